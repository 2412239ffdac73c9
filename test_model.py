"""
The tests of model.py, muon.py and train.py: CPU only, no network, no data but what they make or what lies in
paper/testdata.

    python test_model.py                the quick ones, in under a minute on 2 cores
    python -m pytest                    everything, paper/ too, in under 5 minutes

The order is the paper's: equations, variants, equality with the released code, Muon, a training step; then resuming,
damaged files, and training in two processes. Oracles are independent of the code under test: loops in float64, numbers
that the paper's released code computed, a second implementation. Data, HellaSwag, signals, full disks and torchrun are
tested in paper/.
"""
import copy
import functools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import types
import warnings
import zlib
from contextlib import nullcontext
from dataclasses import asdict

os.environ["OMP_NUM_THREADS"] = "1"          # for every process that a test starts: threads that wait for a core spin
import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

torch.set_num_threads(1)
warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)      # "slow" needs no settings file
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import model as M
import muon
import prepare_fineweb as pf
import train as T
from model import VARIANTS, ExoFormer, InputError, KVCache, ModelConfig, generate, load_checkpoint, variant_config
from prepare_fineweb import UserError
from train import save_checkpoint

HERE, CPU = pathlib.Path(__file__).parent, torch.device("cpu")
TESTDATA = HERE / "paper" / "testdata"
TINY = dict(n_layer=3, n_head=4, n_embd=32, ffn_dim=128, vocab_size=96, block_size=40)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def tiny(variant="exo_dynamic", seed=0, **changes):
    """A small model of a variant with every parameter moved off its special start (zeros, ones, equal lambdas)."""
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


# ---------------------------------------------------------------------------------------------------------- equations

def test_eq_7_heads_are_contiguous_blocks_of_channels():
    h, attn = torch.randn(1, 2, 32), tiny("gated").layers[1].attn
    for s, w in zip("qkvg", attn.project.weight.split(32)):
        torch.testing.assert_close(attn.project(h)[s][0, 1, 2], (h[0, 1] @ w.T)[16:24])


@pytest.mark.parametrize("variant", ["nuresformer", "exo"])
def test_eq_8_and_9_an_anchor_reads_single_tokens(variant):
    """Layer 1's projections of its normed input (internal), or matrices of their own on the raw embeddings."""
    model, idx = tiny(variant), tokens(1, 6)
    x, anchor = model.embed.weight[idx[0, 3]], model.make_anchor(model.embed(idx))
    internal = variant == "nuresformer"
    source = rms_norm(x, model.layers[0].attn_norm.weight) if internal else x
    matrices = (model.layers[0].attn if internal else model.anchor).project.weight.split(32)
    for s, w in zip("qkvg", matrices):
        torch.testing.assert_close(anchor[s][0, 3], rms_norm((source @ w.T).view(4, 8), model.anchor.norms[s].weight))


def test_an_internal_anchor_is_not_mixed_in_its_own_layer():
    inside, outside = (ExoFormer(ModelConfig(**TINY, anchor=anchor, dynamic=True))
                       for anchor in ("internal", "exogenous"))
    assert [len(layer.attn.mix) for layer in inside.layers] == [0, 4, 4]
    assert [len(layer.attn.mix) for layer in outside.layers] == [4, 4, 4]
    assert not list(inside.layers[0].attn.gammas.parameters())


@pytest.mark.parametrize("granularity", M.GRANULARITY)
def test_eq_10_and_12_mix_matches_loops(granularity):
    mix, shape = M.Mix(ModelConfig(**TINY, granularity=granularity)).double(), (2, 3, 4, 8)
    anchor, current = torch.randn(2, *shape).double()
    gamma = torch.rand(2, 2, 3, 1, 1).double()
    with torch.no_grad():
        mix.lambda_anchor.normal_(), mix.lambda_current.normal_()
        mixed = mix(anchor, current, gamma)
    first, second = (p.detach().expand(4, 8) for p in (mix.lambda_anchor, mix.lambda_current))
    for b, t, h, d in np.ndindex(*shape):
        expected = (gamma[0, b, t] * first[h, d] * anchor[b, t, h, d]
                    + gamma[1, b, t] * second[h, d] * current[b, t, h, d])
        assert abs(mixed[b, t, h, d].item() - expected.item()) < 1e-12


@pytest.mark.parametrize("granularity", M.GRANULARITY)
def test_the_derivative_of_eq_12_is_that_of_its_formula(granularity):
    """By finite differences in float64, for every argument; gamma one per token, or the constant of a static model."""
    draw = functools.partial(torch.randn, dtype=torch.float64, requires_grad=True)
    anchor, current, shape = draw(2, 3, 2, 4), draw(2, 3, 2, 4), M.GRANULARITY[granularity](2, 4)
    for gammas in ((draw(2, 3, 1, 1), draw(2, 3, 1, 1)), torch.ones(2, dtype=torch.float64).unbind()):
        assert torch.autograd.gradcheck(M.WeightedSum.apply, (anchor, current, draw(shape), draw(shape), *gammas))


@pytest.mark.parametrize("granularity", M.GRANULARITY)
def test_gradients_of_static_lambdas_are_not_rounded_to_bfloat16(granularity):
    """q, k, v, g are bfloat16 under autocast; the sums over them are taken in float32."""
    config = ModelConfig(**TINY, granularity=granularity)
    mix = M.Mix(config)
    anchor = torch.randn(2, 30, 4, 8).bfloat16()
    current = torch.randn(2, 30, 4, 8).bfloat16()
    gamma = M.StaticMixing(config, "v")(current)["v"]
    with torch.no_grad():
        mix.lambda_anchor.fill_(0.5)
        mix.lambda_current.fill_(0.5)
    mixed = mix(anchor, current, gamma)
    upstream = torch.randn(2, 30, 4, 8).bfloat16()
    mixed.backward(upstream)
    for source, p in ((anchor, mix.lambda_anchor), (current, mix.lambda_current)):
        exact = (upstream.double() * source.double()).sum_to_size(p.shape)
        torch.testing.assert_close(p.grad.double(), exact, atol=1e-4, rtol=1e-5)


def test_eq_11_gamma_matches_loops():
    dynamic, h = M.DynamicMixing(ModelConfig(**TINY, dynamic=True), "qkvg").double(), torch.randn(2, 3, 32).double()
    with torch.no_grad():
        for p in dynamic.parameters():
            p.normal_()
    gamma, w1, w2, bias = dynamic(h), *(p.detach().numpy() for p in (dynamic.fc1.weight, dynamic.fc2.weight,
                                                                     dynamic.bias))
    for b, t in np.ndindex(2, 3):
        hidden = [x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in w1 @ h[b, t].numpy()]
        slots = 1 / (1 + np.exp(-(w2 @ hidden + bias)))
        for i, s in enumerate("qkvg"):
            pair = [gamma[s][j][b, t].item() for j in range(2)]
            np.testing.assert_allclose(pair, slots[2 * i:2 * i + 2], rtol=1e-6)


@pytest.mark.parametrize("anchor", ["internal", "exogenous"])
@pytest.mark.parametrize("granularity", M.GRANULARITY)
def test_dynamic_equals_static_at_init(anchor, granularity):
    static, dynamic = (ExoFormer(ModelConfig(**TINY, anchor=anchor, granularity=granularity, dynamic=dynamic))
                       for dynamic in (False, True))
    with torch.no_grad():
        for name, p in static.named_parameters():
            if "lambda" not in name:
                dynamic.get_parameter(name).copy_(p.normal_(std=0.3))
    assert torch.equal(static(tokens(2, 20)), dynamic(tokens(2, 20)))


