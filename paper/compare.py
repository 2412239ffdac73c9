"""
Compare runs of train.py by their logs: the table of validation losses beside the paper's
perplexities, Figure 1b (loss over tokens), how many fewer tokens reach a baseline's final loss (the
abstracts: 1.84x for base, 1.5x for gated), and what each idea of the paper changes, as the
difference of two rows.

    python paper/compare.py out/paper-base out/paper-gated out/paper-exo --png=figure_1b.png
    python paper/compare.py out/paper-* --out=runs.jsonl              keep the runs in a small file
    python paper/compare.py seed1.jsonl seed2.jsonl --png=curves.png  from such files, or sweep.py's
    python paper/compare.py runs.jsonl --test="exo - gated"           rows of one's own choice
    python paper/compare.py runs.jsonl --test="exo - gated from 1000000 to 9000000"
                                       how much that difference changes between two evaluations

Runs that differ in their seed alone are one row and one curve; a seed that only some rows have is
compared where it is. A row's name is its variant and what it was trained with, where that is not
the default and other rows of the variant have it otherwise.

A difference is the mean over equal seeds, with half of its 95 % interval (Student's t). One
variance serves a whole family, a baseline and the rows that are compared with it: what is left of
their losses when each row's mean and each seed's mean are taken away. A family with fewer than five
degrees of freedom uses the variance of the whole table. A star marks what survives Holm's
correction at 5 % over its family. All differences of --test are corrected together; changes of a
difference have their own variance, not that of the losses.

A file of --out holds one run a line: settings, evaluations, commit, torch version, machine and
command. The machine is the one that writes the file, so write it where the runs were trained.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, fields, replace

import torch

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, ROOT)

from figures import draw_curves, pyplot
from model import (
    TABLE_3,
    VARIANTS,
    DamagedCheckpoint,
    ExoFormer,
    InputError,
    ModelConfig,
    checkpoints_in,
    count_parameters,
    read_checkpoint,
    variant_name,
)
from prepare_fineweb import UserError, atomic_write, command_line, json_lines
from train import TrainConfig

# ------------------------------------------------------------------------------------------ 1 runs

SETTINGS = [*fields(TrainConfig), *fields(ModelConfig)]
NOT_THE_EXPERIMENT = {f.name for f in SETTINGS if not f.metadata.get("experiment", True)}
NOT_THE_EXPERIMENT.add("max_minutes")  # a setting of older code
WHAT_IS_MEASURED = [f.name for f in SETTINGS if f.metadata.get("measures", False)]
# also of settings that a run of older code did not have
DEFAULTS = {**vars(TrainConfig()), **vars(ModelConfig())}


@dataclass
class Run:
    """
    One run, a line of --out.

    variant: a row of Table 3, "" where neither the folder's name nor the configuration tells;
    step, tokens: how far it came; points: [[tokens, validation loss]]; origin: commit, torch,
    machine, command.
    """

    name: str
    variant: str
    settings: dict
    parameters: int | None
    step: int
    tokens: int
    points: list
    diverged: bool
    origin: dict

    @property
    def finished(self):
        """Whether the last step was taken and evaluated."""
        last_step = self.settings.get("max_steps", self.step)
        return self.step >= last_step and self.points[-1][0] == self.tokens

    @property
    def loss(self):
        """The last validation loss."""
        return self.points[-1][1]

    @property
    def seed(self):
        return self.settings.get("seed")

    @property
    def experiment(self):
        """What repetitions of a run share: all settings but the seed and those that steer it."""
        if not self.settings:
            return self.name
        shared = {
            name: value
            for name, value in self.settings.items()
            if name not in NOT_THE_EXPERIMENT and value != DEFAULTS.get(name)
        }
        return json.dumps(shared, sort_keys=True)

    def curve(self):
        """[(tokens, loss)] on the same validation tokens: without a last one on other tokens."""
        during = self.settings.get("eval_tokens")
        at_the_end = self.settings.get("final_eval_tokens")
        points = [(tokens, loss) for tokens, loss in self.points]
        if self.finished and during != at_the_end:
            return [point for point in points if point[0] != self.tokens]
        return points


@dataclass(eq=False)
class Group:
    """
    The runs of one experiment, which differ in their seeds: a row of the table.

    changes: {setting: value} that tell it from the variant's other rows.
    """

    variant: str
    changes: dict
    runs: list

    @property
    def label(self):
        """The name of the row; of no known variant, that of its first folder without the seed."""
        if not self.variant:
            return re.sub(r"-seed\d+$", "", self.runs[0].name)
        shown = {name: "none" if value == "" else value for name, value in self.changes.items()}
        return " ".join([self.variant, *(f"{name}={value}" for name, value in shown.items())])

    @property
    def settings(self):
        return self.runs[0].settings

    @property
    def loss(self):
        """(mean of the last validation losses, standard deviation)."""
        return mean_and_spread([run.loss for run in self.runs])

    @property
    def paper(self):
        """The paper's perplexity for this row of Table 3; None for what is no such row."""
        return TABLE_3[self.variant][1] if self.variant in TABLE_3 and not self.changes else None

    def curve(self):
        """[(tokens, mean loss, lowest, highest)] where all runs were evaluated alike."""
        curves = [dict(run.curve()) for run in self.runs]
        everywhere = sorted(set.intersection(*map(set, curves)))
        losses = {tokens: [curve[tokens] for curve in curves] for tokens in everywhere}
        return [(tokens, statistics.fmean(x), min(x), max(x)) for tokens, x in losses.items()]


