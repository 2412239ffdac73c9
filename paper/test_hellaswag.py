"""
Tests of eval_hellaswag.py and compare_hellaswag.py. CPU only, no network.

The texts and tokens to expect are lm_eval 0.4.13's (testdata/hellaswag_golden.json;
test_six_tasks.py compares with lm_eval itself where it is installed); scores are compared with a
loop that runs every row by itself and adds log-probabilities in float64.
"""

import gzip
import hashlib
import itertools
import json
import math
import os
import pathlib
import random
import re
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
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
SAMPLE = HERE / "testdata" / "hellaswag_sample.jsonl"  # 40 items, (c) 2019 Rowan Zellers, MIT
ROWS = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
GOOD_ROW = {
    "ctx": "a b",
    "ctx_a": "a",
    "ctx_b": "b",
    "activity_label": "x",
    "endings": ["c"] * 4,
    "label": 0,
}


class SampleTokenizer:
    """GPT-2's tokens for the texts of the sample: its pieces from a table, cut by its regular
    expression for ASCII."""

    n_vocab = 50257
    eot = 50256
    piece = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[a-zA-Z]+| ?[0-9]+| ?[^\sa-zA-Z0-9]+|\s+(?!\S)|\s+")

    def __init__(self, tokens):
        self.tokens = tokens

    def encode(self, text):
        return [token for piece in self.piece.findall(text) for token in self.tokens[piece]]


@pytest.fixture
def golden(monkeypatch):
    """What lm_eval made of the sample, and the tokenizer replaced by one without a download."""
    path = HERE / "testdata" / "hellaswag_golden.json"
    golden = json.loads(path.read_text(encoding="utf-8"))
    monkeypatch.setattr(H, "get_tokenizer", lambda name: SampleTokenizer(golden["pieces"]))
    return golden


def tiny(block_size=1024, variant="exo_dynamic", seed=0, **sizes):
    """A tiny model in bytes whose zero-initialised matrices are random too."""
    torch.manual_seed(seed)
    small = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 257, "tokenizer": "bytes"}
    model = ExoFormer(variant_config(variant, **{**small, "block_size": block_size, **sizes}))
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def saved(model, path):
    """The model as a checkpoint file."""
    save_checkpoint(path, {"model": model.state_dict(), "model_config": asdict(model.config)})
    return path


def random_items(count, longest=20, seed=0):
    """Items of random tokens, lengths and labels."""
    draw = random.Random(seed)

    def some(low, high):
        return [draw.randrange(257) for _ in range(draw.randint(low, high))]

    items = []
    for index in range(count):
        label = draw.randrange(4)
        context = some(1, 2 * longest)
        endings = [some(1, longest) for _ in range(4)]
        characters = [draw.randint(1, 99) for _ in range(4)]
        items.append(H.Item(index, label, context, endings, characters))
    return items


@torch.no_grad()
def score_in_loops(model, items):
    """The definition: each row by itself, cut on the left, its log-probabilities in float64, added
    one by one."""
    sums = []
    for item in items:
        for ending in item.endings:
            row = (item.context + ending)[-(model.config.block_size + 1) :]
            hidden = model.trunk(torch.tensor([row[:-1]]))[0, -len(ending) :]
            log_probs = model.logits(hidden).double().log_softmax(-1)
            sums.append(sum(float(log_probs[i, token]) for i, token in enumerate(ending)))
    return torch.tensor(sums, dtype=torch.float64).view(-1, 4)


