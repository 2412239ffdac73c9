"""
How fast: every number from one process, the rivals in turn, so that ratios survive a noisy machine.

    python paper/bench.py step                   a training step of each variant, beside a plain matrix product
    python paper/bench.py generate               decoding with the KV cache, all variants

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

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from compare import circumstances
from model import VARIANTS, choose_device, ExoFormer, flops_per_token, generate, InputError, variant_config
from prepare_fineweb import Progress, command_line, say, write_meta, write_shard
from train import Trainer, fresh_settings, resolve, to_batch

SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


def in_turn(actions, rounds, device):
    """{name: [seconds of each round]}: every action once a round, after one round that warms up (and compiles)."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds, progress = {name: [] for name in actions}, Progress("measuring", (rounds + 1) * len(actions), "runs")
    for i in range(rounds + 1):
        for j, (name, action) in enumerate(actions.items()):
            wait()
            began = time.perf_counter()
            action()
            wait()
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
    return model


# ------------------------------------------------------------------------------------------------------ 1 training step

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
    batch = to_batch(windows[0], trainers["gated"].tokenizer.eot, config)
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


# ----------------------------------------------------------------------------------------------------------- 2 decoding

def bench_generate(args):
    """Tokens/s of each variant that continues --batch_size rows of one token by --tokens, greedily, with a KV cache."""
    config, actions = resolve(dict(device=args.device, dtype=args.dtype))[1], {}
    idx = torch.zeros(args.batch_size, 1, dtype=torch.long, device=config.device)

    def decode(model):
        with torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            generate(model, idx, args.tokens, temperature=0)

    for variant in dict.fromkeys(["gated", *args.variants]):
        model = ExoFormer(variant_config(variant, **{name: vars(args)[name] for name in SIZES}))
        actions[variant] = functools.partial(decode, disturb(model.to(config.device)))
    seconds = in_turn(actions, args.rounds, config.device)
    print(f"{config.dtype}, {args.batch_size} rows of {args.tokens} new tokens\n"
          f"{'variant':30s}{'tokens/s':>10s}{'time / gated':>14s}")
    for variant, taken in seconds.items():
        print(f"{variant:30s}{args.batch_size * args.tokens / statistics.median(taken):10,.1f}"
              f"{ratio(taken, seconds['gated']):14.3f}")


# ------------------------------------------------------------------------------------------------------- 3 command line

def parse_arguments():
    """The command line; `run` of the result is the benchmark that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sizes = dict(rounds=(5, "measurements of each"), n_layer=(2, "layers; the paper has 29"), n_embd=(1024, "width"),
                 n_head=(16, "heads"), vocab_size=(8192, "vocabulary"), block_size=(512, "longest context"))
    step, decode = commands.add_parser("step", help="a training step"), commands.add_parser("generate", help="decoding")
    for sub, run, variants, dtypes, numbers in (
            (step, bench_step, ["base", "gated", "exo", "exo_dynamic"], ("float32", "bfloat16", "pure_bfloat16"),
             dict(sizes, batch_size=(4, "rows"))),
            (decode, bench_generate, list(VARIANTS), ("float32", "bfloat16"),
             dict(sizes, batch_size=(1, "rows"), tokens=(128, "new tokens")))):
        sub.set_defaults(run=run)
        sub.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="auto: as train.py")
        sub.add_argument("--dtype", default="auto", choices=("auto", *dtypes), help="auto: as train.py on that device")
        sub.add_argument("--variants", nargs="+", default=variants, choices=VARIANTS, metavar="NAME",
                         help=f"rows of Table 3 (default {' '.join(variants)})")
        for flag, (default, what) in numbers.items():
            sub.add_argument(f"--{flag}", type=int, default=default, help=f"{what} (default {default})")
    step.add_argument("--compile", default="auto", choices=("auto", "true", "false"), help="as train.py")
    step.add_argument("--mask_documents", action="store_true", help="attention does not cross documents")
    return parser.parse_args()


def main():
    """Print where and what is measured, then measure."""
    args = parse_arguments()
    say(" | ".join(f"{name} {value}" for name, value in circumstances(choose_device(args.device)).items())
        + f" | load {os.getloadavg()[0]:.1f}")
    args.run(args)


if __name__ == "__main__":
    command_line(main, InputError)
