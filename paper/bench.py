"""
How fast: every number from one process, the rivals in turn, so that ratios survive a noisy machine.

    python paper/bench.py step                   a training step of each variant, beside a plain matrix product
    python paper/bench.py generate               decoding with the KV cache, all variants
    python paper/bench.py muon                   one Muon step, equal shapes in one batch against a loop
    python paper/bench.py data                   tokenising, beside tiktoken's own batch encoder; and memory
    python paper/bench.py hellaswag --data=FILE  scoring, beside the plain one-item-at-a-time loop

Say the machine, the torch version, the command and the commit beside any figure you quote; the first line prints them.
All variants have --n_layer layers: a ratio to `gated` is that of equally deep models.
"""
import argparse
import functools
import os
import statistics
import sys
import tempfile
import time

import numpy as np
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..")]

import bench_data
import bench_hellaswag
import muon
from compare import circumstances
from model import VARIANTS, ExoFormer, Linear, choose_device, flops_per_token, generate, variant_config
from prepare_fineweb import Progress, command_line, say, write_meta, write_shard
from train import Trainer, fresh_settings, resolve

SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


def synchronise(device):
    """Wait for the device, so that a clock read afterwards counts its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def in_turn(actions, rounds, device):
    """{name: [seconds of each round]}: every action once a round, after one round that warms up (and compiles)."""
    seconds, progress = {name: [] for name in actions}, Progress("measuring", (rounds + 1) * len(actions), "runs")
    for i in range(rounds + 1):
        for j, (name, action) in enumerate(actions.items()):
            synchronise(device)
            began = time.perf_counter()
            action()
            synchronise(device)
            seconds[name] += [time.perf_counter() - began] * (i > 0)
            progress.update(i * len(actions) + j + 1)
    progress.end()
    return seconds


def ratio(mine, other):
    """Median over the rounds of one action's seconds / another's."""
    return statistics.median(a / b for a, b in zip(mine, other))


@torch.no_grad()
def disturb(model):
    """Move every weight off its start: zero matrices would make zero gradients, which may be cheaper."""
    for p in model.parameters():
        p.add_(0.02 * torch.randn_like(p))


def trainer_of(variant, args):
    """What train.py trains a variant with; the shards that it wants to see are never read."""
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            write_shard(os.path.join(folder, f"none_{split}_000000.bin"), np.zeros(args.block_size + 1, np.uint16))
        write_meta(folder, {"tokenizer": "bytes"})
        trainer = Trainer(*fresh_settings(variant, "smoke", dict(
            {name: vars(args)[name] for name in SIZES}, data=folder, device=args.device, dtype=args.dtype,
            compile=args.compile, mask_documents=args.mask_documents, batch_size=args.batch_size,
            total_batch_size=args.batch_size * args.block_size)))
    disturb(trainer.model)
    return trainer


def forward_backward(trainer, batch):
    """The gradients of one batch, thrown away."""
    trainer.objective(*batch)[0].backward()
    trainer.model.zero_grad()


def bench_step(args):
    """Forward and backward alone, and a whole training step, of each variant."""
    trainers = {variant: trainer_of(variant, args) for variant in dict.fromkeys(["gated", *args.variants])}
    config, tokens = trainers["gated"].config, args.batch_size * args.block_size
    windows = np.random.default_rng(0).integers(0, args.vocab_size, (1, args.batch_size, args.block_size + 1))
    windows[windows < args.vocab_size // 512] = trainers["gated"].tokenizer.eot          # documents of about 512 tokens
    batch = torch.from_numpy(windows[0]).to(config.device)
    docs = (batch[:, :-1] == trainers["gated"].tokenizer.eot).cumsum(1) if config.mask_documents else None
    batch = batch[:, :-1].contiguous(), batch[:, 1:].contiguous(), docs
    actions = {}
    for variant, trainer in trainers.items():
        actions[variant, "pass"] = functools.partial(forward_backward, trainer, batch)
        actions[variant, "step"] = functools.partial(trainer.update, windows)
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    a, b = (torch.randn(*shape, device=config.device, dtype=dtype)
            for shape in ((tokens, args.n_embd), (args.n_embd, 4 * args.n_embd)))
    repeats = 1 if config.device == "cpu" else 100                  # a single one is too short for the clock on a GPU
    actions["product"] = lambda: [a @ b for _ in range(repeats)]
    seconds = in_turn(actions, args.rounds, config.device)
    product = repeats * 8 * tokens * args.n_embd ** 2 / statistics.median(seconds["product"])
    print(f"{config.dtype}, {'compiled' if config.compile == 'true' else 'eager'}, {tokens} tokens a step; a product "
          f"{tokens} x {args.n_embd} by {args.n_embd} x {4 * args.n_embd} in this dtype: {product / 1e9:,.1f} GFLOP/s\n"
          f"{'':20s}|  forward + backward  |  whole step (with clipping and optimizers)\n"
          f"{'variant':20s}|      ms    / gated   |      ms    / gated   tokens/s    GFLOP/s   / product")
    for variant, trainer in trainers.items():
        passes, steps = seconds[variant, "pass"], seconds[variant, "step"]
        step = statistics.median(steps)
        flops = flops_per_token(trainer.model, args.block_size) * tokens / step
        print(f"{variant:20s}|{1e3 * statistics.median(passes):10.1f}{ratio(passes, seconds['gated', 'pass']):9.3f}   |"
              f"{1e3 * step:10.1f}{ratio(steps, seconds['gated', 'step']):9.3f}{tokens / step:11,.0f}"
              f"{flops / 1e9:11,.1f}{flops / product:11.2f}")


def bench_generate(args):
    """Tokens/s of each variant that continues --batch_size rows of one token by --tokens, greedily, with a KV cache."""
    config, models = resolve(dict(device=args.device, dtype=args.dtype))[1], {}
    for variant in dict.fromkeys(["gated", *args.variants]):
        torch.manual_seed(0)
        models[variant] = ExoFormer(variant_config(variant, **{name: vars(args)[name] for name in SIZES}))
        disturb(models[variant].to(config.device))
    idx = torch.zeros(args.batch_size, 1, dtype=torch.long, device=config.device)

    def decode(model):
        with torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            generate(model, idx, args.tokens, temperature=0)

    actions = {name: functools.partial(decode, model) for name, model in models.items()}
    seconds = in_turn(actions, args.rounds, config.device)
    print(f"{config.dtype}, {args.batch_size} rows of {args.tokens} new tokens\n"
          f"{'variant':30s}{'tokens/s':>10s}{'time / gated':>14s}")
    for variant, taken in seconds.items():
        print(f"{variant:30s}{args.batch_size * args.tokens / statistics.median(taken):10,.1f}"
              f"{ratio(taken, seconds['gated']):14.3f}")


def bench_muon(args):
    """A Muon step on the shapes of exo: equal shapes in one batch, and one by one."""
    config = resolve(dict(device=args.device, muon_dtype=args.dtype))[1]
    polar = functools.partial(muon.polar_express, dtype=getattr(torch, config.muon_dtype))
    with torch.device("meta"):
        model = ExoFormer(variant_config("exo", n_layer=args.n_layer, n_embd=args.n_embd, n_head=1))
        shapes = [(m.weight.shape, m.parts) for name, m in model.named_modules()
                  if isinstance(m, Linear) and name != "head"]

    def optimizer_step(polar):
        groups = {}
        for shape, parts in shapes:
            p = torch.nn.Parameter(torch.randn(shape, device=config.device))
            p.grad = torch.randn_like(p)
            groups.setdefault(parts, []).append(p)
        return muon.Muon([dict(params=params, parts=parts) for parts, params in groups.items()], polar=polar).step

    seconds = in_turn({"batched": optimizer_step(polar), "loop": optimizer_step(
        lambda matrices: torch.cat([polar(matrix[None]) for matrix in matrices]))}, args.rounds, config.device)
    print(f"{config.muon_dtype}, {sum(parts for _, parts in shapes)} matrices of {args.n_layer} layers: "
          f"batched {statistics.median(seconds['batched']):.3f} s, loop {statistics.median(seconds['loop']):.3f} s, "
          f"loop / batched {ratio(seconds['loop'], seconds['batched']):.2f}")


def add_parser(commands, name, run, text, dtypes, defaults):
    """A sub-command of this file. defaults: {flag: (default, help)} of its whole numbers."""
    parser = commands.add_parser(name, help=text)
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="auto: as train.py")
    parser.add_argument("--dtype", default="auto", choices=("auto", *dtypes), help="auto: as train.py on that device")
    for flag, (default, what) in defaults.items():
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"{what} (default {default})")
    parser.set_defaults(run=run)
    return parser


def parse_arguments():
    """The command line; `run` of the result is the benchmark that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sizes = dict(n_layer=(2, "layers; the paper has 29"), n_embd=(1024, "width"), rounds=(5, "measurements of each"))
    more = dict(sizes, n_head=(16, "heads"), vocab_size=(8192, "vocabulary"), block_size=(512, "longest context"))
    step = add_parser(commands, "step", bench_step, "a training step of each variant",
                      ("float32", "bfloat16", "pure_bfloat16"), dict(more, batch_size=(4, "rows")))
    step.add_argument("--compile", default="auto", choices=("auto", "true", "false"), help="as train.py")
    step.add_argument("--mask_documents", action="store_true", help="attention does not cross documents")
    decode = add_parser(commands, "generate", bench_generate, "decoding with the KV cache", ("float32", "bfloat16"),
                        dict(more, batch_size=(1, "rows"), tokens=(128, "new tokens")))
    for command, variants in ((step, ["base", "gated", "exo", "exo_dynamic"]), (decode, list(VARIANTS))):
        command.add_argument("--variants", nargs="+", default=variants, choices=VARIANTS, metavar="NAME",
                             help=f"rows of Table 3 (default {' '.join(variants)})")
    add_parser(commands, "muon", bench_muon, "one Muon step, batched against a loop", ("float32", "bfloat16"), sizes)
    bench_data.add_data_parser(commands)
    bench_hellaswag.add_hellaswag_parser(commands)
    return parser.parse_args()


def main():
    """Print where and what is measured, then measure."""
    args = parse_arguments()
    device = choose_device(vars(args).get("device", "cpu"))                       # tokenising and scoring: on the CPU
    say(" | ".join(f"{name} {value}" for name, value in circumstances(device).items())
        + f" | load {os.getloadavg()[0]:.1f}")
    args.run(args)


if __name__ == "__main__":
    command_line(main)
