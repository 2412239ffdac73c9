"""
A checkpoint of the paper's released code: fetch it, say what it is, measure it, turn it into one of ours.

    python paper/released.py PATH
    python paper/released.py https://HOST/PATH/FILE.pt
    python paper/released.py OWNER/REPO --file=NAME.pt --data=data/fineweb_edu10B --save=out/released/exo.pt

Loading is verified against the released CODE: for every family its logits, gradients and key names agree with ours on
small random weights (test_model.py). It is not verified against the released WEIGHTS, which nobody here had: if the
perplexity below is not the one Table 3 prints for the variant, believe the perplexity.
"""
import argparse
import math
import os
import re
import sys
import threading
from dataclasses import asdict
from urllib.parse import unquote, urlsplit

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from analysis import Countdown, cross_entropy, validation_windows, variant_name
from model import (TABLE_3, ConfigError, ExoFormer, count_parameters, read_checkpoint, save_checkpoint,
                   translate_released)
from prepare_fineweb import Hub, InputError, Retry, again, get_tokenizer, locked, origin, settle, size_of
from train import true_or_false

CHUNK = 1 << 20                     # bytes written at a time


# --------------------------------------------------------------------------------------------------------------- fetch

def fetch(source, name, folder, backoff=1.0):
    """The path of a local checkpoint, or of the copy in `folder` of the one at a URL or hub repository. InputError when
    it cannot be had. An interrupted download goes on where it stopped, a finished one is not repeated."""
    if os.path.exists(source):
        return source
    if "://" not in source and not (name and re.fullmatch(r"[\w.-]+/[\w.-]+", source)):
        raise InputError(f"{source}: no such file, and not a URL; for a hub repository OWNER/REPO give --file=NAME too")
    hub = Hub()
    address = url_address(hub, source) if "://" in source else f"{source}/resolve/main/{name}"
    path = os.path.join(folder, os.path.basename(name or unquote(urlsplit(source).path)))
    with locked(folder):
        if not os.path.exists(path):
            again(os.path.basename(path), lambda: transfer(hub, address, f"{path}.part"), threading.Event(), backoff,
                  progress=lambda: size_of(f"{path}.part"))
            settle(whole(f"{path}.part"), path)
    return path


def url_address(hub, url):
    """What to ask of `hub`, turned to the host of `url`. Its token stays with the hub's own host."""
    endpoint = "{0.scheme}://{0.netloc}".format(urlsplit(url))
    hub.secret = hub.secret if origin(endpoint) == origin(hub.endpoint) else {}
    hub.endpoint = endpoint
    return url[len(endpoint) + 1:]