def run(monkeypatch, module, *argv):
    """The exit code of a script's main() with a command line, under every script's wrapper."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
    with pytest.raises(SystemExit) as exit:
        command_line(module.main, InputError)
    return exit.value.code


def write_rows(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


# ---- rendering ----


@pytest.mark.parametrize("shots", [0, 5])
def test_text_examples_and_tokens_are_lm_evals(golden, shots):
    entries = golden[f"{shots}-shot"]
    examples = H.draw_examples(ROWS, ROWS, shots) if shots else [""] * 40
    items = H.load_items(str(SAMPLE), shots=shots, limit=len(entries), train=str(SAMPLE))
    assert len(items) == len(entries) == {0: 40, 5: 5}[shots]
    for row, item, before, entry in zip(ROWS, items, examples, entries):
        context, endings = H.render_lmeval(row)
        assert before + context == entry["context"]
        assert [f" {ending}" for ending in endings] == entry["continuations"]
        assert item.context == entry["context_tokens"]
        assert item.endings == entry["ending_tokens"]
        assert item.characters == [len(ending) for ending in endings]
        assert item.label == row["label"]


def test_spaces_before_an_ending_are_scored_with_it():
    row = {**GOOD_ROW, "ctx_b": "b [mark]"}  # its context is "x: a B "
    tokens = {"x": [1], ":": [2], " a": [3], " B": [4], " ": [5], " c": [6]}
    found = H.lmeval_tokens(row, SampleTokenizer(tokens).encode)
    assert found == ([1, 2, 3, 4], [[5, 6]] * 4, ["c"] * 4)


def test_nanogpt_style_takes_the_text_as_it_is(golden):
    encode = SampleTokenizer(golden["pieces"]).encode
    for row, item in zip(ROWS, H.load_items(str(SAMPLE), style="nanogpt"), strict=True):
        assert item.context == encode(row["ctx"])
        assert item.endings == [encode(f" {ending}") for ending in row["endings"]]
        assert item.characters == [len(ending) for ending in row["endings"]]
        assert item.label == row["label"]


def test_examples_come_from_the_training_file(tmp_path):
    """The texts, one by one: training rows drawn by one generator with lm-eval's seed."""
    train = [
        {**GOOD_ROW, "ctx_b": f"n{i}", "endings": list("pqrs"), "label": i % 4} for i in range(9)
    ]
    path = write_rows(tmp_path / "train.jsonl", train)
    items = H.load_items(str(SAMPLE), shots=2, limit=3, train=path, tokenizer="bytes")
    draw = random.Random(1234)
    for row, item in zip(ROWS, items, strict=False):
        first, second, _ = draw.sample(train, 3)
        shots = [f"x: a N{t['ctx_b'][1:]} {'pqrs'[t['label']]}\n\n" for t in (first, second)]
        context, _ = H.render_lmeval(row)
        assert bytes(item.context).decode() == "".join(shots) + context
    assert len(items) == 3


@pytest.mark.parametrize(
    "text, cleaned",
    [
        (" a [title] b ", "a. b"),
        (" [title] a", " a"),  # stripped first, so this title has no space in front
        ("a [step] b [x] [y] c", "a b  c"),  # three spaces in a row: two of them become one
        ("a [b\nc] d", "a [b\nc] d"),
    ],
)
def test_marks_are_cleaned_away_in_lm_evals_order(text, cleaned):
    assert H.clean(text) == cleaned


def test_an_item_is_no_example_of_itself():
    rows = [{**GOOD_ROW, "ctx_b": f"n{i}"} for i in range(3)]  # 2 + 1 are drawn: all of them
    for row, text in zip(rows, H.draw_examples(rows, rows, 2)):
        others = {f"x: a {other['ctx_b'].upper()} c" for other in rows if other is not row}
        assert set(text.split("\n\n")) == others | {""}


def test_lengths_are_characters_and_not_bytes(tmp_path):
    row = {**GOOD_ROW, "endings": ["é", "né", "日本語", ""], "label": 1}
    path = write_rows(tmp_path / "items.jsonl", [row])
    for style in H.STYLES:
        (item,) = H.load_items(path, style=style, tokenizer="bytes")
        assert item.characters == [1, 2, 3, 0]
        assert [len(ending) for ending in item.endings] == [3, 4, 10, 1]


def test_an_empty_context_begins_with_the_end_of_text(tmp_path):
    path = write_rows(tmp_path / "items.jsonl", [{**GOOD_ROW, "ctx": ""}])
    (item,) = H.load_items(path, style="nanogpt", tokenizer="bytes")
    assert item.context == [256]


# ---- scoring ----


