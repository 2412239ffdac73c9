"""
Train any variant of ExoFormer, on one GPU, several (torchrun) or a CPU.

    python train.py                              no flags: on a CPU a small model on Python's own sources, a minute
    python train.py --variant=exo_dynamic        on an H100 with the FineWeb shards: the paper's run (Table 4)
    python train.py --preset=small --data=DIR    GPT-2-small size, one consumer GPU
    python train.py --resume --out_dir=DIR       go on where a run stopped, bit for bit
    python train.py --init_from=PATH --data=DIR  a new run from the weights of a checkpoint, ours or a released one
    torchrun --nproc_per_node=8 train.py ...     the same run on eight GPUs

Later settings override earlier ones: the defaults below (the paper's recipe), the variant, the preset, the flags.
Which tokens step s reads follows from the settings, the seed and s; so do learning rate and momentum. A checkpoint
therefore stores no position in the data.
"""
import os
import signal

if __name__ == "__main__":                                  # one line for Ctrl-C during the imports, which take seconds
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"\ntrain.py: interrupted\n"), os._exit(128 + signal.SIGINT)))

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import typing
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

from model import (FORMAT, VARIANTS, ExoFormer, InputError, Linear, ModelConfig, check_format, check_ranges,
                   choose_device, config_from, continue_text, count_parameters, flops_per_token, load_checkpoint, read_checkpoint,
                   setting, variant_name, variant_settings)
from muon import Muon, polar_express
from prepare_fineweb import (Progress, UserError, atomic_write, clock, command_line, find_shards, fingerprint, get_tokenizer, locked,
                             read_meta, read_window, say, shard_tokens, write_default_shards)

FINEWEB, DEFAULT_DATA = "data/fineweb_edu10B", "data/python_stdlib"
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))         # torchrun sets both


def print0(line):
    """Print on the first process only."""
    if RANK == 0:
        say(line)


# ----------------------------------------------------------------------------------------------------------- 1 settings

@dataclass(frozen=True)
class TrainConfig:
    """The recipe. The defaults are the paper's (Table 4), except where the README says otherwise."""
    # where
    data: str = setting("", "folder of token shards; empty: FineWeb-Edu if it is there and the preset is not smoke, "
                        "else Python's own sources")
    out_dir: str = setting("", "run folder for log.jsonl and checkpoints; empty: out/PRESET-VARIANT")
    resume: bool = setting(False, "continue the newest whole checkpoint in out_dir, with its settings")
    init_from: str = setting("", "checkpoint to take the weights and the model's settings from; empty: draw new ones")
    device: str = setting("auto", "auto: cuda, else mps, else cpu", ("auto", "cuda", "mps", "cpu"))
    dtype: str = setting("auto", "bfloat16: float32 weights, bfloat16 compute; pure_bfloat16: as the released code, no "
                         "float32 copy of matrices; auto: bfloat16 on cuda, else float32",
                         ("auto", "float32", "bfloat16", "pure_bfloat16"))
    compile: str = setting("auto", "torch.compile; auto: on cuda", ("auto", "true", "false"))
    deterministic: str = setting("auto", "deterministic algorithms only; auto: on a CPU", ("auto", "true", "false"))
    # how much
    seed: int = setting(1337, "of the initial weights and the order of the data", low=0, high=2**63 - 1)
    max_steps: int = setting(38147, "optimizer steps", low=1)
    max_minutes: float = setting(0.0, "stop, saved and resumable, after the step that passes this; 0: never", low=0)
    batch_size: int = setting(16, "sequences per forward pass and device", low=1)
    total_batch_size: int = setting(262144, "tokens per optimizer step, over all forward passes and devices", low=1)
    mask_documents: bool = setting(True, "attention does not cross documents")
    # optimizer
    optimizer: str = setting("muon", "for the matrices of layers and anchors", ("muon", "adamw"))
    muon_lr: float = setting(0.01, "peak learning rate of Muon", low=0)
    muon_momentum: float = setting(0.95, "momentum of Muon", low=0, high=1)
    muon_ramp: bool = setting(False, "as released: momentum from 0.85 over the first 100 steps, back at the end")
    muon_beta2: float = setting(0.0, "second moment of NorMuon (released code: 0.95); 0: none", low=0, high=1)
    muon_dtype: str = setting("auto", "of the Polar Express iteration; auto: float32 on a CPU, else bfloat16",
                              ("auto", "bfloat16", "float32"))
    muon_fused: bool = setting(False, "as released: treat stacked Q,K,V,G (and the two of SwiGLU) as one matrix")
    adamw_lr: float = setting(0.003, "peak learning rate of AdamW", low=0)
    weight_decay: float = setting(0.1, "decoupled; cautious in Muon; on matrices only", low=0)
    warmup_steps: int = setting(1000, "linear warm-up to the peak", low=0)
    decay_fraction: float = setting(0.2, "share of the steps, at the end, with a falling rate", low=0, high=1)
    final_lr: float = setting(0.1, "learning rate at the end, as a share of the peak", low=0, high=1)
    grad_clip: float = setting(1.0, "largest norm of the whole gradient", low=1e-12)
    z_loss: float = setting(1e-5, "weight of mean logsumexp^2 in the loss", low=0)
    # how often
    eval_every: int = setting(500, "steps between validation losses; 0: only first and last", low=0)
    eval_tokens: int = setting(10_485_760, "validation tokens per evaluation; 0: all", low=0)
    final_eval_tokens: int = setting(0, "validation tokens of the last evaluation; 0: all", low=0)
    save_every: int = setting(1000, "steps between checkpoints; 0: only the first and the last", low=0)
    keep: int = setting(2, "newest checkpoints to keep; 0: all", low=0)
    log_every: int = setting(10, "steps between printed lines (log.jsonl has every step)", low=1)
    sample_tokens: int = setting(200, "length of the sample at the end; 0: none", low=0)

    def __post_init__(self):
        check_ranges(self)


