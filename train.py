"""
Train any variant of ExoFormer, on one GPU, several (torchrun) or a CPU.

    python train.py                                on a CPU: a small model on Python's own sources
    python train.py --variant=exo_dynamic          one H100 and FineWeb: the paper's run (Table 4)
    python train.py --preset=small --data=DIR      GPT-2-small size, one consumer GPU
    python train.py --resume --out_dir=DIR         go on where a run stopped
    python train.py --init_from=PATH --data=DIR    a new run from a checkpoint's weights
    torchrun --nproc_per_node=8 train.py ...       the same run on eight GPUs
    timeout -s TERM 55m python train.py ...        stop, saved and resumable, after 55 minutes

First comes what a run computes: settings, data, schedule, step, loop; then what protects it. Which
tokens a step reads follows from the settings, the seed and the tokens read before; learning rate
and momentum follow from the step. A checkpoint stores no other position.
"""
import argparse
import contextlib
import functools
import glob
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import typing
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from model import (FORMAT, VARIANTS, DamagedCheckpoint, ExoFormer, InputError, Linear, ModelConfig,
                   check_format, check_ranges, checkpoints_in, choose_device, config_from,
                   continue_text, count_parameters, flops_per_token, load_checkpoint,
                   read_checkpoint, setting, variant_name, variant_settings)
from muon import Muon, polar_express
from prepare_fineweb import (FINEWEB_FOLDER, Progress, UserError, atomic_write, clock,
                             command_line, find_shards, fingerprint, get_tokenizer, locked,
                             read_meta, read_window, say, shard_tokens, size_of, still_locked,
                             write_default_shards)

DEFAULT_DATA = "data/python_stdlib"
RANK = int(os.environ.get("RANK") or 0)  # number of this process; torchrun sets it
WORLD_SIZE = int(os.environ.get("WORLD_SIZE") or 1)  # number of all processes


# ---- 1 settings ----------------------------------------------------------------------------------

HOW = dict(resume=True, experiment=False)  # facts of a setting that only steers how a run is made


@dataclass(frozen=True)
class TrainConfig:
    """The recipe. The defaults are the paper's (Table 4), except where the README says otherwise.

    Facts of a setting: resume=True: it may change when a run is resumed. experiment=False: runs
    that differ in it alone are repetitions of one experiment. measures=True: it decides which
    tokens a validation loss is measured on. group: the title of it and those below it in --help.
    """
    data: str = setting("", "folder of token shards; empty: FineWeb-Edu, or Python's own sources "
                        "(--preset=smoke, and small where FineWeb-Edu is not)", resume=True,
                        measures=True)
    out_dir: str = setting("", "folder of the run; empty: out/PRESET-VARIANT", **HOW)
    resume: bool = setting(False, "continue the newest checkpoint in out_dir", **HOW)
    init_from: str = setting("", "checkpoint with weights and sizes to begin with; empty: none")
    device: str = setting("auto", "auto: cuda, else mps, else cpu", ("auto", "cuda", "mps", "cpu"),
                          **HOW)
    dtype: str = setting("auto", "bfloat16: float32 weights, bfloat16 compute; pure_bfloat16: also "
                         "matrices, as released; auto: bfloat16 on a cuda device that has it, else "
                         "float32", ("auto", "float32", "bfloat16", "pure_bfloat16"))
    compile: bool | None = setting(None, "torch.compile; none: on cuda", **HOW)
    deterministic: bool | None = setting(None, "deterministic algorithms; none: on a CPU", **HOW)

    seed: int = setting(1337, "of the initial weights and the order of the data",
                        low=0, high=2**63 - 1, experiment=False, group="how much")
    max_steps: int = setting(38147, "optimizer steps", low=1, high=10**7, resume=True)
    batch_size: int = setting(16, "sequences per forward pass and device", low=1, **HOW)
    total_batch_size: int = setting(262144, "tokens per optimizer step, of all devices", low=1)
    mask_documents: bool = setting(True, "attention does not cross documents", measures=True)

    optimizer: str = setting("muon", "for the matrices of layers and anchors", ("muon", "adamw"),
                             group="optimizer")
    muon_lr: float = setting(0.01, "peak learning rate of Muon", low=0, resume=True)
    muon_momentum: float = setting(0.95, "momentum of Muon", low=0, high=1)
    muon_ramp: bool = setting(False, "as released: 0.85 to muon_momentum in 100 steps, and back")
    muon_beta2: float = setting(0.0, "second moment of NorMuon (released code: 0.95); 0: none",
                                low=0, high=1)
    muon_dtype: str = setting("auto", "of the Polar Express iteration; auto: bfloat16 on a cuda "
                              "device that has it, else float32", ("auto", "bfloat16", "float32"))
    muon_fused: bool = setting(False, "as released: stacked Q,K,V,G, and SwiGLU's, as one matrix")
    adamw_lr: float = setting(0.003, "peak learning rate of AdamW", low=0, resume=True)
    weight_decay: float = setting(0.1, "decoupled; cautious in Muon; on matrices only", low=0)
    warmup_steps: int = setting(1000, "linear warm-up to the peak", low=0, resume=True)
    decay_fraction: float = setting(0.2, "share of the steps, at the end, with a falling rate",
                                    low=0, high=1, resume=True)
    final_lr: float = setting(0.1, "learning rate at the end, as a share of the peak",
                              low=0, high=1, resume=True)
    grad_clip: float = setting(1.0, "largest norm of the whole gradient; 0: any", low=0)
    z_loss: float = setting(1e-5, "weight of mean logsumexp^2 in the loss", low=0)

    eval_every: int = setting(500, "steps between validation losses; 0: only first and last",
                              low=0, resume=True, group="how often")
    eval_tokens: int = setting(10_485_760, "validation tokens per evaluation; 0: all", low=0,
                               resume=True, measures=True)
    final_eval_tokens: int = setting(0, "validation tokens of the last evaluation; 0: all", low=0,
                                     resume=True, measures=True)
    save_every: int = setting(1000, "steps between checkpoints; 0: only the first and the last",
                              low=0, **HOW)
    keep: int = setting(2, "newest checkpoints to keep; 0: all", low=0, **HOW)
    log_every: int = setting(10, "steps between printed lines (the log has all)", low=1, **HOW)
    sample_tokens: int = setting(200, "length of the sample at the end; 0: none", low=0, **HOW)

    def __post_init__(self):
        check_ranges(self)


# ---- 2 the data and their order ------------------------------------------------------------------

