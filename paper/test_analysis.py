"""
Each quantity of analysis.py against a slow computation of its definition: Python loops in float64 on a tiny model whose
attention and hidden states are recorded in another way than analysis.py does, and on two layers of a model as the
paper's released code computed them (testdata/golden_two_layers.pt: weights, hidden states, gates, q and k of layer 2).
Then what table2.py, figures.py, usage.py, perplexity.py and export.py make of them.
"""
import json
import math
import pathlib
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import analysis
import export
import figures
import perplexity
import table2
import usage
from model import ExoFormer, Positions, load_checkpoint, variant_config
from prepare_fineweb import UserError
from train import save_checkpoint

VARIANTS = ["base", "resformer", "gated", "nuresformer", "exo_scalar", "exo_headwise", "exo_dynamic"]
every_variant = pytest.mark.parametrize("variant", VARIANTS)
GOLDEN = torch.load(pathlib.Path(__file__).parent / "testdata" / "golden_two_layers.pt", weights_only=True)
ROWS, LENGTH = 2, 12


def tiny(variant, **settings):
    """A model of three layers in which nothing is zero or one."""
    torch.manual_seed(1)
    sizes = dict(n_layer=3, n_head=2, n_embd=12, ffn_dim=16, vocab_size=40, block_size=LENGTH, tokenizer="bytes")
    model = ExoFormer(variant_config(variant, **{**sizes, **settings})).eval()
    for name, p in model.named_parameters():
        spread = 0.4 if p.dim() == 2 else 1.0
        torch.nn.init.uniform_(p, -spread, spread) if "norm" not in name else torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


