"""
ExoFormer, the whole model in one file: every Transformer of Table 3 of "Attention Projection Mixing with Exogenous
Anchors" (arXiv 2601.08131), by flags.

The idea. Attention projects its input into queries, keys, values and (here) gate logits. The paper mixes each of these
with an ANCHOR: the same projection taken close to the token embeddings, so that deep layers need not carry token
identity themselves. The anchor is either layer 1's own projection (internal: ResFormer, NuResFormer) or that of four
extra matrices outside the stack (exogenous: ExoFormer). Everything the paper adds is one line, in `WeightedSum`.

    tokens -> embedding H_0 --------------------------------------------+
                 |                                                      |  once per forward (make_anchor):
                 |            one layer n                               |  S_anc = RMSNorm(H_0 W_S)     exogenous, Eq. 9
                 |                                                      |  S_anc = RMSNorm(layer 1's S) internal,  Eq. 8
                 +--> RMSNorm -> Q_n ---- mix <-- Q_anc ----------------+
                 |               K_n ---- mix <-- K_anc ----------------+   mix:  gamma_1 lambda_1 S_anc
                 |               V_n ---- mix <-- V_anc ----------------+       + gamma_2 lambda_2 S_n
                 |               G_n ---- mix <-- G_anc ----------------+
                 |                 |
                 |   softmax(rope(norm Q) rope(norm K)^T / sqrt(D)) V * sigmoid(G) -> W^O
                 + <---------------+
                 |
                 +--> RMSNorm -> SwiGLU --+
                 + <----------------------+        ... n_layer times, RMSNorm, head -> logits

Layers count from 1 in the paper and in these comments, from 0 in the code: layer n is layers[n - 1].
Symbols, paper | code | shape | where:
    B, T, C, V          batch, tokens, n_embd, vocab_size
    H, D                n_head, head_dim = C / H
    S in {Q, K, V, G}   a letter of "qkvg"                                  `mix="qkvg"` says which are mixed
    S_n                 proj[s]                         (B, T, H, D)        Projections, Eq. 1, 4, 7
    S_anc               anchor[s]                       (B, T, H, D)        InternalAnchor, ExogenousAnchor, Eq. 8, 9
    lambda_{n,1}^S      mix[s].lambda_anchor            (1|H, 1|D)          Mix, Eq. 10
    lambda_{n,2}^S      mix[s].lambda_current           (1|H, 1|D)          Mix, Eq. 10
    gamma_{n,1|2}^S     gamma[s] = (anchor, current)    (B, T, 1, 1)        DynamicMixing, Eq. 11, 12

Numbers live in two precisions. Parameters are float32 (train.py can make them bfloat16); under torch.autocast the
residual stream and every matrix product are bfloat16. The means of RMSNorm, RoPE, gate, softmax statistics and the loss
are computed in float32, and so is mixing where the parameters are.

`python model.py` prints the table of variants; `python model.py --ckpt=PATH --prompt="Once"` samples from a checkpoint.
"""
import argparse
import functools
import math
import pickle
import re
import zipfile
import zlib
from dataclasses import dataclass, field, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


# ------------------------------------------------------------------------------------------------------------- 1 config

class InputError(ValueError):
    """A setting, a file or a device that cannot be used. One line for its user: what is wrong, the value, the remedy."""


COMPONENTS = "qkvg"                 # the order of rows in every fused projection and of the slots of Eq. 11
GRANULARITY = {                     # the shape of a lambda, to broadcast against (..., H, D); Section 3
    "scalar": lambda n_head, head_dim: (1, 1),
    "headwise": lambda n_head, head_dim: (n_head, 1),
    "elementwise": lambda n_head, head_dim: (n_head, head_dim),
}


def setting(default, help, choices=None, low=-math.inf, high=math.inf):
    """A dataclass field with its help text and what it allows; train.py turns every one into a flag."""
    return field(default=default, metadata=dict(help=help, choices=choices, low=low, high=high))


class Checked:
    """A frozen dataclass of settings; InputError if a field is out of range or a rule in `problems` is broken."""

    def __post_init__(self):
        for f in fields(self):
            value, choices, low, high = vars(self)[f.name], *(f.metadata[key] for key in ("choices", "low", "high"))
            if choices and value not in choices:
                raise InputError(f"{f.name}={value!r} must be one of {', '.join(choices)}")
            if type(value) in (int, float) and not (low <= value <= high and math.isfinite(value)):
                raise InputError(f"{f.name}={value} must be a number from {low:g} to {high:g}")
        for broken, message in self.problems():
            if broken:
                raise InputError(message)

    def problems(self):
        """The rules between fields, as (is broken, what to say)."""
        return ()


