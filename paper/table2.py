"""
Table 2 for checkpoints of your own, or for the released ones: attention sink, token similarity, PCA core features.

    python paper/table2.py --ckpt=out/paper-base/ckpt_038147.pt --ckpt=out/paper-exo/ckpt_038147.pt --data=DIR
    python paper/table2.py --ckpt=... --data=DIR --ablate_anchor        with the anchor removed at inference
    python paper/figures.py out/analysis/*.json                         the pictures

Writes one JSON for each checkpoint, which holds every quantity layer by layer (paper/analysis.py says how they are
defined), and prints the averages beside the paper's.
"""
import argparse
import json
import math
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from analysis import Countdown, analyse, validation_windows
from model import choose_device, load_checkpoint
from prepare_fineweb import UserError, atomic_write

PAPER_TABLE_2 = {  # attention sink, token similarity, PCA core features (of C = 1024)
    "base": (0.2572, 0.5365, 838.9), "gated": (0.0091, 0.6328, 880.0), "resformer": (0.0212, 0.6558, 853.8),
    "nuresformer": (0.0112, 0.5783, 887.9), "exo": (0.0041, 0.8265, 818.3), "exo_dynamic": (0.0073, 0.8622, 752.1),
}
COLUMNS = {"attention_sink": 4, "token_similarity": 4, "pca_core_features": 1}             # and their decimals


def label_of(path, ablate_anchor):
    """A short name for a checkpoint: its run folder and file, out/tiny-exo/ckpt_000300.pt -> tiny-exo_ckpt_000300."""
    folder, name = os.path.split(os.path.abspath(path))
    return f"{os.path.basename(folder)}_{os.path.splitext(name)[0]}{'_no_anchor' if ablate_anchor else ''}"


def finite(value):
    """The same nest of dicts and lists with None for every number that JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_record(folder, record):
    """Write the record of one checkpoint as FOLDER/LABEL.json and return the path."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{record['label']}.json")
    with atomic_write(path) as file:
        file.write(json.dumps(finite(record), allow_nan=False).encode())
    return path


def print_table_2(records):
    """The layer averages of Table 2, each beside the paper's where the paper has that variant."""
    width, wide = (max(len(key), *(len(r[key]) for r in records)) for key in ("label", "variant"))
    print(f"\nTable 2, averages over layers. paper: what it prints for its 450M models (C 1024, 10B training tokens)\n"
          f"{'':{width}s}  {'':{wide}s}        attention sink    token similarity   PCA core features\n"
          f"{'label':{width}s}  {'variant':{wide}s}   loss    here   paper      here   paper      "
          "here of C  paper of 1024")
    for r in records:
        cells = []
        for i, (name, digits) in enumerate(COLUMNS.items()):
            paper = PAPER_TABLE_2.get(r["variant"]) if not r["ablate_anchor"] else None
            of = f" {r['model_config']['n_embd']:4d}" if name.startswith("pca") else ""
            cells.append(f"{r['averages'][name]:7.{digits}f}{of} {f'{paper[i]:.{digits}f}' if paper else '-':>7s}")
        print(f"{r['label']:{width}s}  {r['variant']:{wide}s} {r['cross_entropy']:6.3f} {'   '.join(cells)}")
    if any(r["ablate_anchor"] for r in records):
        print("anchor removed at inference: the paper's ExoFormer then reaches a token similarity of 93 %, "
              "and its PCA dimensions collapse")


def print_use(records):
    """What Table 2 leaves out: entropy, gates, and how far the anchor is used. Averages over layers."""
    width = max(len("label"), *(len(r["label"]) for r in records))
    letters = "".join(f"{s:>7s}" for s in "qkvg")
    print(f"\n{'':{width}s}            gate  share   lambda1/lambda2 (median)      |lambda1| < 0.001, share\n"
          f"{'label':{width}s}  entropy   mean  < 0.2 {letters}  {letters}")
    for r in records:
        gates = "".join(f"{r['averages'][name]:7.3f}" if name in r["averages"] else f"{'-':>7s}"
                        for name in ("gate_mean", "gate_sparsity"))
        shares = ["".join(average(r["lambdas"].get(s, {}).get(name)) for s in "qkvg")
                  for name in ("ratio_median", "near_zero")]
        print(f"{r['label']:{width}s}  {r['averages']['attention_entropy']:7.3f}{gates} {'  '.join(shares)}")


def average(layers):
    """A cell: the mean over layers, "-" where the component is not mixed."""
    return f"{sum(layers) / len(layers):7.3f}" if layers else f"{'-':>7s}"


def run(args):
    labels = [label_of(path, args.ablate_anchor) for path in args.ckpt]
    if len(set(labels)) < len(labels):
        raise UserError("two checkpoints share folder and file name, so one JSON would replace the other: "
                         "rename a folder")
    records, device = [], choose_device(args.device, among=("cuda", "cpu"))
    for path, label in zip(args.ckpt, labels):
        model = load_checkpoint(path, device)
        if args.ablate_anchor and model.config.anchor == "none":
            print(f"left out: {path} has no anchor that could be removed", flush=True)
            continue
        windows = validation_windows(args.data, model.config, args.rows, args.block_size)
        record = analyse(model, windows, args.dtype, args.ablate_anchor, Countdown(label, len(windows), "rows"))
        records.append(dict(label=label, checkpoint=path, data=args.data, **record))
        print(f"wrote {write_record(args.out, records[-1])}", flush=True)
    if not records:
        raise UserError("--ablate_anchor: none of the checkpoints has an anchor; drop the flag")
    print_table_2(records)
    print_use(records)
    print(f"\nPictures: python paper/figures.py {args.out}/*.json")


def main():
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
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"),
                        help="of the forward pass (default: float32)")
    parser.add_argument("--out", default="out/analysis", metavar="DIR",
                        help="folder for the JSON files (default: out/analysis)")
    args = parser.parse_args()
    if args.rows < 1:
        parser.error(f"--rows={args.rows} must be at least 1")
    try:
        run(args)
    except (UserError, OSError) as error:
        sys.exit(f"table2.py: {error}")


if __name__ == "__main__":
    main()
