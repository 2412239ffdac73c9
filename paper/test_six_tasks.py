"""Tests of six_tasks.py. No network; tests that need lm_eval are skipped where it is missing."""
import functools
import importlib.util
import json
import math
import os
import random
import shutil

import numpy as np
import pytest
import torch

import eval_hellaswag
import six_tasks
from model import TABLE_3, ExoFormer, variant_config
from prepare_fineweb import UserError, get_tokenizer
from six_tasks import TASK_ACCURACY

SAMPLE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "testdata", "hellaswag_sample.jsonl")
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval")
SMALL = dict(n_layer=2, n_head=2, n_embd=8, vocab_size=320, block_size=16, tokenizer="bytes")


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
    """log p of a continuation, one forward pass per token; the row keeps its last block_size + 1 tokens."""
    row, total = (context + continuation)[-(model.config.block_size + 1):], 0.0
    for place in range(len(row) - len(continuation), len(row)):
        total += model(torch.tensor([row[:place]]))[0, -1].double().log_softmax(-1)[row[place]].item()
    return total


@functools.cache
def scored_rows(count=24):
    """(context, continuation) pairs of many lengths, some too long for block_size, and their looped scores."""
    model, draw = random_model(), np.random.default_rng(0)
    rows = [tuple(draw.integers(0, 257, draw.integers(1, most)).tolist() for most in (24, 9)) for _ in range(count)]
    assert 0 < sum(len(context) + len(continuation) > 17 for context, continuation in rows) < count
    return rows, [looped_score(model, *row) for row in rows]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_scores_equal_a_loop_over_tokens_at_every_batch_size(batch_size):
    rows, expected = scored_rows()
    assert six_tasks.score_all(random_model(), rows, batch_size) == pytest.approx(expected, abs=1e-4)


def test_a_continuation_longer_than_the_context_window_is_refused():
    with pytest.raises(UserError, match="a continuation of 17 tokens does not fit into block_size=16"):
        six_tasks.score_all(random_model(), [([1], [2] * 17)])


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
    model, tokenizer = random_model(), get_tokenizer("bytes")
    pairs = [("the cat", " sat"), ("", "on"), ("a ", "mat"), ("much longer than the window", " is it")]
    moved = [("the cat", " sat"), (None, "on"), ("a", " mat"), pairs[3]]  # spaces go with the continuation
    scores = six_tasks.adapter(model, batch_size).loglikelihood([Request(*pair) for pair in pairs], disable_tqdm=True)
    ids = [([256] if context is None else tokenizer.encode(context), tokenizer.encode(text)) for context, text in moved]
    assert [score for score, _ in scores] == pytest.approx([looped_score(model, *row) for row in ids], abs=1e-4)


def arc(name, stem, options, labels, key):
    """A question in the official format."""
    choices = [dict(text=text, label=label) for text, label in zip(options, labels)]
    return dict(id=name, question=dict(stem=stem, choices=choices), answerKey=key)


ARC = [arc("1", "What barks?", ("cat", "dog", "a big cow"), "123", "2"),
       arc("2", "Which is hot?", ("ice", "fire", "snow", "rain", "milk"), "ABCDE", "B")]
WINOGRANDE = [dict(sentence="The cup fell off the desk as _ was wet.", option1="cup", option2="desk", answer="1"),
              dict(sentence="Ann paid Sue since _ had won.", option1="Ann", option2="Sue", answer="2")]


def write_lines(path, rows):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def items(tmp_path):
    """A --data folder with ARC-Easy (three and five options, numeric labels) and WinoGrande."""
    for name in ("Train", "Test"):
        write_lines(str(tmp_path / f"arc/ARC-Easy-{name}.jsonl"), ARC)
    for name in ("train_xl", "dev"):
        write_lines(str(tmp_path / f"winogrande/{name}.jsonl"), WINOGRANDE)
    return tmp_path


def test_items_keep_three_and_five_options_and_numeric_labels(items):
    rows = six_tasks.local_rows("arc_easy", str(items), 0)["test"]
    assert [row["choices"]["label"] for row in rows] == [["1", "2", "3"], ["A", "B", "C", "D", "E"]]
    assert rows[0] == dict(question="What barks?",
                           choices=dict(text=["cat", "dog", "a big cow"], label=["1", "2", "3"]), answerKey="2")


