"""Token shards: where the training data comes from, how it lies on the disk, and how to check it.

    python prepare_fineweb.py                           the paper's data, already tokenised: 100 files, 19.9 GB
    python prepare_fineweb.py --shards=5                its validation shard and first 5 training shards: 1.2 GB
    python prepare_fineweb.py --input=FILES --out=DIR   your own text (.txt, .jsonl, .gz of both, .parquet)
    python prepare_fineweb.py verify --out=DIR          read everything again and compare

A shard (the format of llm.c and modded-nanogpt) is a header of 256 little-endian int32: magic 20240520, version 1,
number of tokens, zeros; then that many little-endian uint16 tokens. A document STARTS with the end-of-text token.
Files are named *_train_%06d.bin and *_val_%06d.bin. meta.json beside them names the tokenizer and lists the files;
without it the tokenizer is GPT-2's. No file carries a shard's name before every byte of it is on the disk.
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
from collections import Counter, deque
from contextlib import contextmanager, suppress
from urllib.parse import urljoin, urlsplit

import numpy as np
from filelock import FileLock, Timeout

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
SHARD_TOKENS = 100_000_000           # 200 MB a file, like the published shards
BATCH = 1 << 20                      # bytes of text a worker gets at once; also characters in a piece of a plain text
STAGE = ".unfinished"                # finished shards wait in this sub-folder, where nothing looks, for the rest


# ---- what every script of the project uses ---------------------------------------------------------------------------

class UserError(ValueError):
    """The user's input, a file, the network or the machine is at fault. One line: what is wrong, where, what to do."""


def say(line, end="\n", file=None):
    """Print at once. A stream that cannot be written (full disk, closed pipe) is dropped: it must not stop the work."""
    file = file or sys.stdout
    try:
        print(line, end=end, file=file, flush=True)
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
    """Rename a complete file so that even a power cut leaves all of it or nothing under the new name."""
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    with suppress(OSError):                                      # Windows does not open folders
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def locked(folder, wait=False):
    """A held lock that keeps other runs out of the folder, for `with` or to be kept; it ends with the process."""
    os.makedirs(folder, exist_ok=True)
    try:
        return FileLock(os.path.join(folder, "lock")).acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise UserError(f"{folder}: another run is writing there; wait for it, or choose another folder") from None


def command_line(main, memory="use a smaller batch"):
    """Run a script's main() and exit with the code it returns. What a user did wrong is one line, not a traceback;
    `memory` says what to do where it runs out."""
    script = os.path.basename(sys.argv[0])
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:                                      # the reader of a pipe has left, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + 13
    except (UserError, OSError) as error:
        code = f"{script}: {error}"
    except (MemoryError, RuntimeError) as error:                 # torch's OutOfMemoryError is a RuntimeError
        if not re.search("MemoryError|(of|allocate) memory", f"{type(error).__name__} {error}"):
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
        file.write(header(len(tokens)) + tokens.astype("<u2").tobytes())


def read_shard(path):
    """All tokens of a shard, (N,) uint16. UserError as shard_tokens and read_window."""
    return read_window(path, 0, shard_tokens(path))


def read_window(path, start, count):
    """Tokens start .. start + count of a shard, (count,) uint16. A plain read: where a memory map of a file that was
    cut off meanwhile kills the process with SIGBUS, this raises UserError."""
    try:
        tokens = np.fromfile(path, "<u2", count, offset=HEADER_BYTES + 2 * start)
    except OSError as error:
        raise unsound(path, f"cannot be read ({error.strerror})") from None
    if len(tokens) != count:
        raise unsound(path, f"ends {count - len(tokens)} tokens before token {start + count}")
    return tokens


def shard_tokens(path):
    """Number of tokens in a shard, by its header and length alone. UserError when these disagree or it is empty."""
    try:
        with open(path, "rb") as file:
            head, size = file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise unsound(path, f"cannot be read ({error.strerror})") from None
    if len(head) < HEADER_BYTES:
        raise unsound(path, f"{size} bytes are less than a shard's header of {HEADER_BYTES}")
    magic, version, count = (int(field) for field in np.frombuffer(head, "<i4", 3))
    if (magic, version) != (MAGIC, VERSION):
        raise unsound(path, f"magic {magic} version {version} where a shard has magic {MAGIC} version {VERSION}")
    if count < 1 or size != HEADER_BYTES + 2 * count:
        raise unsound(path, f"{size} bytes do not fit the {count} tokens that its header counts")
    return count


