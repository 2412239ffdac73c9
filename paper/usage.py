"""
How the layers come to use their anchor: Table 2's quantities by layer and over training, from the checkpoints of runs.

    python train.py --variant=exo --keep=0                                         keeps all its checkpoints
    python paper/usage.py out/paper-gated out/paper-exo out/paper-exo_dynamic --png=usage.png --out=usage.jsonl
    python paper/usage.py usage.jsonl --png=usage.png                              the same from a file of --out

Each checkpoint in a run folder is analysed on the first validation row, as table2.py does. In the picture every run is
a row of maps, layers downwards, tokens to the right. The table that is printed holds averages over layers, at the last
checkpoint and those nearest to a half, a quarter, ... of its tokens. The anchor's share is that of the mean norms of
gamma_1 lambda_1 S_anc and gamma_2 lambda_2 S_n, which can be compared between anchors with and without a norm.
"""
import argparse
import glob
import os
import re
import sys

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from analysis import analyse, anchor_share, validation_windows
from compare import circumstances, write_lines
from figures import Page, heat_map, inner_limits, pyplot
from model import choose_device, InputError, load_checkpoint, read_checkpoint
from prepare_fineweb import UserError, check_writable, command_line, json_lines
from table2 import number, print_table

QUANTITIES = {  # name: (heading in the table, title in the picture)
    "attention_sink": ("sink", "attention to first token"), "token_similarity": ("similarity", "token similarity"),
    "pca_core_features": ("PCA", "PCA core features"), "gate_mean": ("gate", "mean gate"),
    "q": ("q share", "anchor's share, queries"), "k": ("k share", "anchor's share, keys"),
    "v": ("v share", "anchor's share, values"), "g": ("g share", "anchor's share, gates"),
}


def use_in(path, data, device="cpu", rows=1):
    """{quantity: (n_layer,) float64} of a checkpoint; nan in a layer that does not mix the letter."""
    model = load_checkpoint(path, device)
    layers, record = model.config.n_layer, analyse(model, validation_windows(data, model.config, rows))
    use = {name: np.array(record["by_layer"][name][-layers:], dtype=float)                # without the embedding
           for name in QUANTITIES if name in record["by_layer"]}
    for s, table in record["anchor_use"].items():
        use[s] = np.full(layers, np.nan)
        use[s][np.array(table["layers"]) - 1] = anchor_share(table)[0]
    return use


def use_over_training(folder, data="", device="cpu", rows=1):
    """(tokens (E,), {quantity: (n_layer, E)}) of the E checkpoints in a run folder. data: a folder of shards; "" takes
    the run's own. UserError where there is no checkpoint."""
    paths = glob.glob(os.path.join(glob.escape(folder), "ckpt_*.pt"))
    steps = {int(re.search(r"(\d+)\.pt$", path)[1]): path for path in paths}
    if not steps:
        raise UserError(f"{folder}: no checkpoint (ckpt_*.pt) of train.py in this folder")
    settings = read_checkpoint(paths[0]).get("train_config")
    if settings is None:
        raise UserError(f"{paths[0]}: holds weights but no settings of a run; give a run folder of train.py")
    uses = [use_in(steps[step], data or settings["data"], device, rows) for step in sorted(steps)]
    return np.array(sorted(steps)) * settings["total_batch_size"], {
        name: np.stack([use[name] for use in uses], axis=1) for name in uses[0]}


def measure(folder, data, device, rows):
    """The record of a run folder, a line of --out; null where a layer does not mix the letter."""
    tokens, use = use_over_training(folder, data, device, rows)
    return dict(run=os.path.basename(os.path.normpath(folder)), rows=rows, tokens=tokens.tolist(),
                use={name: np.where(np.isnan(table), None, table.round(5)).tolist() for name, table in use.items()},
                **circumstances(device))


def unpack(record):
    """(label, (tokens, {quantity: values})) of a record of `measure`."""
    use = {name: np.array(table, dtype=float) for name, table in record["use"].items()}
    return record["run"], (np.array(record["tokens"]), use)


def read_records(path):
    """The records in a file of --out; UserError for a line that cannot be unpacked."""
    with open(path, "rb") as file:
        return list(json_lines(file, path, "a line of usage.py --out", lambda record: unpack(record) and record))


def print_uses(runs):
    """Averages over layers at the last checkpoint and those nearest to a half, a quarter, ... of its tokens."""
    rows = []
    for label, (tokens, use) in runs.items():
        for column in sorted({int(abs(tokens - tokens[-1] / 2 ** halvings).argmin()) for halvings in range(8)}):
            rows.append([label, f"{tokens[column]:,}"] +
                        [number(np.nanmean(use[name][:, column]) if name in use else None, 4) for name in QUANTITIES])
    print_table("Averages over layers", ["run", "tokens"] + [heading for heading, _ in QUANTITIES.values()], rows)


def draw(runs, path):
    """Write the picture of {label: (tokens, {quantity: values})}: a row of maps for each run, a column and a colour
    scale for each quantity that any has."""
    names = [name for name in QUANTITIES if any(name in use for _, use in runs.values())]
    most = max(tokens[-1] for tokens, _ in runs.values())
    unit, word = (1e9, "billions") if most >= 1e9 else (1e6, "millions") if most >= 1e6 else (1e3, "thousands")
    page = Page(len(runs), len(names), "Layers over training", width=2.7, height=2.1)
    for column, name in zip(page.axes.reshape(len(runs), -1).T, names):
        limits = inner_limits(np.concatenate([use[name].flatten() for _, use in runs.values() if name in use]))
        for axes, (label, (tokens, use)) in zip(column, runs.items()):
            if name in use:
                lowest, image = axes, heat_map(axes, use[name], limits, [f"{t / unit:.3g}" for t in tokens],
                                               range(1, len(use[name]) + 1), names_shown=4,
                                               ylabel=f"{label}\nlayer" if name == names[0] else "layer")
            else:
                axes.set_axis_off()
        lowest.set_xlabel(f"tokens ({word})")
        column[0].set_title(QUANTITIES[name][1], fontsize=11)
        page.figure.colorbar(image, ax=list(column), location="bottom", aspect=25, pad=0.02, extend="both")
    return page.finish(path)


def main():
    parser = argparse.ArgumentParser(description="Use of the anchor by depth and over training.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or files of --out")
    parser.add_argument("--data", default="", metavar="DIR", help="folder of token shards (default: the run's own)")
    parser.add_argument("--rows", type=int, default=1, help="validation rows (default: 1)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"),
                        help="where to compute (default: cuda if there is a GPU)")
    parser.add_argument("--png", default="", help="write the picture to this file")
    parser.add_argument("--out", default="", help="write what was measured to this file, a line a run")
    args = parser.parse_args()
    if args.png:
        pyplot()                                                               # said before the work, not after it
    check_writable(args.png)
    check_writable(args.out)
    device = choose_device(args.device, among=("cuda", "cpu"))
    records = []
    for run in args.runs:
        records += read_records(run) if run.endswith(".jsonl") else [measure(run, args.data, device, args.rows)]
    runs = dict(map(unpack, records))
    if len(runs) < len(records):
        raise UserError(f"two runs have one name, among {', '.join(record['run'] for record in records)}")
    print_uses(runs)
    if args.out:
        write_lines(records, args.out)
    if args.png:
        print(f"wrote {draw(runs, args.png)}")


if __name__ == "__main__":
    command_line(main, InputError)
