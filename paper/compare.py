"""
Compare runs of train.py by their logs: the table of validation losses beside the paper's perplexities, Figure 1b (loss
over tokens), how many fewer tokens reach a baseline's final loss (the abstracts: 1.84x for base, 1.5x for gated), and
what each idea of the paper changes, as the difference of two rows.

    python paper/compare.py out/paper-base out/paper-gated out/paper-exo --png=figure_1b.png --out=runs.jsonl
    python paper/compare.py seed1.jsonl seed2.jsonl --png=curves.png     the same from files of --out, or of sweep.py

Runs that differ in their seed alone are one row and one curve: the mean, with the spread beside it; a seed that only
some rows have is compared where it is. A row's name is its variant and what it was trained with, where that is not the
default and other rows of the variant have it otherwise. A file of --out holds one run a line: settings, evaluations,
commit, torch version, machine and command. The machine is the one that writes the file, so write it where the runs
were trained.
"""
import argparse
import functools
import glob
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
from dataclasses import asdict, dataclass

import torch

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, ROOT)

from figures import draw_curves, pyplot
from model import (TABLE_3, VARIANTS, count_parameters, ExoFormer, InputError, ModelConfig, read_checkpoint,
                   variant_name)
from prepare_fineweb import UserError, atomic_write, command_line, json_lines
from train import TrainConfig

# --------------------------------------------------------------------------------------------------------------- 1 runs

NOT_THE_EXPERIMENT = set("""seed out_dir resume device compile deterministic max_minutes batch_size save_every keep
    log_every sample_tokens""".split())
DEFAULTS = {**vars(TrainConfig()), **vars(ModelConfig())}      # also of settings that a run of older code did not have
WHAT_IS_MEASURED = "data tokenizer vocab_size block_size mask_documents eval_tokens final_eval_tokens".split()


@dataclass
class Run:
    """One run, a line of --out. variant: a row of Table 3, "" where neither the folder's name nor the configuration
    tells; step, tokens: how far it came; points: [[tokens, validation loss]]; origin: commit, torch, machine, ..."""
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
        return self.step >= self.settings.get("max_steps", self.step) and self.points[-1][0] == self.tokens

    @property
    def loss(self):
        """The last validation loss."""
        return self.points[-1][1]

    @property
    def seed(self):
        return self.settings.get("seed")

    @property
    def experiment(self):
        """What repetitions of a run share: all settings but the seed and those that only steer the run."""
        shared = {name: value for name, value in self.settings.items()
                  if name not in NOT_THE_EXPERIMENT and value != DEFAULTS.get(name)}
        return json.dumps(shared, sort_keys=True) if self.settings else self.name

    def curve(self):
        """[(tokens, loss)] on the same validation tokens: without the last where --final_eval_tokens differs."""
        differs = self.finished and self.settings.get("eval_tokens") != self.settings.get("final_eval_tokens")
        return [(tokens, loss) for tokens, loss in self.points if not (differs and tokens == self.tokens)]


def read_lines(path):
    """The JSON objects in a file, one a line. A last line that a kill cut short is left out; UserError for another."""
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")[:-1]                                  # what follows the last line end is torn
    return list(json_lines(lines, path, "a JSON record", dict))


def write_lines(records, path):
    """Write JSON objects to a file, one a line."""
    with atomic_write(path) as file:
        file.writelines(f"{json.dumps(record)}\n".encode() for record in records)


def read_log(folder):
    """The records of a run's log.jsonl, in order: a step has a "loss", an evaluation a "val_loss"."""
    return read_lines(os.path.join(folder, "log.jsonl"))


def read_state(folder):
    """The newest checkpoint; {} where there is none."""
    paths = glob.glob(os.path.join(glob.escape(folder), "ckpt_*.pt"))
    return read_checkpoint(max(paths)) if paths else {}


def settings_of(state):
    """All settings in a checkpoint; {} for none."""
    return {**state.get("train_config", {}), **state.get("model_config", {})}


