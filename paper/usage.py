"""
Over training: how the layers come to use their anchor, from the checkpoints of runs; and with --log
how smoothly the runs went, from their logs.

    python train.py --variant=exo --keep=0                                keeps all its checkpoints
    python paper/usage.py out/paper-gated out/paper-exo --png=usage.png --out=usage.jsonl
    python paper/usage.py usage.jsonl --png=usage.png                     the same from --out's file
    python paper/usage.py out/paper-naive out/paper-exo --log --png=steps.png --out=steps.jsonl

Each checkpoint in a run folder is analysed on the first validation rows, as table2.py does. The
tables hold averages over layers, at the last checkpoint and those nearest to a half, a quarter, ...
of its tokens. The anchor's share is that of the mean norms of gamma_1 lambda_1 S_anc and gamma_2
lambda_2 S_n, which can be compared between anchors with and without a norm; lambda_1 and lambda_2
are means over channels, weights alone (a dynamic model multiplies them by its gammas). In the
picture every run is a row of maps, layers downwards, tokens to the right.

With --log: the norm of the gradient before clipping, and spikes. A step is a spike where its
training loss (or its norm) lies more than 5 standard deviations above the mean of the 50 steps
before it.
"""

import argparse
import os
import sys

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from analysis import analyse, anchor_share, validation_windows
from compare import circumstances, read_log, read_run, write_lines
from figures import NAMES, Page, heat_map, inner_limits, pyplot, read_lines_of, token_unit
from model import InputError, checkpoints_in, choose_device, model_from, read_checkpoint
from prepare_fineweb import UserError, check_writable, command_line
from table2 import ROWS, number, print_table

# {quantity: (heading in the table, title in the picture)}, four that stand side by side
STATES = {
    "attention_sink": ("sink", "attention to first token"),
    "token_similarity": ("similarity", "token similarity"),
    "pca_core_features": ("PCA", "PCA core features"),
    "gate_mean": ("gate", "mean gate"),
}
SHARES = {s: (f"{s} share", f"anchor's share, {name}") for s, name in NAMES.items()}
LAMBDAS_1 = {f"lambda1_{s}": (f"{s} lambda1", f"lambda1, {name}") for s, name in NAMES.items()}
LAMBDAS_2 = {f"lambda2_{s}": (f"{s} lambda2", f"lambda2, {name}") for s, name in NAMES.items()}

SPIKE_STEPS = 50
SPIKE_DEVIATIONS = 5


# ---- checkpoints: how the layers use their anchor ------------------------------------------------


def use_in(model, data, rows=ROWS):
    """{quantity: (n_layer,) float64} of a model; nan where a layer does not mix the letter."""
    layers = model.config.n_layer
    record = analyse(model, validation_windows(data, model.config, rows))
    use = {}
    for name in STATES:
        if name in record["by_layer"]:
            use[name] = np.array(record["by_layer"][name][-layers:], dtype=float)  # no embedding
    for s, table in record["anchor_use"].items():
        use[s] = in_layers(table, anchor_share(table)[0], layers)
    for s, table in record["lambdas"].items():
        use[f"lambda1_{s}"] = in_layers(table, np.mean(table["anchor"], axis=(1, 2)), layers)
        use[f"lambda2_{s}"] = in_layers(table, np.mean(table["current"], axis=(1, 2)), layers)
    return use


def in_layers(table, values, layers):
    """The values of the layers that a letter's table names, (n_layer,); nan in the others."""
    every = np.full(layers, np.nan)
    every[np.array(table["layers"]) - 1] = values
    return every


def use_over_training(folder, data="", device="cpu", rows=ROWS):
    """(tokens (E,), {quantity: (n_layer, E)}) of the E checkpoints in a run folder.

    data: a folder of shards; "" takes the run's own. UserError where there is no checkpoint.
    """
    tokens = []
    uses = []
    for path in checkpoints_of(folder):
        checkpoint = read_checkpoint(path)
        if "train_config" not in checkpoint:
            raise UserError(
                f"{path}: holds weights but no settings of a run; give a run folder of train.py"
            )
        data = data or checkpoint["train_config"]["data"]
        model = model_from(checkpoint, path).to(device).eval()
        tokens.append(checkpoint["tokens"])
        uses.append(use_in(model, data, rows))
    over_training = {name: np.stack([use[name] for use in uses], axis=1) for name in uses[0]}
    return np.array(tokens), over_training


def checkpoints_of(folder):
    """Paths of the checkpoints, the oldest first; UserError where there is none."""
    paths = list(checkpoints_in(folder).values())
    if not paths:
        raise UserError(f"{folder}: no checkpoint (ckpt_*.pt) of train.py in this folder")
    return paths[::-1]


