"""
ExoFormer, the whole model in one file: every Transformer of Table 3 of "Attention Projection
Mixing with Exogenous Anchors" (arXiv 2601.08131), by flags. It imports torch and the standard
library only, so that it can be copied into another project.

Attention projects its input into queries, keys, values and (here) gate logits. The paper mixes
each of these with an ANCHOR: the same projection taken close to the token embeddings, so that deep
layers need not carry token identity themselves. The anchor is either layer 1's own projection
(internal: ResFormer, NuResFormer) or that of four extra matrices outside the stack (exogenous:
ExoFormer). Everything the paper adds is one line, in `WeightedSum`.

    tokens -> embedding H_0 -------------------------------------+
                 |                                               |   once per forward pass:
                 |         one layer n                           |   S_anc = RMSNorm(H_0 W_S), Eq. 9
                 |                                               |   or layer 1's own S, Eq. 8
                 +-> RMSNorm -> Q_n ---- mix <-- Q_anc ----------+
                 |              K_n ---- mix <-- K_anc ----------+   mix:  gamma_1 lambda_1 S_anc
                 |              V_n ---- mix <-- V_anc ----------+       + gamma_2 lambda_2 S_n
                 |              G_n ---- mix <-- G_anc ----------+
                 |                |
                 |   softmax(rope(norm Q) rope(norm K)^T / sqrt(D)) V * sigmoid(G) -> W^O
                 + <--------------+
                 +-> RMSNorm -> SwiGLU -> +      ... n_layer times, RMSNorm, head -> logits

Layers count from 1 in the paper and in these comments, from 0 in the code. Symbols:

    paper               code                              shape            where
    B, T, C, V          batch, tokens, n_embd, vocab_size
    H, D                n_head, head_dim = C / H
    S in {Q, K, V, G}   a letter of "qkvg"                                 mix="qkvg": all are mixed
    S_n                 proj[s]                           (B, T, H, D)     Projections, Eq. 1, 4, 7
    S_anc               anchor[s]                         (B, T, H, D)     ...Anchor, Eq. 8, 9
    lambda_{n,1|2}^S    mix[s].lambda_anchor, _current    (1|H, 1|D)       Mix, Eq. 10
    gamma_{n,1|2}^S     gamma[s] = (anchor, current)      (B, T, 1, 1)     DynamicMixing, Eq. 11, 12

Whoever comes from nanoGPT:

    model = ExoFormer(variant_config("exo_dynamic", n_layer=6, n_head=6, n_embd=384))
    logits = model(idx)                              # (B, T, V), V rounded up to 64: -inf beyond V
    cross_entropy, z = model.loss(idx, targets)      # train on cross_entropy + 1e-5 * z
    idx = generate(model, idx, max_new_tokens=100)

Precision: parameters are float32 (train.py can make matrices bfloat16); under torch.autocast the
residual stream and every matrix product are bfloat16. The means of RMSNorm, RoPE, both sigmoids,
softmax statistics and the loss are computed in float32, and so is mixing with float32 lambdas.

`python model.py` prints the variants; `python model.py --ckpt=PATH --prompt=TEXT` samples.
"""
import argparse
import functools
import math
import os
import pickle
import re
import sys
import zipfile
import zlib
from dataclasses import dataclass, field, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

# ---------------------------------------------------------------------------------------- 1 config

COMPONENTS = "qkvg"     # the order of rows in every fused projection and of the slots of Eq. 11
LARGEST = 1e12          # no setting is larger in size, unless it says so
LARGEST_SIZE = 2**20    # no width, length or number of layers is larger


def setting(default, help, choices=None, low=-LARGEST, high=LARGEST, **facts):
    """A dataclass field with its help text and what it allows; train.py makes a flag of each."""
    metadata = dict(help=help, choices=choices, low=low, high=high, **facts)
    return field(default=default, metadata=metadata)


def size(default, help, low=1, **facts):
    """A setting that is a width, a length or a number of layers."""
    return setting(default, help, low=low, high=LARGEST_SIZE, **facts)


