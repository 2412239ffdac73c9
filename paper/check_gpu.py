"""
About ten minutes on a GPU that say whether this project computes there what it computes on a CPU, and how fast it is.

    python paper/check_gpu.py                       everything, on one GPU, or on two where there are two
    python paper/check_gpu.py --only resume speed   some of the checks
    python paper/check_gpu.py --device=cpu          the same checks at small size: they test this script, not a GPU

Each row is a number with a limit, and fails above it; a row without a limit is a measurement. Distances are relative
(Euclidean norm of the difference through that of the reference), the largest over all tensors. The last lines are all
rows again, to paste into an issue. Exit code 1 where something failed. On a CPU only the training step is compiled;
elsewhere "compiled" means traced and run without generating code, which would take minutes.
"""
import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, ".."))

import eval_hellaswag
import train as T
from model import (VARIANTS, choose_device, ExoFormer, flops_per_token, InputError, KVCache, Positions,
                   read_checkpoint, variant_config)
from muon import Muon, polar_express
from prepare_fineweb import clock, command_line, say, write_default_shards

SMALL = dict(n_layer=2, n_head=4, n_embd=128, block_size=384, vocab_size=320, tokenizer="bytes")
DTYPES = (("float32", 1e-4), ("bfloat16", 0.1))                            # and how far results may be from float32's


# ------------------------------------------------------------------------------------------------------------- 1 pieces

