"""Tests of bench.py: what is counted, and that every benchmark runs. No network."""

import os

import pytest
import torch

import bench
from model import VARIANTS

MODEL = """--device=cpu --n_layer=2 --n_embd=16 --rounds=2 --n_head=2 --block_size=16
    --vocab_size=512 --batch_size=2""".split()


@pytest.fixture
def parse(call):
    """parse(*flags): the arguments of `bench.py step` at MODEL's size."""
    return lambda *flags: call(bench.parse_arguments, "step", *MODEL, *flags)


def test_rivals_take_turns_and_the_first_round_is_not_counted(monkeypatch):
    now = [0.0]
    order = []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def action(name, *costs):
        costs = iter(costs)

        def act():
            order.append(name)
            now[0] += next(costs)

        return act

    actions = {"a": action("a", 100, 1, 2), "b": action("b", 50, 4, 4)}
    seconds = bench.in_turn(actions, 2, "cpu")
    assert seconds == {"a": [1, 2], "b": [4, 4]}
    assert order == ["a", "b"] * 3
    assert bench.ratio(seconds["b"], seconds["a"]) == 3  # of 4 and 2


def test_a_gpu_is_waited_for_before_the_clock_is_read(monkeypatch):
    now = [0.0]
    queued = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def synchronize():
        now[0] += queued[0]
        queued[0] = 0.0

    def act():
        queued[0] += 3.0

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert bench.in_turn({"a": act, "b": act}, 2, "cuda") == {"a": [3, 3], "b": [3, 3]}


@pytest.mark.parametrize("flag", ["rounds", "batch_size", "n_layer", "tokens"])
def test_a_benchmark_of_nothing_is_refused(flag, call, capsys):
    with pytest.raises(SystemExit):
        call(bench.main, "generate", "--device=cpu", f"--{flag}=0")
    assert f"argument --{flag}: 0 must be from 1" in capsys.readouterr().err


def test_a_ratio_is_the_median_over_rounds_and_not_that_of_medians():
    assert bench.ratio([2.0, 9.0, 30.0], [1.0, 3.0, 3.0]) == 3.0


def test_the_first_line_says_machine_torch_commit_command_and_load(call, monkeypatch, capsys):
    monkeypatch.setattr(bench, "bench_generate", lambda args: print("measured"))
    monkeypatch.setattr(os, "getloadavg", lambda: (1.26, 0, 0))
    call(bench.main, "generate", *MODEL)
    first, second = capsys.readouterr().out.splitlines()
    assert [part.split()[0] for part in first.split(" | ")] == [
        *("machine", "torch", "commit", "command", "load")
    ]
    assert f" | torch {torch.__version__} | " in first
    assert first.endswith(" | load 1.3")
    assert second == "measured"


@pytest.mark.parametrize(
    "flags, field, value",
    [
        ([], "dtype", "float32"),
        ([], "compile", False),
        ([], "mask_documents", False),
        ([], "batch_size", 2),
        ([], "total_batch_size", 32),
        (["--mask_documents"], "mask_documents", True),
        (["--dtype=bfloat16"], "dtype", "bfloat16"),
        (["--compile=true"], "compile", True),
        (["--n_layer=3"], "n_layer", 3),
        (["--n_embd=32"], "n_embd", 32),
        (["--n_head=4"], "n_head", 4),
        (["--block_size=8"], "block_size", 8),
        (["--vocab_size=300"], "vocab_size", 300),
    ],
)
def test_a_flag_reaches_the_trainer(parse, flags, field, value):
    trainer = bench.trainer_of("exo", parse(*flags))
    settings = {**vars(trainer.config), **vars(trainer.model_config)}
    assert settings[field] == value


def test_no_weight_is_zero_and_a_pass_leaves_weights_and_gradients_alone(parse):
    args = parse()
    trainer = bench.trainer_of("exo_dynamic", args)
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    for name, p in trainer.model.named_parameters():
        assert p.ne(0).all(), name
    seen = []
    for p in trainer.model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.abs().sum() > 0))
    windows = bench.random_windows(args, trainer.tokenizer.eot)
    batch = bench.to_batch(windows[0], trainer.tokenizer.eot, trainer.config)
    bench.forward_backward(trainer, batch)
    assert len(seen) == len(weights)
    for p, before in zip(trainer.model.parameters(), weights):
        assert torch.equal(p, before)
        assert p.grad is None