GRANULARITY = {     # the shape of a lambda, which broadcasts against (..., H, D); Section 3
    "scalar": lambda n_head, head_dim: (1, 1),
    "headwise": lambda n_head, head_dim: (n_head, 1),
    "elementwise": lambda n_head, head_dim: (n_head, head_dim),
}


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a model and one field for each axis of the paper; InputError for what cannot be.

    The defaults are `exo` at the paper's size.
    """
    n_layer: int = size(29, "layers; the paper has 29 with the gate, 32 without")
    n_head: int = size(16, "attention heads")
    n_embd: int = size(1024, "width C of the residual stream")
    ffn_dim: int = size(0, "rows of the fused SwiGLU input, twice its inner width; 0: 4 C", low=0)
    vocab_size: int = size(57601, "token ids the model knows; why 57,601: see the README",
                           measures=True)
    block_size: int = size(2048, "longest context in tokens", measures=True)
    gate: bool = setting(True, "gate the attention output with sigmoid(G) (Eq. 4-6)")
    anchor: str = setting("exogenous", "where anchors come from (Eq. 8, 9)",
                          choices=("none", "internal", "exogenous"))
    mix: str = setting("qkvg", "which of q, k, v, g are mixed with their anchor (the S of Eq. 10)")
    anchor_norm: str = setting("qkvg", "which anchors pass an RMSNorm (Eq. 10)")
    granularity: str = setting("elementwise", "lambdas: one, one a head or one a channel",
                               choices=tuple(GRANULARITY))
    dynamic: bool = setting(False, "weigh anchor and current projection per token (Eq. 11, 12)")
    dynamic_dim: int = size(16, "hidden width of the dynamic-mixing MLP (Eq. 11)")
    lambda_init: float | None = setting(None, "start of every lambda; none: 0.5, or 1.0 if dynamic")
    qk_norm: bool = setting(True, "RMSNorm on the mixed queries and keys")
    norm_position: str = setting("pre", "RMSNorm before each sub-layer, after it, or both",
                                 choices=("pre", "after", "both"))
    window: int = size(0, "tokens that a token sees, itself included; 0: all before it", low=0)
    rope_theta: float = setting(500_000.0, "base of the rotary angles", low=1)
    tokenizer: str = setting("gpt2", "what the token ids mean; the data decide it", measures=True)

    def __post_init__(self):
        check_ranges(self)
        check_axes(self)

    @property
    def head_dim(self):
        """Channels of one head, D."""
        return self.n_embd // self.n_head

    @property
    def components(self):
        """The letters a layer projects to: "qkvg" with the gate, "qkv" without."""
        return "qkvg" if self.gate else "qkv"

    @property
    def padded_vocab(self):
        """Rows of the head: vocab_size rounded up to 64, which keeps its matrix product aligned."""
        return 64 * math.ceil(self.vocab_size / 64)

    @property
    def lambda_start(self):
        """The first value of every lambda."""
        if self.lambda_init is not None:
            return self.lambda_init
        return 1.0 if self.dynamic else 0.5                 # dynamic: gamma starts at 0.5

    def mixed_in(self, layer):
        """The letters mixed in layers[layer]; none in layers[0] if it is the anchor."""
        if self.anchor == "internal" and layer == 0:
            return ""
        return "".join(s for s in COMPONENTS if s in self.mix)


# ---------------------------------------------------------------------------------------- 2 layers

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, the mean in float32; weight (dim,)."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x):
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        normed = (x * scale).type_as(x)                 # cast first: backward keeps x's dtype
        return normed * self.weight.type_as(x)


class Linear(nn.Linear):
    """A matrix without bias, (height, n_in); or several stacked, which Muon treats one by one."""

    def __init__(self, n_in, *heights):
        super().__init__(n_in, sum(heights), bias=False)
        self.heights = heights


class SwiGLU(nn.Module):
    """W_down(silu(gate) * value), where [value; gate] = W_up x has ffn_dim rows."""

    def __init__(self, config):
        super().__init__()
        inner = (config.ffn_dim or 4 * config.n_embd) // 2
        self.up = Linear(config.n_embd, inner, inner)
        self.down = Linear(inner, config.n_embd)

    def forward(self, x):
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


# ---------------------------------------------------------------------------------------- 3 mixing

class Projections(Linear):
    """H -> {s: (B, T, H, D)} for each letter s; one matrix stacks the letters' C x C matrices."""

    def __init__(self, config, letters):
        super().__init__(config.n_embd, *[config.n_embd for _ in letters])
        self.letters = letters
        self.head_dim = config.head_dim

    def forward(self, h):
        stacked = F.linear(h, self.weight)                                          # Eq. 1, 4, 7
        heads = stacked.unflatten(-1, (-1, self.head_dim))
        counts = [height // self.head_dim for height in self.heights]
        return dict(zip(self.letters, heads.split(counts, dim=-2)))


class DynamicMixing(nn.Module):
    """H -> {s: (gamma_anchor, gamma_current)}, (B, T, 1, 1) each: a weight in (0, 1) per token."""

    def __init__(self, config, letters):
        super().__init__()
        slots = 2 * len(letters)
        self.letters = letters
        self.fc1 = Linear(config.n_embd, config.dynamic_dim)
        self.fc2 = Linear(config.dynamic_dim, slots)
        self.bias = nn.Parameter(torch.empty(slots))

    def forward(self, h):
        gamma = torch.sigmoid(self.fc2(F.gelu(self.fc1(h))).float() + self.bias)    # Eq. 11
        slots = gamma[..., None, None].unbind(-3)         # 2m of (B, T, 1, 1): q1, q2, k1, ...
        return dict(zip(self.letters, zip(slots[0::2], slots[1::2])))


class StaticMixing(nn.Module):
    """gamma = 1 for every token: with it Eq. 12 is Eq. 10."""

    def __init__(self, config, letters):
        super().__init__()
        self.letters = letters

    def forward(self, h):
        # two tensors: compiled code takes no tensor twice; (1,) each: 0-dimensional ones would not
        # promote bfloat16, and the lambdas' gradients would be rounded
        ones = torch.ones(2, 1, device=h.device).unbind()
        return dict.fromkeys(self.letters, ones)


class WeightedSum(torch.autograd.Function):
    """Eq. 12 with its derivative written out, which sums each product where it is made.

    A change of `forward` alone trains with wrong gradients and says nothing: change `backward` too
    (`python test_model.py` compares them), or delete this class and write the formula into
    Mix.forward. In a traced estimate for an H100, autograd's own derivative makes a step of
    exo_dynamic 8 % slower, of exo 2.5 %.
    """

    @staticmethod
    def forward(ctx, anchor, current, lambda_anchor, lambda_current, gamma_anchor, gamma_current):
        ctx.save_for_backward(anchor, current, lambda_anchor, lambda_current,
                              gamma_anchor, gamma_current)
        mixed = (gamma_anchor * lambda_anchor * anchor
                 + gamma_current * lambda_current * current)                        # Eq. 10, 12
        return mixed.type_as(current)

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        terms = list(zip(saved[0:2], saved[2:4], saved[4:6]))       # (S, lambda, gamma) of each
        of_parts = [(grad * (l * g)).type_as(s) for s, l, g in terms]
        of_lambdas = [(grad * g * s).sum_to_size(l.shape).type_as(l) for s, l, g in terms]
        of_gammas = [None, None]                            # static: the gammas are constants
        if ctx.needs_input_grad[4]:
            of_gammas = [(grad * l * s).sum_to_size(g.shape).type_as(g) for s, l, g in terms]
        return *of_parts, *of_lambdas, *of_gammas


class Mix(nn.Module):
    """gamma_1 lambda_1 S_anc + gamma_2 lambda_2 S_n, one component's anchor and own projection."""

    def __init__(self, config):
        super().__init__()
        shape = GRANULARITY[config.granularity](config.n_head, config.head_dim)
        self.lambda_anchor = nn.Parameter(torch.empty(shape))
        self.lambda_current = nn.Parameter(torch.empty(shape))

    def forward(self, anchor, current, gamma):
        """anchor, current (B, T, H, D); gamma is a pair that broadcasts against them."""
        mixed = WeightedSum.apply(anchor, current, self.lambda_anchor, self.lambda_current, *gamma)
        assert mixed.shape == current.shape, "lambda or gamma has more heads than the projection"
        return mixed


class Anchor(nn.Module):
    """{s: S_anc (B, T, H, D)} for each mixed s, made once per forward from the embeddings.

    Eq. 10's RMSNorm of the anchor has one gain (D,) per component for all heads and layers, so it
    is applied here, once.
    """

    def __init__(self, config):
        super().__init__()
        self.norms = nn.ModuleDict()
        for s in config.mix:
            self.norms[s] = RMSNorm(config.head_dim) if s in config.anchor_norm else nn.Identity()

    def normed(self, source):
        """The mixed letters of `source`, {s: S}, each through its norm, if it has one."""
        return {s: norm(source[s]) for s, norm in self.norms.items()}


class NoAnchor(Anchor):
    """Standard and gated attention: nothing to mix with."""

    def forward(self, embedded, first_layer):
        return {}


class InternalAnchor(Anchor):
    """Layer 1's projections of its input, made again; torch.compile merges the equal products."""

    def forward(self, embedded, first_layer):
        h = first_layer.attn_norm(embedded)
        return self.normed(first_layer.attn.project(h))                             # Eq. 8


class ExogenousAnchor(Anchor):
    """Projections of the raw embeddings by matrices that belong to no layer."""

    def __init__(self, config):
        super().__init__(config)
        self.project = Projections(config, [s for s in COMPONENTS if s in config.mix])

    def forward(self, embedded, first_layer):
        return self.normed(self.project(embedded))                                  # Eq. 9


ANCHORS = {"none": NoAnchor, "internal": InternalAnchor, "exogenous": ExogenousAnchor}

# ------------------------------------------------------------------------------------- 4 attention

class Gate(nn.Module):
    """Elementwise gate on the attention output: u * sigmoid(g), both (B, T, H, D)."""

    def forward(self, u, proj):
        return (u * torch.sigmoid(proj["g"].float())).type_as(u)                    # Eq. 5, 6


class NoGate(nn.Module):
    """Standard attention: the output passes as it is."""

    def forward(self, u, proj):
        return u


class Attention(nn.Module):
    """Attention with mixed projections; where nothing is mixed, `mix` is empty."""

    def __init__(self, config, layer):
        super().__init__()
        letters = config.mixed_in(layer)
        gammas = DynamicMixing if config.dynamic and letters else StaticMixing
        self.layer = layer
        self.project = Projections(config, config.components)
        self.gammas = gammas(config, letters)
        self.mix = nn.ModuleDict({s: Mix(config) for s in letters})
        self.q_norm = RMSNorm(config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim) if config.qk_norm else nn.Identity()
        self.gate = Gate() if config.gate else NoGate()
        self.out_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, h, anchor, positions):
        """h (B, T, C), normed; anchor {s: (B, T, H, D)}; positions a Positions -> (B, T, C)."""
        proj = self.project(h)
        gamma = self.gammas(h)
        for s, mix in self.mix.items():
            proj[s] = mix(anchor[s], proj[s], gamma[s])
        q = positions.rotate(self.q_norm(proj["q"]))
        k = positions.rotate(self.k_norm(proj["k"]))
        u = positions.attend(self.layer, q, k, proj["v"])
        u = self.gate(u, proj)
        return self.out_proj(u.flatten(-2))                                         # Eq. 3


