"""
The six tasks of Table 3 for a checkpoint, beside the paper's: ARC-c, ARC-e, HellaSwag, OpenBookQA,
PIQA, WinoGrande.

    python paper/six_tasks.py --ckpt=out/paper-exo/ckpt_038147.pt --out=exo.json
    python paper/six_tasks.py --ckpt=PATH --data=DIR     offline, from the files of the authors

Prompts, few-shot draws and metrics are lm_eval's own (pip install lm_eval, tried with 0.4.13); this
file gives it a model and, with --data, the items. A task counts acc_norm where lm_eval has it (the
log-probability of an answer divided by its length in characters), WinoGrande acc. --out also says
of every item whether it was right; paper/compare_hellaswag.py compares two such files.

DIR holds, each plain or as .gz:

    arc/ARC-{Challenge,Easy}-{Train,Test}.jsonl
    hellaswag/hellaswag_{train,val}.jsonl
    openbookqa/{train,test}.jsonl
    piqa/{train,valid}.jsonl and {train,valid}-labels.lst
    winogrande/{train_xl,dev}.jsonl
"""

import argparse
import hashlib
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

from eval_hellaswag import (
    CHECKPOINT_HELP,
    DTYPES,
    all_finite,
    checked,
    checkpoint_file,
    eval_mode,
    load_for_scoring,
    read_bytes,
    score_rows,
)
from model import TABLE_3, InputError, choose_device, count_parameters, variant_name
from prepare_fineweb import (
    Progress,
    UserError,
    atomic_write,
    check_writable,
    command_line,
    get_tokenizer,
    json_lines,
)

FEWSHOT_SEED = 1234  # lm_eval's default; the examples in front of an item follow from it

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

# ---- 1 items ---------------------------------------------------------------------------------


def texts(*names):
    """A converter that takes these fields of an official item, each of which must be a text."""

    def convert(row):
        item = {name: row[name] for name in names}
        for name, value in item.items():
            if not isinstance(value, str):
                raise ValueError(f"{name} must be a text, not {value!r}")
        return item

    return convert


def question(stem):
    """A converter of AI2's questions: three to five options, labelled A, B, ... or 1, 2, ...;
    lm_eval calls the question itself `stem`."""

    def convert(row):
        asked = texts("stem")(row["question"])
        options = [texts("text", "label")(option) for option in row["question"]["choices"]]
        choices = {column: [option[column] for option in options] for column in ("text", "label")}
        key = row["answerKey"]
        if key not in choices["label"]:
            raise ValueError(f"answerKey {key!r} is none of {choices['label']}")
        return {stem: asked["stem"], "choices": choices, "answerKey": key}

    return convert


def sentence(row):
    """The converter of WinoGrande: a sentence with a blank, two options, the number of the right
    one."""
    item = texts("sentence", "option1", "option2", "answer")(row)
    if "_" not in item["sentence"] or item["answer"] not in ("1", "2"):
        raise ValueError('the sentence must have a blank "_", the answer must be "1" or "2"')
    return item


@dataclass(frozen=True)
class Task:
    """A column of Table 3 and where its items are."""

    column: str
    metric: str
    convert: Callable  # lm_eval's item of an official one; ValueError where it is none
    train: str  # file under --data, without .jsonl
    test: str  # likewise
    split: str  # what lm_eval calls `test`


TASKS = {  # by lm_eval's names, in the order of Table 3
    "arc_challenge": Task(
        column="ARC-c",
        metric="acc_norm",
        convert=question("question"),
        train="arc/ARC-Challenge-Train",
        test="arc/ARC-Challenge-Test",
        split="test",
    ),
    "arc_easy": Task(
        column="ARC-e",
        metric="acc_norm",
        convert=question("question"),
        train="arc/ARC-Easy-Train",
        test="arc/ARC-Easy-Test",
        split="test",
    ),
    "hellaswag": Task(
        column="HellaSwag",
        metric="acc_norm",
        convert=checked,
        train="hellaswag/hellaswag_train",
        test="hellaswag/hellaswag_val",
        split="validation",
    ),
    "openbookqa": Task(
        column="OBQA",
        metric="acc_norm",
        convert=question("question_stem"),
        train="openbookqa/train",
        test="openbookqa/test",
        split="test",
    ),
    "piqa": Task(
        column="PIQA",
        metric="acc_norm",
        convert=texts("goal", "sol1", "sol2"),
        train="piqa/train",
        test="piqa/valid",
        split="validation",
    ),
    "winogrande": Task(
        column="WinoGrande",
        metric="acc",
        convert=sentence,
        train="winogrande/train_xl",
        test="winogrande/dev",
        split="validation",
    ),
}