def transfer(hub, address, part):
    """Append to `part` what it lacks. Retry when the connection ends early."""
    import requests
    have = max(0, size_of(part) - 1)            # ask for one byte again: a range that begins at the end is an error
    with hub.get(address, **({"Range": f"bytes={have}-"} if have else {})) as response, open(part, "ab") as file:
        start = have if response.status_code == 206 else 0
        size = start + int(response.headers.get("Content-Length", 0))
        file.truncate(start)
        report = Countdown(os.path.basename(part), size // 1_000_000, "MB")
        try:
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                report(file.tell() / 1e6)
        except requests.RequestException as error:
            raise Retry(f"connection lost ({type(error).__name__})") from None
    if size_of(part) < size:
        raise Retry(f"the connection ended at byte {size_of(part)} of {size}")


def whole(part):
    """The path itself, if what lies there is a whole checkpoint; otherwise it is removed and InputError says so."""
    try:
        read_checkpoint(part)
    except ConfigError as error:
        os.remove(part)
        raise InputError(f"what came is no checkpoint: {error}") from None
    return part


# -------------------------------------------------------------------------------------------------------------- report

class Watched(dict):
    """A state dict that remembers which of its tensors were asked for."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.used = set()

    def __getitem__(self, key):
        self.used.add(key)
        return super().__getitem__(key)


def load(path, n_head=None, anchor_norm=None):
    """(checkpoint dict, model) of a released file. ConfigError when it is none."""
    checkpoint = read_checkpoint(path)
    if "model_config" in checkpoint:
        raise ConfigError(f"{path} is in this project's own format already; use it as it is")
    trained_with = checkpoint.get("model_args", {})
    settings = {name: trained_with[name] for name in ("block_size", "rope_theta") if name in trained_with}
    state = checkpoint.get("model", checkpoint)
    return checkpoint, ExoFormer.from_released(state, n_head=n_head, anchor_norm=anchor_norm, **settings).eval()


def unused_tensors(checkpoint, model):
    """Names of the tensors that the model took nothing from: the released forward pass never reads them either."""
    state = Watched(released_names(checkpoint.get("model", checkpoint)))
    translate_released(state, model.state_dict(), model.config)
    return sorted(set(state) - state.used)


def released_names(state):
    """The keys as model.py's loader reads them: no prefix of torch.compile, one name for the norms of v and g."""
    return {re.sub(r"\.([vg])_res_norm\.", r".\1_norm.", key.removeprefix("_orig_mod.")): t for key, t in state.items()}


def describe(path, checkpoint, model):
    """Print what the file holds."""
    config, name = model.config, variant_name(model.config)
    millions = f"; Table 3 prints {TABLE_3[name][0]} M" if name in TABLE_3 else ""
    axes = ("gate", "anchor", "mix", "anchor_norm", "granularity", "dynamic")
    unused = unused_tensors(checkpoint, model)
    entries = [key for key in checkpoint if key != "model"] if "model" in checkpoint else []
    print(f"file        {path}, {size_of(path):,} bytes, step {checkpoint.get('step', 'unknown')}")
    print(f"variant     {name}, by its keys: {', '.join(f'{axis}={vars(config)[axis]!r}' for axis in axes)}")
    print(f"size        {config.n_layer} layers, C {config.n_embd}, {config.n_head} heads, "
          f"context {config.block_size}, vocabulary {config.vocab_size:,}")
    print(f"parameters  {count_parameters(model):,}{millions}")
    print(f"ignored     {len(unused)} tensors that the released forward pass never reads: {shortened(unused)}")
    print(f"            entries beside the weights: {shortened(entries)} (of model_args, block_size and rope_theta)")
    print("verified    against the released code on small random weights; never against released weights, which nobody "
          "here had")


def shortened(names, most=6):
    """The first names of a list, and how many more there are."""
    return (", ".join(names[:most]) or "none") + (f" and {len(names) - most} more" if len(names) > most else "")


@torch.no_grad()
def perplexity(model, windows, eot, dtype="float32", mask_documents=True):
    """exp of the mean cross-entropy over all targets of windows (rows, T + 1), without z; each window by itself."""
    device, total = model.embed.weight.device, 0.0
    report = Countdown("perplexity", len(windows), "windows")
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        for i, window in enumerate(windows):
            idx = torch.as_tensor(window.astype("int64"), device=device)[None]
            docs = (idx[:, :-1] == eot).cumsum(1) if mask_documents else None
            total += cross_entropy(model, idx, docs)
            report(i + 1)
    return math.exp(total / windows[:, 1:].size)


def evaluate(model, args):
    """Print the validation perplexity beside the paper's."""
    windows = validation_windows(args.data, model.config, args.windows)
    value = perplexity(model, windows, get_tokenizer(model.config.tokenizer).eot, args.dtype, args.mask_documents)
    paper = TABLE_3.get(variant_name(model.config))
    print(f"perplexity  {value:.4f} over {len(windows):,} windows of {windows.shape[1] - 1} validation tokens, "
          f"cross-entropy alone, documents {'masked' if args.mask_documents else 'not masked'}"
          f"{f' (Table 3: {paper[1]:.2f}, over all 100M tokens)' if paper else ''}")


def run(args):
    path = fetch(args.source, args.file, args.folder)
    checkpoint, model = load(path, args.n_head, args.anchor_norm)
    describe(path, checkpoint, model)
    if args.save:
        if os.path.exists(args.save):
            raise InputError(f"--save={args.save} is there already; remove it or choose another name")
        os.makedirs(os.path.dirname(os.path.abspath(args.save)), exist_ok=True)
        save_checkpoint(args.save, dict(format=1, model_config=asdict(model.config), model=model.state_dict(),
                                        step=checkpoint.get("step"), released=os.path.basename(path)))
        print(f"saved       {args.save}: weights only, for sampling and evaluation; it cannot be resumed")
    if args.data:
        evaluate(model.to(args.device), args)


def main():
    parser = argparse.ArgumentParser(description="Report, measure, convert a released checkpoint.", allow_abbrev=False)
    parser.add_argument("source", help="local file, URL, or hub repository OWNER/REPO (HF_ENDPOINT, HF_TOKEN honoured)")
    parser.add_argument("--file", metavar="NAME", help="file in the hub repository")
    parser.add_argument("--folder", default="out/released", metavar="DIR",
                        help="where downloads go (default: out/released)")
    parser.add_argument("--save", metavar="PATH", help="write the model here in this project's format")
    parser.add_argument("--data", metavar="DIR", help="folder of token shards, for the validation perplexity")
    parser.add_argument("--windows", type=int, default=0, help="validation windows to score (default: all)")
    parser.add_argument("--mask_documents", type=true_or_false, default=True, metavar="BOOL",
                        help="attention within documents, as trained (default: true)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to compute (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"),
                        help="of the forward pass (default: float32)")
    parser.add_argument("--n_head", type=int, help="heads, where the keys do not tell")
    parser.add_argument("--anchor_norm", choices=("", "qk"),
                        help="internal q and k anchors, where the keys do not tell: '' if not normed")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("released.py: --device=cuda, but this machine has no CUDA device that torch can use")
    try:
        run(args)
    except (ConfigError, InputError) as error:
        sys.exit(f"released.py: {error}")


if __name__ == "__main__":
    main()
