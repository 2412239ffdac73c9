"""
Pictures of what table2.py measured.

    python paper/figures.py out/analysis/*.json --out=out/figures

    by_layer.png            attention sink and entropy, token similarity, PCA core features: all checkpoints, by layer
    gates.png               mean gate, and share of gates below 0.2: all with a gate
    layers.png              likeness of a layer's hidden states to the embedding, and to the layer before
    lambda_ratio.png        median lambda1 / lambda2 of q, k, v, g (Figure 4): all with an anchor
    lambda_map_LABEL.png    lambda1 / lambda2 of every channel of every layer (Figure 3), one for each with an anchor
    gamma_LABEL.png         weights of Eq. 11, mean and standard deviation over tokens, one for each dynamic model
    similarity_LABEL.png    token-similarity maps of three layers; likeness of all layers to each other, one for each

A variant has the same colour, line and marker in every picture, compare.py's included; no two share a marker, and the
maps get lighter as numbers grow, so that all can be read in black and white. With the anchor removed: hollow markers.
"""
import argparse
import importlib.util
import json
import os
import sys

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from compare import variant_style
from prepare_fineweb import UserError, atomic_write

BY_LAYER = {  # what is in by_layer.png: the axis of each panel
    "attention_sink": "attention to the first token", "attention_entropy": "attention entropy (nats)",
    "token_similarity": "token similarity (mean cosine)", "pca_core_features": "PCA core features (99 % of variance)",
}
GATES = {"gate_mean": "mean gate", "gate_sparsity": "share of gates below 0.2"}
RATIO = "$\\lambda_1 / \\lambda_2$"
GAMMA_STYLES = (
    ("anchor", -0.08, dict(label="$\\gamma_1$, anchor", color="#D55E00", linestyle="-", marker="o")),
    ("current", 0.08, dict(label="$\\gamma_2$, current", color="#0072B2", linestyle="--", marker="s", fillstyle="none"))
)
NAMES = {"q": "queries", "k": "keys", "v": "values", "g": "gates"}
CUSTOM = dict(color="#7A3E9D", linestyle=(0, (4, 1, 1, 1, 1, 1)), marker="d", fillstyle="full")     # no row of Table 3
DPI, LEGEND = 130, 135                                         # characters that fit below a picture of two columns
AGAIN = ("right", "bottom", "top")                             # marker filling of a variant's further checkpoints


def read_record(path):
    """The JSON of one checkpoint. UserError when it is not one that table2.py wrote."""
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); make it with python paper/table2.py") from None
    wanted = {"label", "variant", "ablate_anchor", "by_layer", "lambdas", "gammas", "token_maps", "hidden_similarity",
              "model_config"}
    lacks = wanted - set(record if isinstance(record, dict) else ())
    if lacks:
        raise UserError(f"{path}: not a file of paper/table2.py, it lacks {', '.join(sorted(lacks))}")
    return record


def styles_of(records):
    """{label: matplotlib's color, linestyle, marker, fillstyle}: the variant's own, told apart where it comes again."""
    styles = {}
    for record in records:
        style = dict(CUSTOM if record["variant"] == "custom" else variant_style(record["variant"]))
        if record["ablate_anchor"]:
            style |= dict(fillstyle="none", linestyle=":")
        fills = [fill for fill in AGAIN if {**style, "fillstyle": fill} not in styles.values()]
        styles[record["label"]] = {**style, "fillstyle": fills[0]} if style in styles.values() and fills else style
    return styles


def numbers(values):
    """A float array of a JSON list, where null stands for a number that is not finite."""
    return np.array(values, dtype=float)


