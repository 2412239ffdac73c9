"""
What happens inside a model: the quantities of Table 2 and Figures 2 to 6, measured layer by layer.

`analyse(model, windows)` attaches hooks from outside; model.py knows nothing of it. Rows go through one at a time, and
of each layer only running sums stay, and a C x C covariance (float64). The one thing held for a whole row is its hidden
states of every layer, (n_layer + 1, T, C), because each layer is compared with each other. Averages are as in the
paper's released analysis: sink and entropy over batch, heads and all queries, then over layers; token similarity and
PCA core features over the embedding and every layer's output (before the final norm). No document mask.
"""
import contextlib
import math
import os
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from model import Causal, count_parameters, variant_name
from prepare_fineweb import UserError, find_shards, read_meta
from train import Tokens, attention_weights, clock

SPARSE_GATE, NEAR_ZERO_LAMBDA, CORE_VARIANCE = 0.2, 0.001, 0.99
MAP_SIDE = 96                       # tokens, evenly spaced over a row, that a token-similarity heat map shows


# ------------------------------------------------------------------------------------------------------- running sums

class Spread:
    """Mean, standard deviation, least and greatest of numbers that arrive in pieces, in float64."""

    def __init__(self):
        self.count, self.total, self.squares, self.low, self.high = 0, 0.0, 0.0, math.inf, -math.inf

    def add(self, x):
        x = x.double()
        self.count, self.total = self.count + x.numel(), self.total + x.sum().item()
        self.squares += x.square().sum().item()
        self.low, self.high = min(self.low, x.min().item()), max(self.high, x.max().item())

    @property
    def mean(self):
        return self.total / self.count

    def summary(self):
        """{mean, std, min, max}; std of the population."""
        variance = self.squares / self.count - self.mean ** 2
        return dict(mean=self.mean, std=math.sqrt(max(0.0, variance)), min=self.low, max=self.high)


class Covariance:
    """Scatter matrix of vectors (N, C) that arrive in pieces, about their common mean, in float64.

    Pieces are merged about their own means, so that a large mean costs no digits of a small variance.
    """

    def __init__(self):
        self.count, self.mean, self.scatter = 0, 0.0, 0.0

    def add(self, x):
        x, n = x.double(), len(x)
        mean = x.mean(0)
        centred, shift = x - mean, mean - self.mean
        total = self.count + n
        self.scatter = self.scatter + centred.T @ centred + torch.outer(shift, shift) * (self.count * n / total)
        self.mean, self.count = self.mean + shift * (n / total), total

    def core_features(self, share=CORE_VARIANCE):
        """How many principal components it takes to explain `share` of the variance: exact, from all C eigenvalues."""
        variances = torch.linalg.eigvalsh(self.scatter).flip(0).clamp(min=0)
        explained = variances.cumsum(0)
        return int((explained < share * explained[-1]).sum()) + 1


# ---------------------------------------------------------------------------------------------------------- quantities

def token_similarity(x):
    """Mean cosine over all pairs i < j of a row's vectors x (T, C); with u = x / |x| it is
    (|sum u|^2 - sum |u|^2) / (T (T - 1))."""
    unit = F.normalize(x.double(), dim=-1)
    return ((unit.sum(0).square().sum() - unit.square().sum()) / (len(x) * (len(x) - 1))).item()


def lambda_usage(model):
    """{s: what the layers that mix s have learned}: for each such layer (1-based) every lambda, flat over (head,
    channel); the median and the mean of lambda1 / lambda2; and the share of |lambda1| < 0.001. Static weights only:
    a dynamic model multiplies them by its gammas."""
    usage = {}
    for s in model.config.mix:
        mixes = {i + 1: layer.attn.mix[s] for i, layer in enumerate(model.layers) if s in layer.attn.mix}
        anchor = torch.stack([mix.lambda_anchor.detach().double().flatten() for mix in mixes.values()])    # (layers, n)
        current = torch.stack([mix.lambda_current.detach().double().flatten() for mix in mixes.values()])
        ratio = anchor / current
        usage[s] = dict(
            layers=list(mixes), anchor=anchor.tolist(), current=current.tolist(),
            ratio_median=ratio.quantile(0.5, dim=-1).tolist(), ratio_mean=ratio.mean(-1).tolist(),
            near_zero=(anchor.abs() < NEAR_ZERO_LAMBDA).double().mean(-1).tolist())
    return usage