@dataclass(frozen=True)
class ModelConfig(Checked):
    """The sizes of a model and one field for each axis of the paper. The defaults are `exo` at the paper's size."""
    n_layer: int = setting(29, "layers; the paper uses 29 with the gate, 32 without, for equal parameters", low=1)
    n_head: int = setting(16, "attention heads", low=1)
    n_embd: int = setting(1024, "width C of the residual stream", low=1)
    ffn_dim: int = setting(0, "width of the fused SwiGLU input matrix, twice its inner width; 0: 4 * n_embd", low=0)
    vocab_size: int = setting(57601, "token ids the model knows; the README explains the paper's 57,601", low=1)
    block_size: int = setting(2048, "longest context in tokens", low=1)
    gate: bool = setting(True, "gate the attention output with sigmoid(G) (Eq. 4-6)")
    anchor: str = setting("exogenous", "where anchors come from (Eq. 8, Eq. 9)", ("none", "internal", "exogenous"))
    mix: str = setting("qkvg", "which of q, k, v, g are mixed with their anchor (the S of Eq. 10)")
    anchor_norm: str = setting("qkvg", "which anchors pass an RMSNorm (Eq. 10)")
    granularity: str = setting("elementwise", "the shape of a lambda", tuple(GRANULARITY))
    dynamic: bool = setting(False, "weigh anchor and current projection per token (Eq. 11, 12)")
    dynamic_dim: int = setting(16, "hidden width of the dynamic-mixing MLP (Eq. 11)", low=1)
    lambda_init: float | None = setting(None, "start of every lambda; none: 0.5, and 1.0 when dynamic")
    qk_norm: bool = setting(True, "RMSNorm on the mixed queries and keys")
    norm_position: str = setting("pre", "RMSNorm before each sub-layer (the paper), on its output, or both",
                                 ("pre", "after", "both"))
    window: int = setting(0, "tokens that a token sees, itself included (sliding window); 0: all before it", low=0)
    rope_theta: float = setting(500_000.0, "base of the rotary angles", low=1)
    tokenizer: str = setting("gpt2", "what the token ids mean", ("gpt2", "bytes"))

    def problems(self):
        """The rules between fields, as (is broken, what to say)."""
        for name in ("mix", "anchor_norm"):
            letters = vars(self)[name]
            yield (any(s not in COMPONENTS for s in letters) or len(set(letters)) < len(letters),
                   f"{name}={letters!r} must use the letters q, k, v, g, each at most once")
        yield self.n_embd % self.n_head != 0, f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}"
        yield (self.head_dim % 2 != 0, f"head_dim={self.head_dim} (n_embd={self.n_embd} / n_head={self.n_head}) is "
               "odd; RoPE rotates pairs of channels")
        yield self.ffn_dim % 2 != 0, f"ffn_dim={self.ffn_dim} must be even"
        yield ("g" in self.mix and not self.gate,
               f"mix={self.mix!r} mixes g, but gate={self.gate} gives the layers no g")
        yield self.anchor == "none" and self.mix != "", f"mix={self.mix!r} needs an anchor, but anchor='none'"
        yield self.anchor == "none" and self.dynamic, f"dynamic={self.dynamic} needs an anchor, but anchor='none'"
        yield (self.anchor == "internal" and self.n_layer == 1,
               f"anchor='internal' needs a second layer to mix into, but n_layer={self.n_layer}")
        yield (self.anchor != "none" and self.mix == "",
               f"anchor={self.anchor!r} has nothing to mix into, since mix=''; name letters, as in mix=qkvg")
        yield (not set(self.anchor_norm) <= set(self.mix),
               f"anchor_norm={self.anchor_norm!r} names an anchor that mix={self.mix!r} does not use")

    @property
    def head_dim(self):
        """Channels of one head, D."""
        return self.n_embd // self.n_head

    @property
    def components(self):
        """The letters a layer projects to: "qkvg" with the gate, "qkv" without."""
        return COMPONENTS[:4 if self.gate else 3]

    @property
    def padded_vocab(self):
        """Rows of the head: vocab_size rounded up to 64, which keeps the largest matrix product aligned."""
        return 64 * math.ceil(self.vocab_size / 64)

    def mixed_in(self, layer):
        """The letters mixed in layers[layer]: an internal anchor is layers[0]'s own, not mixed there (Eq. 10)."""
        return "".join(s for s in COMPONENTS if s in self.mix and not (self.anchor == "internal" and layer == 0))


def _axes(gate=True, anchor="none", mix="", norm="", granularity="elementwise", dynamic=False):
    return dict(gate=gate, anchor=anchor, mix=mix, anchor_norm=norm, granularity=granularity, dynamic=dynamic,
                n_layer=29 if gate else 32)


VARIANTS = {  # --variant: the ModelConfig fields of one row of Table 3
    "base":                       _axes(gate=False),
    "gated":                      _axes(),
    "resformer":                  _axes(False, "internal", "v"),
    "naive":                      _axes(True, "internal", "v"),
    "nuresformer_qknorm":         _axes(True, "internal", "qkvg", "qk"),
    "nuresformer_qknorm_headwise": _axes(True, "internal", "qkvg", "qk", "headwise"),
    "nuresformer_qknorm_scalar":  _axes(True, "internal", "qkvg", "qk", "scalar"),
    "nuresformer_vg":             _axes(True, "internal", "vg"),
    "nuresformer_vg_headwise":    _axes(True, "internal", "vg", "", "headwise"),
    "nuresformer_vg_scalar":      _axes(True, "internal", "vg", "", "scalar"),
    "nuresformer":                _axes(True, "internal", "qkvg", "qkvg"),
    "nuresformer_headwise":       _axes(True, "internal", "qkvg", "qkvg", "headwise"),
    "nuresformer_scalar":         _axes(True, "internal", "qkvg", "qkvg", "scalar"),
    "exo_nonorm":                 _axes(True, "exogenous", "qkvg"),
    "exo_dynamic":                _axes(True, "exogenous", "qkvg", "qkvg", dynamic=True),
    "exo":                        _axes(True, "exogenous", "qkvg", "qkvg"),
    "exo_headwise":               _axes(True, "exogenous", "qkvg", "qkvg", "headwise"),
    "exo_scalar":                 _axes(True, "exogenous", "qkvg", "qkvg", "scalar"),
}

TABLE_3 = {  # what the paper prints for each row: (millions of parameters, validation perplexity, average accuracy)
    "base": (454, 14.79, 48.14), "gated": (453, 14.64, 48.80), "resformer": (454, 14.32, 49.65),
    "naive": (453, 14.25, 49.09),
    "nuresformer_qknorm": (453, 14.21, 48.91), "nuresformer_qknorm_headwise": (453, 14.21, 49.68),
    "nuresformer_qknorm_scalar": (453, 14.22, 49.83), "nuresformer_vg": (453, 14.24, 49.20),
    "nuresformer_vg_headwise": (453, 14.22, 49.11), "nuresformer_vg_scalar": (453, 14.24, 49.28),
    "nuresformer": (453, 14.15, 49.68), "nuresformer_headwise": (453, 14.17, 49.42),
    "nuresformer_scalar": (453, 14.17, 49.11),
    "exo_nonorm": (457, 14.30, 49.69), "exo_dynamic": (457, 14.09, 50.27), "exo": (457, 14.13, 49.85),
    "exo_headwise": (457, 14.14, 49.23), "exo_scalar": (457, 14.15, 49.16),
}


