"""Tests of sweep.py. No network; one test trains for some seconds."""

import json
import os
import shutil
import signal
import sys
import threading
import types
from dataclasses import asdict

import numpy as np
import pytest
import torch

import sweep
import train
from model import VARIANTS, InputError
from prepare_fineweb import UserError
from test_compare import write_run
from train import fresh_settings, parse_flags

TINY = """--n_layer=10 --n_head=2 --n_embd=8 --block_size=16 --batch_size=2 --total_batch_size=32
    --max_steps=4 --eval_every=2 --eval_tokens=64 --final_eval_tokens=96 --save_every=2""".split()
REFUSED = (InputError, UserError)


def flags_of(command):
    """{name: text} of the flags in a command line of train.py."""
    return dict(part.removeprefix("--").split("=", 1) for part in command[2:])


class FakeTrain:
    """
    Stands in for `python train.py`: writes what a run leaves behind and keeps the command lines.

    ends: {name: (exit code, step reached)} for runs that do not finish at once.
    """

    def __init__(self, ends):
        self.ends = ends
        self.commands = []

    def __call__(self, command):
        flags = flags_of(command)
        name = os.path.basename(flags["out_dir"])
        code, step = self.ends.pop(name, (0, int(flags["max_steps"])))
        self.commands.append((name, flags.get("resume") == "true"))
        loss = {"base": 4.0, "exo": 3.0}[flags["variant"]] + int(flags["seed"]) / 10
        write_run(flags["out_dir"], [(0, 8.0), (100 * step, loss)])
        parsed = parse_flags([part for part in command[2:] if "resume" not in part])
        model_config, config = fresh_settings(*parsed)
        state = dict(train_config=asdict(config), model_config=asdict(model_config))
        torch.save(state, os.path.join(flags["out_dir"], f"ckpt_{step:06d}.pt"))
        return code


@pytest.fixture
def data(tmp_path, write_data):
    """A folder of byte-level shards, 4,801 tokens in each split."""
    text = np.frombuffer(("the cat sat on the mat. " * 200).encode(), np.uint8).astype(np.uint16)
    return write_data(tmp_path / "data", np.append(np.uint16(256), text))


@pytest.fixture
def jobs_of(call, data, tmp_path, monkeypatch):
    """jobs_of(*flags): the plan of a sweep of `data`, in a folder where there is no out/."""
    monkeypatch.chdir(tmp_path)
    return lambda *flags: sweep.plan(call(sweep.parse_arguments, f"--data={data}", *flags))


@pytest.fixture
def run_sweep(tmp_path, data, call, monkeypatch):
    """
    run_sweep(fake, *flags, what=...): the exit code of a sweep with two seeds, of base and exo
    where nothing else is asked for, with `fake` for train.py and without pictures.
    """

    def run(fake, *flags, what="--variants=base,exo"):
        monkeypatch.setattr(sweep, "run_to_end", fake)
        monkeypatch.setattr(sweep, "draw_curves", lambda groups, path: None)
        sizes = ("--n_layer=10", "--max_steps=20", *flags)
        out_dir = f"--out_dir={tmp_path / 's'}"
        return call(sweep.main, f"--data={data}", out_dir, what, "--seeds=1,2", "--", *sizes)

    return run


def no_run(command):
    pytest.fail("a run was started")


# -------------------------------------------------------------------------------------------- plan


def test_the_two_settings_are_those_of_the_measured_sweeps(jobs_of):
    """Typed from paper/RESULTS.md; the last evaluation reads the whole held-out part (0)."""
    common = dict(eval_tokens=65536, final_eval_tokens=0, save_every=100, sample_tokens=0)
    small = dict(n_layer=10, n_head=2, n_embd=64, max_steps=300, eval_every=30)
    large = dict(
        n_layer=10, n_head=4, n_embd=128, max_steps=500, eval_every=50, log_every=50,
        batch_size=4, total_batch_size=4096, warmup_steps=40, dtype="float32",
    )  # fmt: skip
    for setting, sizes, seeds in (("quarter_hour", small, [1]), ("overnight", large, [1, 2, 3])):
        jobs = jobs_of(f"--setting={setting}")
        expected = {**common, **sizes}
        assert {name: jobs[1].settings[name] for name in expected} == expected
        assert [job.settings["seed"] for job in jobs[::6]] == seeds
        model_config, config = jobs[-1].configs()
        assert config.decay_fraction == 0.5 and model_config.block_size == 256
        assert (config.muon_lr, config.adamw_lr) == (0.01, 0.003)


