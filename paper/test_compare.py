"""Tests of compare.py and of the picture that figures.py makes for it. No network."""

import json
import math
import os
import pathlib
import random
import re
import statistics
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch

import compare
import figures
from model import TABLE_3, VARIANTS, ModelConfig, variant_config
from prepare_fineweb import UserError
from train import TrainConfig, save_checkpoint

HERE = pathlib.Path(__file__).parent
SMALL = dict(n_layer=2, n_head=2, n_embd=8, vocab_size=320, block_size=16, tokenizer="bytes")


def write_run(folder, points, variant=None, seed=1, max_steps=None, model=(), **settings):
    """
    A run folder with evaluations at points [(tokens, loss)], 100 tokens a step; with a variant a
    checkpoint too.
    """
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "log.jsonl"), "w", encoding="utf-8") as log:
        for tokens, loss in points:
            where = dict(step=tokens // 100, tokens=tokens)
            log.write(json.dumps({**where, "loss": 9.0, "ms": 5.0}) + "\n")
            log.write(json.dumps({**where, "val_loss": loss}) + "\n")
    if variant:
        last = points[-1][0] // 100
        usual = dict(seed=seed, max_steps=max_steps or last, eval_tokens=64, final_eval_tokens=64)
        config = variant_config(variant, **{**SMALL, **dict(model)})
        state = dict(
            train_config=asdict(TrainConfig(**{**usual, **settings})),
            model_config=asdict(config),
            git_revision="c0ffee",
            torch_version="9.9",
        )
        torch.save(state, os.path.join(folder, f"ckpt_{last:06d}.pt"))
    return str(folder)


def write_ends(root, ends, **settings):
    """Run folders from loss 8 to those of {(variant, seed): loss} in 400 tokens."""
    return [
        write_run(root / f"{variant}{seed}", [(0, 8.0), (400, end)], variant, seed, **settings)
        for (variant, seed), end in ends.items()
    ]


def tables(lines):
    """[[cells of a line, ...], ...] of the tables in lines of markdown, without their rulers."""
    found = [[]]
    for line in lines:
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.split("|")[1:-1]])
        elif found[-1]:
            found.append([])
    return [[table[0], *table[2:]] for table in found if table]


def cells(paths, **asked):
    """{(row, heading): text} of the first table of runs, and all that is printed as one string."""
    runs = [run for path in paths for run in compare.read_runs(str(path))]
    lines = compare.summarise(runs, **asked)[1]
    headings, *rows = tables(lines)[0]
    found = {(row[0], name): cell for row in rows for name, cell in zip(headings, row)}
    return found, "\n".join(lines)


def group_of(losses, variant="exo", tokens=400):
    """A row of finished runs from {seed: loss}."""
    runs = [
        compare.Run(f"{variant}{seed}", variant, dict(seed=seed), 1, 4, tokens,
                    [[tokens, loss]], False, {})
        for seed, loss in losses.items()
    ]  # fmt: skip
    return compare.Group(variant, {}, runs)


# ------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("degrees, t95, t99", [
    (1, 12.706, 63.657), (2, 4.303, 9.925), (3, 3.182, 5.841), (4, 2.776, 4.604),
    (5, 2.571, 4.032), (10, 2.228, 3.169), (23, 2.069, 2.807), (24, 2.064, 2.797),
    (30, 2.042, 2.750), (120, 1.980, 2.617),
])  # fmt: skip
def test_students_t_is_that_of_the_printed_tables(degrees, t95, t99):
    for inside, t in ((0.95, t95), (0.99, t99)):
        assert compare.t_quantile(inside, degrees) == pytest.approx(t, abs=6e-4)
        assert compare.t_inside(-t, degrees) == pytest.approx(inside, abs=2e-4)
        assert compare.t_two_sided(t, degrees) == pytest.approx(1 - inside, abs=2e-4)


@pytest.mark.parametrize("degrees", [1, 2, 3, 6, 7, 33])
def test_students_t_is_the_integral_of_its_density(degrees):
    """Simpson's rule over the density in math.lgamma."""
    half = degrees / 2
    scale = math.exp(math.lgamma(half + 0.5) - math.lgamma(half)) / math.sqrt(degrees * math.pi)
    t = np.linspace(-1.7, 1.7, 2001)
    density = scale * (1 + t * t / degrees) ** -(half + 0.5)
    weights = np.array([1, *[4, 2] * 999, 4, 1]) * 3.4 / 2000 / 3
    assert compare.t_inside(1.7, degrees) == pytest.approx(weights @ density, abs=1e-9)


def test_holms_correction_equals_one_made_by_hand():
    """Sorted .005 .01 .03 .04 times 4 3 2 1; the last, .04, may not be below the one before."""
    assert compare.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert compare.holm([0.6, 0.7]) == [1.0, 1.0]
    assert compare.holm([]) == []


def test_the_pooled_spread_of_two_rows_and_two_seeds_equals_one_made_by_hand():
    """
    The residuals of 1.0 1.2 | 2.0 2.6 are +-0.1: 0.04 over one degree of freedom. Two seeds more
    by 5, a row with one run and a run that is not finished leave it as it is.
    """
    one = group_of({1: 1.0, 2: 1.2})
    other = group_of({1: 2.0, 2: 2.6})
    assert compare.pooled_spread([one, other]) == pytest.approx((0.2, 1))
    shifted = group_of({1: 7.0, 2: 2.6 + 5.0})
    assert compare.pooled_spread([one, shifted]) == pytest.approx((0.2, 1))
    unfinished = group_of({1: 9.0, 2: 1.0})
    for run in unfinished.runs:
        run.settings["max_steps"] = 5
    rows = [one, other, group_of({2: 4.0}), unfinished]
    assert compare.pooled_spread(rows) == pytest.approx((0.2, 1))
    assert compare.pooled_spread([one]) == compare.pooled_spread([]) == (0.0, 0)


def test_the_pooled_spread_of_incomplete_rows_equals_what_alternating_means_leave():
    """Row and seed means are taken away in turn until nothing changes: 5 rows, 4 seeds, 4 gaps."""
    draw = random.Random(1)
    missing = {(0, 3), (1, 0), (2, 1), (4, 3)}
    losses = {
        (i, seed): i + 0.3 * seed + draw.gauss(0, 0.1)
        for i in range(5)
        for seed in range(4)
        if (i, seed) not in missing
    }
    rows = [{seed: x for (j, seed), x in losses.items() if j == i} for i in range(5)]
    found, degrees = compare.pooled_spread([group_of(row) for row in rows])
    for _ in range(500):
        for axis in (0, 1):
            for one in range(5):
                some = [key for key in losses if key[axis] == one]
                if some:
                    mean = statistics.fmean(losses[key] for key in some)
                    losses |= {key: losses[key] - mean for key in some}
    assert degrees == 16 - (5 + 4 - 1)
    assert found == pytest.approx(math.sqrt(sum(x * x for x in losses.values()) / degrees))