def variant_settings(variant, given):
    """The row of Table 3 named `variant` as a dict of settings, overridden by those in `given`.

    What is given narrows what the row says of other fields: gate=False takes g out of mix, letters that are not mixed
    leave anchor_norm, anchor="none" empties both, mix="" means no anchor, and without an anchor nothing is dynamic.
    """
    settings = {**VARIANTS[variant], **given}

    def narrow(name, value):
        settings[name] = given.get(name, value)

    usable = "" if settings["anchor"] == "none" else COMPONENTS if settings["gate"] else COMPONENTS[:3]
    narrow("mix", "".join(s for s in settings["mix"] if s in usable))
    narrow("anchor_norm", "".join(s for s in settings["anchor_norm"] if s in settings["mix"]))
    narrow("anchor", settings["anchor"] if settings["mix"] else "none")
    narrow("dynamic", settings["dynamic"] and settings["anchor"] != "none")
    return settings


def variant_config(variant, **given):
    """The ModelConfig of a row of Table 3 by its --variant name, with any field overridden."""
    return ModelConfig(**variant_settings(variant, given))


def variant_name(config):
    """The --variant whose axes a ModelConfig has, whatever its sizes; "custom" where Table 3 has no such row."""
    ignored = {"n_layer", "granularity"} if config.anchor == "none" else {"n_layer"}     # nothing is mixed: no lambdas
    for name, row in VARIANTS.items():
        axes = {**row, "qk_norm": True, "norm_position": "pre", "window": 0}
        if all(vars(config)[axis] == value for axis, value in axes.items() if axis not in ignored):
            return name
    return "custom"


# -------------------------------------------------------------------------------------------------------------- 2 parts

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, the mean in float32; weight (dim,) starts at 1."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(dim)), eps

    def forward(self, x):
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (x * scale).type_as(x) * self.weight.type_as(x)          # cast first: the backward keeps x's dtype


class Linear(nn.Linear):
    """A matrix without bias; or `parts` matrices stacked by rows, which Muon treats separately."""

    def __init__(self, n_in, n_out, parts=1):
        super().__init__(n_in, n_out, bias=False)
        self.parts = parts