def local_rows(name, folder, shots):
    """{split: rows} of one task from files. UserError where they hold no item, or too few to draw
    `shots` examples from."""
    task = TASKS[name]
    rows = read_rows(name, folder, task.test)
    if not shots:
        return {task.split: rows, "train": rows}  # lm_eval wants a split to draw no examples from
    train = read_rows(name, folder, task.train)
    if len(train) <= shots:
        raise UserError(
            f"--shots={shots} draws from at least {shots + 1} items, and "
            f"{os.path.join(folder, task.train)}.jsonl holds {len(train)}"
        )
    return {task.split: rows, "train": train}


def read_rows(name, folder, file):
    """lm_eval's items of one official file; PIQA keeps its labels in a second one, line by line."""
    path, content = read_local(folder, f"{file}.jsonl")
    lines = content.split(b"\n")
    rows = list(json_lines(lines, path, "an item of this task", TASKS[name].convert))
    if not rows:
        raise UserError(f"{path}: no items in it")
    if name != "piqa":
        return rows
    path, content = read_local(folder, f"{file}-labels.lst")
    labels = content.split()
    if len(labels) != len(rows) or not set(labels) <= {b"0", b"1"}:
        raise UserError(
            f"{path}: must hold a 0 or 1 for each of the {len(rows)} lines of {file}.jsonl"
        )
    return [{**row, "label": int(label)} for row, label in zip(rows, labels)]


def read_local(folder, name):
    """(path, content) of folder/name or folder/name.gz. UserError where neither is there."""
    for path in (os.path.join(folder, name), os.path.join(folder, f"{name}.gz")):
        if os.path.exists(path):
            return path, read_bytes(path)
    raise UserError(
        f"--data={folder}: no {name}(.gz) there; --help lists the files. Get it, leave the task "
        "out with --tasks or the examples with --shots=0, or let lm_eval download all, without "
        "--data"
    )


def load_tasks(names, folder, shots):
    """lm_eval's task objects: its own definitions, on its own downloads or on the files of
    `folder`."""
    import lm_eval.tasks

    root = os.path.dirname(lm_eval.tasks.__file__)
    subfolders = ("arc", "hellaswag", "openbookqa", "piqa", "winogrande")
    paths = [os.path.join(root, subfolder) for subfolder in subfolders]
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=paths)
    if folder:
        return [local_task(manager, name, local_rows(name, folder, shots)) for name in names]
    try:
        return list(manager.load(list(names))["tasks"].values())
    except OSError as error:  # all of requests' and datasets' connection errors are
        why = str(error).split("\n")[0]
        raise UserError(
            f"lm_eval cannot download the items ({why}); give their files with --data=DIR"
        ) from None


def local_task(manager, name, rows):
    """lm_eval's task object on {split: rows}."""
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    splits = {split: datasets.Dataset.from_list(items) for split, items in rows.items()}
    config = load_yaml(manager.task_index[name].yaml_path)
    config["custom_dataset"] = lambda **_: datasets.DatasetDict(splits)
    return ConfigurableTask(config=config)


# ---- 2 model ---------------------------------------------------------------------------------