def test_a_difference_has_the_interval_and_the_mark_of_its_family_made_by_hand():
    """
    Three rows over three seeds. Losses less row and seed means:
        a  0  0  0           row 1.0, seeds 0 0 0
        b  .01 -.01 0        row 0.9
        c  -.01 .01 0        row 0.99
    The squares sum to 4e-4 over (3 - 1) (3 - 1) degrees of freedom: sd 0.01, error of a difference
    0.01 sqrt(2 / 3), t(0.95, 4) = 2.776. b - a: t = 12.25, p = 0.00026; c - a: t = 1.22, p = 0.29.
    """
    a = group_of({1: 1.0, 2: 1.0, 3: 1.0})
    b = group_of({1: 0.91, 2: 0.89, 3: 0.9})
    c = group_of({1: 0.98, 2: 1.0, 3: 0.99})
    found = compare.differences([[(b, a)], [(c, a)]], [a, b, c], [a, b, c])
    assert [x.mean for x in found] == pytest.approx([-0.1, -0.01])
    assert [x.degrees for x in found] == [4, 4]
    assert [x.half_width for x in found] == pytest.approx(
        [2.776 * 0.01 * math.sqrt(2 / 3)] * 2, 1e-3
    )
    assert [x.p for x in found] == pytest.approx([2 * 0.000255, 0.288], rel=0.01)
    assert [str(x) for x in found] == ["-0.1000 +- 0.0227 *", "-0.0100 +- 0.0227"]
    marked = [str(compare.Difference(-0.1, 0.01, 4, p))[-1] == "*" for p in (0.0499, 0.0501, None)]
    assert marked == [True, False, False]


def test_the_mean_of_several_pairs_has_the_error_of_that_mean():
    """Two pairs over two seeds: sd 0.2 (by hand above) sqrt(2/2 + 2/2) / 2."""
    one = group_of({1: 1.0, 2: 1.2})
    other = group_of({1: 2.0, 2: 2.6})
    found, gone = compare.differences([[(one, other), (one, other)], []], [one, other], [])
    assert gone is None and found.mean == pytest.approx(-1.2) and found.error is None
    table = [one, other]
    found, _ = compare.differences([[(one, other), (one, other)], []], [], table)
    assert (found.error, found.degrees) == pytest.approx((0.2 * math.sqrt(2) / 2, 1))


def test_a_family_with_too_few_degrees_of_freedom_takes_the_variance_of_the_table():
    """Five are enough: 2 rows of 6 seeds; 2 rows of 5 have four."""
    quiet = [{seed: row + 0.001 * (seed == 1) for seed in range(6)} for row in (1.0, 1.0)]
    quiet[0][0] = 1.002
    loud = [{seed: row + 0.1 * (-1) ** (seed + row) for seed in range(6)} for row in (1, 2)]
    table = [group_of(losses) for losses in quiet + loud]
    enough, _ = compare.pooled_spread(table[:2])
    of_all, all_degrees = compare.pooled_spread(table)
    found, = compare.differences([[(table[0], table[1])]], table[:2], table)  # fmt: skip
    assert (found.error, found.degrees) == pytest.approx((enough * math.sqrt(2 / 6), 5))
    fewer = [group_of({seed: x for seed, x in row.items() if seed}) for row in quiet]
    found, = compare.differences([[(fewer[0], fewer[1])]], fewer, table)  # fmt: skip
    assert found.degrees == all_degrees == 15 and of_all > 10 * enough
    assert found.error == pytest.approx(of_all * math.sqrt(2 / 5))


@pytest.mark.parametrize("a, b, expected", [
    ([1, 2, 3, 4], [10, 20, 30, 40], 1),
    ([1, 2, 3, 4], [4, 3, 2, 1], -1),
    ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 1 - 6 * 4 / (5 * 24)),  # 1 - 6 sum d^2 / (n (n^2 - 1))
    ([1, 2, 3, 4], [5, 6, 6, 9], 4.5 / math.sqrt(5 * 4.5)),  # ranks 1 2.5 2.5 4
    ([1, 2, 3], [7, 7, 7], math.nan),
])  # fmt: skip
def test_rank_correlation_equals_the_textbooks(a, b, expected):
    assert compare.spearman(a, b) == pytest.approx(expected, nan_ok=True)


def test_the_interval_of_a_rank_correlation_equals_one_made_by_hand():
    """atanh(.87) = 1.3331, sqrt((1 + .87^2 / 2) / 15) = .30315, times 1.96: 0.7389 to 1.9272."""
    expected = math.tanh(0.73892), math.tanh(1.92724)
    assert compare.spearman_interval(0.87, 18) == pytest.approx(expected, abs=1e-4)
    assert compare.spearman_interval(1.0, 18) is compare.spearman_interval(0.5, 3) is None


@pytest.mark.parametrize(
    "level, tokens", [(4.5, 150), (5.0, 100), (4.0, 200), (9.0, 20), (12.0, 0), (3.9, 275)]
)
def test_tokens_to_a_loss_are_interpolated_between_evaluations(level, tokens):
    """The first crossing counts: the curve comes back up in between."""
    curve = [(0, 10.0), (100, 5.0), (200, 4.0), (250, 4.3), (300, 3.5)]
    assert compare.tokens_to_reach(curve, level) == pytest.approx(tokens)
    assert compare.tokens_to_reach(curve, 3.4) is None


# ---------------------------------------------------------------------------------- rows and table


def test_seeds_of_one_experiment_are_one_row_with_hand_computed_figures(tmp_path):
    """
    Tokens to gated's last loss, 4.0 and 4.2, are 300 and 320 of 400. exo - gated is -0.5 and -0.2;
    with row and seed means away 0.075 is left of each of the four losses, sd 0.15 over one degree
    of freedom, whose t is 12.706: half of the interval is 12.706 * 0.15 * sqrt(2 / 2).
    """
    curves = {
        ("gated", 1): (5.0, 4.0),
        ("gated", 2): (5.0, 4.2),
        ("exo", 1): (4.5, 3.5),
        ("exo", 2): (4.5, 4.0),
    }
    folders = [
        write_run(tmp_path / f"{variant}{seed}", [(0, 8.0), (200, x), (400, y)], variant, seed)
        for (variant, seed), (x, y) in curves.items()
    ]
    found, text = cells(folders)
    # embedding and head 2 * 320 * 8; a layer: qkvg, out 5 * 64, SwiGLU 6 * 64, norms 2 * 8 + 2 * 4,
    # 4 * 2 lambdas of 8; final norm 8; anchor 4 * 64 and 4 gains of 4
    parameters = 5120 + 2 * (320 + 384 + 24 + 64) + 8 + 256 + 16
    expected = {
        "runs": "2",
        "layers": "2",
        "parameters": f"{parameters:,}",
        "tokens": "400",
        "val loss": "3.7500",
        "sd": f"{math.sqrt(0.125):.4f}",
        "perplexity": f"{math.exp(3.75):.3f}",
        "paper's": "14.13",
        "loss - gated": "-0.3500 +- 1.9059",
        "tokens, gated / own": "1.29x (1.25 to 1.33)",
    }
    assert {name: found["exo", name] for name in expected} == expected
    assert found["gated", "loss - gated"] == "-" and ("exo", "loss - base") not in found
    assert "about row and seed, all 2 rows: 0.1500 (1 degrees of freedom)" in text
    assert "torch 9.9 | commit c0ffee" in text


