"""
What happens inside a model, layer by layer: Table 2, Figures 2 to 6 and Section 4.4.

`analyse(model, windows)` attaches hooks from outside; model.py knows nothing of it. Rows go
through one at a time, and of each layer only running sums stay, and a C x C covariance (float64).
The one thing held for a whole row is its hidden states of every layer, (n_layer + 1, T, C),
because each layer is compared with each other.

Averages are as in the paper's released analysis: sink and entropy over batch, heads and all
queries, then over layers; token similarity and PCA core features over the embedding and every
layer's output (before the final norm). Attention sees what the model's own rule of sight shows
it, but no document mask. Layers count from 1 here, as in the paper; 0 is the embedding.
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

SPARSE_GATE = 0.2  # a gate below it counts as closed
NEAR_ZERO_LAMBDA = 0.001
CORE_VARIANCE = 0.99
MAP_SIDE = 96  # tokens, evenly spaced over a row, that a token-similarity map shows


@torch.no_grad()
def analyse(model, windows, ablate_anchor=False):
    """Everything below for windows (rows, T + 1) of token ids, as a dict that JSON can hold."""
    model.eval()
    config = model.config
    device = model.embed.weight.device
    length = len(windows[0]) - 1
    watch = Watch(model)
    loss = 0.0
    progress = Progress(variant_name(config), len(windows), "rows")
    with watch, without_anchor(model) if ablate_anchor else contextlib.nullcontext():
        for done, window in enumerate(windows, 1):
            row = torch.as_tensor(window, dtype=torch.long, device=device)
            loss += cross_entropy(model, row[None])
            progress.update(done)
    progress.end()
    if not math.isfinite(loss):
        raise UserError("the loss is not finite: these weights are damaged, or the run diverged")
    by_layer = watch.by_layer()
    return dict(
        variant=variant_name(config),
        ablate_anchor=ablate_anchor,
        model_config=asdict(config),
        parameters=count_parameters(model),
        rows=len(windows),
        tokens_per_row=length,
        device=device.type,
        torch=str(torch.__version__),
        cross_entropy=loss / len(windows) / length,
        averages={name: sum(layers) / len(layers) for name, layers in by_layer.items()},
        by_layer=by_layer,
        hidden_similarity=watch.hidden_similarity(),
        lambdas=lambdas_of(model),
        gammas=watch.gammas(),
        anchor_use=watch.anchor_use(length),
        token_maps=watch.token_maps(length),
    )


def cross_entropy(model, window, docs=None, chunk=512):
    """Summed -log p of the targets of a window (1, T + 1), in nats, without z.

    Only `chunk` tokens at a time have logits.
    """
    hidden = model.trunk(window[:, :-1], docs)[0]
    targets = window[0, 1:]
    loss = 0.0
    for some, answers in zip(hidden.split(chunk), targets.split(chunk)):
        logits = model.logits(some).float()
        loss += F.cross_entropy(logits, answers, reduction="sum").item()
    return loss


@contextlib.contextmanager
def without_anchor(model):
    """Inside, the anchor adds nothing to any projection: the paper's break condition.

    UserError where there is no anchor.
    """
    if model.config.anchor == "none":
        raise UserError("--ablate_anchor: this model has no anchor (anchor='none')")

    def zeros(anchor, args, made):
        return {s: torch.zeros_like(x) for s, x in made.items()}

    hook = model.anchor.register_forward_hook(zeros)
    try:
        yield
    finally:
        hook.remove()


def lambdas_of(model):
    """{s: {layers, anchor, current}}: the layers that mix s, and the lambdas of each as lists.

    A layer's are (H or 1, D or 1). Weights only: a dynamic model multiplies them by its gammas.
    """
    tables = {}
    for s in model.config.mix:
        layers = []
        anchor = []
        current = []
        for i, layer in enumerate(model.layers, 1):
            if s in layer.attn.mix:
                layers.append(i)
                anchor.append(layer.attn.mix[s].lambda_anchor.tolist())
                current.append(layer.attn.mix[s].lambda_current.tolist())
        tables[s] = dict(layers=layers, anchor=anchor, current=current)
    return tables


# ---- quantities of one forward pass --------------------------------------------------------------


def token_similarity(x):
    """Mean cosine over all pairs i < j of a row's vectors x (T, C).

    With u = x / |x| it is (|sum u|^2 - sum |u|^2) / (T (T - 1)).
    """
    unit = F.normalize(x.double(), dim=-1)
    pairs = unit.sum(0).square().sum() - unit.square().sum()
    return (pairs / (len(x) * (len(x) - 1))).item()


def attention_weights(attn, proj, positions):
    """softmax(q k^T / sqrt(D)) of each head in turn, (T, T) float32.

    attn       a layer's attention
    proj       {s: (1, T, H, D)}: what it attends with, mixed, not yet normed; where keys have
               fewer heads than queries (grouped-query attention), neighbouring queries share one
    positions  a Positions of the model, which lets each query see its keys
    """
    hidden = ~positions.dense_mask()
    q = positions.rotate(attn.q_norm(proj["q"]))[0].transpose(0, 1).float()  # (H, T, D)
    k = positions.rotate(attn.k_norm(proj["k"]))[0].transpose(0, 1).float()
    k = k.repeat_interleave(len(q) // len(k), dim=0)
    for q_head, k_head in zip(q, k):
        scores = q_head @ k_head.T / math.sqrt(q.size(-1))
        yield scores.masked_fill(hidden, -torch.inf).softmax(-1)


def octaves(length):
    """The octave of each position of a row: 0 | 1 | 2, 3 | 4 ... 7 | ..., numbered from 0."""
    return torch.frexp(torch.arange(length, dtype=torch.float32)).exponent.long()


def positions_shown(length):
    """The tokens of a row that a token-similarity map shows."""
    return torch.linspace(0, length - 1, min(length, MAP_SIDE)).round().long()


class Watch:
    """A context in which each forward pass of `model`, of one row, adds to the sums of each layer.

    Hooks sit on named submodules: a layer (its input and output are hidden states), `gate` (which
    is given the mixed q, k, v, g) and each `mix` (which is given the anchor, the layer's own
    projection and the gammas).
    """

    def __init__(self, model):
        layers = model.config.n_layer
        self.model = model
        self.rows = 0
        self.row = []  # of the row that goes through: its unit hidden states, layer by layer
        self.means = defaultdict(lambda: defaultdict(Spread))  # [quantity][layer]
        self.gamma = defaultdict(lambda: defaultdict(Spread))  # [letter, slot][layer]
        self.norms = defaultdict(lambda: defaultdict(float))  # the same; sums over each octave
        self.covariance = [Covariance() for _ in range(layers + 1)]
        self.alike = np.zeros((layers + 1, layers + 1))
        self.mapped = sorted({0, (layers + 1) // 2, layers})  # layers with a map
        self.maps = {}

    def __enter__(self):
        self.hooks = [self.model.layers[0].register_forward_pre_hook(self.see_embedding)]
        for i, layer in enumerate(self.model.layers, 1):
            attn = layer.attn
            see_gate = partial(self.see_gate, i, attn)
            self.hooks.append(layer.register_forward_hook(partial(self.see_layer, i)))
            self.hooks.append(attn.gate.register_forward_pre_hook(see_gate))
            for s, mix in attn.mix.items():
                see_mix = partial(self.see_mix, i, s)
                self.hooks.append(mix.register_forward_pre_hook(see_mix))
        return self

    def __exit__(self, *exception):
        for hook in self.hooks:
            hook.remove()

    def see_embedding(self, layer, args):
        """The first layer's arguments: hidden states (1, T, C), anchor, positions."""
        x, _, self.positions = args
        self.row = []
        self.see_hidden(0, x[0])

    def see_layer(self, i, layer, args, out):
        """Output (1, T, C) of layer i."""
        self.see_hidden(i, out[0])
        if i == self.model.config.n_layer:
            self.rows += 1

    def see_hidden(self, i, x):
        """Hidden states x (T, C) after layer i."""
        x = x.float()
        self.means["token_similarity"][i].add(torch.tensor(token_similarity(x)))
        self.covariance[i].add(x)
        unit = F.normalize(x, dim=-1)
        self.row.append(unit)
        self.alike[i, : i + 1] += [(unit * other).sum(-1).mean().item() for other in self.row]
        if self.rows == 0 and i in self.mapped:
            few = unit[positions_shown(len(unit))].double()
            self.maps[i] = (few @ few.T).tolist()

    def see_gate(self, i, attn, gate, args):
        """What layer i attends with: args[1] is {s: (1, T, H, D)}, mixed."""
        proj = args[1]
        for weights in attention_weights(attn, proj, self.positions):
            entropy = torch.special.entr(weights).sum(-1)
            self.means["attention_sink"][i].add(weights[:, 0])
            self.means["attention_entropy"][i].add(entropy)
        if "g" in proj:
            opened = torch.sigmoid(proj["g"].float())
            self.means["gate_mean"][i].add(opened)
            self.means["gate_sparsity"][i].add(opened < SPARSE_GATE)

    def see_mix(self, i, s, mix, args):
        """The two terms of Eq. 12 of letter s in layer i: their gammas, and each token's norm."""
        anchor, current, gammas = args
        self.see_term(i, s, "anchor", anchor, mix.lambda_anchor, gammas[0])
        self.see_term(i, s, "current", current, mix.lambda_current, gammas[1])

    def see_term(self, i, s, slot, x, lam, gamma):
        """gamma * lam * x, one of the two terms; x (1, T, H, D)."""
        term = (gamma * lam * x.float())[0]
        norms = term.flatten(1).norm(dim=-1).double()  # (T,)
        octave = octaves(len(norms)).to(norms.device)
        sums = torch.zeros(octave[-1] + 1).to(norms)
        self.norms[s, slot][i] += sums.index_add(0, octave, norms)
        if self.model.config.dynamic:
            self.gamma[s, slot][i].add(gamma)

    def by_layer(self):
        """{quantity: a number for each layer}; similarity and PCA begin with the embedding."""
        numbers = {}
        for name, layers in self.means.items():
            numbers[name] = [spread.mean for spread in layers.values()]
        numbers["pca_core_features"] = [layer.core_features() for layer in self.covariance]
        return numbers

    def gammas(self):
        """{s: {layers, anchor: {mean, std}, current: {mean, std}}}, over tokens; {} if static."""
        tables = defaultdict(dict)
        for (s, slot), layers in self.gamma.items():
            tables[s]["layers"] = list(layers)
            means = [gamma.mean for gamma in layers.values()]
            stds = [gamma.std for gamma in layers.values()]
            tables[s][slot] = dict(mean=means, std=stds)
        return dict(tables)

    def anchor_use(self, length):
        """{s: {layers, tokens: in each octave, anchor: [layer][octave], current: the same}}.

        These are mean norms of a token's gamma_1 lambda_1 S_anc and of its gamma_2 lambda_2 S_n,
        (H, D) taken as one vector.
        """
        tokens = torch.bincount(octaves(length))
        tables = defaultdict(dict)
        for (s, slot), layers in self.norms.items():
            tables[s]["layers"] = list(layers)
            tables[s]["tokens"] = tokens.tolist()
            seen = tokens * self.rows
            tables[s][slot] = [(total.cpu() / seen).tolist() for total in layers.values()]
        return dict(tables)

    def hidden_similarity(self):
        """Mean cosine between a token's hidden states in two layers, (n_layer + 1, n_layer + 1)."""
        half = self.alike / self.rows
        return (np.tril(half) + np.tril(half, -1).T).tolist()

    def token_maps(self, length):
        """Cosines between the tokens of the first row, in three layers."""
        shown = positions_shown(length).tolist()
        return dict(positions=shown, layers=list(self.maps), maps=list(self.maps.values()))


