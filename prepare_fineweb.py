"""Token shards: where the training data come from, how they lie on the disk, and how to check them.

    python prepare_fineweb.py                           the paper's data, already tokenised: 100 files, 19.9 GB
    python prepare_fineweb.py --shards=5                its validation shard and first 5 training shards: 1.2 GB
    python prepare_fineweb.py --input=FILES --out=DIR   your own text (.txt, .py, .jsonl, .parquet, .gz of each)
    python prepare_fineweb.py verify --out=DIR          read everything again and compare

A shard (the format of llm.c and modded-nanogpt) is a header of 256 little-endian int32: magic 20240520, version 1,
number of tokens, zeros; then that many little-endian uint16 tokens. A document STARTS with the end-of-text token.
Files are named *_train_%06d.bin and *_val_%06d.bin. meta.json beside them names the tokenizer and lists the files;
without it the tokenizer is GPT-2's. Shards are written under a temporary name, then renamed.
"""

import argparse
import functools
import glob
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
from filelock import FileLock, Timeout

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
SHARD_TOKENS = 100_000_000                   # 200 MB a file, like the published shards
TOKENIZERS = {"gpt2": 50257, "bytes": 257}   # name: number of tokens, the last of which is the end of text
PIECE = 1 << 16                              # characters of a plain text that are tokenised at once
WINDOW = 257                                 # block_size + 1 of train.py's smallest preset
REPO, TRAIN_SHARDS, FINEWEB_FOLDER = "kjj0/finewebedu10B-gpt2", 99, "data/fineweb_edu10B"


# ---- what every script of the project uses ---------------------------------------------------------------------------

class UserError(ValueError):
    """The user's input, a file, the network or the machine is at fault. One line: what is wrong, where, what to do."""


def say(line, end="\n", file=None):
    """Print at once. A stream that cannot be written (full disk, closed pipe) is dropped: it must not stop the work."""
    file = file or sys.stdout
    encoding = file.encoding or "utf-8"
    try:
        print(line.encode(encoding, "replace").decode(encoding), end=end, file=file, flush=True)
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def clock(seconds):
    """Seconds as h:mm:ss."""
    return f"{int(seconds) // 3600}:{int(seconds) % 3600 // 60:02d}:{int(seconds) % 60:02d}"


class Progress:
    """A line on stderr with share, rate and time left: each second in place on a terminal, every 5 s elsewhere."""

    def __init__(self, what, total, unit, done=0):
        self.what, self.total, self.unit, self.first = what, max(total, 1), unit, done
        self.in_place, self.began = sys.stderr.isatty(), time.monotonic()
        self.shown = self.began

    def update(self, done, note=""):
        """Say that `done` of `total` units are done, if it is time to."""
        now = time.monotonic()
        if now - self.shown < (1 if self.in_place else 5):
            return
        self.shown, rate = now, (done - self.first) / (now - self.began)
        left = clock((self.total - done) / rate) if rate > 0 else "?"
        line = (f"{self.what}: {done / self.total:.1%} of {self.total:,.0f} {self.unit}, "
                f"{rate:,.3g} {self.unit}/s, {left} left{note}")
        say(f"\r{line:<100}" if self.in_place else line, end="" if self.in_place else "\n", file=sys.stderr)

    def end(self):
        """Leave the line that was written over, if there is one."""
        if self.in_place and self.shown > self.began:
            say("", file=sys.stderr)


@contextmanager
def atomic_write(path):
    """A binary file to write, which takes the name `path` when all of it is on the disk."""
    part = f"{path}.part"
    try:
        with open(part, "wb") as file:
            yield file
        publish_file(part, path)
    except BaseException:
        with suppress(OSError):
            os.remove(part)
        raise


def publish_file(part, path):
    """Rename a complete file or folder so that even a power cut leaves all of it or nothing under the new name."""
    if os.path.isfile(part):
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
    os.replace(part, path)
    with suppress(OSError):                                      # Windows does not open folders
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def locked(folder, wait=False, beside=False):
    """A held lock that keeps other runs out of the folder, for `with` or to be kept; it ends with the process. The lock
    is the file folder/lock; with `beside` it is folder.lock, for a folder that is still to be made."""
    path = f"{os.path.realpath(folder)}.lock" if beside else os.path.join(folder, "lock")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        return FileLock(path).acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise UserError(f"{folder}: another run is writing there; wait for it, or choose another folder") from None


