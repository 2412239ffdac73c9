"""Token shards: where training data comes from, how it lies on the disk, and how to trust it.

    python prepare_fineweb.py                                          the paper's data, already tokenised: 19.9 GB
    python prepare_fineweb.py --shards=5                               validation and the first 5 training shards: 1.2 GB
    python prepare_fineweb.py --input a.txt 'b/*.jsonl.gz' --out=data/mine    your own text
    python prepare_fineweb.py verify --out=data/mine                   read everything again and compare

A shard (the format of llm.c and modded-nanogpt) is a header of 256 little-endian int32: magic 20240520, version 1, number
of tokens, zeros; then that many little-endian uint16 tokens. A document STARTS with the end-of-text token. Files are named
*_train_%06d.bin and *_val_%06d.bin. meta.json beside them names the tokenizer and lists the files; without one the
tokenizer is GPT-2's. Nothing here carries a shard's name before every byte of it is on the disk.
"""

import argparse
import functools
import glob
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
import zlib
from collections import deque
from contextlib import contextmanager

import numpy as np

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
SHARD_TOKENS = 100_000_000                  # 200 MB a file, as the published shards
FINEWEB_FOLDER = "data/fineweb_edu10B"
BATCH_BYTES = 1 << 20                       # text handed to a worker at once; also the longest piece of a plain text
STAGE = ".unfinished"                       # shards lie in this sub-folder, where nobody looks, until all are written


class InputError(ValueError):
    """The user's files, flags or machine are at fault; the message is one line: what, which file, what to do."""


# ---- the format -----------------------------------------------------------------------------------------------------

def write_shard(path, tokens):
    """Write a 1-D sequence of token ids (0..65535) as the shard `path`; the file appears whole or not at all."""
    tokens = np.asarray(tokens)
    if tokens.size == 0 or tokens.min() < 0 or tokens.max() > 65535:
        raise InputError(f"{path}: a shard holds at least one token, each in 0..65535")
    with atomic(path) as file:
        file.write(header(len(tokens)))
        file.write(tokens.astype("<u2").tobytes())


def read_shard(path):
    """All tokens of a shard, (N,) uint16. InputError as in shard_tokens."""
    return read_window(path, 0, shard_tokens(path))


def read_window(path, start, count):
    """Tokens start .. start + count of a shard, (count,) uint16. A plain read: a file that was cut off or taken away
    after it was opened gives InputError, where a memory map would kill the process with SIGBUS."""
    try:
        tokens = np.fromfile(path, "<u2", count, offset=HEADER_BYTES + 2 * start)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy(path)}") from None
    if len(tokens) != count:
        raise InputError(f"{path}: has only {len(tokens)} of {count} tokens from token {start} on; {remedy(path)}")
    return tokens


def shard_tokens(path):
    """Number of tokens in a shard, from its header and length alone. InputError when magic, version, count and length
    do not agree, or when it is empty."""
    try:
        with open(path, "rb") as file:
            head, size = file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy(path)}") from None
    if len(head) < HEADER_BYTES:
        raise InputError(f"{path}: {size} bytes are too few for a shard's {HEADER_BYTES}-byte header; {remedy(path)}")
    magic, version, count = (int(n) for n in np.frombuffer(head, "<i4", 3))
    if magic != MAGIC or version != VERSION:
        raise InputError(f"{path}: magic {magic} version {version}, but a shard has magic {MAGIC} version {VERSION}; "
                         f"{remedy(path)}")
    if count < 1 or size != HEADER_BYTES + 2 * count:
        raise InputError(f"{path}: the header counts {count} tokens, so {HEADER_BYTES + 2 * max(count, 1)} bytes, "
                         f"but the file has {size}; {remedy(path)}")
    return count