def test_rms_norm_and_rope_match_loops():
    norm, x, config = M.RMSNorm(8), torch.randn(2, 5, 3, 8), ModelConfig(**TINY)
    cache = KVCache(config, 2, 7)
    cache.grow(7)                                                           # so that the five are positions 2 to 6
    with torch.no_grad():
        norm.weight.normal_()
    y, rotated = norm(x).detach().numpy(), M.Positions(config, 5, CPU, cache=cache).rotate(x).numpy()
    for b, t, h in np.ndindex(2, 5, 3):
        v = x[b, t, h].double()
        np.testing.assert_allclose(y[b, t, h], rms_norm(v, norm.weight.detach()), rtol=1e-5)
        for i in range(4):
            turned = complex(v[i], v[i + 4]) * np.exp(1j * (t + 2) * 500_000.0 ** (-2 * i / 8))
            np.testing.assert_allclose(rotated[b, t, h, [i, i + 4]], [turned.real, turned.imag], atol=1e-5)


@pytest.mark.parametrize("position, formula", [
    ("pre", lambda x, f, before, after: x + f(before(x))), ("after", lambda x, f, before, after: x + after(f(x))),
    ("both", lambda x, f, before, after: x + after(f(before(x))))])
@torch.no_grad()
def test_norms_stand_where_norm_position_says(position, formula):
    block, x, at = tiny("gated", norm_position=position).layers[1], torch.randn(2, 7, 32), M.Positions(
        ModelConfig(**TINY), 7, CPU)

    def by_hand(norm):
        return lambda y: torch.stack([rms_norm(row, norm.weight) for row in y])
    middle = formula(x, lambda y: block.attn(y, {}, at), by_hand(block.attn_norm), by_hand(block.attn_post_norm))
    end = formula(middle, block.mlp, by_hand(block.mlp_norm), by_hand(block.mlp_post_norm))
    torch.testing.assert_close(block(x, {}, at), end, atol=1e-5, rtol=1e-5)


def test_the_loss_and_its_gradients_match_float64_and_count_only_targets():
    """A head of 90 real columns in 128, targets -100 among the others."""
    model, idx, targets = tiny("base", vocab_size=90), tokens(2, 20, high=90), tokens(2, 20, seed=3, high=90)
    targets[0, 5:9] = -100
    counted, exact = targets != -100, copy.deepcopy(model).double()
    logits = exact(idx)[counted][:, :90]
    lse = logits.exp().sum(-1).log()
    right, squares = (lse - logits[range(36), targets[counted]]).mean(), lse.square().mean()
    (right + 0.01 * squares).backward()
    cross_entropy, z = model.loss(idx, targets)
    (cross_entropy + 0.01 * z).backward()
    assert abs(cross_entropy.item() - right.item()) < 1e-5 and abs(z.item() - squares.item()) < 1e-3
    for (name, p), q in zip(model.named_parameters(), exact.parameters()):
        torch.testing.assert_close(p.grad.double(), q.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_head_padding_is_never_predicted_nor_counted():
    model = tiny("base", vocab_size=90)
    logits = model(tokens(1, 5, high=90))
    assert logits.shape[-1] == 128 and (logits[..., 90:] == -math.inf).all() and logits[..., :90].isfinite().all()
    model.loss(tokens(1, 5, high=90), tokens(1, 5, high=90))[0].backward()
    assert (model.head.weight.grad[90:] == 0).all()
    assert M.count_parameters(model) == sum(p.numel() for p in model.parameters()) - 38 * 32


# --------------------------------------------------------------------------------------------------- who sees whom

DOCS = (tokens(2, 24) < 14).cumsum(1)


def every_other(config, query, key):
    """A rule that model.py does not have."""
    return (key <= query) & ((query - key) % 2 == 0)


@pytest.fixture(params=["causal", "sliding_window", "every_other"])
def rule(request, monkeypatch):
    """(ModelConfig field that chooses a rule, the rule as a function of two numbers)."""
    if request.param == "every_other":
        monkeypatch.setattr(M, "sliding_window", every_other)
    return dict(window=0 if request.param == "causal" else 4), {
        "causal": lambda query, key: key <= query, "sliding_window": lambda query, key: query - 4 < key <= query,
        "every_other": lambda query, key: key in range(query, -1, -2)}[request.param]


@pytest.mark.parametrize("docs, cached", [(None, 0), (DOCS, 0), (None, 9)])
def test_the_mask_matches_a_loop(docs, cached, rule):
    config, sees = ModelConfig(**TINY, **rule[0]), rule[1]
    cache = KVCache(config, 2, 24)
    cache.grow(24)
    mask = M.Positions(config, 24 - cached, CPU, docs, cache if cached else None).dense_mask()
    for b, q, k in np.ndindex(2, 24 - cached, 24):
        seen = sees(q + cached, k) and (docs is None or docs[b, q].item() == docs[b, k].item())
        assert mask.expand(2, 1, -1, -1)[b, 0, q, k] == seen


@pytest.mark.parametrize("way", ["plain", "documents", "cached"])
@torch.no_grad()
def test_a_token_reaches_as_far_as_the_rule_lets_it(way, rule):
    """In 3 layers: whoever sees it, whoever sees those, and once more. Nobody else's logits change by a bit."""
    model, idx, docs = tiny("exo_dynamic", **rule[0]), tokens(1, 24), DOCS[:1] if way == "documents" else None
    sees = torch.tensor([[rule[1](q, k) and (docs is None or docs[0, q].item() == docs[0, k].item())
                          for k in range(24)] for q in range(24)]).float()

    def logits(idx):
        cache, cuts = KVCache(model.config, 1, 24), ((0, 10), (10, 11), (11, 24))
        return (torch.cat([model(idx[:, a:b], cache=cache) for a, b in cuts], 1) if way == "cached"
                else model(idx, docs))
    before = logits(idx)
    for p in range(24):
        moved = logits(idx.where(torch.arange(24) != p, (idx + 1) % 96)) != before
        assert torch.equal(moved[0].any(-1), torch.linalg.matrix_power(sees, 3)[:, p] > 0)
    torch.testing.assert_close(before, model(idx, docs), atol=2e-4, rtol=1e-4)


def alibi(config, head, query, key):
    """A bias that falls with the distance, for each head at another rate."""
    return (key - query) * 2.0 ** -(head + 1)


@pytest.mark.parametrize("way", ["plain", "documents", "cached"])
@torch.no_grad()
def test_a_bias_reaches_every_way_to_attend(way, monkeypatch):
    choose_kernel = M.Positions.choose_kernel

    def with_bias(positions, *args):
        positions.bias = alibi
        return choose_kernel(positions, *args)

    monkeypatch.setattr(M.Positions, "choose_kernel", with_bias)
    config = ModelConfig(**TINY)
    docs = DOCS if way == "documents" else None
    q, k, v = torch.randn(3, 2, 24, 4, 8)
    if way == "cached":
        cache = KVCache(config, 2, 24)
        parts = []
        for a, b in ((0, 10), (10, 24)):
            cache.grow(b - a)
            positions = M.Positions(config, b - a, CPU, cache=cache)
            parts.append(positions.attend(0, q[:, a:b], k[:, a:b], v[:, a:b]))
        attended = torch.cat(parts, 1)
    else:
        attended = M.Positions(config, 24, CPU, docs).attend(0, q, k, v)
    for b, t, h in np.ndindex(2, 24, 4):
        seen = [j for j in range(t + 1) if docs is None or docs[b, j] == docs[b, t]]
        scores = torch.stack([q[b, t, h] @ k[b, j, h] / math.sqrt(8) + (j - t) * 2.0 ** -(h + 1) for j in seen])
        expected = F.softmax(scores, 0) @ v[b, seen, h]
        torch.testing.assert_close(attended[b, t, h], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("docs", [None, (tokens(2, 300) < 3).cumsum(1)])
@torch.no_grad()
def test_flex_attention_masks_the_same_tokens(docs, monkeypatch):
    """The path of compiled CUDA training, run by FlexAttention's eager CPU forward, where it needs no GPU."""
    config, (q, k, v) = ModelConfig(**{**TINY, "block_size": 300, "window": 70}), torch.randn(3, 2, 300, 4, 8)
    sparse, dense = M.Positions(config, 300, CPU, docs), M.Positions(config, 300, CPU, docs)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        patch.setattr(M, "create_block_mask", lambda *args, device: create_block_mask(*args, device="cpu"))
        sparse.kernel = sparse.choose_kernel(300, types.SimpleNamespace(type="cuda"))
    assert "block_mask" in sparse.kernel.keywords and not torch.backends.cuda.cudnn_sdp_enabled()
    torch.testing.assert_close(sparse.attend(0, q, k, v), dense.attend(0, q, k, v), atol=1e-5, rtol=1e-5)


@every_variant
def test_causal(variant):
    model, idx = tiny(variant), tokens(2, 24)
    changed = idx.clone()
    changed[:, 13:] = (changed[:, 13:] + 1) % 96
    before, after = model(idx), model(changed)
    assert torch.equal(before[:, :13], after[:, :13]) and not torch.allclose(before[:, 13:, :96], after[:, 13:, :96])


@every_variant
def test_documents_cannot_see_each_other(variant):
    """A document inside a packed row predicts what it predicts alone: RoPE depends on distances only."""
    model, idx = tiny(variant), tokens(1, 30)
    packed = model(idx, docs=torch.tensor([[0] * 11 + [1] * 9 + [2] * 10]))
    for start, stop in ((0, 11), (11, 20), (20, 30)):
        alone = model(idx[:, start:stop])
        torch.testing.assert_close(packed[:, start:stop, :96], alone[..., :96], atol=2e-4, rtol=1e-4)


@every_variant
@torch.no_grad()
def test_cache_equals_full_forward(variant):
    model, idx = tiny(variant), tokens(2, 30)
    cache = KVCache(model.config, 2, 30)
    pieces = [model(idx[:, a:b], cache=cache) for a, b in ((0, 12), (12, 19), (19, 20), (20, 21), (21, 30))]
    torch.testing.assert_close(torch.cat(pieces, 1), model(idx), atol=2e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="cannot take 1 more"):
        model(idx[:, :1], cache=cache)


def test_generate_is_greedy_at_temperature_0_and_slides_past_block_size():
    """The rule: each token is the argmax of a plain forward of the last block_size tokens, before and past the edge."""
    model, idx = tiny("exo_dynamic", block_size=12), tokens(3, 5)
    out = generate(model, idx, 14, temperature=0)
    for t in range(5, 19):
        expected = model(out[:, max(0, t - 12):t])[:, -1].argmax(-1)
        assert torch.equal(out[:, t], expected)
    expected = model(tokens(1, 20)[:, -12:])[:, -1].argmax(-1)
    assert torch.equal(generate(model, tokens(1, 20), 1, temperature=0)[:, -1], expected)


def test_generate_stops_fills_and_repeats_with_its_seed():
    model, idx = tiny("gated"), tokens(4, 3)
    draw = lambda seed, **kwargs: generate(model, idx, 30, generator=torch.Generator().manual_seed(seed), **kwargs)
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    for row in draw(1, stop_token=7, top_k=50)[:, 3:].tolist():
        assert 7 not in row or set(row[row.index(7):]) == {7}
    assert torch.equal(draw(5, top_k=1), generate(model, idx, 30, temperature=0))
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, idx[:, :0], 3)


def test_sampling_follows_the_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -math.inf]]).expand(20_000, -1)
    counts = torch.bincount(M.sample(logits, 0.7, None, torch.Generator().manual_seed(0))[:, 0], minlength=5) / 20_000
    torch.testing.assert_close(counts, F.softmax(logits[0] / 0.7, -1), atol=0.015, rtol=0)
    assert set(M.sample(logits, 1.0, 2, torch.Generator().manual_seed(0))[:, 0].tolist()) == {0, 1}


