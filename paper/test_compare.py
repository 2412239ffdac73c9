"""Tests of compare.py and of the picture that figures.py makes for it. No network."""
import json
import math
import os
import pathlib
import statistics
from dataclasses import asdict

import numpy as np
import pytest
import torch

import compare
import figures
from model import TABLE_3, VARIANTS, variant_config
from prepare_fineweb import UserError
from train import TrainConfig

SMALL = dict(n_layer=2, n_head=2, n_embd=8, vocab_size=320, block_size=16, tokenizer="bytes")


def write_run(folder, points, variant=None, seed=1, max_steps=None, model=(), **settings):
    """A run folder with evaluations at points [(tokens, loss)], 100 tokens a step; with a variant a checkpoint too."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "log.jsonl"), "w") as log:
        for tokens, loss in points:
            for record in (dict(loss=9.0, ms=5.0), dict(val_loss=loss)):
                log.write(json.dumps(dict(step=tokens // 100, tokens=tokens, **record)) + "\n")
    if variant:
        config = variant_config(variant, **{**SMALL, **dict(model)})
        train_config = TrainConfig(**{"seed": seed, "max_steps": max_steps or points[-1][0] // 100, "eval_tokens": 64,
                                      "final_eval_tokens": 64, **settings})
        torch.save(dict(train_config=asdict(train_config), model_config=asdict(config), git_revision="c0ffee",
                        torch_version="9.9"), os.path.join(folder, f"ckpt_{points[-1][0] // 100:06d}.pt"))
    return str(folder)


def write_ends(root, ends, **settings):
    """Run folders from loss 8 to those of {(variant, seed): loss} in 400 tokens."""
    return [write_run(root / f"{variant}{seed}", [(0, 8.0), (400, end)], variant, seed, **settings)
            for (variant, seed), end in ends.items()]


def cells(paths):
    """{(row, heading): text} of the table of run folders or files, and everything printed as one string."""
    runs = [run for path in paths for run in compare.read_runs(str(path))]
    lines = compare.summarise(runs)[1]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:lines.index("")]]
    return {(row[0], name): cell for row in table[2:] for name, cell in zip(table[0], row)}, "\n".join(lines)


@pytest.mark.parametrize("level, tokens", [(4.5, 150), (5.0, 100), (4.0, 200), (9.0, 20), (12.0, 0), (3.9, 275)])
def test_tokens_to_a_loss_are_interpolated_between_evaluations(level, tokens):
    """The first crossing counts: the curve comes back up in between."""
    curve = [(0, 10.0), (100, 5.0), (200, 4.0), (250, 4.3), (300, 3.5)]
    assert compare.tokens_to_reach(curve, level) == pytest.approx(tokens)
    assert compare.tokens_to_reach(curve, 3.4) is None


def test_seeds_of_one_experiment_are_one_row_with_hand_computed_figures(tmp_path):
    """Tokens to 4.0 are 300 and 320 of 400 (gated's last loss is 4.0 and 4.2, from 5.0 at 200)."""
    curves = {("gated", 1): (5.0, 4.0), ("gated", 2): (5.0, 4.2), ("exo", 1): (4.5, 3.5), ("exo", 2): (4.5, 4.0)}
    found, text = cells([write_run(tmp_path / f"{variant}{seed}", [(0, 8.0), (200, half), (400, last)], variant, seed)
                         for (variant, seed), (half, last) in curves.items()])
    ratios = [400 / 300, 400 / 320]
    expected = {"runs": "2", "layers": "2", "tokens": "400", "val loss": f"3.7500 +- {math.sqrt(0.125):.4f}",
                "perplexity": f"{math.exp(3.75):.3f}", "paper's": "14.13", "loss - gated": "-0.3500 +- 0.1500",
                "tokens, gated / own": f"{sum(ratios) / 2:.2f}x +- {statistics.stdev(ratios):.2f}x",
                # embedding and head 2 * 320 * 8; a layer: qkvg, out 5 * 64, SwiGLU 6 * 64, norms 2 * 8 + 2 * 4,
                # 4 * 2 lambdas of 8; final norm 8; anchor 4 * 64 and 4 gains of 4
                "parameters": f"{5120 + 2 * (320 + 384 + 24 + 64) + 8 + 256 + 16:,}"}
    assert {name: found["exo", name] for name in expected} == expected
    assert found["gated", "loss - gated"] == "-" and ("exo", "loss - base") not in found
    assert "torch 9.9 | commit c0ffee" in text


def test_a_run_of_older_code_that_lacks_a_setting_is_of_the_same_experiment(tmp_path):
    folders = [write_run(tmp_path / f"exo{seed}", [(0, 8.0), (400, 4.0)], "exo", seed) for seed in (1, 2)]
    state = torch.load(tmp_path / "exo1" / "ckpt_000004.pt")
    del state["model_config"]["window"], state["train_config"]["muon_ramp"]
    torch.save(state, tmp_path / "exo1" / "ckpt_000004.pt")
    assert cells(folders)[0]["exo", "runs"] == "2"


def test_a_run_that_never_reaches_the_baseline_is_counted_and_not_averaged(tmp_path):
    ends = {("base", 1): 4.0, ("base", 2): 4.0, ("exo", 1): 3.0, ("exo", 2): 4.5, ("naive", 1): 5.0}
    found, _ = cells(write_ends(tmp_path, ends))
    assert found["exo", "tokens, base / own"] == "1.25x, never in 1 of 2"
    assert found["naive", "tokens, base / own"] == "never in 1 of 1"


def test_rows_are_named_by_what_their_runs_differ_in_and_compared_with_their_like(tmp_path):
    """gated and exo both with AdamW are compared with each other, and each with its own first row."""
    experiments = {"a": ("gated", {}, {}), "b": ("exo", {}, {}), "c": ("gated", dict(optimizer="adamw"), {}),
                   "d": ("exo", dict(optimizer="adamw"), {}), "e": ("exo", {}, dict(lambda_init=0.25))}
    found, _ = cells([write_run(tmp_path / name, [(0, 8.0), (400, 4.0 - 0.1 * i ** 2)], variant, 1, model=model, **rest)
                      for i, (name, (variant, rest, model)) in enumerate(experiments.items())])
    assert [row for row, name in found if name == "runs"] == [
        "gated", "exo", "gated optimizer=adamw", "exo optimizer=adamw", "exo lambda_init=0.25"]
    assert found["exo optimizer=adamw", "loss - gated"] == "-0.5000"                # 3.1 - 3.6
    assert found["exo optimizer=adamw", "loss - first of its variant"] == "-0.8000"     # 3.1 - 3.9
    assert found["exo lambda_init=0.25", "loss - gated"] == "-1.6000"               # 2.4 - 4.0: no gated is like it
    assert found["exo lambda_init=0.25", "paper's"] == found["gated", "loss - first of its variant"] == "-"


def test_a_custom_configuration_is_named_by_the_folder_of_a_sweep_and_by_what_contradicts_the_row(tmp_path):
    points, narrowed = [(0, 8.0), (400, 4.0)], dict(mix="qk", anchor_norm="qk")
    found, _ = cells([write_run(tmp_path / "exo-mix=qk-seed1", points, "exo", 1, model=narrowed),
                      write_run(tmp_path / "mine-seed1", points, "exo", 1, model=dict(narrowed, anchor_norm="q")),
                      write_run(tmp_path / "exo-anchor_norm=none-seed1", points, "exo_nonorm", 1)])
    assert [row for row, name in found if name == "runs"] == ["exo mix=qk anchor_norm=qk", "mine",
                                                              "exo anchor_norm=none"]
    alone = cells([write_run(tmp_path / "exo", points, "base", 1)])[0]             # a name that is not true
    assert {row for row, _ in alone} == {"exo gate=False anchor=none mix=none anchor_norm=none"}


def test_a_last_evaluation_on_other_tokens_stays_out_of_curve_and_ratio(tmp_path):
    folders = [write_run(tmp_path / variant, [(0, 8.0), (200, half), (400, last)], variant, final_eval_tokens=0)
               for variant, half, last in (("base", 5.0, 4.0), ("exo", 4.0, 3.9))]
    found, text = cells(folders)
    assert compare.read_run(folders[1]).curve() == [(0, 8.0), (200, 4.0)] and found["exo", "val loss"] == "3.9000"
    assert found["exo", "tokens, base / own"] == "1.33x"                            # 5.0 lies 3/4 of the way to 200
    assert "--final_eval_tokens" in text


@pytest.mark.parametrize("other", [dict(data="elsewhere"), dict(eval_tokens=96, final_eval_tokens=96)])
def test_losses_on_other_data_are_not_compared(tmp_path, other):
    found, text = cells(write_ends(tmp_path, {("base", 1): 4.0}) + write_ends(tmp_path, {("exo", 1): 3.0}, **other))
    assert found["exo", "val loss"] == "3.0000" and ("exo", "loss - base") not in found
    assert f"exo: not compared with base, since measured with {list(other)[0]}=" in text


def test_a_loss_half_way_is_called_unfinished_and_not_subtracted_from_a_final_one(tmp_path):
    """Half way the evaluation may have been on fewer tokens."""
    found, text = cells([write_run(tmp_path / "base", [(0, 8.0), (400, 4.0)], "base"),
                         write_run(tmp_path / "exo", [(0, 8.0), (200, 5.0)], "exo", max_steps=4)])
    assert ("exo", "loss - base") not in found and "NOT FINISHED: exo is at step 2 of 4" in text


def test_a_diverged_run_is_a_note_and_no_row(tmp_path):
    folder = write_run(tmp_path / "exo", [(0, 8.0), (200, 5.0)], "exo", max_steps=4)
    with open(tmp_path / "exo" / "log.jsonl", "a") as log:
        log.write(json.dumps(dict(step=2, tokens=200, diverged=True)) + "\n")
    found, text = cells([write_run(tmp_path / "base", [(0, 8.0), (400, 4.0)], "base"), folder])
    assert {row for row, _ in found} == {"base"} and "DIVERGED: exo after step 2" in text
    assert "no run to compare" in cells([folder])[1]


@pytest.mark.parametrize("a, b, expected", [
    ([1, 2, 3, 4], [10, 20, 30, 40], 1), ([1, 2, 3, 4], [4, 3, 2, 1], -1),
    ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 1 - 6 * 4 / (5 * 24)),                       # 1 - 6 sum d^2 / (n (n^2 - 1))
    ([1, 2, 3, 4], [5, 6, 6, 9], 4.5 / math.sqrt(5 * 4.5)),                         # ranks 1 2.5 2.5 4
    ([1, 2, 3], [7, 7, 7], math.nan)])
