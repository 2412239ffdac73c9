"""
Train several variants with several seeds at one size on one data folder, and put the results into one table.

    python paper/sweep.py --dry_run                          what would run, and how long from a measured step
    python paper/sweep.py --setting=quarter_hour             six variants, one seed, on a CPU
    python paper/sweep.py --setting=overnight --data=DIR     six variants, three seeds
    python paper/sweep.py --ablation=lambda_init             one of the questions the paper leaves open
    python paper/sweep.py --variants=base,exo --seeds=1,2 -- --n_layer=20 --max_steps=500     flags of train.py after --

Each run is a `python train.py` in OUT_DIR/NAME. The same command again goes on where it stopped: finished runs are
skipped, a stopped one is resumed. After every run OUT_DIR gets table.md, table.json and curves.png of all that have
finished, as compare.py makes them, and usage.png, as usage.py makes it.

Sizes are matched as in the paper: --n_layer counts layers with the gate, and a variant without it gets 1.1 times as
many (32 for 29), since its layer has 10 C^2 weights instead of 11; that comes out even for multiples of 10. Exogenous
anchors are 4 C^2 weights on top, which is 0.9 % of the paper's 29 layers but 4 % of 10: see the column of parameters.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..")]

import compare
import usage
from model import VARIANTS, ExoFormer, count_parameters, flops_per_token
from prepare_fineweb import UserError, atomic_write, find_shards, locked, shard_tokens
from train import RunFolder, choose_data, clock, fresh_settings, parse_flags

TRAIN = [sys.executable, os.path.join(HERE, "..", "train.py")]

# --------------------------------------------------------------------------------------------------------------- 1 plan

SIX = ["base", "gated", "resformer", "nuresformer", "exo", "exo_dynamic"]

SETTINGS = {  # (seeds, train.py flags on top of --preset=smoke); every evaluation reads the same tokens
    "quarter_hour": ([1], dict(n_layer=10, n_head=2, n_embd=64, max_steps=300, eval_every=30, eval_tokens=65536,
                               final_eval_tokens=65536, save_every=100, sample_tokens=0)),
    "overnight": ([1, 2, 3], dict(n_layer=10, n_head=4, n_embd=128, max_steps=1500, warmup_steps=50, eval_every=75,
                                  eval_tokens=131072, final_eval_tokens=131072, save_every=250, log_every=50,
                                  sample_tokens=0)),
}

ABLATIONS = {  # questions the paper leaves open: (variant, the flags that change); the first is the paper's way
    "optimizer": [(variant, dict(optimizer=name)) for variant in ("base", "exo_dynamic") for name in ("muon", "adamw")],
    "lambda_init": [("exo", dict(lambda_init=value)) for value in (0.5, 0.0, 0.25, 1.0)],
    "anchor_norm": [("exo", dict(anchor_norm=letters)) for letters in ("qkvg", "", "q", "k", "v", "g", "qk", "vg")],
    "norm_position": [(variant, dict(norm_position=place)) for variant in ("base", "exo") for place in ("pre", "post")],
}


@dataclass(frozen=True)
class Job:
    """One run of the sweep. flags: all that train.py is given but the variant and the folder."""

    variant: str
    change: tuple
    flags: tuple
    out_dir: str

    @property
    def settings(self):
        return dict(self.flags)

    @property
    def name(self):
        changed = "".join(f"-{name}={'none' if value == '' else value}" for name, value in self.change)
        return f"{self.variant}{changed}-seed{self.settings['seed']}"

    @property
    def folder(self):
        return os.path.join(self.out_dir, self.name)

    def command(self, **other):
        """The command line that starts this run, with settings replaced or added by `other`."""
        settings = {"variant": self.variant, "preset": "smoke", "out_dir": self.folder, **self.settings, **other}
        return TRAIN + [
            f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in settings.items()
        ]


def layers_of(variant, n_layer):
    """Layers of `variant` that have the parameters of n_layer gated ones, by the rule of Table 3: 32 for 29."""
    return n_layer if VARIANTS[variant]["gate"] else round(1.1 * n_layer)


def make_jobs(experiments, seeds, flags, out_dir):
    """[Job], all experiments with the first seed first, so that a sweep that is cut short can be read."""
    jobs = []
    for seed in seeds:
        for variant, change in experiments:
            settings = {**flags, **change, "seed": seed, "n_layer": layers_of(variant, flags["n_layer"])}
            jobs.append(Job(variant, tuple(change.items()), tuple(settings.items()), out_dir))
    return jobs


def plan(args):
    """The sweep that the command line asks for. UserError or UserError for what train.py would refuse."""
    seeds, flags = SETTINGS[args.setting]
    variant, preset, given = parse_flags(args.train_flags)
    ours = [name for name in ("seed", "out_dir", "data", "resume") if name in given]
    ours += [name for name, value in (("variant", variant), ("preset", preset)) if value]
    if ours:
        raise UserError(f"-- --{ours[0]}: the sweep sets it itself; see --variants, --seeds, --data and --out_dir")
    flags = {**flags, **given, "data": args.data or choose_data("smoke")}
    experiments = ABLATIONS[args.ablation] if args.ablation else [(variant, {}) for variant in args.variants]
    out_dir = args.out_dir or f"out/sweep-{args.setting}" + (f"-{args.ablation}" if args.ablation else "")
    return make_jobs(experiments, args.seeds or seeds, flags, out_dir)


def last_record(folder):
    """The last whole record of folder/log.jsonl, {} where there is none."""
    try:
        with open(os.path.join(folder, "log.jsonl")) as file:
            return json.loads((file.read().rpartition("\n")[0].rpartition("\n")[2]) or "{}")
    except (OSError, ValueError):
        return {}


def state_of(job):
    """ "finished", "stopped" (can be resumed) or "new"."""
    record = last_record(job.folder)
    saved = os.path.isdir(job.folder) and any(
        name.startswith("ckpt_") and name.endswith(".pt") for name in os.listdir(job.folder)
    )
    if saved and "val_loss" in record and record["step"] >= job.settings["max_steps"]:
        return "finished"
    return "stopped" if saved else "new"


def check_same(job):
    """UserError if the run in the job's folder was begun with other settings than the job has now."""
    model_config, config = configs_of(job)
    old, new = compare.read_settings(job.folder), {**vars(model_config), **vars(config)}
    for name in sorted(set(old) & set(new) - compare.NOT_THE_EXPERIMENT):
        if old[name] != new[name]:
            raise UserError(f"{job.folder} holds a run with {name}={old[name]}, but now {name}={new[name]}: "
                             "choose another --out_dir, or remove that run")


