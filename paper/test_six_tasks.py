"""Tests of six_tasks.py. No network; tests that need lm_eval are skipped where it is missing."""

import functools
import gzip
import importlib.util
import json
import math
import os
import pathlib
import random
import re
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch

import eval_hellaswag
import six_tasks
from model import TABLE_3, ExoFormer, variant_config
from prepare_fineweb import UserError, get_tokenizer
from six_tasks import TASK_ACCURACY, TASKS
from train import save_checkpoint

HERE = pathlib.Path(__file__).resolve().parent
SAMPLE = HERE / "testdata" / "hellaswag_sample.jsonl"
SMALL = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 8,
    "vocab_size": 320,
    "block_size": 16,
    "tokenizer": "bytes",
}
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval"
)


def random_model(**sizes):
    """A tiny byte-level model, none of whose matrices is zero."""
    torch.manual_seed(0)
    model = ExoFormer(variant_config("exo_dynamic", **{**SMALL, **sizes}))
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.5)
    return model.eval()


@torch.no_grad()
def looped_score(model, context, continuation):
    """log p of a continuation, one forward pass per token; the row keeps its last block_size + 1
    tokens."""
    row = (context + continuation)[-(model.config.block_size + 1) :]
    total = 0.0
    for place in range(len(row) - len(continuation), len(row)):
        log_probs = model(torch.tensor([row[:place]]))[0, -1].double().log_softmax(-1)
        total += log_probs[row[place]].item()
    return total


# ---- scores ----


@functools.cache
def scored_rows(count=24):
    """(context, continuation) pairs of many lengths, some too long for block_size, and their
    looped scores."""
    model = random_model()
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        context = draw.integers(0, 257, draw.integers(1, 24)).tolist()
        continuation = draw.integers(0, 257, draw.integers(1, 9)).tolist()
        rows.append((context, continuation))
    rows.append((list(range(9)), list(range(8))))  # 16 tokens are read: just what there is room for
    assert 0 < sum(len(context) + len(ending) > 17 for context, ending in rows) < count
    return rows, [looped_score(model, *row) for row in rows]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_scores_equal_a_loop_over_tokens_at_every_batch_size(batch_size):
    rows, expected = scored_rows()
    found = six_tasks.score_all(random_model(), rows, batch_size)
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_batch_holds_batch_size_rows_the_longest_first(monkeypatch):
    batches = []

    def record(model, rows):
        batches.append([len(context) + len(ending) - 1 for context, ending in rows])
        return torch.zeros(len(rows), dtype=torch.float64)

    monkeypatch.setattr(six_tasks, "score_rows", record)
    six_tasks.score_all(random_model(), [([1] * n, [2, 3]) for n in (2, 9, 4, 7, 6)], 2)
    assert batches == [[10, 8], [7, 5], [3]]


def test_dropout_does_not_act_in_an_evaluation():
    rows, expected = scored_rows()
    model = random_model()
    model.final_norm = torch.nn.Sequential(model.final_norm, torch.nn.Dropout(0.5))
    model.train()
    assert six_tasks.score_all(model, rows) == pytest.approx(expected, abs=1e-4)
    assert model.training


def test_dtype_is_that_of_the_layers():
    rows, expected = scored_rows()
    model = random_model()
    rough = six_tasks.score_all(model, rows, dtype=torch.bfloat16)
    assert rough == pytest.approx(expected, rel=0.1)
    assert max(abs(a - b) for a, b in zip(rough, expected)) > 1e-3


def test_a_continuation_longer_than_the_context_window_is_refused():
    assert math.isfinite(six_tasks.score_all(random_model(), [([1], [2] * 16)])[0])
    with pytest.raises(
        UserError, match="continuation of 17 tokens does not fit into block_size=16"
    ):
        six_tasks.score_all(random_model(), [([1], [2]), ([1], [2] * 17)])