# ----------------------------------------------------------------------------------------------------------- variants

EXACT = dict(base=453_581_824, gated=452_526_720, resformer=453_645_312, naive=452_584_064, exo_nonorm=456_958_592,
             exo_dynamic=457_437_928, exo=456_958_848, exo_headwise=456_724_992, exo_scalar=456_721_512)


@pytest.mark.parametrize("variant", M.TABLE_3)
def test_table_3_parameter_counts(variant):
    with torch.device("meta"):
        n = M.count_parameters(ExoFormer(variant_config(variant)))
    assert round(n / 1e6) == M.TABLE_3[variant][0]
    assert n == EXACT.get(variant, n)


def test_table_3_has_its_18_rows_and_a_configuration_tells_its_row():
    assert len(M.TABLE_3) == 18 and len({str(row) for row in VARIANTS.values()}) == len(VARIANTS)
    assert [M.variant_name(variant_config(name, n_layer=3, n_embd=64)) for name in VARIANTS] == list(VARIANTS)
    assert M.variant_name(variant_config("gated", granularity="scalar")) == "gated"
    for other in (dict(norm_position="after"), dict(qk_norm=False), dict(window=8), dict(mix="qk")):
        assert M.variant_name(variant_config("exo", **other)) == "custom"


OVERRIDES = [(name, value) for name, values in dict(
    gate=(True, False), anchor=("none", "internal", "exogenous"), mix=("", "v", "qk", "qkvg"),
    anchor_norm=("", "v", "qkvg"), granularity=M.GRANULARITY, dynamic=(True, False), qk_norm=(False,),
    norm_position=("after", "both"), window=(3,), lambda_init=(0.3,)).items() for value in values]
NEEDS = {  # whether a row of Table 3 has what a flag needs
    "mix": lambda value, row: value == "" or row["anchor"] != "none" and (row["gate"] or "g" not in value),
    "anchor": lambda value, row: value == "none" or row["mix"] != "",
    "dynamic": lambda value, row: not value or row["anchor"] != "none",
    "anchor_norm": lambda value, row: set(value) <= set(row["mix"]),
}


@every_variant
def test_a_single_flag_fits_its_row_or_says_what_it_needs(variant):
    for name, value in OVERRIDES:
        row = {**vars(variant_config(variant)), **TINY}
        if NEEDS.get(name, lambda value, row: True)(value, row):
            config = vars(variant_config(variant, **TINY, **{name: value}))
            may_follow = {"gate": "mix anchor anchor_norm dynamic", "anchor": "mix anchor_norm dynamic",
                          "mix": "anchor anchor_norm dynamic"}.get(name, "").split()
            assert config[name] == value
            assert [other for other in config if config[other] != row[other] and other not in (name, *may_follow)] == []
        else:
            with pytest.raises((InputError, UserError), match=f"{name}={value!r}.*(gate|anchor|mix)="):
                variant_config(variant, **TINY, **{name: value})


@pytest.mark.parametrize("given, follows", [
    (dict(gate=False, mix="qk"), dict(anchor="exogenous", mix="qk", anchor_norm="qk", dynamic=True)),
    (dict(gate=False), dict(anchor="exogenous", mix="qkv", anchor_norm="qkv", dynamic=True)),
    (dict(mix="gv", anchor_norm="g"), dict(anchor="exogenous", mix="gv", anchor_norm="g", dynamic=True)),
    (dict(mix=""), dict(anchor="none", anchor_norm="", dynamic=False)),
    (dict(anchor="none"), dict(mix="", anchor_norm="", dynamic=False))])
def test_what_is_given_narrows_what_follows_from_it(given, follows):
    config = vars(variant_config("exo_dynamic", **given))
    assert {name: config[name] for name in follows} == follows


@pytest.mark.parametrize("changes, words", [
    (dict(anchor="none", mix="", anchor_norm="", dynamic=True), "dynamic=True.*anchor='none'"),
    (dict(gate=False), "mix='qkvg'.*gate=False"), (dict(n_embd=33), "n_embd=33.*n_head=4"),
    (dict(n_embd=36), "head_dim=9.*odd"), (dict(mix="qx"), "mix='qx'"), (dict(anchor_norm="qq"), "anchor_norm='qq'"),
    (dict(mix="v"), "anchor_norm='qkvg'.*mix='v'"), (dict(anchor="outer"), "anchor='outer'"),
    (dict(granularity="layer"), "granularity='layer'.*scalar, headwise, elementwise"),
    (dict(anchor="none"), "mix='qkvg'.*anchor='none'"), (dict(mix="", anchor_norm=""), "anchor='exogenous'.*mix=''"),
    (dict(anchor="internal", n_layer=1), "anchor='internal'.*n_layer=1"), (dict(window=-1), "window=-1 .*from 0"),
    (dict(n_layer=0), "n_layer=0 .*from 1"), (dict(norm_position="mid"), "norm_position='mid'.*pre, after, both"),
    (dict(ffn_dim=7), "ffn_dim=7"), (dict(rope_theta=math.nan), "rope_theta=nan"),
    (dict(lambda_init=math.nan), "lambda_init=nan"), (dict(lambda_init=math.inf), "lambda_init=inf")])
