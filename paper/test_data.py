"""
Shards: the format, tokenising, downloads from a server on this machine that misbehaves, killed and concurrent runs.
Oracles are struct, tiktoken and the bytes that the server has. CPU only, no network.
"""
import contextlib
import gzip
import hashlib
import http.server
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import prepare_fineweb as pf


@pytest.fixture(autouse=True)
def small_held_out_parts(monkeypatch):
    """The texts here are too short for a training window; the tests that are about it set it back."""
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


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def make_shards(folder, paths, **settings):
    return pf.tokenise([str(path) for path in paths], str(folder), **{"tokenizer": "bytes", **settings})


def all_tokens(folder, split):
    return [token for path in pf.find_shards(str(folder), split) for token in pf.read_shard(path).tolist()]


def shard_bytes(folder):
    return {name: (pathlib.Path(folder) / name).read_bytes() for name in pf.shard_names(str(folder))}


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


# ---- the format ------------------------------------------------------------------------------------------------------

def test_shard_file_is_header_then_tokens_byte_for_byte(tmp_path):
    pf.write_shard(str(tmp_path / "a_train_000000.bin"), [50256, 0, 1, 65535])
    expected = struct.pack("<256i", 20240520, 1, 4, *[0] * 253) + struct.pack("<4H", 50256, 0, 1, 65535)
    assert (tmp_path / "a_train_000000.bin").read_bytes() == expected
    assert os.listdir(tmp_path) == ["a_train_000000.bin"]


def test_shard_written_by_others_reads_back(tmp_path):
    path, ids = str(tmp_path / "tiny_val.bin"), [50256, 5962, 22307, 25]
    pathlib.Path(path).write_bytes(struct.pack("<256i", 20240520, 1, 4, *[7] * 253) + struct.pack("<4H", *ids))
    assert pf.find_shards(str(tmp_path), "val") == [path] and pf.read_meta(str(tmp_path)) == {"tokenizer": "gpt2"}
    assert pf.shard_tokens(path) == 4 and pf.read_shard(path).tolist() == ids and pf.read_shard(path).dtype == np.uint16
    assert pf.read_window(path, 1, 2).tolist() == ids[1:3]
    assert pf.examine(path, "gpt2") == {"tokens": 4, "sha256": hashlib.sha256(
        pathlib.Path(path).read_bytes()).hexdigest()}


