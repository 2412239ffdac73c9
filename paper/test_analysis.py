"""
Each quantity of analysis.py against a slow computation of its definition: Python loops in float64 on a tiny model whose
attention and hidden states are recorded in another way than analysis.py does, and on two layers of a model as the
paper's released code computed them (testdata/golden_two_layers.pt: weights, hidden states, gates, q and k of layer 2).
"""
import json
import math
import os
import pathlib
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import analysis
import figures
import perplexity
import released
import table2
from model import ExoFormer, load_checkpoint, save_checkpoint, variant_config, variant_name
from prepare_fineweb import UserError, write_meta, write_shard

VARIANTS = ["base", "resformer", "gated", "nuresformer", "exo_scalar", "exo_headwise", "exo_dynamic"]
every_variant = pytest.mark.parametrize("variant", VARIANTS)
GOLDEN = torch.load(HERE / "testdata" / "golden_two_layers.pt", weights_only=True)
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
        anchor, at, states = model.make_anchor(x), model.positions(idx, None, None), [x.double()]
        for layer in model.layers:
            x = layer(x, anchor, at)
            states.append(x.double())
    return states, seen


def attention(q, k, t):
    """Weights of query t on keys 0 ... t, by the definition. q, k (T, D)."""
    scores = [sum(float(a) * float(b) for a, b in zip(q[t], k[j])) / math.sqrt(len(q[t])) for j in range(t + 1)]
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


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

@every_variant
def test_sink_and_entropy_match_loops(variant, monkeypatch):
    """Attention to key 0 and attention entropy: every row, head and query one by one, the first query included."""
    model, rows = tiny(variant), windows()
    result = analysis.analyse(model, rows)["by_layer"]
    _, seen = recorded(model, rows[:, :-1], monkeypatch)
    for layer, (q, k) in enumerate(seen):
        weights = [attention(qh, kh, t) for qb, kb in zip(q, k) for qh, kh in zip(qb, kb) for t in range(LENGTH)]
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


def test_core_features_of_a_line_is_one():
    line = torch.outer(torch.arange(9.0), torch.tensor([1.0, -2.0, 3.0])) + 5
    covariance = analysis.Covariance()
    covariance.add(line)
    assert covariance.core_features() == 1


def test_cross_entropy_matches_loss():
    """The chunked cross-entropy is the model's own, without z."""
    model, rows = tiny("nuresformer"), windows()
    expected = model.loss(rows[:, :-1], rows[:, 1:])[0].item()
    assert analysis.analyse(model, rows)["cross_entropy"] == pytest.approx(expected, abs=1e-5)
    by_five = sum(analysis.cross_entropy(model, row[None], chunk=5) for row in rows) / rows[:, 1:].numel()
    assert by_five == pytest.approx(expected, abs=1e-5)


def test_bfloat16_is_near_float32():
    """Under autocast the model computes in bfloat16, but attention is measured in float32: sinks stay within 2 %."""
    model, rows = tiny("exo_dynamic"), windows()
    exact, rough = (analysis.analyse(model, rows, dtype)["by_layer"] for dtype in ("float32", "bfloat16"))
    assert rough["attention_sink"] == pytest.approx(exact["attention_sink"], rel=0.02)
    assert rough["attention_sink"] != exact["attention_sink"]


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
        gates = gates_by_loops(model, layer, states[i], states[0])
        assert result["gate_mean"][i] == pytest.approx(mean(gates), abs=1e-6)
        assert result["gate_sparsity"][i] == pytest.approx(mean(gate < 0.2 for gate in gates), abs=1e-9)


def weights_of(module):
    return module.weight.detach().double()


def rms_norm(x, gain):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