class SwiGLU(nn.Module):
    """W_down(silu(gate) * value), where [value; gate] = W_up x has ffn_dim rows (the paper's "FFN dimension")."""

    def __init__(self, config):
        super().__init__()
        width = config.ffn_dim or 4 * config.n_embd
        self.up = Linear(config.n_embd, width, parts=2)
        self.down = Linear(width // 2, config.n_embd)

    def forward(self, x):
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


def causal(config, query, key):
    """Who may look at whom: a token sees itself and all before it. PyTorch has a fast path for this rule. For another,
    write a function like sliding_window and choose it in Positions: training, documents and cache then follow it."""
    return key <= query


def sliding_window(config, query, key):
    """A token sees the config.window newest tokens up to itself. query, key: positions, tensors that broadcast."""
    return (key <= query) & (query - key < config.window)


torch.backends.cuda.enable_cudnn_sdp(False)            # its masked backward has given NaN (pytorch issue 196678)


class Positions:
    """What every layer must know of positions, made once per forward: the RoPE tables and who may look at whom.

    The tokens are the newest of those that `cache` counts, if there is one. docs (B, length) holds each token's
    document number, and nobody sees into another document; positions are not reset at its start. The tables are
    computed here in float32 rather than stored, so that no cast of the model can spoil them.
    """

    def __init__(self, config, length, device, docs=None, cache=None):
        self.config, self.docs, self.cache = config, docs, cache
        self.rule = sliding_window if config.window else causal
        self.key = torch.arange(cache.length if cache else length, device=device)
        self.query = self.key[-length:]
        channel = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
        angle = torch.outer(self.query.float(), config.rope_theta ** (-channel / config.head_dim))
        cos, sin = angle.cos()[:, None, :], angle.sin()[:, None, :]
        table = torch.cat((cos, cos, -sin, sin), dim=-1)           # in one tensor: else each kernel redoes the cosines
        self.cos, self.sin = table.chunk(2, dim=-1)                         # (T, 1, D)
        self.kernel = self.choose_kernel(length, device)

    def rotate(self, x):
        """RoPE, half-split: channel i is paired with i + D/2. x (B, T, H, D)."""
        y = x.float()
        partner = y.unflatten(-1, (2, -1)).flip(-2).flatten(-2)             # its derivative is a flip too: both fuse
        return (y * self.cos + partner * self.sin).type_as(x)

    def visible(self, row, head, query, key):
        """Whether the tokens at positions `query` see those at `key`, in batch row `row`: tensors that broadcast."""
        seen = self.rule(self.config, query, key)
        return seen if self.docs is None else seen & (self.docs[row, query] == self.docs[row, key])

    def dense_mask(self):
        """`visible` for all pairs: (T, L), or (B, 1, T, L) with documents; L counts the cached tokens too."""
        row = None if self.docs is None else torch.arange(len(self.docs), device=self.docs.device)[:, None, None, None]
        return self.visible(row, None, self.query[:, None], self.key)

    def choose_kernel(self, length, device):
        """The function of q, k, v (B, H, T, D) that is softmax(q k^T / sqrt(D)) v, with a mask where needed.

        FlexAttention skips blocks of 128 x 128 that nobody sees; it is fast only when compiled for CUDA.
        """
        if self.rule is causal and self.docs is None and self.cache is None:
            return functools.partial(F.scaled_dot_product_attention, is_causal=True)
        if device.type == "cuda" and torch.compiler.is_compiling() and self.cache is None:
            rows = None if self.docs is None else len(self.docs)

            def visible(row, head, query, key):                 # a function: PyTorch counts a method's self as argument
                return self.visible(row, head, query, key)
            blocks = create_block_mask(visible, rows, None, length, length, device=device)
            return functools.partial(flex_attention, block_mask=blocks)
        return functools.partial(F.scaled_dot_product_attention, attn_mask=self.dense_mask())

    def attend(self, layer, q, k, v):
        """Attention of layers[layer] over all that each query sees. All (B, T, H, D)."""
        if self.cache is not None:
            k, v = self.cache.extend(layer, k, v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return self.kernel(q, k, v).transpose(1, 2)                                                # Eq. 2


# ------------------------------------------------------------------------------------------------------------- 3 mixing

class Projections(Linear):
    """H -> {s: (B, T, H, D)} for each letter s; one matrix, whose rows are the letters' C x C matrices in order."""

    def __init__(self, config, letters):
        super().__init__(config.n_embd, len(letters) * config.n_embd, parts=len(letters))
        self.letters, self.heads = letters, (config.n_head, config.head_dim)

    def forward(self, h):
        stacked = F.linear(h, self.weight).unflatten(-1, (self.parts, *self.heads))                # Eq. 1, 4, 7
        return dict(zip(self.letters, stacked.unbind(-3)))


class DynamicMixing(nn.Module):
    """H -> {s: (gamma_anchor, gamma_current)}, each (B, T, 1, 1): one weight in (0, 1) per token and slot."""

    def __init__(self, config, letters):
        super().__init__()
        self.letters = letters
        self.fc1 = Linear(config.n_embd, config.dynamic_dim)
        self.fc2 = Linear(config.dynamic_dim, 2 * len(letters))
        self.bias = nn.Parameter(torch.empty(2 * len(letters)))

    def forward(self, h):
        gamma = torch.sigmoid(self.fc2(F.gelu(self.fc1(h))).float() + self.bias)                   # Eq. 11
        slots = gamma[..., None, None].unbind(-3)                                             # 2m of (B, T, 1, 1)
        return {s: (slots[2 * i], slots[2 * i + 1]) for i, s in enumerate(self.letters)}


class StaticMixing(nn.Module):
    """gamma = 1 for every token: with it Eq. 12 is Eq. 10."""

    def __init__(self, config, letters):
        super().__init__()
        self.letters = letters

    def forward(self, h):
        ones = torch.ones(2, device=h.device).unbind()       # two: torch.compile refuses one tensor passed twice
        return dict.fromkeys(self.letters, ones)


class WeightedSum(torch.autograd.Function):
    """Eq. 12, with its derivative written out so that only its inputs are kept for the backward pass.

    Autograd would also keep the products lambda * S. Whoever changes the formula in `forward` must change `backward`
    too (a test compares them), or delete this class and write the formula into Mix.forward.
    """

    @staticmethod
    def forward(ctx, anchor, current, lambda_anchor, lambda_current, gamma_anchor, gamma_current):
        ctx.save_for_backward(anchor, current, lambda_anchor, lambda_current, gamma_anchor, gamma_current)
        mixed = gamma_anchor * lambda_anchor * anchor + gamma_current * lambda_current * current   # Eq. 10, Eq. 12
        return mixed.type_as(current)

    @staticmethod
    def backward(ctx, grad):
        pair, lambdas, gammas = ctx.saved_tensors[:2], ctx.saved_tensors[2:4], ctx.saved_tensors[4:]
        of_pair = [(grad * (l * g)).type_as(s) for s, l, g in zip(pair, lambdas, gammas)]
        of_lambdas = [(grad * g * s).sum_to_size(l.shape).type_as(l) for s, l, g in zip(pair, lambdas, gammas)]
        of_gammas = [None, None]                                            # static: the gammas are constants
        if ctx.needs_input_grad[4]:
            of_gammas = [(grad * l * s).sum_to_size(g.shape).type_as(g) for s, l, g in zip(pair, lambdas, gammas)]
        return *of_pair, *of_lambdas, *of_gammas


class Mix(nn.Module):
    """gamma_1 lambda_1 S_anc + gamma_2 lambda_2 S_n, one component's sum of its anchor and its own projection."""

    def __init__(self, config):
        super().__init__()
        shape = GRANULARITY[config.granularity](config.n_head, config.head_dim)
        self.lambda_anchor = nn.Parameter(torch.empty(shape))
        self.lambda_current = nn.Parameter(torch.empty(shape))

    def forward(self, anchor, current, gamma):
        """anchor (normalised where it was made), current (B, T, H, D); gamma a pair that broadcasts against them."""
        return WeightedSum.apply(anchor, current, self.lambda_anchor, self.lambda_current, *gamma)


class Anchor(nn.Module):
    """{s: S_anc (B, T, H, D)} for each mixed s, made once per forward from the embeddings, before RoPE.

    Eq. 10's RMSNorm of the anchor has one gain (D,) per component for all heads and layers: it is applied here, once.
    """

    def __init__(self, config):
        super().__init__()
        self.norms = nn.ModuleDict({
            s: RMSNorm(config.head_dim) if s in config.anchor_norm else nn.Identity() for s in config.mix})

    def normed(self, source):
        """The mixed letters of `source`, {s: S}, each through its norm, if it has one."""
        return {s: norm(source[s]) for s, norm in self.norms.items()}


class NoAnchor(Anchor):
    """Standard and gated attention: nothing to mix with."""

    def forward(self, embedded, first_layer):
        return {}


class InternalAnchor(Anchor):
    """Layer 1's projections of layer 1's input. Recomputed here; torch.compile merges the two equal products."""

    def forward(self, embedded, first_layer):
        return self.normed(first_layer.attn.project(first_layer.attn_norm(embedded)))              # Eq. 8


class ExogenousAnchor(Anchor):
    """Projections of the raw embeddings by matrices that belong to no layer."""

    def __init__(self, config):
        super().__init__(config)
        self.project = Projections(config, "".join(s for s in COMPONENTS if s in config.mix))

    def forward(self, embedded, first_layer):
        return self.normed(self.project(embedded))                                                 # Eq. 9


ANCHORS = {"none": NoAnchor, "internal": InternalAnchor, "exogenous": ExogenousAnchor}

# -------------------------------------------------------------------------------------------------------------- 4 layer

class Gate(nn.Module):
    """Elementwise gate on the attention output: u * sigmoid(g), both (B, T, H, D)."""

    def forward(self, u, proj):
        return (u * torch.sigmoid(proj["g"].float())).type_as(u)       # Eq. 5, 6; the sigmoid in float32


class NoGate(nn.Module):
    """Standard attention: the output passes as it is."""

    def forward(self, u, proj):
        return u


class Attention(nn.Module):
    """Attention with mixed projections; an internal-anchor model's layers[0] mixes nothing, since its mix is empty."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, letters = layer, config.mixed_in(layer)
        self.project = Projections(config, config.components)
        self.gammas = (DynamicMixing if config.dynamic and letters else StaticMixing)(config, letters)
        self.mix = nn.ModuleDict({s: Mix(config) for s in letters})
        self.q_norm, self.k_norm = (RMSNorm(config.head_dim) if config.qk_norm else nn.Identity() for _ in range(2))
        self.gate = (Gate if config.gate else NoGate)()
        self.out_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, h, anchor, at):
        """h (B, T, C), the normed input; anchor {s: (B, T, H, D)}; at a Positions -> (B, T, C)."""
        proj, gamma = self.project(h), self.gammas(h)
        for s, mix in self.mix.items():
            proj[s] = mix(anchor[s], proj[s], gamma[s])
        q, k, v = at.rotate(self.q_norm(proj["q"])), at.rotate(self.k_norm(proj["k"])), proj["v"]
        u = self.gate(at.attend(self.layer, q, k, v), proj)
        return self.out_proj(u.flatten(-2))                                                        # Eq. 3


NORM_POSITION = {"pre": (RMSNorm, nn.Identity), "after": (nn.Identity, RMSNorm), "both": (RMSNorm, RMSNorm)}


class Block(nn.Module):
    """x + Attn(norm(x)), then x + MLP(norm(x)). norm_position="after": x + norm(f(x)); "both": x + norm(f(norm(x)))."""

    def __init__(self, config, layer):
        super().__init__()
        before, after = NORM_POSITION[config.norm_position]
        self.attn_norm, self.attn = before(config.n_embd), Attention(config, layer)
        self.attn_post_norm = after(config.n_embd)
        self.mlp_norm, self.mlp = before(config.n_embd), SwiGLU(config)
        self.mlp_post_norm = after(config.n_embd)

    def forward(self, x, anchor, at):
        x = x + self.attn_post_norm(self.attn(self.attn_norm(x), anchor, at))
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x)))


# -------------------------------------------------------------------------------------------------------------- 5 model

def compute_dtype(device):
    """The dtype of the residual stream: bfloat16 under torch.autocast, otherwise that of the parameters (None)."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


class ExoFormer(nn.Module):
    """A decoder-only language model whose every Table 3 variant is a ModelConfig."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.anchor = ANCHORS[config.anchor](config)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.final_norm = RMSNorm(config.n_embd)
        self.head = Linear(config.n_embd, config.padded_vocab)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Set every parameter, by the last parts of its name:

            out_proj, down, head, fc2   zero: each sub-layer starts as the identity, the model as a uniform guess
            other matrices, embedding   normal, std 0.02, cut at 3 std
            RMSNorm gains               1
            lambdas                     lambda_init, else 0.5 (static) or 1.0 (dynamic, where gamma starts at 0.5)
            bias of Eq. 11              0
        """
        start = 1.0 if self.config.dynamic else 0.5
        start = start if self.config.lambda_init is None else self.config.lambda_init
        for name, p in self.named_parameters():
            owner, kind = name.split(".")[-2:]
            if owner in ("out_proj", "down", "head", "fc2") or kind == "bias":
                nn.init.zeros_(p)
            elif p.dim() == 2 and kind == "weight":
                nn.init.trunc_normal_(p, std=0.02, a=-0.06, b=0.06)
            else:
                nn.init.constant_(p, start if kind.startswith("lambda_") else 1.0)

    def make_anchor(self, embedded):
        """{s: S_anc (B, T, H, D)}: it depends on each token alone, never on its context, so no cache holds it."""
        return self.anchor(embedded, self.layers[0])

    def trunk(self, idx, docs=None, cache=None):
        """Hidden states (B, T, C) after the final norm.

        idx    (B, T) token ids, T at most block_size
        docs   (B, T) document number of each token, or None: attention does not cross documents
        cache  a KVCache to continue, or None: idx then holds only the new tokens
        """
        length = idx.size(1)
        if length > self.config.block_size or (docs is not None and cache is not None):
            raise ValueError(f"at most block_size={self.config.block_size} tokens a call (here {length}), and docs or "
                             "cache but not both")
        if cache is not None:
            cache.grow(length)
        at = Positions(self.config, length, idx.device, docs, cache)
        x = self.embed(idx)
        x = x.to(compute_dtype(x.device) or x.dtype)       # autocast leaves an embedding, so the whole stream, float32
        anchor = self.make_anchor(x)
        for layer in self.layers:
            x = layer(x, anchor, at)
        return self.final_norm(x)

    def logits(self, hidden):
        """(..., C) -> (..., padded_vocab); a bias makes the columns from vocab_size on -inf, without another pass."""
        padding = hidden.new_zeros(self.config.padded_vocab)
        padding[self.config.vocab_size:] = -torch.inf
        return F.linear(hidden, self.head.weight, padding)

    def forward(self, idx, docs=None, cache=None):
        """Logits (B, T, padded_vocab) of the next token at every position; arguments as in `trunk`."""
        return self.logits(self.trunk(idx, docs, cache))

    def loss(self, idx, targets, docs=None):
        """(cross-entropy, z): mean -log p(target) and mean logsumexp^2 over targets that are not -100, in float32.

        Training minimises cross-entropy + 1e-5 z; only the cross-entropy is a perplexity.
        """
        logits, targets = self.forward(idx, docs).flatten(0, 1).float(), targets.flatten()[:, None]
        log_sum = torch.logsumexp(logits, dim=-1, keepdim=True)
        # the target's logit by comparison: the backward pass of gather fills a second tensor as large as the logits
        is_target = torch.arange(logits.size(-1), device=logits.device) == targets
        log_p = torch.where(is_target, logits, 0).sum(-1, keepdim=True) - log_sum
        counted = targets != -100
        cross_entropy, z = (torch.where(counted, term, 0).sum() / counted.sum() for term in (-log_p, log_sum.square()))
        return cross_entropy, z

    @classmethod
    def from_released(cls, checkpoint, n_head=None, anchor_norm=None, **settings):
        """Build a model from a checkpoint, or a bare state dict, of the paper's released code; the variant is read off
        the keys.

        n_head       needed only where neither a QKNorm nor a lambda tells the head size
        anchor_norm  "" or "qk", for the one case the keys cannot tell: internal anchors, q or k mixed, no norm of
                     their own. Absent, "qk" is taken and a line says so
        settings     further ModelConfig fields that leave no trace in the keys: tokenizer, block_size, rope_theta; the
                     last two are the checkpoint's where it names them

        Every key must be used, or be one that the released forward pass never reads. InputError otherwise.
        """
        trained_with = checkpoint.get("model_args", {})
        told = {name: trained_with[name] for name in ("block_size", "rope_theta") if name in trained_with}
        theirs = released_names(checkpoint.get("model", checkpoint))
        config = released_config(theirs, n_head, anchor_norm, **{**told, **settings})
        model = cls(config)
        model.load_state_dict(translate_released(theirs, model.state_dict(), config))
        return model


# ---------------------------------------------------------------------------------------------------------------- 6 use

def choose_device(name, among=("cuda", "mps", "cpu")):
    """The device of a --device flag; "auto" takes the first of `among` that is there. InputError where none is."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    usable = [device for device in among if there[device]]
    if name not in ("auto", *usable):
        raise InputError(f"--device={name} is not there: torch can use {', '.join(usable)} on this machine")
    return usable[0] if name == "auto" else name


class KVCache:
    """Rotated keys and mixed values of the tokens seen so far, (n_layer, B, max_len, H, D) each."""

    def __init__(self, config, batch_size, max_len, device="cpu", dtype=torch.float32):
        shape = (config.n_layer, batch_size, max_len, config.n_head, config.head_dim)
        self.config, self.length = config, 0
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))

    def grow(self, length):
        """Count `length` more tokens, whose keys and values `extend` then writes; ValueError if they do not fit."""
        if self.length + length > self.k.size(2):
            raise ValueError(f"a KVCache of {self.k.size(2)} tokens holds {self.length} and cannot take {length} more")
        self.length += length

    def extend(self, layer, k, v):
        """Write the newest tokens' k, v (B, T, H, D) and return all so far, (B, length, H, D)."""
        start = self.length - k.size(1)
        self.k[layer, :, start:self.length], self.v[layer, :, start:self.length] = k, v
        return self.k[layer, :, :self.length].to(k.dtype), self.v[layer, :, :self.length].to(v.dtype)

    def repeat(self, n):
        """A cache whose rows are each repeated n times: one context, n continuations."""
        cache = KVCache(self.config, 0, 0, self.k.device, self.k.dtype)
        cache.k, cache.v, cache.length = self.k.repeat_interleave(n, 1), self.v.repeat_interleave(n, 1), self.length
        return cache


def sample(logits, temperature, top_k, generator):
    """One token id per row, (B, 1), from logits (B, V): greedy at temperature 0, else among the top_k likeliest."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    top, index = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))
    choice = torch.multinomial(F.softmax(top / temperature, dim=-1), 1, generator=generator)
    return index.gather(-1, choice)


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, stop_token=None, generator=None):
    """Continue idx (B, T) by up to max_new_tokens ids; returns (B, T + new).

    Each new token is predicted from the last block_size tokens. Up to there a KV cache makes a token cost one token;
    past it the window slides, every cached position would change, and each token costs a forward of the whole window.
    A row that has produced stop_token is filled up with it; generation ends when all rows have.
    """
    window, stop = model.config.block_size, -1 if stop_token is None else stop_token
    if idx.size(1) == 0:
        raise ValueError("generate needs at least one token to start from")
    fresh, cache = idx, None
    finished = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
    for _ in range(max_new_tokens):
        if cache is None or cache.length + fresh.size(1) > window:
            fresh = idx[:, -window:]
            cache = KVCache(model.config, idx.size(0), min(window, fresh.size(1) + max_new_tokens), idx.device,
                            compute_dtype(idx.device) or model.head.weight.dtype)
        logits = model.logits(model.trunk(fresh, cache=cache)[:, -1]).float()
        fresh = torch.where(finished, stop, sample(logits, temperature, top_k, generator))
        idx, finished = torch.cat((idx, fresh), dim=1), finished | (fresh == stop)
        if finished.all():
            break
    return idx


def count_parameters(model):
    """Parameters, without the head's padding rows: they exist for alignment alone and stay zero."""
    padding = (model.config.padded_vocab - model.config.vocab_size) * model.config.n_embd
    return sum(p.numel() for p in model.parameters()) - padding


def flops_per_token(model, length):
    """FLOPs of forward and backward per token: 6 per matrix entry (the embedding is a look-up) + 12 n_layer C T.

    The usual estimate (PaLM, Appendix B), which counts attention as if it were not causal; MFU figures follow it.
    """
    entries = sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))
    return 6 * entries + 12 * model.config.n_layer * model.config.n_embd * length


