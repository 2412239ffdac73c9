"""
Is one model better than another, or was it luck? Compares what two models made of the same items.

    python paper/compare_hellaswag.py base.jsonl exo.jsonl    two files of eval_hellaswag.py --out
    python paper/compare_hellaswag.py base.json exo.json      two files of six_tasks.py --out

Prints a line for each metric of HellaSwag or for each task: both accuracies, the difference B - A
in points, its standard error and 95 % interval (the differences are paired item by item), how many
items only A and only B got right, and McNemar's exact p-value: how often a fair coin, thrown once
for each of these items, splits them at least as unevenly. Files of six_tasks.py get one line more:
the difference of the average over the tasks, all of which count alike, as the paper averages them.
Its error is that of the mean of the tasks' independent differences.

The errors are those of drawing other items. What another seed of training would give is not in
them. Two files that were asked alike but for the examples (--train) or the items' text (--data) of
eval_hellaswag.py are not told apart.
"""

import argparse
import json
import math
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from eval_hellaswag import METRICS, read_bytes
from model import InputError
from prepare_fineweb import UserError, command_line, json_lines
from six_tasks import TASKS, average

ASKED = ("label", "style", "shots")  # what is the same of an item where two models were asked alike


def read_results(path):
    """{name of a line: (right, items)} from a file written with --out. `right`: 0 or 1 for each
    item; `items`: equal to the other file's where both models were asked the same."""
    content = read_bytes(path)
    try:
        whole = json.loads(content)
    except ValueError:
        whole = None  # several lines of JSON
    if isinstance(whole, dict) and "tasks" in whole:
        return read_six_tasks(whole, path)
    return read_hellaswag(content, path)


def read_six_tasks(results, path):
    """As read_results, of six_tasks.py: a line for each task."""
    try:
        found = {
            TASKS[name].column: ([int(digit) for digit in task["right"]], task["asked"])
            for name, task in results["tasks"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: not a file of six_tasks.py --out, or of an earlier version "
            f"({type(error).__name__}: {error}); run it again"
        ) from None
    if not found or not all(right for right, _ in found.values()):
        raise UserError(f"{path}: no items in it")
    return found


def read_hellaswag(content, path):
    """As read_results, of eval_hellaswag.py: a line for each metric."""

    def convert(row):
        return row["index"], {key: row[key] for key in (*ASKED, *METRICS)}

    kind = "a line of this version's eval_hellaswag.py --out; score the model again"
    records = dict(json_lines(content.split(b"\n"), path, kind, convert))
    if not records:
        raise UserError(f"{path}: no items in it")
    indices = sorted(records)
    asked = {index: [records[index][key] for key in ASKED] for index in indices}
    found = {}
    for metric in METRICS:
        right = [int(records[index][metric] == records[index]["label"]) for index in indices]
        found[metric] = right, asked
    return found


def mcnemar(only_a, only_b):
    """Exact two-sided p-value of McNemar's test: items that A alone and B alone got right."""
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def paired(right_a, right_b):
    """Two lists of 0 and 1 on the same items: both means, the difference b - a and its standard
    error, and on how many items one alone is right."""
    differences = [b - a for a, b in zip(right_a, right_b, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / max(1, n - 1)
    return {
        "items": n,
        "a": sum(right_a) / n,
        "b": sum(right_b) / n,
        "difference": mean,
        "error": math.sqrt(variance / n),
        "only_a": differences.count(-1),
        "only_b": differences.count(1),
    }


def table(a, b):
    """The lines to print for two results of `read_results`."""
    yield (
        f"{'':19}{'items':>6}{'A':>8}{'B':>8}{'B - A':>8}{'error':>7}{'95 % interval':>20}"
        f"{'only A':>7}{'only B':>7}{'McNemar p':>10}"
    )
    rows = {name: paired(a[name][0], b[name][0]) for name in a}
    for name, row in rows.items():
        p = mcnemar(row["only_a"], row["only_b"])
        tail = f"{row['only_a']:7}{row['only_b']:7}{p:10.3g}"
        yield head(name, row["items"], row) + tail
    if METRICS.keys() != rows.keys():  # tasks; several metrics of one task have no average
        yield head(f"average of {len(rows)} tasks", "", averaged(list(rows.values())))


def averaged(rows):
    """The averages of several tasks' rows of `paired`."""
    mean = {}
    for column in ("a", "b"):
        mean[column] = sum(row[column] for row in rows) / len(rows)
    differences = [row["difference"] for row in rows]
    errors = [row["error"] for row in rows]
    mean["difference"], mean["error"] = average(differences, errors)
    return mean


def head(name, items, row):
    """What the lines of the tasks and of their average have in common; differences in points."""
    difference = 100 * row["difference"]
    error = 100 * row["error"]
    interval = f"{difference - 1.96 * error:+.2f} to {difference + 1.96 * error:+.2f}"
    return (
        f"{name:19}{items:>6}{row['a']:8.2%}{row['b']:8.2%}{difference:+8.2f}{error:7.2f}"
        f"{interval:>20}"
    )


def main():
    """Print the comparison of two files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", metavar="A", help="results of one model")
    parser.add_argument("b", metavar="B", help="results of the other")
    args = parser.parse_args()
    a = read_results(args.a)
    b = read_results(args.b)
    for name in [*a, *b]:
        if name not in a or name not in b or a[name][1] != b[name][1]:
            raise UserError(
                f"{args.a} and {args.b} do not hold the same items of {name}, asked alike; score "
                "both models with the same flags"
            )
    print(f"A = {args.a}\nB = {args.b}")
    print("\n".join(table(a, b)))


if __name__ == "__main__":
    command_line(main, InputError)
