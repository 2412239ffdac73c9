"""
Pictures of what table2.py measured.

    python paper/figures.py out/analysis/*.json --out=out/figures

    by_layer.png            attention sink and entropy, token similarity, PCA core features: all checkpoints, by layer
    gates.png               mean gate, and share of gates below 0.2: all with a gate
    layers.png              likeness of a layer's hidden states to the embedding, and to the layer before
    lambda_ratio.png        median lambda1 / lambda2 of q, k, v, g (Figure 4): all with an anchor
    anchor_use.png          the anchor's share of what is mixed, by layer: all with an anchor
    anchor_use_LABEL.png    the same by layer and position, one for each with an anchor
    lambda_map_LABEL.png    lambda1 / lambda2 of every channel of every layer (Figure 3), one for each with an anchor
    gamma_LABEL.png         weights of Eq. 11, mean and standard deviation over tokens, one for each dynamic model
    similarity_LABEL.png    token-similarity maps of three layers; likeness of all layers to each other, one for each

A variant has the same colour, line and marker in every picture, Figure 1b of compare.py included; no two share a
marker, and the maps get lighter as numbers grow, so that all can be read in black and white. With the anchor removed:
hollow markers.
"""
import argparse
import importlib.util
import json
import os
import sys

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from analysis import anchor_share, ratio
from model import TABLE_3, InputError
from prepare_fineweb import UserError, atomic_write, command_line

BY_LAYER = {  # what is in by_layer.png: the axis of each panel
    "attention_sink": "attention to the first token", "attention_entropy": "attention entropy (nats)",
    "token_similarity": "token similarity (mean cosine)", "pca_core_features": "PCA core features (99 % of variance)",
}
GATES = {"gate_mean": "mean gate", "gate_sparsity": "share of gates below 0.2"}
RATIO = "$\\lambda_1 / \\lambda_2$"
TERMS = "the norms of $\\gamma_1 \\lambda_1 S_{anc}$ and $\\gamma_2 \\lambda_2 S_n$"
GAMMA_STYLES = (
    ("anchor", -0.08, dict(label="$\\gamma_1$, anchor", color="#D55E00", linestyle="-", marker="o")),
    ("current", 0.08, dict(label="$\\gamma_2$, current", color="#0072B2", linestyle="--", marker="s", fillstyle="none"))
)
WANTED = {"label", "variant", "ablate_anchor", "by_layer", "lambdas", "gammas", "anchor_use", "token_maps",
          "hidden_similarity", "model_config"}                                                # of a file of table2.py
NAMES = {"q": "queries", "k": "keys", "v": "values", "g": "gates"}
DPI, LEGEND = 130, 135                                         # characters that fit below a picture of two columns

FAMILY_STYLES = {  # (colour, line, marker) of a variant without its granularity; no two share a marker
    "base": ("#000000", "-", "o"),
    "gated": ("#777777", "--", "s"),
    "resformer": ("#009E73", "-.", "^"),
    "naive": ("#8B4513", ":", "v"),
    "nuresformer_qknorm": ("#56B4E9", (0, (1, 1)), "P"),
    "nuresformer_vg": ("#CC79A7", (0, (3, 1, 1, 1)), "X"),
    "nuresformer": ("#0072B2", (0, (6, 2)), "D"),
    "exo_nonorm": ("#B8860B", (0, (2, 2)), "p"),
    "exo_dynamic": ("#E69F00", (0, (8, 2, 2, 2)), "h"),
    "exo": ("#D55E00", (0, (5, 1, 1, 1, 1, 1)), "*"),
}
FILLS = {"headwise": "none", "scalar": "left"}


# -------------------------------------------------------------------------------------------------- what pictures share

def pyplot():
    """matplotlib.pyplot, set to draw into files. UserError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("matplotlib is not installed; pip install -r paper/requirements.txt")
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def variant_style(variant):
    """matplotlib's color, linestyle, marker and fillstyle of a variant of Table 3, the same in every picture."""
    family, _, granularity = variant.rpartition("_")
    family, granularity = (family, granularity) if granularity in FILLS else (variant, "")
    color, line, marker = FAMILY_STYLES[family]
    return dict(color=color, linestyle=line, marker=marker, fillstyle=FILLS.get(granularity, "full"))


