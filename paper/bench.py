"""
How fast and how large: every number from one process, interleaved, so that ratios survive a noisy machine.

    python paper/bench.py model [--variants base gated exo exo_dynamic] [--device cpu|cuda]
    python paper/bench.py muon                   one Muon step over the paper's 29-layer shapes, batched against a loop
    python paper/bench.py data                   tokenising, beside tiktoken's own batch encoder; and memory
    python paper/bench.py hellaswag --data=FILE  scoring, beside the plain one-item-at-a-time loop

Say the machine, the torch version, the command and the commit beside any figure you quote; the first line prints them.
"""
import argparse
import math
import os
import platform
import statistics
import subprocess
import sys
import time

import torch

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, ROOT)

import bench_data
import bench_hellaswag
import muon
import train as T
from model import ExoFormer, flops_per_token, variant_config
from prepare_fineweb import UserError


def print_circumstances(device):
    """Machine, versions and commit: what a figure means nothing without."""
    describe = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    processor = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
                     platform.processor())
    where = torch.cuda.get_device_name() if device == "cuda" else f"{processor}, {torch.get_num_threads()} threads"
    print(f"{where} | torch {torch.__version__} | commit {commit} | load {os.getloadavg()[0]:.1f} | "
          f"{' '.join(sys.argv)}", flush=True)


def synchronise(device):
    """Wait for the device, so that a clock read afterwards counts its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(action, device):
    """Wall time of one call."""
    synchronise(device)
    began = time.perf_counter()
    action()
    synchronise(device)
    return time.perf_counter() - began


def matmul_flops(device, dtype, n=2048):
    """FLOP/s of an n x n matrix product here and now: what MFU is relative to."""
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n ** 3 / min(seconds_of(lambda: a @ b, device) for _ in range(8))


class Contender:
    """One variant, compiled, with its optimizers and one fixed batch."""

    def __init__(self, variant, args):
        sizes = {name: vars(args)[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
        self.config = T.TrainConfig(device=args.device, dtype=args.dtype, deterministic="false",
                                    compile=str(args.compile).lower())
        self.model = T.build_model(variant_config(variant, **sizes), self.config)
        with torch.no_grad():                              # zero heads would make zero gradients, which may be cheaper
            for p in self.model.parameters():
                p.add_(0.02 * torch.randn_like(p))
        self.optimizers = T.build_optimizers(self.model, self.config)
        self.objective = T.Objective(self.model, self.config)
        if args.compile:
            self.objective.compile(fullgraph=True, dynamic=False, options=T.COMPILE_OPTIONS[args.device])
        shape = (2, args.batch_size, args.block_size)
        self.idx, self.targets = torch.randint(args.vocab_size, shape, device=args.device)
        self.docs = (self.idx < args.vocab_size // 512).cumsum(1) if args.mask_documents else None

    def forward_backward(self):
        self.objective(self.idx, self.targets, self.docs)[0].backward()

    def optimizer_step(self):
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def bench_model(args):
    """Forward + backward and optimizer step of each variant, interleaved; medians of paired ratios to `gated`."""
    contenders = {variant: Contender(variant, args) for variant in dict.fromkeys(["gated", *args.variants])}
    tokens, peak_bytes = args.batch_size * args.block_size, {}
    for variant, contender in contenders.items():
        began, before = time.perf_counter(), allocated(args.device)
        contender.forward_backward(), contender.optimizer_step()
        peak_bytes[variant] = allocated(args.device, peak=True) - before
        print(f"warmed up {variant} in {time.perf_counter() - began:.0f} s", flush=True)
    passes, steps, products = {v: [] for v in contenders}, {v: [] for v in contenders}, []
    for _ in range(args.rounds):
        products.append(matmul_flops(args.device, torch.float32 if args.dtype == "float32" else torch.bfloat16))
        for variant, contender in contenders.items():
            passes[variant].append(seconds_of(contender.forward_backward, args.device))
            steps[variant].append(seconds_of(contender.optimizer_step, args.device))
    best = max(products)
    print(f"matrix product {best / 1e9:,.0f} GFLOP/s; {args.rounds} rounds; "
          "ratios: median of the rounds' ratios to gated (of the minima)")
    print(f"{'variant':14s}{'fwd+bwd ms':>12s}{'ratio':>8s}{'(min)':>8s}{'optimizer ms':>14s}{'tokens/s':>11s}"
          f"{'MFU':>7s}{'MB':>9s}")
    for variant, contender in contenders.items():
        ratio = statistics.median(a / b for a, b in zip(passes[variant], passes["gated"]))
        seconds, flops = min(passes[variant]), flops_per_token(contender.model, args.block_size) * tokens
        print(f"{variant:14s}{1e3 * seconds:12.1f}{ratio:8.3f}{seconds / min(passes['gated']):8.3f}"
              f"{1e3 * min(steps[variant]):14.1f}{tokens / seconds:11,.0f}"
              f"{flops / seconds / best:7.1%}{peak_bytes[variant] / 1e6:9,.0f}", flush=True)
    if args.device == "cuda":
        print("MB: the first step's peak beyond all weights: activations, gradients, optimizer states")


def allocated(device, peak=False):
    """Bytes in use on the CUDA device, now or at the most since the last such question; nan elsewhere."""
    if device != "cuda":
        return math.nan
    in_use = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return in_use


def bench_muon(args):
    """A Muon step on the shapes of the paper's 29-layer exo model: equal shapes in one batch, and one by one."""
    with torch.device("meta"):
        model = ExoFormer(variant_config("exo", n_layer=args.n_layer))
        shapes = [(m.weight.shape, m.parts) for name, m in model.named_modules()
                  if isinstance(m, T.Linear) and name != "head"]

    def one_by_one(matrices):
        return torch.cat([muon.polar_express(matrix[None]) for matrix in matrices])
    optimizers = {}
    for name, polar in (("batched", muon.polar_express), ("loop", one_by_one)):
        groups = {}
        for shape, parts in shapes:
            p = torch.nn.Parameter(torch.randn(shape, device=args.device))
            p.grad = torch.randn_like(p)
            groups.setdefault(parts, []).append(p)
        groups = [dict(params=params, parts=parts) for parts, params in groups.items()]
        optimizers[name] = muon.Muon(groups, polar=polar)
    times = {name: [] for name in optimizers}
    for _ in range(args.rounds):
        for name, optimizer in optimizers.items():
            times[name].append(seconds_of(optimizer.step, args.device))
    ratio = statistics.median(slow / fast for slow, fast in zip(times["loop"], times["batched"]))
    print(f"{sum(parts for _, parts in shapes)} matrices of {args.n_layer} layers: "
          f"batched {min(times['batched']):.2f} s, loop {min(times['loop']):.2f} s, "
          f"median ratio of {args.rounds} rounds {ratio:.2f}")