NORM_POSITION = {   # (norm before a sub-layer, norm after it)
    "pre": (RMSNorm, nn.Identity),
    "after": (nn.Identity, RMSNorm),
    "both": (RMSNorm, RMSNorm),
}


class Block(nn.Module):
    """x + Attn(norm(x)), then x + MLP(norm(x)); with other norm positions see NORM_POSITION."""

    def __init__(self, config, layer):
        super().__init__()
        before, after = NORM_POSITION[config.norm_position]
        self.attn_norm = before(config.n_embd)
        self.attn = Attention(config, layer)
        self.attn_post_norm = after(config.n_embd)
        self.mlp_norm = before(config.n_embd)
        self.mlp = SwiGLU(config)
        self.mlp_post_norm = after(config.n_embd)

    def forward(self, x, anchor, positions):
        x = x + self.attn_post_norm(self.attn(self.attn_norm(x), anchor, positions))
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x)))


# ----------------------------------------------------------------------------------------- 5 model

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
        """Set every parameter, by the end of its name; ValueError for one without a rule:

            lambdas                         lambda_init, else 0.5 (static) or 1.0 (dynamic)
            bias of Eq. 11                  0
            last matrix of a sub-layer,
                of Eq. 11, and the head     0: each sub-layer starts as the identity
            other matrices, embedding       normal, std 0.02, cut at 3 std
            RMSNorm gains                   1
        """
        zero = (".attn.out_proj", ".mlp.down", ".gammas.fc2", ".head")
        for name, p in self.named_parameters():
            place, _, kind = f".{name}".rpartition(".")
            if kind in ("lambda_anchor", "lambda_current"):
                nn.init.constant_(p, self.config.lambda_start)
            elif kind == "bias" or place.endswith(zero):
                nn.init.zeros_(p)
            elif kind == "weight" and p.dim() == 2:
                nn.init.trunc_normal_(p, std=0.02, a=-0.06, b=0.06)
            elif kind == "weight" and p.dim() == 1:
                nn.init.ones_(p)
            else:
                raise ValueError(f"init_weights has no rule for parameter {name}: add one there")

    def make_anchor(self, embedded):
        """{s: S_anc (B, T, H, D)}: of each token alone, never its context, so no cache holds it."""
        return self.anchor(embedded, self.layers[0])

    def trunk(self, idx, docs=None, cache=None):
        """Hidden states (B, T, C) after the final norm.

        idx    (B, T) token ids, T at most block_size
        docs   (B, T) document number of each token, or None: attention stays within documents
        cache  a KVCache to continue, or None: idx then holds only the new tokens
        """
        if cache is not None:
            cache.grow(idx.size(1))
        positions = Positions(self.config, idx.size(1), idx.device, docs, cache)
        x = self.embed(idx)
        x = x.to(compute_dtype(x.device) or x.dtype)        # autocast leaves an embedding float32
        anchor = self.make_anchor(x)
        for layer in self.layers:
            x = layer(x, anchor, positions)
        return self.final_norm(x)

    def logits(self, hidden):
        """(..., C) -> (..., padded_vocab); the columns from vocab_size on are -inf, by a bias."""
        padding = hidden.new_zeros(self.config.padded_vocab)
        padding[self.config.vocab_size:] = -torch.inf
        return F.linear(hidden, self.head.weight, padding)

    def forward(self, idx, docs=None, cache=None):
        """Logits (B, T, padded_vocab) of each position's next token; arguments as in `trunk`."""
        return self.logits(self.trunk(idx, docs, cache))

    def loss(self, idx, targets, docs=None):
        """(cross-entropy, z): the means of -log p(target) and of logsumexp^2, in float32.

        Targets (B, T) below 0 do not count (-100 of PyTorch, -1 of nanoGPT). That none is beyond
        the vocabulary is not checked. Training minimises cross-entropy + 1e-5 z; only the
        cross-entropy is a perplexity.
        """
        logits = self.forward(idx, docs).flatten(0, 1).float()                      # (B T, V)
        targets = targets.flatten()[:, None]
        log_sum = torch.logsumexp(logits, dim=-1, keepdim=True)
        # by comparison: the backward of gather would fill a second tensor as large as the logits
        is_target = torch.arange(logits.size(-1), device=logits.device) == targets
        log_p = torch.where(is_target, logits, 0).sum(-1, keepdim=True) - log_sum
        counted = targets >= 0
        cross_entropy = torch.where(counted, -log_p, 0).sum() / counted.sum()
        z = torch.where(counted, log_sum.square(), 0).sum() / counted.sum()
        return cross_entropy, z

    @classmethod
    def from_released(cls, checkpoint, n_head=None, anchor_norm=None, **settings):
        """The model of a checkpoint, or a bare state dict, of the paper's released code.

        The variant is read off the keys. InputError unless every key is used, or is one that the
        released forward pass never reads.

        n_head       needed only where neither a QKNorm nor a lambda tells the head size
        anchor_norm  "" or "qk", for the one case the keys cannot tell: internal anchors, q or k
                     mixed, no norm of their own. Absent, "qk" is taken and a line says so
        settings     further ModelConfig fields that leave no trace in the keys, instead of what
                     the checkpoint says: tokenizer, block_size, rope_theta, norm_position
        """
        settings = {**released_settings(checkpoint.get("model_args", {})), **settings}
        theirs = released_names(checkpoint.get("model", checkpoint))
        config = released_config(theirs, n_head, anchor_norm, **settings)
        model = cls(config)
        model.load_state_dict(translate_released(theirs, model.state_dict(), config))
        return model.eval()