def test_every_seed_has_all_experiments_before_the_next_begins(jobs_of):
    """The six of the README where none are named; a seed that is named twice is one."""
    six = ["base", "gated", "resformer", "nuresformer", "exo", "exo_dynamic"]
    names = [job.name for job in jobs_of("--seeds=5,4,5")]
    assert names == [f"{name}-seed{seed}" for seed in (5, 4) for name in six]
    names = [job.name for job in jobs_of("--variants=exo,base", "--seeds=1,2")]
    assert names == ["exo-seed1", "base-seed1", "exo-seed2", "base-seed2"]


def test_flags_of_train_replace_the_settings_and_reach_its_command_line(jobs_of):
    flags = ("--", "--n_layer=20", "--muon_lr=0.5", "--qk_norm=false", "--eval_tokens=77")
    base, exo = jobs_of("--variants=base,exo", "--out_dir=o", *flags)
    assert exo.command()[:2] == [sys.executable, os.path.join(sweep.HERE, "..", "train.py")]
    given = dict(part[2:].split("=", 1) for part in exo.command(max_steps=7)[2:])
    assert given["out_dir"] == os.path.join("o", "exo-seed1") == exo.folder
    assert (given["variant"], given["preset"], given["n_layer"]) == ("exo", "smoke", "20")
    assert (given["muon_lr"], given["qk_norm"], given["max_steps"]) == ("0.5", "false", "7")
    model_config, config = base.configs()
    assert (model_config.n_layer, model_config.qk_norm) == (22, False)
    assert (config.muon_lr, config.eval_tokens, config.out_dir) == (0.5, 77, base.folder)


def test_layers_follow_the_papers_rule_for_equal_parameters():
    layers = {name: sweep.layers_of(name, 29) for name in VARIANTS}
    assert layers == {name: row["n_layer"] for name, row in VARIANTS.items()}
    assert [sweep.layers_of(name, 10) for name in ("base", "resformer", "naive")] == [11, 11, 10]


ABLATIONS = {  # name: how many rows, and what stands in them
    "optimizer": (10, ["gated-seed1", "exo-optimizer=adamw-adamw_lr=0.03-seed1"]),
    "lambda_init": (4, ["exo-seed1", "exo-lambda_init=0.0-seed1", "exo-lambda_init=1.0-seed1"]),
    "anchor_norm": (8, ["exo-anchor_norm=none-seed1", "exo-anchor_norm=vg-seed1"]),
    "mix": (9, ["exo-mix=vg-anchor_norm=vg-seed1", "exo-mix=kvg-anchor_norm=kvg-seed1"]),
    "qk_norm": (24, ["exo-muon_lr=0.1-qk_norm=False-anchor_norm=vg-seed1", "nuresformer-seed1"]),
    "norm_position": (9, ["base-norm_position=both-seed1", "gated-norm_position=after-seed1"]),
    "window": (6, ["gated-window=64-seed1", "exo-window=16-seed1"]),
    "internal": (4, ["nuresformer-dynamic=True-seed1", "exo_dynamic-seed1"]),
}


