"""
How fast: every number from one process, the rivals in turn, so that ratios survive a noisy machine.

    python paper/bench.py step                   a training step of four variants, beside a product
    python paper/bench.py generate               decoding with the KV cache, all variants

Say the machine, the torch version, the command and the commit beside any figure you quote; the
first line prints them. All variants have --n_layer layers: a ratio to `gated` is that of equally
deep models.
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
from model import (
    VARIANTS,
    ExoFormer,
    InputError,
    choose_device,
    flops_per_token,
    generate,
    number,
    variant_config,
)
from prepare_fineweb import Progress, command_line, say, write_meta, write_shard
from train import Trainer, fresh_settings, resolve, to_batch

SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


def in_turn(actions, rounds, device):
    """{name: [seconds of each round]}: every action once a round; a first round warms up."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = {name: [] for name in actions}
    progress = Progress("measuring", (rounds + 1) * len(actions), "runs")
    for i in range(rounds + 1):
        for j, (name, action) in enumerate(actions.items()):
            began = time.perf_counter()
            action()
            wait()
            if i > 0:
                seconds[name].append(time.perf_counter() - began)
            progress.update(i * len(actions) + j + 1)
    progress.end()
    return seconds


def ratio(mine, other):
    """Median over the rounds of one action's seconds / another's."""
    return statistics.median(a / b for a, b in zip(mine, other))


@torch.no_grad()
def disturb(model):
    """Move every weight off its start: zero matrices would make zero gradients, perhaps cheaper."""
    for p in model.parameters():
        p.add_(0.02 * torch.randn_like(p))
    return model


def sizes_of(args):
    """The sizes on the command line, as fields of ModelConfig."""
    return {name: vars(args)[name] for name in SIZES}


# ------------------------------------------------------------------------------- 1 training step


def trainer_of(variant, args):
    """What train.py trains a variant with; the shards that it wants to see are never read."""
    given = dict(
        sizes_of(args),
        device=args.device,
        dtype=args.dtype,
        compile={"auto": None, "true": True, "false": False}[args.compile],
        mask_documents=args.mask_documents,
        batch_size=args.batch_size,
        total_batch_size=args.batch_size * args.block_size,
    )
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            tokens = np.zeros(args.block_size + 1, np.uint16)
            write_shard(os.path.join(folder, f"none_{split}_000000.bin"), tokens)
        write_meta(folder, {"tokenizer": "bytes"})
        trainer = Trainer(*fresh_settings(variant, "smoke", dict(given, data=folder)))
    disturb(trainer.model)
    return trainer


def forward_backward(trainer, batch):
    """The gradients of one batch, thrown away."""
    trainer.objective(*batch)[0].backward()
    trainer.model.zero_grad()