def test_rank_correlation_equals_the_textbooks(a, b, expected):
    assert compare.spearman(a, b) == pytest.approx(expected, nan_ok=True)


def test_the_agreement_with_the_papers_order_is_over_rows_of_table_3_alone(tmp_path):
    """Paper: base 14.79, gated 14.64, exo 14.13. Seed 1 has this order, seed 2 the first two exchanged, seed 3 too few
    rows; a row with a setting of its own would spoil it."""
    ends = {("base", 1): 4.0, ("gated", 1): 3.9, ("exo", 1): 3.5, ("base", 2): 3.8, ("gated", 2): 3.9, ("exo", 2): 3.4,
            ("exo", 3): 3.45}
    odd = write_run(tmp_path / "odd", [(0, 8.0), (400, 1.0)], "exo", 1, optimizer="adamw")
    line = next(line for line in cells([*write_ends(tmp_path, ends), odd])[1].split("\n") if "Spearman" in line)
    assert line.endswith("perplexity: +0.87 (means, 3 rows), +1.00 (seed 1, 3 rows), +0.50 (seed 2, 3 rows)")


def test_runs_of_a_gpu_can_be_compared_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = compare.read_run(write_run(tmp_path / "exo", [(0, 8.0), (400, 4.0)], "exo", device="cuda"))
    assert run.loss == 4.0 and run.origin["machine"]