def compute_dtype(device):
    """The dtype of the residual stream under torch.autocast; None: that of the parameters."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


# ------------------------------------------------------------------- 6 positions: who sees whom

def causal(config, query, key):
    """A token sees itself and all before it. PyTorch has a fast path for this rule.

    For another, write a function like sliding_window and choose it in Positions: training,
    documents and cache then follow it. query, key: positions, tensors that broadcast.
    """
    return key <= query


def sliding_window(config, query, key):
    """A token sees the config.window newest tokens up to itself."""
    return (key <= query) & (query - key < config.window)


torch.backends.cuda.enable_cudnn_sdp(False)     # its masked backward gave NaN (pytorch 196678)


class Positions:
    """What every layer must know of positions, made once per forward: RoPE tables and the mask.

    The tokens are the newest of those that `cache` counts, if there is one. docs (B, length) holds
    each token's document number, and nobody sees into another document; positions go on there.
    The tables are computed here in float32, not stored, so that no cast of the model spoils them.

    rule   who sees whom: a function of (config, query, key) -> bool
    bias   what is added to the scores: a function of (config, head, query, key) -> float, or None
    """

    def __init__(self, config, length, device, docs=None, cache=None):
        if length > config.block_size:
            raise ValueError(f"{length} tokens are more than block_size={config.block_size}")
        if docs is not None and cache is not None:
            raise ValueError("docs with a cache: a cached token has no document number")
        self.config = config
        self.docs = docs
        self.cache = cache
        self.rule = sliding_window if config.window else causal
        self.bias = None
        self.key = torch.arange(length if cache is None else cache.length, device=device)     # (L,)
        self.query = self.key[-length:]                                                       # (T,)
        self.cos, self.sin = self.rope_tables()
        self.kernel = self.choose_kernel(length, device)

    def rope_tables(self):
        """(cos, sin) of the queries' angles, (T, 1, D) each; the first half's sines are negated."""
        dim = self.config.head_dim
        channel = torch.arange(0, dim, 2, dtype=torch.float32, device=self.query.device)
        angle = torch.outer(self.query.float(), self.config.rope_theta ** (-channel / dim))
        cos = angle.cos()[:, None, :]
        sin = angle.sin()[:, None, :]
        # in one tensor: otherwise each compiled kernel computes the cosines again
        return torch.cat((cos, cos, -sin, sin), dim=-1).chunk(2, dim=-1)

    def rotate(self, x):
        """RoPE, half-split: channel i is paired with i + D/2. x (B, T, H, D)."""
        y = x.float()
        partner = y.unflatten(-1, (2, -1)).flip(-2).flatten(-2)     # its derivative is a flip too
        return (y * self.cos + partner * self.sin).type_as(x)

    def attend(self, layer, q, k, v):
        """Attention of layers[layer] over all that each query sees. All (B, T, H, D)."""
        if self.cache is not None:
            k, v = self.cache.extend(layer, k, v)
        u = self.kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))    # Eq. 2
        return u.transpose(1, 2)

    def choose_kernel(self, length, device):
        """The function of q, k, v (B, H, T, D) that is softmax(q k^T / sqrt(D) + bias) v."""
        plain = self.rule is causal and self.bias is None
        if plain and self.docs is None and self.cache is None:
            return functools.partial(F.scaled_dot_product_attention, is_causal=True)
        if device.type == "cuda" and torch.compiler.is_compiling() and self.cache is None:
            return self.flex_kernel(length, device)
        return functools.partial(F.scaled_dot_product_attention, attn_mask=self.dense_mask())

    def visible(self, row, query, key):
        """Whether `query` sees `key`, positions in batch row `row`: tensors that broadcast."""
        seen = self.rule(self.config, query, key)
        if self.docs is None:
            return seen
        return seen & (self.docs[row, query] == self.docs[row, key])

    def dense_mask(self):
        """`visible` for all pairs, (T, L), with documents (B, 1, T, L).

        With a bias: the bias where the key is seen, -inf elsewhere, (H, T, L) or (B, H, T, L).
        """
        query = self.query[:, None]
        rows = 1 if self.docs is None else len(self.docs)
        row = torch.arange(rows, device=query.device)[:, None, None, None]
        seen = self.visible(row, query, self.key)
        if self.bias is None:
            return seen
        head = torch.arange(self.config.n_head, device=query.device)[:, None, None]
        return torch.where(seen, self.bias(self.config, head, query, self.key), -torch.inf)

    def flex_kernel(self, length, device):
        """FlexAttention, which skips blocks of 128 x 128 that nobody sees: fast where compiled."""
        def visible(row, head, query, key):
            return self.visible(row, query, key)

        def biased(score, row, head, query, key):
            return score + self.bias(self.config, head, query, key)

        rows = None if self.docs is None else len(self.docs)
        blocks = create_block_mask(visible, rows, None, length, length, device=device)
        score_mod = None if self.bias is None else biased
        return functools.partial(flex_attention, score_mod=score_mod, block_mask=blocks)


# -------------------------------------------------------------------------------------- 7 variants

def row(gate=True, anchor="none", mix="", anchor_norm="", granularity="elementwise", dynamic=False):
    """The ModelConfig fields of one row of Table 3; without the gate three layers more."""
    return dict(gate=gate, anchor=anchor, mix=mix, anchor_norm=anchor_norm, dynamic=dynamic,
                granularity=granularity, n_layer=29 if gate else 32)


VARIANTS = {    # --variant: a row of Table 3
    "base": row(gate=False),
    "gated": row(),
    "resformer": row(gate=False, anchor="internal", mix="v"),
    "naive": row(anchor="internal", mix="v"),
    "nuresformer_qknorm": row(anchor="internal", mix="qkvg", anchor_norm="qk"),
    "nuresformer_qknorm_headwise": row(
        anchor="internal", mix="qkvg", anchor_norm="qk", granularity="headwise"),
    "nuresformer_qknorm_scalar": row(
        anchor="internal", mix="qkvg", anchor_norm="qk", granularity="scalar"),
    "nuresformer_vg": row(anchor="internal", mix="vg"),
    "nuresformer_vg_headwise": row(anchor="internal", mix="vg", granularity="headwise"),
    "nuresformer_vg_scalar": row(anchor="internal", mix="vg", granularity="scalar"),
    "nuresformer": row(anchor="internal", mix="qkvg", anchor_norm="qkvg"),
    "nuresformer_headwise": row(
        anchor="internal", mix="qkvg", anchor_norm="qkvg", granularity="headwise"),
    "nuresformer_scalar": row(
        anchor="internal", mix="qkvg", anchor_norm="qkvg", granularity="scalar"),
    "exo_nonorm": row(anchor="exogenous", mix="qkvg"),
    "exo_dynamic": row(anchor="exogenous", mix="qkvg", anchor_norm="qkvg", dynamic=True),
    "exo": row(anchor="exogenous", mix="qkvg", anchor_norm="qkvg"),
    "exo_headwise": row(
        anchor="exogenous", mix="qkvg", anchor_norm="qkvg", granularity="headwise"),
    "exo_scalar": row(
        anchor="exogenous", mix="qkvg", anchor_norm="qkvg", granularity="scalar"),
}

TABLE_3 = {     # what the paper prints: millions of parameters, perplexity, average accuracy
    "base": (454, 14.79, 48.14),
    "gated": (453, 14.64, 48.80),
    "resformer": (454, 14.32, 49.65),
    "naive": (453, 14.25, 49.09),
    "nuresformer_qknorm": (453, 14.21, 48.91),
    "nuresformer_qknorm_headwise": (453, 14.21, 49.68),
    "nuresformer_qknorm_scalar": (453, 14.22, 49.83),
    "nuresformer_vg": (453, 14.24, 49.20),
    "nuresformer_vg_headwise": (453, 14.22, 49.11),
    "nuresformer_vg_scalar": (453, 14.24, 49.28),
    "nuresformer": (453, 14.15, 49.68),
    "nuresformer_headwise": (453, 14.17, 49.42),
    "nuresformer_scalar": (453, 14.17, 49.11),
    "exo_nonorm": (457, 14.30, 49.69),
    "exo_dynamic": (457, 14.09, 50.27),
    "exo": (457, 14.13, 49.85),
    "exo_headwise": (457, 14.14, 49.23),
    "exo_scalar": (457, 14.15, 49.16),
}


def variant_settings(variant, given):
    """The row of Table 3 named `variant` as a dict of settings, overridden by those in `given`.

    What is given narrows what the row says of the rest: gate=False takes g out of mix, letters that
    are not mixed leave anchor_norm, anchor="none" empties both, mix="" means no anchor, and without
    an anchor nothing is dynamic.
    """
    settings = {**VARIANTS[variant], **given}
    if "mix" not in given:
        usable = "" if settings["anchor"] == "none" else "qkvg" if settings["gate"] else "qkv"
        settings["mix"] = "".join(s for s in settings["mix"] if s in usable)
    if "anchor_norm" not in given:
        kept = [s for s in settings["anchor_norm"] if s in settings["mix"]]
        settings["anchor_norm"] = "".join(kept)
    if "anchor" not in given and settings["mix"] == "":
        settings["anchor"] = "none"
    if "dynamic" not in given and settings["anchor"] == "none":
        settings["dynamic"] = False
    return settings


def variant_config(variant, **given):
    """The ModelConfig of a row of Table 3 by its --variant name, with any field overridden."""
    return ModelConfig(**variant_settings(variant, given))


def variant_name(config):
    """The --variant whose axes a ModelConfig has; "custom" if none has them.

    Sizes, lambda_init and rope_theta are ignored. Any other field is an axis: a new one, away from
    its default, is no variant.
    """
    ignored = {"n_layer", "n_head", "n_embd", "ffn_dim", "vocab_size", "block_size", "tokenizer",
               "dynamic_dim", "lambda_init", "rope_theta"}
    if config.anchor == "none":
        ignored.add("granularity")                          # nothing is mixed: there are no lambdas
    defaults = {f.name: f.default for f in fields(config)}
    for name, axes in VARIANTS.items():
        axes = {**defaults, **axes}
        if all(vars(config)[axis] == axes[axis] for axis in axes.keys() - ignored):
            return name
    return "custom"


def count_parameters(model):
    """Parameters, without the head's padding rows: they are there for alignment and stay zero."""
    padding = (model.config.padded_vocab - model.config.vocab_size) * model.config.n_embd
    return sum(p.numel() for p in model.parameters()) - padding