def header(count):
    fields = np.zeros(HEADER_BYTES // 4, "<i4")
    fields[:3] = MAGIC, VERSION, count
    return fields.tobytes()


def remedy(path):
    return f"remove it and run the command that made it again (python prepare_fineweb.py ... --out={folder_of(path)})"


def folder_of(path):
    return os.path.dirname(path) or "."


# ---- tokenizers -----------------------------------------------------------------------------------------------------

class ByteTokenizer:
    """Token = UTF-8 byte; 256 ends (and starts) a document. Needs no files."""
    name, n_vocab, eot = "bytes", 257, 256

    def encode_array(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)

    def encode(self, text):
        return list(well_formed(text).encode())

    def decode(self, ids):
        parts = (bytes([i]) if i < 256 else b"<|endoftext|>" if i == 256 else "\ufffd".encode() for i in ids)
        return b"".join(parts).decode(errors="replace")

    def n_bytes(self, ids):
        return int(np.count_nonzero(np.asarray(ids) < 256))


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding by tiktoken. Special-token text inside a document is data, never a token."""
    name = "gpt2"

    def __init__(self):
        import tiktoken
        self.bpe = tiktoken.get_encoding("gpt2")
        self.n_vocab, self.eot = self.bpe.n_vocab, self.bpe.eot_token
        self.lengths = np.array([len(self.bpe.decode_single_token_bytes(i)) for i in range(self.n_vocab)])
        self.lengths[self.eot] = 0

    def encode_array(self, text):                # the same ids as encode_ordinary, without a list of Python integers
        return self.bpe.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    def encode(self, text):
        return self.bpe.encode_ordinary(text)

    def decode(self, ids):                       # a model's vocabulary is padded: ids beyond ours stand for nothing
        parts = (self.bpe.decode_single_token_bytes(int(i)) if i < self.n_vocab else "\ufffd".encode() for i in ids)
        return b"".join(parts).decode(errors="replace")

    def n_bytes(self, ids):
        return int(self.lengths[np.asarray(ids, dtype=np.int64)].sum())


TOKENIZERS = {"gpt2": GPT2Tokenizer, "bytes": ByteTokenizer}


@functools.cache
def get_tokenizer(name):
    """The tokenizer "gpt2" or "bytes": .name .n_vocab .eot .encode(text) .decode(ids), and .n_bytes(ids), the number of
    UTF-8 bytes the ids stand for (the end-of-text token stands for none). InputError when it cannot be had."""
    import requests
    if name not in TOKENIZERS:
        raise InputError(f"unknown tokenizer {name!r}; there are {', '.join(TOKENIZERS)}")
    try:
        return TOKENIZERS[name]()
    except (requests.RequestException, OSError, ValueError) as error:
        raise InputError(f"tiktoken cannot get GPT-2's vocabulary ({type(error).__name__}); connect to the network once, "
                         "or set TIKTOKEN_CACHE_DIR to a folder that holds it, or take --tokenizer=bytes") from None


def well_formed(text):
    """The text with lone surrogates (JSON can spell them) replaced by U+FFFD, as tiktoken does."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ---- a folder of shards ---------------------------------------------------------------------------------------------

def read_meta(folder):
    """meta.json of a folder of shards: "tokenizer" always; "n_vocab", "eot", "files" {name: {tokens, documents, bytes,
    sha256}} where known. A folder without meta.json holds GPT-2 tokens."""
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
        raise InputError(f"{path}: cannot be used ({error}); {remedy(path)}") from None


def find_shards(folder, split):
    """Sorted paths of the "train" or "val" shards of a folder. InputError when there are none, or when a file that
    meta.json lists is not there (an interrupted run, or somebody removed it)."""
    meta, names = read_meta(folder), shard_names(folder, split)
    if lost := missing(folder, meta):
        raise InputError(f"{folder}: {lost[0]} and {len(lost) - 1} more of the files in its meta.json are not there; "
                         f"run the command that made it again (python prepare_fineweb.py ... --out={folder})")
    if not names:
        raise InputError(f"{folder}: no {split} shard (*_{split}_000000.bin); to make some: "
                         f"python prepare_fineweb.py [--input FILES] --out={folder}")
    return [os.path.join(folder, name) for name in names]


def shard_names(folder, split="train|val"):
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in names if re.search(rf"_({split})(_\d+)?\.bin$", name))


def missing(folder, meta):
    return [name for name in meta.get("files", {}) if not os.path.exists(os.path.join(folder, name))]


