"""Tests of what train.py does for a GPU and for several processes, without a GPU. No network."""

import importlib.util
import json
import math
import subprocess
import sys
import threading
import types
from datetime import timedelta

import numpy as np
import pytest
import torch

import train as T
from muon import polar_express
from prepare_fineweb import UserError
from test_model import HERE, SMALL, Quiet, close, data, log_of, start, train_fully, weights

# ------------------------------------------------------------------------------------- 1 bfloat16


@pytest.fixture
def device(monkeypatch):
    """device(name, has_bfloat16): torch answers as on such a device; emulation is always there."""

    def device(name, has_bfloat16=True):
        monkeypatch.setattr(T, "choose_device", lambda asked: name)
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True: has_bfloat16 or including_emulation,
        )
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(T.shutil, "which", lambda name: name)
        monkeypatch.setattr(T.os.path, "exists", lambda path: True)

    return device


@pytest.mark.parametrize(
    "name, has_bfloat16, dtype, compile, lines",
    [
        ("cuda", True, "bfloat16", True, []),
        (
            *("cuda", False, "float32", True),
            ["Tesla T4 has no bfloat16: dtype=float32, muon_dtype=float32"],
        ),
        ("mps", True, "float32", False, []),
        ("cpu", True, "float32", False, []),
    ],
)
def test_auto_is_bfloat16_only_where_the_device_computes_in_it(
    name, has_bfloat16, dtype, compile, lines, device, capsys
):
    device(name, has_bfloat16)
    config = T.resolve({})[1]
    assert (config.dtype, config.muon_dtype, config.compile) == (dtype, dtype, compile)
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize("dtype", ["bfloat16", "pure_bfloat16"])
def test_bfloat16_is_not_compiled_for_a_card_that_emulates_it(dtype, device):
    device("cuda", has_bfloat16=False)
    with pytest.raises(UserError, match=f"--dtype={dtype}: .*Tesla T4.*--compile=false") as error:
        T.resolve(dict(dtype=dtype))
    assert "\n" not in str(error.value)
    assert T.resolve(dict(dtype=dtype, compile=False))[1].dtype == dtype
    device("cuda", has_bfloat16=True)
    assert T.resolve(dict(dtype=dtype))[1].compile


# ---------------------------------------------------------------------------------- 2 pinned memory


