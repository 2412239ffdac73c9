"""
The tests of model.py, muon.py and train.py: CPU only, no network, no data but what they make or
what lies in paper/testdata.

    python test_model.py                the quick ones, in under a minute on 2 cores
    python -m pytest                    everything, paper/ too, in under 5 minutes

The order is the paper's: equations, who sees whom, settings, variants, equality with the released
code, Muon, a training step; then resuming, damaged files, and training in two processes. Oracles
are independent of the code under test: loops in float64, numbers that the paper's released code
computed, a second implementation, numbers typed from the paper. Data, HellaSwag, signals, full
disks and torchrun are tested in paper/.
"""

import copy
import functools
import inspect
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import types
import warnings
import zlib
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, fields
from io import StringIO

os.environ["OMP_NUM_THREADS"] = "1"  # for each process that a test starts: waiting threads spin
import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.flop_counter import FlopCounterMode

torch.set_num_threads(1)
# so that the mark "slow" needs no file of settings
warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import model as M
import muon
import prepare_fineweb as pf
import train as T
from model import (
    VARIANTS,
    ExoFormer,
    InputError,
    KVCache,
    ModelConfig,
    generate,
    load_checkpoint,
    variant_config,
)
from prepare_fineweb import UserError
from train import save_checkpoint

HERE = pathlib.Path(__file__).parent
CPU = torch.device("cpu")
TESTDATA = HERE / "paper" / "testdata"
TINY = dict(n_layer=3, n_head=4, n_embd=32, ffn_dim=128, vocab_size=96, block_size=40)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Every test draws the same numbers in every run."""
    torch.manual_seed(0)


def tiny(variant="exo_dynamic", seed=0, **changes):
    """A small model of a variant, every parameter moved off its special start (0, 1, equal)."""
    torch.manual_seed(seed)
    model = ExoFormer(variant_config(variant, **{**TINY, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def tokens(*shape, seed=0, high=96):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def rms_norm(x, gain):
    """The definition."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


# -------------------------------------------------------------------------------------- equations


def by_hand(model, idx, docs=None):
    """The logits by the paper's equations, in float64: of model.py its weights alone are used."""
    c = model.config
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    x = weights["embed.weight"][idx]
    anchor = anchor_by_hand(c, weights, x)
    for n in range(c.n_layer):
        mixed = anchor if c.anchor == "exogenous" or n > 0 else {}
        x = layer_by_hand(c, weights, f"layers.{n}", x, mixed, docs)
    return rms_norm(x, weights["final_norm.weight"]) @ weights["head.weight"][: c.vocab_size].T


