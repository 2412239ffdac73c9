"""
Released checkpoints: loaded, reported, measured, saved in our format, fetched from a server on this
machine.
"""

import http.server
import math
import os
import pathlib
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

import analysis
import perplexity
import prepare_fineweb
import released
from model import InputError, load_checkpoint, read_checkpoint, variant_config, variant_name
from prepare_fineweb import UserError

HERE = pathlib.Path(__file__).resolve().parent
GOLDEN = torch.load(HERE / "testdata" / "golden_two_layers.pt", weights_only=True)


@pytest.fixture(scope="module")
def release(tmp_path_factory, write_data):
    """The two golden layers as a released checkpoint file, its data folder, and dead tensors among
    the weights."""
    root = tmp_path_factory.mktemp("release")
    weights = {f"_orig_mod.{key}": tensor for key, tensor in GOLDEN["model"].items()}
    head = torch.randn(96, 32, generator=torch.Generator().manual_seed(5))
    weights["_orig_mod.lm_head.weight"] = head
    settings = {"block_size": 24, "n_head": 99}  # n_head: not to be trusted
    checkpoint = {"step": 38146, "model": weights, "model_args": settings, "optimizer": {}}
    torch.save(checkpoint, root / "theirs.pt")
    tokens = np.random.default_rng(6).integers(0, 95, 24 * 5 + 1)
    tokens[[0, 30, 31, 70]] = 95
    write_data(root, tokens)
    return root


@pytest.fixture
def byte_model(release):
    """The released model, its tokenizer said to be bytes, since GPT-2's needs the network."""
    _, model = released.load(str(release / "theirs.pt"))
    assert not model.training
    model.config = replace(model.config, tokenizer="bytes")
    return model


def test_perplexity_is_the_models_own_loss(release, byte_model):
    """exp of the model's own loss over all windows at once; masked, attention stays within
    documents. Dropout does not act."""
    rows = analysis.validation_windows(str(release), byte_model.config)
    assert rows.shape == (5, 25)
    idx = torch.from_numpy(rows[:, :-1].astype(int))
    targets = torch.from_numpy(rows[:, 1:].astype(int))
    plain = byte_model.loss(idx, targets)[0].item()
    masked = byte_model.loss(idx, targets, (idx == 95).cumsum(1))[0].item()
    assert abs(masked - plain) > 1e-3
    byte_model.final_norm = torch.nn.Sequential(byte_model.final_norm, torch.nn.Dropout(0.5))
    byte_model.train()
    found = math.log(perplexity.perplexity(byte_model, rows, 95, mask_documents=False))
    assert found == pytest.approx(plain, abs=1e-5)
    found = math.log(perplexity.perplexity(byte_model, rows, 95))
    assert found == pytest.approx(masked, abs=1e-5)
    assert byte_model.training
    rough = math.log(perplexity.perplexity(byte_model, rows, 95, "bfloat16"))
    assert 1e-5 < abs(rough - masked) < 0.05


def test_tokens_beyond_the_vocabulary_are_refused(byte_model):
    windows = np.full((1, 9), 95, np.uint16)
    assert perplexity.perplexity(byte_model, windows, 0) > 0
    windows[0, 8] = 96
    with pytest.raises(UserError, match="the data hold token 96, the model knows 96"):
        perplexity.perplexity(byte_model, windows, 0)


def test_every_flag_of_perplexity_reaches_what_it_sets(byte_model, call, capsys, monkeypatch):
    windows = np.zeros((3, 25), np.uint16)
    asked = []
    monkeypatch.setattr(perplexity, "load_checkpoint", lambda path, device: byte_model)
    monkeypatch.setattr(
        perplexity, "validation_windows", lambda *args: asked.append(args) or windows
    )
    monkeypatch.setattr(perplexity, "perplexity", lambda *args: asked.append(args) or 12.5)
    call(perplexity.main, "--ckpt=c.pt", "--data=d", "--device=cpu")
    assert asked == [("d", byte_model.config, 0), (byte_model, windows, 256, "float32", True)]
    words = "c.pt: nuresformer\nperplexity  12.5000 over 3 windows of 24 validation tokens, "
    rest = "cross-entropy alone, documents masked, float32 (the paper's 453 M model: 14.15 over "
    assert capsys.readouterr().out.startswith(words + rest)
    flags = ["--windows=2", "--mask_documents=false", "--dtype=bfloat16"]
    call(perplexity.main, "--ckpt=c.pt", "--data=d", "--device=cpu", *flags)
    assert asked[2] == ("d", byte_model.config, 2)
    assert asked[3][3:] == ("bfloat16", False)
    assert "documents not masked, bfloat16 " in capsys.readouterr().out


