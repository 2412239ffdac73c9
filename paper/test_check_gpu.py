"""Tests of check_gpu.py: its rows, that a wrong result fails, and what it does without a GPU."""

import gc
import types
import weakref

import pytest
import torch

import check_gpu
from model import InputError, KVCache, Mix, Positions
from prepare_fineweb import command_line, write_default_shards
from train import git_revision


@pytest.fixture
def run(call, monkeypatch, capsys):
    """run(*flags): (exit code, lines before the block to paste, lines in it), without data."""
    monkeypatch.setattr(check_gpu, "write_default_shards", lambda folder: None)

    def run(*flags):
        code = call(check_gpu.main, *flags)
        before, block = capsys.readouterr().out.split("\nTo paste into an issue:\n\n```\n")
        return code, before.splitlines(), block.removesuffix("\n```\n").splitlines()

    return run


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of shards to take steps on."""
    folder = str(tmp_path_factory.mktemp("data"))
    write_default_shards(folder)
    return folder


def verdicts(lines):
    """The first word of each line."""
    return [line[:6].strip() for line in lines]


# ------------------------------------------------------------------------------ 1 the report


def test_the_block_to_paste_names_machine_torch_and_commit_and_holds_every_row(run):
    code, before, block = run("--device=cpu", "--only", "cache", "muon", "variants")
    rows = [line for line in before if " done after " not in line]
    assert code == 0
    assert block[0].startswith("check_gpu.py: cpu, ")
    assert f"torch {torch.__version__}, commit {git_revision()[:10]}" in block[0]
    assert block[1:-1] == rows
    assert block[-1].startswith("0 failed; ")
    assert verdicts(rows) == ["pass"] * 8


def test_every_check_of_the_file_is_run_by_default(call, monkeypatch):
    functions = {name for name in vars(check_gpu) if name.startswith("check_")}
    assert {function.__name__ for function in check_gpu.CHECKS.values()} == functions
    ran = []
    monkeypatch.setattr(check_gpu, "write_default_shards", lambda folder: None)
    monkeypatch.setattr(check_gpu, "rows_of", lambda name, *args: ran.append(name) or [])
    assert call(check_gpu.main, "--device=cpu") == 0
    assert {f"check_{name}" for name in ran} == functions


@pytest.mark.parametrize(
    "number, limit, verdict",
    [
        (0.1, 0.1, "pass"),
        (0.1001, 0.1, "FAIL"),
        (0.0, 0.0, "pass"),
        (float("nan"), 0.1, "FAIL"),
        (0.1, None, ""),
        (None, 0.1, "skip"),
    ],
)
def test_a_row_passes_up_to_its_limit_and_nan_fails(number, limit, verdict):
    found, line = check_gpu.row("some distance", number, limit)
    assert found == verdict
    assert line.split()[0] == (verdict or "some")
    assert "some distance" in line
    assert ("at most 0.1" in line) == (limit == 0.1 and number is not None)


def test_a_check_that_breaks_is_one_failed_row_and_does_not_end_the_run(run, monkeypatch):
    good = torch.ones(2)
    bad = torch.tensor([1.0, torch.nan])

    def broken(device, data):
        expected = {"a": good, "b": good, "c": good}
        yield "nan", check_gpu.distance({"a": good, "b": bad, "c": good}, expected), 1.0
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(check_gpu.CHECKS, "cache", broken)
    code, _, block = run("--device=cpu", "--only", "cache", "muon")
    assert code == 1
    assert "nan" in block[1]
    assert block[2] == "FAIL  cache broke: RuntimeError: no such kernel"
    assert verdicts(block[1:-1]) == ["FAIL", "FAIL", "pass", "pass"]
    assert block[-1].startswith("2 failed; ")


def test_no_gpu_is_one_line(call, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        command_line(lambda: call(check_gpu.main, "--device=cuda"), InputError)
    assert "--device=cuda is not there: torch can use cpu" in stopped.value.code
    assert "\n" not in stopped.value.code


# ------------------------------------------------------------------------------ 2 the pieces


def test_distance_is_relative_and_the_largest_of_all_tensors():
    a = {"far": torch.tensor([3.0, 5.0]), "near": torch.tensor([100.0, 1.0])}
    b = {"far": torch.tensor([3.0, 4.0]), "near": torch.tensor([100.0, 0.0])}
    assert check_gpu.distance(a["far"], b["far"]) == pytest.approx(1 / 5)
    assert check_gpu.distance(a["near"], b["near"]) == pytest.approx(1 / 100)
    assert check_gpu.distance(a, b) == pytest.approx(1 / 5)


def test_the_small_model_is_the_same_each_time_and_has_no_zero_parameter():
    one, two = (check_gpu.small_model("exo_dynamic", "cpu", window=7) for _ in range(2))
    assert one.config.window == 7
    for (name, p), q in zip(one.named_parameters(), two.parameters()):
        assert torch.equal(p, q), name
        assert p.ne(0).all(), name


def test_a_batch_predicts_the_next_byte_and_has_several_documents_where_asked():
    idx, targets, docs = check_gpu.random_batch(2, 384, "cpu", documents=True)
    assert torch.equal(idx[:, 1:], targets[:, :-1])
    assert docs.shape == idx.shape
    for row, numbers in zip(idx.tolist(), docs.tolist()):
        assert numbers == [sum(token < 8 for token in row[: i + 1]) for i in range(384)]
        assert 4 < numbers[-1] < 30
    assert not torch.equal(docs[0], docs[1])
    assert check_gpu.random_batch(2, 384, "cpu")[2] is None


def test_gradients_of_two_passes_do_not_add_up_and_follow_the_dtype():
    model = check_gpu.small_model("exo", "cpu")
    batch = check_gpu.random_batch(1, 16, "cpu")
    kept = {name: t.clone() for name, t in check_gpu.gradients(model, batch).items()}
    assert kept.keys() == {"losses", *dict(model.named_parameters())}
    assert kept["losses"].shape == (3,)
    again = check_gpu.gradients(model, batch)
    assert all(torch.equal(again[name], kept[name]) for name in kept)
    rounded = check_gpu.gradients(model, batch, "bfloat16")
    assert 1e-4 < check_gpu.distance(rounded, kept) < 0.1


@pytest.mark.parametrize("device, backend", [("cuda", "inductor"), ("cpu", "aot_eager")])
def test_on_a_gpu_the_checks_run_generated_code(monkeypatch, device, backend):
    used = []
    monkeypatch.setattr(torch, "compile", lambda function, **given: used.append(given))
    check_gpu.compiled(torch.sin, device)
    assert used == [dict(backend=backend, fullgraph=True, dynamic=False)]


@pytest.mark.parametrize("there, dtypes", [(True, ["float32", "bfloat16"]), (False, ["float32"])])
def test_bfloat16_is_checked_where_the_card_computes_in_it(monkeypatch, there, dtypes):
    def supported(including_emulation):
        return there or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert [dtype for dtype, _ in check_gpu.dtypes_of("cuda")] == dtypes
    assert [dtype for dtype, _ in check_gpu.dtypes_of("cpu")] == ["float32", "bfloat16"]


@pytest.mark.parametrize(
    "device, costs, median", [("cpu", [9, 2], 2), ("cuda", [9, 5, 1, 3, 2, 4], 3)]
)
def test_the_first_call_does_not_count_and_a_gpu_is_waited_for(monkeypatch, device, costs, median):
    now = [0.0]
    pending = [0.0]
    left = iter(costs)

    def act():
        pending[0] = next(left)
        if device == "cpu":
            finish()

    def finish():
        now[0] += pending[0]

    monkeypatch.setattr(check_gpu.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", finish)
    assert check_gpu.seconds_of(act, device) == median
    assert list(left) == []


# ------------------------------------------------------------------ 3 a wrong result fails its row


def every_second(function, change):
    """The function with `change` applied to what every second call returns."""
    calls = []

    def changed(*args, **given):
        calls.append(args)
        result = function(*args, **given)
        return change(result) if len(calls) % 2 == 0 else result

    return changed


@torch.no_grad()
def change_one_gain(model):
    """The model with one gain changed."""
    dict(model.named_parameters())["layers.1.mlp_norm.weight"][3] += 5
    return model


def compiled_wrongly(function, device):
    """A compiler that gets the losses wrong by 1 %."""
    return lambda *args: [1.01 * loss for loss in function(*args)]


def without_compiling(function, device):
    """A compiler that does nothing."""
    return function


def forget_the_optimizers(trainer, checkpoint, path):
    """train.load_state, but only the weights and the position."""
    trainer.model.load_state_dict(checkpoint["model"])
    trainer.step = checkpoint["step"]
    trainer.tokens = checkpoint["tokens"]


def evaluate_without_filling_up(trainer, windows):
    """train.evaluate_batch, but with as many rows as there are."""
    trainer.objective(*check_gpu.T.to_batch(windows, trainer.tokenizer.eot, trainer.config))


def wrong_variants(patch):
    patch.setattr(check_gpu, "VARIANTS", ["gated", "exo"])
    wrong = every_second(check_gpu.small_model, change_one_gain)
    patch.setattr(check_gpu, "small_model", wrong)


def wrong_compiler(patch):
    patch.setattr(check_gpu, "compiled", compiled_wrongly)


def wrong_cache(patch):
    extend = KVCache.extend
    patch.setattr(KVCache, "extend", lambda *args: [1.01 * t for t in extend(*args)])


def wrong_muon(patch):
    wrong = every_second(check_gpu.two_muon_steps, lambda moved: {**moved, 2: 1.01 * moved[2]})
    patch.setattr(check_gpu, "two_muon_steps", wrong)


def wrong_step(patch):
    def louder(records):
        return [*records[:-1], {**records[-1], "loss": 1.01 * records[-1]["loss"]}]

    make_trainer = check_gpu.make_trainer

    def make_eager_trainer(device, data, **given):
        return make_trainer(device, data, **{**given, "compile": False})

    patch.setattr(check_gpu, "make_trainer", make_eager_trainer)
    patch.setattr(check_gpu, "take_steps", every_second(check_gpu.take_steps, louder))


def wrong_resume(patch):
    patch.setattr(check_gpu.T, "load_state", forget_the_optimizers)


def wrong_evaluation(patch):
    patch.setattr(check_gpu.T, "evaluate_batch", evaluate_without_filling_up)
    trace_only(patch)


def trace_only(patch):
    """torch.compile of a module as a trace that is run as it is."""

    def compile(module, fullgraph, dynamic, options):
        traced = torch.compile(module._call_impl, fullgraph=True, dynamic=dynamic, backend="eager")
        module._compiled_call_impl = traced

    patch.setattr(torch.nn.Module, "compile", compile)


def wrong_processes(patch):
    losses = {1: torch.tensor([4.0, 3.0, 2.0]), 2: torch.tensor([4.0, 3.0, 2.1])}
    patch.setattr(check_gpu, "losses_of_run", lambda processes, *flags: losses[processes])


@pytest.mark.parametrize(
    "plant, verdicts",
    [
        (wrong_variants, ["FAIL", "FAIL", "FAIL", "pass"]),
        (wrong_compiler, ["FAIL", "pass"]),
        (wrong_cache, ["FAIL", "FAIL"]),
        (wrong_muon, ["FAIL", "pass"]),
        (wrong_step, ["FAIL", "pass"]),
        (wrong_resume, ["FAIL", ""]),
        (wrong_evaluation, ["FAIL"]),
        (wrong_processes, ["FAIL"]),
    ],
)
def test_a_wrong_result_fails_its_row(monkeypatch, data, plant, verdicts):
    plant(monkeypatch)
    name = plant.__name__.removeprefix("wrong_")
    rows = list(check_gpu.rows_of(name, "cpu", data))
    assert [verdict for verdict, _ in rows] == verdicts, rows


def test_documents_and_windows_are_each_compared_with_the_dense_mask(monkeypatch):
    """Whatever the compiled side leaves out fails a row: documents two, the window two."""

    def rows_that_fail(name, value):
        def forgetting(function, device):
            model = function.model
            forward = model.forward
            model.forward = lambda idx, docs=None: forward(idx, None if name == "docs" else docs)
            if name == "window":
                model.config = check_gpu.variant_config("exo_dynamic", **check_gpu.SMALL)
            return function

        monkeypatch.setattr(check_gpu, "compiled", forgetting)
        return [verdict for verdict, _ in check_gpu.rows_of("documents", "cpu", "")]

    assert rows_that_fail("docs", None) == ["FAIL", "FAIL", "pass"]
    assert rows_that_fail("window", 0) == ["pass", "FAIL", "FAIL"]


def test_a_step_an_evaluation_and_a_step_are_one_graph(monkeypatch, data):
    trace_only(monkeypatch)
    ((verdict, line),) = check_gpu.rows_of("evaluation", "cpu", data)
    assert verdict == "pass"
    assert line.split()[-4] == "1"


def test_a_wrong_result_is_exit_code_1(run, monkeypatch):
    wrong_cache(monkeypatch)
    code, _, block = run("--device=cpu", "--only", "cache", "muon")
    assert code == 1
    assert verdicts(block[1:-1]) == ["FAIL", "FAIL", "pass", "pass"]
    assert block[-1].startswith("2 failed; ")


def test_processes_are_started_by_torchrun_and_their_losses_are_read(monkeypatch):
    commands = []

    def fake(command, check, stdout):
        assert check
        commands.append(command)
        (folder,) = [flag[10:] for flag in command if flag.startswith("--out_dir=")]
        with open(f"{folder}/log.jsonl", "w", encoding="utf-8") as log:
            log.write('{"loss": 3.5}\n{"val_loss": 9.0}\n{"loss": 2.5}\n')

    monkeypatch.setattr(check_gpu.subprocess, "run", fake)
    assert check_gpu.losses_of_run(2, "--device=cpu", "--n_layer=2").tolist() == [3.5, 2.5]
    ((*_, nproc, script, _, device, layers),) = commands
    assert nproc == "--nproc_per_node=2"
    assert script.endswith("train.py")
    assert (device, layers) == ("--device=cpu", "--n_layer=2")


def test_what_needs_two_gpus_says_so_and_is_no_failure(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    line = "skip  2 processes against 1: needs two GPUs, here 1"
    assert list(check_gpu.rows_of("processes", "cuda", "")) == [("skip", line)]


# ------------------------------------------------------------------ 4 speed, memory and rivals


@pytest.fixture
def fake_cuda(monkeypatch):
    """What check_gpu.py asks of torch.cuda, answered: fake_cuda.peak is the memory at the most."""
    cuda = types.SimpleNamespace(peak=0.0, memory=85e9, at_reset=lambda: None)
    properties = types.SimpleNamespace
    answers = dict(
        synchronize=lambda: None,
        reset_peak_memory_stats=lambda: cuda.at_reset(),
        max_memory_allocated=lambda: cuda.peak * 1e9,
        get_device_properties=lambda device: properties(total_memory=cuda.memory),
        get_device_name=lambda: "NVIDIA H100 80GB HBM3",
    )
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return cuda


@pytest.mark.parametrize(
    "card, batch", [(141e9, 16), (85e9, 16), (47.8e9, 8), (25.3e9, 4), (16.7e9, 2), (8e9, 2)]
)
def test_the_batch_is_the_largest_that_the_card_has_memory_for(fake_cuda, card, batch):
    fake_cuda.memory = card
    assert check_gpu.largest_batch() == batch
    few, whole, given = check_gpu.step_settings("cuda")
    assert (few, whole) == (8, 29)
    assert given == dict(preset="paper", batch_size=batch, total_batch_size=batch * 2048)


@pytest.mark.parametrize("more, verdict", [(0.9, "pass"), (1.05, "pass"), (1.2, "FAIL")])
def test_a_fifth_more_memory_than_traced_fails(fake_cuda, monkeypatch, more, verdict):
    asked = []

    def measured(device, data, variant, n_layer, **given):
        asked.append((variant, n_layer))
        memory = more * check_gpu.TRACED_PEAK[16]
        return {"pass": len(asked), "rest": 0.5, "memory": memory, "rate": 9.0, "mfu": 0.4}

    monkeypatch.setattr(check_gpu, "measure_step", measured)
    rows = list(check_gpu.check_speed("cuda", ""))
    assert asked == [("gated", 8), ("exo", 8), ("exo_dynamic", 8), ("exo_dynamic", 29)]
    assert [number for _, number, _ in rows] == [
        *(2.0, 3.0),  # times gated
        pytest.approx(more * check_gpu.TRACED_PEAK[16]),
        *(9.0, 40.0, 4000.0, 500.0),
    ]
    found = [check_gpu.row(*row)[0] for row in rows]
    assert found == ["", "", verdict, "", "", "", ""]


def test_the_mfu_of_a_device_whose_peak_is_not_known_is_skipped(monkeypatch):
    found = {"pass": 1.0, "rest": 0.5, "memory": 1.0, "rate": 9.0, "mfu": 0.0}
    monkeypatch.setattr(check_gpu, "measure_step", lambda *args, **given: found)
    lines = [check_gpu.row(*row)[1] for row in check_gpu.check_speed("cpu", "")]
    (line,) = [line for line in lines if "MFU" in line]
    assert line.startswith("skip ")


def test_no_earlier_trainer_is_in_the_memory_that_is_measured(fake_cuda, monkeypatch, data):
    """Each is in a cycle of references, so that only the garbage collector frees it."""
    trainers = []
    alive_at_reset = []
    make_trainer = check_gpu.make_trainer

    def remember(device, data, variant, **given):
        trainer = make_trainer("cpu", data, variant, n_layer=1)
        trainer.itself = trainer
        trainers.append(weakref.ref(trainer))
        return trainer

    def look():
        alive_at_reset.append(sum(trainer() is not None for trainer in trainers))

    fake_cuda.at_reset = look
    monkeypatch.setattr(check_gpu, "make_trainer", remember)
    monkeypatch.setattr(check_gpu, "seconds_of", lambda action, device: 1.0)
    gc.disable()
    try:
        rows = list(check_gpu.check_speed("cuda", data))
    finally:
        gc.enable()
    assert len(rows) == 7
    assert alive_at_reset == [0, 0, 0, 0]


def test_a_step_of_the_recipe_is_128_sequences_with_one_update(fake_cuda, monkeypatch, data):
    """By hand: batch 8, so 16 passes of 2 s, one of them in the step of 5 s: 8 x 256 x 16 / 35."""
    seconds = iter([5.0, 2.0])
    monkeypatch.setattr(check_gpu, "seconds_of", lambda action, device: next(seconds))
    monkeypatch.setattr(check_gpu, "flops_per_token", lambda model, length: 1e9 * length)
    monkeypatch.setattr(check_gpu.T, "peak_flops", lambda device: 1e15)
    found = check_gpu.measure_step("cpu", data, "gated", 1)
    rate = 8 * 256 * 16 / 35
    assert found == {
        "pass": 2.0,
        "rest": 3.0,
        "memory": 0,
        "rate": pytest.approx(rate),
        "mfu": pytest.approx(rate * 256e9 / 1e15),
    }


def test_what_is_timed_is_a_step_and_a_pass(monkeypatch, data):
    trainers = []
    make_trainer = check_gpu.make_trainer

    def remember(*args, **given):
        trainers.append(make_trainer(*args, **given))
        return trainers[-1]

    def run_once(action, device):
        step = trainers[-1].step
        before = trainers[-1].model.head.weight.clone()
        action()
        moved = not torch.equal(trainers[-1].model.head.weight, before)
        passed = trainers[-1].model.head.weight.grad is not None
        done.append((trainers[-1].step - step, moved, passed))
        return 1.0

    done = []
    monkeypatch.setattr(check_gpu, "make_trainer", remember)
    monkeypatch.setattr(check_gpu, "seconds_of", run_once)
    check_gpu.measure_step("cpu", data, "gated", 1)
    assert done == [(1, True, False), (0, False, True)]


def in_force():
    """What the rivals change, as it is now."""
    config = torch._inductor.config
    return (
        Mix.forward is check_gpu.autograd_mixing,
        Positions.rotate is check_gpu.textbook_rotation,
        config.max_pointwise_cat_inputs,
        config.max_complex_pointwise_cat_inputs,
        config.triton.mix_order_reduction_max_reads,
        config.triton.mix_order_reduction_non_strict_mode,
    )


USUAL = (False, False, 8, 8, 10, False)
OF_RIVALS = [
    USUAL,
    (True, False, 8, 8, 10, False),
    (False, True, 8, 8, 10, False),
    (False, False, 0, 0, 10, False),
    (False, False, 8, 8, 30, True),
    (False, False, 0, 0, 30, True),
    USUAL,
]


@pytest.fixture
def times(monkeypatch):
    """Times of the rivals in their order, in the place of measurements; nothing is compiled."""
    times = [4.0, 3.0, 5.0, 6.0, 2.0, 7.0, 4.4]
    left = iter(zip(times, OF_RIVALS))

    def measured(device, data, variant, n_layer, **given):
        assert (variant, n_layer) == ("exo_dynamic", 1)
        seconds, changed = next(left)
        assert in_force() == changed
        return {"pass": seconds}

    monkeypatch.setattr(check_gpu, "measure_step", measured)
    monkeypatch.setattr(check_gpu, "compiled", without_compiling)
    return times


def test_the_fastest_rival_is_named_and_each_is_compared_with_the_code(times):
    rows = list(check_gpu.check_rivals("cpu", ""))
    name = list(check_gpu.RIVALS)[4]
    assert rows[-1] == (f"ms of forward and backward, 1 layers, fastest: {name}", 2000.0, None)
    assert [number for _, number, _ in rows[1:-1:2]] == [t / times[0] for t in times]
    assert [check_gpu.row(*row)[0] for row in rows[:-1:2]] == ["pass"] * 7


@pytest.mark.parametrize("rival, place", [("autograd_mixing", 2), ("textbook_rotation", 4)])
def test_a_rival_that_computes_something_else_fails(monkeypatch, times, rival, place):
    right = getattr(check_gpu, rival)
    monkeypatch.setattr(check_gpu, rival, lambda *args: 1.01 * right(*args))
    found = [check_gpu.row(*row)[0] for row in check_gpu.check_rivals("cpu", "")]
    assert found.index("FAIL") == place
    assert found.count("FAIL") == 1


def test_a_rival_leaves_the_code_as_it_was():
    assert in_force() == USUAL
    for patched in check_gpu.RIVALS.values():
        with patched():
            pass
        assert in_force() == USUAL