GOOD_SHARD = struct.pack("<256i", 20240520, 1, 3, *[0] * 253) + b"\1\0\2\0\3\0"
DAMAGED = {
    "magic": struct.pack("<i", 20240801) + GOOD_SHARD[4:], "version": GOOD_SHARD[:4] + b"\2" + GOOD_SHARD[5:],
    "count too large": GOOD_SHARD[:8] + b"\4" + GOOD_SHARD[9:],
    "count too small": GOOD_SHARD[:8] + b"\2" + GOOD_SHARD[9:],
    "count negative": GOOD_SHARD[:8] + b"\xff" * 4 + GOOD_SHARD[12:], "odd length": GOOD_SHARD + b"\0", "empty": b"",
    "header cut": GOOD_SHARD[:1000], "no tokens": GOOD_SHARD[:8] + b"\0" + GOOD_SHARD[9:1024],
    "web page": b"<html>" * 400,
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_shard_is_refused_with_file_and_remedy(tmp_path, kind):
    path = tmp_path / "a_train_000000.bin"
    path.write_bytes(DAMAGED[kind])
    for read in (pf.shard_tokens, pf.read_shard):
        with refusal("a_train_000000.bin: .*python prepare_fineweb.py"):
            read(str(path))


def test_shard_cut_off_or_removed_while_in_use_is_a_user_error(tmp_path):
    path = str(tmp_path / "a_train_000000.bin")
    pf.write_shard(path, np.arange(1000))
    assert pf.read_window(path, 990, 10).tolist() == list(range(990, 1000))
    os.truncate(path, 1024 + 2 * 995)
    with refusal("ends 5 tokens before token 1000"):
        pf.read_window(path, 990, 10)
    os.remove(path)
    with refusal("cannot be read"):
        pf.read_window(path, 0, 10)


@pytest.mark.parametrize("tokens", [[], [-1], [65536], [1, 70000]])
def test_tokens_that_do_not_fit_16_bits_are_refused_and_leave_no_file(tmp_path, tokens):
    with refusal("0..65535"):
        pf.write_shard(str(tmp_path / "a_train_000000.bin"), tokens)
    assert os.listdir(tmp_path) == []


def test_shards_of_a_split_come_sorted_and_other_files_do_not_count(tmp_path):
    for name in ("b_train_000010.bin", "b_train_000002.bin", "b_train_000003.bin.part", "train.bin", "b_train_0.txt"):
        pf.write_shard(str(tmp_path / name), [1])
    assert [os.path.basename(path) for path in pf.find_shards(str(tmp_path), "train")] == ["b_train_000002.bin",
                                                                                          "b_train_000010.bin"]


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_folder_without_shards_complains_of_shards_and_needs_no_tokenizer(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with refusal("no val shard .*python prepare_fineweb.py"):
        pf.find_shards(str(tmp_path / name), "val")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"tokenizer": "klingon"}', '{"tokenizer": []}', "\xff"])
def test_meta_that_cannot_be_used_is_refused(tmp_path, text):
    (tmp_path / "meta.json").write_text(text, encoding="latin-1")
    with refusal("meta.json: cannot be used"):
        pf.read_meta(str(tmp_path))


@pytest.mark.parametrize("size, change", [(1, 0), (5000, 4321), (65_000, 64_999), (400_000, 12_500)])
def test_fingerprint_sees_a_changed_token_where_name_and_length_are_the_same(tmp_path, size, change):
    tokens, seen = np.random.default_rng(0).integers(0, 50257, size), []
    for changed in (0, 0, 1):
        tokens[change] ^= changed
        pf.write_shard(str(tmp_path / "a_train_000000.bin"), tokens)
        seen += pf.fingerprint(str(tmp_path), "train")
    assert seen[0] == seen[1] and seen[0][:2] == seen[2][:2] == ["a_train_000000.bin", size] and seen[0] != seen[2]


# ---- tokenizers ------------------------------------------------------------------------------------------------------

TEXT = "naïve 汉字 \0 <|endoftext|>\n"


@pytest.mark.parametrize("name, eot", [("bytes", 256), ("gpt2", 50256)])
def test_tokenizer_is_utf8_or_tiktoken_goes_both_ways_and_counts_bytes(name, eot, request):
    ids = list(TEXT.encode()) if name == "bytes" else request.getfixturevalue("gpt2").encode_ordinary(TEXT)
    tokenizer = pf.get_tokenizer(name)
    assert (tokenizer.name, tokenizer.n_vocab, tokenizer.eot) == (name, eot + 1, eot)
    assert tokenizer.encode(TEXT) == ids and eot not in ids and tokenizer.decode(ids) == TEXT
    assert tokenizer.n_bytes([eot, *ids, eot]) == len(TEXT.encode())
    assert tokenizer.decode([eot, *tokenizer.encode("a"), 57600]) == "<|endoftext|>a\ufffd"
    assert tokenizer.decode(tokenizer.encode("half \ud800 a pair")) == "half ? a pair"


def test_unknown_tokenizer_is_refused():
    with refusal("'gpt3'.*gpt2 and bytes"):
        pf.get_tokenizer("gpt3")


# ---- text to shards --------------------------------------------------------------------------------------------------

def test_documents_of_every_kind_of_file_come_in_order_each_after_an_end_of_text(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one\n", "", "twö\0", " \n", "half \ud800"])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'\xef\xbb\xbf{"text": "three", "id": 3}\n\n{"text": "four"}'))
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfline 1\r\nline 2 <|endoftext|>\n")
    (tmp_path / "d.md.gz").write_bytes(gzip.compress("fünf".encode()))
    (tmp_path / "e.py").write_bytes(b" \n")
    names = ["a.jsonl", "b.jsonl.gz", "c.txt", "d.md.gz", "e.py"]
    meta = make_shards(tmp_path / "out", [tmp_path / name for name in names], val_fraction=0)
    texts = ["one\n", "twö\0", "half ?", "three", "four", "line 1\r\nline 2 <|endoftext|>\n", "fünf"]
    assert all_tokens(tmp_path / "out", "train") == byte_documents(texts)
    assert meta == pf.read_meta(str(tmp_path / "out")) and meta["tokenizer"] == "bytes"
    assert sorted(os.listdir(tmp_path / "out")) == ["meta.json", "text_train_000000.bin"]


def test_gpt2_shards_equal_tiktoken(tmp_path, gpt2):
    texts = ["Hello world", "<|endoftext|> is text here", "  spaces \n\n", "汉字 naïve", "lone \ud800 half", "nul \0 end"]
    make_shards(tmp_path / "out", [write_jsonl(tmp_path / "a.jsonl", texts)], tokenizer="gpt2", val_fraction=0)
    expected = [token for text in texts for token in [50256, *gpt2.encode_ordinary(text.replace("\ud800", "?"))]]
    assert all_tokens(tmp_path / "out", "train") == expected


def test_every_nth_document_is_held_out_and_none_is_in_both(tmp_path):
    texts = [f"document {n}" for n in range(1, 41)]
    make_shards(tmp_path / "out", [write_jsonl(tmp_path / "a.jsonl", texts)], val_fraction=0.1)
    assert all_tokens(tmp_path / "out", "val") == byte_documents(texts[9::10])
    assert all_tokens(tmp_path / "out", "train") == byte_documents(t for n, t in enumerate(texts, 1) if n % 10)


@pytest.mark.parametrize("window, held_out, limit", [(1, 200, 10_000), (257, 257, 10_000), (257, 257, 1999)])
def test_single_text_holds_out_its_end_at_least_a_training_window(tmp_path, monkeypatch, window, held_out, limit):
    """Also where a shard ends two tokens before the text does."""
    monkeypatch.setattr(pf, "WINDOW", window)
    (tmp_path / "a.txt").write_text("abcdefghij" * 200)
    make_shards(tmp_path / "out", [tmp_path / "a.txt"], val_fraction=0.1, shard_tokens=limit)
    tokens = byte_documents(["abcdefghij" * 200])
    assert all_tokens(tmp_path / "out", "train") == tokens[:-held_out]
    assert all_tokens(tmp_path / "out", "val") == [256, *tokens[-held_out:]]


def test_held_out_part_shorter_than_a_window_is_filled_up_from_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(pf, "WINDOW", 257)
    texts = ["x" * 99] * 19 + ["y" * 99]
    make_shards(tmp_path / "out", [write_jsonl(tmp_path / "a.jsonl", texts)], val_fraction=0.05)
    train = byte_documents(texts[:19])
    assert all_tokens(tmp_path / "out", "train") == train[:-257]
    assert all_tokens(tmp_path / "out", "val") == [*byte_documents(texts[19:]), 256, *train[-257:]]


def test_document_longer_than_a_shard_runs_over_into_the_next(tmp_path):
    texts = ["x" * 250, "y" * 30, "z" * 17]
    make_shards(tmp_path / "out", [write_jsonl(tmp_path / "a.jsonl", texts)], shard_tokens=100, val_fraction=0)
    assert [pf.shard_tokens(path) for path in pf.find_shards(str(tmp_path / "out"), "train")] == [100, 100, 100]
    assert all_tokens(tmp_path / "out", "train") == byte_documents(texts)


def test_shards_are_the_same_for_any_number_of_threads(tmp_path):
    files = [write_jsonl(tmp_path / "a.jsonl", word_texts(600, 100)), tmp_path / "b.txt"]
    files[1].write_text(" ".join(word_texts(1, 60000, seed=1)))
    results = []
    for workers in (1, 2, 5):
        meta = make_shards(tmp_path / f"out{workers}", files, workers=workers, shard_tokens=100_000)
        results.append((meta, shard_bytes(tmp_path / f"out{workers}")))
    assert len(results[0][1]) > 5 and results[0] == results[1] == results[2]


def test_only_a_few_documents_are_in_memory():
    """The reader never runs ahead of the writer by more than 64 documents a thread."""
    read = [0]

    def texts():
        for read[0] in range(1, 1001):
            yield "abc"
    ahead = [read[0] - n for n, _ in enumerate(pf.encode(texts(), pf.get_tokenizer("bytes"), 2))]
    assert len(ahead) == 1000 and max(ahead) == 128


BAD_INPUT = {
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999)[:-9], "a.jsonl.gz: .*ended before"),
    "not gzip": ("a.txt.gz", b"plain text", "a.txt.gz: .*gzip"), "no text": ("a.txt", b" \n", "no text"),
    "empty file": ("a.jsonl", b"", "no text"), "binary": ("a.parquet", b"PAR1\x15\x84", "a.parquet: 'utf-8' codec"),
    "latin-1": ("a.txt", b"caf\xe9", "a.txt: 'utf-8' codec can't decode byte 0xe9 in position 3"),
}
BAD_LINES = [b"{", b'{"txt": "x"}', b'{"text": null}', b'{"text": ["x"]}', b"[1]", b"7", b"[" * 100_000,
             b'{"text": "caf\xe9' + b"x" * 1000 + b'"}']