FORMAT = 1                          # of the checkpoints that train.py writes, and the newest that this file reads


def read_checkpoint(path):
    """The dict in a checkpoint file, on the CPU. InputError if it is missing, damaged or holds anything but data.

    torch.load does not notice a flipped bit; the CRC of every record of the zip archive does.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile, zlib.error,
            pickle.UnpicklingError) as error:
        why = f"{type(error).__name__}: {str(error)[:80]}".split("\n")[0]
        raise InputError(f"{path} is not a whole checkpoint ({why})") from None
    if damaged is not None:
        raise InputError(f"{path} is damaged: its record {damaged} fails its checksum")
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


def check_format(checkpoint, path):
    """InputError for a checkpoint in a format that a later version of this code has written."""
    if checkpoint.get("format", FORMAT) > FORMAT:
        raise InputError(f"{path} has format {checkpoint['format']}, newer than this code's {FORMAT}; update the code")


def config_from(kind, settings, path):
    """A ModelConfig or TrainConfig (`kind`) from the dict in checkpoint `path`. InputError for an unknown setting."""
    unknown = sorted(set(settings) - {f.name for f in fields(kind)})
    if unknown:
        raise InputError(f"{path} has settings this version does not know: {', '.join(unknown)}; update the code")
    return kind(**settings)


def load_checkpoint(path, device="cpu"):
    """An ExoFormer with the weights of a checkpoint file, ours or the released code's."""
    checkpoint = read_checkpoint(path)
    check_format(checkpoint, path)
    if "model_config" not in checkpoint:
        return ExoFormer.from_released(checkpoint).to(device)
    try:
        model = ExoFormer(config_from(ModelConfig, checkpoint["model_config"], path))
        model.load_state_dict(checkpoint["model"])
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        why = str(error).split("\n")[-1].strip()
        raise InputError(f"{path}: its weights do not fit its configuration ({why})") from None
    return model.to(device)