def test_the_curve_of_a_row_is_the_mean_with_the_range_where_all_runs_were_evaluated():
    row = group_of({1: 4.0, 2: 4.1, 3: 4.5})
    for run, half in zip(row.runs, (5.0, 5.1, 5.5)):
        run.points.insert(0, [200, half])
    row.runs[0].points.insert(0, [100, 6.0])  # it alone
    expected = [(200, 5.2, 5.0, 5.5), (400, 4.2, 4.0, 4.5)]
    assert row.curve() == [pytest.approx(point) for point in expected]


def test_a_run_of_older_code_that_lacks_a_setting_is_of_the_same_experiment(tmp_path):
    folders = [
        write_run(tmp_path / f"exo{seed}", [(0, 8.0), (400, 4.0)], "exo", seed) for seed in (1, 2)
    ]
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
    """gated and exo both with AdamW are compared with each other, each with its own first row."""
    adamw = dict(optimizer="adamw")
    folders = [
        write_run(tmp_path / "a", [(0, 8.0), (400, 4.0)], "gated"),
        write_run(tmp_path / "b", [(0, 8.0), (400, 3.9)], "exo"),
        write_run(tmp_path / "c", [(0, 8.0), (400, 3.6)], "gated", **adamw),
        write_run(tmp_path / "d", [(0, 8.0), (400, 3.1)], "exo", **adamw),
        write_run(tmp_path / "e", [(0, 8.0), (400, 2.4)], "exo", model=dict(lambda_init=0.25)),
    ]
    found, _ = cells(folders)
    names = ["gated", "exo", "gated optimizer=adamw", "exo optimizer=adamw", "exo lambda_init=0.25"]
    assert [row for row, name in found if name == "runs"] == names
    first = "loss - first of its variant"
    assert found["exo optimizer=adamw", "loss - gated"] == "-0.5000"  # 3.1 - 3.6
    assert found["exo optimizer=adamw", first] == "-0.8000"  # 3.1 - 3.9
    assert found["exo lambda_init=0.25", "loss - gated"] == "-1.6000"  # 2.4 - 4.0: none is like it
    assert found["exo lambda_init=0.25", "paper's"] == found["gated", first] == "-"


def test_a_custom_model_is_named_by_its_folder_or_by_what_contradicts_the_row(tmp_path):
    points = [(0, 8.0), (400, 4.0)]
    narrowed = dict(mix="qk", anchor_norm="qk")
    folders = [
        write_run(tmp_path / "exo-mix=qk-seed1", points, "exo", model=narrowed),
        write_run(tmp_path / "mine-seed1", points, "exo", model={**narrowed, "anchor_norm": "q"}),
        write_run(tmp_path / "exo-anchor_norm=none-seed1", points, "exo_nonorm"),
    ]
    found, _ = cells(folders)
    names = ["exo mix=qk anchor_norm=qk", "mine", "exo anchor_norm=none"]
    assert [row for row, name in found if name == "runs"] == names
    alone = cells([write_run(tmp_path / "exo", points, "base")])[0]  # a name that is not true
    assert {row for row, _ in alone} == {"exo gate=False anchor=none mix=none anchor_norm=none"}


def test_two_custom_models_are_not_taken_for_one_variant(tmp_path):
    """Neither has anything to do with the other, so there is no difference between them."""
    model = {"one": dict(mix="q", anchor_norm=""), "two": dict(mix="k", anchor_norm="")}
    ends = {"one": 4.0, "two": 3.0}
    folders = [
        write_run(tmp_path / name, [(0, 8.0), (400, end)], "exo", model=model[name])
        for name, end in ends.items()
    ]
    found, _ = cells(folders)
    assert found["one", "val loss"] == "4.0000" and found["two", "val loss"] == "3.0000"
    assert not any(name == "loss - first of its variant" for _, name in found)


def test_a_last_evaluation_on_other_tokens_stays_out_of_curve_and_ratio(tmp_path):
    """base's 5.0 at 200 lies 3/4 of exo's way from 8 to 4."""
    folders = [
        write_run(
            tmp_path / variant, [(0, 8.0), (200, x), (400, y)], variant, final_eval_tokens=0
        )
        for variant, x, y in (("base", 5.0, 4.0), ("exo", 4.0, 3.9))
    ]  # fmt: skip
    found, text = cells(folders)
    assert compare.read_run(folders[1]).curve() == [(0, 8.0), (200, 4.0)]
    assert found["exo", "val loss"] == "3.9000" and found["exo", "tokens, base / own"] == "1.33x"
    assert "--final_eval_tokens" in text
    half = write_run(
        tmp_path / "half", [(0, 8.0), (200, 4.0)], "exo", max_steps=4, final_eval_tokens=0
    )
    assert compare.read_run(half).curve() == [(0, 8.0), (200, 4.0)]  # no last evaluation yet


@pytest.mark.parametrize("name, value", [
    ("data", "elsewhere"), ("eval_tokens", 96), ("final_eval_tokens", 96),
    ("mask_documents", False), ("tokenizer", "gpt2"), ("vocab_size", 384), ("block_size", 32),
])  # fmt: skip
def test_a_loss_that_is_another_quantity_is_compared_nowhere(tmp_path, name, value):
    """
    Neither with a baseline nor in the rank correlation, which over four rows is 1 and over three,
    without the odd one, 0.5.
    """
    ends = {("base", 1): 4.0, ("gated", 1): 4.1, ("naive", 1): 3.5}
    where = "model" if name in {f.name for f in fields(ModelConfig)} else None
    other = {where: {name: value}} if where else {name: value}
    odd = write_ends(tmp_path, {("exo", 1): 3.0}, **other)
    found, text = cells(write_ends(tmp_path, ends) + odd)
    assert found["exo", "val loss"] == "3.0000"
    assert found["exo", "loss - base"] == found["exo", "tokens, base / own"] == "-"
    assert f"exo: not compared with base, since measured with {name}={value}" in text
    line = next(line for line in text.split("\n") if "Spearman" in line)
    assert "+0.50 (all rows: 3)" in line


STEERS = """seed out_dir resume device compile deterministic batch_size save_every keep log_every
    sample_tokens""".split()
MEASURES = """data tokenizer vocab_size block_size mask_documents eval_tokens
    final_eval_tokens""".split()
CHANGES = """init_from dtype max_steps total_batch_size optimizer muon_lr muon_momentum muon_ramp
    muon_beta2 muon_dtype muon_fused adamw_lr weight_decay warmup_steps decay_fraction final_lr
    grad_clip z_loss eval_every n_layer n_head n_embd ffn_dim gate anchor mix anchor_norm
    granularity dynamic dynamic_dim lambda_init qk_norm norm_position window rope_theta""".split()