def flops_per_token(model, length):
    """FLOPs of forward and backward per token: 6 per matrix entry + 12 n_layer C T for attention.

    The usual estimate (PaLM, Appendix B), which counts attention as if it were not causal; MFU
    figures follow it. The embedding is a look-up and counts nothing.
    """
    entries = sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))
    return 6 * entries + 12 * model.config.n_layer * model.config.n_embd * length


# ------------------------------------------------------------------------------------ 8 generation

class KVCache:
    """Rotated keys and mixed values of the tokens so far, (n_layer, B, max_len, H, D) each."""

    def __init__(self, config, batch_size, max_len, device="cpu", dtype=torch.float32):
        shape = (config.n_layer, batch_size, max_len, config.n_head, config.head_dim)
        self.config = config
        self.length = 0
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    def grow(self, length):
        """Count `length` more tokens, which `extend` then writes; ValueError if they do not fit."""
        room = self.k.size(2)
        if self.length + length > room:
            raise ValueError(f"a KVCache of {room} tokens holds {self.length} and cannot take "
                             f"{length} more")
        self.length += length

    def extend(self, layer, k, v):
        """Write the newest tokens' k, v (B, T, H, D); return all so far, (B, length, H, D)."""
        start = self.length - k.size(1)
        self.k[layer, :, start:self.length] = k
        self.v[layer, :, start:self.length] = v
        all_k = self.k[layer, :, :self.length].to(k.dtype)
        all_v = self.v[layer, :, :self.length].to(v.dtype)
        return all_k, all_v

    def repeat(self, n):
        """A cache whose rows are each repeated n times: one context, n continuations."""
        cache = KVCache(self.config, 0, 0, self.k.device, self.k.dtype)
        cache.k = self.k.repeat_interleave(n, dim=1)
        cache.v = self.v.repeat_interleave(n, dim=1)
        cache.length = self.length
        return cache