def test_one_table_comes_from_the_files_of_two_seeds_of_which_one_is_unfinished(tmp_path, call, monkeypatch, capsys):
    """It is the table of the run folders; where only seed 1 has a row, the row and its differences are seed 1's."""
    ends = {("base", 1): 4.0, ("gated", 1): 3.9, ("exo", 1): 3.5, ("resformer", 1): 3.6, ("base", 2): 4.2,
            ("gated", 2): 4.0, ("exo", 2): 3.6}
    folders, files = write_ends(tmp_path, ends), [tmp_path / f"seed{seed}.jsonl" for seed in (1, 2)]
    for seed, file in enumerate(files, 1):
        call(compare.main, *(folder for folder in folders if folder.endswith(str(seed))), f"--out={file}")
    assert [len(file.read_text().splitlines()) for file in files] == [4, 3]
    found, text = cells(folders)
    monkeypatch.setattr(compare, "circumstances", lambda device: pytest.fail("the machine that reads is not asked"))
    capsys.readouterr()
    call(compare.main, *files)
    assert capsys.readouterr().out == text + "\n"
    assert found["exo", "loss - base"] == "-0.5500 +- 0.0500" and found["exo", "val loss"].startswith("3.5500 +- 0.07")
    assert found["resformer", "runs"] == "1" and found["resformer", "loss - base"] == "-0.4000"
    ratios = [(8 - end) / (8 - base) for end, base in ((3.5, 4.0), (3.6, 4.2))]
    assert found["exo", "tokens, base / own"] == f"{statistics.mean(ratios):.2f}x +- {statistics.stdev(ratios):.2f}x"
    assert found["resformer", "tokens, base / own"] == "1.10x"                                  # 4.4 / 4
    assert "(means, 4 rows)" in text and "(seed 1, 4 rows), +1.00 (seed 2, 3 rows)" in text


