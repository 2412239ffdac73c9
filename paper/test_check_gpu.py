"""Tests of check_gpu.py: what its rows say, that a wrong result fails, and what it prints where there is no GPU."""
import pytest
import torch

import check_gpu
from model import InputError, KVCache
from prepare_fineweb import command_line
from train import git_revision


@pytest.fixture
def run(call, monkeypatch, capsys):
    """run(*flags): (exit code, lines before the block to paste, lines in it); no check here needs training data."""
    monkeypatch.setattr(check_gpu, "write_default_shards", lambda folder: None)

    def run(*flags):
        code = call(check_gpu.main, *flags)
        before, block = capsys.readouterr().out.split("\nTo paste into an issue:\n\n```\n")
        return code, before.splitlines(), block.removesuffix("\n```\n").splitlines()
    return run


def test_the_block_to_paste_names_machine_torch_and_commit_and_holds_every_row(run):
    code, before, block = run("--device=cpu", "--only", "cache", "muon", "variants")
    assert code == 0 and block[0].startswith("check_gpu.py: cpu, ")
    assert f"torch {torch.__version__}, commit {git_revision()[:10]}" in block[0]
    assert block[1:-1] == [line for line in before if " done after " not in line] and block[-1].startswith("0 failed; ")
    assert [line[:6] for line in block[1:-1]] == ["pass  "] * 8


def test_a_wrong_result_fails_its_row_and_the_exit_code(run, monkeypatch):
    extend = KVCache.extend
    monkeypatch.setattr(KVCache, "extend", lambda *args: [1.01 * t for t in extend(*args)])
    code, _, block = run("--device=cpu", "--only", "cache", "muon")
    assert code == 1 and block[-1].startswith("2 failed; ")
    assert [line[:6] for line in block[1:-1]] == ["FAIL  "] * 2 + ["pass  "] * 2


def test_a_nan_in_any_tensor_fails_and_a_check_that_breaks_does_not_end_the_run(run, monkeypatch):
    good, bad = torch.ones(2), torch.tensor([1.0, torch.nan])

    def broken(device, data):
        yield "nan", check_gpu.distance({"a": good, "b": bad, "c": good}, {"a": good, "b": good, "c": good}), 1.0
        raise RuntimeError("no such kernel")
    monkeypatch.setitem(check_gpu.CHECKS, "cache", broken)
    code, _, block = run("--device=cpu", "--only", "cache", "muon")
    assert code == 1 and "nan" in block[1] and block[2] == "FAIL  cache broke: RuntimeError: no such kernel"
    assert [line[:6] for line in block[1:-1]] == ["FAIL  "] * 2 + ["pass  "] * 2


def test_on_a_gpu_the_checks_run_generated_code(monkeypatch):
    used = []
    monkeypatch.setattr(torch, "compile", lambda function, backend, **kw: used.append(backend))
    check_gpu.compiled(torch.sin, "cuda"), check_gpu.compiled(torch.sin, "cpu")
    assert used == ["inductor", "aot_eager"]


def test_what_needs_two_gpus_says_so_and_is_no_failure(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert list(check_gpu.rows_of("processes", "cuda", "")) == [
        ("skip", "skip  2 processes against 1: needs two GPUs, here 1")]


def test_no_gpu_is_one_line(call, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        command_line(lambda: call(check_gpu.main, "--device=cuda"), InputError)
    assert "--device=cuda is not there: torch can use cpu" in stopped.value.code and "\n" not in stopped.value.code