@torch.no_grad()
def gates_by_loops(model, layer, x, embedded):
    """Every gate of a layer as a flat list, from its input x and the embeddings (B, T, C), float64."""
    heads, h = (model.config.n_head, -1), rms_norm(x, weights_of(layer.attn_norm))
    current = (h @ weights_of(layer.attn.project)[-model.config.n_embd:].T).unflatten(-1, heads)
    if "g" in layer.attn.mix:
        outside, first = model.config.anchor == "exogenous", model.layers[0]
        source = embedded if outside else rms_norm(embedded, weights_of(first.attn_norm))
        project = model.anchor.project if outside else first.attn.project
        anchor = (source @ weights_of(project)[-model.config.n_embd:].T).unflatten(-1, heads)
        anchor = rms_norm(anchor, weights_of(model.anchor.norms["g"]))
        gamma = gamma_by_formula(layer, h) if model.config.dynamic else torch.ones(*h.shape[:2], 8).double()
        mix = layer.attn.mix["g"]
        current = (gamma[..., 6, None, None] * mix.lambda_anchor.double() * anchor
                   + gamma[..., 7, None, None] * mix.lambda_current.double() * current)
    return [1 / (1 + math.exp(-g)) for g in current.flatten().tolist()]


@torch.no_grad()
def gamma_by_formula(layer, h):
    """Eq. 11 with GELU by the error function: (B, T, 8) in the order q1 q2 k1 k2 v1 v2 g1 g2."""
    a = h @ weights_of(layer.attn.gammas.fc1).T
    a = a * (1 + torch.erf(a / math.sqrt(2))) / 2
    return 1 / (1 + torch.exp(-(a @ weights_of(layer.attn.gammas.fc2).T + layer.attn.gammas.bias.double())))