def styles_of(rows):
    """A style for each of some rows (variant, whether its anchor is removed). The first of a variant has the variant's
    own, all others have one of a variant that is not here, those first that differ by more than the filling."""
    here = [variant for variant, _ in rows]
    free = sorted((variant_style(name) for name in TABLE_3 if name not in here),
                  key=lambda style: style["fillstyle"] != "full") + [variant_style("base")] * len(rows)
    styles = []
    for i, (variant, ablated) in enumerate(rows):
        style = variant_style(variant) if variant in TABLE_3 and rows[i] not in rows[:i] else free.pop(0)
        styles.append({**style, "fillstyle": "none", "linestyle": ":"} if ablated else style)
    return styles


class Page:
    """A figure of rows x columns panels of width x height inches, with one legend under them."""

    def __init__(self, rows, columns, title, width=6.0, height=3.9):
        size = (width * columns, 0.6 + height * rows)
        self.figure, axes = pyplot().subplots(rows, columns, figsize=size, dpi=DPI, layout="constrained")
        self.axes = np.atleast_1d(axes).flatten()
        self.figure.suptitle(title, fontsize=14)

    def line(self, axes, x, y, label, style):
        """One curve. A long one has a marker on some of its points only, each curve on others."""
        step = 1 + len(y) // 16
        axes.plot(x, y, label=label, linewidth=1.6, markersize=7, markerfacecoloralt="white",
                  markevery=(len(axes.lines) % step, step), **style)
        axes.locator_params(axis="x", integer=all(float(value).is_integer() for value in x))           # e.g. layers

    def finish(self, path):
        """Grid and one legend where there are curves; written and closed. Returns the path."""
        curves = {}
        for axes in (axes for axes in self.axes if axes.lines):
            axes.grid(alpha=0.3)
            curves |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels())}
        if curves:
            columns = min(len(curves), max(1, LEGEND // (10 + max(map(len, curves)))))
            self.figure.legend(curves.values(), curves, loc="outside lower center", ncols=columns, fontsize=10,
                               handlelength=4)
        with atomic_write(path) as file:
            self.figure.savefig(file, format="png")
        pyplot().close(self.figure)
        return path


def page_of(tables, title):
    """A page with one panel for each component in `tables`, two in a row."""
    page = Page((len(tables) + 1) // 2, min(2, len(tables)), title)
    for axes in page.axes[len(tables):]:
        axes.set_axis_off()
    return page


def heat_map(axes, values, limits, across, down, aspect="auto", names_shown=8, **words):
    """A map of (rows, columns), lighter for greater; beyond `limits` the colour is that of the limit, and nan is white.
    `across` and `down` name equal parts of its columns and rows; at most `names_shown` of them are shown."""
    image = axes.imshow(values, cmap="cividis", vmin=limits[0], vmax=limits[1], aspect=aspect, interpolation="nearest")
    for set_ticks, names, length in zip((axes.set_yticks, axes.set_xticks), (down, across), np.shape(values)):
        shown, width = range(0, len(names), -(-len(names) // names_shown)), length / len(names)
        set_ticks([(i + 0.5) * width - 0.5 for i in shown], [names[i] for i in shown])
    axes.set(**words)
    return image


def inner_limits(values):
    """The 2nd and 98th percentile of what is finite: the limits of a map that outliers shall not rule."""
    low, high = np.percentile(values[np.isfinite(values)], (2, 98))
    return (low, high) if low < high else (low - 0.5, high + 0.5)                    # all alike: the middle colour


# -------------------------------------------------------------------------------------------------------------- records

def read_record(path):
    """The JSON of one checkpoint. UserError when it is not one that table2.py wrote."""
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
        lacks = WANTED - set(record)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); make it with python paper/table2.py") from None
    if lacks:
        raise UserError(f"{path}: not a file of this paper/table2.py, it lacks {', '.join(sorted(lacks))}")
    return record


# ----------------------------------------------------------------------------------------------------------- Figure 1b

def draw_curves(groups, path):
    """Figure 1b of compare.py's groups: losses over tokens, and the last two fifths of the tokens enlarged. A band goes
    from the lowest to the highest seed."""
    longest = max((run.tokens for group in groups for run in group.runs), default=0)
    unit, word = (1e9, "billions") if longest >= 1e9 else (1e6, "millions")
    page, late = Page(1, 2, "Validation loss; bands: lowest to highest seed", height=4.9), []
    for group, style in zip(groups, styles_of([(group.variant, False) for group in groups])):
        points = [(tokens / unit, *losses) for tokens, *losses in group.curve() if tokens > 0]
        late += [loss for tokens, *losses in points if tokens >= 0.6 * longest / unit for loss in losses]
        tokens, means, lowest, highest = zip(*points) if points else [()] * 4
        for axes in page.axes:
            page.line(axes, tokens, means, group.label, style)
            axes.fill_between(tokens, lowest, highest, color=style["color"], alpha=0.15, linewidth=0)
            axes.set(xlabel=f"training tokens ({word})", ylabel="nats per token")
    if late:
        margin = 0.05 * (max(late) - min(late)) + 1e-3
        page.axes[1].set(xlim=(0.6 * longest / unit, None), ylim=(min(late) - margin, max(late) + margin),
                         title="the end, enlarged")
    return page.finish(path)


# ------------------------------------------------------------------------------------------ curves of all checkpoints

def draw_by_layer(records, styles, panels, title, path):
    """Panels of one quantity each, a curve for each checkpoint; the embedding is layer 0 where it counts."""
    page = Page(len(panels) // 2, 2, title)
    for axes, (quantity, words) in zip(page.axes, panels.items()):
        for record, style in zip(records, styles):
            if quantity in record["by_layer"]:
                y = record["by_layer"][quantity]
                first = record["model_config"]["n_layer"] + 1 - len(y)
                page.line(axes, range(first, first + len(y)), y, record["label"], style)
        axes.set(xlabel="layer (0: embedding)" if first == 0 else "layer", ylabel=words)
    return page.finish(path)


def draw_layers(records, styles, path):
    """Likeness of each layer's hidden states to the embedding (Figure 2f) and to those of the layer before."""
    page = Page(1, 2, "Hidden states of the same token in two layers")
    for record, style in zip(records, styles):
        alike = np.array(record["hidden_similarity"])
        for axes, y, other in zip(page.axes, (alike[0, 1:], np.diagonal(alike, 1)), ("embedding", "layer before")):
            page.line(axes, range(1, len(alike)), y, record["label"], style)
            axes.set(xlabel="layer", ylabel=f"mean cosine to the {other}")
    return page.finish(path)


def draw_by_letter(records, styles, key, measure, level, words, title, path):
    """A panel for each letter and in it measure(its table in record[key]), (layers,), of each record that mixes it with
    an anchor; `level` is the line where anchor and layer weigh the same."""
    page = Page(2, 2, title)
    for axes, (s, name) in zip(page.axes, NAMES.items()):
        for record, style in zip(records, styles):
            if s in mixed_letters(record):
                table = record[key][s]
                page.line(axes, table["layers"], measure(table), record["label"], style)
        if axes.lines and max(np.abs(line.get_ydata()).max() for line in axes.lines) > 4:
            axes.set_yscale("symlog", linthresh=2)             # a lambda2 near zero would flatten all the rest
        axes.axhline(level, color="black", linewidth=0.8)
        axes.set(xlabel="layer", ylabel=words, title=name)
    return page.finish(path)


def mixed_letters(record):
    """The letters whose lambdas say something: none where the anchor is removed."""
    return [] if record["ablate_anchor"] else list(record["lambdas"])


# ------------------------------------------------------------------------------ pictures of one checkpoint, mostly maps

def draw_lambda_map(record, path):
    """Figure 3: lambda1 / lambda2 of every channel (across) of every layer (down), for each mixed letter."""
    ratios = {s: ratio(table) for s, table in record["lambdas"].items()}
    limits = inner_limits(np.concatenate([values.flatten() for values in ratios.values()]))
    page = page_of(ratios, f"{record['label']}\n{RATIO} of every channel")
    for axes, (s, values) in zip(page.axes, ratios.items()):
        layers, heads, _ = values.shape
        image = heat_map(axes, values.reshape(layers, -1), limits, range(1, heads + 1),
                         record["lambdas"][s]["layers"], title=NAMES[s], ylabel="layer",
                         xlabel="head (its channels side by side)" if heads > 1 else "one for all heads and channels")
    page.figure.colorbar(image, ax=list(page.axes), aspect=40, extend="both",
                         label=f"{RATIO} (limits: 2nd and 98th percentile)")
    return page.finish(path)


def draw_use_map(record, path):
    """The anchor's share of the norms by position (across) and layer (down), for each mixed letter."""
    shares = {s: anchor_share(table)[1] for s, table in record["anchor_use"].items()}
    limits = inner_limits(np.concatenate([values.flatten() for values in shares.values()]))
    page = page_of(shares, f"{record['label']}\nanchor's share of {TERMS}")
    for axes, (s, values) in zip(page.axes, shares.items()):
        octaves = ["0", "1"] + [f"{2 ** i}-{2 ** (i + 1) - 1}" for i in range(1, values.shape[1] - 1)]
        image = heat_map(axes, values, limits, octaves, record["anchor_use"][s]["layers"], title=NAMES[s],
                         xlabel="position", ylabel="layer")
    page.figure.colorbar(image, ax=list(page.axes), aspect=40, extend="both", label="anchor's share")
    return page.finish(path)


def draw_gamma(record, path):
    """Dynamic weights by layer: mean over tokens, with one standard deviation up and down."""
    page = page_of(record["gammas"], f"{record['label']}\nweights of anchor and current projection (Eq. 11)")
    for axes, (s, table) in zip(page.axes, record["gammas"].items()):
        for slot, aside, style in GAMMA_STYLES:                             # aside: so that the bars do not overlap
            axes.errorbar(np.array(table["layers"]) + aside, table[slot]["mean"], yerr=table[slot]["std"], capsize=3,
                          linewidth=1.6, **style)
        axes.set(xlabel="layer", ylabel="mean and std over tokens", ylim=(0, 1), title=NAMES[s])
    return page.finish(path)


def draw_similarity(record, path):
    """Cosines between tokens of the first row in three layers, and between the layers."""
    maps, alike = record["token_maps"], np.array(record["hidden_similarity"])
    limits = (min(0, np.min(maps["maps"]), alike.min()), 1)
    page = Page(2, 2, f"{record['label']}: cosine similarity", width=4.7)
    for axes, layer, square in zip(page.axes, maps["layers"], maps["maps"]):
        image = heat_map(axes, square, limits, maps["positions"], maps["positions"], "equal", xlabel="position",
                         ylabel="position", title=f"tokens, layer {layer}" if layer else "tokens, embedding")
    layers = range(len(alike))
    heat_map(page.axes[3], alike, limits, layers, layers, "equal", title="layers, same token",
             xlabel="layer (0: embedding)", ylabel="layer")
    page.figure.colorbar(image, ax=list(page.axes), aspect=40, label="cosine")
    return page.finish(path)


# -------------------------------------------------------------------------------------------------------------- command

def draw(records, folder):
    """Every picture that the records have the numbers for; yields the paths."""
    def path(name):
        return os.path.join(folder, f"{name}.png")

    styles = styles_of([(record["variant"], record["ablate_anchor"]) for record in records])
    yield draw_by_layer(records, styles, BY_LAYER, "Attention and hidden states, layer by layer", path("by_layer"))
    yield draw_layers(records, styles, path("layers"))
    if any("gate_mean" in record["by_layer"] for record in records):
        yield draw_by_layer(records, styles, GATES, "Gates", path("gates"))
    if any(map(mixed_letters, records)):
        yield draw_by_letter(records, styles, "lambdas", lambda table: np.median(ratio(table), axis=(1, 2)), 1, RATIO,
                             f"Median over channels of {RATIO}", path("lambda_ratio"))
        yield draw_by_letter(records, styles, "anchor_use", lambda table: anchor_share(table)[0], 0.5,
                             "anchor's share", f"Anchor's share of {TERMS}", path("anchor_use"))
    for record in records:
        yield draw_similarity(record, path(f"similarity_{record['label']}"))
        if mixed_letters(record):
            yield draw_lambda_map(record, path(f"lambda_map_{record['label']}"))
            yield draw_use_map(record, path(f"anchor_use_{record['label']}"))
        if record["gammas"]:
            yield draw_gamma(record, path(f"gamma_{record['label']}"))


def main():
    parser = argparse.ArgumentParser(description="Pictures of what table2.py measured.", allow_abbrev=False)
    parser.add_argument("records", nargs="+", metavar="JSON", help="files that table2.py wrote")
    parser.add_argument("--out", default="out/figures", metavar="DIR",
                        help="folder for the pictures (default: out/figures)")
    args = parser.parse_args()
    records = [read_record(path) for path in args.records]
    labels = [record["label"] for record in records]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UserError(f"two files have the label {twice[0]}, so one's pictures would replace the other's: rename a "
                        "run folder and run table2.py again")
    os.makedirs(args.out, exist_ok=True)
    for path in draw(records, args.out):
        print(f"wrote {path}", flush=True)


if __name__ == "__main__":
    command_line(main, InputError)