PRESETS = {  # fields of ModelConfig and TrainConfig that differ from the paper's
    "paper": dict(),
    "small": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=8, total_batch_size=131072,
                  max_steps=19073, warmup_steps=500, eval_tokens=2_097_152),
    "smoke": dict(n_layer=4, n_head=4, n_embd=128, block_size=256, batch_size=8, total_batch_size=2048, max_steps=160,
                  warmup_steps=20, decay_fraction=0.5, eval_every=80, eval_tokens=32768, final_eval_tokens=32768,
                  save_every=80, log_every=20),
}

MAY_CHANGE_ON_RESUME = set("""out_dir resume data device compile deterministic max_steps max_minutes batch_size muon_lr
    adamw_lr warmup_steps decay_fraction final_lr eval_every eval_tokens final_eval_tokens save_every keep log_every
    sample_tokens""".split())


def true_or_false(text):
    """An argparse type for switches."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def parse_flags(argv):
    """(variant or None, preset or None, {flag: value} of the other flags that were given)."""
    parser = argparse.ArgumentParser(prog="train.py", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: parser.exit(2, f"train.py: {message}; --help lists all flags\n")
    parser.add_argument("--variant", choices=VARIANTS, default=None, help="row of Table 3 (default: exo_dynamic)")
    parser.add_argument("--preset", choices=PRESETS, default=None,
                        help="default: paper where there are a CUDA device and the FineWeb shards, else smoke")
    for config in (TrainConfig, ModelConfig):
        group = parser.add_argument_group(config.__name__, "The defaults are the paper's; --preset and --variant "
                                          "replace some of them, a flag replaces both.")
        for f in (f for f in fields(config) if f.name != "tokenizer"):            # the data decide the tokenizer
            kind = next(iter(typing.get_args(f.type)), f.type)                    # float | None is given as a float
            switch = dict(type=true_or_false, nargs="?", const=True) if kind is bool else dict(type=kind)
            group.add_argument(f"--{f.name}", help=f"{f.metadata['help']} (default: {f.default})".replace("%", "%%"),
                               choices=f.metadata["choices"], **switch)
    given = vars(parser.parse_args(argv))
    variant, preset = given.pop("variant"), given.pop("preset")
    return variant, preset, {k: v for k, v in given.items() if v != "" or k in ("mix", "anchor_norm")}     # "--data="


def fresh_settings(variant, preset, given):
    """(ModelConfig, TrainConfig) of a new run."""
    settings = variant_settings(variant or "exo_dynamic", {**PRESETS[preset], **given})
    settings["data"] = settings.get("data") or choose_data(preset)
    find_shards(settings["data"], "train")                 # says what to do where there are none
    settings["tokenizer"] = read_meta(settings["data"])["tokenizer"]
    if preset != "paper" and "vocab_size" not in given:
        settings["vocab_size"] = 64 * math.ceil(get_tokenizer(settings["tokenizer"]).n_vocab / 64)
    if path := settings.get("init_from"):
        source = asdict(load_checkpoint(path).config)
        if source["tokenizer"] != settings["tokenizer"]:
            raise UserError(f"--data={settings['data']} holds {settings['tokenizer']} tokens, but the model in "
                            f"--init_from={path} was trained on {source['tokenizer']}")
        asked = {name: value for name, value in asked_for(variant, given).items() if name in source}
        settings.update(changed(source, asked, {"block_size"}, f"the model in --init_from={path}"))
    return resolve(settings)


def choose_data(preset):
    """The folder of shards where --data is not given; writes the embedded default where nothing else is there."""
    if preset != "smoke" and os.path.isdir(FINEWEB):
        return FINEWEB
    if preset == "paper":
        raise UserError(f"--preset=paper needs the FineWeb-Edu shards in {FINEWEB}: python prepare_fineweb.py")
    print0(f"NO --data: training on the source code of Python's standard library, byte by byte ({DEFAULT_DATA}).\n"
           "For real text: python prepare_fineweb.py, or its --input=FILES --out=DIR and then --data=DIR here")
    write_default_shards(DEFAULT_DATA)
    return DEFAULT_DATA


def resolve(settings):
    """(ModelConfig, TrainConfig) with every "auto" decided, so that a checkpoint records what the run really used."""
    model_config, config = (kind(**{f.name: settings[f.name] for f in fields(kind) if f.name in settings})
                            for kind in (ModelConfig, TrainConfig))
    device = choose_device(config.device)
    if device == "mps" and WORLD_SIZE > 1:
        raise UserError("--device=mps works with one process only; start train.py without torchrun")
    auto = dict(dtype="bfloat16" if device == "cuda" else "float32", compile=str(device == "cuda").lower(),
                deterministic=str(device == "cpu").lower(), muon_dtype="float32" if device == "cpu" else "bfloat16")
    config = replace(config, device=device, **{k: v for k, v in auto.items() if vars(config)[k] == "auto"})
    if config.compile == "true":
        check_compiler(device)
    cpu = torch.backends.cpu.get_cpu_capability()
    if device == "cpu" and "bfloat16" in config.dtype + config.muon_dtype and not cpu.startswith("AVX512"):
        print0(f"SLOW: without bfloat16 instructions a CPU (this one: {cpu}) takes up to 250 times as long for a "
               "matrix product as in float32; --dtype=float32 --muon_dtype=float32 avoids it")
    return model_config, config


def check_compiler(device):
    """UserError where torch.compile would find no compiler: Triton builds a C extension, a CPU needs C++."""
    names = [os.environ.get("CC", "gcc"), "clang"] if device == "cuda" else [os.environ.get("CXX", "g++"), "clang++"]
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    needs = {" or ".join(names): any(map(shutil.which, names))}
    if device == "cuda":
        needs |= {f"{header} (python3-dev)": os.path.exists(header), "triton": importlib.util.find_spec("triton")}
    if missing := [name for name, there in needs.items() if not there]:
        raise UserError(f"torch.compile needs {' and '.join(missing)}: install that, or run with --compile=false, "
                        "slower and with more memory")


def asked_for(variant, given):
    """The settings that the command line asks for: those of --variant but its n_layer, which a preset may change, and
    each flag that was given."""
    row = variant_settings(variant, given) if variant else given
    return {name: value for name, value in row.items() if name != "n_layer" or name in given}


def changed(old, asked, may_change, what):
    """The settings `old` with those that are asked for; UserError for one that may not change in `what`."""
    changes = {name: value for name, value in asked.items() if value not in (old[name], "auto")}
    for name, value in changes.items():
        if name not in may_change:
            raise UserError(f"--{name}={value} does not fit {what}, which has {name}={old[name]}; drop the flag")
    return {**old, **changes}


def resumed_settings(variant, given, path, checkpoint):
    """(ModelConfig, TrainConfig) of a checkpoint and the flags given now. UserError where they make another run."""
    check_format(checkpoint, path)
    old = {**asdict(config_from(ModelConfig, checkpoint["model_config"], path)),
           **asdict(config_from(TrainConfig, checkpoint["train_config"], path))}
    new = changed(old, asked_for(variant, given), MAY_CHANGE_ON_RESUME, "the run to resume")
    for name in sorted(name for name in new if new[name] != old[name] and name not in ("out_dir", "resume")):
        print0(f"changed on resuming: {name} from {old[name]} to {new[name]}; the run may differ from here on")
    return resolve(new)


# ---------------------------------------------------------------------------------- 2 functions of step: rates and data

def lr_multiplier(step, config):
    """Learning rate of `step` (0-based) as a share of the peak: linear warm-up, constant, linear fall (Table 4)."""
    falling = int(config.decay_fraction * config.max_steps)
    fallen = max(0, step - (config.max_steps - falling)) / max(1, falling)
    return min((step + 1) / max(1, config.warmup_steps), 1 - (1 - config.final_lr) * fallen)


def muon_momentum(step, config):
    """Muon's momentum at `step`; muon_ramp: the released code's 0.85 -> peak over 100 steps, and back at the end."""
    if not config.muon_ramp:
        return config.muon_momentum
    ramp = min(1, step / 100, 1 - (step - (config.max_steps - 100)) / 100)
    return 0.85 + (config.muon_momentum - 0.85) * ramp


@functools.lru_cache(maxsize=2)
def permutation(seed, epoch, n):
    """The order in which `epoch` visits n windows. Change this for another order of the data."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n)


