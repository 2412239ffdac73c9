"""
Compare runs of train.py by their logs: Figure 1b (validation loss over tokens), the final table, and how many fewer
tokens a variant needs to reach a baseline's final loss (the abstracts: 1.84x for `base`, 1.5x for `gated`).

    python paper/compare.py out/paper-base out/paper-gated out/paper-exo_dynamic --png=figure_1b.png --out=compare.json
    python paper/compare.py out/paper-gated out/paper-exo_dynamic --baseline=gated

Runs that differ in their seed alone are one row and one curve: the mean, with the spread beside it. What else runs of
one variant differ in (optimizer, lambda_init, ...) becomes part of their names.
"""

import argparse
import glob
import importlib.util
import json
import math
import os
import pickle
import re
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from model import VARIANTS, ExoFormer, ModelConfig, count_parameters, variant_name
from prepare_fineweb import UserError, atomic_write

# --------------------------------------------------------------------------------------------------------------- 1 runs

NOT_THE_EXPERIMENT = set("""seed out_dir resume device compile deterministic max_minutes batch_size save_every keep
    log_every sample_tokens hellaswag_every""".split())
WHAT_IS_MEASURED = "data tokenizer vocab_size block_size mask_documents eval_tokens final_eval_tokens".split()


@dataclass
class Run:
    """One run folder. points {tokens: validation loss}; settings, variant, parameters are its newest checkpoint's."""

    folder: str
    settings: dict
    variant: str
    parameters: int | None
    points: dict
    tokens: int
    step: int
    tokens_per_second: float

    @property
    def name(self):
        return os.path.basename(os.path.normpath(self.folder))

    @property
    def finished(self):
        return self.step >= self.settings.get("max_steps", self.step)

    @property
    def last(self):
        """The last validation loss."""
        return list(self.points.values())[-1]

    @property
    def experiment(self):
        """What repetitions of a run share: all settings but the seed and those that only steer the run."""
        shared = {name: value for name, value in self.settings.items() if name not in NOT_THE_EXPERIMENT}
        return json.dumps(shared, sort_keys=True) if shared else self.folder

    def comparable(self):
        """points on the same validation tokens: without the last, where --final_eval_tokens made it another set."""
        last_differs = self.finished and self.settings.get("eval_tokens") != self.settings.get("final_eval_tokens")
        return {tokens: loss for tokens, loss in self.points.items() if not (last_differs and tokens == self.tokens)}


def read_log(folder):
    """The records of folder/log.jsonl. A last line that a kill cut short is left out; UserError for any other."""
    path = os.path.join(folder, "log.jsonl")
    try:
        with open(path) as file:
            lines = file.read().split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the run folders of train.py") from None
    records = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line end is empty or torn
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not a JSON record ({error}); remove that line") from None
    if not any("val_loss" in record for record in records):
        raise UserError(f"{path}: no evaluation in it yet; wait for the first, or leave this run out")
    return records


def read_settings(folder):
    """All settings in the newest checkpoint that can be opened, {} where there is none; loads no weights."""
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "ckpt_*.pt")), reverse=True)
    for path in paths:
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return {**checkpoint["train_config"], **checkpoint["model_config"]}
        except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
            print(f"skipped: {path} cannot be opened ({type(error).__name__})", file=sys.stderr)
    return {}


def read_run(folder):
    """The Run in a folder. UserError where its log cannot be used."""
    records, settings = read_log(folder), read_settings(folder)
    variant, parameters = "", None
    if settings:
        config = ModelConfig(
            **{name: value for name, value in settings.items() if name in ModelConfig.__dataclass_fields__}
        )
        with torch.device("meta"):
            parameters = count_parameters(ExoFormer(config))
        name = variant_name(config)
        variant = "" if name == "custom" else name
    rates = [record["tokens"] / record["step"] / record["ms"] * 1000 for record in records if record.get("ms")]
    points = {record["tokens"]: record["val_loss"] for record in records if "val_loss" in record}
    return Run(folder, settings, variant, parameters, points, records[-1]["tokens"], records[-1]["step"],
               statistics.median(rates) if rates else math.nan)


