"""
Train any variant of ExoFormer, on one GPU, several (torchrun) or a CPU.

    python train.py                              what this machine can do: a CPU learns Python from Python in 2 minutes
    python train.py --variant=exo_dynamic        on an H100 with the FineWeb shards: the paper's run (Table 4)
    python train.py --preset=small --data=DIR    GPT-2-small size, one consumer GPU
    python train.py --resume --out_dir=DIR       go on where a run stopped, bit for bit
    torchrun --nproc_per_node=8 train.py ...     the same run on eight GPUs

Settings come from, each overriding the one before: the defaults below (the paper's recipe), the variant's row of
Table 3, the preset, the flags. Nothing here is random but the initial weights: which tokens step s reads is a function
of (seed, s), learning rate and momentum are functions of s. So a resumed run needs no state but the tensors (RNG states
are kept for what you may add).
"""
import argparse
import contextlib
import difflib
import fcntl
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from model import (VARIANTS, Causal, Checked, ExoFormer, Linear, ModelConfig, choose_device, count_parameters,
                   flops_per_token, generate, read_checkpoint, save_checkpoint, setting, variant_name)
from muon import Muon, polar_express
from prepare_fineweb import (UserError, find_shards, get_tokenizer, read_meta, read_window, shard_tokens,
                             write_default_shards)

FINEWEB, DEFAULT_DATA = "data/fineweb_edu10B", "data/python_stdlib"

# ----------------------------------------------------------------------------------------------------------- 1 settings


@dataclass(frozen=True)
class TrainConfig(Checked):
    """The recipe. Defaults are the paper's (Table 4), but where the README says otherwise."""
    data: str = setting("", "folder of token shards; empty means FineWeb-Edu if it is there, else Python's own sources")
    out_dir: str = setting("", "run folder: log.jsonl and checkpoints; empty means out/PRESET-VARIANT")
    resume: bool = setting(False, "continue the newest whole checkpoint in out_dir; flags not given keep their "
                                  "old value")
    device: str = setting("auto", "cuda, mps or cpu; auto takes the first there is")
    dtype: str = setting("auto", "float32; bfloat16: float32 weights, bfloat16 compute; pure_bfloat16: as the released "
                                 "code, no float32 copy; auto: bfloat16 on cuda, else float32")
    compile: str = setting("auto", "true or false: torch.compile; auto: on cuda, and on a CPU where the run is long "
                                   "enough")
    deterministic: str = setting("auto", "true or false: deterministic algorithms only; auto: on a CPU")
    seed: int = setting(1337, "of the initial weights and the order of the data")
    max_steps: int = setting(38147, "optimizer steps")
    max_minutes: float = setting(0.0, "stop after the step that passes this many minutes, saved and resumable; "
                                      "0: never")
    batch_size: int = setting(16, "sequences per forward pass and device")
    total_batch_size: int = setting(262144, "tokens per optimizer step, over all forward passes and devices")
    mask_documents: bool = setting(True, "attention does not cross documents")
    optimizer: str = setting("muon", "for the matrices of layers and anchors: muon or adamw")
    muon_lr: float = setting(0.01, "peak learning rate of Muon")
    muon_momentum: float = setting(0.95, "momentum of Muon")
    muon_ramp: bool = setting(False, "as the released code: momentum from 0.85 over the first 100 steps, back at "
                                      "the end")
    muon_beta2: float = setting(0.0, "second moment of NorMuon (released code: 0.95); 0: none, as the paper")
    muon_dtype: str = setting("bfloat16", "of the Polar Express iteration: bfloat16 (the paper) or float32")
    muon_fused: bool = setting(False, "as the released code: orthogonalise fused Q,K,V,G and SwiGLU weights as "
                                      "one matrix")
    adamw_lr: float = setting(0.003, "peak learning rate of AdamW")
    weight_decay: float = setting(0.1, "decoupled; cautious in Muon; on matrices only")
    warmup_steps: int = setting(1000, "linear warm-up to the peak")
    decay_fraction: float = setting(0.2, "share of the steps, at the end, over which the rate falls linearly")
    final_lr: float = setting(0.1, "what it falls to, as a share of the peak")
    grad_clip: float = setting(1.0, "largest norm of the whole gradient")
    z_loss: float = setting(1e-5, "weight of mean logsumexp^2 in the loss")
    eval_every: int = setting(500, "steps between evaluations on the validation split; 0: only first and last")
    eval_tokens: int = setting(10_485_760, "validation tokens per evaluation; 0: all")
    final_eval_tokens: int = setting(0, "validation tokens of the last evaluation; 0: all")
    hellaswag_every: int = setting(0, "steps between HellaSwag evaluations (GPT-2 tokens only); 0: never")
    save_every: int = setting(1000, "steps between checkpoints; 0: only at the end")
    keep: int = setting(2, "newest checkpoints to keep")
    log_every: int = setting(10, "steps between printed lines (log.jsonl has every step)")
    sample_tokens: int = setting(200, "length of the sample at the end")

    def problems(self):
        """Every rule the settings must keep, as (is broken, what to say)."""
        value = vars(self)
        choices = dict(device=("auto", "cuda", "mps", "cpu"), dtype=("auto", "float32", "bfloat16", "pure_bfloat16"),
                       compile=("auto", "true", "false"), deterministic=("auto", "true", "false"),
                       optimizer=("muon", "adamw"), muon_dtype=ITERATION_DTYPES)
        for name, allowed in choices.items():
            yield value[name] not in allowed, f"--{name}={value[name]} must be one of {', '.join(allowed)}"
        for name in ("max_steps", "batch_size", "total_batch_size", "keep", "log_every"):
            yield value[name] < 1, f"--{name}={value[name]} must be at least 1"
        for name in ("eval_every", "eval_tokens", "final_eval_tokens", "hellaswag_every", "save_every", "warmup_steps",
                     "max_minutes", "muon_lr", "adamw_lr", "weight_decay", "sample_tokens", "z_loss"):
            yield not 0 <= value[name] < math.inf, f"--{name}={value[name]} must be 0 or more"
        for name in ("decay_fraction", "final_lr", "muon_momentum", "muon_beta2"):
            yield not 0 <= value[name] <= 1, f"--{name}={value[name]} must be between 0 and 1"
        yield not self.grad_clip > 0, f"--grad_clip={self.grad_clip} must be above 0"
        yield self.seed < 0, f"--seed={self.seed} must not be negative"