def mean_and_spread(values):
    """(mean, standard deviation) of a list; None for what takes more values than there are."""
    mean = statistics.fmean(values) if values else None
    spread = statistics.stdev(values) if len(values) > 1 else None
    return mean, spread


def group_runs(runs):
    """[Group] in the order of their first runs. UserError for an experiment twice with a seed."""
    members = defaultdict(list)
    rivals = defaultdict(list)
    for run in runs:
        for twin in members[run.experiment]:
            if twin.seed == run.seed:
                raise UserError(
                    f"{twin.name} and {run.name} are one experiment with one seed; give one of them"
                )
        members[run.experiment].append(run)
        rivals[run.variant].append(run.settings)
    return [
        Group(some[0].variant, changes_of(some[0], rivals[some[0].variant]), some)
        for some in members.values()
    ]


def changes_of(run, rivals):
    """
    {setting: value} that is not the default, and that either contradicts the variant's row of
    Table 3 or is not shared by all `rivals`, the settings of the variant's runs.
    """
    row = {name: x for name, x in VARIANTS.get(run.variant, {}).items() if name != "n_layer"}
    usual = {**DEFAULTS, **row}
    changed = {
        name: value
        for name, value in run.settings.items()
        if name not in NOT_THE_EXPERIMENT and value != usual.get(name)
    }
    return {
        name: value
        for name, value in changed.items()
        if name in row or any(settings.get(name) != value for settings in rivals)
    }


def best_of(groups, names):
    """
    Of the rows that differ in the settings `names` alone, the one with the lowest mean loss; over
    the seeds that all rows have, and with these seeds only. UserError where there is none.
    """
    for name in names:
        if name not in DEFAULTS:
            raise UserError(f"--best_of: there is no setting {name!r}")
    seeds = set.intersection(*({run.seed for run in group.runs} for group in groups))
    if not seeds:
        raise UserError(f"--best_of={','.join(names)}: there is no seed that all rows have")
    best = {}
    for group in groups:
        changes = {name: value for name, value in group.changes.items() if name not in names}
        runs = [run for run in group.runs if run.seed in seeds]
        rival = Group(group.variant, changes, runs)
        key = (group.variant, json.dumps(changes, sort_keys=True))
        if key not in best or rival.loss[0] < best[key].loss[0]:
            best[key] = rival
    return list(best.values())


# ----------------------------------------------------------------------------------- 2 differences

FIRST = "first of its variant"  # in an ablation of sweep.py that trained as the paper says
BASELINES = ("base", "gated", FIRST)
ENOUGH = 5  # degrees of freedom; a family with fewer takes the variance of the whole table


