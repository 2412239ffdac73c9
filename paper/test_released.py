"""
Released checkpoints: loaded, reported, measured, saved in our format, fetched from a server on this machine.
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
from model import load_checkpoint, variant_config, variant_name
from prepare_fineweb import UserError

GOLDEN = torch.load(pathlib.Path(__file__).parent / "testdata" / "golden_two_layers.pt", weights_only=True)


@pytest.fixture(scope="module")
def release(tmp_path_factory, write_data):
    """The two golden layers as a released checkpoint file, its data folder, and dead tensors among the weights."""
    root = tmp_path_factory.mktemp("release")
    weights = {f"_orig_mod.{key}": tensor for key, tensor in GOLDEN["model"].items()}
    weights["_orig_mod.lm_head.weight"] = torch.randn(96, 32, generator=torch.Generator().manual_seed(5))
    settings = dict(block_size=24, n_head=99)                                            # n_head: not to be trusted
    torch.save(dict(step=38146, model=weights, model_args=settings, optimizer={}), root / "theirs.pt")
    tokens = np.random.default_rng(6).integers(0, 95, 24 * 5 + 1)
    tokens[[0, 30, 31, 70]] = 95
    write_data(root, tokens)
    return root


def test_perplexity_is_the_models_own_loss(release):
    """exp of the model's own loss over all windows at once; masked, attention stays within documents."""
    _, model = released.load(str(release / "theirs.pt"))
    model.config = replace(model.config, tokenizer="bytes")                       # GPT-2's needs the network
    rows = analysis.validation_windows(str(release), model.config)
    idx, targets = (torch.from_numpy(part.astype(int)) for part in (rows[:, :-1], rows[:, 1:]))
    plain = model.loss(idx, targets)[0].item()
    assert math.log(perplexity.perplexity(model, rows, 95, mask_documents=False)) == pytest.approx(plain, abs=1e-5)
    masked = model.loss(idx, targets, (idx == 95).cumsum(1))[0].item()
    assert math.log(perplexity.perplexity(model, rows, 95)) == pytest.approx(masked, abs=1e-5)
    assert abs(masked - plain) > 1e-3


def test_saved_model_is_the_released_one(release, call, capsys, tmp_path):
    """--save writes what load_checkpoint and table2.py take, with equal logits; the report names variant and doubts.
    What is no released file, or would be overwritten, is one line."""
    saved = tmp_path / "new" / "ours.pt"
    call(released.main, release / "theirs.pt", f"--save={saved}")
    printed = capsys.readouterr().out
    ours, (_, theirs) = load_checkpoint(str(saved)), released.load(str(release / "theirs.pt"))
    assert torch.equal(ours(GOLDEN["idx"]), theirs(GOLDEN["idx"])) and ours.config == theirs.config
    for words in ("nuresformer, by its keys", "never against released weights"):
        assert words in printed
    for path, problem in ((release / "theirs.pt", "is there already"), ("nosuch.pt", "no such file"),
                          (saved, "own format already")):
        with pytest.raises(UserError, match=problem):
            call(released.main, path, f"--save={saved}")


@pytest.mark.parametrize("variant", ["base", "gated"])
def test_variant_of_a_released_model_without_anchor(variant):
    """The keys of a model without lambdas do not tell their shape; it is still that row of Table 3."""
    assert variant_name(variant_config(variant, granularity="scalar")) == variant


@pytest.fixture
def server(release, tmp_path):
    """A web server on the folder of `release` that breaks the first connection half-way and knows Range requests."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            data, asked = (release / "theirs.pt").read_bytes(), self.headers.get("Range")
            start = int(asked[6:-1]) if asked else 0
            seen.append((self.path, start, self.headers.get("Authorization")))
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start:start + 50_000] if len(seen) == 1 else data[start:])

        def log_message(self, *args):
            pass
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{web.server_port}", seen
    web.shutdown()
    web.server_close()


def take_as_hub(monkeypatch, url):
    for module in (prepare_fineweb, released):
        monkeypatch.setattr(module, "HUB", url)


def test_download_resumes_and_keeps_the_token_at_home(server, release, tmp_path, monkeypatch):
    """A broken download goes on where it stopped; the hub's token goes to the hub alone; nothing is fetched twice."""
    url, seen = server
    monkeypatch.setenv("HF_TOKEN", "secret")
    path = released.fetch(f"{url}/files/a.pt?key=1", None, str(tmp_path))
    assert pathlib.Path(path).read_bytes() == (release / "theirs.pt").read_bytes()
    assert seen[0] == ("/files/a.pt?key=1", 0, None) and seen[1][1] > 0 and seen[1][2] is None and len(seen) == 2
    assert released.fetch(f"{url}/files/a.pt?key=1", None, str(tmp_path)) == path and len(seen) == 2
    take_as_hub(monkeypatch, url)
    released.fetch("somebody/models", "b.pt", str(tmp_path))
    assert seen[2] == ("/somebody/models/resolve/main/b.pt", 0, "Bearer secret")


def test_files_of_one_name_from_two_places_are_two_files(server, tmp_path, monkeypatch):
    """All of the paper's models may be called ckpt_step:38146.pt; none must be taken for another, nor lead outside."""
    take_as_hub(monkeypatch, server[0])
    sources = [("somebody/one", "../a:1.pt"), ("somebody/two", "../a:1.pt"), (f"{server[0]}/x/a:1.pt", None)]
    paths = [released.fetch(*source, str(tmp_path)) for source in sources]
    host = server[0].removeprefix("http://")
    assert [os.path.relpath(path, tmp_path) for path in paths] == ["somebody/one/a:1.pt", "somebody/two/a:1.pt",
                                                                   f"{host}/x/a:1.pt"]
    assert len({path for path, *_ in server[1]}) == 3