PRESETS = {  # fields of ModelConfig and TrainConfig that differ from the paper's
    "paper": dict(),
    "small": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=8, total_batch_size=131072,
                  max_steps=19073, warmup_steps=500, eval_tokens=2_097_152),
    "smoke": dict(n_layer=4, n_head=4, n_embd=128, block_size=256, batch_size=8, total_batch_size=2048, max_steps=240,
                  warmup_steps=20, decay_fraction=0.5, eval_every=80, eval_tokens=32768, final_eval_tokens=32768,
                  save_every=80, log_every=20),
}

MAY_CHANGE_ON_RESUME = set("""out_dir resume data device compile deterministic max_steps max_minutes batch_size muon_lr
    adamw_lr warmup_steps decay_fraction final_lr eval_every eval_tokens final_eval_tokens hellaswag_every save_every
    keep log_every sample_tokens""".split())


class Parser(argparse.ArgumentParser):
    """argparse, but an unknown flag or name says which one was probably meant, in one line."""

    def error(self, message):
        unknown = re.search(r"(?:unrecognized arguments: |invalid choice: ')([^\s=']+)", message)
        names = [name for action in self._actions for name in (*action.option_strings, *(action.choices or ()))]
        near = difflib.get_close_matches(unknown[1], names, 1) if unknown else []
        self.exit(2, f"{self.prog}: {message}{f' (did you mean {near[0]}?)' if near else ''}; --help lists all flags\n")


def true_or_false(text):
    """An argparse type for switches."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def float_or_none(text):
    """An argparse type for a number that may be left to the code."""
    return None if text.lower() == "none" else float(text)


def parse_flags(argv):
    """(variant or None, preset or None, {flag: value} of the flags that were given)."""
    parser = Parser(prog="train.py", description="Train a variant of ExoFormer.", allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    parser.add_argument("--variant", choices=VARIANTS, default=None, metavar="NAME",
                        help=f"row of Table 3 (default: exo_dynamic): {', '.join(VARIANTS)}")
    parser.add_argument("--preset", choices=PRESETS, default=None, metavar="NAME",
                        help="paper, small or smoke (default: paper where there are a CUDA device and the FineWeb "
                             "shards, else smoke)")
    for config in (TrainConfig, ModelConfig):
        group = parser.add_argument_group(config.__name__)
        for f in (f for f in fields(config) if f.name != "tokenizer"):            # the data decide the tokenizer
            parse = {bool: true_or_false, int: int, float: float, str: str}.get(f.type, float_or_none)
            extra = dict(nargs="?", const=True) if f.type is bool else {}
            default = str(f.default).lower() if f.type is bool else "''" if f.default == "" else f.default
            text = f"{f.metadata['help']} (default: {default})".replace("%", "%%")
            group.add_argument(f"--{f.name}", type=parse, help=text, metavar=f.name.split("_")[-1].upper(), **extra)
    given = vars(parser.parse_args(argv))
    return given.pop("variant"), given.pop("preset"), given


def pick(config, settings):
    """An instance of dataclass `config` from those of `settings` that are its fields."""
    return config(**{f.name: settings[f.name] for f in fields(config) if f.name in settings})


def fresh_settings(variant, preset, given):
    """(ModelConfig, TrainConfig) of a new run."""
    variant, preset = variant or "exo_dynamic", preset or default_preset()
    settings = {**VARIANTS[variant], **PRESETS[preset], **given}
    settings["out_dir"] = settings.get("out_dir") or f"out/{preset}-{variant}"
    settings["data"] = settings.get("data") or choose_data(preset)
    if not os.path.isdir(settings["data"]):
        raise UserError(f"--data={settings['data']}: no such folder; write shards there with: "
                         f"python prepare_fineweb.py --input=FILES --out={settings['data']}")
    settings["tokenizer"] = read_meta(settings["data"])["tokenizer"]
    if preset != "paper" and "vocab_size" not in given:
        settings["vocab_size"] = 64 * math.ceil(get_tokenizer(settings["tokenizer"]).n_vocab / 64)
    return both_configs(settings)


def both_configs(settings):
    """(ModelConfig, TrainConfig) from a dict with the fields of both."""
    model_config = pick(ModelConfig, settings)
    return model_config, resolve(pick(TrainConfig, settings), model_config)


def default_preset():
    """The paper's run where there are a CUDA device and the FineWeb shards, else the smoke run."""
    return "paper" if torch.cuda.is_available() and os.path.isdir(FINEWEB) else "smoke"


def choose_data(preset):
    """The data folder when --data is not given; writes the embedded default where nothing else is there."""
    if preset != "smoke" and os.path.isdir(FINEWEB):
        return FINEWEB
    if preset == "paper":
        raise UserError(f"--preset=paper needs the FineWeb-Edu shards in {FINEWEB}; get them with: "
                         "python prepare_fineweb.py")
    rule = "=" * 100
    say(f"{rule}\nNO --data: training on the source code of Python's standard library, byte by byte ({DEFAULT_DATA}).\n"
        "For real text: python prepare_fineweb.py, or its --input=FILES --out=DIR and then --data=DIR here\n" + rule)
    write_default_shards(DEFAULT_DATA)
    return DEFAULT_DATA