def test_every_setting_either_steers_a_run_or_makes_it_another_experiment():
    """A new setting must be put into one of the three lists; those that measure change it too."""
    names = {f.name for config in (TrainConfig, ModelConfig) for f in fields(config)}
    assert names == set(STEERS + MEASURES + CHANGES)
    for name in [*names, "max_minutes"]:  # the last is one of older code
        run = group_of({1: 3.0}).runs[0]
        run.settings = {"seed": 1, name: "something else"}
        assert (run.experiment == "{}") == (name in [*STEERS, "max_minutes"]), name
    assert set(compare.WHAT_IS_MEASURED) == set(MEASURES)


def test_a_loss_half_way_is_called_unfinished_and_not_subtracted_from_a_final_one(tmp_path):
    """Half way the evaluation may be on fewer tokens; the paper's order is without it too."""
    done = write_ends(tmp_path, {("base", 1): 4.0, ("gated", 1): 3.9, ("naive", 1): 3.8})
    half = write_run(tmp_path / "exo", [(0, 8.0), (200, 5.0)], "exo", max_steps=4)
    found, text = cells([*done, half])
    assert found["exo", "loss - base"] == "-" and found["gated", "loss - base"] == "-0.1000"
    assert "NOT FINISHED: exo is at step 2 of 4" in text
    assert "+1.00 (all rows: 3)" in text


def test_a_run_at_its_last_step_without_the_last_evaluation_is_not_finished(tmp_path):
    """It was killed while it evaluated: its newest loss is that of step 2."""
    base = write_run(tmp_path / "base", [(0, 8.0), (400, 4.0)], "base")
    killed = write_run(tmp_path / "exo", [(0, 8.0), (200, 5.0)], "exo", max_steps=4)
    with open(tmp_path / "exo" / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps(dict(step=4, tokens=400, loss=5.0)) + "\n")
    found, text = cells([base, killed])
    assert ("exo", "loss - base") not in found
    assert "NOT FINISHED: exo is at step 4 of 4" in text


def test_a_diverged_run_is_a_note_and_no_row(tmp_path):
    base = write_run(tmp_path / "base", [(0, 8.0), (400, 4.0)], "base")
    folder = write_run(tmp_path / "exo", [(0, 8.0), (200, 5.0)], "exo", max_steps=4)
    with open(tmp_path / "exo" / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps(dict(step=2, tokens=200, diverged=True)) + "\n")
    found, text = cells([base, folder])
    assert {row for row, _ in found} == {"base"} and "DIVERGED: exo after step 2" in text
    lines = compare.summarise(compare.read_runs(folder))[1]
    assert lines[0] == "no run to compare"


def test_the_agreement_with_the_paper_is_over_rows_of_table_3_and_within_kinds(tmp_path):
    """
    Paper: base 14.79, gated 14.64, naive 14.25, nuresformer_vg 14.24, nuresformer 14.15, exo 14.13.
    Ours has the last two exchanged, so 1 - 6 * 2 / (6 * 35) = 0.94 over all and, over the four with
    gate and anchor, 1 - 6 * 2 / (4 * 15) = 0.80. A row with a setting of its own would spoil it.
    """
    order = ["base", "gated", "naive", "nuresformer_vg", "exo", "nuresformer"]
    ends = {(name, 1): 5.0 - 0.1 * i for i, name in enumerate(order)}
    odd = write_run(tmp_path / "odd", [(0, 8.0), (400, 1.0)], "exo", optimizer="adamw")
    text = cells([*write_ends(tmp_path, ends), odd])[1]
    line = next(line for line in text.split("\n") if "Spearman" in line)
    r = 33 / 35
    half = 1.959964 * math.sqrt((1 + r * r / 2) / (6 - 3))
    low, high = (math.tanh(math.atanh(r) + sign * half) for sign in (-1, 1))
    assert f"+0.94 [{low:+.2f}, {high:+.2f}] (all rows: 6), +0.80 [" in line
    assert line.endswith("(a gate and an anchor: 4)")  # two of nuresformer's are too few


def test_the_kinds_of_rows_are_those_of_table_3():
    counts = {
        kind: sum(map(bool, map(belongs, TABLE_3))) for kind, belongs in compare.KINDS.items()
    }
    assert counts == {"all rows": 18, "a gate and an anchor": 15, "nuresformer's": 9}


def test_the_effect_of_an_idea_is_the_difference_of_two_rows_beside_the_papers(tmp_path):
    """
    exo - nuresformer is -0.5 and -0.3 in two seeds: sd 0.1 over one degree of freedom. A row with
    another learning rate is no row of Table 3.
    """
    ends = {
        ("nuresformer", 1): 4.0,
        ("nuresformer", 2): 4.0,
        ("exo", 1): 3.5,
        ("exo", 2): 3.7,
        ("gated", 1): 4.5,
    }
    other = write_ends(tmp_path / "other", {("exo", 1): 1.0}, muon_lr=0.02)
    runs = [run for path in write_ends(tmp_path, ends) + other for run in compare.read_runs(path)]
    headings, row = tables(compare.summarise(runs)[1])[1]
    assert headings == ["idea", "rows", "loss", "in the paper"]
    assert row == [
        "exogenous anchors in place of layer 1's",
        "exo - nuresformer",
        "-0.4000 +- 1.2706",  # 12.706 * 0.1 * sqrt(2 / 2)
        f"{math.log(14.13) - math.log(14.15):.4f}",
    ]


def test_one_lambda_against_many_is_the_mean_over_the_families_that_have_both(tmp_path):
    """0.1 better with exogenous, 0.3 with internal anchors; paper: 14.15/14.13, 14.17/14.15."""
    ends = {
        ("exo", 1): 3.0,
        ("exo_scalar", 1): 2.9,
        ("nuresformer", 1): 3.5,
        ("nuresformer_scalar", 1): 3.2,
        ("nuresformer_vg", 1): 3.9,
    }
    runs = [run for path in write_ends(tmp_path, ends) for run in compare.read_runs(path)]
    row = next(row for row in tables(compare.summarise(runs)[1])[1] if row[0].startswith("one lam"))
    paper = (math.log(14.15 / 14.13) + math.log(14.17 / 14.15)) / 2
    assert row[1:] == ["exo_scalar - exo and 1 pairs like it", "-0.2000", f"{paper:+.4f}"]