@functools.lru_cache(maxsize=2)
def permutation(seed, epoch, n):
    """The order in which `epoch` visits n windows. Change this for another order of the data."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n)


class Tokens:
    """One split of a data folder, cut into windows of block_size + 1 tokens that overlap by one."""

    def __init__(self, folder, split, model_config):
        tokenizer = get_tokenizer(model_config.tokenizer)
        self.limit = min(tokenizer.n_vocab, model_config.vocab_size)
        self.block_size = model_config.block_size
        self.paths = find_shards(folder, split)
        self.counts = [shard_tokens(path) for path in self.paths]
        self.starts = np.cumsum([0] + [(count - 1) // self.block_size for count in self.counts])
        if len(self) == 0:
            least = self.block_size + 1
            raise UserError(f"{folder}: no {split} shard holds block_size + 1 = {least} tokens; "
                            "lower --block_size")

    def __len__(self):
        return int(self.starts[-1])

    def window(self, i):
        """Tokens of window i, (block_size + 1,) uint16."""
        shard = int(np.searchsorted(self.starts, i, side="right")) - 1
        path = self.paths[shard]
        start = int(i - self.starts[shard]) * self.block_size
        tokens = read_window(path, start, self.block_size + 1)
        if tokens.max() >= self.limit:
            raise UserError(
                f"{path}: token id {tokens.max()} is not below {self.limit}, the size of the "
                "vocabulary; damaged, or of another tokenizer (python prepare_fineweb.py verify "
                "--out=DIR)")
        return tokens

    def shuffled(self, seed, first, count):
        """Windows first ... first + count - 1 of the endless training order, (count, T + 1)."""
        windows = []
        for k in range(first, first + count):
            epoch, i = divmod(k, len(self))
            windows.append(self.window(permutation(seed, epoch, len(self))[i]))
        return np.stack(windows)


def to_batch(windows, eot, config):
    """(idx, targets, docs), each (B, T) on the device, from windows (B, T + 1).

    docs numbers the documents of a row, which start at `eot`; None without mask_documents.
    """
    windows = torch.from_numpy(windows.astype(np.int64))
    if config.device == "cuda":  # from pinned memory: the copy does not wait for the GPU
        windows = windows.pin_memory()
    windows = windows.to(config.device, non_blocking=config.device == "cuda")
    idx = windows[:, :-1].contiguous()
    targets = windows[:, 1:].contiguous()
    docs = (idx == eot).cumsum(1) if config.mask_documents else None
    return idx, targets, docs


# ---- 3 the schedule: functions of the step -------------------------------------------------------

def step_tokens(step, config):
    """Tokens that `step` (0-based) reads. Return fewer in early steps for a batch ramp."""
    return config.total_batch_size


def lr_multiplier(step, config):
    """Learning rate of `step` (0-based) as a share of the peak (Table 4).

    Linear warm-up, constant, linear fall.
    """
    falling = int(config.decay_fraction * config.max_steps)
    fallen = max(0, step - (config.max_steps - falling)) / max(1, falling)
    warm = (step + 1) / max(1, config.warmup_steps)
    return min(warm, 1 - (1 - config.final_lr) * fallen)


def muon_momentum(step, config):
    """Muon's momentum at `step`.

    With muon_ramp the released code's: 0.85 to the peak in 100 steps, and back at the end.
    """
    if not config.muon_ramp:
        return config.muon_momentum
    left = config.max_steps - step
    ramp = min(1, step / 100, left / 100)
    return 0.85 + (config.muon_momentum - 0.85) * ramp


def schedule(optimizers, step, config):
    """Set every group's rate for `step`, a share of its own peak, and the momentum of Muon."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr_multiplier(step, config) * group["peak_lr"]
            if isinstance(optimizer, Muon):
                group["momentum"] = muon_momentum(step, config)


# ---- 4 the step ----------------------------------------------------------------------------------

class Objective(nn.Module):
    """The training loss as one module, so that torch.compile sees a single forward."""

    def __init__(self, model, config):
        super().__init__()
        self.model = model
        self.z_loss = config.z_loss
        self.autocast = config.dtype == "bfloat16"

    def forward(self, idx, targets, docs):
        """(loss to minimise, cross-entropy, z), scalars."""
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=self.autocast):
            cross_entropy, z = self.model.loss(idx, targets, docs)
        return cross_entropy + self.z_loss * z, cross_entropy, z


def build_model(model_config, config):
    """A fresh model: drawn on the CPU, so that a seed gives the same weights on every device."""
    torch.manual_seed(config.seed)
    model = ExoFormer(model_config)
    if config.dtype == "pure_bfloat16":  # as released: gains and lambdas stay float32
        for module in model.modules():
            if isinstance(module, (Linear, nn.Embedding)):
                module.bfloat16()
    return model.to(config.device)


def build_optimizers(model, config):
    """[Muon, AdamW] or [AdamW]: every parameter in exactly one group, each with its peak rate.

    Muon has the matrices of the layers and of the anchor. ValueError for a matrix that is neither
    one of these nor known here as AdamW's.
    """
    places = ("layers.", "anchor.")
    modules = {n: m for n, m in model.named_modules() if n.startswith(places)}
    matrices = {n: m for n, m in modules.items() if isinstance(m, Linear)}
    weights = [m.weight for m in matrices.values()]
    inside = {id(p) for p in weights}
    for name, p in model.named_parameters():
        known = name in ("embed.weight", "head.weight") or "lambda_" in name
        if p.dim() > 1 and id(p) not in inside and not known:
            raise ValueError(
                f"build_optimizers: is {name} Muon's or AdamW's? Make it a model.Linear of a layer "
                "or the anchor, or add it here to those of AdamW")
    others = [p for p in model.parameters() if id(p) not in inside]
    groups = [dict(params=others, weight_decay=0.0)]
    optimizers = []
    if config.optimizer == "muon":
        optimizers = [build_muon(matrices, config)]
    else:
        groups = [dict(params=weights, weight_decay=config.weight_decay), *groups]
    fused = config.device == "cuda"
    adamw = torch.optim.AdamW(groups, lr=config.adamw_lr, betas=(0.9, 0.95), eps=1e-8, fused=fused)
    optimizers.append(adamw)
    held = [id(p) for optimizer in optimizers for p in parameters_of(optimizer)]
    assert sorted(held) == sorted(map(id, model.parameters())), "not a partition"
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


def build_muon(matrices, config):
    """Muon for the weights of {name: Linear}, in a group for each number of stacked matrices."""
    by_parts = {}
    for name, module in matrices.items():
        if len(set(module.heights)) > 1 and not config.muon_fused:
            raise UserError(f"--optimizer=muon: {name} stacks matrices of unequal heights "
                            f"{module.heights}; add --muon_fused, or use --optimizer=adamw")
        parts = 1 if config.muon_fused else len(module.heights)
        by_parts.setdefault(parts, []).append(module.weight)
    groups = [dict(params=params, parts=parts) for parts, params in by_parts.items()]
    dtype = torch.float32 if config.muon_dtype == "float32" else torch.bfloat16
    polar = functools.partial(polar_express, dtype=dtype)
    return Muon(groups, lr=config.muon_lr, weight_decay=config.weight_decay,
                beta2=config.muon_beta2 or None, polar=functools.partial(shared, polar))