def test_illegal_configurations_name_field_and_value(changes, words):
    with pytest.raises((InputError, UserError), match=words) as error:
        ModelConfig(**{**TINY, **changes})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [
    dict(norm_position="after"), dict(norm_position="both", window=5), dict(qk_norm=False),
    dict(gate=False, mix="kv", anchor_norm="v"), dict(dynamic=True, mix="gq", anchor_norm="g", granularity="scalar"),
    dict(dynamic=True, gate=False, mix="qkv", anchor_norm="", anchor="internal")])
@torch.no_grad()
def test_axes_combine_freely(changes):
    model, idx = tiny("exo", **changes), tokens(2, 20)
    full, cache = model(idx), KVCache(model.config, 2, 20)
    pieces = torch.cat([model(idx[:, :9], cache=cache), model(idx[:, 9:], cache=cache)], 1)
    torch.testing.assert_close(pieces, full, atol=2e-4, rtol=1e-4)
    assert full[..., :96].isfinite().all() and not torch.allclose(full, tiny("gated")(idx))


@every_variant
def test_every_parameter_gets_gradient(variant):
    model = tiny(variant)
    model.loss(tokens(2, 24), tokens(2, 24, seed=1))[0].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_a_parameter_without_a_rule_in_init_weights_is_an_error_that_names_it():
    class TwoAnchors(M.ExogenousAnchor):
        def __init__(self, config):
            super().__init__(config)
            self.shares = torch.nn.Parameter(torch.tensor([2.0, 0.0]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(M.ANCHORS, "exogenous", TwoAnchors)
        with pytest.raises(ValueError, match="no rule for parameter anchor.shares"):
            ExoFormer(ModelConfig(**TINY))


@every_variant
def test_init_is_total(variant):
    model = ExoFormer(variant_config(variant, **TINY))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    model.init_weights()
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        zero = any(part in name for part in ("out_proj", "down", "head", "fc2", "bias"))
        assert (p == 0).all() == zero, name
    assert abs(model.layers[0].mlp.up.weight.std().item() - 0.02) < 0.001 and model.embed.weight.abs().max() <= 0.06
    start = 1.0 if model.config.dynamic else 0.5
    assert all((mix.lambda_anchor == start).all() for layer in model.layers for mix in layer.attn.mix.values())


def test_flops_per_token_match_a_count_of_matrix_products():
    from torch.utils.flop_counter import FlopCounterMode
    model, idx = tiny("exo_dynamic", vocab_size=64), tokens(2, 40, high=64)
    with FlopCounterMode(display=False) as counter:
        model(idx).sum().backward()
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    dense = sum(n for op, n in counted.items() if op in ("aten.mm", "aten.addmm"))
    attention = 12 * 3 * 32 * 40
    # the input of the first products needs its gradient too, so nothing is missing from 3 x forward
    assert dense / 80 == M.flops_per_token(model, 40) - attention


def test_bfloat16_autocast_keeps_streams_in_bfloat16_and_parameters_in_float32():
    """A float32 lambda must not promote q, k, v, g, nor the residual stream."""
    model, seen = tiny("exo_dynamic"), {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out}))
    with torch.autocast("cpu", torch.bfloat16):
        cross_entropy, z = model.loss(tokens(2, 8), tokens(2, 8))
    assert cross_entropy.dtype == z.dtype == torch.float32
    for name in ("layers.1", "layers.1.attn.mix.q", "layers.1.attn.mix.g", "layers.1.attn.q_norm", "anchor.norms.v",
                 "final_norm"):
        assert seen[name].dtype == torch.bfloat16, name
    assert all(p.dtype == torch.float32 for p in model.parameters())
    full = model.loss(tokens(2, 8), tokens(2, 8))[0]
    assert 0 < abs(cross_entropy.item() - full.item()) < 0.1


# ------------------------------------------------------------------------------------------------- the released code

GOLDEN = json.loads((TESTDATA / "author_golden.json").read_text())


def drawn(seed, key, shape):
    """The rule by which a golden tensor is rebuilt on any machine."""
    u = np.random.Generator(np.random.PCG64([seed, zlib.crc32(key.encode())])).random(shape)
    name = key.removeprefix("probe.")
    scaled = (-0.2 + 1.4 * u if ".lambda_" in name else 0.5 + u if name.endswith("norm.weight") else
              2 * (u - 0.5) if name.endswith("bias") else 0.6 * (u - 0.5))
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
    logits = model(torch.tensor(golden["idx"]))[:, golden["logits_positions"]][:, :, golden["logits_vocab"]]
    torch.testing.assert_close(logits, torch.tensor(golden["logits"]), atol=2e-5, rtol=0)
    cross_entropy, z = model.loss(torch.tensor(golden["idx"]), torch.tensor(golden["targets"]))
    assert abs(cross_entropy.item() - golden["ce"]) < 2e-5 and abs(z.item() - golden["z"]) < 2e-4


@pytest.mark.parametrize("name", GOLDEN)
def test_released_code_gradients(name):
    """The loading is linear in each tensor, so a released tensor's gradient is read by differentiating through it."""
    golden, state, model = released(name)
    leaves = {key: tensor.requires_grad_() for key, tensor in state.items()}
    filled = M.translate_released(leaves, dict(model.state_dict()), model.config)
    logits = torch.func.functional_call(model, filled, (torch.tensor(golden["idx"]),))
    lse = logits.logsumexp(-1)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), torch.tensor(golden["targets"]).flatten())
    (cross_entropy + 1e-5 * lse.square().mean()).backward()
    for key, (norm, dot) in golden["grads"].items():
        grad = leaves[key].grad if leaves[key].grad is not None else torch.zeros_like(leaves[key])
        probe = drawn(golden["seed"], f"probe.{key}", golden["state_dict"][key])
        assert abs(grad.norm().item() - norm) <= 1e-4 * norm + 1e-9, key
        assert abs((grad * probe).sum().item() - dot) <= 1e-4 * norm * probe.norm().item() + 1e-9, key


def test_released_names_are_strict():
    _, state, _ = released("exo_dynamic_elementwise")
    with pytest.raises((InputError, UserError), match="lacks transformer.layers.1.mlp.fc2.weight"):
        ExoFormer.from_released({k: v for k, v in state.items() if k != "transformer.layers.1.mlp.fc2.weight"})
    with pytest.raises((InputError, UserError), match="smear_gate"):
        ExoFormer.from_released({**state, "transformer.smear_gate.weight": torch.zeros(3)})
    with pytest.raises((InputError, UserError), match="shape"):
        ExoFormer.from_released({**state, "transformer.layers.1.attn.c_proj.weight": torch.zeros(32, 31)})
    with pytest.raises((InputError, UserError), match="not a checkpoint of the released code"):
        ExoFormer.from_released({"weight": torch.zeros(3)})


def test_released_prefix_and_old_norm_names_load_alike():
    golden, state, model = released("nures_full_elementwise")
    renamed = {f"_orig_mod.{k}".replace("v_norm", "v_res_norm").replace("g_norm", "g_res_norm"): v
               for k, v in state.items()}
    idx = torch.tensor(golden["idx"])
    assert torch.equal(ExoFormer.from_released(renamed, block_size=64)(idx), model(idx))