def test_each_row_at_its_best_rate_is_compared_over_the_seeds_that_all_rows_have(tmp_path):
    """
    exo is best at 0.02 over seeds 1 and 2; seed 3, which only 0.01 has, would make 0.01 the best.
    gated is best at 0.01. exo - gated: 3.0 - 3.7 and 3.2 - 3.7.
    """
    ends = {
        0.01: {
            **{("gated", 1): 3.7, ("gated", 2): 3.7},
            **{("exo", 1): 3.6, ("exo", 2): 3.6, ("exo", 3): 1.0},
        },
        0.02: {
            **{("gated", 1): 3.9, ("gated", 2): 3.9},
            **{("exo", 1): 3.0, ("exo", 2): 3.2},
        },
    }
    folders = [
        path
        for rate, some in ends.items()
        for path in write_ends(tmp_path / str(rate), some, muon_lr=rate, adamw_lr=0.3 * rate)
    ]
    found, text = cells(folders, best=["muon_lr", "adamw_lr"], tests=["exo - gated"])
    assert {row for row, _ in found} == {"exo", "gated"}
    assert found["exo", "val loss"] == "3.1000" and found["exo", "runs"] == "2"
    assert found["gated", "val loss"] == "3.7000"
    headings, row = tables(text.split("\n"))[1]
    assert headings == ["test", "pairs", "loss", "p (Holm)"]
    # sd 0.1 over one degree of freedom: t = 6, whose p is 1 - 2 / pi atan(6)
    expected = ["exo - gated", "2", "-0.6000 +- 1.2706", f"{1 - 2 / math.pi * math.atan(6):.4f}"]
    assert row == expected


def test_the_change_of_a_difference_is_tested_within_seeds_and_corrected_with_the_others(tmp_path):
    """
    Over seeds 1, 2, 3 the last losses of exo - gated are -0.9, -1.0, -1.1: mean -1, error
    0.1 / sqrt(3), t = -17.3; from 100 to 300 tokens the difference goes from -3, -3, -3 to -2.1,
    -2.2, -2.3: changes of 0.9, 0.8, 0.7, error again 0.1 / sqrt(3), t = 13.9. With two degrees of
    freedom p = 1 - t / sqrt(2 + t^2), and t(0.95) = 4.303. The last evaluation is on other tokens.
    """
    folders = []
    for seed, middle, last in ((1, 5.9, 4.1), (2, 5.8, 4.0), (3, 5.7, 3.9)):
        end = dict(seed=seed, final_eval_tokens=128)
        gated = [(0, 9.0), (100, 8.0 + seed), (300, 8.0), (400, 5.0)]
        exo = [(0, 9.0), (100, 5.0 + seed), (300, middle), (400, last)]
        folders.append(write_run(tmp_path / f"gated{seed}", gated, "gated", **end))
        folders.append(write_run(tmp_path / f"exo{seed}", exo, "exo", **end))
    folders.append(write_run(tmp_path / "base", [(0, 9.0), (400, 6.0)], "base"))  # not named
    tests = ["exo - gated", "exo - gated from 100 to 300"]
    headings, one, other = tables(cells(folders, tests=tests)[1].split("\n"))[-1]
    half = 4.303 * 0.1 / math.sqrt(3)
    p = [1 - t / math.sqrt(2 + t * t) for t in (10 * math.sqrt(3), 8 * math.sqrt(3))]
    assert headings == ["test", "pairs", "loss", "p (Holm)"]
    assert one == [tests[0], "3", f"-1.0000 +- {half:.4f} *", f"{max(2 * p[0], p[1]):.4f}"]
    assert other == [tests[1], "3", f"+0.8000 +- {half:.4f} *", f"{max(2 * p[0], p[1]):.4f}"]
    with pytest.raises(UserError, match="exo1 has no evaluation after 400 tokens on its curve"):
        cells(folders, tests=["exo - gated from 100 to 400"])
    with pytest.raises(UserError, match='"from 100" is not "from TOKENS to TOKENS"'):
        cells(folders, tests=["exo - gated from 100"])
    with pytest.raises(UserError, match="there is no row 'naive' among"):
        cells(folders, tests=["exo - naive from 100 to 300"])


def test_a_test_or_a_best_of_that_cannot_be_made_is_refused_in_one_line(tmp_path):
    folders = write_ends(tmp_path, {("exo", 1): 3.0, ("gated", 2): 4.0})
    with pytest.raises(UserError, match="there is no row 'base' among"):
        cells(folders, tests=["exo - base"])
    with pytest.raises(UserError, match="there is no row '' among"):
        cells(folders, tests=["exo"])
    with pytest.raises(UserError, match="--best_of=muon_lr: there is no seed that all rows have"):
        cells(folders, best=["muon_lr"])
    with pytest.raises(UserError, match="--best_of: there is no setting 'muon_rate'"):
        cells(folders, best=["muon_rate"])


# ------------------------------------------------------------------------------------------- files


def test_runs_of_a_gpu_can_be_compared_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = write_run(tmp_path / "exo", [(0, 8.0), (400, 4.0)], "exo", device="cuda")
    run = compare.read_run(folder)
    assert run.loss == 4.0 and run.origin["machine"].endswith(" threads")


def test_the_machine_is_called_by_its_processor_where_the_system_knows_it():
    found = []
    if os.path.exists("/proc/cpuinfo"):
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
        found = re.findall(r"^model name\s*: (.*)$", text, re.M)
    if not found:
        pytest.skip("this system does not name its processor in /proc/cpuinfo")
    assert compare.machine_name("cpu").startswith(f"{found[0].strip()}, {os.cpu_count()} cores, ")


def test_without_git_the_commit_is_unknown(monkeypatch):
    def missing(command, **how):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(compare.subprocess, "run", missing)
    assert compare.circumstances.__wrapped__()["commit"] == "unknown"


def test_a_damaged_checkpoint_is_passed_over_as_train_py_does(tmp_path):
    folder = write_run(tmp_path / "exo", [(0, 8.0), (400, 4.0)], "exo", seed=7)
    (tmp_path / "exo" / "ckpt_000005.pt").write_bytes(b"cut short")
    assert compare.read_run(folder).seed == 7


def test_settings_are_those_of_the_newest_checkpoint(tmp_path):
    """A resumed run may have been given more steps and another rate."""
    write_run(tmp_path / "exo", [(0, 8.0), (200, 5.0)], "exo", muon_lr=0.02)
    folder = write_run(tmp_path / "exo", [(0, 8.0), (200, 5.0), (400, 4.0)], "exo", muon_lr=0.03)
    assert len(os.listdir(folder)) == 3  # two checkpoints and the log
    run = compare.read_run(folder)
    assert (run.settings["muon_lr"], run.settings["max_steps"], run.finished) == (0.03, 4, True)


def test_a_row_of_runs_that_came_unequally_far_says_the_least_of_their_tokens():
    far = group_of({1: 4.0}, tokens=400)
    near = group_of({2: 4.0}, tokens=300)
    row = compare.Group("exo", {}, far.runs + near.runs)
    assert compare.rows_of([row])[0]["tokens"] == "300"


