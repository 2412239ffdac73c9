"""
The tests: CPU only, no network, no data but what they make or what lies in paper/testdata.

    python -m pytest                    everything, under 5 minutes on 2 cores
    python -m pytest -m "not slow"      the smoke part, under a minute

The order is the paper's: model, mixing, variants, Muon, training, then data and evaluation. Oracles are independent of
the code under test: loops in float64, numbers that the paper's released code computed, a second implementation.
"""
import contextlib
import copy
import errno
import functools
import gzip
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
import types
import warnings
import zlib
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)      # "slow" needs no settings file
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import eval_hellaswag
import model as M
import muon
import prepare_fineweb as pf
import train as T
from model import VARIANTS, ExoFormer, KVCache, ModelConfig, generate, load_checkpoint, save_checkpoint, variant_config
from prepare_fineweb import UserError

HERE = pathlib.Path(__file__).parent
TESTDATA = HERE / "paper" / "testdata"
GOLDEN = json.loads((TESTDATA / "author_golden.json").read_text())
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


# ------------------------------------------------------------------------------------------------- the released code

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
    ours = {key: value for key, value in model.state_dict().items()}
    filled = M.translate_released(leaves, ours, model.config)
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
    with pytest.raises(UserError, match="lacks transformer.layers.1.mlp.fc2.weight"):
        ExoFormer.from_released({k: v for k, v in state.items() if k != "transformer.layers.1.mlp.fc2.weight"})
    with pytest.raises(UserError, match="smear_gate"):
        ExoFormer.from_released({**state, "transformer.smear_gate.weight": torch.zeros(3)})
    with pytest.raises(UserError, match="shape"):
        ExoFormer.from_released({**state, "transformer.layers.1.attn.c_proj.weight": torch.zeros(32, 31)})
    with pytest.raises(UserError, match="not a checkpoint of the released code"):
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
    with pytest.raises(UserError, match="anchor_norm='qk'.*'qkvg'"):
        ExoFormer.from_released(released("exo_elementwise")[1], anchor_norm="qk")


# ------------------------------------------------------------------------------------------------------------ Table 3

EXACT = dict(base=453_581_824, gated=452_526_720, resformer=453_645_312, naive=452_584_064, exo_nonorm=456_958_592,
             exo_dynamic=457_437_928, exo=456_958_848, exo_headwise=456_724_992, exo_scalar=456_721_512)


@every_variant
def test_table_3_parameter_counts(variant):
    with torch.device("meta"):
        n = M.count_parameters(ExoFormer(variant_config(variant)))
    assert round(n / 1e6) == M.TABLE_3[variant][0]
    assert n == EXACT.get(variant, n)


def test_table_3_has_its_18_rows():
    assert list(VARIANTS) == list(M.TABLE_3) and len({str(row) for row in VARIANTS.values()}) == 18


def test_a_configuration_tells_its_row_of_table_3():
    assert [M.variant_name(variant_config(name, n_layer=3, n_embd=64)) for name in VARIANTS] == list(VARIANTS)
    assert M.variant_name(variant_config("gated", granularity="scalar")) == "gated"
    for other in (dict(norm_position="post"), dict(qk_norm=False), dict(mix="qk", anchor_norm="qk")):
        assert M.variant_name(variant_config("exo", **other)) == "custom"


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


# ------------------------------------------------------------------------------------------------------ Eq. 10, 11, 12

@pytest.mark.parametrize("granularity", M.GRANULARITY)
def test_eq_10_and_12_mix_matches_loops(granularity):
    config = ModelConfig(**TINY, granularity=granularity)
    mix, shape = M.Mix(config).double(), (2, 3, 4, 8)
    anchor, current = torch.randn(shape).double(), torch.randn(shape).double()
    gamma = torch.rand(2, 2, 3, 1, 1).double()
    with torch.no_grad():
        mix.lambda_anchor.normal_(), mix.lambda_current.normal_()
        mixed = mix(anchor, current, gamma)
    first, second = (p.detach().expand(4, 8) for p in (mix.lambda_anchor, mix.lambda_current))
    for b, t, h, d in np.ndindex(*shape):
        expected = (gamma[0, b, t] * first[h, d] * anchor[b, t, h, d]
                    + gamma[1, b, t] * second[h, d] * current[b, t, h, d])
        assert abs(mixed[b, t, h, d].item() - expected.item()) < 1e-12


def test_eq_11_gamma_matches_loops():
    dynamic = M.DynamicMixing(ModelConfig(**TINY, dynamic=True), "qkvg").double()
    with torch.no_grad():
        for p in dynamic.parameters():
            p.normal_()
    h = torch.randn(2, 3, 32).double()
    gamma = dynamic(h)
    w1, w2, bias = (p.detach().numpy() for p in (dynamic.fc1.weight, dynamic.fc2.weight, dynamic.bias))
    for b, t in np.ndindex(2, 3):
        hidden = w1 @ h[b, t].numpy()
        hidden = np.array([x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in hidden])
        slots = 1 / (1 + np.exp(-(w2 @ hidden + bias)))
        for i, s in enumerate("qkvg"):
            pair = [gamma[s][j][b, t].item() for j in range(2)]
            np.testing.assert_allclose(pair, slots[2 * i:2 * i + 2], rtol=1e-6)


def test_rms_norm_and_rope_match_loops():
    norm, x = M.RMSNorm(8), torch.randn(2, 5, 3, 8)
    with torch.no_grad():
        norm.weight.normal_()
    y, gain = norm(x).detach().numpy(), norm.weight.detach().numpy()
    rotated = M.Causal(ModelConfig(**TINY), 5, "cpu", start=2).rotate(x).numpy()
    for b, t, h in np.ndindex(2, 5, 3):
        v = x[b, t, h].double().numpy()
        np.testing.assert_allclose(y[b, t, h], v / np.sqrt((v * v).mean() + 1e-6) * gain, rtol=1e-5)
        for i in range(4):
            turned = complex(v[i], v[i + 4]) * np.exp(1j * (t + 2) * 500_000.0 ** (-2 * i / 8))
            np.testing.assert_allclose(rotated[b, t, h, [i, i + 4]], [turned.real, turned.imag], atol=1e-5)