@pytest.mark.parametrize("block_size", [1024, 24])
@pytest.mark.parametrize("variant", ["base", "exo_dynamic"])
def test_scores_equal_each_row_alone_whatever_runs_beside_it(variant, block_size):
    model = tiny(block_size, variant)
    items = random_items(6, longest=14)
    expected = score_in_loops(model, items)
    for batch_tokens in (1, 400, 10**6):
        found = H.score(model, items, batch_tokens)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(H.score(model, items[::-1]).flip(0), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("spare", [1, 0, -1])
def test_scores_are_right_at_the_limit_of_block_size(spare):
    """An item one token shorter than block_size, of just its length, and one token longer."""
    (item,) = random_items(1)
    item = replace(item, context=list(range(30)))
    model = tiny(item.length + spare)
    found = H.score(model, [item])
    torch.testing.assert_close(found, score_in_loops(model, [item]), rtol=0, atol=2e-5)
    assert H.shape_of(item, item.length + spare)[0] == {1: 24, 0: 24, -1: 0}[spare]


def test_batches_hold_every_item_once_within_their_budget_the_longest_first():
    items = random_items(200)
    batches = H.plan(items, 1024, 3000)
    assert sorted(item.index for _, _, batch in batches for item in batch) == list(range(200))
    assert len(batches) < 100
    for prefix, length, batch in batches:
        lengths = [len(item.context) + max(map(len, item.endings)) - 1 for item in batch]
        assert max(lengths) == length and 4 * len(lengths) * length <= 3000
        assert all(len(item.context) > prefix for item in batch)
    prefixes = [prefix for prefix, _, _ in batches]
    assert prefixes == sorted(prefixes, reverse=True) and prefixes[0] > prefixes[-1] == 0
    assert [len(batch) for _, _, batch in H.plan(items, 1024, 1)] == [1] * 200


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_changes_no_state(training):
    model = tiny().train(training)
    items = random_items(3)
    before = {name: p.clone() for name, p in model.named_parameters()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with torch.autocast("cpu", torch.bfloat16):
        inside = H.score(model, items)
    assert torch.equal(inside, H.score(model, items))  # the caller's autocast does not reach it
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])
    assert model.training is training and torch.is_grad_enabled()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None
    idx = torch.tensor([items[0].context * 3])
    model.loss(idx, idx)[0].backward()


def test_dropout_does_not_act_in_an_evaluation():
    """Of a model that is training, one of whose parts is not: both modes are put back."""
    model = tiny()
    items = random_items(2)
    expected = H.score(model, items)
    model.final_norm = torch.nn.Sequential(model.final_norm, torch.nn.Dropout(0.5))
    model.train()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(H.score(model, items), expected)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(UserError):
        H.score(model, [replace(items[0], endings=[[1] * 2000] * 4)])
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("context", [1, 9])  # without and with a shared prefix
def test_bfloat16_layers_come_close_to_float32(context):
    model = tiny()
    items = [replace(item, context=[item.label] * context) for item in random_items(2)]
    exact = H.score(model, items)
    rough = H.score(model, items, dtype=torch.bfloat16)
    assert 1e-6 < (exact - rough).abs().max() < 0.05 * exact.abs().min()


@torch.no_grad()
def test_the_head_is_multiplied_in_float32_under_autocast():
    """With bfloat16 layers too: their outputs, then the head and the softmax in float64 by hand."""
    model = tiny()
    endings = [[k, 7, 8] for k in range(4)]
    idx = torch.tensor([[5, *ending[:-1]] for ending in endings])
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.trunk(idx)
        inside = H.token_log_probs(model, hidden[0], idx[0])
    assert torch.equal(inside, H.token_log_probs(model, hidden[0], idx[0]))
    log_probs = (hidden.double() @ model.head.weight[:257].double().T).log_softmax(-1)
    expected = log_probs.gather(-1, torch.tensor(endings)[..., None]).sum((1, 2))
    found = H.score(model, [H.Item(0, 0, [5], endings, [1] * 4)], dtype=torch.bfloat16)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=2e-6)


def test_a_bfloat16_models_log_probabilities_are_float32():
    model = tiny().bfloat16()
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.tensor([0, 9, 256, 7, 7])
    expected = model.logits(hidden).double().log_softmax(-1)[torch.arange(5), targets]
    found = H.token_log_probs(model, hidden, targets)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_progress_ends_with_all_tokens_and_items(monkeypatch):
    calls = []

    def update(self, done, note):
        calls.append((self.total, done, note))

    monkeypatch.setattr(H.Progress, "update", update)
    H.score(tiny(), random_items(30), batch_tokens=1000)
    assert 1 < len(calls) < 30
    assert calls[-1][0] == calls[-1][1] and calls[-1][2] == ", 30 of 30 items"