@functools.cache
def circumstances(device="cpu"):
    """{machine, torch, commit, command} of this process: what a measured figure means nothing without."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):                                                       # Linux knows the model
        with open("/proc/cpuinfo") as file:
            processor = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), processor)
    machine = (torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else
               f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    describe = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    return dict(machine=machine, torch=str(torch.__version__), commit=commit or "unknown",
                command=shlex.join(["python", f"paper/{os.path.basename(sys.argv[0])}", *sys.argv[1:]]))


def read_run(folder):
    """The Run in a folder of train.py. UserError where its log cannot be used."""
    records, state = read_log(folder), read_state(folder)
    points = [[record["tokens"], record["val_loss"]] for record in records if "val_loss" in record]
    if not points:
        raise UserError(f"{folder}: its log has no evaluation yet; wait for the first, or leave this run out")
    settings, name = settings_of(state), os.path.basename(os.path.normpath(folder))
    variant, parameters = name.split("-")[0], None                                        # sweep.py names folders so
    if settings:
        config = ModelConfig(**{key: settings[key] for key in settings if key in ModelConfig.__dataclass_fields__})
        with torch.device("meta"):
            parameters = count_parameters(ExoFormer(config))
        variant = variant if variant in VARIANTS else variant_name(config)
    origin = {**circumstances(settings.get("device")), "commit": state.get("git_revision", "unknown")[:12],
              "torch": state.get("torch_version", "unknown")}
    return Run(name, variant if variant in VARIANTS else "", settings, parameters, records[-1]["step"],
               records[-1]["tokens"], points, "diverged" in records[-1], origin)


def read_runs(path):
    """[Run] of a run folder, or of a .jsonl file that --out wrote. UserError where it is neither."""
    try:
        return [Run(**record) for record in read_lines(path)] if path.endswith(".jsonl") else [read_run(path)]
    except TypeError as error:
        raise UserError(f"{path}: not a file that --out wrote ({error})") from None


def write_runs(runs, path):
    """Write --out: a line a run, so that a file under version control grows by lines."""
    write_lines(map(asdict, runs), path)


# ------------------------------------------------------------------------------------------------------------- 2 groups


@dataclass
class Group:
    """The runs of one experiment, which differ in their seeds. changes: {setting: value} that tell it from others."""
    variant: str
    changes: dict
    runs: list

    @property
    def label(self):
        """The name of the row; of no known variant, that of its first folder without the seed."""
        changes = [f"{name}={'none' if value == '' else value}" for name, value in self.changes.items()]
        return " ".join([self.variant, *changes]) if self.variant else re.sub(r"-seed\d+$", "", self.runs[0].name)

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
        """[(tokens, mean loss, lowest, highest)] where all runs were evaluated, on the same validation tokens."""
        curves = [dict(run.curve()) for run in self.runs]
        everywhere = sorted(set.intersection(*map(set, curves)))
        several = [(tokens, [curve[tokens] for curve in curves]) for tokens in everywhere]
        return [(tokens, statistics.fmean(losses), min(losses), max(losses)) for tokens, losses in several]


def mean_and_spread(values):
    """(mean, standard deviation) of a list; None for what takes more values than there are."""
    return statistics.fmean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None


def group_runs(runs):
    """[Group] in the order of their first runs. UserError for one experiment twice with one seed."""
    members, rivals = defaultdict(list), defaultdict(list)
    for run in runs:
        for twin in members[run.experiment]:
            if twin.seed == run.seed:
                raise UserError(f"{twin.name} and {run.name} are one experiment with one seed; give one of them")
        members[run.experiment].append(run)
        rivals[run.variant].append(run.settings)
    return [Group(some[0].variant, changes_of(some[0], rivals[some[0].variant]), some) for some in members.values()]


def changes_of(run, rivals):
    """{setting: value} that is not the default, and that either contradicts the variant's row of Table 3 or is not
    shared by all `rivals`, the settings of the variant's runs."""
    row = {name: value for name, value in VARIANTS.get(run.variant, {}).items() if name != "n_layer"}
    usual = {**DEFAULTS, **row}
    return {name: value for name, value in run.settings.items()
            if name not in NOT_THE_EXPERIMENT and value != usual.get(name)
            and (name in row or any(settings.get(name) != value for settings in rivals))}


# ------------------------------------------------------------------------------------------------------------ 3 figures

FIRST = "first of its variant"                             # in an ablation of sweep.py that trained as the paper says
BASELINES = ("base", "gated", FIRST)


def baseline_of(group, groups, name):
    """The group that one of BASELINES means for this one: of several the one with the same changes, else the first.
    None where that is the group itself, or nothing."""
    named = [other for other in groups if other.variant == (group.variant if name == FIRST else name)]
    alike = [other for other in named if other.changes == group.changes and name != FIRST]
    found = next(iter(alike + named), None)
    return None if found is group else found