def test_damaged_weights_are_an_error_and_not_an_accuracy():
    model = random_model()
    model.final_norm.weight.data[0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        six_tasks.score_all(model, [([1], [2])])


class Request:
    """What lm_eval hands over, as far as the adapter looks at it."""

    def __init__(self, *args):
        self.args = args


@needs_lm_eval
@pytest.mark.parametrize("batch_size", [1, 64])
def test_the_adapter_scores_texts_as_a_loop_does(batch_size):
    model = random_model()
    encode = get_tokenizer("bytes").encode
    long = ("much longer than the window", " is it")
    pairs = [("the cat", " sat"), ("", "on"), ("a ", "mat"), long, ("x" * 9, "y" * 8)]
    # spaces go with the continuation; the last row just fits
    moved = [("the cat", " sat"), (None, "on"), ("a", " mat"), long, ("x" * 9, "y" * 8)]
    lm = six_tasks.adapter(model, batch_size)
    scores = lm.loglikelihood([Request(*pair) for pair in pairs], disable_tqdm=True)
    expected = []
    for context, text in moved:
        ids = [256] if context is None else encode(context)
        expected.append(looped_score(model, ids, encode(text)))
    assert [score for score, _ in scores] == pytest.approx(expected, abs=1e-4)
    assert lm.cut == 1


# ---- items ----


def arc(name, stem, options, labels, key):
    """A question in the official format."""
    choices = [{"text": text, "label": label} for text, label in zip(options, labels)]
    return {"id": name, "question": {"stem": stem, "choices": choices}, "answerKey": key}


ARC = [
    arc("1", "What barks?", ("cat", "dog", "a big ñandú"), "123", "2"),
    arc("2", "Which is hot?", ("ice", "fire", "snow", "rain", "milk"), "ABCDE", "B"),
]
WINOGRANDE = [
    {
        "sentence": "The cup fell off the desk as _ was wet.",
        "option1": "cup",
        "option2": "desk",
        "answer": "1",
    },
    {
        "sentence": "Ann paid Sue since _ had won.",
        "option1": "Ann",
        "option2": "Sue",
        "answer": "2",
    },
]
PIQA = [{"goal": f"g{i}", "sol1": "a", "sol2": "b"} for i in range(3)]
HELLASWAG = {
    "ctx": "a b",
    "ctx_a": "a",
    "ctx_b": "b",
    "activity_label": "x",
    "endings": ["c"] * 4,
    "label": "3",
}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


@pytest.fixture
def items(tmp_path):
    """A --data folder with ARC-Easy (three and five options, numeric labels) and WinoGrande."""
    for name in ("Train", "Test"):
        write_lines(tmp_path / f"arc/ARC-Easy-{name}.jsonl", ARC)
    for name in ("train_xl", "dev"):
        write_lines(tmp_path / f"winogrande/{name}.jsonl", WINOGRANDE)
    return tmp_path


AI2 = {"text": ["cat", "dog", "a big ñandú"], "label": ["1", "2", "3"]}
LOCAL = [  # task, test file, an official row, lm_eval's item of it
    (
        "arc_challenge",
        "arc/ARC-Challenge-Test",
        ARC[0],
        {"question": "What barks?", "choices": AI2, "answerKey": "2"},
    ),
    (
        "arc_easy",
        "arc/ARC-Easy-Test",
        ARC[0],
        {"question": "What barks?", "choices": AI2, "answerKey": "2"},
    ),
    (
        "openbookqa",
        "openbookqa/test",
        ARC[0],
        {"question_stem": "What barks?", "choices": AI2, "answerKey": "2"},
    ),
    ("hellaswag", "hellaswag/hellaswag_val", HELLASWAG, {**HELLASWAG, "label": 3}),
    ("piqa", "piqa/valid", PIQA[0], {**PIQA[0], "label": 1}),
    ("winogrande", "winogrande/dev", WINOGRANDE[0], WINOGRANDE[0]),
]
TRAIN = {
    "arc_challenge": "arc/ARC-Challenge-Train",
    "arc_easy": "arc/ARC-Easy-Train",
    "openbookqa": "openbookqa/train",
    "hellaswag": "hellaswag/hellaswag_train",
    "piqa": "piqa/train",
    "winogrande": "winogrande/train_xl",
}


@pytest.mark.parametrize("name, file, row, expected", LOCAL, ids=[row[0] for row in LOCAL])
def test_official_files_become_lm_evals_items(tmp_path, name, file, row, expected):
    """The test file and, only where examples are drawn, the training file, which may be packed."""
    write_lines(tmp_path / f"{file}.jsonl", [row])
    write_lines(tmp_path / "piqa/valid-labels.lst", [1])
    write_lines(tmp_path / "piqa/train-labels.lst", [0, 0])
    split = "validation" if name in ("hellaswag", "piqa", "winogrande") else "test"
    assert six_tasks.local_rows(name, str(tmp_path), 0) == {split: [expected], "train": [expected]}
    with pytest.raises(UserError, match=rf"no {TRAIN[name]}.jsonl\(.gz\) there"):
        six_tasks.local_rows(name, str(tmp_path), 1)
    path = tmp_path / f"{TRAIN[name]}.jsonl.gz"
    path.write_bytes(gzip.compress(f"{json.dumps(row)}\n".encode() * 2))
    found = six_tasks.local_rows(name, str(tmp_path), 1)
    assert found[split] == [expected] and len(found["train"]) == 2
    assert set(TASKS) == set(TRAIN)
    with pytest.raises(UserError, match=f"--shots=2 draws .* 3 items, .*{TRAIN[name]}.* holds 2"):
        six_tasks.local_rows(name, str(tmp_path), 2)


def test_items_keep_three_and_five_options_and_numeric_labels(items):
    rows = six_tasks.local_rows("arc_easy", str(items), 0)["test"]
    assert [row["choices"]["label"] for row in rows] == [list("123"), list("ABCDE")]


def test_piqa_takes_its_labels_from_the_second_file_line_by_line(tmp_path):
    write_lines(tmp_path / "piqa/valid.jsonl", PIQA)
    labels = tmp_path / "piqa/valid-labels.lst"
    labels.write_bytes(b"0\r\n1\r\n1\r\n")
    rows = six_tasks.local_rows("piqa", str(tmp_path), 0)["validation"]
    assert [row["label"] for row in rows] == [0, 1, 1]
    for content in (b"0\n1\n", b"0\n1\n1\n1\n", b"0\n1\n2\n", b"0\n1\n\xe9\n", b""):
        labels.write_bytes(content)
        with pytest.raises(
            UserError, match="valid-labels.lst: must hold a 0 or 1 for each of .* 3 "
        ):
            six_tasks.local_rows("piqa", str(tmp_path), 0)


@pytest.mark.parametrize(
    "name, row, change, problem",
    [
        ("winogrande", WINOGRANDE[0], {"answer": "3"}, "answer must be"),
        ("winogrande", WINOGRANDE[0], {"answer": ""}, "answer must be"),
        ("winogrande", WINOGRANDE[0], {"answer": 1}, "answer must be a text, not 1"),
        ("winogrande", WINOGRANDE[0], {"sentence": "no blank"}, "must have a blank"),
        ("hellaswag", HELLASWAG, {"label": "9"}, "label 0 to 3"),
        ("hellaswag", HELLASWAG, {"endings": ["c"] * 3}, "four endings"),
        ("piqa", PIQA[0], {"sol2": None}, "sol2 must be a text"),
        ("arc_challenge", ARC[0], {"answerKey": "F"}, "answerKey 'F' is none of"),
        ("openbookqa", ARC[0], {"question": {"stem": "s", "choices": []}}, "'2' is none of"),
        ("arc_easy", ARC[0], {"question": {"stem": "s"}}, "KeyError"),
        ("arc_easy", arc("1", 5, ("a", "b"), "12", "2"), {}, "stem must be a text, not 5"),
        ("arc_easy", arc("1", "Is it?", (4, "b"), "12", "2"), {}, "text must be a text, not 4"),
    ],
)
def test_what_is_no_item_is_named_by_file_and_line(tmp_path, name, row, change, problem):
    file = TASKS[name].test
    write_lines(tmp_path / f"{file}.jsonl", [row, {**row, **change}] if change else [ARC[0], row])
    with pytest.raises(UserError, match=f"{file}.jsonl, line 2: not an item .*{problem}"):
        six_tasks.local_rows(name, str(tmp_path), 0)
    write_lines(tmp_path / f"{file}.jsonl", [])
    with pytest.raises(UserError, match=f"{file}.jsonl: no items in it"):
        six_tasks.local_rows(name, str(tmp_path), 0)


# ---- with lm_eval ----


def likeliest(model, prompts, continuations, lengths):
    """Which of several (prompt, continuation) has the largest log-probability by length."""
    encode = get_tokenizer("bytes").encode
    scores = []
    for prompt, text, length in zip(prompts, continuations, lengths):
        scores.append(looped_score(model, encode(prompt), encode(text)) / length)
    return int(np.argmax(scores))


def likeliest_answer(model, row):
    """ARC: by its length in characters."""
    choices = row["question"]["choices"]
    prompts = [f"Question: {row['question']['stem']}\nAnswer:"] * len(choices)
    texts = [choice["text"] for choice in choices]
    best = likeliest(model, prompts, [f" {text}" for text in texts], map(len, texts))
    return choices[best]["label"]


def likelier_option(model, row):
    """WinoGrande: the likelier end after two starts."""
    start, end = row["sentence"].split("_")
    prompts = [start + row["option1"], start + row["option2"]]
    return str(1 + likeliest(model, prompts, [end, end], (1, 1)))


@needs_lm_eval
def test_lm_eval_counts_what_a_loop_over_the_prompts_counts(items):
    """Each item stands there with every answer, of which one is the model's. Each item's own result
    is kept, for compare_hellaswag.py."""
    model = random_model(block_size=256)
    questions = [{**ARC[0], "answerKey": key} for key in "123"]
    questions += [{**ARC[1], "answerKey": key} for key in "ABCDE"]
    sentences = [{**row, "answer": answer} for row in WINOGRANDE for answer in "12"]
    write_lines(items / "arc/ARC-Easy-Test.jsonl", questions)
    write_lines(items / "winogrande/dev.jsonl", sentences)
    labels = [likeliest_answer(model, ARC[0])] * 3 + [likeliest_answer(model, ARC[1])] * 5
    options = [likelier_option(model, row) for row in WINOGRANDE for _ in "12"]
    names = ["arc_easy", "winogrande"]
    one = six_tasks.evaluate(model, names, 0, None, str(items), 1)["tasks"]
    assert one == six_tasks.evaluate(model, names, 0, None, str(items), 64)["tasks"]
    right = [row["answerKey"] == label for row, label in zip(questions, labels, strict=True)]
    chosen = [row["answer"] == option for row, option in zip(sentences, options, strict=True)]
    for name, flags in zip(names, (right, chosen)):
        task = one[name]
        mean = 2 / len(flags)
        assert sum(flags) == 2 and task["right"] == "".join(str(int(flag)) for flag in flags)
        assert (task["metric"], task["items"]) == (TASKS[name].metric, len(flags))
        assert task["value"] == task[task["metric"]] == pytest.approx(mean)
        assert task["stderr"] == pytest.approx(math.sqrt(mean * (1 - mean) / (len(flags) - 1)))


@needs_lm_eval
def test_the_fingerprint_of_what_was_asked_follows_items_and_examples_not_the_model(items):
    def asked(model, shots=0, limit=None):
        results = six_tasks.evaluate(model, ["winogrande"], shots, limit, str(items))
        return results["tasks"]["winogrande"]["asked"]

    write_lines(items / "winogrande/train_xl.jsonl", WINOGRANDE * 2)
    first = asked(random_model())
    assert asked(random_model(n_layer=3, block_size=64)) == first
    others = {first, asked(random_model(), shots=1), asked(random_model(), limit=1)}
    write_lines(
        items / "winogrande/dev.jsonl", [WINOGRANDE[0], {**WINOGRANDE[1], "option2": "Sam"}]
    )
    others.add(asked(random_model()))
    assert len(others) == 4


@needs_lm_eval
def test_examples_are_those_that_lm_eval_draws_with_its_seed(items, monkeypatch):
    places = ("Rome", "Oslo", "Bonn", "Lima", "Pisa", "Nara", "Faro", "Cork")
    stems = [f"What barks in {place}?" for place in places]
    train = [{**ARC[0], "question": {**ARC[0]["question"], "stem": stem}} for stem in stems]
    write_lines(items / "arc/ARC-Easy-Train.jsonl", train)
    asked = []

    def record(model, rows, *args):
        asked.extend(rows)
        return [0.0] * len(rows)

    monkeypatch.setattr(six_tasks, "score_all", record)
    results = six_tasks.evaluate(random_model(), ["arc_easy"], 2, 2, str(items))
    draw = random.Random(1234)
    expected = []
    for row in ARC:
        drawn = draw.sample(stems, 2)
        shots = "".join(f"Question: {stem}\nAnswer: dog\n\n" for stem in drawn)
        prompt = f"{shots}Question: {row['question']['stem']}\nAnswer:"
        expected += [(prompt, f" {choice['text']}") for choice in row["question"]["choices"]]
    decode = get_tokenizer("bytes").decode
    assert [tuple(map(decode, row)) for row in asked] == expected
    assert results["cautions"] == [
        "8 prompts were cut on the left to block_size=16 tokens",
        "--limit=2: the first 2 items of each task, a trial",
    ]
    assert (results["shots"], results["limit"]) == (2, 2)


@needs_lm_eval
@pytest.mark.parametrize("shots", [0, 5])
def test_eval_hellaswag_asks_what_lm_eval_asks(shots, tmp_path, monkeypatch):
    """The same contexts with the same examples, the same endings, cut apart at the same place: in
    bytes, 40 items."""
    os.mkdir(tmp_path / "hellaswag")
    for split in ("train", "val"):
        shutil.copy(SAMPLE, tmp_path / f"hellaswag/hellaswag_{split}.jsonl")
    asked = []

    def record(model, rows, *args):
        asked.extend(rows)
        return [0.0] * len(rows)

    monkeypatch.setattr(six_tasks, "score_all", record)
    six_tasks.evaluate(random_model(), ["hellaswag"], shots, None, str(tmp_path))
    items = eval_hellaswag.load_items(str(SAMPLE), shots, train=str(SAMPLE), tokenizer="bytes")
    assert len(items) == 40
    assert asked == [(item.context, ending) for item in items for ending in item.endings]


# ---- results ----

# Table 3, typed from the paper: ARC-c, ARC-e, HellaSwag, OpenBookQA, PIQA, WinoGrande, and the
# average that it prints
PAPER = """
base                         30.97  63.38  42.02  33.60  67.30  51.54  48.14
gated                        30.89  64.69  42.73  34.00  67.14  53.35  48.80
resformer                    33.62  64.86  43.49  34.40  68.88  52.64  49.65
naive                        32.94  64.52  43.47  32.60  68.34  52.64  49.09
nuresformer_qknorm           31.74  64.27  43.83  33.00  68.23  52.41  48.91
nuresformer_qknorm_headwise  34.73  64.06  44.45  34.20  67.57  53.04  49.68
nuresformer_qknorm_scalar    32.85  66.08  43.87  34.20  68.28  53.67  49.83
nuresformer_vg               32.42  64.94  43.80  35.00  67.52  51.54  49.20
nuresformer_vg_headwise      31.23  64.18  43.50  34.00  67.68  54.06  49.11
nuresformer_vg_scalar        31.83  64.44  43.66  34.80  68.44  52.49  49.28
nuresformer                  33.70  65.07  44.23  33.60  68.34  53.12  49.68
nuresformer_headwise         33.79  65.11  44.09  33.40  67.41  52.72  49.42
nuresformer_scalar           32.42  64.02  43.93  33.20  67.90  53.20  49.11
exo_nonorm                   32.08  63.76  43.49  34.40  68.77  55.64  49.69
exo_dynamic                  33.36  65.87  44.54  34.40  68.28  55.17  50.27
exo                          34.73  64.65  44.28  36.40  67.74  53.59  49.85
exo_headwise                 32.17  65.87  44.00  32.40  68.23  54.06  49.23
exo_scalar                   32.17  65.66  44.33  33.60  68.06  51.14  49.16
"""


def paper_rows():
    """{variant: [six accuracies, the printed average]}"""
    rows = [line.split() for line in PAPER.strip().splitlines()]
    return {name: [float(cell) for cell in cells] for name, *cells in rows}


def test_the_cells_and_averages_are_the_papers():
    rows = paper_rows()
    assert {name: list(cells) for name, cells in TASK_ACCURACY.items()} == {
        name: cells[:6] for name, cells in rows.items()
    }
    assert {name: row[2] for name, row in TABLE_3.items()} == {
        name: cells[6] for name, cells in rows.items()
    }
    off = {}  # rows whose cells average something else than is printed
    for name, (*six, printed) in rows.items():
        if abs(sum(six) / 6 - printed) > 0.0051:
            off[name] = round(sum(six) / 6, 2)
    assert off == {"exo": 50.23, "exo_headwise": pytest.approx(49.46, abs=0.011)}


def test_tasks_are_counted_as_in_the_paper():
    found = {name: (task.column, task.metric) for name, task in TASKS.items()}
    assert list(found.items()) == [
        ("arc_challenge", ("ARC-c", "acc_norm")),
        ("arc_easy", ("ARC-e", "acc_norm")),
        ("hellaswag", ("HellaSwag", "acc_norm")),
        ("openbookqa", ("OBQA", "acc_norm")),
        ("piqa", ("PIQA", "acc_norm")),
        ("winogrande", ("WinoGrande", "acc")),
    ]
    assert six_tasks.FEWSHOT_SEED == 1234


def sample(index, right, prompt="p"):
    """What lm_eval keeps of an item: acc says the contrary of acc_norm."""
    return {
        "doc_id": index,
        "acc_norm": float(right),
        "acc": float(not right),
        "arguments": [(prompt, " é")],
        "target": 0,
    }


def test_a_summary_counts_by_the_tasks_metric_in_the_order_of_the_file():
    numbers = {"acc,none": 0.25, "acc_stderr,none": 0.1, "alias": "x"}
    numbers |= {"acc_norm,none": 0.75, "acc_norm_stderr,none": 0.2}
    names = ("arc_easy", "winogrande")
    samples = [sample(2, True), sample(0, False), sample(1, True), sample(3, True)]
    out = {"results": dict.fromkeys(names, numbers), "samples": dict.fromkeys(names, samples)}
    by_norm = six_tasks.summary("arc_easy", out)
    by_acc = six_tasks.summary("winogrande", out)
    assert (by_norm["metric"], by_norm["value"], by_norm["stderr"]) == ("acc_norm", 0.75, 0.2)
    assert (by_acc["metric"], by_acc["value"], by_acc["stderr"]) == ("acc", 0.25, 0.1)
    assert by_norm["right"] == "0111" and by_acc["right"] == "1000"
    assert by_norm["items"] == 4 and by_norm["asked"] == by_acc["asked"]
    out["samples"]["arc_easy"] = [*samples[:3], sample(3, True, "other")]
    assert six_tasks.summary("arc_easy", out)["asked"] != by_norm["asked"]


def results_of(values, shots=5):
    """Results of evaluate() with these accuracies and standard errors, in the order of Table 3."""
    tasks = {name: {"value": v, "stderr": error} for name, (v, error) in zip(TASKS, values)}
    return {"tasks": tasks, "shots": shots, "cautions": ["a caution"]}


def numbers_of(lines, name):
    line = next(line for line in lines if line.startswith(name))
    return [float(cell) for cell in line.split() if cell[-1].isdigit()]


def test_the_table_has_the_papers_row_the_difference_and_the_error_task_by_task():
    values = [(0.30, 0.01), (0.60, 0.02), (0.45, 0.01), (0.35, 0.02), (0.70, 0.04), (0.50, 0.01)]
    lines = list(six_tasks.table(results_of(values), "exo", 456_958_848))
    columns = ["ARC-c", "ARC-e", "HellaSwag", "OBQA", "PIQA", "WinoGrande", "average"]
    assert lines[0].split()[2:] == columns
    theirs = paper_rows()["exo"][:6]
    assert numbers_of(lines, "exo") == [30, 60, 45, 35, 70, 50, pytest.approx(290 / 6, abs=0.005)]
    assert numbers_of(lines, "paper") == pytest.approx([*theirs, 50.23])
    differences = [-4.73, -4.65, 0.72, -1.4, 2.26, -3.59, -1.9]
    assert numbers_of(lines, "difference") == pytest.approx(differences, abs=0.006)
    # of the mean of independent tasks
    error = 100 * math.sqrt(3 * 0.01**2 + 2 * 0.02**2 + 0.04**2) / 6
    errors = [1, 2, 1, 2, 4, 1, error]
    assert numbers_of(lines, "standard error of ours") == pytest.approx(errors, abs=0.006)
    text = "\n".join(lines)
    assert "457 M parameters, 10 billion tokens, 5-shot; this checkpoint: 457 M parameters" in text
    assert "the paper prints 49.85 as the average" in text and lines[-1] == "a caution"
    assert "the paper prints" not in "".join(six_tasks.table(results_of(values), "base", 1000))


def test_some_tasks_have_no_average_and_another_model_no_row_of_the_paper():
    lines = list(six_tasks.table(results_of([(0.30, 0.01), (0.60, 0.02)], 0), "gated", 2_500_000))
    assert "average" not in "".join(lines)
    assert numbers_of(lines, "paper") == paper_rows()["gated"][:2]
    assert "this checkpoint: 2.5 M parameters, 0-shot)" in "".join(lines)
    lines = list(six_tasks.table(results_of([(0.5, 0.01)] * 6), "custom", 1000))
    assert [line.split()[0] for line in lines] == ["accuracy,", "custom", "standard", "a"]


# ---- the command line ----


def test_every_flag_reaches_what_it_sets_and_results_are_written(
    tmp_path, call, capsys, monkeypatch
):
    model = random_model()
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, {"model": model.state_dict(), "model_config": asdict(model.config)})
    asked = []

    def evaluate(model, *args):
        asked.append(args)
        return results_of([(0.5, 0.1), (0.25, 0.2)])

    monkeypatch.setattr(six_tasks, "evaluate", evaluate)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    call(six_tasks.main, f"--ckpt={path}", "--device=cpu")
    assert asked[-1] == (list(TASKS), 5, None, "", 16, torch.float32)
    out = tmp_path / "out.json"
    flags = ["--tasks=piqa,arc_easy", "--shots=0", "--limit=2", "--data=d", "--batch_size=3"]
    call(six_tasks.main, f"--ckpt={path}", *flags, "--dtype=bfloat16", f"--out={out}")
    assert asked[-1] == (["piqa", "arc_easy"], 0, 2, "d", 3, torch.bfloat16)
    written = json.loads(out.read_text(encoding="utf-8"))
    parameters = sum(p.numel() for p in model.parameters())
    facts = {"ckpt": str(path), "variant": "exo_dynamic", "parameters": parameters}
    assert written == {**facts, **results_of([(0.5, 0.1), (0.25, 0.2)])}
    assert "exo_dynamic" in capsys.readouterr().out


def test_what_cannot_be_scored_is_one_line(tmp_path, call, monkeypatch, capsys):
    path = f"--ckpt={tmp_path / 'x.pt'}"
    for flags, problem in (
        (["--tasks=wikitext"], "unknown 'wikitext'; there are arc_challenge"),
        (["--shots=-1"], "--shots must be from 0 to 1000"),
        (["--shots=1001"], "--shots must be from 0 to 1000"),
        (["--batch_size=0"], "--batch_size at least 1"),
        (["--limit=1"], "--limit must be from 2"),
        (["--limit=1000001"], "to 1000000"),
    ):
        with pytest.raises(SystemExit, match="2"):
            call(six_tasks.main, path, *flags)
        assert problem in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        call(six_tasks.main, path)
    package = str(error.value).removeprefix("needs lm_eval: pip install ")
    lines = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split()[0] for line in lines if re.match("lm_eval", line)] == [package]