# ---- running sums --------------------------------------------------------------------------------


class Spread:
    """Mean and standard deviation (of the population) of numbers that arrive in pieces, float64."""

    def __init__(self):
        self.count = 0
        self.total = 0.0
        self.squares = 0.0

    def add(self, x):
        x = x.double()
        self.count += x.numel()
        self.total += x.sum().item()
        self.squares += x.square().sum().item()

    @property
    def mean(self):
        return self.total / self.count

    @property
    def std(self):
        return math.sqrt(max(0.0, self.squares / self.count - self.mean**2))


class Covariance:
    """Scatter matrix of vectors (N, C) that arrive in pieces, about their common mean, float64.

    Pieces are merged about their own means: a large mean costs no digits of a small variance.
    """

    def __init__(self):
        self.count = 0
        self.mean = 0.0
        self.scatter = 0.0

    def add(self, x):
        x = x.double()
        n = len(x)
        total = self.count + n
        mean = x.mean(0)
        centred = x - mean
        shift = mean - self.mean
        between = torch.outer(shift, shift) * (self.count * n / total)
        self.scatter = self.scatter + centred.T @ centred + between
        self.mean = self.mean + shift * (n / total)
        self.count = total

    def core_features(self, share=CORE_VARIANCE):
        """How many principal components explain `share` of the variance, from all C eigenvalues."""
        variances = torch.linalg.eigvalsh(self.scatter).flip(0).clamp(min=0)
        explained = variances.cumsum(0)
        return int((explained < share * explained[-1]).sum()) + 1


