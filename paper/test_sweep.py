"""Tests of sweep.py. No network; one test trains for some seconds."""
import json
import os
import shutil
import signal
import sys
import threading
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

TINY = """--n_layer=10 --n_head=2 --n_embd=8 --block_size=16 --batch_size=2 --total_batch_size=32 --max_steps=4
    --eval_every=2 --eval_tokens=64 --final_eval_tokens=96 --save_every=2""".split()


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
        loss = {"base": 4.0, "exo": 3.0}[flags["variant"]] + int(flags["seed"]) / 10
        write_run(flags["out_dir"], [(0, 8.0), (100 * step, loss)])
        model_config, config = fresh_settings(*parse_flags([part for part in command[2:] if "resume" not in part]))
        torch.save(dict(train_config=asdict(config), model_config=asdict(model_config)),
                   os.path.join(flags["out_dir"], f"ckpt_{step:06d}.pt"))
        return code


@pytest.fixture
def data(tmp_path, write_data):
    """A folder of byte-level shards."""
    text = np.frombuffer(("the cat sat on the mat. " * 200).encode(), np.uint8).astype(np.uint16)
    return write_data(tmp_path / "data", np.append(np.uint16(256), text))


@pytest.fixture
def jobs_of(call, data, tmp_path, monkeypatch):
    """jobs_of(*flags): the plan of a sweep of `data`, in a folder where there is no out/."""
    monkeypatch.chdir(tmp_path)
    return lambda *flags: sweep.plan(call(sweep.parse_arguments, f"--data={data}", *flags))


@pytest.fixture
def run_sweep(tmp_path, data, call, monkeypatch):
    """run_sweep(fake, *flags, what=...): the exit code of a sweep with two seeds, of base and exo where nothing else is
    asked for, with `fake` for train.py and without pictures, which take seconds."""

    def run(fake, *flags, what="--variants=base,exo"):
        monkeypatch.setattr(sweep, "run_to_end", fake)
        monkeypatch.setattr(sweep, "draw_curves", lambda groups, path: None)
        return call(sweep.main, f"--data={data}", f"--out_dir={tmp_path / 's'}", what, "--seeds=1,2", "--",
                    "--n_layer=10", "--max_steps=20", *flags)

    return run


def no_run(command):
    pytest.fail("a run was started")


def test_a_sweep_stopped_in_the_middle_goes_on_where_it_stopped(tmp_path, run_sweep, capsys):
    fake, folder = FakeTrain({"exo-seed1": (143, 10)}), tmp_path / "s"
    assert run_sweep(fake) == 143 and fake.commands == [("base-seed1", False), ("exo-seed1", False)]
    assert "NOT FINISHED: exo-seed1" in (folder / "variants.md").read_text()
    fake.commands.clear()
    assert run_sweep(fake) == 0
    assert fake.commands == [("exo-seed1", True), ("base-seed2", False), ("exo-seed2", False)]
    capsys.readouterr()
    assert run_sweep(no_run) == 0
    runs = [json.loads(line) for line in (folder / "variants.jsonl").read_text().splitlines()]
    assert [(run["name"], run["settings"]["n_layer"], run["points"][-1]) for run in runs] == [
        ("base-seed1", 11, [2000, 4.1]), ("exo-seed1", 10, [2000, 3.1]), ("base-seed2", 11, [2000, 4.2]),
        ("exo-seed2", 10, [2000, 3.2])]
    table = (folder / "variants.md").read_text()
    assert "NOT FINISHED" not in table and "-1.0000 +- 0.0000" in table and table in capsys.readouterr().out


def test_an_ablation_takes_the_runs_of_another_sweep_and_leaves_its_table(tmp_path, run_sweep):
    fake = FakeTrain({})
    assert run_sweep(fake) == run_sweep(fake, what="--ablation=lambda_init") == 0
    assert sorted(name for name, _ in fake.commands) == sorted(
        f"{name}-seed{seed}" for seed in (1, 2)
        for name in ("base", "exo", *(f"exo-lambda_init={value}" for value in (0.0, 0.25, 1.0))))
    assert "exo lambda_init=0.25" in (tmp_path / "s" / "lambda_init.md").read_text()
    assert "base" in (tmp_path / "s" / "variants.md").read_text()


@pytest.mark.parametrize("log, saved, state", [
    ("", False, "new"), ('{"step": 0, "tokens": 0, "val_loss": 5.0}\n', False, "new"),
    ('{"step": 0, "tokens": 0, "val_loss": 5.0}\n', True, "stopped"),
    ('{"step": 20, "tokens": 400, "loss": 5.0}\n', True, "stopped"),                             # saved, but killed in its evaluation
    ('{"step": 20, "tokens": 400, "val_loss": 5.0}\n', True, "finished"), ('{"step": 7, "tokens": 140, "diverged": true}\n', True, "diverged")])
def test_the_state_of_a_run_is_told_by_its_log(tmp_path, log, saved, state):
    job = sweep.Job("exo", {}, dict(seed=1, max_steps=20), str(tmp_path))
    os.mkdir(job.folder)
    (tmp_path / "exo-seed1" / "log.jsonl").write_text(log)
    if saved:
        (tmp_path / "exo-seed1" / "ckpt_000000.pt").write_text("")
    assert job.state() == state