def test_released_file_that_cannot_tell_says_so(capsys):
    golden, state, normed = released("x_nures_qknormed_elementwise")
    assert ExoFormer.from_released(state).config.anchor_norm == "qk" and "anchor_norm" in capsys.readouterr().out
    plain = ExoFormer.from_released(state, anchor_norm="")
    assert plain.config.anchor_norm == "" and capsys.readouterr().out == ""
    idx = torch.tensor(golden["idx"])
    assert not torch.allclose(plain(idx)[..., :96], normed(idx)[..., :96], atol=1e-3)
    with pytest.raises((InputError, UserError), match="anchor_norm='qk'.*'qkvg'"):
        ExoFormer.from_released(released("exo_elementwise")[1], anchor_norm="qk")


@pytest.mark.parametrize("theirs, ours", [("before", "pre"), ("after", "after"), ("both", "both")])
def test_norm_pos_of_a_released_checkpoint_is_followed(theirs, ours):
    """Their "both" uses one norm twice, so both of ours get its gain."""
    _, state, _ = released("exo_elementwise")
    checkpoint = dict(model=state, model_args=dict(norm_pos=theirs))
    model = ExoFormer.from_released(checkpoint)
    assert model.config.norm_position == ours
    gain = state["transformer.layers.1.mlp_norm.weight"]
    block = model.layers[1]
    gains = [norm.weight for norm in (block.mlp_norm, block.mlp_post_norm) if isinstance(norm, M.RMSNorm)]
    assert len(gains) == (2 if theirs == "both" else 1)
    assert all(torch.equal(own, gain) for own in gains)
    assert isinstance(block.mlp_norm, M.RMSNorm) == (theirs != "after")


def test_an_unknown_norm_pos_is_refused():
    _, state, _ = released("exo_elementwise")
    with pytest.raises(InputError, match="norm_pos='sandwich'"):
        ExoFormer.from_released(dict(model=state, model_args=dict(norm_pos="sandwich")))


ALONE = """
import json, sys
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
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    idx = torch.arange(8)[None]
    for line, model in zip(lines, (ours, theirs)):
        printed = float(line.split()[1])
        assert printed == model(idx).double().sum().item()
    assert lines[2] == "of this project: []"


# --------------------------------------------------------------------------------------------------------------- Muon

OPTIM = torch.load(TESTDATA / "optim.pt", weights_only=True)


def optimal_quintic(low, high):
    """The odd quintic nearest to 1 on [low, high], by the exchange algorithm: four points of equal error."""
    if low / high >= 1 - 5e-6:
        return np.array([15 / 8 / high, -10 / 8 / high ** 3, 3 / 8 / high ** 5])
    points, error, previous = np.array([low, (3 * low + high) / 4, (low + 3 * high) / 4, high]), math.inf, None
    while previous is None or abs(error - previous) > 1e-15:
        previous = error
        a, b, c, error = np.linalg.solve(np.stack([points, points ** 3, points ** 5, [1, -1, 1, -1]], 1), np.ones(4))
        root = math.sqrt(9 * b * b - 20 * a * c)
        points[1:3] = np.sqrt((-3 * b + np.array([-1, 1]) * math.copysign(root, c)) / (10 * c))
    return np.array([a, b, c])


def test_polar_express_coefficients_are_the_optimal_composition():
    low, high, powers, derived = 1e-3, 1.0, np.array([1, 3, 5]), []
    for i in range(5):
        floor = max(low, 0.02 * high)
        quintic = optimal_quintic(floor, high)
        p = lambda x: float(quintic @ np.float64(x) ** powers)
        if floor > low:
            quintic = quintic * 2 / (p(low) + p(high))
        derived.append(quintic / (1.02 ** powers if i < 4 else 1))
        quintic = derived[-1]
        low, high = p(low), 2 - p(low)
    np.testing.assert_allclose(derived, muon.COEFFICIENTS, rtol=1e-6)


@pytest.mark.parametrize("name", OPTIM["polar_express"])
def test_polar_express_matches_the_released_one(name):
    case = OPTIM["polar_express"][name]
    G = case["in"].reshape(-1, *case["in"].shape[-2:])
    ours, theirs = muon.polar_express(G.double(), torch.float64).view(case["in"].shape), case["ref_fp64"]
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    rounded = muon.polar_express(G).view(case["in"].shape).double()
    their_error = (case["out_author_bf16_in"].double() - theirs).norm()
    assert (rounded - theirs).norm() <= 3 * their_error + 1e-6            # bfloat16 costs us about what it costs them


def composed(s):
    """What the five polynomials make of a singular value."""
    for a, b, c in muon.COEFFICIENTS:
        s = a * s + b * s ** 3 + c * s ** 5
    return s


def test_polar_express_band_is_as_documented():
    band = composed(np.geomspace(1e-3, 1, 100_001))
    assert (round(band.min(), 2), round(band.max(), 2)) == (0.86, 1.14) and composed(1e-5) < 0.1


@pytest.mark.parametrize("shape", [(64, 64), (24, 96), (96, 24)])
def test_polar_express_keeps_singular_vectors_and_maps_singular_values(shape):
    G = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    expected = composed(S / (torch.linalg.matrix_norm(G)[:, None] * 1.02 + 1e-6))
    mapped = U.mT @ muon.polar_express(G, torch.float64) @ Vh.mT
    torch.testing.assert_close(mapped, torch.diag_embed(expected), atol=1e-9, rtol=0)
    rounded = U.mT @ muon.polar_express(G).double() @ Vh.mT - torch.diag_embed(expected)                  # bfloat16
    assert torch.linalg.matrix_norm(rounded).max() < 0.05 * torch.linalg.vector_norm(expected, dim=-1).min()


@pytest.mark.parametrize("key", OPTIM["traj"])
def test_muon_follows_the_released_optimizer_for_20_steps(key):
    """float32 weights. Their bfloat16 rounding differs, so trajectories part by the error of one orthogonalisation; a
    cautious decay flips on entries near zero, which is worth lr * decay * weight = 2.5 % of an entry."""
    setting, recipe = dict(part.split("=") for part in key.split(",")), OPTIM["muon"]
    beta2 = None if setting["beta2"] == "None" else float(setting["beta2"])
    for name, problem in OPTIM["quadratic"].items():
        w = torch.nn.Parameter(problem["W0"].clone())
        optimizer = muon.Muon([w], lr=recipe["lr"], weight_decay=recipe["weight_decay"], momentum=recipe["momentum"],
                              cautious=setting["cautious"] == "True", beta2=beta2)
        for _ in range(20):
            w.grad = problem["H"] * (w.detach() - problem["T"])
            optimizer.step()
        path = (OPTIM["traj"][key][name] - problem["W0"]).norm()
        apart = (w.detach() - OPTIM["traj"][key][name]).norm() / path
        assert apart < (0.03 if setting["cautious"] == "True" else 0.02), name


def one_muon_step(grads, weights, **settings):
    """Weights after one step from given gradients."""
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    for p, g in zip(params, grads):
        p.grad = g.clone()
    muon.Muon([dict(params=params, parts=settings.pop("parts", 1))], **settings).step()
    return [p.detach() for p in params]


def test_muon_step_matches_its_formula_in_float64():
    g, w = torch.randn(2, 48, 16, dtype=torch.float64)
    exact = lambda G: muon.polar_express(G, torch.float64)
    new, = one_muon_step([g], [w], lr=0.1, weight_decay=0.3, polar=exact)
    update = exact((0.05 * g + 0.95 * 0.05 * g)[None])[0] * math.sqrt(3)
    expected = w - 0.1 * update - 0.1 * 0.3 * torch.where(update * w >= 0, w, 0)
    torch.testing.assert_close(new, expected, atol=1e-12, rtol=0)


def test_muon_batches_and_splits_without_changing_a_matrix():
    g, w = torch.randn(2, 3, 64, 32)
    together = one_muon_step(g, w)
    alone = [one_muon_step([g[i]], [w[i]])[0] for i in range(3)]
    fused, = one_muon_step([g.flatten(0, 1)], [w.flatten(0, 1)], parts=3)
    for i in range(3):
        torch.testing.assert_close(together[i], alone[i], atol=1e-4, rtol=0)
        torch.testing.assert_close(fused[64 * i:64 * i + 64], alone[i], atol=1e-4, rtol=0)


def test_decay_in_pure_bfloat16_is_rounded_away_as_in_the_released_code():
    """0.1 x rate 0.01 of a weight is less than half a unit in its last place, and is subtracted by itself."""
    changed = {}
    for dtype in (torch.bfloat16, torch.float32):
        ends = []
        for decay in (0.0, 0.1):
            draw = functools.partial(torch.randn, 16, 24, generator=torch.Generator().manual_seed(0))
            w = torch.nn.Parameter(draw().to(dtype))
            optimizer = muon.Muon([w], lr=0.01, weight_decay=decay)
            for _ in range(50):
                w.grad = draw().to(dtype)
                optimizer.step()
            ends.append(w.detach())
        changed[dtype] = (ends[0] != ends[1]).float().mean().item()
    assert changed[torch.bfloat16] == 0 and changed[torch.float32] > 0.9


# --------------------------------------------------------------------------------------------------- one training step

SMALL = """--device=cpu --n_layer=2 --n_head=2 --n_embd=32 --ffn_dim=64 --block_size=32 --batch_size=2
    --total_batch_size=128 --max_steps=12 --warmup_steps=2 --eval_every=4 --eval_tokens=160 --final_eval_tokens=160
    --save_every=4 --keep=9 --sample_tokens=8""".split()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of byte-level shards: two for training (41 windows), one for validation; a document is 70 tokens."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for name, length in (("t_train_000000.bin", 900), ("t_train_000001.bin", 420), ("t_val_000000.bin", 170)):
        ids = rng.integers(97, 123, length)
        ids[0::70] = 256
        pf.write_shard(folder / name, ids)
    (folder / "meta.json").write_text(json.dumps(dict(tokenizer="bytes")))
    return folder


class Quiet(T.Stop):
    """Stop without signal handlers."""

    def __init__(self):
        self.signal, self.problem = 0, ""


def start(folder, data, *flags):
    """(Trainer, RunFolder) of a small run; the flags come last and win."""
    return T.prepare([f"--data={data}", f"--out_dir={folder}", *SMALL, *flags])


def close(run_folder):
    run_folder.log.close(), run_folder.lock.lock.release()


def train_fully(folder, data, *flags, stop_after=None, before_step=lambda trainer: None):
    """Run to the end, or as if SIGTERM came in step `stop_after`. Returns the trainer, which knows its Stop and why it
    `stopped`; the run folder is free again, whatever happened."""
    trainer, run_folder = (T.prepare([f"--out_dir={folder}", *flags]) if "--resume" in flags
                           else start(folder, data, *flags))
    trainer.stop, update = Quiet(), trainer.update

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
    """The trainer of an undisturbed run of 12 steps in the folder `whole.config.out_dir`, which tests copy."""
    return train_fully(tmp_path_factory.mktemp("whole") / "a", data)


def copied(whole, folder):
    return shutil.copytree(whole.config.out_dir, folder)


def same_state(a, b):
    """Names of the tensors that differ between two runs: weights and all optimizer states."""
    pairs = [(f"weight {n}", p, q) for (n, p), q in zip(a.model.state_dict().items(), b.model.state_dict().values())]
    for x, y in zip(a.optimizers, b.optimizers):
        for i, (s, t) in enumerate(zip(x.state_dict()["state"].values(), y.state_dict()["state"].values())):
            pairs += [(f"{type(x).__name__} {i} {key}", s[key], t[key]) for key in s]
    return [name for name, p, q in pairs if not torch.equal(torch.as_tensor(p), torch.as_tensor(q))]


def log_of(folder, key=""):
    """The records of a run's log without their times; those with `key`, if one is given."""
    records = [{k: v for k, v in json.loads(line).items() if k != "ms"} for line in open(folder / "log.jsonl")]
    return [record for record in records if key in record or not key]