def measured_otherwise(group, baseline):
    """The settings that make a loss of `group` another quantity than one of `baseline`."""
    return [name for name in WHAT_IS_MEASURED if group.settings.get(name) != baseline.settings.get(name)]


def twins(group, baseline):
    """[(run of the group, run of the baseline)] of equal seeds, which read equal data in equal order."""
    if not baseline or measured_otherwise(group, baseline):
        return []
    return [(mine, other) for mine in group.runs for other in baseline.runs if mine.seed == other.seed]


def difference(group, baseline):
    """(mean, its standard error) of loss - baseline's loss over equal seeds, None for what cannot be had. Only of runs
    that have come equally far: the last evaluation may be on more tokens than those before."""
    losses = [mine.loss - other.loss for mine, other in twins(group, baseline)
              if (mine.tokens, mine.finished) == (other.tokens, other.finished)]
    mean, spread = mean_and_spread(losses)
    return mean, None if spread is None else spread / math.sqrt(len(losses))


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


def token_ratios(group, baseline):
    """For each equal seed the baseline's tokens / tokens at which this group's run has the baseline's last loss, None
    where it never has."""
    ends = [(mine.curve(), *other.curve()[-1]) for mine, other in twins(group, baseline) if other.curve()]
    reached = [(tokens, tokens_to_reach(curve, level)) for curve, tokens, level in ends]
    return [None if own is None else tokens / own if own else math.inf for tokens, own in reached]


def spearman(a, b):
    """Spearman's rank correlation of two lists: Pearson's of their ranks, where equal values share their mean rank; nan
    where all values of a list are equal."""
    ranks = [[sum(y < x for y in values) + (values.count(x) + 1) / 2 for x in values] for values in (a, b)]
    return statistics.correlation(*ranks) if len(set(a)) > 1 and len(set(b)) > 1 else math.nan


def pooled_spread(groups):
    """A line with the standard deviation over seeds that all rows with several seeds have together; a row's own, from
    two or three seeds, is rough."""
    several = [(len(group.runs) - 1, group.loss[1]) for group in groups if len(group.runs) > 1]
    if several:
        degrees = sum(n for n, _ in several)
        spread = math.sqrt(sum(n * own ** 2 for n, own in several) / degrees)
        yield (f"standard deviation over seeds, pooled over {len(several)} rows ({degrees} degrees of freedom): "
               f"{spread:.4f}")


def agreement(groups):
    """A line with the rank correlation of our losses with the paper's perplexities: of the means, and of each seed over
    the rows that have it."""
    pairs = {"means": []}
    for group in (group for group in groups if group.paper and all(run.finished for run in group.runs)):
        pairs["means"].append((group.loss[0], group.paper))
        for run in group.runs:
            pairs.setdefault(f"seed {run.seed}", []).append((run.loss, group.paper))
    found = [f"{spearman(*zip(*some)):+.2f} ({name}, {len(some)} rows)"
             for name, some in pairs.items() if len(some) > 2]
    if found:
        yield f"rank correlation (Spearman) of val loss with the paper's perplexity: {', '.join(found)}"


# -------------------------------------------------------------------------------------------------------------- 4 table

IDEAS = {  # of the paper: the row of Table 3 that has it, the row that lacks it
    "output gate": ("gated", "base"),
    "mixing V with layer 1's, without a gate": ("resformer", "base"),
    "mixing V with layer 1's": ("naive", "gated"),
    "mixing G too": ("nuresformer_vg", "naive"),
    "mixing Q and K too, their anchors normed": ("nuresformer_qknorm", "nuresformer_vg"),
    "RMSNorm on the anchors of V and G too": ("nuresformer", "nuresformer_qknorm"),
    "exogenous anchors in place of layer 1's": ("exo", "nuresformer"),
    "RMSNorm on exogenous anchors": ("exo", "exo_nonorm"),
    "a lambda per head, not per channel": ("exo_headwise", "exo"),
    "one lambda, not one per channel": ("exo_scalar", "exo"),
    "dynamic mixing": ("exo_dynamic", "exo"),
}


def show(value, style="{:.4f}", spread=None):
    """A cell: the value, with its spread or error where there is one; "-" for None."""
    more = "" if spread is None else f" +- {style.format(spread).lstrip('+')}"
    return "-" if value is None else style.format(value) + more


def show_ratios(ratios):
    """A cell: mean and spread over the seeds, and how many of them never reached the baseline's loss."""
    reached = [ratio for ratio in ratios if ratio]
    never = [f"never in {len(ratios) - len(reached)} of {len(ratios)}"] * (len(reached) < len(ratios))
    mean, spread = mean_and_spread(reached)
    return ", ".join([show(mean, "{:.2f}x", spread)] * bool(reached) + never) or "-"