# ---- what follows from a record ------------------------------------------------------------------


def ratio(table):
    """lambda_1 / lambda_2 of one letter's table in `lambdas`, (layers, H or 1, D or 1)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.array(table["anchor"]) / np.array(table["current"])


def near_zero(tables):
    """The share of the lambda_1 of some letters' tables whose size is below 0.001."""
    sizes = [np.abs(table["anchor"]).flatten() for table in tables]
    return float(np.mean(np.concatenate(sizes) < NEAR_ZERO_LAMBDA))


def clipped_ratio(table):
    """`ratio`, each layer's between its own 2nd and 98th percentile.

    One lambda_2 near zero would rule any variance.
    """
    values = ratio(table)
    low, high = np.percentile(values, (2, 98), axis=(1, 2), keepdims=True)
    return values.clip(low, high)


def between_heads(table):
    """The share of the variance of lambda_1 / lambda_2 within a layer that lies between its heads.

    Mean over layers: 1 where each head has one value, (H - 1) / (H D - 1) in the mean where all
    are drawn alike.
    """
    values = clipped_ratio(table)
    with np.errstate(invalid="ignore"):
        return np.mean(values.mean(2).var(1) / values.var((1, 2)))


def band_correlation(one, other):
    """The correlation of two letters' lambda_1 / lambda_2 over channels, mean over layers.

    Each channel counts less its head's mean: near 1 where the bands within heads lie on the
    same channels. None where the letters have different numbers of heads.
    """
    a = clipped_ratio(one)
    b = clipped_ratio(other)
    if a.shape != b.shape:
        return None
    a = a - a.mean(2, keepdims=True)
    b = b - b.mean(2, keepdims=True)
    with np.errstate(invalid="ignore"):
        product = np.sqrt((a**2).sum((1, 2)) * (b**2).sum((1, 2)))
        return np.mean((a * b).sum((1, 2)) / product)