def ratio(table):
    """lambda1 / lambda2, (layers, channels), of one component's table."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return numbers(table["anchor"]) / numbers(table["current"])


class Page:
    """A figure of panels with one legend under them."""

    def __init__(self, rows, columns, title, width=6.0):
        from matplotlib import pyplot
        size = (width * columns, 0.6 + 3.9 * rows)
        self.figure, axes = pyplot.subplots(rows, columns, figsize=size, dpi=DPI, layout="constrained")
        self.axes = np.atleast_1d(axes).flatten()
        self.figure.suptitle(title, fontsize=14)

    def line(self, axes, x, y, label, style):
        """One curve. A deep model has a marker on some layers only, each curve on others."""
        step = 1 + len(y) // 16
        axes.plot(x, y, label=label, linewidth=1.6, markersize=7, markerfacecoloralt="white",
                  markevery=(len(axes.lines) % step, step), **style)

    def finish(self, folder, name):
        """Grid, whole layer numbers, one legend; written as FOLDER/NAME.png and closed."""
        from matplotlib import pyplot
        curves = {}
        for axes in (axes for axes in self.axes if axes.lines):
            axes.grid(alpha=0.3)
            number_layers(axes)
            curves |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels())}
        if curves:
            columns = min(len(curves), max(1, LEGEND // (10 + max(map(len, curves)))))
            self.figure.legend(curves.values(), curves, loc="outside lower center", ncols=columns, fontsize=10,
                               handlelength=4)
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, f"{name}.png")
        with atomic_write(path) as file:
            self.figure.savefig(file, format="png")
        pyplot.close(self.figure)
        return path


def page_of(tables, title):
    """A page with one panel for each component in `tables`, two in a row."""
    page = Page((len(tables) + 1) // 2, min(2, len(tables)), title)
    for axes in page.axes[len(tables):]:
        axes.set_axis_off()
    return page


def number_layers(axes):
    """Whole numbers only on an axis of layers, and on the other one too if that is of layers as well."""
    from matplotlib.ticker import MaxNLocator
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.images:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def draw_by_layer(records, styles, panels, title, folder, name):
    """Panels of one quantity each, a curve for each checkpoint; the embedding is layer 0 where it counts."""
    page = Page(len(panels) // 2, 2, title)
    for axes, (quantity, words) in zip(page.axes, panels.items()):
        for record in (record for record in records if quantity in record["by_layer"]):
            y = numbers(record["by_layer"][quantity])
            first = record["model_config"]["n_layer"] + 1 - len(y)
            page.line(axes, range(first, first + len(y)), y, record["label"], styles[record["label"]])
        axes.set(xlabel="layer (0: embedding)" if first == 0 else "layer", ylabel=words)
    return page.finish(folder, name)


def draw_layers(records, styles, folder):
    """Likeness of each layer's hidden states to the embedding and to those of the layer before."""
    page = Page(1, 2, "Hidden states of the same token in two layers")
    for record in records:
        alike = numbers(record["hidden_similarity"])
        layers = range(1, len(alike))
        page.line(page.axes[0], layers, alike[0, 1:], record["label"], styles[record["label"]])
        page.line(page.axes[1], layers, np.diagonal(alike, 1), record["label"], styles[record["label"]])
    page.axes[0].set(xlabel="layer", ylabel="mean cosine to the embedding")
    page.axes[1].set(xlabel="layer", ylabel="mean cosine to the layer before")
    return page.finish(folder, "layers")


def draw_lambda_ratio(records, styles, folder):
    """Median lambda1 / lambda2 by layer, one panel for each component."""
    page = Page(2, 2, f"How much of the anchor a layer takes: median of {RATIO}")
    for axes, (s, words) in zip(page.axes, NAMES.items()):
        for record in (record for record in records if s in record["lambdas"]):
            table = record["lambdas"][s]
            page.line(axes, table["layers"], numbers(table["ratio_median"]), record["label"], styles[record["label"]])
        if axes.lines and max(np.abs(line.get_ydata()).max() for line in axes.lines) > 4:
            axes.set_yscale("symlog", linthresh=2)             # a lambda2 near zero would flatten all the rest
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xlabel="layer", ylabel=RATIO, title=words)
    return page.finish(folder, "lambda_ratio")


def draw_map(axes, values, limits, aspect="auto", **words):
    """A heat map of (rows, columns), lighter for greater; beyond `limits` the colour is that of the limit."""
    image = axes.imshow(values, cmap="cividis", vmin=limits[0], vmax=limits[1], aspect=aspect, interpolation="nearest")
    axes.set(**words)
    return image


