"""
The six tasks of Table 3 for a checkpoint, beside the paper's: ARC-c, ARC-e, HellaSwag, OpenBookQA, PIQA, WinoGrande.

    python paper/six_tasks.py --ckpt=out/paper-exo/ckpt_038147.pt --out=exo.json
    python paper/six_tasks.py --ckpt=PATH --data=DIR              offline, from the files as their authors publish them

Prompts, few-shot draws and metrics are lm_eval's own (pip install lm_eval, tried with 0.4.13); this file gives it a
model and, with --data, the items. A task counts acc_norm where lm_eval has it (the log-probability of an answer divided
by its length in characters), WinoGrande acc. DIR holds, each plain or as .gz:

    arc/ARC-{Challenge,Easy}-{Train,Test}.jsonl        hellaswag/hellaswag_{train,val}.jsonl
    openbookqa/{train,test}.jsonl                      piqa/{train,valid}.jsonl and {train,valid}-labels.lst
    winogrande/{train_xl,dev}.jsonl
"""
import argparse
import importlib.util
import json
import logging
import math
import os
import sys
from dataclasses import dataclass
from typing import Callable

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from eval_hellaswag import read_bytes, score_rows
from model import TABLE_3, choose_device, count_parameters, InputError, load_checkpoint, variant_name
from prepare_fineweb import Progress, UserError, atomic_write, check_writable, command_line, get_tokenizer, json_lines

FEWSHOT_SEED = 1234                                 # lm_eval's default; the examples in front of an item follow from it

TASK_ACCURACY = {  # the paper's, %, 5-shot: ARC-c, ARC-e, HellaSwag, OpenBookQA, PIQA, WinoGrande
    "base": (30.97, 63.38, 42.02, 33.60, 67.30, 51.54),
    "gated": (30.89, 64.69, 42.73, 34.00, 67.14, 53.35),
    "resformer": (33.62, 64.86, 43.49, 34.40, 68.88, 52.64),
    "naive": (32.94, 64.52, 43.47, 32.60, 68.34, 52.64),
    "nuresformer_qknorm": (31.74, 64.27, 43.83, 33.00, 68.23, 52.41),
    "nuresformer_qknorm_headwise": (34.73, 64.06, 44.45, 34.20, 67.57, 53.04),
    "nuresformer_qknorm_scalar": (32.85, 66.08, 43.87, 34.20, 68.28, 53.67),
    "nuresformer_vg": (32.42, 64.94, 43.80, 35.00, 67.52, 51.54),
    "nuresformer_vg_headwise": (31.23, 64.18, 43.50, 34.00, 67.68, 54.06),
    "nuresformer_vg_scalar": (31.83, 64.44, 43.66, 34.80, 68.44, 52.49),
    "nuresformer": (33.70, 65.07, 44.23, 33.60, 68.34, 53.12),
    "nuresformer_headwise": (33.79, 65.11, 44.09, 33.40, 67.41, 52.72),
    "nuresformer_scalar": (32.42, 64.02, 43.93, 33.20, 67.90, 53.20),
    "exo_nonorm": (32.08, 63.76, 43.49, 34.40, 68.77, 55.64),
    "exo_dynamic": (33.36, 65.87, 44.54, 34.40, 68.28, 55.17),
    "exo": (34.73, 64.65, 44.28, 36.40, 67.74, 53.59),
    "exo_headwise": (32.17, 65.87, 44.00, 32.40, 68.23, 54.06),
    "exo_scalar": (32.17, 65.66, 44.33, 33.60, 68.06, 51.14),
}


# -------------------------------------------------------------------------------------------------------------- 1 items

def fields(*names):
    """A converter that takes these fields of an official item."""
    return lambda row: {name: row[name] for name in names}


def question(stem):
    """A converter of AI2's questions: three to five options, labelled A, B, ... or 1, 2, ... lm_eval calls the question
    itself `stem`."""
    def convert(row):
        options, key = row["question"]["choices"], row["answerKey"]
        columns = {column: [option[column] for option in options] for column in ("text", "label")}
        if key not in columns["label"]:
            raise ValueError(f"answerKey {key!r} is none of {columns['label']}")
        return {stem: row["question"]["stem"], "choices": columns, "answerKey": key}
    return convert


