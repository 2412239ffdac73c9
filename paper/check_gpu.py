"""
About fifteen minutes on a GPU that say whether this project computes there what it computes on a
CPU, how fast it is, and which of several ways to write the same thing is faster there.

    python paper/check_gpu.py                       all checks, on one GPU, or two if there are two
    python paper/check_gpu.py --only resume speed   some of the checks
    python paper/check_gpu.py --device=cpu          at small size: tests the script, not a GPU

Each row is a number with a limit, and fails above it; a row without a limit is a measurement.
Distances are relative (Euclidean norm of the difference through that of the reference), the largest
over all tensors. The last lines are all rows again, to paste into an issue. Exit code 1 where
something failed. On a CPU only the training step is compiled; elsewhere "compiled" means traced and
run without generating code, which would take minutes.
"""

import argparse
import contextlib
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, ".."))

import eval_hellaswag
import train as T
from model import (
    VARIANTS,
    ExoFormer,
    InputError,
    KVCache,
    Mix,
    Positions,
    choose_device,
    flops_per_token,
    read_checkpoint,
    variant_config,
)
from muon import Muon, polar_express
from prepare_fineweb import clock, command_line, say, write_default_shards

SMALL = dict(
    n_layer=2,
    n_head=4,
    n_embd=128,
    block_size=384,
    vocab_size=320,
    tokenizer="bytes",
)
TINY_RUN = """--preset=smoke --n_layer=2 --max_steps=3 --batch_size=4 --dtype=float32
    --muon_dtype=float32 --compile=false --eval_tokens=256 --final_eval_tokens=256
    --sample_tokens=0""".split()

# {sequences in a pass: the most memory, in GB, of a step of exo_dynamic at the paper's size}:
# traced on fake CUDA tensors, not measured. What the CUDA context needs is not counted.
TRACED_PEAK = {16: 54.3, 8: 30.5, 4: 18.7, 2: 12.7}


# ------------------------------------------------------------------------------------ 1 pieces


def small_model(variant, device, **given):
    """A small model, the same on every device, in which no parameter is zero."""
    torch.manual_seed(1)
    model = ExoFormer(variant_config(variant, **{**SMALL, **given}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.to(device)


def random_batch(rows, length, device, documents=False):
    """(idx, targets, docs), each (rows, length): random bytes; about every 32nd ends a document."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(256, (rows, length + 1), generator=generator).to(device)
    idx = tokens[:, :-1]
    docs = (idx < 8).cumsum(1) if documents else None
    return idx, tokens[:, 1:], docs


def dtypes_of(device):
    """(dtype, largest distance from float32 on the CPU) for each dtype that the device has."""
    yield "float32", 1e-4
    if device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False):
        yield "bfloat16", 0.1


def compiled(function, device):
    """torch.compile as train.py calls it; on a CPU without its last step, which generates code."""
    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


def eager(function, device):
    """The function as it is, in the place of `compiled`."""
    return function


def gradients(model, batch, dtype="float32", how=eager):
    """{name: tensor} of the three losses and all gradients of one forward and backward pass."""
    model.zero_grad()
    objective = T.Objective(model, T.TrainConfig(dtype=dtype))
    losses = how(objective, batch[0].device.type)(*batch)
    losses[0].backward()
    of_parameters = {name: p.grad for name, p in model.named_parameters()}
    return {"losses": torch.stack(losses).detach(), **of_parameters}


def largest(numbers):
    """The largest, and nan where one of them is nan, which Python's max would pass over."""
    return torch.tensor(list(numbers)).max().item()


def distance(a, b):
    """The largest relative distance of the tensors of a to those of b, two dicts or two tensors."""
    if isinstance(b, dict):
        return largest(distance(a[name], b[name]) for name in b)
    a = a.detach().cpu().double()
    b = b.detach().cpu().double()
    return ((a - b).norm() / b.norm()).item()


def make_trainer(device, data, variant="exo_dynamic", preset="smoke", **given):
    """A Trainer as train.py builds it, with flags as it takes them."""
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)  # a Trainer only ever turns this on
    given = dict(data=data, device=device, **given)
    return T.Trainer(*T.fresh_settings(variant, preset, given))


def take_steps(trainer, n):
    """The log records of n steps."""
    return [trainer.update(trainer.read_step()) for _ in range(n)]


def seconds_of(action, device):
    """Median time of 5 calls (on a CPU: the time of one), after one that does not count."""
    times = []
    for _ in range(6 if device == "cuda" else 2):
        began = time.perf_counter()
        action()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


# -------------------------------------------- 2 checks: generators of (what, number, limit or None)


def check_variants(device, data):
    """Logits and gradients of every row of Table 3."""
    batch = random_batch(2, 64, "cpu")
    here = random_batch(2, 64, device)
    for dtype, limit in dtypes_of(device):
        logits = []
        grads = []
        for variant in VARIANTS:
            reference = small_model(variant, "cpu")
            model = small_model(variant, device)
            expected = torch.cat([t.flatten() for t in gradients(reference, batch).values()])
            found = torch.cat([t.flatten() for t in gradients(model, here, dtype).values()])
            grads.append(distance(found, expected))
            bfloat16 = dtype == "bfloat16"
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=bfloat16):
                found = model(here[0])
            logits.append(distance(found, reference(batch[0])))
        where = f"of {len(VARIANTS)} variants in {dtype}, from the CPU's in float32"
        yield f"logits {where}", largest(logits), limit
        yield f"gradients {where}", largest(grads), limit


