"""
Validation perplexity, as in Table 3, of any checkpoint: train.py's or one of the released code.

    python paper/perplexity.py --ckpt=out/paper-exo/ckpt_038147.pt --data=data/fineweb_edu10B

exp of the mean cross-entropy (no z) over non-overlapping windows of the model's context; the paper
takes all 100M tokens of the validation shard. A run of train.py with --final_eval_tokens=0, the
default, ends with the same number.
"""

import argparse
import math
import os
import sys

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from analysis import cross_entropy, validation_windows
from eval_hellaswag import CHECKPOINT_HELP, checkpoint_file, eval_mode
from model import TABLE_3, InputError, choose_device, load_checkpoint, variant_name
from prepare_fineweb import Progress, UserError, command_line, get_tokenizer
from train import has_bfloat16


@torch.no_grad()
def perplexity(model, windows, eot, dtype="float32", mask_documents=True):
    """exp of the mean cross-entropy, without z, over all targets of windows (rows, T + 1) of token
    ids, each window by itself; the model is in eval mode meanwhile. UserError where a
    token is not in the model's vocabulary."""
    if windows.max() >= model.config.vocab_size:
        raise UserError(
            f"the data hold token {windows.max()}, the model knows {model.config.vocab_size}"
        )
    device = model.embed.weight.device
    total = 0.0
    progress = Progress("perplexity", len(windows), "windows")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    with eval_mode(model), autocast:
        for i, window in enumerate(windows, 1):
            idx = torch.as_tensor(window.astype("int64"), device=device)[None]
            docs = (idx[:, :-1] == eot).cumsum(1) if mask_documents else None
            total += cross_entropy(model, idx, docs)
            progress.update(i)
    progress.end()
    return math.exp(total / windows[:, 1:].size)


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Validation perplexity of a checkpoint.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--ckpt", required=True, metavar="PATH", help=CHECKPOINT_HELP)
    add(
        "--data",
        required=True,
        metavar="DIR",
        help="folder of token shards with a validation split",
    )
    add("--windows", type=int, default=0, help="validation windows to score (default: all)")
    add(
        "--mask_documents",
        default="true",
        choices=("true", "false"),
        help="attention within documents, as trained (default: true)",
    )
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if any")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of the layers (default: bfloat16 where a GPU has it, else float32)",
    )
    return parser.parse_args()


def main():
    """Score a checkpoint, print the perplexity and the paper's."""
    args = parse_arguments()
    device = choose_device(args.device, among=("cuda", "cpu"))
    dtype = args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if has_bfloat16(device) else "float32"
    masked = args.mask_documents == "true"
    documents = "masked" if masked else "not masked"
    path = checkpoint_file(args.ckpt)
    model = load_checkpoint(path, device)
    windows = validation_windows(args.data, model.config, args.windows)
    eot = get_tokenizer(model.config.tokenizer).eot
    value = perplexity(model, windows, eot, dtype, masked)
    name = variant_name(model.config)
    beside = ""
    if name in TABLE_3:
        millions, paper, _ = TABLE_3[name]
        beside = f" (the paper's {millions} M model: {paper:.2f} over 100M GPT-2 tokens)"
    print(f"{path}: {name}")
    print(
        f"perplexity  {value:.4f} over {len(windows):,} windows of {windows.shape[1] - 1} "
        f"validation tokens, cross-entropy alone, documents {documents}, {dtype}{beside}"
    )


if __name__ == "__main__":
    command_line(main, InputError)
