"""
Train several variants with several seeds at one size on one data folder, and put the results into
one table.

    python paper/sweep.py --dry_run                          what would run, and how long
    python paper/sweep.py --setting=quarter_hour             six variants, one seed, on a CPU
    python paper/sweep.py --setting=overnight --data=DIR     six variants, three seeds
    python paper/sweep.py --ablation=lambda_init             a question that the paper leaves open
    python paper/sweep.py --variants=base,exo --seeds=1,2 -- --n_layer=20 --max_steps=500
                                                             flags of train.py after --

Each run is a `python train.py` in OUT_DIR/NAME. The same command again goes on where it stopped:
runs that finished or diverged are skipped, a stopped one is resumed, and an ablation takes the runs
that another sweep left in OUT_DIR. After every run OUT_DIR gets variants.md, .png and .jsonl, or
those of the ablation's name: table, curves and all runs of the sweep that have ended. compare.py
makes the first two again from the last, which is small and meant to be kept.

The last evaluation of a run reads the whole held-out part, those before it 65,536 tokens. Of a
large held-out part that takes long: --dry_run counts it, and -- --final_eval_tokens=N bounds it.

Sizes are matched as in the paper: --n_layer counts layers with the gate, and a variant without it
gets 1.1 times as many (32 for 29), since its layer has 10 C^2 weights instead of 11; that comes out
even for multiples of 10. Exogenous anchors are 4 C^2 weights on top, which is 1.25 % of the
matrices of the paper's 29 layers but 3.6 % of those of 10: see the column of parameters.
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
from dataclasses import dataclass, replace

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..")]

import compare
from figures import draw_curves
from model import VARIANTS, ExoFormer, InputError, checkpoints_in, flops_per_token
from prepare_fineweb import (
    UserError,
    atomic_write,
    clock,
    command_line,
    find_shards,
    locked,
    say,
    shard_tokens,
)
from train import fresh_settings, parse_flags

TRAIN = [sys.executable, os.path.join(HERE, "..", "train.py")]

# ------------------------------------------------------------------------------------------ 1 what

SIX = ["base", "gated", "resformer", "nuresformer", "exo", "exo_dynamic"]

SETTINGS = {  # (seeds, train.py flags on top of --preset=smoke)
    "quarter_hour": (
        [1],
        dict(
            n_layer=10,
            n_head=2,
            n_embd=64,
            max_steps=300,
            eval_every=30,
            eval_tokens=65536,
            final_eval_tokens=0,
            save_every=100,
            sample_tokens=0,
        ),
    ),
    "overnight": (
        [1, 2, 3],
        dict(
            n_layer=10,
            n_head=4,
            n_embd=128,
            batch_size=4,
            total_batch_size=4096,
            max_steps=500,
            warmup_steps=40,
            eval_every=50,
            eval_tokens=65536,
            final_eval_tokens=0,
            save_every=100,
            log_every=50,
            sample_tokens=0,
            dtype="float32",
            compile=True,
        ),
    ),
}

ADAMW = [dict(optimizer="adamw", adamw_lr=rate) for rate in (0.001, 0.003, 0.01, 0.03)]
NORMED = [dict(anchor_norm=letters) for letters in ("", "q", "k", "v", "g", "qk", "vg")]
MIXED = [
    dict(mix=letters, anchor_norm=letters)
    for letters in ("q", "k", "v", "g", "qk", "vg", "qkv", "kvg")
]
STARTS = [dict(lambda_init=value) for value in (0.0, 0.25, 1.0)]
UNNORMED = [{}, dict(anchor_norm="vg"), dict(qk_norm=False), dict(qk_norm=False, anchor_norm="vg")]
RATES = [{}, dict(muon_lr=0.03), dict(muon_lr=0.1)]
POSITIONS = [{}, dict(norm_position="after"), dict(norm_position="both")]
WINDOWS = [{}, dict(window=64), dict(window=16)]


def each(variants, changes):
    """[(variant, the flags that change)]: every change of every variant."""
    return [(variant, change) for variant in variants for change in changes]


ABLATIONS = {  # questions the paper leaves open; where no flags change is the paper's own way
    "optimizer": each(["gated", "exo"], [{}, *ADAMW]),
    "lambda_init": each(["exo"], [{}, *STARTS]),
    "anchor_norm": each(["exo"], [{}, *NORMED]),
    "mix": each(["exo"], [{}, *MIXED]),
    "qk_norm": each(
        ["exo", "nuresformer"], [{**rate, **change} for rate in RATES for change in UNNORMED]
    ),
    "norm_position": each(["base", "gated", "exo"], POSITIONS),
    "window": each(["gated", "exo"], WINDOWS),
    "internal": [
        ("nuresformer", {}),
        ("nuresformer", dict(dynamic=True)),
        ("exo", {}),
        ("exo_dynamic", {}),
    ],
}


@dataclass(frozen=True)
class Job:
    """
    One run of the sweep.

    change: what its name tells; settings: all that train.py gets but variant and folder.
    """

    variant: str
    change: dict
    settings: dict
    out_dir: str

    @property
    def name(self):
        shown = {name: "none" if value == "" else value for name, value in self.change.items()}
        changed = [f"{name}={value}" for name, value in shown.items()]
        return "-".join([self.variant, *changed, f"seed{self.settings['seed']}"])

    @property
    def folder(self):
        return os.path.join(self.out_dir, self.name)

    def command(self, **other):
        """The command line that starts this run, with settings replaced or added by `other`."""
        fixed = {"variant": self.variant, "preset": "smoke", "out_dir": self.folder}
        settings = {**fixed, **self.settings, **other}
        return TRAIN + [f"--{name}={as_flag(value)}" for name, value in settings.items()]

    def configs(self):
        """(ModelConfig, TrainConfig) as train.py resolves them; an error for what it refuses."""
        return fresh_settings(self.variant, "smoke", {**self.settings, "out_dir": self.folder})

    def state(self):
        """ "new", "stopped" (a checkpoint can be resumed), "finished" or "diverged"."""
        records = self.log()
        last = records[-1] if records else {}
        if "diverged" in last:
            return "diverged"
        if "val_loss" in last and last["step"] >= self.settings["max_steps"]:
            return "finished"
        return "stopped" if checkpoints_in(self.folder) else "new"

    def log(self):
        """The records of its log so far."""
        there = os.path.exists(os.path.join(self.folder, "log.jsonl"))
        return compare.read_log(self.folder) if there else []


def as_flag(value):
    """A value as train.py's command line spells it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