def anchor_share(table):
    """The anchor's share of the two mean norms in one letter's table of `anchor_use`.

    By layer, (layers,), and by layer and octave of the position, (layers, octaves). 0: the anchor
    adds nothing; 0.5: as much as the layer's own.
    """
    anchor = np.array(table["anchor"])
    current = np.array(table["current"])
    whole_anchor = np.average(anchor, axis=1, weights=table["tokens"])
    whole_current = np.average(current, axis=1, weights=table["tokens"])
    return whole_anchor / (whole_anchor + whole_current), anchor / (anchor + current)


def stage_3(similarity):
    """The layer where the paper's third stage begins, or None.

    The token similarity of the embedding and of each layer has risen to an early maximum, is
    lowest here, and rises again. Of several dips it is the deepest, measured from the lower one of
    the highest points before and after it.
    """
    depths = [0.0]
    for i, here in enumerate(similarity[1:], 1):
        before = max(similarity[: i + 1])
        after = max(similarity[i:])
        depths.append(min(before, after) - here if before > similarity[0] else 0.0)
    return int(np.argmax(depths)) if max(depths) > 0 else None


# ---- data ----------------------------------------------------------------------------------------


def validation_windows(folder, config, rows=0, block_size=0):
    """(rows, T + 1) token ids: the first windows of the validation split.

    Windows overlap by one token. rows=0: all. T is block_size, or the model's where that is 0.
    UserError where data and model do not fit.
    """
    find_shards(folder, "val")  # says so if there are none, before anything else is asked
    length = block_size or config.block_size
    tokenizer = read_meta(folder)["tokenizer"]
    if tokenizer != config.tokenizer:
        raise UserError(
            f"--data={folder} holds {tokenizer} tokens, "
            f"but the model was trained on {config.tokenizer}"
        )
    if not 2 <= length <= config.block_size:
        raise UserError(
            f"--block_size={length} must be between 2 and the model's {config.block_size}"
        )
    tokens = Tokens(folder, "val", replace(config, block_size=length))
    if not 0 <= rows <= len(tokens):
        raise UserError(
            f"{rows} rows wanted, but {folder} has {len(tokens)} validation windows "
            f"of {length} tokens"
        )
    return np.stack([tokens.window(i) for i in range(rows or len(tokens))])
