"""
Kill a run at random moments, resume it, again and again, and compare the end with a run that nobody disturbed.

    python paper/storm.py --kills=100 [--signal=KILL|TERM|INT] [any flags of train.py]

Exit code 0 only if the last checkpoint of the disturbed run equals the undisturbed one, tensor for tensor, each step is
in its log exactly once with the same numbers, and the newest checkpoint was whole after every kill.
"""
import argparse
import glob
import os
import random
import signal
import subprocess
import sys
import tempfile

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..")]

from compare import read_log
from model import read_checkpoint
from prepare_fineweb import Progress, UserError, command_line, say

SMALL = """--device=cpu --preset=smoke --n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=2
    --total_batch_size=128 --warmup_steps=2 --eval_every=50 --eval_tokens=320 --final_eval_tokens=320 --save_every=5
    --log_every=200 --compile=false --sample_tokens=0""".split()
STATE = ("model", "optimizers", "step", "best_val")


def command(folder, flags):
    """train.py in `folder`: anew, or resumed where a checkpoint is."""
    saved = glob.glob(os.path.join(folder, "ckpt_*.pt"))
    return [sys.executable, os.path.join(HERE, "..", "train.py"), f"--out_dir={folder}",
            *(["--resume"] if saved else flags)]


def newest(folder):
    """The newest checkpoint, read back whole; {"step": 0} while there is none. UserError if it is damaged."""
    paths = sorted(glob.glob(os.path.join(folder, "ckpt_*.pt")))
    return read_checkpoint(paths[-1]) if paths else {"step": 0}


def logged(folder):
    """{(step, whether it is an evaluation): the record without the time}. UserError if one is there twice."""
    records = {}
    for record in read_log(folder):
        key = record["step"], "loss" not in record
        if key in records:
            raise UserError(f"{folder}: step {record['step']} is in the log twice")
        records[key] = {name: value for name, value in record.items() if name != "ms"}
    return records


def differences(a, b, path=""):
    """Paths at which two nested states differ, tensors compared bit by bit."""
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [path]
        return [d for key in a for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}/{i}")]
    return [] if (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b) else [path]


def storm(folder, flags, kills, number, longest, rng):
    """Start, wait a random time, kill; `kills` times, or until the run ended by itself. Returns the kills that hit."""
    progress = Progress("storm", kills, "kills")
    for hits in range(kills):
        process = subprocess.Popen(command(folder, flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            error = process.communicate(timeout=rng.uniform(0.5, longest))[1]
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            process.communicate()
        else:
            if process.returncode:
                raise UserError(f"after {hits} kills train.py failed: {error.strip()}")
            return hits
        progress.update(hits + 1, f", at step {newest(folder)['step']}")
    return kills


def main():
    """The command line. UserError where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how often (default 100)")
    parser.add_argument("--signal", default="KILL", choices=("KILL", "TERM", "INT"), help="with what (default KILL)")
    parser.add_argument("--longest", type=float, default=8.0, help="longest life of a run in seconds (default 8)")
    parser.add_argument("--max_steps", type=int, default=2000, help="steps of the run (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args, flags = parser.parse_known_args()
    flags = [*SMALL, f"--max_steps={args.max_steps}", *flags]
    with tempfile.TemporaryDirectory() as base:
        stormy, calm = os.path.join(base, "stormy"), os.path.join(base, "calm")
        rng = random.Random(args.seed)
        hits = storm(stormy, flags, args.kills, signal.Signals[f"SIG{args.signal}"], args.longest, rng)
        for folder, what in ((stormy, "the rest of the disturbed run"), (calm, "the undisturbed run")):
            say(f"{hits} kills; now {what}")
            if subprocess.run(command(folder, flags)).returncode:
                raise UserError(f"{what} failed")
        different = differences(*({key: newest(folder)[key] for key in STATE} for folder in (calm, stormy)))
        if different or logged(calm) != logged(stormy):
            raise UserError(f"{len(different)} places of the last checkpoints differ ({different[:1]}), "
                            f"the logs are {'equal' if logged(calm) == logged(stormy) else 'different'}")
    say(f"{hits} kills: no checkpoint lost or unreadable, no log line lost or doubled; "
        "the end equals the undisturbed run bit for bit")


if __name__ == "__main__":
    command_line(main)
