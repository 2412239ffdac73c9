"""
Each quantity of analysis.py against a slow computation of its definition: Python loops in float64
on a tiny model whose attention and hidden states are recorded in another way than analysis.py does,
and on two layers of a model as the paper's released code computed them (golden_two_layers.pt in
testdata/: weights, hidden states, gates, q and k of layer 2).

Then what table2.py, usage.py and figures.py print and draw of records whose numbers are made by
hand and differ in every layer, and what perplexity.py and export.py say of a checkpoint.
"""

import json
import math
import pathlib
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import analysis
import export
import figures
import perplexity
import table2
import usage
from model import TABLE_3, ExoFormer, InputError, Positions, load_checkpoint, variant_config
from prepare_fineweb import UserError, write_shard
from train import save_checkpoint

TESTDATA = pathlib.Path(__file__).parent / "testdata"
GOLDEN = torch.load(TESTDATA / "golden_two_layers.pt", weights_only=True)
VARIANTS = [
    "base",
    "resformer",
    "gated",
    "nuresformer",
    "exo_scalar",
    "exo_headwise",
    "exo_dynamic",
]
ROWS = 2
LENGTH = 12


def tiny(variant, **settings):
    """A model of three layers in which nothing is zero or one."""
    torch.manual_seed(1)
    sizes = dict(n_layer=3, n_head=2, n_embd=12, ffn_dim=16, vocab_size=40, block_size=LENGTH)
    sizes["tokenizer"] = "bytes"
    model = ExoFormer(variant_config(variant, **{**sizes, **settings})).eval()
    for name, p in model.named_parameters():
        spread = 0.4 if p.dim() == 2 else 1.0
        low, high = (0.5, 1.5) if "norm" in name else (-spread, spread)
        nn.init.uniform_(p, low, high)
    return model


def windows(rows=ROWS, length=LENGTH):
    return torch.randint(40, (rows, length + 1), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def recorded(model, idx, monkeypatch):
    """(hidden states [layer][row][token][channel], q and k of every layer (B, H, T, D)), float64.

    Without any hook: the layers are called one by one, and F.scaled_dot_product_attention tells
    what it is given.
    """
    seen = []
    plain = F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        seen.append((q.double(), k.double()))
        return plain(q, k, v, **options)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", spy)
        x = model.embed(idx)
        anchor = model.make_anchor(x)
        positions = Positions(model.config, LENGTH, idx.device)
        states = [x.double()]
        for layer in model.layers:
            x = layer(x, anchor, positions)
            states.append(x.double())
    return states, seen


def attention(q, k, t, first=0):
    """Weights of query t on keys 0 ... t, by the definition, none before `first`. q, k (T, D)."""
    keys = range(max(0, first), t + 1)
    scores = []
    for j in keys:
        dot = sum(float(a) * float(b) for a, b in zip(q[t], k[j]))
        scores.append(dot / math.sqrt(len(q[t])))
    powers = [math.exp(score - max(scores)) for score in scores]
    return [0.0] * keys[0] + [power / sum(powers) for power in powers]


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b))
    return dot / math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def pair_cosines(rows):
    """Mean cosine over i < j of each row of vectors (B, T, C)."""
    return mean(
        cosine(row[i], row[j]) for row in rows.tolist() for j in range(len(row)) for i in range(j)
    )


def components_by_svd(rows):
    """Components for 99 % of the variance of (B, T, C): singular values of the centred matrix."""
    flat = rows.flatten(0, 1).numpy()
    squares = np.linalg.svd(flat - flat.mean(0), compute_uv=False) ** 2
    enough = 0.99 * squares.sum()
    return next(n for n in range(1, len(squares) + 1) if squares[:n].sum() >= enough)


# ---- hidden states and attention -----------------------------------------------------------------


@pytest.mark.parametrize("variant, window", [(variant, 0) for variant in VARIANTS] + [("exo", 5)])
def test_sink_and_entropy_match_loops(variant, window, monkeypatch):
    """Every row, head and query one by one, the first query included.

    Where a query sees only the last `window` tokens, its weights are on these alone.
    """
    model = tiny(variant, window=window)
    rows = windows()
    result = analysis.analyse(model, rows)["by_layer"]
    _, seen = recorded(model, rows[:, :-1], monkeypatch)
    for layer, (q, k) in enumerate(seen):
        weights = []
        for q_head, k_head in zip(q.flatten(0, 1), k.flatten(0, 1)):
            for t in range(LENGTH):
                weights.append(attention(q_head, k_head, t, t + 1 - (window or LENGTH)))
        sink = mean(w[0] for w in weights)
        entropy = mean(-sum(p * math.log(p) for p in w if p > 0) for w in weights)
        assert result["attention_sink"][layer] == pytest.approx(sink, abs=1e-6)
        assert result["attention_entropy"][layer] == pytest.approx(entropy, abs=1e-5)