@pytest.mark.parametrize("name", ["cuda", "mps", "cpu"])
def test_a_batch_for_cuda_is_copied_from_pinned_memory_without_waiting(name, monkeypatch):
    pinned = []
    copies = []

    def pin_memory(tensor):
        pinned.append(tensor.data_ptr())
        return tensor

    def to(tensor, device, non_blocking=False):
        copies.append((tensor.data_ptr(), device, non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    windows = np.arange(6, dtype=np.uint16).reshape(2, 3)
    config = types.SimpleNamespace(device=name, mask_documents=False)
    idx, targets, docs = T.to_batch(windows, 256, config)
    assert idx.tolist() == [[0, 1], [3, 4]]
    assert targets.tolist() == [[1, 2], [4, 5]]
    assert [copy[1:] for copy in copies] == [(name, name == "cuda")]
    assert pinned == [copy[0] for copy in copies if name == "cuda"]


# ------------------------------------------------------------------------------- 3 reading ahead


@pytest.fixture
def trainer(data, tmp_path):
    """(Trainer of SMALL's run, its folder)."""
    trainer, folder = start(tmp_path / "run", data, "--max_steps=5", "--eval_every=2")
    yield trainer, folder
    close(folder)


def test_the_next_step_is_read_in_a_thread_while_this_one_is_computed(trainer, monkeypatch):
    trainer, folder = trainer
    asked = {step: threading.Event() for step in range(7)}
    threads = []
    received = []
    read = T.Trainer.read
    update = T.Trainer.update

    def watched_read(self, step, tokens):
        asked[step].set()
        threads.append(threading.current_thread())
        return read(self, step, tokens)

    def watched_update(self, windows):
        last = self.step == 4
        assert last or asked[self.step + 1].wait(20), f"step {self.step + 1} is not read"
        received.append(windows)
        return update(self, windows)

    monkeypatch.setattr(T.Trainer, "read", watched_read)
    monkeypatch.setattr(T.Trainer, "update", watched_update)
    assert T.run(trainer, folder, Quiet()) == ""
    assert [step for step in asked if asked[step].is_set()] == list(range(5))
    assert all(thread.daemon for thread in threads)
    assert threading.main_thread() not in threads
    order = trainer.train.shuffled(trainer.config.seed, 0, 5 * 4)  # 4 windows a step
    assert np.array_equal(np.concatenate(received).reshape(20, -1), order)


def test_what_the_thread_raises_is_raised_in_the_loop(trainer, monkeypatch):
    trainer, folder = trainer
    read = T.Trainer.read

    def broken(self, step, tokens):
        if step == 3:
            raise ZeroDivisionError("a bug")
        return read(self, step, tokens)

    monkeypatch.setattr(T.Trainer, "read", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        T.run(trainer, folder, Quiet())
    assert trainer.step == 3


def test_data_that_cannot_be_read_ahead_cost_no_step(trainer, monkeypatch):
    trainer, folder = trainer
    stop = Quiet()
    read = T.Trainer.read

    def unreadable(self, step, tokens):
        if step == 3:
            raise UserError("shard 7 is gone")
        return read(self, step, tokens)

    monkeypatch.setattr(T.Trainer, "read", unreadable)
    assert T.run(trainer, folder, stop) == "shard 7 is gone"
    assert trainer.step == trainer.saved == 3


def test_the_milliseconds_of_a_step_are_all_but_evaluating_and_saving(trainer, monkeypatch):
    """By hand: 5 s until the windows are there, 1 s to agree, 2 s to compute."""
    trainer, folder = trainer
    now = [0.0]

    def taking(seconds, function):
        def taken(*args, **given):
            now[0] += seconds
            return function(*args, **given)

        return taken

    class Slow(Quiet):
        read = taking(5, Quiet.read)
        agreed = taking(1, Quiet.agreed)

    monkeypatch.setattr(T.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(T.Trainer, "update", taking(2, T.Trainer.update))
    monkeypatch.setattr(T, "evaluate", taking(100, T.evaluate))
    monkeypatch.setattr(T, "save", taking(50, T.save))
    T.run(trainer, folder, Slow())
    with open(folder.log_path, encoding="utf-8") as log:
        records = [json.loads(line) for line in log]
    assert [record["ms"] for record in records if "loss" in record] == [8000.0] * 5


# ---------------------------------------------------------------------------- 4 several processes


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_each_process_orthogonalises_its_share(processes, n, monkeypatch):
    matrices = torch.randn(n, 6, 4, generator=torch.Generator().manual_seed(n))
    shares = []
    numbers = []

    def polar(share):
        numbers.append(len(share))
        return polar_express(share)

    def gather(whole, share):
        shares.append(share)
        whole.copy_(torch.cat((shares * processes)[:processes]))

    monkeypatch.setattr(T.dist, "all_gather_into_tensor", gather)
    monkeypatch.setattr(T, "WORLD_SIZE", processes)
    for rank in range(processes):
        monkeypatch.setattr(T, "RANK", rank)
        found = T.shared(polar, matrices)  # the last process has seen all shares
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, polar_express(matrices))
    assert numbers == [math.ceil(n / processes)] * processes


CHECKED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import torch
import train as T

shared = T.shared

def checked(polar, matrices):
    found = shared(polar, matrices)
    assert torch.equal(found, polar(matrices)), matrices.shape
    if T.RANK == 2:
        print("equal", len(matrices), flush=True)
    return found

T.shared = checked
sys.exit(T.main())
"""


@pytest.mark.slow
def test_three_processes_orthogonalise_what_one_would_bit_for_bit(data, tmp_path):
    """Batches of 2, 4, 8 and 12 matrices and more: not all of them can be divided by three."""
    script = tmp_path / "checked.py"
    script.write_text(CHECKED, encoding="utf-8")
    flags = [f"--data={data}", f"--out_dir={tmp_path / 'run'}", *SMALL, "--batch_size=1"]
    flags += ["--total_batch_size=96", "--max_steps=3", "--muon_dtype=bfloat16"]
    out = torchrun(tmp_path, 1, 3, script, HERE, *flags)[0]
    numbers = {int(line.split()[1]) for line in out.splitlines() if line.startswith("equal ")}
    assert {n % 3 for n in numbers} == {0, 1, 2}, numbers
    assert len(log_of(tmp_path / "run", "loss")) == 3


def torchrun(folder, nodes, processes, *command):
    """What torchrun prints on each of `nodes` agents of this machine, which meet at a file."""
    meet = [
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint={folder / 'meeting'}",
        "--rdzv_conf=store_type=file",
        "--rdzv_id=test",
        "--local_addr=localhost",
    ]
    start = [sys.executable, "-m", "torch.distributed.run", *meet]
    start += [f"--nnodes={nodes}", f"--nproc_per_node={processes}", *map(str, command)]
    agents = []
    for _ in range(nodes):
        output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        agents.append(subprocess.Popen(start, text=True, encoding="utf-8", **output))
    try:
        outputs = [agent.communicate(timeout=600)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0] * nodes, outputs
    return outputs


@pytest.mark.slow
def test_two_nodes_of_one_process_equal_one_process_bit_for_bit(data, tmp_path):
    """Halving is exact, so two processes are one with twice the accumulation, wherever they are."""
    flags = ["--batch_size=1", "--total_batch_size=64", "--max_steps=4"]
    one = train_fully(tmp_path / "one", data, *flags)
    command = [HERE / "train.py", f"--data={data}", f"--out_dir={tmp_path / 'two'}"]
    outputs = torchrun(tmp_path, 2, 1, *command, *SMALL, *flags)
    assert sum("done: 4 steps" in out for out in outputs) == 1  # the first process alone reports
    two = weights(tmp_path / "two", 4)
    for name, p in one.model.state_dict().items():
        assert torch.equal(p, two[name]), name


@pytest.mark.parametrize(
    "processes, here, words",
    [
        (1, None, "python"),
        (8, "8", "torchrun --nproc_per_node=8"),
        (16, "8", "torchrun --nnodes=2 --nproc_per_node=8"),
    ],
)
def test_the_command_that_goes_on_starts_as_many_processes(processes, here, words, monkeypatch):
    monkeypatch.setattr(T, "WORLD_SIZE", processes)
    if here:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    assert T.launcher() == words


@pytest.mark.parametrize("processes, device", [(1, ""), (2, " --device=cpu")])
def test_the_command_that_goes_on_names_the_device_to_several_processes(
    processes, device, monkeypatch, capsys
):
    """They join their group by it before they read the checkpoint."""
    trainer = types.SimpleNamespace(
        step=3, config=T.TrainConfig(device="cpu", out_dir="a"), model_config=T.ModelConfig()
    )
    monkeypatch.setattr(T, "WORLD_SIZE", processes)
    T.conclude(trainer, "SIGTERM", "")
    assert capsys.readouterr().out.endswith(f" train.py --resume --out_dir=a{device}\n")


@pytest.mark.parametrize("name, backend", [("cpu", "gloo"), ("cuda", "cpu:gloo,cuda:nccl")])
def test_a_process_that_hangs_ends_the_others_after_ten_minutes(name, backend, monkeypatch):
    joined = []
    chosen = []

    def init(backend, timeout):
        joined.append((backend, timeout))

    monkeypatch.setattr(T.dist, "init_process_group", init)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    T.init_processes(name)
    assert joined == [(backend, timedelta(minutes=10))]
    assert chosen == ([1] if name == "cuda" else [])


JOINED = """
import os, sys, weakref
sys.path.insert(0, sys.argv[1])
import train as T
os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
T.init_processes("cpu")
group = weakref.ref(T.dist.group.WORLD)
import torch._dynamo
T.dist.destroy_process_group()
print("left:", group())
"""


def test_no_thread_of_the_group_lives_on_to_abort_the_process_at_its_exit():
    """Where Dynamo kept the group, one of 25 pairs of processes ended with SIGABRT."""
    command = [sys.executable, "-c", JOINED, HERE]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.stdout == "left: None\n", done.stdout + done.stderr


@pytest.mark.parametrize("end", ["the last step", "SIGTERM", "bad data", "not finite"])
def test_the_processes_leave_their_group_however_a_run_ends(end, monkeypatch):
    left = []

    def run(trainer, folder, stop):
        if end == "not finite":
            raise T.Diverged("step 3")
        stop.signal = 15 * (end == "SIGTERM")
        stop.problem = end * (end == "bad data")
        return "" if end == "the last step" else end

    trainer = types.SimpleNamespace(
        step=3, config=T.TrainConfig(sample_tokens=0), model_config=T.ModelConfig()
    )
    monkeypatch.setattr(T, "Stop", lambda: types.SimpleNamespace(signal=0, problem=""))
    monkeypatch.setattr(T, "prepare", lambda argv: (trainer, None))
    monkeypatch.setattr(T, "run", run)
    monkeypatch.setattr(T, "WORLD_SIZE", 2)
    monkeypatch.setattr(T.dist, "destroy_process_group", lambda: left.append(True))
    if end == "bad data":
        with pytest.raises(T.UserError, match="bad data; the run is saved after step 3"):
            T.main()
    else:
        assert T.main() == {"the last step": 0, "SIGTERM": 143, "not finite": 3}[end]
    assert left == [True]


# ------------------------------------------------------------------------------------- 5 the peak


@pytest.mark.parametrize(
    "name, tera",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", math.inf),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", math.inf),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 D", math.inf),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", math.inf),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", math.inf),
        ("Tesla T4", math.inf),
    ],
)
def test_the_peak_is_that_of_the_card_and_of_no_other(name, tera, monkeypatch):
    """Dense bfloat16 FLOP/s with float32 sums, from NVIDIA's data sheets."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert T.peak_flops("cuda") == tera * 1e12
    assert T.peak_flops("cpu") == math.inf