class Trainer:
    """Everything that a step needs, and the step."""

    def __init__(self, model_config, config):
        if config.deterministic:
            use_deterministic_algorithms()
        self.model_config = model_config
        self.config = config
        self.step = 0
        self.tokens = 0  # read in all steps so far
        self.saved = -1  # the last step that was saved
        self.evaluated = -1  # the last step that was evaluated
        self.sequences = config.batch_size * WORLD_SIZE  # of a forward pass on all processes
        for step in range(config.max_steps):  # a UserError comes before anything is built
            self.count_passes(step)
        self.tokenizer = get_tokenizer(model_config.tokenizer)
        if model_config.vocab_size < self.tokenizer.n_vocab:
            raise UserError(
                f"--vocab_size={model_config.vocab_size} is too small for the "
                f"{self.tokenizer.n_vocab} ids of the {model_config.tokenizer} tokenizer")
        self.train = Tokens(config.data, "train", model_config)
        self.val = Tokens(config.data, "val", model_config)
        self.shards = {s: fingerprint(config.data, s) for s in ("train", "val")}  # for resuming
        self.model = build_model(model_config, config)
        self.optimizers = build_optimizers(self.model, config)
        self.objective = Objective(self.model, config)
        if config.compile:
            # a value that 3 kernels read is kept, not computed 3 times: 6 % of exo_dynamic's
            # traced time on an H100
            options = dict(realize_reads_threshold=3) if config.device == "cuda" else {}
            self.objective.compile(fullgraph=True, dynamic=False, options=options)

    def count_passes(self, step=None):
        """Forward passes of a step, the next one by default.

        UserError where its tokens are no whole number of them.
        """
        tokens = step_tokens(self.step if step is None else step, self.config)
        batch_size = self.config.batch_size
        block_size = self.model_config.block_size
        passes, rest = divmod(tokens, self.sequences * block_size)
        if rest or not passes:
            raise UserError(
                f"--total_batch_size={tokens} is not a multiple of --batch_size={batch_size} x "
                f"--block_size={block_size} x {WORLD_SIZE} process(es); change one of them")
        return passes

    def read_step(self):
        """This process's windows of the next step, (passes, B, T + 1)."""
        return self.read(self.step, self.tokens)

    def read(self, step, tokens):
        """This process's windows of `step`, before which `tokens` were read, (passes, B, T + 1).

        All processes together read what a single one would.
        """
        batch_size = self.config.batch_size
        first = tokens // self.model_config.block_size + RANK * batch_size
        passes = []
        for i in range(self.count_passes(step)):
            start = first + i * self.sequences
            passes.append(self.train.shuffled(self.config.seed, start, batch_size))
        return np.stack(passes)

    def update(self, windows):
        """One optimizer step on the windows of `read_step`: its record for the log."""
        config = self.config
        parameters = list(self.model.parameters())
        schedule(self.optimizers, self.step, config)
        # here, so that a layer that draws random numbers, say dropout, resumes exactly too
        torch.manual_seed(config.seed + self.step * WORLD_SIZE + RANK)
        cross_entropy, z = self.backward(windows)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if not math.isfinite(cross_entropy + norm.item()):  # before any weight changes
            raise Diverged(
                f"step {self.step + 1}: loss {cross_entropy}, gradient norm {norm.item()}, "
                f"learning rates {lr_multiplier(self.step, config):.3g} of their peaks; "
                f"not finite first: {first_not_finite(self.model)}. Nothing was saved from it")
        if config.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, config.grad_clip, norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += WORLD_SIZE * windows[..., 1:].size
        rate = self.optimizers[0].param_groups[0]["lr"]
        return dict(step=self.step, loss=cross_entropy, z=z, grad_norm=norm.item(), lr=rate,
                    tokens=self.tokens)

    def backward(self, windows):
        """Leave the mean gradient over all processes in p.grad; their mean (cross-entropy, z)."""
        sums = torch.zeros(2, device=self.config.device)
        passes = len(windows) * WORLD_SIZE
        for rows in windows:
            batch = to_batch(rows, self.tokenizer.eot, self.config)
            loss, cross_entropy, z = self.objective(*batch)
            # a mean of means: who masks targets with -100 must weigh passes by their targets
            (loss / passes).backward()
            sums += torch.stack((cross_entropy.detach(), z.detach())).float() / passes
        # a compiled backward yields all gradients at its end: there is nothing to overlap
        all_reduce_gradients(self.model.parameters())
        return all_reduce(sums).tolist()


# ---- 5 the loop ----------------------------------------------------------------------------------

def run(trainer, folder, stop):
    """Train to the last step. Returns why it stopped earlier, or "" at the end."""
    config = trainer.config
    first = trainer.step
    began = time.monotonic()
    reading = read_ahead(trainer, first, trainer.tokens)
    while True:
        top = time.monotonic()
        step = trainer.step
        last = step >= config.max_steps
        windows = None if last else stop.read(reading.result)
        stopped = stop.agreed()
        waited = time.monotonic() - top

        # before evaluating: the last evaluation may read 100M tokens; a kill must lose no step
        due = stopped or last or is_due(step, config.save_every)
        if due and trainer.saved < step:
            save(trainer, folder, needed=stopped or last or trainer.saved < 0)
        if stopped:
            return stopped

        # a resumed run comes here at the step where it stopped, which may be evaluated already
        due = last or is_due(step, config.eval_every)
        if due and trainer.evaluated < step:
            tokens = config.final_eval_tokens if last else config.eval_tokens
            record = evaluate(trainer, tokens, stop)
            if record is None:
                continue  # told to stop: leave by the top
            report_evaluation(folder, record)
            if last:
                # so that it is not evaluated twice; the weights are in the file already
                save(trainer, folder, needed=False)
        if last:
            return ""

        update_began = time.monotonic()
        reading = read_ahead(trainer, step + 1, trainer.tokens + step_tokens(step, config))
        record = trainer.update(windows)
        if step == first:
            check_resumable(trainer)
        record["ms"] = round(1000 * (waited + time.monotonic() - update_began), 3)
        seconds_a_step = (time.monotonic() - began) / (trainer.step - first)
        report_step(trainer, folder, record, seconds_a_step, is_first=step == first)


def read_ahead(trainer, step, tokens):
    """A Future of trainer.read(step, tokens), which a thread reads while the device computes.

    Its result() raises what the thread raised. None where there is no such step. The thread does
    not keep the process from ending.
    """
    if step >= trainer.config.max_steps:
        return None
    future = Future()

    def work():
        try:
            future.set_result(trainer.read(step, tokens))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def is_due(step, every):
    """Whether something is due that is done at step 0 and `every` so many steps; 0: only then."""
    return step == 0 or (every > 0 and step % every == 0)


# ---- 6 evaluation --------------------------------------------------------------------------------