@contextmanager
def atomic(path):
    """A file to write, under another name until all of it is on the disk."""
    part = f"{path}.part"
    try:
        with open(part, "wb") as file:
            yield file
        settle(part, path)
    except BaseException:
        if os.path.exists(part):
            os.remove(part)
        raise


def settle(part, path):
    """Give the complete file `part` its final name, so that a power cut leaves either all of it or none."""
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    folder = os.open(folder_of(path), os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def write_meta(folder, meta):
    with atomic(os.path.join(folder, "meta.json")) as file:
        file.write(json.dumps(meta, indent=1).encode())


@contextmanager
def locked(folder, wait=False):
    """Hold the folder for this process alone. The kernel frees the lock when the process ends, however it ends."""
    import fcntl
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, ".lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise InputError(f"{folder}: another prepare_fineweb.py is writing here; wait for it, or choose another --out "
                             "folder") from None
        yield


def examine(path, eot):
    """Read a whole shard, a few MB at a time: {tokens, documents, bytes, sha256} as in meta.json, and its largest id."""
    shard_tokens(path)
    sha256, tokens, documents, largest = hashlib.sha256(), 0, 0, 0
    with open(path, "rb") as file:
        sha256.update(file.read(HEADER_BYTES))
        while chunk := file.read(1 << 22):
            ids = np.frombuffer(chunk, "<u2")
            sha256.update(chunk)
            tokens, documents = tokens + len(ids), documents + int(np.count_nonzero(ids == eot))
            largest = max(largest, int(ids.max()))
    facts = {"tokens": tokens, "documents": documents, "bytes": HEADER_BYTES + 2 * tokens, "sha256": sha256.hexdigest()}
    return facts, largest


# ---- text to tokens: documents -> encode -> cut ---------------------------------------------------------------------

def read_jsonl(stream):
    """One JSON object a line; parsed by the workers, where the time is."""
    for number, line in enumerate(stream, 1):
        if line.strip():
            yield "json", number, line


def read_text(stream):
    """A plain text is one document. It comes in pieces, so that its size does not matter: every piece ends between a
    visible character and a space or newline, where GPT-2's pattern always ends a token, so the tokens stay the same."""
    text, kind, rest = io.TextIOWrapper(stream, "utf-8-sig", "replace", newline=""), "start", ""
    while chunk := text.read(BATCH_BYTES):
        rest, seen = rest + chunk, len(rest)
        cut = next((i for i in range(len(rest) - 1, max(seen, 1) - 1, -1)
                    if rest[i] in " \n" and not rest[i - 1].isspace()), 0)
        if cut:
            yield kind, 1, rest[:cut]
            kind, rest = "more", rest[cut:]
    yield kind, 1, rest


def read_parquet(stream):
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError("reading .parquet needs pyarrow: pip install pyarrow, or give .jsonl files") from None
    row = 0
    for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=256, columns=["text"]):
        for text in batch.column(0).to_pylist():
            row += 1
            yield "start", row, text or ""


READERS = {".txt": read_text, ".py": read_text, ".jsonl": read_jsonl, ".parquet": read_parquet}


def reader_of(path):
    suffix = os.path.splitext(path.removesuffix(".gz"))[1]
    if suffix not in READERS or (suffix == ".parquet" and path.endswith(".gz")):
        raise InputError(f"{path}: unknown kind of file; known are .txt, .py, .jsonl, each also with .gz, and .parquet")
    return READERS[suffix]


def batches(paths):
    """Batches of documents of about BATCH_BYTES, never across files: (path, input bytes read so far, documents)."""
    done = 0
    for path in paths:
        with open(path, "rb") as raw:
            batch, size = [], 0
            try:
                for document in reader_of(path)(gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw):
                    batch.append(document)
                    size += len(document[2])
                    if size >= BATCH_BYTES:
                        yield path, done + raw.tell(), batch
                        batch, size = [], 0
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise InputError(f"{path}: damaged gzip file ({error}); get it again") from None
        done += os.path.getsize(path)
        yield path, done, batch