def command_line(main, memory="use a smaller batch"):
    """Run a script's main() and exit with the code it returns. What a user did wrong is one line, not a traceback;
    `memory` says what to do where it runs out."""
    script = os.path.basename(sys.argv[0])
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))    # closed: None
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:                                      # the reader of a pipe has left, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + 13
    except (UserError, OSError) as error:
        code = f"{script}: {error}"
    except (MemoryError, RuntimeError) as error:                 # torch's OutOfMemoryError is a RuntimeError
        if not re.search("MemoryError|(of|allocate) memory|new thread", f"{type(error).__name__} {error}"):
            raise
        code = f"{script}: out of memory; {memory}"
    except KeyboardInterrupt:
        say(f"\n{script}: interrupted", file=sys.stderr)
        os._exit(128 + 2)                                        # at once: a thread may be waiting for the network
    sys.exit(code)


# ---- the format ------------------------------------------------------------------------------------------------------

def write_shard(path, tokens):
    """Write token ids (N,), each in 0..65535, as the shard `path`; it appears whole or not at all."""
    tokens = np.asarray(tokens)
    if tokens.size == 0 or tokens.min() < 0 or tokens.max() > 65535:
        raise UserError(f"{path}: a shard holds at least one token, and each is in 0..65535")
    with atomic_write(path) as file:
        file.write(np.array([MAGIC, VERSION, len(tokens)] + [0] * 253, "<i4"))
        file.write(tokens.astype("<u2", copy=False))


def read_shard(path):
    """All tokens of a shard, (N,) uint16. UserError as shard_tokens and read_window."""
    return read_window(path, 0, shard_tokens(path))


def read_window(path, start, count):
    """Tokens start .. start + count of a shard, (count,) uint16. A plain read: where a memory map of a file that was
    cut off meanwhile kills the process with SIGBUS, this raises UserError."""
    try:
        tokens = np.fromfile(path, "<u2", count, offset=HEADER_BYTES + 2 * start)
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror})") from None
    if len(tokens) != count:
        raise damaged(path, f"ends {count - len(tokens)} tokens before token {start + count}")
    return tokens