def test_the_effect_of_an_idea_is_the_difference_of_two_rows_beside_the_papers(tmp_path):
    """Two seeds of exo - nuresformer: -0.5 and -0.3. A row with another learning rate is no row of Table 3."""
    ends = {("nuresformer", 1): 4.0, ("nuresformer", 2): 4.0, ("exo", 1): 3.5, ("exo", 2): 3.7, ("gated", 1): 4.5}
    text = cells(write_ends(tmp_path, ends) + write_ends(tmp_path / "other", {("exo", 1): 1.0}, muon_lr=0.02))[1]
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n\n")[1].splitlines()[2:]]
    assert found == [["exogenous anchors in place of layer 1's", "exo - nuresformer", "-0.4000 +- 0.1000",
                      f"{math.log(14.13) - math.log(14.15):.4f}"]]
    assert "pooled over 2 rows (2 degrees of freedom): 0.1000" in text                  # sqrt((0 + 2 * 0.1 ** 2) / 2)


def test_a_torn_last_line_is_left_out_and_any_other_bad_line_named(tmp_path):
    folder = write_run(tmp_path / "r", [(0, 8.0), (400, 4.0)])
    with open(tmp_path / "r" / "log.jsonl", "a") as log:
        log.write('{"step": 5, "tok')
    assert compare.read_run(folder).step == 4
    with open(tmp_path / "r" / "log.jsonl", "a") as log:
        log.write("\n")
    with pytest.raises(UserError, match="log.jsonl, line 5: not a JSON record"):
        compare.read_run(folder)


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path, call):
    run, twin = (write_run(tmp_path / name, [(0, 8.0), (400, 4.0)], "exo") for name in ("exo", "again"))
    (tmp_path / "other.jsonl").write_text('{"step": 1}\n')
    for paths, words in (([run, twin], "exo and again are one experiment with one seed"),
                         ([tmp_path / "other.jsonl"], "other.jsonl: not a file that --out wrote")):
        with pytest.raises(UserError, match=words):
            call(compare.main, *paths)


def test_variants_can_be_told_apart_without_colour_and_keep_their_style():
    """A second row of the same variant, or one of no row of Table 3, has a look that no row of Table 3 has; with the
    anchor removed a variant's marker is hollow."""
    looks = [{k: v for k, v in figures.variant_style(name).items() if k != "color"} for name in TABLE_3]
    assert all(a != b for i, a in enumerate(looks) for b in looks[:i])
    rows = [("gated", False), ("exo", False), ("gated", False), ("resformer", False), ("", False), ("exo", True)]
    styles = figures.styles_of(rows)
    for i in (0, 1, 3):
        assert styles[i] == figures.variant_style(rows[i][0])
    assert len({style["marker"] for style in styles[:5]}) == 5
    assert styles[5] == {**styles[1], "fillstyle": "none", "linestyle": ":"}