def parse(line):
    """The text of one line of a .jsonl file; ValueError says what is wrong with the line."""
    try:
        row = json.loads(line.decode("utf-8-sig", "replace"))
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError('no string under "text"')
    return row["text"]


def encode(batch, tokenizer, val_fraction):
    """Tokens of a batch, in order: {path, done, documents: [(split or None for the rest of the one before, tokens)],
    bad: [(line, reason)], empty, bytes, marked: documents with NUL or U+FFFD}. Runs in the workers."""
    path, done, records = batch
    tokenizer = get_tokenizer(tokenizer)
    out = {"path": path, "done": done, "documents": [], "bad": [], "empty": 0, "bytes": 0, "marked": 0}
    for kind, line, text in records:
        try:
            text = well_formed(parse(text) if kind == "json" else text)
        except ValueError as error:
            out["bad"].append((line, str(error)))
            continue
        if kind != "more" and not text.strip():
            out["empty"] += 1
            continue
        out["bytes"] += len(text.encode())
        out["marked"] += "\0" in text or "\ufffd" in text
        tokens = tokenizer.encode_array(text)
        if kind == "more":
            out["documents"].append((None, tokens))
        else:
            out["documents"].append((split_of(text, val_fraction), np.append(np.uint16(tokenizer.eot), tokens)))
    return out


def split_of(text, val_fraction):
    """By a hash of the document's beginning: equal documents fall on the same side, on every machine and in any order."""
    digest = hashlib.blake2b(text[:1 << 16].encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") < val_fraction * 2**64 else "train"


def in_order(function, items, workers):
    """map(function, items) by several processes. Results come in the order of items; only a few are alive at a time.
    (concurrent.futures and not multiprocessing.Pool: a Pool waits for ever when one of its processes is killed.)"""
    if workers == 1:
        yield from map(function, items)
        return
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context
    waiting = deque()
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=end_with_parent) as pool:
        try:
            for item in items:
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})    # inherited: Ctrl-C is the parent's to handle
                waiting.append(pool.submit(function, item))
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
                if len(waiting) == 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise InputError("a worker process was killed (out of memory?); try again with fewer --workers") from None
        finally:
            for future in waiting:
                future.cancel()


def end_with_parent():
    """Start a thread that ends this worker when its parent is gone: a killed run must leave no process behind."""
    from multiprocessing import connection, parent_process

    def watch():
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class SplitWriter:
    """Cuts the tokens of one split into files of `limit` tokens each; a document may run over into the next file."""

    def __init__(self, folder, prefix, limit):
        self.stem, self.limit = os.path.join(folder, prefix), limit
        self.paths, self.tokens, self.room, self.file = [], 0, 0, None

    def append(self, tokens):
        self.tokens += len(tokens)
        while len(tokens):
            if self.room == 0:
                self.close()
                self.paths.append(f"{self.stem}_{len(self.paths):06d}.bin")
                self.file, self.room = open(self.paths[-1], "wb"), self.limit
                self.file.write(header(0))
            self.file.write(tokens[:self.room].astype("<u2").tobytes())
            tokens, self.room = tokens[self.room:], self.room - min(self.room, len(tokens))

    def close(self):
        if self.file:
            self.file.seek(0)
            self.file.write(header(self.limit - self.room))
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.file, self.room = None, 0