def test_neighbouring_queries_share_a_head_of_keys():
    """Grouped-query attention: of four heads of queries the first two see the first of keys."""
    positions = Positions(tiny("base").config, LENGTH, torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(1, LENGTH, 4, 6, generator=generator)
    k = torch.randn(1, LENGTH, 2, 6, generator=generator)
    attn = SimpleNamespace(q_norm=nn.Identity(), k_norm=nn.Identity())
    heads = list(analysis.attention_weights(attn, dict(q=q, k=k), positions))
    turned_q = positions.rotate(q)[0].double()
    turned_k = positions.rotate(k)[0].double()
    assert len(heads) == 4
    for i, weights in enumerate(heads):
        for t in range(LENGTH):
            expected = attention(turned_q[:, i], turned_k[:, i // 2], t)
            assert weights[t].tolist() == pytest.approx(expected + [0] * (LENGTH - 1 - t), abs=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_similarity_and_pca_match_loops(variant, monkeypatch):
    """Token similarity, PCA core features and similarity between layers, of the embedding too."""
    model = tiny(variant)
    rows = windows()
    result = analysis.analyse(model, rows)
    states, _ = recorded(model, rows[:, :-1], monkeypatch)
    similarity = [pair_cosines(x) for x in states]
    assert result["by_layer"]["token_similarity"] == pytest.approx(similarity, abs=1e-6)
    assert result["by_layer"]["pca_core_features"] == [components_by_svd(x) for x in states]
    flat = [x.flatten(0, 1).tolist() for x in states]
    table = [[mean(cosine(u, v) for u, v in zip(a, b)) for b in flat] for a in flat]
    np.testing.assert_allclose(result["hidden_similarity"], table, atol=1e-6)


def test_maps_show_the_first_row_in_three_layers(monkeypatch):
    """Cosines of tokens spread evenly over the row, in the embedding, the middle, the end."""
    monkeypatch.setattr(analysis, "MAP_SIDE", 4)
    model = tiny("exo")
    rows = windows()
    result = analysis.analyse(model, rows)["token_maps"]
    states, _ = recorded(model, rows[:, :-1], monkeypatch)
    assert result["positions"] == [0, 4, 7, 11]
    assert result["layers"] == [0, 2, 3]
    for layer, found in zip(result["layers"], result["maps"]):
        few = states[layer][0][[0, 4, 7, 11]].tolist()
        np.testing.assert_allclose(found, [[cosine(u, v) for v in few] for u in few], atol=1e-6)


def test_averages_are_means_over_layers():
    """Sink: over the layers; similarity and PCA: the embedding counts as one more."""
    result = analysis.analyse(tiny("exo"), windows())
    counts = dict(attention_sink=3, token_similarity=4, pca_core_features=4, gate_mean=3)
    for name, layers in counts.items():
        assert len(result["by_layer"][name]) == layers
        assert result["averages"][name] == pytest.approx(np.mean(result["by_layer"][name]))


def test_covariance_survives_a_large_mean():
    """Pieces of unlike means, 1e6 away from zero, give the components of the whole."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    x = noise * 0.5 ** torch.arange(8) + 1e6
    x[20:] += torch.arange(8.0)
    whole = analysis.Covariance()
    for piece in x.split([20, 7, 33]):
        whole.add(piece)
    assert whole.core_features() == components_by_svd(x[None])
    np.testing.assert_allclose(whole.scatter / 60, np.cov(x.numpy().T, bias=True), atol=1e-8)


@pytest.mark.parametrize("share, features", [(0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3)])
def test_core_features_are_the_fewest_that_reach_the_share(share, features):
    """Variances 5, 3 and 2 of 10 along three axes."""
    covariance = analysis.Covariance()
    covariance.count = 10
    covariance.scatter = torch.diag(torch.tensor([2.0, 5.0, 3.0]))
    assert covariance.core_features(share) == features


def test_cross_entropy_matches_loss():
    """The chunked cross-entropy is the model's own, without z."""
    model = tiny("nuresformer")
    rows = windows()
    expected = model.loss(rows[:, :-1], rows[:, 1:])[0].item()
    assert analysis.analyse(model, rows)["cross_entropy"] == pytest.approx(expected, abs=1e-5)
    by_five = sum(analysis.cross_entropy(model, row[None], chunk=5) for row in rows)
    assert by_five / rows[:, 1:].numel() == pytest.approx(expected, abs=1e-5)


def test_the_hooks_leave_nothing_behind():
    """Logits before and after are the same, and so is a second analysis."""
    model = tiny("exo_dynamic").train()
    rows = windows()
    before = model(rows[:, :-1])
    first = analysis.analyse(model, rows, ablate_anchor=True)
    assert torch.equal(model(rows[:, :-1]), before)
    assert analysis.analyse(model, rows, ablate_anchor=True) == first
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_dropout_is_off_in_an_analysis():
    """A model that comes in training mode is analysed as in evaluation mode."""
    model = tiny("exo")
    rows = windows()
    quiet = analysis.analyse(model, rows)
    model.layers[1].mlp = nn.Sequential(model.layers[1].mlp, nn.Dropout(0.5))
    model.train()
    assert analysis.analyse(model, rows)["by_layer"] == quiet["by_layer"]


# ---- gates, lambdas, gammas ----------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["gated", "naive", "nuresformer", "exo", "exo_dynamic"])
def test_gates_match_loops(variant, monkeypatch):
    """Mean gate and share below 0.2, after mixing: Eq. 10 and 12 written out number by number."""
    model = tiny(variant)
    rows = windows()
    result = analysis.analyse(model, rows)["by_layer"]
    states, _ = recorded(model, rows[:, :-1], monkeypatch)
    for i, layer in enumerate(model.layers):
        g = sum(terms_by_formula(model, layer, states[i], states[0], "g"))
        gates = [1 / (1 + math.exp(-x)) for x in g.flatten().tolist()]
        closed = mean(gate < 0.2 for gate in gates)
        assert result["gate_mean"][i] == pytest.approx(mean(gates), abs=1e-6)
        assert result["gate_sparsity"][i] == pytest.approx(closed, abs=1e-9)


def weights_of(module):
    return module.weight.detach().double()


def rms_norm(x, gain):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


@torch.no_grad()
def terms_by_formula(model, layer, x, embedded, s):
    """The two terms of Eq. 12 of letter s in a layer, (B, T, H, D) float64.

    From its input x and the embeddings (B, T, C); without an anchor [its own projection].
    """
    config = model.config
    place = "qkvg".index(s)
    heads = (config.n_head, -1)
    letters = len(config.components)
    h = rms_norm(x, weights_of(layer.attn_norm))
    own = weights_of(layer.attn.project).chunk(letters)[place]
    current = (h @ own.T).unflatten(-1, heads)
    if s not in layer.attn.mix:
        return [current]
    if config.anchor == "exogenous":
        source = embedded
        matrix = weights_of(model.anchor.project).chunk(4)[place]
    else:
        first = model.layers[0]
        source = rms_norm(embedded, weights_of(first.attn_norm))
        matrix = weights_of(first.attn.project).chunk(letters)[place]
    anchor = (source @ matrix.T).unflatten(-1, heads)
    if s in config.anchor_norm:
        anchor = rms_norm(anchor, weights_of(model.anchor.norms[s]))
    gamma = torch.ones(*h.shape[:2], 8).double()
    if config.dynamic:
        gamma = gamma_by_formula(layer, h)
    mix = layer.attn.mix[s]
    gamma_anchor = gamma[..., 2 * place, None, None]
    gamma_current = gamma[..., 2 * place + 1, None, None]
    return [
        gamma_anchor * mix.lambda_anchor.double() * anchor,
        gamma_current * mix.lambda_current.double() * current,
    ]


@torch.no_grad()
def gamma_by_formula(layer, h):
    """Eq. 11 with GELU by the error function: (B, T, 8) in the order q1 q2 k1 k2 v1 v2 g1 g2."""
    gammas = layer.attn.gammas
    a = h @ weights_of(gammas.fc1).T
    a = a * (1 + torch.erf(a / math.sqrt(2))) / 2
    return 1 / (1 + torch.exp(-(a @ weights_of(gammas.fc2).T + gammas.bias.double())))


def test_gamma_statistics_match_the_formula(monkeypatch):
    """Mean and standard deviation over tokens of each gamma, by layer, component and slot."""
    model = tiny("exo_dynamic")
    rows = windows()
    result = analysis.analyse(model, rows)["gammas"]
    assert analysis.analyse(tiny("exo"), rows)["gammas"] == {}
    states, _ = recorded(model, rows[:, :-1], monkeypatch)
    for i, layer in enumerate(model.layers):
        h = rms_norm(states[i], weights_of(layer.attn_norm))
        gamma = gamma_by_formula(layer, h).flatten(0, 1).numpy()
        for slot in range(8):
            table = result["qkvg"[slot // 2]][("anchor", "current")[slot % 2]]
            assert table["mean"][i] == pytest.approx(np.mean(gamma[:, slot]), abs=1e-5)
            assert table["std"][i] == pytest.approx(np.std(gamma[:, slot]), abs=1e-5)


@pytest.mark.parametrize("variant", ["resformer", "nuresformer", "exo_nonorm", "exo_dynamic"])
def test_use_of_the_anchor_matches_loops(variant, monkeypatch):
    """The mean norm of both terms of Eq. 12, token by token, over positions 0 | 1 | 2, 3 | ...

    And the anchor's share of the two means, by layer and by octave.
    """
    model = tiny(variant)
    rows = windows()
    tables = analysis.analyse(model, rows)["anchor_use"]
    states, _ = recorded(model, rows[:, :-1], monkeypatch)
    places = [range(0, 1), range(1, 2), range(2, 4), range(4, 8), range(8, LENGTH)]
    assert list(tables) == list(model.config.mix)
    for s, table in tables.items():
        mixing = [i for i, layer in enumerate(model.layers, 1) if s in layer.attn.mix]
        assert table["layers"] == mixing
        by_layer, by_octave = analysis.anchor_share(table)
        for row, i in enumerate(mixing):
            terms = terms_by_formula(model, model.layers[i - 1], states[i - 1], states[0], s)
            norms = [norms_of(term) for term in terms]  # [anchor, current][row][token]
            means = [
                [mean(n[t] for n in norm for t in place) for place in places] for norm in norms
            ]
            assert table["anchor"][row] == pytest.approx(means[0], rel=1e-5)
            assert table["current"][row] == pytest.approx(means[1], rel=1e-5)
            anchor, current = (mean(x for part in norm for x in part) for norm in norms)
            assert by_layer[row] == pytest.approx(anchor / (anchor + current), rel=1e-5)
            shares = [a / (a + c) for a, c in zip(*means)]
            assert by_octave[row] == pytest.approx(shares, rel=1e-5)


def norms_of(term):
    """The norm of each token's (H, D), [row][token], of a term (B, T, H, D)."""
    return [
        [math.sqrt(sum(x * x for x in token)) for token in row] for row in term.flatten(2).tolist()
    ]


def test_octaves_are_lengths_in_binary():
    assert analysis.octaves(2048).tolist() == [i.bit_length() for i in range(2048)]


@pytest.mark.parametrize(
    "granularity, shape",
    [("scalar", (1, 1)), ("headwise", (2, 1)), ("elementwise", (2, 6))],
)
def test_lambdas_are_those_of_the_layers_that_mix(granularity, shape):
    """An internal anchor's own layer has none."""
    model = tiny("nuresformer", granularity=granularity)
    for s in "qkvg":
        table = analysis.lambdas_of(model)[s]
        assert table["layers"] == [2, 3]
        for row, layer in enumerate((model.layers[1], model.layers[2])):
            mix = layer.attn.mix[s]
            assert np.shape(table["anchor"][row]) == shape
            assert table["anchor"][row] == mix.lambda_anchor.tolist()
            assert table["current"][row] == mix.lambda_current.tolist()


def test_ratio_and_near_zero_by_hand():
    """lambda1 / lambda2 channel by channel; 0.001 itself is not near zero, minus 0.0009 is."""
    table = dict(
        anchor=[[[1.0, 0.0009]], [[-0.0009, -6.0]]],
        current=[[[2.0, 0.0018]], [[0.0003, 2.0]]],
    )
    np.testing.assert_allclose(analysis.ratio(table), [[[0.5, 0.5]], [[-3.0, -3.0]]])
    assert analysis.near_zero([table]) == 0.5
    few_heads = dict(anchor=[[[0.001], [0.0]], [[1.0], [1.0]]])
    assert analysis.near_zero([few_heads]) == 0.25
    assert analysis.near_zero([table, dict(anchor=[[[0.001]]])]) == 0.4  # letters of unlike shapes


def percentile(values, share):
    """The value below which `share` of the sorted values lie, linear in between."""
    ordered = sorted(values)
    place = share * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def clip(layer):
    """A layer's ratios (heads of channels) between their 2nd and 98th percentile."""
    flat = [x for head in layer for x in head]
    low = percentile(flat, 0.02)
    high = percentile(flat, 0.98)
    return [[min(max(x, low), high) for x in head] for head in layer]


def between_heads_by_loops(ratios):
    """Between-head over total variance of ratios [layer][head][channel], mean over layers."""
    shares = []
    for layer in map(clip, ratios):
        whole = mean(x for head in layer for x in head)
        between = sum(len(head) * (mean(head) - whole) ** 2 for head in layer)
        shares.append(between / sum((x - whole) ** 2 for head in layer for x in head))
    return mean(shares)


def correlation_by_loops(one, other):
    """Pearson's correlation of ratios [layer][head][channel] less each head's mean."""
    found = []
    for layer, partner in zip(one, other):
        a = [x - mean(head) for head in clip(layer) for x in head]
        b = [x - mean(head) for head in clip(partner) for x in head]
        product = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
        found.append(sum(x * y for x, y in zip(a, b)) / product)
    return mean(found)


def table_with(ratios):
    """A letter's table whose lambda_1 / lambda_2 are `ratios` (layers, H, D)."""
    current = np.random.default_rng(7).uniform(0.5, 2, np.shape(ratios))
    return dict(anchor=(np.array(ratios) * current).tolist(), current=current.tolist())


def test_share_between_heads_matches_loops():
    """Layer by layer; 1 for heads of one value each, 0 for heads that are alike."""
    drawn = np.random.default_rng(8).normal(size=(3, 4, 10)) + np.arange(4)[:, None]
    expected = between_heads_by_loops(drawn.tolist())
    assert analysis.between_heads(table_with(drawn)) == pytest.approx(expected)
    levels = np.broadcast_to(np.arange(4.0)[None, :, None], (2, 4, 10))
    stripes = np.broadcast_to(np.sin(np.arange(10.0))[None, None], (2, 4, 10))
    assert analysis.between_heads(table_with(levels)) == pytest.approx(1)
    assert analysis.between_heads(table_with(stripes)) == pytest.approx(0, abs=1e-9)


def test_one_lambda_near_zero_does_not_rule_the_share_between_heads():
    ratios = np.broadcast_to(np.arange(4.0)[None, :, None], (1, 4, 64)).copy()
    ratios[0, 0, 0] = 1e6
    assert analysis.between_heads(table_with(ratios)) > 0.9


def test_correlation_of_bands_matches_loops():
    """The same bands on other levels give 1, turned round -1; unlike heads cannot be compared."""
    rng = np.random.default_rng(9)
    bands = rng.normal(size=(2, 4, 10))
    other = 0.5 * bands + rng.normal(size=bands.shape)
    table = table_with(bands)
    expected = correlation_by_loops(bands.tolist(), other.tolist())
    assert analysis.band_correlation(table, table_with(other)) == pytest.approx(expected)
    assert analysis.band_correlation(table, table_with(-2 * bands)) == pytest.approx(-1)
    stripes = np.broadcast_to(np.sin(np.arange(10.0)), (2, 4, 10))
    raised = stripes + np.arange(4.0)[:, None]
    striped = table_with(stripes)
    assert analysis.band_correlation(striped, table_with(stripes + 3)) == pytest.approx(1)
    assert analysis.band_correlation(striped, table_with(raised)) > 0.9
    assert analysis.band_correlation(striped, table_with(stripes[:, :2])) is None


@pytest.mark.parametrize(
    "similarity, start",
    [
        ([0.1, 0.6, 0.9, 0.5, 0.7, 0.95, 0.4], 3),  # the paper's: up, dip, up, a fall at the end
        ([0.1, 0.6, 0.59, 0.6, 0.9, 0.5, 0.7, 0.3], 5),  # a ripple on the way up is no dip
        ([0.1, 0.9, 0.3, 0.4, 0.2, 0.8], 4),  # the lowest point of a wide dip
        ([0.1, 0.2, 0.5, 0.8], None),  # only up
        ([0.1, 0.8, 0.5, 0.2], None),  # only down after the maximum
        ([0.9, 0.1, 0.3, 0.5], None),  # the embedding is no early maximum
    ],
)
def test_stage_3_begins_in_the_deepest_dip(similarity, start):
    assert analysis.stage_3(similarity) == start


@pytest.mark.parametrize("variant", ["resformer", "nuresformer_vg", "exo", "exo_dynamic"])
def test_an_ablated_anchor_is_lambda_zero(variant):
    """Removing the anchor by a hook gives the analysis of a model whose every lambda1 is zero."""
    model = tiny(variant)
    rows = windows()
    ablated = analysis.analyse(model, rows, ablate_anchor=True)
    assert ablated["cross_entropy"] != analysis.analyse(model, rows)["cross_entropy"]
    for layer in model.layers:
        for mix in layer.attn.mix.values():
            mix.lambda_anchor.data.zero_()
    expected = analysis.analyse(model, rows)
    assert ablated["by_layer"] == expected["by_layer"]
    assert ablated["cross_entropy"] == expected["cross_entropy"]


# ---- the paper's released code -------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_result():
    """What is measured, layer by layer, of the released code's two layers."""
    head = torch.zeros(GOLDEN["model"]["transformer.wte.weight"].shape)
    model = ExoFormer.from_released({**GOLDEN["model"], "lm_head.weight": head}).eval()
    window = torch.cat((GOLDEN["idx"], GOLDEN["idx"][:, :1]), dim=1)
    return analysis.analyse(model, window)["by_layer"]


def test_golden_hidden_states_and_gates(golden_result):
    """The released code's own hidden states and gates, through the definitions."""
    states = [x.double() for x in GOLDEN["hidden_states"]]
    similarity = [pair_cosines(x) for x in states]
    assert golden_result["token_similarity"] == pytest.approx(similarity, abs=1e-5)
    assert golden_result["pca_core_features"] == [components_by_svd(x) for x in states]
    for i, gate in enumerate(GOLDEN["gate_scores"]):
        closed = (gate < 0.2).double().mean().item()
        assert golden_result["gate_mean"][i] == pytest.approx(gate.double().mean().item(), abs=1e-6)
        assert golden_result["gate_sparsity"][i] == pytest.approx(closed, abs=1e-9)


def test_golden_attention(golden_result):
    """Sink and entropy of the released code's layer 2, from its rotated q and k (H, T, D)."""
    q = GOLDEN["layer_2"]["q"][0].double()
    k = GOLDEN["layer_2"]["k"][0].double()
    weights = [attention(qh, kh, t) for qh, kh in zip(q, k) for t in range(q.size(1))]
    sink = mean(w[0] for w in weights)
    entropy = mean(-sum(p * math.log(p) for p in w) for w in weights)
    assert golden_result["attention_sink"][1] == pytest.approx(sink, abs=1e-6)
    assert golden_result["attention_entropy"][1] == pytest.approx(entropy, abs=1e-5)


# ---- data and checkpoints ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens():
    """200 tokens of validation text, of which no two windows are alike."""
    ids = np.random.default_rng(4).integers(0, 39, 200)
    ids[::17] = 39
    return ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_data, tokens):
    """Shards in data/, and a run folder with the checkpoints of steps 3 and 7 for each variant."""
    root = tmp_path_factory.mktemp("analysis")
    write_data(root / "data", tokens)
    write_shard(str(root / "data" / "text_train_000000.bin"), tokens[::-1])  # unlike validation's
    for variant in ("base", "nuresformer", "exo_dynamic"):
        (root / variant).mkdir()
        for step, tokens_read, scale in ((3, 3000, 1.5), (7, 9000, 1.0)):  # a growing batch
            model = tiny(variant)
            checkpoint = dict(
                model_config=vars(model.config),
                model={name: scale * p for name, p in model.state_dict().items()},
                train_config=dict(data=str(root / "data"), total_batch_size=1000),
                tokens=tokens_read,
            )
            save_checkpoint(str(root / variant / f"ckpt_{step:06d}.pt"), checkpoint)
    return root


def first_windows(tokens, rows):
    """Rows of LENGTH + 1 tokens, cut by hand; each begins with the last's end."""
    return np.stack([tokens[i * LENGTH : i * LENGTH + LENGTH + 1] for i in range(rows)])


def test_the_first_windows_are_taken(folder, tokens):
    """As many as asked for, from the beginning; all of them without a number."""
    config = tiny("base").config
    data = str(folder / "data")
    for rows, expected in ((3, 3), (0, 16)):
        found = analysis.validation_windows(data, config, rows)
        np.testing.assert_array_equal(found, first_windows(tokens, expected))
    short = analysis.validation_windows(data, config, 2, block_size=5)
    np.testing.assert_array_equal(short, [tokens[:6], tokens[5:11]])


@pytest.mark.parametrize(
    "settings, rows, block_size, problem",
    [
        (dict(tokenizer="gpt2"), 1, 0, "holds bytes tokens, but the model was trained on gpt2"),
        ({}, 17, 0, "17 rows wanted, but .* has 16 validation windows of 12 tokens"),
        ({}, -1, 0, "-1 rows wanted"),
        ({}, 1, 13, "--block_size=13 must be between 2 and the model's 12"),
        ({}, 1, 1, "--block_size=1 must be"),
    ],
)
def test_windows_that_do_not_fit_are_refused(folder, settings, rows, block_size, problem):
    with pytest.raises(UserError, match=problem):
        config = tiny("base", **settings).config
        analysis.validation_windows(str(folder / "data"), config, rows, block_size)
    limits = analysis.validation_windows(str(folder / "data"), tiny("base").config, 16, 12)
    assert limits.shape == (16, 13)


# ---- table2.py -----------------------------------------------------------------------------------


@pytest.fixture
def table_2(folder, call):
    """table_2(*flags): table2.py on the folder's data."""
    data = f"--data={folder / 'data'}"
    out = f"--out={folder / 'out'}"
    return lambda *flags: call(table2.main, data, out, *flags)


def test_table_2_writes_and_prints(folder, table_2, tokens, capsys):
    """One JSON a checkpoint, equal to analyse() of the first windows; four without a number.

    Of a run folder the newest checkpoint is taken.
    """
    paths = [folder / variant / "ckpt_000007.pt" for variant in ("base", "exo_dynamic")]
    for given, flags, rows in ((paths, ["--rows=3"], 3), ([path.parent for path in paths], [], 4)):
        table_2(*(f"--ckpt={path}" for path in given), *flags)
        printed = capsys.readouterr().out
        record = json.loads((folder / "out" / "exo_dynamic_ckpt_000007.json").read_text())
        expected = analysis.analyse(load_checkpoint(paths[1]), first_windows(tokens, rows))
        assert record["rows"] == rows
        assert record["by_layer"] == expected["by_layer"]
        assert record["cross_entropy"] == expected["cross_entropy"]
        sink = f"{expected['averages']['attention_sink']:.4f}"
        cells = rows_under("Table 2", printed)["exo_dynamic_ckpt_000007"]
        assert cells[2:4] == [sink, "0.0073"]
        gates = record["by_layer"]["gate_mean"]
        cells = rows_under("Attention entropy", printed)["exo_dynamic_ckpt_000007"]
        assert cells[1] == f"{sum(gates) / len(gates):.3f}" and cells[3] == f"{gates[0]:.3f}"


def test_a_summary_prints_the_tables_again_and_is_small(folder, table_2, capsys, call):
    """The tables without lambdas, of models with and without an anchor and of its removal."""
    paths = [folder / variant / "ckpt_000007.pt" for variant in ("base", "exo_dynamic")]
    kept = [folder / "kept.jsonl", folder / "removed.jsonl"]
    first = []
    for file, flags in zip(kept, ([], ["--ablate_anchor"])):
        table_2(*(f"--ckpt={path}" for path in paths), f"--summary={file}", *flags)
        printed = capsys.readouterr().out
        first.append(printed[printed.index("Table 2,") :].split("\nLambdas,")[0].rstrip())
        assert file.stat().st_size < 3000 * len(file.read_text().splitlines())
    for file, printed in zip(kept, first):
        call(table2.main, f"--ckpt={file}")
        again, pictures = capsys.readouterr().out.strip().split("\n\nPictures: ")
        assert again == printed.split("\n\nPictures: ")[0]
        assert pictures == f"python paper/figures.py {file}"
    records = [record for file in kept for record in figures.read_records(str(file))]
    assert [record["ablate_anchor"] for record in records] == [False, False, True]


def test_a_summary_has_the_pictures_of_its_numbers(records, pages, tmp_path, call):
    table2.write_lines(map(table2.summary_of, records), str(tmp_path / "kept.jsonl"))
    call(figures.main, tmp_path / "kept.jsonl", f"--out={tmp_path}")
    assert sorted(pages) == ["by_layer", "gates", "layers"]


@pytest.mark.parametrize("others", [[], ["--ckpt=kept.jsonl"]])
def test_a_checkpoint_without_data_is_refused(folder, call, capsys, others):
    with pytest.raises(SystemExit):
        call(table2.main, f"--ckpt={folder / 'base' / 'ckpt_000007.pt'}", *others)
    assert "--data=DIR is needed" in capsys.readouterr().err


def rows_under(title, printed):
    """{first cell: the other cells} of the printed table whose title begins so.

    Rows of one letter are kept under (first cell, letter).
    """
    lines = printed[printed.index(title) :].split("\n\n")[0].splitlines()
    found = {}
    for cells in map(str.split, lines):
        letter = cells[1] in ("q", "k", "v", "g", "all")
        found[(cells[0], cells[1]) if letter else cells[0]] = cells[1:]
    return found


LAMBDAS_Q = dict(
    layers=[2, 5],
    anchor=[[[1.0, 2.0], [3.0, 6.0]], [[0.0005, 4.0], [4.0, 4.0]]],
    current=[[[1.0, 1.0], [1.0, 2.0]], [[1.0, 1.0], [2.0, 0.5]]],
)
RATIOS_Q = [[[1.0, 2.0], [3.0, 3.0]], [[0.0005, 4.0], [2.0, 8.0]]]
LAMBDAS_K = dict(
    layers=[2, 5],
    anchor=[[[0.0, -0.0009], [0.0002, 0.0]], [[3.0, 1.0], [2.0, 5.0]]],
    current=[[[1.0, 1.0], [1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]],
)
USE_Q = dict(
    layers=[2, 5],
    tokens=[1, 3],
    anchor=[[1.0, 1.0], [2.0, 4.0]],
    current=[[3.0, 3.0], [1.5, 1.5]],
)
USE_K = {**USE_Q, "anchor": [[3.0, 3.0], [6.0, 0.5]]}


def planted(**changes):
    """A record of six layers as table2.py would have it, with known numbers, none like another."""
    record = dict(
        label="mine",
        variant="exo",
        ablate_anchor=False,
        cross_entropy=3.14,
        model_config=dict(
            n_layer=6,
            n_embd=64,
            anchor="exogenous",
            anchor_norm="qkvg",
            granularity="elementwise",
        ),
        averages=dict(
            attention_sink=0.25,
            token_similarity=0.5,
            pca_core_features=12.0,
            attention_entropy=2.0,
            gate_mean=0.4,
            gate_sparsity=0.1,
        ),
        by_layer=dict(
            token_similarity=[0.1, 0.9, 0.5, 0.7, 0.95, 0.8, 0.4],
            pca_core_features=[60, 20, 21, 19, 30, 31, 33],
            gate_mean=[0.45, 0.3, 0.2, 0.6, 0.7, 0.15],
        ),
        hidden_similarity=[[1.0, 0.625, -0.125], [0.625, 1.0, 0.25], [-0.125, 0.25, 1.0]],
        lambdas=dict(q=LAMBDAS_Q, k=LAMBDAS_K),
        anchor_use=dict(q=USE_Q, k=USE_K),
    )
    return {**record, **changes}


def settings_with(**changes):
    return {**planted()["model_config"], **changes}


def test_the_papers_numbers_are_those_that_it_prints():
    """Table 2, Section 4.4, Appendix D and the summary, typed from the paper."""
    averages = """
        base         0.2572  0.5365  838.9
        exo_dynamic  0.0073  0.8622  752.1
        exo          0.0041  0.8265  818.3
        gated        0.0091  0.6328  880.0
        nuresformer  0.0112  0.5783  887.9
        resformer    0.0212  0.6558  853.8
    """
    prose = """
        peak        exo 0.95  exo_dynamic 0.93
        stage_3     exo 2/3   exo_dynamic 2/3   base 1/3
        last_pca    exo 738   exo_dynamic 716   base 835
        first_gate  gated 0.2  nuresformer 0.4-0.5  exo between
    """
    expected = {("anchor removed", "peak"): "0.93", ("anchor removed", "least_pca"): "321"}
    for name, *values in map(str.split, averages.strip().splitlines()):
        for key, value in zip(("sink", "similarity", "pca"), values):
            expected[name, key] = value
    for key, *cells in map(str.split, prose.strip().splitlines()):
        for name, value in zip(cells[::2], cells[1::2]):
            expected[name, key] = value
    found = {(name, key): table[key] for name, table in table2.PAPER.items() for key in table}
    assert found == expected


def test_table_2_is_printed_beside_the_papers_numbers(capsys):
    base = planted(label="old", variant="base")
    table2.print_table_2([planted(), base, planted(label="odd", variant="custom")])
    rows = rows_under("Table 2", capsys.readouterr().out)
    assert " ".join(rows["mine"]) == "exo 3.140 0.2500 0.0041 0.5000 0.8265 12.0 64 818.3"
    assert " ".join(rows["old"]) == "base 3.140 0.2500 0.2572 0.5000 0.5365 12.0 64 838.9"
    assert " ".join(rows["odd"]) == "custom 3.140 0.2500 - 0.5000 - 12.0 64 -"


def test_section_4_4_is_printed_beside_the_papers_numbers(capsys):
    """Peak and its layer, start and share of stage 3, PCA of the last layer and the least."""
    dynamic = planted(label="dynamic", variant="exo_dynamic")
    base = planted(label="old", variant="base")
    table2.print_stages([planted(), dynamic, base])
    rows = rows_under("Section 4.4", capsys.readouterr().out)
    assert " ".join(rows["mine"]) == "0.950 0.95 4 2 0.83 2/3 33 738 19 -"
    assert " ".join(rows["dynamic"]) == "0.950 0.93 4 2 0.83 2/3 33 716 19 -"
    assert " ".join(rows["old"]) == "0.950 - 4 2 0.83 1/3 33 835 19 -"
    flat = {**planted()["by_layer"], "token_similarity": [0.1, 0.2, 0.3]}
    table2.print_stages([planted(ablate_anchor=True, by_layer=flat)])
    cells = rows_under("Section 4.4", capsys.readouterr().out)["mine"]
    assert " ".join(cells) == "0.300 0.93 2 - - - 33 - 19 321"


def test_gates_and_entropy_are_printed(capsys):
    """Averages over layers, and the first layer's gate alone; "-" without a gate."""
    table2.print_gates([planted()])
    cells = rows_under("Attention entropy", capsys.readouterr().out)["mine"]
    assert " ".join(cells) == "2.000 0.400 0.100 0.450 between"
    averages = dict(attention_entropy=2.5)
    table2.print_gates([planted(averages=averages, by_layer={})])
    cells = rows_under("Attention entropy", capsys.readouterr().out)["mine"]
    assert " ".join(cells) == "2.500 - - - between"


def test_lambdas_are_printed_by_letter(capsys):
    """Median and mean ratio, the anchor's share, what is near zero, Figure 3's two numbers."""
    table2.print_mixing([planted()])
    rows = rows_under("Lambdas", capsys.readouterr().out)
    ratios_k = LAMBDAS_K["anchor"]
    heads_q = f"{between_heads_by_loops(RATIOS_Q):.3f}"
    heads_k = f"{between_heads_by_loops(ratios_k):.3f}"
    bands = f"{correlation_by_loops(RATIOS_Q, ratios_k):.3f}"
    assert " ".join(rows["mine", "q"]) == f"q 2.750 2.875 0.475 0.125 {heads_q} {bands}"
    # k: medians 0 and 2.5, means -0.0002 and 2.75; shares 3 / 6 and 1.875 / 3.375
    assert " ".join(rows["mine", "k"]) == f"k 1.250 1.375 0.528 0.500 {heads_k} -"
    assert rows["mine", "all"] == ["all", "0.312"]  # 5 of 16
    table2.print_mixing([planted(ablate_anchor=True), planted(lambdas={})])
    assert capsys.readouterr().out == ""


def test_fewer_heads_of_keys_than_of_queries_are_printed(capsys):
    """Grouped-query attention: the letters' tables differ in shape; bands cannot be compared."""
    one_head = dict(
        layers=[2, 5],
        anchor=[[[1.0, 2.0]], [[3.0, 0.0]]],
        current=[[[1.0, 1.0]], [[1.0, 1.0]]],
    )
    table2.print_mixing([planted(lambdas=dict(q=LAMBDAS_Q, k=one_head))])
    rows = rows_under("Lambdas", capsys.readouterr().out)
    assert rows["mine", "q"][-1] == "-"
    assert rows["mine", "all"] == ["all", "0.167"]  # 2 of 12


def test_heads_and_bands_are_asked_of_elementwise_lambdas_alone(capsys):
    table2.print_mixing([planted(model_config=settings_with(granularity="headwise"))])
    rows = rows_under("Lambdas", capsys.readouterr().out)
    assert rows["mine", "q"][-2:] == ["-", "-"]


def test_likeness_to_the_embedding_is_printed_from_layer_1_on(capsys):
    table2.print_embedding_similarity([planted(), planted(label="long")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4:] == ["mine", "     0.625 -0.125", "long", "     0.625 -0.125"]


def test_near_zero_lambdas_are_compared_between_norms_alone(call, monkeypatch, capsys):
    """A model without anchor norms against those that differ from it in nothing else."""
    plain = planted(label="plain", model_config=settings_with(anchor_norm=""))
    plain["lambdas"] = dict(q=dict(anchor=[[[0.0005, -0.0005, 0.0, 1.0]] * 2]))
    other = planted(label="wide", model_config=settings_with(n_embd=128))
    kept = table2.summary_of(planted(label="kept"))  # without the lambdas
    table2.print_near_zero_ratio([planted(), plain, other, kept])
    lines = [line for line in capsys.readouterr().out.split("\n") if line]
    words = "plain 0.7500 against mine 0.3125, 2.40 times (paper: about 3)"
    assert lines == [f"|lambda1| < 0.001: {words}"]
    alike = planted(label="alike", model_config=settings_with(anchor_norm=""))
    monkeypatch.setattr(table2, "measure", lambda args: [planted(), alike])
    call(table2.main, "--ckpt=kept.jsonl")
    assert "alike 0.3125 against mine 0.3125, 1.00 times" in capsys.readouterr().out


@pytest.mark.parametrize(
    "anchor, ablated, expected",
    [("exogenous", True, "0.93"), ("internal", True, "-"), ("exogenous", False, "0.95")],
)
def test_the_papers_number_is_that_of_the_model_as_it_was_run(anchor, ablated, expected):
    record = planted(model_config=settings_with(anchor=anchor), ablate_anchor=ablated)
    assert table2.paper(record, "peak") == expected


def test_what_is_not_finite_has_no_number():
    assert [table2.number(x) for x in (None, math.nan, math.inf, 0.12345)] == ["-"] * 3 + ["0.123"]


@pytest.mark.parametrize(
    "problem, flags",
    [
        ("would replace", ["--ckpt={base}", "--ckpt={base}"]),
        ("none of the checkpoints has an anchor", ["--ckpt={base}", "--ablate_anchor"]),
        ("99 rows wanted", ["--ckpt={base}", "--rows=99"]),
        ("--block_size=13", ["--ckpt={base}", "--block_size=13"]),
        ("no val shard", ["--ckpt={base}", "--data={root}/nowhere"]),
    ],
)
def test_table_2_refuses_in_one_line(folder, table_2, problem, flags):
    names = dict(root=folder, base=folder / "base" / "ckpt_000007.pt")
    with pytest.raises(UserError, match=problem):  # a flag given twice: the later one counts
        table_2(*(flag.format(**names) for flag in flags))


def test_ablation_leaves_out_what_has_no_anchor(folder, table_2, capsys):
    paths = [folder / variant / "ckpt_000007.pt" for variant in ("base", "exo_dynamic")]
    table_2(*(f"--ckpt={path}" for path in paths), "--ablate_anchor", "--rows=1")
    assert f"left out: {paths[0]}" in capsys.readouterr().out
    written = folder / "out" / "exo_dynamic_ckpt_000007_no_anchor.json"
    assert json.loads(written.read_text())["ablate_anchor"]
    assert not (folder / "out" / "base_ckpt_000007_no_anchor.json").exists()


# ---- perplexity.py and export.py -----------------------------------------------------------------


def test_perplexity_of_our_own_checkpoint(folder, tokens, call, capsys):
    """All windows are scored: exp of the mean loss, which the model computes itself."""
    path = folder / "exo_dynamic" / "ckpt_000007.pt"
    flags = ["--device=cpu", "--mask_documents=false"]
    call(perplexity.main, f"--ckpt={path}", f"--data={folder / 'data'}", *flags)
    rows = torch.from_numpy(first_windows(tokens, 16))
    expected = math.exp(load_checkpoint(path).loss(rows[:, :-1], rows[:, 1:])[0].item())
    printed = capsys.readouterr().out
    value, words = re.search(r"perplexity  ([\d.]+) (over \d+ windows of \d+)", printed).groups()
    assert float(value) == pytest.approx(expected, abs=1e-3)
    assert words == "over 16 windows of 12"
    assert "exo_dynamic\n" in printed
    assert "the paper's 457 M model: 14.09 over" in printed


def test_exported_weights_come_back_bit_for_bit(folder, tmp_path, call, monkeypatch, capsys):
    """safetensors and JSON give the model again; a tensor that changed in its last bit is named."""
    pytest.importorskip("safetensors", reason="safetensors: paper/requirements.txt")
    path = folder / "exo_dynamic" / "ckpt_000007.pt"
    out = tmp_path / "new"
    call(export.main, f"--ckpt={path}", f"--out={out}")
    assert "exo_dynamic" in capsys.readouterr().out
    model = load_checkpoint(path)
    back = export.load_exported(out)
    idx = windows()[:, :-1]
    assert torch.equal(back(idx), model(idx))
    assert back.config == model.config
    with torch.no_grad():
        back.embed.weight[0, 0] = torch.nextafter(back.embed.weight[0, 0], torch.tensor(9.0))
    monkeypatch.setattr(export, "load_exported", lambda out: back)
    with pytest.raises(UserError, match="1 tensors .* embed.weight first"):
        call(export.main, f"--ckpt={path}", f"--out={tmp_path}")


# ---- usage.py: checkpoints -----------------------------------------------------------------------


def test_use_over_training_is_that_of_each_checkpoint(folder, tokens, call, tmp_path):
    """In the order of the steps, on the run's own first validation rows; null where not mixed."""
    out = tmp_path / "use.jsonl"
    call(usage.main, folder / "base", folder / "nuresformer", f"--out={out}")
    base, record = map(json.loads, out.read_text().splitlines())
    assert record["run"] == "nuresformer" and record["rows"] == 4
    assert {"machine", "torch", "commit", "command"} <= set(record)
    assert record["tokens"] == [3000, 9000]
    assert sorted(base["use"]) == ["attention_sink", "pca_core_features", "token_similarity"]
    for column, step in enumerate((3, 7)):
        model = load_checkpoint(folder / "nuresformer" / f"ckpt_{step:06d}.pt")
        expected = analysis.analyse(model, first_windows(tokens, 4))
        found = {name: [row[column] for row in table] for name, table in record["use"].items()}
        for name in usage.STATES:
            layers = expected["by_layer"][name][-3:]  # without the embedding
            assert found[name] == pytest.approx(layers, abs=1e-5)
        for s in "qkvg":
            assert found[s][0] is found[f"lambda1_{s}"][0] is found[f"lambda2_{s}"][0] is None
            table = expected["anchor_use"][s]
            for layer in (1, 2):
                anchor = np.dot(table["anchor"][layer - 1], table["tokens"])
                current = np.dot(table["current"][layer - 1], table["tokens"])
                mix = model.layers[layer].attn.mix[s]
                lambdas = [x.mean().item() for x in (mix.lambda_anchor, mix.lambda_current)]
                shown = [found[name][layer] for name in (s, f"lambda1_{s}", f"lambda2_{s}")]
                assert shown == pytest.approx([anchor / (anchor + current), *lambdas], abs=1e-5)


def test_rows_and_data_are_those_asked_for(folder, write_data, tokens, tmp_path, call):
    """--data instead of the run's own, --rows of it."""
    other = write_data(tmp_path / "other", tokens[::-1].copy())
    out = tmp_path / "use.jsonl"
    call(usage.main, folder / "base", f"--data={other}", "--rows=2", f"--out={out}")
    record = json.loads(out.read_text())
    model = load_checkpoint(folder / "base" / "ckpt_000007.pt")
    expected = analysis.analyse(model, first_windows(tokens[::-1], 2))["by_layer"]
    found = [row[1] for row in record["use"]["attention_sink"]]
    assert record["rows"] == 2
    assert found == pytest.approx(expected["attention_sink"], abs=1e-5)


def use_by_hand():
    """Two records as measure_use makes them; in the second run layer 1 mixes nothing."""
    base = dict(
        run="base",
        rows=4,
        tokens=[0, 90, 100, 110, 900, 1000],
        use=dict(attention_sink=[[0.0, 0.1, 0.2, 0.3, 0.4, 0.5], [0.0, 0.3, 0.4, 0.5, 0.6, 0.9]]),
    )
    mixed = dict(
        run="mixed",
        rows=4,
        tokens=[0, 4_000_000],
        use=dict(
            attention_sink=[[0.5, 0.25], [0.5, 0.75]],
            q=[[None, None], [0.9, 0.7]],
            lambda1_q=[[None, None], [0.5, -0.25]],
            lambda2_q=[[None, None], [0.5, 1.5]],
        ),
    )
    return base, mixed


def test_uses_are_averaged_over_layers_at_halvings_of_the_tokens(capsys):
    """1000, then nearest to 500, 250, ...: 110 (not 900), 90 and 0; layers that mix nothing out."""
    usage.print_uses(use_by_hand())
    states, lambdas = capsys.readouterr().out.strip().split("\n\n")
    assert states.splitlines()[1].split()[2:5] == ["sink", "similarity", "PCA"]
    assert [line.split() for line in states.splitlines()[2:]] == [
        ["base", "0", "0.0000", *"-------"],
        ["base", "90", "0.2000", *"-------"],
        ["base", "110", "0.4000", *"-------"],
        ["base", "1,000", "0.7000", *"-------"],
        ["mixed", "0", "0.5000", "-", "-", "-", "0.9000", *"---"],
        ["mixed", "4,000,000", "0.5000", "-", "-", "-", "0.7000", *"---"],
    ]
    assert [line.split() for line in lambdas.splitlines()[2:]][-2:] == [
        ["mixed", "0", "0.5000", "-", "-", "-", "0.5000", *"---"],
        ["mixed", "4,000,000", "-0.2500", "-", "-", "-", "1.5000", *"---"],
    ]


def test_without_lambdas_there_is_no_table_of_them(capsys):
    usage.print_uses(use_by_hand()[:1])
    assert capsys.readouterr().out.count("\n\n") == 0


def test_weights_that_are_not_finite_are_one_line(folder, call, tmp_path):
    """Such a checkpoint exists by design: a run that diverges in its evaluation has saved it."""
    model = tiny("exo_dynamic")
    model.head.weight.data[0] = math.inf
    state = dict(model_config=vars(model.config), model=model.state_dict())
    save_checkpoint(str(tmp_path / "ckpt_000009.pt"), state)
    flags = [f"--data={folder / 'data'}", f"--out={tmp_path / 'out'}"]
    with pytest.raises(UserError, match="the loss is not finite"):
        call(table2.main, f"--ckpt={tmp_path}", *flags)


def test_a_mistake_on_the_command_line_is_found_before_the_first_run_is_measured(
    folder, call, tmp_path, monkeypatch
):
    monkeypatch.setattr(usage, "measure_use", lambda *_: pytest.fail("measured"))
    for wrong, words in (
        (folder / "exoo", "exoo: no checkpoint"),
        (folder / "base", "two runs have one name, among base, base"),
    ):
        with pytest.raises(UserError, match=words):
            call(usage.main, folder / "base", wrong)


def write_json_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_file_of_use_is_read_as_it_was_measured(tmp_path, call):
    """Into another file without a change; two runs of one name and other files are refused."""
    one = write_json_lines(tmp_path / "one.jsonl", use_by_hand())
    call(usage.main, one, f"--out={tmp_path / 'again.jsonl'}")
    assert (tmp_path / "again.jsonl").read_text() == one.read_text()
    other = write_json_lines(tmp_path / "other.jsonl", [{"run": "base"}])
    with pytest.raises(UserError, match="two runs have one name, among base, mixed, base, mixed"):
        call(usage.main, one, tmp_path / "again.jsonl")
    with pytest.raises(UserError, match="other.jsonl, line 1: not a line of usage.py --out"):
        call(usage.main, other)
    with pytest.raises(UserError, match="one.jsonl, line 1: not a line of usage.py --out"):
        call(usage.main, one, "--log")
    empty = write_json_lines(tmp_path / "empty.jsonl", [])
    with pytest.raises(UserError, match="empty.jsonl: no records in it"):
        call(usage.main, empty)


def test_what_was_measured_is_kept_where_a_later_run_cannot_be(folder, tmp_path, call):
    (tmp_path / "cut").mkdir()
    whole = (folder / "base" / "ckpt_000003.pt").read_bytes()
    (tmp_path / "cut" / "ckpt_000003.pt").write_bytes(whole[:-100])
    with pytest.raises(InputError, match="not a whole checkpoint"):
        call(usage.main, folder / "base", tmp_path / "cut", f"--out={tmp_path / 'use.jsonl'}")
    (record,) = map(json.loads, (tmp_path / "use.jsonl").read_text().splitlines())
    assert record["run"] == "base"


def test_folders_without_a_run_are_refused(folder, tmp_path, call):
    with pytest.raises(UserError, match="no checkpoint"):
        call(usage.main, folder / "data")
    torch.save({"model": {}}, tmp_path / "ckpt_000001.pt")
    with pytest.raises(UserError, match="holds weights but no settings of a run"):
        call(usage.main, tmp_path)


# ---- usage.py --log ------------------------------------------------------------------------------


def write_log(folder, losses, norms):
    """A log.jsonl of train.py: steps of 1,000 tokens, then an evaluation."""
    folder.mkdir()
    records = []
    for step, (loss, norm) in enumerate(zip(losses, norms), 1):
        records.append(dict(step=step, loss=loss, grad_norm=norm, tokens=1000 * step))
    records.append(dict(step=len(losses), tokens=1000 * len(losses), val_loss=2.0))
    return write_json_lines(folder / "log.jsonl", records).parent


def unrest():
    """120 losses and norms. Fifty steps of 2.0 and 2.2 have mean 2.1 and deviation 0.1."""
    losses = [2.0, 2.2] * 60
    losses[59] = 2.59  # less than 5 deviations above the mean
    losses[110] = 2.61  # more
    norms = [1.0, 3.0] * 60
    norms[19] = 10.0  # the largest three are of the first fifty
    norms[29] = 20.0
    norms[49] = 100.0
    norms[114] = 2.0  # 59 are smaller, 60 larger
    return losses, norms


def test_norms_and_spikes_of_a_log_by_hand(tmp_path, call, capsys):
    """Median, 99th percentile and largest norm; spikes; the same again from a file of --out."""
    run = write_log(tmp_path / "naive", *unrest())
    call(usage.main, "--log", run, f"--out={tmp_path / 'steps.jsonl'}")
    printed = capsys.readouterr().out
    cells = rows_under("Norm of the gradient", printed)["naive"]
    # of 120 norms place 117.81 from 0, between 10 and 20, has 99 % below it
    assert cells == ["120", "2.500", "18.100", "100.000", "1", "0"]
    record = json.loads((tmp_path / "steps.jsonl").read_text())
    assert [record["loss"], record["grad_norm"]] == list(unrest())
    assert record["tokens"] == [1000 * step for step in range(1, 121)]
    assert {"machine", "torch", "commit", "command"} <= set(record)
    call(usage.main, "--log", tmp_path / "steps.jsonl")
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("place, value, found", [(50, 2.61, 1), (50, 2.59, 0), (49, 9.0, 0)])
def test_a_spike_lies_five_deviations_above_the_fifty_steps_before(place, value, found):
    losses = np.array([2.0, 2.2] * 40)
    losses[place] = value
    assert usage.spikes(losses).sum() == found
    assert usage.spikes(-losses).sum() == 0


def test_a_log_without_a_step_is_refused(tmp_path, call):
    with pytest.raises(UserError, match="its log has no training step yet"):
        call(usage.main, "--log", write_log(tmp_path / "run", [], []))


# ---- pictures ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records():
    """What table2.py would write for a model of no row of Table 3 and one without its anchor."""
    odd = tiny("exo_scalar", mix="qkv", anchor_norm="", gate=False)
    made = []
    for name, model in (("odd", odd), ("cut", tiny("exo_dynamic"))):
        made.append(dict(label=name, **analysis.analyse(model, windows(), name == "cut")))
    return json.loads(json.dumps(made))


@pytest.fixture
def pages(monkeypatch):
    """The pages that are made, {file name: Page}, without the time that it takes to draw them."""
    pytest.importorskip("matplotlib", reason="matplotlib: paper/requirements.txt")
    from matplotlib.figure import Figure

    made = {}
    plain = figures.Page.finish

    def finish(page, path):
        made[pathlib.Path(path).stem] = page
        return plain(page, path)

    monkeypatch.setattr(figures.Page, "finish", finish)
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(b"stub"))
    return made


@pytest.fixture
def drawn_pages(pages, monkeypatch):
    """`pages`, drawn into their files; as coarse as will do, and without a search for a layout."""
    from matplotlib.figure import Figure

    def savefig(figure, file, **options):
        figure.set_layout_engine("none")
        figure.canvas.print_png(file)

    monkeypatch.setattr(Figure, "savefig", savefig)
    monkeypatch.setattr(figures, "DPI", 30)
    return pages


def ticks(axis):
    """(places of the ticks of an axis, their names)."""
    return axis.get_majorticklocs().tolist(), [t.get_text() for t in axis.get_ticklabels()]


def test_every_picture_is_drawn_and_labelled(records, drawn_pages, tmp_path):
    """All pictures that the numbers allow, each panel with named axes and what it shows."""
    pages = drawn_pages
    paths = list(figures.draw(records, str(tmp_path)))
    assert {pathlib.Path(path).read_bytes()[:4] for path in paths} == {b"\x89PNG"}
    assert sorted(pages) == [
        "anchor_use",
        "anchor_use_odd",
        "by_layer",
        "gamma_cut",
        "gates",
        "lambda_map_odd",
        "lambda_ratio",
        "lambda_ratio_mean",
        "layers",
        "similarity_cut",
        "similarity_odd",
    ]
    for page in pages.values():
        for axes in page.axes:
            assert not axes.axison or (axes.get_xlabel() and axes.get_ylabel())
    sink, _, similarity, _ = pages["by_layer"].axes
    assert list(sink.lines[0].get_xdata()) == [1, 2, 3]
    assert list(similarity.lines[0].get_xdata()) == [0, 1, 2, 3]
    assert list(similarity.lines[1].get_ydata()) == records[1]["by_layer"]["token_similarity"]
    assert [axes.get_xlabel() for axes in (sink, similarity)] == ["layer", "layer (0: embedding)"]
    cosines = pages["similarity_odd"].axes
    lowest = min(axes.images[0].get_array().min() for axes in cosines)
    assert lowest < 0
    assert {axes.images[0].get_clim() for axes in cosines} == {(lowest, 1)}
    assert cosines[2].images[0].get_array().tolist() == records[0]["token_maps"]["maps"][2]
    counted = ["by_layer", "layers", "gates", "lambda_ratio", "anchor_use", "gamma_cut"]
    for axes in [axes for name in counted for axes in pages[name].axes]:  # layers are whole
        assert all(place.is_integer() for place in ticks(axes.xaxis)[0])


def test_maps_and_layers_show_the_numbers_of_the_record(records, pages, tmp_path):
    odd, cut = records
    cut["by_layer"]["gate_mean"] = [0.2, 0.3, 0.4]
    styles = figures.styles_of([("", False), ("exo_dynamic", True)])
    figures.draw_by_layer(records, styles, figures.GATES, "", tmp_path / "gates.png")
    (line,) = pages["gates"].axes[0].lines  # odd has no gate
    assert line.get_xydata().tolist() == [[1, 0.2], [2, 0.3], [3, 0.4]]
    figures.draw_layers(records, styles, tmp_path / "layers.png")
    likeness = np.array(cut["hidden_similarity"])
    first, second = (axes.lines[1] for axes in pages["layers"].axes)
    assert first.get_ydata().tolist() == likeness[0][1:].tolist()
    assert second.get_ydata().tolist() == [likeness[i][i + 1] for i in range(3)]
    figures.draw_use_map(odd, tmp_path / "use.png")
    keys = pages["use"].axes[1]
    shares = np.array(odd["anchor_use"]["k"]["anchor"])
    shares = shares / (shares + odd["anchor_use"]["k"]["current"])
    np.testing.assert_array_equal(keys.images[0].get_array(), shares)
    assert ticks(keys.xaxis)[1] == ["0", "1", "2-3", "4-7", "8-15"]
    assert ticks(keys.yaxis) == ([0, 1, 2], ["1", "2", "3"])


def test_lambdas_are_drawn_as_mean_and_as_median(pages, tmp_path):
    """At the layers that mix; the ablated record's lambdas say nothing."""
    both = [planted(), planted(label="cut", ablate_anchor=True)]
    styles = figures.styles_of([("exo", False), ("exo", True)])
    for average, name, y in (
        (np.median, "median", [2.5, 3.0]),
        (np.mean, "mean", [2.25, 3.500125]),
    ):
        figures.draw_lambda_ratio(both, styles, average, name, tmp_path / f"{name}.png")
        curve, level = pages[name].axes[0].lines
        assert list(curve.get_xdata()) == [2, 5]
        assert list(curve.get_ydata()) == pytest.approx(y)
        assert list(level.get_ydata()) == [1, 1]
        assert pages[name].axes[0].get_yscale() == "linear"
    far = {**LAMBDAS_Q, "anchor": [[[-9.0, 9.0], [1.0, -40.0]], [[1.0, 1.0], [1.0, 1.0]]]}
    record = planted(lambdas=dict(q=far))
    figures.draw_lambda_ratio([record], styles, np.mean, "far", tmp_path / "far.png")
    assert pages["far"].axes[0].get_yscale() == "symlog"  # layer 2: -4.75
    figures.draw_anchor_use(both, styles, tmp_path / "use.png")
    curve, level = pages["use"].axes[0].lines
    assert list(curve.get_ydata()) == pytest.approx([0.25, 0.7])
    assert list(level.get_ydata()) == [0.5, 0.5]


def test_lambda_map_has_the_channels_of_a_head_side_by_side(pages, tmp_path):
    figures.draw_lambda_map(planted(), tmp_path / "map.png")
    queries = pages["map"].axes[0]
    shown = queries.images[0].get_array().tolist()
    assert shown == [[1.0, 2.0, 3.0, 3.0], [0.0005, 4.0, 2.0, 8.0]]
    assert ticks(queries.xaxis) == ([0.5, 2.5], ["1", "2"])
    assert ticks(queries.yaxis)[1] == ["2", "5"]


def test_gammas_have_one_deviation_up_and_down(records, pages, tmp_path):
    table = dict(layers=[1, 2])
    table["anchor"] = dict(mean=[0.5, 0.75], std=[0.125, 0.25])
    table["current"] = dict(mean=[0.25, 0.5], std=[0.0, 0.0])
    figures.draw_gamma(dict(label="x", gammas=dict(v=table)), tmp_path / "gamma.png")
    axes = pages["gamma"].axes[0]
    assert axes.get_title() == "values"
    assert axes.containers[0].lines[0].get_ydata().tolist() == [0.5, 0.75]
    bar = axes.containers[0].lines[2][0].get_segments()[1]
    assert bar[:, 1].tolist() == [0.5, 1.0]
    assert axes.containers[0].get_label() == "$\\gamma_1$, anchor"


def test_usage_picture_stands_in_fours_with_one_scale_for_each_quantity(pages, tmp_path):
    """States of both runs, then shares and lambdas of the one that mixes; values as measured."""
    runs = use_by_hand()
    usage.draw_uses(runs, tmp_path / "usage.png")
    grid = pages["usage"].axes.reshape(5, 4)
    shown = [[axes.axison for axes in row] for row in grid]
    assert shown == [[True, False, False, False]] * 5
    names = ["attention_sink", "attention_sink", "q", "lambda1_q", "lambda2_q"]
    for axes, run, name in zip(grid[:, 0], (runs[0], *runs[1:] * 4), names):
        table = np.array(run["use"][name], dtype=float)
        np.testing.assert_array_equal(axes.images[0].get_array().filled(np.nan), table)
    scales = [axes.images[0].get_clim() for axes in grid[:, 0]]
    every = [x for run in runs for layer in run["use"]["attention_sink"] for x in layer]
    assert scales[0] == pytest.approx((percentile(every, 0.02), percentile(every, 0.98)))
    assert scales[0] == scales[1] != scales[2]
    assert [axes.get_title() for axes in grid[:3, 0]] == [
        "attention to first token",
        "",
        "anchor's share, queries",
    ]
    assert grid[0, 0].get_ylabel() == "base\nlayer"
    assert grid[1, 0].get_xlabel() == "tokens (millions)"


def test_tokens_have_ticks_at_round_numbers_where_they_lie(pages, tmp_path):
    """Checkpoints at 0, 3, 9 and 10 million tokens: 5 lies a third of the way from 3 to 9."""
    tokens = [0, 3_000_000, 9_000_000, 10_000_000]
    run = dict(run="x", rows=4, tokens=tokens, use=dict(gate_mean=[[0.1, 0.2, 0.3, 0.4]]))
    usage.draw_uses([run], tmp_path / "usage.png")
    places, names = ticks(pages["usage"].axes[3].xaxis)
    assert names == ["0", "2.5", "5", "7.5", "10"]
    assert places == pytest.approx([0, 2.5 / 3, 1 + 1 / 3, 1.75, 3])
    assert usage.round_numbers(7.0, 7.0) == [7.0]


def test_the_unit_of_the_tokens_is_that_of_the_longest_run(pages, tmp_path):
    long = dict(run="x", rows=4, tokens=[0, 2_000_000], use=dict(gate_mean=[[0.1, 0.2]]))
    short = dict(run="y", rows=4, tokens=[0, 500_000], use=dict(gate_mean=[[0.1, 0.2]]))
    usage.draw_uses([long, short], tmp_path / "usage.png")
    upper, lower = (axes for axes in pages["usage"].axes if axes.axison and axes.images)
    assert lower.get_xlabel() == "tokens (millions)"
    assert ticks(lower.xaxis)[1] == ["0", "0.2", "0.4"]


def test_steps_are_drawn_on_equal_axes_with_their_spikes(pages, tmp_path, call):
    losses, norms = unrest()
    noisy = write_log(tmp_path / "noisy", losses, norms)
    calm = write_log(tmp_path / "calm", losses[:50], norms[:40] + [0.5] * 10)
    call(usage.main, "--log", noisy, calm, f"--png={tmp_path / 'steps.png'}")
    grid = pages["steps"].axes.reshape(2, 2)
    curve, dots = grid[0, 0].lines
    assert curve.get_ydata().tolist() == losses
    assert curve.get_xdata()[-1] == 120
    assert dots.get_xydata().tolist() == [[111, 2.61]]
    assert grid[1, 1].lines[0].get_ydata().tolist() == norms[:40] + [0.5] * 10
    assert grid[0, 1].get_ylim() == grid[1, 1].get_ylim() == pytest.approx((0.475, 105))
    assert "noisy" in grid[0, 0].get_ylabel() and "thousands" in grid[1, 1].get_xlabel()


def group(variant, curves, changes=None, parameters=1_200_000, tokenizer="bytes"):
    """A row of compare.py: a curve, [(tokens, loss)], for each seed."""
    runs = [SimpleNamespace(tokens=curve[-1][0], parameters=parameters) for curve in curves]
    points = []
    for step in zip(*curves):
        losses = [loss for _, loss in step]
        points.append((step[0][0], mean(losses), min(losses), max(losses)))
    return SimpleNamespace(
        variant=variant,
        changes=changes or {},
        label=variant,
        runs=runs,
        settings=dict(tokenizer=tokenizer),
        curve=lambda: points,
    )


def test_curves_have_a_band_where_there_are_several_seeds(pages, tmp_path):
    """Unit and size of the models are said; the last two fifths are enlarged."""
    two = group("exo", [[(0, 8.0), (500, 5.0), (1000, 4.0)], [(0, 8.0), (500, 5.5), (1000, 4.0)]])
    one = group("base", [[(0, 8.0), (500, 6.0), (1000, 5.0)]], parameters=900_000)
    figures.draw_curves([two, one], tmp_path / "curves.png")
    page = pages["curves"]
    for axes in page.axes:
        assert len(axes.lines) == 2 and len(axes.collections) == 1
        assert axes.lines[0].get_xydata().tolist() == [[0.5, 5.25], [1, 4]]
        heights = axes.collections[0].get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == (4, 5.5)
        assert axes.get_xlabel() == "training bytes (thousands)"
        assert axes.get_ylabel() == "validation loss (nats per byte)"
    words = "Validation loss of models with 0.9 to 1.2 million parameters"
    assert page.figure.get_suptitle() == f"{words}; bands: lowest to highest seed"
    assert page.axes[1].get_xlim()[0] == pytest.approx(0.6)
    assert page.axes[1].get_ylim() == pytest.approx((4 - 0.051, 5 + 0.051))
    figures.draw_curves([group("exo", [[(2e9, 3.0)]], tokenizer="gpt2")], tmp_path / "single.png")
    page = pages["single"]
    assert "bands" not in page.figure.get_suptitle() and not page.axes[0].collections
    assert page.axes[0].get_xlabel() == "training tokens (billions)"


def test_the_unit_of_tokens_fits_their_number():
    words = [figures.token_unit(most)[1] for most in (999_999, 1e6, 1e9 - 1, 1e9)]
    assert words == ["thousands", "millions", "millions", "billions"]


def test_an_ablations_rows_have_looks_of_their_own(pages, tmp_path):
    """The paper's way keeps its variant's look wherever it stands; no other row has one."""
    curve = [[(500, 5.0), (1000, 4.0)]]
    rows = [
        group("exo", curve, dict(lambda_init=1.0)),
        group("exo", curve),
        group("exo", curve, dict(lambda_init=0.0)),
        group("gated", curve),
        group("mine", curve),
    ]
    figures.draw_curves(rows, tmp_path / "ablation.png")
    lines = pages["ablation"].axes[0].lines
    looks = [(line.get_color(), line.get_marker()) for line in lines]
    assert len({marker for _, marker in looks}) == len({color for color, _ in looks}) == 5
    known = [figures.variant_style(name) for name in TABLE_3]
    for i in (1, 3):
        style = figures.variant_style(rows[i].variant)
        assert looks[i] == (style["color"], style["marker"])
    for i in (0, 2, 4):
        assert looks[i][0] not in [style["color"] for style in known]
        assert looks[i][1] not in [style["marker"] for style in known]


def test_a_long_curve_has_few_markers_each_on_other_points(pages):
    page = figures.Page(1, 1, "")
    for name in ("exo", "gated"):
        page.line(page.axes[0], range(40), range(40), name, figures.variant_style(name))
    assert [line.get_markevery() for line in page.axes[0].lines] == [(0, 3), (1, 3)]


def test_names_of_a_map_lie_in_the_middle_of_their_parts(pages):
    """Three heads of four channels: names over channels 1.5, 5.5 and 9.5; of many rows some."""
    axes = figures.Page(1, 1, "").axes[0]
    image = figures.heat_map(axes, np.zeros((20, 12)), (0, 1), ["a", "b", "c"], range(20))
    dark, light = image.to_rgba(np.array([0.0, 1.0]))[:, :3].sum(axis=1)
    assert dark < light  # lighter for greater numbers
    assert ticks(axes.xaxis) == ([1.5, 5.5, 9.5], ["a", "b", "c"])
    rows = [0, 3, 6, 9, 12, 15, 18]
    assert ticks(axes.yaxis) == (rows, [str(row) for row in rows])


def test_limits_leave_out_what_is_far_off_and_keep_equal_numbers_apart():
    """The 2nd and 98th percentile of finite numbers; where all are equal a range around them."""
    assert figures.inner_limits(np.array([*range(101), np.inf, np.nan])) == (2, 98)
    assert figures.inner_limits(np.ones(5)) == (0.5, 1.5)
    assert figures.inner_limits(np.full(5, np.nan)) == (-0.5, 0.5)  # lambdas that never started


def test_figures_refuses_other_files(tmp_path, records, call):
    for name, content in (("other", {"label": "x"}), ("a", records[0]), ("b", records[0])):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "torn.json").write_text("{")
    for files, problem in (
        (["other"], "line 1: not a record of this paper/table2.py .*anchor_use"),
        (["a", "b"], "two records have the label odd"),
        (["torn"], "torn.json, line 1: not a record of this"),
    ):
        with pytest.raises(UserError, match=problem):
            call(figures.main, *(tmp_path / f"{name}.json" for name in files))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="empty.jsonl: no records in it"):
        call(figures.main, tmp_path / "empty.jsonl")