def check_compiler(device, data):
    """Compiled against eager, without documents."""
    batch = random_batch(2, 64, device)
    for dtype, limit in dtypes_of(device):
        expected = gradients(small_model("exo_dynamic", device), batch, dtype)
        found = gradients(small_model("exo_dynamic", device), batch, dtype, compiled)
        what = f"losses and gradients in {dtype}, compiled from eager"
        yield what, distance(found, expected), limit


def check_documents(device, data):
    """Compiled (on CUDA: FlexAttention) against the dense mask on the CPU."""
    for documents, window, name in (
        (True, 0, "documents"),
        (True, 100, "documents and a window of 100"),
        (False, 100, "a window of 100"),
    ):
        reference = small_model("exo_dynamic", "cpu", window=window)
        model = small_model("exo_dynamic", device, window=window)
        expected = gradients(reference, random_batch(2, 384, "cpu", documents))
        found = gradients(model, random_batch(2, 384, device, documents), how=compiled)
        what = f"losses and gradients with {name}, compiled from a dense mask"
        yield what, distance(found, expected), 1e-4


@torch.no_grad()
def check_cache(device, data):
    """Tokens given bit by bit against all at once."""
    idx = random_batch(2, 64, device)[0]
    for window in (0, 20):
        model = small_model("exo_dynamic", device, window=window)
        cache = KVCache(model.config, 2, 64, device)
        parts = [model(part, cache=cache) for part in idx.split([30, 1, 1, 32], dim=1)]
        found = torch.cat(parts, 1)[..., :320]
        what = f"logits through the KV cache, window={window}, from a full forward"
        yield what, distance(found, model(idx)[..., :320]), 1e-4


def two_muon_steps(device, dtype):
    """{i: how far two steps of Muon move matrix i}: a wide, a tall and a stacked one."""
    torch.manual_seed(3)
    shapes = ((64, 256), (256, 64), (256, 64))
    start, *steps = [[torch.randn(shape).to(device) for shape in shapes] for _ in range(3)]
    params = [nn.Parameter(t.clone()) for t in start]
    groups = [dict(params=params[:2], parts=1), dict(params=params[2:], parts=4)]
    optimizer = Muon(groups, polar=functools.partial(polar_express, dtype=dtype))
    for step in steps:
        for p, gradient in zip(params, step):
            p.grad = gradient
        optimizer.step()
    return {i: p - t for i, (p, t) in enumerate(zip(params, start))}


def check_muon(device, data):
    """Two steps of Muon on wide, tall and stacked matrices."""
    expected = two_muon_steps("cpu", torch.float32)
    for dtype, limit in ((torch.float32, 1e-3), (torch.bfloat16, 0.1)):
        found = two_muon_steps(device, dtype)
        what = f"two steps of Muon in {str(dtype)[6:]}, from the CPU's in float32"
        yield what, distance(found, expected), limit


def check_step(device, data):
    """The loss of the third training step, which sees two updates."""

    def third_loss(where, compile):
        given = dict(n_layer=1, dtype="float32", muon_dtype="float32", compile=compile)
        trainer = make_trainer(where, data, **given)
        return torch.tensor(take_steps(trainer, 3)[-1]["loss"])

    expected = third_loss("cpu", False)
    for compile, name in ((False, "eager"), (True, "compiled")):
        found = third_loss(device, compile)
        yield f"loss of training step 3, {name}, from the CPU's", distance(found, expected), 1e-4