def measure_use(folder, data, device, rows):
    """The record of a run folder, a line of --out; null where a layer does not mix the letter."""
    tokens, use = use_over_training(folder, data, device, rows)
    rounded = {}
    for name, table in use.items():
        rounded[name] = np.where(np.isnan(table), None, table.round(5)).tolist()
    return dict(
        run=run_name(folder),
        rows=rows,
        tokens=tokens.tolist(),
        use=rounded,
        **circumstances(device),
    )


def unpack_use(record):
    """(tokens, {quantity: values}) of a record of `measure_use`."""
    use = {name: np.array(table, dtype=float) for name, table in record["use"].items()}
    return np.array(record["tokens"]), use


def print_uses(records):
    """Averages over layers at the last checkpoint and those nearest to a half, a quarter, ..."""
    print_averages("Averages over layers", STATES | SHARES, records)
    if any("lambda1" in name for record in records for name in record["use"]):
        print_averages("Lambdas, averages over layers", LAMBDAS_1 | LAMBDAS_2, records)


def print_averages(title, quantities, records):
    headings = ["run", "tokens"] + [heading for heading, _ in quantities.values()]
    rows = []
    for record in records:
        tokens, use = unpack_use(record)
        targets = [tokens[-1] / 2**halvings for halvings in range(8)]
        nearest = {int(abs(tokens - target).argmin()) for target in targets}
        for column in sorted(nearest):
            cells = [record["run"], f"{tokens[column]:,}"]
            for name in quantities:
                mean = np.nanmean(use[name][:, column]) if name in use else None
                cells.append(number(mean, 4))
            rows.append(cells)
    print_table(title, headings, rows)


def draw_uses(records, path):
    """Write the picture: below each other the quantities in fours, a row of maps for each run.

    A quantity has one colour scale for all runs. A run that has none of four is left out there.
    """
    blocks = []
    for quantities in (STATES, SHARES, LAMBDAS_1, LAMBDAS_2):
        having = [record for record in records if set(quantities) & set(record["use"])]
        if having:
            blocks.append((quantities, having))
    rows = sum(len(having) for _, having in blocks)
    page = Page(rows, 4, "Layers over training", width=2.7, height=2.1)
    grid = page.axes.reshape(rows, 4)
    for quantities, having in blocks:
        block = grid[: len(having)]
        grid = grid[len(having) :]
        for column, (name, (_, title)) in zip(block.T, quantities.items()):
            draw_quantity(page, column, having, name, title)
        for axes, record in zip(block[:, 0], having):
            axes.set_ylabel(f"{record['run']}\nlayer")
    return page.finish(path)


def draw_quantity(page, column, records, name, title):
    """The maps of one quantity, one below the other, with their colours."""
    drawn = []
    unit, word = token_unit(max(record["tokens"][-1] for record in records))
    values = [unpack_use(record)[1][name] for record in records if name in record["use"]]
    limits = inner_limits(np.concatenate([table.flatten() for table in values] or [[0.0]]))
    for axes, record in zip(column, records):
        if name not in record["use"]:
            axes.set_axis_off()
            continue
        tokens, use = unpack_use(record)
        layers = range(1, len(use[name]) + 1)
        image = heat_map(axes, use[name], limits, across=[""], down=layers, names_shown=4)
        ticks = round_numbers(tokens[0] / unit, tokens[-1] / unit)
        places = np.interp(ticks, tokens / unit, range(len(tokens)))
        axes.set_xticks(places, [f"{tick:g}" for tick in ticks])
        drawn.append(axes)
    if drawn:
        drawn[0].set_title(title, fontsize=11)
        drawn[-1].set_xlabel(f"tokens ({word})")
        page.figure.colorbar(image, ax=drawn, location="bottom", aspect=25, pad=0.02, extend="both")


def round_numbers(low, high):
    """Up to five round numbers from low to high; low itself where they are equal."""
    ticks = pyplot().MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [tick for tick in ticks if low <= tick <= high] if low < high else [low]


# ---- logs: how smoothly the runs went ------------------------------------------------------------


def measure_log(folder):
    """The record of a run's log.jsonl, a line of --out: loss and norm of the gradient by step."""
    steps = [record for record in read_log(folder) if "loss" in record]
    if not steps:
        raise UserError(f"{folder}: its log has no training step yet")
    return dict(
        run=run_name(folder),
        tokens=[step["tokens"] for step in steps],
        loss=[round(step["loss"], 4) for step in steps],
        grad_norm=[round(step["grad_norm"], 4) for step in steps],
        **read_run(folder).origin,
    )


def unpack_log(record):
    """(tokens, loss, norm of the gradient), each (steps,), of a record of `measure_log`."""
    return tuple(np.array(record[name], dtype=float) for name in ("tokens", "loss", "grad_norm"))


def spikes(values):
    """Which of some steps' values (steps,) are spikes, as a mask; none of the first 50 can be."""
    found = np.zeros(len(values), dtype=bool)
    for i in range(SPIKE_STEPS, len(values)):
        before = values[i - SPIKE_STEPS : i]
        found[i] = values[i] > before.mean() + SPIKE_DEVIATIONS * before.std()
    return found