def heads_by_hand(c, weights, name, x, letters):
    """{s: (B, T, H, D)}: the stacked C x C matrices one after the other."""
    matrices = weights[f"{name}.project.weight"].split(c.n_embd)
    split = (*x.shape[:2], c.n_head, c.n_embd // c.n_head)
    return {s: (x @ matrix.T).view(split) for s, matrix in zip(letters, matrices)}


def anchor_by_hand(c, weights, x):
    """Eq. 8, 9 and the RMSNorm of Eq. 10."""
    mixed = [s for s in "qkvg" if s in c.mix]
    anchor = {}
    if c.anchor == "exogenous":
        anchor = heads_by_hand(c, weights, "anchor", x, mixed)
    if c.anchor == "internal":
        h = x if c.norm_position == "after" else rms_norm(x, weights["layers.0.attn_norm.weight"])
        anchor = heads_by_hand(c, weights, "layers.0.attn", h, "qkvg" if c.gate else "qkv")
    for s in c.anchor_norm:
        anchor[s] = rms_norm(anchor[s], weights[f"anchor.norms.{s}.weight"])
    return {s: anchor[s] for s in mixed}


def layer_by_hand(c, weights, name, x, anchor, docs):
    """Eq. 1 to 7 and the SwiGLU, with norms where norm_position says."""

    def norm(x, which, used):
        return rms_norm(x, weights[f"{name}.{which}.weight"]) if used else x

    before = c.norm_position in ("pre", "both")
    after = c.norm_position in ("after", "both")
    h = norm(x, "attn_norm", before)
    own = heads_by_hand(c, weights, f"{name}.attn", h, "qkvg" if c.gate else "qkv")
    mix_by_hand(own, anchor, h, weights, f"{name}.attn", c.dynamic)
    own["q"] = norm(own["q"], "attn.q_norm", c.qk_norm)
    own["k"] = norm(own["k"], "attn.k_norm", c.qk_norm)
    u = attention_by_hand(c, own, docs).flatten(-2)
    x = x + norm(u @ weights[f"{name}.attn.out_proj.weight"].T, "attn_post_norm", after)
    h = norm(x, "mlp_norm", before)
    value, gate = (h @ weights[f"{name}.mlp.up.weight"].T).chunk(2, -1)
    down = (gate * gate.sigmoid() * value) @ weights[f"{name}.mlp.down.weight"].T
    return x + norm(down, "mlp_post_norm", after)


def mix_by_hand(own, anchor, h, weights, name, dynamic):
    """Eq. 10 to 12 in place: own[s] (B, T, H, D) for each s of anchor, in the order q, k, v, g."""
    gammas = torch.ones(*h.shape[:2], 2 * len(anchor)).double()
    if dynamic and anchor:
        hidden = h @ weights[f"{name}.gammas.fc1.weight"].T
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        slots = hidden @ weights[f"{name}.gammas.fc2.weight"].T + weights[f"{name}.gammas.bias"]
        gammas = 1 / (1 + (-slots).exp())
    for i, s in enumerate(anchor):
        first = gammas[..., 2 * i, None, None] * weights[f"{name}.mix.{s}.lambda_anchor"]
        second = gammas[..., 2 * i + 1, None, None] * weights[f"{name}.mix.{s}.lambda_current"]
        own[s] = first * anchor[s] + second * own[s]


def attention_by_hand(c, own, docs):
    """The gated output (B, T, H, D) of normed queries and keys, one query after the other."""
    q = turned(own["q"], c.rope_theta)
    k = turned(own["k"], c.rope_theta)
    u = torch.zeros_like(q)
    for b, t in np.ndindex(q.shape[:2]):
        oldest = max(0, t - c.window + 1) if c.window else 0
        seen = [j for j in range(oldest, t + 1) if docs is None or docs[b, j] == docs[b, t]]
        scores = (k[b, seen] * q[b, t]).sum(-1) / math.sqrt(q.size(-1))
        u[b, t] = (scores.softmax(0)[..., None] * own["v"][b, seen]).sum(0)
    return u * own["g"].sigmoid() if c.gate else u


def turned(x, theta, first=0):
    """RoPE by complex numbers: channel i and i + D/2 of position t turn by t theta^(-2 i / D)."""
    half = x.size(-1) // 2
    speed = theta ** (-2 * torch.arange(half).double() / x.size(-1))
    position = torch.arange(first, first + x.size(1)).double()
    turn = torch.polar(torch.ones(()).double(), position[:, None, None] * speed)
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
    return torch.cat((pairs.real, pairs.imag), -1)


# two rows that are cut at different places; later documents have larger or smaller numbers
DOCS = (tokens(2, 24) < 14).cumsum(1) * 5 % 7

MODELS = [(variant, {}) for variant in VARIANTS] + [  # and combinations that Table 3 does not have
    ("gated", dict(norm_position="after")),
    ("exo", dict(norm_position="both", window=5)),
    ("exo_dynamic", dict(qk_norm=False, rope_theta=50.0)),
    ("exo", dict(gate=False, mix="kv", anchor_norm="v")),
    ("exo_dynamic", dict(mix="gq", anchor_norm="g", granularity="scalar", dynamic_dim=5)),
    ("nuresformer", dict(norm_position="after", dynamic=True, anchor_norm="k")),
    ("nuresformer", dict(gate=False, mix="qkv", anchor_norm="", dynamic=True)),
    ("base", dict(n_layer=1, n_head=1, n_embd=2, ffn_dim=0, vocab_size=90)),
]
every_model = pytest.mark.parametrize("variant, changes", MODELS)


@every_model
@torch.no_grad()
def test_logits_are_those_of_the_equations(variant, changes):
    model = tiny(variant, **changes)
    idx = tokens(2, 24, high=model.config.vocab_size)
    for docs in (None, DOCS):
        logits = model(idx, docs)[..., : model.config.vocab_size]
        torch.testing.assert_close(logits.double(), by_hand(model, idx, docs), atol=2e-4, rtol=1e-4)


def test_eq_7_heads_are_contiguous_blocks_of_channels():
    h = torch.randn(1, 2, 32)
    attn = tiny("gated").layers[1].attn
    for s, w in zip("qkvg", attn.project.weight.split(32)):
        torch.testing.assert_close(attn.project(h)[s][0, 1, 2], (h[0, 1] @ w.T)[16:24])


@pytest.mark.parametrize("variant", ["nuresformer", "exo"])
def test_eq_8_and_9_an_anchor_reads_single_tokens(variant):
    """Layer 1's projections of its normed input, or own matrices on the raw embeddings."""
    model = tiny(variant)
    idx = tokens(2, 6)
    x = model.embed.weight[idx[1, 3]]
    anchor = model.make_anchor(model.embed(idx))
    internal = variant == "nuresformer"
    source = rms_norm(x, model.layers[0].attn_norm.weight) if internal else x
    matrices = (model.layers[0].attn if internal else model.anchor).project.weight.split(32)
    for s, w in zip("qkvg", matrices):
        expected = rms_norm((source @ w.T).view(4, 8), model.anchor.norms[s].weight)
        torch.testing.assert_close(anchor[s][1, 3], expected)


def test_an_internal_anchor_is_not_mixed_in_its_own_layer():
    inside = ExoFormer(ModelConfig(**TINY, anchor="internal", dynamic=True))
    outside = ExoFormer(ModelConfig(**TINY, anchor="exogenous", dynamic=True))
    assert [len(layer.attn.mix) for layer in inside.layers] == [0, 4, 4]
    assert [len(layer.attn.mix) for layer in outside.layers] == [4, 4, 4]
    assert not list(inside.layers[0].attn.gammas.parameters())


@pytest.mark.parametrize("granularity", M.GRANULARITY)
def test_eq_10_and_12_mix_matches_loops(granularity):
    mix = M.Mix(ModelConfig(**TINY, granularity=granularity)).double()
    shape = (2, 3, 4, 8)
    anchor, current = torch.randn(2, *shape).double()
    gamma = torch.rand(2, 2, 3, 1, 1).double()
    with torch.no_grad():
        mix.lambda_anchor.normal_()
        mix.lambda_current.normal_()
        mixed = mix(anchor, current, gamma)
    first = mix.lambda_anchor.detach().expand(4, 8)
    second = mix.lambda_current.detach().expand(4, 8)
    for b, t, h, d in np.ndindex(shape):
        of_anchor = gamma[0, b, t] * first[h, d] * anchor[b, t, h, d]
        of_current = gamma[1, b, t] * second[h, d] * current[b, t, h, d]
        assert abs(mixed[b, t, h, d].item() - (of_anchor + of_current).item()) < 1e-12


@pytest.mark.parametrize("granularity", M.GRANULARITY)
def test_the_derivative_of_eq_12_is_that_of_its_formula(granularity):
    """By finite differences, for every argument; gamma of each token, or that of a static model."""
    draw = functools.partial(torch.randn, dtype=torch.float64, requires_grad=True)
    shape = M.GRANULARITY[granularity](2, 4)
    parts = (draw(2, 3, 2, 4), draw(2, 3, 2, 4), draw(shape), draw(shape))
    static = M.StaticMixing(ModelConfig(), "v")(torch.ones(1))["v"]
    constant = [gamma.double() for gamma in static]
    for gammas in ((draw(2, 3, 1, 1), draw(2, 3, 1, 1)), constant):
        assert torch.autograd.gradcheck(M.WeightedSum.apply, (*parts, *gammas))


def test_eq_11_gamma_matches_loops():
    dynamic = M.DynamicMixing(ModelConfig(**TINY, dynamic=True), "qkvg").double()
    h = torch.randn(2, 3, 32).double()
    with torch.no_grad():
        for p in dynamic.parameters():
            p.normal_(std=0.3)
    gamma = dynamic(h)
    w1 = dynamic.fc1.weight.detach().numpy()
    w2 = dynamic.fc2.weight.detach().numpy()
    bias = dynamic.bias.detach().numpy()
    for b, t in np.ndindex(2, 3):
        hidden = [x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in w1 @ h[b, t].numpy()]
        slots = 1 / (1 + np.exp(-(w2 @ hidden + bias)))
        for i, s in enumerate("qkvg"):
            pair = [gamma[s][j][b, t].item() for j in range(2)]
            np.testing.assert_allclose(pair, slots[2 * i : 2 * i + 2], rtol=1e-6)


@pytest.mark.parametrize("anchor", ["internal", "exogenous"])
@pytest.mark.parametrize("granularity", M.GRANULARITY)
def test_dynamic_equals_static_at_init(anchor, granularity):
    axes = dict(anchor=anchor, granularity=granularity)
    static = ExoFormer(ModelConfig(**TINY, **axes, dynamic=False))
    dynamic = ExoFormer(ModelConfig(**TINY, **axes, dynamic=True))
    with torch.no_grad():
        for name, p in static.named_parameters():
            if "lambda" not in name:
                dynamic.get_parameter(name).copy_(p.normal_(std=0.3))
    assert torch.equal(static(tokens(2, 20)), dynamic(tokens(2, 20)))


def test_rms_norm_matches_its_formula_for_small_values_too():
    """Of values near the root of eps, 0.001, it makes less than 1."""
    norm = M.RMSNorm(8)
    with torch.no_grad():
        norm.weight.normal_()
    for size in (1.0, 1e-3, 0.0):
        x = size * torch.randn(2, 5, 3, 8)
        expected = rms_norm(x.double(), norm.weight.double())
        torch.testing.assert_close(norm(x).double(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("theta", [500_000.0, 100.0])
def test_rope_turns_pairs_of_channels_by_their_position(theta):
    config = ModelConfig(**TINY, rope_theta=theta)
    cache = KVCache(config, 2, 7)
    cache.grow(7)  # so that the five tokens are positions 2 to 6
    x = torch.randn(2, 5, 3, 8)
    rotated = M.Positions(config, 5, CPU, cache=cache).rotate(x)
    torch.testing.assert_close(rotated.double(), turned(x, theta, first=2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "position, formula",
    [
        ("pre", lambda x, f, before, after: x + f(before(x))),
        ("after", lambda x, f, before, after: x + after(f(x))),
        ("both", lambda x, f, before, after: x + after(f(before(x)))),
    ],
)
@torch.no_grad()
def test_norms_stand_where_norm_position_says(position, formula):
    block = tiny("gated", norm_position=position).layers[1]
    x = torch.randn(2, 7, 32)
    positions = M.Positions(ModelConfig(**TINY), 7, CPU)

    def attention(y):
        return block.attn(y, {}, positions)

    def norm(module):
        return lambda y: rms_norm(y, module.weight)

    middle = formula(x, attention, norm(block.attn_norm), norm(block.attn_post_norm))
    end = formula(middle, block.mlp, norm(block.mlp_norm), norm(block.mlp_post_norm))
    torch.testing.assert_close(block(x, {}, positions), end, atol=1e-5, rtol=1e-5)


def test_the_loss_and_its_gradients_match_float64_and_count_only_targets():
    """A head of 90 real columns in 128, targets -100 among the others."""
    model = tiny("base", vocab_size=90)
    idx = tokens(2, 20, high=90)
    targets = tokens(2, 20, seed=3, high=90)
    targets[0, 5:9] = -100
    counted = targets != -100
    exact = copy.deepcopy(model).double()
    logits = exact(idx)[counted][:, :90]
    lse = logits.exp().sum(-1).log()
    right = (lse - logits[range(36), targets[counted]]).mean()
    squares = lse.square().mean()
    (right + 0.01 * squares).backward()
    cross_entropy, z = model.loss(idx, targets)
    (cross_entropy + 0.01 * z).backward()
    assert abs(cross_entropy.item() - right.item()) < 1e-5
    assert abs(z.item() - squares.item()) < 1e-3
    for (name, p), q in zip(model.named_parameters(), exact.parameters()):
        torch.testing.assert_close(p.grad.double(), q.grad, atol=1e-5, rtol=1e-4, msg=name)


@torch.no_grad()
def test_the_targets_that_nanogpt_ignores_do_not_count_either():
    model = tiny()
    idx = tokens(2, 20)
    targets = tokens(2, 20, seed=3)
    targets[0, :7] = -1
    right = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=-1)
    torch.testing.assert_close(model.loss(idx, targets)[0], right)


@torch.no_grad()
def test_the_loss_of_documents_is_that_of_their_logits():
    model = tiny()
    idx = tokens(2, 24)
    targets = tokens(2, 24, seed=1)
    cross_entropy = model.loss(idx, targets, DOCS)[0].item()
    expected = F.cross_entropy(by_hand(model, idx, DOCS).flatten(0, 1), targets.flatten())
    assert abs(cross_entropy - expected.item()) < 1e-4
    assert abs(cross_entropy - model.loss(idx, targets)[0].item()) > 1e-2


def test_head_padding_is_never_predicted_nor_counted():
    model = tiny("base", vocab_size=90)
    logits = model(tokens(1, 5, high=90))
    assert logits.shape[-1] == 128
    assert (logits[..., 90:] == -math.inf).all() and logits[..., :90].isfinite().all()
    model.loss(tokens(1, 5, high=90), tokens(1, 5, high=90))[0].backward()
    assert (model.head.weight.grad[90:] == 0).all()
    assert M.count_parameters(model) == sum(p.numel() for p in model.parameters()) - 38 * 32


# ------------------------------------------------------------------------ what is kept in float32


def share_rounded_wrongly(result, exact):
    """Of the entries of a bfloat16 result: how many are not `exact`, rounded once."""
    assert result.dtype == torch.bfloat16
    return (result != exact.bfloat16()).double().mean().item()


@torch.no_grad()
def normed_in_bfloat16():
    x = torch.randn(2, 50, 4, 64).bfloat16()
    norm = M.RMSNorm(64)
    norm.weight.fill_(1)
    return norm(x), rms_norm(x.double(), 1)


def rotated_in_bfloat16():
    x = torch.randn(2, 300, 4, 64).bfloat16()
    config = ModelConfig(n_embd=256, n_head=4)
    return M.Positions(config, 300, CPU).rotate(x), turned(x, 500_000.0)


def gated_in_bfloat16():
    u, g = torch.randn(2, 2, 50, 4, 64).bfloat16()
    return M.Gate()(u, dict(g=g)), u.double() * g.double().sigmoid()


@torch.no_grad()
def mixed_in_bfloat16():
    mix = M.Mix(ModelConfig(n_embd=256, n_head=4))
    mix.lambda_anchor.normal_()
    mix.lambda_current.normal_()
    anchor, current = torch.randn(2, 2, 50, 4, 64).bfloat16()
    gamma = torch.rand(2, 2, 50, 1, 1)
    exact = (
        gamma[0].double() * mix.lambda_anchor.double() * anchor.double()
        + gamma[1].double() * mix.lambda_current.double() * current.double()
    )
    return mix(anchor, current, gamma), exact


@pytest.mark.parametrize(
    "compute", [normed_in_bfloat16, rotated_in_bfloat16, gated_in_bfloat16, mixed_in_bfloat16]
)
def test_computed_in_float32_and_rounded_once(compute):
    """Computed in bfloat16, a quarter or more of the entries would be others."""
    with torch.autocast("cpu", torch.bfloat16):
        assert share_rounded_wrongly(*compute()) < 0.01


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_gamma_is_float32_from_its_bias_on(weights):
    """With W2 = 0 it is the sigmoid of the bias, whatever the layer's input."""
    dynamic = M.DynamicMixing(ModelConfig(**TINY, dynamic=True), "qkvg")
    for p in dynamic.parameters():
        p.normal_()
    dynamic.fc2.weight.zero_()
    dynamic.to(weights)
    with torch.autocast("cpu", torch.bfloat16):
        gamma = dynamic(torch.randn(2, 3, 32).bfloat16())
    slots = torch.stack([gamma[s][j][1, 2, 0, 0] for s in "qkvg" for j in range(2)])
    assert slots.dtype == torch.float32
    exact = dynamic.bias.double().sigmoid()
    torch.testing.assert_close(slots.double(), exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("granularity", M.GRANULARITY)
def test_gradients_of_lambdas_and_gammas_are_not_rounded_to_bfloat16(granularity, dynamic):
    """q, k, v, g are bfloat16 under autocast; the sums over them are taken in float32."""
    config = ModelConfig(**TINY, granularity=granularity)
    lambdas = [torch.randn(M.GRANULARITY[granularity](4, 8)).requires_grad_() for _ in range(2)]
    sources = torch.randn(2, 2, 30, 4, 8).bfloat16().unbind()
    upstream = torch.randn(2, 30, 4, 8).bfloat16()
    gammas = M.StaticMixing(config, "v")(sources[0])["v"]
    if dynamic:
        gammas = [torch.rand(2, 30, 1, 1).requires_grad_() for _ in range(2)]
    M.WeightedSum.apply(*sources, *lambdas, *gammas).backward(upstream)
    for source, l, gamma in zip(sources, lambdas, gammas):
        product = upstream.double() * source.double()
        exact = (product * gamma).sum_to_size(l.shape)
        torch.testing.assert_close(l.grad.double(), exact, atol=1e-4, rtol=1e-5)
        if dynamic:
            exact = (product * l).sum_to_size(gamma.shape)
            torch.testing.assert_close(gamma.grad.double(), exact, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_the_loss_of_bfloat16_logits_is_computed_in_float32():
    model = tiny()
    idx = tokens(2, 24)
    targets = tokens(2, 24, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(idx)
        cross_entropy, z = model.loss(idx, targets)
    assert logits.dtype == torch.bfloat16
    assert cross_entropy.dtype == z.dtype == torch.float32
    exact = logits.double().flatten(0, 1)
    assert abs(cross_entropy.item() - F.cross_entropy(exact, targets.flatten()).item()) < 1e-5
    assert abs(z.item() - exact.logsumexp(-1).square().mean().item()) < 1e-4
    in_float32 = model.loss(idx, targets)[0].item()
    assert 0 < abs(cross_entropy.item() - in_float32) < 0.1


@pytest.mark.parametrize("way", ["autocast", "matrices in bfloat16"])
@torch.no_grad()
def test_streams_are_bfloat16_beside_float32_lambdas(way):
    """A float32 lambda must not promote q, k, v, g, nor the residual stream."""
    model = tiny()
    seen = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, _, out, name=name: seen.update({name: out}))
    model.anchor.register_forward_pre_hook(lambda m, args: seen.update(embedded=args[0]))
    if way == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            model(tokens(2, 8))
        assert all(p.dtype == torch.float32 for p in model.parameters())
    else:
        for name, p in model.named_parameters():
            p.data = p.data.bfloat16() if p.dim() == 2 and "lambda" not in name else p.data
        model(tokens(2, 8))
    within = ["attn.mix.q", "attn.mix.g", "attn.q_norm", "attn.gate", "attn", "mlp"]
    inner = [f"layers.1.{name}" for name in within]
    for name in ["embedded", "anchor.norms.v", "layers.0", "layers.2", "final_norm", *inner]:
        assert seen[name].dtype == torch.bfloat16, name
    assert seen[""].dtype == torch.bfloat16  # the logits


# ---------------------------------------------------------------------------------- who sees whom


def every_other(config, query, key):
    """A rule that model.py does not have."""
    return (key <= query) & ((query - key) % 2 == 0)


def alibi(config, head, query, key):
    """A bias that falls with the distance, for each head at another rate."""
    return (key - query) * 2.0 ** -(head + 1)


def plant_bias(patch, bias):
    """Give every Positions this bias, as an edit of its constructor would."""
    choose_kernel = M.Positions.choose_kernel

    def choose_with_bias(positions, *args):
        positions.bias = bias
        return choose_kernel(positions, *args)

    patch.setattr(M.Positions, "choose_kernel", choose_with_bias)


SEES = {  # a rule as a function of two numbers
    "causal": lambda query, key: key <= query,
    "sliding_window": lambda query, key: query - 4 < key <= query,
    "every_other": lambda query, key: key in range(query, -1, -2),
}


@pytest.fixture(params=SEES)
def rule(request, monkeypatch):
    """(ModelConfig field that chooses a rule, the rule as a function of two numbers)."""
    if request.param == "every_other":
        monkeypatch.setattr(M, "sliding_window", every_other)
    return dict(window=0 if request.param == "causal" else 4), SEES[request.param]


@pytest.mark.parametrize("docs, cached", [(None, 0), (DOCS, 0), (None, 9)])
def test_the_mask_matches_a_loop(docs, cached, rule):
    config = ModelConfig(**TINY, **rule[0])
    cache = KVCache(config, 2, 24)
    cache.grow(24)
    positions = M.Positions(config, 24 - cached, CPU, docs, cache if cached else None)
    mask = positions.dense_mask().expand(2, 1, -1, -1)
    for b, q, k in np.ndindex(2, 24 - cached, 24):
        together = docs is None or docs[b, q] == docs[b, k]
        assert mask[b, 0, q, k] == (rule[1](q + cached, k) and together)


@pytest.mark.parametrize("way", ["plain", "documents", "cached"])
@torch.no_grad()
def test_a_token_reaches_as_far_as_the_rule_lets_it(way, rule):
    """In 3 layers: who sees it, who sees those, once more. No other's logits change by a bit."""
    model = tiny("exo_dynamic", **rule[0])
    idx = tokens(2, 24)
    docs = DOCS if way == "documents" else None
    sees = torch.zeros(2, 24, 24)
    for b, q, k in np.ndindex(sees.shape):
        sees[b, q, k] = rule[1](q, k) and (docs is None or docs[b, q] == docs[b, k])

    def logits(idx):
        if way != "cached":
            return model(idx, docs)
        cache = KVCache(model.config, 2, 24)
        cuts = ((0, 10), (10, 11), (11, 24))
        return torch.cat([model(idx[:, a:b], cache=cache) for a, b in cuts], 1)

    before = logits(idx)
    for p in range(24):
        changed = idx.where(torch.arange(24) != p, (idx + 1) % 96)
        moved = (logits(changed) != before).any(-1)
        assert torch.equal(moved, torch.linalg.matrix_power(sees, 3)[..., p] > 0)
    torch.testing.assert_close(before, model(idx, docs), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("way", ["plain", "documents", "cached"])
@torch.no_grad()
def test_a_bias_reaches_every_way_to_attend(way, monkeypatch):
    plant_bias(monkeypatch, alibi)
    config = ModelConfig(**TINY)
    docs = DOCS if way == "documents" else None
    q, k, v = torch.randn(3, 2, 24, 4, 8)
    attended = []
    cache = KVCache(config, 2, 24)
    for a, b in ((0, 10), (10, 24)) if way == "cached" else ((0, 24),):
        cache.grow(b - a)
        positions = M.Positions(config, b - a, CPU, docs, cache if way == "cached" else None)
        attended.append(positions.attend(0, q[:, a:b], k[:, a:b], v[:, a:b]))
    attended = torch.cat(attended, 1)
    for b, t, h in np.ndindex(2, 24, 4):
        seen = [j for j in range(t + 1) if docs is None or docs[b, j] == docs[b, t]]
        bias = [(j - t) * 2.0 ** -(h + 1) for j in seen]
        scores = k[b, seen, h] @ q[b, t, h] / math.sqrt(8) + torch.tensor(bias)
        expected = F.softmax(scores, 0) @ v[b, seen, h]
        torch.testing.assert_close(attended[b, t, h], expected, atol=1e-5, rtol=1e-5)


LONG = 300  # more than two of FlexAttention's blocks of 128
CUTS = torch.tensor([[250, 299], [128, 200]])  # documents end here: each row has blocks of its own
LONG_DOCS = (torch.arange(LONG) >= CUTS[..., None]).sum(1)
every_mask = pytest.mark.parametrize(
    "docs, window, bias",
    [(None, 70, None), (LONG_DOCS, 0, None), (LONG_DOCS, 70, alibi), (None, 0, alibi)],
)


@pytest.mark.parametrize(
    "compiling, device, cached, sparse",
    [
        (True, "cuda", False, True),
        (False, "cuda", False, False),
        (True, "cpu", False, False),
        (True, "cuda", True, False),
    ],
)
def test_flex_attention_is_for_compiled_training_alone(
    compiling, device, cached, sparse, monkeypatch
):
    """Eager it is slow, CPUs have no gradient of it, and a cache has fewer queries than keys."""
    config = ModelConfig(**TINY, window=4)
    cache = KVCache(config, 2, 24)
    cache.grow(24)
    positions = M.Positions(config, 24, CPU, cache=cache if cached else None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(M.Positions, "flex_kernel", lambda *args: "sparse")
    kernel = positions.choose_kernel(24, types.SimpleNamespace(type=device))
    assert (kernel == "sparse") == sparse


def attend_sparsely_and_densely(docs, window, bias):
    """(Positions with FlexAttention's kernel, Positions with the dense mask, q, k, v)."""
    config = ModelConfig(**{**TINY, "block_size": LONG, "window": window})
    with pytest.MonkeyPatch.context() as patch:
        plant_bias(patch, bias)
        dense = M.Positions(config, LONG, CPU, docs)
        sparse = M.Positions(config, LONG, CPU, docs)
        # as where the model is compiled for CUDA
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        patch.setattr(M, "create_block_mask", lambda *a, device: create_block_mask(*a, device=CPU))
        sparse.kernel = sparse.choose_kernel(LONG, types.SimpleNamespace(type="cuda"))
    return sparse, dense, torch.randn(3, 2, LONG, 4, 8)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@every_mask
@torch.no_grad()
def test_flex_attention_masks_the_same_tokens(docs, window, bias):
    """The path of compiled CUDA training, by FlexAttention's eager forward, which needs no GPU."""
    sparse, dense, (q, k, v) = attend_sparsely_and_densely(docs, window, bias)
    attended = sparse.attend(0, q, k, v)
    torch.testing.assert_close(attended, dense.attend(0, q, k, v), atol=1e-5, rtol=1e-5)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@every_mask
def test_flex_attention_visits_the_blocks_in_which_a_token_is_seen(docs, window, bias):
    """A compiled kernel skips the others; in those that it takes as full it asks for no mask."""
    sparse, dense, _ = attend_sparsely_and_densely(docs, window, bias)
    blocks = sparse.kernel.keywords["block_mask"]
    mask = dense.dense_mask().expand(2, 4, LONG, LONG)[:, 0]
    seen = mask > -math.inf if bias else mask
    assert blocks.BLOCK_SIZE == (128, 128)
    for b, i, j in np.ndindex(2, 3, 3):
        tile = seen[b, 128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
        row = b if len(blocks.kv_num_blocks) > 1 else 0
        masked = j in blocks.kv_indices[row, 0, i, : blocks.kv_num_blocks[row, 0, i]]
        full = j in blocks.full_kv_indices[row, 0, i, : blocks.full_kv_num_blocks[row, 0, i]]
        assert (masked or full) == tile.any() and (tile.all() or not full)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_flex_attention_is_dense_attention():
    """Compiled for the CPU, which has its forward alone: the code that skips blocks."""
    _, dense, (q, k, v) = attend_sparsely_and_densely(LONG_DOCS, 0, alibi)

    @torch.compile
    def attend(q, k, v, docs):
        sparse = M.Positions(dense.config, LONG, CPU, docs)
        sparse.bias = alibi
        sparse.kernel = sparse.flex_kernel(LONG, q.device)
        return sparse.attend(0, q, k, v)

    attended = attend(q, k, v, LONG_DOCS)
    torch.testing.assert_close(attended, dense.attend(0, q, k, v), atol=1e-5, rtol=1e-5)


@every_model
@torch.no_grad()
def test_cache_equals_full_forward(variant, changes):
    model = tiny(variant, **changes)
    idx = tokens(2, 30, high=model.config.vocab_size)
    cache = KVCache(model.config, 2, 30)
    cuts = ((0, 12), (12, 19), (19, 20), (20, 21), (21, 30))
    pieces = [model(idx[:, a:b], cache=cache) for a, b in cuts]
    torch.testing.assert_close(torch.cat(pieces, 1), model(idx), atol=2e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="30 tokens holds 30 and cannot take 1 more"):
        model(idx[:, :1], cache=cache)


@torch.no_grad()
def test_a_repeated_cache_continues_each_row_several_times():
    model = tiny()
    contexts = tokens(2, 9)
    endings = tokens(6, 5, seed=1)
    cache = KVCache(model.config, 2, 14)
    model(contexts, cache=cache)
    continued = model(endings, cache=cache.repeat(3))
    whole = model(torch.cat((contexts.repeat_interleave(3, 0), endings), 1))
    torch.testing.assert_close(continued, whole[:, 9:], atol=2e-4, rtol=1e-4)
    assert cache.length == 9


@torch.no_grad()
def test_a_cache_of_another_dtype_gives_keys_and_values_of_the_model_s():
    model = tiny().bfloat16()
    caches = [KVCache(model.config, 2, 9), KVCache(model.config, 2, 9, CPU, torch.bfloat16)]
    first, second = (model(tokens(2, 9), cache=cache) for cache in caches)
    assert first.dtype == torch.bfloat16 and torch.equal(first, second)


def test_what_attention_cannot_do_is_refused():
    model = tiny()
    model(tokens(1, 40))
    with pytest.raises(ValueError, match="41 tokens are more than block_size=40"):
        model(tokens(1, 41))
    cache = KVCache(model.config, 2, 60)
    model(tokens(2, 24), cache=cache)
    with pytest.raises(ValueError, match="docs with a cache"):
        model(tokens(2, 16), docs=torch.zeros(2, 16), cache=cache)
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, tokens(4, 0), 3)


# ------------------------------------------------------------------------------------- generation


def test_generate_is_greedy_at_temperature_0_and_slides_past_block_size():
    """Each token is the argmax of a plain forward of the last block_size tokens."""
    model = tiny("exo_dynamic", block_size=12)
    out = generate(model, tokens(3, 5), 14, temperature=0)
    for t in range(5, 19):
        expected = model(out[:, max(0, t - 12) : t])[:, -1].argmax(-1)
        assert torch.equal(out[:, t], expected)
    expected = model(tokens(1, 20)[:, -12:])[:, -1].argmax(-1)
    assert torch.equal(generate(model, tokens(1, 20), 1, temperature=0)[:, -1], expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_generated_token_costs_one_token_up_to_block_size(autocast, monkeypatch):
    model = tiny(block_size=12)
    trunk = model.trunk
    read = []
    dtypes = set()

    def counted(idx, cache):
        read.append(idx.size(1))
        dtypes.add(cache.k.dtype)
        return trunk(idx, cache=cache)

    monkeypatch.setattr(model, "trunk", counted)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        generate(model, tokens(3, 5), 10)
    assert read == [5] + 7 * [1] + 2 * [12]
    assert dtypes == {torch.bfloat16 if autocast else torch.float32}


def test_generation_ends_when_all_rows_have_ended_which_are_filled_up(monkeypatch):
    """Rows end at their 2nd, 4th and 1st new token; what is drawn for them later is not used."""
    drawn_for = torch.tensor([[3, 7, 5, 6, 8], [1, 2, 3, 7, 9], [7, 1, 1, 1, 1]])
    columns = iter(drawn_for.T[..., None])
    monkeypatch.setattr(M, "sample", lambda *args: next(columns))
    idx = tokens(3, 4)
    out = generate(tiny(), idx, 5, stop_token=7)
    assert torch.equal(out[:, :4], idx)
    assert out[:, 4:].tolist() == [[3, 7, 7, 7], [1, 2, 3, 7], [7, 7, 7, 7]]
    columns = iter(drawn_for.T[..., None])
    assert torch.equal(generate(tiny(), idx, 5)[:, 4:], drawn_for)


def test_generation_repeats_with_its_seed():
    model = tiny("gated")
    idx = tokens(4, 3)

    def draw(seed, **settings):
        generator = torch.Generator().manual_seed(seed)
        return generate(model, idx, 20, generator=generator, **settings)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(5, top_k=1), generate(model, idx, 20, temperature=0))


def test_sampling_follows_the_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -math.inf]]).expand(20_000, -1)

    def draw(*settings):
        return M.sample(logits, *settings, torch.Generator().manual_seed(0))[:, 0]

    counts = torch.bincount(draw(0.7, None), minlength=5) / 20_000
    torch.testing.assert_close(counts, F.softmax(logits[0] / 0.7, -1), atol=0.015, rtol=0)
    assert set(draw(1.0, 2).tolist()) == {0, 1}
    assert set(draw(1.0, 99).tolist()) == {0, 1, 2, 3}


def test_weights_that_are_not_finite_are_refused_in_one_line_when_sampling():
    model = tiny("exo")
    with torch.no_grad():
        model.head.weight[3, 5] = math.nan
    with pytest.raises(InputError, match="logits are not finite"):
        generate(model, tokens(1, 4), 3)


class Letters:
    """A tokenizer whose tokens 0 to 25 are letters and 95 the end of a text; the rest are dots."""

    eot = 95

    def encode(self, text):
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids):
        return "".join(chr(ord("a") + i) if i < 26 else "|" if i == 95 else "." for i in ids)


def test_an_empty_prompt_starts_a_document_and_one_that_cannot_be_read_is_refused():
    model = tiny()
    new = generate(model, torch.tensor([[95]]), 9, temperature=0)[0, 1:]
    expected = Letters().decode([i for i in new.tolist() if i != 95])
    assert M.continue_text(model, Letters(), "", 9, temperature=0) == [expected]
    assert M.continue_text(model, Letters(), "\xc0", 3)  # token 95
    with pytest.raises(InputError, match="token 96, but the model knows vocab_size=96"):
        M.continue_text(model, Letters(), "\xc1", 3)


def test_a_text_is_continued_as_by_hand_and_its_end_is_not_shown():
    model = tiny()
    logits = torch.full((96,), -9.0)
    logits[:26] = torch.linspace(0, 1, 26)
    logits[95] = 0.99
    model.logits = lambda hidden: logits.expand(len(hidden), -1)
    texts = M.continue_text(model, Letters(), "ab", 30, 4, temperature=1.5, top_k=7, seed=3)
    generator = torch.Generator().manual_seed(3)
    start = torch.tensor(4 * [[0, 1]])
    out = generate(model, start, 30, 1.5, 7, 95, generator)
    assert (out == 95).any(1).all() and len(set(texts)) > 1
    assert texts == [Letters().decode(row[: row.index(95)]) for row in out.tolist()]


SAMPLING_LIMITS = {  # flag: (lowest, highest, just below, just above, default)
    "max_new_tokens": ("1", "1000000", "0", "1000001", 200),
    "num_samples": ("1", "10000", "0", "10001", 1),
    "temperature": ("0", "1000", "-1", "1001", 0.8),
    "top_k": ("1", "1000000", "0", "1000001", 50),
    "seed": ("0", str(2**63 - 1), "-1", str(2**63), 1337),
}


def parsed(monkeypatch, *argv):
    """What model.py makes of a command line; None if it refuses it with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["model.py", *argv])
    try:
        return vars(M.parse_arguments())
    except SystemExit as error:
        assert error.code == 2
        return None


@pytest.mark.parametrize("flag", SAMPLING_LIMITS)
def test_both_sides_of_the_limits_of_flags(flag, monkeypatch, capsys):
    low, high, below, above, default = SAMPLING_LIMITS[flag]
    for value in (low, high):
        assert parsed(monkeypatch, f"--{flag}={value}")[flag] == type(default)(value)
    for value in (below, above, "nan", "x"):
        assert parsed(monkeypatch, f"--{flag}={value}") is None
        assert flag in capsys.readouterr().err
    assert parsed(monkeypatch)[flag] == default


def test_further_rules_of_the_command_line(monkeypatch):
    assert parsed(monkeypatch, "--temperature=0.001")["temperature"] == 0.001
    assert parsed(monkeypatch, "--temperature=0.0009") is None
    assert parsed(monkeypatch, "--prompt=x") is None  # no model to continue it
    assert parsed(monkeypatch, "--top=5") is None  # nor is a shortened flag understood
    given = parsed(monkeypatch, "--ckpt=a", "--prompt=x", "--device=cpu")
    assert (given["ckpt"], given["prompt"], given["device"]) == ("a", "x", "cpu")


def run_main(monkeypatch, *argv):
    """The exit code of python model.py with these arguments."""
    monkeypatch.setattr(sys, "argv", ["model.py", *map(str, argv)])
    try:
        return M.main()
    except SystemExit as error:
        return error.code


def test_the_command_line_samples_what_its_flags_say(tmp_path, monkeypatch, capsys):
    """With weights that make each of the flags count."""
    model = tiny("exo", vocab_size=257, tokenizer="bytes")
    path = saved(model, tmp_path / "c.pt")
    flags = dict(max_new_tokens=9, num_samples=3, temperature=1.4, top_k=11, seed=5)
    argv = [f"--{flag}={value}" for flag, value in flags.items()]
    assert not run_main(monkeypatch, f"--ckpt={path}", "--prompt=ab", "--device=cpu", *argv)
    expected = M.continue_text(model, pf.get_tokenizer("bytes"), "ab", **flags)
    assert capsys.readouterr().out == "".join(f"{text}\n---\n" for text in expected)
    for flag, other in dict(max_new_tokens=8, temperature=0.7, top_k=5, seed=6).items():
        texts = M.continue_text(model, pf.get_tokenizer("bytes"), "ab", **{**flags, flag: other})
        assert texts != expected
    assert "no such checkpoint" in run_main(monkeypatch, f"--ckpt={tmp_path / 'absent.pt'}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused = run_main(monkeypatch, f"--ckpt={path}", "--device=cuda")
    assert "--device=cuda is not there" in refused


def test_the_device_is_the_first_there_is_or_the_one_named(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert M.choose_device("auto") == M.choose_device("cpu") == "cpu"
    with pytest.raises(InputError, match="--device=cuda is not there: torch can use cpu"):
        M.choose_device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert M.choose_device("auto") == "mps" and M.choose_device("auto", ("cuda", "cpu")) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert M.choose_device("auto") == M.choose_device("cuda") == "cuda"


# --------------------------------------------------------------------------------------- settings


def longest_input(model):
    """The largest number of tokens that a forward pass takes."""
    for length in range(1, 99):
        try:
            M.Positions(model.config, length, CPU)
        except ValueError:
            return length - 1


def tokenizer_of_samples(model):
    """The tokenizer that `python model.py --ckpt` asks for."""
    asked = []
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()):
        patch.setattr(M, "load_checkpoint", lambda path, device: model)
        patch.setattr(pf, "get_tokenizer", lambda name: asked.append(name) or Letters())
        assert not run_main(patch, "--ckpt=any", "--device=cpu", "--max_new_tokens=1")
    return asked


def norms_of(block):
    """The names of a block's RMSNorms."""
    return [name for name, part in block.named_children() if isinstance(part, M.RMSNorm)]


def tokens_seen(model):
    """How many tokens each of the first five sees."""
    return M.Positions(model.config, 5, CPU).dense_mask().view(5, 5).sum(1).tolist()


def first_lambdas(model):
    """The values that the lambdas of a new model of this kind begin with."""
    new = ExoFormer(model.config).named_parameters()
    return {round(x, 5) for name, p in new if "lambda_" in name for x in p.flatten().tolist()}


# What each field of ModelConfig governs in a model, and what is there for several of its values.
# fmt: off
EFFECTS = {
    "n_layer": (lambda model: len(model.layers), {1: 1, 3: 3}),
    "n_head": (lambda model: model.layers[1].attn.q_norm.weight.numel(), {4: 8, 2: 16}),
    "n_embd": (lambda model: model.embed.weight.size(1), {32: 32, 64: 64}),
    "ffn_dim": (lambda model: (len(model.layers[1].mlp.up.weight),
                               model.layers[1].mlp.down.weight.size(1)),
                {0: (128, 64), 2: (2, 1), 48: (48, 24)}),
    "vocab_size": (lambda model: (len(model.embed.weight), len(model.head.weight)),
                   {1: (1, 64), 64: (64, 64), 65: (65, 128), 129: (129, 192)}),
    "block_size": (longest_input, {24: 24, 40: 40}),
    "gate": (lambda model: len(model.layers[1].attn.project.weight), {False: 96, True: 128}),
    "anchor": (lambda model: [len(p) for name, p in model.anchor.named_parameters()],
               {"none": [], "internal": [8, 8, 8, 8], "exogenous": [8, 8, 8, 8, 128]}),
    "mix": (lambda model: "".join(model.layers[1].attn.mix),
            {"": "", "v": "v", "kq": "qk", "qkvg": "qkvg"}),
    "anchor_norm": (lambda model: "".join(sorted(norms_of(model.anchor.norms))),
                    {"": "", "v": "v", "gk": "gk", "qkvg": "gkqv"}),
    "granularity": (lambda model: tuple(model.layers[1].attn.mix["k"].lambda_current.shape),
                    {"scalar": (1, 1), "headwise": (4, 1), "elementwise": (4, 8)}),
    "dynamic": (lambda model: sum(p.numel() for p in model.layers[1].attn.gammas.parameters()),
                {False: 0, True: 32 * 16 + 16 * 8 + 8}),
    "dynamic_dim": (lambda model: tuple(model.layers[1].attn.gammas.fc1.weight.shape),
                    {16: (16, 32), 5: (5, 32)}),
    "lambda_init": (first_lambdas, {None: {1.0}, 0.3: {0.3}, 0.0: {0.0}, -2: {-2.0}}),
    "qk_norm": (lambda model: norms_of(model.layers[1].attn),
                {False: [], True: ["q_norm", "k_norm"]}),
    "norm_position": (lambda model: norms_of(model.layers[1]),
                      {"pre": ["attn_norm", "mlp_norm"],
                       "after": ["attn_post_norm", "mlp_post_norm"],
                       "both": ["attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm"]}),
    "window": (tokens_seen, {0: [1, 2, 3, 4, 5], 1: [1, 1, 1, 1, 1], 3: [1, 2, 3, 3, 3]}),
    "rope_theta": (lambda model: round(M.Positions(model.config, 5, CPU).cos[4, 0, 1].item(), 5),
                   {500_000.0: round(math.cos(4 / 500_000 ** 0.25), 5),
                    81.0: round(math.cos(4 / 3), 5)}),
    "tokenizer": (tokenizer_of_samples, {"gpt2": ["gpt2"], "bytes": ["bytes"]}),
}
# fmt: on


@pytest.mark.parametrize("name", [f.name for f in fields(ModelConfig)])
@torch.no_grad()
def test_every_setting_of_the_model_has_its_effect(name):
    """On a part of the model, and on its logits as the equations have them."""
    assert name in EFFECTS, f"say in EFFECTS what the setting {name} does"
    what_it_governs, expected = EFFECTS[name]
    choices = ModelConfig.__dataclass_fields__[name].metadata["choices"] or ()
    assert len(expected) > 1 and set(choices) <= set(expected)
    for value, seen in expected.items():
        model = tiny("exo_dynamic", **{name: value})
        assert what_it_governs(model) == seen, value
        assert vars(model.config)[name] == value
        idx = tokens(2, 24, high=model.config.vocab_size)
        logits = model(idx)[..., : model.config.vocab_size].double()
        torch.testing.assert_close(logits, by_hand(model, idx), atol=2e-4, rtol=1e-4)


SIZES = "n_layer n_head n_embd vocab_size block_size dynamic_dim".split()
LIMITS = {  # numeric field: (lowest, highest)
    **dict.fromkeys(SIZES, (1, 2**20)),
    "ffn_dim": (0, 2**20),
    "window": (0, 2**20),
    "rope_theta": (1.0, 1e12),
    "lambda_init": (-1e12, 1e12),
}


def refusal(**changes):
    """The message of ModelConfig for these settings, or "" if it takes them."""
    try:
        ModelConfig(**{**TINY, **changes})
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("f", fields(ModelConfig), ids=lambda f: f.name)
def test_both_sides_of_every_limit(f):
    numeric = f.type in (int, float, float | None)
    assert numeric == (f.name in LIMITS)
    if numeric:
        low, high = LIMITS[f.name]
        outside = [low - 1, high + 1]
        if f.type is not int:
            outside = [math.nextafter(low, -math.inf), math.nextafter(high, math.inf), math.nan]
        for value in (low, high):
            assert "must be a number" not in refusal(**{f.name: value})
        for value in outside:
            message = f"{f.name}={value!r} must be a number from {low:g} to {high:g}"
            assert refusal(**{f.name: value}) == message
    wrong = 7 if f.type is str else "7"
    assert refusal(**{f.name: wrong}).startswith(f"{f.name}={wrong!r} must be ")


def test_the_kind_of_a_setting_is_checked():
    assert refusal(lambda_init=None) == refusal(rope_theta=1) == refusal(lambda_init=1) == ""
    for wrong in (dict(n_layer=2.0), dict(n_layer=None), dict(gate=1), dict(mix=None)):
        [(name, value)] = wrong.items()
        assert refusal(**wrong).startswith(f"{name}={value!r} must be ")


@pytest.mark.parametrize(
    "wrong, words, right",
    [
        (dict(n_embd=33), "n_embd=33.*n_head=4", dict(n_embd=24)),
        (dict(n_embd=36), "head_dim=9.*odd", dict(n_embd=8)),
        (dict(ffn_dim=7), "ffn_dim=7", dict(ffn_dim=6)),
        (dict(mix="qx", anchor_norm=""), "mix='qx'", dict(mix="vq", anchor_norm="")),
        (dict(anchor_norm="qq"), "anchor_norm='qq'", dict(anchor_norm="gq")),
        (dict(mix="v"), "anchor_norm='qkvg'.*mix='v'", dict(mix="v", anchor_norm="v")),
        (dict(gate=False), "mix='qkvg'.*gate=False", dict(gate=False, mix="v", anchor_norm="v")),
        (dict(anchor="outer"), "anchor='outer'.*none, internal, exogenous", {}),
        (dict(granularity="layer"), "='layer'.*scalar, headwise, elementwise", {}),
        (dict(norm_position="mid"), "norm_position='mid'.*pre, after, both", {}),
        (
            dict(anchor="none"),
            "mix='qkvg'.*anchor='none'",
            dict(anchor="none", mix="", anchor_norm=""),
        ),
        (
            dict(anchor="none", mix="", anchor_norm="", dynamic=True),
            "dynamic=True.*anchor='none'",
            dict(anchor="internal", dynamic=True),
        ),
        (
            dict(mix="", anchor_norm=""),
            "anchor='exogenous'.*mix=''",
            dict(mix="g", anchor_norm=""),
        ),
        (
            dict(anchor="internal", n_layer=1),
            "anchor='internal'.*n_layer=1",
            dict(anchor="internal", n_layer=2),
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_named(wrong, words, right):
    """And their nearest neighbours are taken."""
    assert re.search(words, refusal(**wrong)) and "\n" not in refusal(**wrong)
    assert refusal(**right) == ""


# --------------------------------------------------------------------------------------- variants

# Table 3 as it is printed, and the number of parameters of the rows for which it is known exactly.
# fmt: off
TABLE = """
variant                     gate anchor    mixed norm lambda      dyn n  M   ppl   acc   exact
base                        no   none      -     -    -           no  32 454 14.79 48.14 453581824
gated                       yes  none      -     -    -           no  29 453 14.64 48.80 452526720
resformer                   no   internal  v     -    elementwise no  32 454 14.32 49.65 453645312
naive                       yes  internal  v     -    elementwise no  29 453 14.25 49.09 452584064
nuresformer_qknorm          yes  internal  qkvg  qk   elementwise no  29 453 14.21 48.91 -
nuresformer_qknorm_headwise yes  internal  qkvg  qk   headwise    no  29 453 14.21 49.68 -
nuresformer_qknorm_scalar   yes  internal  qkvg  qk   scalar      no  29 453 14.22 49.83 -
nuresformer_vg              yes  internal  vg    -    elementwise no  29 453 14.24 49.20 -
nuresformer_vg_headwise     yes  internal  vg    -    headwise    no  29 453 14.22 49.11 -
nuresformer_vg_scalar       yes  internal  vg    -    scalar      no  29 453 14.24 49.28 -
nuresformer                 yes  internal  qkvg  qkvg elementwise no  29 453 14.15 49.68 -
nuresformer_headwise        yes  internal  qkvg  qkvg headwise    no  29 453 14.17 49.42 -
nuresformer_scalar          yes  internal  qkvg  qkvg scalar      no  29 453 14.17 49.11 -
exo_nonorm                  yes  exogenous qkvg  -    elementwise no  29 457 14.30 49.69 456958592
exo_dynamic                 yes  exogenous qkvg  qkvg elementwise yes 29 457 14.09 50.27 457437928
exo                         yes  exogenous qkvg  qkvg elementwise no  29 457 14.13 49.85 456958848
exo_headwise                yes  exogenous qkvg  qkvg headwise    no  29 457 14.14 49.23 456724992
exo_scalar                  yes  exogenous qkvg  qkvg scalar      no  29 457 14.15 49.16 456721512
"""
# fmt: on
COLUMNS, *LINES = [line.split() for line in TABLE.strip().splitlines()]
ROWS = {line[0]: dict(zip(COLUMNS, line)) for line in LINES}
every_row = pytest.mark.parametrize("variant", ROWS)
PAPER_SIZE = dict(
    n_head=16, n_embd=1024, ffn_dim=0, vocab_size=57601, block_size=2048, rope_theta=500_000.0
)
NOT_IN_TABLE_3 = dict(
    dynamic_dim=16,
    lambda_init=None,
    qk_norm=True,
    norm_position="pre",
    window=0,
    tokenizer="gpt2",
)


def axes_of(row):
    """The settings of a row of the table."""
    return dict(
        gate=row["gate"] == "yes",
        anchor=row["anchor"],
        mix=row["mixed"].strip("-"),
        anchor_norm=row["norm"].strip("-"),
        granularity="elementwise" if row["lambda"] == "-" else row["lambda"],
        dynamic=row["dyn"] == "yes",
        n_layer=int(row["n"]),
    )


def matrix_entries_by_hand(row):
    """Entries of the matrices at the paper's size, without embedding and head: C = 1024."""
    gate = row["gate"] == "yes"
    attention = (4 if gate else 3) * 1024**2 + 1024**2
    swiglu = 1024 * 4096 + 2048 * 1024
    dynamic = 1024 * 16 + 16 * 8 if row["dyn"] == "yes" else 0
    anchors = len(row["mixed"]) * 1024**2 if row["anchor"] == "exogenous" else 0
    return int(row["n"]) * (attention + swiglu + dynamic) + anchors


def parameters_by_hand(row):
    """At the paper's size: 16 heads of 64 channels, 57,601 tokens, embedding and head apart."""
    layers = int(row["n"])
    mixed = row["mixed"].strip("-")
    mixing_layers = layers - 1 if row["anchor"] == "internal" else layers
    a_lambda = {"-": 0, "scalar": 1, "headwise": 16, "elementwise": 16 * 64}[row["lambda"]]
    lambdas = mixing_layers * 2 * len(mixed) * a_lambda
    biases = layers * 2 * len(mixed) if row["dyn"] == "yes" else 0
    gains = layers * (2 * 1024 + 2 * 64) + 1024 + len(row["norm"].strip("-")) * 64
    return matrix_entries_by_hand(row) + 2 * 57601 * 1024 + lambdas + biases + gains


@every_row
def test_the_axes_of_a_variant_are_those_of_its_row_in_table_3(variant):
    expected = {**PAPER_SIZE, **NOT_IN_TABLE_3, **axes_of(ROWS[variant])}
    assert vars(variant_config(variant)) == expected
    assert vars(ModelConfig()) == {**PAPER_SIZE, **NOT_IN_TABLE_3, **axes_of(ROWS["exo"])}


@pytest.fixture(scope="module")
def printed():
    """{variant: the columns that `python model.py` prints}, with one row of our own."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out:
        patch.setitem(VARIANTS, "mine", dict(VARIANTS["gated"], n_layer=1))
        assert not run_main(patch)
    return {line.split()[0]: line.split()[1:] for line in out.getvalue().splitlines()}


@every_row
def test_table_3_parameter_counts(variant, printed):
    """Printed beside the paper's millions and perplexity, with FLOPs at 2048 tokens."""
    row = ROWS[variant]
    parameters = parameters_by_hand(row)
    assert row["exact"] in ("-", str(parameters)) and round(parameters / 1e6) == int(row["M"])
    head = 57664 * 1024  # padded to a multiple of 64 rows
    matrices = matrix_entries_by_hand(row) + head
    flops = 6 * matrices + 12 * int(row["n"]) * 1024 * 2048
    assert printed[variant] == [
        row["n"],
        f"{parameters:,}",
        f"{parameters / 1e6:.1f}",
        row["M"],
        f"{flops / 1e9:.3f}",
        f"{float(row['ppl'])}",
    ]
    assert M.TABLE_3[variant] == (int(row["M"]), float(row["ppl"]), float(row["acc"]))


def test_a_variant_of_one_s_own_is_listed_and_the_paper_s_are_18(printed):
    assert len(M.TABLE_3) == len(ROWS) == 18
    assert printed["mine"][0] == "1" and printed["mine"][3::2] == ["-", "-"]


@every_row
def test_a_configuration_tells_its_row(variant):
    """Whatever its sizes; one that differs from all rows in an axis is nobody's."""
    assert M.variant_name(variant_config(variant, n_layer=3, n_embd=64)) == variant
    others = [dict(norm_position="after"), dict(qk_norm=False), dict(window=8)]
    if ROWS[variant]["anchor"] == "none":
        assert M.variant_name(variant_config(variant, granularity="scalar")) == variant
    else:
        others.append(dict(mix="k", anchor_norm=""))
    for other in others:
        assert M.variant_name(variant_config(variant, **other)) == "custom"


def test_a_field_of_ones_own_is_an_axis():
    """Also where its author did not think of the names."""

    @dataclass(frozen=True)
    class Config(ModelConfig):
        n_kv_head: int = M.size(0, "heads of keys and values; 0: n_head", low=0)

    assert M.variant_name(Config()) == "exo"
    assert M.variant_name(Config(n_kv_head=2)) == "custom"


# fmt: off
OVERRIDES = dict(
    gate=(True, False), anchor=("none", "internal", "exogenous"), mix=("", "v", "qk", "qkvg"),
    anchor_norm=("", "v", "qkvg"), granularity=("scalar", "headwise", "elementwise"),
    dynamic=(True, False), qk_norm=(False,), norm_position=("after", "both"), window=(3,),
    lambda_init=(0.3,),
)
NEEDS = {  # whether a row of Table 3 has what a flag needs
    "mix": lambda value, row: (
        value == "" or row["anchor"] != "none" and (row["gate"] or "g" not in value)),
    "anchor": lambda value, row: value == "none" or row["mix"] != "",
    "dynamic": lambda value, row: not value or row["anchor"] != "none",
    "anchor_norm": lambda value, row: set(value) <= set(row["mix"]),
}
MAY_FOLLOW = {  # what else may change with a flag
    "gate": {"mix", "anchor", "anchor_norm", "dynamic"},
    "anchor": {"mix", "anchor_norm", "dynamic"},
    "mix": {"anchor", "anchor_norm", "dynamic"},
}
# fmt: on


@every_variant
def test_a_single_flag_fits_its_row_or_says_what_it_needs(variant):
    row = {**vars(variant_config(variant)), **TINY}
    for name, value in [(name, value) for name in OVERRIDES for value in OVERRIDES[name]]:
        if name not in NEEDS or NEEDS[name](value, row):
            config = vars(variant_config(variant, **TINY, **{name: value}))
            changed = {other for other in config if config[other] != row[other]}
            assert config[name] == value
            assert changed <= {name, *MAY_FOLLOW.get(name, ())}
        else:
            with pytest.raises(InputError, match=f"{name}={value!r}.*(gate|anchor|mix)="):
                variant_config(variant, **TINY, **{name: value})


@pytest.mark.parametrize(
    "given, follows",
    [
        (
            dict(gate=False, mix="qk"),
            dict(anchor="exogenous", mix="qk", anchor_norm="qk", dynamic=True),
        ),
        (
            dict(gate=False),
            dict(anchor="exogenous", mix="qkv", anchor_norm="qkv", dynamic=True),
        ),
        (
            dict(mix="gv", anchor_norm="g"),
            dict(anchor="exogenous", mix="gv", anchor_norm="g", dynamic=True),
        ),
        (dict(mix=""), dict(anchor="none", anchor_norm="", dynamic=False)),
        (dict(anchor="none"), dict(mix="", anchor_norm="", dynamic=False)),
    ],
)
def test_what_is_given_narrows_what_follows_from_it(given, follows):
    config = vars(variant_config("exo_dynamic", **given))
    assert {name: config[name] for name in follows} == follows


def test_only_the_last_matrix_of_a_sub_layer_starts_at_zero():
    """Not every one called `down`: two zeros in a row would never learn."""

    class LowRank(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.down = M.Linear(32, 4)
            self.up = M.Linear(4, 32)

    model = tiny("exo_dynamic")
    model.layers[0].attn.extra = LowRank()
    model.init_weights()
    zero = {name for name, p in model.named_parameters() if not p.any()}
    ends = ("attn.gammas.bias", "attn.gammas.fc2.weight", "attn.out_proj.weight", "mlp.down.weight")
    layers = range(len(model.layers))
    assert zero == {f"layers.{n}.{end}" for n in layers for end in ends} | {"head.weight"}


def test_a_lambda_of_more_heads_than_the_projection_has_is_an_error():
    """As with keys of one head for all queries: broadcasting would make them many again."""
    config = ModelConfig(**TINY)
    mix = M.Mix(config)
    s = torch.randn(2, 5, 1, config.head_dim)
    ones = torch.ones(2, 1).unbind()
    with pytest.raises(AssertionError, match="more heads than the projection"):
        mix(s, s, ones)


@every_variant
def test_every_parameter_gets_gradient(variant):
    model = tiny(variant)
    model.loss(tokens(2, 24), tokens(2, 24, seed=1))[0].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_a_parameter_without_a_rule_in_init_weights_is_an_error_that_names_it(monkeypatch):
    class TwoAnchors(M.ExogenousAnchor):
        def __init__(self, config):
            super().__init__(config)
            self.shares = torch.nn.Parameter(torch.tensor([2.0, 0.0]))

    monkeypatch.setitem(M.ANCHORS, "exogenous", TwoAnchors)
    with pytest.raises(ValueError, match="no rule for parameter anchor.shares"):
        ExoFormer(ModelConfig(**TINY))


@every_variant
def test_init_is_total_and_as_the_paper_says(variant):
    """NaN before it. Matrices: std 0.02 cut at 3; what closes a sub-layer, W2, b, the head: 0."""
    model = ExoFormer(variant_config(variant, **{**TINY, "n_embd": 64}))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    model.init_weights()
    for name, p in model.named_parameters():
        if "lambda" in name:
            assert (p == (1.0 if model.config.dynamic else 0.5)).all(), name
        elif any(part in name for part in ("out_proj", "down", "head", "fc2", "bias")):
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            assert 0.018 < p.std() < 0.021 and 0.04 < p.abs().max() <= 0.06, name
            assert abs(p.mean()) < 0.002, name


def test_stacked_matrices_say_their_heights():
    model = tiny("exo_dynamic", mix="qv", anchor_norm="")
    attn = model.layers[1].attn
    assert attn.project.heights == (32, 32, 32, 32) and attn.out_proj.heights == (32,)
    assert model.layers[1].mlp.up.heights == (64, 64) and model.layers[1].mlp.down.heights == (32,)
    assert model.anchor.project.heights == (32, 32)
    assert attn.gammas.fc1.heights == (16,) and attn.gammas.fc2.heights == (4,)


@pytest.mark.parametrize("variant", ["base", "exo_dynamic"])
def test_flops_per_token_match_a_count_of_matrix_products(variant):
    model = tiny(variant, vocab_size=64)
    with FlopCounterMode(display=False) as counter:
        model(tokens(2, 40, high=64)).sum().backward()
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    dense = sum(n for op, n in counted.items() if op in ("aten.mm", "aten.addmm"))
    # the input of the first products needs its gradient too, so nothing is missing from 3 x forward
    assert M.flops_per_token(model, 40) == dense / 80 + 12 * 3 * 32 * 40
    assert M.flops_per_token(model, 20) == dense / 80 + 12 * 3 * 32 * 20


# ------------------------------------------------------------------------------ the released code

GOLDEN = json.loads((TESTDATA / "author_golden.json").read_text(encoding="utf-8"))


def drawn(seed, key, shape):
    """The rule by which a golden tensor is rebuilt on any machine."""
    u = np.random.Generator(np.random.PCG64([seed, zlib.crc32(key.encode())])).random(shape)
    name = key.removeprefix("probe.")
    scaled = 0.6 * (u - 0.5)
    if ".lambda_" in name:
        scaled = -0.2 + 1.4 * u
    elif name.endswith("norm.weight"):
        scaled = 0.5 + u
    elif name.endswith("bias"):
        scaled = 2 * (u - 0.5)
    return torch.tensor(scaled, dtype=torch.float32)


def released(name):
    """(golden record, state dict in the released code's names, our model built from it)."""
    golden = GOLDEN[name]
    state = {key: drawn(golden["seed"], key, shape) for key, shape in golden["state_dict"].items()}
    ambiguous = "qk" if name == "x_nures_qknormed_elementwise" else None
    return golden, state, ExoFormer.from_released(state, anchor_norm=ambiguous, block_size=64)


@pytest.mark.parametrize("name", GOLDEN)
def test_released_code_logits(name):
    golden, _, model = released(name)
    idx = torch.tensor(golden["idx"])
    logits = model(idx)[:, golden["logits_positions"]][:, :, golden["logits_vocab"]]
    torch.testing.assert_close(logits, torch.tensor(golden["logits"]), atol=2e-5, rtol=0)
    cross_entropy, z = model.loss(idx, torch.tensor(golden["targets"]))
    assert abs(cross_entropy.item() - golden["ce"]) < 2e-5
    assert abs(z.item() - golden["z"]) < 2e-4
    assert not model.training


@pytest.mark.parametrize("name", GOLDEN)
def test_released_code_gradients(name):
    """Loading is linear in each tensor: going back through it gives the released one's gradient."""
    golden, state, model = released(name)
    leaves = {key: tensor.requires_grad_() for key, tensor in state.items()}
    filled = M.translate_released(leaves, dict(model.state_dict()), model.config)
    logits = torch.func.functional_call(model, filled, (torch.tensor(golden["idx"]),))
    lse = logits.logsumexp(-1)
    targets = torch.tensor(golden["targets"]).flatten()
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets)
    (cross_entropy + 1e-5 * lse.square().mean()).backward()
    for key, (norm, dot) in golden["grads"].items():
        grad = torch.zeros_like(leaves[key]) if leaves[key].grad is None else leaves[key].grad
        probe = drawn(golden["seed"], f"probe.{key}", golden["state_dict"][key])
        assert abs(grad.norm().item() - norm) <= 1e-4 * norm + 1e-9, key
        projected = (grad * probe).sum().item()
        assert abs(projected - dot) <= 1e-4 * norm * probe.norm().item() + 1e-9, key


def without(state, pattern):
    """A state dict without the tensors whose names match."""
    return {key: tensor for key, tensor in state.items() if not re.search(pattern, key)}


# fmt: off
FOREIGN = [  # how a state dict differs from exo_dynamic's, and what is said of it
    (lambda state: without(state, "layers.1.mlp.fc2"), "lacks transformer.layers.1.mlp.fc2.weight"),
    (lambda state: without(state, "layers.0.mlp.fc1"), "lacks transformer.layers.0.mlp.fc1.weight"),
    (lambda state: without(state, "layers.2.attn.c_attn"), "lacks .*2.attn.c_attn.weight"),
    (lambda state: without(state, "wte"), "not a checkpoint of the released code.*wte.weight"),
    (lambda state: without(state, "layers.2.attn.[qk]_norm"), "holds 4 tensors .*[01].attn.q_norm"),
    (lambda state: {**state, "transformer.smear_gate.weight": torch.zeros(3)}, "smear_gate"),
    (lambda state: {**state, "transformer.layers.1.attn.c_proj.weight": torch.zeros(32, 31)},
     r"c_proj.weight has shape \(32, 31\), expected \(32, 32\)"),
    (lambda state: {**state, "transformer.layers.1.mlp.fc2.weight":
                    state["transformer.layers.1.mlp.fc2.weight"].T}, "fc2.weight has shape"),
    (lambda state: {**state, "transformer.layers.1.attn.lambda_q1": torch.zeros(3)},
     r"lambda_q1 has shape \(3,\)"),
]
# fmt: on


@pytest.mark.parametrize("change, words", FOREIGN)
def test_released_names_are_strict(change, words):
    """No tensor is missing, none is left over, each has the shape of its place."""
    state = released("exo_dynamic_elementwise")[1]
    with pytest.raises(InputError, match=words) as error:
        ExoFormer.from_released(change(state))
    assert "\n" not in str(error.value)


def test_released_prefix_and_old_norm_names_load_alike():
    golden, state, model = released("nures_full_elementwise")
    renamed = {
        f"_orig_mod.{key}".replace("v_norm", "v_res_norm").replace("g_norm", "g_res_norm"): tensor
        for key, tensor in state.items()
    }
    idx = torch.tensor(golden["idx"])
    assert torch.equal(ExoFormer.from_released(renamed, block_size=64)(idx), model(idx))


def test_released_file_that_cannot_tell_says_so(capsys):
    golden, state, normed = released("x_nures_qknormed_elementwise")
    assert ExoFormer.from_released(state).config.anchor_norm == "qk"
    assert "anchor_norm" in capsys.readouterr().out
    plain = ExoFormer.from_released(state, anchor_norm="")
    assert plain.config.anchor_norm == "" and capsys.readouterr().out == ""
    idx = torch.tensor(golden["idx"])
    assert not torch.allclose(plain(idx)[..., :96], normed(idx)[..., :96], atol=1e-3)
    for asked in ("qkvg", "v"):
        with pytest.raises(InputError, match=f"anchor_norm='{asked}' must be '' or 'qk'"):
            ExoFormer.from_released(state, anchor_norm=asked)
    with pytest.raises(InputError, match="anchor_norm='qk'.*'qkvg'"):
        ExoFormer.from_released(released("exo_elementwise")[1], anchor_norm="qk")


def test_what_model_args_say_is_followed_and_what_is_given_goes_before_it():
    """Of the settings that leave no trace in the keys; the rest cannot be trusted."""
    golden, state, _ = released("exo_elementwise")
    told = dict(block_size=48, rope_theta=100.0, n_head=2, n_layer=7, gate=False, norm_pos="before")
    model = ExoFormer.from_released(dict(model=state, model_args=told))
    assert model.config == ModelConfig(**{**TINY, "block_size": 48}, rope_theta=100.0)
    idx = torch.tensor(golden["idx"])
    expected = by_hand(model, idx)
    torch.testing.assert_close(model(idx)[..., :96].double(), expected, atol=2e-4, rtol=1e-4)
    given = dict(block_size=9, rope_theta=7.0, tokenizer="bytes", norm_position="after")
    state = {key: tensor for key, tensor in state.items()}
    model = ExoFormer.from_released(dict(model=state, model_args=told), **given)
    assert given.items() <= vars(model.config).items()
    assert ExoFormer.from_released(state).config == ModelConfig(**{**TINY, "block_size": 2048})


@pytest.mark.parametrize(
    "name, expected",
    [
        ("exo_elementwise", dict(granularity="elementwise")),
        ("exo_headwise", dict(granularity="headwise")),
        ("nures_nkqr_headwise", dict(anchor="internal", mix="vg", granularity="headwise")),
        ("resformer", dict(gate=False, anchor="internal", mix="v")),
    ],
)
def test_released_files_without_qk_norm_tell_their_heads_by_their_lambdas(name, expected):
    golden, state, _ = released(name)
    model = ExoFormer.from_released(without(state, r"attn\.[qk]_norm"), block_size=40)
    assert dict(expected, n_head=4, qk_norm=False).items() <= vars(model.config).items()
    idx = torch.tensor(golden["idx"])
    logits = model(idx)[..., :96].double()
    torch.testing.assert_close(logits, by_hand(model, idx), atol=2e-4, rtol=1e-4)


def test_heads_that_nothing_tells_must_be_given():
    state = without(released("gated")[1], r"attn\.[qk]_norm")
    with pytest.raises(InputError, match="number of heads; pass n_head"):
        ExoFormer.from_released(state)
    assert ExoFormer.from_released(state, n_head=2).config.head_dim == 16
    one_lambda = without(released("exo_headwise")[1], r"attn\.[qk]_norm")
    scalar = {key: x[:1] if ".lambda_" in key else x for key, x in one_lambda.items()}
    with pytest.raises(InputError, match="number of heads; pass n_head"):
        ExoFormer.from_released(scalar)
    assert ExoFormer.from_released(scalar, n_head=4).config.granularity == "scalar"


def test_released_files_of_other_sizes_load():
    """Another width of Eq. 11's MLP and of the SwiGLU, another number of layers and tokens."""
    golden, _, _ = released("exo_dynamic_elementwise")
    shapes = {key: list(shape) for key, shape in golden["state_dict"].items() if ".2." not in key}
    for key, shape in shapes.items():
        shape[0] = 5 if "dynamic_mixing.fc1" in key else 48 if "mlp.fc1" in key else shape[0]
        shape[0] = 90 if key in ("transformer.wte.weight", "lm_head.weight") else shape[0]
        shape[-1] = 5 if "dynamic_mixing.fc2.weight" in key else shape[-1]
        shape[-1] = 24 if "mlp.fc2" in key else shape[-1]
    state = {key: drawn(1, key, shape) for key, shape in shapes.items()}
    model = ExoFormer.from_released(state, block_size=40)
    sizes = dict(n_layer=2, vocab_size=90, ffn_dim=48)
    assert model.config == ModelConfig(**{**TINY, **sizes}, dynamic=True, dynamic_dim=5)
    idx = tokens(2, 12, high=90)
    logits = model(idx)[..., :90].double()
    torch.testing.assert_close(logits, by_hand(model, idx), atol=2e-4, rtol=1e-4)
    fc1 = state["transformer.layers.1.attn.dynamic_mixing.fc1.weight"]
    assert torch.equal(model.layers[1].attn.gammas.fc1.weight, fc1)


def test_anchors_of_what_a_released_model_does_not_mix_are_dropped():
    golden, state, _ = released("exo_elementwise")
    model = ExoFormer.from_released(without(state, "lambda_[qk]"), block_size=40)
    assert model.config == ModelConfig(**TINY, mix="vg", anchor_norm="vg")
    assert torch.equal(model.anchor.project.weight, state["anchor_proj.weight"][64:])
    idx = torch.tensor(golden["idx"])
    logits = model(idx)[..., :96].double()
    torch.testing.assert_close(logits, by_hand(model, idx), atol=2e-4, rtol=1e-4)


def test_tensors_that_the_released_forward_pass_never_reads_are_ignored():
    state = released("exo_elementwise")[1]
    norms = {
        "transformer.layers.2.attn.v_norm.weight": torch.ones(8),
        "transformer.layers.0.attn.g_norm.weight": torch.ones(8),
    }
    assert ExoFormer.from_released({**state, **norms})
    internal = released("nures_nkqr_headwise")[1]
    own_lambda = {"transformer.layers.0.attn.lambda_v1": torch.ones(4)}
    assert ExoFormer.from_released({**internal, **own_lambda})
    unmixed = {key: tensor for key, tensor in state.items() if ".lambda_g" not in key}
    assert "anchor_g_norm.weight" in unmixed
    assert ExoFormer.from_released(unmixed).config.mix == "qkv"


@pytest.mark.parametrize(
    "theirs, ours", [("before", "pre"), ("after", "after"), ("both", "both"), (None, "pre")]
)
def test_norm_pos_of_a_released_checkpoint_is_followed(theirs, ours):
    """Their "both" uses one norm twice, so both of ours get its gain."""
    state = released("exo_elementwise")[1]
    model_args = dict(norm_pos=theirs) if theirs else {}
    model = ExoFormer.from_released(dict(model=state, model_args=model_args))
    assert model.config.norm_position == ours
    for kind in ("attn", "mlp"):
        gain = state[f"transformer.layers.1.{kind}_norm.weight"]
        block = dict(model.layers[1].named_parameters())
        before = ours != "after"
        after = ours != "pre"
        assert (f"{kind}_norm.weight" in block) == before
        assert (f"{kind}_post_norm.weight" in block) == after
        assert not before or torch.equal(block[f"{kind}_norm.weight"], gain)
        assert not after or torch.equal(block[f"{kind}_post_norm.weight"], gain)


def test_a_released_file_that_lost_its_exogenous_anchors_is_not_taken_for_an_internal_one():
    _, state, _ = released("exo_elementwise")
    del state["anchor_proj.weight"]
    with pytest.raises(InputError, match="the checkpoint lacks anchor_proj.weight"):
        ExoFormer.from_released(state)


def test_an_unknown_norm_pos_is_refused():
    state = released("exo_elementwise")[1]
    with pytest.raises(InputError, match="norm_pos='sandwich'"):
        ExoFormer.from_released(dict(model=state, model_args=dict(norm_pos="sandwich")))


ALONE = """
import sys
import torch
import model as M

tiny = dict(n_layer=2, n_head=2, n_embd=16, vocab_size=64, block_size=16)
idx = torch.randint(64, (4, 16))
for variant in M.VARIANTS:
    model = M.ExoFormer(M.variant_config(variant, **tiny))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for step in range(20):
        loss, z = model.loss(idx[:, :-1], idx[:, 1:])
        (loss + 1e-5 * z).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1, (variant, losses)
assert M.generate(model.eval(), idx[:1, :3], 20).shape == (1, 23)
for name in ("ours.pt", "released.pt"):
    print(name, M.load_checkpoint(name)(torch.arange(8)[None]).double().sum().item())
print("of this project:", sorted(set(sys.modules) & {"prepare_fineweb", "train", "muon"}))
"""


def test_model_py_alone_builds_trains_generates_and_reads_checkpoints(tmp_path):
    """In a process of its own, in a folder with nothing else of the project."""
    shutil.copy(HERE / "model.py", tmp_path)
    ours = tiny("exo_dynamic", vocab_size=64)
    saved(ours, tmp_path / "ours.pt")
    _, state, theirs = released("exo_elementwise")
    torch.save(dict(model=state, model_args=dict(block_size=64)), tmp_path / "released.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    idx = torch.arange(8)[None]
    for line, model in zip(lines, (ours, theirs)):
        printed = float(line.split()[1])
        assert printed == model(idx).double().sum().item()
    assert lines[2] == "of this project: []"


# ------------------------------------------------------------------------------------------- Muon

OPTIM = torch.load(TESTDATA / "optim.pt", weights_only=True)


def optimal_quintic(low, high):
    """The odd quintic nearest to 1 on [low, high], by exchange: its error is equal at 4 points."""
    if low / high >= 1 - 5e-6:
        return np.array([15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5])
    points = np.array([low, (3 * low + high) / 4, (low + 3 * high) / 4, high])
    error = math.inf
    previous = None
    while previous is None or abs(error - previous) > 1e-15:
        previous = error
        equations = np.stack([points, points**3, points**5, [1, -1, 1, -1]], 1)
        a, b, c, error = np.linalg.solve(equations, np.ones(4))
        root = math.copysign(math.sqrt(9 * b * b - 20 * a * c), c)
        points[1:3] = np.sqrt((-3 * b + np.array([-1, 1]) * root) / (10 * c))
    return np.array([a, b, c])


def test_polar_express_coefficients_are_the_optimal_composition():
    powers = np.array([1, 3, 5])
    low = 1e-3
    high = 1.0
    derived = []

    def p(x):
        return float(quintic @ np.float64(x) ** powers)

    for i in range(5):
        floor = max(low, 0.02 * high)
        quintic = optimal_quintic(floor, high)
        if floor > low:
            quintic = quintic * 2 / (p(low) + p(high))
        quintic = quintic / (1.02**powers if i < 4 else 1)
        derived.append(quintic)
        low = p(low)
        high = 2 - low
    np.testing.assert_allclose(derived, muon.COEFFICIENTS, rtol=1e-6)


@pytest.mark.parametrize("name", OPTIM["polar_express"])
def test_polar_express_matches_the_released_one(name):
    case = OPTIM["polar_express"][name]
    G = case["in"].reshape(-1, *case["in"].shape[-2:])
    theirs = case["ref_fp64"]
    ours = muon.polar_express(G.double(), torch.float64).view(case["in"].shape)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    rounded = muon.polar_express(G).view(case["in"].shape).double()
    their_error = (case["out_author_bf16_in"].double() - theirs).norm()
    # bfloat16 costs us about what it costs them
    assert (rounded - theirs).norm() <= 3 * their_error + 1e-6


def composed(s):
    """What the five polynomials make of a singular value."""
    for a, b, c in muon.COEFFICIENTS:
        s = a * s + b * s**3 + c * s**5
    return s


def test_polar_express_band_is_as_documented():
    band = composed(np.geomspace(1e-3, 1, 100_001))
    assert (round(band.min(), 2), round(band.max(), 2)) == (0.86, 1.14)
    assert composed(1e-5) < 0.1


@pytest.mark.parametrize("shape", [(64, 64), (24, 96), (96, 24)])
def test_polar_express_keeps_singular_vectors_and_maps_singular_values(shape):
    G = torch.randn(3, *shape, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    expected = composed(S / (torch.linalg.matrix_norm(G)[:, None] * 1.02 + 1e-6))
    mapped = U.mT @ muon.polar_express(G, torch.float64) @ Vh.mT
    torch.testing.assert_close(mapped, torch.diag_embed(expected), atol=1e-9, rtol=0)
    rounded = muon.polar_express(G)
    assert rounded.dtype == torch.bfloat16
    error = torch.linalg.matrix_norm(U.mT @ rounded.double() @ Vh.mT - torch.diag_embed(expected))
    assert error.max() < 0.05 * torch.linalg.vector_norm(expected, dim=-1).min()


def test_polar_express_multiplies_by_the_smaller_gram_matrix():
    costs = set()
    for shape in ((1, 24, 96), (1, 96, 24)):
        with FlopCounterMode(display=False) as counter:
            muon.polar_express(torch.randn(shape))
        costs.add(counter.get_total_flops())
    # X X^T, A A and B X in each of five steps, at 2 FLOPs for an entry of a product
    assert costs == {5 * 2 * (24 * 96 * 24 + 24 * 24 * 24 + 24 * 24 * 96)}


@pytest.mark.parametrize("key", OPTIM["traj"])
def test_muon_follows_the_released_optimizer_for_20_steps(key):
    """float32 weights. Their bfloat16 rounding differs: trajectories part by the error of one
    orthogonalisation; a cautious decay flips on entries near zero: lr * decay * weight, 2.5 %."""
    setting = dict(part.split("=") for part in key.split(","))
    recipe = {name: OPTIM["muon"][name] for name in ("lr", "weight_decay", "momentum")}
    cautious = setting["cautious"] == "True"
    beta2 = None if setting["beta2"] == "None" else float(setting["beta2"])
    for name, problem in OPTIM["quadratic"].items():
        w = torch.nn.Parameter(problem["W0"].clone())
        optimizer = muon.Muon([w], cautious=cautious, beta2=beta2, **recipe)
        for _ in range(20):
            w.grad = problem["H"] * (w.detach() - problem["T"])
            optimizer.step()
        path = (OPTIM["traj"][key][name] - problem["W0"]).norm()
        apart = (w.detach() - OPTIM["traj"][key][name]).norm() / path
        assert apart < (0.03 if cautious else 0.02), name


def polar_in_float64(G):
    return muon.polar_express(G, torch.float64)


def rows_normalised_by_hand(update, variance, beta2):
    """NorMuon, one row (or, of a wide matrix, one column) after the other; (update, variance)."""
    if update.shape[0] < update.shape[1]:
        update, variance = rows_normalised_by_hand(update.T, variance, beta2)
        return update.T, variance
    scaled = []
    running = []
    for i, row in enumerate(update):
        running.append(beta2 * variance[i] + (1 - beta2) * (row**2).mean())
        scaled.append(row / running[i].sqrt())
    scaled = torch.stack(scaled)
    return scaled * update.norm() / scaled.norm(), running


def muon_by_hand(w, grads, settings):
    """The weights (float64) after a step with each of the gradients, matrix after matrix."""
    mean = torch.zeros_like(w)
    longer = max(len(w) // settings["parts"], w.size(1))
    variances = [torch.zeros(longer).double() for _ in range(settings["parts"])]
    for grad in grads:
        momentum = settings["momentum"]
        mean = momentum * mean + (1 - momentum) * grad
        ahead = momentum * mean + (1 - momentum) * grad if settings["nesterov"] else mean
        updates = []
        for i, matrix in enumerate(ahead.chunk(settings["parts"])):
            update = polar_in_float64(matrix[None])[0]
            if settings["beta2"]:
                update, variances[i] = rows_normalised_by_hand(
                    update, variances[i], settings["beta2"]
                )
            rows, cols = update.shape
            updates.append(update * math.sqrt(max(1, rows / cols)))
        update = torch.cat(updates)
        decays = (update * w >= 0) | (not settings["cautious"])
        w = w - settings["lr"] * (settings["weight_decay"] * w * decays + update)
    return w


MUON = dict(  # the paper's, Table 4
    lr=0.01, momentum=0.95, nesterov=True, weight_decay=0.1, cautious=True, beta2=None, parts=1
)
OTHER_MUON = dict(
    lr=0.1, momentum=0.5, nesterov=False, weight_decay=0.7, cautious=False, beta2=0.9, parts=3
)


def muon_steps(weights, grads, **settings):
    """The weights after steps of Muon in float64; the gradients are (step, parameter)."""
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = muon.Muon(params, polar=polar_in_float64, **settings)
    for of_step in zip(*grads):
        for p, grad in zip(params, of_step):
            p.grad = grad.clone()
        optimizer.step()
    return [p.detach() for p in params]


def test_muon_s_defaults_are_the_paper_s():
    assert muon.Muon([torch.nn.Parameter(torch.zeros(2, 2))]).defaults == MUON
    known = {*MUON, "self", "params", "polar"}
    assert set(inspect.signature(muon.Muon.__init__).parameters) == known


@pytest.mark.parametrize("setting", [None, *MUON, "all"])
def test_muon_is_its_formula_in_float64(setting):
    """In three steps, for tall, square and wide matrices, two of each shape; every setting acts."""
    settings = dict(MUON)
    if setting:
        settings.update(OTHER_MUON if setting == "all" else {setting: OTHER_MUON[setting]})
    shapes = [(18, 6), (6, 18), (18, 6), (6, 18), (6, 6), (18, 18), (6, 6)]
    weights = [torch.randn(shape).double() for shape in shapes]
    grads = [[torch.randn(shape).double() for _ in range(3)] for shape in shapes]
    ends = muon_steps(weights, grads, **settings)
    with_defaults = muon_steps(weights, grads)
    for w, of_steps, end, plain in zip(weights, grads, ends, with_defaults):
        # the norms and means of NorMuon are float32
        expected = muon_by_hand(w, of_steps, settings)
        torch.testing.assert_close(end, expected, atol=1e-6 if settings["beta2"] else 1e-12, rtol=0)
        assert (end == plain).all() == (setting is None)


def test_muon_leaves_what_has_no_gradient_and_takes_each_group_s_settings():
    w = torch.randn(3, 6, 6).double()
    g = torch.randn(6, 6).double()
    params = [torch.nn.Parameter(x.clone()) for x in w]
    groups = [dict(params=params[:1]), dict(params=params[1:], lr=0.2, parts=2)]
    params[0].grad = g
    params[1].grad = g
    muon.Muon(groups, polar=polar_in_float64).step()
    torch.testing.assert_close(params[0].detach(), muon_by_hand(w[0], [g], MUON))
    second = muon_by_hand(w[1], [g], dict(MUON, lr=0.2, parts=2))
    torch.testing.assert_close(params[1].detach(), second)
    assert torch.equal(params[2], w[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_keeps_weights_and_state_in_the_dtype_of_the_weights(dtype):
    """And orthogonalises in bfloat16 in one call for all parameters of a shape."""
    calls = []

    def polar(G):
        calls.append(G.shape)
        return muon.polar_express(G)

    params = [torch.nn.Parameter(torch.randn(8, 4).to(dtype)) for _ in range(3)]
    optimizer = muon.Muon(params, beta2=0.9, parts=2, polar=polar)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert calls == [(6, 4, 4)]
    for p in params:
        state = optimizer.state[p]
        assert {name: tuple(x.shape) for name, x in state.items()} == {
            "momentum_buffer": (8, 4),
            "variance_buffer": (2, 4, 1),
        }
        assert {p.dtype, *(x.dtype for x in state.values())} == {dtype}


def test_decay_in_pure_bfloat16_is_rounded_away_as_in_the_released_code():
    """0.1 x rate 0.01 of a weight is less than half a unit in its last place, subtracted alone."""
    changed = {}
    for dtype in (torch.bfloat16, torch.float32):
        ends = []
        for decay in (0.0, 0.1):
            generator = torch.Generator().manual_seed(0)
            w = torch.nn.Parameter(torch.randn(16, 24, generator=generator).to(dtype))
            optimizer = muon.Muon([w], lr=0.01, weight_decay=decay)
            for _ in range(50):
                w.grad = torch.randn(16, 24, generator=generator).to(dtype)
                optimizer.step()
            ends.append(w.detach())
        changed[dtype] = (ends[0] != ends[1]).float().mean().item()
    assert changed[torch.bfloat16] == 0 and changed[torch.float32] > 0.9


# -------------------------------------------------------------------------------- one training step

SMALL = """--device=cpu --n_layer=2 --n_head=2 --n_embd=32 --ffn_dim=64 --block_size=32
    --batch_size=2 --total_batch_size=128 --max_steps=12 --warmup_steps=2 --eval_every=4
    --eval_tokens=160 --final_eval_tokens=160 --save_every=4 --keep=9 --sample_tokens=8""".split()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of byte-level shards: two for training (41 windows), one for validation; a document
    is 70 tokens."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for name, length in (
        ("t_train_000000.bin", 900),
        ("t_train_000001.bin", 420),
        ("t_val_000000.bin", 170),
    ):
        ids = rng.integers(97, 123, length)
        ids[0::70] = 256
        pf.write_shard(folder / name, ids)
    pf.write_meta(folder, dict(tokenizer="bytes"))
    return folder


class Quiet(T.Stop):
    """Stop without signal handlers."""

    def __init__(self):
        self.signal = 0
        self.problem = ""


def start(folder, data, *flags):
    """(Trainer, RunFolder) of a small run; the flags come last and win."""
    return T.prepare([f"--data={data}", f"--out_dir={folder}", *SMALL, *flags])


def close(run_folder):
    run_folder.log.close()
    run_folder.lock.lock.release()


def train_fully(folder, data, *flags, stop_after=None, before_step=lambda trainer: None):
    """Run to the end, or as if SIGTERM came in step `stop_after`. Returns the trainer, which knows
    its Stop and why it `stopped`; the run folder is free again, whatever happened."""
    if "--resume" in flags:
        trainer, run_folder = T.prepare([f"--out_dir={folder}", *flags])
    else:
        trainer, run_folder = start(folder, data, *flags)
    trainer.stop = Quiet()
    update = trainer.update

    def update_then_stop(windows):
        before_step(trainer)
        record = update(windows)
        trainer.stop.signal = signal.SIGTERM if trainer.step == stop_after else 0
        return record

    trainer.update = update_then_stop
    try:
        trainer.stopped = T.run(trainer, run_folder, trainer.stop)
    finally:
        close(run_folder)
    return trainer


def resume(folder, *flags, **options):
    return train_fully(folder, None, "--resume", *flags, **options)


@pytest.fixture(scope="session")
def whole(data, tmp_path_factory):
    """The trainer of an undisturbed run of 12 steps in the folder `whole.config.out_dir`, which
    tests copy."""
    return train_fully(tmp_path_factory.mktemp("whole") / "a", data)


def copied(whole, folder):
    return shutil.copytree(whole.config.out_dir, folder)


def same_state(a, b):
    """Names of the tensors that differ between two runs: weights and all optimizer states."""
    left = tensors_of(a)
    right = tensors_of(b)
    assert set(left) == set(right)
    return [name for name in left if not torch.equal(left[name], right[name])]


def tensors_of(trainer):
    """{name: tensor} of all weights and optimizer states."""
    tensors = {f"weight {name}": p for name, p in trainer.model.state_dict().items()}
    for optimizer in trainer.optimizers:
        for i, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"{type(optimizer).__name__} {i} {key}"] = torch.as_tensor(value)
    return tensors


def log_of(folder, key=""):
    """The records of a run's log without their times; those with `key`, if one is given."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        record.pop("ms", None)
    return [record for record in records if key in record or not key]


def test_learning_rate_and_momentum_follow_table_4():
    schedule = OPTIM["schedule"]
    paper = T.TrainConfig()
    ours = [T.lr_multiplier(step, paper) for step in schedule["paper_steps"]]
    np.testing.assert_allclose(ours, schedule["paper_linear_mult"], rtol=0, atol=1e-12)
    ramp = T.TrainConfig(muon_ramp=True)
    momentum = [T.muon_momentum(step, ramp) for step in schedule["momentum_steps"]]
    np.testing.assert_allclose(momentum, schedule["momentum"], atol=1e-12)
    assert T.muon_momentum(5, paper) == 0.95
    assert max(T.lr_multiplier(step, paper) for step in range(0, 38147, 7)) == 1.0


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize(
    "name, module",
    [
        ("layers.0.attn.extra", torch.nn.Linear(32, 32, bias=False)),
        ("second_head", M.Linear(32, 96)),
        ("positions", torch.nn.Embedding(24, 32)),
    ],
)
def test_a_new_matrix_goes_to_no_optimizer_unseen(name, module, optimizer):
    model = tiny("base")
    owner, _, last = name.rpartition(".")
    model.get_submodule(owner).add_module(last, module)
    config = T.TrainConfig(device="cpu", optimizer=optimizer)
    with pytest.raises(ValueError, match=f"is {name}.weight Muon's or AdamW's"):
        T.build_optimizers(model, config)


@every_variant
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_optimizers_partition_the_parameters_and_only_matrices_decay(variant, optimizer):
    """Embedding, head, gains, lambdas and biases are AdamW's, and left alone by the decay."""
    model = ExoFormer(variant_config(variant, **TINY))
    config = T.TrainConfig(device="cpu", optimizer=optimizer, weight_decay=0.25)
    optimizers = T.build_optimizers(model, config)
    groups = [(o, group) for o in optimizers for group in o.param_groups]
    held = [(id(p), o, group) for o, group in groups for p in group["params"]]
    assert sorted(number for number, _, _ in held) == sorted(map(id, model.parameters()))
    found = {number: (o, group) for number, o, group in held}
    for name, p in model.named_parameters():
        owner, group = found[id(p)]
        matrix = p.dim() == 2 and "lambda" not in name and not name.startswith(("embed", "head"))
        assert group["weight_decay"] == (0.25 if matrix else 0.0), name
        assert isinstance(owner, muon.Muon) == (matrix and optimizer == "muon"), name
        if isinstance(owner, muon.Muon):
            assert group["parts"] == parts_by_hand(model.config, name), name
        else:
            assert group["betas"] == (0.9, 0.95)


def parts_by_hand(c, name):
    """How many matrices are stacked in a weight."""
    if "project" in name:
        return len(c.mix if "anchor" in name else c.components)
    return 2 if ".up." in name else 1


@pytest.mark.parametrize(
    "device, expected",
    [
        ("cpu", dict(dtype="float32", muon_dtype="float32", compile=False, deterministic=True)),
        ("mps", dict(dtype="float32", muon_dtype="float32", compile=False, deterministic=False)),
        ("cuda", dict(dtype="bfloat16", muon_dtype="bfloat16", compile=True, deterministic=False)),
    ],
)
def test_auto_is_decided_by_the_device_and_what_is_given_stays(device, expected, monkeypatch):
    monkeypatch.setattr(T, "choose_device", lambda name: device)
    monkeypatch.setattr(T, "has_bfloat16", lambda device: device == "cuda")
    monkeypatch.setattr(T, "check_compiler", lambda device, dtype: None)
    decided = vars(T.resolve({})[1])
    assert {name: decided[name] for name in expected} == expected
    given = dict(muon_dtype="float32", compile=False)
    assert given.items() <= vars(T.resolve(given)[1]).items()


def test_pure_bfloat16_casts_matrices_and_embedding_alone():
    """As the released code: in bfloat16 a lambda of 1.0 does not move by steps of 0.003."""
    config = T.TrainConfig(device="cpu", dtype="pure_bfloat16")
    model = T.build_model(variant_config("exo_dynamic", **TINY), config)
    for name, p in model.named_parameters():
        matrix = p.dim() == 2 and "lambda" not in name
        assert p.dtype == (torch.bfloat16 if matrix else torch.float32), name


def test_a_new_model_is_on_the_device_and_the_same_for_a_seed():
    """Drawn on the CPU, whatever else drew numbers before."""
    model_config = variant_config("exo_dynamic", **TINY)
    first = T.build_model(model_config, T.TrainConfig(device="cpu", seed=3))
    torch.rand(5)
    again = T.build_model(model_config, T.TrainConfig(device="cpu", seed=3))
    for (name, p), q in zip(first.named_parameters(), again.parameters()):
        assert torch.equal(p, q), name
    elsewhere = types.SimpleNamespace(device="meta", seed=3, dtype="float32")
    moved = T.build_model(model_config, elsewhere)
    assert {p.device.type for p in moved.parameters()} == {"meta"}


@pytest.mark.parametrize("clip", [0.5, 1e9, 0])
def test_a_step_follows_the_clipped_gradient_of_the_mean_loss(clip, data, tmp_path):
    """Two passes of two sequences, against one float64 pass of all four: cross-entropy, z, norm,
    and how far plain gradient descent in the optimizers' place moves each weight."""
    trainer, run_folder = start(
        tmp_path / "a", data, f"--grad_clip={clip}", "--z_loss=0.01", "--variant=exo_dynamic"
    )
    close(run_folder)
    for p in trainer.model.parameters():
        p.data += 0.05 * torch.randn_like(p)  # at init most gradients are zero
    trainer.optimizers = [torch.optim.SGD(trainer.model.parameters(), lr=1.0)]
    trainer.optimizers[0].param_groups[0]["peak_lr"] = 0.003
    exact = copy.deepcopy(trainer.model).double()
    windows = trainer.train.shuffled(1337, 0, 4).astype(np.int64)
    idx = torch.from_numpy(windows[:, :-1])
    targets = torch.from_numpy(windows[:, 1:])
    logits = exact(idx, (idx == 256).cumsum(1))
    cross_entropy = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    z = logits.exp().sum(-1).log().square().mean()
    (cross_entropy + 0.01 * z).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in exact.parameters()))
    assert (norm > clip) == (clip < 1)
    shrunk = min(1, clip / norm) if clip else 1
    record = trainer.update(trainer.read_step())
    step = 0.003 / 2
    assert record == pytest.approx(
        dict(step=1, loss=cross_entropy.item(), z=z.item(), grad_norm=norm, lr=step, tokens=128),
        rel=1e-4,
    )
    for (name, p), q in zip(trainer.model.named_parameters(), exact.parameters()):
        torch.testing.assert_close(
            p.double(), q - step * shrunk * q.grad, atol=2e-7, rtol=0, msg=name
        )


@every_variant
def test_matrices_of_unequal_height_in_one_weight_are_refused_by_name(variant):
    """Half of the rows of 16 and 8 would not be the first matrix."""
    model = ExoFormer(variant_config(variant, **TINY))
    model.layers[1].mlp.up.heights = (16, 8)
    with pytest.raises(UserError, match="^--optimizer=muon: layers.1.mlp.up stacks .*16, 8"):
        T.build_optimizers(model, T.TrainConfig(device="cpu"))
    for flags in (dict(optimizer="adamw"), dict(muon_fused=True)):
        assert T.build_optimizers(model, T.TrainConfig(device="cpu", **flags))


def test_each_group_runs_at_a_share_of_its_own_peak_rate():
    """Also one of an optimizer that is neither Muon nor AdamW, whose momentum is its own."""
    weights = [torch.nn.Parameter(torch.zeros(4, 4)) for _ in range(3)]
    groups = [dict(params=weights[:1], peak_lr=0.3), dict(params=weights[1:2], peak_lr=0.02)]
    others = torch.optim.SGD(groups, lr=7.0, momentum=0.5)
    ours = muon.Muon([dict(params=weights[2:], peak_lr=0.01)])
    config = T.TrainConfig(max_steps=100, warmup_steps=10, muon_momentum=0.9)
    T.schedule([others, ours], 3, config)
    assert [group["lr"] for group in others.param_groups] == pytest.approx([0.12, 0.008])
    assert ours.param_groups[0]["lr"] == pytest.approx(0.004)
    assert others.param_groups[0]["momentum"] == 0.5 and ours.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize("optimizer, peaks", [("muon", {0.05, 0.07}), ("adamw", {0.07})])
def test_muon_and_adamw_run_at_the_rates_given_for_each(optimizer, peaks):
    config = T.TrainConfig(device="cpu", optimizer=optimizer, muon_lr=0.05, adamw_lr=0.07)
    optimizers = T.build_optimizers(ExoFormer(variant_config("exo", **TINY)), config)
    T.schedule(optimizers, config.max_steps // 2, config)
    assert {group["lr"] for o in optimizers for group in o.param_groups} == peaks
    for o in optimizers if optimizer == "muon" else []:
        rate = 0.05 if isinstance(o, muon.Muon) else 0.07
        assert all(group["lr"] == rate for group in o.param_groups)


def test_dropout_acts_in_training_alone(data, tmp_path, monkeypatch):
    """Neither in an evaluation, after which training goes on with it, nor in the sample."""
    forward = M.SwiGLU.forward
    monkeypatch.setattr(
        M.SwiGLU, "forward", lambda layer, x: F.dropout(forward(layer, x), 0.5, layer.training)
    )
    trainer = train_fully(tmp_path / "a", data)
    batch = T.to_batch(trainer.train.shuffled(1, 0, 4), 256, trainer.config)

    def loss():
        return trainer.objective(*batch)[1].item()

    losses = [T.evaluate(trainer, 0, Quiet())["val_loss"] for _ in range(2)]
    assert losses[0] == losses[1] == log_of(tmp_path / "a")[-1]["val_loss"]
    assert all(module.training for module in trainer.model.modules()) and loss() != loss()
    assert T.sample_text(trainer) == T.sample_text(trainer) and loss() == loss()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "pure_bfloat16"])
def test_the_sample_is_computed_in_the_dtype_of_training(dtype, monkeypatch):
    def text(model, tokenizer, prompt, length):
        return [f"{torch.is_autocast_enabled('cpu')}, training={model.training}"]

    monkeypatch.setattr(T, "continue_text", text)
    config = T.TrainConfig(device="cpu", dtype=dtype)
    trainer = types.SimpleNamespace(config=config, model=torch.nn.Identity(), tokenizer=None)
    assert T.sample_text(trainer) == f"{dtype == 'bfloat16'}, training=False"


def test_a_batch_ramp_counts_the_tokens_that_were_read(data, tmp_path, monkeypatch, capsys):
    """64 tokens in each of the first 3 steps, then 128: log, budget, order of the data and
    resuming."""
    monkeypatch.setattr(T, "step_tokens", lambda step, config: 64 if step < 3 else 128)
    read = []
    window = T.Tokens.window

    def noted(split, i):
        if len(split) == 41:
            read.append(i)
        return window(split, i)

    monkeypatch.setattr(T.Tokens, "window", noted)
    whole = train_fully(tmp_path / "a", data)
    tokens_of = [record["tokens"] for record in log_of(tmp_path / "a", "loss")]
    assert tokens_of == [64, 128, 192, *range(320, 1345, 128)]
    assert "12 steps" in capsys.readouterr().out and whole.tokens == 1344
    order = [*T.permutation(1337, 0, 41), T.permutation(1337, 1, 41)[0]]
    assert read[:42] == [int(i) for i in order]
    train_fully(tmp_path / "b", data, stop_after=2)
    assert same_state(whole, resume(tmp_path / "b")) == []
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")


def test_a_batch_ramp_that_does_not_fit_is_refused_before_the_first_step(
    data, tmp_path, monkeypatch
):
    monkeypatch.setattr(T, "step_tokens", lambda step, config: 128 if step < 11 else 100)
    with pytest.raises(UserError, match="--total_batch_size=100 is not a multiple"):
        start(tmp_path / "a", data, "--max_steps=12")
    _, folder = start(tmp_path / "b", data, "--max_steps=11")
    close(folder)


def test_every_epoch_visits_every_window_once_in_its_own_order(data):
    config = ModelConfig(**{**TINY, "block_size": 32, "vocab_size": 320}, tokenizer="bytes")
    split = T.Tokens(data, "train", config)
    assert len(split) == 28 + 13 == 899 // 32 + 419 // 32
    every = [split.window(i) for i in range(len(split))]
    assert np.array_equal(every[28], pf.read_shard(data / "t_train_000001.bin")[:33])
    assert every[3][-1] == every[4][0]
    epochs = [split.shuffled(7, e * 41, 41) for e in range(2)]
    for epoch in epochs:
        assert sorted(map(bytes, epoch)) == sorted(map(bytes, np.array(every)))
    assert not np.array_equal(*epochs)
    one_by_one = [split.shuffled(7, k, 1) for k in range(30, 50)]
    assert np.array_equal(split.shuffled(7, 30, 20), np.concatenate(one_by_one))


@pytest.mark.parametrize("vocab_size, bad, limit", [(200, 256, 200), (320, 300, 257)])
def test_a_token_outside_vocabulary_or_tokenizer_names_its_shard(
    vocab_size, bad, limit, data, tmp_path
):
    shutil.copytree(data, tmp_path / "data")
    pf.write_shard(tmp_path / "data" / "t_train_000000.bin", np.full(900, bad))
    config = ModelConfig(**{**TINY, "vocab_size": vocab_size}, tokenizer="bytes")
    split = T.Tokens(tmp_path / "data", "train", config)
    words = f"t_train_000000.bin: token id {bad} .* {limit}, .*verify --out="
    with pytest.raises(UserError, match=words):
        split.window(0)


def test_training_lowers_the_validation_loss(data, tmp_path):
    train_fully(tmp_path / "a", data, "--max_steps=40", "--eval_every=0")
    first, last = (record["val_loss"] for record in log_of(tmp_path / "a", "val_loss"))
    assert abs(first - math.log(320)) < 1e-4 and last < 0.65 * first


def test_evaluation_is_the_mean_over_all_windows_and_counts_bytes(data, whole):
    """5 windows in batches of 2: the last batch is filled up, and must not count the filling."""
    result = log_of(pathlib.Path(whole.config.out_dir))[-1]
    val = pf.read_shard(data / "t_val_000000.bin").astype(int)
    losses = []
    n_bytes = 0
    for start_at in range(0, 160, 32):
        window = torch.tensor(val[start_at : start_at + 33])[None]
        docs = (window[:, :-1] == 256).cumsum(1)
        losses.append(whole.model.loss(window[:, :-1], window[:, 1:], docs)[0].item())
        n_bytes += sum(int(t) != 256 for t in window[0, 1:])
    assert len(whole.val) == 5 and abs(result["val_loss"] - np.mean(losses)) < 1e-5
    assert abs(result["val_bpb"] - sum(losses) * 32 / math.log(2) / n_bytes) < 1e-4
    assert result["val_ppl"] == math.exp(result["val_loss"])


@pytest.mark.parametrize("where, row", [("embed.weight", 100), ("layers.1.mlp.up.weight", 60)])
def test_a_planted_nan_stops_the_run_and_is_never_saved(where, row, data, tmp_path):
    def plant(trainer):
        if trainer.step == 6:
            trainer.model.get_parameter(where).data[row, 3] = math.nan

    words = f"step 7: .*learning rates 1 of.*not finite.*: weight {where}"
    with pytest.raises(T.Diverged, match=words):
        train_fully(tmp_path / "a", data, before_step=plant)
    assert newest_of(tmp_path / "a") == "ckpt_000004.pt" and log_of(tmp_path / "a")[-1]["step"] == 6


# ------------------------------------------------------------------------- the settings of training

PLAIN = """--variant=exo_dynamic --max_steps=4 --warmup_steps=2 --decay_fraction=0.5 --eval_every=0
    --eval_tokens=64 --final_eval_tokens=64 --save_every=0 --sample_tokens=0""".split()


def watch(folder, data, *flags):
    """A run of PLAIN steps, and what somebody sees of it who looks on."""
    run = types.SimpleNamespace(folder=folder, trainer=None, log=None, out=None)
    run.devices = []  # that torch was asked for
    run.compiled = []  # how the objective was compiled
    run.deterministic = []  # what torch was told of algorithms
    run.sampled = []  # the lengths of samples
    run.windows = []  # of each step
    run.weights = []  # before each step, and at the end
    run.norms = []  # of the gradients as the optimizers see them
    run.momenta = []  # of the first optimizer in each step
    run.losses = []  # of each pass: loss, cross-entropy, z
    run.documents = []  # whether each pass knows its documents
    run.streams = set()  # the dtypes of the residual stream
    run.evaluated = []  # the number of windows of each evaluation

    def before(trainer, windows):
        run.windows.append(windows)
        run.weights.append(copy.deepcopy(trainer.model.state_dict()))

    def before_optimizer(optimizer, *_):
        grads = [p.grad for p in run.trainer.model.parameters()]
        run.norms.append(torch.nn.utils.get_total_norm(grads).item())
        run.momenta.append(round(optimizer.param_groups[0].get("momentum", 0), 6))

    def after_objective(objective, batch, result):
        run.documents.append(batch[2] is not None)
        run.losses.append([x.item() for x in result])

    def evaluated(trainer, first, n):
        run.evaluated += [n] if first == 0 else []
        return read_validation(trainer, first, n)

    update = T.Trainer.update
    read_validation = T.read_validation
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out:
        patch.setattr(T, "choose_device", lambda name: run.devices.append(name) or "cpu")
        patch.setattr(T, "check_compiler", lambda device, dtype: None)
        patch.setattr(T.Objective, "compile", lambda self, **how: run.compiled.append(how))
        patch.setattr(torch, "use_deterministic_algorithms", run.deterministic.append)
        patch.setattr(T, "continue_text", lambda *args: [str(run.sampled.append(args[-1]))])
        patch.setattr(T, "read_validation", evaluated)
        patch.setattr(T.Trainer, "update", lambda *args: before(*args) or update(*args))
        run.trainer, run_folder = start(folder / "run", data, *PLAIN, *flags)
        run.trainer.optimizers[0].register_step_pre_hook(before_optimizer)
        run.trainer.objective.register_forward_hook(after_objective)
        run.trainer.model.final_norm.register_forward_hook(
            lambda module, args, result: run.streams.add(result.dtype)
        )
        try:
            T.run(run.trainer, run_folder, Quiet())
        finally:
            close(run_folder)
        T.conclude(run.trainer, "", "")
    run.weights.append(run.trainer.model.state_dict())
    run.out = out.getvalue()
    run.log = log_of(pathlib.Path(run.trainer.config.out_dir))
    return run


def rates(run):
    """The learning rate of Muon in each step."""
    return [round(record["lr"], 6) for record in run.log if "lr" in record]


def steps_with(key):
    """A function of a run: the steps whose records have `key`."""
    return lambda run: [record["step"] for record in run.log if key in record]


def checkpoints(run):
    """The steps of its checkpoints."""
    return sorted(int(path.name[5:-3]) for path in run.folder.glob("run/ckpt_*.pt"))


def lengths_of_steps(run):
    """How far the first step moves a number of the head, and the second a direction of W^O.

    Both begin at zero. AdamW's first step is the rate itself, Muon's matrix is orthogonal times it.
    """
    head = run.weights[1]["head.weight"].abs().median()
    turned = torch.linalg.svdvals(run.weights[2]["layers.0.attn.out_proj.weight"]).median()
    return round(head.item(), 6), round(turned.item(), 2)


def decay(run):
    """Share of a matrix and of the embedding that the first step takes, by the rate 0.005.

    Their gradients are zero then, since the head is.
    """
    first, second = run.weights[:2]
    names = ("layers.0.attn.project.weight", "embed.weight")
    shares = [1 - (second[name] / first[name]).median().item() for name in names]
    return [round(share / 0.005, 3) for share in shares]


def clipping(run):
    """The norms that the optimizers see; "none" if they are those of the log."""
    seen = [round(norm, 4) for norm in run.norms]
    logged = [round(record["grad_norm"], 4) for record in run.log if "grad_norm" in record]
    return "none" if seen == logged else sorted(set(seen))


def beginning(run):
    """The first window, and a weight, before the first step."""
    return int(run.windows[0][0, 0, :].sum()), round(run.weights[0]["embed.weight"].std().item(), 7)


def second_moments(run):
    """beta2 of each group of Muon, and whether it keeps second moments."""
    optimizer = run.trainer.optimizers[0]
    states = {name for state in optimizer.state.values() for name in state}
    return {group["beta2"] for group in optimizer.param_groups}, "variance_buffer" in states


def dtypes(run):
    """Of the residual stream, of matrices, of lambdas."""
    weights = run.weights[-1]
    matrix = weights["layers.0.mlp.up.weight"].dtype
    return run.streams, matrix, weights["layers.1.attn.mix.k.lambda_anchor"].dtype


def polar_dtype(run):
    """Of what Muon's orthogonaliser returns."""
    return run.trainer.optimizers[0].polar(torch.eye(4)[None]).dtype


def printed_steps(run):
    return [int(step) for step in re.findall(r"^step +(\d)/\d  loss", run.out, re.M)]


F32 = torch.float32
BF16 = torch.bfloat16
USUAL = [0.005, 0.01, 0.01, 0.0055]  # two steps of warm-up; the last half falls to a tenth
COMPILED = dict(fullgraph=True, dynamic=False, options={})
# What each field of TrainConfig governs in a run of PLAIN, and what is seen of several values.
# fmt: off
TRAINING_EFFECTS = {
    "data": (lambda run: int(np.max(run.windows)), {"{data}": 256, "{other}": 97}),
    "out_dir": (lambda run: [path.parent.name for path in run.folder.rglob("log.jsonl")],
                {"{folder}/here": ["here"], "{folder}/there": ["there"]}),
    "resume": (lambda run: "holds no checkpoint" in run.out, {False: False, True: True}),
    "init_from": (lambda run: bool(run.weights[0]["head.weight"].any()),
                  {"": False, "{source}": True}),
    "device": (lambda run: run.devices,
               {"auto": ["auto"], "cuda": ["cuda"], "mps": ["mps"], "cpu": ["cpu"]}),
    "dtype": (dtypes, {"auto": ({F32}, F32, F32), "float32": ({F32}, F32, F32),
                       "bfloat16": ({BF16}, F32, F32), "pure_bfloat16": ({BF16}, BF16, F32)}),
    "compile": (lambda run: run.compiled, {None: [], False: [], True: [COMPILED]}),
    "deterministic": (lambda run: run.deterministic, {None: [True], False: [], True: [True]}),
    "seed": (lambda run: beginning(run) == run.plain, {1337: True, 0: False}),
    "max_steps": (steps_with("loss"), {4: [1, 2, 3, 4], 1: [1]}),
    "batch_size": (lambda run: np.shape(run.windows)[:3],
                   {1: (4, 4, 1), 2: (4, 2, 2), 4: (4, 1, 4)}),
    "total_batch_size": (lambda run: (np.shape(run.windows)[:3], run.log[-2]["tokens"]),
                         {128: ((4, 2, 2), 512), 64: ((4, 1, 2), 256)}),
    "mask_documents": (lambda run: set(run.documents), {True: {True}, False: {False}}),
    "optimizer": (lambda run: [type(o).__name__ for o in run.trainer.optimizers],
                  {"muon": ["Muon", "AdamW"], "adamw": ["AdamW"]}),
    "muon_lr": (lengths_of_steps, {0.01: (0.0015, 0.01), 0.04: (0.0015, 0.04)}),
    "muon_momentum": (lambda run: run.momenta, {0.95: [0.95] * 4, 0.5: [0.5] * 4}),
    "muon_ramp": (lambda run: run.momenta,
                  {False: [0.95] * 4, True: [0.85, 0.851, 0.852, 0.851]}),
    "muon_beta2": (second_moments, {0.0: ({None}, False), 0.9: ({0.9}, True)}),
    "muon_dtype": (polar_dtype, {"auto": F32, "float32": F32, "bfloat16": BF16}),
    "muon_fused": (lambda run: {g["parts"] for g in run.trainer.optimizers[0].param_groups},
                   {False: {1, 2, 4}, True: {1}}),
    "adamw_lr": (lengths_of_steps, {0.003: (0.0015, 0.01), 0.006: (0.003, 0.01)}),
    "weight_decay": (decay, {0.1: [0.1, 0], 0.5: [0.5, 0], 0: [0, 0]}),
    "warmup_steps": (rates, {2: USUAL, 4: [0.0025, 0.005, 0.0075, 0.0055],
                             0: [0.01, 0.01, 0.01, 0.0055]}),
    "decay_fraction": (rates, {0.5: USUAL, 1: [0.005, 0.00775, 0.0055, 0.00325],
                               0: [0.005, 0.01, 0.01, 0.01]}),
    "final_lr": (rates, {0.1: USUAL, 0.9: [0.005, 0.01, 0.01, 0.0095]}),
    "grad_clip": (clipping, {0: "none", 0.01: [0.01], 1000: "none"}),
    "z_loss": (lambda run: {round((loss - ce) / z, 4) for loss, ce, z in run.losses},
               {0: {0}, 0.5: {0.5}}),
    "eval_every": (steps_with("val_loss"), {0: [0, 4], 2: [0, 2, 4], 3: [0, 3, 4]}),
    "eval_tokens": (lambda run: run.evaluated, {64: [2, 2], 65: [3, 2], 0: [5, 2]}),
    "final_eval_tokens": (lambda run: run.evaluated,
                          {64: [2, 2], 65: [2, 3], 31: [2, 1], 0: [2, 5]}),
    "save_every": (checkpoints, {0: [0, 4], 3: [0, 3, 4], 1: [0, 1, 2, 3, 4]}),
    "keep": (checkpoints, {9: [0, 4], 1: [4], 2: [0, 4], 0: [0, 4]}),
    "log_every": (printed_steps, {1: [1, 2, 3, 4], 2: [1, 2, 4], 4: [1, 4]}),
    "sample_tokens": (lambda run: run.sampled, {0: [], 8: [8]}),
}
# fmt: on
CHANGE_THE_WEIGHTS = """data init_from dtype seed max_steps total_batch_size mask_documents
    optimizer
    muon_lr muon_momentum muon_ramp muon_beta2 muon_dtype muon_fused adamw_lr weight_decay
    warmup_steps decay_fraction final_lr grad_clip z_loss""".split()


@pytest.fixture(scope="session")
def plain(data, tmp_path_factory):
    return watch(tmp_path_factory.mktemp("plain"), data)


@pytest.fixture(scope="session")
def places(data, whole, tmp_path_factory):
    """The paths that stand in the table: data, data of one letter, and a checkpoint."""
    other = shutil.copytree(data, tmp_path_factory.mktemp("other") / "data")
    pf.write_shard(other / "t_train_000000.bin", np.full(900, 97))
    pf.write_shard(other / "t_train_000001.bin", np.full(420, 97))
    return dict(data=data, other=other, source=f"{whole.config.out_dir}/ckpt_000012.pt")


@pytest.mark.parametrize("name", [f.name for f in fields(T.TrainConfig)])
def test_every_setting_of_training_has_its_effect(name, plain, places, data, tmp_path):
    """What it governs, and whether the weights after 4 steps are others.

    The plain run's own value needs no run, but for the seed: the same seed is the same run.
    """
    assert name in TRAINING_EFFECTS, f"say in TRAINING_EFFECTS what the setting {name} does"
    what_it_governs, expected = TRAINING_EFFECTS[name]
    choices = T.TrainConfig.__dataclass_fields__[name].metadata["choices"] or ()
    assert len(expected) > 1 and set(choices) <= set(expected)
    for i, (value, seen) in enumerate(expected.items()):
        folder = tmp_path / str(i)
        (folder / "run").mkdir(parents=True)  # or there would be nothing to resume
        run = plain
        if value != vars(plain.trainer.config)[name] or name == "seed":
            spelled = str(value).format(folder=folder, **places)
            run = watch(folder, data, f"--{name}={spelled}")
        run.plain = beginning(plain)
        assert what_it_governs(run) == seen, value
        pairs = zip(run.weights[-1].values(), plain.weights[-1].values())
        apart = max((p.float() - q.float()).abs().max().item() for p, q in pairs)
        config = vars(run.trainer.config)
        if name in CHANGE_THE_WEIGHTS and config[name] != vars(plain.trainer.config)[name]:
            assert apart > 1e-6, value
        else:  # another number of passes sums in another order
            assert apart <= (1e-4 if name == "batch_size" else 0), value


def test_the_start_of_a_seed_is_of_its_own_in_weights_and_order(data, tmp_path):
    runs = [watch(tmp_path / name, data, f"--seed={n}") for name, n in (("a", 0), ("b", 1))]
    starts = [run.weights[0]["embed.weight"] for run in runs]
    assert not torch.equal(*starts)
    assert not np.array_equal(runs[0].windows, runs[1].windows)


RUN_LIMITS = {  # numeric field: (lowest, highest)
    "seed": (0, 2**63 - 1),
    "max_steps": (1, 10**7),
    **dict.fromkeys("batch_size total_batch_size log_every".split(), (1, 10**12)),
    **dict.fromkeys("warmup_steps save_every keep sample_tokens".split(), (0, 10**12)),
    **dict.fromkeys("eval_every eval_tokens final_eval_tokens".split(), (0, 10**12)),
    **dict.fromkeys("muon_lr adamw_lr weight_decay grad_clip z_loss".split(), (0, 1e12)),
    **dict.fromkeys("muon_momentum muon_beta2 decay_fraction final_lr".split(), (0, 1)),
}


@pytest.mark.parametrize("f", fields(T.TrainConfig), ids=lambda f: f.name)
def test_both_sides_of_every_limit_of_training(f):
    assert (f.type in (int, float)) == (f.name in RUN_LIMITS)
    for value in RUN_LIMITS.get(f.name, []):
        assert vars(T.TrainConfig(**{f.name: value}))[f.name] == value
    low, high = RUN_LIMITS.get(f.name, (0, 0))
    outside = [low - 1, high + 1]
    if f.type is float:
        outside = [math.nextafter(low, -math.inf), math.nextafter(high, math.inf), math.nan]
    for value in outside if f.name in RUN_LIMITS else []:
        message = f"^{f.name}=.* must be a number from {low:g} to {re.escape(f'{high:g}')}$"
        with pytest.raises(InputError, match=message):
            T.TrainConfig(**{f.name: value})
    for choice in f.metadata["choices"] or ():
        assert vars(T.TrainConfig(**{f.name: choice}))[f.name] == choice
    wrong = 7 if f.type is str else "7"
    with pytest.raises(InputError, match=f"^{f.name}={wrong!r} must be "):
        T.TrainConfig(**{f.name: wrong})


RECIPE = dict(  # Table 4, and where it is silent the released code, at the paper's size
    n_embd=1024,
    n_head=16,
    block_size=2048,
    vocab_size=57601,
    ffn_dim=0,
    rope_theta=500_000.0,
    total_batch_size=262_144,
    max_steps=38_147,
    warmup_steps=1000,
    decay_fraction=0.2,
    final_lr=0.1,
    optimizer="muon",
    muon_lr=0.01,
    muon_momentum=0.95,
    muon_ramp=False,
    muon_beta2=0.0,
    muon_fused=False,
    adamw_lr=0.003,
    weight_decay=0.1,
    grad_clip=1.0,
    z_loss=1e-5,
    mask_documents=True,
    final_eval_tokens=0,
    init_from="",
    seed=1337,
    batch_size=16,
    eval_every=500,
    eval_tokens=10_485_760,
    save_every=1000,
    keep=2,
)


@pytest.mark.parametrize("variant, layers", [("base", 32), ("exo_dynamic", 29)])
def test_the_paper_s_run_is_table_4(variant, layers, data):
    given = dict(data=str(data), device="cpu")
    model_config, config = T.fresh_settings(variant, "paper", given)
    settings = {**asdict(model_config), **asdict(config)}
    assert {name: settings[name] for name in RECIPE} == RECIPE
    assert settings["n_layer"] == layers
    assert 128 * 2048 == 262_144 and 38_147 * 262_144 == 10_000_007_168


def test_the_learning_rates_of_the_paper_by_hand():
    """Warm-up (s + 1) / 1000; 7,629 steps, from 30,518 on, fall linearly towards a tenth."""
    paper = T.TrainConfig()
    by_hand = {
        0: 0.001,
        499: 0.5,
        999: 1,
        1000: 1,
        30_517: 1,
        30_518: 1,
        30_519: 1 - 0.9 / 7629,
        34_332: 1 - 0.9 * 3814 / 7629,
        38_146: 0.1 + 0.9 / 7629,
    }
    for step, share in by_hand.items():
        assert abs(T.lr_multiplier(step, paper) - share) < 1e-12, step
        assert T.muon_momentum(step, paper) == 0.95
    assert T.step_tokens(0, paper) == T.step_tokens(38_146, paper) == 262_144
    ours, adamw = T.build_optimizers(tiny("exo_dynamic"), T.TrainConfig(device="cpu"))
    T.schedule([ours, adamw], 499, paper)
    for group in ours.param_groups:
        assert (group["lr"], group["momentum"]) == (0.005, 0.95)
    assert {group["lr"] for group in adamw.param_groups} == {0.0015}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_optimizers_of_the_paper(optimizer):
    config = T.TrainConfig(device="cpu", optimizer=optimizer)
    *muons, adamw = T.build_optimizers(tiny("exo_dynamic"), config)
    assert len(muons) == (optimizer == "muon")
    for group in (group for o in muons for group in o.param_groups):
        assert (group["nesterov"], group["cautious"], group["beta2"]) == (True, True, None)
        assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.01, 0.95, 0.1)
    for group in adamw.param_groups:
        assert (group["betas"], group["eps"], group["lr"]) == ((0.9, 0.95), 1e-8, 0.003)
        assert not group["amsgrad"] and not group["maximize"]
    assert [g["weight_decay"] for g in adamw.param_groups] == ([0] if muons else [0.1, 0])


@pytest.mark.parametrize(
    "preset, expected",
    [
        ("small", (12, 12, 768, 1024, 8, 131_072, 19_073, 500, 0.2, 2_097_152, 0, 1000, 10)),
        ("smoke", (4, 4, 128, 256, 8, 2048, 160, 20, 0.5, 32_768, 32_768, 80, 20)),
    ],
)
def test_the_other_presets(preset, expected, data):
    """A preset goes before the number of layers of a row of Table 3, and a flag before both."""
    names = """n_layer n_head n_embd block_size batch_size total_batch_size max_steps warmup_steps
        decay_fraction eval_tokens final_eval_tokens save_every log_every""".split()
    given = dict(data=str(data), device="cpu")
    settings = {}
    for config in T.fresh_settings("base", preset, given):
        settings.update(asdict(config))
    assert tuple(settings[name] for name in names) == expected
    assert settings["vocab_size"] == 320  # 257 of the tokenizer, in full 64s
    assert not settings["gate"] and settings["anchor"] == "none"
    assert T.fresh_settings("base", preset, {**given, "n_layer": 7})[0].n_layer == 7
    assert T.fresh_settings("base", preset, {**given, "vocab_size": 300})[0].vocab_size == 300


MAY_CHANGE = set(
    """data out_dir resume device compile deterministic max_steps batch_size muon_lr adamw_lr
    warmup_steps decay_fraction final_lr eval_every eval_tokens final_eval_tokens save_every keep
    log_every sample_tokens""".split()
)
NO_PART_OF_THE_EXPERIMENT = set(
    """seed out_dir resume device compile deterministic batch_size save_every keep log_every
    sample_tokens""".split()
)
DECIDE_WHAT_IS_MEASURED = set(
    """data mask_documents eval_tokens final_eval_tokens vocab_size block_size tokenizer""".split()
)


def test_what_the_settings_declare():
    """A new setting is in none of these lists until somebody puts it there."""
    declared = {f.name: f.metadata for kind in (ModelConfig, T.TrainConfig) for f in fields(kind)}
    assert {n for n, facts in declared.items() if facts.get("resume")} == MAY_CHANGE
    steers = {n for n, facts in declared.items() if not facts.get("experiment", True)}
    assert steers == NO_PART_OF_THE_EXPERIMENT
    assert {n for n, facts in declared.items() if facts.get("measures")} == DECIDE_WHAT_IS_MEASURED


@pytest.mark.parametrize("name", TRAINING_EFFECTS)
def test_a_resumed_run_takes_these_changes_and_no_other(name, whole, places, tmp_path, capsys):
    path = f"{whole.config.out_dir}/ckpt_000012.pt"
    checkpoint = M.read_checkpoint(path)
    stored = checkpoint["train_config"][name]
    others = {*TRAINING_EFFECTS[name][1]} - {stored, "auto", "cuda", "mps", None}
    value = max(others, default="cpu")  # the one device that is everywhere
    if isinstance(value, str):
        value = value.format(folder=tmp_path, **places)
    if name in MAY_CHANGE:
        config = T.resumed_settings(None, {name: value}, checkpoint, path)[1]
        assert vars(config)[name] == value
        said = f"changed on resuming: {name} from {stored} to {value}; "
        silent = name in ("out_dir", "resume", "device")
        assert (said in capsys.readouterr().out) != silent
        return
    with pytest.raises(UserError, match=f"^--{name}=.* does not fit the run to resume, which has"):
        T.resumed_settings(None, {name: value}, checkpoint, path)


def test_a_gradient_that_is_not_finite_under_a_finite_loss_touches_no_weight(data, tmp_path):
    trainer, run_folder = start(tmp_path / "a", data)
    close(run_folder)
    weight = trainer.model.get_parameter("layers.1.mlp.up.weight")
    weight.register_hook(lambda grad: grad * math.nan)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(T.Diverged, match="gradient norm nan.*gradient of layers.1.mlp.up.weight"):
        trainer.update(trainer.read_step())
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.state_dict().items())


def test_what_a_variant_brings_is_refused_under_its_name(whole):
    path = f"{whole.config.out_dir}/ckpt_000012.pt"
    words = r"^--variant=base \(anchor=none\) does not fit the run to resume"
    with pytest.raises(UserError, match=words):
        T.resumed_settings("base", {"gate": True}, M.read_checkpoint(path), path)


@pytest.mark.parametrize("length, windows", [(33, 1), (64, 1), (65, 2), (66, 2)])
def test_a_window_needs_one_token_more_than_it_predicts(length, windows, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "t_train_000001.bin").unlink()
    pf.write_shard(tmp_path / "data" / "t_train_000000.bin", np.arange(length) % 97)
    config = ModelConfig(**{**TINY, "block_size": 32, "vocab_size": 320}, tokenizer="bytes")
    split = T.Tokens(tmp_path / "data", "train", config)
    assert len(split) == windows
    last = range(32 * windows - 32, 32 * windows + 1)
    assert split.window(windows - 1).tolist() == [i % 97 for i in last]


@pytest.mark.parametrize("rank, expected", [(0, {50, 52, 54}), (1, {51, 53, 55})])
def test_no_two_processes_draw_the_same_random_numbers(rank, expected, data, tmp_path, monkeypatch):
    """Of two, at no step."""
    trainer, run_folder = start(tmp_path / "a", data, "--seed=50")
    close(run_folder)
    seeds = set()

    def backward(windows):
        seeds.add(torch.initial_seed())
        raise InterruptedError

    monkeypatch.setattr(T, "WORLD_SIZE", 2)
    monkeypatch.setattr(T, "RANK", rank)
    monkeypatch.setattr(trainer, "backward", backward)
    for trainer.step in range(3):
        with pytest.raises(InterruptedError):
            trainer.update(None)
    assert seeds == expected


def test_each_step_draws_other_random_numbers(data, tmp_path, monkeypatch):
    forward = T.Objective.forward
    seeds = []

    def seen(objective, *batch):
        seeds.append(torch.initial_seed())
        return forward(objective, *batch)

    monkeypatch.setattr(T.Objective, "forward", seen)
    flags = ["--max_steps=3", "--eval_every=0", "--seed=50", "--batch_size=4"]
    train_fully(tmp_path / "a", data, *flags)
    assert set(seeds) == {50, 51, 52}


def test_a_preset_may_set_what_the_variant_sets(data, monkeypatch):
    """In the order that --help promises: defaults, variant, preset, flags."""
    preset = dict(T.PRESETS["smoke"], granularity="scalar", dynamic=False, window=7)
    monkeypatch.setitem(T.PRESETS, "mine", preset)
    given = dict(data=str(data), out_dir="x", window=9)
    config = T.fresh_settings("exo_dynamic", "mine", given)[0]
    assert (config.granularity, config.dynamic, config.window) == ("scalar", False, 9)
    assert (config.anchor, config.n_layer) == ("exogenous", preset["n_layer"])


def test_the_last_step_is_saved_before_its_evaluation(data, tmp_path, monkeypatch):
    """Also where no checkpoint is due."""
    saved_at = []
    evaluate = T.evaluate

    def look(trainer, tokens, stop):
        saved_at.append((trainer.step, trainer.saved))
        return evaluate(trainer, tokens, stop)

    monkeypatch.setattr(T, "evaluate", look)
    train_fully(tmp_path / "a", data, "--max_steps=4", "--save_every=3")
    assert saved_at == [(0, 0), (4, 4)]


def test_a_last_save_that_only_adds_the_evaluation_may_fail(data, tmp_path, monkeypatch, capsys):
    """The weights of the last step are in the file already: the run has not failed."""
    save_checkpoint = T.save_checkpoint

    def fill_the_disk(path, checkpoint):
        if checkpoint["evaluated"] == 4:
            raise OSError("no space left")
        save_checkpoint(path, checkpoint)

    monkeypatch.setattr(T, "save_checkpoint", fill_the_disk)
    flags = [f"--data={data}", f"--out_dir={tmp_path / 'a'}", *SMALL, "--max_steps=4"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    assert T.main() == 0
    out = capsys.readouterr().out
    assert "COULD NOT WRITE" in out and "done: 4 steps" in out
    assert newest_of(tmp_path / "a") == "ckpt_000004.pt"


def test_an_optimizer_that_could_not_be_resumed_is_refused_at_the_first_step(data, tmp_path):
    trainer, run_folder = start(tmp_path / "a", data)
    trainer.optimizers[1] = torch.optim.Adafactor(T.parameters_of(trainer.optimizers[1]))
    trainer.optimizers[1].param_groups[0]["peak_lr"] = 0.01
    with pytest.raises(ValueError, match="refuse the checkpoints of this run: .* Adafactor is not"):
        T.run(trainer, run_folder, Quiet())
    assert trainer.step == 1
    close(run_folder)


def test_a_variant_named_on_resuming_may_have_other_layers(whole, tmp_path):
    """The row of Table 3 has 29 layers, the run 2."""
    folder = copied(whole, tmp_path / "a")
    assert resume(folder, "--variant=exo_dynamic", "--max_steps=13").step == 13
    with pytest.raises(UserError, match="^--n_layer=29 does not fit the run to resume"):
        resume(folder, "--variant=exo_dynamic", "--n_layer=29")


def test_a_checkpoint_is_written_when_the_log_it_counts_is_on_the_disk(tmp_path, monkeypatch):
    run_folder = T.RunFolder(str(tmp_path / "a"), resume=False)
    run_folder.open_log(0)
    order = []
    fsync = os.fsync
    save_checkpoint = T.save_checkpoint

    def noted_fsync(number):
        order.append(number)
        fsync(number)

    def noted_save(*args):
        order.append("save")
        save_checkpoint(*args)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(T, "save_checkpoint", noted_save)
    assert run_folder.save(dict(step=1), keep=0)
    assert order[:2] == [run_folder.log.fileno(), "save"]
    close(run_folder)
    checkpoint = torch.load(tmp_path / "a" / "ckpt_000001.pt", weights_only=True)
    assert checkpoint["format"] == 1 and checkpoint["torch_version"] == torch.__version__
    assert checkpoint["git_revision"] == T.git_revision()


def test_gradients_of_every_dtype_are_summed_over_the_processes(monkeypatch):
    parameters = [
        torch.nn.Parameter(torch.ones(3)),
        torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16)),
    ]
    for p in parameters:
        p.grad = torch.full_like(p, 1.5)
    monkeypatch.setattr(T, "WORLD_SIZE", 2)
    monkeypatch.setattr(T.dist, "all_reduce", lambda tensor, op: tensor.mul_(2))
    T.all_reduce_gradients(parameters)
    assert all((p.grad == 3).all() and p.grad.dtype == p.dtype for p in parameters)


def test_two_processes_read_the_windows_that_one_would(data, tmp_path, monkeypatch):
    """Of a step and of an evaluation, each its own; and they share the mean of the loss."""
    one, run_folder = start(tmp_path / "one", data, "--batch_size=4")
    close(run_folder)
    whole_step = one.read_step()
    whole_val = T.read_validation(one, 0, 4)
    two, run_folder = start(tmp_path / "two", data, "--batch_size=2")
    close(run_folder)
    two.sequences = 4
    monkeypatch.setattr(T, "WORLD_SIZE", 2)
    monkeypatch.setattr(T.dist, "all_reduce", lambda tensor, op: tensor.mul_(2))  # as of two alike
    steps = []
    val = []
    for rank in (0, 1):
        monkeypatch.setattr(T, "RANK", rank)
        steps.append(two.read_step())
        val += T.read_validation(two, 0, 4)
    assert np.array_equal(np.concatenate(steps, axis=1), whole_step)
    assert np.array_equal(val, whole_val)
    cross_entropy, z = two.backward(steps[0])
    assert cross_entropy == pytest.approx(math.log(320), rel=1e-5)
    alike = two.model.head.weight.grad.clone()
    two.model.zero_grad()
    monkeypatch.setattr(T, "WORLD_SIZE", 1)
    two.backward(steps[0])
    torch.testing.assert_close(alike, two.model.head.weight.grad)


def test_init_from_is_refused_on_data_of_another_tokenizer(data, tmp_path):
    model = tiny("exo", n_layer=2, n_embd=32, ffn_dim=64, n_head=2)
    path = saved(model, tmp_path / "gpt2.pt")
    words = "holds bytes tokens, but the model in --init_from=.* was trained on gpt2"
    with pytest.raises(UserError, match=words):
        start(tmp_path / "a", data, f"--init_from={path}")


# ----------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    "variant, flags",
    [
        ("base", []),
        ("exo_dynamic", ["--muon_ramp", "--muon_beta2=0.95"]),
        ("gated", ["--dtype=bfloat16", "--window=9"]),
        *(
            pytest.param(*run, marks=pytest.mark.slow)
            for run in (
                ("nuresformer", ["--mask_documents=false"]),
                ("exo_dynamic", []),
                ("exo", ["--optimizer=adamw"]),
                ("exo_dynamic", ["--dtype=pure_bfloat16"]),
            )
        ),
    ],
)
def test_resume_is_bitwise(variant, flags, data, tmp_path):
    """12 steps = 5 steps, a stop, 7 more: weights, optimizer states, log. The first epoch ends
    within step 11."""
    flags = [f"--variant={variant}", *flags]
    whole = train_fully(tmp_path / "a", data, *flags)
    stopped = train_fully(tmp_path / "b", data, *flags, stop_after=5)
    assert stopped.stopped == "SIGTERM" and newest_of(tmp_path / "b") == "ckpt_000005.pt"
    assert len(log_of(tmp_path / "b", "loss")) == 5
    resumed = resume(tmp_path / "b")
    assert same_state(whole, resumed) == [] and resumed.step == 12
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")
    assert [record["step"] for record in log_of(tmp_path / "b", "loss")] == list(range(1, 13))
    assert [record["step"] for record in log_of(tmp_path / "b", "val_loss")] == [0, 4, 8, 12]


def test_a_layer_that_draws_random_numbers_resumes_bitwise(data, tmp_path, monkeypatch):
    forward = T.Objective.forward

    def random_loss(objective, *batch):
        loss, *parts = forward(objective, *batch)
        return F.dropout(loss, 0.5), *parts

    monkeypatch.setattr(T.Objective, "forward", random_loss)
    whole = train_fully(tmp_path / "a", data)
    train_fully(tmp_path / "b", data, stop_after=5)
    assert same_state(whole, resume(tmp_path / "b")) == []


@pytest.mark.parametrize("step", [0, 12])
@pytest.mark.parametrize("how", ["killed", "SIGTERM"])
def test_a_run_that_ends_within_an_evaluation_loses_nothing(
    how, step, whole, data, tmp_path, monkeypatch
):
    """The last evaluation may read the whole validation set; the log ends as if nothing had
    happened."""
    batches = []
    evaluate_batch = T.evaluate_batch
    log = log_of(pathlib.Path(whole.config.out_dir))

    def interrupted(trainer, windows):
        if trainer.step == step:
            batches.append(windows)
            trainer.stop.signal = signal.SIGTERM
            if how == "killed":
                raise KeyboardInterrupt
        return evaluate_batch(trainer, windows)

    with (
        monkeypatch.context() as patch,
        pytest.raises(KeyboardInterrupt) if how == "killed" else nullcontext(),
    ):
        patch.setattr(T, "evaluate_batch", interrupted)
        assert train_fully(tmp_path / "a", data, "--save_every=0").stopped == "SIGTERM"
    assert newest_of(tmp_path / "a") == f"ckpt_{step:06d}.pt" and len(batches) == 1
    resumed = resume(tmp_path / "a")
    assert resumed.step == 12 and same_state(whole, resumed) == []
    assert log_of(tmp_path / "a") == log and "val_loss" in log[-1]
    assert resume(tmp_path / "a").step == 12 and log_of(tmp_path / "a") == log


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--variant=base"], r"--variant=base \(gate=False\).*gate=True"),
        (["--n_embd=64"], "--n_embd=64.*n_embd=32"),
        (["--seed=5"], "--seed=5.*seed=1337"),
        (["--total_batch_size=64"], "--total_batch_size=64.*total_batch_size=128"),
        (["--optimizer=adamw"], "--optimizer=adamw.*optimizer=muon"),
    ],
)
def test_resume_refuses_another_run(flags, words, whole, tmp_path):
    with pytest.raises((InputError, UserError), match="^" + words):
        resume(copied(whole, tmp_path / "a"), *flags)