def draw_lambda_map(record, folder):
    """Figure 3: lambda1 / lambda2 of every channel (across) of every layer (down), for each mixed component."""
    tables, heads = record["lambdas"], record["model_config"]["n_head"]
    every = np.concatenate([ratio(table).flatten() for table in tables.values()])
    limits = np.percentile(every[np.isfinite(every)], (2, 98))
    page = page_of(tables, f"{record['label']}\n{RATIO} of every channel")
    for axes, (s, table) in zip(page.axes, tables.items()):
        image = draw_map(axes, ratio(table), limits, title=NAMES[s], ylabel="layer",
                         xlabel="head (its channels side by side)")
        rows = range(0, len(table["layers"]), 1 + len(table["layers"]) // 13)
        axes.set_yticks(rows, [table["layers"][row] for row in rows])
        width, step = len(table["anchor"][0]) / heads, max(1, heads // 8)
        if width >= 1:
            axes.set_xticks([width * (head + 0.5) - 0.5 for head in range(0, heads, step)], range(1, heads + 1, step))
        else:
            axes.set(xticks=[], xlabel="one for all heads and channels")
    page.figure.colorbar(image, ax=list(page.axes), aspect=40, extend="both",
                         label=f"{RATIO} (limits: 2nd and 98th percentile)")
    return page.finish(folder, f"lambda_map_{record['label']}")


def draw_gamma(record, folder):
    """Dynamic weights by layer: mean over tokens, with one standard deviation up and down."""
    tables = record["gammas"]
    page = page_of(tables, f"{record['label']}\nweights of anchor and current projection (Eq. 11)")
    for axes, (s, table) in zip(page.axes, tables.items()):
        for slot, aside, style in GAMMA_STYLES:                             # aside: so that the bars do not overlap
            axes.errorbar(np.array(table["layers"]) + aside, table[slot]["mean"], yerr=table[slot]["std"], capsize=3,
                          linewidth=1.6, **style)
        axes.set(xlabel="layer", ylabel="mean and std over tokens", ylim=(0, 1), title=NAMES[s])
    return page.finish(folder, f"gamma_{record['label']}")


def draw_similarity(record, folder):
    """Cosines between tokens of the first row in three layers, and between the layers."""
    maps, alike = record["token_maps"], numbers(record["hidden_similarity"])
    squares = [numbers(square) for square in maps["maps"]]
    limits = (min(0, min(square.min() for square in squares), alike.min()), 1)
    page = Page(2, 2, f"{record['label']}: cosine similarity", width=4.7)
    for axes, layer, square in zip(page.axes, maps["layers"], squares):
        title = f"tokens, layer {layer}" if layer else "tokens, embedding"
        image = draw_map(axes, square, limits, "equal", title=title, xlabel="position", ylabel="position")
        ticks = np.linspace(0, len(square) - 1, 5).round().astype(int)
        axes.set_xticks(ticks, [maps["positions"][tick] for tick in ticks])
        axes.set_yticks(ticks, [maps["positions"][tick] for tick in ticks])
    draw_map(page.axes[3], alike, limits, "equal", title="layers, same token", xlabel="layer (0: embedding)",
             ylabel="layer")
    number_layers(page.axes[3])
    page.figure.colorbar(image, ax=list(page.axes), aspect=40, label="cosine")
    return page.finish(folder, f"similarity_{record['label']}")


def draw(records, folder):
    """Every picture that the records have the numbers for; yields the paths."""
    import matplotlib
    matplotlib.use("Agg")
    styles = styles_of(records)
    yield draw_by_layer(records, styles, BY_LAYER, "Attention and hidden states, layer by layer", folder, "by_layer")
    yield draw_layers(records, styles, folder)
    gated = [record for record in records if "gate_mean" in record["by_layer"]]
    mixed = [record for record in records if record["lambdas"] and not record["ablate_anchor"]]       # same lambdas
    if gated:
        yield draw_by_layer(gated, styles, GATES, "Gates", folder, "gates")
    if mixed:
        yield draw_lambda_ratio(mixed, styles, folder)
    for record in records:
        yield draw_similarity(record, folder)
        if record in mixed:
            yield draw_lambda_map(record, folder)
        if record["gammas"]:
            yield draw_gamma(record, folder)


def main():
    parser = argparse.ArgumentParser(description="Pictures of what table2.py measured.", allow_abbrev=False)
    parser.add_argument("records", nargs="+", metavar="JSON", help="files that table2.py wrote")
    parser.add_argument("--out", default="out/figures", metavar="DIR",
                        help="folder for the pictures (default: out/figures)")
    args = parser.parse_args()
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("figures.py: matplotlib is not installed; pip install -r paper/requirements.txt")
    try:
        records = [read_record(path) for path in args.records]
        labels = [record["label"] for record in records]
        twice = [label for label in labels if labels.count(label) > 1]
        if twice:
            raise UserError(f"two files have the label {twice[0]}, so one's pictures would replace the other's: "
                             "rename a run folder and run table2.py again")
        for path in draw(records, args.out):
            print(f"wrote {path}", flush=True)
    except (UserError, OSError) as error:
        sys.exit(f"figures.py: {error}")


if __name__ == "__main__":
    main()
