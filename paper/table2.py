"""
Table 2 and the numbers of Section 4.4 and the appendix, for checkpoints of your own or the released ones.

    python paper/table2.py --ckpt=out/paper-base/ckpt_038147.pt --ckpt=out/paper-exo/ckpt_038147.pt --data=DIR
    python paper/table2.py --ckpt=... --data=DIR --ablate_anchor        with the anchor removed at inference
    python paper/figures.py out/analysis/*.json                         the pictures

Writes one JSON for each checkpoint, which holds every quantity layer by layer (paper/analysis.py says how they are
defined), and prints the numbers that the paper states beside the paper's.
"""
import argparse
import json
import math
import os
import sys
import textwrap

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from analysis import (analyse, anchor_share, band_correlation, between_heads, near_zero, ratio, stage_3,
                      validation_windows)
from model import choose_device, InputError, load_checkpoint
from prepare_fineweb import UserError, atomic_write, command_line

ABLATED = "anchor removed"
PAPER = {  # as printed for its 450M models (C 1024, 10B tokens); ABLATED: an ExoFormer without its anchor
    "base": dict(sink="0.2572", similarity="0.5365", pca="838.9", last_pca="835", stage_3="1/3"),
    "gated": dict(sink="0.0091", similarity="0.6328", pca="880.0", first_gate="0.2"),
    "resformer": dict(sink="0.0212", similarity="0.6558", pca="853.8"),
    "nuresformer": dict(sink="0.0112", similarity="0.5783", pca="887.9", first_gate="0.4-0.5"),
    "exo": dict(sink="0.0041", similarity="0.8265", pca="818.3", peak="0.95", last_pca="738", stage_3="2/3",
                first_gate="between"),
    "exo_dynamic": dict(sink="0.0073", similarity="0.8622", pca="752.1", peak="0.93", last_pca="716"),
    ABLATED: dict(peak="0.93", least_pca="321"),
}


# ------------------------------------------------------------------------------------------------------------- printing

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
    """Rows of strings under their headings, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(headings, *rows)]
    print(f"\n{title}")
    for row in (headings, *rows):
        print("  ".join(cell.rjust(width) if i else cell.ljust(width)
                        for i, (cell, width) in enumerate(zip(row, widths))))


def print_table_2(records):
    """The layer averages of Table 2."""
    rows = [[r["label"], r["variant"], number(r["cross_entropy"]),
             number(r["averages"]["attention_sink"], 4), paper(r, "sink"),
             number(r["averages"]["token_similarity"], 4), paper(r, "similarity"),
             number(r["averages"]["pca_core_features"], 1), str(r["model_config"]["n_embd"]), paper(r, "pca")]
            for r in records]
    print_table("Table 2, averages over layers. paper: its 450M models, C 1024",
                ["label", "variant", "loss", "sink", "paper", "similarity", "paper", "PCA", "of C", "paper"], rows)


def print_stages(records):
    """Section 4.4: where tokens are alike, and how many dimensions they fill."""
    rows = []
    for r in records:
        similarity, pca = r["by_layer"]["token_similarity"], r["by_layer"]["pca_core_features"]
        start, layers = stage_3(similarity), r["model_config"]["n_layer"]
        stage = ("-", "-") if start is None else (str(start), number((layers + 1 - start) / layers, 2))
        rows.append([r["label"], number(max(similarity)), paper(r, "peak"), str(similarity.index(max(similarity))),
                     *stage, paper(r, "stage_3"), str(pca[-1]), paper(r, "last_pca"), str(min(pca)),
                     paper(r, "least_pca")])
    print_table("Section 4.4: token similarity (layer 0: embedding), share of layers in stage 3, PCA core features",
                ["label", "peak", "paper", "at layer", "stage 3 from", "share", "paper", "last PCA", "paper",
                 "least PCA", "paper"], rows)


def print_embedding_similarity(records):
    """Figure 2f: a token's hidden states against its embedding."""
    print("\nSimilarity to the embedding, layer 1 to the last (paper: exo starts low and falls to about 0 or below)")
    for r in records:
        print(r["label"])
        print(textwrap.fill(" ".join(f"{x:6.3f}" for x in r["hidden_similarity"][0][1:]), 110,
                            initial_indent="    ", subsequent_indent="    "))


def print_gates(records):
    """Appendix D, and the entropy of attention."""
    rows = []
    for r in records:
        averages, gates = r["averages"], r["by_layer"].get("gate_mean", [None])
        rows.append([r["label"], number(averages["attention_entropy"]), number(averages.get("gate_mean")),
                     number(averages.get("gate_sparsity")), number(gates[0]), paper(r, "first_gate")])
    print_table("Attention entropy in nats and gates, averages over layers; the first layer's gate (Appendix D)",
                ["label", "entropy", "mean gate", "gates < 0.2", "first layer's", "paper"], rows)