def test_resume_announces_what_may_change(whole, data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "moved")
    flags = ["--max_steps=14", "--muon_lr=0.002", f"--data={tmp_path / 'moved'}"]
    assert resume(copied(whole, tmp_path / "a"), *flags).step == 14
    out = capsys.readouterr().out
    assert "max_steps from 12 to 14" in out and "muon_lr from 0.01 to 0.002" in out
    assert f"data from {data} to {tmp_path / 'moved'}" in out


# ----------------------------------------------------------------------------------------- damage


def saved(model, path, **more):
    save_checkpoint(path, dict(model_config=asdict(model.config), model=model.state_dict(), **more))
    return path


@every_variant
def test_checkpoint_round_trip_is_bitwise(variant, tmp_path):
    model = tiny(variant)
    again = load_checkpoint(saved(model, tmp_path / "c.pt"))
    assert torch.equal(again(tokens(2, 10)), model(tokens(2, 10)))
    assert again.config == model.config and not again.training
    assert os.listdir(tmp_path) == ["c.pt"]


def test_released_checkpoint_file_loads(tmp_path):
    golden, state, model = released("exo_headwise")
    model_args = dict(block_size=64, rope_theta=500_000.0)
    torch.save(dict(model=state, model_args=model_args, step=38146), tmp_path / "r.pt")
    idx = torch.tensor(golden["idx"])
    again = load_checkpoint(tmp_path / "r.pt")
    assert torch.equal(again(idx), model(idx)) and again.config.block_size == 64