def random_windows(args, eot):
    """The tokens of one step, (1, batch, T + 1): random ones, in documents of about 512."""
    shape = (1, args.batch_size, args.block_size + 1)
    windows = np.random.default_rng(0).integers(0, args.vocab_size, shape)
    windows[windows < args.vocab_size // 512] = eot
    return windows


def plain_product(args, config):
    """(action, FLOPs) of the MLP's largest matrix product, repeated: one is too short on a GPU."""
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    tokens = args.batch_size * args.block_size
    a = torch.randn(tokens, args.n_embd, device=config.device, dtype=dtype)
    b = torch.randn(args.n_embd, 4 * args.n_embd, device=config.device, dtype=dtype)
    repeats = 1 if config.device == "cpu" else 100
    return lambda: [a @ b for _ in range(repeats)], repeats * 8 * tokens * args.n_embd**2


def bench_step(args):
    """Forward and backward alone, and a whole training step, of each variant."""
    variants = dict.fromkeys(["gated", *args.variants])
    trainers = {variant: trainer_of(variant, args) for variant in variants}
    config = trainers["gated"].config
    eot = trainers["gated"].tokenizer.eot
    windows = random_windows(args, eot)
    batch = to_batch(windows[0], eot, config)
    actions = {}
    for variant, trainer in trainers.items():
        actions[variant, "pass"] = functools.partial(forward_backward, trainer, batch)
        actions[variant, "step"] = functools.partial(trainer.update, windows)
    actions["product"], flops = plain_product(args, config)
    seconds = in_turn(actions, args.rounds, config.device)
    print_steps(args, trainers, seconds, flops / statistics.median(seconds["product"]))


def print_steps(args, trainers, seconds, product):
    """The table of `bench_step`; product: FLOP/s of the plain matrix product."""
    tokens = args.batch_size * args.block_size
    config = trainers["gated"].config
    how = "compiled" if config.compile else "eager"
    print(
        f"{config.dtype}, {how}, {tokens} tokens a step; a product {tokens} x {args.n_embd} by "
        f"{args.n_embd} x {4 * args.n_embd} in this dtype: {product / 1e9:,.1f} GFLOP/s"
    )
    print(f"{'':20s}|  forward + backward  |  whole step (with clipping and optimizers)")
    print(
        f"{'variant':20s}|      ms    / gated   |"
        "      ms    / gated   tokens/s    GFLOP/s   / product"
    )
    for variant, trainer in trainers.items():
        passes = seconds[variant, "pass"]
        steps = seconds[variant, "step"]
        step = statistics.median(steps)
        flops = flops_per_token(trainer.model, args.block_size) * tokens / step
        pass_ratio = ratio(passes, seconds["gated", "pass"])
        step_ratio = ratio(steps, seconds["gated", "step"])
        print(
            f"{variant:20s}|{1e3 * statistics.median(passes):10.1f}{pass_ratio:9.3f}   |"
            f"{1e3 * step:10.1f}{step_ratio:9.3f}{tokens / step:11,.0f}"
            f"{flops / 1e9:11,.1f}{flops / product:11.2f}"
        )


# ------------------------------------------------------------------------------------ 2 decoding


def bench_generate(args):
    """Tokens/s of each variant that continues rows of one token greedily, with a KV cache."""
    config = resolve(dict(device=args.device, dtype=args.dtype))[1]
    idx = torch.zeros(args.batch_size, 1, dtype=torch.long, device=config.device)
    bfloat16 = config.dtype == "bfloat16"

    def decode(model):
        with torch.autocast(config.device, torch.bfloat16, enabled=bfloat16):
            generate(model, idx, args.tokens, temperature=0)

    actions = {}
    for variant in dict.fromkeys(["gated", *args.variants]):
        model = ExoFormer(variant_config(variant, **sizes_of(args)))
        actions[variant] = functools.partial(decode, disturb(model.to(config.device)))
    seconds = in_turn(actions, args.rounds, config.device)
    print(f"{config.dtype}, {args.batch_size} rows of {args.tokens} new tokens")
    print(f"{'variant':30s}{'tokens/s':>10s}{'time / gated':>14s}")
    for variant, taken in seconds.items():
        rate = args.batch_size * args.tokens / statistics.median(taken)
        print(f"{variant:30s}{rate:10,.1f}{ratio(taken, seconds['gated']):14.3f}")


# -------------------------------------------------------------------------------- 3 command line


def add_common(parser, run, variants, dtypes, batch_size):
    """The flags that both benchmarks have."""
    parser.set_defaults(run=run)
    devices = ("auto", "cuda", "cpu")
    parser.add_argument("--device", default="auto", choices=devices, help="auto: cuda, else cpu")
    dtypes = ("auto", *dtypes)
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="auto: as train.py")
    what = f"rows of Table 3 (default {' '.join(variants)})"
    parser.add_argument(
        "--variants", nargs="+", default=variants, choices=VARIANTS, metavar="NAME", help=what
    )
    for flag, default, what in (
        ("rounds", 5, "measurements of each"),
        ("n_layer", 2, "layers; the paper has 29"),
        ("n_embd", 1024, "width"),
        ("n_head", 16, "heads"),
        ("vocab_size", 8192, "vocabulary"),
        ("block_size", 512, "longest context"),
        ("batch_size", batch_size, "rows"),
    ):
        parser.add_argument(
            f"--{flag}",
            type=number(int, 1, 2**20),
            default=default,
            help=f"{what} (default {default})",
        )


def parse_arguments():
    """The command line; `run` of the result is the benchmark that was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    step = commands.add_parser("step", help="a training step")
    variants = ["base", "gated", "exo", "exo_dynamic"]
    add_common(step, bench_step, variants, ("float32", "bfloat16", "pure_bfloat16"), 4)
    choices = ("auto", "true", "false")
    step.add_argument("--compile", default="auto", choices=choices, help="as train.py")
    what = "attention does not cross documents"
    step.add_argument("--mask_documents", action="store_true", help=what)

    decode = commands.add_parser("generate", help="decoding")
    add_common(decode, bench_generate, list(VARIANTS), ("float32", "bfloat16"), 1)
    decode.add_argument(
        "--tokens", type=number(int, 1, 2**20), default=128, help="new tokens (default 128)"
    )
    return parser.parse_args()


def main():
    """Print where and what is measured, then measure."""
    args = parse_arguments()
    args.device = choose_device(args.device, among=("cuda", "cpu"))
    for name, value in circumstances(args.device).items():
        print(f"{name} {value}", end=" | ")
    say(f"load {os.getloadavg()[0]:.1f}")
    args.run(args)


if __name__ == "__main__":
    command_line(main, InputError)
