"""
HellaSwag: which of four endings of a short story does a language model find the likeliest?

    python eval_hellaswag.py --ckpt=PATH                             0-shot, rendered as in lm-evaluation-harness
    python eval_hellaswag.py --ckpt=PATH --shots=5 --out=exo.jsonl   with five solved examples, as in the paper

Two results can be compared only if they follow the same convention: how an item becomes text, and by what the summed
log-probability of an ending is divided before the largest is taken. One pass over the items gives all three accuracies.

    --style    text                                                               the number usually quoted
    lmeval     "activity: ctx_a Ctx_b", WikiHow's [title] marks cleaned away      acc, acc_norm (characters)
    nanogpt    the raw `ctx` (build-nanogpt, llm.c, modded-nanogpt)               acc_norm (tokens)

Three things make it fast. The four endings of an item share its context, so the first tokens of the context run once
and their keys and values are copied for each ending. Only the scored positions are multiplied with the head. Items of
similar length run together, padded on the right: attention is causal, so no scored token can see the padding.
"""
import argparse
import gzip
import hashlib
import json
import math
import os
import random
import re
import zlib
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from model import choose_device, compute_dtype, InputError, KVCache, load_checkpoint
from prepare_fineweb import (Progress, UserError, atomic_write, check_writable, command_line, download, get_tokenizer,
                             json_lines, say)

# --------------------------------------------------------------------------------------------------------------- 1 data

COMMIT = "a29ff8e9a04bba4bd6588223785ce105328adc57"
URL = f"https://raw.githubusercontent.com/rowanz/hellaswag/{COMMIT}/data/hellaswag_{{}}.jsonl"
SHA256 = {
    "val": "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",      # git blob 0f5ee25d of that commit
    "train": "dae5e69249868cb9fe4e23ff925c60b66169564cfb7072d793cd7356a2b69f8d",    # as in TensorFlow Datasets
}


def read_split(split, path=""):
    """Rows of the file `path` or, where it is "", of the official file of the split "val" or "train", which is
    downloaded into data/hellaswag if it is not there. UserError where it cannot be had or is not what was published."""
    name, url = path or f"data/hellaswag/hellaswag_{split}.jsonl", URL.format(split)
    if not path and not os.path.exists(name):
        try:
            download(url, name, tries=3)
        except UserError as error:
            raise UserError(f"{error}; without a connection, save {url} as {name} yourself") from None
    data = read_bytes(name)
    if not path and hashlib.sha256(data).hexdigest() != SHA256[split]:
        raise UserError(f"{name} is not the official file; remove it and run again")
    rows = list(json_lines(data.split(b"\n"), name, "a HellaSwag item", checked))
    if not rows:
        raise UserError(f"{name}: no items in it")
    return rows


def read_bytes(path):
    """The contents of a file, unpacked if its name ends in .gz."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def checked(row):
    """A row of a HellaSwag file with an integer label. An error where it is none."""
    texts = [row["ctx"], row["ctx_a"], row["ctx_b"], row["activity_label"]] + row["endings"]
    if [type(text) for text in texts] != 8 * [str] or str(row["label"]) not in ("0", "1", "2", "3"):
        raise ValueError("ctx, ctx_a, ctx_b, activity_label and four endings must be texts, label 0 to 3")
    return {**row, "label": int(row["label"])}


# ---------------------------------------------------------------------------------------------------------- 2 rendering

@dataclass(frozen=True)
class Item:
    """One question in tokens. The model reads the context and one of the endings; the ending is scored."""
    index: int                     # place in the file, from 0
    label: int                     # the true ending, 0 to 3
    context: list[int]
    endings: list[list[int]]       # four
    characters: list[int]          # of the four endings, without the space that joins them to the context

    @property
    def length(self):
        """Tokens that the model reads for the longest ending, whose last token predicts nothing."""
        return len(self.context) + max(map(len, self.endings)) - 1


def clean(text):
    """Remove WikiHow's marks as lm-eval does. The order of the steps matters; "  " is replaced once only."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def render_lmeval(row):
    """(context, four endings) as text, as in lm-evaluation-harness."""
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return clean(context), [clean(ending) for ending in row["endings"]]


