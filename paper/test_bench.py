"""Tests of bench.py: what is counted, and that every benchmark runs. No network."""
import bench
from model import VARIANTS

MODEL = """--device=cpu --n_layer=2 --n_embd=16 --rounds=2 --n_head=2 --block_size=16 --vocab_size=512
    --batch_size=2""".split()


def test_rivals_take_turns_and_the_first_round_is_not_counted(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def action(name, *costs):
        costs = iter(costs)

        def act():
            order.append(name)
            now[0] += next(costs)

        return act

    seconds = bench.in_turn({"a": action("a", 100, 1, 2), "b": action("b", 50, 4, 4)}, 2, "cpu")
    assert seconds == {"a": [1, 2], "b": [4, 4]} and order == ["a", "b"] * 3
    assert bench.ratio(seconds["b"], seconds["a"]) == 3                          # of 4 and 2


def test_a_step_is_counted_in_tokens_and_in_the_flops_of_its_products(call, monkeypatch, capsys):
    """exo of 2 layers, C 16, T 16, vocabulary 512: 11 C^2 a layer, 4 C^2 of anchors, 512 C of head; 12 n C T."""
    seconds = {("gated", "pass"): [1e-3], ("gated", "step"): [2e-3], ("exo", "pass"): [1.5e-3],
               ("exo", "step"): [3e-3], "product": [1e-5]}
    monkeypatch.setattr(bench, "in_turn", lambda actions, rounds, device: {
        name: [action(), seconds[name]][1] for name, action in actions.items()})
    call(bench.main, "step", *MODEL, "--variants", "exo", "--mask_documents")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("machine ") and "32 tokens a step" in lines[1] and "eager" in lines[1]
    product, flops = 2 * 32 * 16 * 64 / 1e-5, (6 * (22 * 256 + 4 * 256 + 512 * 16) + 12 * 2 * 16 * 16) * 32 / 3e-3
    assert f"{product / 1e9:.1f} GFLOP/s" in lines[1]
    assert lines[-1].replace("|", " ").split() == [
        "exo", "1.5", "1.500", "3.0", "1.500", "10,667", f"{flops / 1e9:.1f}", f"{flops / product:.2f}"]


def test_every_variant_decodes_as_many_tokens_as_were_asked_for(call, monkeypatch, capsys):
    made, plain = [], bench.generate
    monkeypatch.setattr(bench, "generate", lambda *args, **kw: made.append(plain(*args, **kw)))
    call(bench.main, "generate", *MODEL, "--tokens=5")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert {row[0] for row in rows} == set(VARIANTS)
    assert all(len(row) == 3 and float(row[1].replace(",", "")) > 0 for row in rows)
    assert len(made) == 3 * len(VARIANTS) and all(idx.shape == (2, 6) for idx in made)