def tokenise(paths, folder, tokenizer="gpt2", workers=1, shard_tokens=SHARD_TOKENS, val_fraction=0.01, max_bad_lines=100,
             prefix="text"):
    """Turn text files into the shards of `folder` and return their meta. About `val_fraction` of the documents, chosen by
    hash, are held out. The result depends on the files and these settings, never on `workers`. Hold the folder's lock."""
    kinds = [reader_of(path) for path in paths]                # refuse an unknown kind before the work, not in the middle
    stats = [os.stat(path) for path in paths]
    recipe = {"inputs": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in zip(paths, stats)],
              "tokenizer": tokenizer, "shard_tokens": shard_tokens, "val_fraction": val_fraction}
    if done_before(folder, recipe):
        print(f"{folder}: already complete, made from these files with these settings")
        return read_meta(folder)
    get_tokenizer(tokenizer)
    stage, size = os.path.join(folder, STAGE), sum(stat.st_size for stat in stats)
    shutil.rmtree(stage, ignore_errors=True)
    os.mkdir(stage)
    train, val = (SplitWriter(stage, f"{prefix}_{split}", shard_tokens) for split in ("train", "val"))
    work = functools.partial(encode, tokenizer=tokenizer, val_fraction=val_fraction)
    results = in_order(work, batches(paths), min(workers, 1 + size // BATCH_BYTES) if kinds else 1)
    try:
        counts = write_splits(results, train, val, Progress("tokenising", size), max_bad_lines)
        if val_fraction and not val.tokens and train.tokens > 1:
            hold_out_tail(train, val, val_fraction, get_tokenizer(tokenizer).eot)
        meta = publish(stage, folder, tokenizer, recipe)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    print(f"{folder}: {len(train.paths)} train and {len(val.paths)} val shards, {train.tokens:,} + {val.tokens:,} {tokenizer} "
          f"tokens from {counts['bytes']:,} bytes of text in {len(paths)} files; {counts['empty']} empty documents and "
          f"{counts['bad']} malformed lines left out, {counts['marked']} documents with NUL or U+FFFD kept")
    return meta


def done_before(folder, recipe):
    """True when these very shards are there already. A run cut short is done again; anything else is not ours to touch."""
    meta = read_meta(folder)
    if meta.get("recipe") == recipe:
        return not missing(folder, meta)
    if "files" in meta or shard_names(folder):
        raise InputError(f"{folder}: holds other shards (other input files or settings); choose another --out folder, or "
                         "remove this one first")
    return False


def write_splits(results, train, val, progress, max_bad_lines):
    """Append every encoded document to its split; count what was left out, and stop at too many malformed lines."""
    counts, writer = {"bytes": 0, "empty": 0, "bad": 0, "marked": 0}, train
    for result in results:
        for line, reason in result["bad"]:
            counts["bad"] += 1
            if counts["bad"] > max_bad_lines:
                raise InputError(f"{result['path']}:{line}: {reason}; {counts['bad']} malformed lines, more than "
                                 f"--max_bad_lines={max_bad_lines}; nothing was written")
            if counts["bad"] <= 5:
                print(f"{result['path']}:{line}: {reason}; line left out", file=sys.stderr)
        for split, tokens in result["documents"]:
            if split:                                           # None: more of the document before
                writer = val if split == "val" and train.tokens else train      # the first document always trains
            writer.append(tokens)
        for name in ("bytes", "empty", "marked"):
            counts[name] += result[name]
        progress.update(result["done"], f"{train.tokens + val.tokens:,} tokens")
    progress.end()
    if not train.tokens:
        raise InputError("there is no text in the input files; nothing was written")
    train.close()
    val.close()
    return counts


def hold_out_tail(train, val, fraction, eot):
    """No document fell to validation (a single text, say): the end of the last training shard becomes the validation."""
    tokens = read_shard(train.paths[-1])
    keep = len(tokens) - min(len(tokens) // 2, max(1, int(fraction * train.tokens)))
    write_shard(train.paths[-1], tokens[:keep])
    val.append(np.append(np.uint16(eot), tokens[keep:]))
    val.close()
    train.tokens -= len(tokens) - keep
    print(f"no whole document fell to validation, so the last {len(tokens) - keep:,} tokens are held out")


def publish(stage, folder, tokenizer, recipe):
    """Move finished shards to where train.py looks. meta.json goes first: it lists them all, and find_shards refuses a
    folder where one of the list is missing, so a kill between two renames leaves nothing that could be trained on."""
    encoding = get_tokenizer(tokenizer)
    files = {name: examine(os.path.join(stage, name), encoding.eot)[0] for name in shard_names(stage)}
    meta = {"tokenizer": tokenizer, "n_vocab": encoding.n_vocab, "eot": encoding.eot, "files": files, "recipe": recipe}
    write_meta(folder, meta)
    for name in files:
        settle(os.path.join(stage, name), os.path.join(folder, name))
    os.rmdir(stage)
    return meta


def write_default_shards(folder):
    """Data for a machine that has none: the source files of this Python's standard library as bytes, about 12 MB in a fixed
    order, a twentieth of the files held out. Returns the meta; a complete folder is used as it is."""
    try:
        with locked(folder, wait=True):
            if "files" in (meta := read_meta(folder)) and not missing(folder, meta):
                return meta
            paths = standard_library_files()
            print(f"{folder}: writing byte-level shards from {len(paths)} source files of Python's standard library "
                  f"({sum(map(os.path.getsize, paths)):,} bytes)")
            return tokenise(paths, folder, "bytes", val_fraction=0.05, prefix="stdlib")
    except OSError as error:
        raise InputError(f"{folder}: the default data cannot be written ({error})") from None


def standard_library_files():
    root, skip = sysconfig.get_path("stdlib"), {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skip]
        paths += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    if not paths:
        raise InputError(f"{root}: this Python came without its source files; give your own text (README, prepare_fineweb.py)")
    return sorted(paths)


class Progress:
    """One line on stderr with share, rate and time left: rewritten every second on a terminal, else every 10 s a line."""

    def __init__(self, what, total, done=0):
        self.what, self.total, self.first = what, max(total, 1), done
        self.terminal, self.start = sys.stderr.isatty(), time.monotonic()
        self.last = self.start

    def update(self, done, note=""):
        now = time.monotonic()
        if now - self.last < (1 if self.terminal else 10):
            return
        self.last, rate = now, max(done - self.first, 1) / (now - self.start)
        left = (self.total - done) / rate
        line = (f"{self.what}: {100 * done / self.total:5.1f} %  {done / 1e6:,.1f} of {self.total / 1e6:,.1f} MB  "
                f"{rate / 1e6:.1f} MB/s  {left // 60:.0f} min {left % 60:02.0f} s left  {note}")
        print(line, end="\r" if self.terminal else "\n", file=sys.stderr, flush=True)

    def end(self):
        if self.terminal and self.last > self.start:
            print(file=sys.stderr)


# ---- the command line -----------------------------------------------------------------------------------------------

def parse_args(argv):
    parser = argparse.ArgumentParser(description="Make token shards from text.")
    parser.add_argument("--input", nargs="+", metavar="FILE", help="text files to tokenise (.txt, .py, .jsonl with a field "
                        "\"text\", each also as .gz, .parquet); patterns with * are expanded; a .txt or .py is one document")
    parser.add_argument("--out", help=f"folder of the shards (default for the download: {FINEWEB_FOLDER})")
    parser.add_argument("--tokenizer", choices=TOKENIZERS, default="gpt2", help="how --input becomes tokens (default: gpt2)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one per core)")
    parser.add_argument("--shard_tokens", type=int, default=SHARD_TOKENS, help="tokens in a full shard")
    parser.add_argument("--val_fraction", type=float, default=0.01, help="share of the documents held out, by hash")
    parser.add_argument("--max_bad_lines", type=int, default=100, help="refuse input with more malformed lines than this")
    # "--input=a b" means the same as "--input a b", also where the shell did not expand a pattern
    argv = [word for arg in argv for word in (arg.split("=", 1) if arg.startswith("--input=") else [arg])]
    args = parser.parse_args(argv)
    if not args.input or not args.out:
        parser.error("--input and --out are needed")
    return args


def expand(patterns):
    """File names from names and patterns, in the order given, each pattern's matches sorted."""
    paths = []
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        if not found:
            raise InputError(f"{pattern}: no such file")
        paths += found
    return paths


def main(argv=None):
    args = parse_args(sys.argv[1:] if argv is None else argv)
    try:
        paths = expand(args.input)
        with locked(args.out):
            tokenise(paths, args.out, args.tokenizer, args.workers, args.shard_tokens, args.val_fraction, args.max_bad_lines)
    except (InputError, OSError) as error:
        sys.exit(f"prepare_fineweb.py: {error}")
    except KeyboardInterrupt:
        print("\nprepare_fineweb.py: interrupted; no shard was left half-written, run the same command again", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