@pytest.mark.parametrize("granularity", M.GRANULARITY)
def test_weighted_sum_derivative_is_that_of_its_formula(granularity):
    """By finite differences in float64, for every argument; gamma one per token, or the constant of a static model."""
    draw = functools.partial(torch.randn, dtype=torch.float64, requires_grad=True)
    anchor, current, shape = draw(2, 3, 2, 4), draw(2, 3, 2, 4), M.GRANULARITY[granularity](2, 4)
    for gammas in ((draw(2, 3, 1, 1), draw(2, 3, 1, 1)), torch.ones(2, dtype=torch.float64).unbind()):
        assert torch.autograd.gradcheck(M.WeightedSum.apply, (anchor, current, draw(shape), draw(shape), *gammas))


@pytest.mark.parametrize("anchor", ["internal", "exogenous"])
@pytest.mark.parametrize("granularity", M.GRANULARITY)
def test_dynamic_equals_static_at_init(anchor, granularity):
    models = []
    for dynamic in (False, True):
        model = ExoFormer(ModelConfig(**TINY, anchor=anchor, granularity=granularity, dynamic=dynamic))
        models.append(model)
    with torch.no_grad():
        for name, p in models[0].named_parameters():
            if "lambda" not in name:
                p.copy_(torch.randn_like(p) * 0.3)
                models[1].get_parameter(name).copy_(p)
    idx = tokens(2, 20)
    assert torch.equal(models[0](idx), models[1](idx))


def test_internal_anchor_is_not_mixed_in_its_own_layer():
    inside, outside = (ExoFormer(ModelConfig(**TINY, anchor=anchor, dynamic=True))
                       for anchor in ("internal", "exogenous"))
    assert [len(layer.attn.mix) for layer in inside.layers] == [0, 4, 4]
    assert [len(layer.attn.mix) for layer in outside.layers] == [4, 4, 4]
    assert not list(inside.layers[0].attn.gammas.parameters())


def test_exogenous_anchor_reads_raw_embeddings_of_single_tokens():
    model = tiny("exo")
    idx = tokens(1, 6)
    anchor = model.make_anchor(model.embed(idx))
    w = dict(zip("qkvg", model.anchor.project.weight.split(32)))
    for s in "qkvg":
        raw = (model.embed.weight[idx[0, 3]] @ w[s].T).view(4, 8)
        gain = model.anchor.norms[s].weight
        torch.testing.assert_close(anchor[s][0, 3], raw / (raw.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain)


def test_eq_7_heads_are_contiguous_blocks_of_channels():
    model = tiny("gated")
    h, attn = torch.randn(1, 2, 32), tiny("gated").layers[1].attn
    wq, wk, wv, wg = attn.project.weight.split(32)
    for s, w in zip("qkvg", (wq, wk, wv, wg)):
        torch.testing.assert_close(attn.project(h)[s][0, 1, 2], (h[0, 1] @ w.T)[16:24])
    assert model.config.components == "qkvg" and tiny("base").config.components == "qkv"


# -------------------------------------------------------------------------------------------------- every variant

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


@torch.no_grad()
def test_flex_attention_masks_the_same_tokens():
    """The CUDA path of document masking, run by FlexAttention's eager CPU forward, where it needs no GPU."""
    config, (q, k, v) = ModelConfig(**{**TINY, "block_size": 300}), torch.randn(3, 2, 300, 4, 8)
    docs = (tokens(2, 300) < 3).cumsum(1)
    sparse, dense = (kind(config, 300, "cpu", docs).attend(0, q, k, v)
                     for kind in (M.DocumentBlocks, M.WithinDocuments))
    torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=1e-5)


@every_variant
@torch.no_grad()
def test_cache_equals_full_forward(variant):
    model, idx = tiny(variant), tokens(2, 30)
    full = model(idx)
    cache = KVCache(model.config, 2, 30)
    pieces = [model(idx[:, a:b], cache=cache) for a, b in ((0, 12), (12, 19), (19, 20), (20, 21), (21, 30))]
    torch.testing.assert_close(torch.cat(pieces, 1), full, atol=2e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="cannot take 1 more"):
        model(idx[:, :1], cache=cache)


@every_variant
def test_every_parameter_gets_gradient(variant):
    model = tiny(variant)
    model.loss(tokens(2, 24), tokens(2, 24, seed=1))[0].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


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