def evaluate(trainer, tokens, stop):
    """Mean cross-entropy over the first `tokens` (0: all) of the validation split.

    Returns a record for the log; None where the run was told to stop meanwhile.
    """
    block_size = trainer.model_config.block_size
    n = len(trainer.val)
    if tokens:
        n = min(n, math.ceil(tokens / block_size))
    sums = torch.zeros(3, dtype=torch.float64)
    progress = Progress("evaluating", n, "windows")
    trainer.model.eval()
    for first in range(0, n, trainer.sequences):
        windows = stop.read(read_validation, trainer, first, n)
        if stop.agreed():
            break
        if windows:
            sums += evaluate_batch(trainer, np.stack(windows))
        if RANK == 0:
            progress.update(min(first + trainer.sequences, n))
    trainer.model.train()
    progress.end()
    if stop.agreed():
        return None
    total, count, n_bytes = all_reduce(sums).tolist()
    loss = total / count
    if not math.isfinite(loss):
        raise Diverged(
            f"the evaluation after step {trainer.step}: validation loss {loss}. If there is "
            "a checkpoint of that step, it holds these weights")
    trainer.evaluated = trainer.step
    return dict(
        step=trainer.step,
        tokens=trainer.tokens,
        val_loss=loss,
        val_ppl=math.exp(min(loss, 700.0)),
        val_bpb=loss / math.log(2) * count * block_size / n_bytes)


def read_validation(trainer, first, n):
    """This process's share of the validation windows from `first` on, of which there are n."""
    batch_size = trainer.config.batch_size
    start = first + RANK * batch_size
    return [trainer.val.window(i) for i in range(start, min(start + batch_size, n))]


def evaluate_batch(trainer, windows):
    """(rows x mean cross-entropy, rows, bytes of text) of windows (rows, T + 1), in float64.

    The batch is filled up with windows whose targets do not count.
    """
    config = trainer.config
    rows = len(windows)
    n_bytes = trainer.tokenizer.n_bytes(windows[:, 1:].ravel())
    windows = np.pad(windows, ((0, config.batch_size - rows), (0, 0)))
    idx, targets, docs = to_batch(windows, trainer.tokenizer.eot, config)
    targets[rows:] = -100
    with torch.set_grad_enabled(config.compile):  # compiled: the training graph is used again
        # a number, since a tensor would keep its graph in memory
        loss = trainer.objective(idx, targets, docs)[1].item()
    return torch.tensor([loss * rows, rows, n_bytes], dtype=torch.float64)


# ---- 7 from the command line to the settings -----------------------------------------------------

PRESETS = {  # fields of ModelConfig and TrainConfig that differ from the paper's
    "paper": dict(),
    "small": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=8,
                  total_batch_size=131072, max_steps=19073, warmup_steps=500,
                  eval_tokens=2_097_152),
    "smoke": dict(n_layer=4, n_head=4, n_embd=128, block_size=256, batch_size=8,
                  total_batch_size=2048, max_steps=160, warmup_steps=20, decay_fraction=0.5,
                  eval_every=80, eval_tokens=32768, final_eval_tokens=32768, save_every=80,
                  log_every=20),
}

DEFAULTS = {f.name: f.default for kind in (ModelConfig, TrainConfig) for f in fields(kind)}
RESUMABLE = {f.name for f in fields(TrainConfig) if f.metadata.get("resume")}


def merge(base, variant, given, may_change=None, what=""):
    """The settings `base`, changed to what the command line asks for.

    That is the row of --variant, but for its n_layer, which the checkpoint decides; then the
    flags `given`, {name: value}. With `may_change`, names of settings, a change of any other is
    a UserError, which says that it does not fit `what`.
    """
    asked = given
    if variant:
        row = variant_settings(variant, given)
        asked = {name: row[name] for name in row if name != "n_layer" or name in given}
    changes = {name: v for name, v in asked.items() if v != base[name] and v != "auto"}
    for name, value in changes.items():
        if may_change is not None and name not in may_change:
            flag = f"--{name}={value}" if name in given else f"--variant={variant} ({name}={value})"
            raise UserError(f"{flag} does not fit {what}, which has {name}={base[name]}; drop the "
                            "flag")
    return {**base, **changes}


def fresh_settings(variant, preset, given):
    """(ModelConfig, TrainConfig) of a new run: defaults, variant, preset, flags in this order."""
    row = variant or "exo_dynamic"
    settings = {**DEFAULTS, **variant_settings(row, {**PRESETS[preset], **given})}
    settings["data"] = settings["data"] or choose_data(preset)
    find_shards(settings["data"], "train")  # says what to do where there are none
    settings["tokenizer"] = read_meta(settings["data"])["tokenizer"]
    if preset != "paper" and "vocab_size" not in given:
        n_vocab = get_tokenizer(settings["tokenizer"]).n_vocab
        settings["vocab_size"] = 64 * math.ceil(n_vocab / 64)
    if settings["init_from"]:
        settings = sizes_of_source(settings, variant, given)
    return resolve(settings)


def sizes_of_source(settings, variant, given):
    """The settings of a run that begins with the weights of the checkpoint init_from."""
    path = settings["init_from"]
    source = asdict(load_checkpoint(path).config)
    if source["tokenizer"] != settings["tokenizer"]:
        raise UserError(
            f"--data={settings['data']} holds {settings['tokenizer']} tokens, but the model in "
            f"--init_from={path} was trained on {source['tokenizer']}")
    what = f"the model in --init_from={path}"
    return merge({**settings, **source}, variant, given, {"block_size"}, what)


def resumed_settings(variant, given, checkpoint, path):
    """(ModelConfig, TrainConfig) of a checkpoint and the flags given now.

    UserError where these make it another run.
    """
    old = {
        **asdict(config_from(ModelConfig, checkpoint["model_config"], path)),
        **asdict(config_from(TrainConfig, checkpoint["train_config"], path)),
    }
    new = merge(old, variant, given, RESUMABLE, "the run to resume")
    for name in sorted(new):
        if new[name] != old[name] and name not in ("out_dir", "resume"):
            print0(
                f"changed on resuming: {name} from {old[name]} to {new[name]}; "
                "the run may differ from here on")
    return resolve(new)


def resolve(settings):
    """(ModelConfig, TrainConfig) with every "auto" decided.

    So a checkpoint records what the run really used.
    """
    model_config = config_of(ModelConfig, settings)
    config = config_of(TrainConfig, settings)
    device = choose_device(config.device)
    if device == "mps" and WORLD_SIZE > 1:
        raise UserError("--device=mps works with one process; start train.py without torchrun")
    dtype = "bfloat16" if has_bfloat16(device) else "float32"
    decided = dict(
        dtype=dtype,
        muon_dtype=dtype,
        compile=device == "cuda",
        deterministic=device == "cpu")
    decided = {k: v for k, v in decided.items() if vars(config)[k] in ("auto", None)}
    config = replace(config, device=device, **decided)
    if device == "cuda" and not has_bfloat16(device):
        print0(f"{torch.cuda.get_device_name()} has no bfloat16: dtype={config.dtype}, "
               f"muon_dtype={config.muon_dtype}")
    if config.compile:
        check_compiler(device, config.dtype)
    return model_config, config


def config_of(kind, settings):
    """A ModelConfig or TrainConfig (`kind`) of its own settings among these."""
    return kind(**{f.name: settings[f.name] for f in fields(kind) if f.name in settings})