def windows(rows=ROWS, length=LENGTH):
    return torch.randint(40, (rows, length + 1), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def recorded(model, idx, monkeypatch):
    """(hidden states [layer][row][token][channel], q and k of every layer (B, H, T, D)), float64, without any hook: the
    layers are called one by one, and F.scaled_dot_product_attention tells what it is given."""
    seen, plain = [], F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        seen.append((q.double(), k.double()))
        return plain(q, k, v, **options)
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", spy)
        x = model.embed(idx)
        anchor, at, states = model.make_anchor(x), Positions(model.config, LENGTH, idx.device), [x.double()]
        for layer in model.layers:
            x = layer(x, anchor, at)
            states.append(x.double())
    return states, seen


def attention(q, k, t, first=0):
    """Weights of query t on keys 0 ... t, by the definition, none on those before `first`. q, k (T, D)."""
    keys = range(max(0, first), t + 1)
    scores = [sum(float(a) * float(b) for a, b in zip(q[t], k[j])) / math.sqrt(len(q[t])) for j in keys]
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
    return mean(cosine(row[i], row[j]) for row in rows.tolist() for j in range(len(row)) for i in range(j))


def components_by_svd(rows):
    """Components for 99 % of the variance of (B, T, C), by singular values of the centred (B * T, C) matrix."""
    flat = rows.flatten(0, 1).numpy()
    squares = np.linalg.svd(flat - flat.mean(0), compute_uv=False) ** 2
    return next(n for n in range(1, len(squares) + 1) if squares[:n].sum() >= 0.99 * squares.sum())


# ------------------------------------------------------------------------------------------ hidden states and attention

@pytest.mark.parametrize("variant, window", [(variant, 0) for variant in VARIANTS] + [("exo", 5)])
def test_sink_and_entropy_match_loops(variant, window, monkeypatch):
    """Attention to key 0 and attention entropy: every row, head and query one by one, the first query included. Where
    a query sees only the last `window` tokens, its weights are on these alone."""
    model, rows = tiny(variant, window=window), windows()
    result = analysis.analyse(model, rows)["by_layer"]
    _, seen = recorded(model, rows[:, :-1], monkeypatch)
    for layer, (q, k) in enumerate(seen):
        weights = [attention(qh, kh, t, t + 1 - (window or LENGTH))
                   for qb, kb in zip(q, k) for qh, kh in zip(qb, kb) for t in range(LENGTH)]
        assert result["attention_sink"][layer] == pytest.approx(mean(w[0] for w in weights), abs=1e-6)
        entropy = mean(-sum(p * math.log(p) for p in w if p > 0) for w in weights)
        assert result["attention_entropy"][layer] == pytest.approx(entropy, abs=1e-5)


@every_variant
def test_similarity_and_pca_match_loops(variant, monkeypatch):
    """Token similarity, PCA core features and similarity between layers, of the embedding and every layer's output."""
    model, rows = tiny(variant), windows()
    result = analysis.analyse(model, rows)
    states, _ = recorded(model, rows[:, :-1], monkeypatch)
    assert result["by_layer"]["token_similarity"] == pytest.approx([pair_cosines(x) for x in states], abs=1e-6)
    assert result["by_layer"]["pca_core_features"] == [components_by_svd(x) for x in states]
    flat = [x.flatten(0, 1).tolist() for x in states]
    table = [[mean(cosine(u, v) for u, v in zip(a, b)) for b in flat] for a in flat]
    np.testing.assert_allclose(result["hidden_similarity"], table, atol=1e-6)
    row = states[-1][0].tolist()
    assert result["token_maps"]["layers"] == [0, 2, 3]
    np.testing.assert_allclose(result["token_maps"]["maps"][-1], [[cosine(u, v) for v in row] for u in row], atol=1e-6)


def test_averages_are_means_over_layers():
    """Sink: over the layers; similarity and PCA: the embedding counts as one more."""
    result = analysis.analyse(tiny("exo"), windows())
    for name, layers in (("attention_sink", 3), ("token_similarity", 4), ("pca_core_features", 4), ("gate_mean", 3)):
        assert len(result["by_layer"][name]) == layers
        assert result["averages"][name] == pytest.approx(np.mean(result["by_layer"][name]))


def test_covariance_survives_a_large_mean():
    """Pieces of unlike means, 1e6 away from zero, give the components of the whole."""
    noise = torch.randn(60, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = noise * 0.5 ** torch.arange(8) + 1e6
    x[20:] += torch.arange(8.0)
    whole = analysis.Covariance()
    for piece in x.split([20, 7, 33]):
        whole.add(piece)
    assert whole.core_features() == components_by_svd(x[None])
    np.testing.assert_allclose(whole.scatter / 60, np.cov(x.numpy().T, bias=True), atol=1e-8)


def test_cross_entropy_matches_loss():
    """The chunked cross-entropy is the model's own, without z."""
    model, rows = tiny("nuresformer"), windows()
    expected = model.loss(rows[:, :-1], rows[:, 1:])[0].item()
    assert analysis.analyse(model, rows)["cross_entropy"] == pytest.approx(expected, abs=1e-5)
    by_five = sum(analysis.cross_entropy(model, row[None], chunk=5) for row in rows) / rows[:, 1:].numel()
    assert by_five == pytest.approx(expected, abs=1e-5)


def test_the_hooks_leave_nothing_behind():
    """Logits before, during and after are the same, and so is a second analysis."""
    model, rows = tiny("exo_dynamic"), windows()
    before = model(rows[:, :-1])
    first = analysis.analyse(model, rows, ablate_anchor=True)
    assert torch.equal(model(rows[:, :-1]), before)
    assert analysis.analyse(model, rows, ablate_anchor=True) == first
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ----------------------------------------------------------------------------------------------- gates, lambdas, gammas

@pytest.mark.parametrize("variant", ["gated", "naive", "nuresformer", "exo", "exo_dynamic"])
def test_gates_match_loops(variant, monkeypatch):
    """Mean gate and share below 0.2, after mixing: Eq. 10 and 12 written out number by number."""
    model, rows = tiny(variant), windows()
    result = analysis.analyse(model, rows)["by_layer"]
    states, _ = recorded(model, rows[:, :-1], monkeypatch)
    for i, layer in enumerate(model.layers):
        g = sum(terms_by_formula(model, layer, states[i], states[0], "g"))
        gates = [1 / (1 + math.exp(-x)) for x in g.flatten().tolist()]
        assert result["gate_mean"][i] == pytest.approx(mean(gates), abs=1e-6)
        assert result["gate_sparsity"][i] == pytest.approx(mean(gate < 0.2 for gate in gates), abs=1e-9)


def weights_of(module):
    return module.weight.detach().double()


def rms_norm(x, gain):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


@torch.no_grad()
def terms_by_formula(model, layer, x, embedded, s):
    """The two terms of Eq. 12 of letter s in a layer, (B, T, H, D) float64, from its input x and the embeddings (B, T,
    C); without an anchor [its own projection]."""
    heads, place, h = (model.config.n_head, -1), "qkvg".index(s), rms_norm(x, weights_of(layer.attn_norm))
    current = (h @ weights_of(layer.attn.project).chunk(len(model.config.components))[place].T).unflatten(-1, heads)
    if s not in layer.attn.mix:
        return [current]
    outside, first = model.config.anchor == "exogenous", model.layers[0]
    source = embedded if outside else rms_norm(embedded, weights_of(first.attn_norm))
    project = weights_of(model.anchor.project if outside else first.attn.project)
    anchor = (source @ project.chunk(4 if outside else len(model.config.components))[place].T).unflatten(-1, heads)
    if s in model.config.anchor_norm:
        anchor = rms_norm(anchor, weights_of(model.anchor.norms[s]))
    gamma = gamma_by_formula(layer, h) if model.config.dynamic else torch.ones(*h.shape[:2], 8).double()
    mix = layer.attn.mix[s]
    return [gamma[..., 2 * place, None, None] * mix.lambda_anchor.double() * anchor,
            gamma[..., 2 * place + 1, None, None] * mix.lambda_current.double() * current]


@torch.no_grad()
def gamma_by_formula(layer, h):
    """Eq. 11 with GELU by the error function: (B, T, 8) in the order q1 q2 k1 k2 v1 v2 g1 g2."""
    a = h @ weights_of(layer.attn.gammas.fc1).T
    a = a * (1 + torch.erf(a / math.sqrt(2))) / 2
    return 1 / (1 + torch.exp(-(a @ weights_of(layer.attn.gammas.fc2).T + layer.attn.gammas.bias.double())))


def test_gamma_statistics_match_the_formula(monkeypatch):
    """Mean and standard deviation over tokens of each gamma, by layer, component and slot."""
    model, rows = tiny("exo_dynamic"), windows()
    result = analysis.analyse(model, rows)["gammas"]
    assert analysis.analyse(tiny("exo"), rows)["gammas"] == {}
    states, _ = recorded(model, rows[:, :-1], monkeypatch)
    for i, layer in enumerate(model.layers):
        gamma = gamma_by_formula(layer, rms_norm(states[i], weights_of(layer.attn_norm))).flatten(0, 1).numpy()
        for slot in range(8):
            table = result["qkvg"[slot // 2]][("anchor", "current")[slot % 2]]
            for key, measure in (("mean", np.mean), ("std", np.std)):
                assert table[key][i] == pytest.approx(measure(gamma[:, slot]), abs=1e-5)


@pytest.mark.parametrize("variant", ["resformer", "nuresformer", "exo_nonorm", "exo_dynamic"])
def test_use_of_the_anchor_matches_loops(variant, monkeypatch):
    """The mean norm of both terms of Eq. 12, token by token, over positions 0 | 1 | 2, 3 | 4 ... 7 | 8 ... 11; and the
    anchor's share of the two means, by layer and by octave."""
    model, rows = tiny(variant), windows()
    tables = analysis.analyse(model, rows)["anchor_use"]
    states, _ = recorded(model, rows[:, :-1], monkeypatch)
    places = [range(0, 1), range(1, 2), range(2, 4), range(4, 8), range(8, LENGTH)]
    assert list(tables) == list(model.config.mix)
    for s, table in tables.items():
        assert table["layers"] == [i for i, layer in enumerate(model.layers, 1) if s in layer.attn.mix]
        by_layer, by_octave = analysis.anchor_share(table)
        for row, i in enumerate(table["layers"]):
            terms = terms_by_formula(model, model.layers[i - 1], states[i - 1], states[0], s)
            norms = [[[math.sqrt(sum(x * x for x in token)) for token in part] for part in term.flatten(2).tolist()]
                     for term in terms]                                              # [anchor, current][row][token]
            means = [[mean(part[t] for part in norm for t in place) for place in places] for norm in norms]
            assert table["anchor"][row] == pytest.approx(means[0], rel=1e-5)
            assert table["current"][row] == pytest.approx(means[1], rel=1e-5)
            whole = [mean(x for part in norm for x in part) for norm in norms]
            assert by_layer[row] == pytest.approx(whole[0] / (whole[0] + whole[1]), rel=1e-5)
            assert by_octave[row] == pytest.approx([a / (a + c) for a, c in zip(*means)], rel=1e-5)


def test_octaves_are_lengths_in_binary():
    assert analysis.octaves(2048).tolist() == [i.bit_length() for i in range(2048)]


@pytest.mark.parametrize("granularity, shape", [("scalar", (1, 1)), ("headwise", (2, 1)), ("elementwise", (2, 6))])
def test_lambdas_by_hand(granularity, shape):
    """The lambdas as the layers have them, their ratio and the near-zero share; an internal anchor's own layer has
    none."""
    model = tiny("nuresformer", granularity=granularity)
    mix = model.layers[2].attn.mix["k"]
    mix.lambda_anchor.data = torch.linspace(-0.002, 0.0021, math.prod(shape)).view(shape)
    mix.lambda_current.data = torch.linspace(1, 2, math.prod(shape)).view(shape)
    table = analysis.lambdas_of(model)["k"]
    assert table["layers"] == [2, 3] and np.shape(table["anchor"]) == np.shape(table["current"]) == (2, *shape)
    anchor, current = (x.detach().flatten().tolist() for x in (mix.lambda_anchor, mix.lambda_current))
    assert analysis.ratio(table)[1].flatten().tolist() == pytest.approx([a / c for a, c in zip(anchor, current)])
    every = anchor + model.layers[1].attn.mix["k"].lambda_anchor.detach().flatten().tolist()
    assert analysis.near_zero([table]) == pytest.approx(mean(abs(x) < 0.001 for x in every))
    other = dict(anchor=[[[0.0] * shape[1]] * shape[0]] * 2)
    assert analysis.near_zero([table, other]) == pytest.approx((analysis.near_zero([table]) + 1) / 2)


def percentile(values, share):
    """The value below which `share` of the sorted values lie, linear in between."""
    ordered, at = sorted(values), share * (len(values) - 1)
    low = int(at)
    return ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def clip(layer):
    """A layer's ratios (heads of channels) between their 2nd and 98th percentile."""
    flat = [x for head in layer for x in head]
    low, high = percentile(flat, 0.02), percentile(flat, 0.98)
    return [[min(max(x, low), high) for x in head] for head in layer]


def table_with(ratios):
    """A letter's table whose lambda_1 / lambda_2 are `ratios` (layers, H, D)."""
    current = np.random.default_rng(7).uniform(0.5, 2, np.shape(ratios))
    return dict(anchor=(np.array(ratios) * current).tolist(), current=current.tolist())


def test_share_between_heads_matches_loops():
    """Between-head over total variance, layer by layer; 1 for heads of one value each, 0 for heads that are alike."""
    drawn = np.random.default_rng(8).normal(size=(3, 4, 10)) + np.arange(4)[:, None]
    shares = []
    for layer in map(clip, drawn.tolist()):
        whole, middles = mean(x for head in layer for x in head), [mean(head) for head in layer]
        between = sum(len(head) * (middle - whole) ** 2 for head, middle in zip(layer, middles))
        shares.append(between / sum((x - whole) ** 2 for head in layer for x in head))
    assert analysis.between_heads(table_with(drawn)) == pytest.approx(mean(shares))
    levels, stripes = np.arange(4.0)[None, :, None], np.sin(np.arange(10.0))[None, None]
    assert analysis.between_heads(table_with(np.broadcast_to(levels, (2, 4, 10)))) == pytest.approx(1)
    assert analysis.between_heads(table_with(np.broadcast_to(stripes, (2, 4, 10)))) == pytest.approx(0, abs=1e-9)


def test_one_lambda_near_zero_does_not_rule_the_share_between_heads():
    ratios = np.broadcast_to(np.arange(4.0)[None, :, None], (1, 4, 64)).copy()
    ratios[0, 0, 0] = 1e6
    assert analysis.between_heads(table_with(ratios)) > 0.9


def test_correlation_of_bands_matches_loops():
    """Pearson's correlation of what is left when each head's mean is taken away, layer by layer; the same bands on
    other levels give 1, turned round -1."""
    rng = np.random.default_rng(9)
    bands = rng.normal(size=(2, 4, 10))
    other = 0.5 * bands + rng.normal(size=bands.shape)
    found = []
    for one, two in zip(bands.tolist(), other.tolist()):
        a, b = ([x - mean(head) for head in clip(layer) for x in head] for layer in (one, two))
        found.append(sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b)))
    assert analysis.band_correlation(table_with(bands), table_with(other)) == pytest.approx(mean(found))
    assert analysis.band_correlation(table_with(bands), table_with(-2 * bands)) == pytest.approx(-1)
    stripes = np.broadcast_to(np.sin(np.arange(10.0)), (2, 4, 10))
    raised = stripes + np.arange(4.0)[:, None]
    assert analysis.band_correlation(table_with(stripes), table_with(stripes + 3)) == pytest.approx(1)
    assert analysis.band_correlation(table_with(stripes), table_with(raised)) > 0.9


@pytest.mark.parametrize("similarity, start", [
    ([0.1, 0.6, 0.9, 0.5, 0.7, 0.95, 0.4], 3),             # the paper's shape: up, dip, up, a fall at the end
    ([0.1, 0.6, 0.59, 0.6, 0.9, 0.5, 0.7, 0.3], 5),        # a ripple on the way up is no dip
    ([0.1, 0.9, 0.3, 0.4, 0.2, 0.8], 4),                   # the lowest point of a wide dip
    ([0.1, 0.2, 0.5, 0.8], None),                          # only up
    ([0.1, 0.8, 0.5, 0.2], None),                          # only down after the maximum
    ([0.9, 0.1, 0.3, 0.5], None),                          # the embedding is no early maximum
])
def test_stage_3_begins_in_the_deepest_dip(similarity, start):
    assert analysis.stage_3(similarity) == start


@pytest.mark.parametrize("variant", ["resformer", "nuresformer_vg", "exo", "exo_dynamic"])
def test_an_ablated_anchor_is_lambda_zero(variant):
    """Removing the anchor by a hook gives the analysis of a model whose every lambda1 is zero."""
    model, rows = tiny(variant), windows()
    ablated = analysis.analyse(model, rows, ablate_anchor=True)
    for layer in model.layers:
        for mix in layer.attn.mix.values():
            mix.lambda_anchor.data.zero_()
    expected = analysis.analyse(model, rows)
    assert ablated["by_layer"] == expected["by_layer"] and ablated["cross_entropy"] == expected["cross_entropy"]


# -------------------------------------------------------------------------------------------- the paper's released code

def golden_model():
    head = torch.zeros(GOLDEN["model"]["transformer.wte.weight"].shape)
    return ExoFormer.from_released({**GOLDEN["model"], "lm_head.weight": head}).eval()


def test_golden_hidden_states_and_gates():
    """The released code's own hidden states and gates, through the definitions, give what the hooks measure."""
    window = torch.cat((GOLDEN["idx"], GOLDEN["idx"][:, :1]), dim=1)
    result = analysis.analyse(golden_model(), window)["by_layer"]
    states = [x.double() for x in GOLDEN["hidden_states"]]
    assert result["token_similarity"] == pytest.approx([pair_cosines(x) for x in states], abs=1e-5)
    assert result["pca_core_features"] == [components_by_svd(x) for x in states]
    for i, gate in enumerate(GOLDEN["gate_scores"]):
        assert result["gate_mean"][i] == pytest.approx(gate.double().mean().item(), abs=1e-6)
        assert result["gate_sparsity"][i] == pytest.approx((gate < 0.2).double().mean().item(), abs=1e-9)


def test_golden_attention():
    """Sink and entropy of the released code's layer 2, from its rotated q and k (H, T, D)."""
    window = torch.cat((GOLDEN["idx"], GOLDEN["idx"][:, :1]), dim=1)
    result = analysis.analyse(golden_model(), window)["by_layer"]
    q, k = GOLDEN["layer_2"]["q"][0].double(), GOLDEN["layer_2"]["k"][0].double()
    weights = [attention(qh, kh, t) for qh, kh in zip(q, k) for t in range(q.size(1))]
    assert result["attention_sink"][1] == pytest.approx(mean(w[0] for w in weights), abs=1e-6)
    entropy = mean(-sum(p * math.log(p) for p in w) for w in weights)
    assert result["attention_entropy"][1] == pytest.approx(entropy, abs=1e-5)


# ---------------------------------------------------------------------------------------------------- the command lines

@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_data):
    """Shards of 200 validation tokens in data/, and a run folder with two checkpoints for each of two variants."""
    root = tmp_path_factory.mktemp("analysis")
    tokens = np.random.default_rng(4).integers(0, 39, 200)
    tokens[::17] = 39
    write_data(root / "data", tokens)
    for variant in ("base", "exo_dynamic"):
        (root / variant).mkdir()
        for step, scale in ((3, 1.5), (7, 1.0)):
            model = tiny(variant)
            save_checkpoint(str(root / variant / f"ckpt_{step:06d}.pt"), dict(
                model_config=vars(model.config), model={n: scale * p for n, p in model.state_dict().items()},
                train_config=dict(data=str(root / "data"), total_batch_size=1000)))
    return root


@pytest.fixture
def table_2(folder, call):
    """table_2(*flags): table2.py on the folder's data."""
    return lambda *flags: call(table2.main, f"--data={folder / 'data'}", f"--out={folder / 'out'}", *flags)


def test_table_2_writes_and_prints(folder, table_2, capsys):
    """One JSON a checkpoint, equal to analyse() of the first windows, and the paper's numbers beside ours."""
    paths = [folder / variant / "ckpt_000007.pt" for variant in ("base", "exo_dynamic")]
    table_2(*(f"--ckpt={path}" for path in paths), "--rows=3")
    printed = capsys.readouterr().out
    record = json.loads((folder / "out" / "exo_dynamic_ckpt_000007.json").read_text())
    model = load_checkpoint(paths[1])
    expected = analysis.analyse(model, analysis.validation_windows(str(folder / "data"), model.config, 3))
    assert record["averages"] == pytest.approx(expected["averages"]) and record["rows"] == 3
    line = next(line for line in printed.splitlines() if line.startswith("exo_dynamic_ckpt_000007"))
    ours = f"{expected['averages']['attention_sink']:.4f}"
    assert all(number in line for number in ("0.0073", "0.8622", "752.1", ours))


def rows_under(title, printed):
    """{first cell: the other cells} of the printed table whose heading starts with `title`; rows of many letters are
    kept under (first cell, letter)."""
    lines = printed[printed.index(title):].split("\n\n")[0].splitlines()
    found = {}
    for cells in (line.split() for line in lines if line.split() and not line.startswith(title)):
        found[(cells[0], cells[1]) if cells[1] in ("q", "k", "v", "g", "all") else cells[0]] = cells[1:]
    return found


def planted(**changes):
    """A record of 30 layers as table2.py would have it, with known numbers."""
    layers = 30
    similarity = [0.1] + [0.5, 0.9, 0.8] + [0.6, 0.7, 0.8, 0.85, 0.9, 0.95] + [0.9] * 20 + [0.4]
    lambdas = dict(layers=[1], anchor=[[[0.0005, 1.0, 1.0, 1.0]] * 2], current=[[[1.0, 1.0, 1.0, 1.0]] * 2])
    use = dict(layers=[1], tokens=[1, 3], anchor=[[1.0, 1.0]], current=[[3.0, 3.0]])
    record = dict(
        label="mine", variant="exo", ablate_anchor=False, cross_entropy=3.0,
        model_config=dict(n_layer=layers, n_embd=64, anchor="exogenous", anchor_norm="qkvg", granularity="elementwise"),
        averages=dict(attention_sink=0.25, token_similarity=0.5, pca_core_features=12.0, attention_entropy=2.0,
                      gate_mean=0.4, gate_sparsity=0.1),
        by_layer=dict(token_similarity=similarity, pca_core_features=[60] + [20] * 29 + [33],
                      gate_mean=[0.45] * layers),
        hidden_similarity=[[1.0, 0.625, -0.125]], lambdas=dict(q=lambdas, k=lambdas), anchor_use=dict(q=use, k=use))
    return {**record, **changes}


def test_section_4_4_is_printed_beside_the_papers_numbers(capsys):
    """Peak and its layer, where stage 3 starts and its share of the layers, PCA of the last layer and the least."""
    table2.print_stages([planted()])
    cells = rows_under("Section 4.4", capsys.readouterr().out)["mine"]
    assert cells == ["0.950", "0.95", "9", "4", "0.90", "2/3", "33", "738", "20", "-"]
    table2.print_stages([planted(ablate_anchor=True)])
    cells = rows_under("Section 4.4", capsys.readouterr().out)["mine"]
    assert cells[1] == "0.93" and cells[5:] == ["-", "33", "-", "20", "321"]


def test_gates_lambdas_and_embedding_are_printed(capsys):
    """The first layer's gate, Figure 3's claims by letter, the similarity to the embedding in every layer."""
    for show in (table2.print_gates, table2.print_mixing, table2.print_embedding_similarity):
        show([planted()])
    printed = capsys.readouterr().out
    assert rows_under("Attention entropy", printed)["mine"] == ["2.000", "0.400", "0.100", "0.450", "between"]
    rows = rows_under("Lambdas", printed)
    assert rows["mine", "q"] == ["q", "1.000", "0.250", "0.250", "0.000", "1.000"]
    assert rows["mine", "k"][-1] == "-" and rows["mine", "all"] == ["all", "0.250"]
    assert printed.splitlines()[-2:] == ["mine", "     0.625 -0.125"]


def test_near_zero_lambdas_are_compared_between_norms_alone(capsys):
    """A model without anchor norms against those that differ from it in nothing else: its share over theirs."""
    normed, plain = planted(), planted(label="plain", model_config={**planted()["model_config"], "anchor_norm": ""})
    plain["lambdas"] = dict(q=dict(anchor=[[[0.0005, -0.0005, 0.0, 1.0]] * 2]))
    other = planted(label="wide", model_config={**planted()["model_config"], "n_embd": 128})
    table2.print_near_zero_ratio([normed, plain, other])
    lines = capsys.readouterr().out.split("\n")
    assert [line for line in lines if line] == [
        "|lambda1| < 0.001: plain 0.7500 against mine 0.2500, 3.00 times (paper: about 3)"]


def test_the_papers_number_is_that_of_the_model_as_it_was_run():
    for anchor, ablated, expected in (("exogenous", True, "0.93"), ("internal", True, "-"),
                                      ("exogenous", False, "0.95")):
        settings = {**planted()["model_config"], "anchor": anchor}
        assert table2.paper(planted(model_config=settings, ablate_anchor=ablated), "peak") == expected


@pytest.mark.parametrize("problem, flags", [
    ("would replace", ["--ckpt={root}/base/ckpt_000007.pt", "--ckpt={root}/base/ckpt_000007.pt"]),
    ("none of the checkpoints has an anchor", ["--ckpt={root}/base/ckpt_000007.pt", "--ablate_anchor"]),
    ("99 rows wanted", ["--ckpt={root}/base/ckpt_000007.pt", "--rows=99"]),
    ("--block_size=13", ["--ckpt={root}/base/ckpt_000007.pt", "--block_size=13"]),
    ("no val shard", ["--ckpt={root}/base/ckpt_000007.pt", "--data={root}/nowhere"]),
])
def test_table_2_refuses_in_one_line(folder, table_2, problem, flags):
    with pytest.raises(UserError, match=problem):                  # a flag given twice: the later one counts
        table_2(*(flag.format(root=folder) for flag in flags))


def test_ablation_leaves_out_what_has_no_anchor(folder, table_2, capsys):
    paths = [folder / variant / "ckpt_000007.pt" for variant in ("base", "exo_dynamic")]
    table_2(*(f"--ckpt={path}" for path in paths), "--ablate_anchor", "--rows=1")
    assert f"left out: {paths[0]}" in capsys.readouterr().out
    assert json.loads((folder / "out" / "exo_dynamic_ckpt_000007_no_anchor.json").read_text())["ablate_anchor"]
    assert not (folder / "out" / "base_ckpt_000007_no_anchor.json").exists()


def test_perplexity_of_our_own_checkpoint(folder, call, capsys):
    """The command line scores all windows: exp of the mean loss, which the model computes itself."""
    path = folder / "exo_dynamic" / "ckpt_000007.pt"
    call(perplexity.main, f"--ckpt={path}", f"--data={folder / 'data'}", "--device=cpu", "--mask_documents=false")
    model = load_checkpoint(path)
    rows = torch.from_numpy(analysis.validation_windows(str(folder / "data"), model.config).astype(int))
    expected, printed = math.exp(model.loss(rows[:, :-1], rows[:, 1:])[0].item()), capsys.readouterr().out
    value, words = re.search(r"perplexity  ([\d.]+) (over \d+ windows of \d+)", printed).groups()
    assert float(value) == pytest.approx(expected, abs=1e-3) and words == f"over {len(rows)} windows of 12"
    assert "exo_dynamic\n" in printed and "the paper's 457 M model: 14.09 over" in printed


def test_use_over_training_is_that_of_each_checkpoint(folder, call, capsys):
    """Tokens from the step and the run's batch, quantities of each checkpoint on its run's own first validation row;
    the table holds the last checkpoint and the one nearest to half its tokens."""
    call(usage.main, folder / "base", folder / "exo_dynamic")
    tokens, use = usage.use_over_training(str(folder / "exo_dynamic"))
    assert tokens.tolist() == [3000, 7000] and list(use) == list(usage.QUANTITIES)
    for column, step in enumerate((3, 7)):
        model = load_checkpoint(folder / "exo_dynamic" / f"ckpt_{step:06d}.pt")
        record = analysis.analyse(model, analysis.validation_windows(str(folder / "data"), model.config, 1))
        assert use["attention_sink"][:, column].tolist() == record["by_layer"]["attention_sink"]
        assert use["pca_core_features"][:, column].tolist() == record["by_layer"]["pca_core_features"][1:]
        assert use["k"][:, column].tolist() == analysis.anchor_share(record["anchor_use"]["k"])[0].tolist()
    printed = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert [cells[:2] for cells in printed[2:]] == [[run, tokens] for run in ("base", "exo_dynamic")
                                                    for tokens in ("3,000", "7,000")]
    assert printed[3][5:] == ["-"] * 5
    for column, cells in enumerate(printed[4:]):
        assert cells[2:] == [f"{table[:, column].round(5).mean():.4f}" for table in use.values()]
    with pytest.raises(UserError, match="no checkpoint"):
        call(usage.main, folder / "data")


def test_a_file_of_use_gives_the_table_again_and_says_where_it_was_measured(folder, call, tmp_path, capsys):
    call(usage.main, folder / "base", folder / "exo_dynamic", f"--out={tmp_path / 'use.jsonl'}", "--rows=2")
    first = capsys.readouterr().out
    call(usage.main, tmp_path / "use.jsonl")
    assert capsys.readouterr().out == first
    line = json.loads((tmp_path / "use.jsonl").read_text().splitlines()[1])
    assert line["run"] == "exo_dynamic" and line["rows"] == 2 and {"machine", "torch", "commit", "command"} <= set(line)
    call(usage.main, tmp_path / "use.jsonl", f"--out={tmp_path / 'again.jsonl'}")           # as they were measured
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "use.jsonl").read_text()
    (tmp_path / "other.jsonl").write_text('{"run": "base"}\n')
    for files, words in ((["use.jsonl", "again.jsonl"], "two runs have one name"),
                         (["other.jsonl"], "other.jsonl, line 1: not a line of usage.py --out")):
        with pytest.raises(UserError, match=words):
            call(usage.main, *(tmp_path / file for file in files))