# ------------------------------------------------------------------------------------------------------------- 2 timing


def configs_of(job):
    """(ModelConfig, TrainConfig) as train.py will resolve them."""
    return fresh_settings(job.variant, "smoke", {**job.settings, "out_dir": job.folder})


def measure(job, steps=6):
    """(seconds of a step, seconds of starting up) of a job, from a few steps of it in a temporary folder."""
    model_config, config = configs_of(job)
    with tempfile.TemporaryDirectory() as folder:
        command = job.command(out_dir=os.path.join(folder, "run"), max_steps=steps, eval_every=0, save_every=0,
                              sample_tokens=0, eval_tokens=model_config.block_size,
                              final_eval_tokens=model_config.block_size, compile=config.compile)
        began = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True)
        wall = time.monotonic() - began
        if done.returncode:
            raise UserError(
                f"{job.name}: a trial of {steps} steps failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}"
            )
        seconds = [record["ms"] / 1000 for record in compare.read_log(os.path.join(folder, "run")) if "ms" in record]
    return statistics.median(seconds[steps // 2 :]), wall - sum(seconds)


def cost_of(job):
    """(parameters, FLOPs per training token, training tokens still to come, tokens of their evaluations)."""
    model_config, config = configs_of(job)
    with torch.device("meta"):
        model = ExoFormer(model_config)
    steps = config.max_steps - (last_record(job.folder).get("step", 0) if state_of(job) != "new" else 0)
    held_out = sum(shard_tokens(path) for path in find_shards(config.data, "val"))
    evaluated = min(config.eval_tokens or held_out, held_out) * (
        1 + steps // config.eval_every if config.eval_every else 1
    )
    return (count_parameters(model), flops_per_token(model, model_config.block_size), steps * config.total_batch_size,
            evaluated + min(config.final_eval_tokens or held_out, held_out))


def seconds_of(cost, measured, measured_cost, tokens_per_step):
    """Estimated seconds of a run: a step costs by its FLOPs, an evaluated token a third of a trained one."""
    step, start = measured
    per_token = step / tokens_per_step * cost[1] / measured_cost[1]
    return start + per_token * (cost[2] + cost[3] / 3)


def dry_run(jobs):
    """Print the plan with the time each run should take, scaled by FLOPs from a few steps of the first one to come."""
    todo = [job for job in jobs if state_of(job) != "finished"]
    if not todo:
        print("every run is finished")
        return
    print(f"measuring a few steps of {todo[0].name} ...", flush=True)
    measured, reference = measure(todo[0]), cost_of(todo[0])
    tokens_per_step, total = configs_of(todo[0])[1].total_batch_size, 0
    print(f"{measured[0] * 1000:.0f} ms per step of {tokens_per_step} tokens, {measured[1]:.1f} s to start, "
          f"{torch.get_num_threads()} threads")
    for job in jobs:
        state, cost = state_of(job), cost_of(job)
        seconds = 0 if state == "finished" else seconds_of(cost, measured, reference, tokens_per_step)
        total += seconds
        print(f"{job.name:44s} {state:9s} {cost[0]:>12,} parameters, {cost[2] if seconds else 0:>13,} tokens to train, "
              f"{clock(seconds)}")
    print(f"{len(todo)} of {len(jobs)} runs to do, about {clock(total)} in all, if the machine stays as busy as now")


# ------------------------------------------------------------------------------------------------------------ 3 running


def run_to_end(command):
    """Exit code of `command`; SIGINT and SIGTERM are passed on to it, so that train.py saves before it ends."""
    child = subprocess.Popen(command, start_new_session=True)  # or Ctrl-C would reach it twice, which ends it unsaved
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: child.send_signal(signal.SIGTERM)) for number in numbers]
    try:
        return child.wait()
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def forget(job):
    """Remove the log of a run that was killed before its first checkpoint. UserError if the run still lives."""
    folder = RunFolder(job.folder, resume=True)
    os.remove(folder.log_path)
    folder.lock.close()