# ------------------------------------------------------------------------------------------ 2 plan


def layers_of(variant, n_layer):
    """Layers of `variant` with the parameters of n_layer gated ones, as in Table 3: 32 for 29."""
    return n_layer if VARIANTS[variant]["gate"] else round(1.1 * n_layer)


def plan(args):
    """
    [Job] that the command line asks for, all experiments with the first seed first, so that a sweep
    that is cut short can be read. An error for what train.py would refuse, or for another run in a
    job's folder.
    """
    seeds, flags = SETTINGS[args.setting]
    flags = {**flags, **flags_given(args.train_flags)}
    flags["data"] = args.data or fresh_settings("base", "smoke", {})[1].data
    experiments = each(args.variants, [{}])
    if args.ablation:
        experiments = ABLATIONS[args.ablation]
    out_dir = args.out_dir or f"out/sweep-{args.setting}"  # one for all: no run is made twice
    jobs = []
    for seed in args.seeds or seeds:
        for variant, change in experiments:
            settings = {**flags, **change, "seed": seed}
            settings["n_layer"] = layers_of(variant, flags["n_layer"])
            jobs.append(Job(variant, change, settings, out_dir))
    planned = {}
    for job in jobs:  # before the first run, not between two
        check_same(job)
        model_config, config = job.configs()
        twin = planned.setdefault((model_config, replace(config, out_dir="")), job)
        if twin is not job:
            raise UserError(
                f"{twin.name} and {job.name} would be one experiment; drop a flag after --"
            )
    return jobs