class Tokens:
    """One split of a data folder, cut into windows of block_size + 1 tokens that overlap by one."""

    def __init__(self, folder, split, model_config):
        self.limit = min(get_tokenizer(model_config.tokenizer).n_vocab, model_config.vocab_size)
        self.block_size = model_config.block_size
        self.paths = find_shards(folder, split)
        self.counts = [shard_tokens(path) for path in self.paths]
        self.starts = np.cumsum([0] + [(count - 1) // self.block_size for count in self.counts])
        if len(self) == 0:
            raise UserError(f"{folder}: no {split} shard holds block_size + 1 = {self.block_size + 1} tokens; "
                            "lower --block_size")

    def __len__(self):
        return int(self.starts[-1])

    def window(self, i):
        """Tokens of window i, (block_size + 1,) uint16."""
        shard = int(np.searchsorted(self.starts, i, side="right")) - 1
        start = int(i - self.starts[shard]) * self.block_size
        tokens = read_window(self.paths[shard], start, self.block_size + 1)
        if tokens.max() >= self.limit:
            raise UserError(f"{self.paths[shard]}: token id {tokens.max()} is not below {self.limit}, the size of the "
                            "vocabulary; damaged, or of another tokenizer (python prepare_fineweb.py verify --out=DIR)")
        return tokens

    def shuffled(self, seed, first, count):
        """Windows first ... first + count - 1 of the endless training order, (count, block_size + 1)."""
        places = [divmod(k, len(self)) for k in range(first, first + count)]
        return np.stack([self.window(permutation(seed, epoch, len(self))[i]) for epoch, i in places])


def to_batch(windows, eot, config):
    """(idx, targets, docs), each (B, T) on the device, from windows (B, T + 1); docs is None without mask_documents."""
    windows = torch.from_numpy(windows.astype(np.int64)).to(config.device)
    idx, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    return idx, targets, (idx == eot).cumsum(1) if config.mask_documents else None


# ----------------------------------------------------------------------------------------------------- 3 many processes

def init_processes(device):
    """Join the group that torchrun started."""
    local_rank, cuda = int(os.environ["LOCAL_RANK"]), device == "cuda"
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(f"process {local_rank} has no GPU: there are {torch.cuda.device_count()}; lower "
                        "torchrun's --nproc_per_node")
    if cuda:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """Combine `tensor` over all processes, in place, and return it."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor, op)
    return tensor


def all_reduce_gradients(parameters):
    """Sum the gradients over all processes, in one flat tensor per dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        grads = [p.grad for p in parameters if p.dtype == dtype]
        if WORLD_SIZE > 1 and grads:
            flat = all_reduce(torch.cat([grad.flatten() for grad in grads]))
            parts = flat.split([grad.numel() for grad in grads])
            torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads)])