BAD_INPUT |= {line[:20]: ("a.jsonl", b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}',
                          'a.jsonl, line 3: not a JSON object with a string "text"') for line in BAD_LINES}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_unusable_input_gives_one_line_and_leaves_nothing(tmp_path, case):
    name, content, message = BAD_INPUT[case]
    (tmp_path / name).write_bytes(content)
    with refusal(message) as error:
        make_shards(tmp_path / "out", [tmp_path / name])
    assert sorted(os.listdir(tmp_path)) == sorted([name, "out.lock"]) and len(str(error.value)) < 400


def test_default_shards_are_the_standard_library_byte_for_byte(tmp_path, capsys):
    folder = str(tmp_path / "default")
    meta = pf.write_default_shards(folder)
    assert meta["tokenizer"] == "bytes" and "source files of Python's standard library" in capsys.readouterr().out
    train, val = (pf.read_shard(f"{folder}/stdlib_{split}_000000.bin") for split in ("train", "val"))
    sources = [source for source in (open(path, "rb").read() for path in pf.standard_library_files()) if source.strip()]
    texts = [source.decode("utf-8-sig", "replace").encode() for source in sources]
    for tokens, expected in ((train, [t for n, t in enumerate(texts, 1) if n % 20]), (val, texts[19::20])):
        documents = [np.append(256, np.frombuffer(text, np.uint8)) for text in expected]
        assert np.array_equal(tokens, np.concatenate(documents))
    assert len(texts) > 100
    assert not any("/test/" in path or "/site-packages/" in path for path in pf.standard_library_files())
    assert pf.write_default_shards(folder) == meta and capsys.readouterr().out == ""


# ---- interrupted and concurrent runs ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["x_train_000000.bin", "notes.txt"])
def test_folder_that_is_there_is_never_touched(tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(GOOD_SHARD)
    with refusal("is there already; remove the folder or choose another --out"):
        make_shards(tmp_path / "out", [write_jsonl(tmp_path / "a.jsonl", ["one"])])
    assert (tmp_path / "out" / name).read_bytes() == GOOD_SHARD and os.listdir(tmp_path / "out") == [name]


def test_run_that_waits_for_another_takes_what_it_wrote(tmp_path):
    path, out = write_jsonl(tmp_path / "a.jsonl", ["one", "two"]), tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", HOLD, out, "True"], stdout=subprocess.PIPE,
                          cwd=os.path.dirname(pf.__file__)) as other:
        other.stdout.readline()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(make_shards, out, [path], wait=True)
            time.sleep(0.1)
            assert not waiting.done()
            shutil.copytree(make_folder(tmp_path / "other", "three"), out)
            other.kill()
            assert waiting.result(timeout=30) == pf.read_meta(str(out))
    assert all_tokens(out, "train") == byte_documents(["three"])


def make_folder(folder, *texts):
    """A folder of shards of these texts."""
    make_shards(folder, [write_jsonl(folder.with_suffix(".jsonl"), texts)], val_fraction=0)
    return folder


def test_folder_with_a_lost_shard_is_refused_by_everyone(tmp_path):
    path, out = write_jsonl(tmp_path / "a.jsonl", word_texts(20, 20)), tmp_path / "out"
    make_shards(out, [path], shard_tokens=500)
    (out / "text_train_000001.bin").unlink()
    with refusal("text_train_000001.bin is not there .*run the command"):
        pf.find_shards(str(out), "train")
    with refusal("is there already; remove the folder"):
        make_shards(out, [path], shard_tokens=500)


