"""Token shards: where the training data come from, how they lie on the disk, and how to check them.

    python prepare_fineweb.py                           the paper's data, already tokenised: 100 files, 19.9 GB
    python prepare_fineweb.py --shards=5                its validation shard and first 5 training shards: 1.2 GB
    python prepare_fineweb.py --input=FILES --out=DIR   your own text: .jsonl, plain text, .gz of both
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
import itertools
import json
import math
import os
import re
import shutil
import sys
import sysconfig
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


def check_writable(path):
    """UserError if no file can be written to `path`, for a script to say so before its work; "" is no file."""
    if path and (os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK)):
        raise UserError(f"{path}: must be a file in a folder that exists and can be written")


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
        held = FileLock(path).acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise UserError(f"{folder}: another run is writing there; wait for it, or choose another folder") from None
    held.file = os.stat(path)                                    # for still_locked
    return held


def still_locked(held):
    """Whether the lock file that `held`, of `locked`, stands for is still the one at its path. It is not when the
    folder was renamed or removed, or another has taken its name: what is written there then belongs to another run."""
    try:
        return os.path.samestat(held.file, os.stat(held.lock.lock_file))
    except OSError:
        return False


def json_lines(lines, path, kind, convert):
    """convert(value) of the JSON on each line that is not blank. UserError names the first line that is not `kind`."""
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                yield convert(json.loads(line))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not {kind} ({type(error).__name__}: {error})") from None


def command_line(main, *errors, memory="use a smaller batch"):
    """Run a script's main() and exit with the code it returns. What a user did wrong is one line, not a traceback:
    UserError, OSError and the exceptions `errors`; `memory` says what to do where it runs out."""
    script = os.path.basename(sys.argv[0])
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))    # closed: None
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:                                      # the reader of a pipe has left, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + 13
    except (UserError, OSError, *errors) as error:
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
    """Read a whole shard, some MB at a time: {tokens, sha256}. UserError when it is not sound."""
    count, n_vocab, sha256 = shard_tokens(path), TOKENIZERS[tokenizer], hashlib.sha256()
    sha256.update(read_window(path, -HEADER_BYTES // 2, HEADER_BYTES // 2))
    for start in range(0, count, 1 << 21):
        tokens = read_window(path, start, min(1 << 21, count - start))
        sha256.update(tokens)
        if tokens.max() >= n_vocab:
            raise damaged(path, f"token {tokens.max()} is not in the vocabulary of {n_vocab}")
    return {"tokens": count, "sha256": sha256.hexdigest()}


def damaged(path, what):
    return UserError(f"{path}: {what}; remove it and run the command that made it again "
                     f"(python prepare_fineweb.py ... --out={os.path.dirname(path) or '.'})")


# ---- tokenizers ------------------------------------------------------------------------------------------------------

class Tokenizer:
    """.name .n_vocab .eot .encode(text) .decode(ids), and .n_bytes(ids): the number of UTF-8 bytes that the ids stand
    for (the end of text stands for none). A special token that is spelled out in a text is text; half of a surrogate
    pair, which JSON can spell, is "?"."""

    def __init__(self, name, table, to_array):
        self.name, self.n_vocab, self.eot = name, TOKENIZERS[name], TOKENIZERS[name] - 1
        self.table, self.to_array = [*table, b"<|endoftext|>"], to_array     # bytes of each token; text -> ids as array
        self.lengths = np.array([*map(len, table), 0])

    def encode(self, text):
        return self.to_array(text).tolist()

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
        return Tokenizer(name, [bytes([i]) for i in range(256)],
                         lambda text: np.frombuffer(text.encode(errors="replace"), np.uint8))
    import requests
    import tiktoken
    try:
        bpe = tiktoken.get_encoding("gpt2")
    except (requests.RequestException, OSError, ValueError) as error:
        raise UserError(f"tiktoken cannot get the vocabulary of GPT-2 ({type(error).__name__}); go online once, set "
                        "TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer=bytes") from None
    return Tokenizer(name, [bpe.decode_single_token_bytes(i) for i in range(50256)],
                     lambda text: bpe.encode_to_numpy(text.encode(errors="replace").decode(), disallowed_special=()))


# ---- a folder of shards ----------------------------------------------------------------------------------------------

def read_meta(folder):
    """meta.json of a folder: "tokenizer" and, where known, "files", {name: {tokens, sha256}}. A folder without one
    holds GPT-2 tokens. UserError when it cannot be used."""
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


def find_shards(folder, split):
    """Sorted paths of the "train" or "val" shards. UserError when there is none, or when a listed file is missing."""
    if gone := sorted({*read_meta(folder).get("files", {})} - {*shard_names(folder)}):
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

def documents(paths, counts):
    """The documents of text files in turn, without empty ones. A file that is no .jsonl is one document. counts["read"]
    is the number of bytes read so far."""
    for path in paths:
        before = counts["read"]
        with open(path, "rb") as file:
            stream = gzip.GzipFile(fileobj=file) if path.endswith(".gz") else file
            try:
                for text in (json_lines(stream, path, 'a JSON object with a string "text"', text_of)
                             if path.removesuffix(".gz").endswith(".jsonl") else [stream.read().decode("utf-8-sig")]):
                    counts["read"] = before + file.tell()
                    if text.strip():
                        yield text
            except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"{path}: {error}; nothing was written") from None


def text_of(row):
    """The document in a line of a .jsonl file. TypeError where it is no string."""
    return "" + row["text"]


def encode(texts, tokenizer, workers):
    """The tokens of the texts, in order, as arrays; only some are in memory. Threads serve, since tiktoken releases the
    interpreter's lock."""
    pool = ThreadPoolExecutor(workers)                           # `with` would make Ctrl-C wait for the end of a text
    while some := list(itertools.islice(texts, 64 * workers)):
        yield from pool.map(tokenizer.to_array, some)