def sample(logits, temperature, top_k, generator):
    """One id per row, (B, 1), by logits (B, V): the likeliest, or one of top_k."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    n_vocab = logits.size(-1)
    top, index = logits.topk(min(top_k or n_vocab, n_vocab))
    p = F.softmax(top / temperature, dim=-1)
    choice = torch.multinomial(p, 1, generator=generator)
    return index.gather(-1, choice)


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, stop_token=None,
             generator=None):
    """Continue idx (B, T) by up to max_new_tokens ids; returns (B, T + new).

    Each new token is predicted from the last block_size tokens. Up to there a KV cache makes a
    token cost one token; past it the window slides, every cached position would change, and each
    token costs a forward of the whole window. A row that has produced stop_token is filled up with
    it; generation ends when all rows have. With dropout in the model, call model.eval() before.
    """
    if idx.size(1) == 0:
        raise ValueError("generate needs at least one token to start from")
    window = model.config.block_size
    stop = -1 if stop_token is None else stop_token
    dtype = compute_dtype(idx.device) or model.head.weight.dtype
    longest = min(window, idx.size(1) + max_new_tokens)
    finished = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
    fresh = idx                                             # what the cache does not hold yet
    cache = None
    for _ in range(max_new_tokens):
        if cache is None or cache.length + fresh.size(1) > window:
            fresh = idx[:, -window:]
            cache = KVCache(model.config, idx.size(0), longest, idx.device, dtype)
        hidden = model.trunk(fresh, cache=cache)[:, -1]
        logits = model.logits(hidden).float()                                       # (B, V)
        if not logits.max().isfinite():
            raise InputError("the logits are not finite: the weights are damaged or diverged")
        fresh = torch.where(finished, stop, sample(logits, temperature, top_k, generator))
        idx = torch.cat((idx, fresh), dim=1)
        finished = finished | (fresh == stop)
        if finished.all():
            break
    return idx


def continue_text(model, tokenizer, prompt, max_new_tokens, num_samples=1, temperature=0.8,
                  top_k=50, seed=1337):
    """Continuations of a text, as a list of texts that begin with it; "" starts a new document.

    The tokenizer has encode(text) -> ids, decode(ids) -> text, and eot, the id that ends a text.
    """
    device = model.head.weight.device
    ids = tokenizer.encode(prompt) or [tokenizer.eot]
    if max(ids) >= model.config.vocab_size:
        raise InputError(f"the prompt has token {max(ids)}, but the model knows "
                         f"vocab_size={model.config.vocab_size} tokens")
    idx = torch.tensor([ids] * num_samples, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    out = generate(model, idx, max_new_tokens, temperature, top_k, tokenizer.eot, generator)
    return [tokenizer.decode([i for i in row if i != tokenizer.eot]) for row in out.tolist()]


def choose_device(name, among=("cuda", "mps", "cpu")):
    """The device of a --device flag; "auto" is the first of `among` that is there. InputError."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    usable = [device for device in among if there[device]]
    if name not in ("auto", *usable):
        raise InputError(f"--device={name} is not there: torch can use {', '.join(usable)} on this "
                         "machine")
    return usable[0] if name == "auto" else name


# ----------------------------------------------------------------------------------- 9 checkpoints

FORMAT = 1      # of the checkpoints that train.py writes, and the newest that this file reads


class InputError(ValueError):
    """A setting, file or device that cannot be used; in one line: what is wrong, and the remedy."""


class DamagedCheckpoint(InputError):
    """A file whose checksums fail: written in part, or changed on the disk."""


def load_checkpoint(path, device="cpu"):
    """An ExoFormer in eval mode with the weights of a checkpoint file, ours or a released one.

    path may be a run folder: its newest checkpoint is taken. InputError as in read_checkpoint, and
    where weights and configuration do not fit.
    """
    return model_from(read_checkpoint(path), path).to(device).eval()


def model_from(checkpoint, path):
    """The ExoFormer in a dict of read_checkpoint, which came from `path`; InputError as above."""
    check_format(checkpoint, path)
    try:
        if "model_config" in checkpoint:
            model = ExoFormer(config_from(ModelConfig, checkpoint["model_config"], path))
            model.load_state_dict(checkpoint["model"])
        else:
            model = ExoFormer.from_released(checkpoint)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        why = str(error).split("\n")[-1].strip()
        raise InputError(f"{path}: its weights do not fit its configuration ({why})") from None
    return model


def read_checkpoint(path):
    """The dict in a checkpoint file, or in the newest one of a folder, on the CPU.

    InputError if it is missing or holds anything but data, DamagedCheckpoint if a checksum fails
    (torch.load does not notice a flipped bit), OSError if it cannot be read now.
    """
    path = newest_checkpoint(path) if os.path.isdir(path) else path
    if not os.path.exists(path):
        raise InputError(f"{path}: no such checkpoint")
    check_records(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, KeyError, RuntimeError, ValueError) as error:
        if "memory" in str(error):
            raise
        why = f"{type(error).__name__}: {str(error)[:80]}".split("\n")[0]
        raise InputError(f"{path} is not a checkpoint ({why})") from None
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


def checkpoints_in(folder):
    """{step: path} of the ckpt_{step}.pt in a run folder, the newest first."""
    there = os.listdir(folder) if os.path.isdir(folder) else []
    steps = [int(name[5:-3]) for name in there if re.fullmatch(r"ckpt_\d+\.pt", name)]
    names = {step: f"ckpt_{step:06d}.pt" for step in sorted(steps, reverse=True)}
    return {step: os.path.join(folder, name) for step, name in names.items() if name in there}


def newest_checkpoint(folder):
    """Path of ckpt_{step}.pt with the largest step in a run folder."""
    paths = checkpoints_in(folder)
    if not paths:
        raise InputError(f"{folder}: there is no checkpoint in this folder")
    return next(iter(paths.values()))