def lmeval_tokens(row, encode, examples=""):
    """(context tokens, tokens of the four endings, their texts) as in lm-evaluation-harness.

    An ending's tokens are those of context + ending after the context's, so spaces at the end of the context belong to
    the ending. Examples in front do not change them, because no GPT-2 token spans the line break after an example.
    """
    context, endings = render_lmeval(row)
    stem = encode(context.rstrip())
    tokens = [encode(f"{context} {ending}")[len(stem):] for ending in endings]
    return encode(examples + context.rstrip()), tokens, endings


def nanogpt_tokens(row, encode, examples=""):
    """As lmeval_tokens, in build-nanogpt's way: the texts unchanged, context and ending encoded each by itself."""
    return encode(examples + row["ctx"]), [encode(f" {ending}") for ending in row["endings"]], row["endings"]


STYLES = {"lmeval": lmeval_tokens, "nanogpt": nanogpt_tokens}


def draw_examples(train_rows, rows, shots, seed=1234):
    """For each row the text of `shots` solved training rows, drawn as lm-eval draws them.

    One generator serves the whole task and advances once per row, so a row's examples depend on its place alone.
    shots + 1 are drawn; the row itself is left out if it is among them, otherwise the last one.
    """
    if shots >= len(train_rows):
        raise UserError(f"{shots} examples cannot be drawn from {len(train_rows)} training items")
    generator, texts = random.Random(seed), []
    for row in rows:
        drawn = [other for other in generator.sample(train_rows, shots + 1) if other != row][:shots]
        solved = [(*render_lmeval(other), other["label"]) for other in drawn]
        texts.append("".join(f"{context} {endings[label]}\n\n" for context, endings, label in solved))
    return texts


def make_items(rows, style="lmeval", examples=None):
    """Rows of a HellaSwag file -> list of Item. `examples` holds a text for each row, put in front of its context."""
    tokenizer, items = get_tokenizer("gpt2"), []
    for row, before in zip(rows, examples or [""] * len(rows)):
        context, endings, texts = STYLES[style](row, tokenizer.encode, before)
        characters = [max(1, len(text)) for text in texts]
        items.append(Item(len(items), row["label"], context or [tokenizer.eot], endings, characters))
    return items


def load_items(data="", shots=0, style="lmeval", limit=None, train=""):
    """The first `limit` items of the file `data`, ready for `score`, with `shots` solved examples of the file `train`
    in front of each. For a file that is "" the official one is taken, which is downloaded."""
    rows = read_split("val", data)[:limit]
    examples = draw_examples(read_split("train", train), rows, shots) if shots else None
    return make_items(rows, style, examples)


# ------------------------------------------------------------------------------------------------------------ 3 scoring

GRID = 8              # shared prefixes are multiples of this many tokens, so that many items have equally long ones
HEAD_ROWS = 128       # scored positions multiplied with the head at once: 26 MB of logits


def shape_of(item, block_size):
    """(prefix, length): how many tokens the item's four rows share in its batch, and the length of its longest row.

    The last context token is never shared, because its output predicts the ending. Rows longer than block_size lose
    tokens on the left, as in lm-eval; they begin at different tokens then and share nothing.
    """
    longest = max(map(len, item.endings))
    if longest > block_size:
        raise UserError(f"item {item.index}: an ending of {longest} tokens does not fit into block_size={block_size}")
    prefix = (len(item.context) - 1) // GRID * GRID if item.length <= block_size else 0
    return prefix, min(block_size, item.length)