class Attack:
    """A pickle that would leave a file behind if it ran."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def with_a_bit_flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


HARM_TO_BYTES = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[:-700],
    "text": lambda content: b"hello",
    "flipped bit": with_a_bit_flipped,
}
HARM_TO_CONTENT = {
    "newer format": lambda checkpoint: checkpoint.update(format=2),
    "unknown setting": lambda checkpoint: checkpoint["model_config"].update(n_lair=3),
    "unknown flag": lambda checkpoint: checkpoint["train_config"].update(color="red"),
    "missing tensor": lambda checkpoint: checkpoint["model"].popitem(),
    "missing key": lambda checkpoint: checkpoint.pop("tokens"),
    "missing optimizer": lambda checkpoint: checkpoint["optimizers"].pop(),
    "missing state": lambda checkpoint: checkpoint["optimizers"][0]["state"].popitem(),
    "missing moment": lambda checkpoint: checkpoint["optimizers"][1]["state"][0].popitem(),
    "number for a state": lambda checkpoint: checkpoint["optimizers"][0]["state"].update({0: 3}),
    "list for a setting": lambda checkpoint: checkpoint["train_config"].update(keep=[]),
    "no shards": lambda checkpoint: checkpoint["shards"].clear(),
    "number for shards": lambda checkpoint: checkpoint["shards"].update(val=3),
    "of another program": lambda checkpoint: checkpoint.clear(),
}


def harm(path, fault, witness=None):
    """Do to a checkpoint what `fault` says; what is "malicious" would write the file `witness`."""
    content = path.read_bytes()
    if fault == "missing":
        path.unlink()
    elif fault in HARM_TO_BYTES:
        path.unlink()  # not written in place: it may be a hard link
        path.write_bytes(HARM_TO_BYTES[fault](content))
    else:
        checkpoint = torch.load(path, weights_only=True)
        if fault == "malicious":
            checkpoint.update(model=Attack(witness))
        else:
            HARM_TO_CONTENT[fault](checkpoint)
        torch.save(checkpoint, path)


@pytest.mark.parametrize(
    "fault, words",
    [
        ("missing", "no such checkpoint"),
        ("empty", "not a whole checkpoint"),
        ("truncated", "not a whole checkpoint"),
        ("flipped bit", "is damaged: its record|not a whole checkpoint"),
        ("text", "not a whole checkpoint"),
        ("malicious", "is not a checkpoint"),
        ("newer format", "has format 2, newer than the 1 .*update the code"),
        ("unknown setting", "settings this version does not know: n_lair; use the version"),
        ("missing tensor", "weights do not fit its configuration .*head.weight"),
    ],
)
def test_damaged_checkpoints_are_refused_in_one_line(fault, words, tmp_path):
    path = saved(tiny("exo"), tmp_path / "c.pt")
    witness = tmp_path / "witness"
    harm(path, fault, witness)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}.*{words}") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value) and not witness.exists()
    damaged = fault in HARM_TO_BYTES
    assert isinstance(error.value, M.DamagedCheckpoint) == damaged


def test_a_record_marked_as_a_folder_is_damage(tmp_path):
    """The bit is in the archive's directory, which has no checksum; torch reads other values."""
    path = saved(tiny("exo"), tmp_path / "c.pt")
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")  # the last entry of the directory
    content[entry + 38] |= 0x10  # its external attributes
    path.write_bytes(content)
    with pytest.raises(M.DamagedCheckpoint, match="is damaged: its record"):
        load_checkpoint(path)


