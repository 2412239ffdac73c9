"""Token shards: where the training data come from, how they lie on the disk, how to check them.

    python prepare_fineweb.py                the paper's data, already tokenised: 19.9 GB
    python prepare_fineweb.py --shards=5     its validation shard, first 5 training shards: 1.2 GB
    python prepare_fineweb.py --input=FILES --out=DIR
                                             your own text: .jsonl, plain text, .gz of both
    python prepare_fineweb.py verify --out=DIR
                                             read everything again and compare

A shard (the format of llm.c and modded-nanogpt) is a header of 256 little-endian int32: magic
20240520, version 1, number of tokens, zeros; then that many little-endian uint16 tokens. A
document STARTS with the end-of-text token. Files are named *_train_%06d.bin and *_val_%06d.bin.
meta.json beside them names the tokenizer and lists the files with their number of tokens and
sha256; without it the tokenizer is GPT-2's. A file is written under a temporary name, then renamed.

The format, your own text, the download; the last part is what all scripts of the project share.
"""

import argparse
import concurrent.futures
import functools
import glob
import gzip
import hashlib
import json
import math
import os
import random
import re
import shlex
import shutil
import sys
import sysconfig
import time
import zlib
from contextlib import contextmanager, suppress

import numpy as np
from filelock import FileLock, Timeout

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
SHARD_TOKENS = 100_000_000                   # 200 MB a file, like the published shards

REPO = "kjj0/finewebedu10B-gpt2"             # the paper's data on the Hugging Face hub
TRAIN_SHARDS = 99
FINEWEB_FOLDER = "data/fineweb_edu10B"
HUB = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or "https://huggingface.co"


# ---------------------------------------------------------------------------------- a shard

def write_shard(path, tokens):
    """Write token ids (N,), each in 0..65535, as the shard `path`, which appears whole or not at
    all."""
    tokens = np.asarray(tokens)
    if tokens.size == 0 or tokens.min() < 0 or tokens.max() > 65535:
        raise UserError(f"{path}: a shard holds at least one token, and each is in 0..65535")
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with atomic_write(path) as file:
        file.write(header)
        file.write(tokens.astype("<u2", copy=False))


def read_shard(path):
    """All tokens of a shard, (N,) uint16. UserError as shard_tokens and read_window."""
    return read_window(path, 0, shard_tokens(path))


def read_window(path, start, count):
    """Tokens start .. start + count of a shard, (count,) uint16. A plain read: where a memory map
    of a file that was cut off meanwhile kills the process with SIGBUS, this raises UserError."""
    try:
        tokens = np.fromfile(path, "<u2", count, offset=HEADER_BYTES + 2 * start)
    except OSError as error:
        raise Damaged(path, f"cannot be read ({error.strerror})") from None
    if len(tokens) != count:
        missing = count - len(tokens)
        raise Damaged(path, f"ends {missing} tokens before token {start + count}")
    return tokens


def read_header(path):
    """The bytes in front of a shard's tokens. UserError where the file has fewer."""
    try:
        with open(path, "rb") as file:
            header = file.read(HEADER_BYTES)
    except OSError as error:
        raise Damaged(path, f"cannot be read ({error.strerror})") from None
    if len(header) < HEADER_BYTES:
        raise Damaged(path, f"is no shard: it has {len(header)} bytes, less than a header")
    return header


def shard_tokens(path):
    """Number of tokens in a shard, by its header and length alone. UserError when these disagree
    or it is empty."""
    magic, version, count = np.frombuffer(read_header(path), "<i4", 3).tolist()
    size = os.path.getsize(path)
    due = (size - HEADER_BYTES) // 2
    if (magic, version, count) != (MAGIC, VERSION, due) or size % 2 or due < 1:
        raise Damaged(
            path,
            f"is no shard of {size} bytes: its header says magic {magic}, version {version} and "
            f"{count} tokens where magic {MAGIC}, version {VERSION} and {due} tokens are due",
        )
    return count


def examine(path, tokenizer):
    """Read a whole shard, some MB at a time: {tokens, sha256}. UserError when it is not sound."""
    count = shard_tokens(path)
    n_vocab, _ = TOKENIZERS[tokenizer]
    sha256 = hashlib.sha256(read_header(path))
    step = 1 << 21
    for start in range(0, count, step):
        tokens = read_window(path, start, min(step, count - start))
        sha256.update(tokens)
        if tokens.max() >= n_vocab:
            raise Damaged(path, f"token {tokens.max()} is not in the vocabulary of {n_vocab}")
    return {"tokens": count, "sha256": sha256.hexdigest()}


# ---------------------------------------------------------------------- a folder of shards

UNFINISHED = "unfinished"                    # a file that stands beside shards until all are there