@pytest.mark.parametrize("ablation", sweep.ABLATIONS)
def test_every_run_of_an_ablation_is_a_configuration_of_its_own(jobs_of, ablation):
    """Its folder is that of the setting's other sweeps, so that a run of two is made once."""
    count, some = ABLATIONS[ablation]
    jobs = jobs_of(f"--ablation={ablation}", "--seeds=1,2")
    assert len({job.name for job in jobs}) == len(jobs) == 2 * count
    assert set(some) <= {job.name for job in jobs}
    assert {job.out_dir for job in jobs + jobs_of("--variants=exo")} == {"out/sweep-quarter_hour"}
    resolved = set()
    for job in jobs[:count]:
        model_config, config = job.configs()
        settings = {**asdict(model_config), **asdict(config)}
        assert {name: settings[name] for name in job.change} == job.change
        resolved.add(json.dumps({**settings, "out_dir": ""}))
    assert len(resolved) == count and set(ABLATIONS) == set(sweep.ABLATIONS)


def test_without_data_a_sweep_learns_pythons_own_sources(tmp_path, data, call, monkeypatch):
    os.mkdir(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(train, "write_default_shards", lambda folder: shutil.copytree(data, folder))
    jobs = sweep.plan(call(sweep.parse_arguments, "--variants=all"))
    data_of = [(job.variant, job.settings["data"]) for job in jobs]
    assert data_of == [(name, "data/python_stdlib") for name in VARIANTS]


@pytest.mark.parametrize("flags, message", [
    ("--seed=3", "--seed: the sweep sets it itself"), ("--preset=paper", "--preset: the sweep"),
    ("--variant=exo", "--variant: the sweep sets"), ("--out_dir=x", "--out_dir: the sweep sets"),
    ("--data=x", "--data: the sweep sets"), ("--n_embd=7", "n_embd=7"),
])  # fmt: skip
def test_what_train_would_refuse_is_refused_before_the_first_run(run_sweep, flags, message):
    with pytest.raises(REFUSED, match=message):
        run_sweep(no_run, flags)


@pytest.mark.parametrize(
    "asked, flags",
    [
        (["--ablation=lambda_init"], ["--lambda_init=0.25"]),
        (["--ablation=qk_norm"], ["--muon_lr=0.03"]),
        (["--variants=exo,exo_scalar"], ["--granularity=scalar"]),
    ],
)
def test_one_experiment_under_two_names_is_refused_before_the_first_run(jobs_of, asked, flags):
    with pytest.raises(UserError, match="would be one experiment; drop a flag after --"):
        jobs_of(*asked, "--seeds=1", "--", *flags)


def test_a_variant_or_a_seed_given_twice_is_trained_once(jobs_of):
    jobs = jobs_of("--variants=base,exo,base", "--seeds=2,1,2")
    assert [job.name for job in jobs] == ["base-seed2", "exo-seed2", "base-seed1", "exo-seed1"]


def test_seeds_that_are_no_numbers_are_named(call, capsys):
    with pytest.raises(SystemExit):
        call(sweep.parse_arguments, "--seeds=1,x")
    assert "'1,x' is not whole numbers and commas" in capsys.readouterr().err


def test_an_unknown_variant_is_named_with_those_there_are(call, capsys):
    with pytest.raises(SystemExit):
        call(sweep.parse_arguments, "--variants=base,exxo")
    assert "unknown 'exxo'; there are base, gated" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- running


def test_a_sweep_stopped_in_the_middle_goes_on_where_it_stopped(tmp_path, run_sweep, capsys):
    fake = FakeTrain({"exo-seed1": (143, 10)})
    folder = tmp_path / "s"
    assert run_sweep(fake) == 143
    assert fake.commands == [("base-seed1", False), ("exo-seed1", False)]
    assert "sweep.py: exo-seed1 was stopped" in capsys.readouterr().out
    assert "NOT FINISHED: exo-seed1" in (folder / "variants.md").read_text(encoding="utf-8")
    fake.commands.clear()
    assert run_sweep(fake) == 0
    assert fake.commands == [("exo-seed1", True), ("base-seed2", False), ("exo-seed2", False)]
    capsys.readouterr()
    assert run_sweep(no_run) == 0
    lines = (folder / "variants.jsonl").read_text(encoding="utf-8").splitlines()
    runs = [json.loads(line) for line in lines]
    assert [(run["name"], run["settings"]["n_layer"], run["points"][-1]) for run in runs] == [
        ("base-seed1", 11, [2000, 4.1]),
        ("exo-seed1", 10, [2000, 3.1]),
        ("base-seed2", 11, [2000, 4.2]),
        ("exo-seed2", 10, [2000, 3.2]),
    ]
    table = (folder / "variants.md").read_text(encoding="utf-8")
    assert "NOT FINISHED" not in table and "| -1.0000 +- 0.0000" in table
    assert table in capsys.readouterr().out


@pytest.mark.parametrize("code, left, words", [
    (1, 1, "failed with exit code 1"), (2, 2, "failed with exit code 2"),
    (128, 128, "failed with exit code 128"), (129, 129, "was stopped"), (-9, 137, "was stopped"),
])  # fmt: skip
def test_a_run_that_fails_ends_the_sweep_with_its_code(run_sweep, capsys, code, left, words):
    """A signal is told as a shell does: 128 and its number."""
    fake = FakeTrain({"exo-seed1": (code, 10)})
    assert run_sweep(fake) == left
    assert f"sweep.py: exo-seed1 {words}" in capsys.readouterr().out
    assert [name for name, _ in fake.commands] == ["base-seed1", "exo-seed1"]


def test_each_run_says_which_it_is_of_how_many_and_how_long_is_left(run_sweep, capsys, monkeypatch):
    """base-seed1 ended in an earlier sweep; of the three to do each takes 50 s."""
    run_sweep(FakeTrain({"exo-seed1": (1, 0)}))
    capsys.readouterr()
    ticks = iter([0.0, 0.0, 50.0, 100.0])
    monkeypatch.setattr(sweep.time, "monotonic", lambda: next(ticks))
    run_sweep(FakeTrain({}))
    said = [line for line in capsys.readouterr().out.split("\n") if line.startswith("===")]
    assert said == [
        "=== run 2 of 4: exo-seed1 (stopped); 0:00:00 so far",
        "=== run 3 of 4: base-seed2 (new); 0:00:50 so far, about 0:01:40 left",
        "=== run 4 of 4: exo-seed2 (new); 0:01:40 so far, about 0:00:50 left",
    ]


def test_an_ablation_takes_the_runs_of_another_sweep_and_leaves_its_table(tmp_path, run_sweep):
    fake = FakeTrain({})
    assert run_sweep(fake) == run_sweep(fake, what="--ablation=lambda_init") == 0
    rows = ("base", "exo", *(f"exo-lambda_init={value}" for value in (0.0, 0.25, 1.0)))
    names = [f"{name}-seed{seed}" for seed in (1, 2) for name in rows]
    assert sorted(name for name, _ in fake.commands) == sorted(names)
    table = (tmp_path / "s" / "lambda_init.md").read_text(encoding="utf-8")
    assert "exo lambda_init=0.25" in table
    assert "| base " in (tmp_path / "s" / "variants.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("log, saved, state", [
    (None, False, "new"),
    ("", False, "new"),
    ('{"step": 0, "tokens": 0, "val_loss": 5.0}\n', False, "new"),
    ('{"step": 0, "tokens": 0, "val_loss": 5.0}\n', True, "stopped"),
    ('{"step": 19, "tokens": 380, "val_loss": 5.0}\n', True, "stopped"),
    ('{"step": 20, "tokens": 400, "loss": 5.0}\n', True, "stopped"),  # killed as it evaluated
    ('{"step": 20, "tokens": 400, "val_loss": 5.0}\n', True, "finished"),
    ('{"step": 7, "tokens": 140, "diverged": true}\n', True, "diverged"),
])  # fmt: skip
def test_the_state_of_a_run_is_told_by_its_log(tmp_path, log, saved, state):
    job = sweep.Job("exo", {}, dict(seed=1, max_steps=20), str(tmp_path))
    os.mkdir(job.folder)
    if log is not None:
        (tmp_path / "exo-seed1" / "log.jsonl").write_text(log, encoding="utf-8")
    if saved:
        (tmp_path / "exo-seed1" / "ckpt_000000.pt").touch()
    assert job.state() == state