def has_bfloat16(device):
    """Whether the device computes in bfloat16 without emulating it (older GPUs do emulate it)."""
    return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def choose_data(preset):
    """The folder of shards where --data is not given.

    Writes the embedded default where nothing else is there.
    """
    if preset != "smoke" and os.path.isdir(FINEWEB_FOLDER):
        return FINEWEB_FOLDER
    if preset == "paper":
        raise UserError(
            f"--preset=paper needs the FineWeb-Edu shards in {FINEWEB_FOLDER}: "
            "python prepare_fineweb.py")
    print0(
        "NO --data: training on the source code of Python's standard library, byte by byte "
        f"({DEFAULT_DATA}).\nFor real text: --data=DIR with what prepare_fineweb.py brings "
        f"({FINEWEB_FOLDER}) or makes of your own (--input=FILES --out=DIR)")
    write_default_shards(DEFAULT_DATA)
    return DEFAULT_DATA


def check_compiler(device, dtype):
    """UserError where torch.compile would find no compiler, or not compile for the dtype."""
    if device == "cuda" and dtype != "float32" and not has_bfloat16(device):
        raise UserError(
            f"--dtype={dtype}: torch.compile does not compile it for "
            f"{torch.cuda.get_device_name()}, which has no bfloat16; drop the flag or add "
            "--compile=false")
    # Triton needs C, a CPU C++
    names = [os.environ.get("CXX", "g++"), "clang++"]
    needs = {}
    if device == "cuda":
        names = [os.environ.get("CC", "gcc"), "clang"]
        header = os.path.join(sysconfig.get_path("include"), "Python.h")
        needs[f"{header} (python3-dev)"] = os.path.exists(header)
        needs["triton"] = importlib.util.find_spec("triton")
    needs[" or ".join(names)] = any(map(shutil.which, names))
    missing = [name for name, there in needs.items() if not there]
    if missing:
        raise UserError(
            f"torch.compile needs {' and '.join(missing)}: install that, or run with "
            "--compile=false, slower and with more memory")


def parse_flags(argv):
    """(variant or None, preset or None, {flag: value} of the other flags that were given)."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        usage="python train.py [--variant=NAME] [--preset=NAME] [--FLAG=VALUE ...]",
        description="Defaults are the paper's. --variant and --preset replace some of them, in "
        "this order; a flag replaces both. Variants: " + ", ".join(VARIANTS) + ".",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=28))
    parser.error = lambda message: parser.exit(2, f"train.py: {message}; --help lists all flags\n")
    parser.add_argument(
        "--variant", choices=VARIANTS, default=None, metavar="NAME",
        help="row of Table 3 (default: exo_dynamic)")
    parser.add_argument(
        "--preset", choices=PRESETS, default=None,
        help="default: paper where there are a CUDA device and the FineWeb shards, else smoke")
    add_flags(parser, TrainConfig, "where")
    add_flags(parser, ModelConfig, "model")
    given = vars(parser.parse_args(argv))
    variant = given.pop("variant")
    preset = given.pop("preset")
    # "--data=" is no folder, but "--mix=" says that no letter is mixed
    given = {k: v for k, v in given.items() if v != "" or DEFAULTS[k]}
    return variant, preset, given


def add_flags(parser, kind, title):
    """A flag for every setting of a config class, in the groups that its fields begin."""
    group = parser.add_argument_group(title)
    for f in fields(kind):
        if "group" in f.metadata:
            group = parser.add_argument_group(f.metadata["group"])
        if f.name == "tokenizer":  # the data decide it
            continue
        kinds = typing.get_args(f.type) or (f.type,)  # float | None is (float, NoneType)
        default = "" if f.default in ("", None) else f" (default: {f.default})"
        default = default.lower() if bool in kinds else default
        choices = f.metadata["choices"]
        options = dict(metavar=kinds[0].__name__.upper())
        if choices:
            options = dict(choices=choices)
        if bool in kinds:
            options = dict(nargs="?", const=True, metavar="true|false")
        group.add_argument(
            f"--{f.name}", type=functools.partial(parse_value, kinds=kinds),
            help=f"{f.metadata['help']}{default}".replace("%", "%%"),
            **options)


def parse_value(text, kinds):
    """The value that a flag's text spells, of the first of `kinds`; "none" where None is one."""
    if type(None) in kinds and text.lower() == "none":
        return None
    try:
        if bool in kinds:
            return {"true": True, "false": False}[text.lower()]
        return kinds[0](text)
    except (KeyError, ValueError):
        what = "neither true nor false" if bool in kinds else f"not of type {kinds[0].__name__}"
        raise argparse.ArgumentTypeError(f"{text!r} is {what}") from None


# ---- 8 the run folder and its checkpoints --------------------------------------------------------

class RunFolder:
    """log.jsonl and ckpt_{step:06d}.pt of one run, for the first process alone.

    A lock keeps a second run out.
    """

    def __init__(self, path, resume):
        self.path = path
        self.log_path = os.path.join(path, "log.jsonl")
        self.lock = locked(path)
        for name in os.listdir(path):
            part = os.path.join(path, name)
            # of a run that was killed while it saved
            if re.fullmatch(r"ckpt_\d+\.pt\.part", name) and os.path.isfile(part):
                os.remove(part)
        if not resume and self.checkpoints():
            raise UserError(
                f"{path}: holds a run already; add --resume to continue it, or choose another "
                "--out_dir")
        if not self.checkpoints() and size_of(self.log_path):
            raise UserError(
                f"{self.log_path}: a log without a checkpoint; move it away, or choose another "
                "--out_dir")

    def checkpoints(self):
        """Paths of the checkpoints, newest first."""
        return list(checkpoints_in(self.path).values())

    def open_log(self, size):
        """Append to log.jsonl from byte `size` on.

        What was logged after the checkpoint is cut off, and logged again.
        """
        self.log = open(self.log_path, "a", encoding="utf-8")
        self.size = size
        self.log.truncate(min(size, size_of(self.log_path)))

    @contextlib.contextmanager
    def survive(self, what):
        """Print that it could not be done, and go on training."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of it
            print0(
                f"COULD NOT {what}: {str(error).splitlines()[0]}; training goes on, older "
                "files are intact")

    def write(self, record):
        """Append one object to log.jsonl; what a full disk refuses waits in the file's buffer."""
        with self.survive(f"WRITE {self.log_path}"):
            self.follow_log()
            self.log.write(json.dumps(record) + "\n")
            self.log.flush()
            self.size = os.fstat(self.log.fileno()).st_size

    def follow_log(self):
        """Say so where log.jsonl was removed, replaced or cut; go on in the file of that name.

        Not where the folder itself was: another run may have one there, and the next save says it.
        """
        if not still_locked(self.lock):
            return
        held = os.fstat(self.log.fileno())
        there = os.path.exists(self.log_path) and os.path.samestat(held, os.stat(self.log_path))
        if there and held.st_size >= self.size:
            return
        print0(f"LOG {self.log_path} was removed, replaced or cut: earlier records are missing")
        if not there:
            self.log = open(self.log_path, "a", encoding="utf-8")
        self.size = os.fstat(self.log.fileno()).st_size

    def save(self, checkpoint, keep):
        """Write ckpt_{step}.pt and drop all but the newest `keep`. True if it is there.

        UserError where another folder has taken the name: the files in it are another run's.
        """
        if not still_locked(self.lock):
            raise UserError(
                f"{self.path}: the folder of this run was moved, removed or replaced while it ran; "
                f"nothing is written there any more, its last checkpoint is in the old folder")
        path = os.path.join(self.path, f"ckpt_{checkpoint['step']:06d}.pt")
        saved = False
        with self.survive(f"WRITE {path}"):
            self.log.flush()
            os.fsync(self.log.fileno())
            log_size = os.fstat(self.log.fileno()).st_size
            save_checkpoint(path, {**checkpoint, "log_size": log_size})
            saved = True
        if saved and keep:
            with self.survive(f"REMOVE old checkpoints of {self.path}"):
                checkpoints = self.checkpoints()
                newest = checkpoints.index(path)  # later ones can only be damaged: resuming skipped
                for old in checkpoints[newest + keep :]:
                    os.remove(old)
        return saved