def small_model(variant, device, **given):
    """A small model, the same on every device, in which no parameter is zero."""
    torch.manual_seed(1)
    model = ExoFormer(variant_config(variant, **{**SMALL, **given}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.to(device)


def random_batch(rows, length, device, documents=False):
    """(idx, targets, docs), each (rows, length): random bytes, of which every 32nd or so ends a document."""
    tokens = torch.randint(256, (rows, length + 1), generator=torch.Generator().manual_seed(2)).to(device)
    return tokens[:, :-1], tokens[:, 1:], (tokens[:, :-1] < 8).cumsum(1) if documents else None


def compiled(function, device):
    """torch.compile as train.py calls it; on a CPU without its last step, which generates code."""
    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


def gradients(model, batch, dtype="float32", how=lambda function, device: function):
    """{name: tensor} of the three losses and all gradients of one forward and backward pass, eager or compiled."""
    model.zero_grad()
    losses = how(T.Objective(model, T.TrainConfig(dtype=dtype)), batch[0].device.type)(*batch)
    losses[0].backward()
    return {"losses": torch.stack(losses).detach(), **{name: p.grad for name, p in model.named_parameters()}}


def largest(numbers):
    """The largest, and nan where one of them is nan, which Python's max would pass over."""
    return torch.tensor(list(numbers)).max().item()


def distance(a, b):
    """The largest relative distance of the tensors of a to those of b, two dicts or two tensors."""
    if isinstance(b, dict):
        return largest(distance(a[name], b[name]) for name in b)
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return ((a - b).norm() / b.norm()).item()


def make_trainer(device, data, variant="exo_dynamic", preset="smoke", **given):
    """A Trainer as train.py builds it, with flags as it takes them."""
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)                              # a Trainer only ever turns this on
    return T.Trainer(*T.fresh_settings(variant, preset, dict(data=data, device=device, **given)))


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


# ---------------------------------------------------------- 2 the checks: generators of (what, number, limit or None)

def check_variants(device, data):
    """Logits and gradients of every row of Table 3."""
    def flat(grad):
        return torch.cat([t.flatten().cpu() for t in grad.values()])
    for dtype, limit in DTYPES:
        logits, grads, batch, here = [], [], random_batch(2, 64, "cpu"), random_batch(2, 64, device)
        for variant in VARIANTS:
            reference, model = small_model(variant, "cpu"), small_model(variant, device)
            grads.append(distance(flat(gradients(model, here, dtype)), flat(gradients(reference, batch))))
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                found = model(here[0])
            logits.append(distance(found, reference(batch[0])))
        yield f"logits of {len(logits)} variants in {dtype}, from the CPU's in float32", largest(logits), limit
        yield f"gradients of {len(grads)} variants in {dtype}, from the CPU's in float32", largest(grads), limit


def check_compiler(device, data):
    """Compiled against eager, without documents."""
    for dtype, limit in DTYPES:
        batch = random_batch(2, 64, device)
        eager, other = (gradients(small_model("exo_dynamic", device), batch, dtype, *how) for how in ((), (compiled,)))
        yield f"losses and gradients in {dtype}, compiled from eager", distance(other, eager), limit


def check_documents(device, data):
    """Compiled (on CUDA: FlexAttention) against the dense mask on the CPU."""
    for documents, window in ((True, 0), (True, 100), (False, 100)):
        reference, model = (small_model("exo_dynamic", where, window=window) for where in ("cpu", device))
        expected = gradients(reference, random_batch(2, 384, "cpu", documents))
        found = gradients(model, random_batch(2, 384, device, documents), how=compiled)
        what = " and ".join(["documents"] * documents + [f"a window of {window}"] * bool(window))
        yield f"losses and gradients with {what}, compiled from a dense mask", distance(found, expected), 1e-4


@torch.no_grad()
def check_cache(device, data):
    """Tokens given bit by bit against all at once."""
    for window in (0, 20):
        model, idx = small_model("exo_dynamic", device, window=window), random_batch(2, 64, device)[0]
        cache = KVCache(model.config, 2, 64, device)
        parts = [model(part, cache=cache) for part in idx.split([30, 1, 1, 32], dim=1)]
        yield f"logits through the KV cache, window={window}, from a full forward", distance(
            torch.cat(parts, 1)[..., :320], model(idx)[..., :320]), 1e-4


def check_muon(device, data):
    """Two steps of Muon on wide, tall and stacked matrices."""
    def moved(where, dtype):
        torch.manual_seed(3)
        shapes = ((64, 256), (256, 64), (256, 64))
        start, *steps = ([torch.randn(shape).to(where) for shape in shapes] for _ in range(3))
        params = [nn.Parameter(t.clone()) for t in start]
        optimizer = Muon([dict(params=params[:2], parts=1), dict(params=params[2:], parts=4)],
                         polar=functools.partial(polar_express, dtype=dtype))
        for step in steps:
            for p, gradient in zip(params, step):
                p.grad = gradient
            optimizer.step()
        return {i: p - t for i, (p, t) in enumerate(zip(params, start))}
    expected = moved("cpu", torch.float32)
    for dtype, limit in ((torch.float32, 1e-3), (torch.bfloat16, 0.1)):
        found = moved(device, dtype)
        yield f"two steps of Muon in {str(dtype)[6:]}, from the CPU's in float32", distance(found, expected), limit


def check_step(device, data):
    """The loss of the third training step, which sees two updates."""
    def third_loss(where, compiled):
        trainer = make_trainer(where, data, n_layer=1, dtype="float32", muon_dtype="float32", compile=compiled)
        return torch.tensor(take_steps(trainer, 3)[-1]["loss"])
    expected = third_loss("cpu", False)
    for compiled, name in ((False, "eager"), (True, "compiled")):
        yield f"loss of training step 3, {name}, from the CPU's", distance(third_loss(device, compiled), expected), 1e-4


def check_resume(device, data):
    """Two steps, saved, and two more by another Trainer, against four in a row; compiled on CUDA as by default."""
    path = os.path.join(data, "check_gpu.pt")
    for deterministic, limit in ((True, 0.0), (False, None)):
        make = functools.partial(make_trainer, device, data, n_layer=2, deterministic=deterministic)
        whole, first = make(), make()
        take_steps(whole, 4), take_steps(first, 2)
        T.save_checkpoint(path, T.state_of(first))
        second = make()
        T.load_state(second, read_checkpoint(path), path)
        take_steps(second, 2)
        yield (f"weights of a resumed run, deterministic={deterministic}, from an undisturbed one's",
               distance(dict(second.model.named_parameters()), dict(whole.model.named_parameters())), limit)


def check_evaluation(device, data):
    """Step, evaluation, step: all run the graph that the first step has compiled."""
    trainer = make_trainer(device, data, n_layer=1, compile=True)
    torch._dynamo.utils.counters.clear()
    take_steps(trainer, 1)
    T.evaluate_batch(trainer, trainer.read_step()[0][:3])
    take_steps(trainer, 1)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    yield "graphs compiled for a step, an evaluation and a step", graphs, 1


def check_speed(device, data):
    """Memory and speed of the paper's step. 29 layers take minutes to compile, so variants are compared at 8."""
    few, whole, given = (8, 29, dict(preset="paper", total_batch_size=16 * 2048)) if device == "cuda" else (1, 2, {})
    passes = {}
    for variant, n_layer in (("gated", few), ("exo", few), ("exo_dynamic", few), ("exo_dynamic", whole)):
        torch.cuda.reset_peak_memory_stats() if device == "cuda" else None
        trainer = make_trainer(device, data, variant, n_layer=n_layer, **given)
        batch = T.to_batch(trainer.read_step()[0], trainer.tokenizer.eot, trainer.config)
        update = seconds_of(lambda: take_steps(trainer, 1), device)
        passes[variant, n_layer] = one = seconds_of(lambda: trainer.objective(*batch)[0].backward(), device)
        if n_layer == few:
            yield f"forward and backward of {variant}, times gated, {few} layers", one / passes["gated", few], None
    name, gigabytes = f"{variant}, {n_layer} layers", device == "cuda" and torch.cuda.max_memory_allocated() / 1e9
    yield f"GB at the most, batch 16: {name} (traced: 58)", gigabytes or None, 66
    rate = 8 * batch[0].numel() / (7 * one + update)                               # as the recipe: 8 passes to a step
    flops = rate * flops_per_token(trainer.model, batch[0].size(1))
    yield f"tokens/s: {name}", rate, None
    yield f"MFU in %: {name}", 100 * flops / T.peak_flops(device), None
    yield f"ms of forward and backward: {name}", 1000 * one, None
    yield f"ms of the rest of a step, clipping and optimizers: {name}", 1000 * (update - one), None


def check_kernels(device, data):
    """The head with the loss, and FlexAttention's forward by its number of warps, at the paper's sizes."""
    sizes = dict(n_layer=1) if device == "cuda" else SMALL
    model = ExoFormer(variant_config("gated", **sizes)).to(device)
    rows, length, config = (16 if device == "cuda" else 1), model.config.block_size, model.config
    idx, targets, docs = random_batch(rows, length, device, documents=True)
    hidden = torch.randn(rows, length, config.n_embd, device=device, requires_grad=True)
    model.forward = lambda idx, docs: model.logits(hidden)
    loss = compiled(model.loss, device)
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        yield "ms of head and loss, forward and backward", 1000 * seconds_of(
            lambda: sum(loss(idx, targets)).backward(), device), None
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = torch.randn(3, rows, config.n_head, length, config.head_dim, device=device, dtype=dtype)
    at = Positions(config, length, torch.device(device), docs)
    blocks = create_block_mask(lambda b, h, q, k: at.visible(b, q, k), rows, None, length, length, device=device)
    yield "ms of causal attention without documents, forward", 1000 * seconds_of(
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), device), None
    for options in ({}, {"num_warps": 4}, {"num_warps": 8}) if device == "cuda" else ({},):
        attention = compiled(flex_attention, device)
        yield f"ms of FlexAttention with documents, forward, options {options}", 1000 * seconds_of(
            lambda: attention(q, k, v, block_mask=blocks, kernel_options=options), device), None