def find_shards(folder, split):
    """Sorted paths of the "train" or "val" shards. UserError when there is none, or when the folder
    is not what meta.json says: a file is missing or not listed, or has another number of tokens.
    Changed tokens in a file of the same length are seen by `verify`, which reads all, not here."""
    files = read_meta(folder).get("files")
    if files is not None:
        check_names(folder, files)
    names = shard_names(folder, split)
    if not names:
        raise UserError(f"{folder}: no {split} shard (*_{split}_000000.bin) here; "
                        "to get the paper's data: python prepare_fineweb.py "
                        f"--out={shlex.quote(str(folder))}, or with --input=FILES your own text")
    paths = [os.path.join(folder, name) for name in names]
    for name, path in zip(names, paths):
        count = shard_tokens(path)
        listed = (files or {}).get(name, {}).get("tokens", count)
        if count != listed:
            raise Damaged(path, f"holds {count} tokens where meta.json has {listed}")
    return paths


def check_names(folder, files):
    """UserError unless the shards in a folder are those that meta.json lists, no more, no less."""
    there = shard_names(folder)
    missing = sorted({*files} - {*there})
    unlisted = sorted({*there} - {*files})
    if missing:
        raise UserError(f"{folder}: {missing[0]} is not there but meta.json lists it "
                        f"({len(missing)} such files); {run_again(folder)}")
    if unlisted:
        raise UserError(f"{folder}: {unlisted[0]} is there but meta.json does not list it "
                        f"({len(unlisted)} such files); remove it, or {run_again(folder)}")


def shard_names(folder, split="train|val"):
    """Sorted file names of the shards in a folder, none where there is no folder."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in names if re.search(rf"_({split})(_\d+)?\.bin$", name))


def read_meta(folder):
    """meta.json of a folder: "tokenizer" and, where known, "files", {name: {tokens, sha256}}, {}
    for one that has not come or was not read yet. A
    folder without one holds GPT-2 tokens. UserError when it cannot be used."""
    path = os.path.join(folder, "meta.json")
    if is_unfinished(folder):
        raise UserError(f"{folder}: another run writes shards there, or was stopped; wait for it, "
                        f"or {run_again(folder)}")
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
        check_meta(meta)
        return meta
    except FileNotFoundError as error:
        if os.path.islink(path):
            raise Damaged(path, f"cannot be used ({error!r})") from None
        return {"tokenizer": "gpt2"}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(path, f"cannot be used ({error!r})") from None


def check_meta(meta):
    """ValueError, KeyError or TypeError where meta.json does not hold what read_meta promises."""
    if meta["tokenizer"] not in TOKENIZERS:
        raise ValueError(f"unknown tokenizer {meta['tokenizer']!r}")
    files = meta.get("files", {})
    if not isinstance(files, dict):
        raise ValueError("its files have no names")
    for name, facts in files.items():
        if not isinstance(facts, dict) or not isinstance(facts.get("tokens", 0), int):
            raise ValueError(f"it has no number of tokens for {name}")


def write_meta(folder, meta):
    """Write meta.json of a folder."""
    with atomic_write(os.path.join(folder, "meta.json")) as file:
        file.write(json.dumps(meta, indent=1).encode())


def fingerprint(folder, split):
    """[[file name, tokens, checksum], ...] of a split, to compare when a run is resumed. The
    checksum is a CRC-32 of 32 blocks of 4 KiB spread over the file, or of all of a small one: a
    change between these blocks is not seen."""
    rows = []
    for path in find_shards(folder, split):
        count = shard_tokens(path)
        starts = range(0, count, max(2048, count // 32))
        blocks = [read_window(path, start, min(2048, count - start)) for start in starts]
        checksum = zlib.crc32(np.concatenate(blocks))
        rows.append([os.path.basename(path), count, f"{checksum:08x}"])
    return rows


def verify(folder):
    """Read every shard again, compare it with meta.json, print a line for each. Returns how many
    are bad."""
    meta = read_meta(folder)
    there = shard_names(folder)
    files = meta.get("files", dict.fromkeys(there, {}))
    names = sorted({*there, *files})
    if not names:
        raise UserError(f"{folder}: there are no shards here")
    bad = 0
    for name in names:
        listed = files.get(name)
        path = os.path.join(folder, name)
        try:
            if listed is None:
                raise UserError(f"{path}: meta.json does not list it; remove it, or "
                                f"{run_again(folder)}")
            facts = examine(path, meta["tokenizer"])
            if any(listed.get(key) not in (None, value) for key, value in facts.items()):
                raise Damaged(path, f"{facts} where meta.json has {listed}")
        except UserError as error:
            bad += 1
            say(f"BAD   {error}")
        else:
            unlisted = "" if listed else ", not in meta.json"
            say(f"good  {name}: {facts['tokens']:,} tokens{unlisted}")
    say(f"{folder}: {len(names) - bad} of {len(names)} shards are good")
    return bad


# ------------------------------------------------------------------------------ tokenizers

class Tokenizer:
    """.name .n_vocab .eot .encode(text) .decode(ids), and .n_bytes(ids): the number of UTF-8 bytes
    that the ids stand for (the end of text stands for none).

    pieces: the bytes of each token. eot: the id of the end of text. to_ids(text): the ids of a
    text, list or array; a special token that is spelled out in the text must come out as text. Half
    of a surrogate pair, which JSON can spell, is "?"."""

    def __init__(self, name, pieces, eot, to_ids):
        self.name = name
        self.n_vocab = len(pieces)
        self.eot = eot
        self.pieces = list(pieces)
        self.pieces[eot] = b"<|endoftext|>"
        self.lengths = np.array([len(piece) for piece in self.pieces])
        self.lengths[eot] = 0
        self.to_ids = to_ids

    def to_array(self, text):
        return np.asarray(self.to_ids(text.encode(errors="replace").decode()))

    def encode(self, text):
        return self.to_array(text).tolist()

    def decode(self, ids):
        unknown = "\ufffd".encode()          # a model's vocabulary is padded beyond ours
        known = (self.pieces[i] if i < self.n_vocab else unknown for i in ids)
        return b"".join(known).decode(errors="replace")

    def n_bytes(self, ids):
        return int(self.lengths[np.asarray(ids, np.int64)].sum())


def make_bytes():
    """The 256 bytes of UTF-8 and an end of text."""
    pieces = [bytes([i]) for i in range(256)]
    pieces.append(b"")
    return Tokenizer("bytes", pieces, 256, lambda text: np.frombuffer(text.encode(), np.uint8))


SPACE = r"[^\S\x1c-\x1f]"                    # white space in tiktoken's eyes; Python has four more


def make_gpt2():
    """tiktoken's GPT-2."""
    import requests
    import tiktoken
    try:
        bpe = tiktoken.get_encoding("gpt2")
    except (requests.RequestException, OSError, ValueError) as error:
        raise UserError(
            f"tiktoken cannot get the vocabulary of GPT-2 ({type(error).__name__}); go online "
            "once, set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer=bytes"
        ) from None
    pieces = [bpe.decode_single_token_bytes(i) for i in range(bpe.n_vocab)]
    to_ids = functools.partial(bpe.encode_to_numpy, disallowed_special=())
    return Tokenizer("gpt2", pieces, 50256, functools.partial(ids_by_words, to_ids))