def save_checkpoint(path, checkpoint):
    """Write a dict of tensors and plain values; a crash leaves the old file or all of the new."""
    about = dict(
        format=FORMAT,
        git_revision=git_revision(),
        torch_version=str(torch.__version__))
    with atomic_write(path) as file:
        torch.save({**about, **checkpoint}, file)


@functools.cache
def git_revision():
    """The commit of this code, or "unknown"."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", here, "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.strip() or "unknown"
    return "unknown"


def save(trainer, folder, needed):
    """A checkpoint, written by the first process.

    UserError where it is `needed` and could not be written.
    """
    if on_first(lambda: folder.save(state_of(trainer), trainer.config.keep)):
        trainer.saved = trainer.step
    elif needed:
        raise UserError(
            f"{trainer.config.out_dir}: the run ends at step {trainer.step} without a checkpoint "
            "of it")


STATE = {  # what the checkpoint of a run holds, by type
    "model_config": dict,
    "train_config": dict,
    "step": int,
    "tokens": int,
    "evaluated": int,
    "shards": dict,
    "model": dict,
    "optimizers": list,
}


def state_of(trainer):
    """All of a run as tensors and plain values; load_state undoes it."""
    return dict(
        model_config=asdict(trainer.model_config),
        train_config=asdict(trainer.config),
        step=trainer.step,
        tokens=trainer.tokens,
        evaluated=trainer.evaluated,
        shards=trainer.shards,
        model=trainer.model.state_dict(),
        optimizers=[optimizer.state_dict() for optimizer in trainer.optimizers])


def load_state(trainer, checkpoint, path):
    """Continue from what `state_of` returned. UserError where it does not fit this run."""
    for split, new in trainer.shards.items():
        if checkpoint["shards"].get(split) != new:
            raise UserError(
                f"--data={trainer.config.data}: its {split} shards ({len(new)}, "
                f"{sum(tokens for _, tokens, _ in new):,} tokens) are not those that the run began "
                "with; bring the old data back")
    misfit = first_misfit(trainer, checkpoint)
    if misfit:
        raise UserError(f"{path} is not the whole state of this run: {misfit}")
    trainer.model.load_state_dict(checkpoint["model"])
    for optimizer, state in zip(trainer.optimizers, checkpoint["optimizers"]):
        # rates and all else that a group says come from the settings, moments from the file: an
        # optimizer that keeps state in its groups must take that from the file here
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({**state, "param_groups": groups})
    trainer.step = checkpoint["step"]
    trainer.saved = checkpoint["step"]
    trainer.tokens = checkpoint["tokens"]
    trainer.evaluated = checkpoint["evaluated"]


def check_resumable(trainer):
    """ValueError where --resume would refuse this run's checkpoints, before there is one to lose.

    `fits` must learn of an optimizer whose state is of another kind.
    """
    misfit = first_misfit(trainer, state_of(trainer))
    if misfit:
        raise ValueError(f"--resume would refuse the checkpoints of this run: {misfit}; see `fits`")


def first_misfit(trainer, checkpoint):
    """The first weight or optimizer state of a checkpoint that does not fit; "" if all do."""
    theirs = checkpoint["model"]
    for name, tensor in trainer.model.state_dict().items():
        if not (torch.is_tensor(theirs.get(name)) and theirs[name].shape == tensor.shape):
            return f"its weight {name} is missing or has another shape"
    if len(theirs) != len(trainer.model.state_dict()):
        return "it has weights that this model has no place for"
    if len(checkpoint["optimizers"]) != len(trainer.optimizers):
        return f"it has {len(checkpoint['optimizers'])} optimizers"
    for optimizer, state in zip(trainer.optimizers, checkpoint["optimizers"]):
        if not fits(optimizer, state, checkpoint["step"]):
            return f"the state of {type(optimizer).__name__} is not complete"
    return ""


def fits(optimizer, state, step):
    """Whether `state`, as of optimizer.state_dict() after `step` steps, can be that optimizer's."""
    sizes = [p.numel() for p in parameters_of(optimizer)]
    entries = state.get("state") if isinstance(state, dict) else None
    if not isinstance(entries, dict) or set(entries) != set(range(len(sizes) if step else 0)):
        return False
    if not all(isinstance(entry, dict) for entry in entries.values()):
        return False
    if len({frozenset(entry) for entry in entries.values()}) > 1:
        return False  # a moment is missing
    for i, entry in entries.items():
        for tensor in entry.values():
            # a number, a moment of each weight, or one for each row: all divide the size
            if not torch.is_tensor(tensor) or not tensor.numel() or sizes[i] % tensor.numel():
                return False
    return True


def continue_newest(paths, variant, given):
    """(Trainer, bytes of its log) from the first of these checkpoints that is whole.

    Says which are damaged and skipped. UserError where none is whole.
    """
    for path in paths:
        try:
            checkpoint = read_checkpoint(path)
        except DamagedCheckpoint as error:
            print0(f"skipped: {error}")
            continue
        check_format(checkpoint, path)
        for name, kind in {**STATE, "log_size": int}.items():
            if not isinstance(checkpoint.get(name), kind):
                raise UserError(f"{path} is not the whole state of a run: no {name} in it")
        trainer = Trainer(*resumed_settings(variant, given, checkpoint, path))
        load_state(trainer, checkpoint, path)
        print0(f"continuing {path} after step {trainer.step}")
        return trainer, checkpoint["log_size"]
    raise UserError(
        f"{given['out_dir']}: --resume found no whole checkpoint there; start anew in another "
        "--out_dir")


# ---- 9 signals -----------------------------------------------------------------------------------