@dataclass
class Difference:
    """
    A mean difference of losses: its standard error, the error's degrees of freedom, and the
    two-sided p after Holm's correction; None for what one run of each cannot tell.
    """

    mean: float
    error: float | None
    degrees: int
    p: float | None = None

    @property
    def half_width(self):
        """Half of the 95 % interval."""
        return None if self.error is None else self.error * t_quantile(0.95, self.degrees)

    @property
    def survives(self):
        return self.p is not None and self.p < 0.05

    def __str__(self):
        return show(self.mean, "{:+.4f}", self.half_width) + (" *" if self.survives else "")


def baseline_of(group, groups, name):
    """
    The group that one of BASELINES means for this one: of several the one with the same changes,
    else the first. None where that is the group itself, or nothing.
    """
    if name == FIRST:
        named = [other for other in groups if other.variant and other.variant == group.variant]
        alike = []
    else:
        named = [other for other in groups if other.variant == name]
        alike = [other for other in named if other.changes == group.changes]
    found = next(iter(alike + named), None)
    return None if found is group else found


def measured_otherwise(group, baseline):
    """The settings that make a loss of `group` another quantity than one of `baseline`."""
    return [
        name for name in WHAT_IS_MEASURED if group.settings.get(name) != baseline.settings.get(name)
    ]


def twins(group, baseline):
    """[(run of the group, of the baseline)] of equal seeds: equal data in equal order."""
    if not baseline or measured_otherwise(group, baseline):
        return []
    return [(mine, x) for mine in group.runs for x in baseline.runs if mine.seed == x.seed]


def paired_losses(group, baseline):
    """
    [loss - baseline's loss] over equal seeds, of runs that have come equally far: the last
    evaluation may be on more tokens than those before.
    """
    return [
        mine.loss - other.loss
        for mine, other in twins(group, baseline)
        if (mine.tokens, mine.finished) == (other.tokens, other.finished)
    ]


def differences(contrasts, groups, table):
    """
    A Difference, or None, for each contrast: a list of (group, baseline), over which the mean is
    taken. They are one family: one variance, of `groups`, and one correction by Holm.
    """
    found = uncorrected(contrasts, groups, table)
    correct(found)
    return found


def uncorrected(contrasts, groups, table):
    """The differences of contrasts, as above, without p."""
    spread, degrees = pooled_spread(groups)
    if degrees < ENOUGH:
        spread, degrees = pooled_spread(table)
    found = []
    for pairs in contrasts:
        losses = [paired_losses(*pair) for pair in pairs]
        if not losses or not all(losses):
            found.append(None)
            continue
        mean = statistics.fmean(map(statistics.fmean, losses))
        error = None
        if degrees:
            error = spread * math.sqrt(sum(2 / len(some) for some in losses)) / len(losses)
        found.append(Difference(mean, error, degrees))
    return found


def correct(found):
    """Give each Difference that has an error its p after Holm's correction over all of them."""
    tested = [difference for difference in found if difference and difference.error]
    raw = [t_two_sided(x.mean / x.error, x.degrees) for x in tested]
    for difference, p in zip(tested, holm(raw)):
        difference.p = p


def families_of(name, groups):
    """{baseline: [the groups that are compared with it]} for one of BASELINES."""
    families = defaultdict(list)
    for group in groups:
        baseline = baseline_of(group, groups, name)
        if twins(group, baseline):
            families[baseline].append(group)
    return families


def against(name, groups):
    """{group: Difference} from its baseline."""
    found = {}
    for baseline, members in families_of(name, groups).items():
        contrasts = [[(group, baseline)] for group in members]
        found |= zip(members, differences(contrasts, [baseline, *members], groups))
    return found


def tokens_to_reach(curve, level):
    """Tokens at which `curve`, [(tokens, loss)], first comes down to `level`; None if never."""
    before = None
    for tokens, loss in curve:
        if loss <= level:
            if before is None or before[1] == loss:
                return tokens
            share = (before[1] - level) / (before[1] - loss)  # linear in between
            return before[0] + share * (tokens - before[0])
        before = (tokens, loss)
    return None