def test_models_that_cannot_be_scored_are_refused():
    items = [replace(random_items(1)[0], endings=[[1] * 5] * 4)]
    assert H.score(tiny(block_size=5), items).isfinite().all()
    with pytest.raises(UserError, match="ending of 5 tokens does not fit into block_size=4"):
        H.score(tiny(block_size=4), items)
    broken = tiny()
    torch.nn.init.constant_(broken.final_norm.weight, math.nan)
    with pytest.raises(UserError, match="not finite"):
        H.score(broken, items)
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(UserError, match="not finite"):
            H.all_finite(torch.tensor([[-1.0, value]]))


# ---- accuracy ----


def test_accuracy_is_counted_by_hand_and_of_equal_endings_the_first_counts():
    items = random_items(50)
    scores = -np.random.default_rng(0).integers(1, 5, (50, 4)).astype(float)
    result = H.accuracy(items, H.predictions(items, torch.from_numpy(scores)))
    divisors = {
        "acc": lambda item, k: 1,
        "acc_norm": lambda item, k: item.characters[k],
        "acc_norm_tokens": lambda item, k: len(item.endings[k]),
    }
    assert list(divisors) == list(H.METRICS)
    for metric, divisor in divisors.items():
        right = []
        for i, item in enumerate(items):
            best = max(range(4), key=lambda k: scores[i, k] / divisor(item, k))
            right.append(float(best == item.label))
        assert result[metric] == pytest.approx(statistics.mean(right))
        assert result[f"{metric}_stderr"] == pytest.approx(statistics.stdev(right) / 50**0.5)


def test_an_ending_without_characters_is_never_the_choice_of_acc_norm():
    """As in lm-eval, which divides its score by 0.0."""
    item = H.Item(0, 0, [1], [[2], [3], [4], [5]], [0, 9, 9, 9])
    scores = torch.tensor([[-1.0, -99.0, -98.0, -99.0]], dtype=torch.float64)
    choices = H.predictions([item], scores)
    assert {metric: int(choice) for metric, choice in choices.items()} == {
        "acc": 0,
        "acc_norm": 2,
        "acc_norm_tokens": 0,
    }


@pytest.mark.parametrize("only_a, only_b", [(0, 0), (0, 1), (2, 2), (1, 6), (9, 3), (0, 10)])
def test_mcnemar_equals_tossing_all_coins(only_a, only_b):
    n = only_a + only_b
    gap = abs(only_a - only_b)
    extreme = sum(abs(2 * sum(coins) - n) >= gap for coins in itertools.product((0, 1), repeat=n))
    assert compare_hellaswag.mcnemar(only_a, only_b) == pytest.approx(extreme / 2**n, abs=1e-12)


def test_mcnemar_survives_large_counts():
    """2 ** 1230 is no float."""
    assert 0.15 < compare_hellaswag.mcnemar(590, 640) < 0.18  # normal approximation: 0.16


def test_paired_difference_equals_numpy():
    a, b = np.random.default_rng(0).integers(0, 2, (2, 400))
    result = compare_hellaswag.paired(a.tolist(), b.tolist())
    assert result == {
        "items": 400,
        "a": pytest.approx(a.mean()),
        "b": pytest.approx(b.mean()),
        "difference": pytest.approx(b.mean() - a.mean()),
        "error": pytest.approx(np.std(b - a, ddof=1) / 20),
        "only_a": sum(a > b),
        "only_b": sum(b > a),
    }


def six_tasks_file(path, asked="q", **right):
    """A file of six_tasks.py --out, as far as the comparison looks at it."""
    tasks = {name: {"right": digits, "asked": asked} for name, digits in right.items()}
    path.write_text(json.dumps({"tasks": tasks}, indent=1), encoding="utf-8")
    return path


