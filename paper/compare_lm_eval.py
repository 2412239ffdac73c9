"""
Is eval_hellaswag.py the same as lm-evaluation-harness? Compares text, tokens and scores item by item.

    python paper/compare_lm_eval.py --data=hellaswag_val.jsonl --train=hellaswag_train.jsonl --shots=5

Runs lm_eval's own HellaSwag task on local files, and lm_eval's own scoring loop over a model with random weights.
Needs `pip install -r paper/requirements.txt` (tried with lm_eval 0.4.13).
"""
import argparse
import importlib.util
import json
import os
import re
import sys

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import eval_hellaswag
from model import ExoFormer, variant_config
from prepare_fineweb import UserError, command_line, get_tokenizer

LICENCE = "HellaSwag items, Copyright (c) 2019 Rowan Zellers, MIT licence, https://github.com/rowanz/hellaswag"
# where GPT-2's tokenizer cuts ASCII text
GPT2_PIECE = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[a-zA-Z]+| ?[0-9]+| ?[^\sa-zA-Z0-9]+|\s+(?!\S)|\s+")


def harness_requests(data, train, shots, limit):
    """(lm_eval's task object, its (context, continuation) pairs: four per item, in file order)."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks.hellaswag.utils import process_docs
    task = ConfigurableTask(config={
        "task": "hellaswag", "output_type": "multiple_choice", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": train, "validation": data}},
        "training_split": "train", "validation_split": "validation", "process_docs": process_docs,
        "doc_to_text": "{{query}}", "doc_to_target": "{{label}}", "doc_to_choice": "choices", "num_fewshot": shots,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]})
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=limit)
    return task, [request.args for request in task.instances]


def harness_model(model):
    """lm_eval's Hugging Face class around an ExoFormer: its tokenisation of pairs and scoring loop, our forward."""
    from lm_eval.models.huggingface import HFLM

    class Harness(HFLM):
        tokenizer, backend, logits_cache, softmax_dtype, enable_thinking = None, "causal", False, torch.float32, None
        batch_size, max_length, device, rank = 8, model.config.block_size, torch.device("cpu"), 0
        eot_token_id, encode = get_tokenizer("gpt2").eot, staticmethod(get_tokenizer("gpt2").encode)

        def __init__(self):
            super(HFLM, self).__init__()

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return self.encode(string)

        @torch.no_grad()
        def _model_call(self, inps):
            return model(inps)

    return Harness()


def count_different(items, requests, harness):
    """Number of items whose tokens or character counts differ from lm_eval's."""
    different = 0
    for item in items:
        pairs = requests[4 * item.index:4 * item.index + 4]
        ours = [(item.context, ending) for ending in item.endings], item.characters
        different += ours != ([harness._encode_pair(*pair) for pair in pairs], [len(text) - 1 for _, text in pairs])
    return different


def compare_scores(model, items, task, harness):
    """Print accuracies and predictions of both, and the largest difference between their scores."""
    wanted = {item.index for item in items}
    instances = [request for request in task.instances if request.doc_id in wanted]
    answers = harness.loglikelihood(instances, disable_tqdm=True)
    theirs = torch.tensor([score for score, _ in answers], dtype=torch.float64).view(-1, 4)
    ours = eval_hellaswag.score(model, items)
    predicted, other = (eval_hellaswag.predictions(items, scores) for scores in (ours, theirs))
    accuracy = eval_hellaswag.accuracy(items, predicted)
    results = [task.process_results(instances[4 * i].doc, answers[4 * i:4 * i + 4]) for i in range(len(items))]
    for metric in ("acc", "acc_norm"):
        print(f"{metric}: lm_eval {sum(r[metric] for r in results) / len(items):.4f}, ours {accuracy[metric]:.4f}, "
              f"predictions that differ: {int((predicted[metric] != other[metric]).sum())}")
    best, second = ours.topk(2, dim=-1).values.T
    clear = (predicted["acc"] != other["acc"]) & (best - second > 1e-3)
    print(f"largest difference of a score {float((ours - theirs).abs().max()):.2e}; predictions that differ though the "
          f"best two are more than 1e-3 apart: {int(clear.sum())}")


def random_model(block_size):
    """A small ExoFormer whose zero-initialised matrices are random too."""
    torch.manual_seed(0)
    config = variant_config("exo", n_layer=2, n_embd=64, n_head=2, vocab_size=50257, block_size=block_size)
    model = ExoFormer(config).eval()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return model


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
    harness, golden = harness_model(random_model(1024)), {"licence": LICENCE}
    for shots, limit in ((0, count), (5, few)):
        requests = harness_requests(sample, sample, shots, limit)[1]
        golden[f"{shots}-shot"] = [golden_entry(harness, requests[i:i + 4]) for i in range(0, len(requests), 4)]
    entries = golden["0-shot"] + golden["5-shot"]
    texts = [text for entry in entries for text in (entry["context"], *entry["continuations"])]
    texts += [text for row in rows for text in (row["ctx"], *(f" {ending}" for ending in row["endings"]))]
    pieces = sorted({piece for text in texts for piece in GPT2_PIECE.findall(text)})
    golden["pieces"] = {piece: get_tokenizer("gpt2").encode(piece) for piece in pieces}
    with open(os.path.join(folder, "hellaswag_golden.json"), "w") as file:
        json.dump(golden, file, separators=(",", ":"))


def golden_entry(harness, pairs):
    """Text and tokens of the four (context, continuation) pairs of one item, which have the context in common."""
    tokens = [harness._encode_pair(*pair) for pair in pairs]
    assert all(pair[0] == pairs[0][0] and t[0] == tokens[0][0] for pair, t in zip(pairs, tokens))
    return {"context": pairs[0][0], "continuations": [continuation for _, continuation in pairs],
            "context_tokens": tokens[0][0], "ending_tokens": [ending for _, ending in tokens]}


def main():
    """Print how many items are rendered differently and how far scores differ, or write the test data."""
    parser = argparse.ArgumentParser(description="Compare eval_hellaswag.py with lm_eval.")
    parser.add_argument("--data", required=True, help="validation items, .jsonl")
    parser.add_argument("--train", required=True, help="training items, .jsonl")
    parser.add_argument("--shots", type=int, default=0, help="solved examples in front of each item")
    parser.add_argument("--limit", type=int, help="compare the first LIMIT items only")
    parser.add_argument("--score", type=int, default=300, help="items to score, evenly spread over the file")
    parser.add_argument("--block_size", type=int, default=1024, help="of the random model; a small one tests cutting")
    parser.add_argument("--golden", metavar="FOLDER", help="write the test data into this folder, and stop")
    args = parser.parse_args()
    if not all(map(importlib.util.find_spec, ("lm_eval", "transformers", "accelerate"))):
        raise UserError("needs lm_eval with its Hugging Face models: pip install -r paper/requirements.txt")
    if args.golden:
        return write_golden(args.golden, args.data)
    items = eval_hellaswag.load_items(args.data, args.shots, "lmeval", args.limit, args.train)
    task, requests = harness_requests(args.data, args.train, args.shots, args.limit)
    model = random_model(args.block_size)
    harness = harness_model(model)
    different = count_different(items, requests, harness)
    print(f"{args.shots}-shot: {different} of {len(items)} items are rendered differently")
    compare_scores(model, items[::max(1, len(items) // args.score)][:args.score], task, harness)


if __name__ == "__main__":
    command_line(main)