def token_ratios(group, baseline):
    """
    For each equal seed the baseline's tokens / tokens at which this group's run has the baseline's
    last loss; None where it never has.
    """
    ratios = []
    for mine, other in twins(group, baseline):
        if not other.curve():
            continue
        tokens, level = other.curve()[-1]
        own = tokens_to_reach(mine.curve(), level)
        ratios.append(None if own is None else tokens / own if own else math.inf)
    return ratios


# ------------------------------------------------------------------------------------ 3 statistics


def pooled_spread(groups):
    """
    (standard deviation, degrees of freedom) of a loss about the sum of its row's and its seed's
    mean, by least squares over the finished runs of all rows; (0, 0) where nothing is left.
    """
    runs = [(i, run) for i, group in enumerate(groups) for run in group.runs if run.finished]
    seeds = list(dict.fromkeys(run.seed for _, run in runs))
    if not runs:
        return 0.0, 0
    design = torch.zeros(len(runs), len(groups) + len(seeds), dtype=torch.float64)
    losses = torch.tensor([[run.loss] for _, run in runs], dtype=torch.float64)
    for k, (i, run) in enumerate(runs):
        design[k, i] = 1
        design[k, len(groups) + seeds.index(run.seed)] = 1
    fitted = design @ torch.linalg.pinv(design) @ losses
    degrees = len(runs) - int(torch.linalg.matrix_rank(design))
    if not degrees:
        return 0.0, 0
    return math.sqrt((losses - fitted).square().sum().item() / degrees), degrees


def t_inside(t, degrees):
    """P(|T| <= t) of Student's t with whole degrees of freedom (Abramowitz, Stegun 26.7.3-4)."""
    angle = math.atan(abs(t) / math.sqrt(degrees))
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for n in range(2 + odd, degrees - 1, 2):
        term *= (n - 1) / n * math.cos(angle) ** 2
        total += term
    inside = math.sin(angle) * total
    return 2 / math.pi * (angle + inside) if odd else inside


def t_two_sided(t, degrees):
    """P(|T| > |t|): the two-sided p."""
    return max(0.0, 1 - t_inside(t, degrees))


def t_quantile(inside, degrees):
    """The t with P(|T| <= t) = inside, by bisection over the angle atan(t / sqrt(degrees))."""
    low = 0.0
    high = math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        if t_inside(math.sqrt(degrees) * math.tan(middle), degrees) < inside:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)


def holm(ps):
    """Holm's corrected p of each: the k-th smallest of m times m - k + 1, and none below one."""
    corrected = [0.0] * len(ps)
    least = 0.0
    for k, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        least = max(least, min(1.0, ps[i] * (len(ps) - k)))
        corrected[i] = least
    return corrected


def ranks(values):
    """The rank of each value, from 1; equal values share their mean rank."""
    return [sum(y < x for y in values) + (values.count(x) + 1) / 2 for x in values]


def spearman(a, b):
    """Spearman's rank correlation of two lists; nan where all values of a list are equal."""
    if len(set(a)) < 2 or len(set(b)) < 2:
        return math.nan
    return statistics.correlation(ranks(a), ranks(b))


def spearman_interval(r, n):
    """
    95 % interval of a rank correlation of n pairs: Fisher's z with the variance of Bonett and
    Wright (2000), (1 + r^2 / 2) / (n - 3). None for n < 4 and for r = 1 or -1, where z is infinite.
    """
    if n < 4 or abs(r) > 1 - 1e-12:
        return None
    half = statistics.NormalDist().inv_cdf(0.975) * math.sqrt((1 + r * r / 2) / (n - 3))
    return math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)


# ---------------------------------------------------------------------------------------- 4 tables

GRANULARITIES = ("exo", "nuresformer", "nuresformer_qknorm", "nuresformer_vg")

