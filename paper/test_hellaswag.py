"""
Tests of eval_hellaswag.py and compare_hellaswag.py. CPU only, no network.

The texts and tokens to expect are lm_eval 0.4.13's (testdata/hellaswag_golden.json; test_six_tasks.py compares with
lm_eval itself where it is installed); scores are compared with a loop that runs every row by itself and adds
log-probabilities in float64.
"""
import gzip
import hashlib
import itertools
import json
import os
import pathlib
import random
import re
import statistics
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import compare_hellaswag
import eval_hellaswag as H
from model import ExoFormer, InputError, variant_config
from prepare_fineweb import UserError, command_line
from train import save_checkpoint

HERE = pathlib.Path(__file__).resolve().parent
SAMPLE = str(HERE / "testdata" / "hellaswag_sample.jsonl")               # 40 items, (c) 2019 Rowan Zellers, MIT licence
ROWS = [json.loads(line) for line in open(SAMPLE)]
GOOD_ROW = {"ctx": "a b", "ctx_a": "a", "ctx_b": "b", "activity_label": "x", "endings": ["c"] * 4, "label": 0}


class SampleTokenizer:
    """GPT-2's tokens for the texts of the sample: its pieces from a table, cut by its regular expression for ASCII."""
    n_vocab, eot = 50257, 50256
    piece = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[a-zA-Z]+| ?[0-9]+| ?[^\sa-zA-Z0-9]+|\s+(?!\S)|\s+")

    def __init__(self, tokens):
        self.tokens = tokens

    def encode(self, text):
        return [token for piece in self.piece.findall(text) for token in self.tokens[piece]]


@pytest.fixture
def golden(monkeypatch):
    """What lm_eval made of the sample, and the tokenizer replaced by one that needs no download."""
    golden = json.loads((HERE / "testdata" / "hellaswag_golden.json").read_text())
    monkeypatch.setattr(H, "get_tokenizer", lambda name: SampleTokenizer(golden["pieces"]))
    return golden


def tiny(block_size=1024, variant="exo_dynamic", seed=0, **sizes):
    """A tiny model whose zero-initialised matrices are random too."""
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50257, "block_size": block_size, **sizes}
    model = ExoFormer(variant_config(variant, **sizes)).eval()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model


def random_items(count, longest=20, seed=0):
    """Items of random tokens, lengths and labels."""
    draw = random.Random(seed)
    some = lambda low, high: [draw.randrange(50257) for _ in range(draw.randint(low, high))]
    return [H.Item(i, draw.randrange(4), some(1, 2 * longest), [some(1, longest) for _ in range(4)],
                   [draw.randint(1, 99) for _ in range(4)]) for i in range(count)]


@torch.no_grad()
def score_in_loops(model, items):
    """The definition: each row by itself, cut on the left, its log-probabilities in float64, added one by one."""
    sums = []
    for item in items:
        for ending in item.endings:
            row = (item.context + ending)[-(model.config.block_size + 1):]
            log_probs = model.logits(model.trunk(torch.tensor([row[:-1]]))[0, -len(ending):]).double().log_softmax(-1)
            sums.append(sum(float(log_probs[i, token]) for i, token in enumerate(ending)))
    return torch.tensor(sums, dtype=torch.float64).view(-1, 4)