def test_gamma_statistics_match_the_formula(monkeypatch):
    """Mean, standard deviation, least and greatest over tokens of each gamma, by layer, component and slot."""
    model, rows = tiny("exo_dynamic"), windows()
    result = analysis.analyse(model, rows)["gammas"]
    states, _ = recorded(model, rows[:, :-1], monkeypatch)
    for i, layer in enumerate(model.layers):
        gamma = gamma_by_formula(layer, rms_norm(states[i], weights_of(layer.attn_norm))).flatten(0, 1).numpy()
        for slot in range(8):
            table = result["qkvg"[slot // 2]][("anchor", "current")[slot % 2]]
            for key, measure in (("mean", np.mean), ("std", np.std), ("min", np.min), ("max", np.max)):
                assert table[key][i] == pytest.approx(measure(gamma[:, slot]), abs=1e-5)


def test_static_models_have_no_gammas():
    assert analysis.analyse(tiny("exo"), windows())["gammas"] == {}


@pytest.mark.parametrize("granularity, numbers", [("scalar", 1), ("headwise", 2), ("elementwise", 12)])
def test_lambda_usage_by_hand(granularity, numbers):
    """Ratios, medians and near-zero shares of known lambdas; an internal anchor's own layer has none."""
    model = tiny("nuresformer", granularity=granularity)
    mix = model.layers[2].attn.mix["k"]
    anchor = torch.linspace(-0.002, 0.002, numbers).view(mix.lambda_anchor.shape)
    current = torch.linspace(1, 2, numbers).view(mix.lambda_current.shape)
    mix.lambda_anchor.data, mix.lambda_current.data = anchor, current
    usage = analysis.lambda_usage(model)["k"]
    ratios = sorted(a / c for a, c in zip(anchor.flatten().tolist(), current.flatten().tolist()))
    median = (ratios[(numbers - 1) // 2] + ratios[numbers // 2]) / 2
    assert usage["layers"] == [2, 3]
    assert usage["anchor"][1] == anchor.flatten().tolist() and usage["current"][1] == current.flatten().tolist()
    assert usage["ratio_median"][1] == pytest.approx(median) and usage["ratio_mean"][1] == pytest.approx(mean(ratios))
    assert usage["near_zero"][1] == pytest.approx(mean(abs(a) < 0.001 for a in anchor.flatten().tolist()))


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


def test_ablation_needs_an_anchor():
    with pytest.raises(UserError, match="no anchor"):
        analysis.analyse(tiny("gated"), windows(), ablate_anchor=True)


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
def folder(tmp_path_factory):
    """Shards of 200 validation tokens, and a run folder with one checkpoint for each of two variants."""
    root = tmp_path_factory.mktemp("analysis")
    (root / "data").mkdir()
    tokens = np.random.default_rng(4).integers(0, 39, 200)
    tokens[::17] = 39
    for split in ("train", "val"):
        write_shard(str(root / "data" / f"tiny_{split}_000000.bin"), tokens)
    write_meta(str(root / "data"), {"tokenizer": "bytes"})
    for variant in ("base", "exo_dynamic"):
        model = tiny(variant)
        (root / variant).mkdir()
        save_checkpoint(str(root / variant / "ckpt_000007.pt"),
                        dict(model_config=vars(model.config), model=model.state_dict(), step=7))
    return root


def table2_here(monkeypatch, root, *args):
    monkeypatch.setattr(sys, "argv", ["table2.py", f"--data={root / 'data'}", f"--out={root / 'out'}", *args])
    table2.main()


def test_table_2_writes_and_prints(folder, monkeypatch, capsys):
    """One JSON a checkpoint, equal to analyse() of the first windows, and the paper's numbers beside ours."""
    paths = [folder / variant / "ckpt_000007.pt" for variant in ("base", "exo_dynamic")]
    table2_here(monkeypatch, folder, *(f"--ckpt={path}" for path in paths), "--rows=3")
    printed = capsys.readouterr().out
    record = json.loads((folder / "out" / "exo_dynamic_ckpt_000007.json").read_text())
    model = load_checkpoint(paths[1])
    expected = analysis.analyse(model, analysis.validation_windows(str(folder / "data"), model.config, 3))
    assert record["averages"] == pytest.approx(expected["averages"]) and record["rows"] == 3
    line = next(line for line in printed.splitlines() if line.startswith("exo_dynamic_ckpt_000007"))
    ours = f"{expected['averages']['attention_sink']:.4f}"
    assert all(number in line for number in ("0.0073", "0.8622", "752.1", ours))


@pytest.mark.parametrize("problem, flags", [
    ("would replace", ["--ckpt={root}/base/ckpt_000007.pt", "--ckpt={root}/base/ckpt_000007.pt"]),
    ("none of the checkpoints has an anchor", ["--ckpt={root}/base/ckpt_000007.pt", "--ablate_anchor"]),
    ("99 rows wanted", ["--ckpt={root}/base/ckpt_000007.pt", "--rows=99"]),
    ("--block_size=13", ["--ckpt={root}/base/ckpt_000007.pt", "--block_size=13"]),
    ("no such checkpoint", ["--ckpt={root}/base/missing.pt"]),
    ("no val shard", ["--ckpt={root}/base/ckpt_000007.pt", "--data={root}/nowhere"]),
])
def test_table_2_refuses_in_one_line(folder, monkeypatch, problem, flags):
    with pytest.raises(SystemExit) as stop:                        # a flag given twice: the later one counts
        table2_here(monkeypatch, folder, *(flag.format(root=folder) for flag in flags))
    assert problem in stop.value.code and "\n" not in stop.value.code and stop.value.code.startswith("table2.py: ")


def test_ablation_leaves_out_what_has_no_anchor(folder, monkeypatch, capsys):
    paths = [folder / variant / "ckpt_000007.pt" for variant in ("base", "exo_dynamic")]
    table2_here(monkeypatch, folder, *(f"--ckpt={path}" for path in paths), "--ablate_anchor", "--rows=1")
    assert f"left out: {paths[0]}" in capsys.readouterr().out
    assert json.loads((folder / "out" / "exo_dynamic_ckpt_000007_no_anchor.json").read_text())["ablate_anchor"]
    assert not (folder / "out" / "base_ckpt_000007_no_anchor.json").exists()


def test_perplexity_of_our_own_checkpoint(folder, monkeypatch, capsys):
    """The command line scores all windows: exp of the mean loss, which the model computes itself."""
    path = folder / "exo_dynamic" / "ckpt_000007.pt"
    monkeypatch.setattr(sys, "argv", ["perplexity.py", f"--ckpt={path}", f"--data={folder / 'data'}", "--device=cpu",
                                      "--mask_documents=false"])
    perplexity.main()
    model = load_checkpoint(path)
    rows = torch.from_numpy(analysis.validation_windows(str(folder / "data"), model.config).astype(int))
    expected = math.exp(model.loss(rows[:, :-1], rows[:, 1:])[0].item())
    value, words = re.search(r"perplexity  ([\d.]+) (over \d+ windows of \d+)", capsys.readouterr().out).groups()
    assert float(value) == pytest.approx(expected, abs=1e-3) and words == f"over {len(rows)} windows of 12"
    monkeypatch.setattr(sys, "argv", ["perplexity.py", f"--ckpt={path}"])
    with pytest.raises(SystemExit, match="2"):
        perplexity.main()


def test_json_has_no_infinities(tmp_path):
    """A lambda2 of zero makes an infinite ratio; the file stays JSON, with null."""
    model = tiny("exo_scalar")
    model.layers[0].attn.mix["q"].lambda_current.data.zero_()
    record = dict(label="x", **analysis.analyse(model, windows()))
    saved = json.loads(pathlib.Path(table2.write_record(str(tmp_path), record)).read_text())
    assert saved["lambdas"]["q"]["ratio_mean"][0] is None and saved["lambdas"]["q"]["ratio_mean"][1] is not None


# ------------------------------------------------------------------------------------------------------------- pictures

@pytest.fixture(scope="module")
def records():
    """What table2.py would write for models of every kind, one with its anchor removed, one from no row of Table 3."""
    made = {variant: tiny(variant) for variant in ("base", "gated", "nuresformer_vg", "exo_scalar", "exo_dynamic")}
    made["odd"] = tiny("exo", mix="qkv", anchor_norm="")
    found = [dict(label=name, **analysis.analyse(model, windows())) for name, model in made.items()]
    found.append(dict(label="cut", **analysis.analyse(made["exo_dynamic"], windows(), ablate_anchor=True)))
    return json.loads(json.dumps(table2.finite(found)))


def test_styles_tell_everything_apart_in_black_and_white(records):
    """No two checkpoints share marker and filling; a variant keeps its colour and marker when ablated, but hollow."""
    styles = figures.styles_of(records + [{**records[0], "label": "seed 2"}, {**records[0], "label": "seed 3"}])
    looks = [(style["marker"], style["fillstyle"]) for style in styles.values()]
    assert len(set(looks)) == len(looks) == 9 and styles["cut"]["fillstyle"] == "none"
    for one, other in (("cut", "exo_dynamic"), ("seed 2", "base")):
        assert (styles[one]["color"], styles[one]["marker"]) == (styles[other]["color"], styles[other]["marker"])


def test_every_picture_is_drawn_and_labelled(records, tmp_path, monkeypatch):
    """All pictures that the numbers allow, each panel with named axes or a heat map, no label over another."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (paper/requirements.txt)")
    pages, plain = [], figures.Page.finish

    def finish(page, folder, name):
        path = plain(page, folder, name)
        pages.append(name)
        check_page(page)
        return path
    monkeypatch.setattr(figures.Page, "finish", finish)
    monkeypatch.setattr(figures, "DPI", 50)
    chosen = [record for record in records if record["label"] in ("base", "exo_scalar", "odd", "cut")]
    paths = list(figures.draw(chosen, str(tmp_path)))
    assert {pathlib.Path(path).read_bytes()[:4] for path in paths} == {b"\x89PNG"}
    assert sorted(pages) == sorted(
        ["by_layer", "layers", "gates", "lambda_ratio", "gamma_cut", "lambda_map_exo_scalar", "lambda_map_odd"]
        + [f"similarity_{record['label']}" for record in chosen])


def check_page(page):
    """Every panel in use is labelled, and no two tick labels, titles or axis labels of the page overlap."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    renderer = FigureCanvasAgg(page.figure).get_renderer()
    texts = [page.figure._suptitle]
    for axes in (axes for axes in page.figure.axes if axes.axison and axes in set(page.axes)):
        assert axes.get_xlabel() and axes.get_ylabel() and (axes.lines or axes.images)
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label, *shown_ticks(axes.xaxis), *shown_ticks(axes.yaxis)]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]
    clashes = [(one, other) for i, (one, a) in enumerate(boxes) for other, b in boxes[:i] if a.overlaps(b)]
    assert not clashes


def shown_ticks(axis):
    """Labels of the ticks within the axis's limits: matplotlib keeps some beyond, which it does not draw."""
    low, high = sorted(axis.get_view_interval())
    return [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


@pytest.mark.parametrize("content", ['{"label": "x"}', "5"])
def test_figures_refuses_other_files(tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(UserError, match="not a file of paper/table2.py"):
        figures.read_record(str(tmp_path / "other.json"))


def test_figures_refuses_two_files_of_one_label(records, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path in paths:
        path.write_text(json.dumps(records[0]))
    monkeypatch.setattr(sys, "argv", ["figures.py", *map(str, paths), f"--out={tmp_path / 'out'}"])
    with pytest.raises(SystemExit, match="two files have the label base"):
        figures.main()


# ------------------------------------------------------------------------------------------------- released checkpoints

@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """The two golden layers as a released checkpoint file, its data folder, and dead tensors among the weights."""
    root = tmp_path_factory.mktemp("release")
    weights = {f"_orig_mod.{key}": tensor for key, tensor in GOLDEN["model"].items()}
    weights["_orig_mod.lm_head.weight"] = torch.randn(96, 32, generator=torch.Generator().manual_seed(5))
    settings = dict(block_size=24, n_head=99)                                            # n_head: not to be trusted
    torch.save(dict(step=38146, model=weights, model_args=settings, optimizer={}), root / "theirs.pt")
    tokens = np.random.default_rng(6).integers(0, 95, 24 * 5 + 1)
    tokens[[0, 30, 31, 70]] = 95
    for split in ("train", "val"):
        write_shard(str(root / f"tiny_{split}_000000.bin"), tokens)
    return root


def test_unused_tensors_are_those_that_change_nothing(release):
    """The names reported as ignored are exactly those whose destruction leaves the loaded model as it was."""
    checkpoint, model = released.load(str(release / "theirs.pt"))
    weights, changes = checkpoint["model"], {}
    for key in weights:
        spoiled = ExoFormer.from_released({**weights, key: weights[key] + 1}, block_size=24)
        same = all(torch.equal(a, b) for a, b in zip(spoiled.state_dict().values(), model.state_dict().values()))
        changes[key.removeprefix("_orig_mod.")] = not same
    assert released.unused_tensors(checkpoint, model) == sorted(key for key, changed in changes.items() if not changed)
    assert changes["transformer.layers.0.attn.v_norm.weight"] and not changes["transformer.layers.1.attn.v_norm.weight"]


def test_perplexity_is_the_models_own_loss(release):
    """exp of the model's own loss over all windows at once; masked, attention stays within documents."""
    _, model = released.load(str(release / "theirs.pt"))
    rows = analysis.validation_windows(str(release), model.config)
    idx, targets = (torch.from_numpy(part.astype(int)) for part in (rows[:, :-1], rows[:, 1:]))
    plain = model.loss(idx, targets)[0].item()
    assert math.log(perplexity.perplexity(model, rows, 95, mask_documents=False)) == pytest.approx(plain, abs=1e-5)
    masked = model.loss(idx, targets, (idx == 95).cumsum(1))[0].item()
    assert math.log(perplexity.perplexity(model, rows, 95)) == pytest.approx(masked, abs=1e-5)
    assert abs(masked - plain) > 1e-3


def released_here(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["released.py", *map(str, args)])
    released.main()


def test_saved_model_is_the_released_one(release, monkeypatch, capsys, tmp_path):
    """--save writes what load_checkpoint and table2.py take, with equal logits; the report names variant and doubts."""
    released_here(monkeypatch, release / "theirs.pt", f"--save={tmp_path / 'new' / 'ours.pt'}")
    printed = capsys.readouterr().out
    ours, (_, theirs) = load_checkpoint(str(tmp_path / "new" / "ours.pt")), released.load(str(release / "theirs.pt"))
    assert torch.equal(ours(GOLDEN["idx"]), theirs(GOLDEN["idx"])) and ours.config == theirs.config
    for words in ("nuresformer, by its keys", "never against released weights", "2 tensors that"):
        assert words in printed
    with pytest.raises(SystemExit, match="is there already"):
        released_here(monkeypatch, release / "theirs.pt", f"--save={tmp_path / 'new' / 'ours.pt'}")


@pytest.mark.parametrize("variant", ["base", "gated"])
def test_variant_of_a_released_model_without_anchor(variant):
    """The keys of a model without lambdas do not tell their shape; it is still that row of Table 3."""
    assert variant_name(tiny(variant, granularity="scalar").config) == variant


@pytest.fixture
def server(release, tmp_path):
    """A web server on the folder of `release` that breaks the first connection half-way and knows Range requests."""
    import http.server
    import threading
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            data, asked = (release / "theirs.pt").read_bytes(), self.headers.get("Range")
            start = int(asked[6:-1]) if asked else 0
            seen.append((self.path, start, self.headers.get("Authorization")))
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start:start + 50_000] if len(seen) == 1 else data[start:])

        def log_message(self, *args):
            pass
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{web.server_port}", seen
    web.shutdown()
    web.server_close()


def test_download_resumes_and_keeps_the_token_at_home(server, release, tmp_path, monkeypatch):
    """A broken download goes on where it stopped; the hub's token goes to the hub alone; nothing is fetched twice."""
    url, seen = server
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(released, "CHUNK", 10_000)
    path = released.fetch(f"{url}/files/a.pt?key=1", None, str(tmp_path), backoff=0.01)
    assert pathlib.Path(path).read_bytes() == (release / "theirs.pt").read_bytes()
    assert seen == [("/files/a.pt?key=1", 0, None), ("/files/a.pt?key=1", 49_999, None)]
    assert released.fetch(f"{url}/files/a.pt?key=1", None, str(tmp_path)) == path and len(seen) == 2
    monkeypatch.setenv("HF_ENDPOINT", url)
    released.fetch("somebody/models", "b.pt", str(tmp_path))
    assert seen[2] == ("/somebody/models/resolve/main/b.pt", 0, "Bearer secret")


def test_files_of_one_name_from_two_places_are_two_files(server, tmp_path, monkeypatch):
    """All of the paper's models may be called ckpt_step:38146.pt; none must be taken for another, nor lead outside."""
    monkeypatch.setenv("HF_ENDPOINT", server[0])
    sources = [("somebody/one", "../a:1.pt"), ("somebody/two", "../a:1.pt"), (f"{server[0]}/x/a:1.pt", None)]
    paths = [released.fetch(*source, str(tmp_path), backoff=0.01) for source in sources]
    host = server[0].removeprefix("http://")
    assert [os.path.relpath(path, tmp_path) for path in paths] == ["somebody/one/a:1.pt", "somebody/two/a:1.pt",
                                                                   f"{host}/x/a:1.pt"]
    assert len({path for path, *_ in server[1]}) == 3


def test_released_refuses_in_one_line(folder, monkeypatch):
    for path, problem in (("nosuch.pt", "no such file"), (folder / "base" / "ckpt_000007.pt", "own format already")):
        with pytest.raises(SystemExit) as stop:
            released_here(monkeypatch, path)
        assert problem in stop.value.code and "\n" not in stop.value.code
