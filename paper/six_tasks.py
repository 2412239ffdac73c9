"""
The six tasks of Table 3 for a checkpoint: ARC-c, ARC-e, HellaSwag, OpenBookQA, PIQA and WinoGrande, 5-shot.

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
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Callable

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from eval_hellaswag import HEAD_ROWS, URL, Progress, parse_rows, read_bytes, token_log_probs
from model import TABLE_3, choose_device, count_parameters, generate, load_checkpoint, variant_name
from prepare_fineweb import UserError, atomic_write, get_tokenizer

FEWSHOT_SEED = 1234  # lm_eval's default; the examples in front of each item follow from it

# -------------------------------------------------------------------------------------------------------------- 1 items


def read_rows(path, convert):
    """[convert(row)] of a .jsonl file. UserError names the first line that cannot be used."""
    rows = []
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        try:
            rows.append(convert(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise UserError(f"{path}, line {number}: not an item of this task ({why})") from None
    if not rows:
        raise UserError(f"{path}: no items in it")
    return rows


def choices_of(row):
    """Options and key of an AI2 question: three to five options, labelled A, B, ... or 1, 2, ..."""
    options = row["question"]["choices"]
    columns = {column: [option[column] for option in options] for column in ("text", "label")}
    if row["answerKey"] not in columns["label"]:
        raise ValueError(f"answerKey {row['answerKey']!r} is none of {columns['label']}")
    return {"choices": columns, "answerKey": row["answerKey"]}


def read_arc(path):
    return read_rows(path, lambda row: {"question": row["question"]["stem"], **choices_of(row)})


def read_openbookqa(path):
    return read_rows(path, lambda row: {"question_stem": row["question"]["stem"], **choices_of(row)})


def read_winogrande(path):
    return read_rows(path, lambda row: {name: row[name] for name in ("sentence", "option1", "option2", "answer")})


def read_piqa(path):
    """PIQA keeps its labels in a second file, line by line."""
    rows = read_rows(path, lambda row: {name: row[name] for name in ("goal", "sol1", "sol2")})
    labels_path = path.removesuffix(".gz").removesuffix(".jsonl") + "-labels.lst"
    labels_path = local_path("", labels_path) or labels_path
    labels = read_bytes(labels_path).decode().split()
    if len(labels) != len(rows) or not set(labels) <= {"0", "1"}:
        raise UserError(f"{labels_path}: must hold a 0 or 1 for each of the {len(rows)} lines of {path}")
    return [{**row, "label": int(label)} for row, label in zip(rows, labels)]


def read_hellaswag(path):
    fields = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    return [{name: row[name] for name in fields} for row in parse_rows(read_bytes(path), path)]


@dataclass(frozen=True)
class Task:
    """A column of Table 3. `train` and `test` are files under --data, `split` is what lm_eval calls the second."""

    column: str
    metric: str
    read: Callable
    train: str
    test: str
    split: str


TASKS = {
    "arc_challenge": Task("ARC-c", "acc_norm", read_arc, "arc/ARC-Challenge-Train.jsonl",
                          "arc/ARC-Challenge-Test.jsonl", "test"),
    "arc_easy": Task("ARC-e", "acc_norm", read_arc, "arc/ARC-Easy-Train.jsonl", "arc/ARC-Easy-Test.jsonl", "test"),
    "hellaswag": Task("HellaSwag", "acc_norm", read_hellaswag, "hellaswag/hellaswag_train.jsonl",
                      "hellaswag/hellaswag_val.jsonl", "validation"),
    "openbookqa": Task("OBQA", "acc_norm", read_openbookqa, "openbookqa/train.jsonl", "openbookqa/test.jsonl", "test"),
    "piqa": Task("PIQA", "acc_norm", read_piqa, "piqa/train.jsonl", "piqa/valid.jsonl", "validation"),
    "winogrande": Task("WinoGrande", "acc", read_winogrande, "winogrande/train_xl.jsonl", "winogrande/dev.jsonl",
                       "validation"),
}


def local_path(folder, name):
    """folder/name or folder/name.gz, whichever there is, or None."""
    paths = [os.path.join(folder, name + ending) for ending in ("", ".gz")]
    return next((path for path in paths if os.path.exists(path)), None)


def local_rows(name, folder, shots, limit):
    """({split: rows} of one task from files, a caution or ""). UserError where a file is missing.

    A --limit run is a trial, so where it lacks training items it may draw its examples from the items themselves.
    """
    task = TASKS[name]
    test, train = local_path(folder, task.test), local_path(folder, task.train)
    if not test:
        raise UserError(f"--data={folder}: no {task.test}(.gz) there; --help says which files are needed, and without "
                         "--data lm_eval downloads them")
    if not train and shots and not limit:
        hint = f" ({URL.format('train')})" if name == "hellaswag" else ""
        raise UserError(f"--data={folder}: no {task.train}(.gz) there, from which the {shots} examples are drawn"
                         f"{hint}; get it, take --shots=0, leave out {name} with --tasks, or make a trial with --limit")
    rows = task.read(test)
    caution = f"{name}: no {task.train}, so examples are drawn from {task.test}: a trial, NOT the paper's 5-shot number"
    return {task.split: rows, "train": task.read(train) if train else rows}, "" if train or not shots else caution


def load_tasks(names, folder, shots, limit):
    """(lm_eval's task objects, cautions): its own definitions, on its own downloads or on the files of `folder`."""
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    root = os.path.dirname(lm_eval.tasks.__file__)
    paths = [os.path.join(root, sub) for sub in ("arc", "hellaswag", "openbookqa", "piqa", "winogrande")]
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=paths)
    if not folder:
        try:
            return list(manager.load(list(names))["tasks"].values()), []
        except OSError as error:                           # all of requests' and datasets' connection errors are
            why = str(error).split("\n")[0]
            raise UserError(f"lm_eval cannot download the items ({why}); give their files with --data=DIR") from None
    tasks, cautions = [], []
    for name in names:
        splits, caution = local_rows(name, folder, shots, limit)
        definition = load_yaml(manager.task_index[name].yaml_path)
        tasks.append(ConfigurableTask(config={**definition, "custom_dataset": as_dataset(splits)}))
        cautions += [caution] * bool(caution)
    return tasks, cautions