def check_resume(device, data):
    """Two steps, saved, and two more by another Trainer, against four; compiled as by default."""
    path = os.path.join(data, "check_gpu.pt")
    for deterministic, limit in ((True, 0.0), (False, None)):
        given = dict(n_layer=2, deterministic=deterministic)
        whole = make_trainer(device, data, **given)
        first = make_trainer(device, data, **given)
        take_steps(whole, 4)
        take_steps(first, 2)
        T.save_checkpoint(path, T.state_of(first))
        second = make_trainer(device, data, **given)
        T.load_state(second, read_checkpoint(path), path)
        take_steps(second, 2)
        expected = dict(whole.model.named_parameters())
        found = dict(second.model.named_parameters())
        what = f"weights of a resumed run, deterministic={deterministic}, from an undisturbed one's"
        yield what, distance(found, expected), limit


def check_evaluation(device, data):
    """Step, evaluation, step: all run the graph that the first step has compiled."""
    trainer = make_trainer(device, data, n_layer=1, compile=True)
    torch._dynamo.utils.counters.clear()
    take_steps(trainer, 1)
    trainer.model.eval()
    T.evaluate_batch(trainer, trainer.read_step()[0][:3])
    trainer.model.train()
    take_steps(trainer, 1)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    yield "graphs compiled for a step, an evaluation and a step", graphs, 1


def check_kernels(device, data):
    """Head with loss, and FlexAttention's forward by its warps, at the paper's sizes."""
    cuda = device == "cuda"
    rows = 16 if cuda else 1
    model = ExoFormer(variant_config("gated", **(dict(n_layer=1) if cuda else SMALL))).to(device)
    config = model.config
    length = config.block_size
    idx, targets, docs = random_batch(rows, length, device, documents=True)

    hidden = torch.randn(rows, length, config.n_embd, device=device, requires_grad=True)
    model.forward = lambda idx, docs: model.logits(hidden)
    loss = compiled(model.loss, device)
    with torch.autocast(device, torch.bfloat16, enabled=cuda):
        seconds = seconds_of(lambda: sum(loss(idx, targets)).backward(), device)
    yield "ms of head and loss, forward and backward", 1000 * seconds, None

    shape = (3, rows, config.n_head, length, config.head_dim)
    dtype = torch.bfloat16 if cuda else torch.float32
    q, k, v = torch.randn(shape, device=device, dtype=dtype)
    sdpa = functools.partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
    milliseconds = 1000 * seconds_of(sdpa, device)
    yield "ms of causal attention without documents, forward", milliseconds, None

    positions = Positions(config, length, torch.device(device), docs)

    def visible(row, head, query, key):
        return positions.visible(row, query, key)

    blocks = create_block_mask(visible, rows, None, length, length, device=device)
    for options in ({}, {"num_warps": 4}, {"num_warps": 8}) if cuda else ({},):
        attention = functools.partial(
            compiled(flex_attention, device), q, k, v, block_mask=blocks, kernel_options=options
        )
        milliseconds = 1000 * seconds_of(attention, device)
        yield f"ms of FlexAttention with documents, forward, options {options}", milliseconds, None


def check_hellaswag(device, data):
    """Made-up items of about the real ones' lengths."""
    cuda = device == "cuda"
    sizes = {} if cuda else dict(n_layer=2, n_head=4, n_embd=128)
    dtype = torch.bfloat16 if cuda else torch.float32
    model = ExoFormer(variant_config("exo_dynamic", **sizes)).to(device)
    items = []
    for i in range(400 if cuda else 8):
        context = [50] * (40 + i % 90)
        endings = [[60] * (10 + i % 20)] * 4
        items.append(eval_hellaswag.Item(i, 0, context, endings, [60] * 4))
    seconds = seconds_of(lambda: eval_hellaswag.score(model, items, dtype=dtype), device)
    what = f"HellaSwag items/s, exo_dynamic, {model.config.n_layer} layers"
    yield what, len(items) / seconds, None