@dataclass
class Group:
    """The runs of one experiment, which differ in their seeds."""

    label: str
    runs: list

    @property
    def variant(self):
        return self.runs[0].variant

    def curve(self):
        """[(tokens, mean loss, lowest, highest)] where all runs were evaluated, on the same validation tokens."""
        curves = [run.comparable() for run in self.runs]
        at = sorted(set.intersection(*map(set, curves)))
        several = [[curve[tokens] for curve in curves] for tokens in at]
        return [(tokens, statistics.fmean(losses), min(losses), max(losses)) for tokens, losses in zip(at, several)]


def group_runs(runs):
    """[Group], in the order given; a label is the variant and whatever tells its experiments apart."""
    members = defaultdict(list)
    for run in runs:
        for twin in members[run.experiment]:
            if twin.settings.get("seed") == run.settings.get("seed"):
                raise UserError(f"{twin.folder} and {run.folder} are one experiment with one seed; give one of them")
        members[run.experiment].append(run)
    by_variant = defaultdict(list)
    for some in members.values():
        by_variant[some[0].variant].append(some[0].settings)
    return [Group(label_of(some[0], by_variant[some[0].variant]), some) for some in members.values()]


def label_of(run, rivals):
    """The variant, and the settings in which its runs differ; for no known variant the folder's name, seedless."""
    if not run.variant:
        return re.sub(r"-seed\d+$", "", run.name)
    names = [name for name in run.settings if name not in NOT_THE_EXPERIMENT]
    telling = [name for name in names if len({repr(settings.get(name)) for settings in rivals}) > 1]
    return " ".join(
        [run.variant] + [f"{name}={run.settings[name] if run.settings[name] != '' else 'none'}" for name in telling]
    )


# ------------------------------------------------------------------------------------------------------------ 2 figures


def tokens_to_reach(curve, level):
    """Tokens at which `curve`, [(tokens, loss)], first comes down to `level`, linear in between; None if never."""
    before = None
    for tokens, loss in curve:
        if loss <= level:
            if before is None or before[1] == loss:
                return tokens
            share = (before[1] - level) / (before[1] - loss)
            return before[0] + share * (tokens - before[0])
        before = tokens, loss
    return None


def token_ratio(group, baseline):
    """The baseline's tokens / tokens at which this group's mean has the baseline's last loss; None if never."""
    base, mine = ([(tokens, loss) for tokens, loss, _, _ in g.curve()] for g in (baseline, group))
    reached = tokens_to_reach(mine, base[-1][1]) if base else None
    return base[-1][0] / reached if reached else None


def measured_otherwise(group, baseline):
    """The settings that make a loss of `group` another quantity than one of `baseline`."""
    return [name for name in WHAT_IS_MEASURED
            if group.runs[0].settings.get(name) != baseline.runs[0].settings.get(name)]