def test_a_file_that_holds_something_else_is_not_called_damaged(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(dict(weights=torch.ones(2)), tmp_path / "other.pt")
    for name, words in (("list.pt", "holds a list"), ("other.pt", "not a checkpoint of the")):
        with pytest.raises(InputError, match=words) as error:
            load_checkpoint(tmp_path / name)
        assert not isinstance(error.value, M.DamagedCheckpoint)


def test_too_little_memory_is_not_a_fault_of_the_file(tmp_path, monkeypatch):
    path = saved(tiny("exo"), tmp_path / "c.pt")

    def load(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(RuntimeError, match="allocate memory"):
        load_checkpoint(path)


def test_a_folder_stands_for_its_newest_checkpoint(tmp_path):
    for step, variant in ((9, "base"), (999_999, "gated"), (1_000_000, "exo")):
        saved(tiny(variant), tmp_path / f"ckpt_{step:06d}.pt")
    (tmp_path / "ckpt_2000000.pt.part").write_bytes(b"half")
    assert M.variant_name(load_checkpoint(tmp_path).config) == "exo"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no checkpoint in this folder"):
        load_checkpoint(tmp_path / "empty")


def newest_of(folder):
    """The name of the newest checkpoint."""
    return max(os.path.basename(path) for path in folder.glob("ckpt_*.pt"))


@pytest.mark.parametrize("fault", HARM_TO_BYTES)
def test_resume_skips_a_bad_newest_checkpoint_and_says_so(fault, whole, tmp_path, capsys):
    folder = copied(whole, tmp_path / "a")
    harm(folder / "ckpt_000012.pt", fault)
    resumed = resume(folder)
    assert resumed.step == 12 and same_state(whole, resumed) == []
    said = "skipped: .*ckpt_000012.pt .+\\ncontinuing .*ckpt_000008.pt after step 8\\n"
    assert re.search(said, capsys.readouterr().out)
    assert log_of(folder) == log_of(pathlib.Path(whole.config.out_dir))


@pytest.mark.parametrize(
    "fault",
    [
        "malicious",
        "of another program",
        "missing tensor",
        "missing optimizer",
        "missing key",
        "missing state",
        "missing moment",
        "number for a state",
    ],
)
def test_a_sound_file_that_does_not_fit_is_named_and_no_older_one_continued(fault, whole, tmp_path):
    folder = copied(whole, tmp_path / "a")
    witness = tmp_path / "witness"
    harm(folder / "ckpt_000012.pt", fault, witness)
    words = "ckpt_000012.pt is not (a checkpoint|the whole state of)"
    with pytest.raises((InputError, UserError), match=words) as error:
        resume(folder)
    assert "\n" not in str(error.value) and not witness.exists()


@pytest.mark.parametrize(
    "fault, words",
    [
        ("no shards", "train shards .* are not those that the run began"),
        ("number for shards", "val shards .* are not those that the run began"),
        ("list for a setting", "keep=.* must be"),
    ],
)
def test_odd_values_in_a_checkpoint_are_one_line(fault, words, whole, tmp_path):
    folder = copied(whole, tmp_path / "a")
    harm(folder / "ckpt_000012.pt", fault, None)
    with pytest.raises((InputError, UserError), match=words):
        resume(folder)


@pytest.mark.parametrize(
    "fault, words",
    [
        ("newer format", "has format 2, newer.*update the code"),
        ("unknown setting", "n_lair; use the version of the code that wrote it"),
        ("unknown flag", "color; use the version of the code that wrote it"),
    ],
)
def test_resume_refuses_the_checkpoint_of_another_version(fault, words, whole, tmp_path):
    folder = copied(whole, tmp_path / "a")
    harm(folder / "ckpt_000012.pt", fault)
    with pytest.raises((InputError, UserError), match=words):
        resume(folder)


def test_resume_without_a_whole_checkpoint_says_so(whole, tmp_path):
    folder = copied(whole, tmp_path / "a")
    for path in folder.glob("ckpt_*.pt"):
        harm(path, "truncated")
    with pytest.raises((InputError, UserError), match="no whole checkpoint"):
        resume(folder)


def remove_a_shard(folder):
    (folder / "t_train_000001.bin").unlink()


def change_tokens_of_a_shard(folder):
    pf.write_shard(folder / "t_val_000000.bin", np.full(170, 97))


@pytest.mark.parametrize(
    "change, words",
    [
        (remove_a_shard, "its train shards .1, 900 tokens. are not those that"),
        (change_tokens_of_a_shard, "its val shards .1, 170 tokens. are not those that"),
    ],
)
def test_data_that_changed_since_are_refused(change, words, whole, data, tmp_path):
    change(shutil.copytree(data, tmp_path / "data"))
    with pytest.raises((InputError, UserError), match=words):
        resume(copied(whole, tmp_path / "a"), f"--data={tmp_path / 'data'}")


# ----------------------------------------------------------------------------------- many processes


PATIENCE = 900  # seconds: no limit for a slow machine, but the end of a process that hangs


def launch_ranks(n, folder, *flags):
    """torchrun with n processes on this machine, which meet at a port that torchrun holds."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    train = [str(HERE / "train.py"), f"--out_dir={folder}", *flags]
    return subprocess.Popen(
        [*torchrun, f"--nproc_per_node={n}", *train],
        text=True,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def output_of(process):
    """(stdout, stderr) of a process that ends; one that hangs is ended."""
    try:
        return process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends those that it started
        raise


def run_ranks(n, folder, *flags):
    process = launch_ranks(n, folder, *flags)
    out = output_of(process)[0]
    assert process.returncode == 0, out
    return out


def weights(folder, step):
    return M.read_checkpoint(folder / f"ckpt_{step:06d}.pt")["model"]


@pytest.mark.slow
def test_two_processes_equal_one_with_two_accumulations_bit_for_bit(data, tmp_path):
    """Compiled. Halving is exact, so this is the sharpest check there is. And one process resumes
    what two began: block_size 31 makes 42 windows, so that step 21 of 2 x 31 tokens, where it goes
    on, begins an epoch anew."""
    folder = tmp_path / "two"
    flags = """--variant=exo_dynamic --n_layer=1 --block_size=31 --batch_size=1
        --total_batch_size=62 --max_steps=23 --save_every=21 --eval_every=0
        --compile=true""".split()
    one = train_fully(tmp_path / "one", data, *flags)
    run_ranks(2, folder, *SMALL, f"--data={data}", *flags)
    two = weights(folder, 23)
    for name, p in one.model.state_dict().items():
        assert torch.equal(p, two[name]), name
    assert log_of(folder, "val_loss") == log_of(tmp_path / "one", "val_loss")
    assert len(one.train) == 42
    (folder / "ckpt_000023.pt").unlink()
    assert same_state(one, resume(folder)) == []
    assert [record["step"] for record in log_of(folder, "loss")] == list(range(1, 24))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-m", "not slow", *sys.argv[1:]]))