def plan(items, block_size, batch_tokens):
    """Batches (prefix, length, items) of items with prefixes of one length and similar lengths, at most `length`.

    A batch has room for batch_tokens tokens, where a shared prefix counts four times; one item always fits.
    """
    shaped = sorted(((*shape_of(item, block_size), item) for item in items), key=lambda s: s[:2], reverse=True)
    batches = []
    while shaped:
        prefix, length, _ = shaped[0]
        room = max(1, batch_tokens // (4 * length))
        batch = [item for other, _, item in shaped[:room] if other == prefix]
        batches.append((prefix, length, batch))
        del shaped[:len(batch)]
    return batches


def score_batch(model, prefix, length, items, dtype):
    """Summed log-probabilities (items, 4) of the endings, float64 on the CPU."""
    device, config, cache = model.head.weight.device, model.config, None
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        if prefix:                                           # read once, then repeated for the four endings
            cache = KVCache(config, len(items), length, device, compute_dtype(device) or model.head.weight.dtype)
            model.trunk(torch.tensor([item.context[:prefix] for item in items], device=device), cache=cache)
            cache = cache.repeat(4)
        rows = [(item.context, ending) for item in items for ending in item.endings]
        return score_rows(model, rows, prefix, cache).view(-1, 4)


def score_rows(model, rows, prefix=0, cache=None):
    """Summed log p(ending | context) of (context, ending) ids, float64 on the CPU. The rows run as one batch,
    padded on the right and cut on the left to block_size; `cache` has read the first `prefix` tokens of each."""
    device, lengths = model.head.weight.device, [len(ending) for _, ending in rows]
    inputs = [(context + ending)[:-1][-model.config.block_size:][prefix:] for context, ending in rows]
    idx = pad_sequence([torch.tensor(tokens) for tokens in inputs], batch_first=True).to(device)
    hidden = model.trunk(idx, cache=cache)
    # the last outputs of a row predict the tokens of its ending
    scored = torch.cat([h[len(tokens) - length:len(tokens)] for h, tokens, length in zip(hidden, inputs, lengths)])
    targets = torch.tensor([token for _, ending in rows for token in ending], device=device)
    return torch.stack([p.sum() for p in token_log_probs(model, scored, targets).cpu().double().split(lengths)])


def token_log_probs(model, hidden, targets):
    """log p(target) for hidden states (N, C) and targets (N,), in float32, HEAD_ROWS positions at a time."""
    parts = []
    with torch.autocast(hidden.device.type, enabled=False):                    # whatever the caller runs under
        for h, t in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS)):
            logits = model.logits(h.to(model.head.weight.dtype)).float()
            parts.append(logits.gather(1, t[:, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(parts)


@torch.no_grad()
def score(model, items, batch_tokens=8192, dtype=torch.float32):
    """Summed log-probabilities (len(items), 4) of the endings, float64 on the CPU. Shows its progress.

    model         an ExoFormer of GPT-2's tokens, not compiled
    batch_tokens  tokens in one batch, counting a shared prefix four times
    dtype         torch.float32, or torch.bfloat16 to run the layers under autocast (log-probabilities stay float32)
    """
    batches, scores, done = plan(items, model.config.block_size, batch_tokens), {}, 0
    progress = Progress("HellaSwag", sum(length * len(batch) for _, length, batch in batches), "tokens")
    for prefix, length, batch in batches:
        scores.update(zip((item.index for item in batch), score_batch(model, prefix, length, batch, dtype)))
        done += length * len(batch)
        progress.update(done, f", {len(scores)} of {len(items)} items")
    progress.end()
    result = torch.stack([scores[item.index] for item in items])
    if not result.isfinite().all():
        raise UserError("the model gives log-probabilities that are not finite; its weights are damaged")
    return result


# ----------------------------------------------------------------------------------------------------------- 4 accuracy

METRICS = {  # name: what the summed log-probabilities are divided by
    "acc": "1",
    "acc_norm": "characters of the ending (lm-eval's acc_norm)",
    "acc_norm_tokens": "tokens of the ending (nanoGPT-style acc_norm)",
}


def predictions(items, scores):
    """{metric: (len(items),) index of the likeliest ending}; of equal ones the first, as in lm-eval."""
    characters = torch.tensor([item.characters for item in items])
    tokens = torch.tensor([[len(ending) for ending in item.endings] for item in items])
    quotients = (scores, scores / characters, scores / tokens)
    return {metric: torch.from_numpy(q.numpy().argmax(-1)) for metric, q in zip(METRICS, quotients)}


def accuracy(items, predicted):
    """{metric: accuracy, metric_stderr: its standard error}; sample variance, as in lm-eval."""
    n, result = len(items), {}
    for metric, choice in predicted.items():
        mean = sum(int(c) == item.label for c, item in zip(choice, items)) / n
        result[metric], result[f"{metric}_stderr"] = mean, math.sqrt(mean * (1 - mean) / max(1, n - 1))
    return result


# ------------------------------------------------------------------------------------------------------- 5 command line

def parse_arguments():
    """The command line as a namespace; argparse ends the program where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint to score: one of train.py, or one released with the paper")
    add("--shots", type=int, default=0, help="solved examples in front of each item; the paper uses 5")
    add("--style", choices=STYLES, default="lmeval", help="how items become text")
    add("--limit", type=int, help="score the first LIMIT items only")
    add("--data", default="", help="items, .jsonl or .jsonl.gz; default: the official file, downloaded")
    add("--train", default="", help="where examples come from; default: the official file, downloaded")
    add("--out", help="write label, scores and predictions of every item to this .jsonl file")
    add("--batch_tokens", type=int, default=8192, help="tokens in one batch; fewer need less memory")
    add("--device", default="auto", help="cuda, mps or cpu; auto takes the first there is")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="precision of the layers")
    args = parser.parse_args()
    if args.shots < 0 or args.batch_tokens < 1 or (args.limit is not None and args.limit < 1):
        parser.error("--shots must not be negative; --batch_tokens and --limit must be at least 1")
    if args.shots and args.style == "nanogpt":
        parser.error("--style=nanogpt has no examples; use --shots=0")
    return args


def main():
    """Score a checkpoint, print the accuracies with the convention they follow, write --out."""
    args = parse_arguments()
    check_writable(args.out)
    model = load_checkpoint(args.ckpt, choose_device(args.device))
    config = model.config
    if config.tokenizer != "gpt2" or config.vocab_size < 50257:
        raise UserError("HellaSwag is scored in GPT-2's 50,257 tokens; this model was trained on "
                        f"{config.vocab_size:,} of the tokenizer {config.tokenizer!r}")
    items = load_items(args.data, args.shots, args.style, args.limit, args.train)
    scores = score(model, items, args.batch_tokens, getattr(torch, args.dtype))
    predicted = predictions(items, scores)
    if args.out:
        with atomic_write(args.out) as file:
            for row, (item, values) in enumerate(zip(items, scores.tolist())):
                choices = {metric: int(choice[row]) for metric, choice in predicted.items()}
                record = {"index": item.index, "label": item.label, "scores": values, **choices}
                file.write(f"{json.dumps(record)}\n".encode())
    say(f"HellaSwag, {args.style} rendering, {args.shots}-shot, {len(items)} items, {args.dtype} on "
        f"{model.head.weight.device.type}")
    if cut := sum(item.length > config.block_size for item in items):
        say(f"{cut} contexts were cut on the left to block_size={config.block_size}")
    result = accuracy(items, predicted)
    for metric, divisor in METRICS.items():
        say(f"{metric:16} {result[metric]:6.2%} +- {result[metric + '_stderr']:.2%}   log-probability / {divisor}")


if __name__ == "__main__":
    command_line(main, InputError, memory="use a smaller --batch_tokens")