def test_exported_weights_come_back_bit_for_bit(folder, tmp_path, call, monkeypatch, capsys):
    """safetensors and JSON give the model again; a tensor that changed in its last bit is named."""
    pytest.importorskip("safetensors", reason="safetensors is not installed (paper/requirements.txt)")
    path = folder / "exo_dynamic" / "ckpt_000007.pt"
    call(export.main, f"--ckpt={path}", f"--out={tmp_path}")
    assert "exo_dynamic" in capsys.readouterr().out
    model, back = load_checkpoint(path), export.load_exported(tmp_path)
    assert torch.equal(back(windows()[:, :-1]), model(windows()[:, :-1])) and back.config == model.config
    with torch.no_grad():
        back.embed.weight[0, 0] = torch.nextafter(back.embed.weight[0, 0], torch.tensor(9.0))
    monkeypatch.setattr(export, "load_exported", lambda out: back)
    with pytest.raises(UserError, match="1 tensors .* embed.weight first"):
        call(export.main, f"--ckpt={path}", f"--out={tmp_path}")


# ------------------------------------------------------------------------------------------------------------- pictures

@pytest.fixture(scope="module")
def records():
    """What table2.py would write for three models, one from no row of Table 3 and one with its anchor removed."""
    made = {"base": tiny("base"), "odd": tiny("exo_scalar", mix="qkv", anchor_norm=""), "cut": tiny("exo_dynamic")}
    return json.loads(json.dumps([dict(label=name, **analysis.analyse(model, windows(), ablate_anchor=name == "cut"))
                                  for name, model in made.items()]))