def print_mixing(records):
    """Section 4.2 and Figure 3: what became of the lambdas, for each letter and over all."""
    rows = []
    for r in (r for r in records if r["lambdas"] and not r["ablate_anchor"]):                 # else the same lambdas
        tables, elementwise = r["lambdas"], r["model_config"]["granularity"] == "elementwise"
        for s, table in tables.items():
            with_k = elementwise and s == "q" and "k" in tables
            rows.append([r["label"], s, number(float(np.median(ratio(table), axis=(1, 2)).mean())),
                         number(anchor_share(r["anchor_use"][s])[0].mean()), number(near_zero([table])),
                         number(between_heads(table) if elementwise else None),
                         number(band_correlation(table, tables["k"]) if with_k else None)])
        rows.append([r["label"], "all", "", "", number(near_zero(tables.values())), "", ""])
    if not rows:
        return
    print_table("Lambdas, averages over layers. Paper, Figure 3: v's ratio hardly varies within a head (between heads: "
                "near 1),\nthose of q, k and g do, q's like k's",
                ["label", "letter", "lambda1/lambda2", "anchor's share", "|lambda1| < 0.001", "between heads",
                 "q with k"], rows)


def print_near_zero_ratio(records):
    """Section 4.2: the share of lambda1 near zero without norms on the anchors against that with them."""
    for r in records:
        settings = r["model_config"]
        for other in records:
            if {**other["model_config"], "anchor_norm": ""} == settings != other["model_config"]:
                shares = [near_zero(each["lambdas"].values()) for each in (r, other)]
                print(f"\n|lambda1| < 0.001: {r['label']} {shares[0]:.4f} against {other['label']} {shares[1]:.4f}, "
                      f"{number(shares[0] / shares[1] if shares[1] else None, 2)} times (paper: about 3)")


# -------------------------------------------------------------------------------------------------------------- command

def label_of(path, ablate_anchor):
    """A short name for a checkpoint: its run folder and file, out/tiny-exo/ckpt_000300.pt -> tiny-exo_ckpt_000300."""
    folder, name = os.path.split(os.path.abspath(path))
    return f"{os.path.basename(folder)}_{os.path.splitext(name)[0]}{'_no_anchor' if ablate_anchor else ''}"


def measure(args):
    """Analyse each checkpoint and write its record as OUT/LABEL.json; yields the records."""
    device = choose_device(args.device, among=("cuda", "cpu"))
    os.makedirs(args.out, exist_ok=True)
    for path in args.ckpt:
        model = load_checkpoint(path, device)
        if args.ablate_anchor and model.config.anchor == "none":
            print(f"left out: {path} has no anchor that could be removed", flush=True)
            continue
        windows = validation_windows(args.data, model.config, args.rows, args.block_size)
        record = dict(label=label_of(path, args.ablate_anchor), checkpoint=path, data=args.data,
                      **analyse(model, windows, args.ablate_anchor))
        with atomic_write(os.path.join(args.out, f"{record['label']}.json")) as file:
            file.write(json.dumps(record).encode())
        print(f"wrote {file.name.removesuffix('.part')}", flush=True)
        yield record


def parse_args():
    parser = argparse.ArgumentParser(description="Table 2, and all that the figures need.", allow_abbrev=False)
    parser.add_argument("--ckpt", action="append", required=True, metavar="PATH",
                        help="checkpoint, ours or a released one; repeat for more")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of token shards, for its validation split")
    parser.add_argument("--rows", type=int, default=4, help="validation rows (default: the paper's 4)")
    parser.add_argument("--block_size", type=int, default=0, metavar="T",
                        help="tokens of a row (default: the model's, 2048 in the paper)")
    parser.add_argument("--ablate_anchor", action="store_true",
                        help="remove the anchor at inference: it adds nothing to any projection")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"),
                        help="where to compute (default: cuda if there is a GPU)")
    parser.add_argument("--out", default="out/analysis", metavar="DIR",
                        help="folder for the JSON files (default: out/analysis)")
    return parser.parse_args()


def main():
    args = parse_args()
    labels = [label_of(path, args.ablate_anchor) for path in args.ckpt]
    if len(set(labels)) < len(labels):
        raise UserError("two checkpoints share folder and file name, so one JSON would replace the other: "
                        "rename a folder")
    records = list(measure(args))
    if not records:
        raise UserError("--ablate_anchor: none of the checkpoints has an anchor; drop the flag")
    for show in (print_table_2, print_stages, print_embedding_similarity, print_gates, print_mixing,
                 print_near_zero_ratio):
        show(records)
    print(f"\nPictures: python paper/figures.py {args.out}/*.json")


if __name__ == "__main__":
    command_line(main, InputError)