def test_one_table_comes_from_the_files_of_two_seeds_of_which_one_is_unfinished(
    tmp_path, call, monkeypatch, capsys
):
    """It is that of the run folders; what only seed 1 has is compared over seed 1."""
    ends = {
        ("base", 1): 4.0,
        ("gated", 1): 3.9,
        ("exo", 1): 3.5,
        ("resformer", 1): 3.6,
        ("base", 2): 4.2,
        ("gated", 2): 4.0,
        ("exo", 2): 3.6,
    }
    folders = write_ends(tmp_path, ends)
    files = [tmp_path / f"seed{seed}.jsonl" for seed in (1, 2)]
    for seed, file in enumerate(files, 1):
        call(
            compare.main,
            *(folder for folder in folders if folder.endswith(str(seed))),
            f"--out={file}",
        )
    assert [len(file.read_text(encoding="utf-8").splitlines()) for file in files] == [4, 3]
    found, text = cells(folders)
    monkeypatch.setattr(
        compare, "circumstances", lambda device: pytest.fail("the machine that reads is not asked")
    )
    capsys.readouterr()
    call(compare.main, *files)
    assert capsys.readouterr().out == text + "\n"
    assert found["exo", "loss - base"].startswith("-0.5500 +- ")
    assert (found["exo", "val loss"], found["exo", "sd"]) == ("3.5500", "0.0707")
    assert found["resformer", "runs"] == "1"
    assert found["resformer", "loss - base"].startswith("-0.4000 +- ")
    one = (8 - 3.5) / (8 - 4.0)  # the way of exo to 400 tokens over that to base's last loss
    two = (8 - 3.6) / (8 - 4.2)
    ratio = f"{(one + two) / 2:.2f}x ({one:.2f} to {two:.2f})"
    assert found["exo", "tokens, base / own"] == ratio
    assert found["resformer", "tokens, base / own"] == "1.10x"  # 4.4 / 4


def test_a_file_of_runs_needs_no_last_line_end(tmp_path, call):
    file = tmp_path / "runs.jsonl"
    folder = write_run(tmp_path / "exo", [(0, 8.0), (400, 4.0)], "exo")
    call(compare.main, folder, f"--out={file}")
    file.write_text(file.read_text(encoding="utf-8").rstrip("\n"), encoding="utf-8")
    (run,) = compare.read_runs(str(file))
    assert run.loss == 4.0