@torch.no_grad()
def score_all(model, rows, batch_size=16, dtype=torch.float32):
    """[log p(continuation | context)] for (context, continuation) ids, in nats.

    Rows of similar length run together, the longest first, so that a batch too large for the memory
    fails at once. A row longer than block_size loses tokens on its left. Log-probabilities are
    float32 per token, summed in float64. The model is scored in eval mode.
    """
    block_size = model.config.block_size
    longest = max(len(continuation) for _, continuation in rows)
    if longest > block_size:
        raise UserError(
            f"a continuation of {longest} tokens does not fit into block_size={block_size}"
        )
    lengths = [min(block_size, len(context) + len(ending) - 1) for context, ending in rows]
    order = sorted(range(len(rows)), key=lambda i: -lengths[i])
    scores = torch.empty(len(rows), dtype=torch.float64)
    progress = Progress("scoring", sum(lengths), "tokens")
    done = 0
    device = model.head.weight.device.type
    with eval_mode(model), torch.autocast(device, dtype, enabled=dtype != torch.float32):
        for first in range(0, len(rows), batch_size):
            batch = order[first : first + batch_size]
            scores[batch] = score_rows(model, [rows[i] for i in batch])
            done += sum(lengths[i] for i in batch)
            progress.update(done)
    progress.end()
    return all_finite(scores).tolist()


def adapter(model, batch_size=16, dtype=torch.float32):
    """An lm_eval model around an ExoFormer, for tasks of multiple choice; lm_eval's TemplateLM
    turns texts into (context, continuation) ids."""
    from lm_eval.api.model import TemplateLM

    tokenizer = get_tokenizer(model.config.tokenizer)

    class ExoFormerLM(TemplateLM):
        eot_token_id = tokenizer.eot
        cut = 0  # rows that lost tokens
        loglikelihood_rolling = None  # the six tasks ask for neither
        generate_until = None

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return tokenizer.encode(string)

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
            rows = [(context, continuation) for _, context, continuation in requests]
            lengths = [len(context) + len(continuation) - 1 for context, continuation in rows]
            self.cut += sum(length > model.config.block_size for length in lengths)
            scores = score_all(model, rows, batch_size, dtype)
            return [(score, False) for score in scores]  # False: whether it is greedy, not asked

    return ExoFormerLM()


# ---- 3 results -------------------------------------------------------------------------------


def evaluate(
    model, names=tuple(TASKS), shots=5, limit=None, data="", batch_size=16, dtype=torch.float32
):
    """{"tasks": {name: see `summary`}, "shots", "limit", "cautions": [lines], "lm_eval": version};
    accuracies in [0, 1]."""
    if data:  # these are read when lm_eval's packages are imported
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    import datasets
    import lm_eval

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    tasks = load_tasks(names, data, shots)
    for task in tasks:
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(FEWSHOT_SEED)
    lm = adapter(model, batch_size, dtype)
    loaded = {"tasks": {task.config.task: task for task in tasks}, "groups": {}, "group_map": {}}
    out = lm_eval.evaluate(lm, loaded, limit=limit, log_samples=True)
    cautions = []
    if lm.cut:
        block_size = model.config.block_size
        cautions.append(f"{lm.cut} prompts were cut on the left to block_size={block_size} tokens")
    if limit:
        cautions.append(f"--limit={limit}: the first {limit} items of each task, a trial")
    return {
        "tasks": {name: summary(name, out) for name in names},
        "shots": shots,
        "limit": limit,
        "cautions": cautions,
        "lm_eval": lm_eval.__version__,
    }


def summary(name, out):
    """One task's entry of the results, from what lm_eval.evaluate returns:

    metric, value, stderr  the metric of Table 3, the accuracy by it, its standard error
    acc, acc_stderr, ...   all that lm_eval computed
    items                  how many
    right                  a text with a 1 or 0 for each item, in order: was it right by `metric`
    asked                  sha256 of all prompts and options: equal if two models were asked the
                           same
    """
    metric = TASKS[name].metric
    computed = {}  # lm_eval's keys are "acc,none", "acc_stderr,none", ...
    for key, value in out["results"][name].items():
        if key.startswith("acc"):
            computed[key.split(",")[0]] = value
    samples = sorted(out["samples"][name], key=lambda sample: sample["doc_id"])
    asked = [sample["arguments"] for sample in samples]
    return {
        "metric": metric,
        "value": computed[metric],
        "stderr": computed[f"{metric}_stderr"],
        **computed,
        "items": len(samples),
        "right": "".join(str(int(sample[metric])) for sample in samples),
        "asked": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
    }