def ids_by_words(to_ids, text):
    """to_ids(text), word by word where it refuses the whole: tiktoken's regular expression runs out
    of its stack in a million spaces before a word. The last space before a word begins a new piece
    in any case ("a  b" is "a", " " and " b"), so a cut in front of it changes no id."""
    try:
        return to_ids(text)
    except ValueError:
        words = re.split(rf"(?={SPACE}(?!{SPACE}|$))", text)
        return np.concatenate([to_ids(word) for word in words])


# name: (number of tokens, function that makes it); the number must be known without a download
TOKENIZERS = {
    "gpt2": (50257, make_gpt2),
    "bytes": (257, make_bytes),
}


@functools.cache
def get_tokenizer(name):
    """The Tokenizer of this name. UserError when there is none or it cannot be had."""
    if name not in TOKENIZERS:
        raise UserError(f"unknown tokenizer {name!r}; there are {' and '.join(TOKENIZERS)}")
    n_vocab, make = TOKENIZERS[name]
    tokenizer = make()
    if tokenizer.n_vocab != n_vocab or n_vocab > 65536:
        raise UserError(f"tokenizer {name!r}: TOKENIZERS says {n_vocab} tokens, it has "
                        f"{tokenizer.n_vocab}, and a shard can hold 65,536 different ones")
    return tokenizer


# ----------------------------------------------- your own text: documents -> tokens -> shards

WINDOW = 257                                 # block_size + 1 of train.py's smallest preset
FEW_WINDOWS = 20


def tokenise(paths, folder, tokenizer, workers=1, shard_tokens=SHARD_TOKENS, val_fraction=0.01,
             prefix="text", wait=False):
    """Make the shards of `folder`, new or empty, from text files; returns the meta. Where it fails
    it leaves nothing; where it is killed, the file UNFINISHED keeps what is there from being used,
    and the next call begins anew. With `wait`, another run that writes there is waited for, and
    what it wrote is taken."""
    with only_writer(folder, wait):
        if wait and holds_shards(folder):
            return read_meta(folder)
        begin(folder)
        try:
            train_tokens, val_tokens = write_splits(
                paths, os.path.join(folder, prefix), get_tokenizer(tokenizer), workers,
                shard_tokens, val_fraction,
            )
            names = shard_names(folder)
            files = {name: examine(os.path.join(folder, name), tokenizer) for name in names}
            meta = {"tokenizer": tokenizer, "files": files}
            write_meta(folder, meta)
            os.remove(os.path.join(folder, UNFINISHED))
            sync_folder(folder)
        except BaseException:
            with suppress(OSError):
                discard(folder)
            raise
    say(f"{folder}: {train_tokens:,} tokens to train on, {val_tokens:,} held out")
    if 0 < val_tokens < FEW_WINDOWS * WINDOW:
        say(f"{folder}: only {val_tokens // WINDOW} windows of {WINDOW} tokens are held out, too "
            "few for more than a rough validation loss; more text or a larger --val_fraction than "
            f"{val_fraction} helps")
    return meta