def test_a_torn_last_line_is_left_out_and_any_other_bad_line_named(tmp_path):
    folder = write_run(tmp_path / "r", [(0, 8.0), (400, 4.0)])
    with open(tmp_path / "r" / "log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"step": 5, "tok')
    assert compare.read_run(folder).step == 4
    with open(tmp_path / "r" / "log.jsonl", "a", encoding="utf-8") as log:
        log.write("\n")
    with pytest.raises(UserError, match="log.jsonl, line 5: not a JSON record"):
        compare.read_run(folder)


@pytest.mark.parametrize("record, name", [
    ({"step": 5, "val_loss": 3.0}, "tokens"), ({"tokens": 5, "val_loss": 3.0}, "step"),
    ({"step": 5, "tokens": "500", "val_loss": 3.0}, "tokens"),
    ({"step": 5, "tokens": 500, "val_loss": None}, "val_loss"),
    ({"step": True, "tokens": 500, "loss": 3.0}, "step"),
])  # fmt: skip
def test_a_record_without_its_numbers_is_named_by_file_line_and_field(tmp_path, record, name):
    folder = write_run(tmp_path / "r", [(0, 8.0), (400, 4.0)])
    with open(tmp_path / "r" / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=f"r/log.jsonl, line 5: '{name}' is no number"):
        compare.read_run(folder)


def test_a_log_without_an_evaluation_is_refused_in_one_line(tmp_path):
    folder = write_run(tmp_path / "r", [])
    with pytest.raises(UserError, match="r: its log has no evaluation yet"):
        compare.read_run(folder)


@pytest.mark.parametrize("record", [{"step": 1}, dict.fromkeys(
    "name variant settings parameters step tokens points diverged origin".split(), 1)])  # fmt: skip
def test_a_file_that_out_did_not_write_is_refused_in_one_line(tmp_path, record):
    (tmp_path / "other.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="other.jsonl: not a file that --out wrote"):
        compare.read_runs(str(tmp_path / "other.jsonl"))


def test_one_experiment_twice_with_one_seed_is_refused(tmp_path, call):
    points = [(0, 8.0), (400, 4.0)]
    twins = [write_run(tmp_path / name, points, "exo") for name in ("exo", "again")]
    with pytest.raises(UserError, match="exo and again are one experiment with one seed"):
        call(compare.main, *twins)


# --------------------------------------------------------------------------------------- pictures


def test_variants_can_be_told_apart_without_colour_and_keep_their_style():
    """
    A second row of the same variant, or one of no row of Table 3, has a look that no row of
    Table 3 has; with the anchor removed a variant's marker is hollow.
    """
    looks = [
        {key: value for key, value in figures.variant_style(name).items() if key != "color"}
        for name in TABLE_3
    ]
    assert all(a != b for i, a in enumerate(looks) for b in looks[:i])
    rows = [
        ("gated", False),
        ("exo", False),
        ("gated", False),
        ("resformer", False),
        ("", False),
        ("exo", True),
    ]
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


def test_the_picture_has_a_curve_for_every_row_with_the_spread_as_a_band(
    tmp_path, call, monkeypatch
):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (paper/requirements.txt)")
    pages = []
    plain = figures.Page.finish
    monkeypatch.setattr(
        figures.Page, "finish", lambda page, path: pages.append(page) or plain(page, path)
    )
    runs = [
        write_run(tmp_path / f"{v}{s}", [(0, 8.0), (200, 5.0 + s / 10), (400, 4.0)], v, s)
        for v, s in (("base", 1), ("base", 2), ("exo", 1), ("exo", 2), ("gated", 1))
    ]
    call(compare.main, *runs, f"--png={tmp_path / 'c.png'}")
    axes = pages[0].axes[0]
    legend = [text.get_text() for text in pages[0].figure.legends[0].get_texts()]
    assert legend == ["base", "exo", "gated"]
    assert "bytes" in axes.get_xlabel() and "nats" in axes.get_ylabel()
    assert list(axes.lines[1].get_ydata()) == pytest.approx([5.15, 4.0])
    assert axes.lines[1].get_xdata().tolist() == pytest.approx([0.2, 0.4])
    assert axes.collections[1].get_paths()[0].vertices[:, 1].max() == pytest.approx(5.2)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_the_newest_checkpoint_is_that_of_the_largest_number(tmp_path):
    for step in (999_999, 1_000_000):
        save_checkpoint(str(tmp_path / f"ckpt_{step:06d}.pt"), dict(step=step))
    (tmp_path / "ckpt_best.pt").write_bytes(b"a copy of someone's own")
    assert compare.read_state(str(tmp_path))["step"] == 1_000_000
    assert compare.read_state(str(tmp_path / "nowhere")) == {}


# ------------------------------------------------------------------------------- what is committed


def committed(*kinds):
    """(groups, [{heading: text}] of their table) of files of results/."""
    paths = [HERE / "results" / f"{kind}.jsonl" for kind in kinds]
    groups = compare.group_runs([run for path in paths for run in compare.read_runs(str(path))])
    return groups, compare.rows_of(groups)


def lines_of(path):
    return (HERE / path).read_text(encoding="utf-8").splitlines()


def losses_in(*kinds):
    """{name of a sweep's folder without its seed: {seed: last loss}}, by json alone."""
    found = {}
    for kind in kinds:
        for line in lines_of(f"results/{kind}.jsonl"):
            run = json.loads(line)
            name, _, seed = run["name"].rpartition("-seed")
            found.setdefault(name, {})[int(seed)] = run["points"][-1][1]
    return found


SWEEP = "variant|layers|parameters|val loss|sd|perplexity|paper's|loss - base|loss - gated"
DEFAULT = "variant|layers|parameters|val loss|sd|perplexity|loss - base|loss - gated"
TOKENS = "variant|val loss|tokens, base / own|tokens, gated / own"
ABLATION = "variant|val loss|sd|loss - gated|loss - first of its variant"


@pytest.mark.parametrize("kinds, headings, wanted", [
    (["six", "rest", "control"], SWEEP, lambda label: True),
    (["six", "rest", "control"], TOKENS, lambda label: label != "base"),
    (["ablations"], ABLATION, lambda label: True),
    (["ablations", "rates"], ABLATION, lambda label: "muon_lr=" in label),
    (["adamw"], ABLATION, lambda label: True),
    (["three_seeds"], ABLATION, lambda label: True),
    (["default"], DEFAULT, lambda label: True),
    (["long"], "variant|val loss|loss - base|loss - gated", lambda label: True),
    (["long"], TOKENS, lambda label: label != "base"),
])  # fmt: skip
def test_results_hold_what_the_program_prints_for_the_committed_runs(kinds, headings, wanted):
    lines = lines_of("RESULTS.md")
    names = headings.split("|")
    assert f"| {' | '.join(names)} |" in lines
    for row in committed(*kinds)[1]:
        if wanted(row["variant"]):
            assert f"| {' | '.join(row[name] for name in names)} |" in lines


PLAN_MODELS = ["base", "gated", "exo", "exo-lambda_init=1.0", "exo-mix=vg-anchor_norm=vg"]
PLAN_MODELS += ["exo_dynamic"]
PLAN_RATES = ["-muon_lr=0.005-adamw_lr=0.0015", "", "-muon_lr=0.02-adamw_lr=0.006"]
PLAN_RATES += ["-muon_lr=0.04-adamw_lr=0.012"]


def test_results_hold_the_losses_of_the_plan_at_each_rate():
    """By json alone: mean and standard deviation over seeds 4, 5 and 6."""
    losses = losses_in("plan")
    lines = lines_of("RESULTS.md")
    for model in PLAN_MODELS:
        cells = []
        for rate in PLAN_RATES:
            found = [losses[model + rate][seed] for seed in (4, 5, 6)]
            cells.append(f"{statistics.fmean(found):.4f} ({statistics.stdev(found):.4f})")
        assert f"| {model.replace('-', ' ')} | {' | '.join(cells)} |" in lines


def test_results_hold_the_losses_of_the_second_plan():
    """By json alone: Muon's rate, mean and standard deviation over seeds 10, 11 and 12."""
    lines = lines_of("RESULTS.md")
    runs = list(map(json.loads, lines_of("results/best.jsonl")))
    for model in PLAN_MODELS:
        some = [run for run in runs if run["name"].rpartition("-seed")[0] == model]
        assert sorted(run["settings"]["seed"] for run in some) == [10, 11, 12]
        (rate,) = {run["settings"]["muon_lr"] for run in some}
        losses = [run["points"][-1][1] for run in some]
        cells = f"{rate} | {statistics.fmean(losses):.4f} | {statistics.stdev(losses):.4f}"
        assert f"| {model.replace('-', ' ')} | {cells} |" in lines


FIVE = ["gated - base", "exo - gated", "exo_dynamic - exo", "exo lambda_init=1.0 - exo"]
FIVE += ["exo mix=vg anchor_norm=vg - exo"]


@pytest.mark.parametrize("kind, rates, tests, seeds, degrees, t", [
    ("plan", PLAN_RATES, FIVE, (4, 5, 6), 10, 2.2281),
    ("plan", [""], FIVE[3:], (4, 5, 6, 7, 8, 9), 10, 2.2281),
    ("best", [""], FIVE, (10, 11, 12), 10, 2.2281),
])  # fmt: skip
def test_results_hold_the_tests_of_the_plans(kind, rates, tests, seeds, degrees, t):
    """The program's rows; differences and intervals a second time, by json and statistics alone."""
    lines = lines_of("RESULTS.md")
    losses = losses_in(kind)
    models = PLAN_MODELS if tests == FIVE else PLAN_MODELS[2:5]
    best = ("muon_lr", "adamw_lr") if tests == FIVE else ()
    chosen = {}
    for model in models:
        rows = [[losses[model + rate][seed] for seed in seeds] for rate in rates]
        chosen[model.replace("-", " ")] = min(rows, key=statistics.fmean)
    means = [statistics.fmean(column) for column in zip(*chosen.values())]
    left = 0
    for row in chosen.values():
        deviations = [x - mean for x, mean in zip(row, means)]
        left += statistics.variance(deviations) * (len(row) - 1)
    half = t * math.sqrt(left / degrees * 2 / len(seeds))
    for test in tests:
        first, _, second = test.partition(" - ")
        mean = statistics.fmean(chosen[first]) - statistics.fmean(chosen[second])
        start = f"| {test} | {len(seeds)} | {mean:+.4f} +- {half:.4f}"
        assert [line for line in lines if line.startswith(start)], start
    runs = compare.read_runs(str(HERE / "results" / f"{kind}.jsonl"))
    for row in printed_tests(runs, best, tests):
        assert row in lines


def test_results_hold_the_tests_of_the_longest_runs():
    """
    The program's rows; the paired t tests of dynamic mixing a second time, by json and statistics.
    """
    lines = lines_of("RESULTS.md")
    path = "results/pairs.jsonl"
    runs = list(map(json.loads, lines_of(path)))
    curves = {(run["variant"], run["settings"]["seed"]): dict(run["points"]) for run in runs}
    last = []
    change = []
    seeds = (10, 11, 12, 13)
    for seed in seeds:
        ahead = {t: x - curves["exo", seed][t] for t, x in curves["exo_dynamic", seed].items()}
        last.append(ahead[10_240_000])
        change.append(ahead[9_216_000] - ahead[1_024_000])
    readme = " ".join(lines_of("../README.md"))
    tests = ["exo_dynamic - exo", "exo_dynamic - exo from 1024000 to 9216000"]
    for test, values in zip(tests, (last, change)):
        mean = statistics.fmean(values)
        half = 3.1824 * statistics.stdev(values) / math.sqrt(4)  # t with 3 degrees of freedom
        start = f"| {test} | 4 | {mean:+.4f} +- {half:.4f} *"
        assert [line for line in lines if line.startswith(start)], start
        assert f"({abs(mean):.4f} +- {half:.4f}" in readme
    for row in printed_tests(compare.read_runs(str(HERE / path)), (), tests):
        assert row in lines
    by_seed = [f"| {seed} | {a:+.4f} | {b:+.4f} |" for seed, a, b in zip(seeds, last, change)]
    assert set(by_seed) <= set(lines)


def printed_tests(runs, best, tests):
    """The rows of the table of tests that compare.py prints, with single spaces."""
    printed = [" ".join(line.split()) for line in compare.summarise(runs, best, tests)[1]]
    begin = next(i for i, line in enumerate(printed) if line.startswith("| test |"))
    return printed[begin + 2 : begin + 2 + len(tests)]


def test_the_readme_holds_the_effect_of_each_idea_and_the_six_variants_losses():
    groups, rows = committed("six", "rest", "control")
    lines = lines_of("../README.md")
    ideas = compare.ideas_of(groups)
    assert len(ideas) == len(compare.IDEAS)
    for idea in ideas:
        assert f"| {' | '.join(idea.values())} |" in lines
    lines = [line for line in lines if line.count("|") == 11]  # the table of variants
    small = [line for row in rows for line in lines if line.startswith(f"| {row['variant']} |")]
    for row in rows:
        for line in small:
            if line.startswith(f"| {row['variant']} |"):
                assert line.endswith(f" {row['val loss']} |")
    assert len(small) >= 6


@pytest.mark.parametrize("kinds, baseline, heading, count", [
    (["six", "rest"], "base", "loss - base", 17),
    (["six", "rest"], "gated", "loss - gated", 17),
    (["ablations"], "exo", "loss - first of its variant", 21),
    (["three_seeds"], "nuresformer", "loss - first of its variant", 3),
    (["three_seeds"], "gated", "loss - gated", 8),
])  # fmt: skip
def test_committed_numbers_equal_a_second_computation(kinds, baseline, heading, count):
    """
    From the JSON by json and statistics alone; the spread by taking row and seed means away.
    """
    losses = losses_in(*kinds)
    rows = {frozenset(row["variant"].split()): row for row in committed(*kinds)[1]}
    family = {baseline: losses[baseline]}
    for name, some in losses.items():
        if heading in ("loss - base", "loss - gated") or name.startswith(f"{baseline}-"):
            family[name] = some
    left = {(name, seed): x for name, some in family.items() for seed, x in some.items()}
    seeds = {seed for _, seed in left}
    for _ in range(300):
        for axis, values in ((0, family), (1, seeds)):
            for value in values:
                mean = statistics.fmean(x for key, x in left.items() if key[axis] == value)
                left = {key: x - mean * (key[axis] == value) for key, x in left.items()}
    degrees = len(left) - len(family) - len(seeds) + 1
    spread = math.sqrt(sum(x * x for x in left.values()) / degrees)
    t = {6: 2.4469, 16: 2.1199, 21: 2.0796, 22: 2.0739, 23: 2.0687}[degrees]
    seen = 0
    for name, some in family.items():
        row = rows[frozenset(name.split("-"))]
        assert row["val loss"] == f"{statistics.fmean(some.values()):.4f}"
        assert row["sd"] == f"{statistics.stdev(some.values()):.4f}"
        if name != baseline:
            both = sorted(set(some) & set(losses[baseline]))
            mean = statistics.fmean(some[seed] - losses[baseline][seed] for seed in both)
            half = t * spread * math.sqrt(2 / len(both))
            assert row[heading].rstrip(" *") == f"{mean:+.4f} +- {half:.4f}"
            seen += 1
    assert seen == count


def test_the_readme_holds_what_the_default_sweep_gave():
    lines = lines_of("../README.md")
    names = ["variant", "val loss", "sd", "loss - base", "loss - gated"]
    assert f"| {' | '.join(names)} |" in lines
    rows = committed("default")[1]
    assert len(rows) == 6
    for row in rows:
        assert f"| {' | '.join(row[name] for name in names)} |" in lines


def test_results_hold_table_2_of_the_default_sweep():
    """Both seeds in a cell: averages over layers, and the loss with the anchor and without it."""
    lines = lines_of("RESULTS.md")
    records = []
    for kind in ("seed1", "seed2", "no_anchor"):
        records += map(json.loads, lines_of(f"results/table2_{kind}.jsonl"))
    for variant in ("base", "gated", "resformer", "nuresformer", "exo", "exo_dynamic"):
        whole = [r for r in records if r["variant"] == variant and not r["ablate_anchor"]]
        cut = [r for r in records if r["variant"] == variant and r["ablate_anchor"]]
        assert [r["label"] for r in whole] == [f"{variant}-seed{n}_ckpt_000500" for n in (1, 2)]
        assert len(cut) == (0 if variant in ("base", "gated") else 2)
        cells = []
        for name, digits in [
            ("attention_sink", 4),
            ("token_similarity", 3),
            ("pca_core_features", 1),
        ]:
            found = [statistics.fmean(record["by_layer"][name]) for record in whole]
            cells.append(", ".join(f"{value:.{digits}f}" for value in found))
        for some in (whole, cut):
            cells.append(", ".join(f"{record['cross_entropy']:.3f}" for record in some))
        assert f"| {variant} | {' | '.join(cells)} |".replace("|  |", "| |") in lines


def test_results_hold_the_norms_and_spikes_of_four_runs():
    """Typed as usage.py defines them, with the standard deviation of statistics."""
    lines = lines_of("RESULTS.md")

    def count_spikes(values):
        windows = [values[i - 50 : i] for i in range(50, len(values))]
        limits = [statistics.fmean(some) + 5 * statistics.pstdev(some) for some in windows]
        return sum(value > limit for value, limit in zip(values[50:], limits))

    for record in map(json.loads, lines_of("results/steps.jsonl")):
        norms = record["grad_norm"]
        high = np.percentile(norms, 99)
        cells = [record["run"], "300", f"{statistics.median(norms):.3f}", f"{high:.3f}"]
        cells += [f"{max(norms):.3f}", count_spikes(record["loss"]), count_spikes(norms)]
        assert f"| {' | '.join(map(str, cells))} |" in lines


def test_results_hold_the_numbers_of_the_longer_run():
    """Table 2's quantities over training: averages over the layers of four models in a cell."""
    lines = lines_of("RESULTS.md")
    records = [json.loads(line) for line in lines_of("results/long_use.jsonl")]
    steps = (0, 204_800, 409_600, 614_400, 1_228_800, 2_457_600, 5_120_000, 10_240_000)
    digits = {"attention_sink": 4, "token_similarity": 3, "pca_core_features": 0}

    def average(name, record, tokens, digits):
        at = record["tokens"].index(tokens)
        return f"{np.mean([layer[at] for layer in record['use'][name]]):.{digits}f}"

    for tokens in steps:
        shown = [
            ", ".join(average(name, record, tokens, places) for record in records)
            for name, places in digits.items()
        ]
        shown.append(", ".join(average(name, records[2], tokens, 2) for name in "qkvg"))
        assert f"| {tokens:,} | {' | '.join(shown)} |" in lines