def train(job):
    """Start or resume one run; its exit code."""
    state = state_of(job)
    if state == "new" and os.path.exists(os.path.join(job.folder, "log.jsonl")):
        forget(job)
    return run_to_end(job.command(**({"resume": True} if state == "stopped" else {})))


def run(jobs):
    """Do every run that is not finished. Returns the names of those that diverged; SystemExit when one was stopped."""
    todo, began, diverged = [job for job in jobs if state_of(job) != "finished"], time.monotonic(), []
    for i, job in enumerate(todo):
        spent = time.monotonic() - began
        left = f", about {clock(spent / i * (len(todo) - i))} left" if i else ""
        print(f"=== run {len(jobs) - len(todo) + i + 1} of {len(jobs)}: {job.name} ({state_of(job)}); "
              f"{clock(spent)} so far{left}", flush=True)
        code = train(job)
        if code == 3:
            diverged.append(job.name)
        elif code:
            tabulate(jobs, diverged)
            what = ("was stopped; the same command goes on from there" if code < 0 or code > 128 else
                    f"failed with exit code {code}; its last line says why")
            print(f"sweep.py: {job.name} {what}", file=sys.stderr)
            sys.exit(code if code > 0 else 128 - code)
        tabulate(jobs, diverged)
    return diverged


def tabulate(jobs, diverged=()):
    """Write table.md, table.json, curves.png and usage.png of the finished runs; returns the lines of the table."""
    finished = [job for job in jobs if state_of(job) == "finished"]
    missing = [f"diverged: {name}" for name in diverged]
    missing += [f"not finished: {job.name}" for job in jobs if job not in finished and job.name not in diverged]
    if not finished:
        return missing
    groups, base, rows, remarks = compare.summarise([job.folder for job in finished])
    lines = compare.markdown(rows) + [""] + remarks + missing
    paths = [os.path.join(jobs[0].out_dir, name) for name in ("table.md", "table.json", "curves.png", "usage.png")]
    compare.write(groups, base, rows, remarks + missing, paths[1], paths[2] if compare.can_draw() else "")
    with atomic_write(paths[0]) as file:
        file.write("\n".join(lines + [""]).encode())
    if compare.can_draw():
        usage.draw(groups, [usage.usage_of_group(group) for group in groups], paths[3])
    return lines


def names_in(known):
    """An argparse type: names separated by commas, all of them among `known`."""

    def parse(text):
        unknown = [name for name in text.split(",") if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {unknown[0]!r}; there are {', '.join(known)}")
        return text.split(",")

    return parse


def seeds_in(text):
    """An argparse type: whole numbers separated by commas, each once."""
    seeds = text.split(",")
    if not all(seed.isdecimal() for seed in seeds) or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different whole numbers like 1,2,3")
    return list(map(int, seeds))


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--setting", choices=SETTINGS, default="quarter_hour",
                        help="size, tokens and seeds (default: quarter_hour)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--variants", type=names_in(VARIANTS), default=SIX,
                      help=f"rows of Table 3, by commas (default: {','.join(SIX)})")
    what.add_argument("--ablation", choices=ABLATIONS, help="instead of --variants, one variant with a setting changed")
    parser.add_argument("--seeds", type=seeds_in, help="by commas (default: the setting's)")
    parser.add_argument("--data", default="",
                        help="folder of token shards (default: train.py's, Python's own sources byte by byte)")
    parser.add_argument("--out_dir", default="",
                        help="folder of the runs and the table (default: out/sweep-SETTING[-ABLATION])")
    parser.add_argument("--dry_run", action="store_true", help="train nothing; print what would run and how long")
    parser.add_argument("train_flags", nargs="*", metavar="-- FLAG",
                        help="flags of train.py, which override the setting's")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    try:
        jobs = plan(args)
        if args.dry_run:
            return dry_run(jobs)
        with locked(jobs[0].out_dir):
            for job in jobs:                               # what cannot be is refused before the first run
                check_same(job)
            diverged = run(jobs)
            print("\n".join(tabulate(jobs, diverged)))
    except (UserError, OSError) as error:
        sys.exit(f"sweep.py: {error}")


if __name__ == "__main__":
    main()