def test_documents_have_about_512_tokens(parse):
    args = parse("--batch_size=32", "--block_size=2048", "--vocab_size=8192")
    windows = bench.random_windows(args, 256)
    assert windows.shape == (1, 32, 2049)
    assert 0 <= windows.min() and windows.max() == 8191
    assert 400 < windows.size / (windows == 256).sum() < 600


@pytest.mark.parametrize("device, repeats", [("cpu", 1), ("cuda", 100)])
def test_the_flops_of_the_product_are_those_of_its_shapes(parse, monkeypatch, device, repeats):
    made = []
    randn = torch.randn

    def remember(*shape, device, dtype):
        made.append((shape, device, dtype))
        return randn(*shape, dtype=dtype)

    monkeypatch.setattr(torch, "randn", remember)
    args = parse()
    for dtype, used in (
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("pure_bfloat16", torch.bfloat16),
    ):
        made.clear()
        config = bench.argparse.Namespace(device=device, dtype=dtype)
        product, flops = bench.plain_product(args, config)
        assert made == [((32, 16), device, used), ((16, 64), device, used)]
        assert [tuple(t.shape) for t in product()] == [(32, 64)] * repeats
        assert flops == repeats * 2 * 32 * 16 * 64


def test_a_step_is_counted_in_tokens_and_in_the_flops_of_its_products(call, monkeypatch, capsys):
    """exo of 2 layers, C 16, T 16, vocabulary 512: 11 C^2 a layer, 4 C^2 of anchors, 512 C of
    head; 12 n C T."""
    seconds = {
        ("gated", "pass"): [1e-3],
        ("gated", "step"): [2e-3],
        ("exo", "pass"): [1.5e-3],
        ("exo", "step"): [3e-3],
        "product": [1e-5],
    }
    steps = []
    update = bench.Trainer.update

    def count(trainer, windows):
        steps.append(windows.shape)
        return update(trainer, windows)

    def ran(actions, rounds, device):
        assert (rounds, device) == (2, "cpu")
        for action in actions.values():
            action()
        return {name: seconds[name] for name in actions}

    monkeypatch.setattr(bench.Trainer, "update", count)
    monkeypatch.setattr(bench, "in_turn", ran)
    call(bench.main, "step", *MODEL, "--variants", "exo", "--mask_documents")
    lines = capsys.readouterr().out.splitlines()
    product = 2 * 32 * 16 * 64 / 1e-5
    flops = (6 * (22 * 256 + 4 * 256 + 512 * 16) + 12 * 2 * 16 * 16) * 32 / 3e-3
    assert steps == [(1, 2, 17)] * 2
    assert lines[0].startswith("machine ")
    assert "32 tokens a step" in lines[1]
    assert "eager" in lines[1]
    assert f"{product / 1e9:.1f} GFLOP/s" in lines[1]
    gated, exo = (line.replace("|", " ").split() for line in lines[-2:])
    assert gated[:6] == ["gated", "1.0", "1.000", "2.0", "1.000", "16,000"]
    assert exo == [
        *("exo", "1.5", "1.500", "3.0", "1.500", "10,667"),
        f"{flops / 1e9:.1f}",
        f"{flops / product:.2f}",
    ]


def test_every_variant_decodes_greedily_as_many_tokens_as_were_asked_for(call, monkeypatch, capsys):
    made = []
    plain = bench.generate

    def remember(model, *args, **given):
        made.append((model.config, plain(model, *args, **given)))

    monkeypatch.setattr(bench, "generate", remember)
    call(bench.main, "generate", *MODEL, "--tokens=5")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert {row[0] for row in rows} == set(VARIANTS)
    assert all(len(row) == 3 and float(row[1].replace(",", "")) > 0 for row in rows)
    assert len(made) == 3 * len(VARIANTS)
    first = {}
    for config, idx in made:
        assert idx.shape == (2, 6)
        assert torch.equal(idx, first.setdefault(config, idx))


def test_the_rate_of_decoding_counts_all_rows(call, monkeypatch, capsys):
    seconds = {"gated": [0.5, 0.5], "exo": [0.25, 0.25]}
    monkeypatch.setattr(bench, "in_turn", lambda *args: seconds)
    call(bench.main, "generate", *MODEL, "--variants", "exo", "--tokens=5")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert rows == [["gated", "20.0", "1.000"], ["exo", "40.0", "0.500"]]