IDEAS = {  # of the paper: (the row of Table 3 that has it, the row that lacks it), or several
    "output gate": [("gated", "base")],
    "mixing V with layer 1's, without a gate": [("resformer", "base")],
    "mixing V with layer 1's": [("naive", "gated")],
    "mixing G too": [("nuresformer_vg", "naive")],
    "mixing Q and K too, their anchors normed": [("nuresformer_qknorm", "nuresformer_vg")],
    "RMSNorm on the anchors of V and G too": [("nuresformer", "nuresformer_qknorm")],
    "exogenous anchors in place of layer 1's": [("exo", "nuresformer")],
    "RMSNorm on exogenous anchors": [("exo", "exo_nonorm")],
    "a lambda per head, not per channel": [(f"{row}_headwise", row) for row in GRANULARITIES],
    "one lambda, not one per channel": [(f"{row}_scalar", row) for row in GRANULARITIES],
    "dynamic mixing": [("exo_dynamic", "exo")],
}

KINDS = {  # over which the rank correlation with the paper is taken
    "all rows": lambda name: True,
    "a gate and an anchor": lambda name: VARIANTS[name]["gate"] and VARIANTS[name]["mix"],
    "nuresformer's": lambda name: name.startswith("nuresformer"),
}


def show(value, style="{:.4f}", more=None):
    """A cell: the value, with half of its interval where there is one; "-" for None."""
    if value is None:
        return "-"
    return style.format(value) + ("" if more is None else f" +- {more:.4f}")


def show_ratios(ratios):
    """A cell: mean and range over the seeds, and how many never reached the baseline's loss."""
    reached = [ratio for ratio in ratios if ratio]
    parts = []
    if reached:
        parts.append(f"{statistics.fmean(reached):.2f}x")
    if len(reached) > 1:
        parts[0] += f" ({min(reached):.2f} to {max(reached):.2f})"
    if len(reached) < len(ratios):
        parts.append(f"never in {len(ratios) - len(reached)} of {len(ratios)}")
    return ", ".join(parts) or "-"


def rows_of(groups):
    """[{heading: text}], a line of the table for each group."""
    columns = {name: against(name, groups) for name in BASELINES}
    rows = []
    for group in groups:
        mean, spread = group.loss
        row = {
            "variant": group.label,
            "runs": f"{len(group.runs)}",
            "layers": show(group.settings.get("n_layer"), "{}"),
            "parameters": show(group.runs[0].parameters, "{:,}"),
            "tokens": f"{min(run.tokens for run in group.runs):,}",
            "val loss": show(mean),
            "sd": show(spread),
            "perplexity": f"{math.exp(min(mean, 700.0)):.3f}",
            "paper's": show(group.paper, "{:.2f}"),
        }
        for name, found in columns.items():
            row[f"loss - {name}"] = str(found.get(group) or "-")
            if name != FIRST:
                ratios = token_ratios(group, baseline_of(group, groups, name))
                row[f"tokens, {name} / own"] = show_ratios(ratios)
        rows.append(row)
    return rows


def ideas_of(groups):
    """[{heading: text}] for those of IDEAS whose rows of Table 3 are there: one family."""
    rows = {group.variant: group for group in groups if group.paper}
    there = {
        idea: [(rows[one], rows[other]) for one, other in pairs if {one, other} <= set(rows)]
        for idea, pairs in IDEAS.items()
    }
    there = {idea: pairs for idea, pairs in there.items() if pairs}
    found = differences(there.values(), list(rows.values()), groups)
    return [
        {
            "idea": idea,
            "rows": rows_compared(pairs),
            "loss": str(difference or "-"),
            "in the paper": f"{paper_difference(pairs):+.4f}",
        }
        for (idea, pairs), difference in zip(there.items(), found)
    ]


def rows_compared(pairs):
    """The first of [(group, baseline)] by name, and how many more."""
    one, other = pairs[0]
    more = f" and {len(pairs) - 1} pairs like it" if len(pairs) > 1 else ""
    return f"{one.variant} - {other.variant}{more}"


def paper_difference(pairs):
    """Mean difference of the logarithms of the paper's perplexities over [(group, baseline)]."""
    return statistics.fmean(math.log(one.paper / other.paper) for one, other in pairs)