def test_piqa_takes_its_labels_from_the_second_file_line_by_line(tmp_path):
    write_lines(str(tmp_path / "piqa/valid.jsonl"), [dict(goal=f"g{i}", sol1="a", sol2="b") for i in range(3)])
    labels = tmp_path / "piqa/valid-labels.lst"
    labels.write_text("0\n1\n1\n")
    assert [row["label"] for row in six_tasks.local_rows("piqa", str(tmp_path), 0)["validation"]] == [0, 1, 1]
    labels.write_text("0\n1\n")
    with pytest.raises(UserError, match="valid-labels.lst: must hold a 0 or 1 for each of the 3 lines"):
        six_tasks.local_rows("piqa", str(tmp_path), 0)


@needs_lm_eval
def test_lm_eval_counts_what_a_loop_over_the_prompts_counts(items):
    """ARC: the likeliest answer for its length in characters. WinoGrande: the likelier start for the same end."""
    model, encode, right, chosen = random_model(block_size=256), get_tokenizer("bytes").encode, [], []
    for row in ARC:
        prompt, choices = encode(f"Question: {row['question']['stem']}\nAnswer:"), row["question"]["choices"]
        scores = [looped_score(model, prompt, encode(f" {choice['text']}")) / len(choice["text"]) for choice in choices]
        right.append(choices[int(np.argmax(scores))]["label"] == row["answerKey"])
    for row in WINOGRANDE:
        start, end = row["sentence"].split("_")
        scores = [looped_score(model, encode(start + row[option]), encode(end)) for option in ("option1", "option2")]
        chosen.append(str(1 + int(np.argmax(scores))) == row["answer"])
    results = [six_tasks.evaluate(model, ["arc_easy", "winogrande"], 0, None, str(items), batch_size)
               for batch_size in (1, 64)]
    assert results[0]["tasks"] == results[1]["tasks"]
    assert [task["value"] for task in results[0]["tasks"].values()] == [sum(right) / 2, sum(chosen) / 2]


@needs_lm_eval
def test_examples_are_those_that_lm_eval_draws_with_its_seed(items, monkeypatch):
    stems = [f"What barks in {place}?" for place in ("Rome", "Oslo", "Bonn", "Lima", "Pisa", "Nara", "Faro", "Cork")]
    train = [{**ARC[0], "question": {**ARC[0]["question"], "stem": stem}} for stem in stems]
    write_lines(str(items / "arc/ARC-Easy-Train.jsonl"), train)
    asked, tokenizer, draw, expected = [], get_tokenizer("bytes"), random.Random(1234), []
    monkeypatch.setattr(six_tasks, "score_all", lambda _, rows, *__: asked.extend(rows) or [0.0] * len(rows))
    six_tasks.evaluate(random_model(), ["arc_easy"], 2, None, str(items))
    for row in ARC:
        shots = "".join(f"Question: {shot['question']['stem']}\nAnswer: dog\n\n" for shot in draw.sample(train, 2))
        prompt = f"{shots}Question: {row['question']['stem']}\nAnswer:"
        expected += [(prompt, f" {choice['text']}") for choice in row["question"]["choices"]]
    assert [tuple(map(tokenizer.decode, row)) for row in asked] == expected


@needs_lm_eval
@pytest.mark.parametrize("shots", [0, 5])
def test_eval_hellaswag_asks_what_lm_eval_asks(shots, tmp_path, monkeypatch):
    """The same contexts with the same examples, the same endings, cut apart at the same place: in bytes, 40 items."""
    os.mkdir(tmp_path / "hellaswag")
    for split in ("train", "val"):
        shutil.copy(SAMPLE, tmp_path / f"hellaswag/hellaswag_{split}.jsonl")
    asked = []
    monkeypatch.setattr(six_tasks, "score_all", lambda _, rows, *__: asked.extend(rows) or [0.0] * len(rows))
    monkeypatch.setattr(eval_hellaswag, "get_tokenizer", lambda name: get_tokenizer("bytes"))
    six_tasks.evaluate(random_model(), ["hellaswag"], shots, None, str(tmp_path))
    items = eval_hellaswag.load_items(SAMPLE, shots, train=SAMPLE)
    assert len(items) == 40 and asked == [(item.context, ending) for item in items for ending in item.endings]