def run(monkeypatch, module, *argv):
    """A script's main() with a command line, under the wrapper that every script has. Returns the exit code."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
    with pytest.raises(SystemExit) as exit:
        command_line(module.main, InputError)
    return exit.value.code


# ---- rendering ----

@pytest.mark.parametrize("shots", [0, 5])
def test_text_examples_and_tokens_are_lm_evals(golden, shots):
    entries = golden[f"{shots}-shot"]
    examples = H.draw_examples(ROWS, ROWS, shots) if shots else [""] * 40
    items = H.load_items(SAMPLE, shots=shots, limit=len(entries), train=SAMPLE)
    assert len(items) == len(entries) == (40, 5)[shots > 0]
    for row, item, before, entry in zip(ROWS, items, examples, entries):
        context, endings = H.render_lmeval(row)
        assert (before + context, [f" {ending}" for ending in endings]) == (entry["context"], entry["continuations"])
        assert (item.context, item.endings) == (entry["context_tokens"], entry["ending_tokens"])
        assert item.characters == [len(ending) for ending in endings] and item.label == row["label"]


def test_spaces_before_an_ending_are_scored_with_it():
    row = {**GOOD_ROW, "ctx_b": "b [mark]"}                              # its context is "x: a B "
    encode = SampleTokenizer({"x": [1], ":": [2], " a": [3], " B": [4], " ": [5], " c": [6]}).encode
    assert H.lmeval_tokens(row, encode) == ([1, 2, 3, 4], [[5, 6]] * 4, ["c"] * 4)


def test_nanogpt_style_takes_the_text_as_it_is(golden):
    encode = SampleTokenizer(golden["pieces"]).encode
    for row, item in zip(ROWS, H.load_items(SAMPLE, style="nanogpt"), strict=True):
        assert item.context == encode(row["ctx"]) and item.label == row["label"]
        assert item.endings == [encode(f" {ending}") for ending in row["endings"]]


# ---- scoring ----

@pytest.mark.parametrize("block_size", [1024, 24])
@pytest.mark.parametrize("variant", ["base", "exo_dynamic"])
def test_scores_equal_each_row_alone_whatever_runs_beside_it(variant, block_size):
    model, items = tiny(block_size, variant), random_items(6, longest=14)
    expected = score_in_loops(model, items)
    for batch_tokens in (1, 400, 10 ** 6):
        torch.testing.assert_close(H.score(model, items, batch_tokens), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(H.score(model, items[::-1]).flip(0), expected, rtol=0, atol=2e-5)


def test_batches_hold_every_item_once_within_their_budget():
    batches = H.plan(random_items(200), 1024, 3000)
    assert sorted(item.index for _, _, batch in batches for item in batch) == list(range(200))
    assert len(batches) < 100
    for prefix, length, batch in batches:
        lengths = [len(item.context) + max(map(len, item.endings)) - 1 for item in batch]
        assert max(lengths) == length and 4 * len(lengths) * length <= 3000
        assert all(len(item.context) > prefix for item in batch)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_changes_no_state(training):
    model, items = tiny().train(training), random_items(3)
    before = {name: p.clone() for name, p in model.named_parameters()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with torch.autocast("cpu", torch.bfloat16):
        inside = H.score(model, items)
    assert torch.equal(inside, H.score(model, items))                    # the caller's autocast does not reach it
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])
    assert model.training is training and torch.is_grad_enabled()
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    model.loss(torch.tensor([items[0].context * 3]), torch.tensor([items[0].context * 3]))[0].backward()


@pytest.mark.parametrize("context", [1, 9])                              # without and with a shared prefix
def test_bfloat16_layers_come_close_to_float32(context):
    model, items = tiny(), [replace(item, context=[item.label] * context) for item in random_items(2)]
    exact, rough = (H.score(model, items, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert 1e-6 < (exact - rough).abs().max() < 0.05 * exact.abs().min()


def test_progress_ends_with_all_tokens_and_items(monkeypatch):
    calls = []
    monkeypatch.setattr(H.Progress, "update", lambda self, done, note: calls.append((self.total, done, note)))
    H.score(tiny(), random_items(30), batch_tokens=1000)
    assert 1 < len(calls) < 30 and calls[-1][0] == calls[-1][1] and calls[-1][2] == ", 30 of 30 items"


def test_models_that_cannot_be_scored_are_refused():
    items = random_items(2)
    broken = tiny()
    torch.nn.init.constant_(broken.final_norm.weight, torch.nan)
    for model, message in ((tiny(block_size=4), "does not fit into block_size=4"), (broken, "not finite")):
        with pytest.raises((InputError, UserError), match=message):
            H.score(model, items)


# ---- accuracy ----

def test_accuracy_is_counted_by_hand_and_of_equal_endings_the_first_counts():
    items, scores = random_items(50), -np.random.default_rng(0).integers(1, 5, (50, 4)).astype(float)
    result = H.accuracy(items, H.predictions(items, torch.from_numpy(scores)))
    divisors = {"acc": lambda item, k: 1, "acc_norm": lambda item, k: item.characters[k],
                "acc_norm_tokens": lambda item, k: len(item.endings[k])}
    for metric, divisor in divisors.items():
        best = [max(range(4), key=lambda k: scores[i, k] / divisor(item, k)) for i, item in enumerate(items)]
        right = [float(k == item.label) for k, item in zip(best, items)]
        assert result[metric] == pytest.approx(statistics.mean(right))
        assert result[f"{metric}_stderr"] == pytest.approx(statistics.stdev(right) / 50 ** 0.5)


@pytest.mark.parametrize("only_a, only_b", [(0, 0), (0, 1), (2, 2), (1, 6), (9, 3), (0, 10)])
def test_mcnemar_equals_tossing_all_coins(only_a, only_b):
    n, gap = only_a + only_b, abs(only_a - only_b)
    extreme = sum(abs(2 * sum(coins) - n) >= gap for coins in itertools.product((0, 1), repeat=n))
    assert compare_hellaswag.mcnemar(only_a, only_b) == pytest.approx(extreme / 2 ** n, abs=1e-12)


def test_mcnemar_survives_large_counts():
    assert 0.3 < compare_hellaswag.mcnemar(1990, 2050) < 0.4             # normal approximation: 0.35


def test_paired_difference_equals_numpy():
    a, b = np.random.default_rng(0).integers(0, 2, (2, 400))
    result = compare_hellaswag.paired(a.tolist(), b.tolist())
    mean, error = b.mean() - a.mean(), np.std(b - a, ddof=1) / 20
    assert result["difference"] == pytest.approx(mean)
    assert (result["low"], result["high"]) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error))
    assert (result["only_a"], result["only_b"]) == (sum(a > b), sum(b > a))


# ---- files and the command line ----

@pytest.mark.parametrize("bad, problem", [
    ({"label": None}, "label"), ({"label": 4}, "label"), ({"label": ""}, "label"), ({"endings": ["c"] * 3}, "endings"),
    ({"endings": "cccc"}, "list"), ({"endings": ["c", "c", "c", 5]}, "endings"), ({"ctx_b": 7}, "ctx_b")])
def test_a_malformed_item_is_named_by_file_and_line(tmp_path, bad, problem):
    path = tmp_path / "items.jsonl"
    path.write_text(f"{json.dumps(GOOD_ROW)}\n\n{json.dumps({**GOOD_ROW, **bad})}\n")
    with pytest.raises((InputError, UserError), match=f"items.jsonl, line 3: not a HellaSwag item .*{problem}"):
        H.load_items(str(path))


def test_a_damaged_file_is_refused(tmp_path):
    data = open(SAMPLE, "rb").read()
    for name, content, message in (
            ("cut.jsonl", data[:-100], "line 40: .*JSON"), ("empty.jsonl", b"", "no items"),
            ("cut.jsonl.gz", gzip.compress(data)[:-100], "ended before"), ("flat.jsonl.gz", data, "gzip"),
            ("latin.jsonl", b'{"ctx": "\xe9"}', "line 1: "), ("list.jsonl", b'["a"]', "line 1: "),
            ("text.jsonl", b'"a"', "line 1: "), ("short.jsonl", b'{"ctx": ""}', "line 1: .*ctx_a")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises((InputError, UserError), match=f"{name}.*{message}"):
            H.load_items(str(tmp_path / name))


def test_packed_files_and_labels_as_text_read_alike(golden, tmp_path):
    text = "\n".join(json.dumps({**row, "label": str(row["label"])}) for row in ROWS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert H.load_items(str(tmp_path / "a.jsonl.gz")) == H.load_items(SAMPLE)


def test_the_official_file_is_downloaded_once_and_scored_only_whole(golden, tmp_path, monkeypatch):
    data, calls = open(SAMPLE, "rb").read(), []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(H.SHA256, "val", hashlib.sha256(data).hexdigest())

    def fake_download(url, path, tries):
        calls.append((url, path))
        os.makedirs(os.path.dirname(path))
        pathlib.Path(path).write_bytes(data)
    monkeypatch.setattr(H, "download", fake_download)
    assert [len(H.load_items()) for _ in range(2)] == [40, 40]
    assert calls == [("https://raw.githubusercontent.com/rowanz/hellaswag/a29ff8e9a04bba4bd6588223785ce105328adc57/"
                      "data/hellaswag_val.jsonl", "data/hellaswag/hellaswag_val.jsonl")]
    pathlib.Path(calls[0][1]).write_bytes(data.replace(b'"label": 3', b'"label": 2', 1))
    with pytest.raises((InputError, UserError), match="hellaswag_val.jsonl is not the official file; remove it"):
        H.load_items()


def test_without_a_network_the_error_says_what_to_save_where(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise UserError("no answer")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(H, "download", offline)
    with pytest.raises((InputError, UserError), match="no answer.*save https://.*_val.jsonl as data/hellaswag/.*_val.jsonl") as error:
        H.load_items()
    assert "--" not in str(error.value)                                  # train.py has other flags than this script


def test_the_command_lines_score_and_compare(golden, tmp_path, capsys, monkeypatch):
    results, outs = [], [tmp_path / "0.jsonl", tmp_path / "1.jsonl"]
    for seed, out in enumerate(outs):
        model, ckpt = tiny(seed=seed), tmp_path / "ckpt.pt"
        save_checkpoint(ckpt, {"model": model.state_dict(), "model_config": asdict(model.config)})
        flags = [f"--ckpt={ckpt}", f"--data={SAMPLE}", "--limit=6", f"--out={out}", "--device=cpu"]
        assert not run(monkeypatch, H, *flags)
        results.append([json.loads(line) for line in open(out)])
        items = H.load_items(SAMPLE, limit=6)
        assert [line["index"] for line in results[-1]] == list(range(6))
        assert [line["scores"] for line in results[-1]] == H.score(model, items).tolist()
        expected, printed = H.accuracy(items, H.predictions(items, H.score(model, items))), capsys.readouterr().out
        for metric in H.METRICS:
            assert re.search(rf"^{metric} +{expected[metric]:.2%} ", printed, re.M)
            assert sum(line[metric] == line["label"] for line in results[-1]) == round(6 * expected[metric])
    assert not run(monkeypatch, compare_hellaswag, *outs)
    printed, differences = capsys.readouterr().out, set()
    for metric in H.METRICS:
        a, b = (sum(line[metric] == line["label"] for line in lines) / 6 for lines in results)
        assert f"{metric:16} A {a:6.2%}  B {b:6.2%}  B - A {100 * (b - a):+.2f} points" in printed
        differences.add(b - a)
    assert len(differences) > 1                                          # else A and B could have changed places


def test_user_errors_are_one_line(tmp_path, monkeypatch):
    for name, sizes in (("bytes", {"tokenizer": "bytes"}), ("small", {"vocab_size": 512})):
        model = tiny(**sizes)
        save_checkpoint(tmp_path / f"{name}.pt", {"model": model.state_dict(), "model_config": asdict(model.config)})
    line = '{"index": %d, "label": 0, "acc": 0, "acc_norm": 0, "acc_norm_tokens": 0}\n'
    texts = {"a": line % 0, "b": line % 1, "c": '{"index": 1}\n', "empty": ""}
    for name, text in texts.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    a, b, c, empty = (tmp_path / f"{name}.jsonl" for name in texts)
    for module, argv, message in ((H, ["--ckpt=nowhere.pt"], "nowhere.pt"),
                                  (H, [f"--ckpt={tmp_path / 'bytes.pt'}", "--device=cpu"], "tokenizer 'bytes'"),
                                  (H, [f"--ckpt={tmp_path / 'small.pt'}", "--device=cpu"], "trained on 512"),
                                  (H, ["--ckpt=x", "--out=/nowhere/x.jsonl"], "/nowhere/x.jsonl: must be a file"),
                                  (H, ["--ckpt=x", f"--out={tmp_path}"], f"{tmp_path}: must be a file"),
                                  (H, ["--ckpt=x", "--device=gpu"], "--device=gpu"),
                                  (compare_hellaswag, [a, b], "same items"),
                                  (compare_hellaswag, [a, c], "c.jsonl, line 1"),
                                  (compare_hellaswag, [empty, a], "empty.jsonl: no items")):
        code = run(monkeypatch, module, *argv)
        assert message in code and "\n" not in code
    for argv in ([], ["--ckpt=x", "--limit=0"], ["--ckpt=x", "--shots=5", "--style=nanogpt"]):
        assert run(monkeypatch, H, *argv) == 2