def tests_of(texts, groups):
    """
    [{heading: text}] of what --test names: "row - row", whose variance is that of the rows named,
    or "row - row from A to B", the same for changes of the loss between A and B tokens. One family
    for Holm's correction. UserError for a row, or an evaluation of its runs, that is not there.
    """
    alike = {}  # a stretch, or "" for the last loss: its tests, which share a variance
    for text in texts:
        stretch = text.partition(" from ")[2]
        alike.setdefault(stretch, []).append(text)
    found = {}
    for stretch, some in alike.items():
        pairs = [rows_named(text, groups) for text in some]
        table = groups
        if stretch:
            changes = {row: changed(row, stretch) for pair in pairs for row in pair}
            pairs = [(changes[one], changes[other]) for one, other in pairs]
            table = list(changes.values())
        named = list(dict.fromkeys(row for pair in pairs for row in pair))
        tested = uncorrected([[pair] for pair in pairs], named, table)
        found |= {text: (pair, x) for text, pair, x in zip(some, pairs, tested)}
    correct([difference for _, difference in found.values()])
    return [
        {
            "test": text,
            "pairs": f"{len(paired_losses(*pair))}",
            "loss": str(difference or "-"),
            "p (Holm)": show(difference.p if difference else None),
        }
        for text, (pair, difference) in found.items()
    ]


def rows_named(text, groups):
    """(group, group) of the rows in "row - row" or "row - row from A to B"."""
    rows = {group.label: group for group in groups}
    one, _, other = text.partition(" from ")[0].partition(" - ")
    for label in (one, other):
        if label not in rows:
            raise UserError(f'--test="{text}": there is no row {label!r} among {list(rows)}')
    return rows[one], rows[other]


def changed(group, stretch):
    """The row with each run's change of loss between two evaluations, "A to B", as its loss."""
    ends = re.fullmatch(r"(\d+) to (\d+)", stretch)
    if not ends:
        raise UserError(f'--test: "from {stretch}" is not "from TOKENS to TOKENS"')
    return replace(group, runs=[change_of(run, *map(int, ends.groups())) for run in group.runs])


def change_of(run, first, last):
    """The run with loss(last) - loss(first), both on the same validation tokens, as its loss."""
    curve = dict(run.curve())
    for tokens in (first, last):
        if tokens not in curve:
            raise UserError(
                f"--test: {run.name} has no evaluation after {tokens} tokens on its curve; choose "
                f"of {list(curve)}"
            )
    return replace(run, points=[[run.tokens, curve[last] - curve[first]]])


def table_of(rows):
    """Lines of markdown from [{heading: text}], padded, without columns that say nothing."""
    names = [name for name in rows[0] if any(row[name] != "-" for row in rows)]
    columns = [[name, *(row[name] for row in rows)] for name in names]
    widths = [max(map(len, column)) for column in columns]
    lines = list(zip(*columns))
    lines.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in lines]
    return ["| " + " | ".join(line) + " |" for line in padded]


def summarise(runs, best=(), tests=()):
    """(groups, lines of the tables and their notes); a diverged run is in the notes alone."""
    groups = group_runs([run for run in runs if not run.diverged])
    if best and groups:
        groups = best_of(groups, best)
    lines = []
    for rows in (rows_of(groups), ideas_of(groups), tests_of(tests, groups)):
        if rows:
            lines += [*table_of(rows), ""]
    lines = lines or ["no run to compare", ""]
    return groups, [*lines, *notes(groups, [run for run in runs if run.diverged])]


# ----------------------------------------------------------------------------------------- 5 notes


