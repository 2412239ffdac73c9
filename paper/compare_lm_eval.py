"""
Does eval_hellaswag.py ask what lm-evaluation-harness asks? Compares text and tokens item by item with lm_eval's own
HellaSwag task on local files.

    python paper/compare_lm_eval.py --data=hellaswag_val.jsonl --train=hellaswag_train.jsonl --shots=5

Needs `pip install -r paper/requirements.txt` (tried with lm_eval 0.4.13). For scores, run six_tasks.py, which lets
lm_eval count, and eval_hellaswag.py on one checkpoint.
"""
import argparse
import importlib.util
import itertools
import json
import os
import re
import sys
import types

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import eval_hellaswag
from model import ModelConfig
from prepare_fineweb import UserError, command_line, get_tokenizer
from six_tasks import FEWSHOT_SEED, adapter

LICENCE = "HellaSwag items, Copyright (c) 2019 Rowan Zellers, MIT licence, https://github.com/rowanz/hellaswag"
# where GPT-2's tokenizer cuts ASCII text
GPT2_PIECE = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[a-zA-Z]+| ?[0-9]+| ?[^\sa-zA-Z0-9]+|\s+(?!\S)|\s+")


def harness_requests(data, train, shots, limit=None):
    """lm_eval's (context, continuation) pairs: four per item, in file order."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks.hellaswag.utils import process_docs
    task = ConfigurableTask(config={
        "task": "hellaswag", "output_type": "multiple_choice", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": train, "validation": data}},
        "training_split": "train", "validation_split": "validation", "process_docs": process_docs,
        "doc_to_text": "{{query}}", "doc_to_target": "{{label}}", "doc_to_choice": "choices", "num_fewshot": shots,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]})
    task.set_fewshot_seed(FEWSHOT_SEED)
    task.build_all_requests(limit=limit)
    return [request.args for request in task.instances]


def encode_pair():
    """lm_eval's function from (context, continuation) to their tokens."""
    return adapter(types.SimpleNamespace(config=ModelConfig()))._encode_pair


def count_different(items, requests):
    """Number of items whose tokens or character counts differ from lm_eval's."""
    encode, different = encode_pair(), 0
    for item in items:
        pairs = requests[4 * item.index:4 * item.index + 4]
        ours = [(item.context, ending) for ending in item.endings], item.characters
        different += ours != ([encode(*pair) for pair in pairs], [len(text) - 1 for _, text in pairs])
    return different


def write_golden(folder, data, count=40, few=5):
    """Write the data of test_hellaswag.py, made so that tests need no download.

    hellaswag_sample.jsonl  `count` rows spread over the file
    hellaswag_golden.json   the text and tokens that lm_eval makes of them 0-shot, and 5-shot for the first `few` with
                            examples from the same rows; and the tokens of each piece into which GPT-2 cuts these texts
    """
    rows = eval_hellaswag.read_split("val", data)
    rows = rows[::len(rows) // count][:count]
    sample = os.path.join(folder, "hellaswag_sample.jsonl")
    with open(sample, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    golden = {"licence": LICENCE}
    for shots, limit in ((0, count), (5, few)):
        requests = harness_requests(sample, sample, shots, limit)
        golden[f"{shots}-shot"] = [golden_entry(requests[i:i + 4]) for i in range(0, len(requests), 4)]
    entries = golden["0-shot"] + golden["5-shot"]
    texts = [text for entry in entries for text in (entry["context"], *entry["continuations"])]
    texts += [text for row in rows for text in (row["ctx"], *(f" {ending}" for ending in row["endings"]))]
    pieces = sorted({piece for text in texts for piece in GPT2_PIECE.findall(text)})
    golden["pieces"] = {piece: get_tokenizer("gpt2").encode(piece) for piece in pieces}
    with open(os.path.join(folder, "hellaswag_golden.json"), "w") as file:
        json.dump(golden, file, separators=(",", ":"))


def golden_entry(pairs):
    """Text and tokens of the four (context, continuation) pairs of one item, which have the context in common."""
    tokens = list(itertools.starmap(encode_pair(), pairs))
    assert all(pair[0] == pairs[0][0] and t[0] == tokens[0][0] for pair, t in zip(pairs, tokens))
    return {"context": pairs[0][0], "continuations": [continuation for _, continuation in pairs],
            "context_tokens": tokens[0][0], "ending_tokens": [ending for _, ending in tokens]}


def main():
    """Print how many items are rendered differently, or write the test data."""
    parser = argparse.ArgumentParser(description="Compare eval_hellaswag.py with lm_eval.")
    parser.add_argument("--data", required=True, help="validation items, .jsonl")
    parser.add_argument("--train", required=True, help="training items, .jsonl")
    parser.add_argument("--shots", type=int, default=0, help="solved examples in front of each item")
    parser.add_argument("--golden", metavar="FOLDER", help="write the test data into this folder, and stop")
    args = parser.parse_args()
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("needs lm_eval: pip install -r paper/requirements.txt")
    if args.golden:
        return write_golden(args.golden, args.data)
    items = eval_hellaswag.load_items(args.data, args.shots, train=args.train)
    different = count_different(items, harness_requests(args.data, args.train, args.shots))
    print(f"{args.shots}-shot: {different} of {len(items)} items are rendered differently")


if __name__ == "__main__":
    command_line(main)