def test_a_diverged_run_is_named_not_tried_again_and_the_others_go_on(tmp_path, run_sweep, capsys):
    assert run_sweep(FakeTrain({"exo-seed1": (3, 10)})) == 0
    log = (tmp_path / "s" / "exo-seed1" / "log.jsonl").read_text(encoding="utf-8")
    assert json.loads(log.splitlines()[-1]) == {"step": 10, "tokens": 1000, "diverged": True}
    assert run_sweep(no_run) == 0
    out = capsys.readouterr().out
    assert out.count("DIVERGED: exo-seed1 after step 10") == 2 and "| exo     | 1 " in out
    assert '"diverged": true' in (tmp_path / "s" / "variants.jsonl").read_text(encoding="utf-8")


def test_a_folder_with_a_run_of_other_settings_is_refused(run_sweep):
    """Else a finished run would be taken for one of the new sweep."""
    run_sweep(FakeTrain({}))
    with pytest.raises(
        REFUSED, match="base-seed1 holds a run with muon_lr=0.01, but now muon_lr=0"
    ):
        run_sweep(no_run, "--muon_lr=0.5")
    with pytest.raises(REFUSED, match="holds a run with final_eval_tokens=0, but now"):
        run_sweep(no_run, "--final_eval_tokens=96")
    assert run_sweep(no_run, "--log_every=7") == 0  # changes nothing that is measured


