"""Speed and memory of prepare_fineweb.py: the sub-command `data` of paper/bench.py."""

import contextlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter

import tiktoken

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import prepare_fineweb as pf


def bench_data(args):
    """Tokenising speed of prepare_fineweb.py, from text files to checked shards on the disk, beside tiktoken's own
    encode_ordinary_batch on the same documents already in memory, interleaved on the same cores. Wall time compares
    them on an idle machine only; CPU time is less disturbed by others."""
    texts = list(pf.documents(args.input or pf.standard_library_files(), Counter()))
    size, encoding = sum(len(text.encode()) for text in texts), tiktoken.get_encoding("gpt2")
    theirs, ours = [], []                                         # (wall, CPU) seconds
    with tempfile.TemporaryDirectory() as folder:
        source, out = os.path.join(folder, "text.jsonl"), os.path.join(folder, "out")
        with open(source, "w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        for _ in range(args.rounds):
            theirs.append(seconds_of(lambda: encoding.encode_ordinary_batch(texts, num_threads=args.workers)))
            ours.append(seconds_of(lambda: tokenise([source], out, args.workers)))
    print(f"{size / 1e6:.1f} MB of text, {len(texts)} documents, {args.workers} workers, {args.rounds} rounds "
          f"interleaved, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for clock, name in enumerate(("wall", "CPU")):
        a, b = [size / 1e6 / t[clock] for t in theirs], [size / 1e6 / t[clock] for t in ours]
        ratios = [y / x for x, y in zip(a, b)]
        print(f"  MB/s of {name:4} time: tiktoken {statistics.median(a):6.2f}   prepare_fineweb "
              f"{statistics.median(b):6.2f}   ratio {statistics.median(ratios):.2f} "
              f"({' '.join(f'{ratio:.2f}' for ratio in ratios)})")


def bench_data_memory(args):
    """Peak memory of `python prepare_fineweb.py` for one copy of the input and for eight. Measured from a small
    process in between: a child's peak counts the memory of the process it was forked from."""
    paths = args.input or pf.standard_library_files()
    measure = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True); "
               "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    for copies in (1, 8):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", measure, sys.executable, pf.__file__, f"--workers={args.workers}",
                       f"--out={folder}/out", "--input", *paths * copies]
            peak = int(subprocess.run(command, check=True, capture_output=True).stdout)
        size = sum(map(os.path.getsize, paths)) / 1e6
        print(f"  peak memory, {copies} x {size:.1f} MB of files   {peak / 1e3:.0f} MB")


def tokenise(paths, folder, workers):
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pf.tokenise(paths, folder, "gpt2", workers)


def seconds_of(action):
    """(wall, CPU) seconds of an action."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


def add_data_parser(commands):
    """The sub-command `data` of paper/bench.py."""
    parser = commands.add_parser("data", help="tokenising speed beside tiktoken's own batch encoder, and memory")
    parser.add_argument("--input", nargs="+", help="text files (default: Python's standard library)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads, of tiktoken too")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each, interleaved")
    parser.set_defaults(run=lambda args: (bench_data(args), bench_data_memory(args)))