def test_a_variant_of_ones_own_is_compared_and_drawn(tmp_path, call, monkeypatch):
    """One line in VARIANTS is all that it takes; it has no perplexity in the paper."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (paper/requirements.txt)")
    monkeypatch.setitem(VARIANTS, "mine", {**VARIANTS["exo"], "mix": "vg", "anchor_norm": "vg"})
    runs = write_ends(tmp_path, {("exo", 1): 4.0, ("mine", 1): 3.5, ("gated", 1): 4.5})
    table, _ = cells(runs)
    assert table["mine", "loss - gated"] == "-1.0000" and table["mine", "paper's"] == "-"
    call(compare.main, *runs, f"--png={tmp_path / 'c.png'}")


def test_the_picture_has_a_curve_for_every_row_with_the_spread_as_a_band(tmp_path, call, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (paper/requirements.txt)")
    pages, plain = [], figures.Page.finish
    monkeypatch.setattr(figures.Page, "finish", lambda page, path: pages.append(page) or plain(page, path))
    runs = [write_run(tmp_path / f"{v}{s}", [(0, 8.0), (200, 5.0 + s / 10), (400, 4.0)], v, s)
            for v, s in (("base", 1), ("base", 2), ("exo", 1), ("exo", 2), ("gated", 1))]
    call(compare.main, *runs, f"--png={tmp_path / 'c.png'}")
    axes = pages[0].axes[0]
    legend = [text.get_text() for text in pages[0].figure.legends[0].get_texts()]
    assert legend == ["base", "exo", "gated"] and "bytes" in axes.get_xlabel() and "nats" in axes.get_ylabel()
    assert list(axes.lines[1].get_ydata()) == pytest.approx([5.15, 4.0])
    assert axes.lines[1].get_xdata().tolist() == pytest.approx([0.2, 0.4])
    assert axes.collections[1].get_paths()[0].vertices[:, 1].max() == pytest.approx(5.2)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


HERE = pathlib.Path(__file__).parent


def committed(*kinds):
    """Groups of the runs in files of results/, the lines of RESULTS.md and those of README.md."""
    runs = [run for kind in kinds for run in compare.read_runs(str(HERE / "results" / f"{kind}.jsonl"))]
    results = (HERE / "RESULTS.md").read_text(encoding="utf-8").splitlines()
    readme = (HERE.parent / "README.md").read_text(encoding="utf-8").splitlines()
    return compare.group_runs(runs), results, readme


def test_results_and_readme_hold_the_numbers_of_the_committed_sweep():
    """Each row's loss, perplexity and differences stand in one line of a table of RESULTS.md; README.md has the
    effect of each idea, and in their lines the six variants' losses."""
    groups, lines, top = committed("six", "rest", "control")
    for group in groups:
        cells = compare.cells_of(group, groups)
        row, = [line for line in lines if line.startswith(f"| {group.label} | {cells['layers']} |")]
        assert [cells[name] for name in cells if f" {cells[name]} |" not in row and name in (
            "val loss", "perplexity", "loss - base", "tokens, base / own", "loss - gated", "tokens, gated / own")] == []
        small = [line for line in top if line.startswith(f"| {group.label} |")]
        assert all(line.endswith(f" {group.loss[0]:.4f} |") for line in small) and len(small) <= 1
    effects = [f"| {' | '.join(effect.values())} |" for effect in compare.effects_of(groups)]
    assert effects and [line for line in effects if line not in top] == []


def test_results_hold_the_numbers_of_the_committed_ablations():
    groups, lines, _ = committed("ablations", "rates")
    for group in groups:
        cells = compare.cells_of(group, groups)
        shown = [cells[name] for name in ("variant", "val loss", "loss - gated", "loss - first of its variant")]
        assert f"| {' | '.join(shown)} |" in lines
    own_rate = [group for group in groups if not {"optimizer", "muon_lr"} & set(group.changes)]
    baselines = [compare.baseline_of(group, groups, compare.FIRST) for group in own_rate]
    errors = [compare.difference(*pair)[1] for pair in zip(own_rate, baselines) if pair[1]]
    assert f"the last column is {math.sqrt(statistics.fmean(e * e for e in errors)):.3f}." in " ".join(lines)


def test_results_hold_the_numbers_of_the_longer_run():
    """Losses, and Table 2's quantities over training: averages over the layers of four models, in one cell each."""
    groups, lines, _ = committed("long")
    for group in groups:
        cells = compare.cells_of(group, groups)
        shown = [cells[name] for name in ("variant", "val loss", "loss - base", "tokens, base / own", "loss - gated",
                                          "tokens, gated / own")]
        assert f"| {' | '.join(shown)} |" in lines
    records = [json.loads(line) for line in (HERE / "results" / "long_use.jsonl").read_text().splitlines()]
    for tokens in (0, 204_800, 409_600, 614_400, 1_228_800, 2_457_600, 5_120_000, 10_240_000):
        def average(name, record, digits):
            return f"{np.mean([layer[record['tokens'].index(tokens)] for layer in record['use'][name]]):.{digits}f}"
        shown = [", ".join(average(name, record, digits) for record in records) for name, digits in (
            ("attention_sink", 4), ("token_similarity", 3), ("pca_core_features", 0))]
        shown.append(", ".join(average(name, records[2], 2) for name in "qkvg"))
        assert f"| {tokens:,} | {' | '.join(shown)} |" in lines