def flags_given(train_flags):
    """{setting: value} of the flags after --. UserError for one that the sweep sets itself."""
    variant, preset, given = parse_flags(train_flags)
    ours = [name for name in ("seed", "out_dir", "data", "resume") if name in given]
    if variant:
        ours.append("variant")
    if preset:
        ours.append("preset")
    if ours:
        raise UserError(
            f"-- --{ours[0]}: the sweep sets it itself; see --variants, --seeds, --data and "
            "--out_dir"
        )
    return given


def check_same(job):
    """UserError if the run in the job's folder was begun with other settings than it has now."""
    model_config, config = job.configs()
    old = compare.settings_of(compare.read_state(job.folder))
    new = {**vars(model_config), **vars(config)}
    for name in sorted(set(old) & set(new) - compare.NOT_THE_EXPERIMENT):
        if old[name] != new[name]:
            raise UserError(
                f"{job.folder} holds a run with {name}={old[name]}, but now {name}={new[name]}: "
                "choose another --out_dir, or remove that run"
            )


# --------------------------------------------------------------------------------------- 3 running


def run(jobs, name):
    """Do every run that has not ended and tabulate after each; 0, or the exit code that ended."""
    todo = [job for job in jobs if job.state() in ("new", "stopped")]
    began = time.monotonic()
    for i, job in enumerate(todo):
        state = job.state()
        spent = time.monotonic() - began
        left = f", about {clock(spent / i * (len(todo) - i))} left" if i else ""
        number = len(jobs) - len(todo) + i + 1
        say(f"=== run {number} of {len(jobs)}: {job.name} ({state}); {clock(spent)} so far{left}")
        code = run_to_end(job.command(**({"resume": True} if state == "stopped" else {})))
        if code == 3:  # train.py: not finite
            remember_divergence(job)
        elif code:
            return say_why(job, code)
        tabulate(jobs, name)
    return 0


def run_to_end(command):
    """Exit code of `command`; signals that ask to stop are passed on, so that train.py saves."""
    # in a session of its own, or Ctrl-C would reach it twice, which ends it unsaved
    child = subprocess.Popen(command, start_new_session=True)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def pass_on(number, frame):
        child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say_why(job, code):
    """Say that a run did not end well; the exit code for it, where a signal is 128 + its number."""
    if code < 0 or code > 128:
        say(f"sweep.py: {job.name} was stopped; the same command goes on from there")
    else:
        say(f"sweep.py: {job.name} failed with exit code {code}; its last line says why")
    return code if code > 0 else 128 - code


def remember_divergence(job):
    """Put it into the log, where Job.state and compare.py look; --resume would cut it off again."""
    last = job.log()[-1]
    record = dict(step=last["step"], tokens=last["tokens"], diverged=True)
    with open(os.path.join(job.folder, "log.jsonl"), "a", encoding="utf-8") as log:
        log.write(json.dumps(record) + "\n")


def tabulate(jobs, name):
    """Write NAME.jsonl, .md and .png of the runs that have ended; the lines of the table."""
    ended = [job for job in jobs if job.state() in ("finished", "diverged")]
    missing = [f"NOT FINISHED: {job.name}" for job in jobs if job not in ended]
    if not ended:
        return missing
    runs = [compare.read_run(job.folder) for job in ended]
    groups, lines = compare.summarise(runs)
    path = os.path.join(jobs[0].out_dir, name)
    compare.write_runs(runs, f"{path}.jsonl")
    with atomic_write(f"{path}.md") as file:
        file.write("\n".join([*lines, *missing, ""]).encode())
    try:
        draw_curves(groups, f"{path}.png")
    except UserError as error:  # no matplotlib: the table stands alone
        say(f"no {name}.png: {error}")
    return lines + missing


# ---------------------------------------------------------------------------------------- 4 timing


def dry_run(jobs):
    """Print the plan with the time each run should take, by FLOPs from a few steps of the first."""
    todo = [job for job in jobs if job.state() in ("new", "stopped")]
    if not todo:
        return say("every run has ended")
    say(f"measuring a few steps of {todo[0].name} ...")
    speed, start = measure(todo[0])
    total = 0
    for job in jobs:
        seconds = start + flops_to_come(job) / speed if job in todo else 0
        total += seconds
        say(f"{job.name:44s} {job.state():9s} {clock(seconds)}")
    say(
        f"{len(todo)} of {len(jobs)} runs to do, about {clock(total)} in all, "
        "if the machine stays as busy as now"
    )