def losses_of_run(processes, *flags):
    """The losses that train.py logs with these flags, run by torchrun on so many processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = os.path.join(HERE, "..", "train.py")
    with tempfile.TemporaryDirectory() as folder:
        command = [*torchrun, f"--nproc_per_node={processes}", script, f"--out_dir={folder}"]
        subprocess.run([*command, *flags], check=True, stdout=subprocess.DEVNULL)
        with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as log:
            records = [json.loads(line) for line in log]
    return torch.tensor([record["loss"] for record in records if "loss" in record])


def check_processes(device, data):
    """Two processes against one with twice the accumulation; skipped where there is one GPU."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        there = torch.cuda.device_count()
        yield f"2 processes against 1: needs two GPUs, here {there}", None, None
        return
    flags = [f"--device={device}", f"--data={data}", *TINY_RUN]
    expected = losses_of_run(1, *flags)
    found = losses_of_run(2, *flags)
    what = "losses of 2 processes, from 1 with twice the accumulation"
    yield what, distance(found, expected), 1e-4


# ------------------------------------------------------------------------------- 3 speed and memory


def largest_batch():
    """The most sequences in a pass, of those with a traced peak, that fit the GPU's memory."""
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9
    fitting = [batch for batch, peak in TRACED_PEAK.items() if 1.1 * peak < memory]
    return max(fitting, default=min(TRACED_PEAK))


def measure_step(device, data, variant, n_layer, **given):
    """{pass, rest: seconds of forward and backward, and of the rest of a step; memory: GB at the
    most, 0 on a CPU; rate: tokens/s of the recipe's step; mfu: its share of the peak}."""
    gc.collect()  # earlier trainers are in reference cycles, and their weights would count
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer = make_trainer(device, data, variant, n_layer=n_layer, **given)
    batch = T.to_batch(trainer.read_step()[0], trainer.tokenizer.eot, trainer.config)
    update = seconds_of(lambda: take_steps(trainer, 1), device)
    one = seconds_of(lambda: trainer.objective(*batch)[0].backward(), device)
    accumulation = 128 // trainer.config.batch_size  # passes of the recipe's 262,144 tokens
    rate = accumulation * batch[0].numel() / ((accumulation - 1) * one + update)
    flops = rate * flops_per_token(trainer.model, batch[0].size(1))
    memory = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0
    mfu = flops / T.peak_flops(device)
    return {"pass": one, "rest": update - one, "memory": memory, "rate": rate, "mfu": mfu}


def step_settings(device):
    """(layers to compare at, layers of the whole model, flags) of the steps that are timed. 29
    layers take minutes to compile, so variants are compared at 8."""
    if device == "cpu":
        return 1, 2, {}
    batch = largest_batch()
    return 8, 29, dict(preset="paper", batch_size=batch, total_batch_size=batch * 2048)


def check_speed(device, data):
    """Memory and speed of the paper's step."""
    few, whole, given = step_settings(device)
    gated = measure_step(device, data, "gated", few, **given)
    for variant in ("exo", "exo_dynamic"):
        found = measure_step(device, data, variant, few, **given)
        ratio = found["pass"] / gated["pass"]
        yield f"forward and backward of {variant}, times gated, {few} layers", ratio, None
    found = measure_step(device, data, "exo_dynamic", whole, **given)
    name = f"exo_dynamic, {whole} layers"
    if device == "cuda":
        batch = given["batch_size"]
        traced = TRACED_PEAK[batch]
        what = f"GB at the most, batch {batch}: {name} (traced: {traced})"
        yield what, found["memory"], 1.1 * traced
    yield f"tokens/s: {name}", found["rate"], None
    yield f"MFU in %: {name}", 100 * found["mfu"] or None, None  # skipped: the peak is not known
    yield f"ms of forward and backward: {name}", 1000 * found["pass"], None
    yield f"ms of the rest of a step: {name}", 1000 * found["rest"], None


def autograd_mixing(self, anchor, current, gamma):
    """Mix.forward with autograd's derivative in the place of WeightedSum's."""
    mixed_anchor = gamma[0] * self.lambda_anchor * anchor
    mixed_current = gamma[1] * self.lambda_current * current
    return (mixed_anchor + mixed_current).type_as(current)


def textbook_rotation(self, x):
    """Positions.rotate as RoPE is usually written."""
    first, second = x.float().chunk(2, dim=-1)
    cos = self.cos.chunk(2, dim=-1)[0]
    sin = self.sin.chunk(2, dim=-1)[1]
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(rotated, dim=-1).type_as(x)