def shard_tokens(path):
    """Number of tokens in a shard, by its header and length alone. UserError when these disagree or it is empty."""
    head = read_window(path, -HEADER_BYTES // 2, HEADER_BYTES // 2).view("<i4")[:3].tolist()
    size = os.path.getsize(path)
    count = (size - HEADER_BYTES) // 2
    if count < 1 or size % 2 or head != [MAGIC, VERSION, count]:
        raise damaged(path, f"is no shard of {size} bytes: its header says magic {head[0]}, version {head[1]} and "
                            f"{head[2]} tokens where magic {MAGIC}, version {VERSION} and {count} tokens are due")
    return count


def examine(path, tokenizer):
    """Read a whole shard, some MB at a time: {tokens, documents, bytes, sha256}. UserError when it is not sound."""
    count, n_vocab, documents, sha256 = shard_tokens(path), TOKENIZERS[tokenizer], 0, hashlib.sha256()
    sha256.update(read_window(path, -HEADER_BYTES // 2, HEADER_BYTES // 2))
    for start in range(0, count, 1 << 21):
        tokens = read_window(path, start, min(1 << 21, count - start))
        sha256.update(tokens)
        documents += int(np.count_nonzero(tokens == n_vocab - 1))
        if tokens.max() >= n_vocab:
            raise damaged(path, f"token {tokens.max()} is not in the vocabulary of {n_vocab}")
    return {"tokens": count, "documents": documents, "bytes": HEADER_BYTES + 2 * count, "sha256": sha256.hexdigest()}


def damaged(path, what):
    return UserError(f"{path}: {what}; remove it and run the command that made it again "
                     f"(python prepare_fineweb.py ... --out={os.path.dirname(path) or '.'})")


# ---- tokenizers ------------------------------------------------------------------------------------------------------

class Tokenizer:
    """.name .n_vocab .eot .encode(text) .decode(ids), and .n_bytes(ids): the number of UTF-8 bytes that the ids stand
    for (the end of text stands for none). A special token that is spelled out in a text is text."""

    def __init__(self, name, table, to_array):
        self.name, self.n_vocab, self.eot = name, TOKENIZERS[name], TOKENIZERS[name] - 1
        self.table, self.to_array = [*table, b"<|endoftext|>"], to_array     # bytes of each token; text -> ids as array
        self.lengths = np.array([*map(len, table), 0])

    def encode(self, text):
        return self.to_array(repaired(text)).tolist()

    def decode(self, ids):                    # a model's vocabulary is padded: what lies beyond ours has no text
        known = (self.table[i] if i < self.n_vocab else "\ufffd".encode() for i in ids)
        return b"".join(known).decode(errors="replace")

    def n_bytes(self, ids):
        return int(self.lengths[np.asarray(ids, np.int64)].sum())


@functools.cache
def get_tokenizer(name):
    """The Tokenizer "gpt2" (tiktoken's) or "bytes" (of UTF-8). UserError when there is none or it cannot be had."""
    if name not in TOKENIZERS:
        raise UserError(f"unknown tokenizer {name!r}; there are {' and '.join(TOKENIZERS)}")
    if name == "bytes":
        return Tokenizer(name, [bytes([i]) for i in range(256)], lambda text: np.frombuffer(text.encode(), np.uint8))
    import requests
    import tiktoken
    try:
        bpe = tiktoken.get_encoding("gpt2")
    except (requests.RequestException, OSError, ValueError) as error:
        raise UserError(f"tiktoken cannot get the vocabulary of GPT-2 ({type(error).__name__}); go online once, set "
                        "TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer=bytes") from None
    return Tokenizer(name, [bpe.decode_single_token_bytes(i) for i in range(50256)],
                     lambda text: bpe.encode_to_numpy(text, disallowed_special=()))


def repaired(text):
    """The text with U+FFFD for each half of a surrogate pair that lacks the other; JSON can spell such a half."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ---- a folder of shards ----------------------------------------------------------------------------------------------

def read_meta(folder):
    """meta.json of a folder: "tokenizer"; where known also "n_vocab", "eot" and "files", {name: {tokens, documents,
    bytes, sha256}}. A folder without one holds GPT-2 tokens. UserError when it cannot be used."""
    path = os.path.join(folder, "meta.json")
    if not os.path.exists(path):
        return {"tokenizer": "gpt2"}
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
        if meta["tokenizer"] not in TOKENIZERS:
            raise ValueError(f"unknown tokenizer {meta['tokenizer']!r}")
        return meta
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"cannot be used ({error!r})") from None


def write_meta(folder, meta):
    """Write meta.json of a folder."""
    with atomic_write(os.path.join(folder, "meta.json")) as file:
        file.write(json.dumps(meta, indent=1).encode())


def shard_names(folder, split="train|val"):
    """Sorted file names of the shards in a folder."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in names if re.search(rf"_({split})(_\d+)?\.bin$", name))


def missing(folder, meta):
    """The files that meta.json lists and the folder lacks."""
    return [name for name in meta.get("files", {}) if not os.path.exists(os.path.join(folder, name))]


def find_shards(folder, split):
    """Sorted paths of the "train" or "val" shards. UserError when there is none, or when a listed file is missing."""
    if gone := missing(folder, read_meta(folder)):
        raise UserError(f"{folder}: {gone[0]} is not there but meta.json lists it ({len(gone)} such files); run the "
                        f"command that made this folder again (python prepare_fineweb.py ... --out={folder})")
    if not (names := shard_names(folder, split)):
        raise UserError(f"{folder}: no {split} shard (*_{split}_000000.bin) here; to get the paper's data: "
                        f"python prepare_fineweb.py --out={folder}, or with --input=FILES your own text")
    return [os.path.join(folder, name) for name in names]


def fingerprint(folder, split):
    """[[file name, tokens, checksum], ...] of a split, to compare when a run is resumed. The checksum is a CRC-32 of 32
    blocks of 4 KiB spread over the file, or of all of a small one."""
    rows = []
    for path in find_shards(folder, split):
        count = shard_tokens(path)
        starts = range(0, count, max(2048, count // 32))
        blocks = [read_window(path, start, min(2048, count - start)) for start in starts]
        rows.append([os.path.basename(path), count, f"{zlib.crc32(np.concatenate(blocks)):08x}"])
    return rows


# ---- your own text: documents -> tokens -> shards --------------------------------------------------------------------

def read_jsonl(stream):
    """A line is a document: its field "text"."""
    for number, line in enumerate(stream, 1):
        try:
            if line.strip():
                yield "start", repaired(json.loads(line.decode("utf-8-sig", "replace"), strict=False)["text"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            yield "bad", f'{number}: no JSON object with a string "text"'


def read_text(stream):
    """A plain text is one document. It is read in pieces, so that its size does not matter. Each ends between a visible
    character and a space or newline, where GPT-2's pattern ends a token in any case: the tokens are the same."""
    text, kind, rest = io.TextIOWrapper(stream, "utf-8-sig", "replace", newline=""), "start", ""
    while piece := text.read(PIECE):
        if end := re.match(r".*\S(?=[ \n])", piece, re.DOTALL):
            yield kind, rest + end[0]
            kind, rest, piece = "more", "", piece[end.end():]
        rest += piece
    yield kind, rest


def read_parquet(stream):
    """A row is a document: its column "text"."""
    from pyarrow import parquet
    for batch in parquet.ParquetFile(stream).iter_batches(batch_size=256, columns=["text"]):
        if not batch.num_columns:
            raise ValueError('no column "text"')
        yield from (("start", text or "") for text in batch.column(0).to_pylist())


READERS = {".txt": read_text, ".py": read_text, ".jsonl": read_jsonl, ".parquet": read_parquet}


def read_files(paths, counts):
    """(path, kind, text) of all files in turn. Kinds are "start" (a document or its first piece), "more" (a further
    piece) and "bad" (line number and what is wrong with the line). counts["read"] is the number of bytes read."""
    suffixes = [os.path.splitext(path.removesuffix(".gz"))[1] for path in paths]
    for path, suffix in zip(paths, suffixes):
        if suffix not in READERS:
            raise UserError(f"{path}: unknown kind of file; known are {', '.join(READERS)}, each also with .gz")
        if suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
            raise UserError(f"{path}: to read .parquet, pip install pyarrow; or give .jsonl files")
    for path, suffix in zip(paths, suffixes):
        before = counts["read"]
        with open(path, "rb") as file:
            try:
                for kind, text in READERS[suffix](gzip.GzipFile(fileobj=file) if path.endswith(".gz") else file):
                    counts["read"] = before + file.tell()
                    yield path, kind, text
            except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"{path}: damaged file ({error}); get it again") from None


def documents(paths, counts, max_bad_lines):
    """(whether a document starts here, text) of all files in turn. What is left out, and what is odd, is counted."""
    for path, kind, text in read_files(paths, counts):
        if kind == "bad":
            counts["malformed"] += 1
            if counts["malformed"] > max_bad_lines:
                raise UserError(f"{path}:{text}; these are more malformed lines than --max_bad_lines={max_bad_lines}; "
                                "nothing was written")
            if counts["malformed"] <= 10:
                say(f"{path}:{text}; left out", file=sys.stderr)
        elif kind == "start" and not text.strip():
            counts["empty"] += 1
        else:
            counts["bytes"] += len(text.encode())
            counts["odd"] += "\0" in text or "\ufffd" in text
            yield kind == "start", text


def encode(texts, tokenizer, workers):
    """(whether a document starts, tokens) of (whether a document starts, text), in order; only some are in memory.
    Threads serve, since tiktoken releases the interpreter's lock."""
    with ThreadPoolExecutor(workers) as pool:
        while some := list(itertools.islice(texts, 64 * workers)):
            yield from zip([starts for starts, _ in some], pool.map(tokenizer.to_array, [text for _, text in some]))


def write_splits(paths, stem, tokenizer, workers, limit, val_fraction, max_bad_lines):
    """Write the documents of text files as shards STEM_train_000000.bin, STEM_val_000000.bin, ... of `limit` tokens; a
    document may run over into the next file. Returns counts of what was read."""
    counts, waiting, written = Counter(), {"train": [], "val": []}, Counter()
    bar = Progress("tokenising", sum(map(os.path.getsize, paths)) / 1e6, "MB")

    def write(split, keep):
        while counts[split] - written[split] * limit > keep:
            tokens = np.concatenate(waiting[split])
            write_shard(f"{stem}_{split}_{written[split]:06d}.bin", tokens[:limit])
            waiting[split], written[split] = [tokens[limit:]], written[split] + 1

    for starts, tokens in encode(documents(paths, counts, max_bad_lines), tokenizer, workers):
        if starts:                                                # with 0.01, documents 100, 200, ... are held out
            counts["documents"] += 1
            n = counts["documents"]
            split = "val" if int(n * val_fraction) > int((n - 1) * val_fraction) else "train"
            tokens = np.append(tokenizer.eot, tokens)
        waiting[split].append(tokens.astype(np.uint16))
        counts[split] += len(tokens)
        write(split, limit)
        bar.update(counts["read"] / 1e6, f", {counts['train'] + counts['val']:,} tokens")
    bar.end()
    if not counts["train"]:
        raise UserError("there is no text in these files; nothing was written")
    if val_fraction and not counts["val"]:                        # there was one document: hold out its end
        tokens = np.concatenate(waiting["train"])
        tail = min(len(tokens) // 2, max(WINDOW, int(val_fraction * counts["train"])))
        rest, end = np.split(tokens, [len(tokens) - tail])
        waiting["train"], waiting["val"] = [rest], [[tokenizer.eot], end]
        counts["train"], counts["val"] = counts["train"] - tail, 1 + tail
    if val_fraction and counts["val"] < WINDOW:
        raise UserError(f"only {counts['val']} of {counts['train'] + counts['val']} tokens would be held out, train.py "
                        f"needs {WINDOW} or more; give a larger --val_fraction or more text (nothing was written)")
    write("train", 0)
    write("val", 0)
    return counts


def tokenise(paths, folder, tokenizer="gpt2", workers=1, shard_tokens=SHARD_TOKENS, val_fraction=0.01,
             max_bad_lines=100, prefix="text", wait=False):
    """Make the shards of `folder` from text files; returns its meta. They are made in folder.part, which is renamed
    when all are complete. Every 1/val_fraction-th document is held out. The number of threads changes nothing."""
    stats, n_vocab = [os.stat(path) for path in paths], TOKENIZERS[tokenizer]
    recipe = {"inputs": [[os.path.basename(path), stat.st_size, stat.st_mtime_ns] for path, stat in zip(paths, stats)],
              "tokenizer": tokenizer, "shard_tokens": shard_tokens, "val_fraction": val_fraction}
    with locked(folder, wait, beside=True):
        meta, part = read_meta(folder), f"{os.path.realpath(folder)}.part"
        if meta.get("recipe") == recipe and not missing(folder, meta):
            say(f"{folder}: these shards are there already, made from the same files with the same settings")
            return meta
        if os.path.isdir(folder) and os.listdir(folder):
            raise UserError(f"{folder}: is there already, incomplete or made from other files or settings; remove it "
                            "or choose another --out")
        shutil.rmtree(part, ignore_errors=True)                  # of a run that was killed
        try:
            os.mkdir(part)
            counts = write_splits(paths, os.path.join(part, prefix), get_tokenizer(tokenizer), workers, shard_tokens,
                                  val_fraction, max_bad_lines)
            files = {name: examine(os.path.join(part, name), tokenizer) for name in shard_names(part)}
            meta = {"tokenizer": tokenizer, "n_vocab": n_vocab, "eot": n_vocab - 1, "files": files, "recipe": recipe}
            write_meta(part, meta)
            publish_file(part, os.path.realpath(folder))
        finally:
            shutil.rmtree(part, ignore_errors=True)
    say(f"{folder}: {counts['train']:,} tokens to train on, {counts['val']:,} held out, from {counts['bytes']:,} bytes "
        f"of text; left out: {counts['empty']} empty documents, {counts['malformed']} malformed lines; kept: "
        f"{counts['odd']} documents with NUL or U+FFFD (not UTF-8)")
    return meta


def write_default_shards(folder):
    """Data for a machine that has none: the source files of Python's own standard library as bytes, about 12 MB in a
    fixed order, a twentieth of the files held out. Returns the meta; shards that are there already stay."""
    if shard_names(folder):
        return read_meta(folder)
    paths = standard_library_files()
    say(f"{folder}: writing byte-level shards from the {len(paths)} source files of Python's standard library, "
        f"{sum(map(os.path.getsize, paths)):,} bytes")
    return tokenise(paths, folder, "bytes", val_fraction=0.05, prefix="stdlib", wait=True)


def standard_library_files():
    """Sorted paths of the source files of Python's standard library, without its tests and without packages."""
    skip, paths = {"test", "tests", "idle_test", "site-packages", "dist-packages"}, []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = [name for name in subfolders if name not in skip]
        paths += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    return sorted(paths)


# ---- the network: any file, and the paper's shards -------------------------------------------------------------------

FIRST_WAIT, LONGEST_WAIT = 1, 600            # seconds before the next try; who asks for longer is left to the user
TIMEOUT, BLOCK = (10, 30), 1 << 14           # seconds to connect, and of silence; bytes read at a time
SLOW_SECONDS, SLOW_BYTES = 30, 300_000       # a connection that brings fewer bytes in this time is begun anew


def hub():
    """(address, token or "") of the Hugging Face hub, from HF_ENDPOINT and HF_TOKEN."""
    endpoint = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/")
    return endpoint or "https://huggingface.co", os.environ.get("HF_TOKEN", "").strip()


def download(url, path, size=None, sha256=None, progress=None, tries=8):
    """Bring `url` to `path`. It arrives as path.part, which a later call continues, is checked, then renamed.

    size (bytes) and sha256 (hex): what the file must have, where known. progress(bytes so far) replaces the line on
    stderr. UserError when the file cannot be had; it is given up after `tries` tries in a row that add nothing.
    HF_TOKEN is sent to the hub's own address alone.
    """
    name, part, failures = os.path.basename(path), f"{path}.part", 0
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    most = size_of(part)
    while True:
        problem, asked = receive(url, part, size, progress)
        came = size_of(part)
        if not problem and sha256 and hashlib.sha256(np.memmap(part, mode="r")).hexdigest() != sha256:
            problem = f"what came is not the published file (sha256 {sha256})"
            os.remove(part)
        if not problem:
            return publish_file(part, path)
        failures, most = (0, came) if came > most else (failures + 1, most)
        wait = max(asked, min(60, FIRST_WAIT * 2 ** max(0, failures - 1)))
        if failures == tries or wait > LONGEST_WAIT:
            raise UserError(f"{name}: {problem}; given up after try {max(1, failures)} of {tries}")
        say(f"{name}: {problem}; try {failures + 1} of {tries} in {wait:.0f} s", file=sys.stderr)
        time.sleep(wait)


def size_of(path):
    """Bytes in a file, 0 where there is none."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def receive(url, part, size, progress):
    """One connection: append to `part` what it lacks, or begin anew where the server does. Returns (what is wrong,
    seconds to wait at least): ("", 0) when the file is complete, infinity where another try is useless."""
    import requests
    have = max(0, size_of(part) - 1)             # one byte again: a range that begins at the end of a file is an error
    have = have if have < (size or math.inf) else 0
    try:
        with get(url, have) as response:
            status, asked = response.status_code, response.headers.get("Retry-After", "")
            if status in (408, 425, 429) or status >= 500:
                wait = int(asked) if asked.isdecimal() else 0                # a date gets the usual wait
                return f"HTTP {status}" + f", and the server asks to wait {wait} s" * bool(wait), wait
            if status not in (200, 206):
                hint = {401: "; set HF_TOKEN to a token that may read it", 416: f"; remove {part}"}
                return f"HTTP {status}{hint.get(401 if status == 403 else status, '')}", math.inf
            if "text/html" in response.headers.get("Content-Type", ""):
                return "a web page came instead of the file", 0
            return copy(response, part, have if status == 206 else 0, size, progress), 0
    except ValueError as error:
        return f"no such address or token ({type(error).__name__}); check HF_ENDPOINT and HF_TOKEN", math.inf
    except requests.RequestException as error:
        return f"no connection, or a lost one ({type(error).__name__})", 0


def get(url, start):
    """The open response to a GET of `url` from byte `start` on. Raises what requests raises: ValueErrors for what can
    be no address or token, other RequestExceptions for what may pass."""
    import requests
    session, (endpoint, token) = requests.Session(), hub()

    def authorize(request, response=None):       # called at every redirect too, and keeps out what ~/.netrc has
        request.headers.pop("Authorization", None)
        if token and not session.should_strip_auth(endpoint, request.url):
            request.headers["Authorization"] = f"Bearer {token}"
        return request

    session.auth = session.rebuild_auth = authorize
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-"}
    return session.get(url, headers=headers, stream=True, timeout=TIMEOUT)


def copy(response, part, start, size, progress):
    """Write what the response brings to the file `part` from byte `start` on. Returns what is wrong, "" if nothing."""
    length, place = response.headers.get("Content-Length", ""), response.headers.get("Content-Range", "")
    total = start + int(length) if length.isdecimal() else size
    if size not in (None, total) or (place and not place.startswith(f"bytes {start}-")):
        return f"the server offers {length} bytes {place} where byte {start} to {size} is due"
    bar = Progress(f"downloading {os.path.basename(part)}", (total or 0) / 1e6, "MB", start / 1e6)
    since, before = time.monotonic(), start
    with open(part, "r+b" if start else "wb") as file:
        file.seek(start)
        try:
            for block in response.iter_content(BLOCK):
                file.write(block)
                progress(file.tell()) if progress else bar.update(file.tell() / 1e6)
                if (seconds := time.monotonic() - since) > SLOW_SECONDS:
                    if file.tell() < before + SLOW_BYTES:
                        return f"only {file.tell() - before:,} bytes came in {seconds:.0f} s"
                    since, before = time.monotonic(), file.tell()
        finally:
            bar.end()
        return "" if total in (None, file.tell()) else f"the connection ended at byte {file.tell()} of {total}"


def published(shards):
    """{name: bytes} of the validation shard and the first training shards, as they lie in REPO."""
    names = ["finewebedu_val_000000.bin"] + [f"finewebedu_train_{i:06d}.bin" for i in range(1, shards + 1)]
    return {name: 107_979_712 if name == "finewebedu_train_000099.bin" else 200_001_024 for name in names}


def published_checksums():
    """{name: sha256} of the files of REPO, by the hub's list; empty where it cannot be had."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "list of checksums")
        try:
            download(f"{hub()[0]}/api/datasets/{REPO}/tree/main", path, tries=3)
            with open(path, encoding="utf-8") as file:
                return {row["path"]: row["lfs"]["oid"] for row in json.load(file) if row.get("lfs")}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            say(f"no list of checksums ({error}); going on without", file=sys.stderr)
            return {}


def download_shards(folder, shards=TRAIN_SHARDS):
    """Bring the validation shard and the first `shards` training shards into `folder`; what is there already stays."""
    with locked(folder, beside=True):
        meta, sizes = read_meta(folder), published(shards)
        if "recipe" in meta:
            raise UserError(f"{folder}: holds shards made from your own text; choose another --out")
        os.makedirs(folder, exist_ok=True)
        checksums, files = published_checksums(), meta.setdefault("files", {})
        paths = {name: os.path.join(folder, name) for name in sizes}
        came = {name: size_of(path) or size_of(f"{path}.part") for name, path in paths.items()}
        need, free = sum(sizes.values()) - sum(came.values()), shutil.disk_usage(folder).free
        if need > free - (64 << 20):
            raise UserError(f"{folder}: {need / 1e9:.1f} GB are still to come but {free / 1e9:.1f} GB are free; make "
                            "room, choose another --out, or take fewer --shards")
        bar = Progress("downloading", sum(sizes.values()) / 1e6, "MB", sum(came.values()) / 1e6)

        def bring(name):
            """What is known of a shard, after it has come."""
            def progress(done):
                came[name] = done
                bar.update(sum(came.values()) / 1e6)
            if size_of(paths[name]) == sizes[name]:
                return files.get(name, {"bytes": sizes[name], "sha256": checksums.get(name)})
            download(f"{hub()[0]}/datasets/{REPO}/resolve/main/{name}", paths[name], sizes[name], checksums.get(name),
                     progress)
            try:
                return examine(paths[name], "gpt2")
            except UserError:
                os.remove(paths[name])
                raise

        for name, facts in zip(sizes, ThreadPoolExecutor(4).map(bring, sizes)):
            files[name] = facts
            write_meta(folder, meta)
        bar.end()
    say(f"{folder}: the validation shard and {shards} training shards are complete")


# ---- the command line ------------------------------------------------------------------------------------------------

def verify(folder):
    """Read every shard again, compare it with what is known of it, print a line for each. Returns how many are bad."""
    meta, sizes, bad = read_meta(folder), published(TRAIN_SHARDS), 0
    files = meta.get("files", {})
    names = sorted({*shard_names(folder), *files})
    if not names:
        raise UserError(f"{folder}: there are no shards here")
    for name in names:
        path, known = os.path.join(folder, name), files.get(name) or {"bytes": sizes.get(name)}
        try:
            facts = examine(path, meta["tokenizer"])
            for key, value in known.items():
                if value not in (None, facts[key]):
                    raise damaged(path, f"{key} {facts[key]} should be {value}")
            say(f"good  {name}: {facts['tokens']:,} tokens, {facts['documents']:,} documents, "
                f"{'checksum matches' if known.get('sha256') else 'no checksum known'}")
        except UserError as error:
            bad += 1
            say(f"BAD   {error}")
    say(f"{folder}: {len(names) - bad} of {len(names)} shards are good")
    return bad


def parse_args():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n\nA shard")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", nargs="?", choices=["verify"], help="check the shards in --out instead of making any")
    add("--out", metavar="DIR", help=f"folder of the shards (default: {FINEWEB_FOLDER}; with --input there is none)")
    add("--shards", type=int, default=TRAIN_SHARDS, metavar="N",
        help=f"download the first N training shards of 100M tokens (default: all {TRAIN_SHARDS})")
    add("--input", nargs="+", metavar="FILE", help="text to tokenise; patterns like 'a/*.jsonl.gz' are expanded. A "
        "line of .jsonl or row of .parquet (field \"text\") is a document, and so is a whole .txt or .py file")
    add("--tokenizer", choices=TOKENIZERS, default="gpt2", help="for --input (default: gpt2)")
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="threads for --input (default: one a core)")
    add("--shard_tokens", type=int, default=SHARD_TOKENS, metavar="N",
        help=f"tokens in a file made from --input (default: {SHARD_TOKENS})")
    add("--val_fraction", type=float, default=0.01, metavar="F",
        help="share of the documents of --input held out; 0.01 (default) takes the 100th, 200th, ...")
    add("--max_bad_lines", type=int, default=100, metavar="N",
        help="malformed lines of .jsonl to leave out before giving up (default: 100)")
    # "--input=a b" shall mean "--input a b", since a shell expands no pattern behind "="
    args = parser.parse_args([w for arg in sys.argv[1:] for w in re.split("(?<=^--input)=", arg)])
    for name, low, high in (("shards", 0, TRAIN_SHARDS), ("workers", 1, 512), ("shard_tokens", 2, 2**31 - 1),
                            ("val_fraction", 0, 0.9), ("max_bad_lines", 0, 2**31)):
        if not low <= vars(args)[name] <= high:
            parser.error(f"--{name}={vars(args)[name]} is not in {low} .. {high}")
    if args.input and (args.command or not args.out):
        parser.error("--input needs --out=DIR and no other command")
    return args


def expand(patterns):
    """File names from names and patterns, in the order given; the matches of a pattern sorted."""
    paths = []
    for pattern in patterns:
        found = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern)))
        if not found:
            raise UserError(f"{pattern}: no such file; --input takes files and patterns like 'folder/*.jsonl.gz'")
        paths += found
    return paths


def main():
    args = parse_args()
    out = args.out or FINEWEB_FOLDER
    if args.command == "verify":
        return 1 if verify(out) else 0
    if args.input:
        tokenise(expand(args.input), out, args.tokenizer, args.workers, args.shard_tokens, args.val_fraction,
                 args.max_bad_lines)
    else:
        download_shards(out, args.shards)
    say(f"next: python train.py --data={out}")


if __name__ == "__main__":
    command_line(main, memory="use fewer --workers or smaller --shard_tokens")