@dataclass(frozen=True)
class Task:
    """A column of Table 3. `convert` makes lm_eval's item of an official one; `train` and `test` are files under --data
    without .jsonl; `split` is what lm_eval calls the second."""
    column: str
    metric: str
    convert: Callable
    train: str
    test: str
    split: str


TASKS = {  # by lm_eval's names, in the order of Table 3
    "arc_challenge": Task("ARC-c", "acc_norm", question("question"), "arc/ARC-Challenge-Train",
                          "arc/ARC-Challenge-Test", "test"),
    "arc_easy": Task("ARC-e", "acc_norm", question("question"), "arc/ARC-Easy-Train", "arc/ARC-Easy-Test", "test"),
    "hellaswag": Task("HellaSwag", "acc_norm", fields("activity_label", "ctx_a", "ctx_b", "endings", "label"),
                      "hellaswag/hellaswag_train", "hellaswag/hellaswag_val", "validation"),
    "openbookqa": Task("OBQA", "acc_norm", question("question_stem"), "openbookqa/train", "openbookqa/test", "test"),
    "piqa": Task("PIQA", "acc_norm", fields("goal", "sol1", "sol2"), "piqa/train", "piqa/valid", "validation"),
    "winogrande": Task("WinoGrande", "acc", fields("sentence", "option1", "option2", "answer"), "winogrande/train_xl",
                       "winogrande/dev", "validation"),
}


def read_local(folder, name):
    """(path, content) of folder/name or folder/name.gz. UserError where neither is there."""
    for path in (os.path.join(folder, name), os.path.join(folder, f"{name}.gz")):
        if os.path.exists(path):
            return path, read_bytes(path)
    raise UserError(f"--data={folder}: no {name}(.gz) there; --help lists the files. Get it, leave the task out with "
                    "--tasks or the examples with --shots=0, or let lm_eval download all, without --data")


def local_rows(name, folder, shots):
    """{split: rows} of one task from files."""
    task, rows = TASKS[name], {}
    for split, file in ((task.split, task.test), *([("train", task.train)] if shots else [])):
        path, content = read_local(folder, f"{file}.jsonl")
        rows[split] = list(json_lines(content.split(b"\n"), path, "an item of this task", task.convert))
        if name == "piqa":                                            # keeps its labels in a second file, line by line
            path, labels = read_local(folder, f"{file}-labels.lst")
            labels = labels.decode().split()
            if len(labels) != len(rows[split]) or not set(labels) <= {"0", "1"}:
                raise UserError(f"{path}: must hold a 0 or 1 for each of the {len(rows[split])} lines of {file}.jsonl")
            rows[split] = [{**row, "label": int(label)} for row, label in zip(rows[split], labels)]
    return {"train": rows[task.split], **rows}                        # lm_eval wants a split to draw no examples from


def load_tasks(names, folder, shots):
    """lm_eval's task objects: its own definitions, on its own downloads or on the files of `folder`."""
    import datasets
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    root = os.path.dirname(lm_eval.tasks.__file__)
    paths = [os.path.join(root, sub) for sub in ("arc", "hellaswag", "openbookqa", "piqa", "winogrande")]
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=paths)
    if not folder:
        try:
            return list(manager.load(list(names))["tasks"].values())
        except OSError as error:                           # all of requests' and datasets' connection errors are
            why = str(error).split("\n")[0]
            raise UserError(f"lm_eval cannot download the items ({why}); give their files with --data=DIR") from None
    tasks = []
    for name in names:
        splits = {split: datasets.Dataset.from_list(rows) for split, rows in local_rows(name, folder, shots).items()}
        config = {**load_yaml(manager.task_index[name].yaml_path),
                  "custom_dataset": lambda splits=splits, **_: datasets.DatasetDict(splits)}
        tasks.append(ConfigurableTask(config=config))
    return tasks