def test_learning_rate_and_momentum_follow_table_4():
    schedule, paper = OPTIM["schedule"], T.TrainConfig()
    ours = [T.lr_multiplier(step, paper) for step in schedule["paper_steps"]]
    np.testing.assert_allclose(ours, schedule["paper_linear_mult"], rtol=0, atol=1e-12)
    momentum = [T.muon_momentum(step, T.TrainConfig(muon_ramp=True)) for step in schedule["momentum_steps"]]
    np.testing.assert_allclose(momentum, schedule["momentum"], atol=1e-12)
    assert T.muon_momentum(5, paper) == 0.95
    assert max(T.lr_multiplier(step, paper) for step in range(0, 38147, 7)) == 1.0


@every_variant
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_optimizers_partition_the_parameters_and_only_matrices_decay(variant, optimizer):
    """Embedding, head, gains, lambdas and biases are AdamW's, and left alone by the decay."""
    model = ExoFormer(variant_config(variant, **TINY))
    optimizers = T.build_optimizers(model, T.TrainConfig(device="cpu", optimizer=optimizer, weight_decay=0.25))
    groups = [(o, group, p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(id(p) for _, _, p in groups) == sorted(id(p) for p in model.parameters())
    found = {id(p): (o, group) for o, group, p in groups}
    for name, p in model.named_parameters():
        owner, group = found[id(p)]
        matrix = p.dim() == 2 and "lambda" not in name and not name.startswith(("embed", "head"))
        assert group["weight_decay"] == (0.25 if matrix else 0.0), name
        assert isinstance(owner, muon.Muon) == (matrix and optimizer == "muon"), name
        parts = len(model.config.mix if "anchor" in name else model.config.components) if "project" in name else 1
        assert group.get("parts", 1) == (2 if ".up." in name else parts) or optimizer == "adamw", name
        assert group.get("betas", (0.9, 0.95)) == (0.9, 0.95)


@pytest.mark.parametrize("device, expected", [
    ("cpu", dict(dtype="float32", muon_dtype="float32", compile="false", deterministic="true")),
    ("mps", dict(dtype="float32", muon_dtype="bfloat16", compile="false", deterministic="false")),
    ("cuda", dict(dtype="bfloat16", muon_dtype="bfloat16", compile="true", deterministic="false"))])
def test_auto_is_decided_by_the_device_and_what_is_given_stays(device, expected, monkeypatch):
    monkeypatch.setattr(T, "choose_device", lambda name: device)
    monkeypatch.setattr(T, "check_compiler", lambda device: None)
    decided = vars(T.resolve({})[1])
    assert {name: decided[name] for name in expected} == expected
    assert T.resolve(dict(muon_dtype="float32", compile="false"))[1].muon_dtype == "float32"


def test_pure_bfloat16_casts_matrices_and_embedding_alone():
    """As the released code: in bfloat16 a lambda of 1.0 does not move by steps of 0.003."""
    model = T.build_model(variant_config("exo_dynamic", **TINY), T.TrainConfig(device="cpu", dtype="pure_bfloat16"))
    for name, p in model.named_parameters():
        assert p.dtype == (torch.bfloat16 if p.dim() == 2 and "lambda" not in name else torch.float32), name


@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_a_step_follows_the_clipped_gradient_of_the_mean_loss(clip, data, tmp_path):
    """Two passes of two sequences, against one float64 pass of all four: cross-entropy, z, norm, and how far plain
    gradient descent in the optimizers' place moves each weight."""
    trainer, run_folder = start(tmp_path / "a", data, f"--grad_clip={clip}", "--z_loss=0.01", "--variant=exo_dynamic")
    close(run_folder)
    for p in trainer.model.parameters():
        p.data += 0.05 * torch.randn_like(p)                                # at init most gradients are zero
    trainer.optimizers = [torch.optim.SGD(trainer.model.parameters(), lr=1.0)]
    exact, windows = copy.deepcopy(trainer.model).double(), trainer.train.shuffled(1337, 0, 4).astype(np.int64)
    idx, targets = torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, 1:])
    logits = exact(idx, (idx == 256).cumsum(1))
    cross_entropy = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    z = logits.exp().sum(-1).log().square().mean()
    (cross_entropy + 0.01 * z).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in exact.parameters()))
    assert (norm > clip) == (clip == 0.5)
    record, step = trainer.update(trainer.read_step()), 0.003 / 2           # the first of two warm-up steps
    assert record == pytest.approx(dict(step=1, loss=cross_entropy.item(), z=z.item(), grad_norm=norm, lr=step,
                                        tokens=128), rel=1e-4)
    for (name, p), q in zip(trainer.model.named_parameters(), exact.parameters()):
        torch.testing.assert_close(p.double(), q - step * min(1, clip / norm) * q.grad, atol=2e-7, rtol=0, msg=name)