RELEASED_NAMES = (  # (our name, the released code's), tried in order on each of our parameters
    (r"^embed\.", "transformer.wte."), (r"^layers\.", "transformer.layers."),
    (r"^final_norm\.", "transformer.final_norm."), (r"^head\.", "lm_head."),
    (r"^anchor\.project\.", "anchor_proj."), (r"^anchor\.norms\.(.)\.", r"anchor_\1_norm."),
    (r"\.attn\.project\.", ".attn.c_attn."), (r"\.out_proj\.", ".c_proj."), (r"\.up\.", ".fc1."),
    (r"\.down\.", ".fc2."),
    (r"\.mix\.(.)\.lambda_anchor", r".lambda_\g<1>1"), (r"\.mix\.(.)\.lambda_current", r".lambda_\g<1>2"),
    (r"\.gammas\.bias", ".dynamic_mixing.fc2.bias"), (r"\.gammas\.", ".dynamic_mixing."),
)

DEAD_IN_RELEASED = (  # tensors the released files carry but their forward pass never reads
    r"transformer\.layers\.\d+\.attn\.[vg]_norm\.weight",               # v_norm, g_norm: of use in layer 0 at most
    r"transformer\.layers\.0\.attn\.(lambda_[qkvg][12]|dynamic_mixing\..*)",     # an internal anchor's own layer
    r"anchor_[qkvg]_norm\.weight",                                        # of a component that is not mixed
)