# -------------------------------------------------------------------------------------------------------------- 2 model


@torch.no_grad()
def score_all(model, rows, batch_size=16, dtype=torch.float32):
    """[log p(continuation | context)] for (context, continuation) ids.

    Rows of similar length run together, the longest first, so that a batch too large for the memory fails at once. A
    row longer than block_size loses tokens on its left. Log-probabilities are float32 per token, summed in float64.
    """
    device, block_size = next(model.parameters()).device, model.config.block_size
    longest = max(len(continuation) for _, continuation in rows)
    if longest > block_size:
        raise UserError(f"a continuation of {longest} tokens does not fit into block_size={block_size}")
    lengths = [min(block_size, len(context) + len(continuation) - 1) for context, continuation in rows]
    order, scores, done = sorted(range(len(rows)), key=lambda i: -lengths[i]), {}, 0
    progress = Progress("scoring", sum(lengths), "tokens")
    for first in range(0, len(rows), batch_size):
        batch = order[first:first + batch_size]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            scores.update(zip(batch, score_rows(model, [rows[i] for i in batch]).tolist()))
        done += sum(lengths[i] for i in batch)
        progress.update(done)
    progress.end()
    if not all(map(math.isfinite, scores.values())):
        raise UserError("the model gives log-probabilities that are not finite; its weights are damaged")
    return [scores[i] for i in range(len(rows))]


def adapter(model, batch_size=16, dtype=torch.float32):
    """An lm_eval model around an ExoFormer, for tasks of multiple choice; lm_eval's TemplateLM turns texts into
    (context, continuation) ids."""
    from lm_eval.api.model import TemplateLM
    tokens = get_tokenizer(model.config.tokenizer)

    class ExoFormerLM(TemplateLM):
        eot_token_id, cut = tokens.eot, 0                                             # cut: rows that lost tokens
        loglikelihood_rolling = generate_until = None                                 # the six tasks ask for neither

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return tokens.encode(string)

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
            rows = [(context, continuation) for _, context, continuation in requests]
            self.cut += sum(len(before) + len(scored) - 1 > model.config.block_size for before, scored in rows)
            return [(score, False) for score in score_all(model, rows, batch_size, dtype)]       # False: not asked for

    return ExoFormerLM()


# ------------------------------------------------------------------------------------------------------------ 3 results


def evaluate(model, names=tuple(TASKS), shots=5, limit=None, data="", batch_size=16, dtype=torch.float32):
    """{"tasks": {name: {metric, value, stderr, items, acc, ...}}, "cautions": [...], ...}; accuracies in [0, 1]."""
    if data:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")  # read when lm_eval's packages are imported
    import datasets
    import lm_eval

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    tasks, cautions = load_tasks(names, data, shots), []
    for task in tasks:
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(FEWSHOT_SEED)
    lm = adapter(model, batch_size, dtype)
    loaded = {"tasks": {task.config.task: task for task in tasks}, "groups": {}, "group_map": {}}
    out = lm_eval.evaluate(lm, loaded, limit=limit, log_samples=False)
    if lm.cut:
        cautions.append(f"{lm.cut} prompts were cut on the left to block_size={model.config.block_size} tokens")
    if limit:
        cautions.append(f"--limit={limit}: the first {limit} items of each task, a trial")
    return {"tasks": {name: summary(name, out) for name in names}, "shots": shots, "limit": limit,
            "cautions": cautions, "lm_eval": lm_eval.__version__}


def summary(name, out):
    """One task's entry of the results, from lm_eval's {"acc,none": ..., "acc_stderr,none": ...}."""
    metric = TASKS[name].metric
    plain = {key.split(",")[0]: value for key, value in out["results"][name].items() if key.startswith("acc")}
    return {"metric": metric, "value": plain[metric], "stderr": plain[f"{metric}_stderr"],
            "items": out["n-samples"][name]["effective"], **plain}