def notes(groups, diverged):
    """What the reader of the table must know."""
    yield (
        "sd: standard deviation over seeds. loss - ...: mean over equal seeds +- half of its 95 % "
        "interval; *: survives Holm's correction at 5 % among the rows with this baseline, or "
        "among the ideas. tokens, ... / own: the baseline's tokens / tokens to reach its last "
        "loss, mean (and range). An idea's loss is the difference of two rows, the paper's that of "
        "the logarithms of its perplexities."
    )
    yield from variances(groups)
    yield from agreement(groups)
    yield from not_compared(groups)
    runs = [run for group in groups for run in group.runs]
    for run in runs:
        if not run.finished:
            end = run.settings.get("max_steps", "an unknown number")
            yield f"NOT FINISHED: {run.name} is at step {run.step} of {end}"
    if any(len(run.curve()) < len(run.points) for run in runs):
        yield (
            "the last evaluation has other tokens (--final_eval_tokens) than those before: curves "
            "and ratios are without it"
        )
    for run in diverged:
        yield f"DIVERGED: {run.name} after step {run.step}, in no row"
    names = ("machine", "torch", "commit", "command")
    origins = [[f"{name} {run.origin.get(name)}" for name in names] for run in runs + diverged]
    yield from sorted({" | ".join(origin) for origin in origins})


def variances(groups):
    """A line for each variance that an error of the table of runs comes from."""
    found = {f"all {len(groups)} rows": pooled_spread(groups)}
    for name in BASELINES:
        for baseline, members in families_of(name, groups).items():
            spread, degrees = pooled_spread([baseline, *members])
            if degrees >= ENOUGH:
                words = f"{baseline.label} and the {len(members)} compared with it"
                found.setdefault(words, (spread, degrees))
    for words, (spread, degrees) in found.items():
        if degrees:
            yield (
                f"standard deviation about row and seed, {words}: {spread:.4f} "
                f"({degrees} degrees of freedom)"
            )


def agreement(groups):
    """A line with the rank correlation of our mean losses with the paper's perplexities."""
    rows = [group for group in groups if group.paper and all(run.finished for run in group.runs)]
    alike = [group for group in rows if not measured_otherwise(group, rows[0])]
    found = []
    for kind, belongs in KINDS.items():
        some = [group for group in alike if belongs(group.variant)]
        if len(some) > 2:
            r = spearman([group.loss[0] for group in some], [group.paper for group in some])
            interval = spearman_interval(r, len(some))
            within = "" if interval is None else f" [{interval[0]:+.2f}, {interval[1]:+.2f}]"
            found.append(f"{r:+.2f}{within} ({kind}: {len(some)})")
    if found:
        yield (
            "rank correlation (Spearman) of val loss with the paper's perplexity, 95 % interval by "
            f"Fisher's z: {', '.join(found)}"
        )


def not_compared(groups):
    """A line for each row that lacks a comparison since its loss is another quantity."""
    for group in groups:
        for baseline in filter(None, (baseline_of(group, groups, name) for name in BASELINES)):
            other = measured_otherwise(group, baseline)
            if other:
                values = ", ".join(f"{name}={group.settings.get(name)}" for name in other)
                yield (
                    f"{group.label}: not compared with {baseline.label}, "
                    f"since measured with {values}"
                )


# ----------------------------------------------------------------------------------------- 6 files


def read_lines(path):
    """
    The JSON objects in a file, one a line. A last line that a kill cut short is left out;
    UserError for any other that is none.
    """
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")[:-1]  # what follows the last line end is torn
    return list(json_lines(lines, path, "a JSON record", dict))


def write_lines(records, path):
    """Write JSON objects to a file, one a line."""
    with atomic_write(path) as file:
        file.writelines(f"{json.dumps(record)}\n".encode() for record in records)


def read_log(folder):
    """
    The records of a run's log.jsonl, in order: a step has a "loss", an evaluation a "val_loss".
    UserError for a record without the numbers that every record has.
    """
    path = os.path.join(folder, "log.jsonl")
    records = read_lines(path)
    for number, record in enumerate(records, 1):
        for name in ("step", "tokens", *(["val_loss"] if "val_loss" in record else [])):
            if type(record.get(name)) not in (int, float):
                raise UserError(
                    f"{path}, line {number}: {name!r} is no number; train.py wrote none"
                )
    return records


def read_state(folder):
    """The newest checkpoint that is whole, as train.py resumes; {} where there is none."""
    for path in checkpoints_in(folder).values():
        with contextlib.suppress(DamagedCheckpoint):
            return read_checkpoint(path)
    return {}


