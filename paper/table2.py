"""
Table 2, the numbers of Section 4.4 and of the appendix, for checkpoints of ours or released ones.

    python paper/table2.py --ckpt=out/paper-base --ckpt=out/paper-exo --data=DIR
    python paper/table2.py --ckpt=out/paper-exo --data=DIR --ablate_anchor      the anchor removed
    python paper/figures.py out/analysis/*.json                                 the pictures
    python paper/table2.py --ckpt=summary.jsonl                        what --summary kept, again

Writes one JSON for each checkpoint, which holds every quantity layer by layer (paper/analysis.py
says how they are defined), and prints the numbers that the paper states beside the paper's. With
--summary all of them go into one small file too, without what is large: the maps of tokens, the
lambdas, the gammas, and the anchor's share of each channel.
"""

import argparse
import json
import math
import os
import sys
import textwrap

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from analysis import (
    analyse,
    anchor_share,
    band_correlation,
    between_heads,
    near_zero,
    ratio,
    stage_3,
    validation_windows,
)
from compare import write_lines
from figures import read_records
from model import InputError, choose_device, load_checkpoint, newest_checkpoint
from prepare_fineweb import UserError, atomic_write, check_writable, command_line

ROWS = 4  # validation rows that are analysed: as many as in the paper's released analysis
ABLATED = "anchor removed"

# as printed for the paper's 450M models (C 1024, 10B tokens); ABLATED: an ExoFormer without anchor
PAPER = {
    "base": {
        "sink": "0.2572",
        "similarity": "0.5365",
        "pca": "838.9",
        "last_pca": "835",
        "stage_3": "1/3",
    },
    "gated": {
        "sink": "0.0091",
        "similarity": "0.6328",
        "pca": "880.0",
        "first_gate": "0.2",
    },
    "resformer": {
        "sink": "0.0212",
        "similarity": "0.6558",
        "pca": "853.8",
    },
    "nuresformer": {
        "sink": "0.0112",
        "similarity": "0.5783",
        "pca": "887.9",
        "first_gate": "0.4-0.5",
    },
    "exo": {
        "sink": "0.0041",
        "similarity": "0.8265",
        "pca": "818.3",
        "peak": "0.95",
        "last_pca": "738",
        "stage_3": "2/3",
        "first_gate": "between",
    },
    "exo_dynamic": {
        "sink": "0.0073",
        "similarity": "0.8622",
        "pca": "752.1",
        "peak": "0.93",
        "last_pca": "716",
        "stage_3": "2/3",
    },
    ABLATED: {
        "peak": "0.93",
        "least_pca": "321",
    },
}


# ---- the tables ----------------------------------------------------------------------------------


def number(value, digits=3):
    """A cell; "-" for what is not there or not finite."""
    return f"{value:.{digits}f}" if value is not None and math.isfinite(value) else "-"


def paper(record, key):
    """The paper's number for the record's model, as it prints it; "-" where it prints none."""
    name = record["variant"]
    if record["ablate_anchor"]:
        name = ABLATED if record["model_config"]["anchor"] == "exogenous" else ""
    return PAPER.get(name, {}).get(key, "-")


def print_table(title, headings, rows):
    """Rows of strings under their headings: the first column to the left, others to the right."""
    widths = [max(map(len, column)) for column in zip(headings, *rows)]
    print(f"\n{title}")
    for first, *others in (headings, *rows):
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        print("  ".join(cells))


def print_table_2(records):
    """The layer averages of Table 2."""
    headings = ["label", "variant", "loss", "sink", "paper"]
    headings += ["similarity", "paper", "PCA", "of C", "paper"]
    rows = []
    for record in records:
        averages = record["averages"]
        rows.append(
            [
                record["label"],
                record["variant"],
                number(record["cross_entropy"]),
                number(averages["attention_sink"], 4),
                paper(record, "sink"),
                number(averages["token_similarity"], 4),
                paper(record, "similarity"),
                number(averages["pca_core_features"], 1),
                str(record["model_config"]["n_embd"]),
                paper(record, "pca"),
            ]
        )
    print_table("Table 2, averages over layers. paper: its 450M models, C 1024", headings, rows)