def test_saved_model_is_the_released_one(release, call, capsys, tmp_path):
    """--save writes what load_checkpoint and table2.py take, with equal logits; the report names
    variant and doubts. What is no released file, or would be overwritten, is one line."""
    saved = tmp_path / "new" / "ours.pt"
    call(released.main, release / "theirs.pt", f"--save={saved}")
    printed = capsys.readouterr().out
    ours = load_checkpoint(str(saved))
    _, theirs = released.load(str(release / "theirs.pt"))
    assert torch.equal(ours(GOLDEN["idx"]), theirs(GOLDEN["idx"])) and ours.config == theirs.config
    checkpoint = read_checkpoint(str(saved))
    assert (checkpoint["step"], checkpoint["released"]) == (38146, "theirs.pt")
    parameters = sum(p.numel() for p in theirs.parameters()) - 32 * 32  # 96 ids, padded to 128
    for words in (
        f"theirs.pt, {os.path.getsize(release / 'theirs.pt'):,} bytes, step 38146\n",
        "nuresformer, by its keys: gate=True, anchor='internal', mix='qkvg', anchor_norm='qkvg'",
        "2 layers, C 32, 4 heads, context 24, vocabulary 96\n",
        f"parameters  {parameters:,}; Table 3 prints 453 M\n",
        "never against released weights",
    ):
        assert words in printed
    for path, problem in (
        (release / "theirs.pt", "is there already"),
        ("nosuch.pt", "no such file"),
        (saved, "own format already"),
    ):
        with pytest.raises(UserError, match=problem):
            call(released.main, path, f"--save={saved}")


def test_what_the_keys_do_not_tell_can_be_said(release, tmp_path, call, capsys):
    """Without QKNorm and with scalar lambdas nothing names the heads; without norms of the v and g
    anchors nothing says whether those of q and k had one."""
    checkpoint = torch.load(release / "theirs.pt", weights_only=True)
    weights = checkpoint["model"]
    plain = tmp_path / "qk.pt"
    kept = {
        key: tensor
        for key, tensor in weights.items()
        if not key.endswith(("v_norm.weight", "g_norm.weight"))
    }
    torch.save({"model": kept, "model_args": {}}, plain)
    for flags, norms in (([], "qk"), (["--anchor_norm=qk"], "qk"), (["--anchor_norm="], "")):
        call(released.main, plain, *flags)
        assert f"anchor_norm={norms!r}, granularity" in capsys.readouterr().out
    bare = tmp_path / "bare.pt"
    left = {}
    for key, tensor in weights.items():
        if not key.endswith(("q_norm.weight", "k_norm.weight", "v_norm.weight", "g_norm.weight")):
            left[key] = tensor.flatten()[:1] if ".lambda_" in key else tensor
    torch.save({"model": left, "model_args": {}}, bare)
    with pytest.raises(InputError, match="n_head"):
        call(released.main, bare)
    call(released.main, bare, "--n_head=8")
    assert "C 32, 8 heads" in capsys.readouterr().out


@pytest.mark.parametrize("variant", ["base", "gated"])
def test_variant_of_a_released_model_without_anchor(variant):
    """The keys of a model without lambdas do not tell their shape; it is still that row of Table
    3."""
    assert variant_name(variant_config(variant, granularity="scalar")) == variant


@pytest.fixture
def server(release):
    """A web server on the folder of `release` that breaks the first connection half-way and knows
    Range requests."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            data = (release / "theirs.pt").read_bytes()
            asked = self.headers.get("Range")
            start = int(asked[6:-1]) if asked else 0
            seen.append((self.path, start, self.headers.get("Authorization")))
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            end = start + 50_000 if len(seen) == 1 else len(data)
            self.wfile.write(data[start:end])

        def log_message(self, *args):
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{web.server_port}", seen
    web.shutdown()
    web.server_close()


def take_as_hub(monkeypatch, url):
    for module in (prepare_fineweb, released):
        monkeypatch.setattr(module, "HUB", url)


def test_download_resumes_and_keeps_the_token_at_home(server, release, tmp_path, monkeypatch):
    """A broken download goes on where it stopped; the hub's token goes to the hub alone; nothing is
    fetched twice."""
    url, seen = server
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(prepare_fineweb.time, "sleep", lambda seconds: None)
    path = released.fetch(f"{url}/files/a.pt?key=1", None, str(tmp_path))
    assert pathlib.Path(path).read_bytes() == (release / "theirs.pt").read_bytes()
    assert seen[0] == ("/files/a.pt?key=1", 0, None) and len(seen) == 2
    assert seen[1][1] > 0 and seen[1][2] is None
    assert released.fetch(f"{url}/files/a.pt?key=1", None, str(tmp_path)) == path
    assert len(seen) == 2
    take_as_hub(monkeypatch, url)
    released.fetch("somebody/models", "b.pt", str(tmp_path))
    assert seen[2] == ("/somebody/models/resolve/main/b.pt", 0, "Bearer secret")


def test_files_of_one_name_from_two_places_are_two_files(server, tmp_path, monkeypatch):
    """All of the paper's models may be called ckpt_step:38146.pt; none must be taken for another,
    nor lead outside."""
    url, seen = server
    take_as_hub(monkeypatch, url)
    monkeypatch.setattr(prepare_fineweb.time, "sleep", lambda seconds: None)
    sources = [
        ("somebody/one", "../a:1.pt"),
        ("somebody/two", "../a:1.pt"),
        (f"{url}/x/./a%3A1.pt", None),
    ]
    paths = [released.fetch(*source, str(tmp_path)) for source in sources]
    host = url.removeprefix("http://")
    names = [os.path.relpath(path, tmp_path) for path in paths]
    assert names == ["somebody/one/a:1.pt", "somebody/two/a:1.pt", f"{host}/x/a:1.pt"]
    assert len({path for path, *_ in seen}) == 3


@pytest.mark.parametrize("source, name", [("a/b", None), ("a/b/c", "x.pt"), ("a b/c", "x.pt")])
def test_what_is_neither_file_nor_address_is_refused(source, name, tmp_path):
    with pytest.raises(UserError, match=f"{source}: no such file, .* give --file=NAME"):
        released.fetch(source, name, str(tmp_path))
