"""
Kill a run at random moments, resume it, again and again, and compare the end with a run that nobody disturbed.

    python paper/storm.py --kills=100 [--signal=KILL|TERM] [any flags of train.py]

Exit code 0 only if the last checkpoint of the disturbed run equals the undisturbed one, tensor for tensor, each step is
in its log exactly once with the same numbers, and the newest checkpoint was whole after every kill.
"""
import argparse
import glob
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

import torch

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, ROOT)

from model import read_checkpoint

SMALL = """--device=cpu --preset=smoke --n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=2
    --total_batch_size=128 --warmup_steps=2 --eval_every=50 --eval_tokens=320 --final_eval_tokens=320 --save_every=5
    --compile=false --sample_tokens=0""".split()
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "INT": signal.SIGINT}


def start(folder, flags):
    """train.py in `folder`: anew, or resumed where a checkpoint is."""
    again = ["--resume"] if glob.glob(os.path.join(folder, "ckpt_*.pt")) else flags
    if again is flags:                                     # killed before the first checkpoint: nothing to go on from
        for path in glob.glob(os.path.join(folder, "*")):
            os.remove(path)
    return subprocess.Popen([sys.executable, os.path.join(ROOT, "train.py"), f"--out_dir={folder}", *again],
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def newest(folder):
    """The newest checkpoint, read back whole; None while there is none. UserError if it is damaged."""
    paths = sorted(glob.glob(os.path.join(folder, "ckpt_*.pt")))
    return read_checkpoint(paths[-1]) if paths else None


def logged(folder):
    """{step: its record without the time}; an assertion fails if a step is there twice."""
    records = [json.loads(line) for line in open(os.path.join(folder, "log.jsonl"))]
    assert len({r["step"] for r in records}) == len(records), "a step is in the log twice"
    return {r["step"]: {k: v for k, v in r.items() if k != "ms"} for r in records}


def differences(a, b, path=""):
    """Paths at which two nested states differ, tensors compared bit by bit."""
    if isinstance(a, dict):
        return [d for key in a for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}/{i}")]
    return [] if (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b) else [path]


def storm(folder, flags, kills, number, longest, rng):
    """Start, wait a random time, kill; `kills` times, or until the run ended by itself. Returns the kills that hit."""
    hits, began = 0, time.monotonic()
    while hits < kills:
        process = start(folder, flags)
        try:
            error = process.communicate(timeout=rng.uniform(0.5, longest))[1]
            assert process.returncode == 0, error
            break
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            process.communicate()
        hits += 1
        checkpoint = newest(folder)
        seconds = time.monotonic() - began
        print(f"kill {hits}/{kills} at step {checkpoint['step'] if checkpoint else 0}; {seconds:.0f} s, "
              f"{seconds / hits * (kills - hits):.0f} s left", flush=True)
    return hits


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how often (default 100)")
    parser.add_argument("--signal", default="KILL", choices=SIGNALS, help="with what (default KILL)")
    parser.add_argument("--longest", type=float, default=8.0, help="longest life of a run in seconds (default 8)")
    parser.add_argument("--max_steps", type=int, default=2000, help="steps of the run (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args, flags = parser.parse_known_args()
    flags = [*SMALL, f"--max_steps={args.max_steps}", *flags]
    with tempfile.TemporaryDirectory() as base:
        calm, stormy = os.path.join(base, "calm"), os.path.join(base, "stormy")
        hits = storm(stormy, flags, args.kills, SIGNALS[args.signal], args.longest, random.Random(args.seed))
        for folder in (stormy, calm):
            error = start(folder, flags).communicate()[1] if newest_step(folder) < args.max_steps else ""
            assert newest_step(folder) == args.max_steps, error
        end = newest(calm)
        wanted = {key: end[key] for key in ("model", "optimizers", "step", "best_val", "rng")}
        different = differences(wanted, newest(stormy))
        assert not different, f"{len(different)} places differ, first {different[0]}"
        assert logged(calm) == logged(stormy), "the logs differ"
    print(f"{hits} kills: no checkpoint lost or unreadable, no log line lost or doubled; "
          "the end equals the undisturbed run bit for bit")


def newest_step(folder):
    """Step of the newest checkpoint; -1 where there is none."""
    checkpoint = newest(folder) if os.path.isdir(folder) else None
    return checkpoint["step"] if checkpoint else -1


if __name__ == "__main__":
    try:
        main()
    except (AssertionError, UserError) as error:
        sys.exit(f"storm.py: {error}")