def test_a_diverged_run_is_named_not_tried_again_and_the_others_go_on(tmp_path, run_sweep, capsys):
    assert run_sweep(FakeTrain({"exo-seed1": (3, 10)})) == 0
    assert run_sweep(no_run) == 0
    out = capsys.readouterr().out
    assert out.count("DIVERGED: exo-seed1 after step 10") == 2 and "| exo     | 1 " in out
    assert '"diverged": true' in (tmp_path / "s" / "variants.jsonl").read_text()


def test_a_folder_with_a_run_of_other_settings_is_refused(run_sweep):
    """Else a finished run would be taken for one of the new sweep."""
    run_sweep(FakeTrain({}))
    with pytest.raises((InputError, UserError), match="base-seed1 holds a run with muon_lr=0.01, but now muon_lr=0.5"):
        run_sweep(no_run, "--muon_lr=0.5")
    assert run_sweep(no_run, "--log_every=7") == 0                                # changes nothing that is measured


@pytest.mark.parametrize("flags, message", [
    ("--seed=3", "--seed: the sweep sets it itself"), ("--preset=paper", "--preset: the sweep sets it"),
    ("--n_embd=7", "n_embd=7")])
def test_what_train_would_refuse_is_refused_before_the_first_run(run_sweep, flags, message):
    with pytest.raises((InputError, UserError), match=message):
        run_sweep(no_run, flags)


def test_a_sweep_keeps_a_second_one_out_of_its_folder(tmp_path, run_sweep):
    with sweep.locked(str(tmp_path / "s")), pytest.raises((InputError, UserError), match="another run is writing there"):
        run_sweep(no_run)


def test_without_data_a_sweep_learns_pythons_own_sources(tmp_path, data, call, monkeypatch):
    os.mkdir(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(train, "write_default_shards", lambda folder: shutil.copytree(data, folder))
    jobs = sweep.plan(call(sweep.parse_arguments, "--variants=all"))
    assert [(job.variant, job.settings["data"]) for job in jobs] == [(name, "data/python_stdlib") for name in VARIANTS]


def test_layers_follow_the_papers_rule_for_equal_parameters():
    assert {name: sweep.layers_of(name, 29) for name in VARIANTS} == {
        name: row["n_layer"] for name, row in VARIANTS.items()}


@pytest.mark.parametrize("ablation", sweep.ABLATIONS)
def test_every_run_of_an_ablation_is_a_configuration_of_its_own(jobs_of, ablation):
    """Its folder is that of the setting's other sweeps, so that a run that two of them need is made once."""
    jobs, count = jobs_of(f"--ablation={ablation}", "--seeds=1,2"), len(sweep.ABLATIONS[ablation])
    assert len({job.name for job in jobs}) == len(jobs) == 2 * count
    assert {job.out_dir for job in jobs + jobs_of("--variants=exo")} == {"out/sweep-quarter_hour"}
    configs = [job.configs() for job in jobs if job.settings["seed"] == 1]
    assert len({str((model, asdict(config) | {"out_dir": ""})) for model, config in configs}) == count
    assert all(vars(config)[name] == value for job, pair in zip(jobs, configs) for config in pair
               for name, value in job.change.items() if name in vars(config))


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_signals_reach_the_training_process_once(name, tmp_path):
    """The child's exit code tells how often; 10 more if Ctrl-C of the terminal would have reached it as well."""
    child = (
        f"import os, signal, sys, time\ncount = []\nsignal.signal(signal.{name}, lambda *_: count.append(1))\n"
        f"open({str(tmp_path / 'up')!r}, 'w').close()\n"
        "end = time.time() + 10\nwhile not count and time.time() < end: time.sleep(0.01)\n"
        f"time.sleep(0.1)\nsys.exit(100 + len(count) + 10 * (os.getpgrp() == {os.getpgrp()}))\n"
    )
    before = signal.getsignal(signal.Signals[name])

    def interrupt():
        while not os.path.exists(tmp_path / "up"):
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.Signals[name])

    threading.Thread(target=interrupt).start()
    assert sweep.run_to_end([sys.executable, "-c", child]) == 101
    assert signal.getsignal(signal.Signals[name]) is before


def test_estimated_work_is_training_and_a_third_for_evaluations(jobs_of):
    """exo of 10 layers, C 8: matrices 11 C^2 a layer, 4 C^2 of anchors, a head of 320 C; attention 12 n C T."""
    job, = jobs_of("--variants=exo", "--seeds=1", "--", *TINY)
    per_token = 6 * (10 * 11 * 64 + 4 * 64 + 320 * 8) + 12 * 10 * 8 * 16
    evaluated = 3 * 64 + 96                                             # at steps 0, 2 and 4, where 96 come on top
    assert sweep.flops_to_come(job) == pytest.approx(per_token * (4 * 32 + evaluated / 3))


@pytest.mark.slow
def test_a_dry_run_measures_and_a_sweep_of_real_training_finishes(tmp_path, data, call, capfd):
    flags = [f"--data={data}", f"--out_dir={tmp_path / 's'}", "--variants=exo", "--seeds=1", "--", *TINY, "--n_layer=1"]
    call(sweep.main, "--dry_run", *flags)
    said = capfd.readouterr().out
    assert "ms per step of 32 tokens" in said and "1 of 1 runs to do" in said and not (tmp_path / "s").exists()
    assert call(sweep.main, *flags) == 0
    run = json.loads((tmp_path / "s" / "variants.jsonl").read_text())
    assert (run["variant"], run["tokens"], run["settings"]["n_layer"]) == ("exo", 128, 1)
    assert 3 < run["points"][-1][1] < 7
    call(sweep.main, "--dry_run", *flags)
    assert "every run has ended" in capfd.readouterr().out
