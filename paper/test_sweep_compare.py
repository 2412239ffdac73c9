"""
Tests of compare.py, usage.py, sweep.py and six_tasks.py.

No network. Tests that need lm_eval or matplotlib say so and are skipped where these are missing.
"""

import functools
import importlib.util
import json
import math
import os
import random
import signal
import sys
import threading
import types
from dataclasses import asdict

import numpy as np
import pytest
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..")]

import compare
import six_tasks
import sweep
import train
import usage
from model import VARIANTS, ExoFormer, variant_config
from prepare_fineweb import UserError, get_tokenizer, write_shard
from train import TrainConfig, fresh_settings, parse_flags

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
needs_matplotlib = pytest.mark.skipif(not compare.can_draw(), reason="matplotlib is not installed")
SMALL = dict(n_layer=1, n_head=2, n_embd=8, vocab_size=320, block_size=16, tokenizer="bytes")

# ---- compare ----


def write_run(folder, points, variant=None, seed=1, ms=100.0, max_steps=None, model=(), **settings):
    """A run folder with evaluations at points [(tokens, loss)], 100 tokens a step; with a variant a checkpoint too."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "log.jsonl"), "w") as log:
        for tokens, loss in points:
            record = dict(step=tokens // 100, tokens=tokens, val_loss=loss, **(dict(ms=ms) if tokens else {}))
            record |= dict(attention_sink=[0.1 * seed, loss], lambda_ratio=dict(v=[None, loss / seed]))
            log.write(json.dumps(record) + "\n")
    if variant:
        max_steps, config = max_steps or points[-1][0] // 100, variant_config(variant, **{**SMALL, **dict(model)})
        train_config = TrainConfig(
            **{"seed": seed, "max_steps": max_steps, "eval_tokens": 64, "final_eval_tokens": 64, **settings}
        )
        torch.save(dict(train_config=asdict(train_config), model_config=asdict(config)),
                   os.path.join(folder, f"ckpt_{points[-1][0] // 100:06d}.pt"))
    return str(folder)


@pytest.mark.parametrize("level, tokens", [(4.5, 150), (5.0, 100), (4.0, 200), (9.0, 20), (12.0, 0), (3.9, None)])
def test_tokens_to_a_loss_are_interpolated_between_evaluations(level, tokens):
    assert compare.tokens_to_reach([(0, 10.0), (100, 5.0), (200, 4.0)], level) == (
        None if tokens is None else pytest.approx(tokens)
    )


def test_the_first_crossing_counts_where_a_curve_comes_back_up():
    assert compare.tokens_to_reach([(0, 5.0), (100, 3.0), (200, 4.0), (300, 2.0)], 3.5) == pytest.approx(75)


def test_ratio_is_the_baselines_tokens_over_tokens_to_its_final_loss(tmp_path):
    base = write_run(tmp_path / "base", [(0, 8.0), (200, 5.0), (400, 4.0)])
    fast = write_run(tmp_path / "fast", [(0, 8.0), (200, 4.5), (400, 3.5)])  # 4.0 at 300 tokens
    slow = write_run(tmp_path / "slow", [(0, 8.0), (200, 6.0), (400, 5.0)])
    _, _, rows, _ = compare.summarise([slow, base, fast], baseline="base")
    assert [row["label"] for row in rows] == ["slow", "base", "fast"]
    assert [row["token_ratio"] for row in rows] == [None, pytest.approx(1.0), pytest.approx(400 / 300)]


def test_seeds_of_one_experiment_are_one_row_with_hand_computed_figures(tmp_path):
    losses = {("base", 1): 4.0, ("base", 2): 4.2, ("exo", 1): 3.7, ("exo", 2): 4.1}
    folders = [
        write_run(tmp_path / f"{v}{s}", [(0, 8.0), (400, loss)], v, s, ms=50.0 * s) for (v, s), loss in losses.items()
    ]
    groups, base, rows, _ = compare.summarise(folders)
    exo = rows[1]
    assert base.label == "base" and [row["label"] for row in rows] == ["base", "exo"] and exo["runs"] == 2
    assert exo["val_loss"] == pytest.approx(3.9) and exo["val_ppl"] == pytest.approx(math.exp(3.9))
    assert exo["spread"] == pytest.approx(math.sqrt(0.08))  # of 3.7 and 4.1
    assert exo["difference"] == pytest.approx(-0.2) and exo["difference_error"] == pytest.approx(0.1)  # of -0.3, -0.1
    assert exo["tokens_per_second"] == pytest.approx((2000 + 1000) / 2)
    # embedding and head 2 * 320 * 8; layer: qkvg, out 5 * 64, SwiGLU 6 * 64, norms 2 * 8 + 2 * 4, 4 * 2 lambdas of 8;
    # final norm 8; anchor 4 * 64 and 4 gains of 4
    assert exo["parameters"] == 5120 + 320 + 384 + 24 + 64 + 8 + 256 + 16
    assert groups[1].curve()[-1] == (400, pytest.approx(3.9), 3.7, 4.1)


def test_what_differs_between_runs_of_a_variant_becomes_their_name(tmp_path):
    points = [(0, 8.0), (400, 4.0)]
    runs = [write_run(tmp_path / "a", points, "exo", 1),
            write_run(tmp_path / "b", points, "exo", 1, optimizer="adamw"),
            write_run(tmp_path / "c", points, "exo", 1, model=dict(lambda_init=0.25)),
            write_run(tmp_path / "odd-seed3", points, "exo", 3, model=dict(anchor_norm="qk"))]
    labels = [row["label"] for row in compare.summarise(runs)[2]]
    assert labels == ["exo optimizer=muon lambda_init=None", "exo optimizer=adamw lambda_init=None",
                      "exo optimizer=muon lambda_init=0.25", "odd"]


def test_a_last_evaluation_on_other_tokens_stays_out_of_curve_and_ratio(tmp_path):
    same = write_run(tmp_path / "base", [(0, 8.0), (200, 5.0), (400, 4.0)], "base", eval_tokens=64, final_eval_tokens=0)
    other = write_run(tmp_path / "exo", [(0, 8.0), (200, 4.0), (400, 3.9)], "exo", eval_tokens=64, final_eval_tokens=0)
    groups, _, rows, remarks = compare.summarise([same, other])
    assert [tokens for tokens, *_ in groups[1].curve()] == [0, 200] and rows[1]["val_loss"] == 3.9
    assert rows[1]["token_ratio"] == pytest.approx(200 / 150)  # 5.0 lies 3/4 of the way to 200
    assert sum("--final_eval_tokens" in remark for remark in remarks) == 2


def test_an_unfinished_run_is_called_so(tmp_path):
    run = write_run(tmp_path / "base", [(0, 8.0), (400, 4.0)], "base", max_steps=10)
    assert any("step 4 of 10" in remark for remark in compare.summarise([run])[3])


def test_a_torn_last_line_is_left_out_and_any_other_bad_line_named(tmp_path):
    folder = write_run(tmp_path / "r", [(0, 8.0), (400, 4.0)])
    with open(tmp_path / "r" / "log.jsonl", "a") as log:
        log.write('{"step": 5, "tok')
    assert compare.read_run(folder).step == 4
    with open(tmp_path / "r" / "log.jsonl", "a") as log:
        log.write("\n")
    with pytest.raises(UserError, match="log.jsonl, line 3: not a JSON record"):
        compare.read_run(folder)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: os.mkdir(path)])
def test_a_folder_without_a_log_is_refused_in_one_line(tmp_path, make):
    make(tmp_path / "none")
    with pytest.raises(SystemExit, match=r"compare.py: .*log.jsonl: cannot be read"):
        compare.main([str(tmp_path / "none")])


def test_variants_can_be_told_apart_without_colour():
    looks = [{k: v for k, v in compare.variant_style(name).items() if k != "color"} for name in VARIANTS]
    assert all(a != b for i, a in enumerate(looks) for b in looks[:i])
    lines = [compare.variant_style(name)["linestyle"] for name in sweep.SIX]
    assert all(a != b for i, a in enumerate(lines) for b in lines[:i])


@needs_matplotlib
def test_the_picture_has_a_curve_for_every_group_and_labelled_axes(tmp_path, monkeypatch):
    from matplotlib import pyplot

    kept, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", kept.append)
    runs = [write_run(tmp_path / f"{v}{s}", [(0, 8.0), (200, 5.0 + s / 10), (400, 4.0)], v, s)
            for v in ("base", "exo")
            for s in (1, 2)]
    compare.main(runs + [f"--png={tmp_path / 'c.png'}"])
    axes = kept[0].axes[0]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["base", "exo", "last of base"] and "tokens" in axes.get_xlabel() and "loss" in axes.get_ylabel()
    assert list(axes.lines[1].get_ydata()) == pytest.approx([5.15, 4.0])
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    close(kept[0])


@pytest.mark.parametrize("other", [dict(data="elsewhere"), dict(eval_tokens=96, final_eval_tokens=96)])
def test_losses_on_other_data_are_not_compared(tmp_path, other):
    runs = [write_run(tmp_path / "base", [(0, 8.0), (400, 4.0)], "base"),
            write_run(tmp_path / "exo", [(0, 8.0), (400, 3.0)], "exo", **other)]
    _, _, rows, remarks = compare.summarise(runs)
    assert rows[1]["val_loss"] == 3.0 and rows[1]["difference"] is None and rows[1]["token_ratio"] is None
    assert any(f"exo: not compared with the baseline, since it was measured with {list(other)[0]}=" in remark
               for remark in remarks)


def test_a_loss_half_way_is_not_subtracted_from_a_final_one(tmp_path):
    """Half way the evaluation may have been on fewer tokens."""
    runs = [write_run(tmp_path / "base", [(0, 8.0), (400, 4.0)], "base"),
            write_run(tmp_path / "exo", [(0, 8.0), (200, 5.0)], "exo", max_steps=4)]
    assert compare.summarise(runs)[2][1]["difference"] is None


def test_a_baseline_that_is_not_there_and_a_run_given_twice_are_refused(tmp_path):
    run = write_run(tmp_path / "exo", [(0, 8.0), (400, 4.0)], "exo")
    twin = write_run(tmp_path / "again", [(0, 8.0), (400, 3.0)], "exo")
    with pytest.raises(SystemExit, match="--baseline=gatd: no run is of it; there are exo"):
        compare.main([run, "--baseline=gatd"])
    with pytest.raises(SystemExit, match="exo and .*again are one experiment with one seed"):
        compare.main([run, twin])


def test_a_variant_keeps_its_style_whatever_stands_beside_it():
    """A second row of the same variant, or one of no row of Table 3, takes a look that nobody here has."""
    groups = [compare.Group(label, [types.SimpleNamespace(variant=variant)]) for label, variant in (
        ("gated", "gated"), ("gated wide", "gated"), ("resformer", "resformer"), ("odd", ""), ("base", "base"))]
    styles = compare.styles_of(groups)
    for i in (0, 2, 4):
        assert styles[i] == compare.variant_style(groups[i].variant)
    assert len({style["marker"] for style in styles}) == 5


# ---- usage ----


def test_usage_is_the_mean_over_seeds_where_all_were_evaluated(tmp_path):
    """Values by layer and evaluation; a layer that does not mix v has none, and no run here has a gate."""
    two = dict(n_layer=2)
    folders = [write_run(tmp_path / "a", [(0, 8.0), (100, 6.0), (200, 4.0)], "resformer", 1, model=two),
               write_run(tmp_path / "b", [(0, 8.0), (200, 2.0)], "resformer", 2, model=two)]
    group, = compare.group_runs([compare.read_run(folder) for folder in folders])
    found = usage.usage_of_group(group)
    assert set(found) == {"attention_sink", "v"}
    assert found["v"][0].tolist() == [0, 200] and np.isnan(found["v"][1][0]).all()
    np.testing.assert_allclose(found["v"][1][1], [(8 / 1 + 8 / 2) / 2, (4 / 1 + 2 / 2) / 2])
    np.testing.assert_allclose(found["attention_sink"][1], [[0.15, 0.15], [8.0, 3.0]])
    assert list(usage.table_of([group], [found]))[1].split() == ["resformer", "1.5750", "-", "-", "-", "2.5000", "-"]


def test_usage_of_a_log_without_it_is_refused_in_one_line(tmp_path, capsys):
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "log.jsonl").write_text('{"step": 1, "tokens": 100, "val_loss": 4.0}\n')
    with pytest.raises(SystemExit, match="old: its log does not say how layers use their anchor"):
        usage.main([str(folder)])
    with pytest.raises(SystemExit, match="nowhere/a.png: its folder does not exist"):
        usage.main([str(folder), "--png=nowhere/a.png"])


@needs_matplotlib
def test_usage_picture_has_a_map_of_each_run_and_one_scale_for_each_column(tmp_path, monkeypatch):
    maps, plain = [], usage.draw_map
    monkeypatch.setattr(usage, "draw_map", lambda *given: maps.append(given[1:]) or plain(*given))
    runs = [write_run(tmp_path / str(n), [(0, 1.0), (400, n)], "exo", 1, model=dict(n_layer=n)) for n in (2, 3)]
    usage.main([*runs, f"--png={tmp_path / 'usage.png'}"])
    assert [(tokens.tolist(), values[1].tolist()) for tokens, values, _ in maps] == [
        ([0, 400], [1.0, n]) for _ in ("sink", "ratio of v") for n in (2, 3)]
    scales = [tuple(limits) for *_, limits in maps]
    assert scales[0] == scales[1] != scales[2] == scales[3] and scales[2][0] >= 1.0 and 2.5 < scales[2][1] <= 3.0
    assert (tmp_path / "usage.png").stat().st_size > 10_000


# ---- sweep ----


class FakeTrain:
    """Stands in for `python train.py`: writes what a run leaves behind and keeps the command lines. ends: {name: (exit
    code, step reached)} for runs that do not finish at once."""

    def __init__(self, ends):
        self.ends, self.commands = ends, []

    def __call__(self, command):
        flags = dict(part.removeprefix("--").split("=", 1) for part in command[2:])
        name = os.path.basename(flags["out_dir"])
        code, step = self.ends.pop(name, (0, int(flags["max_steps"])))
        self.commands.append((name, flags.get("resume") == "true"))
        assert flags.get("resume") == "true" or not os.path.exists(os.path.join(flags["out_dir"], "log.jsonl"))
        loss = {"base": 4.0, "exo": 3.0}[flags["variant"]] + int(flags["seed"]) / 10
        write_run(flags["out_dir"], [(0, 8.0), (100 * step, loss)])
        model_config, config = fresh_settings(*parse_flags([part for part in command[2:] if "resume" not in part]))
        torch.save(dict(train_config=asdict(config), model_config=asdict(model_config)),
                   os.path.join(flags["out_dir"], f"ckpt_{step:06d}.pt"))
        return code


def stand_in(monkeypatch, fake):
    """Run `fake` in place of train.py, and draw nothing, which saves seconds."""
    monkeypatch.setattr(sweep, "run_to_end", fake)
    monkeypatch.setattr(compare, "can_draw", lambda: False)


@pytest.fixture
def data(tmp_path):
    """A folder of byte-level shards."""
    folder = tmp_path / "data"
    os.mkdir(folder)
    text = np.frombuffer(("the cat sat on the mat. " * 200).encode(), np.uint8).astype(np.uint16)
    for split in ("train", "val"):
        write_shard(str(folder / f"text_{split}_000000.bin"), np.append(np.uint16(256), text))
    (folder / "meta.json").write_text('{"tokenizer": "bytes"}')
    return str(folder)


def arguments(data, out, *flags):
    return [f"--data={data}", f"--out_dir={out}", "--variants=base,exo", "--seeds=1,2", *flags, "--", "--n_layer=10",
            "--max_steps=20"]


NAMES = ["base-seed1", "exo-seed1", "base-seed2", "exo-seed2"]


def test_a_sweep_stopped_in_the_middle_goes_on_where_it_stopped(tmp_path, data, monkeypatch, capsys):
    fake = FakeTrain({"exo-seed1": (143, 10)})
    stand_in(monkeypatch, fake)
    with pytest.raises(SystemExit) as stopped:
        sweep.main(arguments(data, tmp_path / "s"))
    assert stopped.value.code == 143 and fake.commands == [("base-seed1", False), ("exo-seed1", False)]
    assert "not finished: exo-seed1" in (tmp_path / "s" / "table.md").read_text()
    fake.commands.clear()
    sweep.main(arguments(data, tmp_path / "s"))
    assert fake.commands == [("exo-seed1", True), ("base-seed2", False), ("exo-seed2", False)]
    fake.commands.clear()
    sweep.main(arguments(data, tmp_path / "s"))
    assert fake.commands == []
    rows = json.loads((tmp_path / "s" / "table.json").read_text())["rows"]
    assert [(r["label"], r["runs"], r["layers"]) for r in rows] == [("base", 2, 11), ("exo", 2, 10)]
    assert [r["val_loss"] for r in rows] == pytest.approx([4.15, 3.15])
    assert [r["spread"] for r in rows] == pytest.approx([math.sqrt(0.005)] * 2)
    table = (tmp_path / "s" / "table.md").read_text()
    assert "not finished" not in table and table in capsys.readouterr().out.replace("\r", "")


def test_a_run_killed_before_its_first_checkpoint_starts_anew(tmp_path, data, monkeypatch):
    fake = FakeTrain({})
    stand_in(monkeypatch, fake)
    os.makedirs(tmp_path / "s" / "base-seed1")
    (tmp_path / "s" / "base-seed1" / "log.jsonl").write_text('{"step": 1, "tokens": 100, "ms": 3.0}\n')
    sweep.main(arguments(data, tmp_path / "s"))
    assert fake.commands == [(name, False) for name in NAMES]


def test_a_diverged_run_is_named_and_the_others_go_on(tmp_path, data, monkeypatch, capsys):
    stand_in(monkeypatch, FakeTrain({"exo-seed1": (3, 10)}))
    sweep.main(arguments(data, tmp_path / "s"))
    assert "diverged: exo-seed1" in capsys.readouterr().out
    assert [r["runs"] for r in json.loads((tmp_path / "s" / "table.json").read_text())["rows"]] == [2, 1]


def test_a_folder_with_a_run_of_other_settings_is_refused(tmp_path, data, monkeypatch):
    """Else a finished run would be taken for one of the new sweep."""
    stand_in(monkeypatch, FakeTrain({}))
    sweep.main(arguments(data, tmp_path / "s"))
    monkeypatch.setattr(sweep, "run_to_end", lambda command: pytest.fail("a run was started"))
    with pytest.raises(SystemExit, match="base-seed1 holds a run with muon_lr=0.01, but now muon_lr=0.5"):
        sweep.main([*arguments(data, tmp_path / "s"), "--muon_lr=0.5"])
    sweep.main([*arguments(data, tmp_path / "s"), "--log_every=7"])               # changes nothing that is measured


def test_without_data_a_sweep_learns_pythons_own_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "write_default_shards", lambda folder: os.makedirs(folder))
    jobs = sweep.plan(sweep.parse_arguments(["--variants=exo"]))
    assert [job.settings["data"] for job in jobs] == ["data/python_stdlib"]


@pytest.mark.parametrize("flags, words", [(["--seeds=1,1"], "different whole numbers"),
                                          (["--seeds=x"], "different whole numbers"),
                                          (["--ablation=optimizer", "--variants=exo"], "not allowed with")])
def test_usage_errors_are_one_line(capsys, flags, words):
    with pytest.raises(SystemExit, match="2"):
        sweep.main(flags)
    assert words in capsys.readouterr().err


def test_a_sweep_keeps_a_second_one_out_of_its_folder(tmp_path, data, monkeypatch):
    stand_in(monkeypatch, FakeTrain({}))
    with sweep.locked(str(tmp_path / "s")), pytest.raises(SystemExit, match="another run is writing here"):
        sweep.main(arguments(data, tmp_path / "s"))


@pytest.mark.parametrize("flags, message",
                         [(["--", "--seed=3"], "--seed: the sweep sets it itself"), (["--", "--n_embd=7"], "n_embd=7"),
                          (["--", "--preset=paper"], "--preset: the sweep sets it")])
def test_what_train_would_refuse_is_refused_before_the_first_run(tmp_path, data, monkeypatch, flags, message):
    monkeypatch.setattr(sweep, "run_to_end", lambda command: pytest.fail("a run was started"))
    with pytest.raises(SystemExit, match=message):
        sweep.main([f"--data={data}", f"--out_dir={tmp_path / 's'}", *flags])


def test_layers_follow_the_papers_rule_for_equal_parameters():
    assert {name: sweep.layers_of(name, 29) for name in VARIANTS} == {
        name: row["n_layer"] for name, row in VARIANTS.items()
    }


@pytest.mark.parametrize("ablation", sweep.ABLATIONS)
def test_every_run_of_an_ablation_is_a_configuration_of_its_own(data, tmp_path, ablation):
    args = sweep.parse_arguments([f"--ablation={ablation}", f"--data={data}", "--seeds=1,2"])
    jobs = sweep.plan(args)
    assert len({job.name for job in jobs}) == len(jobs) == 2 * len(sweep.ABLATIONS[ablation])
    configs = [sweep.configs_of(job) for job in jobs if job.settings["seed"] == 1]
    experiments = {str((model, asdict(config) | {"out_dir": ""})) for model, config in configs}
    assert len(experiments) == len(sweep.ABLATIONS[ablation])


def test_signals_reach_the_training_process_once(tmp_path):
    child = (
        "import os, signal, sys, time\ncount = []\nsignal.signal(signal.SIGTERM, lambda *_: count.append(1))\n"
        f"open({str(tmp_path / 'up')!r}, 'w').close()\n"
        "end = time.time() + 10\nwhile not count and time.time() < end: time.sleep(0.01)\n"
        f"time.sleep(0.1)\nsys.exit(100 + len(count) + 10 * (os.getpgrp() == {os.getpgrp()}))\n"  # Ctrl-C
    )
    before = signal.getsignal(signal.SIGINT)

    def interrupt():
        while not os.path.exists(tmp_path / "up"):
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert sweep.run_to_end([sys.executable, "-c", child]) == 101
    assert signal.getsignal(signal.SIGINT) is before


def test_a_dry_run_measures_and_a_sweep_of_real_training_finishes(tmp_path, data, capfd):
    flags = [f"--data={data}", f"--out_dir={tmp_path / 's'}", "--variants=exo", "--seeds=1"]
    tiny = ["--", "--n_layer=1", "--n_head=2", "--n_embd=8", "--block_size=16", "--batch_size=2",
            "--total_batch_size=32", "--max_steps=4", "--eval_every=2", "--eval_tokens=32", "--final_eval_tokens=32",
            "--save_every=2"]
    sweep.main([*flags, "--dry_run", *tiny])
    said = capfd.readouterr().out
    assert "ms per step of 32 tokens" in said and "1 of 1 runs to do" in said and not (tmp_path / "s").exists()
    sweep.main([*flags, *tiny])
    (row,) = json.loads((tmp_path / "s" / "table.json").read_text())["rows"]
    assert (row["label"], row["tokens"], row["layers"]) == ("exo", 128, 1) and 3 < row["val_loss"] < 7
    sweep.main([*flags, "--dry_run", *tiny])
    assert "every run is finished" in capfd.readouterr().out


def test_estimated_time_scales_with_flops_tokens_and_evaluations():
    reference = (10, 100.0, 0, 0)  # parameters, FLOPs per token, ...
    assert sweep.seconds_of((10, 300.0, 1000, 300), (2.0, 5.0), reference, 50) == pytest.approx(5 + 2 / 50 * 3 * 1100)


# ---- six tasks ----


def random_model(**sizes):
    """A tiny byte-level model, none of whose matrices is zero; float64, so that a loop is an oracle to 1e-5."""
    torch.manual_seed(0)
    model = ExoFormer(variant_config("exo_dynamic", **{**SMALL, "n_layer": 2, **sizes}))
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.5)
    return model.eval()


@torch.no_grad()
def looped_score(model, context, continuation):
    """(log p, greedy) of a continuation, one forward pass per token; the row keeps its last block_size + 1 tokens."""
    row, total, greedy = (context + continuation)[-(model.config.block_size + 1) :], 0.0, True
    for place in range(len(row) - len(continuation), len(row)):
        log_p = model(torch.tensor([row[:place]]))[0, -1].double().log_softmax(-1)
        total, greedy = total + log_p[row[place]].item(), greedy and log_p.argmax().item() == row[place]
    return total, greedy


@functools.cache
def scored_rows(count=24):
    """(context, continuation) pairs of many lengths, some too long for block_size, some wholly or partly as greedy
    decoding has them, and their looped scores."""
    model, draw, rows = random_model(), np.random.default_rng(0), []
    for i in range(count):
        context = draw.integers(0, 257, draw.integers(1, 24)).tolist()
        continuation = draw.integers(0, 257, draw.integers(1, 9)).tolist()
        if i % 4 < 2:
            context = context[:8]
            likely = six_tasks.generate(model, torch.tensor([context]), 3, temperature=0)[0, -3:].tolist()
            continuation = likely if i % 4 else likely[:2] + continuation[:1]
        rows.append((context, continuation))
    return rows, [looped_score(model, *row) for row in rows]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_scores_equal_a_loop_over_tokens_at_every_batch_size(batch_size):
    rows, expected = scored_rows()
    scores = six_tasks.score_rows(random_model(), rows, batch_size)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
    assert 6 <= sum(greedy for _, greedy in expected) < 12
    assert np.allclose([score for score, _ in scores], [score for score, _ in expected], rtol=0, atol=1e-4)


def test_a_continuation_longer_than_the_context_window_is_refused():
    with pytest.raises(UserError, match="a continuation of 17 tokens does not fit into block_size=16"):
        six_tasks.score_rows(random_model(), [([1], [2] * 17)])


def test_damaged_weights_are_an_error_and_not_an_accuracy():
    model = random_model()
    model.final_norm.weight.data[0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        six_tasks.score_rows(model, [([1], [2])])


def test_generation_equals_greedy_steps_and_ends_at_the_stop_text():
    model, tokenizer = random_model(block_size=32), get_tokenizer("bytes")
    expected = []
    for context in ("abc", "xyz", "a"):
        ids = tokenizer.encode(context)
        for _ in range(6):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
            if ids[-1] == tokenizer.eot:
                break
        expected.append(tokenizer.decode([t for t in ids[len(context) :] if t != tokenizer.eot]))
    requests = [(context, dict(max_gen_toks=6)) for context in ("abc", "xyz", "a")]
    assert six_tasks.generate_texts(model, tokenizer, requests) == expected
    assert six_tasks.cut_at("one two\nthree", ["\n", "two"]) == "one " and six_tasks.cut_at("one", []) == "one"


class Request:
    """What lm_eval hands over, as far as the adapter looks at it."""

    def __init__(self, *args):
        self.args = args


@needs_lm_eval
@pytest.mark.parametrize("batch_size", [1, 64])
def test_the_adapter_scores_texts_as_a_loop_does(batch_size):
    model, tokenizer = random_model(), get_tokenizer("bytes")
    pairs = [("the cat", " sat"), ("", "on"), ("a ", "mat"), ("much longer than the window", " is it")]
    moved = [("the cat", " sat"), (None, "on"), ("a", " mat"), pairs[3]]  # spaces go with the continuation
    scores = six_tasks.adapter(model, batch_size).loglikelihood([Request(*pair) for pair in pairs], disable_tqdm=True)
    ids = [([256] if context is None else tokenizer.encode(context), tokenizer.encode(text)) for context, text in moved]
    expected = [looped_score(model, *row) for row in ids]
    assert [s for s, _ in scores] == pytest.approx([s for s, _ in expected], abs=1e-4)
    assert [g for _, g in scores] == [g for _, g in expected]


@needs_lm_eval
@pytest.mark.parametrize("batch_size", [1, 64])
def test_rolling_log_likelihood_predicts_every_token_once(batch_size):
    model, tokenizer, block = random_model(), get_tokenizer("bytes"), SMALL["block_size"]
    texts, expected = ["short", "a text that needs more than two windows", "x" * block, "y" * (block + 1)], []
    for text in texts:
        ids = tokenizer.encode(text)
        before, total = [tokenizer.eot] + ids, 0.0
        for i, token in enumerate(ids):  # full windows of `block`; the last reaches back for context
            end = min(len(ids), (i // block + 1) * block)
            total += looped_score(model, before[max(0, end - block) : i + 1], [token])[0]
        expected.append(total)
    scores = six_tasks.adapter(model, batch_size).loglikelihood_rolling([Request(text) for text in texts])
    assert scores == pytest.approx(expected, abs=1e-4)


def arc(name, stem, options, labels, key):
    """A question in the official format."""
    choices = [dict(text=text, label=label) for text, label in zip(options, labels)]
    return dict(id=name, question=dict(stem=stem, choices=choices), answerKey=key)


ARC = [arc("1", "What barks?", ("cat", "dog", "a big cow"), "123", "2"),
       arc("2", "Which is hot?", ("ice", "fire", "snow", "rain", "milk"), "ABCDE", "B")]
WINOGRANDE = [dict(sentence="The cup fell off the desk as _ was wet.", option1="cup", option2="desk", answer="1"),
              dict(sentence="Ann paid Sue since _ had won.", option1="Ann", option2="Sue", answer="2")]


def write_lines(path, rows):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def items(tmp_path):
    """A --data folder with ARC-Easy (three and five options, numeric labels) and WinoGrande."""
    for name in ("Train", "Test"):
        write_lines(str(tmp_path / f"arc/ARC-Easy-{name}.jsonl"), ARC)
    for name in ("train_xl", "dev"):
        write_lines(str(tmp_path / f"winogrande/{name}.jsonl"), WINOGRANDE)
    return tmp_path


def test_items_keep_three_and_five_options_and_numeric_labels(items):
    rows = six_tasks.read_arc(str(items / "arc/ARC-Easy-Test.jsonl"))
    assert [row["choices"]["label"] for row in rows] == [["1", "2", "3"], ["A", "B", "C", "D", "E"]]
    assert rows[0] == dict(question="What barks?",
                           choices=dict(text=["cat", "dog", "a big cow"], label=["1", "2", "3"]), answerKey="2")


def test_piqa_takes_its_labels_from_the_second_file_line_by_line(tmp_path):
    write_lines(str(tmp_path / "p/valid.jsonl"), [dict(goal=f"g{i}", sol1="a", sol2="b") for i in range(3)])
    labels = tmp_path / "p/valid-labels.lst"
    labels.write_text("0\n1\n1\n")
    assert [row["label"] for row in six_tasks.read_piqa(str(tmp_path / "p/valid.jsonl"))] == [0, 1, 1]
    labels.write_text("0\n1\n")
    with pytest.raises(UserError, match="valid-labels.lst: must hold a 0 or 1 for each of the 3 lines"):
        six_tasks.read_piqa(str(tmp_path / "p/valid.jsonl"))


@pytest.mark.parametrize(
    "bad, what", [({**ARC[0], "answerKey": "F"}, "answerKey 'F' is none of"), ({"id": "1"}, "KeyError: 'question'")]
)
def test_an_item_that_cannot_be_used_is_named_with_its_line(tmp_path, bad, what):
    write_lines(str(tmp_path / "d/x.jsonl"), [ARC[1], bad])
    with pytest.raises(UserError, match=f"x.jsonl, line 2: .*{what}"):
        six_tasks.read_arc(str(tmp_path / "d/x.jsonl"))


def test_without_training_items_only_a_trial_may_draw_its_examples_elsewhere(items):
    os.remove(items / "arc/ARC-Easy-Train.jsonl")
    with pytest.raises(UserError, match="no arc/ARC-Easy-Train.jsonl.* from which the 5 examples are drawn"):
        six_tasks.local_rows("arc_easy", str(items), 5, None)
    assert "NOT the paper's" in six_tasks.local_rows("arc_easy", str(items), 5, 1)[1]
    assert six_tasks.local_rows("arc_easy", str(items), 0, None)[1] == ""


def test_the_average_has_the_error_of_independent_tasks():
    tasks = {str(i): dict(value=v, stderr=e) for i, (v, e) in enumerate([(0.2, 0.03), (0.6, 0.04)])}
    assert six_tasks.average(tasks) == (pytest.approx(0.4), pytest.approx(0.025))


@needs_lm_eval
def test_lm_eval_counts_what_a_loop_over_the_prompts_counts(items):
    model, encode = random_model(block_size=256), get_tokenizer("bytes").encode
    right = []
    for row in ARC:
        texts = [choice["text"] for choice in row["question"]["choices"]]
        scores = [
            looped_score(model, encode(f"Question: {row['question']['stem']}\nAnswer:"), encode(f" {t}"))[0] / len(t)
            for t in texts
        ]
        right.append(
            int(np.argmax(scores)) == [choice["label"] for choice in row["question"]["choices"]].index(row["answerKey"])
        )
    chosen = []
    for row in WINOGRANDE:
        start, end = row["sentence"].split("_")
        scores = [
            looped_score(model, encode(start + option), encode(end))[0] for option in (row["option1"], row["option2"])
        ]
        chosen.append(str(1 + int(np.argmax(scores))) == row["answer"])
    results = [
        six_tasks.evaluate(model, ["arc_easy", "winogrande"], 0, None, str(items), batch_size) for batch_size in (1, 64)
    ]
    assert results[0]["tasks"] == results[1]["tasks"]
    assert [task["value"] for task in results[0]["tasks"].values()] == [sum(right) / 2, sum(chosen) / 2]
    lines = "\n".join(six_tasks.table(results[0], "exo", 1000))
    assert "ARC-e" in lines and "WinoGrande" in lines and "average" not in lines


@needs_lm_eval
def test_examples_are_those_that_lm_eval_draws_with_its_seed(items, monkeypatch):
    stems = [f"What barks in {place}?" for place in ("Rome", "Oslo", "Bonn", "Lima", "Pisa", "Nara", "Faro", "Cork")]
    train = [{**ARC[0], "question": {**ARC[0]["question"], "stem": stem}} for stem in stems]
    write_lines(str(items / "arc/ARC-Easy-Train.jsonl"), train)
    asked, tokenizer, draw, expected = [], get_tokenizer("bytes"), random.Random(1234), []
    monkeypatch.setattr(six_tasks, "score_rows", lambda _, rows, *__: asked.extend(rows) or [(0.0, False)] * len(rows))
    six_tasks.evaluate(random_model(), ["arc_easy"], 2, None, str(items))
    for row in ARC:
        shots = "".join(f"Question: {shot['question']['stem']}\nAnswer: dog\n\n" for shot in draw.sample(train, 2))
        prompt = f"{shots}Question: {row['question']['stem']}\nAnswer:"
        expected += [(prompt, f" {choice['text']}") for choice in row["question"]["choices"]]
    assert [tuple(map(tokenizer.decode, row)) for row in asked] == expected


def test_a_missing_lm_eval_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="six_tasks.py: needs lm_eval: pip install"):
        six_tasks.main([f"--ckpt={tmp_path / 'x.pt'}"])