def results_of(values, shots=5):
    """Results of evaluate() with these accuracies and standard errors, in the order of Table 3."""
    return dict(tasks={name: dict(value=value, stderr=error) for name, (value, error) in zip(six_tasks.TASKS, values)},
                shots=shots, cautions=["a caution"])


def numbers_of(lines, name):
    return [float(cell) for cell in next(line for line in lines if line.startswith(name)).split() if cell[-1].isdigit()]


def test_the_table_has_the_papers_row_the_difference_and_the_error_task_by_task():
    values = [(0.30, 0.01), (0.60, 0.02), (0.45, 0.01), (0.35, 0.02), (0.70, 0.04), (0.50, 0.01)]
    lines = list(six_tasks.table(results_of(values), "exo", 456_958_848))
    assert lines[0].split()[2:] == ["ARC-c", "ARC-e", "HellaSwag", "OBQA", "PIQA", "WinoGrande", "average"]
    theirs = [34.73, 64.65, 44.28, 36.40, 67.74, 53.59]                          # Table 3, E-ExoFormer
    assert numbers_of(lines, "exo") == [30, 60, 45, 35, 70, 50, pytest.approx(290 / 6, abs=0.005)]
    assert numbers_of(lines, "paper") == pytest.approx([*theirs, 50.23])
    assert numbers_of(lines, "difference") == pytest.approx([-4.73, -4.65, 0.72, -1.4, 2.26, -3.59, -1.9], abs=0.006)
    error = 100 * math.sqrt(3 * 0.01 ** 2 + 2 * 0.02 ** 2 + 0.04 ** 2) / 6       # of the mean of independent tasks
    assert numbers_of(lines, "standard error of ours") == pytest.approx([1, 2, 1, 2, 4, 1, error], abs=0.006)
    assert "the paper prints 49.85 as the average" in "".join(lines) and lines[-1] == "a caution"


def test_some_tasks_have_no_average_and_another_model_no_row_of_the_paper():
    lines = list(six_tasks.table(results_of([(0.30, 0.01), (0.60, 0.02)]), "gated", 1000))
    assert "average" not in "".join(lines) and numbers_of(lines, "paper") == list(TASK_ACCURACY["gated"][:2])
    lines = list(six_tasks.table(results_of([(0.5, 0.01)] * 6), "custom", 1000))
    assert [line.split()[0] for line in lines] == ["accuracy,", "custom", "standard", "a"]


def test_what_cannot_be_scored_is_one_line(tmp_path, items, call, monkeypatch, capsys):
    write_lines(str(items / "arc/ARC-Challenge-Test.jsonl"), [ARC[1], {**ARC[0], "answerKey": "F"}])
    with pytest.raises(UserError, match="ARC-Challenge-Test.jsonl, line 2: .*answerKey 'F' is none of"):
        six_tasks.local_rows("arc_challenge", str(items), 0)
    os.remove(items / "arc/ARC-Easy-Train.jsonl")
    with pytest.raises(UserError, match=r"no arc/ARC-Easy-Train.jsonl\(.gz\) there"):
        six_tasks.local_rows("arc_easy", str(items), 5)
    assert len(six_tasks.local_rows("arc_easy", str(items), 0)["test"]) == 2
    with pytest.raises(SystemExit, match="2"):
        call(six_tasks.main, "--ckpt=x.pt", "--tasks=wikitext")
    assert "unknown 'wikitext'; there are arc_challenge" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs lm_eval: pip install"):
        call(six_tasks.main, f"--ckpt={tmp_path / 'x.pt'}")


def test_six_accuracies_of_every_row_have_the_average_that_the_paper_prints():
    """But for two rows, whose cells average more than is printed."""
    off = {name: round(sum(six) / 6, 2) for name, six in TASK_ACCURACY.items()
           if abs(sum(six) / 6 - TABLE_3[name][2]) > 0.0051}
    assert list(TASK_ACCURACY) == list(TABLE_3) and all(len(six) == 6 for six in TASK_ACCURACY.values())
    assert off == {"exo": 50.23, "exo_headwise": pytest.approx(49.46, abs=0.011)}