def test_six_tasks_are_compared_with_numbers_made_by_hand(tmp_path, monkeypatch, capsys):
    """ARC-e: differences 0, 0, 1, 0: mean 1/4, deviation 1/2, error 1/4 (by sqrt(4)).
    PIQA: -1, 1: mean 0, deviation sqrt(2), error 1 (by sqrt(2)).
    Average: 1/8, its error sqrt(1/16 + 1) / 2 = 0.51539; 1.96 of it are 101.02 points."""
    a = six_tasks_file(tmp_path / "a.json", arc_easy="1100", piqa="10")
    b = six_tasks_file(tmp_path / "b.json", arc_easy="1110", piqa="01")
    assert not run(monkeypatch, compare_hellaswag, a, b)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"A = {a}", f"B = {b}"]
    assert [re.sub("  +", "|", line) for line in lines[2:]] == [
        "|items|A|B|B - A|error|95 % interval only A only B McNemar p",
        "ARC-e|4|50.00%|75.00%|+25.00|25.00|-24.00 to +74.00|0|1|1",
        "PIQA|2|50.00%|50.00%|+0.00 100.00|-196.00 to +196.00|1|1|1",
        "average of 2 tasks|50.00%|62.50%|+12.50|51.54|-88.52 to +113.52",
    ]
    assert max(map(len, lines[2:])) <= 100


# ---- files and the command line ----


@pytest.mark.parametrize(
    "bad, problem",
    [
        ({"label": None}, "label"),
        ({"label": 4}, "label"),
        ({"label": 9}, "label"),
        ({"label": -1}, "label"),
        ({"label": ""}, "label"),
        ({"endings": ["c"] * 3}, "endings"),
        ({"endings": ["c"] * 5}, "endings"),
        ({"endings": "cccc"}, "list"),
        ({"endings": ["c", "c", "c", 5]}, "endings"),
        ({"ctx_b": 7}, "ctx_b"),
    ],
)
def test_a_malformed_item_is_named_by_file_and_line(tmp_path, bad, problem):
    path = tmp_path / "items.jsonl"
    lines = f"{json.dumps(GOOD_ROW)}\n\n{json.dumps({**GOOD_ROW, **bad})}\n"
    path.write_text(lines, encoding="utf-8")
    with pytest.raises(UserError, match=f"items.jsonl, line 3: not a HellaSwag item .*{problem}"):
        H.load_items(str(path), tokenizer="bytes")


@pytest.mark.parametrize("label", [0, 3, "0", "3"])
def test_labels_from_0_to_3_are_numbers_or_texts(tmp_path, label):
    path = write_rows(tmp_path / "items.jsonl", [{**GOOD_ROW, "label": label}])
    assert H.load_items(path, tokenizer="bytes")[0].label == int(label)