def test_a_sweep_keeps_a_second_one_out_of_its_folder(tmp_path, run_sweep):
    with sweep.locked(str(tmp_path / "s")):
        with pytest.raises(REFUSED, match="another run is writing there"):
            run_sweep(no_run)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_signals_reach_the_training_process_once(name, tmp_path):
    """
    The child's exit code tells how often; 10 more if Ctrl-C of the terminal would have reached it
    as well. It waits for the signal for a minute at most.
    """
    child = (
        f"import os, signal, sys, time\ncount = []\n"
        f"signal.signal(signal.{name}, lambda *_: count.append(1))\n"
        f"open({str(tmp_path / 'up')!r}, 'w').close()\n"
        "end = time.time() + 60\nwhile not count and time.time() < end: time.sleep(0.01)\n"
        f"time.sleep(0.1)\nsys.exit(100 + len(count) + 10 * (os.getpgrp() == {os.getpgrp()}))\n"
    )
    before = signal.getsignal(signal.Signals[name])
    gone = threading.Event()

    def interrupt():
        while not os.path.exists(tmp_path / "up") and not gone.wait(0.01):
            pass
        if not gone.is_set():
            os.kill(os.getpid(), signal.Signals[name])

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        assert sweep.run_to_end([sys.executable, "-c", child]) == 101
    finally:
        gone.set()
        thread.join()
    assert signal.getsignal(signal.Signals[name]) is before


# ------------------------------------------------------------------------------------------ timing


def test_estimated_work_is_training_and_a_third_for_evaluations(jobs_of):
    """
    exo of 10 layers, C 8: matrices 11 C^2 a layer, 4 C^2 of anchors, a head of 320 C; attention
    12 n C T. Evaluations of 64 at steps 0, 2 and 4, where 96 come on top; the whole held-out part
    is 4,801.
    """
    per_token = 6 * (10 * 11 * 64 + 4 * 64 + 320 * 8) + 12 * 10 * 8 * 16
    for flags, evaluated in (
        ([], 3 * 64 + 96),
        (["--final_eval_tokens=0"], 3 * 64 + 4801),
        (["--eval_tokens=0", "--final_eval_tokens=9999"], 4 * 4801),
        (["--eval_every=0"], 96),
    ):
        job = jobs_of("--variants=exo", "--seeds=1", "--", *TINY, *flags)[0]
        assert sweep.flops_to_come(job) == pytest.approx(per_token * (4 * 32 + evaluated / 3))