def print_stages(records):
    """Section 4.4: where tokens are alike, and how many dimensions they fill."""
    headings = ["label", "peak", "paper", "at layer", "stage 3 from", "share", "paper"]
    headings += ["last PCA", "paper", "least PCA", "paper"]
    rows = []
    for record in records:
        similarity = record["by_layer"]["token_similarity"]
        pca = record["by_layer"]["pca_core_features"]
        peak = max(similarity)
        start = stage_3(similarity)
        layers = record["model_config"]["n_layer"]
        rows.append(
            [
                record["label"],
                number(peak),
                paper(record, "peak"),
                str(similarity.index(peak)),
                "-" if start is None else str(start),
                "-" if start is None else number((layers + 1 - start) / layers, 2),
                paper(record, "stage_3"),
                str(pca[-1]),
                paper(record, "last_pca"),
                str(min(pca)),
                paper(record, "least_pca"),
            ]
        )
    title = (
        "Section 4.4: token similarity (layer 0: embedding), share of layers in stage 3, "
        "PCA core features"
    )
    print_table(title, headings, rows)


def print_embedding_similarity(records):
    """Figure 2f: a token's hidden states against its embedding."""
    print("\nSimilarity to the embedding, layer 1 to the last")
    print("(paper: exo starts low and falls to about 0 or below)")
    for record in records:
        embedding = record["hidden_similarity"][0]
        numbers = " ".join(f"{x:6.3f}" for x in embedding[1:])
        print(record["label"])
        print(textwrap.fill(numbers, 100, initial_indent="    ", subsequent_indent="    "))


def print_gates(records):
    """Appendix D, and the entropy of attention."""
    headings = ["label", "entropy", "mean gate", "gates < 0.2", "first layer's", "paper"]
    rows = []
    for record in records:
        averages = record["averages"]
        gates = record["by_layer"].get("gate_mean", [None])
        rows.append(
            [
                record["label"],
                number(averages["attention_entropy"]),
                number(averages.get("gate_mean")),
                number(averages.get("gate_sparsity")),
                number(gates[0]),
                paper(record, "first_gate"),
            ]
        )
    title = (
        "Attention entropy in nats and gates, averages over layers; "
        "the first layer's gate (Appendix D)"
    )
    print_table(title, headings, rows)


def print_mixing(records):
    """Sections 4.2 and 4.4, Figures 3 and 4: the lambdas, for each letter and over all."""
    headings = ["label", "letter", "median", "mean", "anchor's share", "|lambda1| < 0.001"]
    headings += ["between heads", "q with k"]
    rows = []
    for record in records:
        if record["lambdas"] and not record["ablate_anchor"]:  # else the lambdas say nothing
            rows += [mixing_of(record, s) for s in record["lambdas"]]
            every = number(near_zero(record["lambdas"].values()))
            rows.append([record["label"], "all", "", "", "", every, "", ""])
    if rows:
        title = (
            "Lambdas, averages over layers; median and mean: of lambda1 / lambda2 over channels\n"
            "(Figure 4 as the released analysis draws it: the mean).\n"
            "Paper, Figure 3: v's ratio hardly varies within a head (between heads: near 1),\n"
            "those of q, k and g do, q's like k's"
        )
        print_table(title, headings, rows)


def mixing_of(record, s):
    """The cells of one letter in `print_mixing`."""
    table = record["lambdas"][s]
    heads = None
    bands = None
    if record["model_config"]["granularity"] == "elementwise":
        heads = between_heads(table)
        if s == "q" and "k" in record["lambdas"]:
            bands = band_correlation(table, record["lambdas"]["k"])
    return [
        record["label"],
        s,
        number(float(np.median(ratio(table), axis=(1, 2)).mean())),
        number(float(ratio(table).mean())),
        number(anchor_share(record["anchor_use"][s])[0].mean()),
        number(near_zero([table])),
        number(heads),
        number(bands),
    ]


def print_near_zero_ratio(records):
    """Section 4.2: the share of lambda1 near zero without norms on the anchors and with them."""
    for plain in records:
        for normed in records:
            unlike = plain["model_config"] != normed["model_config"]
            without_norms = {**normed["model_config"], "anchor_norm": ""}
            both = plain["lambdas"] and normed["lambdas"]  # a kept record has none
            if both and unlike and plain["model_config"] == without_norms:
                share = near_zero(plain["lambdas"].values())
                other = near_zero(normed["lambdas"].values())
                times = number(share / other if other else None, 2)
                print(
                    f"\n|lambda1| < 0.001: {plain['label']} {share:.4f} against "
                    f"{normed['label']} {other:.4f}, {times} times (paper: about 3)"
                )