def average(values, errors):
    """(mean of the values, its standard error), where the values' errors are independent."""
    return sum(values) / len(values), math.hypot(*errors) / len(values)


def table(results, variant, parameters):
    """The lines of Table 3's columns: this checkpoint, the paper's row of its variant, their
    difference, our error, in %."""
    tasks = results["tasks"]
    columns = [TASKS[name].column for name in tasks]
    ours = [100 * task["value"] for task in tasks.values()]
    errors = [100 * task["stderr"] for task in tasks.values()]
    cells = dict(zip(TASKS, TASK_ACCURACY.get(variant, ())))
    theirs = [cells[name] for name in tasks if name in cells]
    if len(tasks) == len(TASKS):
        columns.append("average")
        mean, error = average(ours, errors)
        ours.append(mean)
        errors.append(error)
        if theirs:
            theirs.append(sum(theirs) / len(theirs))
    yield f"{'accuracy, %':24s}" + "".join(f"{column:>12s}" for column in columns)
    yield line(variant, ours)
    if theirs:
        yield line("paper", theirs)
        yield line("difference", [a - b for a, b in zip(ours, theirs)], "+")
    yield line("standard error of ours", errors)
    if theirs:
        yield from notes(results, variant, parameters, theirs)
    yield from results["cautions"]


def line(name, numbers, sign=""):
    """A row of the table."""
    return f"{name[:23]:24s}" + "".join(f"{number:{sign}12.2f}" for number in numbers)


def notes(results, variant, parameters, theirs):
    """What a reader of the table must know of the paper's row."""
    millions, _, printed = TABLE_3[variant]
    yield (
        f"(the paper's row: {millions} M parameters, 10 billion tokens, 5-shot; this checkpoint: "
        f"{parameters / 1e6:.4g} M parameters, {results['shots']}-shot)"
    )
    if len(theirs) > len(TASKS) and abs(theirs[-1] - printed) > 0.01:
        yield (
            f"(the paper prints {printed:.2f} as the average; its six cells have the mean that "
            "stands here)"
        )


# ---- 4 command line --------------------------------------------------------------------------


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--ckpt", required=True, help=CHECKPOINT_HELP)
    add("--tasks", default=",".join(TASKS), help="which, separated by commas (default: all six)")
    add("--shots", type=int, default=5, help="solved examples before each item (default: 5)")
    add("--limit", type=int, help="score the first LIMIT items of each task only: a trial")
    add("--data", default="", help="folder of the official files; default: lm_eval downloads them")
    add("--out", help="write the results to this JSON file")
    add("--batch_size", type=int, default=16, help="rows that run together; fewer need less memory")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
    add("--dtype", choices=DTYPES, default="float32", help="precision of the layers")
    args = parser.parse_args()
    args.tasks = args.tasks.split(",")
    for name in args.tasks:
        if name not in TASKS:
            parser.error(f"--tasks: unknown {name!r}; there are {', '.join(TASKS)}")
    if not 0 <= args.shots <= 1000 or args.batch_size < 1:
        parser.error("--shots must be from 0 to 1000, --batch_size at least 1")
    if args.limit is not None and not 2 <= args.limit <= 1_000_000:
        parser.error("--limit must be from 2, for a standard error, to 1000000")
    return args


def main():
    """Score a checkpoint, print the table, write --out."""
    args = parse_arguments()
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("needs lm_eval: pip install lm_eval==0.4.13")
    check_writable(args.out)
    device = choose_device(args.device, among=("cuda", "cpu"))
    path = checkpoint_file(args.ckpt)
    model = load_for_scoring(path, device)
    dtype = DTYPES[args.dtype]
    results = evaluate(model, args.tasks, args.shots, args.limit, args.data, args.batch_size, dtype)
    variant = variant_name(model.config)
    parameters = count_parameters(model)
    print("\n".join(table(results, variant, parameters)))
    if args.out:
        record = {"ckpt": path, "variant": variant, "parameters": parameters, **results}
        with atomic_write(args.out) as file:
            file.write(json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    command_line(main, InputError, memory="halve --batch_size")