def resolve(config, model_config):
    """`config` with every "auto" decided, so that a checkpoint records what the run really used."""
    device = choose_device(config.device)
    dtype = {"auto": "bfloat16" if device == "cuda" else "float32"}.get(config.dtype, config.dtype)
    deterministic = {"auto": str(device == "cpu").lower()}.get(config.deterministic, config.deterministic)
    config = replace(config, device=device, dtype=dtype, deterministic=deterministic)
    return replace(config, compile=decide_compile(config, model_config))


COMPILE_PAYS_ON_CPU = 2e13      # training FLOPs per layer: 20 minutes of eager work on 2 cores; compiling takes 1 or 2


def decide_compile(config, model_config):
    """ "true" or "false". On a CPU compiling pays once the run is long; where no compiler exists, a line says so."""
    with torch.device("meta"):
        per_token = flops_per_token(ExoFormer(model_config), model_config.block_size)
    flops = per_token * config.max_steps * config.total_batch_size
    long_enough = flops > COMPILE_PAYS_ON_CPU * model_config.n_layer
    worth_it = config.device == "cuda" or (config.device == "cpu" and long_enough)
    wanted = {"auto": worth_it}.get(config.compile, config.compile == "true")
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if wanted and (not compiler or (config.device == "cuda" and importlib.util.find_spec("triton") is None)):
        say(f"no {'compiler' if not compiler else 'triton'} here, so torch.compile cannot be used: training eagerly")
        return "false"
    return str(wanted).lower()


def resumed_settings(variant, given, checkpoint):
    """(ModelConfig, TrainConfig) of a checkpoint and the flags given now. UserError where they make another run."""
    old = {**asdict(TrainConfig()), **checkpoint["train_config"], **checkpoint["model_config"]}
    axes = {name: value for name, value in VARIANTS.get(variant, {}).items() if name != "n_layer"}
    asked = {name: value for name, value in {**axes, **given}.items() if value != "auto"}
    changed = {name: value for name, value in asked.items()
               if old[name] != value and name not in ("out_dir", "resume")}
    for name, value in changed.items():
        if name not in MAY_CHANGE_ON_RESUME:
            raise UserError(f"--{name}={value} does not fit the run to resume, which has {name}={old[name]}; "
                              "drop the flag, or start anew in another --out_dir")
        say(f"changed on resuming: {name} from {old[name]} to {value}; what follows may differ from the old run")
    settings = {**old, **changed, "out_dir": given["out_dir"], "resume": True}
    return both_configs(settings)


# -------------------------------------------------------------------------------------------------- 2 functions of step

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
    """The order in which `epoch` visits n windows."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n)


class Tokens:
    """One split of a data folder, cut into windows of block_size + 1 tokens that overlap by one."""

    def __init__(self, folder, split, model_config):
        self.vocab_size, self.block_size = model_config.vocab_size, model_config.block_size
        self.paths = [str(path) for path in find_shards(folder, split)]
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
        if tokens.max() >= self.vocab_size:
            raise UserError(f"{self.paths[shard]}: token id {tokens.max()} at or above vocab_size={self.vocab_size}; "
                             "the shard is damaged or of another tokenizer "
                             "(python prepare_fineweb.py verify --out=DIR)")
        return tokens

    def shuffled(self, seed, first, count):
        """Windows first ... first + count - 1 of the endless training order: every epoch a new permutation."""
        places = [divmod(k, len(self)) for k in range(first, first + count)]
        return np.stack([self.window(permutation(seed, epoch, len(self))[i]) for epoch, i in places])

    def fingerprint(self):
        """What a resumed run must find again: shard names and lengths."""
        return [[os.path.basename(path), count] for path, count in zip(self.paths, self.counts)]


def to_batch(windows, eot, config):
    """(idx, targets, docs), each (B, T) on the device, from windows (B, T + 1); docs is None without mask_documents."""
    windows = torch.from_numpy(windows.astype(np.int64))
    on_cuda = config.device == "cuda"
    windows = (windows.pin_memory() if on_cuda else windows).to(config.device, non_blocking=on_cuda)
    idx, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    return idx, targets, (idx == eot).cumsum(1) if config.mask_documents else None


# ------------------------------------------------------------------------------------------------ 3 one process or many

class Alone:
    """One process. `Team` offers the same to each of the processes that torchrun started."""
    rank, size = 0, 1

    def use(self, device):
        pass

    def wrap(self, objective):
        return objective

    def without_sync(self, objective):
        return contextlib.nullcontext()

    def total(self, tensor):
        return tensor

    def largest(self, tensor):
        return tensor

    def agree(self, value):
        return value

    def polar(self, matrices, dtype):
        return polar_express(matrices, dtype)

    def close(self):
        pass


class Team(Alone):
    """A data-parallel group: each process reads its share of every step; PyTorch's DDP averages the gradients."""

    def __init__(self):
        self.rank, self.size, self.device = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "cpu"
        local_rank = int(os.environ["LOCAL_RANK"])
        if torch.cuda.is_available() and local_rank >= torch.cuda.device_count():
            raise UserError(f"process {local_rank} has no GPU: there are {torch.cuda.device_count()}; lower "
                              "torchrun's --nproc_per_node")
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")

    def use(self, device):
        """Work on `device` from now on, once the settings have decided it."""
        if device == "mps":
            raise UserError("--device=mps works with one process only; start train.py without torchrun")
        self.device = device

    def wrap(self, objective):
        torch._dynamo.config.optimize_ddp = False          # else what is compiled inside DDP first is cut into pieces
        device_ids = [torch.cuda.current_device()] if self.device == "cuda" else None
        return DistributedDataParallel(objective, device_ids=device_ids)

    def without_sync(self, objective):
        return objective.no_sync()

    def total(self, tensor):
        """The sum of `tensor` over all processes."""
        tensor = tensor.to(self.device)
        dist.all_reduce(tensor)
        return tensor

    def largest(self, tensor):
        """The elementwise maximum of `tensor` over all processes."""
        tensor = tensor.to(self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def agree(self, value):
        """The first process's `value`, everywhere; nobody goes on before it is there."""
        box = [value]
        dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]

    def polar(self, matrices, dtype):
        """polar_express of (N, rows, cols): each process works on N / size of them, and all gather the results."""
        share = math.ceil(len(matrices) / self.size)
        missing = share * self.size - len(matrices)
        padded = torch.cat((matrices, matrices.new_zeros(missing, *matrices.shape[1:])))
        mine = polar_express(padded[self.rank * share:(self.rank + 1) * share], dtype).contiguous()
        shares = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(shares, mine)
        return torch.cat(shares)[:len(matrices)]

    def close(self):
        dist.destroy_process_group()