def as_dataset(splits):
    """{split: rows} as the function from which lm_eval takes a task's data."""
    import datasets

    return lambda **_: datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})


# -------------------------------------------------------------------------------------------------------------- 2 model


def score_batch(model, rows, device, dtype):
    """What score_rows returns, for rows that run as one batch, padded on the right: no scored token can see that."""
    inputs = [(context + continuation)[-(model.config.block_size + 1) :][:-1] for context, continuation in rows]
    idx = torch.zeros(len(rows), max(1, *map(len, inputs)), dtype=torch.long)
    for row, tokens in enumerate(inputs):
        idx[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        hidden = model.trunk(idx.to(device))
    lengths = [len(continuation) for _, continuation in rows]
    picked = torch.cat(
        [hidden[row, len(tokens) - n : len(tokens)] for row, (tokens, n) in enumerate(zip(inputs, lengths))]
    )
    picked = picked.to(model.head.weight.dtype)
    targets = torch.tensor([token for _, continuation in rows for token in continuation], dtype=torch.long,
                           device=device)
    likeliest = torch.cat([model.logits(part).argmax(-1) for part in picked.split(HEAD_ROWS)])
    log_probs = token_log_probs(model, picked, targets).cpu().double()
    greedy = (likeliest == targets).cpu()
    return [(p.sum().item(), g.all().item()) for p, g in zip(log_probs.split(lengths), greedy.split(lengths))]


@torch.no_grad()
def score_rows(model, rows, batch_size=16, dtype=torch.float32, progress=None):
    """[(log p(continuation | context), whether each of its tokens is the likeliest)] for (context, continuation) ids.

    Rows of similar length run together, the longest first, so that a batch too large for the memory fails at once. A
    row longer than block_size loses tokens on its left. Log-probabilities are float32 per token, summed in float64.
    """
    device, block_size = next(model.parameters()).device, model.config.block_size
    too_long = max((len(continuation) for _, continuation in rows), default=0)
    if too_long > block_size:
        raise UserError(f"a continuation of {too_long} tokens does not fit into block_size={block_size}")
    lengths = [min(block_size, len(context) + len(continuation) - 1) for context, continuation in rows]
    order, scores, done = sorted(range(len(rows)), key=lambda i: -lengths[i]), {}, 0
    for first in range(0, len(rows), batch_size):
        batch = order[first : first + batch_size]
        scores.update(zip(batch, score_batch(model, [rows[i] for i in batch], device, dtype)))
        done += sum(lengths[i] for i in batch)
        if progress:
            progress(len(scores), len(rows), done, sum(lengths))
    if not all(math.isfinite(score) for score, _ in scores.values()):
        raise UserError("the model gives log-probabilities that are not finite; its weights are damaged")
    return [scores[i] for i in range(len(rows))]


def cut_at(text, stops):
    """`text` up to the first of the strings `stops` in it."""
    return text[: min([text.index(stop) for stop in stops if stop in text], default=len(text))]


def generate_texts(model, tokenizer, requests, batch_size=16):
    """Texts that continue [(context, lm_eval's generation settings)]; prompts of equal length run together."""
    groups, texts = defaultdict(list), {}
    for i, (context, settings) in enumerate(requests):
        new, room = settings.get("max_gen_toks", 256), model.config.block_size - settings.get("max_gen_toks", 256)
        if room < 1:
            raise UserError(f"max_gen_toks={new} leaves no room for a prompt in block_size={model.config.block_size}")
        temperature = settings.get("temperature", 1.0) if settings.get("do_sample", False) else 0
        prompt = (tokenizer.encode(context) or [tokenizer.eot])[-room:]
        groups[len(prompt), new, temperature].append((i, prompt))
    for (length, new, temperature), members in sorted(groups.items(), reverse=True):
        for first in range(0, len(members), batch_size):
            batch = members[first : first + batch_size]
            idx = torch.tensor([prompt for _, prompt in batch], device=model.head.weight.device)
            out = generate(model, idx, new, temperature, stop_token=tokenizer.eot)[:, length:].tolist()
            texts.update(
                (i, tokenizer.decode([t for t in row if t != tokenizer.eot])) for (i, _), row in zip(batch, out)
            )
    stops = [settings.get("until") or [] for _, settings in requests]
    return [cut_at(texts[i], [s] if isinstance(s, str) else s) for i, s in enumerate(stops)]


def adapter(model, batch_size=16, dtype=torch.float32):
    """An lm_eval model around an ExoFormer; lm_eval's TemplateLM turns texts into (context, continuation) ids."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokens = get_tokenizer(model.config.tokenizer)
    cut_up = partial(get_rolling_token_windows, max_seq_len=model.config.block_size, context_len=1)

    class ExoFormerLM(TemplateLM):
        eot_token_id, cut = tokens.eot, 0  # cut: rows that lost tokens on the left

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return tokens.encode(string)

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
            rows = [(context, continuation) for _, context, continuation in requests]
            self.cut += sum(len(before) + len(scored) - 1 > model.config.block_size for before, scored in rows)
            return score_rows(model, rows, batch_size, dtype, Progress())

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            texts = [self.tok_encode(request.args[0]) for request in requests]
            windows = [list(map(make_disjoint_window, cut_up(text, self.prefix_token_id))) for text in texts]
            scores = iter(score_rows(model, [window for some in windows for window in some], batch_size, dtype))
            return [sum(next(scores)[0] for _ in some) for some in windows]

        def generate_until(self, requests, disable_tqdm=False):
            return generate_texts(model, tokens, [request.args for request in requests], batch_size)

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
    tasks, cautions = load_tasks(names, data, shots, limit)
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
    results = {name: summary(TASKS[name].metric, out["results"][name], out["n-samples"][name]["effective"])
               for name in names}
    return {"tasks": results, "shots": shots, "limit": limit, "cautions": cautions, "lm_eval": lm_eval.__version__}


def summary(metric, measured, items):
    """One task's entry of the results, from lm_eval's {"acc,none": ..., "acc_stderr,none": ...}."""
    plain = {key.split(",")[0]: value
             for key, value in measured.items()
             if key.startswith("acc") and isinstance(value, float)}
    return {"metric": metric, "value": plain[metric], "stderr": plain[f"{metric}_stderr"], "items": items, **plain}


def average(tasks):
    """(mean, standard error) over the tasks of results["tasks"]; their errors are independent."""
    n = len(tasks)
    return sum(t["value"] for t in tasks.values()) / n, math.sqrt(sum(t["stderr"] ** 2 for t in tasks.values())) / n


def table(results, variant, parameters):
    """The lines of Table 3's columns: this checkpoint, its standard errors, and the paper's average for the variant."""
    names = list(results["tasks"])
    cells = [(TASKS[name].column, results["tasks"][name]["value"], results["tasks"][name]["stderr"]) for name in names]
    if len(names) == len(TASKS):
        cells.append(("average", *average(results["tasks"])))
    yield f"{'accuracy, %':24s}" + "".join(f"{column:>12s}" for column, _, _ in cells)
    yield f"{variant[:23]:24s}" + "".join(f"{100 * value:12.2f}" for _, value, _ in cells)
    yield f"{'  standard error':24s}" + "".join(f"{100 * error:12.2f}" for _, _, error in cells)
    if variant in TABLE_3 and len(names) == len(TASKS):
        millions, _, paper = TABLE_3[variant]
        yield f"{'paper':24s}" + f"{'-':>12s}" * len(names) + f"{paper:12.2f}"
        yield (f"(the paper's row: {millions} M parameters, 10 billion tokens, 5-shot; this checkpoint: "
               f"{parameters / 1e6:.4g} M parameters, {results['shots']}-shot)")
    yield from results["cautions"]


def parse_arguments(argv):
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
    args = parser.parse_args(argv)
    args.tasks = args.tasks.split(",")
    unknown = [name for name in args.tasks if name not in TASKS]
    if unknown:
        parser.error(f"--tasks: unknown {unknown[0]!r}; there are {', '.join(TASKS)}")
    if args.shots < 0 or args.batch_size < 1 or (args.limit is not None and args.limit < 2):
        parser.error("--shots must not be negative, --batch_size at least 1, --limit at least 2 (for a standard error)")
    return args


def run(args):
    """Score a checkpoint, print the table, write --out."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("needs lm_eval: pip install -r paper/requirements.txt")
    if args.out and not os.access(os.path.dirname(args.out) or ".", os.W_OK):
        raise UserError(f"--out={args.out}: its folder does not exist or cannot be written")  # not after the work
    model = load_checkpoint(args.ckpt, choose_device(args.device, among=("cuda", "cpu"))).eval()
    needed = get_tokenizer(model.config.tokenizer).n_vocab
    if model.config.vocab_size < needed:
        raise UserError(
            f"{args.ckpt}: knows {model.config.vocab_size} token ids, but its tokenizer, {model.config.tokenizer}, "
            f"has {needed}"
        )
    results = evaluate(model, args.tasks, args.shots, args.limit, args.data, args.batch_size,
                       getattr(torch, args.dtype))
    variant, parameters = variant_name(model.config), count_parameters(model)
    print("\n".join(table(results, variant, parameters)))
    if args.out:
        with atomic_write(args.out) as file:
            record = {"ckpt": args.ckpt, "variant": variant, "parameters": parameters, **results}
            file.write(json.dumps(record, indent=1).encode())


def main(argv=None):
    args = parse_arguments(argv)
    try:
        run(args)
    except torch.OutOfMemoryError:
        sys.exit(f"six_tasks.py: the GPU's memory is full; halve --batch_size={args.batch_size}")
    except UserError as error:
        sys.exit(f"six_tasks.py: {error}")


if __name__ == "__main__":
    main()