HOLD = ("import sys, time, prepare_fineweb as pf\n"
        "with pf.locked(sys.argv[1], beside=sys.argv[2] == 'True'): print('held', flush=True); time.sleep(60)")


@pytest.mark.parametrize("beside", [True, False])
def test_two_runs_on_one_folder_refuse_each_other_and_a_dead_one_does_not_count(tmp_path, beside):
    path, out = write_jsonl(tmp_path / "a.jsonl", ["one", "two"]), tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", HOLD, out, str(beside)], stdout=subprocess.PIPE,
                          cwd=os.path.dirname(pf.__file__)) as other:
        other.stdout.readline()
        with refusal("another run is writing there"):
            make_shards(out, [path]) if beside else pf.locked(str(out))
        other.kill()
    with pf.locked(str(out), beside=beside):
        assert os.path.exists(tmp_path / "out.lock" if beside else out / "lock") and out.exists() != beside
    if beside:
        make_shards(out, [path], val_fraction=0)


@pytest.mark.parametrize("loss", ["none", "folder renamed", "renamed and replaced", "removed", "lock replaced"])
def test_lock_knows_whether_its_file_is_still_the_one_at_the_path(tmp_path, loss):
    out = tmp_path / "out"
    held = pf.locked(str(out))
    with held:
        assert pf.still_locked(held)
        if loss.startswith("folder") or loss.startswith("renamed"):
            out.rename(tmp_path / "elsewhere")
        if loss == "renamed and replaced":
            second = pf.locked(str(out))
            with second:
                assert pf.still_locked(second) and not pf.still_locked(held)
        if loss == "removed":
            shutil.rmtree(out)
        if loss == "lock replaced":
            (out / "new").touch()
            (out / "new").replace(out / "lock")
        assert pf.still_locked(held) == (loss == "none")


def test_run_killed_before_any_rename_leaves_no_folder_and_the_next_run_completes_it(tmp_path, monkeypatch):
    path, out, settings = write_jsonl(tmp_path / "a.jsonl", word_texts(20, 20)), tmp_path / "out", {"shard_tokens": 500}
    replace, rmtree, settings["val_fraction"] = os.replace, shutil.rmtree, 0.2
    make_shards(tmp_path / "whole", [path], **settings)
    expected = shard_bytes(tmp_path / "whole")
    for survived in range(len(expected) + 2):                            # of the shards, meta.json and the folder
        renames = iter(range(survived))
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda *names: replace(*names) if next(renames, None) is not None else die())
            patch.setattr(shutil, "rmtree", lambda *args, **options: sys.exc_info()[0] or rmtree(*args, **options))
            with pytest.raises(KeyboardInterrupt):
                make_shards(out, [path], **settings)
        assert not out.exists() and (tmp_path / "out.part").exists()
    (tmp_path / "out.part" / "text_train_000009.bin").write_bytes(GOOD_SHARD)
    make_shards(out, [path], **settings)
    assert shard_bytes(out) == expected and len(expected) == 5 and not (tmp_path / "out.part").exists()


def die():
    raise KeyboardInterrupt


def test_system_that_does_not_open_folders_can_still_write(tmp_path, monkeypatch):
    """Windows: os.open of a folder is refused, so its names cannot be synchronised."""
    plain = os.open

    def no_folders(path, *args):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied")
        return plain(path, *args)
    monkeypatch.setattr(os, "open", no_folders)
    make_shards(tmp_path / "out", [write_jsonl(tmp_path / "a.jsonl", ["one", "two"])], val_fraction=0)
    assert all_tokens(tmp_path / "out", "train") == byte_documents(["one", "two"])


def start(*args):
    """Python in a process of its own, with Ctrl-C as a terminal has it."""
    return subprocess.Popen([sys.executable, *map(str, args)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))


def wait_for(condition, process):
    while not condition() and process.poll() is None:
        time.sleep(0.005)


@pytest.mark.slow
def test_kill_9_while_tokenising_then_the_same_command_gives_the_same_shards(tmp_path):
    path, out, rng = write_jsonl(tmp_path / "a.jsonl", word_texts(4000, 300)), tmp_path / "out", random.Random(0)
    command = [pf.__file__, "--input", path, "--tokenizer=bytes", "--shard_tokens=100000", f"--out={out}"]
    make_shards(tmp_path / "whole", [path], shard_tokens=100_000)
    expected = shard_bytes(tmp_path / "whole")
    for _ in range(3):
        process = start(*command)
        wait_for((tmp_path / "out.part").exists, process)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.wait()
        assert not out.exists() or shard_bytes(out) == expected
        shutil.rmtree(out, ignore_errors=True)
    process = start(*command)
    assert process.wait(60) == 0 and shard_bytes(out) == expected, process.stderr.read()