TEAM = Alone()


def say(line):
    """Print on the first process only."""
    if TEAM.rank == 0:
        print(line, flush=True)


# -------------------------------------------------------------------------------------------------- 4 model, optimizers

class Objective(nn.Module):
    """The training loss as one module, so that torch.compile and DDP both wrap a single forward."""

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
    if config.dtype == "pure_bfloat16":
        for p in model.parameters():
            p.data = p.data.bfloat16()
    return model.to(config.device)


ITERATION_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


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
        by_parts.setdefault(1 if config.muon_fused else m.parts, []).append(m.weight)
    groups = [dict(params=params, parts=parts) for parts, params in by_parts.items()]
    muon = Muon(groups, lr=config.muon_lr, weight_decay=config.weight_decay, beta2=config.muon_beta2 or None,
                polar=functools.partial(TEAM.polar, dtype=ITERATION_DTYPES[config.muon_dtype]))
    return [muon, torch.optim.AdamW([dict(params=others)], weight_decay=0.0, **adamw)]


def set_rates(optimizers, step, config):
    """Put the learning rates and the momentum of `step` into the optimizers; returns the matrices' learning rate."""
    for optimizer in optimizers:
        is_muon = isinstance(optimizer, Muon)
        for group in optimizer.param_groups:
            group["lr"] = (config.muon_lr if is_muon else config.adamw_lr) * lr_multiplier(step, config)
            if is_muon:
                group["momentum"] = muon_momentum(step, config)
    return optimizers[0].param_groups[0]["lr"]


# ----------------------------------------------------------------------------------------------------- 5 the run folder

class RunFolder:
    """log.jsonl and ckpt_{step:06d}.pt of one run; held by a lock, so that two runs cannot write to one folder."""

    def __init__(self, path, resume):
        self.path, self.log_path = path, os.path.join(path, "log.jsonl")
        try:
            os.makedirs(path, exist_ok=True)
            self.lock = open(os.path.join(path, "lock"), "w")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = "wait for it, or choose another --out_dir"
            raise UserError(f"{path}: another run is writing there; {remedy}") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out_dir") from None
        if not resume and self.checkpoints():
            raise UserError(f"{path}: holds a run already; add --resume to continue it, or choose another --out_dir")
        if not resume and os.path.exists(self.log_path):
            raise UserError(f"{path}: holds the log of a run that saved no checkpoint; remove {self.log_path}, "
                             "or choose another --out_dir")

    def checkpoints(self):
        """Paths of the checkpoints, newest first."""
        names = sorted((name for name in os.listdir(self.path) if re.fullmatch(r"ckpt_\d{6,}\.pt", name)),
                       key=lambda name: int(name[5:-3]), reverse=True)
        return [os.path.join(self.path, name) for name in names]

    def newest(self):
        """The newest checkpoint that reads back whole; says which were skipped. UserError when there is none."""
        for path in self.checkpoints():
            try:
                checkpoint = read_checkpoint(path)
                if "train_config" in checkpoint:
                    return path, checkpoint
                say(f"skipped: {path} holds a model but not the state of a run")
            except UserError as error:
                say(f"skipped: {error}")
        raise UserError(f"{self.path}: --resume found no whole checkpoint there; start anew in another --out_dir")

    def open_log(self, size):
        """Append to log.jsonl from byte `size` on, where the checkpoint to continue was written."""
        self.log = open(self.log_path, "a")
        self.log.truncate(min(size, os.path.getsize(self.log_path)))

    def write(self, record):
        """Append one object to log.jsonl. A full disk is said and survived: what is not out yet stays in the buffer."""
        try:
            self.log.write(json.dumps(record) + "\n")
            self.log.flush()
        except OSError as error:
            say(f"COULD NOT WRITE {self.log_path}: {error.strerror}; training goes on, the lines wait")

    def save(self, step, checkpoint, keep):
        """Write ckpt_{step}.pt and drop all but the newest `keep`. A full disk is said and survived: True if saved."""
        path = os.path.join(self.path, f"ckpt_{step:06d}.pt")
        try:
            os.fsync(self.log.fileno())
            save_checkpoint(path, {**checkpoint, "log_size": os.path.getsize(self.log_path)})
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                os.remove(f"{path}.tmp")
            say(f"COULD NOT SAVE {path}: {str(error).splitlines()[0]}; training goes on, older checkpoints are intact")
            return False
        checkpoints = self.checkpoints()                   # newer than this one: damaged, skipped on resuming
        for old in checkpoints[checkpoints.index(path) + keep:]:
            with contextlib.suppress(OSError):
                os.remove(old)
        return True


class NoFolder:
    """What the processes after the first have instead of a RunFolder: nothing is written."""

    def open_log(self, size):
        pass

    def write(self, record):
        pass

    def save(self, step, checkpoint, keep):
        return True


