"""
What happens inside a model: the quantities of Table 2, of Figures 2 to 6 and of Section 4.4, layer by layer.

`analyse(model, windows)` attaches hooks from outside; model.py knows nothing of it. Rows go through one at a time, and
of each layer only running sums stay, and a C x C covariance (float64). The one thing held for a whole row is its hidden
states of every layer, (n_layer + 1, T, C), because each layer is compared with each other. Averages are as in the
paper's released analysis: sink and entropy over batch, heads and all queries, then over layers; token similarity and
PCA core features over the embedding and every layer's output (before the final norm). Attention sees what the model's
own rule of sight shows it, but no document mask. Layers count from 1 here, as in the paper; 0 is the embedding.
"""
import contextlib
import math
import os
import sys
from collections import defaultdict
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from model import count_parameters, variant_name
from prepare_fineweb import Progress, UserError, find_shards, read_meta
from train import Tokens

SPARSE_GATE, NEAR_ZERO_LAMBDA, CORE_VARIANCE = 0.2, 0.001, 0.99
MAP_SIDE = 96                       # tokens, evenly spaced over a row, that a token-similarity heat map shows


# ------------------------------------------------------------------------------------------------------- running sums

class Spread:
    """Mean and standard deviation (of the population) of numbers that arrive in pieces, in float64."""

    def __init__(self):
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, x):
        x = x.double()
        self.count, self.total = self.count + x.numel(), self.total + x.sum().item()
        self.squares += x.square().sum().item()

    @property
    def mean(self):
        return self.total / self.count

    @property
    def std(self):
        return math.sqrt(max(0.0, self.squares / self.count - self.mean ** 2))


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


# ----------------------------------------------------------------------------------- quantities of one forward pass

def token_similarity(x):
    """Mean cosine over all pairs i < j of a row's vectors x (T, C); with u = x / |x| it is
    (|sum u|^2 - sum |u|^2) / (T (T - 1))."""
    unit = F.normalize(x.double(), dim=-1)
    return ((unit.sum(0).square().sum() - unit.square().sum()) / (len(x) * (len(x) - 1))).item()


def attention_weights(attn, proj, at):
    """softmax(q k^T / sqrt(D)) over the keys that the Positions `at` let each query see: one (T, T) float32 for each
    head in turn. attn: a layer's attention; proj {s: (1, T, H, D)}: what it attends with, mixed, not yet normed."""
    hidden = ~at.dense_mask()
    q, k = (at.rotate(norm(proj[s]))[0].transpose(0, 1).float() for s, norm in (("q", attn.q_norm), ("k", attn.k_norm)))
    for q_head, k_head in zip(q, k):                                                                    # (T, D) each
        scores = q_head @ k_head.T / math.sqrt(q.size(-1))
        yield scores.masked_fill(hidden, -torch.inf).softmax(-1)


def octaves(length):
    """The octave of each position of a row, (length,): 0 | 1 | 2, 3 | 4 ... 7 | 8 ... 15 | ..., numbered from 0."""
    return torch.frexp(torch.arange(length, dtype=torch.float32)).exponent.long()


def positions_shown(length):
    """The tokens of a row that a token-similarity map shows."""
    return torch.linspace(0, length - 1, min(length, MAP_SIDE)).round().long()


