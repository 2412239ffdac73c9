"""
Shards: the format, tokenising, downloads from a server on this machine that misbehaves, killed and
concurrent runs, the command line, and what all scripts share. Oracles are struct, zlib, tiktoken
and the bytes that the server has. CPU only, no network.
"""

import contextlib
import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import types
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import prepare_fineweb as pf

PATIENCE = 600  # seconds after which something is taken to hang; nothing here needs so long
PROJECT = os.path.dirname(pf.__file__)


@pytest.fixture(autouse=True)
def small_held_out_parts(monkeypatch):
    """The texts here are too short for a training window; the tests about it set it back."""
    monkeypatch.setattr(pf, "WINDOW", 1)


@pytest.fixture
def gpt2():
    """tiktoken's own GPT-2, as the oracle; it needs its vocabulary file once from the network."""
    try:
        pf.get_tokenizer("gpt2")
    except pf.UserError as error:
        pytest.skip(f"no GPT-2 vocabulary: {error}")
    import tiktoken

    return tiktoken.get_encoding("gpt2")


def write_text(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def write_jsonl(path, texts):
    return write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


def make_shards(folder, paths, **settings):
    settings = {"tokenizer": "bytes", **settings}
    return pf.tokenise([str(path) for path in paths], str(folder), **settings)


def make_folder(folder, *texts, **settings):
    """A folder of shards of these texts, whose file is removed again."""
    path = folder.with_suffix(".jsonl")
    make_shards(folder, [write_jsonl(path, texts)], **{"val_fraction": 0, **settings})
    path.unlink()
    return folder


def all_tokens(folder, split):
    paths = pf.find_shards(str(folder), split)
    return [token for path in paths for token in pf.read_shard(path).tolist()]


def shard_bytes(folder):
    return {
        name: (pathlib.Path(folder) / name).read_bytes() for name in pf.shard_names(str(folder))
    }


def byte_documents(texts):
    return [token for text in texts for token in [256, *text.encode()]]


def word_texts(count, words, seed=0):
    rng = random.Random(seed)
    vocabulary = [f"{rng.choice('abcdefgh')}{rng.randrange(1000)}" for _ in range(500)]
    return [" ".join(rng.choices(vocabulary, k=words)) for _ in range(count)]


def run_main(monkeypatch, *args):
    """What the command line exits with: a code, or a message (which means 1)."""
    monkeypatch.setattr(sys, "argv", ["prepare_fineweb.py", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        pf.command_line(pf.main)
    return end.value.code


def refusal(match):
    """A context in which a UserError of one line is due."""
    return pytest.raises(pf.UserError, match=rf"(?m)\A.*(?:{match}).*\Z")


# -------------------------------------------------------------------------------- a shard


def test_shard_file_is_header_then_tokens_byte_for_byte(tmp_path):
    pf.write_shard(str(tmp_path / "a_train_000000.bin"), [50256, 0, 1, 65535])
    header = struct.pack("<256i", 20240520, 1, 4, *[0] * 253)
    tokens = struct.pack("<4H", 50256, 0, 1, 65535)
    assert (tmp_path / "a_train_000000.bin").read_bytes() == header + tokens
    assert os.listdir(tmp_path) == ["a_train_000000.bin"]


def test_shard_written_by_others_reads_back(tmp_path):
    path = tmp_path / "tiny_val.bin"
    ids = [50256, 5962, 22307, 25]
    header = struct.pack("<256i", 20240520, 1, 4, *[7] * 253)
    path.write_bytes(header + struct.pack("<4H", *ids))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    path = str(path)
    assert pf.find_shards(str(tmp_path), "val") == [path]
    assert pf.read_meta(str(tmp_path)) == {"tokenizer": "gpt2"}
    assert pf.shard_tokens(path) == 4
    assert pf.read_shard(path).tolist() == ids
    assert pf.read_shard(path).dtype == np.uint16
    assert pf.read_window(path, 1, 2).tolist() == ids[1:3]
    assert pf.examine(path, "gpt2") == {"tokens": 4, "sha256": sha256}


GOOD_SHARD = struct.pack("<256i", 20240520, 1, 3, *[0] * 253) + b"\1\0\2\0\3\0"
DAMAGED = {
    "magic": struct.pack("<i", 20240801) + GOOD_SHARD[4:],
    "version": GOOD_SHARD[:4] + b"\2" + GOOD_SHARD[5:],
    "count too large": GOOD_SHARD[:8] + b"\4" + GOOD_SHARD[9:],
    "count too small": GOOD_SHARD[:8] + b"\2" + GOOD_SHARD[9:],
    "count negative": GOOD_SHARD[:8] + b"\xff" * 4 + GOOD_SHARD[12:],
    "odd length": GOOD_SHARD + b"\0",
    "empty": b"",
    "header cut": GOOD_SHARD[:1000],
    "no tokens": GOOD_SHARD[:8] + b"\0" + GOOD_SHARD[9:1024],
    "web page": b"<html>" * 400,
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_shard_is_refused_with_file_and_remedy(tmp_path, kind):
    path = tmp_path / "my data" / "a_train_000000.bin"
    path.parent.mkdir()
    path.write_bytes(DAMAGED[kind])
    for read in (pf.shard_tokens, pf.read_shard):
        remedy = f"remove it and run the command that made {path.parent} again"
        with refusal(f"a_train_000000.bin: is no shard.*{remedy}"):
            read(str(path))


def test_shard_cut_off_or_removed_while_in_use_is_a_user_error(tmp_path):
    path = str(tmp_path / "a_train_000000.bin")
    pf.write_shard(path, np.arange(1000))
    assert pf.read_window(path, 990, 10).tolist() == list(range(990, 1000))
    os.truncate(path, 1024 + 2 * 995)
    with refusal("ends 5 tokens before token 1000"):
        pf.read_window(path, 990, 10)
    os.remove(path)
    for read in (pf.shard_tokens, lambda path: pf.read_window(path, 0, 10)):
        with refusal("cannot be read"):
            read(path)


@pytest.mark.parametrize("tokens", [[], [-1], [65536], [1, 70000]])
def test_tokens_that_do_not_fit_16_bits_are_refused_and_leave_no_file(tmp_path, tokens):
    with refusal("0..65535"):
        pf.write_shard(str(tmp_path / "a_train_000000.bin"), tokens)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "place, token", [(0, 256), (2_097_151, 256), (2_097_152, 256), (2_100_000, 257)]
)
def test_every_token_of_a_shard_is_examined(tmp_path, place, token):
    """Also those behind the first block that is read."""
    path = tmp_path / "a_train_000000.bin"
    tokens = np.zeros(2_100_001, np.uint16)
    tokens[place] = token
    pf.write_shard(str(path), tokens)
    if token < 257:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        assert pf.examine(str(path), "bytes") == {"tokens": len(tokens), "sha256": sha256}
    else:
        with refusal("token 257 is not in the vocabulary of 257"):
            pf.examine(str(path), "bytes")


# ------------------------------------------------------------------------ a folder of shards


def test_shards_of_a_split_come_sorted_and_other_files_do_not_count(tmp_path, monkeypatch):
    names = "b_train_000010.bin b_train_000002.bin b_train_000003.bin.part train.bin b_train_0.txt"
    for name in names.split():
        pf.write_shard(str(tmp_path / name), [1])
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listdir(path), reverse=True))
    found = [os.path.basename(path) for path in pf.find_shards(str(tmp_path), "train")]
    assert found == ["b_train_000002.bin", "b_train_000010.bin"]


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_folder_without_shards_complains_of_shards_and_needs_no_tokenizer(
    tmp_path, monkeypatch, name
):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with refusal("no val shard .*python prepare_fineweb.py"):
        pf.find_shards(str(tmp_path / name), "val")


def test_folder_that_cannot_be_listed_is_not_one_without_shards(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(PermissionError):
        pf.find_shards(str(tmp_path), "val")


NO_META = {
    "cut off": "{",
    "a list": "[]",
    "nothing": "{}",
    "unknown tokenizer": '{"tokenizer": "klingon"}',
    "tokenizer of odd type": '{"tokenizer": []}',
    "no UTF-8": "\xff",
    "nested deeply": "[" * 100_000,
    "files null": '{"tokenizer": "bytes", "files": null}',
    "files a number": '{"tokenizer": "bytes", "files": 7}',
    "files a list": '{"tokenizer": "bytes", "files": ["a_train_000000.bin"]}',
    "file null": '{"tokenizer": "bytes", "files": {"a_train_000000.bin": null}}',
    "tokens text": '{"tokenizer": "bytes", "files": {"a_train_000000.bin": {"tokens": "3"}}}',
}


@pytest.mark.parametrize("kind", NO_META)
def test_meta_that_cannot_be_used_is_refused(tmp_path, kind):
    (tmp_path / "meta.json").write_text(NO_META[kind], encoding="latin-1")
    (tmp_path / "a_train_000000.bin").write_bytes(GOOD_SHARD)
    with refusal("meta.json: cannot be used .*remove it and run the command"):
        pf.read_meta(str(tmp_path))
    with refusal("meta.json: cannot be used"):
        pf.verify(str(tmp_path))


@pytest.mark.parametrize("target", ["nowhere", "meta.json"])
def test_meta_that_is_a_link_to_nothing_or_to_itself_is_not_a_missing_one(tmp_path, target):
    (tmp_path / "a_train_000000.bin").write_bytes(GOOD_SHARD)
    (tmp_path / "meta.json").symlink_to(target)
    with refusal("meta.json: cannot be used"):
        pf.find_shards(str(tmp_path), "train")


def test_folder_that_contradicts_its_meta_is_refused_for_either_split(tmp_path):
    """A file is missing, not listed, or has another number of tokens; all else is as before."""
    out = make_folder(tmp_path / "my out", *word_texts(20, 20), shard_tokens=500, val_fraction=0.2)
    expected = pf.find_shards(str(out), "train")
    first = (out / "text_train_000000.bin").read_bytes()
    remedy = f"run the command that made {out} again: .*for other data remove the folder"

    (out / "text_train_000000.bin").unlink()
    for split in ("train", "val"):
        with refusal(f"text_train_000000.bin is not there but meta.json lists it.*{remedy}"):
            pf.find_shards(str(out), split)
    with refusal("is there already; remove the folder"):
        make_shards(out, [])  # so the command alone mends nothing

    pf.write_shard(str(out / "text_train_000000.bin"), [256] * 499)
    assert len(pf.find_shards(str(out), "val")) == 1
    with refusal(f"text_train_000000.bin: holds 499 tokens where meta.json has 500.*{remedy}"):
        pf.find_shards(str(out), "train")

    (out / "text_train_000000.bin").write_bytes(first)
    (out / "old_val_000000.bin").write_bytes(GOOD_SHARD)
    for split in ("train", "val"):
        with refusal(f"old_val_000000.bin is there but meta.json does not list it.*{remedy}"):
            pf.find_shards(str(out), split)

    (out / "old_val_000000.bin").unlink()
    assert pf.find_shards(str(out), "train") == expected


@pytest.mark.parametrize("size", [1, 2049, 5000, 65_000, 400_000])
def test_fingerprint_is_a_crc_of_32_blocks_spread_over_the_whole_shard(tmp_path, size):
    tokens = np.random.default_rng(0).integers(0, 50257, size)
    pf.write_shard(str(tmp_path / "a_train_000000.bin"), tokens)
    data = (tmp_path / "a_train_000000.bin").read_bytes()[1024:]
    checksum = 0
    for start in range(0, size, max(2048, size // 32)):
        checksum = zlib.crc32(data[2 * start : 2 * start + 4096], checksum)
    expected = [["a_train_000000.bin", size, f"{checksum:08x}"]]
    assert pf.fingerprint(str(tmp_path), "train") == expected


@pytest.mark.parametrize(
    "size, change", [(1, 0), (5000, 4321), (65_000, 64_999), (400_000, 12_500), (400_000, 389_000)]
)
def test_fingerprint_sees_a_changed_token_where_name_and_length_are_the_same(
    tmp_path, size, change
):
    tokens = np.random.default_rng(0).integers(0, 50257, size)
    seen = []
    for changed in (0, 0, 1):
        tokens[change] ^= changed
        pf.write_shard(str(tmp_path / "a_train_000000.bin"), tokens)
        seen += pf.fingerprint(str(tmp_path), "train")
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]


# ------------------------------------------------------------------------------ tokenizers

TEXT = "naïve 汉字 \0 <|endoftext|>\n"


@pytest.mark.parametrize("name, eot", [("bytes", 256), ("gpt2", 50256)])
def test_tokenizer_is_utf8_or_tiktoken_goes_both_ways_and_counts_bytes(name, eot, request):
    if name == "bytes":
        ids = list(TEXT.encode())
    else:
        ids = request.getfixturevalue("gpt2").encode_ordinary(TEXT)
    tokenizer = pf.get_tokenizer(name)
    assert (tokenizer.name, tokenizer.n_vocab, tokenizer.eot) == (name, eot + 1, eot)
    assert tokenizer.encode(TEXT) == ids
    assert eot not in ids
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.n_bytes([eot, *ids, eot]) == len(TEXT.encode())
    assert tokenizer.decode([eot, *tokenizer.encode("a"), 57600]) == "<|endoftext|>a\ufffd"
    assert tokenizer.decode(tokenizer.encode("half \ud800 a pair")) == "half ? a pair"


@pytest.fixture
def like_gpt2(monkeypatch):
    """An encoding with tiktoken's regular expression for GPT-2; its merges are pairs of bytes."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    pieces = [bytes([i]) for i in range(256)]
    pieces += [one + two for one in pieces for two in pieces][:50_000]
    ranks = {piece: i for i, piece in enumerate(pieces)}
    special = {"<|endoftext|>": 50256}
    encoding = tiktoken.Encoding(
        "like gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    return encoding


def test_a_million_spaces_before_a_word_are_tokenised(like_gpt2):
    """tiktoken 0.14 refuses the whole; the pieces are those that its expression makes."""
    text = "one  two" + " \n" * 600_000 + " end  \n"
    pieces = ["one", " ", " two", " \n" * 600_000, " end", "  \n"]
    expected = [token for piece in pieces for token in like_gpt2.encode_ordinary(piece)]
    assert pf.make_gpt2().encode(text) == expected


def test_text_that_is_tokenised_word_by_word_has_the_ids_of_the_whole(like_gpt2):
    """Of every sort of space, and of four characters that are spaces for Python alone."""
    rng = random.Random(0)
    letters = " \t\n\r\v\f\x1c\x1f\x85\xa0\u2003\u3000\u200b" + 3 * "  \n" + "ab1!'sé汉\0"
    several = 0
    for _ in range(5000):
        text = "".join(rng.choices(letters, k=rng.randint(0, 25)))
        asked = []

        def refuse_whole(part, asked=asked):
            asked.append(part)
            if len(asked) == 1:
                raise ValueError
            return like_gpt2.encode_to_numpy(part)

        found = pf.ids_by_words(refuse_whole, text).tolist()
        assert (found, "".join(asked[1:])) == (like_gpt2.encode_ordinary(text), text)
        several += len(asked) > 2
    assert several > 2500


def test_unknown_tokenizer_is_refused():
    with refusal("'gpt3'.*gpt2 and bytes"):
        pf.get_tokenizer("gpt3")


def make_two_letters():
    """Ids as a list, and the end of text in the middle of the vocabulary."""
    pieces = [b"a", b"", b"bb"]
    return pf.Tokenizer("two letters", pieces, 1, lambda text: ["a?b".index(c) for c in text])


def test_tokenizer_of_your_own_is_a_function_and_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(pf.TOKENIZERS, "two letters", (3, make_two_letters))
    tokenizer = pf.get_tokenizer("two letters")
    assert (tokenizer.n_vocab, tokenizer.eot, tokenizer.encode("ab")) == (3, 1, [0, 2])
    assert tokenizer.decode([1, 0, 2]) == "<|endoftext|>abb"
    assert tokenizer.n_bytes([0, 1, 2, 2]) == 5
    out = make_folder(tmp_path / "out", "ab", "b", tokenizer="two letters")
    assert all_tokens(out, "train") == [1, 0, 2, 1, 2]
    assert pf.read_meta(str(out))["tokenizer"] == "two letters"


@pytest.mark.parametrize("listed, size", [(3, 4), (4, 3), (65537, 65537)])
def test_tokenizer_of_another_size_or_beyond_16_bits_is_refused(monkeypatch, listed, size):
    name = f"{listed} {size}"
    make = lambda: pf.Tokenizer(name, [b"x"] * size, 0, list)  # noqa: E731
    monkeypatch.setitem(pf.TOKENIZERS, name, (listed, make))
    with refusal(f"'{name}': TOKENIZERS says {listed} tokens, it has {size}"):
        pf.get_tokenizer(name)


# -------------------------------------------------------------------------- text to shards


def test_documents_of_every_kind_of_file_come_in_order_each_after_an_end_of_text(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one\n", "", "twö\0", " \n", "half \ud800"])
    lines = b'\xef\xbb\xbf{"text": "three", "id": 3}\n\n{"text": "four"}'
    (tmp_path / "b.JSONL.GZ").write_bytes(gzip.compress(lines))
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfline 1\r\nline 2 <|endoftext|>\n")
    (tmp_path / "d.md.gz").write_bytes(gzip.compress("fünf".encode()))
    (tmp_path / "e.py").write_bytes(b" \n")
    write_jsonl(tmp_path / "f.Jsonl", ["six"])
    names = ["a.jsonl", "b.JSONL.GZ", "c.txt", "d.md.gz", "e.py", "f.Jsonl"]
    meta = make_shards(tmp_path / "out", [tmp_path / name for name in names], val_fraction=0)
    texts = ["one\n", "twö\0", "half ?", "three", "four"]
    texts += ["line 1\r\nline 2 <|endoftext|>\n", "fünf", "six"]
    assert all_tokens(tmp_path / "out", "train") == byte_documents(texts)
    assert meta == pf.read_meta(str(tmp_path / "out"))
    assert meta["tokenizer"] == "bytes"
    assert sorted(os.listdir(tmp_path / "out")) == ["meta.json", "text_train_000000.bin"]
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "out"])


def test_gpt2_shards_equal_tiktoken(tmp_path, gpt2):
    texts = ["Hello world", "<|endoftext|> is text here", "  spaces \n\n", "汉字 naïve"]
    texts += ["lone \ud800 half", "nul \0 end"]
    out = make_folder(tmp_path / "out", *texts, tokenizer="gpt2")
    expected = []
    for text in texts:
        expected += [50256, *gpt2.encode_ordinary(text.replace("\ud800", "?"))]
    assert all_tokens(out, "train") == expected


def held_out_by_hand(lengths, fraction):
    """Which documents of these lengths in tokens are held out."""
    rng = random.Random(0)
    chosen = []
    for n in range(1, len(lengths)):
        total = sum(lengths[:n])
        lacking = fraction * total - sum(lengths[i] for i in chosen)
        if rng.random() < lacking / (total / n):
            chosen.append(n)
    return chosen


LENGTHS = {
    "equal": [50] * 600,
    "short and long in turn": [10, 400] * 300,
    "short ones first": [10] * 300 + [400] * 300,
    "every tenth is short": ([300] * 9 + [5]) * 60,
    "a few are very long": [2000 if n % 97 == 50 else 20 for n in range(600)],
}


@pytest.mark.parametrize("kind", LENGTHS)
def test_share_of_the_tokens_is_held_out_in_whole_documents_of_every_length(tmp_path, kind):
    lengths = LENGTHS[kind]
    texts = [f"{n:04d}".ljust(length - 1, "x") for n, length in enumerate(lengths)]
    chosen = held_out_by_hand(lengths, 0.1)
    out = make_folder(tmp_path / "out", *texts, val_fraction=0.1)
    train = all_tokens(out, "train")
    val = all_tokens(out, "val")
    assert val == byte_documents(texts[n] for n in chosen)
    assert train == byte_documents(text for n, text in enumerate(texts) if n not in chosen)
    assert abs(len(val) - 0.1 * sum(lengths)) <= max(lengths)
    for length in {*lengths}:
        same = [n for n, other in enumerate(lengths) if other == length]
        if len(same) >= 60:
            assert 0.02 <= len({*same} & {*chosen}) / len(same) <= 0.35


@pytest.mark.parametrize(
    "window, held_out, limit", [(1, 200, 10_000), (257, 257, 10_000), (257, 257, 1999)]
)
def test_single_text_holds_out_its_end_at_least_a_training_window(
    tmp_path, monkeypatch, window, held_out, limit
):
    """Also where a shard ends two tokens before the text does."""
    monkeypatch.setattr(pf, "WINDOW", window)
    text = "abcdefghij" * 200
    path = write_text(tmp_path / "a.txt", text)
    make_shards(tmp_path / "out", [path], val_fraction=0.1, shard_tokens=limit)
    tokens = byte_documents([text])
    assert all_tokens(tmp_path / "out", "train") == tokens[:-held_out]
    assert all_tokens(tmp_path / "out", "val") == [256, *tokens[-held_out:]]


@pytest.mark.parametrize("window, held_out", [(257, 257), (1, 1000)])
def test_held_out_part_short_of_a_window_or_of_half_its_share_gets_the_end_too(
    tmp_path, monkeypatch, window, held_out
):
    """60 short documents, of which at least one is held out; with a long one behind them."""
    monkeypatch.setattr(pf, "WINDOW", window)
    texts = ["x" * 9] * 60 + ["y" * (9399 if window == 1 else 0)]
    out = make_folder(tmp_path / "out", *texts, val_fraction=0.1)
    whole = len(held_out_by_hand([10] * 60, 0.1))
    train = byte_documents(texts[: 60 - whole] + [text for text in texts[60:] if text])
    tail = held_out - 10 * whole
    assert whole >= 1
    assert all_tokens(out, "train") == train[:-tail]
    expected = byte_documents(texts[:whole]) + [256] + train[-tail:]
    assert all_tokens(out, "val") == expected


@pytest.mark.parametrize("held_out, moved", [(50, 0), (49, 51)])
def test_half_of_its_share_is_enough_for_the_held_out_part(held_out, moved):
    """The share is 100 of 1,000 tokens; what lacks is moved behind a token that ends a document."""
    train = pf.Split("train", 10_000)
    val = pf.Split("val", 10_000)
    train.add(np.zeros(1000 - held_out, np.uint16))
    val.add(np.zeros(held_out, np.uint16))
    pf.hold_out_end(train, val, 0.1, 256)
    assert train.tokens == 1000 - held_out - moved
    assert val.tokens == held_out + moved + (moved > 0)


@pytest.mark.parametrize("length, mentioned", [(300, 6), (990, 19), (995, None), (3000, None)])
def test_less_than_20_validation_windows_are_mentioned(
    tmp_path, monkeypatch, capsys, length, mentioned
):
    monkeypatch.setattr(pf, "WINDOW", 10)
    make_folder(tmp_path / "out", "x" * (length - 1), val_fraction=0.2)
    said = re.findall(
        "only ([0-9]+) windows of 10 tokens are held out, .* larger --val_fraction than 0.2 helps",
        capsys.readouterr().out,
    )
    assert said == ([] if mentioned is None else [str(mentioned)])


def test_document_longer_than_a_shard_runs_over_into_the_next(tmp_path):
    texts = ["x" * 250, "y" * 30, "z" * 17]
    out = make_folder(tmp_path / "out", *texts, shard_tokens=100)
    counts = [pf.shard_tokens(path) for path in pf.find_shards(str(out), "train")]
    assert counts == [100, 100, 100]
    assert all_tokens(out, "train") == byte_documents(texts)


def test_shards_are_the_same_for_any_number_of_threads(tmp_path):
    texts = write_jsonl(tmp_path / "a.jsonl", word_texts(600, 100))
    long = write_text(tmp_path / "b.txt", " ".join(word_texts(1, 60000, seed=1)))
    results = []
    for workers in (1, 2, 5):
        out = tmp_path / f"out{workers}"
        meta = make_shards(out, [texts, long], workers=workers, shard_tokens=100_000)
        results.append((meta, shard_bytes(out)))
    assert len(results[0][1]) > 5
    assert results[0] == results[1] == results[2]


def test_only_a_few_documents_are_in_memory():
    """The reader never runs ahead of the writer by more than 64 documents a thread."""
    read = [0]

    def texts():
        for read[0] in range(1, 1001):
            yield "abc", 3 * read[0]

    tokenised = pf.encode(texts(), pf.get_tokenizer("bytes"), 2, tick=lambda: None)
    ahead = []
    for n, (tokens, bytes_read) in enumerate(tokenised):
        ahead.append(read[0] - n)
        assert (tokens.tolist(), bytes_read) == ([97, 98, 99], 3 * n + 3)
    assert len(ahead) == 1000
    assert max(ahead) == 128


def test_batch_ends_with_its_last_text_or_its_last_character():
    texts = [("abc", n) for n in range(10)]
    by_count = [len(batch) for batch in pf.batches(texts, 4, 1000)]
    by_length = [len(batch) for batch in pf.batches(texts, 1000, 7)]
    assert by_count == [4, 4, 2]
    assert by_length == [3, 3, 3, 1]
    assert [text for batch in pf.batches(texts, 1000, 7) for text in batch] == texts


def test_as_many_threads_work_as_are_asked_for():
    meeting = threading.Barrier(3)

    def to_array(text):
        meeting.wait(timeout=PATIENCE / 10)
        return text

    tokenizer = types.SimpleNamespace(to_array=to_array)
    texts = [("a", 0), ("b", 0), ("c", 0)]
    assert [text for text, _ in pf.encode(texts, tokenizer, 3, lambda: None)] == ["a", "b", "c"]


def test_long_text_shows_signs_of_life(monkeypatch):
    """tick() is called while a single text is being tokenised."""
    wait = pf.concurrent.futures.wait
    monkeypatch.setattr(pf.concurrent.futures, "wait", lambda jobs, timeout: wait(jobs, 0.01))
    ticked = threading.Event()
    tokenizer = types.SimpleNamespace(to_array=lambda text: ticked.wait(PATIENCE / 10))
    assert list(pf.encode([("a", 7)], tokenizer, 1, ticked.set)) == [(True, 7)]


class Recorder(pf.Progress):
    """Notes every call of update in Recorder.seen: (done before, total, done, note)."""

    seen = []

    def update(self, done, note=""):
        self.seen.append(
            (round(1e6 * self.first), round(1e6 * self.total), round(1e6 * done), note)
        )


@pytest.fixture
def seen(monkeypatch):
    monkeypatch.setattr(Recorder, "seen", [])
    monkeypatch.setattr(pf, "Progress", Recorder)
    return Recorder.seen


def test_progress_of_tokenising_counts_the_bytes_of_all_files(tmp_path, seen):
    one = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    two = write_text(tmp_path / "b.txt", "three")
    make_shards(tmp_path / "out", [one, two], val_fraction=0)
    sizes = [os.path.getsize(one), os.path.getsize(two)]
    notes = [", 4 tokens", ", 8 tokens", ", 14 tokens"]
    assert [row[:2] for row in seen] == [(0, sum(sizes))] * 3
    assert [row[3] for row in seen] == notes
    assert [row[2] for row in seen][-2:] == [sizes[0], sum(sizes)]


BAD_INPUT = {
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999)[:-9], "gz: .*ended before"),
    "damaged gzip": (
        "a.txt.gz",
        gzip.compress(b"text")[:10] + b"\xff" * 20,
        "a.txt.gz: .*Error -3",
    ),
    "not gzip": ("a.txt.gz", b"plain text", "a.txt.gz: .*gzip"),
    "no text": ("a.txt", b" \n", "no text"),
    "empty file": ("a.jsonl", b"", "no text"),
    "binary": ("a.parquet", b"PAR1\x15\x84", "a.parquet: 'utf-8' codec"),
    "latin-1": ("a.txt", b"caf\xe9", "a.txt: 'utf-8' codec can't decode byte 0xe9 in position 3"),
}
BAD_LINES = [
    b"{",
    b'{"txt": "x"}',
    b'{"text": null}',
    b'{"text": ["x"]}',
    b"[1]",
    b"7",
    b"[" * 100_000,
    b'{"text": "caf\xe9' + b"x" * 1000 + b'"}',
]
for line in BAD_LINES:
    lines = b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}'
    message = 'a.jsonl, line 3: not a JSON object with a string "text"'
    BAD_INPUT[line[:20]] = ("a.jsonl", lines, message)


@pytest.mark.parametrize("case", BAD_INPUT)
def test_unusable_input_gives_one_line_and_leaves_nothing(tmp_path, case):
    name, content, message = BAD_INPUT[case]
    (tmp_path / name).write_bytes(content)
    with refusal(message) as error:
        make_shards(tmp_path / "out", [tmp_path / name], shard_tokens=500)
    assert os.listdir(tmp_path) == [name]
    assert len(str(error.value)) < 400


def test_default_shards_are_the_standard_library_byte_for_byte(tmp_path, capsys):
    folder = str(tmp_path / "default")
    meta = pf.write_default_shards(folder)
    assert meta["tokenizer"] == "bytes"
    assert "source files of Python's standard library" in capsys.readouterr().out
    paths = pf.standard_library_files()
    sources = [pathlib.Path(path).read_bytes() for path in paths]
    texts = [source.decode("utf-8-sig") for source in sources if source.strip()]
    documents = [np.append(256, np.frombuffer(text.encode(), np.uint8)) for text in texts]
    chosen = held_out_by_hand([len(document) for document in documents], 0.05)
    parts = {
        "train": [document for n, document in enumerate(documents) if n not in chosen],
        "val": [documents[n] for n in chosen],
    }
    for split, expected in parts.items():
        tokens = pf.read_shard(f"{folder}/stdlib_{split}_000000.bin")
        assert np.array_equal(tokens, np.concatenate(expected))
    assert len(texts) > 100
    without = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    assert not any(without & {*path.split(os.sep)} for path in paths)
    assert pf.write_default_shards(folder) == meta
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- interrupted and concurrent runs


@pytest.mark.parametrize("name", ["x_train_000000.bin", "notes.txt"])
def test_folder_that_holds_something_is_never_touched(tmp_path, name):
    path = write_jsonl(tmp_path / "a.jsonl", ["one"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(GOOD_SHARD)
    with refusal("is there already; remove the folder or choose another --out"):
        make_shards(tmp_path / "out", [path])
    assert (tmp_path / "out" / name).read_bytes() == GOOD_SHARD
    assert os.listdir(tmp_path / "out") == [name]


def test_empty_folder_is_filled_and_nothing_outside_it_is_touched(tmp_path, monkeypatch):
    """It may be a mount point, or lie in a folder that cannot be written: no file or folder is
    made beside it or renamed over it, and after an error it is there as before."""
    bad = write_text(tmp_path / "bad.jsonl", "{")
    good = write_jsonl(tmp_path / "good.jsonl", ["one", "two"])
    out = tmp_path / "out"
    out.mkdir()
    inode = out.stat().st_ino
    replace = os.replace
    beside = []

    def note(part, path):
        beside.append(sorted(os.listdir(tmp_path)))
        replace(part, path)

    monkeypatch.setattr(os, "replace", note)
    with refusal("bad.jsonl, line 1"):
        make_shards(out, [bad])
    assert (os.listdir(out), out.stat().st_ino) == ([], inode)
    make_shards(out, [good], val_fraction=0)
    assert all_tokens(out, "train") == byte_documents(["one", "two"])
    assert out.stat().st_ino == inode
    assert beside == [["bad.jsonl", "good.jsonl", "out"]] * 2


def test_error_is_told_even_if_its_traces_cannot_be_removed(tmp_path, monkeypatch):
    def refuse(folder):
        raise OSError("the disk has gone")

    monkeypatch.setattr(pf, "discard", refuse)
    with refusal("a.jsonl, line 1"):
        make_shards(tmp_path / "out", [write_text(tmp_path / "a.jsonl", "{")])


def test_lock_file_is_removed_while_its_lock_is_held(tmp_path, monkeypatch):
    """Else another run might have taken it in between, and a third one a new file."""
    remove = os.remove
    removed = []

    def note(path):
        if os.path.basename(path) == "lock":
            removed.append(path)
            with refusal("another run is writing there"):
                pf.locked(os.path.dirname(path))
        remove(path)

    monkeypatch.setattr(os, "remove", note)
    with pf.only_writer(str(tmp_path / "out")):
        pass
    assert removed == [str(tmp_path / "out" / "lock")]
    assert os.listdir(tmp_path) == []


HOLD = """
import sys, prepare_fineweb as pf
with pf.locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def another_run(folder):
    """A process that holds the lock of a folder until it is killed, which is at the end."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=PROJECT, **pipes) as process:
        assert process.stdout.readline() == b"held\n"
        try:
            yield process
        finally:
            process.kill()


def test_run_that_waits_for_another_takes_what_it_wrote(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    out = tmp_path / "out"
    with another_run(out) as other, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(make_shards, out, [path], wait=True)
        time.sleep(0.1)
        assert not waiting.done()
        shutil.copytree(make_folder(tmp_path / "other", "three"), out, dirs_exist_ok=True)
        other.kill()
        assert waiting.result(timeout=PATIENCE) == pf.read_meta(str(out))
    assert all_tokens(out, "train") == byte_documents(["three"])


def test_two_runs_on_one_folder_refuse_each_other_and_a_dead_one_does_not_count(tmp_path, hub):
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    out = tmp_path / "out"
    runs = {
        "locked": lambda: pf.locked(str(out)),
        "download": lambda: pf.download_shards(str(out), 0),
        "tokenise": lambda: make_shards(out, [path], val_fraction=0),
    }
    with another_run(out):
        for run in runs.values():
            with refusal("another run is writing there"):
                run()
        assert os.listdir(out) == ["lock"]
    assert hub.requests == []
    runs["tokenise"]()
    assert all_tokens(out, "train") == byte_documents(["one", "two"])
    with pf.locked(str(out)):
        assert (out / "lock").exists()


LOSSES = ["none", "folder renamed", "renamed and replaced", "removed", "lock replaced"]


@pytest.mark.parametrize("loss", LOSSES)
def test_lock_knows_whether_its_file_is_still_the_one_at_the_path(tmp_path, loss):
    out = tmp_path / "out"
    held = pf.locked(str(out))
    with held:
        assert pf.still_locked(held)
        if loss in ("folder renamed", "renamed and replaced"):
            out.rename(tmp_path / "elsewhere")
        if loss == "renamed and replaced":
            second = pf.locked(str(out))
            with second:
                assert pf.still_locked(second)
                assert not pf.still_locked(held)
        if loss == "removed":
            shutil.rmtree(out)
        if loss == "lock replaced":
            (out / "new").touch()
            (out / "new").replace(out / "lock")
        assert pf.still_locked(held) == (loss == "none")


def test_run_killed_at_any_rename_leaves_what_nobody_takes_and_the_next_run_begins_anew(
    tmp_path, monkeypatch
):
    path = write_jsonl(tmp_path / "a.jsonl", word_texts(20, 20))
    out = tmp_path / "out"
    settings = {"shard_tokens": 500, "val_fraction": 0.2}
    make_shards(tmp_path / "whole", [path], **settings)
    expected = shard_bytes(tmp_path / "whole")
    replace = os.replace
    remove = os.remove
    for survived in range(len(expected) + 2):  # of the renames of the shards and of meta.json
        renamed = []

        def rename_or_die(part, name, renamed=renamed, survived=survived):
            if len(renamed) == survived:
                renamed.append("killed")
                raise KeyboardInterrupt
            renamed.append(name)
            replace(part, name)

        def remove_unless_dead(name, renamed=renamed):
            if "killed" not in renamed and not str(renamed[-1:]).endswith("meta.json']"):
                remove(name)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(os, "replace", rename_or_die)
            patch.setattr(os, "remove", remove_unless_dead)
            make_shards(out, [path], **settings)
        assert len(pf.shard_names(str(out))) == min(survived, len(expected))
        for use in (pf.read_meta, pf.verify, pf.fingerprint, pf.download_shards):
            with refusal(f"was stopped; .*run the command that made {out} again"):
                use(str(out), "train") if use == pf.fingerprint else use(str(out))
        if survived % 2:
            continue  # what two killed runs left must not be in the way either
        make_shards(out, [path], wait=True, **settings)
        assert shard_bytes(out) == expected
        assert sorted(os.listdir(out)) == sorted(["meta.json", *expected])
        shutil.rmtree(out)
    assert len(expected) == 5


def test_system_that_does_not_open_folders_can_still_write(tmp_path, monkeypatch):
    """Windows: os.open of a folder is refused, so its names cannot be synchronised."""
    plain = os.open

    def no_folders(path, *args):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied")
        return plain(path, *args)

    monkeypatch.setattr(os, "open", no_folders)
    out = make_folder(tmp_path / "out", "one", "two")
    assert all_tokens(out, "train") == byte_documents(["one", "two"])


def start(*args):
    """Python in a process of its own, with Ctrl-C as a terminal has it."""
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(condition, process):
    """Until the condition holds or the process has ended."""
    end = time.monotonic() + PATIENCE
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.005)


@pytest.mark.slow
def test_kill_9_while_tokenising_then_the_same_command_gives_the_same_shards(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", word_texts(400, 300) * 10)
    out = tmp_path / "out"
    rng = random.Random(0)
    command = [pf.__file__, "--input", path, "--tokenizer=bytes", "--shard_tokens=100000"]
    command.append(f"--out={out}")
    make_shards(tmp_path / "whole", [path], shard_tokens=100_000)
    expected = shard_bytes(tmp_path / "whole")
    for _ in range(3):
        process = start(*command)
        wait_for((out / "unfinished").exists, process)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate(timeout=PATIENCE)
        if (out / "unfinished").exists():
            with refusal("was stopped"):
                pf.find_shards(str(out), "train")
        else:
            assert shard_bytes(out) == expected
            shutil.rmtree(out)
    process = start(*command)
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, errors
    assert shard_bytes(out) == expected


def test_ctrl_c_is_one_line_and_leaves_nothing(tmp_path, tmp_path_factory):
    """Fifty names of one file: work for long enough."""
    path = write_jsonl(tmp_path / "a.jsonl", word_texts(200, 400) * 10)
    folder = tmp_path_factory.mktemp("links")
    links = [folder / f"{i}.jsonl" for i in range(50)]
    for link in links:
        link.symlink_to(path)
    out = tmp_path / "out"
    process = start(pf.__file__, "--input", *links, "--tokenizer=bytes", f"--out={out}")
    wait_for((out / "unfinished").exists, process)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 130
    assert "prepare_fineweb.py: interrupted" in errors
    assert "Traceback" not in errors
    assert os.listdir(tmp_path) == ["a.jsonl"]


# ------------------------------------------------------------------------------ the command line

OWN_TEXT = ["--input=a.txt", "--out=out"]
WRONG = [
    (["--shards=100"], 2, "--shards is 0 to 99"),
    (["--shards=-1"], 2, "--shards is 0 to 99"),
    (["--shards=5", *OWN_TEXT], 2, "--shards is for the download"),
    (["verify", "--shards=5"], 2, "--shards is for the download"),
    (["--input", "x.txt"], 2, "--out=DIR"),
    (["verify", "--input", "x.txt", "--out=x"], 2, "no other command"),
    (["--workers=0", *OWN_TEXT], 2, "--workers is 1 to 1024"),
    (["--workers=1025", *OWN_TEXT], 2, "--workers is 1 to 1024"),
    ([f"--workers={2**63}", *OWN_TEXT], 2, "--workers is 1 to 1024"),
    (["--val_fraction=1", *OWN_TEXT], 2, "--val_fraction is from 0 to below 1"),
    (["--val_fraction=-0.1", *OWN_TEXT], 2, "--val_fraction is from 0 to below 1"),
    (["--val_fraction=nan", *OWN_TEXT], 2, "--val_fraction is from 0 to below 1"),
    (["--shard_tokens=1", *OWN_TEXT], 2, "--shard_tokens is 2 to 2147483647"),
    ([f"--shard_tokens={2**31}", *OWN_TEXT], 2, "--shard_tokens is 2 to 2147483647"),
    (["--out=mine", "--tokenizer=bytes"], 2, "--tokenizer is for --input=FILES, which is not"),
    (["--tokenizer=gpt2"], 2, "--tokenizer is for --input=FILES"),
    ([f"--workers={os.cpu_count()}"], 2, "--workers is for --input=FILES"),
    (["--shard_tokens=100000000"], 2, "--shard_tokens is for --input=FILES"),
    (["--val_fraction=0.01"], 2, "--val_fraction is for --input=FILES"),
    (["verify", "--val_fraction=0"], 2, "--val_fraction is for --input=FILES"),
    (["verfy"], 2, "verfy"),
    (["--tokenizer=klingon"], 2, "klingon"),
    (["--input=nowhere.txt", "--out=out"], 1, "No such file or directory: 'nowhere.txt'"),
    (["--input=*.zzz", "--out=out"], 1, "*.zzz"),
    (["--input=my texts", "--out=out"], 1, "is a folder; --input='my texts/*' takes"),
    (["--input=a.json", "--out=out"], 1, "a.json is not plain text; .* of a .jsonl file"),
    (["--input", "a.txt", "a.JSON.gz", "--out=out"], 1, "a.JSON.gz is not plain text"),
    (["--input=a.ndjson", "--out=out"], 1, "a.ndjson is not plain text"),
    (["--input", "a.txt", "/dev/null", "--out=out"], 1, "/dev/null is a pipe or a device; write"),
    (["--input=a.txt", "--out=a.txt/sub"], 1, "a.txt"),
    (["--input=a.txt", "--out=a.txt"], 1, "a.txt"),
    (["verify", "--out=nowhere"], 1, "no shards here"),
]


@pytest.mark.parametrize("args, code, message", WRONG)
def test_wrong_command_lines_end_with_one_line_and_a_code(
    tmp_path, monkeypatch, capsys, args, code, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pf, "download_shards", lambda *args: pytest.fail("a download begins"))
    for name in ("a.txt", "a.json", "a.JSON.gz", "a.ndjson"):
        write_text(tmp_path / name, "text")
    (tmp_path / "my texts").mkdir()
    before = sorted(os.listdir(tmp_path))
    end = run_main(monkeypatch, *args, *["--tokenizer=bytes"] * ("--input" in " ".join(args)))
    said = end if isinstance(end, str) else capsys.readouterr().err
    assert (1 if isinstance(end, str) else end) == code
    assert re.search(message.replace("*.", r"\*."), said) or message in said
    assert "\n" not in said.strip()
    assert sorted(os.listdir(tmp_path)) == before


def test_input_takes_files_and_unexpanded_patterns_behind_an_equals_sign_and_more_than_once(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.txt", "c1.md", "c[1].md", "d.jsonl"):
        write_jsonl(tmp_path / name, [name])
    command = ["--input=*.txt", "c[1].md", "b.txt", "--tokenizer=bytes", "--out=my out"]
    command += ["--input", "d.jsonl", "--val_fraction=0"]
    assert run_main(monkeypatch, *command) is None
    assert "next: python train.py --data='my out'\n" in capsys.readouterr().out
    names = ("a.txt", "b.txt", "c[1].md")
    texts = [(tmp_path / name).read_text(encoding="utf-8") for name in names]  # b.txt once
    assert all_tokens(tmp_path / "my out", "train") == byte_documents([*texts, "d.jsonl"])


def test_every_flag_reaches_what_it_is_for(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(pf, "tokenise", lambda *args: calls.append(args))
    monkeypatch.setattr(pf, "download_shards", lambda *args: calls.append(args))
    monkeypatch.setattr(pf, "verify", lambda *args: calls.append(args) or 3)
    path = write_text(tmp_path / "a.txt", "text")
    flags = "--tokenizer=bytes --workers=3 --shard_tokens=7 --val_fraction=0.25".split()
    assert run_main(monkeypatch, "--input", path, "--out=x") is None
    assert run_main(monkeypatch, "--input", path, "--out=x", *flags) is None
    assert run_main(monkeypatch) is None
    assert run_main(monkeypatch, "--shards=5", "--out=y") is None
    assert run_main(monkeypatch, "verify") == 1
    assert calls == [
        ([path], "x", "gpt2", os.cpu_count(), 100_000_000, 0.01),
        ([path], "x", "bytes", 3, 7, 0.25),
        ("data/fineweb_edu10B", 99),
        ("y", 5),
        ("data/fineweb_edu10B",),
    ]


def test_help_needs_no_docstrings():
    process = start("-OO", pf.__file__, "--help")
    errors = process.communicate(timeout=PATIENCE)[1]
    assert (process.returncode, errors) == (0, "")


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)


SPOIL = {
    "flipped bit": (flip_a_bit, "sha256"),
    "cut off": (lambda path: os.truncate(path, 2000), "488 tokens are due"),
    "removed": (lambda path: path.unlink(), "cannot be read"),
    "token outside": (lambda path: pf.write_shard(str(path), [256, 257]), "token 257"),
    "another shard": (
        lambda path: pf.write_shard(str(path), [256, 1, 2]),
        "'tokens': 3, .* where meta.json has",
    ),
}


@pytest.mark.parametrize("how", SPOIL)
def test_verify_names_the_bad_file_and_the_remedy(tmp_path, monkeypatch, capsys, how):
    out = make_folder(tmp_path / "out", *word_texts(20, 100), shard_tokens=2000)
    meta = pf.read_meta(str(out))
    for known in meta["files"].values():
        known["documents"] = known.pop("tokens")  # an earlier version knew other things of a file
    pf.write_meta(str(out), meta)
    assert pf.verify(str(out)) == 0
    assert "BAD" not in capsys.readouterr().out
    spoil, message = SPOIL[how]
    spoil(out / "text_train_000001.bin")
    assert run_main(monkeypatch, "verify", f"--out={out}") == 1
    lines = capsys.readouterr().out.splitlines()
    bad = [line for line in lines if line.startswith("BAD")]
    assert len(bad) == 1
    for part in ("text_train_000001.bin", message, f"the command that made {out} again"):
        assert re.search(part, bad[0])
    assert f"{len(meta['files']) - 1} of {len(meta['files'])} shards are good" in lines[-1]


def test_verify_passes_a_shard_that_meta_does_not_list_only_where_it_lists_none(tmp_path, capsys):
    """As find_shards does."""
    out = make_folder(tmp_path / "out", "one", "two")
    pf.write_shard(str(out / "old_train_000000.bin"), [256, 1])
    assert pf.verify(str(out)) == 1
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert re.search("BAD .*old_train_000000.bin: meta.json does not list it; remove it", lines[0])
    assert lines[1:] == [
        "good  text_train_000000.bin: 8 tokens",
        f"{out}: 1 of 2 shards are good",
    ]
    pf.write_meta(str(out), {"tokenizer": "bytes"})
    assert pf.verify(str(out)) == 0
    assert "good  old_train_000000.bin: 2 tokens, not in meta.json" in capsys.readouterr().out
    assert len(pf.find_shards(str(out), "train")) == 2


# ---------------------------------------- download, from a server on this machine that misbehaves

PAPER_FILES = [
    "finewebedu_val_000000.bin",
    "finewebedu_train_000001.bin",
    "finewebedu_train_000002.bin",
]
FIRST = PAPER_FILES[0]
HUB_PATH = "/datasets/kjj0/finewebedu10B-gpt2/resolve/main/"


def rest(body, start, **headers):
    if start >= len(body):
        return 416, {}, b""
    place = f"bytes {start}-{len(body) - 1}/{len(body)}"
    return 206, {"Content-Range": place, **headers}, body[start:]


def half(body, start):
    status, headers, data = rest(body, start)
    return status, {**headers, "Content-Length": len(data)}, data[: len(data) // 2 + 1]


def whole(**headers):
    """All of the file whatever was asked for, with these headers."""
    return lambda body, start: (200, {k.replace("_", "-"): v for k, v in headers.items()}, body)


def first_half(**headers):
    return lambda body, start: (
        200,
        {"Content-Length": len(body), **headers},
        body[: len(body) // 2],
    )


def answer(status, headers=None, data=b""):
    return lambda body, start: (status, headers or {}, data)


# what the server does: function of the file and of the byte asked for, to (status, headers, body)
HTML = {"Content-Type": "text/html; charset=utf-8"}
TROUBLE = {
    "none": rest,
    "half": half,
    "stalls": rest,
    "no_range": whole(),
    "half_without_range": first_half(),
    "half_without_length": first_half(**{"Content-Length": ""}),
    "length_too_small": lambda body, start: (200, {"Content-Length": len(body) - 100}, body),
    "length_too_large": lambda body, start: (200, {}, body + b"tail"),
    "length_is_no_number": whole(Content_Length="many"),
    "wrong_place": lambda body, start: rest(body, start, **{"Content-Range": "bytes 0-"}),
    "busy": answer(429, {"Retry-After": 7}),
    "busy_until_a_date": answer(503, {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}),
    "busy_for_ten_minutes": answer(429, {"Retry-After": 600}),
    "busy_for_longer": answer(429, {"Retry-After": 601}),
    "error_500": answer(500, HTML, b"<html>oops</html>"),
    "web_page": answer(200, HTML, b"<html>log in</html>"),
    "web_page_of_right_length": lambda body, start: (200, {}, (b"<html>" * len(body))[: len(body)]),
    "token_outside": lambda body, start: (200, {}, body[:-2] + b"\xff\xff"),
    "not_found": answer(404, None, b"nothing here"),
    "redirect_home": answer(307, {"Location": "/other/path/NAME"}),
    "redirect_away": answer(302, {"Location": "ELSEWHERE/NAME"}),
    "redirect_in_a_circle": answer(302, {"Location": "/x/NAME"}),
    "redirect_to_nonsense": answer(302, {"Location": "http://127.0.0.1:99999/x"}),
}
for status in (400, 401, 403, 408, 410, 425, 502, 503):
    TROUBLE[f"status_{status}"] = answer(status)


class Troubled(http.server.BaseHTTPRequestHandler):
    """Serves server.files; request n for a file meets the trouble server.trouble(name, n)."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        name = self.path.split("/")[-1]
        server.requests.append((name, dict(self.headers)))
        server.paths.append(self.path)
        self.close_connection = True
        kind = server.trouble(name, sum(seen == name for seen, _ in server.requests))
        if "//" in self.path or "%" in self.path:
            kind = "not_found"
        if kind == "dropped":
            reset = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            return self.connection.close()
        start = int(self.headers["Range"][6:-1])
        status, headers, body = TROUBLE[kind](server.files[name], start)
        self.send_response(status)
        for header, value in {
            "Connection": "close",
            "Content-Length": len(body),
            **headers,
        }.items():
            value = str(value).replace("NAME", name).replace("ELSEWHERE", server.elsewhere)
            self.send_header(header, value)
        self.end_headers()
        size, pause = server.pace
        with contextlib.suppress(ConnectionError):
            for begin in range(0, len(body), size):
                self.wfile.write(body[begin : begin + size])
                time.sleep(pause)
                if kind == "stalls":
                    server.over.wait(PATIENCE)


@contextlib.contextmanager
def serve(files):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Troubled)
    server.files = files
    server.requests = []
    server.paths = []
    server.waits = []
    server.pace = (10_000, 0)
    server.over = threading.Event()
    server.trouble = lambda name, times: "none"
    server.elsewhere = ""
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        thread.join(PATIENCE)
        server.server_close()


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """A hub with the validation shard and two training shards of 100,000 tokens; waits are noted,
    not waited for."""
    folder = tmp_path_factory.mktemp("hub")
    files = {}
    for seed, name in enumerate(PAPER_FILES):
        tokens = np.random.default_rng(seed).integers(0, 50257, 100_000)
        pf.write_shard(str(folder / name), tokens)
        files[name] = (folder / name).read_bytes()
    sizes = {name: len(body) for name, body in files.items()}
    with serve(files) as server:
        clock = types.SimpleNamespace(sleep=server.waits.append, monotonic=time.monotonic)
        first = lambda n: {name: sizes[name] for name in PAPER_FILES[: n + 1]}  # noqa: E731
        monkeypatch.setattr(pf, "published", first)
        monkeypatch.setattr(pf, "time", clock)
        monkeypatch.setattr(pf, "BLOCK", 1 << 8)
        monkeypatch.setattr(pf, "HUB", server.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def asked(hub):
    """The names, and the first bytes asked for, of the requests for files."""
    return [(file, int(headers["Range"][6:-1])) for file, headers in hub.requests]


def troubled_once(hub, trouble, times=1):
    hub.trouble = lambda name, n: trouble if n <= times else "none"


def test_download_brings_the_published_bytes_and_what_is_there_stays(
    tmp_path, hub, monkeypatch, capsys
):
    out = tmp_path / "out"
    for shards in (1, 2, 2):
        names = sorted(PAPER_FILES[: shards + 1])
        assert run_main(monkeypatch, f"--shards={shards}", f"--out={out}") is None
        assert shard_bytes(out) == {name: hub.files[name] for name in names}
        assert sorted(pf.read_meta(str(out))["files"]) == names
    assert asked(hub) == [(name, 0) for name in PAPER_FILES]
    assert hub.paths == [HUB_PATH + name for name in PAPER_FILES]
    assert {headers["Accept-Encoding"] for _, headers in hub.requests} == {"identity"}
    assert sorted(os.listdir(out)) == sorted(["meta.json", *PAPER_FILES])
    assert os.listdir(tmp_path) == ["out"]
    assert pf.verify(str(out)) == 0
    assert pf.read_meta(str(out))["tokenizer"] == "gpt2"
    assert f"next: python train.py --data={out}" in capsys.readouterr().out
    flip_a_bit(out / FIRST)
    assert pf.verify(str(out)) == 1  # by the checksum taken on arrival


def test_complete_shards_are_not_read_again(tmp_path, hub, monkeypatch):
    out = tmp_path / "out"
    pf.download_shards(str(out), 1)
    examined = []
    examine = pf.examine
    monkeypatch.setattr(pf, "examine", lambda *args: examined.append(args[0]) or examine(*args))
    pf.download_shards(str(out), 2)
    assert [os.path.basename(path) for path in examined] == [f"{PAPER_FILES[2]}.part"]


def test_progress_counts_all_that_was_lacking_together(tmp_path, hub, seen):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FIRST).write_bytes(hub.files[FIRST])
    part = hub.files[PAPER_FILES[1]][:50_000]
    (tmp_path / "out" / f"{PAPER_FILES[1]}.part").write_bytes(part)
    pf.download_shards(str(tmp_path / "out"), 2)
    first, total, done, notes = zip(*seen, strict=True)
    assert set(first) == {50_000}
    assert set(total) == {2 * len(hub.files[FIRST])}
    assert done == tuple(sorted(done))
    assert 50_000 < done[0] < 51_000
    assert done[-1] == total[0]
    assert [notes[0], notes[-1]] == [f", {name}" for name in PAPER_FILES[1:]]


# how often each comes before it passes
PASSING = dict.fromkeys(
    "half half_without_range half_without_length length_too_small length_too_large "
    "length_is_no_number busy busy_until_a_date web_page redirect_home no_range status_408 "
    "status_425 status_502 "
    "status_503".split(),
    1,
)
PASSING |= {"dropped": 3, "error_500": 3}


@pytest.mark.parametrize("trouble", PASSING)
def test_trouble_that_passes_is_overcome(tmp_path, hub, trouble):
    troubled_once(hub, trouble, PASSING[trouble])
    pf.download_shards(str(tmp_path / "out"), 2)
    assert shard_bytes(tmp_path / "out") == hub.files
    assert sorted(os.listdir(tmp_path / "out")) == sorted(["meta.json", *PAPER_FILES])


LASTING = {
    "dropped": "no connection, or a lost one",
    "length_too_small": "the server offers",
    "length_too_large": "the server offers",
    "error_500": "HTTP 500, .*given up after try 8 of 8",
    "status_408": "HTTP 408, .*given up after try 8 of 8",
    "web_page": "a web page came",
    "web_page_of_right_length": "what came is no shard .*; it was removed: run the same command",
    "token_outside": "what came token 65535 is not in the vocabulary .*; it was removed",
    "not_found": "HTTP 404; given up after try 1 of 8",
    "status_400": "HTTP 400; given up after try 1 of 8",
    "status_401": "HTTP 401; set HF_TOKEN",
    "status_403": "HTTP 403; set HF_TOKEN",
    "status_410": "HTTP 410; given up after try 1 of 8",
    "busy_for_longer": "Retry-After: 601; given up after try 1 of 8",
    "redirect_in_a_circle": "TooManyRedirects",
    "redirect_to_nonsense": "InvalidURL",
    "half_without_range": "the connection ended at byte|a lost one",
}


@pytest.mark.parametrize("trouble", LASTING)
def test_trouble_that_lasts_is_one_true_line_and_no_file_under_a_final_name(tmp_path, hub, trouble):
    """And nothing that stays in the way when the same command is given again."""
    hub.trouble = lambda name, times: trouble if name == PAPER_FILES[1] else "none"
    with refusal(rf"{PAPER_FILES[1]}: .*{LASTING[trouble]}"):
        pf.download_shards(str(tmp_path / "out"), 2)
    assert PAPER_FILES[1] not in os.listdir(tmp_path / "out")
    hub.trouble = lambda name, times: "none"
    pf.download_shards(str(tmp_path / "out"), 2)
    assert shard_bytes(tmp_path / "out") == hub.files


def test_lost_connection_goes_on_where_it_ended(tmp_path, hub):
    troubled_once(hub, "half", 11)  # more than the tries without progress
    pf.download_shards(str(tmp_path / "out"), 0)
    assert shard_bytes(tmp_path / "out") == {FIRST: hub.files[FIRST]}
    starts = [start for _, start in asked(hub)]
    assert len(starts) == 12
    assert starts == sorted(starts)
    assert len(set(starts)) >= 8


def test_connection_that_ends_without_a_length_goes_on_where_it_was(tmp_path, hub, capsys):
    troubled_once(hub, "half_without_length")
    pf.download_shards(str(tmp_path / "out"), 0)
    assert shard_bytes(tmp_path / "out") == {FIRST: hub.files[FIRST]}
    assert "ended at byte 100512 of 201024" in capsys.readouterr().err
    assert asked(hub) == [(FIRST, 0), (FIRST, 100_512)]


def test_connection_that_stalls_goes_on_where_it_was(tmp_path, hub, monkeypatch, capsys):
    """The server falls silent after 10,000 bytes, in the first connection alone; on a slow machine
    a later one may be slower than the limit set here, too."""
    monkeypatch.setattr(pf, "TIMEOUT", (PATIENCE, 0.5))
    troubled_once(hub, "stalls")
    pf.download_shards(str(tmp_path / "out"), 0)
    assert shard_bytes(tmp_path / "out") == {FIRST: hub.files[FIRST]}
    assert "a lost one" in capsys.readouterr().err
    starts = [start for _, start in asked(hub)]
    assert starts[0] == 0
    assert starts[-1] > 0
    assert starts == sorted(starts)


def test_bytes_from_another_place_never_enter_a_file(tmp_path, hub):
    hub.trouble = lambda name, times: "half" if times == 1 else "wrong_place"
    with refusal("the server offers .*bytes 0-"):
        pf.download_shards(str(tmp_path / "out"), 0)
    assert shard_bytes(tmp_path / "out") == {}


@pytest.mark.parametrize(
    "left, starts", [(30_000, [30_000]), (201_024, []), (300_000, [300_000, 0])]
)
def test_left_over_part_file_is_continued_or_complete_and_one_too_long_is_begun_anew(
    tmp_path, hub, left, starts
):
    (tmp_path / "out").mkdir()
    data = (hub.files[FIRST] + b"\0" * 300_000)[:left]
    (tmp_path / "out" / f"{FIRST}.part").write_bytes(data)
    pf.download_shards(str(tmp_path / "out"), 0)
    assert shard_bytes(tmp_path / "out") == {FIRST: hub.files[FIRST]}
    assert asked(hub) == [(FIRST, at) for at in starts]


def test_folder_in_the_way_of_a_part_file_is_one_line(tmp_path, hub, monkeypatch):
    (tmp_path / "out" / f"{FIRST}.part").mkdir(parents=True)
    assert f"{FIRST}.part'" in run_main(monkeypatch, "--shards=0", f"--out={tmp_path / 'out'}")


WAITS = {
    "error_500": [1, 2, 4, 8, 16, 32, 60],
    "busy": [7, 7, 7, 8, 16, 32, 60],
    "busy_for_ten_minutes": [600] * 7,
}


@pytest.mark.parametrize("trouble", WAITS)
def test_wait_doubles_or_is_what_the_server_asks_for_and_every_try_is_counted(
    tmp_path, hub, capsys, trouble
):
    hub.trouble = lambda name, times: trouble
    with refusal("x: HTTP .*; given up after try 8 of 8"):
        pf.download(f"{hub.url}/{FIRST}", str(tmp_path / "x"))
    assert hub.waits == WAITS[trouble]
    assert len(hub.requests) == 8
    errors = capsys.readouterr().err
    said = re.findall("; try ([0-9]) of 8 in ([0-9]+) s\n", errors)
    assert len(errors.splitlines()) == 7
    assert said == [(str(n), str(wait)) for n, wait in enumerate(WAITS[trouble], 2)]


def test_download_of_any_file_reports_progress_and_checks_what_is_known_of_it(tmp_path, hub):
    body = hub.files[FIRST]
    seen = []
    troubled_once(hub, "half")
    hub.files[f"{FIRST}?x=1"] = body
    pf.download(f"{hub.url}/a/{FIRST}?x=1", str(tmp_path / "new" / "x"), progress=seen.append)
    assert (tmp_path / "new" / "x").read_bytes() == body
    assert os.listdir(tmp_path / "new") == ["x"]
    assert seen == sorted(seen)
    assert seen[-1] == len(body)
    assert len(seen) > 100
    with refusal("y: .*given up after try 2 of 2"):
        url = f"{hub.url}/a/{FIRST}?x=1"
        pf.download(url, str(tmp_path / "new" / "y"), len(body) + 1, tries=2)
    assert os.listdir(tmp_path / "new") == ["x"]


def test_published_sizes_are_the_paper_s():
    sizes = pf.published(99)
    tokens = {name: (size - 1024) // 2 for name, size in sizes.items()}
    assert len(sizes) == 100
    assert tokens.pop(FIRST) == 100_000_000
    assert tokens["finewebedu_train_000099.bin"] == 53_989_344
    assert sum(tokens.values()) == 9_853_989_344
    assert pf.published(0) == {FIRST: 200_001_024}
    assert pf.published(98) == dict(list(sizes.items())[:-1])
    assert list(pf.published(2)) == PAPER_FILES


ADDRESSES = {
    "": "https://huggingface.co",
    " ": "https://huggingface.co",
    " http://mirror:8000/ \n": "http://mirror:8000",
    "https://mirror/hub//": "https://mirror/hub",
}


@pytest.mark.parametrize("setting", ADDRESSES)
def test_address_of_the_hub_is_what_hf_endpoint_says(monkeypatch, setting):
    monkeypatch.setenv("HF_ENDPOINT", setting)
    spec = importlib.util.spec_from_file_location("prepare_again", pf.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.HUB == ADDRESSES[setting]


SECRET = "hf_thisIsASecret123"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])  # another port, and another name too
def test_token_goes_to_the_endpoint_and_never_into_a_redirect_elsewhere(
    tmp_path, hub, monkeypatch, capsys, host
):
    monkeypatch.setenv("HF_TOKEN", f" {SECRET}\n")
    hub.trouble = lambda name, times: "redirect_away"
    with serve(hub.files) as other:
        hub.elsewhere = other.url.replace("127.0.0.1", host)
        pf.download_shards(str(tmp_path / "out"), 2)
        pf.download(f"{other.url}/{FIRST}", str(tmp_path / "x"))
        assert shard_bytes(tmp_path / "out") == hub.files
        assert len(other.requests) == 4
        assert not any("Authorization" in headers for _, headers in other.requests)
    sent = [headers["Authorization"] for _, headers in hub.requests]
    assert sent == [f"Bearer {SECRET}"] * 3
    assert SECRET not in "".join(capsys.readouterr())


def test_token_does_not_go_to_an_address_that_only_begins_like_the_hub_s(
    tmp_path, hub, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(pf, "HUB", hub.url[:-1])  # another port, without its last digit
    pf.download(f"{hub.url}/{FIRST}", str(tmp_path / "x"))
    assert "Authorization" not in hub.requests[0][1]


@pytest.mark.parametrize(
    "netrc, trouble",
    [("machine 127.0.0.1 login someone password else\n", "none"), ("", "redirect_home")],
)
def test_token_follows_a_redirect_within_the_endpoint_and_beats_netrc(
    tmp_path, hub, monkeypatch, netrc, trouble
):
    monkeypatch.setenv("NETRC", write_text(tmp_path / "netrc", netrc))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    troubled_once(hub, trouble)
    pf.download_shards(str(tmp_path / "out"), 2)
    sent = {headers["Authorization"] for _, headers in hub.requests}
    assert sent == {f"Bearer {SECRET}"}
    assert len(hub.requests) == (3 if trouble == "none" else 6)


@pytest.mark.parametrize(
    "name, value",
    [
        ("HF_TOKEN", f"{SECRET}\nX-Header: 1"),
        ("HF_TOKEN", f"{SECRET}汉"),
        ("HF_ENDPOINT", "huggingface.co"),
        ("HF_ENDPOINT", "file:///etc"),
    ],
)
def test_unusable_settings_are_refused_without_showing_the_token(
    tmp_path, hub, monkeypatch, capsys, name, value
):
    if name == "HF_TOKEN":
        monkeypatch.setenv(name, value)
    else:
        monkeypatch.setattr(pf, "HUB", value)
    with refusal(name) as error:
        pf.download_shards(str(tmp_path / "out"), 2)
    assert SECRET not in str(error.value) + "".join(capsys.readouterr())
    assert hub.requests == []
    assert hub.waits == []
    assert os.listdir(tmp_path) == []


def test_download_leaves_shards_of_your_own_text_alone(tmp_path, hub):
    out = make_folder(tmp_path / "out", "one", "two")
    before = shard_bytes(out)
    with refusal("holds other shards; choose another --out"):
        pf.download_shards(str(out), 2)
    assert shard_bytes(out) == before
    assert hub.requests == []


@pytest.mark.parametrize("before", [0, 1, 2])
def test_download_that_was_stopped_is_refused_until_it_or_a_smaller_one_is_complete(
    tmp_path, hub, before
):
    """It stops at the second training shard; before, there is nothing, or so many shards."""
    out = tmp_path / "out"
    if before:
        pf.download_shards(str(out), before - 1)
    hub.trouble = lambda name, times: "not_found" if name == PAPER_FILES[2] else "none"
    with refusal("HTTP 404"):
        pf.download_shards(str(out), 2)
    for split in ("train", "val"):
        remedy = f"made {out} again: a download goes on with what is missing"
        with refusal(f"{PAPER_FILES[2]} is not there but meta.json lists it .*{remedy}"):
            pf.find_shards(str(out), split)
    assert pf.verify(str(out)) == 1
    pf.download_shards(str(out), 1)
    assert pf.find_shards(str(out), "train") == [str(out / PAPER_FILES[1])]
    hub.trouble = lambda name, times: "none"
    pf.download_shards(str(out), 2)
    assert len(pf.find_shards(str(out), "train")) == 2
    assert pf.verify(str(out)) == 0


def test_download_that_brings_nothing_leaves_nothing(tmp_path, hub):
    """Else train.py would take the folder for the data to train on."""
    hub.trouble = lambda name, times: "not_found"
    with refusal("HTTP 404"):
        pf.download_shards(str(tmp_path / "out"), 2)
    assert os.listdir(tmp_path) == []


def test_fewer_shards_are_complete_where_the_others_were_removed(tmp_path, hub):
    out = tmp_path / "out"
    pf.download_shards(str(out), 2)
    (out / PAPER_FILES[2]).unlink()
    pf.download_shards(str(out), 1)
    assert pf.find_shards(str(out), "train") == [str(out / PAPER_FILES[1])]
    assert pf.verify(str(out)) == 0
    assert len(hub.requests) == 3


def test_shard_that_is_there_though_not_asked_for_is_examined_and_listed(tmp_path, hub):
    out = tmp_path / "out"
    out.mkdir()
    (out / PAPER_FILES[2]).write_bytes(hub.files[PAPER_FILES[2]])
    pf.download_shards(str(out), 1)
    assert len(pf.find_shards(str(out), "train")) == 2
    sha256 = hashlib.sha256(hub.files[PAPER_FILES[2]]).hexdigest()
    assert pf.read_meta(str(out))["files"][PAPER_FILES[2]]["sha256"] == sha256


def test_shard_of_wrong_length_is_brought_again_and_one_that_came_by_other_means_is_examined(
    tmp_path, hub
):
    out = tmp_path / "out"
    out.mkdir()
    for name, body in hub.files.items():
        (out / name).write_bytes(body)
    os.truncate(out / PAPER_FILES[2], 5000)
    older = {PAPER_FILES[2]: {"tokens": 1, "sha256": "an older one"}}
    pf.write_meta(str(out), {"tokenizer": "gpt2", "files": older})
    pf.download_shards(str(out), 2)
    assert asked(hub) == [(PAPER_FILES[2], 0)]
    assert shard_bytes(out) == hub.files
    assert pf.verify(str(out)) == 0
    (out / "meta.json").unlink()
    pf.write_shard(str(out / FIRST), [50257] * 100_000)
    with refusal(f"{FIRST}: token 50257 is not in the vocabulary"):
        pf.download_shards(str(out), 2)


DOWNLOAD = """
import json, sys
sys.path.insert(0, sys.argv.pop(1))
import prepare_fineweb as pf
sizes = json.loads(sys.argv.pop(1))
pf.BLOCK = 256
pf.published = lambda shards: sizes
pf.command_line(pf.main)
"""


@pytest.mark.slow
def test_kill_9_while_downloading_then_the_same_command_gives_the_published_bytes(
    tmp_path, hub, monkeypatch
):
    out = tmp_path / "out"
    rng = random.Random(1)
    hub.pace = (70_000, 0.3)
    monkeypatch.setenv("HF_ENDPOINT", f" {hub.url}/ ")
    sizes = json.dumps({name: len(body) for name, body in hub.files.items()})
    command = ["-c", DOWNLOAD, PROJECT, sizes, f"--out={out}"]
    for _ in range(3):
        process = start(*command)
        parts = lambda: out.glob("finewebedu*.part")  # noqa: E731
        wait_for(lambda: any(part.stat().st_size for part in parts()), process)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.communicate(timeout=PATIENCE)
        for name, body in shard_bytes(out).items():
            assert body == hub.files[name]
    hub.pace = (10_000, 0)
    process = start(*command)
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, errors
    assert shard_bytes(out) == hub.files
    assert any(start for _, start in asked(hub))


# ------------------------------------------------------------------- what every script shares


@pytest.mark.parametrize("action", ["write", "tokenise", "download"])
def test_file_is_on_the_disk_before_it_takes_its_name_and_the_name_after(
    tmp_path, hub, monkeypatch, action
):
    out = tmp_path / "out"
    out.mkdir()
    fsync = os.fsync
    replace = os.replace
    calls = []

    def note_fsync(descriptor):
        calls.append(("fsync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def note_replace(part, path):
        calls.append(("replace", os.stat(part).st_ino))
        replace(part, path)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    if action == "write":
        pf.write_shard(str(out / "a_train_000000.bin"), [1])
    if action == "tokenise":
        make_shards(out, [write_jsonl(tmp_path / "a.jsonl", ["one", "two"])], shard_tokens=5)
    if action == "download":
        pf.download_shards(str(out), 1)
    folder = out.stat().st_ino
    renamed = [n for n, (what, _) in enumerate(calls) if what == "replace"]
    assert len(renamed) == {"write": 1, "tokenise": 4, "download": 4}[action]
    for n in renamed:
        assert calls[n - 1] == ("fsync", calls[n][1])
        assert calls[n + 1] == ("fsync", folder)
    if action == "tokenise":  # and that the mark "unfinished" has gone
        assert calls[-2:] == [("fsync", folder)] * 2


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, error):
    path = write_text(tmp_path / "a", "old")
    with pytest.raises(error), pf.atomic_write(path) as file:
        file.write(b"half")
        raise error
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"
    with pf.atomic_write(path) as file:
        file.write(b"new")
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"new"


def test_only_a_regular_file_in_a_folder_that_can_be_written_is_written(tmp_path, monkeypatch):
    """A device or a pipe would be replaced by a file; here a pipe, which everybody may make."""
    os.mkfifo(tmp_path / "pipe")
    file = write_text(tmp_path / "old", "")
    for path in ("", file, str(tmp_path / "new")):
        pf.check_writable(path)
    for path in (f"{tmp_path}", f"{tmp_path}/pipe", f"{tmp_path}/none/new", f"{file}/new"):
        with refusal(f"{path}: must be a file"):
            pf.check_writable(path)
    for path in (f"{tmp_path}", f"{tmp_path}/pipe"):
        with refusal(f"{path}: must be a file"), pf.atomic_write(path):
            pass
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["old", "pipe"]
    monkeypatch.chdir(tmp_path)
    pf.check_writable("new")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with refusal("old: must be a file in a folder that exists and can be written"):
        pf.check_writable(file)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream, interval", [(io.StringIO, 5), (Terminal, 1)])
def test_progress_says_share_rate_and_time_left_now_and_then(monkeypatch, stream, interval):
    now = [1000]
    err = stream()
    monkeypatch.setattr(pf, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("COLUMNS", "100")
    bar = pf.Progress("reading", 4000, "MB", done=50)
    now[0] += interval - 0.1
    bar.update(60)
    assert err.getvalue() == ""
    now[0] = 1020
    bar.update(150, ", x")  # 100 in 20 s
    now[0] += interval - 0.1
    bar.tick()
    now[0] = 1040
    bar.tick()
    bar.end()
    lines = [
        "reading: 3.8% of 4,000 MB, 5 MB/s, 0:12:50 left, x",
        "reading: 3.8% of 4,000 MB, 2.5 MB/s, 0:25:40 left, x",
    ]
    if stream is Terminal:
        assert err.getvalue() == "".join(f"\r{line:<99}" for line in lines) + "\n"
    else:
        assert err.getvalue() == "".join(f"{line}\n" for line in lines)


def test_progress_without_progress_and_on_a_narrow_terminal(monkeypatch):
    now = [0]
    err = Terminal()
    monkeypatch.setattr(pf, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("COLUMNS", "32")
    bar = pf.Progress("reading", 0.5, "MB")
    bar.end()
    assert err.getvalue() == ""
    now[0] = 10
    bar.tick()
    bar.update(0.25, ", a note that is longer than the terminal is wide")
    assert err.getvalue() == "\rreading: 0.0% of 0 MB, 0 MB/s, "
    monkeypatch.setenv("COLUMNS", "60")
    now[0] = 20
    bar.update(0.25)
    line = "reading: 50.0% of 0 MB, 0.0125 MB/s, 0:00:20 left"
    assert err.getvalue().split("\r")[2] == line.ljust(59)


def test_clock():
    times = {0: "0:00:00", 59.9: "0:00:59", 60: "0:01:00", 3661: "1:01:01", 360_000: "100:00:00"}
    assert {seconds: pf.clock(seconds) for seconds in times} == times


def test_say_writes_what_the_stream_can_show_and_survives_one_that_is_closed():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    pf.say("汉 a", file=stream)
    assert stream.buffer.getvalue().split() == [b"?", b"a"]
    stream.close()
    pf.say("b", file=stream)


ENDS = [
    (None, None),
    (3, 3),
    (pf.UserError("what to do"), "x.py: what to do"),
    (FileNotFoundError(2, "No such file", "a"), "x.py: [Errno 2] No such file: 'a'"),
    (MemoryError(), "x.py: out of memory; REMEDY"),
    (RuntimeError("can't start new thread"), "x.py: out of memory; REMEDY"),
    (RuntimeError("CUDA out of memory. Tried"), "x.py: out of memory; REMEDY"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "x.py: out of memory; REMEDY"),
    (KeyError("a setting"), "x.py: 'a setting'"),
]


@pytest.mark.parametrize("result, code", ENDS)
def test_command_line_exits_with_a_code_or_one_line(monkeypatch, result, code):
    def main():
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(sys, "argv", ["folder/x.py"])
    with pytest.raises(SystemExit) as end:
        pf.command_line(main, KeyError, memory="REMEDY")
    assert end.value.code == code


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_command_line_works_where_a_stream_is_closed(monkeypatch, stream):
    monkeypatch.setattr(sys, stream, None)
    with pytest.raises(SystemExit) as end:
        pf.command_line(lambda: pf.say("a", file=getattr(sys, stream)))
    assert end.value.code is None
    getattr(sys, stream).close()


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("a bug"), KeyError(1)])
def test_error_that_is_nobody_s_fault_but_ours_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)) as raised:
        pf.command_line(main)
    assert raised.value is error


@pytest.mark.parametrize("write, code", [("print", 141), ("pf.say", 0)])
def test_reader_of_a_pipe_that_leaves_ends_a_print_but_not_the_work(write, code):
    script = f"import prepare_fineweb as pf\npf.command_line(lambda: {write}('x' * 100_000))"
    read, pipe = os.pipe()
    os.close(read)
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=PROJECT, stdout=pipe, stderr=subprocess.PIPE
    )
    os.close(pipe)
    errors = process.communicate(timeout=PATIENCE)[1]
    assert (process.returncode, errors) == (code, b"")