def write_splits(paths, stem, tokenizer, workers, limit, val_fraction):
    """Write the documents of text files as shards STEM_train_000000.bin, STEM_val_000000.bin, ...
    of `limit` tokens; a document may run over into the next file. Returns the numbers of tokens to
    train on and held out."""
    train = Split(f"{stem}_train", limit)
    val = Split(f"{stem}_val", limit)
    bar = Progress("tokenising", sum(map(os.path.getsize, paths)) / 1e6, "MB")
    draw = random.Random(0)
    tokenised = encode(documents(paths), tokenizer, workers, bar.tick)
    for n, (tokens, bytes_read) in enumerate(tokenised):
        total = train.tokens + val.tokens
        held_out = is_held_out(n, total, val.tokens, val_fraction, draw)
        split = val if held_out else train
        split.add(np.append(tokenizer.eot, tokens).astype(np.uint16))
        split.write(keep=limit + 2 * WINDOW)                 # the end may have to be held out
        bar.update(bytes_read / 1e6, f", {train.tokens + val.tokens:,} tokens")
    bar.end()
    if not train.tokens:
        raise UserError("there is no text in these files; nothing was written")
    hold_out_end(train, val, val_fraction, tokenizer.eot)
    train.write()
    val.write()
    return train.tokens, val.tokens


def is_held_out(n, total, held_out, val_fraction, draw):
    """Whether the document after n documents with `total` tokens, `held_out` of them held out, is
    held out too. The probability is the number of tokens that the held-out part lacks, divided by
    the mean length of a document. So the share of the tokens comes out right; documents of every
    length have the same chance; and there is no rhythm that the files could have as well."""
    if n == 0:
        return False
    lacking = val_fraction * total - held_out
    mean_length = total / n
    return draw.random() < lacking / mean_length