def check_records(path):
    """DamagedCheckpoint unless each record of the zip archive that torch.save wrote is whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch reads other values from a record that is marked as a folder; its CRC still holds
            folders = [info.filename for info in archive.infolist() if info.external_attr & 0x10]
            damaged = archive.testzip() or "".join(folders[:1])
    except (EOFError, NotImplementedError, RuntimeError, ValueError, zipfile.BadZipFile,
            zlib.error) as error:
        why = f"{type(error).__name__}: {str(error)[:80]}"
        raise DamagedCheckpoint(f"{path} is not a whole checkpoint ({why})") from None
    if damaged:
        raise DamagedCheckpoint(f"{path} is damaged: its record {damaged} fails its checksum")


def check_format(checkpoint, path):
    """InputError for a checkpoint in a format that a later version of this code has written."""
    if checkpoint.get("format", FORMAT) != FORMAT:
        raise InputError(f"{path} has format {checkpoint['format']}, newer than the {FORMAT} that "
                         "this version reads; update the code")


def config_from(kind, settings, path):
    """A ModelConfig or TrainConfig (`kind`) from the dict in checkpoint `path`, or InputError."""
    unknown = sorted(set(settings) - {f.name for f in fields(kind)})
    if unknown:
        raise InputError(f"{path} has settings this version does not know: {', '.join(unknown)}; "
                         "use the version of the code that wrote it")
    return kind(**settings)


# ------------------------------------------------------------------------ 10 released checkpoints

RELEASED_NAMES = (  # (our name, the released code's), tried in order on each of our parameters
    (r"^embed\.", "transformer.wte."),
    (r"^layers\.", "transformer.layers."),
    (r"^final_norm\.", "transformer.final_norm."),
    (r"^head\.", "lm_head."),
    (r"^anchor\.project\.", "anchor_proj."),
    (r"^anchor\.norms\.(.)\.", r"anchor_\1_norm."),
    (r"_post_norm\.", "_norm."),        # their "both" uses one norm twice: ours get its gain
    (r"\.attn\.project\.", ".attn.c_attn."),
    (r"\.out_proj\.", ".c_proj."),
    (r"\.up\.", ".fc1."),
    (r"\.down\.", ".fc2."),
    (r"\.mix\.(.)\.lambda_anchor", r".lambda_\g<1>1"),
    (r"\.mix\.(.)\.lambda_current", r".lambda_\g<1>2"),
    (r"\.gammas\.bias", ".dynamic_mixing.fc2.bias"),
    (r"\.gammas\.", ".dynamic_mixing."),
)

DEAD_IN_RELEASED = (  # tensors the released files carry but their forward pass never reads
    r"transformer\.layers\.\d+\.attn\.[vg]_norm\.weight",   # of use in layer 0 at most
    r"transformer\.layers\.0\.attn\.(lambda_[qkvg][12]|dynamic_mixing\..*)",  # of the anchor itself
    r"anchor_[qkvg]_norm\.weight",                          # of a component that is not mixed
)

RELEASED_NORM_POSITION = {"before": "pre", "after": "after", "both": "both"}


def released_settings(model_args):
    """What a released checkpoint's model_args say that its keys cannot: a dict of settings.

    Nothing else in them can be trusted: their flags default to True, whatever the file is.
    """
    told = model_args.keys() & {"block_size", "rope_theta"}
    settings = {name: model_args[name] for name in told}
    position = model_args.get("norm_pos", "before")
    if position not in RELEASED_NORM_POSITION:
        raise InputError(f"the checkpoint's norm_pos={position!r} is none of before, after, both")
    return {**settings, "norm_position": RELEASED_NORM_POSITION[position]}


def released_names(state):
    """A released state dict without torch.compile's prefix, with one name for v's and g's norms."""
    names = {key: key.removeprefix("_orig_mod.") for key in state}
    return {re.sub(r"\.([vg])_res_norm\.", r".\1_norm.", names[key]): state[key] for key in state}


def released_config(state, n_head, anchor_norm, **settings):
    """The ModelConfig that a released state dict was trained with, from its keys and shapes."""
    if "transformer.wte.weight" not in state:
        raise InputError("not a checkpoint of the released code: no transformer.wte.weight among "
                         f"{len(state)} keys")
    vocab_size, n_embd = state["transformer.wte.weight"].shape
    n_layer = len({key.split(".")[2] for key in state if key.startswith("transformer.layers.")})
    last = f"transformer.layers.{n_layer - 1}.attn."        # layers[0] may be the anchor
    for needed in ("transformer.layers.0.mlp.fc1.weight", f"{last}c_attn.weight"):
        if needed not in state:
            raise InputError(f"the checkpoint lacks {needed}")
    mix = "".join(s for s in COMPONENTS if f"{last}lambda_{s}1" in state)
    shape = state[f"{last}lambda_{mix[0]}1"].shape if mix else torch.Size()
    anchor = "internal" if mix else "none"
    if any(key.startswith("anchor_") for key in state):
        anchor = "exogenous"
    fc1 = state.get(f"{last}dynamic_mixing.fc1.weight")
    return ModelConfig(
        n_layer=n_layer,
        n_head=n_head or released_heads(n_embd, state.get(f"{last}q_norm.weight"), shape),
        n_embd=n_embd,
        ffn_dim=state["transformer.layers.0.mlp.fc1.weight"].size(0),
        vocab_size=vocab_size,
        gate=state[f"{last}c_attn.weight"].size(0) == 4 * n_embd,
        anchor=anchor,
        mix=mix,
        anchor_norm=released_anchor_norm(state, anchor, mix, anchor_norm),
        granularity=released_granularity(shape, mix),
        dynamic=fc1 is not None,
        dynamic_dim=16 if fc1 is None else fc1.size(0),
        qk_norm=f"{last}q_norm.weight" in state,
        **settings,
    )


def released_heads(n_embd, q_norm, lambda_shape):
    """Number of heads by the gain of QKNorm (D,), or else by a lambda (H,), (H, 1) or (H, D)."""
    if q_norm is not None:
        return n_embd // q_norm.size(-1)
    if lambda_shape.numel() > 1:
        return lambda_shape[0]
    raise InputError("the keys do not tell the number of heads; pass n_head")


def released_granularity(shape, mix):
    """The granularity whose lambdas have this shape in a released file."""
    if len(shape) == 2 or not mix:
        return "elementwise"
    return "headwise" if shape.numel() > 1 else "scalar"


def released_anchor_norm(state, anchor, mix, asked):
    """The anchors a released model normalises.

    Internal q and k anchors share layer 0's QKNorm, which leaves no key to tell.
    """
    name = "anchor_{}_norm.weight"
    if anchor == "internal":
        name = "transformer.layers.0.attn.{}_norm.weight"
    owned = "".join(s for s in mix if name.format(s) in state)
    told = anchor != "internal" or not set("qk") & set(mix) or set("vg") & set(owned)
    if told:
        if asked not in (None, owned):
            raise InputError(f"anchor_norm={asked!r}, but the keys say {owned!r}")
        return owned
    if asked is None:
        print("from_released: the keys do not say whether the q and k anchors are normalised; "
              f"taking anchor_norm={owned!r} (pass anchor_norm='' for a model trained without)",
              flush=True)
        return owned
    if not set(asked) <= set(owned):
        raise InputError(f"anchor_norm={asked!r} must be '' or {owned!r}: no other norm has a gain "
                         "in these keys")
    return asked