def test_a_stopped_run_has_only_the_rest_to_do(jobs_of):
    """Three of four steps are done: 32 tokens, and evaluations of 64 and 96 at the end."""
    job = jobs_of("--variants=exo", "--seeds=1", "--", *TINY)[0]
    write_run(job.folder, [(0, 8.0), (300, 5.0)])
    open(os.path.join(job.folder, "ckpt_000003.pt"), "w").close()
    per_token = 6 * (10 * 11 * 64 + 4 * 64 + 320 * 8) + 12 * 10 * 8 * 16
    assert sweep.flops_to_come(job) == pytest.approx(per_token * (32 + (64 + 96) / 3))


def test_a_dry_run_adds_up_what_each_run_will_take(
    tmp_path, run_sweep, call, data, capsys, monkeypatch
):
    """base-seed1 has ended; the others take 3 s to start and do 2 of their FLOPs a second."""
    run_sweep(FakeTrain({"exo-seed1": (1, 0)}))
    capsys.readouterr()
    monkeypatch.setattr(sweep, "flops_to_come", lambda job: 90.0 if job.variant == "exo" else 60.0)
    monkeypatch.setattr(sweep, "measure", lambda job: (2.0, 3.0))
    sizes = ("--", "--n_layer=10", "--max_steps=20")
    where = (f"--data={data}", f"--out_dir={tmp_path / 's'}", "--variants=base,exo", "--seeds=1,2")
    call(sweep.main, *where, "--dry_run", *sizes)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "measuring a few steps of exo-seed1 ..."
    assert [line.split() for line in lines[1:5]] == [
        ["base-seed1", "finished", "0:00:00"],
        ["exo-seed1", "stopped", "0:00:48"],
        ["base-seed2", "new", "0:00:33"],
        ["exo-seed2", "new", "0:00:48"],
    ]
    assert lines[5].startswith("3 of 4 runs to do, about 0:02:09 in all")


def test_a_trial_of_six_steps_tells_the_speed_of_the_last_three_and_what_starting_takes(
    jobs_of, monkeypatch, capsys
):
    """40 s in all; the slow first steps are part of starting up."""
    job = jobs_of("--variants=exo", "--", *TINY)[0]
    clock = [100.0]

    def trial(command, **how):
        flags = flags_of(command)
        assert flags["max_steps"] == "6"
        ms = enumerate((9000, 7000, 300, 200, 500, 100), 1)
        records = [dict(step=step, tokens=32 * step, loss=5.0, ms=x) for step, x in ms]
        os.makedirs(flags["out_dir"])
        sweep.compare.write_lines(records, os.path.join(flags["out_dir"], "log.jsonl"))
        clock[0] += 40
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(sweep.subprocess, "run", trial)
    monkeypatch.setattr(sweep.time, "monotonic", lambda: clock[0])
    speed, start = sweep.measure(job)
    assert speed == pytest.approx(sweep.flops_of(job, 32) / 0.2)
    assert start == pytest.approx(40 - 6 * 0.2)
    assert "200 ms per step of 32 tokens, 38.8 s to start" in capsys.readouterr().out


@pytest.mark.slow
def test_a_dry_run_measures_and_a_sweep_of_real_training_finishes(tmp_path, data, call, capfd):
    flags = [f"--data={data}", f"--out_dir={tmp_path / 's'}", "--variants=exo", "--seeds=1"]
    flags += ["--", *TINY, "--n_layer=1"]
    call(sweep.main, "--dry_run", *flags)
    said = capfd.readouterr().out
    assert "ms per step of 32 tokens" in said and "1 of 1 runs to do" in said
    assert not (tmp_path / "s").exists()
    assert call(sweep.main, *flags) == 0
    run = json.loads((tmp_path / "s" / "variants.jsonl").read_text(encoding="utf-8"))
    assert (run["variant"], run["tokens"], run["settings"]["n_layer"]) == ("exo", 128, 1)
    assert 3 < run["points"][-1][1] < 7
    call(sweep.main, "--dry_run", *flags)
    assert "every run has ended" in capfd.readouterr().out
