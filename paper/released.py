"""
A checkpoint of the paper's released code: fetch it, say what it is, turn it into one of ours.

    python paper/released.py PATH
    python paper/released.py https://HOST/PATH/FILE.pt
    python paper/released.py Jonnester/Baseline --file=ckpt_step:38146.pt --save=base.pt
    python paper/perplexity.py --ckpt=base.pt --data=data/fineweb_edu10B

The third is the paper's baseline as the README of the released code names it; the other models lie
beside it, at https://huggingface.co/Jonnester. Downloads go to --folder, each under its own
address.

Loading is verified against the released CODE: for every family its logits, gradients and key names
agree with ours on small random weights (test_model.py). It is not verified against the released
WEIGHTS, which nobody here had: if the perplexity is not the one Table 3 prints for the variant,
believe the perplexity.
"""

import argparse
import os
import re
import sys
from dataclasses import asdict
from urllib.parse import unquote, urlsplit

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from model import (
    TABLE_3,
    ExoFormer,
    InputError,
    count_parameters,
    read_checkpoint,
    variant_name,
)
from prepare_fineweb import HUB, UserError, command_line, download, locked
from train import save_checkpoint


def fetch(source, name, folder):
    """The path of a local checkpoint, or of the copy in `folder` of the one at a URL or hub
    repository: folder/ADDRESS, since the files of several models have one name.

    An interrupted download goes on where it stopped, a finished one is not repeated. UserError
    when it cannot be had.
    """
    if os.path.exists(source):
        return source
    url, address = locate(source, name)
    # no part may lead out of the folder
    parts = [part for part in address.split("/") if part not in ("", ".", "..")]
    path = os.path.join(folder, *parts)
    with locked(os.path.dirname(path)):
        if not os.path.exists(path):
            download(url, path)
    return path


def locate(source, name):
    """(url, address as a relative path) of a URL, or of the file `name` of a hub repository."""
    url = urlsplit(source)
    if url.netloc:
        return source, url.netloc + unquote(url.path)
    if name and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return f"{HUB}/{source}/resolve/main/{name}", f"{source}/{name}"
    raise UserError(
        f"{source}: no such file, and not a URL; for a hub repository OWNER/REPO give --file=NAME "
        "too"
    )


def load(path, n_head=None, anchor_norm=None):
    """(checkpoint dict, model in eval mode) of a released file. UserError when it is none."""
    checkpoint = read_checkpoint(path)
    if "model_config" in checkpoint:
        raise UserError(
            f"{path} is in this project's own format already; use it as it is (paper/perplexity.py)"
        )
    return checkpoint, ExoFormer.from_released(checkpoint, n_head, anchor_norm).eval()


def describe(path, checkpoint, model):
    """Print what the file holds."""
    config = model.config
    name = variant_name(config)
    axes = ("gate", "anchor", "mix", "anchor_norm", "granularity", "dynamic")
    settings = ", ".join(f"{axis}={vars(config)[axis]!r}" for axis in axes)
    millions = f"; Table 3 prints {TABLE_3[name][0]} M" if name in TABLE_3 else ""
    step = checkpoint.get("step", "unknown")
    print(f"file        {path}, {os.path.getsize(path):,} bytes, step {step}")
    print(f"variant     {name}, by its keys: {settings}")
    print(
        f"size        {config.n_layer} layers, C {config.n_embd}, {config.n_head} heads, "
        f"context {config.block_size}, vocabulary {config.vocab_size:,}"
    )
    print(f"parameters  {count_parameters(model):,}{millions}")
    print(
        "verified    against the released code on small random weights; never against released "
        "weights, which nobody here had"
    )


def save(path, checkpoint, model, source):
    """Write the model to `path` in this project's format. UserError where a file is there."""
    if os.path.exists(path):
        raise UserError(f"--save={path} is there already; remove it or choose another name")
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    ours = {
        "model_config": asdict(model.config),
        "model": model.state_dict(),
        "step": checkpoint.get("step"),
        "released": os.path.basename(source),
    }
    save_checkpoint(path, ours)
    print(f"saved       {path}: weights only, to sample and evaluate; it cannot be resumed")


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Report and convert a released checkpoint.", allow_abbrev=False
    )
    add = parser.add_argument
    add("source", help="local file, URL, or hub repository OWNER/REPO (HF_ENDPOINT, HF_TOKEN)")
    add("--file", metavar="NAME", help="file in the hub repository")
    add("--folder", default="out/released", help="where downloads go (default: out/released)")
    add("--save", metavar="PATH", help="write the model here in this project's format")
    add("--n_head", type=int, help="heads, where the keys do not tell")
    add(
        "--anchor_norm",
        choices=("", "qk"),
        help="internal q and k anchors, where the keys do not tell: '' if not normed",
    )
    return parser.parse_args()


def main():
    """Fetch, report and, with --save, convert."""
    args = parse_arguments()
    path = fetch(args.source, args.file, args.folder)
    checkpoint, model = load(path, args.n_head, args.anchor_norm)
    describe(path, checkpoint, model)
    if args.save:
        save(args.save, checkpoint, model, path)


if __name__ == "__main__":
    command_line(main, InputError)