def test_accumulation_computes_the_same_step(data, tmp_path):
    a, b = (train_fully(tmp_path / name, data, f"--batch_size={n}", "--max_steps=2", "--optimizer=adamw")
            for name, n in (("a", 4), ("b", 1)))
    for p, q in zip(a.model.parameters(), b.model.parameters()):
        torch.testing.assert_close(p, q, atol=2e-4, rtol=0)
    assert abs(log_of(tmp_path / "a", "loss")[0]["loss"] - log_of(tmp_path / "b", "loss")[0]["loss"]) < 1e-5


def test_every_epoch_visits_every_window_once_in_its_own_order(data):
    split = T.Tokens(data, "train", ModelConfig(**{**TINY, "block_size": 32, "vocab_size": 320}, tokenizer="bytes"))
    assert len(split) == 28 + 13 == 899 // 32 + 419 // 32
    every = [split.window(i) for i in range(len(split))]
    assert np.array_equal(every[28], pf.read_shard(data / "t_train_000001.bin")[:33]) and every[3][-1] == every[4][0]
    epochs = [split.shuffled(7, e * 41, 41) for e in range(2)]
    assert sorted(map(bytes, epochs[0])) == sorted(map(bytes, epochs[1])) == sorted(map(bytes, np.array(every)))
    assert not np.array_equal(*epochs)
    assert np.array_equal(split.shuffled(7, 30, 20), np.concatenate([split.shuffled(7, k, 1) for k in range(30, 50)]))


@pytest.mark.parametrize("vocab_size, bad, limit", [(200, 256, 200), (320, 300, 257)])
def test_a_token_outside_vocabulary_or_tokenizer_names_its_shard(vocab_size, bad, limit, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    pf.write_shard(tmp_path / "data" / "t_train_000000.bin", np.full(900, bad))
    split = T.Tokens(tmp_path / "data", "train", ModelConfig(**{**TINY, "vocab_size": vocab_size}, tokenizer="bytes"))
    with pytest.raises((InputError, UserError), match=f"t_train_000000.bin: token id {bad} .* {limit}, .*verify --out="):
        split.window(0)


def test_training_lowers_the_validation_loss(data, tmp_path):
    train_fully(tmp_path / "a", data, "--max_steps=40", "--eval_every=0")
    first, last = (record["val_loss"] for record in log_of(tmp_path / "a", "val_loss"))
    assert abs(first - math.log(320)) < 1e-4 and last < 0.65 * first


def test_evaluation_is_the_mean_over_all_windows_and_counts_bytes(data, whole):
    """5 windows in batches of 2: the last batch is filled up, and must not count the filling."""
    result, val = log_of(pathlib.Path(whole.config.out_dir))[-1], pf.read_shard(data / "t_val_000000.bin").astype(int)
    losses, n_bytes = [], 0
    for start_at in range(0, 160, 32):
        window = torch.tensor(val[start_at:start_at + 33])[None]
        losses.append(whole.model.loss(window[:, :-1], window[:, 1:], (window[:, :-1] == 256).cumsum(1))[0].item())
        n_bytes += sum(int(t) != 256 for t in window[0, 1:])
    assert len(whole.val) == 5 and abs(result["val_loss"] - np.mean(losses)) < 1e-5
    assert abs(result["val_bpb"] - sum(losses) * 32 / math.log(2) / n_bytes) < 1e-4
    assert result["val_ppl"] == math.exp(result["val_loss"])


@pytest.mark.parametrize("where, row", [("embed.weight", 100), ("layers.1.mlp.up.weight", 60)])
def test_a_planted_nan_stops_the_run_and_is_never_saved(where, row, data, tmp_path):
    def plant(trainer):
        if trainer.step == 6:
            trainer.model.get_parameter(where).data[row, 3] = math.nan
    with pytest.raises(T.Diverged, match=f"step 7: .*learning rates 1 of.*not finite.*: weight {where}"):
        train_fully(tmp_path / "a", data, before_step=plant)
    assert newest_of(tmp_path / "a") == "ckpt_000004.pt" and log_of(tmp_path / "a")[-1]["step"] == 6


# ------------------------------------------------------------------------------------------------------------ resuming

@pytest.mark.parametrize("variant, flags", [
    ("base", []), ("exo_dynamic", ["--muon_ramp", "--muon_beta2=0.95"]), ("gated", ["--dtype=bfloat16", "--window=9"]),
    *(pytest.param(*run, marks=pytest.mark.slow) for run in (
        ("nuresformer", ["--mask_documents=false"]), ("exo_dynamic", []), ("exo", ["--optimizer=adamw"]),
        ("exo_dynamic", ["--dtype=pure_bfloat16"])))])
def test_resume_is_bitwise(variant, flags, data, tmp_path):
    """12 steps = 5 steps, a stop, 7 more: weights, optimizer states, log. The first epoch ends within step 11."""
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
def test_a_run_that_ends_within_an_evaluation_loses_nothing(how, step, whole, data, tmp_path, monkeypatch):
    """The last evaluation may read the whole validation set; the log ends as if nothing had happened."""
    batches, evaluate_batch, log = [], T.Trainer.evaluate_batch, log_of(pathlib.Path(whole.config.out_dir))

    def interrupted(trainer, windows):
        if trainer.step == step:
            batches.append(windows)
            trainer.stop.signal = signal.SIGTERM
            if how == "killed":
                raise KeyboardInterrupt
        return evaluate_batch(trainer, windows)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) if how == "killed" else nullcontext():
        patch.setattr(T.Trainer, "evaluate_batch", interrupted)
        assert train_fully(tmp_path / "a", data, "--save_every=0").stopped == "SIGTERM"
    assert newest_of(tmp_path / "a") == f"ckpt_{step:06d}.pt" and len(batches) == 1
    resumed = resume(tmp_path / "a")
    assert resumed.step == 12 and same_state(whole, resumed) == [] and resumed.best_val == whole.best_val
    assert log_of(tmp_path / "a") == log and "val_loss" in log[-1]
    assert resume(tmp_path / "a").step == 12 and log_of(tmp_path / "a") == log