@pytest.fixture
def pages(monkeypatch):
    """The pages that are drawn, as {file name: Page}; skips the test where matplotlib is not installed."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (paper/requirements.txt)")
    drawn, plain = {}, figures.Page.finish

    def finish(page, path):
        drawn[pathlib.Path(path).stem] = page
        return plain(page, path)
    monkeypatch.setattr(figures.Page, "finish", finish)
    monkeypatch.setattr(figures, "DPI", 50)
    return drawn


def test_every_picture_is_drawn_and_labelled(records, pages, tmp_path):
    """All pictures that the numbers allow, each panel with named axes and what it shows."""
    paths = list(figures.draw(records, str(tmp_path)))
    assert {pathlib.Path(path).read_bytes()[:4] for path in paths} == {b"\x89PNG"}
    assert sorted(pages) == sorted(["by_layer", "layers", "gates", "lambda_ratio", "anchor_use", "anchor_use_odd",
                                    "lambda_map_odd", "gamma_cut"]
                                   + [f"similarity_{label}" for label in ("base", "odd", "cut")])
    base, odd, _ = records
    assert pages["by_layer"].axes[2].lines[0].get_ydata().tolist() == base["by_layer"]["token_similarity"]
    shown = pages["lambda_map_odd"].axes[1].images[0].get_array()
    np.testing.assert_array_equal(shown, analysis.ratio(odd["lambdas"]["k"]).reshape(3, 1))
    for page in pages.values():
        panels = [axes for axes in page.axes if axes.axison]
        assert all(axes.get_xlabel() and axes.get_ylabel() and (axes.lines or axes.images) for axes in panels)


def test_usage_picture_has_a_map_of_each_run_and_one_scale_for_each_column(folder, pages, call, tmp_path, monkeypatch):
    """Rows are the runs; in each the quantities it has, as measured, and the limits of a column are shared."""
    monkeypatch.setattr(usage, "QUANTITIES", {name: usage.QUANTITIES[name] for name in ("attention_sink", "q", "g")})
    runs = [str(folder / name) for name in ("base", "exo_dynamic")]
    call(usage.main, *runs, f"--png={tmp_path / 'usage.png'}")
    grid = pages["usage"].axes.reshape(2, -1)
    assert [sum(axes.axison for axes in row) for row in grid] == [1, 3]
    for row, run in zip(grid, runs):
        for axes, name in zip(row, usage.QUANTITIES):
            if axes.axison:
                measured = usage.use_over_training(run)[1][name].round(5)
                np.testing.assert_array_equal(axes.images[0].get_array(), measured)
    assert all(len({axes.images[0].get_clim() for axes in column if axes.axison}) == 1 for column in grid.T)


def test_names_of_a_map_lie_in_the_middle_of_their_parts(pages):
    """Three heads of four channels: their names stand over channels 1.5, 5.5 and 9.5; of many rows some are named."""
    axes = figures.Page(1, 1, "").axes[0]
    figures.heat_map(axes, np.zeros((20, 12)), (0, 1), ["a", "b", "c"], range(20))
    assert axes.get_xticks().tolist() == [1.5, 5.5, 9.5] and axes.get_yticks().tolist() == [0, 3, 6, 9, 12, 15, 18]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "3", "6", "9", "12", "15", "18"]


def test_limits_leave_out_what_is_far_off_and_keep_equal_numbers_apart():
    """The 2nd and 98th percentile of finite numbers; where all are equal a range around them."""
    assert figures.inner_limits(np.array([*range(101), np.inf, np.nan])) == (2, 98)
    assert figures.inner_limits(np.ones(5)) == (0.5, 1.5)


def test_figures_refuses_other_files(tmp_path, records, call):
    for name, content in (("other", {"label": "x"}), ("a", records[0]), ("b", records[0])):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="not a file of this paper/table2.py, it lacks .*anchor_use"):
        call(figures.main, tmp_path / "other.json")
    with pytest.raises(UserError, match="two files have the label base"):
        call(figures.main, tmp_path / "a.json", tmp_path / "b.json")