def broadcast(value):
    """Send the first process's `value` to all processes, and return it; all wait for it."""
    box = [value]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


# -------------------------------------------------------------------------------------------------- 4 model, optimizers

class Objective(nn.Module):
    """The training loss as one module, so that torch.compile sees a single forward."""

    def __init__(self, model, config):
        super().__init__()
        self.model, self.z_loss, self.autocast = model, config.z_loss, config.dtype == "bfloat16"

    def forward(self, idx, targets, docs):
        """(loss to minimise, cross-entropy, z), scalars."""
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=self.autocast):
            cross_entropy, z = self.model.loss(idx, targets, docs)
        return cross_entropy + self.z_loss * z, cross_entropy, z


def build_model(model_config, config):
    """A freshly initialised model: drawn on the CPU, so that one seed gives the same weights on every device."""
    torch.manual_seed(config.seed)
    model = ExoFormer(model_config)
    if config.dtype == "pure_bfloat16":                    # as the released code: gains and lambdas stay float32
        for module in model.modules():
            if isinstance(module, (Linear, nn.Embedding)):
                module.bfloat16()
    return model.to(config.device)


def build_optimizers(model, config):
    """[Muon, AdamW] or [AdamW]: every parameter in exactly one group."""
    matrices = [m for name, m in model.named_modules() if isinstance(m, Linear) and name != "head"]
    inside = {id(m.weight) for m in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    adamw = dict(lr=config.adamw_lr, betas=(0.9, 0.95), eps=1e-8, fused=config.device == "cuda")
    if config.optimizer == "adamw":
        decayed = dict(params=[m.weight for m in matrices], weight_decay=config.weight_decay)
        return [torch.optim.AdamW([decayed, dict(params=others, weight_decay=0.0)], **adamw)]
    by_parts = {}
    for m in matrices:
        by_parts.setdefault(1 if config.muon_fused else len(m.heights), []).append(m.weight)
    groups = [dict(params=params, parts=parts) for parts, params in by_parts.items()]
    dtype = torch.float32 if config.muon_dtype == "float32" else torch.bfloat16
    muon = Muon(groups, lr=config.muon_lr, weight_decay=config.weight_decay, beta2=config.muon_beta2 or None,
                polar=functools.partial(polar_express, dtype=dtype))
    return [muon, torch.optim.AdamW([dict(params=others)], weight_decay=0.0, **adamw)]


# ----------------------------------------------------------------------------------------------------- 5 the run folder

@functools.cache
def git_revision():
    """The commit of this code, or "unknown"."""
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"


def save_checkpoint(path, checkpoint):
    """Write a dict of tensors and plain values so that a crash leaves the old file or the whole new one."""
    with atomic_write(path) as file:
        torch.save({"format": FORMAT, "git_revision": git_revision(), "torch_version": str(torch.__version__),
                    **checkpoint}, file)


class RunFolder:
    """log.jsonl and ckpt_{step:06d}.pt of one run, for the first process alone; a lock keeps a second run out."""

    def __init__(self, path, resume):
        self.path, self.log_path = path, os.path.join(path, "log.jsonl")
        self.lock = locked(path)
        for name in os.listdir(path):
            if re.fullmatch(r"ckpt_\d+\.pt\.part", name):                  # of a run that was killed while it saved
                os.remove(os.path.join(path, name))
        if not resume and self.checkpoints():
            raise UserError(f"{path}: holds a run already; add --resume to continue it, or choose another --out_dir")

    def checkpoints(self):
        """Paths of the checkpoints, newest first."""
        steps = sorted(int(name[5:-3]) for name in os.listdir(self.path) if re.fullmatch(r"ckpt_\d{6,}\.pt", name))
        return [os.path.join(self.path, f"ckpt_{step:06d}.pt") for step in reversed(steps)]

    def open_log(self, size):
        """Append to log.jsonl from byte `size` on: what was logged after the checkpoint is cut off and logged again."""
        self.log = open(self.log_path, "a")
        self.log.truncate(min(size, os.path.getsize(self.log_path)))

    @contextlib.contextmanager
    def survive(self, what):
        """Print that a write failed, and go on training."""
        try:
            yield
        except (OSError, RuntimeError) as error:                           # torch.save makes a RuntimeError of it
            print0(f"COULD NOT WRITE {what}: {str(error).splitlines()[0]}; training goes on, older files are intact")

    def write(self, record):
        """Append one object to log.jsonl; what a full disk refuses waits in the file's buffer."""
        with self.survive(self.log_path):
            self.log.write(json.dumps(record) + "\n")
            self.log.flush()

    def save(self, checkpoint, keep):
        """Write ckpt_{step}.pt and drop all but the newest `keep`. True if it is there."""
        path, saved = os.path.join(self.path, f"ckpt_{checkpoint['step']:06d}.pt"), False
        with self.survive(path):
            self.log.flush()
            os.fsync(self.log.fileno())
            save_checkpoint(path, {**checkpoint, "log_size": os.fstat(self.log.fileno()).st_size})
            saved = True
            checkpoints = self.checkpoints()               # those of later steps are damaged: they were skipped
            for old in checkpoints[checkpoints.index(path) + keep:] if keep else []:
                os.remove(old)
        return saved


class Stop:
    """Why a run should end early: a signal, or data that could not be read. All processes hear of it in `agreed`.

    A second Ctrl-C or SIGTERM ends the process at once. Under torchrun it is ignored: Ctrl-C reaches each process
    twice, and torchrun kills what will not end.
    """

    def __init__(self):
        self.signal, self.problem = 0, ""
        for name in {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"} & set(signal.Signals.__members__):    # Windows: two
            if signal.getsignal(signal.Signals[name]) != signal.SIG_IGN:                 # nohup: SIGHUP stays ignored
                signal.signal(signal.Signals[name], self.ask)

    def ask(self, number, frame):
        """The signal handler."""
        self.signal = number
        if number in (signal.SIGINT, signal.SIGTERM):          # a closed terminal can send SIGHUP twice
            signal.signal(number, signal.SIG_DFL if WORLD_SIZE == 1 else signal.SIG_IGN)
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step\n")

    def read(self, function, *args):
        """function(*args), or None where it raises a UserError, which is kept until all processes have agreed."""
        try:
            return function(*args)
        except UserError as error:
            self.problem = str(error)

    def agreed(self, late=False):
        """Why all processes stop now, as a few words; "" if they go on."""
        flags = torch.tensor([self.signal, bool(self.problem), late])
        number, failed, late = all_reduce(flags, dist.ReduceOp.MAX).tolist()
        self.signal = self.signal or number                    # one that came meanwhile is agreed on the next time
        if failed:
            self.problem = self.problem or "another process could not read its data"
        return self.problem or (signal.Signals(number).name if number else "--max_minutes" if late else "")


# ------------------------------------------------------------------------------------------------ 6 step and evaluation

class Diverged(Exception):
    """The loss or the gradient is not finite."""


class Trainer:
    """Everything a step needs, and the step."""

    def __init__(self, model_config, config):
        if config.deterministic == "true":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        self.model_config, self.config = model_config, config
        self.sequences = config.batch_size * WORLD_SIZE                    # of one forward pass on all processes
        self.accumulation, rest = divmod(config.total_batch_size, self.sequences * model_config.block_size)
        if rest or not self.accumulation:
            raise UserError(f"--total_batch_size={config.total_batch_size} is not a multiple of --batch_size="
                            f"{config.batch_size} x --block_size={model_config.block_size} x {WORLD_SIZE} process(es)")
        self.tokenizer = get_tokenizer(model_config.tokenizer)
        self.train, self.val = (Tokens(config.data, split, model_config) for split in ("train", "val"))
        self.shards = {split: fingerprint(config.data, split) for split in ("train", "val")}     # compared on resuming
        self.model = build_model(model_config, config)
        self.optimizers = build_optimizers(self.model, config)
        self.objective = Objective(self.model, config)
        if config.compile == "true":
            # a value that 3 kernels read is kept, not computed 3 times: 6 % of exo_dynamic's traced time on an H100
            options = dict(realize_reads_threshold=3) if config.device == "cuda" else {}
            self.objective.compile(fullgraph=True, dynamic=False, options=options)
        self.step, self.best_val = 0, math.inf
        self.saved = self.evaluated = -1                                   # the last step that was saved, evaluated

    def read_step(self):
        """This process's windows of the step, (accumulation, B, T + 1); all together read what a single one would."""
        first = self.step * self.accumulation * self.sequences + RANK * self.config.batch_size
        return np.stack([self.train.shuffled(self.config.seed, first + i * self.sequences, self.config.batch_size)
                         for i in range(self.accumulation)])

    def update(self, windows):
        """One optimizer step on the windows of `read_step`: its record for the log."""
        config, parameters, rate = self.config, list(self.model.parameters()), lr_multiplier(self.step, self.config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * (config.muon_lr if isinstance(optimizer, Muon) else config.adamw_lr)
                if isinstance(optimizer, Muon):
                    group["momentum"] = muon_momentum(self.step, config)

        torch.manual_seed(config.seed + self.step)         # a layer that draws random numbers, say dropout, resumes too
        sums, passes = torch.zeros(2, device=config.device), self.accumulation * WORLD_SIZE
        for batch in windows:
            loss, cross_entropy, z = self.objective(*to_batch(batch, self.tokenizer.eot, config))
            (loss / passes).backward()
            sums += torch.stack((cross_entropy.detach(), z.detach())).float() / passes
        all_reduce_gradients(parameters)       # a compiled backward yields all of them at its end: nothing to overlap
        cross_entropy, z = all_reduce(sums).tolist()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if not math.isfinite(cross_entropy + norm.item()):                  # checked before any weight changes
            raise Diverged(f"step {self.step + 1}: loss {cross_entropy}, gradient norm {norm.item()}, learning rates "
                           f"{rate:.3g} of their peaks; not finite first: {self.first_not_finite()}")

        torch.nn.utils.clip_grads_with_norm_(parameters, config.grad_clip, norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return dict(step=self.step, loss=cross_entropy, z=z, grad_norm=norm.item(),
                    lr=self.optimizers[0].param_groups[0]["lr"], tokens=self.step * config.total_batch_size)

    def first_not_finite(self):
        """The name of the first tensor that holds a NaN or an infinity."""
        tensors = [(f"weight {name}", p) for name, p in self.model.named_parameters()]
        tensors += [(f"gradient of {name}", p.grad) for name, p in self.model.named_parameters()]
        return next((name for name, t in tensors if not t.isfinite().all()), "the norm of all gradients together")

    def evaluate(self, tokens, stop):
        """Mean cross-entropy over the first `tokens` (0: all) of the validation split: a log record; or None."""
        config, T = self.config, self.model_config.block_size
        n = min(len(self.val), math.ceil(tokens / T)) if tokens else len(self.val)
        sums, progress = torch.zeros(3, dtype=torch.float64), Progress("evaluating", n, "windows")
        for first in range(0, n, self.sequences):
            mine = range(first + RANK * config.batch_size, min(first + (RANK + 1) * config.batch_size, n))
            windows = stop.read(lambda: [self.val.window(i) for i in mine])
            if stop.agreed():
                return None
            if windows:
                sums += self.evaluate_batch(np.stack(windows))
            if RANK == 0:
                progress.update(min(first + self.sequences, n))
        progress.end()
        total, count, n_bytes = all_reduce(sums).tolist()
        loss = total / count
        self.evaluated, self.best_val = self.step, min(self.best_val, loss)
        return dict(step=self.step, tokens=self.step * config.total_batch_size, val_loss=loss,
                    val_ppl=math.exp(min(loss, 700.0)), val_bpb=loss / math.log(2) * count * T / n_bytes)

    def evaluate_batch(self, windows):
        """(rows x mean cross-entropy, rows, bytes of text) of windows (rows, T + 1), in float64. The batch is filled up
        with windows whose targets do not count."""
        rows, n_bytes = len(windows), self.tokenizer.n_bytes(windows[:, 1:].ravel())
        windows = np.pad(windows, ((0, self.config.batch_size - rows), (0, 0)))
        idx, targets, docs = to_batch(windows, self.tokenizer.eot, self.config)
        targets[rows:] = -100
        with torch.set_grad_enabled(self.config.compile == "true"):        # compiled: the training graph is reused
            loss = self.objective(idx, targets, docs)[1].item()    # a number: a tensor would keep its graph in memory
        return torch.tensor([loss * rows, rows, n_bytes], dtype=torch.float64)

    def state(self):
        """All of the run as tensors and plain values; load_state undoes it."""
        return dict(model_config=asdict(self.model_config), train_config=asdict(self.config), step=self.step,
                    tokens=self.step * self.config.total_batch_size, evaluated=self.evaluated, best_val=self.best_val,
                    shards=self.shards, model=self.model.state_dict(),
                    optimizers=[optimizer.state_dict() for optimizer in self.optimizers])

    def load_state(self, checkpoint):
        """Continue from what `state` returned. UserError where the data are not the same, KeyError, ValueError or
        RuntimeError where the checkpoint is not of this structure."""
        for split, new in self.shards.items():
            old = checkpoint["shards"][split]
            if old != new:
                raise UserError(f"--data={self.config.data}: its {split} shards are not those that the run began with "
                                f"({len(old)}, {sum(entry[1] for entry in old):,} tokens); bring the old data back")
        self.model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizers"], strict=True):
            for group in state["param_groups"]:
                group.update({"fused": self.config.device == "cuda"} if "fused" in group else {})
            kinds = {frozenset(entries) for entries in state["state"].values()}
            parameters = sum(len(group["params"]) for group in state["param_groups"])
            if checkpoint["step"] and (len(kinds) != 1 or len(state["state"]) != parameters):
                raise ValueError(f"the state of {type(optimizer).__name__} is not complete")
            optimizer.load_state_dict(state)
        self.step, self.best_val = checkpoint["step"], checkpoint["best_val"]
        self.saved, self.evaluated = self.step, checkpoint["evaluated"]


# ------------------------------------------------------------------------------------------------------------- 7 report

PEAK_FLOPS = {  # dense bfloat16 FLOP/s by a part of the device's name, from NVIDIA's data sheets; MFU is n/a for others
    "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12,
}


def peak_flops(device):
    """Peak bfloat16 FLOP/s of this machine's device; infinite where it is not known, so that a share of it is 0."""
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), math.inf)


def announce(trainer):
    """What is about to happen, before it does."""
    c, m = trainer.config, trainer.model_config
    tokens, epoch = c.max_steps * c.total_batch_size, len(trainer.train) * m.block_size
    print0(f"model      {variant_name(m)}: {count_parameters(trainer.model):,} parameters, {m.n_layer} layers, "
           f"C {m.n_embd}, {m.n_head} heads, context {m.block_size}, vocabulary {m.vocab_size}")
    for optimizer in trainer.optimizers:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        size, moments = sum(p.numel() * p.element_size() for p in params) / 1e9, 1 if isinstance(optimizer, Muon) else 2
        print0(f"{type(optimizer).__name__:10s} {len(params)} tensors, {sum(p.numel() for p in params):,} numbers: "
               f"{size * (2 + moments):.3g} GB with gradients and moments, {size * (1 + moments):.3g} in a checkpoint")
    print0(f"data       {c.data}: {sum(trainer.train.counts):,} training tokens ({m.tokenizer}) in "
           f"{len(trainer.train.paths)} shards; documents {'masked' if c.mask_documents else 'not masked'}")
    print0(f"budget     {c.max_steps:,} steps x {c.total_batch_size:,} = {tokens:,} tokens, {tokens / epoch:.2f} "
           f"epochs, {flops_per_token(trainer.model, m.block_size) * tokens:.3g} FLOPs")
    print0(f"device     {c.device} x {WORLD_SIZE}, {c.dtype} (Muon {c.muon_dtype}), {torch.get_num_threads()} threads, "
           f"{c.batch_size} sequences x {trainer.accumulation} accumulations; run folder {c.out_dir}")
    if c.compile == "true":
        print0("compiling, which can take some minutes")


def progress_line(trainer, record, seconds_left):
    """One line for a person from the log record of a step."""
    config, seconds = trainer.config, record["ms"] / 1000
    rate = config.total_batch_size / seconds
    flops = rate * flops_per_token(trainer.model, trainer.model_config.block_size) / WORLD_SIZE
    mfu = flops / peak_flops(config.device)
    return (f"step {record['step']:6d}/{config.max_steps} | loss {record['loss']:.4f} | z {record['z']:7.2f} | "
            f"norm {record['grad_norm']:.3f} | lr {record['lr']:.2e} | {record['ms']:7.1f} ms | {rate:10,.0f} tok/s | "
            f"MFU {f'{mfu:.1%}' if mfu else 'n/a'} | ETA {clock(seconds_left)}")


# --------------------------------------------------------------------------------------------------------------- 8 main

def run(trainer, folder, stop):
    """Train to the last step. Returns why it stopped earlier, or "" at the end."""
    config, first, began = trainer.config, trainer.step, time.monotonic()
    while True:
        step, last = trainer.step, trainer.step >= config.max_steps
        windows = None if last else stop.read(trainer.read_step)
        stopped = stop.agreed(late=step > first and 0 < config.max_minutes <= (time.monotonic() - began) / 60)

        # save before evaluating: the last evaluation may read 100M tokens, and a kill during it must lose no step
        if trainer.saved < step and (stopped or last or step % (config.save_every or config.max_steps) == 0):
            save(trainer, folder, needed=stopped or last)
        if stopped:
            return stopped

        # a resumed run starts here at the step where it stopped; `evaluated` prevents a second evaluation
        if trainer.evaluated < step and (last or step % (config.eval_every or config.max_steps) == 0):
            record = trainer.evaluate(config.final_eval_tokens if last else config.eval_tokens, stop)
            if record is None:
                continue                                                   # stopped: leave by the top
            if RANK == 0:
                folder.write(record)
            print0(f"step {step:6d} | validation loss {record['val_loss']:.4f}, perplexity {record['val_ppl']:.2f}, "
                   f"{record['val_bpb']:.4f} bits per byte")
            if last:
                save(trainer, folder, needed=True)                         # so that it is not evaluated twice
        if last:
            return ""

        step_began = time.monotonic()
        record = trainer.update(windows)
        record["ms"] = round(1000 * (time.monotonic() - step_began), 3)
        if RANK == 0:
            folder.write(record)
        if trainer.step % config.log_every == 0 or trainer.step == config.max_steps:
            each = (time.monotonic() - began) / (trainer.step - first)
            print0(progress_line(trainer, record, each * (config.max_steps - trainer.step)))


def save(trainer, folder, needed):
    """A checkpoint, written by the first process; UserError where it is `needed` and could not be written."""
    if broadcast(RANK > 0 or folder.save(trainer.state(), trainer.config.keep)):
        trainer.saved = trainer.step
    elif needed:
        raise UserError(f"{trainer.config.out_dir}: the run ended at step {trainer.step} without a checkpoint of it")


def prepare(argv):
    """(Trainer, RunFolder or None) from the command line, at step 0 or where the run in the folder stopped."""
    variant, preset, given = parse_flags(argv)
    resuming = given.get("resume", False)
    if resuming and preset:
        print0(f"--preset={preset} names the folder only: a resumed run keeps its settings")
    preset = preset or ("paper" if torch.cuda.is_available() and os.path.isdir(FINEWEB) else "smoke")
    given["out_dir"] = given.get("out_dir") or f"out/{preset}-{variant or 'exo_dynamic'}"
    if resuming and not os.path.isdir(given["out_dir"]):
        raise UserError(f"--resume: there is no folder {given['out_dir']}; name the run with --out_dir")
    if WORLD_SIZE > 1:
        init_processes(choose_device(given.get("device", "auto")))
    settings = None if resuming else fresh_settings(variant, preset, given)
    folder = RunFolder(given["out_dir"], resuming) if RANK == 0 else None
    candidates = broadcast(folder and folder.checkpoints())
    if candidates:
        trainer, log_size = continue_newest(candidates, variant, given)
    else:
        trainer, log_size = Trainer(*(settings or fresh_settings(variant, preset, given))), 0
        if resuming:
            print0(f"{given['out_dir']} holds no checkpoint: starting at step 0 with the flags given")
        if trainer.config.init_from:
            trainer.model.load_state_dict(load_checkpoint(trainer.config.init_from).state_dict())
    if RANK == 0:
        folder.open_log(log_size)
    announce(trainer)
    return trainer, folder


def continue_newest(paths, variant, given):
    """(Trainer, bytes of its log) from the first of these checkpoints that is whole; says which were skipped."""
    for path in paths:
        try:
            checkpoint = read_checkpoint(path)
        except InputError as error:
            print0(f"skipped: {error}")
            continue
        try:
            trainer = Trainer(*resumed_settings(variant, given, path, checkpoint))
            trainer.load_state(checkpoint)
            print0(f"continuing {path} after step {trainer.step}")
            return trainer, checkpoint["log_size"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, (InputError, UserError)) or "memory" in str(error):
                raise
            why = f"{type(error).__name__}: {' '.join(str(error).split())[-80:]}"
            print0(f"skipped: {path} is not the whole state of a run ({why})")
    raise UserError(f"{given['out_dir']}: --resume found no whole checkpoint there; start anew in another --out_dir")


def conclude(trainer, stopped, problem):
    """The last lines of a run: what came out and which command comes next."""
    out_dir, gpt2 = trainer.config.out_dir, trainer.model_config.tokenizer == "gpt2"
    start = "python" if WORLD_SIZE == 1 else f"torchrun --nproc_per_node={WORLD_SIZE}"
    again = f"{start} train.py --resume --out_dir={out_dir}"
    if problem:
        raise UserError(f"{problem}; the run is saved after step {trainer.step}: mend the data, then {again}")
    if stopped:
        print0(f"stopped by {stopped} after step {trainer.step}, saved. Continue with:\n  {again}")
        return
    if trainer.config.sample_tokens and RANK == 0:
        with torch.autocast(trainer.config.device, torch.bfloat16, enabled=trainer.config.dtype == "bfloat16"):
            print0(f"sample:\n{continue_text(trainer.model, trainer.tokenizer, '', trainer.config.sample_tokens)[0]}\n")
    checkpoint = f"--ckpt={out_dir}/ckpt_{trainer.step:06d}.pt"
    print0(f"done: {trainer.step} steps, best validation loss of all evaluations {trainer.best_val:.4f}. Next:\n"
           f"  python model.py {checkpoint} --prompt=\"{'Once upon a time' if gpt2 else 'def '}\"\n"
           + (f"  python eval_hellaswag.py {checkpoint}\n" if gpt2 else "")
           + f"  {again} --max_steps={2 * trainer.step}")


def main():
    """The command line. Exit codes: 1 bad input, 2 bad usage, 3 diverged, 128 + n stopped by signal n."""
    trainer, folder = prepare(sys.argv[1:])
    stop = Stop()
    try:
        stopped = run(trainer, folder, stop)
    except Diverged as error:
        print0(f"train.py: not finite at {error}. Nothing was saved from it: lower the learning rates, and --resume "
               "from the last checkpoint, or start anew in another --out_dir")
        return 3
    conclude(trainer, stopped, stop.problem)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    return 128 + stop.signal if stopped and stop.signal else 0


if __name__ == "__main__":
    command_line(main, InputError, memory="lower --batch_size (the step stays the same, in more passes), --block_size or --n_embd")
