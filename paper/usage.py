"""
How much the layers use their anchor, by depth and over training: from the logs of train.py alone.

    python paper/usage.py out/paper-gated out/paper-exo out/paper-exo_dynamic --png=usage.png

train.py logs at every evaluation, for the first validation row: each layer's attention to the first token, its mean
gate, and for q, k, v, g the median over channels of lambda_1 / lambda_2 (of a dynamic model without its gammas). Here
every experiment is a row of maps, layers upwards, tokens to the right; runs that differ in the seed alone are averaged.
The table that is printed holds the last evaluation, averaged over layers.
"""
import argparse
import os
import sys

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import compare
from prepare_fineweb import UserError, atomic_write

RATIO = "$\\lambda_1 / \\lambda_2$"
QUANTITIES = {  # name: (heading in the table, title in the picture)
    "attention_sink": ("sink", "attention to first token"), "gate_mean": ("gate", "mean gate"),
    "q": ("q ratio", f"{RATIO} of queries"), "k": ("k ratio", f"{RATIO} of keys"),
    "v": ("v ratio", f"{RATIO} of values"), "g": ("g ratio", f"{RATIO} of gates"),
}


def usage_of_run(run):
    """{quantity: {tokens: (n_layer,) float64}} of a run's evaluations; nan in a layer that does not mix the letter."""
    usage = {}
    for record in (record for record in compare.read_log(run.folder) if "attention_sink" in record):
        for name, layers in {**record, **record.get("lambda_ratio", {})}.items():
            if name in QUANTITIES:
                usage.setdefault(name, {})[record["tokens"]] = np.array(layers, dtype=float)
    if not usage:
        raise UserError(f"{run.folder}: its log does not say how layers use their anchor; train with this train.py")
    return usage


def usage_of_group(group):
    """{quantity: (tokens (E,), values (n_layer, E))}: the mean over the runs of a group, where all were evaluated."""
    usages, result = [usage_of_run(run) for run in group.runs], {}
    for name in usages[0]:
        tokens = sorted(set.intersection(*(set(usage[name]) for usage in usages)))
        values = [[usage[name][at] for at in tokens] for usage in usages]                       # (runs, E, n_layer)
        result[name] = np.array(tokens), np.mean(values, axis=0).T
    return result


def table_of(groups, usages):
    """Lines of text: the last evaluation, averaged over the layers that have the quantity."""
    width = max(len("variant"), *(len(group.label) for group in groups))
    yield f"{'variant':{width}s}" + "".join(f"{heading:>9s}" for heading, _ in QUANTITIES.values())
    for group, usage in zip(groups, usages):
        cells = [f"{np.nanmean(usage[name][1][:, -1]):9.4f}" if name in usage else f"{'-':>9s}" for name in QUANTITIES]
        yield f"{group.label:{width}s}" + "".join(cells)


def draw(groups, usages, path):
    """Write the picture: a row of maps for each group, a column and a colour scale for each quantity that any has."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    names = [name for name in QUANTITIES if any(name in usage for usage in usages)]
    size = (2.7 * len(names) + 0.8, 1.7 * len(groups) + 1.4)
    figure, axes = pyplot.subplots(len(groups), len(names), figsize=size, dpi=130, layout="constrained", squeeze=False)
    for column, name in zip(axes.T, names):
        every = np.concatenate([usage[name][1].flatten() for usage in usages if name in usage])
        limits = np.percentile(every[np.isfinite(every)], (2, 98))
        for panel, group, usage in zip(column, groups, usages):
            if name in usage:
                image = draw_map(panel, *usage[name], limits)
                panel.set_ylabel(f"{group.label}\nlayer" if name == names[0] else "")
            else:
                panel.set_axis_off()
        column[0].set_title(QUANTITIES[name][1], fontsize=11)
        last = max(i for i, usage in enumerate(usages) if name in usage)
        column[last].set_xlabel("tokens (millions)")
        figure.colorbar(image, ax=list(column), location="bottom", aspect=25, extend="both")
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
    pyplot.close(figure)


def draw_map(axes, tokens, values, limits):
    """values (n_layer, E) as a map, lighter for greater; white where a layer does not mix the letter."""
    from matplotlib.ticker import MaxNLocator
    step = (tokens[-1] - tokens[0]) / max(1, len(tokens) - 1) / 1e6 or 1.0
    extent = (tokens[0] / 1e6 - step / 2, tokens[-1] / 1e6 + step / 2, 0.5, len(values) + 0.5)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    return axes.imshow(values, cmap="cividis", vmin=limits[0], vmax=limits[1], extent=extent, origin="lower",
                       aspect="auto", interpolation="nearest")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Use of the anchor by depth and over training.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; repetitions with other seeds are averaged")
    parser.add_argument("--png", default="", help="write the picture to this file")
    args = parser.parse_args(argv)
    try:
        if not os.path.isdir(os.path.dirname(args.png) or "."):
            raise UserError(f"{args.png}: its folder does not exist")
        if args.png and not compare.can_draw():
            raise UserError("--png needs matplotlib: pip install -r paper/requirements.txt")
        groups = compare.group_runs([compare.read_run(folder) for folder in args.runs])
        usages = [usage_of_group(group) for group in groups]
        print("\n".join(table_of(groups, usages)))
        if args.png:
            draw(groups, usages, args.png)
    except (UserError, OSError) as error:
        sys.exit(f"usage.py: {error}")


if __name__ == "__main__":
    main()