def test_a_damaged_file_is_refused(tmp_path):
    data = SAMPLE.read_bytes()
    for name, content, message in (
        ("cut.jsonl", data[:-100], "line 40: .*JSON"),
        ("empty.jsonl", b"", "no items"),
        ("blank.jsonl", b"\n \n", "no items"),
        ("cut.jsonl.gz", gzip.compress(data)[:-100], "ended before"),
        ("flat.jsonl.gz", data, "gzip"),
        ("latin.jsonl", b'{"ctx": "\xe9"}', "line 1: "),
        ("list.jsonl", b'["a"]', "line 1: "),
        ("text.jsonl", b'"a"', "line 1: "),
        ("short.jsonl", b'{"ctx": ""}', "line 1: .*ctx_a"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.*{message}"):
            H.load_items(str(tmp_path / name))


def test_packed_files_read_alike(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(SAMPLE.read_bytes()))
    assert H.load_items(str(path), tokenizer="bytes") == H.load_items(
        str(SAMPLE), tokenizer="bytes"
    )


def test_the_official_file_is_downloaded_once_and_scored_only_whole(tmp_path, monkeypatch):
    data = SAMPLE.read_bytes()
    calls = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(H.SHA256, "val", hashlib.sha256(data).hexdigest())

    def fake_download(url, path, tries):
        calls.append((url, path, tries))
        pathlib.Path(path).write_bytes(data)

    monkeypatch.setattr(H, "download", fake_download)
    assert [len(H.load_items(tokenizer="bytes")) for _ in range(2)] == [40, 40]
    url = (
        "https://raw.githubusercontent.com/rowanz/hellaswag/"
        "a29ff8e9a04bba4bd6588223785ce105328adc57/data/hellaswag_val.jsonl"
    )
    assert calls == [(url, "data/hellaswag/hellaswag_val.jsonl", 3)]
    pathlib.Path(calls[0][1]).write_bytes(data.replace(b'"label": 3', b'"label": 2', 1))
    with pytest.raises(UserError, match="hellaswag_val.jsonl is not the official file; remove it"):
        H.load_items(tokenizer="bytes")


def test_two_first_evaluations_at_once_download_once(tmp_path, monkeypatch):
    """The second comes while the first downloads: it waits, and takes what came."""
    monkeypatch.chdir(tmp_path)
    calls = []
    begun = threading.Event()

    def slow_download(url, path, tries):
        calls.append(path)
        begun.set()
        time.sleep(0.3)
        pathlib.Path(path).write_bytes(SAMPLE.read_bytes())

    monkeypatch.setattr(H, "download", slow_download)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(H.official_file, "val")
        begun.wait(timeout=60)
        second = pool.submit(H.official_file, "val")
        assert first.result() == second.result() == calls[0]
    assert calls == ["data/hellaswag/hellaswag_val.jsonl"]
    assert os.listdir("data/hellaswag") == ["hellaswag_val.jsonl"]


def test_the_official_files_are_those_of_the_publication():
    """sha256 of hellaswag_val.jsonl: of the file whose git blob is 0f5ee25d72216f12..."""
    assert H.SHA256["val"].startswith("0aa3b88843990f3f10a97b9575c94d7b")
    assert H.SHA256["train"].startswith("dae5e69249868cb9fe4e23ff925c60b6")


@pytest.mark.parametrize("split, flag", [("val", "--data"), ("train", "--train")])
def test_without_a_network_the_error_says_what_to_save_where(tmp_path, monkeypatch, split, flag):
    def offline(*args, **kwargs):
        raise UserError("no answer")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(H, "download", offline)
    name = f"hellaswag_{split}.jsonl"
    with pytest.raises(UserError) as error:
        H.load_items("" if split == "val" else str(SAMPLE), shots=5, tokenizer="bytes")
    assert str(error.value).startswith("no answer; without a connection, save https://")
    assert f"{name} as data/hellaswag/{name} yourself, or name a file with {flag}" in str(
        error.value
    )


def test_too_few_training_items_are_refused_by_the_flag_that_names_them(tmp_path):
    rows = [{**GOOD_ROW, "ctx_b": f"n{i}"} for i in range(3)]
    path = write_rows(tmp_path / "train.jsonl", rows)
    assert len(H.load_items(str(SAMPLE), 2, train=path, tokenizer="bytes")) == 40
    with pytest.raises(UserError, match="--shots=3 draws from at least 4 .* are 3; .* --train"):
        H.load_items(str(SAMPLE), 3, train=path, tokenizer="bytes")


def test_every_flag_reaches_what_it_sets(monkeypatch, capsys, tmp_path):
    calls = {}
    items = random_items(3)

    def record(name, result):
        def call(*args):
            calls[name] = args
            return result

        return call

    shortest, middle, _ = sorted(items, key=lambda item: item.length)
    model = tiny(block_size=middle.length)
    monkeypatch.setattr(H, "load_for_scoring", record("load", model))
    monkeypatch.setattr(H, "load_items", record("items", items))
    monkeypatch.setattr(H, "score", record("score", torch.zeros(3, 4, dtype=torch.float64)))
    cpu = "--device=cpu"
    assert not run(monkeypatch, H, "--ckpt=c.pt", cpu)
    assert calls["load"] == ("c.pt", "cpu")
    assert calls["items"] == ("", 0, "lmeval", None, "", "bytes")
    assert calls["score"] == (model, items, 8192, torch.float32)
    flags = ["--shots=2", "--limit=9", "--data=d", "--train=t", "--batch_tokens=7"]
    assert not run(monkeypatch, H, "--ckpt=c.pt", cpu, *flags, "--dtype=bfloat16")
    assert calls["items"] == ("d", 2, "lmeval", 9, "t", "bytes")
    assert calls["score"] == (model, items, 7, torch.bfloat16)
    printed = capsys.readouterr().out
    assert "c.pt: HellaSwag, lmeval rendering, 2-shot, 3 items, bfloat16 on cpu" in printed
    assert shortest.length < middle.length
    assert f"1 contexts were cut on the left to block_size={middle.length}" in printed
    assert not run(monkeypatch, H, "--ckpt=c.pt", cpu, "--style=nanogpt")
    assert calls["items"] == ("", 0, "nanogpt", None, "", "bytes")
    assert not run(monkeypatch, H, "--ckpt=c.pt", cpu, "--limit=1", "--batch_tokens=1")
    assert calls["items"][3] == 1 and calls["score"][2] == 1


def test_the_command_lines_score_and_compare(tmp_path, capsys, monkeypatch):
    results = []
    outs = [tmp_path / "0.jsonl", tmp_path / "1.jsonl"]
    for seed, out in enumerate(outs):
        model = tiny(seed=seed)
        ckpt = saved(model, tmp_path / "ckpt.pt")
        flags = [f"--ckpt={ckpt}", f"--data={SAMPLE}", "--limit=6", f"--out={out}", "--device=cpu"]
        assert not run(monkeypatch, H, *flags)
        lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        items = H.load_items(str(SAMPLE), limit=6, tokenizer="bytes")
        scores = H.score(model, items)
        assert [line["index"] for line in lines] == list(range(6))
        assert [line["label"] for line in lines] == [row["label"] for row in ROWS[:6]]
        assert {(line["style"], line["shots"]) for line in lines} == {("lmeval", 0)}
        assert [line["scores"] for line in lines] == scores.tolist()
        expected = H.accuracy(items, H.predictions(items, scores))
        printed = capsys.readouterr().out
        for metric in H.METRICS:
            error = expected[f"{metric}_stderr"]
            assert re.search(rf"^{metric} +{expected[metric]:.2%} \+- {error:.2%} ", printed, re.M)
            right = sum(line[metric] == line["label"] for line in lines)
            assert right == round(6 * expected[metric])
        results.append(lines)
    assert not run(monkeypatch, compare_hellaswag, *outs)
    printed = capsys.readouterr().out
    differences = set()
    for metric in H.METRICS:
        a, b = (sum(line[metric] == line["label"] for line in lines) / 6 for lines in results)
        assert re.search(
            rf"^{metric} +6 +{a:.2%} +{b:.2%} +{re.escape(f'{100 * (b - a):+.2f}')} ", printed, re.M
        )
        differences.add(b - a)
    assert differences - {0.0}  # else A and B could have changed places
    assert "average" not in printed  # three metrics of one task


def test_accuracies_are_printed_where_the_results_cannot_be_written(tmp_path, capsys, monkeypatch):
    def full(*what):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(H, "write_results", full)
    ckpt = saved(tiny(), tmp_path / "ckpt.pt")
    out = f"--out={tmp_path / 'out.jsonl'}"
    flags = [f"--ckpt={ckpt}", f"--data={SAMPLE}", "--limit=2", "--device=cpu", out]
    assert "No space left" in run(monkeypatch, H, *flags)
    assert re.search(r"^acc_norm +\d", capsys.readouterr().out, re.M)


def test_results_that_were_asked_differently_are_not_compared(tmp_path, monkeypatch):
    """One model: without an example, with one, and with the text as it is."""
    ckpt = saved(tiny(), tmp_path / "ckpt.pt")
    data = [f"--ckpt={ckpt}", f"--data={SAMPLE}", f"--train={SAMPLE}", "--limit=2", "--device=cpu"]
    settings = {"0": [], "1": ["--shots=1"], "raw": ["--style=nanogpt"]}
    for name, flags in settings.items():
        assert not run(monkeypatch, H, *data, *flags, f"--out={tmp_path / name}")
    for a, b in itertools.product(settings, repeat=2):
        code = run(monkeypatch, compare_hellaswag, tmp_path / a, tmp_path / b)
        if a == b:
            assert not code
        else:
            assert "do not hold the same items of acc, asked alike; score both" in code


def test_a_tokenizer_needs_all_its_ids_in_the_models_vocabulary(tmp_path):
    assert H.load_for_scoring(saved(tiny(), tmp_path / "257.pt"), "cpu").config.vocab_size == 257
    path = saved(tiny(vocab_size=256), tmp_path / "256.pt")
    with pytest.raises(UserError, match="256.pt: knows 256 token ids, .* bytes, has 257"):
        H.load_for_scoring(path, "cpu")


def test_a_run_folder_is_its_newest_checkpoint(tmp_path, monkeypatch, capsys):
    for step in (9, 10):
        saved(tiny(seed=step), tmp_path / f"ckpt_{step:06d}.pt")
    assert not run(monkeypatch, H, f"--ckpt={tmp_path}", f"--data={SAMPLE}", "--limit=1")
    assert f"{tmp_path}/ckpt_000010.pt: HellaSwag" in capsys.readouterr().out


def test_user_errors_are_one_line(tmp_path, monkeypatch):
    line = '{"index": %d, "label": 0, "acc": 0, "acc_norm": 0, "acc_norm_tokens": 0, '
    line += '"style": "lmeval", "shots": 0}\n'
    texts = {
        "a.jsonl": line % 0,
        "b.jsonl": line % 1,
        "c.jsonl": '{"index": 1}\n',
        "old.jsonl": (line % 0).replace(', "style": "lmeval", "shots": 0', ""),
        "label.jsonl": (line % 0).replace('"label": 0', '"label": 1'),
        "empty.jsonl": "",
        "list.json": '{"tasks": []}',
        "old.json": '{"tasks": {"piqa": {"value": 0.5}}}',
        "strange.json": '{"tasks": {"wikitext": {"right": "1", "asked": ""}}}',
        "none.json": '{"tasks": {}}',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    six_tasks_file(tmp_path / "d.json", arc_easy="1", piqa="10")
    six_tasks_file(tmp_path / "e.json", arc_easy="1", piqa="10", asked="other")
    six_tasks_file(tmp_path / "f.json", piqa="10")
    six_tasks_file(tmp_path / "g.json", piqa="", arc_easy="1")
    monkeypatch.chdir(tmp_path)
    compare = compare_hellaswag
    for module, argv, message in (
        (H, ["--ckpt=nowhere.pt"], "nowhere.pt"),
        (H, ["--ckpt=x", "--out=/nowhere/x.jsonl"], "/nowhere/x.jsonl: must be a file"),
        (H, ["--ckpt=x", f"--out={tmp_path}"], f"{tmp_path}: must be a file"),
        (H, ["--ckpt=x", "--device=gpu"], "--device=gpu"),
        (compare, ["a.jsonl", "b.jsonl"], "same items"),
        (compare, ["a.jsonl", "label.jsonl"], "same items"),
        (compare, ["a.jsonl", "c.jsonl"], "c.jsonl, line 1"),
        (
            compare,
            ["a.jsonl", "old.jsonl"],
            "this version's eval_hellaswag.py --out; score the model again",
        ),
        (compare, ["empty.jsonl", "a.jsonl"], "empty.jsonl: no items"),
        (compare, ["a.jsonl", "d.json"], "same items"),
        (compare, ["d.json", "e.json"], "same items of ARC-e, asked alike"),
        (compare, ["d.json", "f.json"], "same items of ARC-e"),
        (compare, ["f.json", "d.json"], "same items of ARC-e"),
        (compare, ["g.json", "d.json"], "g.json: no items"),
        (compare, ["none.json", "d.json"], "none.json: no items"),
        (compare, ["d.json", "list.json"], "list.json: not a file of six_tasks.py --out"),
        (compare, ["d.json", "old.json"], "old.json: not a file of six_tasks.py --out"),
        (compare, ["d.json", "strange.json"], "strange.json: not a file of six_tasks.py --out"),
        (compare, ["a.jsonl", "x.jsonl"], "cannot read x.jsonl"),
    ):
        code = run(monkeypatch, module, *argv)
        assert message in code and "\n" not in code
    for argv in (
        [],
        ["--ckpt=x", "--limit=0"],
        ["--ckpt=x", "--batch_tokens=0"],
        ["--ckpt=x", "--shots=-1"],
        ["--ckpt=x", "--shots=5", "--style=nanogpt"],
    ):
        assert run(monkeypatch, H, *argv) == 2