def test_same_seed_same_run_other_seed_another(data, tmp_path):
    a, b, c = (train_fully(tmp_path / name, data, f"--seed={seed}", "--max_steps=3")
               for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert same_state(a, b) == [] and same_state(a, c) != []


@pytest.mark.parametrize("flags, words", [
    (["--variant=base"], "--gate=False.*gate=True"), (["--n_embd=64"], "--n_embd=64.*n_embd=32"),
    (["--seed=5"], "--seed=5.*seed=1337"),
    (["--total_batch_size=64"], "--total_batch_size=64.*total_batch_size=128"),
    (["--optimizer=adamw"], "--optimizer=adamw.*optimizer=muon")])
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


# -------------------------------------------------------------------------------------------------------------- damage

def saved(model, path, **more):
    save_checkpoint(path, dict(model_config=asdict(model.config), model=model.state_dict(), **more))
    return path


@every_variant
def test_checkpoint_round_trip_is_bitwise(variant, tmp_path):
    model, idx = tiny(variant), tokens(1, 10)
    again = load_checkpoint(saved(model, tmp_path / "c.pt"))
    assert torch.equal(again(idx), model(idx)) and again.config == model.config
    assert os.listdir(tmp_path) == ["c.pt"]


def test_released_checkpoint_file_loads(tmp_path):
    golden, state, model = released("exo_headwise")
    torch.save(dict(model=state, model_args=dict(block_size=64, rope_theta=500_000.0), step=38146), tmp_path / "r.pt")
    idx = torch.tensor(golden["idx"])
    again = load_checkpoint(tmp_path / "r.pt")
    assert torch.equal(again(idx), model(idx)) and again.config.block_size == 64


class Attack:
    """A pickle that would leave a file behind if it ran."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def harm(path, fault, witness):
    """Do to a checkpoint what `fault` says."""
    whole = path.read_bytes()
    if fault in ("missing", "empty", "truncated", "text", "flipped bit"):
        path.unlink()
        flipped = whole[:len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 16]) + whole[len(whole) // 2 + 1:]
        content = {"empty": b"", "truncated": whole[:-700], "text": b"hello", "flipped bit": flipped}.get(fault)
        return content is None or path.write_bytes(content)
    checkpoint = torch.load(path, weights_only=True)
    {"malicious": lambda: checkpoint.update(model=Attack(witness)), "newer format": lambda: checkpoint.update(format=2),
     "unknown setting": lambda: checkpoint["model_config"].update(n_lair=3),
     "unknown flag": lambda: checkpoint["train_config"].update(color="red"),
     "missing tensor": lambda: checkpoint["model"].popitem(), "missing key": lambda: checkpoint.pop("best_val"),
     "missing optimizer": lambda: checkpoint["optimizers"].pop(),
     "missing state": lambda: checkpoint["optimizers"][0]["state"].popitem(),
     "missing moment": lambda: checkpoint["optimizers"][1]["state"][0].popitem(),
     "of another program": checkpoint.clear}[fault]()
    torch.save(checkpoint, path)


@pytest.mark.parametrize("fault", ["missing", "empty", "truncated", "flipped bit", "text", "malicious", "newer format",
                                   "unknown setting", "missing tensor"])
def test_damaged_checkpoints_are_refused_in_one_line(fault, tmp_path):
    path, witness = saved(tiny("exo"), tmp_path / "c.pt"), tmp_path / "witness"
    harm(path, fault, witness)
    with pytest.raises((InputError, UserError), match=f"^{re.escape(str(path))}") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value) and not witness.exists()


def test_a_record_marked_as_a_folder_is_damage(tmp_path):
    """The bit is in the directory of the zip archive, outside of every checksum; torch reads other values."""
    path = saved(tiny("exo"), tmp_path / "c.pt")
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")                  # the last entry of the directory
    content[entry + 38] |= 0x10                             # its external attributes
    path.write_bytes(content)
    with pytest.raises(M.DamagedCheckpoint, match="is damaged: its record"):
        load_checkpoint(path)


def test_a_file_that_holds_something_else_is_not_called_damaged(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(dict(model=Attack(tmp_path / "witness")), tmp_path / "code.pt")
    for name in ("list.pt", "code.pt"):
        with pytest.raises(InputError, match=name) as error:
            load_checkpoint(tmp_path / name)
        assert not isinstance(error.value, M.DamagedCheckpoint)


def test_a_folder_stands_for_its_newest_checkpoint_which_loads_in_eval_mode(tmp_path):
    for step, variant in ((9, "base"), (10, "gated"), (100, "exo")):
        saved(tiny(variant), tmp_path / f"ckpt_{step:06d}.pt")
    (tmp_path / "ckpt_000200.pt.part").write_bytes(b"half")
    model = load_checkpoint(tmp_path)
    assert M.variant_name(model.config) == "exo" and not model.training
    assert not ExoFormer.from_released(released("exo_elementwise")[1]).training
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no checkpoint in this folder"):
        load_checkpoint(tmp_path / "empty")


def test_weights_that_are_not_finite_are_refused_in_one_line_when_sampling():
    model = tiny("exo")
    with torch.no_grad():
        model.head.weight[3, 5] = math.nan
    with pytest.raises(InputError, match="logits are not finite"):
        generate(model, tokens(1, 4), 3)


def newest_of(folder):
    """The name of the newest checkpoint."""
    return max(os.path.basename(path) for path in folder.glob("ckpt_*.pt"))


@pytest.mark.parametrize("fault", ["truncated", "flipped bit", "empty", "malicious", "of another program",
                                   "missing tensor", "missing optimizer", "missing key", "missing state",
                                   "missing moment"])
def test_resume_skips_a_bad_newest_checkpoint_and_says_so(fault, whole, tmp_path, capsys):
    folder = copied(whole, tmp_path / "a")
    harm(folder / "ckpt_000012.pt", fault, tmp_path / "witness")
    resumed, out = resume(folder), capsys.readouterr().out
    assert resumed.step == 12 and same_state(whole, resumed) == [] and not (tmp_path / "witness").exists()
    assert re.search("skipped: .*ckpt_000012.pt .+\\ncontinuing .*ckpt_000008.pt after step 8\\n", out)
    assert log_of(folder) == log_of(pathlib.Path(whole.config.out_dir))


@pytest.mark.parametrize("fault, words", [("newer format", "has format 2, newer"), ("unknown setting", "n_lair"),
                                          ("unknown flag", "color")])
def test_resume_refuses_the_checkpoint_of_a_later_version(fault, words, whole, tmp_path):
    folder = copied(whole, tmp_path / "a")
    harm(folder / "ckpt_000012.pt", fault, None)
    with pytest.raises((InputError, UserError), match=f"{words}.*update the code"):
        resume(folder)


def test_resume_without_a_whole_checkpoint_says_so(whole, tmp_path):
    folder = copied(whole, tmp_path / "a")
    for path in folder.glob("ckpt_*.pt"):
        harm(path, "truncated", None)
    with pytest.raises((InputError, UserError), match="no whole checkpoint"):
        resume(folder)


@pytest.mark.parametrize("change, words", [
    (lambda folder: (folder / "t_train_000001.bin").unlink(), "its train shards are not those.*2, 1,320 tokens"),
    (lambda folder: pf.write_shard(folder / "t_val_000000.bin", np.full(170, 97)), "its val shards are not those")])
def test_data_that_changed_since_are_refused(change, words, whole, data, tmp_path):
    """A shard is gone; a shard of equal length has other tokens."""
    change(shutil.copytree(data, tmp_path / "data"))
    with pytest.raises((InputError, UserError), match=words):
        resume(copied(whole, tmp_path / "a"), f"--data={tmp_path / 'data'}")


# ------------------------------------------------------------------------------------------------------ many processes

def launch_ranks(n, folder, *flags):
    """torchrun with n processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", f"--master_port={port}",
               str(HERE / "train.py"), f"--out_dir={folder}", *flags]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run_ranks(n, folder, *flags):
    process = launch_ranks(n, folder, *flags)
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    return out


def weights(folder, step):
    return M.read_checkpoint(folder / f"ckpt_{step:06d}.pt")["model"]


@pytest.mark.slow
def test_two_processes_equal_one_with_two_accumulations_bit_for_bit(data, tmp_path):
    """Compiled. Halving is exact, so this is the sharpest check there is. And one process resumes what two began:
    block_size 31 makes 42 windows, so that step 21 of 2 x 31 tokens, where it goes on, begins an epoch anew."""
    folder, flags = tmp_path / "two", ["--variant=exo_dynamic", "--n_layer=1", "--block_size=31", "--batch_size=1",
                                       "--total_batch_size=62", "--max_steps=23", "--save_every=21", "--eval_every=0",
                                       "--compile=true"]
    one = train_fully(tmp_path / "one", data, *flags)
    run_ranks(2, folder, *SMALL, f"--data={data}", *flags)
    two = weights(folder, 23)
    assert [name for name, p in one.model.state_dict().items() if not torch.equal(p, two[name])] == []
    assert log_of(folder, "val_loss") == log_of(tmp_path / "one", "val_loss") and len(one.train) == 42
    (folder / "ckpt_000023.pt").unlink()
    assert same_state(one, resume(folder)) == []
    assert [record["step"] for record in log_of(folder, "loss")] == list(range(1, 24))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-m", "not slow", *sys.argv[1:]]))