# ---- command -------------------------------------------------------------------------------------


def label_of(path, ablate_anchor):
    """The run folder and file: out/tiny-exo/ckpt_000300.pt -> tiny-exo_ckpt_000300."""
    folder, name = os.path.split(os.path.abspath(path))
    stem = os.path.splitext(name)[0]
    label = f"{os.path.basename(folder)}_{stem}"
    return f"{label}_no_anchor" if ablate_anchor else label


def measure(args):
    """Analyse each checkpoint and write its record as OUT/LABEL.json; yields the records."""
    device = choose_device(args.device, among=("cuda", "cpu"))
    os.makedirs(args.out, exist_ok=True)
    for path in args.ckpt:
        if path.endswith(".jsonl"):
            yield from read_records(path)
            continue
        model = load_checkpoint(path, device)
        if args.ablate_anchor and model.config.anchor == "none":
            print(f"left out: {path} has no anchor that could be removed", flush=True)
            continue
        windows = validation_windows(args.data, model.config, args.rows, args.block_size)
        record = dict(
            label=label_of(path, args.ablate_anchor),
            checkpoint=path,
            data=args.data,
            **analyse(model, windows, args.ablate_anchor),
        )
        target = os.path.join(args.out, f"{record['label']}.json")
        with atomic_write(target) as file:
            file.write(json.dumps(record).encode())
        print(f"wrote {target}", flush=True)
        yield record


def parse_args():
    parser = argparse.ArgumentParser(
        description="Table 2, and all that the figures need.", allow_abbrev=False
    )
    parser.add_argument(
        "--ckpt",
        action="append",
        required=True,
        metavar="PATH",
        help="checkpoint, ours or a released one, or a run folder: its newest, or a file of "
        "--summary; repeat for more",
    )
    parser.add_argument(
        "--data", default="", metavar="DIR", help="folder of token shards (validation split)"
    )
    parser.add_argument(
        "--rows", type=int, default=ROWS, help=f"validation rows (default: the paper's {ROWS})"
    )
    parser.add_argument(
        "--block_size",
        type=int,
        default=0,
        metavar="T",
        help="tokens of a row (default: the model's, 2048 in the paper)",
    )
    parser.add_argument(
        "--ablate_anchor",
        action="store_true",
        help="remove the anchor at inference: it adds nothing to any projection",
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="where to compute (default: cuda if there is a GPU)",
    )
    parser.add_argument(
        "--out", default="out/analysis", metavar="DIR", help="JSON files (default: out/analysis)"
    )
    parser.add_argument(
        "--summary", default="", metavar="FILE", help="also keep the records here, a line each"
    )
    args = parser.parse_args()
    if not args.data and not all(path.endswith(".jsonl") for path in args.ckpt):
        parser.error("--data=DIR is needed to analyse a checkpoint")
    return args


def summary_of(record):
    """The record without what grows with tokens or channels: some 5 kB are left."""
    return {**record, "lambdas": {}, "gammas": {}, "anchor_use": {}, "token_maps": {}}


def main():
    args = parse_args()
    check_writable(args.summary)
    args.ckpt = [newest_checkpoint(path) if os.path.isdir(path) else path for path in args.ckpt]
    labels = [label_of(path, args.ablate_anchor) for path in args.ckpt]
    if len(set(labels)) < len(labels):
        raise UserError(
            "two checkpoints share folder and file name, so one JSON would replace the other: "
            "rename a folder"
        )
    records = list(measure(args))
    if not records:
        raise UserError("--ablate_anchor: none of the checkpoints has an anchor; drop the flag")
    if args.summary:
        write_lines([summary_of(record) for record in records], args.summary)
    print_table_2(records)
    print_stages(records)
    print_embedding_similarity(records)
    print_gates(records)
    print_mixing(records)
    print_near_zero_ratio(records)
    kept = [path for path in args.ckpt if path.endswith(".jsonl")]
    print(f"\nPictures: python paper/figures.py {' '.join(kept) or f'{args.out}/*.json'}")


if __name__ == "__main__":
    command_line(main, InputError)
