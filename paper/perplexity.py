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
from model import TABLE_3, choose_device, InputError, load_checkpoint, variant_name
from prepare_fineweb import Progress, command_line, get_tokenizer


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


def main():
    parser = argparse.ArgumentParser(description="Validation perplexity of a checkpoint.", allow_abbrev=False)
    parser.add_argument("--ckpt", required=True, metavar="PATH", help="checkpoint, ours or a released one")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of token shards, for its validation split")
    parser.add_argument("--windows", type=int, default=0, help="validation windows to score (default: all)")
    parser.add_argument("--mask_documents", default="true", choices=("true", "false"),
                        help="attention within documents, as trained (default: true)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"),
                        help="where to compute (default: cuda if there is a GPU)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                        help="of the forward pass (default: bfloat16 on cuda, else float32)")
    args = parser.parse_args()
    device, masked = choose_device(args.device, among=("cuda", "cpu")), args.mask_documents == "true"
    dtype = {"auto": "bfloat16" if device == "cuda" else "float32"}.get(args.dtype, args.dtype)
    model = load_checkpoint(args.ckpt, device).eval()
    windows, eot = validation_windows(args.data, model.config, args.windows), get_tokenizer(model.config.tokenizer).eot
    value, name = perplexity(model, windows, eot, dtype, masked), variant_name(model.config)
    millions, paper, _ = TABLE_3.get(name, (0, 0, 0))
    beside = f" (the paper's {millions} M model: {paper:.2f} over 100M GPT-2 tokens)" if millions else ""
    print(f"{args.ckpt}: {name}\n"
          f"perplexity  {value:.4f} over {len(windows):,} windows of {windows.shape[1] - 1} validation tokens, "
          f"cross-entropy alone, documents {'masked' if masked else 'not masked'}, {dtype}{beside}")


if __name__ == "__main__":
    command_line(main, InputError)