# --------------------------------------------------------------------------------------------------------------- hooks

class Watch:
    """A context in which every forward pass of `model`, of one row at a time, adds to the sums of each layer.

    Hooks sit on named submodules: a layer's input and output (hidden states), `gate` (which is given the mixed q, k, v,
    g) and `gammas` (Eq. 11).
    """

    def __init__(self, model):
        self.model, layers = model, range(model.config.n_layer)
        self.similarity, self.covariance = ([make() for _ in range(len(layers) + 1)] for make in (Spread, Covariance))
        self.sink, self.entropy, self.gate, self.sparsity = ([Spread() for _ in layers] for _ in range(4))
        self.gamma = [{s: (Spread(), Spread()) for s in model.config.mixed_in(i)} for i in layers]
        self.alike, self.rows, self.row, self.maps = np.zeros((len(layers) + 1,) * 2), 0, [], {}
        self.mapped = sorted({0, (len(layers) + 1) // 2, len(layers)})       # whose token similarity is kept as a map

    def __enter__(self):
        first = self.model.layers[0].register_forward_pre_hook(lambda layer, args: self.see_hidden(0, args[0][0]))
        self.hooks = [first]
        for i, layer in enumerate(self.model.layers):
            self.hooks += [
                layer.register_forward_hook(lambda layer, args, out, i=i: self.see_hidden(i + 1, out[0])),
                layer.attn.gate.register_forward_pre_hook(lambda gate, args, i=i: self.see_attention(i, args[1])),
                layer.attn.gammas.register_forward_hook(lambda mlp, args, out, i=i: self.see_gamma(i, out))]
        return self

    def __exit__(self, *exception):
        for hook in self.hooks:
            hook.remove()

    def see_hidden(self, i, x):
        """Output x (T, C) of layer i, 1-based; 0 is the embedding."""
        x = x.float()
        self.similarity[i].add(torch.tensor(token_similarity(x)))
        self.covariance[i].add(x)
        unit = F.normalize(x, dim=-1)
        self.row = self.row + [unit] if i else [unit]
        self.alike[i, :i + 1] += [(unit * other).sum(-1).mean().item() for other in self.row]
        if self.rows == 0 and i in self.mapped:
            few = unit[positions_shown(len(unit))].double()
            self.maps[i] = (few @ few.T).tolist()
        self.rows += i == self.model.config.n_layer

    def see_attention(self, i, proj):
        """What layer i (0-based) attends with: proj {s: (1, T, H, D)}, mixed, q and k not yet normed."""
        attn, length = self.model.layers[i].attn, proj["q"].size(1)
        at = Causal(self.model.config, length, proj["q"].device)
        for weights in attention_weights(attn, proj, at):
            self.sink[i].add(weights[:, 0])
            self.entropy[i].add(torch.special.entr(weights).sum(-1))
        if "g" in proj:
            gate = torch.sigmoid(proj["g"].float())
            self.gate[i].add(gate)
            self.sparsity[i].add(gate < SPARSE_GATE)

    def see_gamma(self, i, gamma):
        """Mixing weights of layer i (0-based): {s: (anchor, current)}, (1, T, 1, 1) each; a static model has ones."""
        if self.model.config.dynamic:
            for s, pair in gamma.items():
                for spread, values in zip(self.gamma[i][s], pair):
                    spread.add(values)

    def by_layer(self):
        """{quantity: one number for each layer}; token similarity and PCA begin with the embedding."""
        spreads = dict(attention_sink=self.sink, attention_entropy=self.entropy, token_similarity=self.similarity)
        if self.model.config.gate:
            spreads |= dict(gate_mean=self.gate, gate_sparsity=self.sparsity)
        numbers = {name: [spread.mean for spread in layers] for name, layers in spreads.items()}
        return {**numbers, "pca_core_features": [covariance.core_features() for covariance in self.covariance]}

    def gamma_by_layer(self):
        """{s: {layers, anchor: {mean, std, min, max}, current: ...}}, over tokens; {} for a static model."""
        letters = self.model.config.mix if self.model.config.dynamic else ""
        tables = {}
        for s in letters:
            layers = [i for i, pairs in enumerate(self.gamma) if s in pairs]
            tables[s] = dict(layers=[i + 1 for i in layers])
            for slot, name in enumerate(("anchor", "current")):
                rows = [self.gamma[i][s][slot].summary() for i in layers]
                tables[s][name] = {key: [row[key] for row in rows] for key in rows[0]}
        return tables

    def hidden_similarity(self):
        """(n_layer + 1, n_layer + 1): mean cosine between a token's hidden states in two layers, 0 the embedding."""
        half = self.alike / self.rows
        return (np.tril(half) + np.tril(half, -1).T).tolist()


def positions_shown(length):
    """The tokens of a row that a token-similarity map shows."""
    return torch.linspace(0, length - 1, min(length, MAP_SIDE)).round().long()


@contextlib.contextmanager
def without_anchor(model):
    """Inside, the anchor adds nothing to any projection: the paper's break condition. UserError if there is none."""
    if model.config.anchor == "none":
        raise UserError("--ablate_anchor: this model has no anchor (anchor='none')")
    hook = model.anchor.register_forward_hook(
        lambda anchor, args, made: {s: torch.zeros_like(x) for s, x in made.items()})
    try:
        yield
    finally:
        hook.remove()


def cross_entropy(model, window, docs=None, chunk=512):
    """Summed -log p of the targets of a window (1, T + 1), no z, in nats; the logits of `chunk` tokens at a time."""
    hidden, targets = model.trunk(window[:, :-1], docs)[0], window[0, 1:]
    return sum(F.cross_entropy(model.logits(h).float(), t, reduction="sum").item()
               for h, t in zip(hidden.split(chunk), targets.split(chunk)))


# ------------------------------------------------------------------------------------------------------------- a model

@torch.no_grad()
def analyse(model, windows, dtype="float32", ablate_anchor=False, progress=lambda done: None):
    """Everything above for windows (rows, T + 1) of token ids, as a dict that JSON can hold (keys: see the return)."""
    device, config = model.embed.weight.device, model.config
    windows = torch.as_tensor(windows, dtype=torch.long)
    watch, loss = Watch(model.eval()), 0.0
    ablation = without_anchor(model) if ablate_anchor else contextlib.nullcontext()
    with watch, ablation, torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        for i, window in enumerate(windows):
            loss += cross_entropy(model, window[None].to(device))
            progress(i + 1)
    by_layer, maps = watch.by_layer(), watch.maps
    return dict(
        variant=variant_name(config), ablate_anchor=ablate_anchor, model_config=asdict(config),
        parameters=count_parameters(model), rows=len(windows), tokens_per_row=windows.size(1) - 1,
        dtype=dtype, device=device.type, torch=str(torch.__version__), cross_entropy=loss / windows[:, 1:].numel(),
        averages={name: sum(layers) / len(layers) for name, layers in by_layer.items()}, by_layer=by_layer,
        hidden_similarity=watch.hidden_similarity(), lambdas=lambda_usage(model), gammas=watch.gamma_by_layer(),
        token_maps=dict(positions=positions_shown(windows.size(1) - 1).tolist(), layers=list(maps),
                        maps=list(maps.values())))


def validation_windows(folder, config, rows=0, block_size=0):
    """(rows, T + 1) token ids: the first windows of the validation split, which overlap by one token; rows=0: all.
    T is block_size, or the model's where that is 0. UserError or UserError where data and model do not fit."""
    find_shards(folder, "val")                             # says so if there are none, before anything else is asked
    length, tokenizer = block_size or config.block_size, read_meta(folder)["tokenizer"]
    if tokenizer != config.tokenizer:
        raise UserError(f"--data={folder} holds {tokenizer} tokens, but the model was trained on {config.tokenizer}")
    if not 2 <= length <= config.block_size:
        raise UserError(f"--block_size={length} must be between 2 and the model's {config.block_size}")
    tokens = Tokens(folder, "val", replace(config, block_size=length))
    if rows > len(tokens):
        raise UserError(f"{rows} rows wanted, but {folder} has {len(tokens)} validation windows of {length} tokens")
    return np.stack([tokens.window(i) for i in range(rows or len(tokens))])


class Countdown:
    """A line on stderr with rate and time left, every 10 seconds."""

    def __init__(self, what, total, unit):
        self.what, self.total, self.unit, self.began = what, total, unit, time.monotonic()
        self.last = self.began

    def __call__(self, done):
        now = time.monotonic()
        if now - self.last > 10:
            self.last, rate = now, done / (now - self.began)
            print(f"{self.what}: {done} of {self.total} {self.unit}, {rate:.3g} a second, "
                  f"{clock((self.total - done) / rate)} left", file=sys.stderr, flush=True)