def table(results, variant, parameters):
    """The lines of Table 3's columns: this checkpoint, the paper's row of its variant, their difference, our error."""
    tasks, paper = results["tasks"], dict(zip(TASKS, TASK_ACCURACY.get(variant, ())))
    columns = {TASKS[name].column: (100 * task["value"], 100 * task["stderr"], paper.get(name))
               for name, task in tasks.items()}
    if len(columns) == len(TASKS):
        ours, errors, theirs = zip(*columns.values())
        columns["average"] = (sum(ours) / len(ours), math.hypot(*errors) / len(ours),       # of independent errors
                              sum(theirs) / len(theirs) if paper else None)
    yield f"{'accuracy, %':24s}" + "".join(f"{column:>12s}" for column in columns)
    yield f"{variant[:23]:24s}" + "".join(f"{ours:12.2f}" for ours, _, _ in columns.values())
    if paper:
        yield f"{'paper':24s}" + "".join(f"{theirs:12.2f}" for _, _, theirs in columns.values())
        yield f"{'difference':24s}" + "".join(f"{ours - theirs:+12.2f}" for ours, _, theirs in columns.values())
    yield f"{'standard error of ours':24s}" + "".join(f"{error:12.2f}" for _, error, _ in columns.values())
    if paper:
        millions, _, printed = TABLE_3[variant]
        yield (f"(the paper's row: {millions} M parameters, 10 billion tokens, 5-shot; this checkpoint: "
               f"{parameters / 1e6:.4g} M parameters, {results['shots']}-shot)")
        if "average" in columns and abs(columns["average"][2] - printed) > 0.01:
            yield f"(the paper prints {printed:.2f} as the average; its six cells have the mean that stands here)"
    yield from results["cautions"]


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--ckpt", required=True,
                        help="checkpoint to score: one of train.py, or one released with the paper")
    parser.add_argument("--tasks", default=",".join(TASKS), help="which, separated by commas (default: all six)")
    parser.add_argument("--shots", type=int, default=5,
                        help="solved examples in front of each item (default: 5, the paper's)")
    parser.add_argument("--limit", type=int, help="score the first LIMIT items of each task only: a trial")
    parser.add_argument("--data", default="",
                        help="folder with the official files; default: lm_eval downloads from the Hugging Face hub")
    parser.add_argument("--out", help="write the results to this JSON file")
    parser.add_argument("--batch_size", type=int, default=16, help="rows that run together; fewer need less memory")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="precision of the layers; scores are float32")
    args = parser.parse_args()
    args.tasks = args.tasks.split(",")
    unknown = [name for name in args.tasks if name not in TASKS]
    if unknown:
        parser.error(f"--tasks: unknown {unknown[0]!r}; there are {', '.join(TASKS)}")
    if args.shots < 0 or args.batch_size < 1 or (args.limit is not None and args.limit < 2):
        parser.error("--shots must not be negative, --batch_size at least 1, --limit at least 2 (for a standard error)")
    return args


def main():
    """Score a checkpoint, print the table, write --out."""
    args = parse_arguments()
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("needs lm_eval: pip install -r paper/requirements.txt")
    check_writable(args.out)
    model = load_checkpoint(args.ckpt, choose_device(args.device, among=("cuda", "cpu"))).eval()
    needed = get_tokenizer(model.config.tokenizer).n_vocab
    if model.config.vocab_size < needed:
        raise UserError(f"{args.ckpt}: knows {model.config.vocab_size} token ids, but its tokenizer, "
                        f"{model.config.tokenizer}, has {needed}")
    results = evaluate(model, args.tasks, args.shots, args.limit, args.data, args.batch_size,
                       getattr(torch, args.dtype))
    variant, parameters = variant_name(model.config), count_parameters(model)
    print("\n".join(table(results, variant, parameters)))
    if args.out:
        with atomic_write(args.out) as file:
            record = {"ckpt": args.ckpt, "variant": variant, "parameters": parameters, **results}
            file.write(json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    command_line(main, InputError, memory="halve --batch_size")
