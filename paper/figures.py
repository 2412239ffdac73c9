"""
Pictures of what table2.py measured.

    python paper/figures.py out/analysis/*.json --out=out/figures

    by_layer.png            attention sink and entropy, token similarity, PCA core features
    gates.png               mean gate, and share of gates below 0.2: all with a gate
    layers.png              likeness of hidden states to the embedding, and to the layer before
    lambda_ratio_mean.png   mean of lambda1 / lambda2 over channels, as the released Figure 4
    lambda_ratio.png        its median, which a lambda2 near zero does not rule
    anchor_use.png          the anchor's share of what is mixed, by layer: all with an anchor
    anchor_use_LABEL.png    the same by layer and position, one for each with an anchor
    lambda_map_LABEL.png    lambda1 / lambda2 of every channel of every layer (Figure 3)
    gamma_LABEL.png         weights of Eq. 11, mean and standard deviation over tokens
    similarity_LABEL.png    token-similarity maps of three layers; likeness of all layers

A row of Table 3 has the same colour, line and marker in every picture, Figure 1b of compare.py
included. What is no such row has a look of its own, which is no row's; in the curves of compare.py
and sweep.py so has a row trained otherwise (an ablation). With the anchor removed: hollow markers.
Maps get lighter as numbers grow, so that all can be read in black and white.
"""

import argparse
import importlib.util
import os
import sys

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from analysis import anchor_share, ratio
from model import TABLE_3
from prepare_fineweb import UserError, atomic_write, command_line, json_lines

BY_LAYER = {  # what is in by_layer.png: the axis of each panel
    "attention_sink": "attention to the first token",
    "attention_entropy": "attention entropy (nats)",
    "token_similarity": "token similarity (mean cosine)",
    "pca_core_features": "PCA core features (99 % of variance)",
}
GATES = {
    "gate_mean": "mean gate",
    "gate_sparsity": "share of gates below 0.2",
}
NAMES = {"q": "queries", "k": "keys", "v": "values", "g": "gates"}
RATIO = "$\\lambda_1 / \\lambda_2$"
TERMS = "the norms of $\\gamma_1 \\lambda_1 S_{anc}$ and $\\gamma_2 \\lambda_2 S_n$"
WANTED = {  # of a file of table2.py
    "label",
    "variant",
    "ablate_anchor",
    "by_layer",
    "lambdas",
    "gammas",
    "anchor_use",
    "token_maps",
    "hidden_similarity",
    "model_config",
}
DPI = 130
LEGEND = 130  # characters that fit below a picture of two columns