def cells_of(group, groups):
    """{heading: text} of a group's line in the table."""
    cells = {"variant": group.label, "runs": f"{len(group.runs)}", "layers": show(group.settings.get("n_layer"), "{}"),
             "parameters": show(group.runs[0].parameters, "{:,}"), "tokens": f"{min(r.tokens for r in group.runs):,}",
             "val loss": show(group.loss[0], spread=group.loss[1]), "perplexity": f"{math.exp(group.loss[0]):.3f}",
             "paper's": show(group.paper, "{:.2f}")}
    for name in BASELINES:
        baseline = baseline_of(group, groups, name)
        mean, error = difference(group, baseline)
        cells[f"loss - {name}"] = show(mean, "{:+.4f}", error)
        if name != FIRST:
            cells[f"tokens, {name} / own"] = show_ratios(token_ratios(group, baseline))
    return cells


def effects_of(groups):
    """{heading: text} for each of IDEAS whose two rows of Table 3 are there."""
    rows = {group.variant: group for group in groups if group.paper}
    for idea, (variant, without) in IDEAS.items():
        if variant in rows and without in rows:
            mean, error = difference(rows[variant], rows[without])
            yield {"idea": idea, "rows": f"{variant} - {without}", "loss": show(mean, "{:+.4f}", error),
                   "in the paper": f"{math.log(rows[variant].paper / rows[without].paper):+.4f}"}


def table_of(rows):
    """Lines of markdown from [{heading: text}], padded to be read as text too, without columns that say nothing."""
    columns = [[name, *(row[name] for row in rows)] for name in rows[0] if any(row[name] != "-" for row in rows)]
    widths = [max(map(len, column)) for column in columns]
    lines = [*zip(*columns)]
    lines.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]


def notes(groups, diverged):
    """What the reader of the table must know."""
    yield ("val loss: mean +- standard deviation over seeds. loss - ...: mean over equal seeds +- its standard error. "
           "tokens, ... / own: the baseline's tokens / tokens to reach its last loss, mean +- standard deviation. An "
           "idea's loss is the difference of two rows, the paper's that of the logarithms of its perplexities.")
    yield from pooled_spread(groups)
    yield from agreement(groups)
    for group in groups:
        for baseline in filter(None, (baseline_of(group, groups, name) for name in BASELINES)):
            if other := [f"{name}={group.settings.get(name)}" for name in measured_otherwise(group, baseline)]:
                yield f"{group.label}: not compared with {baseline.label}, since measured with {', '.join(other)}"
    runs = [run for group in groups for run in group.runs]
    for run in (run for run in runs if not run.finished):
        yield f"NOT FINISHED: {run.name} is at step {run.step} of {run.settings.get('max_steps', 'an unknown number')}"
    if any(len(run.curve()) < len(run.points) for run in runs):
        yield "the last evaluation has other tokens (--final_eval_tokens) than those before: curves, ratios without it"
    yield from (f"DIVERGED: {run.name} after step {run.step}, in no row" for run in diverged)
    yield from sorted({" | ".join(f"{key} {run.origin[key]}" for key in ("machine", "torch", "commit", "command"))
                       for run in runs + diverged})


def summarise(runs):
    """(groups, lines of the tables and their notes) of runs; those that diverged are in the notes alone."""
    groups = group_runs([run for run in runs if not run.diverged])
    tables = [cells_of(group, groups) for group in groups], list(effects_of(groups))
    lines = [line for rows in tables if rows for line in (*table_of(rows), "")] or ["no run to compare", ""]
    return groups, [*lines, *notes(groups, [run for run in runs if run.diverged])]


# --------------------------------------------------------------------------------------------------------------- 5 main


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py, and .jsonl files of --out")
    parser.add_argument("--png", default="", help="write the picture of Figure 1b to this file")
    parser.add_argument("--out", default="", help="write the runs to this .jsonl file")
    args = parser.parse_args()
    if args.png:
        pyplot()                                                               # said before the work, not after it
    runs = [run for path in args.runs for run in read_runs(path)]
    groups, lines = summarise(runs)
    print("\n".join(lines))
    if args.out:
        write_runs(runs, args.out)
    if args.png:
        draw_curves(groups, args.png)


if __name__ == "__main__":
    command_line(main, InputError)