def test_ctrl_c_is_one_line_and_leaves_nothing(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", word_texts(2000, 400))
    process = start(pf.__file__, "--input", *[path] * 50, "--tokenizer=bytes", f"--out={tmp_path / 'out'}")
    wait_for((tmp_path / "out.part").exists, process)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "Traceback" not in err and "prepare_fineweb.py: interrupted" in err
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out.lock"]


LIMITED = ("import resource, sys; sys.path.insert(0, sys.argv.pop(1)); import prepare_fineweb as pf\n"
           "most = 4096 * int(open('/proc/self/statm').read().split()[0]) + int(sys.argv.pop(1))\n"
           "resource.setrlimit(resource.RLIMIT_AS, (most, most)); pf.command_line(pf.main, memory='REMEDY')")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
@pytest.mark.parametrize("room, words", [(3 << 20, 100), (100 << 20, 6_000_000)])       # for no thread; for no text
def test_too_little_memory_is_one_line(tmp_path, room, words):
    path = write_jsonl(tmp_path / "a.jsonl", ["text " * words])
    process = start("-c", LIMITED, os.path.dirname(pf.__file__), room, f"--input={path}", "--tokenizer=bytes",
                    f"--out={tmp_path / 'out'}")
    assert process.communicate(timeout=60)[1] == "-c: out of memory; REMEDY\n" and process.returncode == 1
    assert not (tmp_path / "out").exists()


# ---- the command line ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("args, code, message", [
    (["--shards=100"], 2, "--shards is 0 to 99"), (["--input", "x.txt"], 2, "--out=DIR"),
    (["--workers=0"], 2, "--workers at least 1"), (["--val_fraction=1"], 2, "--val_fraction from 0 to below 1"),
    (["--shard_tokens=1"], 2, "--shard_tokens 2 to"), (["verfy"], 2, "verfy"),
    (["--input=nowhere.txt", "--out=out", "--tokenizer=bytes"], 1, "No such file or directory: 'nowhere.txt'"),
    (["--input=*.zzz", "--out=out", "--tokenizer=bytes"], 1, "*.zzz"),
    (["--input=.", "--out=out", "--tokenizer=bytes"], 1, "Is a directory: '.'"),
    (["--input=a.txt", "--out=a.txt/sub"], 1, "a.txt"),
    (["verify", "--out=nowhere"], 1, "no shards here"), (["--tokenizer=klingon"], 2, "klingon"),
])
def test_wrong_command_lines_end_with_one_line_and_a_code(tmp_path, monkeypatch, capsys, args, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    end = run_main(monkeypatch, *args)
    said = end if isinstance(end, str) else capsys.readouterr().err
    assert (1 if isinstance(end, str) else end) == code and message in said and "\n" not in said.strip()


def test_input_takes_several_files_and_unexpanded_patterns_behind_an_equals_sign(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.txt", "c.jsonl"):
        write_jsonl(tmp_path / name, [name])
    command = ["--input=*.txt", "c.jsonl", "--tokenizer=bytes", "--out=out", "--val_fraction=0"]
    assert run_main(monkeypatch, *command) is None
    assert "next: python train.py --data=out" in capsys.readouterr().out
    texts = [(tmp_path / name).read_text() for name in ("a.txt", "b.txt")] + ["c.jsonl"]
    assert all_tokens(tmp_path / "out", "train") == byte_documents(texts)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)


SPOIL = {
    "flipped bit": (flip_a_bit, "sha256"), "cut off": (lambda path: os.truncate(path, 2000), "488 tokens are due"),
    "removed": (lambda path: path.unlink(), "cannot be read"),
    "token outside the vocabulary": (lambda path: pf.write_shard(str(path), [256, 257]), "token 257"),
    "another shard": (lambda path: pf.write_shard(str(path), [256, 1, 2]), "'tokens': 3, .* where meta.json has"),
}


@pytest.mark.parametrize("how", SPOIL)
def test_verify_names_the_bad_file_and_the_remedy(tmp_path, monkeypatch, capsys, how):
    path, out = write_jsonl(tmp_path / "a.jsonl", word_texts(20, 100)), tmp_path / "out"
    make_shards(out, [path], shard_tokens=2000)
    meta = pf.read_meta(str(out))
    for known in meta["files"].values():
        known["documents"] = known.pop("tokens")                 # an earlier version knew other things of a file
    pf.write_meta(str(out), meta)
    assert pf.verify(str(out)) == 0 and "BAD" not in capsys.readouterr().out
    spoil, message = SPOIL[how]
    spoil(out / "text_train_000001.bin")
    assert run_main(monkeypatch, "verify", f"--out={out}") == 1
    bad, = [line for line in capsys.readouterr().out.split("\n") if line.startswith("BAD")]
    assert all(re.search(part, bad) for part in ("text_train_000001.bin", message, "python prepare_fineweb.py"))


# ---- download, from a server on this machine that misbehaves ---------------------------------------------------------

PAPER_FILES = ["finewebedu_val_000000.bin", "finewebedu_train_000001.bin", "finewebedu_train_000002.bin"]
FIRST = PAPER_FILES[0]


def rest(body, start, **headers):
    if start >= len(body):
        return 416, {}, b""
    return 206, {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}", **headers}, body[start:]


def half(body, start):
    status, headers, data = rest(body, start)
    return status, {**headers, "Content-Length": len(data)}, data[:len(data) // 2 + 1]


# what the server does: function of the file and of the byte asked for, to (status, headers, body)
TROUBLE = {
    "none": rest, "half": half, "stalls": rest,
    "no_range": lambda body, start: (200, {}, body),
    "half_without_range": lambda body, start: (200, {"Content-Length": len(body)}, body[:len(body) // 2]),
    "half_without_length": lambda body, start: (200, {"Content-Length": ""}, body[:len(body) // 2]),
    "length_too_small": lambda body, start: (200, {"Content-Length": len(body) - 100}, body),
    "length_too_large": lambda body, start: (200, {}, body + b"tail"),
    "length_is_no_number": lambda body, start: (200, {"Content-Length": "many"}, body),
    "wrong_place": lambda body, start: rest(body, start, **{"Content-Range": "bytes 0-"}),
    "busy": lambda body, start: (429, {"Retry-After": 7}, b""),
    "busy_for_a_day": lambda body, start: (429, {"Retry-After": 86400}, b""),
    "error_500": lambda body, start: (500, {"Content-Type": "text/html"}, b"<html>oops</html>"),
    "web_page": lambda body, start: (200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>log in</html>"),
    "web_page_of_right_length": lambda body, start: (200, {}, (b"<html>" * len(body))[:len(body)]),
    "not_found": lambda body, start: (404, {}, b"nothing here"), "forbidden": lambda body, start: (403, {}, b"no"),
    "redirect_home": lambda body, start: (307, {"Location": "/other/path/NAME"}, b""),
    "redirect_away": lambda body, start: (302, {"Location": "ELSEWHERE/NAME"}, b""),
    "redirect_in_a_circle": lambda body, start: (302, {"Location": "/x/NAME"}, b""),
    "redirect_to_nonsense": lambda body, start: (302, {"Location": "http://127.0.0.1:99999/x"}, b""),
}


class Troubled(http.server.BaseHTTPRequestHandler):
    """Serves server.files; request number n for a file meets the trouble that server.trouble(name, n) names."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, name = self.server, self.path.split("/")[-1]
        server.requests.append((name, dict(self.headers)))
        self.close_connection = True
        kind = server.trouble(name, sum(seen == name for seen, _ in server.requests))
        kind = "not_found" if "//" in self.path or "%" in self.path else kind
        if kind == "dropped":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))     # RST
            return self.connection.close()
        start = int(self.headers["Range"][6:-1])
        status, headers, body = TROUBLE[kind](server.files[name], start)
        self.send_response(status)
        for header, value in {"Connection": "close", "Content-Length": len(body), **headers}.items():
            self.send_header(header, str(value).replace("NAME", name).replace("ELSEWHERE", server.elsewhere))
        self.end_headers()
        size, pause = (30_000, 1) if kind == "stalls" else server.pace
        with contextlib.suppress(ConnectionError):
            for begin in range(0, len(body), size):
                self.wfile.write(body[begin:begin + size])
                time.sleep(pause)


@contextlib.contextmanager
def serve(files):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Troubled)
    server.files, server.requests, server.pace, server.waits = files, [], (10_000, 0), []
    server.trouble, server.elsewhere = (lambda name, times: "none"), ""
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with the validation shard and two training shards of 100,000 tokens; waits are noted, not waited for."""
    files = {}
    for seed, name in enumerate(PAPER_FILES):
        pf.write_shard(str(tmp_path / name), np.random.default_rng(seed).integers(0, 50257, 100_000))
        files[name] = (tmp_path / name).read_bytes()
    with serve(files) as server:
        monkeypatch.setattr(pf, "published", lambda n: {name: len(files[name]) for name in PAPER_FILES[:n + 1]})
        monkeypatch.setattr(pf, "time", types.SimpleNamespace(sleep=server.waits.append, monotonic=time.monotonic))
        monkeypatch.setattr(pf, "BLOCK", 1 << 8)
        monkeypatch.setattr(pf, "HUB", server.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def asked(hub):
    """The names, and the first bytes asked for, of the requests for files."""
    return [(file, int(headers["Range"][6:-1])) for file, headers in hub.requests]


def test_download_brings_the_published_bytes_and_what_is_there_stays(tmp_path, hub, monkeypatch, capsys):
    out = tmp_path / "out"
    for shards in (1, 2, 2):
        assert run_main(monkeypatch, f"--shards={shards}", f"--out={out}") is None
        assert shard_bytes(out) == {name: hub.files[name] for name in sorted(PAPER_FILES[:shards + 1])}
        assert sorted(pf.read_meta(str(out))["files"]) == sorted(PAPER_FILES[:shards + 1])
    assert asked(hub) == [(name, 0) for name in PAPER_FILES]
    assert sorted(os.listdir(out)) == sorted(["meta.json", *PAPER_FILES])
    assert pf.verify(str(out)) == 0 and pf.read_meta(str(out))["tokenizer"] == "gpt2"
    assert f"next: python train.py --data={out}" in capsys.readouterr().out
    flip_a_bit(out / FIRST)
    assert pf.verify(str(out)) == 1                                             # by the checksum taken on arrival


def test_progress_counts_all_that_was_lacking_together(tmp_path, hub, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FIRST).write_bytes(hub.files[FIRST])
    (tmp_path / "out" / f"{PAPER_FILES[1]}.part").write_bytes(hub.files[PAPER_FILES[1]][:50_000])
    seen = []

    class Recorder(pf.Progress):
        def __init__(self, what, total, unit, done=0):
            self.bytes = round(1e6 * done), round(1e6 * total)

        def update(self, done, note):
            seen.append((*self.bytes, round(1e6 * done), note))

        def end(self):
            pass
    monkeypatch.setattr(pf, "Progress", Recorder)
    pf.download_shards(str(tmp_path / "out"), 2)
    first, total, done, notes = zip(*seen)
    assert set(first) == {50_000} and set(total) == {2 * len(hub.files[FIRST])}
    assert done == tuple(sorted(done)) and 50_000 < done[0] < 51_000 and done[-1] == total[0]
    assert [notes[0], notes[-1]] == [f", {name}" for name in PAPER_FILES[1:]]


PASSING = ["half", "half_without_range", "half_without_length", "dropped", "length_too_small", "length_too_large",
           "length_is_no_number", "busy", "error_500", "web_page", "redirect_home", "no_range"]


@pytest.mark.parametrize("trouble", PASSING)
def test_trouble_that_passes_is_overcome(tmp_path, hub, trouble):
    hub.trouble = lambda name, times: trouble if times <= (3 if trouble in ("error_500", "dropped") else 1) else "none"
    pf.download_shards(str(tmp_path / "out"), 2)
    assert shard_bytes(tmp_path / "out") == hub.files
    assert sorted(os.listdir(tmp_path / "out")) == sorted(["meta.json", *PAPER_FILES])


LASTING = {"dropped": "no connection, or a lost one", "length_too_small": "the server offers",
           "length_too_large": "the server offers", "error_500": "HTTP 500, .*given up after try 8 of 8",
           "web_page": "a web page came", "not_found": "HTTP 404; given up after try 1 of 8",
           "forbidden": "HTTP 403; set HF_TOKEN", "busy_for_a_day": "Retry-After: 86400; given up after try 1 of 8",
           "redirect_in_a_circle": "TooManyRedirects", "redirect_to_nonsense": "InvalidURL",
           "half_without_range": "the connection ended at byte|a lost one"}


@pytest.mark.parametrize("trouble", LASTING)
def test_trouble_that_lasts_is_one_true_line_and_no_file_under_a_final_name(tmp_path, hub, trouble):
    hub.trouble = lambda name, times: trouble if name == PAPER_FILES[1] else "none"
    with refusal(rf"{PAPER_FILES[1]}: .*{LASTING[trouble]}"):
        pf.download_shards(str(tmp_path / "out"), 2)
    assert PAPER_FILES[1] not in os.listdir(tmp_path / "out")
    hub.trouble = lambda name, times: "none"
    pf.download_shards(str(tmp_path / "out"), 2)
    assert shard_bytes(tmp_path / "out") == hub.files


def test_lost_connection_goes_on_where_it_ended(tmp_path, hub):
    hub.trouble = lambda name, times: "half" if times < 12 else "none"          # more than the tries without progress
    pf.download_shards(str(tmp_path / "out"), 0)
    assert shard_bytes(tmp_path / "out") == {FIRST: hub.files[FIRST]}
    starts = [start for _, start in asked(hub)]
    assert len(starts) == 12 and starts == sorted(starts) and len(set(starts)) >= 8


@pytest.mark.parametrize("trouble, message", [("stalls", "a lost one"),
                                              ("half_without_length", "ended at byte 100512 of 201024")])
def test_connection_that_stalls_or_ends_goes_on_where_it_was(tmp_path, hub, monkeypatch, capsys, trouble, message):
    monkeypatch.setattr(pf, "TIMEOUT", (5, 0.2))
    hub.trouble = lambda name, times: trouble if times == 1 else "none"
    pf.download_shards(str(tmp_path / "out"), 0)
    assert shard_bytes(tmp_path / "out") == {FIRST: hub.files[FIRST]} and message in capsys.readouterr().err
    (_, first), (_, second) = asked(hub)
    assert first == 0 < second <= 100_512


def test_bytes_from_another_place_never_enter_a_file(tmp_path, hub):
    hub.trouble = lambda name, times: "half" if times == 1 else "wrong_place"
    with refusal("the server offers .*bytes 0-"):
        pf.download_shards(str(tmp_path / "out"), 0)
    assert shard_bytes(tmp_path / "out") == {}


@pytest.mark.parametrize("left, starts", [(30_000, [30_000]), (201_024, []), (300_000, [300_000, 0])])
def test_left_over_part_file_is_continued_or_complete_and_one_too_long_is_begun_anew(tmp_path, hub, left, starts):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{FIRST}.part").write_bytes((hub.files[FIRST] + b"\0" * 300_000)[:left])
    pf.download_shards(str(tmp_path / "out"), 0)
    assert shard_bytes(tmp_path / "out") == {FIRST: hub.files[FIRST]} and asked(hub) == [(FIRST, at) for at in starts]


@pytest.mark.parametrize("trouble, waits", [("error_500", [1, 2, 4, 8, 16, 32, 60]),
                                            ("busy", [7, 7, 7, 8, 16, 32, 60])])
def test_wait_doubles_or_is_what_the_server_asks_for_and_every_try_is_counted(tmp_path, hub, capsys, trouble, waits):
    hub.trouble = lambda name, times: trouble
    with refusal("x: HTTP .*; given up after try 8 of 8"):
        pf.download(f"{hub.url}/{FIRST}", str(tmp_path / "x"))
    assert hub.waits == waits and len(hub.requests) == 8
    assert re.findall("; try ([0-9]) of 8 in ([0-9]+) s\n", capsys.readouterr().err) == [
        (str(n), str(wait)) for n, wait in enumerate(waits, 2)]


def test_download_of_any_file_reports_progress_and_checks_what_is_known_of_it(tmp_path, hub):
    url, body, seen = f"{hub.url}/a/{FIRST}?x=1", hub.files[FIRST], []
    hub.trouble = lambda name, times: "half" if times == 1 else "none"
    hub.files[f"{FIRST}?x=1"] = body
    pf.download(url, str(tmp_path / "new" / "x"), progress=seen.append)
    assert (tmp_path / "new" / "x").read_bytes() == body and os.listdir(tmp_path / "new") == ["x"]
    assert seen == sorted(seen) and seen[-1] == len(body) and len(seen) > 100
    with refusal("y: .*given up after try 2 of 2"):
        pf.download(url, str(tmp_path / "new" / "y"), len(body) + 1, tries=2)
    assert os.listdir(tmp_path / "new") == ["x"]


def test_what_came_and_is_no_shard_is_refused_until_it_is_removed(tmp_path, hub):
    out, hub.trouble = tmp_path / "out", lambda name, times: "web_page_of_right_length" if times == 1 else "none"
    for _ in range(2):
        with refusal(f"{FIRST}: is no shard .*remove it and run the command"):
            pf.download_shards(str(out), 0)
    (out / FIRST).unlink()
    pf.download_shards(str(out), 0)
    assert shard_bytes(out) == {FIRST: hub.files[FIRST]} and len(asked(hub)) == 2


def test_published_sizes_are_the_paper_s():
    sizes = pf.published(99)
    train_tokens = sum((size - 1024) // 2 for name, size in sizes.items() if "train" in name)
    assert len(sizes) == 100 and train_tokens == 9_853_989_344
    assert list(pf.published(0)) == [FIRST] and list(pf.published(2)) == PAPER_FILES


SECRET = "hf_thisIsASecret123"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])                    # another port, and another name too
def test_token_goes_to_the_endpoint_and_never_into_a_redirect_elsewhere(tmp_path, hub, monkeypatch, capsys, host):
    monkeypatch.setenv("HF_TOKEN", f" {SECRET}\n")
    hub.trouble = lambda name, times: "redirect_away"
    with serve(hub.files) as other:
        hub.elsewhere = other.url.replace("127.0.0.1", host)
        pf.download_shards(str(tmp_path / "out"), 2)
        pf.download(f"{other.url}/{FIRST}", str(tmp_path / "x"))
        assert shard_bytes(tmp_path / "out") == hub.files and len(other.requests) == 4
        assert not any("Authorization" in headers for _, headers in other.requests)
    assert [headers["Authorization"] for _, headers in hub.requests] == [f"Bearer {SECRET}"] * 3
    assert SECRET not in "".join(capsys.readouterr())


@pytest.mark.parametrize("netrc, trouble", [("machine 127.0.0.1 login someone password else\n", "none"),
                                            ("", "redirect_home")])
def test_token_follows_a_redirect_within_the_endpoint_and_beats_netrc(tmp_path, hub, monkeypatch, netrc, trouble):
    (tmp_path / "netrc").write_text(netrc)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    hub.trouble = lambda name, times: trouble if times == 1 else "none"
    pf.download_shards(str(tmp_path / "out"), 2)
    assert {headers["Authorization"] for _, headers in hub.requests} == {f"Bearer {SECRET}"}
    assert len(hub.requests) == (3 if trouble == "none" else 6)


@pytest.mark.parametrize("name, value", [("HF_TOKEN", f"{SECRET}\nX-Header: 1"), ("HF_TOKEN", f"{SECRET}汉"),
                                         ("HF_ENDPOINT", "huggingface.co"), ("HF_ENDPOINT", "file:///etc")])
def test_unusable_settings_are_refused_without_showing_the_token(tmp_path, hub, monkeypatch, capsys, name, value):
    monkeypatch.setenv(name, value) if name == "HF_TOKEN" else monkeypatch.setattr(pf, "HUB", value)
    with refusal(name) as error:
        pf.download_shards(str(tmp_path / "out"), 2)
    assert SECRET not in str(error.value) + "".join(capsys.readouterr()) and hub.requests == [] and hub.waits == []


def test_download_leaves_shards_of_your_own_text_alone(tmp_path, hub):
    make_shards(tmp_path / "out", [write_jsonl(tmp_path / "a.jsonl", ["one", "two"])])
    before = shard_bytes(tmp_path / "out")
    with refusal("holds other shards; choose another --out"):
        pf.download_shards(str(tmp_path / "out"), 2)
    assert shard_bytes(tmp_path / "out") == before and hub.requests == []


def test_shard_of_wrong_length_is_brought_again_and_one_that_came_by_other_means_is_examined(tmp_path, hub):
    out = tmp_path / "out"
    out.mkdir()
    for name, body in hub.files.items():
        (out / name).write_bytes(body)
    os.truncate(out / PAPER_FILES[2], 5000)
    pf.write_meta(str(out), {"tokenizer": "gpt2", "files": {PAPER_FILES[2]: {"tokens": 1, "sha256": "an older one"}}})
    pf.download_shards(str(out), 2)
    assert asked(hub) == [(PAPER_FILES[2], 0)] and shard_bytes(out) == hub.files and pf.verify(str(out)) == 0
    (out / "meta.json").unlink()
    pf.write_shard(str(out / FIRST), [50257] * 100_000)
    with refusal(f"{FIRST}: token 50257 is not in the vocabulary"):
        pf.download_shards(str(out), 2)


DOWNLOAD = ("import json, sys; sys.path.insert(0, sys.argv.pop(1)); import prepare_fineweb as pf; pf.BLOCK = 256\n"
            "sizes = json.loads(sys.argv.pop(1)); pf.published = lambda shards: sizes; pf.command_line(pf.main)")


@pytest.mark.slow
def test_kill_9_while_downloading_then_the_same_command_gives_the_published_bytes(tmp_path, hub, monkeypatch):
    out, rng, hub.pace = tmp_path / "out", random.Random(1), (70_000, 0.3)
    monkeypatch.setenv("HF_ENDPOINT", f" {hub.url}/ ")
    sizes = json.dumps({name: len(body) for name, body in hub.files.items()})
    command = "-c", DOWNLOAD, os.path.dirname(pf.__file__), sizes, f"--out={out}"
    for _ in range(3):
        process = start(*command)
        wait_for(lambda: any(part.stat().st_size for part in out.glob("finewebedu*.part")), process)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.wait()
        assert all(body == hub.files[name] for name, body in shard_bytes(out).items())
    hub.pace = 10_000, 0
    process = start(*command)
    assert process.wait(60) == 0 and shard_bytes(out) == hub.files, process.stderr.read()
    assert any(start for _, start in asked(hub))
