"""
Tests of train.py that are too long, or too far from the paper, for test_model.py: the command line,
folders, full disks, output that nobody reads, signals, kills, compilation and torchrun. No network.
"""

import io
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch._dynamo.testing

import prepare_fineweb as pf
import train as T
from model import InputError, read_checkpoint
from prepare_fineweb import UserError, command_line
from test_model import (
    HERE,
    PATIENCE,
    SMALL,
    Quiet,
    close,
    copied,
    data,
    launch_ranks,
    log_of,
    newest_of,
    output_of,
    released,
    resume,
    same_state,
    saved,
    start,
    tiny,
    tokens,
    train_fully,
    weights,
    whole,
)


# ------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--variant=exo_dynamc"], "'exo_dynamic'"),
        (["--vairant=exo"], "unrecognized arguments: --vairant"),
        (["--preset=papr"], "'paper', 'small', 'smoke'"),
        (["--n_layer=two"], "'two' is not of type int"),
        (["--dtype=float16"], "'auto', 'float32', 'bfloat16'"),
        (["--optimizer=adamW"], "'muon', 'adamw'"),
        (["--gate=maybe"], "'maybe' is neither true nor false"),
        (["--max_steps"], "expected one argument"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(flags, words, capsys):
    with pytest.raises(SystemExit) as error:
        T.parse_flags(flags)
    message = capsys.readouterr().err
    assert error.value.code == 2 and words in message and message.count("\n") == 1


@pytest.mark.parametrize(
    "flag, name, value",
    [
        ("--compile", "compile", True),
        ("--compile=True", "compile", True),
        ("--compile=false", "compile", False),
        ("--compile=none", "compile", None),
        ("--deterministic=False", "deterministic", False),
        ("--muon_ramp", "muon_ramp", True),
        ("--gate=FALSE", "gate", False),
        ("--lambda_init=none", "lambda_init", None),
        ("--lambda_init=0.25", "lambda_init", 0.25),
        ("--n_layer=3", "n_layer", 3),
        ("--mix=", "mix", ""),
    ],
)
def test_a_flag_has_the_value_that_it_spells(flag, name, value):
    given = T.parse_flags([flag])[2]
    assert given == {name: value} and type(given[name]) is type(value)


def test_help_names_every_setting_and_variant_once(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        T.parse_flags(["--help"])
    text = capsys.readouterr().out
    for name in {**T.DEFAULTS, "variant": "", "preset": ""}.keys() - {"tokenizer"}:
        assert len(re.findall(rf"^  --{name} ", text, re.M)) == 1, name
    for variant in T.VARIANTS:
        assert len(re.findall(rf"\b{variant}[,.]", text)) == 1, variant
    assert max(map(len, text.splitlines())) <= 300
    assert "(default: true)" in text and "True" not in text  # as a flag spells it


def test_the_report_counts_what_the_optimizers_hold(capsys):
    """amsgrad: three moments and a step number for each of two weights; 3 million numbers of 4
    bytes."""
    model = torch.nn.Linear(1000, 3000)
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    model(torch.ones(1, 1000)).sum().backward()
    optimizer.step()
    T.report_memory(types.SimpleNamespace(model=model, optimizers=[optimizer]))
    line = capsys.readouterr().out
    assert "0.0601 GB of weights, gradients and optimizer states; a checkpoint has" in line
    assert line.endswith(" 0.048 GB\n")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--total_batch_size=100"], "--total_batch_size=100 is not a multiple"),
        (["--vocab_size=256"], "--vocab_size=256 is too small for the 257 ids of the bytes"),
        (["--device=cuda"], "--device=cuda is not there: torch can use"),
        (["--batch_size=0"], "batch_size=0 .*from 1"),
        (["--muon_lr=nan"], "muon_lr=nan"),
        (["--grad_clip=-1"], "grad_clip=-1"),
        (["--final_lr=1.5"], "final_lr=1.5"),
        (["--n_head=3"], "n_embd=32 is not a multiple of n_head=3"),
        (["--keep=-1"], "keep=-1"),
        (["--block_size=5000", "--total_batch_size=10000"], "5001 tokens; lower --block_size"),
        (["--compile=true"], "torch.compile needs g\\+\\+.*--compile=false"),
        (["--data=nowhere"], "nowhere.*--input=FILES"),
        (["--init_from=nowhere.pt"], "nowhere.pt: no such checkpoint"),
        (["--preset=paper", "--data="], "python prepare_fineweb.py"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="expects a machine without CUDA")
def test_a_run_that_cannot_start_says_why_in_one_line(flags, words, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises((InputError, UserError), match=words) as error:
        start(tmp_path / "a", data, *flags)
    assert "\n" not in str(error.value)


def run_main(*flags, stop=Quiet):
    """train.py's main() as the command line runs it: its exit code, or the message that it exits
    with."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as error:
        patch.setattr(sys, "argv", ["train.py", *flags])
        patch.setattr(T, "Stop", stop)  # a quiet one: pytest keeps its Ctrl-C
        command_line(T.main, T.InputError, memory="lower --batch_size")
    return error.value.code


def test_the_command_line_trains_and_tells_the_next_commands(data, tmp_path, capsys):
    assert run_main(f"--data={data}", f"--out_dir={tmp_path / 'a'}", *SMALL) == 0
    out = capsys.readouterr().out
    assert f"python model.py --ckpt={tmp_path / 'a'} --prompt" in out and "sample:" in out
    assert f"python train.py --resume --out_dir={tmp_path / 'a'} --max_steps=24" in out
    n = sum(p.numel() for p in T.load_checkpoint(str(tmp_path / "a")).parameters())
    sizes = "2 layers, C 32, 2 heads, context 32, vocabulary 320"
    assert f"model      exo_dynamic: {n:,} parameters, {sizes}\n" in out


@pytest.mark.parametrize(
    "error, code",
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "train.py: out of memory; lower --b",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), "train.py: out of memory; lower --b"),
        (MemoryError(), "train.py: out of memory; lower --b"),
        (T.Diverged("step 3"), 3),
    ],
)
def test_only_a_lack_of_memory_is_called_so(error, code, data, tmp_path, monkeypatch):
    def fail(trainer, windows):
        raise error

    monkeypatch.setattr(T.Trainer, "update", fail)
    flags = [f"--data={data}", f"--out_dir={tmp_path / 'a'}", *SMALL]
    if code is None:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            run_main(*flags)
    else:
        assert str(run_main(*flags)).startswith(str(code))


def test_a_model_too_large_for_the_machine_is_one_line(data, tmp_path):
    """A matrix of 17 TB."""
    huge = ["--n_embd=1048576", "--ffn_dim=64"]
    message = run_main(f"--data={data}", f"--out_dir={tmp_path / 'a'}", *SMALL, *huge)
    assert message == "train.py: out of memory; lower --batch_size"


@pytest.mark.parametrize("place", ["log.jsonl", ""])
def test_what_cannot_be_written_is_one_line(place, data, tmp_path):
    """A log that is a folder, a run folder that is a file."""
    folder = tmp_path / "a"
    if place:
        (folder / place).mkdir(parents=True)
    else:
        folder.write_bytes(b"")
    message = run_main(f"--data={data}", f"--out_dir={folder}", *SMALL)
    assert re.fullmatch(f"train.py: .*{place or folder}.*", message)


# ------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("source", ["ours", "released"])
def test_init_from_takes_weights_and_sizes_of_a_checkpoint(source, tmp_path, monkeypatch):
    """A tokenizer of 96 ids that needs no file. Once started, a run no longer needs the source."""
    gpt2 = types.SimpleNamespace(n_vocab=96, eot=95, n_bytes=len)
    monkeypatch.setattr(T, "get_tokenizer", lambda name: gpt2)
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        pf.write_shard(tmp_path / "data" / f"t_{split}_000000.bin", tokens(500).numpy())
    _, state, model = released("exo_elementwise")
    path = tmp_path / "source.pt"
    if source == "released":
        torch.save(dict(model=state), path)
    else:
        saved(model, path)
    flags = [f"--out_dir={tmp_path / 'a'}", f"--init_from={path}", f"--data={tmp_path / 'data'}"]
    flags += ["--device=cpu", "--block_size=32", "--batch_size=2"]
    flags += ["--total_batch_size=64", "--max_steps=2"]
    words = "--n_embd=64 does not fit .*source.pt, which has n_embd=32"
    with pytest.raises(UserError, match=words):
        T.prepare([*flags, "--n_embd=64"])
    trainer, run_folder = T.prepare(flags)
    assert trainer.model.config == replace(model.config, block_size=32)
    assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), model.parameters()))
    T.run(trainer, run_folder, Quiet())
    close(run_folder)
    path.unlink()
    assert resume(tmp_path / "a", "--max_steps=3").step == 3


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_a_run_killed_before_its_first_checkpoint_starts_over(flags, data, tmp_path):
    """With or without --resume. Half a checkpoint goes; a folder of such a name is not its own."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "ckpt_000000.pt.part").write_bytes(b"half")
    (tmp_path / "a" / "ckpt_000001.pt.part").mkdir()
    trainer, run_folder = start(tmp_path / "a", data, *flags)
    close(run_folder)
    assert trainer.step == 0
    assert sorted(os.listdir(tmp_path / "a")) == ["ckpt_000001.pt.part", "lock", "log.jsonl"]


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_a_log_whose_checkpoints_were_deleted_is_not_emptied(flags, data, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "log.jsonl").write_text('{"step": 1}\n', encoding="utf-8")
    with pytest.raises(UserError, match="log.jsonl: a log without a checkpoint; move it away"):
        start(tmp_path / "a", data, *flags)
    assert (tmp_path / "a" / "log.jsonl").read_text(encoding="utf-8") == '{"step": 1}\n'


def test_the_same_command_twice_trains_twice_and_resume_takes_the_newest(
    data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    flags = [f"--data={data}", *SMALL, "--variant=base", "--max_steps=1"]
    for name in ("smoke-base", "smoke-base-2", "smoke-base-3"):
        assert run_main(*flags) == 0
        assert newest_of(tmp_path / "out" / name) == "ckpt_000001.pt"
    shutil.rmtree(tmp_path / "out" / "smoke-base-2")
    (tmp_path / "out" / "smoke-base-9").mkdir()
    (tmp_path / "out" / "smoke-base_more").mkdir()
    (tmp_path / "out" / "smoke-base_more" / "log.jsonl").write_text("", encoding="utf-8")
    for step, newest, taken in (
        (2, "smoke-base-3", "smoke-base-2"),
        (3, "smoke-base-2", "smoke-base-4"),
    ):
        assert run_main("--variant=base", "--resume", f"--max_steps={step}") == 0
        assert newest_of(tmp_path / "out" / newest) == f"ckpt_{step:06d}.pt"
        assert run_main(*flags) == 0
        assert newest_of(tmp_path / "out" / taken) == "ckpt_000001.pt"


def test_a_run_whose_folder_was_moved_stops_and_leaves_the_other_run_alone(data, tmp_path):
    """Another run has begun under the old name: the first must not write there, nor delete."""

    def move(trainer):
        if trainer.step == 5:
            os.rename(tmp_path / "a", tmp_path / "old")
            shutil.copytree(tmp_path / "old", tmp_path / "a")
            (tmp_path / "a" / "ckpt_000004.pt").write_bytes(b"of another run")
            (tmp_path / "a" / "log.jsonl").write_bytes(b"of another run")

    with pytest.raises(UserError, match="the folder of this run was moved, removed or replaced"):
        train_fully(tmp_path / "a", data, "--keep=1", before_step=move)
    assert newest_of(tmp_path / "a") == newest_of(tmp_path / "old") == "ckpt_000004.pt"
    for name in ("ckpt_000004.pt", "log.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == b"of another run"
    assert log_of(tmp_path / "old")[-1]["step"] == 8


@pytest.mark.parametrize(
    "environment, words",
    [
        (
            dict(RANK="1"),
            "^RANK set in the environment, but not LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_P",
        ),
        (dict(WORLD_SIZE="2"), "^WORLD_SIZE set .*but not RANK"),
        (
            dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0"),
            "but not MASTER_ADDR, MASTER_PORT: .*torchrun",
        ),
    ],
)
def test_processes_that_torchrun_did_not_start_are_refused(environment, words, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, environment.get(name, ""))
    with pytest.raises(UserError, match=words):
        T.prepare([])


def test_no_processes_and_empty_variables_are_one_process(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("MASTER_ADDR", "host")  # some clusters set it for everybody
    T.check_processes()
    code = "import train; print(train.RANK, train.WORLD_SIZE)"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.stdout == "0 1\n", done.stderr


def test_a_run_that_diverges_in_its_last_step_has_failed(data, tmp_path, monkeypatch, capsys):
    update = T.Trainer.update

    def diverge(trainer, windows):
        record = update(trainer, windows)
        trainer.model.head.weight.data.fill_(math.inf)
        return record

    monkeypatch.setattr(T.Trainer, "update", diverge)
    assert run_main(f"--data={data}", f"--out_dir={tmp_path / 'a'}", *SMALL, "--max_steps=1") == 3
    out = capsys.readouterr().out
    assert "not finite at the evaluation after step 1: validation loss" in out
    assert "done" not in out and "best" not in out
    assert [record["step"] for record in log_of(tmp_path / "a", "val_loss")] == [0]


def test_the_first_step_is_printed_in_100_columns(data, tmp_path, capsys):
    assert run_main(f"--data={data}", f"--out_dir={tmp_path / 'a'}", *SMALL, "--max_steps=3") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " ms  " in line]
    assert [line.split()[1] for line in lines] == ["1/3", "3/3"]
    model = tiny("base")
    config = T.TrainConfig(device="cpu")
    trainer = types.SimpleNamespace(config=config, model=model, model_config=model.config)
    record = dict(step=38147, loss=12.3456, z=123.4, grad_norm=12.345, lr=1e-3, ms=2067.1)
    line = T.progress_line(trainer, record, 99 * 3600)
    assert len(line) <= 100
    assert line == (
        "step 38147/38147  loss 12.3456  norm 12.35  lr 1.0e-03  2067 ms  127k tok/s  "
        "ETA 99:00:00  MFU n/a"
    )


@pytest.mark.parametrize("processes, share", [(1, "40.0%"), (4, "10.0%")])
def test_mfu_is_that_of_one_device(processes, share, monkeypatch):
    monkeypatch.setattr(T, "WORLD_SIZE", processes)
    monkeypatch.setattr(T, "flops_per_token", lambda model, length: 1000)
    monkeypatch.setattr(T, "peak_flops", lambda device: 2.5e6)
    model_config = types.SimpleNamespace(block_size=8)
    config = T.TrainConfig(device="cpu", total_batch_size=500)
    trainer = types.SimpleNamespace(config=config, model=None, model_config=model_config)
    record = dict(step=3, loss=1.0, grad_norm=1.0, lr=0.1, ms=500.0)
    line = T.progress_line(trainer, record, 61)
    assert "1k tok/s  ETA 0:01:01" in line and line.endswith(f"MFU {share}")


def test_epochs_and_time_left_are_those_to_come(data, tmp_path, capsys, monkeypatch):
    """12 steps of 4 windows out of 41; 2 s a step after 5 of them."""
    trainer, run_folder = start(tmp_path / "a", data)
    assert "12 steps, 1,536 tokens, 1.17 epochs" in capsys.readouterr().out
    asked = []
    monkeypatch.setattr(T, "progress_line", lambda trainer, record, left: str(asked.append(left)))
    trainer.step = 5
    trainer.config = replace(trainer.config, log_every=1)
    T.report_step(trainer, run_folder, dict(step=5), 2.0, is_first=False)
    close(run_folder)
    assert asked == [14.0]


def test_printed_commands_can_be_pasted(data, tmp_path, capsys):
    folder = tmp_path / "a run"
    assert run_main(f"--data={data}", f"--out_dir={folder}", *SMALL, "--max_steps=1") == 0
    assert f"train.py --resume --out_dir='{folder}' --max_steps=2" in capsys.readouterr().out


def test_a_folder_is_for_one_run_at_a_time(whole, data, tmp_path):
    _, run_folder = start(tmp_path / "a", data)
    with pytest.raises((InputError, UserError), match="another run is writing there"):
        T.RunFolder(tmp_path / "a", resume=True)
    close(run_folder)
    with pytest.raises((InputError, UserError), match="no folder"):
        T.prepare([f"--out_dir={tmp_path / 'nowhere'}", "--resume"])
    with pytest.raises((InputError, UserError), match="holds a run already.*--resume"):
        start(copied(whole, tmp_path / "b"), data)


@pytest.mark.parametrize("keep, steps", [(2, [9, 12]), (0, [0, 3, 6, 9, 12])])
def test_only_the_newest_checkpoints_are_kept(keep, steps, data, tmp_path):
    train_fully(tmp_path / "a", data, f"--keep={keep}", "--save_every=3")
    names = [f"ckpt_{step:06d}.pt" for step in steps]
    assert sorted(os.listdir(tmp_path / "a")) == [*names, "lock", "log.jsonl"]


def test_what_a_group_says_comes_from_the_settings_after_a_resume(whole, tmp_path):
    """A run saved on CUDA has fused=True, and peak rates may be given anew; states come from the
    file."""
    path = copied(whole, tmp_path / "a") / "ckpt_000012.pt"
    checkpoint = torch.load(path, weights_only=True)
    group = checkpoint["optimizers"][1]["param_groups"][0]
    group.update(fused=True, peak_lr=7.0, eps=7.0)
    torch.save(checkpoint, path)
    resumed = resume(tmp_path / "a", "--adamw_lr=0.002", "--max_steps=13", "--final_lr=1")
    group = resumed.optimizers[1].param_groups[0]
    assert (group["fused"], group["eps"]) == (False, 1e-8)
    assert group["peak_lr"] == group["lr"] == 0.002
    assert resumed.optimizers[1].state_dict()["state"][0]["step"] == 13


# -------------------------------------------------------------------------------------------- disks


@pytest.mark.parametrize("split, steps", [("train", (6, 7)), ("val", (8,))])
@pytest.mark.parametrize("content", [b"", None])
def test_data_that_go_bad_in_mid_run_cost_no_step(content, split, steps, whole, data, tmp_path):
    """Shards that are cut off, or hold a bad token id, in step 6: found by the next reading, where
    step 7 was not read ahead already, or by the next evaluation."""
    shutil.copytree(data, tmp_path / "data")

    def spoil(trainer):
        for path in (tmp_path / "data").glob(f"t_{split}_*.bin") if trainer.step == 5 else []:
            if content is None:
                pf.write_shard(path, np.full(900, 300))
            else:
                path.write_bytes(content)

    spoilt = train_fully(tmp_path / "a", tmp_path / "data", "--save_every=0", before_step=spoil)
    assert spoilt.step in steps and newest_of(tmp_path / "a") == f"ckpt_{spoilt.step:06d}.pt"
    assert f"t_{split}_00000" in spoilt.stopped
    message = f"saved after step {spoilt.step}: .*train.py --resume --out_dir="
    with pytest.raises((InputError, UserError), match=message):
        T.conclude(spoilt, spoilt.stopped, spoilt.stop.problem)
    shutil.rmtree(tmp_path / "data")
    shutil.copytree(data, tmp_path / "data")
    assert same_state(whole, resume(tmp_path / "a")) == []
    assert log_of(tmp_path / "a") == log_of(pathlib.Path(whole.config.out_dir))


def test_log_lines_that_a_full_disk_refuses_are_written_before_the_next_checkpoint_counts_them(
    tmp_path, capsys
):
    """In order, none lost."""
    folder = T.RunFolder(str(tmp_path), resume=False)
    folder.open_log(0)
    real = folder.log

    def flush():
        raise OSError("no space left")

    folder.log = types.SimpleNamespace(write=real.write, fileno=real.fileno, flush=flush)
    folder.write(dict(step=1))
    folder.write(dict(step=2))
    assert capsys.readouterr().out.count("COULD NOT WRITE") == 2
    assert not os.path.getsize(tmp_path / "log.jsonl")
    folder.log = real
    assert folder.save(dict(step=2), keep=1)
    folder.write(dict(step=3))
    written = (tmp_path / "log.jsonl").read_text(encoding="utf-8")
    assert written == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    checkpoint = torch.load(tmp_path / "ckpt_000002.pt", weights_only=True)
    assert checkpoint["log_size"] == 2 * len('{"step": 1}\n')


LOG_LOST = "removed, replaced or cut: earlier records are missing"


@pytest.mark.parametrize(
    "harm",
    [os.remove, lambda path: os.rename(path, f"{path}.old"), lambda path: os.truncate(path, 0)],
)
def test_a_log_that_goes_in_mid_run_costs_no_checkpoint_and_is_missed(
    harm, whole, data, tmp_path, capsys
):
    def take(trainer):
        if trainer.step == 5:
            harm(tmp_path / "a" / "log.jsonl")

    assert same_state(whole, train_fully(tmp_path / "a", data, before_step=take)) == []
    assert newest_of(tmp_path / "a") == "ckpt_000012.pt"
    assert capsys.readouterr().out.count(LOG_LOST) == 1
    assert [record["step"] for record in log_of(tmp_path / "a", "loss")] == list(range(6, 13))


def test_a_run_that_is_resumed_with_a_shorter_log_says_so(whole, tmp_path, capsys):
    folder = copied(whole, tmp_path / "a")
    os.truncate(folder / "log.jsonl", 0)
    resume(folder, "--max_steps=13")
    assert capsys.readouterr().out.count(LOG_LOST) == 1


def test_a_character_that_the_terminal_lacks_does_not_end_the_output():
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    pf.say("\ufffd one", file=terminal)
    pf.say("two", file=terminal)
    assert terminal.buffer.getvalue() == b"? one\ntwo\n"


# true makes torch import Inductor, 2 seconds; one thread is exact anyway
FAST_START = ["--deterministic=false"]


def launch(folder, *flags):
    """train.py as a user starts it."""
    command = [sys.executable, str(HERE / "train.py"), *SMALL]
    command += [f"--out_dir={folder}", *FAST_START, *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, text=True, encoding="utf-8", **pipes)


def wait_for(process, condition):
    """Wait until condition(), or until the process has ended; one that hangs is ended."""
    end = time.monotonic() + PATIENCE
    while process.poll() is None and not condition():
        if time.monotonic() > end:
            process.terminate()
            pytest.fail("waited too long")
        time.sleep(0.05)


def lines_of(folder):
    """How many lines the log has."""
    path = folder / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is POSIX")
def test_a_full_disk_does_not_stop_training_nor_spoil_a_checkpoint(
    data, tmp_path, capsys, monkeypatch
):
    """Files may not grow past 30 kB after the first checkpoint: a second does not fit, log.jsonl
    does."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
        message = run_main(f"--data={data}", f"--out_dir={tmp_path / 'b'}", *SMALL)
        assert message.endswith("the run ends at step 0 without a checkpoint of it")  # at once
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        save = T.save

        def save_then_fill(*args, **kwargs):
            save(*args, **kwargs)
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))

        monkeypatch.setattr(T, "save", save_then_fill)
        message = run_main(f"--data={data}", f"--out_dir={tmp_path / 'a'}", *SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.fullmatch("train.py: .*ends at step 12 without a checkpoint.*", message)
    assert capsys.readouterr().out.count("COULD NOT WRITE") == 4  # b after step 0; a after 4, 8, 12
    assert sorted(os.listdir(tmp_path / "a")) == ["ckpt_000000.pt", "lock", "log.jsonl"]
    assert len(log_of(tmp_path / "a", "loss")) == 12


def test_an_old_checkpoint_that_cannot_be_removed_stays(tmp_path, monkeypatch, capsys):
    folder = T.RunFolder(str(tmp_path), resume=False)
    folder.open_log(0)
    assert folder.save(dict(step=1), keep=1)

    def remove(path):
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "remove", remove)
    assert folder.save(dict(step=2), keep=1)
    out = capsys.readouterr().out
    assert "COULD NOT REMOVE old checkpoints" in out and "WRITE" not in out
    assert len(folder.checkpoints()) == 2


@pytest.mark.parametrize("where", ["full disk", "closed pipe", "closed stream"])
def test_output_that_cannot_be_written_does_not_stop_training(where, data, tmp_path, monkeypatch):
    """A closed stream, as in `python train.py >&- 2>&-`, is None in Python."""
    if where == "full disk" and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    reader, writer = os.pipe()
    os.close(reader)
    path = "/dev/full" if where == "full disk" else os.devnull
    with os.fdopen(writer, "w") as pipe, open(path, "w", encoding="utf-8") as full:
        stream = {"full disk": full, "closed pipe": pipe, "closed stream": None}[where]
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        code = run_main(f"--data={data}", f"--out_dir={tmp_path / 'a'}", *SMALL)
    assert code == 0 and newest_of(tmp_path / "a") == "ckpt_000012.pt"
    assert len(log_of(tmp_path / "a", "loss")) == 12


# -------------------------------------------------------------------------------- signals and kills

ENDLESS = ["--max_steps=100000", "--eval_every=0", "--save_every=0"]


@pytest.fixture
def handlers():
    """Python's own signal handlers, also where the tests run in the background or under nohup.

    Those of this process are put back after the test.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name, times", [("SIGTERM", 1), ("SIGHUP", 2), ("SIGUSR1", 2)])
def test_a_signal_is_obeyed_after_the_step(
    name, times, data, handlers, tmp_path, monkeypatch, capsys
):
    """A closed terminal may say so twice."""
    number = signal.Signals[name]
    update = T.Trainer.update

    def signalled(trainer, windows):
        for _ in range(times if trainer.step == 4 else 0):
            os.kill(os.getpid(), number)
        return update(trainer, windows)

    monkeypatch.setattr(T.Trainer, "update", signalled)
    signal.signal(number, lambda *_: None)  # a run that is deaf to it ends with code 0
    flags = [f"--data={data}", f"--out_dir={tmp_path / 'a'}", *SMALL]
    assert run_main(*flags, stop=T.Stop) == 128 + number
    assert f"stopped by {name} after step 5, saved" in capsys.readouterr().out
    assert newest_of(tmp_path / "a") == "ckpt_000005.pt"


@pytest.mark.parametrize("processes, second", [(1, signal.SIG_DFL), (2, signal.SIG_IGN)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_ends_a_single_process_and_no_other(
    number, processes, second, handlers, monkeypatch
):
    """torchrun sends it twice to each of several processes."""
    monkeypatch.setattr(T, "WORLD_SIZE", processes)
    stop = T.Stop()
    assert signal.getsignal(number) == stop.ask
    os.kill(os.getpid(), number)
    assert stop.signal == number and signal.getsignal(number) == second


def test_a_hangup_is_ignored_under_nohup(handlers):
    """nohup starts a program with SIGHUP ignored, so that it outlives the terminal."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = T.Stop()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.agreed() == ""
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.agreed() == "SIGUSR1"


def test_a_signal_while_the_processes_agree_is_not_lost(monkeypatch):
    stop = T.Stop.__new__(T.Stop)
    reduce = T.all_reduce
    stop.signal = 0
    stop.problem = ""

    def signalled(flags, operation):
        stop.signal = signal.SIGUSR1
        return reduce(flags, operation)

    monkeypatch.setattr(T, "all_reduce", signalled)
    assert [stop.agreed(), stop.agreed()] == ["", "SIGUSR1"]


@pytest.mark.slow
def test_ctrl_c_saves_tells_how_to_go_on_and_exits_with_its_code(data, handlers, tmp_path):
    folder = tmp_path / "a"
    process = launch(folder, f"--data={data}", *ENDLESS)
    wait_for(process, lambda: lines_of(folder) > 3)
    process.send_signal(signal.SIGINT)
    out, err = output_of(process)
    step = int(newest_of(folder)[5:-3])
    assert process.returncode == 130 and "Traceback" not in err
    assert "stopped by SIGINT" in out and f"python train.py --resume --out_dir={folder}" in out
    assert log_of(folder)[-1]["step"] == step
    straight = train_fully(tmp_path / "b", data, *ENDLESS, stop_after=step + 2)
    assert same_state(straight, resume(folder, stop_after=step + 2)) == []


@pytest.mark.slow
def test_a_storm_of_kills_loses_nothing(data, tmp_path):
    """One command, again and again: no checkpoint is lost or unreadable, no log line lost or
    doubled, and the end is bit for bit that of an undisturbed run. For as many kills as you like:
    KILLS=100 python -m pytest paper/test_runs.py -k storm"""
    kills = int(os.environ.get("KILLS", 3))
    folder = tmp_path / "a"
    rng = np.random.default_rng(3)
    flags = [
        f"--data={data}",
        f"--max_steps={40 * kills}",
        "--save_every=5",
        "--eval_every=20",
        "--keep=2",
    ]
    for _ in range(kills):
        process = launch(folder, *flags, *(["--resume"] if folder.exists() else []))
        lines = lines_of(folder)
        wait_for(process, lambda: lines_of(folder) not in (0, lines))
        time.sleep(float(rng.uniform(0, 0.7)))
        process.kill()
        output_of(process)
        assert all(map(read_checkpoint, folder.glob("ckpt_*.pt")))
    assert same_state(train_fully(tmp_path / "b", data, *flags), resume(folder)) == []
    assert log_of(tmp_path / "b") == log_of(folder)


# ----------------------------------------------------------------------------------------- compiler


@pytest.mark.parametrize("compiled", [False, True])
def test_evaluation_keeps_the_graph_of_one_pass_at_most(compiled, data, tmp_path):
    """None if eager. A compiled run evaluates with the graph that trains; two alive at once would
    need twice the memory of a training step. Nothing is compiled here."""
    trainer, run_folder = start(tmp_path / "a", data)
    alive = [0, 0]
    close(run_folder)
    trainer.config = replace(trainer.config, compile=compiled)

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # the graph itself would be a cycle
            alive[0] += 1
            alive[1] = max(alive)

        def __del__(self):
            alive[0] -= 1

    peaks = []
    for tokens in (32, 0):  # one batch, three batches
        alive[1] = alive[0]
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            T.evaluate(trainer, tokens, Quiet())
        peaks.append(alive[1])
    assert peaks[0] == peaks[1] and (peaks[0] > 10) == compiled and alive[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["base", "resformer", "exo_dynamic"])
def test_one_graph_and_no_recompilation(variant):
    """fullgraph raises on a graph break; new documents and a last batch filled up with -100 must
    not compile again."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    objective = T.Objective(tiny(variant, n_layer=2), T.TrainConfig(dtype="bfloat16"))
    objective.compile(backend=counter, fullgraph=True, dynamic=False)
    for seed in range(3):
        idx = tokens(4, 24, seed=seed)
        targets = tokens(4, 24, seed=seed + 1)
        targets[2:] = -100 if seed == 2 else targets[2:]
        objective(idx, targets, (idx < 9).cumsum(1))[0].backward()
    assert counter.frame_count == 1


@pytest.mark.slow
def test_training_and_evaluation_share_one_graph(data, tmp_path):
    """Evaluation is in eval mode, and its last batch filled up; the model has no layer that the
    mode changes."""
    torch._dynamo.reset()
    trainer, run_folder = start(tmp_path / "a", data, "--deterministic=false")
    close(run_folder)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    trainer.objective.compile(backend=counter, fullgraph=True, dynamic=False)
    trainer.config = replace(trainer.config, compile=True)
    for _ in range(2):
        trainer.update(trainer.read_step())
        T.evaluate(trainer, 160, Quiet())
    assert counter.frame_count == 1


# ----------------------------------------------------------------------------------- many processes


@pytest.mark.slow
def test_three_processes_train_like_one_and_sigterm_saves_once(data, tmp_path):
    """6 sequences a step in 2 passes of 3 processes, or 6 passes of one. Sums are ordered
    differently, so not bit for bit. SIGTERM comes to torchrun, which passes it on to each
    process."""
    flags = [
        "--variant=exo_dynamic",
        "--batch_size=1",
        "--total_batch_size=192",
        "--eval_every=10",
        "--save_every=20",
        "--max_steps=100000",
        "--keep=0",
    ]
    train_fully(tmp_path / "one", data, *flags, stop_after=21)
    folder = tmp_path / "three"
    process = launch_ranks(3, folder, *SMALL, f"--data={data}", *flags, *FAST_START)
    wait_for(process, lambda: lines_of(folder) and len(log_of(folder, "loss")) > 21)
    process.terminate()
    out = output_of(process)[0]
    assert out.count("stopped by SIGTERM") == 1 and process.returncode != 0
    assert log_of(folder)[-1]["step"] == int(newest_of(folder)[5:-3])
    for a, b in zip(log_of(tmp_path / "one"), log_of(folder)):
        assert list(a) == list(b) and a["step"] == b["step"]
        assert all(abs(a[key] - b[key]) < 1e-5 for key in ("loss", "val_loss") if key in a)
    for (name, p), q in zip(weights(tmp_path / "one", 20).items(), weights(folder, 20).values()):
        torch.testing.assert_close(p, q, atol=2e-4, rtol=0, msg=name)


@pytest.mark.slow
def test_an_input_error_under_torchrun_is_said_once(data, tmp_path):
    """The first process says it; the others leave without the traceback of a lost connection."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "ckpt_000001.pt").write_bytes(b"")
    process = launch_ranks(2, tmp_path / "a", *SMALL, f"--data={data}")
    out = output_of(process)[0]
    assert process.returncode == 1
    assert out.count("holds a run already") == 1
    assert "Connection closed" not in out and 'train.py", line' not in out