FAMILY_STYLES = {  # (colour, line, marker) of a variant without its granularity
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
OTHER_STYLES = (  # what is no row of Table 3 has these in turn: no colour and no marker of a row
    ("#7B2CBF", "-", "<"),
    ("#1B7837", "--", ">"),
    ("#C51B7D", "-.", "d"),
    ("#3F51B5", ":", "H"),
    ("#A50026", (0, (6, 2)), "8"),
    ("#00838F", (0, (3, 1, 1, 1)), "x"),
    ("#6B8E23", (0, (5, 1, 1, 1, 1, 1)), "+"),
    ("#FF7F7F", (0, (8, 2, 2, 2)), "1"),
    ("#5C4033", (0, (2, 2)), "2"),
    ("#9E9AC8", (0, (1, 1)), "|"),
)


# ---- Figure 1b -----------------------------------------------------------------------------------


def draw_curves(groups, path):
    """Figure 1b of compare.py's groups: losses over tokens, and the last two fifths enlarged.

    A row of several seeds has a band from the lowest to the highest.
    """
    longest = max((run.tokens for group in groups for run in group.runs), default=0)
    unit, word = token_unit(longest)
    what = "byte" if groups and all_in_bytes(groups) else "token"
    page = Page(1, 2, title_of_curves(groups), height=4.2)
    late = []
    for group, style in zip(groups, styles_of(map(row_of, groups))):
        points = [(tokens / unit, *losses) for tokens, *losses in group.curve() if tokens > 0]
        if points:
            draw_curve(page, points, group, style)
        for tokens, *losses in points:
            late += losses if tokens >= 0.6 * longest / unit else []
    for axes in page.axes:
        axes.set(xlabel=f"training {what}s ({word})", ylabel=f"validation loss (nats per {what})")
    if late:
        margin = 0.05 * (max(late) - min(late)) + 1e-3
        page.axes[1].set(
            title="the end, enlarged",
            xlim=(0.6 * longest / unit, None),
            ylim=(min(late) - margin, max(late) + margin),
        )
    return page.finish(path)


def draw_curve(page, points, group, style):
    """One group, [(tokens, mean loss, lowest, highest)], in both panels."""
    tokens, means, lowest, highest = zip(*points)
    for axes in page.axes:
        page.line(axes, tokens, means, group.label, style)
        if len(group.runs) > 1:
            color = style["color"]
            axes.fill_between(tokens, lowest, highest, color=color, alpha=0.15, linewidth=0)


def row_of(group):
    """(variant, whether its anchor is removed) for `styles_of`; no variant where it is changed."""
    return ("" if group.changes else group.variant, False)


def all_in_bytes(groups):
    return all(group.settings.get("tokenizer") == "bytes" for group in groups)


def title_of_curves(groups):
    """What the picture shows: how large the models are, how many seeds."""
    sizes = [run.parameters for group in groups for run in group.runs if run.parameters]
    seeds = max((len(group.runs) for group in groups), default=0)
    title = "Validation loss"
    if sizes:
        sizes = dict.fromkeys(f"{size / 1e6:.1f}" for size in (min(sizes), max(sizes)))
        title += f" of models with {' to '.join(sizes)} million parameters"
    return f"{title}; bands: lowest to highest seed" if seeds > 1 else title


def token_unit(most):
    """The unit of an axis of tokens that ends at `most`, and its name."""
    if most >= 1e9:
        return 1e9, "billions"
    return (1e6, "millions") if most >= 1e6 else (1e3, "thousands")


# ---- curves of all checkpoints -------------------------------------------------------------------


def draw_by_layer(records, styles, panels, title, path):
    """Panels of one quantity each, a curve for each checkpoint; layer 0 is the embedding."""
    page = Page(len(panels) // 2, 2, title)
    for axes, (quantity, words) in zip(page.axes, panels.items()):
        for record, style in zip(records, styles):
            if quantity in record["by_layer"]:
                y = record["by_layer"][quantity]
                first = record["model_config"]["n_layer"] + 1 - len(y)
                page.line(axes, range(first, first + len(y)), y, record["label"], style)
        whole_numbers(axes)
        axes.set(xlabel="layer (0: embedding)" if first == 0 else "layer", ylabel=words)
    return page.finish(path)


def draw_layers(records, styles, path):
    """Likeness of hidden states to the embedding (Figure 2f) and to those of the layer before."""
    page = Page(1, 2, "Hidden states of the same token in two layers")
    for record, style in zip(records, styles):
        alike = np.array(record["hidden_similarity"])
        layers = range(1, len(alike))
        page.line(page.axes[0], layers, alike[0, 1:], record["label"], style)
        page.line(page.axes[1], layers, np.diagonal(alike, 1), record["label"], style)
    for axes, other in zip(page.axes, ("embedding", "layer before")):
        whole_numbers(axes)
        axes.set(xlabel="layer", ylabel=f"mean cosine to the {other}")
    return page.finish(path)


def draw_lambda_ratio(records, styles, average, name, path):
    """lambda1 / lambda2 by layer, its mean or median over channels: Figure 4."""

    def measure(record, s):
        return average(ratio(record["lambdas"][s]), axis=(1, 2))

    title = f"{name} over channels of {RATIO}"
    return draw_by_letter(records, styles, measure, 1, RATIO, title, path)


def draw_anchor_use(records, styles, path):
    """The anchor's share of the norms by layer."""

    def measure(record, s):
        return anchor_share(record["anchor_use"][s])[0]

    title = f"Anchor's share of {TERMS}"
    return draw_by_letter(records, styles, measure, 0.5, "anchor's share", title, path)


def draw_by_letter(records, styles, measure, level, words, title, path):
    """A panel for each letter, a curve measure(record, letter) for each record that mixes it.

    `level` is the line where anchor and layer weigh the same.
    """
    page = Page(2, 2, title)
    for axes, (s, name) in zip(page.axes, NAMES.items()):
        largest = 0
        for record, style in zip(records, styles):
            if s in mixed_letters(record):
                y = measure(record, s)
                largest = max(largest, np.abs(y).max())
                page.line(axes, record["lambdas"][s]["layers"], y, record["label"], style)
        if largest > 4:
            axes.set_yscale("symlog", linthresh=2)  # a lambda2 near zero would flatten the rest
        axes.axhline(level, color="black", linewidth=0.8)
        whole_numbers(axes)
        axes.set(xlabel="layer", ylabel=words, title=name)
    return page.finish(path)


def mixed_letters(record):
    """The letters whose lambdas say something: none where the anchor is removed."""
    return [] if record["ablate_anchor"] else list(record["lambdas"])


# ---- pictures of one checkpoint, mostly maps -----------------------------------------------------


def draw_lambda_map(record, path):
    """Figure 3: lambda1 / lambda2 of every channel (across) of every layer (down), by letter."""
    ratios = {s: ratio(table) for s, table in record["lambdas"].items()}
    limits = inner_limits(np.concatenate([values.flatten() for values in ratios.values()]))
    page = page_of(ratios, f"{record['label']}\n{RATIO} of every channel")
    for axes, (s, values) in zip(page.axes, ratios.items()):
        layers, heads, _ = values.shape
        image = heat_map(
            axes,
            values.reshape(layers, -1),
            limits,
            across=range(1, heads + 1),
            down=record["lambdas"][s]["layers"],
            title=NAMES[s],
            ylabel="layer",
            xlabel="head (its channels side by side)" if heads > 1 else "one for all heads",
        )
    page.color_bar(image, page.axes, f"{RATIO} (limits: 2nd and 98th percentile)", extend="both")
    return page.finish(path)


def draw_use_map(record, path):
    """The anchor's share of the norms by position (across) and layer (down), by letter."""
    shares = {s: anchor_share(table)[1] for s, table in record["anchor_use"].items()}
    limits = inner_limits(np.concatenate([values.flatten() for values in shares.values()]))
    page = page_of(shares, f"{record['label']}\nanchor's share of {TERMS}")
    for axes, (s, values) in zip(page.axes, shares.items()):
        octaves = ["0", "1"]
        octaves += [f"{2**i}-{2 ** (i + 1) - 1}" for i in range(1, values.shape[1] - 1)]
        image = heat_map(
            axes,
            values,
            limits,
            across=octaves,
            down=record["anchor_use"][s]["layers"],
            title=NAMES[s],
            xlabel="position",
            ylabel="layer",
        )
    page.color_bar(image, page.axes, "anchor's share", extend="both")
    return page.finish(path)


def draw_gamma(record, path):
    """Dynamic weights by layer: mean over tokens, with one standard deviation up and down."""
    page = page_of(record["gammas"], f"{record['label']}\nweights of anchor and layer (Eq. 11)")
    anchor = dict(label="$\\gamma_1$, anchor", color="#D55E00", linestyle="-", marker="o")
    current = dict(label="$\\gamma_2$, current", color="#0072B2", linestyle="--", marker="s")
    current["fillstyle"] = "none"
    for axes, (s, table) in zip(page.axes, record["gammas"].items()):
        layers = np.array(table["layers"])
        for slot, aside, style in (("anchor", -0.08, anchor), ("current", 0.08, current)):
            moments = table[slot]
            axes.errorbar(
                layers + aside,  # so that the bars do not overlap
                moments["mean"],
                yerr=moments["std"],
                capsize=3,
                linewidth=1.6,
                **style,
            )
        whole_numbers(axes)
        axes.set(xlabel="layer", ylabel="mean and std over tokens", ylim=(0, 1), title=NAMES[s])
    return page.finish(path)


def draw_similarity(record, path):
    """Cosines between tokens of the first row in three layers, and between the layers."""
    maps = record["token_maps"]
    alike = np.array(record["hidden_similarity"])
    limits = (min(0, np.min(maps["maps"]), alike.min()), 1)
    page = Page(2, 2, f"{record['label']}: cosine similarity", width=4.7)
    for axes, layer, square in zip(page.axes, maps["layers"], maps["maps"]):
        heat_map(
            axes,
            square,
            limits,
            across=maps["positions"],
            down=maps["positions"],
            aspect="equal",
            xlabel="position",
            ylabel="position",
            title=f"tokens, layer {layer}" if layer else "tokens, embedding",
        )
    image = heat_map(
        page.axes[3],
        alike,
        limits,
        across=range(len(alike)),
        down=range(len(alike)),
        aspect="equal",
        title="layers, same token",
        xlabel="layer (0: embedding)",
        ylabel="layer",
    )
    page.color_bar(image, page.axes, "cosine")
    return page.finish(path)


# ---- what pictures share -------------------------------------------------------------------------


def pyplot():
    """matplotlib.pyplot, set to draw into files. UserError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("matplotlib is not installed; pip install matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def variant_style(variant):
    """matplotlib's color, linestyle, marker and fillstyle of a row of Table 3."""
    family, _, granularity = variant.rpartition("_")
    if granularity not in FILLS:
        family = variant
    color, line, marker = FAMILY_STYLES[family]
    fill = FILLS.get(granularity, "full")
    return dict(color=color, linestyle=line, marker=marker, fillstyle=fill)


def styles_of(rows):
    """A style for each of some rows (variant, whether its anchor is removed).

    The first of a variant has the variant's own; what is no variant, or one for the second time,
    has one of OTHER_STYLES.
    """
    styles = []
    seen = []
    others = 0
    for row in rows:
        variant, ablated = row
        if variant in TABLE_3 and row not in seen:
            style = variant_style(variant)
        else:
            color, line, marker = OTHER_STYLES[others % len(OTHER_STYLES)]
            style = dict(color=color, linestyle=line, marker=marker, fillstyle="full")
            others += 1
        if ablated:
            style.update(fillstyle="none", linestyle=":")
        styles.append(style)
        seen.append(row)
    return styles


class Page:
    """A figure of rows x columns panels of width x height inches, with one legend under them."""

    def __init__(self, rows, columns, title, width=5.0, height=3.4):
        size = (width * columns, 0.6 + height * rows)
        self.figure, axes = pyplot().subplots(
            rows,
            columns,
            figsize=size,
            dpi=DPI,
            layout="constrained",
        )
        self.axes = np.atleast_1d(axes).flatten()
        self.figure.suptitle(title, fontsize=13)

    def line(self, axes, x, y, label, style):
        """One curve. A long one has a marker on some of its points only, each curve on others."""
        step = 1 + len(y) // 16
        axes.plot(
            x,
            y,
            label=label,
            linewidth=1.6,
            markersize=7,
            markerfacecoloralt="white",
            markevery=(len(axes.lines) % step, step),
            **style,
        )

    def color_bar(self, image, axes, label, **options):
        """The colours of some panels' maps, beside them."""
        self.figure.colorbar(image, ax=list(axes), aspect=40, label=label, **options)

    def finish(self, path):
        """Grid and one legend where there are curves; written and closed. Returns the path."""
        curves = {}
        for axes in self.axes:
            if axes.lines:
                axes.grid(alpha=0.3)
                handles, labels = axes.get_legend_handles_labels()
                curves.update(zip(labels, handles))
        if curves:
            longest = max(map(len, curves))
            self.figure.legend(
                curves.values(),
                curves.keys(),
                loc="outside lower center",
                ncols=min(len(curves), max(1, LEGEND // (10 + longest))),
                fontsize=10,
                handlelength=4,
            )
        with atomic_write(path) as file:
            self.figure.savefig(file, format="png")
        pyplot().close(self.figure)
        return path


def page_of(tables, title):
    """A page with one panel for each component in `tables`, two in a row."""
    page = Page((len(tables) + 1) // 2, min(2, len(tables)), title)
    for axes in page.axes[len(tables) :]:
        axes.set_axis_off()
    return page


def whole_numbers(axes):
    """Ticks at whole numbers only on the horizontal axis, which counts layers."""
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)


def heat_map(axes, values, limits, across, down, aspect="auto", names_shown=8, **words):
    """A map of (rows, columns), lighter for greater numbers; nan is white.

    Beyond `limits` the colour is that of the limit. `across` and `down` name equal parts of its
    columns and rows, of which at most `names_shown` are shown.
    """
    image = axes.imshow(
        values,
        cmap="cividis",
        vmin=limits[0],
        vmax=limits[1],
        aspect=aspect,
        interpolation="nearest",
    )
    rows, columns = np.shape(values)
    axes.set_yticks(*places_of(down, rows, names_shown))
    axes.set_xticks(*places_of(across, columns, names_shown))
    axes.set(**words)
    return image


def places_of(names, length, names_shown):
    """(the middles of equal parts of `length` rows, their names), of at most `names_shown`."""
    width = length / len(names)
    step = -(-len(names) // names_shown)  # rounded up
    shown = range(0, len(names), step)
    return [(i + 0.5) * width - 0.5 for i in shown], [names[i] for i in shown]


def inner_limits(values):
    """The 2nd and 98th percentile of what is finite: limits of a map that no outlier rules."""
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, (2, 98)) if len(finite) else (0.0, 0.0)
    return (low, high) if low < high else (low - 0.5, high + 0.5)  # all alike: the middle colour


# ---- command -------------------------------------------------------------------------------------


def read_lines_of(script, path, kind, convert):
    """[convert(record)] of a file that a script wrote, one a line. UserError where it is none."""
    with open(path, "rb") as file:
        records = list(json_lines(file, path, kind, convert))
    if not records:
        raise UserError(f"{path}: no records in it; make it with python paper/{script}")
    return records


def read_records(path):
    """The records in a file that table2.py wrote."""
    return read_lines_of("table2.py", path, "a record of this paper/table2.py", complete)


def complete(record):
    """The record. KeyError for what it lacks."""
    lacks = WANTED - set(record)
    if lacks:
        raise KeyError(", ".join(sorted(lacks)))
    return record


def draw(records, folder):
    """Every picture that the records have the numbers for; yields the paths."""

    def path(name):
        return os.path.join(folder, f"{name}.png")

    styles = styles_of((record["variant"], record["ablate_anchor"]) for record in records)
    title = "Attention and hidden states, layer by layer"
    yield draw_by_layer(records, styles, BY_LAYER, title, path("by_layer"))
    yield draw_layers(records, styles, path("layers"))
    if any("gate_mean" in record["by_layer"] for record in records):
        yield draw_by_layer(records, styles, GATES, "Gates", path("gates"))
    if any(map(mixed_letters, records)):
        yield draw_lambda_ratio(records, styles, np.median, "Median", path("lambda_ratio"))
        yield draw_lambda_ratio(records, styles, np.mean, "Mean", path("lambda_ratio_mean"))
        yield draw_anchor_use(records, styles, path("anchor_use"))
    for record in records:
        label = record["label"]
        if record["token_maps"]:
            yield draw_similarity(record, path(f"similarity_{label}"))
        if mixed_letters(record):
            yield draw_lambda_map(record, path(f"lambda_map_{label}"))
            yield draw_use_map(record, path(f"anchor_use_{label}"))
        if record["gammas"]:
            yield draw_gamma(record, path(f"gamma_{label}"))


def main():
    parser = argparse.ArgumentParser(
        description="Pictures of what table2.py measured.", allow_abbrev=False
    )
    parser.add_argument("records", nargs="+", metavar="JSON", help="files that table2.py wrote")
    parser.add_argument(
        "--out",
        default="out/figures",
        metavar="DIR",
        help="folder for the pictures (default: out/figures)",
    )
    args = parser.parse_args()
    records = [record for path in args.records for record in read_records(path)]
    labels = [record["label"] for record in records]
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise UserError(
            f"two records have the label {twice[0]}, so one's pictures would replace the other's: "
            "rename a run folder and run table2.py again"
        )
    os.makedirs(args.out, exist_ok=True)
    for path in draw(records, args.out):
        print(f"wrote {path}", flush=True)


if __name__ == "__main__":
    command_line(main)