def parse_args():
    """The command line; `run` of the result is the benchmark that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    commands = parser.add_subparsers(dest="command", required=True)
    model = commands.add_parser("model", help="forward + backward and optimizer step per variant")
    model.add_argument("--variants", nargs="+", default=["base", "gated", "exo", "exo_dynamic"],
                       help="names of Table 3")
    for name, default, text in (("n_layer", 2, "layers"), ("n_head", 16, "heads"), ("n_embd", 1024, "width"),
                                ("block_size", 512, "tokens a row"), ("batch_size", 4, "rows"),
                                ("vocab_size", 8192, "vocabulary"), ("rounds", 7, "interleaved rounds")):
        model.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    model.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "pure_bfloat16"],
                       help="as train.py (default bfloat16)")
    model.add_argument("--mask_documents", action="store_true", help="with document masking")
    model.add_argument("--eager", dest="compile", action="store_false", help="without torch.compile")
    model.set_defaults(run=bench_model)
    steps = commands.add_parser("muon", help="one Muon step, batched against a loop")
    steps.add_argument("--n_layer", type=int, default=29, help="layers (default 29)")
    steps.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    steps.set_defaults(run=bench_muon)
    for command in (model, steps):
        command.add_argument("--device", default=device, choices=["cpu", "cuda", "mps"],
                             help=f"default here: {device}")
    bench_data.add_data_parser(commands)
    bench_hellaswag.add_hellaswag_parser(commands)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    print_circumstances(vars(arguments).get("device", "cpu"))               # tokenising and scoring run on the CPU
    try:
        arguments.run(arguments)
    except (KeyError, UserError) as error:
        sys.exit(f"bench.py: {'unknown variant ' if isinstance(error, KeyError) else ''}{error}")