def translate_released(theirs, ours, config):
    """The state dict `ours` filled with the released tensors in float32, or InputError."""
    filled = {}
    unused = dict.fromkeys(theirs)
    for name, like in ours.items():
        key = released_key(name, config)
        if key not in theirs:
            raise InputError(f"the checkpoint lacks {key}")
        unused.pop(key, None)
        filled[name] = fit_released(key, theirs[key].float(), like, config)
    dead = "|".join(DEAD_IN_RELEASED)
    unknown = [key for key in unused if not re.fullmatch(dead, key)]
    if unknown:
        raise InputError(f"the checkpoint holds {len(unknown)} tensors this model has no place "
                         f"for: {unknown[0]} ...")
    return filled


def released_key(name, config):
    """The released code's name of our parameter `name`."""
    if config.anchor == "internal":
        name = re.sub(r"^anchor\.norms\.(.)\.", r"layers.0.attn.\1_norm.", name)
    for pattern, replacement in RELEASED_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def fit_released(key, tensor, like, config):
    """One released tensor in our shape: head padded, unused anchors dropped, lambdas reshaped."""
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


# --------------------------------------------------------------------------- 11 checks of settings

def require(holds, message):
    """InputError with this message unless the rule holds."""
    if not holds:
        raise InputError(message)


def check_ranges(config):
    """InputError unless each field of a dataclass of settings has its type and an allowed value."""
    for f in fields(config):
        value = vars(config)[f.name]
        shown = repr(value)[:60]
        kind = f.type | int if isinstance(0.0, f.type) else f.type         # 1 will do for 1.0
        require(isinstance(value, kind), f"{f.name}={shown} must be {f.type}")
        choices = f.metadata["choices"]
        if choices:
            require(value in choices, f"{f.name}={shown} must be one of {', '.join(choices)}")
        if type(value) in (int, float):
            low = f.metadata["low"]
            high = f.metadata["high"]
            require(low <= value <= high,
                    f"{f.name}={shown} must be a number from {low:g} to {high:g}")


def check_axes(c):
    """InputError unless the fields of ModelConfig `c` fit together; it names both and values."""
    for name, letters in (("mix", c.mix), ("anchor_norm", c.anchor_norm)):
        known = all(s in COMPONENTS for s in letters) and len(set(letters)) == len(letters)
        require(known, f"{name}={letters!r} must use the letters q, k, v, g, each at most once")
    require(c.n_embd % c.n_head == 0, f"n_embd={c.n_embd} is not a multiple of n_head={c.n_head}")
    require(c.head_dim % 2 == 0,
            f"head_dim={c.head_dim} (n_embd={c.n_embd} / n_head={c.n_head}) is odd; RoPE rotates "
            "pairs of channels")
    require(c.ffn_dim % 2 == 0, f"ffn_dim={c.ffn_dim} must be even")
    require("g" not in c.mix or c.gate,
            f"mix={c.mix!r} mixes g, but gate={c.gate} gives the layers no g")
    if c.anchor == "none":
        require(c.mix == "", f"mix={c.mix!r} needs an anchor, but anchor='none'")
        require(not c.dynamic, f"dynamic={c.dynamic} needs an anchor, but anchor='none'")
    else:
        require(c.mix != "", f"anchor={c.anchor!r} has nothing to mix into, since mix=''; name "
                "letters, as in mix=qkvg")
    require(c.anchor != "internal" or c.n_layer > 1,
            f"anchor='internal' needs a second layer to mix into, but n_layer={c.n_layer}")
    require(set(c.anchor_norm) <= set(c.mix),
            f"anchor_norm={c.anchor_norm!r} names an anchor that mix={c.mix!r} does not use")


# -------------------------------------------------------------------------------- 12 command line

def print_variants():
    """Table 3 as this file builds it: exact parameters beside the paper's, at the paper's size."""
    lines = [f"{'--variant':28s}{'layers':>7s}{'parameters':>14s}{'M':>7s}{'paper M':>9s}"
             f"{'GFLOP/token':>13s}{'paper ppl':>11s}"]
    for name in VARIANTS:
        with torch.device("meta"):
            model = ExoFormer(variant_config(name))
        n = count_parameters(model)
        flops = flops_per_token(model, model.config.block_size)
        millions, perplexity, _ = TABLE_3.get(name, ("-", "-", "-"))    # "-": a row of one's own
        lines.append(f"{name:28s}{model.config.n_layer:7d}{n:14,d}{n / 1e6:7.1f}{millions:>9}"
                     f"{flops / 1e9:13.3f}{perplexity:>11}")
    print("\n".join(lines))


def number(kind, low, high):
    """An argparse type: a number of this kind from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} must be from {low:g} to {high:g}")
        return value
    parse.__name__ = kind.__name__                          # argparse names it: "invalid int value"
    return parse


def temperature_from(text):
    """An argparse type: 0, or a temperature that float32 can divide by."""
    return 0.0 if float(text) == 0 else number(float, 1e-3, 1e3)(text)


def parse_arguments():
    """The command line as a namespace; argparse ends the program where it is wrong."""
    parser = argparse.ArgumentParser(
        description="Print the table of variants, or sample from a checkpoint.", allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt", help="checkpoint or run folder to sample from, ours or the released code's")
    add("--prompt", default="", help="text to continue; empty starts a new document")
    add("--max_new_tokens", type=number(int, 1, 10**6), default=200, help="tokens to add")
    add("--num_samples", type=number(int, 1, 10**4), default=1, help="how many continuations")
    add("--temperature", type=temperature_from, default=0.8,
        help="0: the likeliest token every time")
    add("--top_k", type=number(int, 1, 10**6), default=50, help="choose among so many likeliest")
    add("--seed", type=number(int, 0, 2**63 - 1), default=1337, help="seed of the sampling")
    add("--device", default="auto", help="cuda, mps or cpu; auto takes the first there is")
    args = parser.parse_args()
    if args.prompt and not args.ckpt:
        parser.error("--prompt needs a model to continue it: add --ckpt=PATH")
    return args


def main():
    """The command line."""
    args = parse_arguments()
    if not args.ckpt:
        return print_variants()
    from prepare_fineweb import command_line, get_tokenizer, say    # the model itself needs neither

    def sample_checkpoint():
        model = load_checkpoint(args.ckpt, choose_device(args.device))
        tokenizer = get_tokenizer(model.config.tokenizer)
        texts = continue_text(model, tokenizer, args.prompt, args.max_new_tokens, args.num_samples,
                              args.temperature, args.top_k, args.seed)
        for text in texts:
            say(f"{text}\n---")

    command_line(sample_checkpoint, InputError, memory="lower --num_samples or --max_new_tokens")


if __name__ == "__main__":
    sys.exit(main())