def released_names(state):
    """A released state dict without torch.compile's prefix, and with one name for the norms of v and g anchors."""
    return {re.sub(r"\.([vg])_res_norm\.", r".\1_norm.", key.removeprefix("_orig_mod.")): tensor
            for key, tensor in state.items()}


def released_config(state, n_head, anchor_norm, **settings):
    """The ModelConfig that a released state dict was trained with, from its keys and shapes alone."""
    if "transformer.wte.weight" not in state:
        raise InputError(f"not a checkpoint of the released code: no transformer.wte.weight among {len(state)} keys")
    vocab_size, n_embd = state["transformer.wte.weight"].shape
    n_layer = len({key.split(".")[2] for key in state if key.startswith("transformer.layers.")})
    for needed in ("transformer.layers.0.mlp.fc1.weight", f"transformer.layers.{n_layer - 1}.attn.c_attn.weight"):
        if needed not in state:
            raise InputError(f"the checkpoint lacks {needed}")
    last = f"transformer.layers.{n_layer - 1}.attn."     # not layer 0, which mixes nothing if its own is the anchor
    lambdas = {s: state[f"{last}lambda_{s}1"] for s in COMPONENTS if f"{last}lambda_{s}1" in state}
    shape = next(iter(lambdas.values())).shape if lambdas else torch.Size()
    q_norm = state.get(f"{last}q_norm.weight")
    head_dim = None if q_norm is None else q_norm.size(-1)
    n_head = n_head or (n_embd // head_dim if head_dim else shape[0] if shape.numel() > 1 else None)
    if n_head is None:
        raise InputError("the keys do not tell the number of heads; pass n_head")
    mix = "".join(lambdas)
    anchor = "exogenous" if "anchor_proj.weight" in state else "internal" if mix else "none"
    fc1 = state.get(f"{last}dynamic_mixing.fc1.weight")
    return ModelConfig(
        n_layer=n_layer, n_head=n_head, n_embd=n_embd, ffn_dim=state["transformer.layers.0.mlp.fc1.weight"].size(0),
        vocab_size=vocab_size, gate=state[f"{last}c_attn.weight"].size(0) == 4 * n_embd, anchor=anchor, mix=mix,
        anchor_norm=released_anchor_norm(state, anchor, mix, anchor_norm), qk_norm=head_dim is not None,
        granularity="elementwise" if len(shape) == 2 or not mix else "headwise" if shape.numel() > 1 else "scalar",
        dynamic=fc1 is not None, dynamic_dim=16 if fc1 is None else fc1.size(0), **settings)


def released_anchor_norm(state, anchor, mix, asked):
    """The anchors a released model normalises. Internal q and k share layer 0's QKNorm, which leaves no key to tell."""
    name = "anchor_{}_norm.weight" if anchor == "exogenous" else "transformer.layers.0.attn.{}_norm.weight"
    owned = "".join(s for s in mix if name.format(s) in state)
    told = anchor != "internal" or not set("qk") & set(mix) or set("vg") & set(owned)
    if told and asked not in (None, owned):
        raise InputError(f"anchor_norm={asked!r}, but the keys say {owned!r}")
    if not told and asked is None:
        print("from_released: the keys do not say whether the q and k anchors are normalised; "
            f"taking anchor_norm={owned!r} (pass anchor_norm='' for a model trained without)", flush=True)
    if not told and not set(asked or "") <= set(owned):
        raise InputError(f"anchor_norm={asked!r} must be '' or {owned!r}: no other norm has a gain in these keys")
    return owned if told or asked is None else asked


def translate_released(theirs, ours, config):
    """The state dict `ours` filled with the released tensors in float32. InputError for a key missing or left over."""
    filled, left = {}, dict.fromkeys(theirs)
    for name, like in ours.items():
        key = name
        if config.anchor == "internal":
            key = re.sub(r"^anchor\.norms\.(.)\.", r"layers.0.attn.\1_norm.", key)
        for pattern, replacement in RELEASED_NAMES:
            key = re.sub(pattern, replacement, key)
        if key not in theirs:
            raise InputError(f"the checkpoint lacks {key}")
        left.pop(key, None)
        filled[name] = fit_released(key, theirs[key].float(), like, config)
    unknown = [key for key in left if not any(re.fullmatch(dead, key) for dead in DEAD_IN_RELEASED)]
    if unknown:
        raise InputError(f"the checkpoint holds {len(unknown)} tensors this model has no place for: {unknown[0]} ...")
    return filled


def fit_released(key, tensor, like, config):
    """One released tensor in our shape: the head padded, unused anchors dropped, lambdas broadcastable."""
    if key == "lm_head.weight":
        tensor = F.pad(tensor, (0, 0, 0, config.padded_vocab - config.vocab_size))
    if key == "anchor_proj.weight":
        rows = dict(zip(COMPONENTS, tensor.split(config.n_embd)))
        tensor = torch.cat([rows[s] for s in COMPONENTS if s in config.mix])
    if ".lambda_" in key and tensor.numel() == like.numel():
        tensor = tensor.reshape(like.shape)
    if tensor.shape != like.shape:
        raise InputError(f"{key} has shape {tuple(tensor.shape)}, expected {tuple(like.shape)}")
    return tensor


def print_variants():
    """Table 3 as this file builds it: exact parameters beside the paper's, at the paper's size."""
    print(f"{'--variant':28s}{'layers':>7s}{'parameters':>14s}{'M':>7s}{'paper M':>9s}{'GFLOP/token':>13s}"
          f"{'paper ppl':>11s}")
    for name, (millions, perplexity, _) in TABLE_3.items():
        with torch.device("meta"):
            model = ExoFormer(variant_config(name))
        n, flops = count_parameters(model), flops_per_token(model, model.config.block_size)
        print(f"{name:28s}{model.config.n_layer:7d}{n:14,d}{n / 1e6:7.1f}{millions:9d}{flops / 1e9:13.3f}"
              f"{perplexity:11.2f}")


def continue_text(model, tokenizer, prompt, max_new_tokens, num_samples=1, temperature=0.8, top_k=50, seed=1337):
    """Continuations of a text as a list of texts that begin with it; an empty prompt starts a new document. The
    tokenizer has encode(text) -> ids, decode(ids) -> text and eot, the id that ends a text."""
    device = model.head.weight.device
    prompt = tokenizer.encode(prompt) or [tokenizer.eot]
    idx = torch.tensor([prompt] * num_samples, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    out = generate(model, idx, max_new_tokens, temperature, top_k, tokenizer.eot, generator)
    return [tokenizer.decode([token for token in row if token != tokenizer.eot]) for row in out.tolist()]


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description="Print the table of variants, or sample from a checkpoint.",
                                     allow_abbrev=False)
    parser.add_argument("--ckpt", help="checkpoint to sample from, ours or the released code's")
    parser.add_argument("--prompt", default="", help="text to continue; empty starts a new document")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="tokens to add")
    parser.add_argument("--num_samples", type=int, default=1, help="how many continuations")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token every time")
    parser.add_argument("--top_k", type=int, default=50, help="choose among this many likeliest tokens")
    parser.add_argument("--seed", type=int, default=1337, help="seed of the sampling")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu; auto takes the first there is")
    args = parser.parse_args()
    for broken, message in ((args.prompt and not args.ckpt, "--prompt needs a model to continue it: add --ckpt=PATH"),
                            (args.num_samples < 1, "--num_samples must be at least 1"),
                            (args.max_new_tokens < 1, "--max_new_tokens must be at least 1"),
                            (args.top_k < 1, "--top_k must be at least 1"),
                            (not 0 <= args.seed < 2**63, "--seed must be from 0 to 2**63 - 1"),
                            (not 0 <= args.temperature < math.inf, "--temperature must be 0 or more")):
        if broken:
            parser.error(message)
    if not args.ckpt:
        return print_variants()
    from prepare_fineweb import command_line, get_tokenizer, say       # text needs a tokenizer; the model does not

    def sample_checkpoint():
        model = load_checkpoint(args.ckpt, choose_device(args.device))
        for text in continue_text(model, get_tokenizer(model.config.tokenizer), args.prompt, args.max_new_tokens,
                                  args.num_samples, args.temperature, args.top_k, args.seed):
            say(f"{text}\n---")
    command_line(sample_checkpoint, InputError, memory="lower --num_samples or --max_new_tokens")


if __name__ == "__main__":
    main()
