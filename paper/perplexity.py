"""
Validation perplexity, as in Table 3, of any checkpoint: train.py's or one of the released code.

    python paper/perplexity.py --ckpt=out/paper-exo/ckpt_038147.pt --data=data/fineweb_edu10B

exp of the mean cross-entropy (no z) over non-overlapping windows of the model's context; the paper takes all 100M
tokens of the validation shard. A run of train.py with --final_eval_tokens=0, the default, ends with the same number.
"""
import argparse
import math
import os
import sys

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from analysis import cross_entropy, validation_windows
from model import TABLE_3, choose_device, load_checkpoint, variant_name
from prepare_fineweb import Progress, UserError, command_line, get_tokenizer


@torch.no_grad()
def perplexity(model, windows, eot, dtype="float32", mask_documents=True):
    """exp of the mean cross-entropy over all targets of windows (rows, T + 1), without z; each window by itself."""
    device, total, progress = model.embed.weight.device, 0.0, Progress("perplexity", len(windows), "windows")
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        for i, window in enumerate(windows, 1):
            idx = torch.as_tensor(window.astype("int64"), device=device)[None]
            docs = (idx[:, :-1] == eot).cumsum(1) if mask_documents else None
            total += cross_entropy(model, idx, docs)
            progress.update(i)
    progress.end()
    return math.exp(total / windows[:, 1:].size)


def print_perplexity(model, args):
    """Print the validation perplexity on args.data beside the paper's; the other arguments are `add_arguments`'s."""
    device, masked = choose_device(args.device, among=("cuda", "cpu")), args.mask_documents == "true"
    dtype = {"auto": "bfloat16" if device == "cuda" else "float32"}.get(args.dtype, args.dtype)
    windows, eot = validation_windows(args.data, model.config, args.windows), get_tokenizer(model.config.tokenizer).eot
    value = perplexity(model.to(device).eval(), windows, eot, dtype, masked)
    millions, paper, _ = TABLE_3.get(variant_name(model.config), (0, 0, 0))
    beside = f" (the paper's {millions} M model: {paper:.2f} over 100M GPT-2 tokens)" if millions else ""
    print(f"perplexity  {value:.4f} over {len(windows):,} windows of {windows.shape[1] - 1} validation tokens, "
          f"cross-entropy alone, documents {'masked' if masked else 'not masked'}, {dtype}{beside}")


def add_arguments(parser):
    """The flags that released.py has too."""
    parser.add_argument("--data", metavar="DIR", help="folder of token shards, for its validation split")
    parser.add_argument("--windows", type=int, default=0, help="validation windows to score (default: all)")
    parser.add_argument("--mask_documents", default="true", choices=("true", "false"),
                        help="attention within documents, as trained (default: true)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"),
                        help="where to compute (default: cuda if there is a GPU)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                        help="of the forward pass (default: bfloat16 on cuda, else float32)")


def main():
    parser = argparse.ArgumentParser(description="Validation perplexity of a checkpoint.", allow_abbrev=False)
    parser.add_argument("--ckpt", required=True, metavar="PATH", help="checkpoint, ours or a released one")
    add_arguments(parser)
    args = parser.parse_args()
    if not args.data:
        raise UserError("--data=DIR is needed: a folder of token shards")
    model = load_checkpoint(args.ckpt)
    print(f"checkpoint  {args.ckpt}: {variant_name(model.config)}")
    print_perplexity(model, args)


if __name__ == "__main__":
    command_line(main)