def measure(job, steps=6):
    """(FLOP/s, seconds of starting up) of a job, from a few steps of it in a temporary folder."""
    model_config, config = job.configs()
    with tempfile.TemporaryDirectory() as folder:
        out_dir = os.path.join(folder, "run")
        command = job.command(
            out_dir=out_dir,
            max_steps=steps,
            eval_every=0,
            save_every=0,
            sample_tokens=0,
            eval_tokens=model_config.block_size,
            final_eval_tokens=model_config.block_size,
        )
        began = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True)
        wall = time.monotonic() - began
        if done.returncode:
            why = (done.stderr or done.stdout).strip().splitlines()[-1]
            raise UserError(f"{job.name}: a trial of {steps} steps failed: {why}")
        seconds = [record["ms"] / 1000 for record in compare.read_log(out_dir) if "ms" in record]
    step = statistics.median(seconds[steps // 2 :])
    start = wall - steps * step  # with what the first steps take to compile
    say(
        f"{step * 1000:.0f} ms per step of {config.total_batch_size} tokens, {start:.1f} s to "
        f"start, {torch.get_num_threads()} threads"
    )
    return flops_of(job, config.total_batch_size) / step, start


def flops_of(job, tokens):
    """FLOPs of training on `tokens`."""
    model_config = job.configs()[0]
    with torch.device("meta"):
        return flops_per_token(ExoFormer(model_config), model_config.block_size) * tokens


def flops_to_come(job):
    """FLOPs of what is left of a job; without a backward pass an evaluation costs a third."""
    config = job.configs()[1]
    done = 0
    if job.state() != "new":
        done = max((record["step"] for record in job.log()), default=0)
    steps = config.max_steps - done
    held_out = sum(map(shard_tokens, find_shards(config.data, "val")))
    evaluated = min(config.final_eval_tokens or held_out, held_out)
    if config.eval_every:
        each_time = min(config.eval_tokens or held_out, held_out)
        evaluated += each_time * (steps // config.eval_every + 1)
    return flops_of(job, steps * config.total_batch_size + evaluated / 3)


# ------------------------------------------------------------------------------------------ 5 main


def variants_in(text):
    """An argparse type: variants separated by commas, or "all"."""
    names = list(VARIANTS) if text == "all" else list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in VARIANTS:
            raise argparse.ArgumentTypeError(f"unknown {name!r}; there are {', '.join(VARIANTS)}")
    return names


def seeds_in(text):
    """An argparse type: whole numbers separated by commas, each once."""
    try:
        return list(dict.fromkeys(map(int, text.split(","))))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers and commas") from None


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--setting",
        choices=SETTINGS,
        default="quarter_hour",
        help="size, tokens and seeds (default: quarter_hour)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--variants",
        type=variants_in,
        default=SIX,
        help=f"rows of Table 3, by commas, or all (default: {','.join(SIX)})",
    )
    what.add_argument(
        "--ablation", choices=ABLATIONS, help="instead of --variants: one setting in several ways"
    )
    parser.add_argument("--seeds", type=seeds_in, help="by commas (default: the setting's)")
    parser.add_argument(
        "--data",
        default="",
        help="folder of token shards (default: train.py's, Python's own sources byte by byte)",
    )
    parser.add_argument(
        "--out_dir", default="", help="folder of the runs and tables (default: out/sweep-SETTING)"
    )
    parser.add_argument("--dry_run", action="store_true", help="print what would run and how long")
    parser.add_argument(
        "train_flags",
        nargs="*",
        metavar="-- FLAG",
        help="flags of train.py, which override the setting's",
    )
    return parser.parse_args()


def main():
    """Exit code: 0, or that of a run that was stopped or failed."""
    args = parse_arguments()
    jobs = plan(args)
    if args.dry_run:
        return dry_run(jobs)
    name = args.ablation or "variants"
    with locked(jobs[0].out_dir):
        code = run(jobs, name)
        say("\n".join(tabulate(jobs, name)))
    return code


if __name__ == "__main__":
    command_line(main, InputError)