@every_variant
def test_optimizers_partition_the_parameters(variant):
    model = ExoFormer(variant_config(variant, **TINY))
    optimizers = T.build_optimizers(model, T.TrainConfig(device="cpu"))
    grouped = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    muons = {id(p) for group in optimizers[0].param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        matrix = p.dim() == 2 and "lambda" not in name and not name.startswith(("embed", "head"))
        assert (id(p) in muons) == matrix, name
    parts = {id(p): group["parts"] for group in optimizers[0].param_groups for p in group["params"]}
    layer = model.layers[0]
    assert parts[id(layer.attn.project.weight)] == len(model.config.components) and parts[id(layer.mlp.up.weight)] == 2
    assert parts[id(layer.attn.out_proj.weight)] == 1


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_matrices_decay_and_nothing_else_does(optimizer):
    """The rates of Table 4, in either optimizer; embedding, head, gains, lambdas and biases are left alone."""
    model = ExoFormer(variant_config("exo_dynamic", **TINY))
    config = T.TrainConfig(device="cpu", optimizer=optimizer, weight_decay=0.25)
    optimizers = T.build_optimizers(model, config)
    decay = {id(p): group["weight_decay"] for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        matrix = p.dim() == 2 and "lambda" not in name and not name.startswith(("embed", "head"))
        assert decay[id(p)] == (0.25 if matrix else 0.0), name
    assert all(group.get("betas", (0.9, 0.95)) == (0.9, 0.95) for o in optimizers for group in o.param_groups)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["base", "resformer", "nuresformer", "exo_dynamic"])
def test_one_graph_and_no_recompilation(variant):
    """fullgraph raises on a graph break; new documents and a last batch filled up with -100 must not compile again."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    objective = T.Objective(tiny(variant), T.TrainConfig(dtype="bfloat16"))
    objective.compile(backend=counter, fullgraph=True, dynamic=False)
    for seed in range(3):
        idx, targets = tokens(4, 24, seed=seed), tokens(4, 24, seed=seed + 1)
        targets[2:] = -100 if seed == 2 else targets[2:]
        objective(idx, targets, (idx < 9).cumsum(1))[0].backward()
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compiler_computes_an_internal_anchor_once():
    from torch._dynamo.backends.common import aot_autograd
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    products = {}
    for variant in ("gated", "nuresformer"):
        torch._dynamo.reset()
        graphs = []
        backend = aot_autograd(fw_compiler=lambda graph, _: graphs.append(graph) or make_boxed_func(graph.forward),
                               partition_fn=min_cut_rematerialization_partition)
        torch.compile(tiny(variant).loss, backend=backend, fullgraph=True)(tokens(2, 24), tokens(2, 24))
        product = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        products[variant] = sum(node.target in product for node in graphs[0].graph.nodes)
    assert products["nuresformer"] == products["gated"] == 3 * 4 + 1


@pytest.mark.parametrize("changes", [
    dict(norm_position="post"), dict(qk_norm=False), dict(gate=False, mix="kv", anchor_norm="v"),
    dict(dynamic=True, mix="gq", anchor_norm="g", granularity="scalar"),
    dict(dynamic=True, gate=False, mix="qkv", anchor_norm="", anchor="internal")])
@torch.no_grad()
def test_axes_combine_freely(changes):
    model, idx = tiny("exo", **changes), tokens(2, 20)
    full = model(idx)
    cache = KVCache(model.config, 2, 20)
    pieces = torch.cat([model(idx[:, :9], cache=cache), model(idx[:, 9:], cache=cache)], 1)
    torch.testing.assert_close(pieces, full, atol=2e-4, rtol=1e-4)
    assert full[..., :96].isfinite().all() and not torch.allclose(full, tiny("gated")(idx))


@pytest.mark.parametrize("changes, words", [
    (dict(anchor="none", mix="", anchor_norm="", dynamic=True), "dynamic=True.*anchor='none'"),
    (dict(gate=False), "mix='qkvg'.*gate=False"), (dict(n_embd=33), "n_embd=33.*n_head=4"),
    (dict(n_embd=36), "head_dim=9.*odd"), (dict(mix="qx"), "mix='qx'"), (dict(anchor_norm="qq"), "anchor_norm='qq'"),
    (dict(mix="v"), "anchor_norm='qkvg'.*mix='v'"), (dict(anchor="outer"), "anchor='outer'"),
    (dict(granularity="layer"), "granularity='layer'.*scalar, headwise, elementwise"),
    (dict(anchor="none"), "mix='qkvg'.*anchor='none'"), (dict(mix="", anchor_norm=""), "anchor='exogenous'.*mix=''"),
    (dict(n_layer=0), "n_layer=0"), (dict(norm_position="mid"), "norm_position='mid'"), (dict(ffn_dim=7), "ffn_dim=7")])
def test_illegal_configurations_name_field_and_value(changes, words):
    with pytest.raises(UserError, match=words) as error:
        ModelConfig(**{**TINY, **changes})
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------- loss, head, generation

def test_loss_matches_float64_and_counts_only_targets():
    model, idx, targets = tiny("base", vocab_size=90), tokens(2, 20, high=90), tokens(2, 20, seed=3, high=90)
    targets[0, 5:9] = -100
    logits = model(idx).detach().double().numpy()[..., :90]
    lse = np.log(np.exp(logits).sum(-1))
    right = [lse[b, t] - logits[b, t, targets[b, t]] for b, t in np.ndindex(2, 20) if targets[b, t] != -100]
    squares = [lse[b, t] ** 2 for b, t in np.ndindex(2, 20) if targets[b, t] != -100]
    cross_entropy, z = model.loss(idx, targets)
    assert abs(cross_entropy.item() - np.mean(right)) < 1e-5 and abs(z.item() - np.mean(squares)) < 1e-3


def test_head_padding_is_never_predicted_nor_counted():
    model = tiny("base", vocab_size=90)
    logits = model(tokens(1, 5, high=90))
    assert logits.shape[-1] == 128 and (logits[..., 90:] == -math.inf).all() and logits[..., :90].isfinite().all()
    model.loss(tokens(1, 5, high=90), tokens(1, 5, high=90))[0].backward()
    assert (model.head.weight.grad[90:] == 0).all()
    assert M.count_parameters(model) == sum(p.numel() for p in model.parameters()) - 38 * 32


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
    out = draw(1, stop_token=7, top_k=50)[:, 3:]
    for row in out.tolist():
        assert 7 not in row or set(row[row.index(7):]) == {7}
    assert torch.equal(draw(5, top_k=1), generate(model, idx, 30, temperature=0))
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, idx[:, :0], 3)


def test_sampling_follows_the_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -math.inf]]).expand(20_000, -1)
    counts = torch.bincount(M.sample(logits, 0.7, None, torch.Generator().manual_seed(0))[:, 0], minlength=5) / 20_000
    torch.testing.assert_close(counts, F.softmax(logits[0] / 0.7, -1), atol=0.015, rtol=0)
    assert set(M.sample(logits, 1.0, 2, torch.Generator().manual_seed(0))[:, 0].tolist()) == {0, 1}


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


# -------------------------------------------------------------------------------------------------------- checkpoints

def saved(model, path, **more):
    save_checkpoint(path, dict(model_config=vars(model.config).copy(), model=model.state_dict(), **more))
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


@pytest.mark.parametrize("fault", ["missing", "empty", "truncated", "flipped bit", "text", "malicious",
                                   "unknown setting"])
def test_damaged_checkpoints_are_refused_in_one_line(fault, tmp_path):
    path, witness = tmp_path / "c.pt", tmp_path / "witness"
    saved(tiny("exo"), path)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 16
    strange = {**torch.load(path, weights_only=True), "model_config": dict(n_lair=3)}
    {"missing": path.unlink, "empty": lambda: path.write_bytes(b""),
     "truncated": lambda: path.write_bytes(path.read_bytes()[:-700]), "text": lambda: path.write_text("hello"),
     "flipped bit": lambda: path.write_bytes(whole), "unknown setting": lambda: torch.save(strange, path),
     "malicious": lambda: torch.save(dict(model=Attack(witness)), path)}[fault]()
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and not witness.exists()


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


def test_muon_decay_of_small_weights_survives_float32_and_dies_in_bfloat16():
    """Why weights are float32 (README): decay 0.1 x rate 0.01 is below half a unit in the last place of bfloat16."""
    w, g = torch.rand(16, 16) + 0.5, torch.zeros(16, 16)
    assert torch.allclose(one_muon_step([g], [w], lr=0.01, weight_decay=0.1)[0], w * (1 - 1e-3))
    assert torch.equal(one_muon_step([g.bfloat16()], [w.bfloat16()], lr=0.01, weight_decay=0.1)[0], w.bfloat16())


# ------------------------------------------------------------------------------------------------------------ schedule

def test_learning_rate_and_momentum_follow_table_4():
    schedule, paper = OPTIM["schedule"], T.TrainConfig()
    ours = [T.lr_multiplier(step, paper) for step in schedule["paper_steps"]]
    np.testing.assert_allclose(ours, schedule["paper_linear_mult"], rtol=0, atol=1e-12)
    ramp = T.TrainConfig(muon_ramp=True)
    momentum = [T.muon_momentum(step, ramp) for step in schedule["momentum_steps"]]
    np.testing.assert_allclose(momentum, schedule["momentum"], atol=1e-12)
    assert T.muon_momentum(5, paper) == 0.95
    assert max(T.lr_multiplier(step, paper) for step in range(0, 38147, 7)) == 1.0


# ----------------------------------------------------------------------------------------------------------- training

SMALL = """--device=cpu --n_layer=2 --n_head=2 --n_embd=32 --ffn_dim=64 --block_size=32 --batch_size=2
    --total_batch_size=128 --max_steps=12 --warmup_steps=2 --eval_every=4 --eval_tokens=160 --final_eval_tokens=160
    --save_every=4 --keep=9 --compile=false --sample_tokens=8""".split()


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


def start(folder, data, *flags):
    """(Trainer, RunFolder) of a small run; the flags come last and win."""
    return T.prepare([f"--data={data}", f"--out_dir={folder}", *SMALL, *flags])


class NeverStop:
    signal = 0


def train_fully(folder, data, *flags, stop_after=None):
    """Run to the end, or as if stopped after a step. Returns the trainer; the folder's lock is released."""
    resuming = "--resume" in flags
    trainer, run_folder = T.prepare([f"--out_dir={folder}", *flags]) if resuming else start(folder, data, *flags)
    stop = NeverStop()
    update = trainer.update

    def update_then_stop():
        measured = update()
        stop.signal = signal.SIGTERM if trainer.step == stop_after else 0
        return measured
    trainer.update = update_then_stop
    T.run(trainer, run_folder, stop)
    run_folder.log.close(), run_folder.lock.close()
    return trainer


def same_state(a, b):
    """Names of the tensors that differ between two runs: weights and all optimizer states."""
    pairs = [(f"weight {n}", p, q) for (n, p), q in zip(a.model.state_dict().items(), b.model.state_dict().values())]
    for x, y in zip(a.optimizers, b.optimizers):
        for i, (s, t) in enumerate(zip(x.state_dict()["state"].values(), y.state_dict()["state"].values())):
            pairs += [(f"{type(x).__name__} {i} {key}", s[key], t[key]) for key in s]
    return [name for name, p, q in pairs if not torch.equal(torch.as_tensor(p), torch.as_tensor(q))]


def log_of(folder):
    """The records of a run's log without their times."""
    return [{k: v for k, v in json.loads(line).items() if k != "ms"} for line in open(folder / "log.jsonl")]


def test_every_epoch_visits_every_window_once_in_its_own_order(data):
    config = ModelConfig(**{**TINY, "block_size": 32, "vocab_size": 320})
    split = T.Tokens(data, "train", config)
    assert len(split) == 28 + 13 == 899 // 32 + 419 // 32
    every = [split.window(i) for i in range(len(split))]
    assert np.array_equal(every[28], pf.read_shard(data / "t_train_000001.bin")[:33]) and every[3][-1] == every[4][0]
    epochs = [split.shuffled(7, e * 41, 41) for e in range(2)]
    assert sorted(map(bytes, epochs[0])) == sorted(map(bytes, epochs[1])) == sorted(map(bytes, np.array(every)))
    assert not np.array_equal(*epochs)
    assert np.array_equal(split.shuffled(7, 30, 20), np.concatenate([split.shuffled(7, k, 1) for k in range(30, 50)]))


def test_a_token_outside_the_vocabulary_names_its_shard(data):
    with pytest.raises(pf.UserError, match="t_train_000000.bin: token id 256.*vocab_size=200"):
        T.Tokens(data, "train", ModelConfig(**{**TINY, "vocab_size": 200})).window(0)


@pytest.mark.parametrize("variant, flags", [
    ("base", []), ("exo_dynamic", ["--muon_ramp", "--muon_beta2=0.95"]), ("gated", ["--dtype=bfloat16"]),
    *(pytest.param(*run, marks=pytest.mark.slow) for run in (
        ("nuresformer", ["--mask_documents=false"]), ("exo_dynamic", []), ("exo", ["--optimizer=adamw"]),
        ("exo_dynamic", ["--dtype=pure_bfloat16"])))])
def test_resume_is_bitwise(variant, flags, data, tmp_path):
    """12 steps = 5 steps, a stop, 7 more: weights, optimizer states, log. The first epoch ends within step 11."""
    flags = [f"--variant={variant}", *flags]
    whole = train_fully(tmp_path / "a", data, *flags)
    train_fully(tmp_path / "b", data, *flags, stop_after=5)
    assert (tmp_path / "b" / "ckpt_000005.pt").exists() and len(log_of(tmp_path / "b")) == 6
    resumed = train_fully(tmp_path / "b", data, "--resume")
    assert same_state(whole, resumed) == [] and resumed.step == 12
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")
    assert [record["step"] for record in log_of(tmp_path / "b")] == list(range(13))


@pytest.mark.slow
def test_resume_is_bitwise_compiled_and_at_the_edge_of_an_epoch(data, tmp_path):
    """block_size 31 makes 42 windows, so that step 14 of 3 x 31 tokens begins an epoch anew."""
    flags = ["--variant=exo_dynamic", "--compile=true", "--n_layer=1", "--block_size=31", "--batch_size=1",
             "--total_batch_size=93", "--max_steps=16"]
    whole = train_fully(tmp_path / "a", data, *flags)
    assert len(whole.train) == 42
    train_fully(tmp_path / "b", data, *flags, stop_after=14)
    assert same_state(whole, train_fully(tmp_path / "b", data, "--resume")) == []
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")


def test_a_run_killed_in_its_last_evaluation_loses_no_step(data, tmp_path, monkeypatch):
    """The last evaluation may read the whole validation set; the log ends as if nothing had happened."""
    whole, evaluation = train_fully(tmp_path / "a", data, "--save_every=0"), T.evaluation

    def killed(trainer, tokens):
        if trainer.step == 12:
            raise KeyboardInterrupt
        return evaluation(trainer, tokens)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(T, "evaluation", killed)
        trainer, run_folder = start(tmp_path / "b", data, "--save_every=0")
        try:
            T.run(trainer, run_folder, NeverStop())
        finally:
            run_folder.log.close(), run_folder.lock.close()
    resumed = train_fully(tmp_path / "b", data, "--resume")
    assert resumed.step == 12 and same_state(whole, resumed) == [] and resumed.best_val == whole.best_val
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b") and "val_loss" in log_of(tmp_path / "b")[-1]
    assert len(log_of(tmp_path / "b")) == 13 and train_fully(tmp_path / "b", data, "--resume").step == 12
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")


def test_same_seed_same_run_other_seed_another(data, tmp_path):
    a, b, c = (train_fully(tmp_path / name, data, f"--seed={seed}", "--max_steps=3")
               for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert same_state(a, b) == [] and same_state(a, c) != []


@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_a_step_follows_the_clipped_gradient_of_the_mean_loss(clip, data, tmp_path):
    """Two passes of two sequences, against one float64 pass of all four: cross-entropy, z, norm, and how far plain
    gradient descent in the optimizers' place moves each weight."""
    trainer, run_folder = start(tmp_path / "a", data, f"--grad_clip={clip}", "--z_loss=0.01", "--variant=exo_dynamic")
    run_folder.log.close(), run_folder.lock.close()
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
    assert trainer.update()[:3] == pytest.approx((cross_entropy.item(), z.item(), norm), rel=1e-4)
    step = 0.003 / 2 * min(1, clip / norm)                                  # the first of two warm-up steps
    for (name, p), q in zip(trainer.model.named_parameters(), exact.parameters()):
        torch.testing.assert_close(p.double(), q - step * q.grad, atol=2e-7, rtol=0, msg=name)


def test_accumulation_computes_the_same_step(data, tmp_path):
    a, b = (train_fully(tmp_path / name, data, f"--batch_size={n}", "--max_steps=2", "--optimizer=adamw")
            for name, n in (("a", 4), ("b", 1)))
    for p, q in zip(a.model.parameters(), b.model.parameters()):
        torch.testing.assert_close(p, q, atol=2e-4, rtol=0)
    assert abs(log_of(tmp_path / "a")[1]["loss"] - log_of(tmp_path / "b")[1]["loss"]) < 1e-5


def test_training_lowers_the_validation_loss(data, tmp_path):
    train_fully(tmp_path / "a", data, "--max_steps=40", "--eval_every=0")
    losses = [record["val_loss"] for record in log_of(tmp_path / "a") if "val_loss" in record]
    assert len(losses) == 2 and abs(losses[0] - math.log(320)) < 1e-4 and losses[1] < 0.65 * losses[0]


def test_evaluation_is_the_mean_over_all_windows_and_counts_bytes(data, tmp_path):
    """5 windows in batches of 2: the last batch is filled up, and must not count the filling."""
    trainer = train_fully(tmp_path / "a", data, "--max_steps=2")
    result, val = trainer.evaluate(0), pf.read_shard(data / "t_val_000000.bin").astype(np.int64)
    losses, n_bytes = [], 0
    for start_at in range(0, 160, 32):
        window = torch.tensor(val[start_at:start_at + 33])[None]
        losses.append(trainer.model.loss(window[:, :-1], window[:, 1:], (window[:, :-1] == 256).cumsum(1))[0].item())
        n_bytes += sum(int(t) != 256 for t in window[0, 1:])
    assert len(trainer.val) == 5 and abs(result["val_loss"] - np.mean(losses)) < 1e-5
    assert abs(result["val_bpb"] - sum(losses) * 32 / math.log(2) / n_bytes) < 1e-4
    assert result["val_ppl"] == math.exp(result["val_loss"])


@torch.no_grad()
def use_by_hand(model, row, monkeypatch):
    """(sink, mean gate) of each layer on the tokens of one row, one head, query and layer after the other."""
    seen, plain = [], F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        seen.append((q[0].double(), k[0].double()))
        return plain(q, k, v, **options)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    x, gates = model.embed(row), []
    anchor, at = model.make_anchor(x), model.positions(row, None, None)
    for layer in model.layers:
        attn, h = layer.attn, layer.attn_norm(x)
        g = attn.project(h)["g"]
        if "g" in attn.mix:
            g = attn.mix["g"].lambda_anchor * anchor["g"] + attn.mix["g"].lambda_current * g
        gates.append((1 / (1 + (-g.double()).exp())).mean().item())
        x = layer(x, anchor, at)
    sinks = [np.mean([math.exp(q[t] @ k[0]) / sum(math.exp(q[t] @ k[j]) for j in range(t + 1))
                      for q, k in zip(queries / queries.size(-1) ** 0.5, keys) for t in range(len(q))])
             for queries, keys in seen]
    return sinks, gates


@pytest.mark.parametrize("variant", ["gated", "nuresformer", "exo"])
def test_every_evaluation_logs_how_layers_use_their_anchor(variant, data, tmp_path, monkeypatch):
    """Sink, gate and median lambda ratio of the last record, by loops over the final model; the first is as at init."""
    model = train_fully(tmp_path / "a", data, f"--variant={variant}", "--n_layer=2").model
    first, *others = [record for record in log_of(tmp_path / "a") if "val_loss" in record]
    row = torch.tensor(pf.read_shard(data / "t_val_000000.bin")[:32].astype(np.int64))[None]
    sinks, gates = use_by_hand(model, row, monkeypatch)
    np.testing.assert_allclose(others[-1]["attention_sink"], sinks, atol=1e-6)
    np.testing.assert_allclose(others[-1]["gate_mean"], gates, atol=1e-6)
    ratios = {s: [float(np.median(layer.attn.mix[s].lambda_anchor.detach() / layer.attn.mix[s].lambda_current.detach()))
                  if s in layer.attn.mix else None for layer in model.layers] for s in model.config.mix}
    assert [record["step"] for record in others] == [4, 8, 12]
    assert all(others[-1].get("lambda_ratio", {})[s] == pytest.approx(ratios[s], abs=1e-6) for s in ratios)
    assert all(set(numbers) <= {1.0, None} for numbers in first.get("lambda_ratio", {}).values())
    assert ("lambda_ratio" in first) == (variant != "gated") and not model.layers[0].attn.gate._forward_pre_hooks


def test_evaluation_keeps_the_graph_of_one_pass_only(data, tmp_path):
    """It runs the training graph; two alive at once would need twice the memory of a training step."""
    trainer, run_folder = start(tmp_path / "a", data)
    run_folder.log.close(), run_folder.lock.close()
    alive = [0, 0]                                                          # now, at most

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor.detach()                       # the graph itself would be a cycle
            alive[0] += 1
            alive[1] = max(alive)

        def __del__(self):
            alive[0] -= 1
    peaks = []
    for tokens in (32, 0):                                                  # one batch, three batches
        alive[1] = alive[0]
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            trainer.evaluate(tokens)
        peaks.append(alive[1])
    assert peaks[0] == peaks[1] > 10 and alive[0] == 0


def test_a_log_on_a_full_disk_waits_and_loses_no_line(data, tmp_path, capsys):
    """Two lines meet a full disk; once there is room, all are written, in order."""
    trainer, run_folder = start(tmp_path / "a", data)
    run_folder.log.close(), run_folder.lock.close()
    written, full = [], [True]

    class Disk(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            if full[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(bytes(data))
            return len(data)
    run_folder.log = io.TextIOWrapper(io.BufferedWriter(Disk()))
    for step in (1, 2, 3):
        full[0] = step < 3
        run_folder.write(dict(step=step))
    assert b"".join(written) == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    assert capsys.readouterr().out.count("COULD NOT WRITE") == 2


def newest_of(folder):
    """What --resume would take."""
    run_folder = T.RunFolder(folder, resume=True)
    try:
        return os.path.basename(run_folder.newest()[0])
    finally:
        run_folder.lock.close()


@pytest.mark.parametrize("fault", ["truncated", "flipped bit", "zero length", "malicious pickle", "of another program"])
def test_resume_skips_a_bad_newest_checkpoint_and_says_so(fault, data, tmp_path, capsys):
    train_fully(tmp_path / "a", data)
    path, witness = tmp_path / "a" / "ckpt_000012.pt", tmp_path / "witness"
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 3] ^= 1
    {"truncated": lambda: path.write_bytes(whole[:-900]), "flipped bit": lambda: path.write_bytes(whole),
     "zero length": lambda: path.write_bytes(b""), "malicious pickle": lambda: torch.save(Attack(witness), path),
     "of another program": lambda: torch.save(dict(weights=torch.zeros(3)), path)}[fault]()
    assert newest_of(tmp_path / "a") == "ckpt_000008.pt"
    assert "skipped" in capsys.readouterr().out and not witness.exists()
    resumed = train_fully(tmp_path / "a", data, "--resume")
    assert resumed.step == 12 and [record["step"] for record in log_of(tmp_path / "a")] == list(range(13))


@pytest.mark.parametrize("flags, words", [
    (["--variant=base"], "--gate=False.*gate=True"), (["--n_embd=64"], "--n_embd=64.*n_embd=32"),
    (["--seed=5"], "--seed=5.*seed=1337"),
    (["--total_batch_size=64"], "--total_batch_size=64.*total_batch_size=128"),
    (["--optimizer=adamw"], "--optimizer=adamw.*optimizer=muon")])
def test_resume_refuses_another_run(flags, words, data, tmp_path):
    train_fully(tmp_path / "a", data, "--max_steps=2")
    with pytest.raises(UserError, match=words):
        T.prepare([f"--out_dir={tmp_path / 'a'}", "--resume", *flags])


def test_resume_announces_what_may_change(data, tmp_path, capsys):
    train_fully(tmp_path / "a", data, "--max_steps=4")
    trainer = train_fully(tmp_path / "a", data, "--resume", "--max_steps=6", "--muon_lr=0.002")
    out = capsys.readouterr().out
    assert trainer.step == 6 and "max_steps from 4 to 6" in out and "muon_lr from 0.01 to 0.002" in out


def test_a_folder_is_for_one_run_at_a_time(data, tmp_path):
    trainer, run_folder = start(tmp_path / "a", data)
    with pytest.raises(pf.UserError, match="another run is writing there"):
        T.RunFolder(tmp_path / "a", resume=True)
    run_folder.log.close(), run_folder.lock.close()
    with pytest.raises(pf.UserError, match="no whole checkpoint"):
        T.prepare([f"--out_dir={tmp_path / 'a'}", "--resume"])
    with pytest.raises(pf.UserError, match="no folder"):
        T.prepare([f"--out_dir={tmp_path / 'nowhere'}", "--resume"])
    (tmp_path / "file").write_text("")
    with pytest.raises(pf.UserError, match="cannot be written"):
        start(tmp_path / "file" / "a", data)
    train_fully(tmp_path / "b", data, "--max_steps=1")
    with pytest.raises(pf.UserError, match="holds a run already.*--resume"):
        start(tmp_path / "b", data)


def test_only_the_newest_checkpoints_are_kept(data, tmp_path):
    train_fully(tmp_path / "a", data, "--keep=2", "--save_every=3")
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["ckpt_000009.pt", "ckpt_000012.pt", "lock", "log.jsonl"]


@pytest.mark.parametrize("where, row", [("embed.weight", 100), ("layers.1.mlp.up.weight", 60)])
def test_a_planted_nan_stops_the_run_and_is_never_saved(where, row, data, tmp_path):
    trainer, run_folder = start(tmp_path / "a", data)
    update = trainer.update

    def plant():
        if trainer.step == 6:
            trainer.model.get_parameter(where).data[row, 3] = math.nan
        return update()
    trainer.update = plant
    with pytest.raises(T.Diverged, match=f"step 7: .*lr 0.0.*not finite first: weight {where}"):
        T.run(trainer, run_folder, NeverStop())
    run_folder.log.close(), run_folder.lock.close()
    assert newest_of(tmp_path / "a") == "ckpt_000004.pt" and log_of(tmp_path / "a")[-1]["step"] == 6


def test_data_that_changed_since_is_refused(data, tmp_path):
    copy = tmp_path / "data"
    copy.mkdir()
    for path in data.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    train_fully(tmp_path / "a", copy, "--max_steps=2")
    (copy / "t_train_000001.bin").unlink()
    with pytest.raises(pf.UserError, match="2 train shards of 1,320 tokens, but there are 1 of 900"):
        T.prepare([f"--out_dir={tmp_path / 'a'}", "--resume"])


def test_a_run_resumes_where_its_data_moved_to(data, tmp_path, capsys):
    whole = train_fully(tmp_path / "a", data, "--max_steps=5")
    train_fully(tmp_path / "b", data, "--max_steps=5", stop_after=2)
    shutil.copytree(data, tmp_path / "moved")
    resumed = train_fully(tmp_path / "b", data, "--resume", f"--data={tmp_path / 'moved'}")
    assert same_state(whole, resumed) == [] and f"data from {data} to {tmp_path / 'moved'}" in capsys.readouterr().out


def test_a_failed_start_leaves_a_folder_that_says_what_to_do(data, tmp_path):
    """A run that ends before its first checkpoint leaves only a log."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(pf.UserError, match="the log of a run that saved no checkpoint; remove .*a/log.jsonl"):
        start(tmp_path / "a", data)
    (tmp_path / "a" / "log.jsonl").unlink()
    assert start(tmp_path / "a", data)[0].step == 0


@pytest.mark.parametrize("error, code", [
    (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "lower --batch_size"),
    (torch.OutOfMemoryError("CUDA out of memory"), "lower --batch_size"), (MemoryError(), "lower --batch_size")])
def test_only_a_lack_of_memory_is_called_so(error, code, monkeypatch):
    def fail(argv):
        raise error
    monkeypatch.setattr(T, "prepare", fail)
    with pytest.raises(SystemExit if code else RuntimeError, match=code):
        T.main()


def test_max_minutes_stops_saved_and_resumable(data, tmp_path):
    trainer = train_fully(tmp_path / "a", data, "--max_minutes=0.0001")
    assert trainer.step == 1 and train_fully(tmp_path / "a", data, "--resume", "--max_minutes=0").step == 12


@pytest.mark.parametrize("flags, words", [
    (["--variant=exo_dynamc"], "did you mean exo_dynamic"), (["--vairant=exo"], "did you mean --variant"),
    (["--preset=papr"], "did you mean paper"), (["--n_layer=two"], "invalid int value: 'two'"),
    (["--gate=maybe"], "'maybe' is neither true nor false"), (["--max_steps"], "expected one argument")])
def test_a_wrong_flag_is_one_line_and_exit_code_2(flags, words, capsys):
    with pytest.raises(SystemExit) as error:
        T.parse_flags(flags)
    message = capsys.readouterr().err
    assert error.value.code == 2 and words in message and message.count("\n") == 1


def test_every_setting_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit):
        T.parse_flags(["--help"])
    text = capsys.readouterr().out
    for config in (T.TrainConfig, ModelConfig):
        for field in T.fields(config):
            assert field.metadata["help"], field.name
            assert field.name == "tokenizer" or f"--{field.name} " in text


@pytest.mark.parametrize("flags, words", [
    (["--total_batch_size=100"], "--total_batch_size=100 is not a multiple"),
    (["--device=cuda"], "--device=cuda is not there: torch can use"),
    (["--batch_size=0"], "--batch_size=0"), (["--dtype=float16"], "--dtype=float16 must be one of"),
    (["--n_head=3"], "n_embd=32 is not a multiple of n_head=3"),
    (["--block_size=5000", "--total_batch_size=10000"], "lower --block_size"),
    (["--data=nowhere"], "nowhere.*--input=FILES --out=nowhere"),
    (["--preset=paper", "--data="], "python prepare_fineweb.py")])
@pytest.mark.skipif(torch.cuda.is_available(), reason="expects a machine without CUDA")
def test_a_run_that_cannot_start_says_why_in_one_line(flags, words, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UserError, pf.UserError), match=words) as error:
        start(tmp_path / "a", data, *flags)
    assert "\n" not in str(error.value)


def launch(folder, *flags, **kwargs):
    """train.py as a user starts it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **kwargs.pop("env", {})}
    command = [sys.executable, str(HERE / "train.py"), *SMALL, f"--out_dir={folder}", *flags]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_tells_how_to_go_on_and_exits_with_its_code(number, data, tmp_path):
    folder = tmp_path / "a"
    process = launch(folder, f"--data={data}", "--max_steps=100000", "--eval_every=0", "--save_every=0")
    wait_for(lambda: (folder / "log.jsonl").exists() and len(open(folder / "log.jsonl").readlines()) > 3)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    step = int(newest_of(folder)[5:-3])
    assert process.returncode == 128 + number and "Traceback" not in err
    assert f"python train.py --resume --out_dir={folder}" in out
    assert log_of(folder)[-1]["step"] == step
    flags = ["--max_steps=100000", "--eval_every=0", "--save_every=0"]
    whole = train_fully(tmp_path / "b", data, *flags, stop_after=step + 2)
    resumed = train_fully(folder, data, "--resume", stop_after=step + 2)
    assert same_state(whole, resumed) == []


@pytest.mark.slow
def test_a_storm_of_kills_loses_nothing(data, tmp_path):
    """paper/storm.py runs this for as long as you like."""
    folder, rng = tmp_path / "a", np.random.default_rng(3)
    flags = [f"--data={data}", "--max_steps=150", "--save_every=5", "--eval_every=50", "--keep=2"]
    for kills in range(5):
        resume = folder.exists() and any(folder.glob("ckpt_*.pt"))
        process = launch(folder, *(["--resume"] if resume else flags)) if resume or not folder.exists() else None
        if process is None:
            [p.unlink() for p in folder.iterdir()], folder.rmdir()
            continue
        wait_for(lambda: process.poll() is not None or (folder / "log.jsonl").exists())
        time.sleep(float(rng.uniform(0, 1.0)))
        process.kill()
        process.communicate()
    saved_once = any(folder.glob("ckpt_*.pt"))
    resumed = train_fully(folder, data, "--resume") if saved_once else train_fully(tmp_path / "c", data, *flags)
    whole = train_fully(tmp_path / "b", data, *flags)
    assert same_state(whole, resumed) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is POSIX")
def test_a_full_disk_does_not_stop_training_nor_spoil_a_checkpoint(data, tmp_path):
    """Files may not grow past 30 kB: a checkpoint does not fit, log.jsonl does."""
    import resource
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    process = launch(tmp_path / "a", f"--data={data}", preexec_fn=limit)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and out.count("COULD NOT SAVE") == 4 and "Traceback" not in err
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["lock", "log.jsonl"]
    assert len(log_of(tmp_path / "a")) == 13


# ------------------------------------------------------------------------------------------------------ many processes

def launch_ranks(n, folder, *flags, **kwargs):
    """torchrun with n processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", f"--master_port={port}",
               str(HERE / "train.py"), f"--out_dir={folder}", *flags]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, **kwargs)


ENDLESS = [*SMALL, "--total_batch_size=128", "--max_steps=100000", "--eval_every=0"]


def run_ranks(n, folder, *flags):
    process = launch_ranks(n, folder, *flags)
    out = process.communicate(timeout=200)[0]
    assert process.returncode == 0, out
    return out


def weights(folder, step):
    return M.read_checkpoint(folder / f"ckpt_{step:06d}.pt")["model"]


@pytest.mark.slow
def test_one_two_and_three_processes_are_the_same_run(data, tmp_path):
    """6 sequences a step in 6, 3 and 2 passes a process. Sums are ordered differently, so not bit for bit."""
    flags = [*SMALL, f"--data={data}", "--variant=exo_dynamic", "--batch_size=1", "--total_batch_size=192",
             "--max_steps=20", "--muon_dtype=float32", "--eval_every=10"]
    for n in (1, 2, 3):
        run_ranks(n, tmp_path / str(n), *flags)
    one, two, three = (log_of(tmp_path / str(n)) for n in (1, 2, 3))
    for a, b, c in zip(one, two, three, strict=True):
        for key in ("loss", "val_loss"):
            assert abs(a.get(key, 0) - b.get(key, 0)) < 1e-5 and abs(a.get(key, 0) - c.get(key, 0)) < 1e-5
    for n in (2, 3):
        for (name, p), q in zip(weights(tmp_path / "1", 20).items(), weights(tmp_path / str(n), 20).values()):
            torch.testing.assert_close(p, q, atol=2e-4, rtol=0, msg=name)


@pytest.mark.slow
def test_two_processes_equal_one_with_two_accumulations_bit_for_bit(data, tmp_path):
    """Halving is exact, so this is the sharpest check there is; and one process may resume what two began."""
    flags = [*SMALL, f"--data={data}", "--total_batch_size=128", "--max_steps=8"]
    run_ranks(1, tmp_path / "one", *flags)
    run_ranks(2, tmp_path / "two", *flags)
    for folder in ("one", "two"):
        assert "val_loss" in log_of(tmp_path / folder)[-1]
    one, two = weights(tmp_path / "one", 8), weights(tmp_path / "two", 8)
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    (tmp_path / "two" / "ckpt_000008.pt").unlink()
    run_ranks(1, tmp_path / "two", "--resume")
    resumed = weights(tmp_path / "two", 8)
    assert [name for name in one if not torch.equal(one[name], resumed[name])] == []
    assert [record["step"] for record in log_of(tmp_path / "two")] == list(range(9))


@pytest.mark.slow
def test_a_dead_process_ends_the_job_and_the_run_resumes(data, tmp_path):
    folder = tmp_path / "a"
    process = launch_ranks(2, folder, *ENDLESS, f"--data={data}", "--save_every=5")
    wait_for(lambda: folder.exists() and len(list(folder.glob("ckpt_*.pt"))) > 1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    began = time.monotonic()
    process.communicate(timeout=90)
    assert process.returncode != 0 and time.monotonic() - began < 60
    step = int(newest_of(folder)[5:-3])
    run_ranks(1, folder, "--resume", f"--max_steps={step + 2}")
    assert newest_of(folder) == f"ckpt_{step + 2:06d}.pt"


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_once(data, tmp_path):
    folder = tmp_path / "a"
    process = launch_ranks(2, folder, *ENDLESS, f"--data={data}", "--save_every=0")
    wait_for(lambda: (folder / "log.jsonl").exists() and len(open(folder / "log.jsonl").readlines()) > 3)
    process.terminate()
    out = process.communicate(timeout=90)[0]
    names = [path.name for path in folder.glob("ckpt_*.pt")]
    assert len(names) == 1 and out.count("stopped by SIGTERM") == 1 and process.returncode != 0
    assert log_of(folder)[-1]["step"] == int(names[0][5:-3])