def settings_of(state):
    """All settings in a checkpoint; {} for none."""
    return {**state.get("train_config", {}), **state.get("model_config", {})}


@functools.cache
def circumstances(device="cpu"):
    """{machine, torch, commit, command} of this process: a figure means nothing without them."""
    describe = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    commit = ""
    with contextlib.suppress(OSError):  # without git
        commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    script = f"paper/{os.path.basename(sys.argv[0])}"
    return dict(
        machine=machine_name(device),
        torch=str(torch.__version__),
        commit=commit or "unknown",
        command=shlex.join(["python", script, *sys.argv[1:]]),
    )


def machine_name(device):
    """The GPU; else the processor, its cores, and the threads that torch uses."""
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):  # Linux knows the model
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        processor = names[0] if names else processor
    return f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def read_run(folder):
    """The Run in a folder of train.py. UserError where its log cannot be used."""
    records = read_log(folder)
    state = read_state(folder)
    points = [[record["tokens"], record["val_loss"]] for record in records if "val_loss" in record]
    if not points:
        raise UserError(
            f"{folder}: its log has no evaluation yet; wait for the first, or leave this run out"
        )
    settings = settings_of(state)
    name = os.path.basename(os.path.normpath(folder))
    variant = name.split("-")[0]  # sweep.py names folders so
    parameters = None
    if settings:
        model_settings = set(ModelConfig.__dataclass_fields__) & set(settings)
        config = ModelConfig(**{key: settings[key] for key in model_settings})
        with torch.device("meta"):
            parameters = count_parameters(ExoFormer(config))
        variant = variant if variant in VARIANTS else variant_name(config)
    origin = {
        **circumstances(settings.get("device")),
        "commit": state.get("git_revision", "unknown")[:12],
        "torch": state.get("torch_version", "unknown"),
    }
    return Run(
        name,
        variant if variant in VARIANTS else "",
        settings,
        parameters,
        records[-1]["step"],
        records[-1]["tokens"],
        points,
        "diverged" in records[-1],
        origin,
    )


def read_runs(path):
    """[Run] of a run folder, or of a .jsonl file that --out wrote. UserError for neither."""
    if not path.endswith(".jsonl"):
        return [read_run(path)]
    try:
        with open(path, "rb") as file:
            runs = [Run(**record) for record in json_lines(file, path, "a JSON record", dict)]
    except TypeError as error:
        raise UserError(f"{path}: not a file that --out wrote ({error})") from None
    for run in runs:
        if not (isinstance(run.settings, dict) and isinstance(run.points, list) and run.points):
            raise UserError(f"{path}: not a file that --out wrote (no settings or no points)")
    return runs


def write_runs(runs, path):
    """Write --out: a line a run, so that a file under version control grows by lines."""
    write_lines(map(asdict, runs), path)


# ------------------------------------------------------------------------------------------ 7 main


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run folders of train.py, and .jsonl files of --out",
    )
    parser.add_argument("--png", default="", help="write the picture of Figure 1b to this file")
    parser.add_argument("--out", default="", help="write the runs to this .jsonl file")
    parser.add_argument(
        "--best_of",
        default="",
        metavar="NAMES",
        help="of rows that differ in these settings alone (by commas) keep the best; "
        "over the seeds that all rows have",
    )
    parser.add_argument(
        "--test",
        action="append",
        default=[],
        metavar="'ROW - ROW [from A to B]'",
        help="a table of these differences as one family; may be given several times; with 'from A "
        "to B' how much the difference changes between the evaluations after A and B tokens",
    )
    return parser.parse_args()


def main():
    """Print the tables; write the picture and the runs where asked for."""
    args = parse_arguments()
    if args.png:
        pyplot()  # said before the work, not after it
    runs = [run for path in args.runs for run in read_runs(path)]
    best = [name for name in args.best_of.split(",") if name]
    groups, lines = summarise(runs, best, args.test)
    print("\n".join(lines))
    if args.out:
        write_runs(runs, args.out)
    if args.png:
        draw_curves(groups, args.png)


if __name__ == "__main__":
    command_line(main, InputError)