def header(count):
    fields = np.zeros(HEADER_BYTES // 4, "<i4")
    fields[:3] = MAGIC, VERSION, count
    return fields.tobytes()


def examine(path, eot, n_vocab):
    """Read a whole shard, some MB at a time: {tokens, documents, bytes, sha256}. UserError when it is not sound."""
    size, documents, sha256 = HEADER_BYTES + 2 * shard_tokens(path), 0, hashlib.sha256()
    with open(path, "rb") as file:
        sha256.update(file.read(HEADER_BYTES))
        while chunk := file.read(1 << 22):
            sha256.update(chunk)
            tokens = np.frombuffer(chunk, "<u2")
            documents += int(np.count_nonzero(tokens == eot))
            if tokens.max() >= n_vocab:
                raise unsound(path, f"token {tokens.max()} is not in the vocabulary of {n_vocab}")
    return {"tokens": (size - HEADER_BYTES) // 2, "documents": documents, "bytes": size, "sha256": sha256.hexdigest()}


def unsound(path, what):
    return UserError(f"{path}: {what}; remove it and run the command that made it again "
                      f"(python prepare_fineweb.py ... --out={os.path.dirname(path) or '.'})")


# ---- tokenizers ------------------------------------------------------------------------------------------------------

END_TEXT, UNKNOWN = b"<|endoftext|>", "\ufffd".encode()


class ByteTokenizer:
    """A token is a byte of UTF-8; 256 is the end of text. Needs no files."""
    name, n_vocab, eot = "bytes", 257, 256

    def encode_array(self, text):
        return np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.uint16)

    def encode(self, text):
        return self.encode_array(text).tolist()

    def decode(self, ids):
        parts = (bytes([i]) if i < 256 else END_TEXT if i == 256 else UNKNOWN for i in ids)
        return b"".join(parts).decode(errors="replace")

    def n_bytes(self, ids):
        return int(np.count_nonzero(np.asarray(ids) < 256))


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, by tiktoken. Special-token text inside a document is data, never a token."""
    name, n_vocab, eot = "gpt2", 50257, 50256

    def __init__(self):
        import requests
        import tiktoken
        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except (requests.RequestException, OSError, ValueError) as error:
            raise UserError(f"tiktoken cannot get the vocabulary of GPT-2 ({type(error).__name__}); go online once, "
                             "set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer=bytes") from None
        self.bytes = [self.bpe.decode_single_token_bytes(i) for i in range(self.n_vocab)]
        self.lengths = np.array([len(token) for token in self.bytes[:self.eot]] + [0])

    def encode_array(self, text):         # the ids of encode_ordinary, without making a Python integer of each
        return self.bpe.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    def encode(self, text):
        return self.bpe.encode_ordinary(text)

    def decode(self, ids):                # a model's vocabulary is padded: what lies beyond ours has no text
        return b"".join(self.bytes[i] if i < self.n_vocab else UNKNOWN for i in ids).decode(errors="replace")

    def n_bytes(self, ids):
        return int(self.lengths[np.asarray(ids, np.int64)].sum())


TOKENIZERS = {"gpt2": GPT2Tokenizer, "bytes": ByteTokenizer}


@functools.cache
def get_tokenizer(name):
    """The tokenizer "gpt2" or "bytes": .name .n_vocab .eot .encode(text) .decode(ids) and .n_bytes(ids), the number of
    UTF-8 bytes the ids stand for (end of text stands for none). UserError when there is none or it cannot be had."""
    if name not in TOKENIZERS:
        raise UserError(f"unknown tokenizer {name!r}; there are {' and '.join(TOKENIZERS)}")
    return TOKENIZERS[name]()


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
        raise unsound(path, f"cannot be used ({error!r})") from None


def find_shards(folder, split):
    """Sorted paths of the "train" or "val" shards. UserError when there is none, or when one that meta.json lists is
    gone: a run was interrupted, or somebody took it."""
    if gone := missing(folder, read_meta(folder)):
        raise UserError(f"{folder}: {gone[0]} is not there but meta.json lists it ({len(gone)} such files); run the "
                         f"command that made this folder again (python prepare_fineweb.py ... --out={folder})")
    if not (names := shard_names(folder, split)):
        raise UserError(f"{folder}: no {split} shard (*_{split}_000000.bin) here; to get the paper's data: "
                         f"python prepare_fineweb.py --out={folder}, or with --input=FILES your own text")
    return [os.path.join(folder, name) for name in names]


def fingerprint(folder, split):
    """[[file name, number of tokens, checksum], ...] of a split: what a resumed run must find as it was. The checksum
    is a CRC-32 of 32 blocks of 4 KiB spread evenly over the file, which is all of it up to 128 KiB."""
    return [[os.path.basename(path), shard_tokens(path), sampled_checksum(path)] for path in find_shards(folder, split)]


def sampled_checksum(path):
    checksum, size = 0, os.path.getsize(path)
    with open(path, "rb") as file:
        for i in range(32):
            file.seek(max(4096 * i, i * (size - 4096) // 31))
            checksum = zlib.crc32(file.read(4096), checksum)
    return f"{checksum:08x}"


def shard_names(folder, split="train|val"):
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in names if re.search(rf"_({split})(_\d+)?\.bin$", name))


def missing(folder, meta):
    return [name for name in meta.get("files", {}) if not os.path.exists(os.path.join(folder, name))]


def write_meta(folder, meta):
    with atomic_write(os.path.join(folder, "meta.json")) as file:
        file.write(json.dumps(meta, indent=1).encode())


# ---- your own text: documents -> encode -> cut -----------------------------------------------------------------------

def read_jsonl(stream):
    """One JSON object a line. Parsing is left to the workers."""
    return (("json", number, line) for number, line in enumerate(stream, 1) if line.strip())


def read_text(stream):
    """A plain text is one document. It is read in pieces, so that its size does not matter; each ends between a visible
    character and a space or newline, where GPT-2's pattern ends a token in any case: the tokens stay the same."""
    text, kind, rest = io.TextIOWrapper(stream, "utf-8-sig", "replace", newline=""), "start", ""
    while chunk := text.read(BATCH):
        rest, old = rest + chunk, max(len(rest), 1)
        cut = next((i for i in range(len(rest) - 1, old - 1, -1) if rest[i] in " \n" and not rest[i - 1].isspace()), 0)
        if cut:
            yield kind, 1, rest[:cut]
            kind, rest = "more", rest[cut:]
    yield kind, 1, rest


def read_parquet(stream):
    """The column `text`; every row is a document."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError("to read .parquet, pip install pyarrow; or give .jsonl files") from None
    row = 0
    for batch in parquet.ParquetFile(stream).iter_batches(batch_size=256, columns=["text"]):
        for row, text in enumerate(batch.column(0).to_pylist(), row + 1):
            yield "start", row, text or ""


READERS = {".txt": read_text, ".py": read_text, ".jsonl": read_jsonl, ".parquet": read_parquet}


def reader_of(path):
    suffix = os.path.splitext(path.removesuffix(".gz"))[1]
    if suffix not in READERS:
        raise UserError(f"{path}: unknown kind of file; known are {', '.join(READERS)}, each also with .gz")
    return READERS[suffix]


def batches(paths):
    """Documents by the batch, about BATCH bytes of one file: (path, bytes of all files read so far, documents)."""
    before = 0
    for path in paths:
        with open(path, "rb") as raw:
            stream, batch, size = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw, [], 0
            try:
                for document in reader_of(path)(stream):
                    batch.append(document)
                    size += len(document[2])
                    if size >= BATCH:
                        yield path, before + raw.tell(), batch
                        batch, size = [], 0
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"{path}: damaged gzip file ({error}); get it again") from None
        before += os.path.getsize(path)
        yield path, before, batch


def parse(line):
    """The text in one line of a .jsonl file. ValueError says what is wrong with the line. Bytes that are not UTF-8, and
    surrogates without their other half, which JSON can spell, become U+FFFD."""
    try:
        row = json.loads(line.decode("utf-8-sig", "replace"), strict=False)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError('no string "text"')
    return row["text"].encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def encode(batch, tokenizer):
    """Runs in the workers: (path, bytes read, [(whether a document starts, tokens)], [(line, reason)] of what is
    malformed, counts of bytes and of documents that are empty or odd, which is to have NUL or U+FFFD)."""
    path, done, records = batch
    documents, malformed, counts = [], [], Counter()
    for kind, line, text in records:
        try:
            text = parse(text) if kind == "json" else text
        except ValueError as error:
            malformed.append((line, str(error)))
            continue
        if kind != "more" and not text.strip():
            counts["empty"] += 1
            continue
        counts["bytes"] += len(text.encode())
        counts["odd"] += "\0" in text or "\ufffd" in text
        tokens = get_tokenizer(tokenizer).encode_array(text)
        if kind != "more":
            tokens = np.append(np.uint16(TOKENIZERS[tokenizer].eot), tokens)
        documents.append((kind != "more", tokens))
    return path, done, documents, malformed, counts


def in_order(function, items, workers):
    """map(function, items) by several processes: results in the order of items, only a few of them alive at a time.
    (Not by multiprocessing.Pool, which waits for ever when one of its processes is killed. Forked, not spawned: then
    they have the tokenizer that this process loaded already.)"""
    from concurrent.futures import ProcessPoolExecutor, process
    from multiprocessing import get_context
    waiting = deque()
    with ProcessPoolExecutor(workers, get_context("fork"), initializer=end_with_parent) as pool:
        try:
            for item in items:
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})     # workers inherit it: Ctrl-C is for us
                waiting.append(pool.submit(function, item))
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
                if len(waiting) == 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except process.BrokenProcessPool:
            raise UserError("a worker process was killed (out of memory?); try fewer --workers") from None
        finally:
            for future in waiting:
                future.cancel()


def end_with_parent():
    """Let this worker end when its parent does: a killed run must leave no process behind."""
    from multiprocessing import connection, parent_process

    def watch():
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class SplitWriter:
    """Cuts the tokens of one split into files of `limit` tokens; a document may run over into the next file."""

    def __init__(self, stem, limit):
        self.stem, self.limit, self.paths, self.tokens, self.room, self.file = stem, limit, [], 0, 0, None

    def append(self, tokens):
        self.tokens += len(tokens)
        while len(tokens):
            if not self.room:
                self.close()
                self.paths.append(f"{self.stem}_{len(self.paths):06d}.bin")
                self.file, self.room = open(self.paths[-1], "wb"), self.limit
                self.file.write(header(0))
            now, tokens = tokens[:self.room], tokens[self.room:]
            self.file.write(now.astype("<u2").tobytes())
            self.room -= len(now)

    def close(self):
        if self.file:
            self.file.seek(0)
            self.file.write(header(self.limit - self.room))
            self.file.close()
            self.file, self.room = None, 0


def tokenise(paths, folder, tokenizer="gpt2", workers=1, shard_tokens=SHARD_TOKENS, val_fraction=0.01,
             max_bad_lines=100, prefix="text"):
    """Make the shards of `folder` (whose lock the caller holds) from text files; returns its meta. Every
    1/val_fraction-th document is held out. The result depends on files and settings, not on the number of workers."""
    kinds, stats = [reader_of(path) for path in paths], [os.stat(path) for path in paths]
    recipe = {"inputs": [[os.path.basename(path), stat.st_size, stat.st_mtime_ns] for path, stat in zip(paths, stats)],
              "tokenizer": tokenizer, "shard_tokens": shard_tokens, "val_fraction": val_fraction}
    if done_before(folder, recipe):
        print(f"{folder}: these shards are there already, made from the same files with the same settings")
        return read_meta(folder)
    get_tokenizer(tokenizer)                                      # before the work, and before the workers are forked
    stage, size = os.path.join(folder, STAGE), sum(stat.st_size for stat in stats)
    shutil.rmtree(stage, ignore_errors=True)
    os.mkdir(stage)
    try:
        train, val = (SplitWriter(os.path.join(stage, f"{prefix}_{split}"), shard_tokens) for split in ("train", "val"))
        work = functools.partial(encode, tokenizer=tokenizer)
        workers = workers if read_parquet in kinds else min(workers, 1 + size // BATCH)
        results = map(work, batches(paths)) if workers == 1 else in_order(work, batches(paths), workers)
        counts = write_splits(results, train, val, val_fraction, max_bad_lines, Progress("tokenising", size / 1e6, "MB"))
        if val_fraction and not val.tokens:
            hold_out_tail(train, val, val_fraction, TOKENIZERS[tokenizer].eot)
        meta = publish(stage, folder, tokenizer, recipe)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    print(f"{folder}: {train.tokens:,} tokens to train on in {len(train.paths)} shards, {val.tokens:,} held out in "
          f"{len(val.paths)}, from {counts['bytes']:,} bytes of text; left out: {counts['empty']} empty documents, "
          f"{counts['malformed']} malformed lines; kept: {counts['odd']} documents with NUL or U+FFFD (not UTF-8)")
    return meta


def done_before(folder, recipe):
    """Whether these very shards are there. The same, cut short, are to be made again; others are not ours to touch."""
    meta = read_meta(folder)
    if meta.get("recipe") == recipe:
        return not missing(folder, meta)
    if "files" in meta or shard_names(folder):
        raise UserError(f"{folder}: holds shards made from other files or settings; remove it or choose another --out")
    return False


def write_splits(results, train, val, val_fraction, max_bad_lines, progress):
    """Append each document to its split and close both. Returns the counts; stops at too many malformed lines."""
    total, writer = Counter(), train
    for path, done, documents, malformed, counts in results:
        for line, reason in malformed:
            total["malformed"] += 1
            if total["malformed"] > max_bad_lines:
                raise UserError(f"{path}:{line}: {reason}; these are more malformed lines than --max_bad_lines="
                                 f"{max_bad_lines}, so nothing was written")
            if total["malformed"] <= 10:
                print(f"{path}:{line}: {reason}; left out", file=sys.stderr)
        for starts, tokens in documents:
            if starts:                                            # else more of the document before
                total["documents"] += 1
                n = total["documents"]                            # with 0.01, documents 100, 200, ... are held out
                writer = val if int(n * val_fraction) > int((n - 1) * val_fraction) else train
            writer.append(tokens)
        total.update(counts)
        progress.update(done / 1e6, f", {train.tokens + val.tokens:,} tokens")
    progress.end()
    if not train.tokens:
        raise UserError("there is no text in these files; nothing was written")
    train.close()
    val.close()
    return total


def hold_out_tail(train, val, fraction, eot):
    """No document fell to validation (there was only one?): hold out the end of the last training shard instead."""
    tokens = read_shard(train.paths[-1])
    tail = min(len(tokens) // 2, max(1, int(fraction * train.tokens)))
    write_shard(train.paths[-1], tokens[:len(tokens) - tail])
    train.tokens -= tail
    val.append(np.append(np.uint16(eot), tokens[len(tokens) - tail:]))
    val.close()
    print(f"no document fell to validation as a whole: the last {tail:,} tokens are held out instead")


def publish(stage, folder, tokenizer, recipe):
    """Move the shards to where train.py looks. meta.json goes first and lists them all: as long as one is missing,
    find_shards refuses the folder, so a kill between two renames leaves nothing to train on."""
    kind = TOKENIZERS[tokenizer]
    files = {name: examine(os.path.join(stage, name), kind.eot, kind.n_vocab) for name in shard_names(stage)}
    meta = {"tokenizer": tokenizer, "n_vocab": kind.n_vocab, "eot": kind.eot, "files": files, "recipe": recipe}
    write_meta(folder, meta)
    for name in files:
        publish_file(os.path.join(stage, name), os.path.join(folder, name))
    return meta


def write_default_shards(folder):
    """Data for a machine that has none: the source files of Python's own standard library as bytes, about 12 MB in a
    fixed order, a twentieth of the files held out. Returns the meta; a complete folder is used as it is."""
    try:
        with locked(folder, wait=True):
            meta = read_meta(folder)
            if "files" in meta and not missing(folder, meta):
                return meta
            paths = standard_library_files()
            print(f"{folder}: writing byte-level shards from the {len(paths)} source files of Python's standard "
                  f"library, {sum(map(os.path.getsize, paths)):,} bytes")
            return tokenise(paths, folder, "bytes", val_fraction=0.05, prefix="stdlib")
    except OSError as error:
        raise UserError(f"{folder}: the default data cannot be written ({error})") from None


def standard_library_files():
    root, skip = sysconfig.get_path("stdlib"), {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skip]
        paths += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    if not paths:
        raise UserError(f"{root}: this Python has no source files; make shards from your own text with --input=FILES")
    return sorted(paths)


# ---- one file from the network ---------------------------------------------------------------------------------------

FIRST_WAIT, LONGEST_WAIT = 1, 600            # seconds; a server that asks for a longer wait is left to the user
BLOCK = 1 << 14                              # bytes read at a time; a lost connection loses no more than that
SLOW_SECONDS, SLOW_BYTES = 30, 300_000       # a connection that brings fewer bytes in this time is begun anew


class TryAgain(Exception):
    """Worth another try, not sooner than `wait` seconds from now."""

    def __init__(self, reason, wait=0):
        super().__init__(reason)
        self.wait = wait


def hub():
    """(address, token or "") of the Hugging Face hub, from HF_ENDPOINT and HF_TOKEN."""
    endpoint = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/")
    return endpoint or "https://huggingface.co", os.environ.get("HF_TOKEN", "").strip()


def download(url, path, size=None, sha256=None, progress=None, stop=None, tries=8):
    """Bring `url` to `path`. It arrives as path.part, which a later call continues, is checked, then renamed.

    size (bytes) and sha256 (hex): what the file must have, where known. progress(bytes so far) replaces the line on
    stderr. The threading.Event `stop` ends the call early, without the file. UserError when the file cannot be had;
    it is given up after `tries` tries in a row that add nothing. HF_TOKEN is sent to the hub's own address alone.
    """
    name, part, stop, failures = os.path.basename(path), f"{path}.part", stop or threading.Event(), 0
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    most = size_of(part)
    while not stop.is_set():
        try:
            receive(url, part, size, progress, stop)
            if not stop.is_set():
                check_sha256(part, sha256)
                publish_file(part, path)
            return
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        except TryAgain as error:
            failures, most = (0, size_of(part)) if size_of(part) > most else (failures + 1, most)
            wait = max(error.wait, min(60, FIRST_WAIT * 2 ** max(0, failures - 1)))
            if failures == tries or wait > LONGEST_WAIT:
                raise UserError(f"{name}: {error}; given up after try {max(1, failures)} of {tries}") from None
            say(f"{name}: {error}; try {failures + 1} of {tries} in {wait:.0f} s", file=sys.stderr)
            stop.wait(wait)


def receive(url, part, size, progress, stop):
    """One connection: append to `part` what it lacks, or begin anew where the server does."""
    have = max(0, size_of(part) - 1)             # ask for one byte again: a range that begins at the end is an error
    with open(part, "ab") as file, get(url, have) as response:
        start = have if response.status_code == 206 else 0
        file.truncate(start)
        file.seek(start)
        if response.status_code == 416:
            raise TryAgain("more bytes came before than the file has; beginning anew")
        if not response.headers.get("Content-Range", f"bytes {start}-").startswith(f"bytes {start}-"):
            raise TryAgain(f"the server sent another part when asked to go on at byte {start}")
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if length.isdecimal() else size
        if size not in (None, total):
            raise TryAgain(f"the server offers {total} bytes where {size} are due")
        bar = Progress(f"downloading {os.path.basename(part)}", (total or 0) / 1e6, "MB", start / 1e6)
        copy(response, file, progress or (lambda done: bar.update(done / 1e6)), stop)
        bar.end()
        if total not in (None, file.tell()) and not stop.is_set():
            raise TryAgain(f"the connection ended at byte {file.tell()} of {total}")


def copy(response, file, progress, stop):
    """Write what the response brings to the file, until it ends, is lost, is too slow or `stop` is set."""
    import requests
    mark, marked = time.monotonic(), file.tell()
    try:
        for block in response.iter_content(BLOCK):
            file.write(block)
            progress(file.tell())
            if stop.is_set():
                return
            if (seconds := time.monotonic() - mark) > SLOW_SECONDS:
                if file.tell() < marked + SLOW_BYTES:
                    raise TryAgain(f"only {file.tell() - marked:,} bytes came in {seconds:.0f} s")
                mark, marked = time.monotonic(), file.tell()
    except requests.RequestException as error:
        raise TryAgain(f"connection lost ({type(error).__name__})") from None


def get(url, start):
    """The open response (200, 206, 416) to a GET of `url` from byte `start` on. TryAgain for what may pass, UserError
    for what will not."""
    import requests
    endpoint, token = hub()

    def authorize(request, response=None):       # called at every redirect too, and keeps out what ~/.netrc has
        request.headers.pop("Authorization", None)
        if token and origin(request.url) == origin(endpoint):
            request.headers["Authorization"] = f"Bearer {token}"
        return request

    session, host = requests.Session(), urlsplit(url).hostname
    session.auth = session.rebuild_auth = authorize
    try:
        response = session.get(url, headers={"Accept-Encoding": "identity", "Range": f"bytes={start}-"}, stream=True,
                               timeout=(10, 30))
    except ValueError as error:
        raise UserError(f"cannot ask {host} ({type(error).__name__}); check the address, HF_ENDPOINT and HF_TOKEN"
                        ) from None
    except requests.RequestException as error:
        raise TryAgain(f"no answer from {host} ({type(error).__name__})") from None
    status, asked = response.status_code, response.headers.get("Retry-After", "")
    if status in (200, 206) and "text/html" in response.headers.get("Content-Type", ""):
        raise TryAgain("a web page came instead of the file")
    if status in (200, 206, 416):
        return response
    if status in (408, 425, 429) or status >= 500:
        wait = int(asked) if asked.isdecimal() else 0                        # a date gets the usual wait
        raise TryAgain(f"HTTP {status}" + (f" (the server asks to wait {wait} s)" if wait else ""), wait)
    hint = "; set HF_TOKEN to a token that may read it" if status in (401, 403) else ""
    raise UserError(f"HTTP {status} from {host}{hint}")


def check_sha256(part, sha256):
    if sha256 and hashlib.sha256(np.memmap(part, mode="r")).hexdigest() != sha256:
        os.remove(part)
        raise TryAgain(f"what came is not the published file (sha256 {sha256})")


# ---- the paper's data: download --------------------------------------------------------------------------------------

REPO, TRAIN_SHARDS = "kjj0/finewebedu10B-gpt2", 99
FINEWEB_FOLDER = "data/fineweb_edu10B"
LONGEST_WAIT = 600                   # seconds a server may ask for before we leave it to the user
CHUNK = 1 << 16                      # bytes; at most so much of what came is lost with a connection


def published(shards):
    """{name: bytes} of the validation shard and the first training shards, as they lie in REPO."""
    names = ["finewebedu_val_000000.bin"] + [f"finewebedu_train_{i:06d}.bin" for i in range(1, shards + 1)]
    return {name: 107_979_712 if name == "finewebedu_train_000099.bin" else 200_001_024 for name in names}


class Retry(Exception):
    """Worth another try, not sooner than `wait` seconds from now; `cost` counts towards the number of attempts."""

    def __init__(self, reason, wait=0.0, cost=1):
        super().__init__(reason)
        self.wait, self.cost = wait, cost


class Hub:
    """HTTP to HF_ENDPOINT. HF_TOKEN goes to that scheme, host and port alone; no message has it or a URL's query."""

    def __init__(self):
        self.endpoint = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or "https://huggingface.co"
        token = os.environ.get("HF_TOKEN", "").strip()
        if not re.match(r"https?://[^/]", self.endpoint):
            raise UserError("HF_ENDPOINT is not an address like https://huggingface.co")
        if not re.fullmatch(r"[!-~]*", token):
            raise UserError("HF_TOKEN contains characters that no token has; set it again or unset it")
        self.secret = {"Authorization": f"Bearer {token}"} if token else {}

    def get(self, path, **headers):
        """The open response, 200 or 206, to a GET. Retry for what may pass, UserError for what will not."""
        import requests
        url = f"{self.endpoint}/{path}"
        for _ in range(10):
            try:       # redirects are followed here, to decide on the token each time; `auth` keeps out ~/.netrc
                secret = self.secret if origin(url) == origin(self.endpoint) else {}
                response = requests.get(url, headers={"Accept-Encoding": "identity", **headers, **secret}, stream=True,
                                        timeout=(10, 60), allow_redirects=False, auth=lambda request: request)
            except (requests.RequestException, ValueError) as error:
                raise Retry(f"no answer from {urlsplit(url).hostname} ({type(error).__name__})") from None
            if not response.is_redirect:
                return checked(response)
            response.close()
            url = urljoin(url, response.headers["Location"])
        raise Retry("redirected in a circle")

    def listing(self):
        """{name: (bytes, sha256)} of the repository's large files, as the hub's tree listing has it."""
        with self.get(f"api/datasets/{REPO}/tree/main") as response:
            try:
                return {row["path"]: (int(row["size"]), row["lfs"]["oid"]) for row in response.json() if row.get("lfs")}
            except (ValueError, KeyError, TypeError, AttributeError, OSError):
                raise Retry("the answer makes no sense") from None


def origin(url):
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def checked(response):
    """The response if it brings data; the error that it stands for if not."""
    status, web_page = response.status_code, "text/html" in response.headers.get("Content-Type", "")
    if status in (200, 206) and not web_page:
        return response
    response.close()
    if status in (200, 206):
        raise Retry("a web page came instead of the file")
    if status in (408, 416, 425, 429) or status >= 500:
        asked = response.headers.get("Retry-After", "")                    # seconds; a date gets the usual back-off
        raise Retry(f"HTTP {status}", float(asked) if asked.isdecimal() else 0.0)
    hint = "; set HF_TOKEN to a token that may read it" if status in (401, 403) else ""
    raise UserError(f"HTTP {status} from {urlsplit(response.url).hostname}{hint}")


def again(name, action, stop, backoff, attempts=8, progress=lambda: 0):
    """action(), repeated after a Retry with exponential back-off (`backoff` seconds at first) until `attempts` in a row
    brought nothing new. None when `stop` is set."""
    failures, best = 0, progress()
    while not stop.is_set():
        try:
            return action()
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        except Retry as error:
            failures = error.cost + (failures if progress() <= best else 0)
            best, wait = max(best, progress()), max(error.wait, min(60, backoff * 2 ** (failures - 1)))
            if wait > LONGEST_WAIT:
                raise UserError(f"{name}: {error}, and the server asks to wait {wait:.0f} s") from None
            if failures >= attempts:
                raise UserError(f"{name}: {error}, no luck in {attempts} tries") from None
            print(f"{name}: {error}; trying again in {wait:.0f} s", file=sys.stderr)
            stop.wait(wait)


def transfer(hub, name, size, part, stop, got):
    """One connection: append to the file `part` what it lacks of `size` bytes; begin anew where the server does."""
    import requests
    have = size_of(part)
    if have >= size:
        return
    resume = {"Range": f"bytes={have}-"} if have else {}
    with hub.get(f"datasets/{REPO}/resolve/main/{name}", **resume) as response, open(part, "ab") as file:
        start, place = have if response.status_code == 206 else 0, response.headers.get("Content-Range", "")
        if start and not place.startswith(f"bytes {start}-"):
            raise Retry(f"the server sent {place!r} when asked to go on at byte {start}")
        offer = response.headers.get("Content-Length", str(size - start))
        if offer != str(size - start):
            raise Retry(f"the server offers {offer} bytes where {size - start} are due")
        file.truncate(start)
        file.seek(start)
        try:
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                file.flush()
                got[name] = file.tell()
                if stop.is_set() or got[name] > size:
                    break
        except requests.RequestException as error:
            raise Retry(f"connection lost ({type(error).__name__})") from None
    if size_of(part) < size:
        raise Retry(f"the connection ended at byte {size_of(part)} of {size}")


def size_of(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


def fetch(hub, name, size, sha256, folder, stop, backoff, got):
    """Bring one shard into the folder. Returns its facts for meta.json, None when stopped; UserError if it cannot."""
    path = os.path.join(folder, name)
    part = f"{path}.part"

    def attempt():
        transfer(hub, name, size, part, stop, got)
        try:
            facts = examine(part, GPT2Tokenizer.eot, GPT2Tokenizer.n_vocab)
            wrong = [key for key, value in (("bytes", size), ("sha256", sha256)) if value not in (None, facts[key])]
        except UserError as error:
            wrong = [str(error).split(";")[0]]
        if wrong:                                 # twice wrong: it is not the line but what lies on the server
            os.remove(part)
            raise Retry(f"what came is not the published file ({wrong[0]})", cost=4)
        publish_file(part, path)
        return facts

    return again(name, attempt, stop, backoff, progress=lambda: size_of(part))


def download_shards(folder, shards=TRAIN_SHARDS, connections=4, backoff=1.0):
    """Bring the validation shard and the first `shards` training shards into `folder` (whose lock the caller holds);
    what is there already stays. UserError when a file cannot be had; what has come is kept for the next run."""
    from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
    hub, stop, meta = Hub(), threading.Event(), read_meta(folder)
    if "recipe" in meta:
        raise UserError(f"{folder}: holds shards made from your own text; choose another --out")
    wanted = sizes_and_checksums(hub, shards, stop, backoff)
    got = {name: size_of(os.path.join(folder, name)) for name in wanted}
    todo = [name for name, (size, _) in wanted.items() if got[name] != size]
    files = meta.setdefault("files", {})
    for name, (size, sha256) in wanted.items():
        files.setdefault(name, {"bytes": size, "sha256": sha256})
    meta |= {"n_vocab": GPT2Tokenizer.n_vocab, "eot": GPT2Tokenizer.eot}
    meta["files"] = {name: files[name] for name in files if name not in todo}     # the others when they have arrived
    write_meta(folder, meta)
    got |= {name: size_of(os.path.join(folder, f"{name}.part")) for name in todo}
    total = sum(size for size, _ in wanted.values())
    check_space(folder, total - sum(got.values()))
    progress, pool = Progress("downloading", total / 1e6, "MB", sum(got.values()) / 1e6), ThreadPoolExecutor(connections)
    try:
        waiting = {pool.submit(fetch, hub, name, *wanted[name], folder, stop, backoff, got): name for name in todo}
        while waiting:
            for future in wait(waiting, 0.5, FIRST_COMPLETED).done:
                meta["files"][waiting.pop(future)] = future.result()
                write_meta(folder, meta)
            progress.update(sum(got.values()) / 1e6)
    except UserError as error:
        raise UserError(f"{error}; what has come is kept, run the same command again to go on") from None
    finally:
        progress.end()
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
    print(f"{folder}: the validation shard and {shards} training shards are complete, {len(todo)} of these came now")


def sizes_and_checksums(hub, shards, stop, backoff):
    """{name: (bytes, sha256)} of the files to have: as the hub lists them, else as published, without checksums."""
    try:
        known = again("list of files", hub.listing, stop, backoff, attempts=3)
    except UserError as error:
        print(f"{error}; going on without it: published sizes, no checksums", file=sys.stderr)
        known = {}
    return {name: known.get(name, (size, None)) for name, size in published(shards).items()}


def check_space(folder, need):
    free = shutil.disk_usage(folder).free
    if need > free - (64 << 20):
        raise UserError(f"{folder}: {need / 1e9:.1f} GB are still to come but {free / 1e9:.1f} GB are free; make "
                         "room, choose another --out, or take fewer --shards")


# ---- verify ----------------------------------------------------------------------------------------------------------

def verify(folder):
    """Read every shard again, compare it with what is known of it, print a line for each. Returns how many are bad."""
    meta, bad = read_meta(folder), 0
    kind, files, sizes = TOKENIZERS[meta["tokenizer"]], meta.get("files", {}), published(TRAIN_SHARDS)
    names = sorted({*shard_names(folder), *files})
    if not names:
        raise UserError(f"{folder}: there are no shards here")
    for name in names:
        path, known = os.path.join(folder, name), files.get(name) or ({"bytes": sizes[name]} if name in sizes else {})
        try:
            facts = examine(path, kind.eot, kind.n_vocab)
            if wrong := [key for key, value in known.items() if value not in (None, facts[key])]:
                raise unsound(path, f"{wrong[0]} {facts[wrong[0]]} should be {known[wrong[0]]}")
            checksum = "checksum matches" if known.get("sha256") else "no checksum known"
            print(f"good  {name}: {facts['tokens']:,} tokens, {facts['documents']:,} documents, {checksum}", flush=True)
        except UserError as error:
            bad += 1
            print(f"BAD   {error}", flush=True)
    print(f"{folder}: {len(names) - bad} of {len(names)} shards are good")
    return bad


# ---- the command line ------------------------------------------------------------------------------------------------

def parse_args(argv):
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
    add("--workers", type=int, default=os.cpu_count(), metavar="N",
        help="processes for --input (default: one a core); the result does not depend on it")
    add("--shard_tokens", type=int, default=SHARD_TOKENS, metavar="N",
        help=f"tokens in a file made from --input (default: {SHARD_TOKENS})")
    add("--val_fraction", type=float, default=0.01, metavar="F",
        help="share of the documents of --input held out; 0.01 (default) takes the 100th, 200th, ...")
    add("--max_bad_lines", type=int, default=100, metavar="N",
        help="malformed lines of .jsonl to leave out before giving up (default: 100)")
    # "--input=a b" shall mean "--input a b", since a shell expands no pattern behind "="
    args = parser.parse_args([w for arg in argv for w in (arg.split("=", 1) if arg.startswith("--input=") else [arg])])
    for name, low, high in (("shards", 0, TRAIN_SHARDS), ("workers", 1, 512), ("shard_tokens", 2, 2**31 - 1),
                            ("val_fraction", 0, 0.9), ("max_bad_lines", 0, 2**31)):
        if not low <= vars(args)[name] <= high:
            parser.error(f"--{name}={vars(args)[name]} is not in {low} .. {high}")
    if args.input and (args.command or not args.out):
        parser.error("--input needs --out=DIR and no other command")
    args.out = args.out or FINEWEB_FOLDER
    return args


def expand(patterns):
    """File names from names and patterns, in the order given; the matches of a pattern sorted."""
    paths = []
    for pattern in patterns:
        found = [pattern] if os.path.isfile(pattern) else [p for p in sorted(glob.glob(pattern)) if os.path.isfile(p)]
        if not found:
            raise UserError(f"{pattern}: no such file; --input takes files and patterns like 'folder/*.jsonl.gz'")
        paths += found
    return paths


def run(args):
    if args.command == "verify":
        return 1 if verify(args.out) else 0
    paths = expand(args.input or [])
    with locked(args.out):
        if args.input:
            tokenise(paths, args.out, args.tokenizer, args.workers, args.shard_tokens, args.val_fraction,
                     args.max_bad_lines)
        else:
            download_shards(args.out, args.shards)
    print(f"next: python train.py --data={args.out}")
    return 0


def main():
    """The command line."""
    return run(parse_args(sys.argv[1:]))


if __name__ == "__main__":
    command_line(main, memory="try fewer --workers")