def write_splits(paths, stem, tokenizer, workers, limit, val_fraction):
    """Write the documents of text files as shards STEM_train_000000.bin, STEM_val_000000.bin, ... of `limit` tokens; a
    document may run over into the next file. Returns {"train": tokens, "val": tokens, ...}."""
    counts, waiting, written = Counter(), {"train": [], "val": []}, Counter()
    bar = Progress("tokenising", sum(map(os.path.getsize, paths)) / 1e6, "MB")

    def write(split, keep):
        while counts[split] - written[split] * limit > keep:
            tokens = np.concatenate(waiting[split])
            write_shard(f"{stem}_{split}_{written[split]:06d}.bin", tokens[:limit])
            waiting[split], written[split] = [tokens[limit:]], written[split] + 1

    for n, tokens in enumerate(encode(documents(paths, counts), tokenizer, workers)):
        # with 0.01, documents 100, 200, ... are held out
        split = "val" if int((n + 1) * val_fraction) > int(n * val_fraction) else "train"
        waiting[split].append(np.append(tokenizer.eot, tokens).astype(np.uint16))
        counts[split] += 1 + len(tokens)
        write(split, limit + 2 * WINDOW)                           # the end of "train" may have to become "val"
        bar.update(counts["read"] / 1e6, f", {counts['train'] + counts['val']:,} tokens")
    bar.end()
    if not counts["train"]:
        raise UserError("there is no text in these files; nothing was written")
    if val_fraction and counts["val"] < WINDOW:                   # few documents, or one: hold out the end too
        tokens = np.concatenate(waiting["train"])
        tail = min(len(tokens) // 2, max(WINDOW, int(val_fraction * counts["train"])))
        rest, end = np.split(tokens, [len(tokens) - tail])
        waiting["train"], waiting["val"] = [rest], [*waiting["val"], [tokenizer.eot], end]
        counts["train"], counts["val"] = counts["train"] - tail, counts["val"] + 1 + tail
    write("train", 0)
    write("val", 0)
    return counts


def tokenise(paths, folder, tokenizer, workers=1, shard_tokens=SHARD_TOKENS, val_fraction=0.01, prefix="text",
             wait=False):
    """Make the shards of `folder` from text files, in folder.part, which is renamed when all are complete; returns the
    meta. With `wait`, another run that writes there is waited for, and what it wrote is taken."""
    with locked(folder, wait, beside=True):
        if wait and shard_names(folder):
            return read_meta(folder)
        if os.path.isdir(folder) and os.listdir(folder):
            raise UserError(f"{folder}: is there already; remove the folder or choose another --out")
        part = f"{os.path.realpath(folder)}.part"
        shutil.rmtree(part, ignore_errors=True)                  # of a run that was killed
        try:
            os.mkdir(part)
            counts = write_splits(paths, os.path.join(part, prefix), get_tokenizer(tokenizer), workers, shard_tokens,
                                  val_fraction)
            files = {name: examine(os.path.join(part, name), tokenizer) for name in shard_names(part)}
            meta = {"tokenizer": tokenizer, "files": files}
            write_meta(part, meta)
            publish_file(part, os.path.realpath(folder))
        finally:
            shutil.rmtree(part, ignore_errors=True)
    say(f"{folder}: {counts['train']:,} tokens to train on, {counts['val']:,} held out")
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

TIMEOUT, BLOCK = (10, 30), 1 << 14           # seconds to connect, and of silence; bytes read at a time
LONGEST_WAIT = 600                           # seconds before the next try; a server that asks for more is given up
HUB = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or "https://huggingface.co"


def download(url, path, size=None, progress=None, tries=8):
    """Bring `url`, a file of `size` bytes where that is known, to `path`. It arrives as path.part, which a later call
    continues, and is renamed when complete. progress(bytes so far) replaces the line on stderr. UserError when it
    cannot be had, or after `tries` tries in a row that add nothing. HF_TOKEN is sent to the hub's address alone."""
    name, part, failures = os.path.basename(path), f"{path}.part", 0
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    while True:
        before = size_of(part)
        problem, wait = receive(url, part, size, progress)
        if not problem:
            return publish_file(part, path)
        say("\n" * sys.stderr.isatty(), end="", file=sys.stderr)            # leave the line of progress
        failures = 0 if size_of(part) > before else failures + 1
        wait = max(wait, min(60, 2 ** failures / 2))
        if failures == tries or wait > LONGEST_WAIT:
            raise UserError(f"{name}: {problem}; given up after try {failures} of {tries}")
        say(f"{name}: {problem}; try {failures + 1} of {tries} in {wait:.0f} s", file=sys.stderr)
        time.sleep(wait)


def size_of(path):
    """Bytes in a file, 0 where there is none."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def receive(url, part, size, progress):
    """One connection: append to `part` what it lacks, or begin anew where the server does. Returns (what is wrong,
    seconds to wait at least): ("", 0) when the file is complete, infinity where another try is useless."""
    import requests
    have, token = size_of(part), os.environ.get("HF_TOKEN", "").strip()
    if have == size:                     # a kill came before the renaming
        return "", 0

    def authorize(request):              # for the first address; requests itself takes the header out where a redirect
        if token and url.startswith(f"{HUB}/"):                          # leads to another host or port
            request.headers["Authorization"] = f"Bearer {token}"
        return request

    headers = {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
    try:
        with requests.get(url, headers=headers, auth=authorize, stream=True, timeout=TIMEOUT) as response:
            status, asked = response.status_code, response.headers.get("Retry-After", "")
            if status in (408, 425, 429) or status >= 500:               # a date in Retry-After gets the usual wait
                return f"HTTP {status}, Retry-After: {asked or 'none'}", int(asked) if asked.isdecimal() else 0
            if status == 416:                                            # the part is no shorter than the file
                os.remove(part)
                return "what came earlier cannot be continued; begun anew", 0
            if status not in (200, 206):
                hint = "; set HF_TOKEN to a token that may read it" if status in (401, 403) else ""
                return f"HTTP {status}{hint}", math.inf
            if "text/html" in response.headers.get("Content-Type", ""):
                return "a web page came instead of the file", 0
            return copy(response, part, have if status == 206 else 0, size, progress), 0
    except ValueError as error:                                          # its text may hold the token
        return f"no such address or token ({type(error).__name__}); check HF_ENDPOINT and HF_TOKEN", math.inf
    except requests.RequestException as error:
        return f"no connection, or a lost one ({type(error).__name__})", 0


def copy(response, part, start, size, progress):
    """Write what the response brings to the file `part` from byte `start` on. Returns what is wrong, "" if nothing."""
    length, place = response.headers.get("Content-Length", ""), response.headers.get("Content-Range", "")
    total = start + int(length) if length.isdecimal() else size
    if size not in (None, total) or (place and not place.startswith(f"bytes {start}-")):
        return f"the server offers {length} bytes {place} where byte {start} to {size} is due"
    bar = Progress(f"downloading {os.path.basename(part)}", (total or 0) / 1e6, "MB", start / 1e6)
    with open(part, "r+b" if start else "wb") as file:
        file.seek(start)
        for block in response.iter_content(BLOCK):
            file.write(block)
            done = file.tell()
            progress(done) if progress else bar.update(done / 1e6)
    bar.end()
    return "" if total in (None, size_of(part)) else f"the connection ended at byte {size_of(part)} of {total}"


def published(shards):
    """{name: bytes} of the validation shard and the first training shards, as they lie in REPO."""
    names = ["finewebedu_val_000000.bin"] + [f"finewebedu_train_{i:06d}.bin" for i in range(1, shards + 1)]
    return {name: 107_979_712 if name == "finewebedu_train_000099.bin" else 200_001_024 for name in names}


def download_shards(folder, shards=TRAIN_SHARDS):
    """Bring the validation shard and the first `shards` training shards into `folder`; what is there already stays."""
    with locked(folder, beside=True):
        meta, sizes = read_meta(folder), published(shards)
        if {*shard_names(folder)} - {*published(TRAIN_SHARDS)}:
            raise UserError(f"{folder}: holds other shards; choose another --out")
        files, paths = meta.setdefault("files", {}), {name: os.path.join(folder, name) for name in sizes}
        lacking = [name for name, path in paths.items() if size_of(path) != sizes[name]]
        bar = Progress("downloading", sum(sizes[name] for name in lacking) / 1e6, "MB",
                       sum(size_of(f"{paths[name]}.part") for name in lacking) / 1e6)
        came = 0
        for name, path in paths.items():
            if name in lacking:
                download(f"{HUB}/datasets/{REPO}/resolve/main/{name}", path, sizes[name],
                         lambda done: bar.update((came + done) / 1e6, f", {name}"))
                came += sizes[name]
            if name in lacking or name not in files:
                files[name] = examine(path, "gpt2")
                write_meta(folder, meta)
        bar.end()
    say(f"{folder}: the validation shard and {shards} training shards are complete")


# ---- the command line ------------------------------------------------------------------------------------------------

def verify(folder):
    """Read every shard again, compare it with meta.json, print a line for each. Returns how many are bad."""
    meta, bad = read_meta(folder), 0
    files = meta.get("files", {})
    names = sorted({*shard_names(folder), *files})
    if not names:
        raise UserError(f"{folder}: there are no shards here")
    for name in names:
        path = os.path.join(folder, name)
        try:
            facts = examine(path, meta["tokenizer"])
            if any(files.get(name, {}).get(key) not in (None, value) for key, value in facts.items()):
                raise damaged(path, f"{facts} where meta.json has {files[name]}")
            say(f"good  {name}: {facts['tokens']:,} tokens" + ", not in meta.json" * (name not in files))
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
        "line of .jsonl (its field \"text\") is a document, and so is the whole of any other file; all in UTF-8")
    add("--tokenizer", choices=TOKENIZERS, default="gpt2", help="for --input (default: gpt2)")
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="threads for --input (default: one a core)")
    add("--shard_tokens", type=int, default=SHARD_TOKENS, metavar="N",
        help=f"tokens in a file made from --input (default: {SHARD_TOKENS})")
    add("--val_fraction", type=float, default=0.01, metavar="F",
        help="share of the documents of --input held out; 0.01 (default) takes the 100th, 200th, ...")
    # "--input=a b" shall mean "--input a b", since a shell expands no pattern behind "="
    args = parser.parse_args([w for arg in sys.argv[1:] for w in re.split("(?<=^--input)=", arg)])
    if not (0 <= args.shards <= TRAIN_SHARDS and args.workers > 0 and 1 < args.shard_tokens < 2 ** 31
            and 0 <= args.val_fraction < 1):
        parser.error(f"--shards is 0 to {TRAIN_SHARDS}, --workers at least 1, --shard_tokens 2 to 2147483647, "
                     "--val_fraction from 0 to below 1")
    if args.input and (args.command or not args.out):
        parser.error("--input needs --out=DIR and no other command")
    return args


def main():
    args = parse_args()
    out = args.out or FINEWEB_FOLDER
    if args.command == "verify":
        return 1 if verify(out) else 0
    if args.input:
        paths = [path for pattern in args.input for path in sorted(glob.glob(pattern)) or [pattern]]
        tokenise(paths, out, args.tokenizer, args.workers, args.shard_tokens, args.val_fraction)
    else:
        download_shards(out, args.shards)
    say(f"next: python train.py --data={out}")


if __name__ == "__main__":
    command_line(main, memory="use fewer --workers or smaller --shard_tokens")