class Stop:
    """Why a run should end early: a signal, or data that could not be read.

    All processes hear of it in `agreed`. A second Ctrl-C or SIGTERM ends the process at once. Under
    torchrun it is ignored: Ctrl-C reaches each process twice, and torchrun kills what will not end.
    """

    def __init__(self):
        self.signal = 0
        self.problem = ""
        there = signal.Signals.__members__  # Windows has two of the four
        for name in {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"} & set(there):
            if signal.getsignal(there[name]) != signal.SIG_IGN:  # nohup: SIGHUP stays ignored
                signal.signal(there[name], self.ask)

    def ask(self, number, frame):
        """The signal handler."""
        self.signal = number
        if number in (signal.SIGINT, signal.SIGTERM):  # a closed terminal can send SIGHUP twice
            signal.signal(number, signal.SIG_DFL if WORLD_SIZE == 1 else signal.SIG_IGN)
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step\n")

    def read(self, function, *args):
        """function(*args); None where it raises a UserError, kept until all have agreed."""
        try:
            return function(*args)
        except UserError as error:
            self.problem = str(error)

    def agreed(self):
        """Why all processes stop now, as a few words; "" if they go on."""
        flags = torch.tensor([self.signal, bool(self.problem)])
        number, failed = all_reduce(flags, dist.ReduceOp.MAX).tolist()
        self.signal = self.signal or number  # one that came meanwhile is agreed on the next time
        if failed:
            self.problem = self.problem or "another process could not read its data"
        return self.problem or (signal.Signals(number).name if number else "")


# ---- 10 several processes ------------------------------------------------------------------------

def init_processes(device):
    """Join the group that torchrun started."""
    # Dynamo imports this later. Its default arguments are the group of that moment, and a group
    # that outlives destroy_process_group has threads that can abort the process as it exits.
    import torch.distributed.nn.functional

    # a process that hangs ends the others after this; a checkpoint has to be written faster
    timeout = timedelta(minutes=10)
    if device != "cuda":
        dist.init_process_group("gloo", timeout=timeout)
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} has no GPU: there are {torch.cuda.device_count()}; lower "
            "torchrun's --nproc_per_node")
    torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout)


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """Combine `tensor` over all processes, in place, and return it."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor, op)
    return tensor


def all_reduce_gradients(parameters):
    """Sum the gradients over all processes, in one flat tensor per dtype."""
    if WORLD_SIZE == 1:
        return
    by_dtype = {}
    for p in parameters:
        by_dtype.setdefault(p.grad.dtype, []).append(p.grad)
    for grads in by_dtype.values():
        flat = all_reduce(torch.cat([grad.flatten() for grad in grads]))
        parts = flat.split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads)])


def shared(function, matrices):
    """function(matrices), (N, rows, cols) -> the same, each process computing its share of N."""
    if WORLD_SIZE == 1:
        return function(matrices)
    share = math.ceil(len(matrices) / WORLD_SIZE)
    mine = matrices[RANK * share : (RANK + 1) * share]
    mine = F.pad(mine, (0, 0, 0, 0, 0, share - len(mine)))  # zeros, where N does not divide
    mine = function(mine).contiguous()
    whole = mine.new_empty(share * WORLD_SIZE, *mine.shape[1:])
    dist.all_gather_into_tensor(whole, mine)
    return whole[: len(matrices)]


def on_first(function):
    """function() of the first process, for all processes; all wait for it.

    An error in the input ends all: the first process says it, the others leave without a word.
    """
    value = None
    problem = None
    if RANK == 0:
        try:
            value = function()
        except (InputError, UserError, OSError) as error:
            problem = error
    if WORLD_SIZE > 1:
        box = [value, problem is not None]
        dist.broadcast_object_list(box, device=torch.device("cpu"))
        value = box[0]
        if box[1] and RANK > 0:
            sys.exit(1)
    if problem:
        raise problem
    return value


def check_processes():
    """UserError where variables that torchrun sets together are set in part."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    known = [name for name in names if os.environ.get(name)]
    lacking = [name for name in names if name not in known]
    if {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & set(known) and lacking:
        raise UserError(
            f"{', '.join(known)} set in the environment, but not {', '.join(lacking)}: start "
            "several processes with torchrun, or unset these for a single one")


def use_deterministic_algorithms():
    """Make PyTorch choose algorithms that compute the same bits every time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


# ---- 11 report -----------------------------------------------------------------------------------

def print0(line):
    """Print on the first process only."""
    if RANK == 0:
        say(line)


PEAK_FLOPS = {  # dense bfloat16 FLOP/s by the device's name, from NVIDIA's data sheets
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}


def peak_flops(device):
    """Peak bfloat16 FLOP/s of this machine's device; infinite where it is not known.

    A share of it is then 0.
    """
    return PEAK_FLOPS.get(torch.cuda.get_device_name(), math.inf) if device == "cuda" else math.inf


def announce(trainer):
    """What is about to happen, before it does."""
    c = trainer.config
    m = trainer.model_config
    print0(
        f"model      {variant_name(m)}: {count_parameters(trainer.model):,} parameters, "
        f"{m.n_layer} layers, C {m.n_embd}, {m.n_head} heads, context {m.block_size}, "
        f"vocabulary {m.vocab_size}")
    for optimizer in trainer.optimizers:
        params = parameters_of(optimizer)
        numbers = sum(p.numel() for p in params)
        print0(f"{type(optimizer).__name__:10s} {len(params)} tensors, {numbers:,} numbers")
    print0(
        f"data       {c.data}: {sum(trainer.train.counts):,} training tokens ({m.tokenizer}) in "
        f"{len(trainer.train.paths)} shards; documents {'' if c.mask_documents else 'not '}masked")
    tokens = sum(step_tokens(step, c) for step in range(c.max_steps))
    epochs = tokens / (len(trainer.train) * m.block_size)
    flops = flops_per_token(trainer.model, m.block_size) * tokens
    print0(
        f"budget     {c.max_steps:,} steps, {tokens:,} tokens, {epochs:.2f} epochs, "
        f"{flops:.3g} FLOPs")
    print0(
        f"device     {c.device} x {WORLD_SIZE}, {c.dtype} (Muon {c.muon_dtype}), "
        f"{torch.get_num_threads()} threads, {c.batch_size} sequences x {trainer.count_passes()} "
        f"accumulations; run folder {c.out_dir}")
    if c.compile:
        print0("compiling, which can take some minutes")


def parameters_of(optimizer):
    """All tensors that an optimizer changes."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def report_memory(trainer):
    """What weights and optimizers hold, once a step has made the optimizers' states."""
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    states = [v for o in trainer.optimizers for entry in o.state.values() for v in entry.values()]
    moments = sum(t.numel() * t.element_size() for t in states if torch.is_tensor(t))
    print0(
        f"memory     {(2 * weights + moments) / 1e9:.3g} GB of weights, gradients and optimizer "
        f"states; a checkpoint has {(weights + moments) / 1e9:.3g} GB")


def report_step(trainer, folder, record, seconds_a_step, is_first):
    """Log a step, and print the first, the last and every log_every-th."""
    config = trainer.config
    if RANK == 0:
        folder.write(record)
    if is_first:
        report_memory(trainer)
    if is_first or trainer.step % config.log_every == 0 or trainer.step == config.max_steps:
        left = seconds_a_step * (config.max_steps - trainer.step)
        print0(progress_line(trainer, record, left))


def report_evaluation(folder, record):
    """Log an evaluation, and print it."""
    if RANK == 0:
        folder.write(record)
    print0(
        f"step {record['step']:6d} | validation loss {record['val_loss']:.4f}, "
        f"perplexity {record['val_ppl']:.2f}, {record['val_bpb']:.4f} bits per byte")


def progress_line(trainer, record, seconds_left):
    """One line of at most 100 columns from the log record of a step; z is in the log only."""
    config = trainer.config
    rate = step_tokens(record["step"] - 1, config) / (record["ms"] / 1000)
    flops = rate * flops_per_token(trainer.model, trainer.model_config.block_size) / WORLD_SIZE
    mfu = flops / peak_flops(config.device)
    return (
        f"step {record['step']:5d}/{config.max_steps}  loss {record['loss']:.4f}  "
        f"norm {record['grad_norm']:.2f}  lr {record['lr']:.1e}  {record['ms']:.0f} ms  "
        f"{rate / 1000:.3g}k tok/s  ETA {clock(seconds_left)}  "
        f"MFU {f'{mfu:.1%}' if mfu else 'n/a'}")


class Diverged(Exception):
    """The loss or the gradient is not finite."""


def first_not_finite(model):
    """The name of the first tensor that holds a NaN or an infinity."""
    tensors = [(f"weight {name}", p) for name, p in model.named_parameters()]
    tensors += [(f"gradient of {name}", p.grad) for name, p in model.named_parameters()]
    names = [name for name, tensor in tensors if not tensor.isfinite().all()]
    return names[0] if names else "the norm of all gradients together"


# ---- 12 main -------------------------------------------------------------------------------------

def prepare(argv):
    """(Trainer, RunFolder or None) from the command line.

    At step 0, or where the run in the folder stopped.
    """
    check_processes()
    variant, preset, given = parse_flags(argv)
    resuming = given.get("resume", False)
    if resuming and preset:
        print0(f"--preset={preset} names the folder only: a resumed run keeps its settings")
    if not preset:
        has_data = torch.cuda.is_available() and os.path.isdir(FINEWEB_FOLDER)
        preset = "paper" if has_data else "smoke"
    if WORLD_SIZE > 1:
        init_processes(choose_device(given.get("device", "auto")))
    if "out_dir" not in given:
        name = f"out/{preset}-{variant or 'exo_dynamic'}"
        given["out_dir"] = on_first(lambda: folder_for(name, resuming))
    if resuming and not os.path.isdir(given["out_dir"]):
        raise UserError(
            f"--resume: there is no folder {given['out_dir']}; name the run with --out_dir")
    settings = None if resuming else on_first(lambda: fresh_settings(variant, preset, given))
    folder, candidates = open_folder(given["out_dir"], resuming)
    if candidates:
        trainer, log_size = continue_newest(candidates, variant, given)
    else:
        if resuming:
            print0(f"{given['out_dir']} holds no checkpoint: starting at step 0 with these flags")
            settings = on_first(lambda: fresh_settings(variant, preset, given))
        trainer = begin(settings)
        log_size = 0
    on_first(lambda: folder.open_log(log_size))
    announce(trainer)
    return trainer, folder


def folder_for(name, resuming):
    """The run folder where none is given: `name`, or name-2, name-3, ... for later runs.

    A new run takes the first without a run in it; a resumed one that which was written last.
    """
    if resuming:
        paths = glob.glob(f"{glob.escape(name)}-*")
        numbered = [path for path in paths if path[len(name) + 1 :].isdecimal()]
        return max([name, *numbered], key=last_written)
    path = name
    n = 1
    while last_written(path):
        n += 1
        path = f"{name}-{n}"
    return path


def last_written(path):
    """When a run has last written into this folder; 0 where none has."""
    names = os.listdir(path) if os.path.isdir(path) else []
    ours = [name for name in names if re.fullmatch(r"ckpt_\d+\.pt|log\.jsonl", name)]
    return max((os.path.getmtime(os.path.join(path, name)) for name in ours), default=0)


def open_folder(path, resuming):
    """(RunFolder, for the first process alone; the paths of its checkpoints, newest first)."""
    folder = None

    def open_first():
        nonlocal folder
        folder = RunFolder(path, resuming)
        return folder.checkpoints()

    candidates = on_first(open_first)
    return folder, candidates


def begin(settings):
    """A Trainer at step 0, with the weights of --init_from where that is given."""
    trainer = Trainer(*settings)
    source = trainer.config.init_from
    if source:
        trainer.model.load_state_dict(load_checkpoint(source).state_dict())
    return trainer


def conclude(trainer, stopped, problem):
    """The last lines of a run: what came out and which command comes next."""
    out_dir = trainer.config.out_dir
    gpt2 = trainer.model_config.tokenizer == "gpt2"
    again = f"{launcher()} train.py --resume --out_dir={shlex.quote(out_dir)}"
    if WORLD_SIZE > 1:  # which join their group before they read the checkpoint
        again += f" --device={trainer.config.device}"
    if problem:
        raise UserError(
            f"{problem}; the run is saved after step {trainer.step}: mend the data, then {again}")
    if stopped:
        print0(f"stopped by {stopped} after step {trainer.step}, saved. Continue with:\n  {again}")
        return
    if trainer.config.sample_tokens and RANK == 0:
        print0(f"sample:\n{sample_text(trainer)}\n")
    checkpoint = f"--ckpt={shlex.quote(out_dir)}"
    prompt = "Once upon a time" if gpt2 else "def "
    print0(f"done: {trainer.step} steps. Next:")
    print0(f'  python model.py {checkpoint} --prompt="{prompt}"')
    if gpt2:
        print0(f"  python eval_hellaswag.py {checkpoint}")
    print0(f"  {again} --max_steps={2 * trainer.step}")


def launcher():
    """What starts as many processes, on as many machines, as there are now."""
    if WORLD_SIZE == 1:
        return "python"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD_SIZE))  # torchrun sets it
    nodes = f"--nnodes={WORLD_SIZE // here} " if here < WORLD_SIZE else ""
    return f"torchrun {nodes}--nproc_per_node={here}"


def sample_text(trainer):
    """A text that the model writes from nothing."""
    config = trainer.config
    trainer.model.eval()
    with torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        return continue_text(trainer.model, trainer.tokenizer, "", config.sample_tokens)[0]


def main():
    """The command line.

    Exit codes: 1 bad input, 2 bad usage, 3 diverged, 128 + n stopped by signal n.
    """
    trainer, folder = prepare(sys.argv[1:])
    stop = Stop()
    diverged = None
    try:
        stopped = run(trainer, folder, stop)
    except Diverged as error:
        diverged = error
    if WORLD_SIZE > 1:
        dist.destroy_process_group()  # all processes come here together
    if diverged:
        print0(
            f"train.py: not finite at {diverged}. Lower the learning rates and --resume (from the "
            "newest checkpoint: move away those that are too late), or start anew in another "
            "--out_dir")
        return 3
    conclude(trainer, stopped, stop.problem)
    return 128 + stop.signal if stopped and stop.signal else 0


if __name__ == "__main__":
    smaller = "lower --batch_size (the same step in more passes), --block_size or --n_embd"
    command_line(main, InputError, memory=smaller)