NO_CAT = {"max_complex_pointwise_cat_inputs": 0, "max_pointwise_cat_inputs": 0}
MORE_READS = {
    "triton.mix_order_reduction_max_reads": 30,
    "triton.mix_order_reduction_non_strict_mode": True,
}
RIVALS = {  # another way to compute the same: a context manager in which to compile and to run it
    "as it is": contextlib.nullcontext,
    "mixing's derivative by autograd": lambda: mock.patch.object(Mix, "forward", autograd_mixing),
    "the textbook's rotation": lambda: mock.patch.object(Positions, "rotate", textbook_rotation),
    "Inductor without pointwise cat": lambda: torch._inductor.config.patch(NO_CAT),
    "Inductor with 30 reads a reduction": lambda: torch._inductor.config.patch(MORE_READS),
    "Inductor with both": lambda: torch._inductor.config.patch(NO_CAT | MORE_READS),
    "as it is, once more": contextlib.nullcontext,
}


def check_rivals(device, data):
    """Other ways to compute the same step, timed: what this code may drop or should take up."""
    few, _, given = step_settings(device)
    batch = random_batch(2, 64, device)
    expected = gradients(small_model("exo_dynamic", device), batch)
    times = {}
    for name, patched in RIVALS.items():
        with patched():
            found = gradients(small_model("exo_dynamic", device), batch, how=compiled)
            times[name] = measure_step(device, data, "exo_dynamic", few, **given)["pass"]
        yield f"losses and gradients, {name}, from eager", distance(found, expected), 1e-4
        what = f"forward and backward, {few} layers, {name}, times as it is"
        yield what, times[name] / times["as it is"], None
    fastest = min(times, key=times.get)
    yield (
        f"ms of forward and backward, {few} layers, fastest: {fastest}",
        1000 * times[fastest],
        None,
    )


# ------------------------------------------------------------------------------- 4 the command

CHECKS = {
    "variants": check_variants,
    "compiler": check_compiler,
    "documents": check_documents,
    "cache": check_cache,
    "muon": check_muon,
    "step": check_step,
    "resume": check_resume,
    "evaluation": check_evaluation,
    "kernels": check_kernels,
    "hellaswag": check_hellaswag,
    "processes": check_processes,
    "speed": check_speed,
    "rivals": check_rivals,
}


def row(what, number, limit):
    """(verdict, line) of a row: pass, FAIL, "" for a measurement, or skip where there is none."""
    if number is None:
        return "skip", f"skip  {what}"
    if limit is None:
        return "", f"      {what:88s}{number:12.4g}"
    verdict = "pass" if number <= limit else "FAIL"  # nan fails
    return verdict, f"{verdict:6s}{what:88s}{number:12.4g}   at most {limit:g}"


def rows_of(name, device, data):
    """Yield `row` for each row of a check. A check that breaks is one failed row."""
    try:
        for what, number, limit in CHECKS[name](device, data):
            yield row(what, number, limit)
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).strip()[:300]}"
        yield "FAIL", f"FAIL  {name} broke: {why}"


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", default="auto", help="cuda or cpu; auto takes the first there is"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=list(CHECKS),
        metavar="CHECK",
        choices=CHECKS,
        help=f"some of: {', '.join(CHECKS)}",
    )
    return parser.parse_args()


def main():
    """Print the rows of all checks, and all of them again as a block to paste."""
    args = parse_arguments()
    # read once, before the first product on a GPU
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = choose_device(args.device, among=("cuda", "cpu"))
    where = f"cpu, {torch.get_num_threads()} threads"
    if device == "cuda":
        where = torch.cuda.get_device_name()
    commit = T.git_revision()[:10]
    lines = [f"check_gpu.py: {where}, torch {torch.__version__}, commit {commit}"]
    failed = 0
    began = time.time()
    with tempfile.TemporaryDirectory() as data:
        write_default_shards(data)
        for name in args.only:
            for verdict, line in rows_of(name, device, data):
                say(line)
                lines.append(line)
                failed += verdict == "FAIL"
            say(f"      {name} done after {clock(time.time() - began)}")
    lines.append(f"{failed} failed; {clock(time.time() - began)} in all")
    block = "\n".join(lines)
    say(f"\nTo paste into an issue:\n\n```\n{block}\n```")
    return 1 if failed else 0


if __name__ == "__main__":
    command_line(main, InputError)
