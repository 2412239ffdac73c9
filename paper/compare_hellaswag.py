"""
Is one model better at HellaSwag than another, or was it luck? Compares two files written by eval_hellaswag.py --out.

    python paper/compare_hellaswag.py base.jsonl exo.jsonl

For each metric: both accuracies, their difference with a 95 % interval over the items, how many items only one of the
two models got right, and McNemar's exact p-value: how often a fair coin, thrown once for each of these items, splits
them at least as unevenly.
"""
import argparse
import math
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from eval_hellaswag import METRICS, read_bytes
from model import InputError
from prepare_fineweb import UserError, command_line, json_lines


def read_results(path):
    """{index of an item: {"label", metric: the predicted ending}} from a file written with --out."""
    records = dict(json_lines(read_bytes(path).split(b"\n"), path, "a line of eval_hellaswag.py --out",
                              lambda row: (row["index"], {key: row[key] for key in ("label", *METRICS)})))
    if not records:
        raise UserError(f"{path}: no items in it")
    return records


def mcnemar(only_a, only_b):
    """Exact two-sided p-value of McNemar's test for the numbers of items that A alone and B alone got right."""
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2 ** n)


def paired(right_a, right_b):
    """Compare two lists of 0 and 1 on the same items: the mean of b - a, its 95 % interval, and who alone was right."""
    n, differences = len(right_a), [b - a for a, b in zip(right_a, right_b)]
    mean = sum(differences) / n
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / max(1, n - 1) / n)
    only_a, only_b = differences.count(-1), differences.count(1)
    return {"difference": mean, "low": mean - 1.96 * error, "high": mean + 1.96 * error,
            "only_a": only_a, "only_b": only_b, "p": mcnemar(only_a, only_b)}


def main():
    """Print the comparison of two files."""
    parser = argparse.ArgumentParser(description="Compare two files written with eval_hellaswag.py --out.")
    parser.add_argument("a", metavar="A.jsonl", help="results of one model")
    parser.add_argument("b", metavar="B.jsonl", help="results of the other")
    args = parser.parse_args()
    a, b = read_results(args.a), read_results(args.b)
    if {i: r["label"] for i, r in a.items()} != {i: r["label"] for i, r in b.items()}:
        raise UserError(f"{args.a} ({len(a)} items) and {args.b} ({len(b)} items) do not hold the same items")
    print(f"A = {args.a}\nB = {args.b}\n{len(a)} items")
    for metric in METRICS:
        right_a, right_b = ([int(r[i][metric] == r[i]["label"]) for i in sorted(a)] for r in (a, b))
        c = paired(right_a, right_b)
        print(f"{metric:16} A {sum(right_a) / len(a):6.2%}  B {sum(right_b) / len(a):6.2%}  "
              f"B - A {100 * c['difference']:+.2f} points, 95 % interval [{100 * c['low']:+.2f}, "
              f"{100 * c['high']:+.2f}]; right alone: A {c['only_a']}, B {c['only_b']}; McNemar exact p = {c['p']:.3g}")


if __name__ == "__main__":
    command_line(main, InputError)