class Watch:
    """A context in which every forward pass of `model`, of one row at a time, adds to the sums of each layer.

    Hooks sit on named submodules: a layer's input and output (hidden states), `gate` (which is given the mixed q, k, v,
    g) and each `mix` (which is given the anchor, the layer's own projection and the gammas).
    """

    def __init__(self, model):
        self.model, layers = model, model.config.n_layer
        self.means = defaultdict(lambda: defaultdict(Spread))                       # [quantity][layer]
        self.covariance = [Covariance() for _ in range(layers + 1)]
        self.gamma = defaultdict(lambda: defaultdict(Spread))                       # [letter, anchor or current][layer]
        self.norms = defaultdict(lambda: defaultdict(float))                        # the same; sums over each octave
        self.alike, self.rows, self.row, self.maps = np.zeros((layers + 1,) * 2), 0, [], {}
        self.mapped = sorted({0, (layers + 1) // 2, layers})                        # layers with a map

    def __enter__(self):
        self.hooks = [self.model.layers[0].register_forward_pre_hook(self.see_embedding)]
        for i, layer in enumerate(self.model.layers, 1):
            self.hooks += [layer.register_forward_hook(partial(self.see_layer, i)),
                           layer.attn.gate.register_forward_pre_hook(partial(self.see_gate, i, layer.attn))]
            self.hooks += [mix.register_forward_pre_hook(partial(self.see_mix, i, s))
                           for s, mix in layer.attn.mix.items()]
        return self

    def __exit__(self, *exception):
        for hook in self.hooks:
            hook.remove()

    def see_embedding(self, layer, args):
        """The first layer's arguments: hidden states (1, T, C), anchor, what it knows of positions."""
        x, _, self.at = args
        self.row = []
        self.see_hidden(0, x[0])

    def see_layer(self, i, layer, args, out):
        """Output (1, T, C) of layer i."""
        self.see_hidden(i, out[0])
        self.rows += i == self.model.config.n_layer

    def see_hidden(self, i, x):
        """Hidden states x (T, C) after layer i."""
        x = x.float()
        self.means["token_similarity"][i].add(torch.tensor(token_similarity(x)))
        self.covariance[i].add(x)
        unit = F.normalize(x, dim=-1)
        self.row.append(unit)
        self.alike[i, :i + 1] += [(unit * other).sum(-1).mean().item() for other in self.row]
        if self.rows == 0 and i in self.mapped:
            few = unit[positions_shown(len(unit))].double()
            self.maps[i] = (few @ few.T).tolist()

    def see_gate(self, i, attn, gate, args):
        """What layer i attends with: args[1] is {s: (1, T, H, D)}, mixed."""
        proj = args[1]
        for weights in attention_weights(attn, proj, self.at):
            self.means["attention_sink"][i].add(weights[:, 0])
            self.means["attention_entropy"][i].add(torch.special.entr(weights).sum(-1))
        if "g" in proj:
            opened = torch.sigmoid(proj["g"].float())
            self.means["gate_mean"][i].add(opened)
            self.means["gate_sparsity"][i].add(opened < SPARSE_GATE)

    def see_mix(self, i, s, mix, args):
        """The two terms of Eq. 12 of letter s in layer i: their gammas, and the norm of each token's term."""
        *projections, gammas = args
        lambdas, octave = (mix.lambda_anchor, mix.lambda_current), octaves(projections[0].size(1)).to(gammas[0].device)
        for slot, x, lam, gamma in zip(("anchor", "current"), projections, lambdas, gammas):
            norms = (gamma * lam * x.float())[0].flatten(1).norm(dim=-1).double()                         # (T,)
            self.norms[s, slot][i] += torch.zeros(octave[-1] + 1).to(norms).index_add(0, octave, norms)
            if self.model.config.dynamic:
                self.gamma[s, slot][i].add(gamma)

    def by_layer(self):
        """{quantity: one number for each layer}; token similarity and PCA begin with the embedding."""
        numbers = {name: [spread.mean for spread in layers.values()] for name, layers in self.means.items()}
        return {**numbers, "pca_core_features": [covariance.core_features() for covariance in self.covariance]}

    def gammas(self):
        """{s: {layers, anchor: {mean, std}, current: {mean, std}}}, over tokens; {} for a static model."""
        tables = {}
        for (s, slot), layers in self.gamma.items():
            moments = dict(mean=[g.mean for g in layers.values()], std=[g.std for g in layers.values()])
            tables[s] = {**tables.get(s, {}), "layers": list(layers), slot: moments}
        return tables

    def anchor_use(self, length):
        """{s: {layers, tokens: of each octave, anchor: [layer][octave], current: the same}}: the mean norm of a token's
        gamma_1 lambda_1 S_anc and of its gamma_2 lambda_2 S_n, (H, D) taken as one vector."""
        tokens, tables = torch.bincount(octaves(length)), {}
        for (s, slot), layers in self.norms.items():
            norms = [(total.cpu() / (tokens * self.rows)).tolist() for total in layers.values()]
            tables[s] = {**tables.get(s, {}), "layers": list(layers), "tokens": tokens.tolist(), slot: norms}
        return tables

    def hidden_similarity(self):
        """(n_layer + 1, n_layer + 1): mean cosine between a token's hidden states in two layers, 0 the embedding."""
        half = self.alike / self.rows
        return (np.tril(half) + np.tril(half, -1).T).tolist()


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


def lambdas_of(model):
    """{s: {layers, anchor, current}}: the layers that mix s, and the lambdas of each, (H or 1, D or 1) lists. Weights
    only: a dynamic model multiplies them by its gammas."""
    tables = {}
    for s in model.config.mix:
        mixes = {i: layer.attn.mix[s] for i, layer in enumerate(model.layers, 1) if s in layer.attn.mix}
        tables[s] = dict(layers=list(mixes), anchor=[mix.lambda_anchor.tolist() for mix in mixes.values()],
                         current=[mix.lambda_current.tolist() for mix in mixes.values()])
    return tables


@torch.no_grad()
def analyse(model, windows, ablate_anchor=False):
    """Everything above for windows (rows, T + 1) of token ids, as a dict that JSON can hold (keys: see the return)."""
    device, config, length = model.embed.weight.device, model.config, len(windows[0]) - 1
    watch, loss, progress = Watch(model.eval()), 0.0, Progress(variant_name(config), len(windows), "rows")
    with watch, without_anchor(model) if ablate_anchor else contextlib.nullcontext():
        for i, window in enumerate(windows, 1):
            loss += cross_entropy(model, torch.as_tensor(window, dtype=torch.long, device=device)[None])
            progress.update(i)
    progress.end()
    by_layer = watch.by_layer()
    return dict(
        variant=variant_name(config), ablate_anchor=ablate_anchor, model_config=asdict(config),
        parameters=count_parameters(model), rows=len(windows), tokens_per_row=length,
        device=device.type, torch=str(torch.__version__), cross_entropy=loss / len(windows) / length,
        averages={name: sum(layers) / len(layers) for name, layers in by_layer.items()}, by_layer=by_layer,
        hidden_similarity=watch.hidden_similarity(), lambdas=lambdas_of(model), gammas=watch.gammas(),
        anchor_use=watch.anchor_use(length),
        token_maps=dict(positions=positions_shown(length).tolist(), layers=list(watch.maps),
                        maps=list(watch.maps.values())))


# ------------------------------------------------------------------------------------------- what follows from a record

def ratio(table):
    """lambda_1 / lambda_2 of one letter's table in `lambdas`, (layers, H or 1, D or 1)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.array(table["anchor"]) / np.array(table["current"])


def near_zero(tables):
    """The share of the lambda_1 of some letters' tables whose size is below 0.001, over all layers."""
    return float(np.mean([np.abs(table["anchor"]) < NEAR_ZERO_LAMBDA for table in tables]))


def clipped_ratio(table):
    """`ratio`, each layer's between its own 2nd and 98th percentile: one lambda_2 near zero would rule any variance."""
    values = ratio(table)
    low, high = np.percentile(values, (2, 98), axis=(1, 2), keepdims=True)
    return values.clip(low, high)


def between_heads(table):
    """The share of the variance of lambda_1 / lambda_2 within a layer that lies between its heads, mean over layers:
    1 where each head has one value, (H - 1) / (H D - 1) in the mean where all are drawn alike."""
    values = clipped_ratio(table)
    with np.errstate(invalid="ignore"):
        return np.mean(values.mean(2).var(1) / values.var((1, 2)))


def band_correlation(one, other):
    """The correlation of two letters' lambda_1 / lambda_2 over a layer's channels, each less its head's mean; mean over
    layers: near 1 where the bands within heads lie on the same channels."""
    a, b = (values - values.mean(2, keepdims=True) for values in map(clipped_ratio, (one, other)))
    with np.errstate(invalid="ignore"):
        return np.mean((a * b).sum((1, 2)) / np.sqrt((a ** 2).sum((1, 2)) * (b ** 2).sum((1, 2))))


def anchor_share(table):
    """The anchor's share of the two mean norms in one letter's table of `anchor_use`: by layer, (layers,), and by layer
    and octave of the position, (layers, octaves). 0: the anchor adds nothing; 0.5: as much as the layer's own."""
    anchor, current = (np.array(table[slot]) for slot in ("anchor", "current"))
    whole = [np.average(norms, axis=1, weights=table["tokens"]) for norms in (anchor, current)]
    return whole[0] / (whole[0] + whole[1]), anchor / (anchor + current)


def stage_3(similarity):
    """The layer where the paper's third stage begins, or None: the token similarity of the embedding and of each layer
    has risen to an early maximum, is lowest here, and rises again. Of several dips it is the deepest, measured from the
    lower one of the highest points before and after it."""
    depths = [0.0]
    for i, here in enumerate(similarity[1:], 1):
        before, after = max(similarity[:i + 1]), max(similarity[i:])
        depths.append(min(before, after) - here if before > similarity[0] else 0.0)
    return int(np.argmax(depths)) if max(depths) > 0 else None


# ----------------------------------------------------------------------------------------------------------------- data

def validation_windows(folder, config, rows=0, block_size=0):
    """(rows, T + 1) token ids: the first windows of the validation split, which overlap by one token; rows=0: all.
    T is block_size, or the model's where that is 0. UserError where data and model do not fit."""
    find_shards(folder, "val")                             # says so if there are none, before anything else is asked
    length, tokenizer = block_size or config.block_size, read_meta(folder)["tokenizer"]
    if tokenizer != config.tokenizer:
        raise UserError(f"--data={folder} holds {tokenizer} tokens, but the model was trained on {config.tokenizer}")
    if not 2 <= length <= config.block_size:
        raise UserError(f"--block_size={length} must be between 2 and the model's {config.block_size}")
    tokens = Tokens(folder, "val", replace(config, block_size=length))
    if not 0 <= rows <= len(tokens):
        raise UserError(f"{rows} rows wanted, but {folder} has {len(tokens)} validation windows of {length} tokens")
    return np.stack([tokens.window(i) for i in range(rows or len(tokens))])