def print_logs(records):
    """The norm of the gradient over all steps, and how many spikes of loss and norm there are."""
    headings = ["run", "steps", "norm: median", "99th percentile", "largest"]
    headings += ["loss spikes", "norm spikes"]
    rows = []
    for record in records:
        _, loss, norm = unpack_log(record)
        rows.append(
            [
                record["run"],
                f"{len(loss):,}",
                number(np.median(norm)),
                number(np.percentile(norm, 99)),
                number(norm.max()),
                str(spikes(loss).sum()),
                str(spikes(norm).sum()),
            ]
        )
    title = (
        "Norm of the gradient before clipping; spikes: "
        f"more than {SPIKE_DEVIATIONS} standard deviations above the {SPIKE_STEPS} steps before"
    )
    print_table(title, headings, rows)


def draw_logs(records, path):
    """Training loss and norm of the gradient of every step, a row for each run, on equal axes."""
    page = Page(len(records), 2, "Every training step; dots: spikes", width=5.0, height=1.8)
    grid = page.axes.reshape(len(records), 2)
    series = [unpack_log(record) for record in records]
    unit, word = token_unit(max(tokens[-1] for tokens, _, _ in series))
    norms = np.concatenate([norm for _, _, norm in series])
    losses = np.concatenate([loss for _, loss, _ in series])
    for row, record, (tokens, loss, norm) in zip(grid, records, series):
        for axes, values, every in ((row[0], loss, losses), (row[1], norm, norms)):
            mask = spikes(values)
            axes.plot(tokens / unit, values, linewidth=0.7, color="#0072B2")
            axes.plot(tokens[mask] / unit, values[mask], "o", markersize=4, color="#D55E00")
            axes.set(xlabel=f"tokens ({word})", ylim=(0.95 * every.min(), 1.05 * every.max()))
        row[0].set_ylabel(f"{record['run']}\nloss (nats)")
        row[1].set_ylabel("gradient norm")
        row[1].set_yscale("log")
        row[1].yaxis.set_major_locator(pyplot().LogLocator(subs=(1, 2, 5)))
        row[1].yaxis.set_major_formatter("{x:g}")
        row[1].minorticks_off()
    return page.finish(path)


# ---- command -------------------------------------------------------------------------------------


def run_name(folder):
    return os.path.basename(os.path.normpath(folder))


def read_records(path, unpack):
    """The records in a file of --out; UserError for a line that `unpack` cannot read."""
    kind = "a line of usage.py --out (with --log where it was made so)"
    return read_lines_of("usage.py --out", path, kind, lambda record: unpack(record) and record)


def collect(args):
    """
    The records of all that the command line names, written to --out. UserError where two have one
    name.
    """
    device = choose_device(args.device, among=("cuda", "cpu"))
    kept = {}
    names = []
    for run in args.runs:  # what is wrong with any of them is said before the first is measured
        if run.endswith(".jsonl"):
            kept[run] = read_records(run, unpack_log if args.log else unpack_use)
            names += [record["run"] for record in kept[run]]
            continue
        names.append(run_name(run))
        if not args.log:
            checkpoints_of(run)
    if len(set(names)) < len(names):
        raise UserError(f"two runs have one name, among {', '.join(names)}")
    records = []
    for run in args.runs:
        if run in kept:
            records += kept[run]
        elif args.log:
            records.append(measure_log(run))
        else:
            records.append(measure_use(run, args.data, device, args.rows))
        if args.out:  # after each run, since measuring many can take hours
            write_lines(records, args.out)
    return records


def parse_args():
    parser = argparse.ArgumentParser(
        description="Use of the anchor by depth and over training; or how smoothly runs went.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or files of --out")
    parser.add_argument(
        "--log",
        action="store_true",
        help="norm of the gradient and spikes of the loss, from log.jsonl, instead of the layers",
    )
    parser.add_argument(
        "--data", default="", metavar="DIR", help="folder of token shards (default: the run's own)"
    )
    parser.add_argument(
        "--rows", type=int, default=ROWS, help=f"validation rows (default: {ROWS}, as table2.py)"
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="where to compute (default: cuda if there is a GPU)",
    )
    parser.add_argument("--png", default="", help="write the picture to this file")
    parser.add_argument(
        "--out", default="", help="write what was measured to this file, a line a run"
    )
    return parser.parse_args()


def main():
    args = parse_args()
    if args.png:
        pyplot()  # said before the work, not after it
    check_writable(args.png)
    check_writable(args.out)
    records = collect(args)
    show, draw = (print_logs, draw_logs) if args.log else (print_uses, draw_uses)
    show(records)
    if args.png:
        print(f"wrote {draw(records, args.png)}")


if __name__ == "__main__":
    command_line(main, InputError)