def hold_out_end(train, val, val_fraction, eot):
    """Where few or long documents gave the held-out part less than half its share, or less than a
    window, move the end of the training tokens that no file has yet into it."""
    share = max(WINDOW, int(val_fraction * (train.tokens + val.tokens)))
    if val_fraction == 0 or val.tokens >= max(WINDOW, share // 2):
        return
    end = train.take_end(min(share - val.tokens, train.waiting_tokens // 2))
    val.add(np.append(eot, end).astype(np.uint16))


class Split:
    """The tokens of one split on their way into the files STEM_000000.bin, STEM_000001.bin, ... of
    `limit` tokens."""

    def __init__(self, stem, limit):
        self.stem = stem
        self.limit = limit
        self.tokens = 0                      # in all
        self.files = 0                       # written
        self.waiting = []                    # arrays of tokens that no file has yet
        self.waiting_tokens = 0

    def add(self, tokens):
        self.tokens += len(tokens)
        self.waiting.append(tokens)
        self.waiting_tokens += len(tokens)

    def take_end(self, count):
        """Remove the last `count` of the waiting tokens, and return them."""
        tokens = np.concatenate(self.waiting)
        rest, end = np.split(tokens, [len(tokens) - count])
        self.tokens -= count
        self.waiting = [rest]
        self.waiting_tokens -= count
        return end

    def write(self, keep=0):
        """Write files, the last of which may be shorter, until at most `keep` tokens wait."""
        while self.waiting_tokens > keep:
            tokens = np.concatenate(self.waiting)
            write_shard(f"{self.stem}_{self.files:06d}.bin", tokens[: self.limit])
            self.files += 1
            self.waiting = [tokens[self.limit :]]
            self.waiting_tokens = len(self.waiting[0])


def documents(paths):
    """(text, bytes of the files read so far) of each document that is not empty, in order."""
    earlier = 0
    for path in paths:
        with open(path, "rb") as file:
            for text in texts_of(file, path):
                if text.strip():
                    yield text, earlier + file.tell()
        earlier += os.path.getsize(path)


def texts_of(file, path):
    """The documents of one open file: each line of .jsonl, and all of any other."""
    name = path.lower()
    stream = gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file
    try:
        if name.removesuffix(".gz").endswith(".jsonl"):
            yield from json_lines(stream, path, 'a JSON object with a string "text"', text_of)
        else:
            yield stream.read().decode("utf-8-sig")
    except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: {error}; nothing was written") from None


def text_of(row):
    """The document in a line of a .jsonl file. TypeError where it is no string."""
    return "" + row["text"]


def encode(texts, tokenizer, workers, tick):
    """(tokens as an array, bytes read) of each (text, bytes read), in order; only some are in
    memory. tick() is called each second while a long text is waited for. Threads serve, since
    tiktoken releases the interpreter's lock."""
    pool = concurrent.futures.ThreadPoolExecutor(workers)    # `with` would let Ctrl-C wait for it
    for batch in batches(texts, 64 * workers, workers << 24):
        jobs = [pool.submit(tokenizer.to_array, text) for text, _ in batch]
        for job, (_, bytes_read) in zip(jobs, batch):
            while not job.done():
                concurrent.futures.wait([job], timeout=1)
                tick()
            yield job.result(), bytes_read


def batches(texts, most_texts, most_characters):
    """Lists of at most `most_texts` (text, ...), with fewer where they reach `most_characters`."""
    batch = []
    characters = 0
    for item in texts:
        batch.append(item)
        characters += len(item[0])
        if len(batch) == most_texts or characters >= most_characters:
            yield batch
            batch = []
            characters = 0
    yield batch


def begin(folder):
    """Mark an empty folder, or one in which an earlier call was killed, as unfinished."""
    if is_unfinished(folder):
        discard(folder)
    if {*os.listdir(folder)} - {"lock"}:
        raise UserError(f"{folder}: is there already; remove the folder or choose another --out")
    open(os.path.join(folder, UNFINISHED), "x").close()


def discard(folder):
    """Remove the files of an unfinished preparation, the mark last."""
    for name in os.listdir(folder):
        if name == "meta.json" or name.endswith((".bin", ".part")):
            os.remove(os.path.join(folder, name))
    with suppress(FileNotFoundError):
        os.remove(os.path.join(folder, UNFINISHED))


def is_unfinished(folder):
    return os.path.exists(os.path.join(folder, UNFINISHED))


def holds_shards(folder):
    return bool(shard_names(folder)) and not is_unfinished(folder)


def write_default_shards(folder):
    """Data for a machine that has none: the source files of Python's own standard library as bytes,
    about 12 MB in a fixed order, a twentieth held out. Returns the meta; shards that are there
    already stay."""
    if holds_shards(folder):
        return read_meta(folder)
    paths = standard_library_files()
    size = sum(map(os.path.getsize, paths))
    say(f"{folder}: writing byte-level shards from the {len(paths)} source files of Python's "
        f"standard library, {size:,} bytes")
    return tokenise(paths, folder, "bytes", val_fraction=0.05, prefix="stdlib", wait=True)


def standard_library_files():
    """Sorted paths of the source files of Python's standard library, without its tests and without
    packages."""
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    paths = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = [name for name in subfolders if name not in skip]
        paths += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    return sorted(paths)


# -------------------------------------------------------------- the paper's shards, already made

def published(shards):
    """{name: bytes} of the validation shard and the first training shards, as they lie in REPO."""
    names = ["finewebedu_val_000000.bin"]
    names += [f"finewebedu_train_{i:06d}.bin" for i in range(1, shards + 1)]
    sizes = {name: 200_001_024 for name in names}
    if shards == TRAIN_SHARDS:
        sizes[names[-1]] = 107_979_712
    return sizes


def download_shards(folder, shards=TRAIN_SHARDS):
    """Bring the validation shard and the first `shards` training shards into `folder`; what is
    there already stays. Length, header and vocabulary of each are checked before it takes its name.
    The checksums that the hub lists are not asked for, so a bit that was changed on the way is not
    seen: the sha256 in meta.json is of what came. From the first shard on meta.json lists all that
    are wanted or there, those that it knows nothing of yet as {}: so find_shards takes no part of a
    download for the whole."""
    with only_writer(folder):
        meta = read_meta(folder)
        there = shard_names(folder)
        if {*there} - {*published(TRAIN_SHARDS)}:
            raise UserError(f"{folder}: holds other shards; choose another --out")
        sizes = published(shards)
        known = meta.get("files", {})
        files = {name: known.get(name, {}) for name in [*sizes, *there]}
        meta["files"] = files
        paths = {name: os.path.join(folder, name) for name in files}
        lacking = [name for name in sizes if size_of(paths[name]) != sizes[name]]
        total = sum(sizes[name] for name in lacking)
        parts = sum(size_of(f"{paths[name]}.part") for name in lacking)
        bar = Progress("downloading", total / 1e6, "MB", parts / 1e6)
        came = 0
        for name, path in paths.items():
            if name in lacking:
                progress = functools.partial(show_download, bar, came, name)
                files[name] = download_shard(name, path, sizes[name], progress)
                came += sizes[name]
            elif not files[name]:
                files[name] = examine(path, "gpt2")
            write_meta(folder, meta)
        bar.end()
    say(f"{folder}: the validation shard and {shards} training shards are complete")


def show_download(bar, came, name, done):
    bar.update((came + done) / 1e6, f", {name}")


def download_shard(name, path, size, progress):
    """Bring one published shard to `path`, and return its {tokens, sha256}. Where it is not sound,
    it is removed: UserError."""
    url = f"{HUB}/datasets/{REPO}/resolve/main/{name}"
    part = f"{path}.part"
    fetch(url, part, size, progress)
    try:
        facts = examine(part, "gpt2")
    except Damaged as error:
        os.remove(part)
        raise UserError(f"{url}: what came {error.what}; it was removed: run the same command "
                        "again, and check HF_ENDPOINT if that does not help") from None
    publish_file(part, path)
    return facts


# ------------------------------------------------------------------- the network: any file

TIMEOUT = (10, 30)                           # seconds to connect, and of silence
BLOCK = 1 << 14                              # bytes read at a time
LONGEST_WAIT = 600                           # seconds; a server that asks for more is given up


def download(url, path, size=None, progress=None, tries=8):
    """Bring `url`, a file of `size` bytes where that is known, to `path`. It arrives as path.part,
    which a later call continues, and is renamed when complete. Arguments and errors as of fetch."""
    fetch(url, f"{path}.part", size, progress, tries)
    publish_file(f"{path}.part", path)


def fetch(url, part, size=None, progress=None, tries=8):
    """Bring the bytes of `url` that the file `part` lacks. progress(bytes so far) replaces the
    line on stderr. UserError when they cannot be had, or after `tries` tries in a row that add
    nothing. HF_TOKEN is sent to the hub's address alone."""
    name = os.path.basename(part).removesuffix(".part")
    os.makedirs(os.path.dirname(part) or ".", exist_ok=True)
    failures = 0
    while True:
        before = size_of(part)
        problem, wait = receive(url, part, size, progress)
        if not problem:
            return
        if sys.stderr.isatty():
            say("", file=sys.stderr)                         # leave the line of progress
        failures = 0 if size_of(part) > before else failures + 1
        wait = max(wait, min(60, 2**failures / 2))
        if failures == tries or wait > LONGEST_WAIT:
            raise UserError(f"{name}: {problem}; given up after try {failures} of {tries}")
        say(f"{name}: {problem}; try {failures + 1} of {tries} in {wait:.0f} s", file=sys.stderr)
        time.sleep(wait)


def size_of(path):
    """Bytes in a file, 0 where there is none."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def receive(url, part, size, progress):
    """One connection: append to `part` what it lacks, or begin anew where the server does. Returns
    (what is wrong, seconds to wait at least): ("", 0) when the file is complete, infinity where
    another try is useless."""
    import requests
    have = size_of(part)
    if have == size:                         # a kill came before the renaming
        return "", 0
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
    options = {"auth": functools.partial(authorize, url), "stream": True, "timeout": TIMEOUT}
    try:
        with requests.get(url, headers=headers, **options) as response:
            problem, wait = refusal_of(response)
            if problem:
                if response.status_code == 416:
                    os.remove(part)
                return problem, wait
            start = have if response.status_code == 206 else 0
            return copy(response, part, start, size, progress), 0
    except ValueError as error:              # its text may hold the token
        name = type(error).__name__
        return f"no such address or token ({name}); check HF_ENDPOINT and HF_TOKEN", math.inf
    except requests.RequestException as error:
        return f"no connection, or a lost one ({type(error).__name__})", 0


def authorize(url, request):
    """Add the token to a request for the hub. This is called for the first address alone; requests
    itself takes the header out where a redirect leads to another host or port."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if token and url.startswith(f"{HUB}/"):
        request.headers["Authorization"] = f"Bearer {token}"
    return request


def refusal_of(response):
    """(what is wrong, seconds to wait at least) where a response does not bring the file."""
    status = response.status_code
    asked = response.headers.get("Retry-After", "")          # a date gets the usual wait
    if status in (408, 425, 429) or status >= 500:
        seconds = int(asked) if asked.isdecimal() else 0
        return f"HTTP {status}, Retry-After: {asked or 'none'}", seconds
    if status == 416:                                        # the part is no shorter than the file
        return "what came earlier cannot be continued; begun anew", 0
    if status in (401, 403):
        return f"HTTP {status}; set HF_TOKEN to a token that may read it", math.inf
    if status not in (200, 206):
        return f"HTTP {status}", math.inf
    if "text/html" in response.headers.get("Content-Type", ""):
        return "a web page came instead of the file", 0
    return "", 0


def copy(response, part, start, size, progress):
    """Write what the response brings to the file `part` from byte `start` on. Returns what is
    wrong, "" if nothing."""
    length = response.headers.get("Content-Length", "")
    place = response.headers.get("Content-Range", "")
    total = start + int(length) if length.isdecimal() else size
    elsewhere = place and not place.startswith(f"bytes {start}-")
    if elsewhere or size not in (None, total):
        return f"the server offers {length} bytes {place} where byte {start} to {size} is due"
    name = os.path.basename(part)
    bar = Progress(f"downloading {name}", (total or 0) / 1e6, "MB", start / 1e6)
    with open(part, "r+b" if start else "wb") as file:
        file.seek(start)
        for block in response.iter_content(BLOCK):
            file.write(block)
            done = file.tell()
            if progress:
                progress(done)
            else:
                bar.update(done / 1e6)
    bar.end()
    have = size_of(part)
    return "" if total in (None, have) else f"the connection ended at byte {have} of {total}"


# -------------------------------------------------------------------------- the command line

TEXT_DEFAULTS = {                            # of the flags that --input alone takes
    "tokenizer": "gpt2",
    "workers": os.cpu_count(),
    "shard_tokens": SHARD_TOKENS,
    "val_fraction": 0.01,
}


def parse_args():
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=(__doc__ or "").split("\n\nA shard")[0],     # python -OO removes docstrings
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("command", nargs="?", choices=["verify"],
        help="check the shards in --out instead of making any")
    add("--out", metavar="DIR",
        help=f"folder of the shards (default: {FINEWEB_FOLDER}; with --input there is none)")
    add("--shards", type=int, metavar="N",
        help=f"download the first N training shards of 100M tokens (default: all {TRAIN_SHARDS})")
    add("--input", nargs="+", action="extend", metavar="FILE",
        help="text to tokenise; patterns like 'a/*.jsonl.gz' are expanded, a file named twice is "
        'read once. A line of .jsonl (its field "text") is a document, and so is the whole of any '
        "other file; all in UTF-8")
    add("--tokenizer", choices=TOKENIZERS, help="for --input (default: gpt2)")
    add("--workers", type=int, metavar="N",
        help="threads for --input (default: one a core)")
    add("--shard_tokens", type=int, metavar="N",
        help=f"tokens in a file made from --input (default: {SHARD_TOKENS})")
    add("--val_fraction", type=float, metavar="F",
        help="share of the tokens of --input held out, in whole documents (default: 0.01)")
    # "--input=a b" shall mean "--input a b", since a shell expands no pattern behind "="
    words = [word for arg in sys.argv[1:] for word in re.split("(?<=^--input)=", arg)]
    args = parser.parse_args(words)
    for name, default in TEXT_DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif not args.input:
            parser.error(f"--{name} is for --input=FILES, which is not given")
    if args.shards is None:
        args.shards = TRAIN_SHARDS
    elif args.input or args.command:
        parser.error("--shards is for the download, and nothing else")
    if not 0 <= args.shards <= TRAIN_SHARDS:
        parser.error(f"--shards is 0 to {TRAIN_SHARDS}")
    if not 1 <= args.workers <= 1024:
        parser.error("--workers is 1 to 1024")
    if not 2 <= args.shard_tokens < 2**31:
        parser.error("--shard_tokens is 2 to 2147483647")
    if not 0 <= args.val_fraction < 1:
        parser.error("--val_fraction is from 0 to below 1")
    if args.input and (args.command or not args.out):
        parser.error("--input needs --out=DIR and no other command")
    return args


def input_files(patterns):
    """The files that --input names, patterns expanded. UserError for what is no text."""
    paths = []
    for pattern in patterns:
        found = [] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        paths += found or [pattern]
    paths = list(dict.fromkeys(paths))                           # a file named twice is read once
    for path in paths:
        if os.path.isdir(path):
            files = shlex.quote(os.path.join(path, "*"))
            raise UserError(f"--input: {path} is a folder; --input={files} takes the files in it")
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"--input: {path} is a pipe or a device; write the text to a file (.gz "
                            "is read as it is)")
        if re.search(r"(?i)\.(json|ndjson)(\.gz)?$", path):
            raise UserError(f"--input: {path} is not plain text; write each document as a line "
                            '{"text": ...} of a .jsonl file (if it is that already, rename it)')
    return paths


def main():
    args = parse_args()
    out = args.out or FINEWEB_FOLDER
    if args.command == "verify":
        return 1 if verify(out) else 0
    if args.input:
        paths = input_files(args.input)
        tokenise(paths, out, args.tokenizer, args.workers, args.shard_tokens, args.val_fraction)
    else:
        download_shards(out, args.shards)
    say(f"next: python train.py --data={shlex.quote(out)}")


# ------------------------------------------------------ what every script of the project shares

class UserError(ValueError):
    """The user's input, a file, the network or the machine is at fault. One line: what is wrong,
    where, what to do."""


class Damaged(UserError):
    """A file of the data is not what it should be; `what` says in which way."""

    def __init__(self, path, what):
        self.what = what
        again = run_again(os.path.dirname(path) or ".")
        super().__init__(f"{path}: {what}; remove it and {again}")


def run_again(folder):
    return (f"run the command that made {folder} again: a download goes on with what is missing "
            "(--shards=N: of the first N), for other data remove the folder first")


def command_line(main, *errors, memory="use a smaller batch"):
    """Run a script's main() and exit with the code it returns. What a user did wrong is one line,
    not a traceback: UserError, OSError and the exceptions `errors`; `memory` says what to do where
    it runs out."""
    script = os.path.basename(sys.argv[0])
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")       # None: it was closed
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:                  # the reader of a pipe has left, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + 13
    except (UserError, OSError, *errors) as error:
        code = f"{script}: {error}"
    except (MemoryError, RuntimeError) as error:     # torch's OutOfMemoryError is a RuntimeError
        text = f"{type(error).__name__} {error}"
        if not re.search("MemoryError|(of|allocate) memory|new thread", text):
            raise
        code = f"{script}: out of memory; {memory}"
    except KeyboardInterrupt:
        say(f"\n{script}: interrupted", file=sys.stderr)
        os._exit(128 + 2)                    # at once: a thread may be waiting for the network
    sys.exit(code)


def say(line, end="\n", file=None):
    """Print at once. A stream that cannot be written (full disk, closed pipe) is dropped: it must
    not stop the work."""
    file = file or sys.stdout
    encoding = file.encoding or "utf-8"
    try:
        text = line.encode(encoding, "replace").decode(encoding)
        print(text, end=end, file=file, flush=True)
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def clock(seconds):
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class Progress:
    """A line on stderr with share, rate and time left: each second in place on a terminal, cut to
    its width; every 5 s elsewhere."""

    def __init__(self, what, total, unit, done=0):
        self.what = what
        self.total = total or 1
        self.unit = unit
        self.first = done
        self.done = done
        self.note = ""
        self.in_place = sys.stderr.isatty()
        self.began = time.monotonic()
        self.shown = self.began

    def update(self, done, note=""):
        """Say that `done` of `total` units are done, if it is time to."""
        self.done = done
        self.note = note
        self.tick()

    def tick(self):
        """Say again what is done, if it is time to: a sign of life while one unit takes long."""
        now = time.monotonic()
        if now - self.shown < (1 if self.in_place else 5):
            return
        self.shown = now
        rate = (self.done - self.first) / (now - self.began)
        left = clock((self.total - self.done) / rate) if rate > 0 else "?"
        line = (f"{self.what}: {self.done / self.total:.1%} of {self.total:,.0f} {self.unit}, "
                f"{rate:,.3g} {self.unit}/s, {left} left{self.note}")
        if self.in_place:
            width = shutil.get_terminal_size().columns - 1
            say(f"\r{line[:width]:<{width}}", end="", file=sys.stderr)
        else:
            say(line, file=sys.stderr)

    def end(self):
        """Leave the line that was written over, if there is one."""
        if self.in_place and self.shown > self.began:
            say("", file=sys.stderr)


@contextmanager
def atomic_write(path):
    """A binary file to write, which takes the name `path` when all of it is on the disk. UserError
    where `path` is a folder or a device, which would be replaced."""
    check_regular(path)
    part = f"{path}.part"
    try:
        with open(part, "wb") as file:
            yield file
        publish_file(part, path)
    except BaseException:
        with suppress(OSError):
            os.remove(part)
        raise


def check_regular(path):
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: must be a file, and is a folder or a device")


def check_writable(path):
    """UserError if no file can be written to `path`, for a script to say so before its work; "" is
    no file."""
    if path:
        check_regular(path)
        folder = os.path.dirname(path) or "."
        if not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
            raise UserError(f"{path}: must be a file in a folder that exists and can be written")


def publish_file(part, path):
    """Rename a complete file so that even a power cut leaves all of it or nothing under the new
    name."""
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(os.path.dirname(path) or ".")


def sync_folder(folder):
    """Bring the names in a folder onto the disk, where the system can: Windows opens no folder."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def locked(folder, wait=False):
    """A held lock that keeps other runs out of the folder, for `with` or to be kept; it ends with
    the process. The lock is the file folder/lock; the folder is made where there is none."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "lock")
    try:
        held = FileLock(path).acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise UserError(f"{folder}: another run is writing there; wait for it, or choose another "
                        "folder") from None
    held.file = os.stat(path)                # for still_locked
    return held


def still_locked(held):
    """Whether the lock file that `held`, of `locked`, stands for is still the one at its path. It
    is not when the folder was renamed or removed, or another has taken its name: what is written
    there then belongs to another run."""
    try:
        return os.path.samestat(held.file, os.stat(held.lock.lock_file))
    except OSError:
        return False


@contextmanager
def only_writer(folder, wait=False):
    """Hold the lock of a folder, made where there is none, and leave neither the lock file nor, if
    it is still empty, the new folder. Whoever waits for a lock file that is removed makes a new
    one."""
    is_new = not os.path.isdir(folder)
    held = locked(folder, wait)
    try:
        yield
    finally:
        with suppress(OSError):              # Windows removes no open file
            os.remove(held.lock.lock_file)
        held.lock.release()
        with suppress(OSError):              # it is not empty
            if is_new:
                os.rmdir(folder)


def json_lines(lines, path, kind, convert):
    """convert(value) of the JSON on each line that is not blank. UserError names the first line
    that is not `kind`."""
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                yield convert(json.loads(line))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise UserError(f"{path}, line {number}: not {kind} ({problem})") from None


if __name__ == "__main__":
    command_line(main, memory="use fewer --workers or smaller --shard_tokens")