class Stop:
    """SIGINT and SIGTERM ask the run to stop after the step; a second one ends the process at once.

    Under torchrun a second signal is ignored: Ctrl-C reaches each process twice, and torchrun kills what will not end.
    """

    def __init__(self):
        self.signal = 0                                                    # 0, or the number of the signal that came
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        self.signal = number
        for other in (signal.SIGINT, signal.SIGTERM):
            signal.signal(other, signal.SIG_DFL if TEAM.size == 1 else signal.SIG_IGN)
        once_more = b"; once more to end at once" if TEAM.size == 1 else b""
        os.write(2, b"\nstopping after this step" + once_more + b"\n")


class Diverged(Exception):
    """The loss or the gradient is not finite."""


def git_revision():
    """The commit of this code, or "unknown"."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", here, "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


# -------------------------------------------------------------------------------------------------- 6 steps and reports

# Inductor keeps a value that 3 kernels read instead of computing it 3 times (its default is 4): so the gradient of a
# rotated, normed, mixed query is made once. 1 % of the roofline of exo_dynamic on the fake H100 (README).
COMPILE_OPTIONS = {"cuda": {"realize_reads_threshold": 3}, "mps": {}, "cpu": {}}


class Trainer:
    """Everything a step needs, and the step."""

    def __init__(self, model_config, config):
        self.model_config, self.config = model_config, config
        per_pass = config.batch_size * model_config.block_size
        self.accumulation, rest = divmod(config.total_batch_size, per_pass * TEAM.size)
        if rest or not self.accumulation:
            raise UserError(f"--total_batch_size={config.total_batch_size} is not a multiple of "
                              f"--batch_size={config.batch_size} x --block_size={model_config.block_size} x "
                              f"{TEAM.size} process(es) = {per_pass * TEAM.size}")
        self.tokenizer, self.revision = get_tokenizer(model_config.tokenizer), git_revision()
        self.train, self.val = (Tokens(config.data, split, model_config) for split in ("train", "val"))
        self.model = build_model(model_config, config)
        self.optimizers = build_optimizers(self.model, config)
        self.objective = Objective(self.model, config)
        if config.compile == "true":
            self.objective.compile(fullgraph=True, dynamic=False, options=COMPILE_OPTIONS[config.device])
        self.parallel = TEAM.wrap(self.objective)
        self.step, self.best_val = 0, math.inf
        self.unreported = None                             # the record of a last step that was not evaluated nor logged

    def update(self):
        """One optimizer step: (cross-entropy, z, gradient norm, learning rate of the matrices)."""
        config = self.config
        lr, sums = set_rates(self.optimizers, self.step, config), torch.zeros(2, device=config.device)
        for micro in range(self.accumulation):
            batch = self.batch(micro)
            last = micro == self.accumulation - 1
            with contextlib.nullcontext() if last else TEAM.without_sync(self.parallel):
                loss, cross_entropy, z = self.parallel(*batch)
                (loss / self.accumulation).backward()
            sums += torch.stack((cross_entropy.detach(), z.detach())).float()
        cross_entropy, z = (TEAM.total(sums) / (self.accumulation * TEAM.size)).tolist()
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if not math.isfinite(cross_entropy + norm.item()):                  # looked at before a weight is touched
            raise Diverged(self.diagnosis(cross_entropy, norm.item(), lr))
        torch.nn.utils.clip_grads_with_norm_(parameters, config.grad_clip, norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return cross_entropy, z, norm.item(), lr

    def batch(self, micro):
        """This process's `micro`-th batch of the current step. All processes together read what one alone would."""
        config = self.config
        sequences = config.total_batch_size // self.model_config.block_size
        first = self.step * sequences + (micro * TEAM.size + TEAM.rank) * config.batch_size
        return to_batch(self.train.shuffled(config.seed, first, config.batch_size), self.tokenizer.eot, config)

    def diagnosis(self, loss, norm, lr):
        """One line on a step that is not finite: when, how fast, and which parameter is the first to blame."""
        sick = [f"weight {n}" for n, p in self.model.named_parameters() if not p.isfinite().all()]
        sick += [f"gradient of {n}" for n, p in self.model.named_parameters() if not p.grad.isfinite().all()]
        return (f"step {self.step + 1}: loss {loss}, gradient norm {norm}, lr {lr:.3g} (matrices), "
                f"{self.config.adamw_lr * lr_multiplier(self.step, self.config):.3g} (others); not finite first: "
                f"{sick[0] if sick else 'only the sum over all gradients'} (of {len(sick)})")

    @functools.lru_cache(maxsize=2)
    def validation(self, tokens):
        """(number of windows, bytes of text per predicted token) of the first `tokens` validation tokens; 0: all."""
        n = min(len(self.val), math.ceil(tokens / self.model_config.block_size)) if tokens else len(self.val)
        n_bytes = sum(self.tokenizer.n_bytes(self.val.window(i)[1:]) for i in range(n))
        return n, n_bytes / (n * self.model_config.block_size)

    def evaluate(self, tokens):
        """Mean cross-entropy over non-overlapping validation windows, and what follows from it.

        It runs the very graph that trains, gradients unused, so that a compiled run compiles once; the last batch is
        filled up with windows whose targets do not count.
        """
        n, bytes_per_token = self.validation(tokens)
        sums = torch.zeros(2, dtype=torch.float64)
        for first in range(TEAM.rank * self.config.batch_size, n, TEAM.size * self.config.batch_size):
            rows = range(first, min(first + self.config.batch_size, n))
            windows = np.stack([self.val.window(i) for i in rows])
            windows = np.pad(windows, ((0, self.config.batch_size - len(rows)), (0, 0)))
            idx, targets, docs = to_batch(windows, self.tokenizer.eot, self.config)
            targets[len(rows):] = -100
            loss = self.objective(idx, targets, docs)[1].item()    # a tensor kept until the next pass keeps its graph
            sums += torch.tensor([loss * len(rows), len(rows)], dtype=torch.float64)
        total, count = TEAM.total(sums).tolist()
        loss = total / count
        return dict(val_loss=loss, val_ppl=math.exp(min(loss, 700.0)), val_bpb=loss / math.log(2) / bytes_per_token)

    def state(self):
        """All of the run as tensors and plain values; load_state undoes it."""
        rng = dict(cpu=torch.get_rng_state(), cuda=torch.cuda.get_rng_state() if self.config.device == "cuda" else None)
        return dict(format=1, model_config=asdict(self.model_config), train_config=asdict(self.config), step=self.step,
                    tokens=self.step * self.config.total_batch_size, best_val=self.best_val, rng=rng,
                    shards=self.fingerprints(), git_revision=self.revision,
                    torch_version=str(torch.__version__), model=self.model.state_dict(),
                    optimizers=[optimizer.state_dict() for optimizer in self.optimizers])

    def fingerprints(self):
        """{split: names and lengths of its shards}."""
        return dict(train=self.train.fingerprint(), val=self.val.fingerprint())

    def load_state(self, checkpoint):
        """Continue from what `state` returned. UserError where the shards are not the same."""
        for split, new in self.fingerprints().items():
            old = checkpoint["shards"][split]
            if old != new:
                raise UserError(f"--data={self.config.data}: the run began with {len(old)} {split} shards of "
                                 f"{sum(n for _, n in old):,} tokens, but there are {len(new)} of "
                                 f"{sum(n for _, n in new):,}; bring the old data back")
        self.model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step, self.best_val = checkpoint["step"], checkpoint["best_val"]
        self.unreported = checkpoint.get("unreported")
        torch.set_rng_state(checkpoint["rng"]["cpu"])
        if self.config.device == "cuda" and checkpoint["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(checkpoint["rng"]["cuda"])


PEAK_FLOPS = {  # dense bfloat16 FLOP/s by a part of the device's name, from NVIDIA's data sheets; MFU is n/a for others
    "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12,
}


def peak_flops(device):
    """Peak FLOP/s of this device for MFU, or None where it is not in the table."""
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def clock(seconds):
    """Seconds as h:mm:ss."""
    return f"{int(seconds) // 3600}:{int(seconds) % 3600 // 60:02d}:{int(seconds) % 60:02d}"


def announce(trainer):
    """What is about to happen, before it does."""
    config, model_config = trainer.config, trainer.model_config
    tokens, epoch = config.max_steps * config.total_batch_size, len(trainer.train) * model_config.block_size
    n, flops = count_parameters(trainer.model), flops_per_token(trainer.model, model_config.block_size)
    say(f"model      {variant_name(model_config)}: {n:,} parameters, {model_config.n_layer} layers, "
        f"C {model_config.n_embd}, {model_config.n_head} heads, context {model_config.block_size}, "
        f"vocabulary {model_config.vocab_size}")
    for optimizer in trainer.optimizers:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        say(f"{type(optimizer).__name__:10s} {len(params)} tensors, {sum(p.numel() for p in params):,} numbers")
    say(f"data       {config.data}: {len(trainer.train.paths)} training shards, {sum(trainer.train.counts):,} tokens "
        f"({model_config.tokenizer}), {len(trainer.train):,} windows; "
        f"documents {'masked' if config.mask_documents else 'not masked'}")
    again = f"; {tokens - epoch:,} tokens are seen again" if tokens > epoch else ""
    say(f"budget     {config.max_steps:,} steps x {config.total_batch_size:,} = {tokens:,} tokens, "
        f"{tokens / epoch:.2f} epochs{again}; {flops * tokens:.3g} FLOPs")
    kept = sum(p.numel() * p.element_size() * (2 if isinstance(optimizer, Muon) else 3)   # weights and optimizer states
               for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"])
    held = kept + sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    say(f"memory     {held / 1e9:.2f} GB for weights, gradients and optimizer states, plus activations; "
        f"a checkpoint has {kept / 1e9:.2f} GB")
    how = "compiled" if config.compile == "true" else "eager"
    say(f"device     {config.device} x {TEAM.size}, {config.dtype}, {how}, {config.batch_size} sequences x "
        f"{trainer.accumulation} accumulations, {torch.get_num_threads()} threads")
    say(f"run folder {config.out_dir}")


class Reporter:
    """Turns measurements into a log record and, now and then, a printed line."""

    def __init__(self, trainer):
        self.trainer, self.config = trainer, trainer.config
        self.began, self.first, self.recent = time.monotonic(), trainer.step, []
        self.flops = flops_per_token(trainer.model, trainer.model_config.block_size) * self.config.total_batch_size
        self.peak = peak_flops(self.config.device)

    def record(self, loss, z, norm, lr, seconds):
        """The log.jsonl object of a step."""
        return dict(step=self.trainer.step, loss=loss, z=z, grad_norm=norm, lr=lr,
                    tokens=self.trainer.step * self.config.total_batch_size, ms=round(seconds * 1000, 3))

    def show(self, record):
        """Print the step if it is its turn, or if its loss jumped above the recent ones."""
        step, seconds = record["step"], record["ms"] / 1000
        usual = float(np.median(self.recent)) if len(self.recent) == 20 else math.inf
        if record["loss"] > 1.3 * usual:
            say(f"LOSS SPIKE at step {step}: {record['loss']:.3f}, the last 20 steps had a median of {usual:.3f}")
        self.recent = (self.recent + [record["loss"]])[-20:]
        if step % self.config.log_every and step != self.config.max_steps:
            return
        rate = (time.monotonic() - self.began) / (step - self.first)
        mfu = f"{self.flops / seconds / self.peak / TEAM.size:.1%}" if self.peak else "n/a"
        say(f"step {step:6d}/{self.config.max_steps} | loss {record['loss']:.4f} | z {record['z']:7.2f} | "
            f"norm {record['grad_norm']:.3f} | lr {record['lr']:.2e} | {record['ms']:7.1f} ms | "
            f"{self.config.total_batch_size / seconds:10,.0f} tok/s | MFU {mfu} | "
            f"ETA {clock(rate * (self.config.max_steps - step))}")


def sample(trainer):
    """Text that the model writes from the start of a document, with a generator of its own; "" where it cannot."""
    tokenizer, config = trainer.tokenizer, trainer.config
    if tokenizer.eot >= trainer.model_config.vocab_size or not config.sample_tokens:
        return ""
    idx = torch.tensor([[tokenizer.eot]], device=config.device)
    with torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        out = generate(trainer.model, idx, config.sample_tokens, temperature=0.8, top_k=50, stop_token=tokenizer.eot,
                       generator=torch.Generator(config.device).manual_seed(config.seed))
    return tokenizer.decode([t for t in out[0, 1:].tolist() if t != tokenizer.eot])


def attention_weights(attn, proj, at):
    """softmax(q k^T / sqrt(D)) under the causal mask, one (T, T) float32 for each head in turn, of a layer's attention
    and the mixed projections {s: (1, T, H, D)} that it is about to attend with."""
    q, k = at.rotate(attn.q_norm(proj["q"]))[0].transpose(0, 1), at.rotate(attn.k_norm(proj["k"]))[0].transpose(0, 1)
    later = torch.ones(q.size(1), q.size(1), dtype=torch.bool, device=q.device).triu(1)
    for q_head, k_head in zip(q, k):                                                                    # (T, D) each
        with torch.autocast(q.device.type, enabled=False):
            scores = q_head.float() @ k_head.float().T / math.sqrt(q.size(-1))
        yield scores.masked_fill(later, -torch.inf).softmax(-1)


def median_ratio(mix, s):
    """Median over channels of lambda_1 / lambda_2 of letter s in a layer's `mix`; None if it is not there, or is not
    finite, for which JSON has no word."""
    median = (mix[s].lambda_anchor / mix[s].lambda_current).float().quantile(0.5).item() if s in mix else math.nan
    return median if math.isfinite(median) else None


@torch.no_grad()
def anchor_use(model, idx):
    """What the layers do with one row, idx (1, T), for the log record: lists with a number for each layer.

        attention_sink   attention to the first token, mean over heads and queries
        gate_mean        mean of sigmoid(G); a model without the gate has no such key
        lambda_ratio     {s: median over channels of lambda_1 / lambda_2}, None where a layer does not mix s

    Hooks on the uncompiled model, for one forward pass: model.py knows nothing of it, nor does the graph that trains.
    """
    at, use = Causal(model.config, idx.size(1), idx.device), dict(attention_sink=[], gate_mean=[])

    def see(attn, proj):
        """A layer's mixed projections, {s: (1, T, H, D)}, on their way to its gate."""
        sinks = [weights[:, 0].mean() for weights in attention_weights(attn, proj, at)]
        use["attention_sink"].append(torch.stack(sinks).mean().item())
        if "g" in proj:
            use["gate_mean"].append(torch.sigmoid(proj["g"].float()).mean().item())

    hooks = [layer.attn.gate.register_forward_pre_hook(lambda gate, args, attn=layer.attn: see(attn, args[1]))
             for layer in model.layers]
    model.trunk(idx)
    for hook in hooks:
        hook.remove()
    use["lambda_ratio"] = {s: [median_ratio(layer.attn.mix, s) for layer in model.layers] for s in model.config.mix}
    return {name: numbers for name, numbers in use.items() if numbers}


def evaluation(trainer, tokens):
    """Validation figures, printed and returned for the log record together with `anchor_use` on the first window."""
    began, results = time.monotonic(), trainer.evaluate(tokens)
    trainer.best_val = min(trainer.best_val, results["val_loss"])
    say(f"step {trainer.step:6d} | validation loss {results['val_loss']:.4f}, perplexity {results['val_ppl']:.2f}, "
        f"{results['val_bpb']:.4f} bits per byte ({time.monotonic() - began:.1f} s)")
    idx, _, _ = to_batch(trainer.val.window(0)[None], trainer.tokenizer.eot, trainer.config)
    with torch.autocast(trainer.config.device, torch.bfloat16, enabled=trainer.config.dtype == "bfloat16"):
        return results | anchor_use(trainer.model, idx)


def hellaswag(trainer, items):
    """HellaSwag accuracies for the log record, on the uncompiled model, so that the training graph stays as it is."""
    from eval_hellaswag import evaluate
    dtype = torch.float32 if trainer.config.dtype == "float32" else torch.bfloat16
    results = evaluate(trainer.model, items, dtype=dtype)
    say(f"step {trainer.step:6d} | HellaSwag {json.dumps(results)}")
    return dict(hellaswag=results)


def hellaswag_items(config, model_config):
    """The items to score, loaded before the first step, so that whatever is missing is missed early."""
    if not config.hellaswag_every:
        return None
    if model_config.tokenizer != "gpt2":
        raise UserError(f"--hellaswag_every={config.hellaswag_every} needs GPT-2 tokens, "
                          f"but --data={config.data} holds {model_config.tokenizer}")
    from eval_hellaswag import load_items
    return load_items()


# ----------------------------------------------------------------------------------------------------------- 7 the loop

def run(trainer, folder, stop):
    """Train to the end, or to a signal, or to the wall-clock limit. Returns the signal that stopped it, or 0."""
    config = trainer.config
    items = hellaswag_items(config, trainer.model_config) if TEAM.rank == 0 else None      # the others wait for it
    reporter, began = Reporter(trainer), time.monotonic()
    if trainer.step == 0:
        folder.write(dict(step=0, tokens=0, **evaluation(trainer, config.eval_tokens)))
    record = trainer.unreported
    while record or trainer.step < config.max_steps:
        if record is None:
            step_began = time.monotonic()
            measured = trainer.update()
            record = reporter.record(*measured, time.monotonic() - step_began)
            reporter.show(record)
            if trainer.step == config.max_steps:           # the last evaluation is long: a kill there must cost no step
                folder.save(trainer.step, {**trainer.state(), "unreported": record}, config.keep)
        step, finished = trainer.step, trainer.step == config.max_steps
        if finished or (config.eval_every and step % config.eval_every == 0):
            record |= evaluation(trainer, config.final_eval_tokens if finished else config.eval_tokens)
        if items and (finished or step % config.hellaswag_every == 0):
            record |= hellaswag(trainer, items)
        folder.write(record)
        record = None
        minutes = (time.monotonic() - began) / 60
        asked = torch.tensor([stop.signal, int(0 < config.max_minutes <= minutes)])
        signal_number, out_of_time = TEAM.largest(asked).tolist()         # a signal may reach one process only
        leaving = finished or signal_number or out_of_time
        if leaving or (config.save_every and step % config.save_every == 0):
            saved = TEAM.agree(folder.save(step, trainer.state(), config.keep))    # nobody leaves while the first saves
        if leaving and not saved:
            raise UserError(f"{config.out_dir}: the run ended at step {step} without a checkpoint of it")
        if leaving:
            return 0 if finished else signal_number
    return 0


def conclude(trainer, signal_number):
    """The last lines of a run: what came out and which command comes next."""
    config = trainer.config
    checkpoint = f"{config.out_dir}/ckpt_{trainer.step:06d}.pt"
    if trainer.step < config.max_steps:
        reason = signal.Signals(signal_number).name if signal_number else f"--max_minutes={config.max_minutes:g}"
        start = "python" if TEAM.size == 1 else f"torchrun --nproc_per_node={TEAM.size}"
        say(f"stopped by {reason} after step {trainer.step}, saved. Continue with:\n"
            f"  {start} train.py --resume --out_dir={config.out_dir}")
        return
    say(f"sample:\n{sample(trainer)}\n")
    prompt = "def " if trainer.model_config.tokenizer == "bytes" else "Once upon a time"
    say(f"done: {trainer.step} steps, best validation loss {trainer.best_val:.4f}. Next:\n"
        f"  python model.py --ckpt={checkpoint} --prompt=\"{prompt}\"\n"
        f"  python train.py --resume --out_dir={config.out_dir} --max_steps={2 * config.max_steps}")
    if trainer.model_config.tokenizer == "gpt2":
        say(f"  python eval_hellaswag.py --ckpt={checkpoint}")


def prepare(argv):
    """(Trainer, RunFolder) from the command line, at step 0 or where the run in the folder stopped."""
    global TEAM
    variant, preset, given = parse_flags(argv)
    TEAM = Team() if "RANK" in os.environ else Alone()                      # torchrun sets RANK
    begin = resume if given.get("resume") else begin_anew
    model_config, config, folder, checkpoint = begin(variant, preset, given)
    TEAM.use(config.device)
    torch.backends.cuda.enable_cudnn_sdp(False)            # its masked backward has given NaN (pytorch issue 196678)
    if config.deterministic == "true":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    trainer = Trainer(model_config, config)
    if checkpoint:
        trainer.load_state(checkpoint)
    folder.open_log(checkpoint["log_size"] if checkpoint else 0)
    announce(trainer)
    return trainer, folder


def begin_anew(variant, preset, given):
    """(ModelConfig, TrainConfig, RunFolder, no checkpoint) of a new run."""
    model_config, config = fresh_settings(variant, preset, given)
    return model_config, config, RunFolder(config.out_dir, resume=False) if TEAM.rank == 0 else NoFolder(), None


def resume(variant, preset, given):
    """(ModelConfig, TrainConfig, RunFolder, checkpoint) of the run in --out_dir; the first process picks the last."""
    given["out_dir"] = given.get("out_dir") or f"out/{preset or default_preset()}-{variant or 'exo_dynamic'}"
    if not os.path.isdir(given["out_dir"]):
        raise UserError(f"--resume: there is no folder {given['out_dir']}; name the run with --out_dir")
    folder, path, checkpoint = NoFolder(), None, None
    if TEAM.rank == 0:
        folder = RunFolder(given["out_dir"], resume=True)
        path, checkpoint = folder.newest()
    path = TEAM.agree(path)
    checkpoint = checkpoint or read_checkpoint(path)
    say(f"continuing {path} after step {checkpoint['step']}")
    return *resumed_settings(variant, given, checkpoint), folder, checkpoint


def main():
    """The command line. Exit codes: 1 bad input, 2 bad usage, 3 diverged, 128 + n stopped by signal n."""
    try:
        trainer, folder = prepare(sys.argv[1:])
        stop = Stop()
        signal_number = run(trainer, folder, stop)
        conclude(trainer, signal_number)
        TEAM.close()
    except UserError as error:
        sys.exit(f"train.py: {error}")
    except Diverged as error:
        say(f"train.py: not finite at {error}. Nothing was saved from it: lower the learning rates, and --resume from "
            "the last checkpoint, or start anew if there is none")
        sys.exit(3)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise                                          # the second is what a CPU's RuntimeError says
        sys.exit("train.py: out of memory; lower --batch_size (the step stays the same, in more passes), "
                 "then --block_size or --n_embd")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    sys.exit(128 + signal_number if signal_number else 0)


if __name__ == "__main__":
    main()