def difference(group, baseline):
    """(mean, its standard error) of loss - baseline's loss over equal seeds, which read equal data; or None. Only of
    runs that have come equally far: the last evaluation may be on more tokens than those before."""
    far = {(run.settings.get("seed"), run.tokens, run.finished): run.last for run in baseline.runs}
    mine = {(run.settings.get("seed"), run.tokens, run.finished): run.last for run in group.runs}
    pairs = [loss - far[key] for key, loss in mine.items() if key in far]
    if not pairs:
        return None, None
    return statistics.fmean(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None


def find_baseline(groups, asked):
    """The group whose label or variant is `asked`; where nothing is, `base` or else the first."""
    named = [g for g in groups if g.label == (asked or "base")] + [g for g in groups if g.variant == (asked or "base")]
    if asked and not named:
        raise UserError(f"--baseline={asked}: no run is of it; there are {', '.join(g.label for g in groups)}")
    return (named or groups)[0]


def rows_of(groups, baseline):
    """The table as a list of dicts, one per group."""
    return [row_of(group, baseline) for group in groups]


def row_of(group, baseline):
    """One line of the table. spread, difference and token_ratio are None where there is nothing to compare."""
    losses, same = [run.last for run in group.runs], not measured_otherwise(group, baseline)
    speed = statistics.fmean(run.tokens_per_second for run in group.runs)
    mean_difference, error = difference(group, baseline) if same and group is not baseline else (None, None)
    return {"label": group.label, "variant": group.variant, "runs": len(group.runs),
            "parameters": group.runs[0].parameters, "layers": group.runs[0].settings.get("n_layer"),
            "tokens": min(run.tokens for run in group.runs), "val_loss": statistics.fmean(losses),
            "spread": statistics.stdev(losses) if len(losses) > 1 else None,
            "val_ppl": math.exp(statistics.fmean(losses)), "difference": mean_difference, "difference_error": error,
            "token_ratio": token_ratio(group, baseline) if same else None,
            "tokens_per_second": speed if math.isfinite(speed) else None}


def show(value, style="{:.4f}"):
    return "-" if value is None else style.format(value)


COLUMNS = {  # heading: how a row shows it
    "variant": lambda r: r["label"],
    "runs": lambda r: str(r["runs"]),
    "layers": lambda r: show(r["layers"], "{}"),
    "parameters": lambda r: show(r["parameters"], "{:,}"),
    "tokens": lambda r: f"{r['tokens']:,}",
    "val loss": lambda r: show(r["val_loss"]),
    "spread": lambda r: show(r["spread"]),
    "perplexity": lambda r: show(r["val_ppl"], "{:.3f}"),
    "loss - baseline": lambda r: show(r["difference"], "{:+.4f}")
    + ("" if r["difference_error"] is None else f" +- {r['difference_error']:.4f}"),
    "tokens ratio": lambda r: show(r["token_ratio"], "{:.2f}x"),
    "tokens/s": lambda r: show(r["tokens_per_second"], "{:,.0f}"),
}


def markdown(rows):
    """The table as lines of markdown, padded to be read as text too."""
    cells = [list(COLUMNS)] + [[cell(row) for cell in COLUMNS.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in cells]


def notes(groups, baseline):
    """What the reader of the table must know."""
    yield (f"spread: standard deviation over seeds. loss - baseline ({baseline.label}): mean over equal seeds +- its "
           "standard error. tokens ratio: the baseline's tokens / tokens to reach its final loss.")
    for group in groups:
        other = [f"{name}={group.runs[0].settings.get(name)}" for name in measured_otherwise(group, baseline)]
        if other:
            yield f"{group.label}: not compared with the baseline, since it was measured with {', '.join(other)}"
    for run in (run for group in groups for run in group.runs):
        if not run.finished:
            yield f"NOT FINISHED: {run.folder} is at step {run.step} of {run.settings['max_steps']}"
        if len(run.comparable()) < len(run.points):
            yield (
                f"{run.name}: the last evaluation has other tokens (--final_eval_tokens) than those before; curve and "
                "ratio leave it out"
            )


# ------------------------------------------------------------------------------------------------------------ 3 picture

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


def variant_style(variant):
    """matplotlib's color, linestyle, marker and fillstyle of a variant of Table 3, the same in every picture."""
    family, _, granularity = variant.rpartition("_")
    family, granularity = (family, granularity) if granularity in FILLS else (variant, "")
    color, line, marker = FAMILY_STYLES[family]
    return dict(color=color, linestyle=line, marker=marker, fillstyle=FILLS.get(granularity, "full"))


def styles_of(groups):
    """A style for each group: the first of a variant has the variant's own, others that of a variant not here."""
    here = [group.variant for group in groups]
    free = [variant_style(name) for name in VARIANTS if name not in here] + [variant_style("base")] * len(groups)
    return [variant_style(variant) if variant and variant not in here[:i] else free.pop(0)
            for i, variant in enumerate(here)]


def draw(groups, baseline, path):
    """Write the picture: the curves on the left, the last two fifths of the tokens enlarged on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    longest = max(run.tokens for group in groups for run in group.runs)
    unit, word = (1e9, "billions") if longest >= 1e9 else (1e6, "millions")
    figure, (whole, late) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for i, (group, style) in enumerate(zip(groups, styles_of(groups))):
        points = [point for point in group.curve() if point[0] > 0]
        tokens, mean, low, high = zip(*((t / unit, m, a, b) for t, m, a, b in points)) if points else ((), (), (), ())
        for axes in (whole, late):
            marked = range(len(tokens))[i % 4 :: max(1, len(tokens) // 10)]  # staggered, to hide no others
            axes.plot(tokens, mean, label=group.label, linewidth=1.6, markevery=list(marked), **style)
            if len(group.runs) > 1:
                axes.fill_between(tokens, low, high, color=style["color"], alpha=0.15, linewidth=0)
    level = [loss for _, loss, _, _ in baseline.curve()][-1:]
    for axes in (whole, late):
        if level:
            axes.axhline(level[0], color="#444444", linewidth=0.8, linestyle=":", label=f"last of {baseline.label}")
        axes.set(xlabel=f"training tokens ({word})", ylabel="validation loss (nats per token)")
        axes.grid(alpha=0.25)
    enlarge(late, groups, 0.6 * longest, unit)
    bands = ", bands: lowest to highest seed" if any(len(group.runs) > 1 for group in groups) else ""
    whole.set_title("whole run" + bands)
    whole.legend(fontsize=9, handlelength=4)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)
    pyplot.close(figure)


def enlarge(axes, groups, start, unit):
    """Limit `axes` to the curves from `start` tokens on."""
    late = [loss for group in groups for tokens, *losses in group.curve() if tokens >= start for loss in losses]
    if late:
        margin = 0.05 * (max(late) - min(late)) + 1e-3
        axes.set(xlim=(start / unit, None), ylim=(min(late) - margin, max(late) + margin), title="the end, enlarged")


def summarise(folders, baseline=""):
    """(groups, the baseline among them, table rows, remarks) of run folders."""
    groups = group_runs([read_run(folder) for folder in folders])
    base = find_baseline(groups, baseline)
    return groups, base, rows_of(groups, base), list(notes(groups, base))


def can_draw():
    return importlib.util.find_spec("matplotlib") is not None


def write(groups, base, rows, remarks, out="", png=""):
    """Write table and curves to the JSON file `out` and the picture to `png`, where they are asked for."""
    if out:
        curves = {group.label: group.curve() for group in groups}
        with atomic_write(out) as file:
            file.write(json.dumps({"baseline": base.label, "rows": rows, "notes": remarks, "curves": curves},
                                  indent=1).encode())
    if png and can_draw():
        draw(groups, base, png)
    elif png:
        print("no picture: it needs matplotlib (pip install -r paper/requirements.txt)", file=sys.stderr)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Compare runs of train.py by their logs.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; repetitions with other seeds are averaged")
    parser.add_argument("--baseline", default="",
                        help="variant whose final loss is to be reached (default: base, else the first run)")
    parser.add_argument("--png", default="", help="write the picture of Figure 1b to this file")
    parser.add_argument("--out", default="", help="write table and curves to this JSON file")
    args = parser.parse_args(argv)
    try:
        for path in filter(None, (args.out, args.png)):
            if not os.path.isdir(os.path.dirname(path) or "."):
                raise UserError(f"{path}: its folder does not exist")
        groups, base, rows, remarks = summarise(args.runs, args.baseline)
        print("\n".join(markdown(rows) + [""] + remarks))
        write(groups, base, rows, remarks, args.out, args.png)
    except (UserError, OSError) as error:
        sys.exit(f"compare.py: {error}")


if __name__ == "__main__":
    main()