def check_hellaswag(device, data):
    """Made-up items of about the real ones' lengths."""
    sizes = {} if device == "cuda" else dict(n_layer=2, n_head=4, n_embd=128)
    model = ExoFormer(variant_config("exo_dynamic", **sizes)).to(device)
    items = [eval_hellaswag.Item(i, 0, [50] * (40 + i % 90), [[60] * (10 + i % 20)] * 4, [60] * 4)
             for i in range(400 if device == "cuda" else 8)]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    seconds = seconds_of(lambda: eval_hellaswag.score(model, items, dtype=dtype), device)
    yield f"HellaSwag items/s, exo_dynamic, {model.config.n_layer} layers", len(items) / seconds, None


def check_processes(device, data):
    """Two processes against one with twice the accumulation; skipped where there are not two GPUs."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        yield f"2 processes against 1: needs two GPUs, here {torch.cuda.device_count()}", None, None
        return
    flags = (f"--device={device} --data={data} --preset=smoke --n_layer=2 --max_steps=3 --batch_size=4 --dtype=float32 "
             "--compile=false --muon_dtype=float32 --eval_tokens=256 --final_eval_tokens=256 --sample_tokens=0").split()
    losses = []
    for n in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}",
                            os.path.join(HERE, "..", "train.py"), f"--out_dir={folder}", *flags],
                           check=True, stdout=subprocess.DEVNULL)
            with open(os.path.join(folder, "log.jsonl")) as log:
                records = [json.loads(line) for line in log]
        losses.append(torch.tensor([record["loss"] for record in records if "loss" in record]))
    yield "losses of 2 processes, from 1 with twice the accumulation", distance(losses[1], losses[0]), 1e-4


# -------------------------------------------------------------------------------------------------------- 3 the command

CHECKS = {check.__name__.removeprefix("check_"): check for check in (
    check_variants, check_compiler, check_documents, check_cache, check_muon, check_step, check_resume,
    check_evaluation, check_kernels, check_hellaswag, check_processes, check_speed)}


def rows_of(name, device, data):
    """Yield (verdict, line) for each row of a check. A check that breaks is one failed row and does not end the run."""
    try:
        for what, number, limit in CHECKS[name](device, data):
            if number is None:
                yield "skip", f"skip  {what}"
                continue
            verdict = "" if limit is None else "pass" if number <= limit else "FAIL"            # nan fails
            yield verdict, f"{verdict:6s}{what:88s}{number:12.4g}" + ("" if limit is None else f"   at most {limit:g}")
    except Exception as error:
        yield "FAIL", f"FAIL  {name} broke: {type(error).__name__}: {str(error).strip()[:300]}"


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="cuda or cpu; auto takes the first there is")
    parser.add_argument("--only", nargs="+", default=list(CHECKS), metavar="CHECK", choices=CHECKS,
                        help=f"some of: {', '.join(CHECKS)}")
    args = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")      # read once, before the first product on a GPU
    device = choose_device(args.device, among=("cuda", "cpu"))
    where = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    lines = [f"check_gpu.py: {where}, torch {torch.__version__}, commit {T.git_revision()[:10]}"]
    failed, began = 0, time.time()
    with tempfile.TemporaryDirectory() as data:
        write_default_shards(data)
        for name in args.only:
            for verdict, line in rows_of(name, device, data):
                say(line)
                lines.append(line)
                failed += verdict == "FAIL"
            say(f"      {name} done after {clock(time.time() - began)}")
    lines.append(f"{failed} failed; {clock(time.time() - began)} in all")
    say("\nTo paste into an issue:\n\n```\n" + "\n".join(lines) + "\n```")
    return 1 if failed else 0


if __name__ == "__main__":
    command_line(main, InputError)
