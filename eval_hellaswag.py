"""
HellaSwag: which of four endings of a short story does a language model find the likeliest?

    python eval_hellaswag.py --ckpt=PATH                             no examples, as lm-eval asks
    python eval_hellaswag.py --ckpt=PATH --shots=5 --out=exo.jsonl   five examples, as in the paper

Two results can be compared only if they follow the same convention: how an item becomes text, and
whether the summed log-probability of an ending is divided by the ending's length before the largest
is taken. One pass over the items gives all three accuracies: undivided (acc), divided by the number
of characters (acc_norm), divided by the number of tokens (acc_norm_tokens).

    --style   text                                                  what is usually quoted
    lmeval    "activity: ctx_a Ctx_b" without WikiHow's [title]     acc, acc_norm
    nanogpt   `ctx` as it is (build-nanogpt, llm.c, modded-nanogpt) acc_norm_tokens, as "acc_norm"

Three things make it fast. The four endings of an item share its context, so the first tokens of the
context run once and their keys and values are copied for each ending. Only the scored positions are
multiplied with the head. Items of similar length run together, padded on the right: attention is
causal, so no scored token can see the padding.
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
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from model import (
    InputError,
    KVCache,
    choose_device,
    compute_dtype,
    load_checkpoint,
    newest_checkpoint,
)
from prepare_fineweb import (
    Progress,
    UserError,
    atomic_write,
    check_writable,
    command_line,
    download,
    get_tokenizer,
    json_lines,
    only_writer,
    say,
)

# ---- 1 from rows to tokens -------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One question. The model reads the context and one of the endings; the ending is scored."""

    index: int  # place in the file, from 0
    label: int  # the true ending, 0 to 3
    context: list[int]  # tokens
    endings: list[list[int]]  # tokens of each of the four
    characters: list[int]  # of each of the four, without the space in front

    @property
    def length(self):
        """Tokens read for the longest ending; an ending's last token predicts nothing."""
        return len(self.context) + max(map(len, self.endings)) - 1


def clean(text):
    """Remove WikiHow's marks as lm-eval does: in this order, and "  " becomes " " only once."""
    text = text.strip().replace(" [title]", ". ")
    text = re.sub(r"\[.*?\]", "", text)
    return text.replace("  ", " ")


def render_lmeval(row):
    """(context, four endings) as text, as in lm-evaluation-harness."""
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [clean(ending) for ending in row["endings"]]
    return clean(context), endings


def lmeval_tokens(row, encode, examples=""):
    """(context tokens, tokens of the four endings, their texts) as in lm-evaluation-harness.

    An ending's tokens are those of context + ending after the context's, so spaces at the end of
    the context belong to the ending. Examples in front do not change them, because no token of
    GPT-2 spans the line break after an example.
    """
    context, endings = render_lmeval(row)
    stem = encode(context.rstrip())
    tokens = [encode(f"{context} {ending}")[len(stem) :] for ending in endings]
    return encode(examples + context.rstrip()), tokens, endings


def nanogpt_tokens(row, encode, examples=""):
    """As lmeval_tokens, in build-nanogpt's way: context and ending unchanged, encoded apart."""
    tokens = [encode(f" {ending}") for ending in row["endings"]]
    return encode(examples + row["ctx"]), tokens, row["endings"]


STYLES = {"lmeval": lmeval_tokens, "nanogpt": nanogpt_tokens}


def draw_examples(train_rows, rows, shots, seed=1234):
    """For each row the text of `shots` solved training rows, drawn as lm-eval draws them.

    One generator serves the whole task and advances once per row, so a row's examples depend on
    its place alone. shots + 1 are drawn; the row itself is left out if it is among them, otherwise
    the last one.
    """
    if len(train_rows) <= shots:
        raise UserError(
            f"--shots={shots} draws from at least {shots + 1} training items, and there are "
            f"{len(train_rows)}; choose another --train"
        )
    generator = random.Random(seed)
    texts = []
    for row in rows:
        drawn = generator.sample(train_rows, shots + 1)
        others = [other for other in drawn if other != row]
        texts.append("".join(solved(other) for other in others[:shots]))
    return texts


def solved(row):
    """A training row as an example: context, true ending, an empty line."""
    context, endings = render_lmeval(row)
    return f"{context} {endings[row['label']]}\n\n"


def make_items(rows, style="lmeval", examples=None, tokenizer="gpt2"):
    """Rows of a HellaSwag file -> list of Item. `examples`: a text for each row, put before it."""
    tokenizer = get_tokenizer(tokenizer)
    items = []
    for row, before in zip(rows, examples or [""] * len(rows)):
        context, endings, texts = STYLES[style](row, tokenizer.encode, before)
        context = context or [tokenizer.eot]
        characters = [len(text) for text in texts]
        items.append(Item(len(items), row["label"], context, endings, characters))
    return items


def load_items(data="", shots=0, style="lmeval", limit=None, train="", tokenizer="gpt2"):
    """The first `limit` items of the file `data`, ready for `score`, with `shots` solved examples
    of the file `train` in front of each. "" is the official file, which is downloaded."""
    rows = read_split("val", data)[:limit]
    examples = None
    if shots:
        examples = draw_examples(read_split("train", train), rows, shots)
    return make_items(rows, style, examples, tokenizer)


# ---- 2 scoring -------------------------------------------------------------------------------

GRID = 8  # shared prefixes are multiples of this many tokens: many items have equally long ones
HEAD_ROWS = 128  # scored positions multiplied with the head at once: 26 MB of logits


@torch.no_grad()
def score(model, items, batch_tokens=8192, dtype=torch.float32):
    """Summed log-probabilities (len(items), 4) of the endings, float64 on the CPU, in nats.

    model         an ExoFormer, not compiled; scored in eval mode, whatever mode it is in
    batch_tokens  tokens in one batch, counting a shared prefix four times
    dtype         torch.float32, or torch.bfloat16 to run the layers under autocast; the
                  log-probabilities stay float32

    Shows its progress. UserError where a log-probability is not finite.
    """
    batches = plan(items, model.config.block_size, batch_tokens)
    total = sum(length * len(batch) for _, length, batch in batches)
    progress = Progress("HellaSwag", total, "tokens")
    scores = {}
    done = 0
    with eval_mode(model):
        for prefix, length, batch in batches:
            indices = [item.index for item in batch]
            scores.update(zip(indices, score_batch(model, prefix, length, batch, dtype)))
            done += length * len(batch)
            progress.update(done, f", {len(scores)} of {len(items)} items")
    progress.end()
    return all_finite(torch.stack([scores[item.index] for item in items]))


@contextmanager
def eval_mode(model):
    """The model without dropout, for `with`; afterwards each module is in its mode of before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def all_finite(scores):
    """The scores, a tensor; UserError where one is infinite or not a number."""
    if not scores.isfinite().all():
        raise UserError(
            "the model gives log-probabilities that are not finite; its weights are damaged"
        )
    return scores


def plan(items, block_size, batch_tokens):
    """Batches (prefix, length, items): items with prefixes of one length and similar lengths, at
    most `length`. A batch has room for batch_tokens tokens, where a shared prefix counts four
    times; one item always fits."""
    shaped = [(*shape_of(item, block_size), item) for item in items]
    shaped.sort(key=lambda entry: entry[:2], reverse=True)
    batches = []
    while shaped:
        prefix, length, _ = shaped[0]
        room = max(1, batch_tokens // (4 * length))
        batch = [item for other, _, item in shaped[:room] if other == prefix]
        batches.append((prefix, length, batch))
        del shaped[: len(batch)]
    return batches


def shape_of(item, block_size):
    """(prefix, length): how many tokens the item's four rows share in its batch, and the length of
    its longest row.

    The last token of the context is never shared, because its output predicts the ending. Rows
    longer than block_size lose tokens on the left, as in lm-eval; they begin at different tokens
    then and share nothing.
    """
    longest = max(map(len, item.endings))
    if longest > block_size:
        raise UserError(
            f"item {item.index}: an ending of {longest} tokens does not fit into "
            f"block_size={block_size}"
        )
    if item.length > block_size:
        return 0, block_size
    return (len(item.context) - 1) // GRID * GRID, item.length


def score_batch(model, prefix, length, items, dtype):
    """Summed log-probabilities (len(items), 4) of one batch of `plan`, float64 on the CPU."""
    device = model.head.weight.device
    rows = [(item.context, ending) for item in items for ending in item.endings]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        cache = read_prefix(model, prefix, length, items) if prefix else None
        return score_rows(model, rows, prefix, cache).view(-1, 4)


def read_prefix(model, prefix, length, items):
    """A KVCache of `length` tokens that has read the first `prefix` tokens of each item once and
    holds them four times, for its four endings."""
    device = model.head.weight.device
    dtype = compute_dtype(device) or model.head.weight.dtype
    cache = KVCache(model.config, len(items), length, device, dtype)
    idx = torch.tensor([item.context[:prefix] for item in items], device=device)
    model.trunk(idx, cache=cache)
    return cache.repeat(4)


def score_rows(model, rows, prefix=0, cache=None):
    """Summed log p(ending | context) of (context, ending) ids, float64 on the CPU.

    The rows run as one batch, padded on the right and cut on the left to block_size; `cache` has
    read the first `prefix` tokens of each.
    """
    device = model.head.weight.device
    newest = model.config.block_size
    inputs = [(context + ending)[:-1][-newest:][prefix:] for context, ending in rows]
    lengths = [len(ending) for _, ending in rows]
    padded = pad_sequence([torch.tensor(tokens) for tokens in inputs], batch_first=True)
    hidden = model.trunk(padded.to(device), cache=cache)
    # the last outputs of a row predict the tokens of its ending
    ends = [len(tokens) for tokens in inputs]
    scored = [h[end - length : end] for h, end, length in zip(hidden, ends, lengths)]
    targets = torch.tensor([token for _, ending in rows for token in ending], device=device)
    log_probs = token_log_probs(model, torch.cat(scored), targets).cpu().double()
    return torch.stack([part.sum() for part in log_probs.split(lengths)])


def token_log_probs(model, hidden, targets):
    """log p(target) for hidden states (N, C) and targets (N,), in float32 also under autocast."""
    hidden = hidden.to(model.head.weight.dtype)
    parts = []
    with torch.autocast(hidden.device.type, enabled=False):
        for h, t in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS)):
            logits = model.logits(h).float()
            parts.append(logits.gather(1, t[:, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(parts)


# ---- 3 accuracy ------------------------------------------------------------------------------

METRICS = {  # name: what the summed log-probabilities are divided by
    "acc": "1",
    "acc_norm": "characters of the ending (lm-eval's acc_norm)",
    "acc_norm_tokens": "tokens of the ending (build-nanogpt's acc_norm)",
}


def predictions(items, scores):
    """{metric: (len(items),) index of the likeliest ending}; of equal ones the first, as lm-eval.
    An ending without characters is never acc_norm's choice: it is divided by 0, as in lm-eval."""
    characters = torch.tensor([item.characters for item in items])
    tokens = torch.tensor([[len(ending) for ending in item.endings] for item in items])
    quotients = (scores, scores / characters, scores / tokens)
    # numpy's argmax takes the first of equal ones; torch promises none
    choices = [torch.from_numpy(quotient.numpy().argmax(-1)) for quotient in quotients]
    return dict(zip(METRICS, choices))


def accuracy(items, predicted):
    """{metric: accuracy, metric_stderr: its standard error}; sample variance, as in lm-eval."""
    n = len(items)
    result = {}
    for metric, choices in predicted.items():
        mean = sum(int(choice) == item.label for choice, item in zip(choices, items)) / n
        result[metric] = mean
        result[f"{metric}_stderr"] = math.sqrt(mean * (1 - mean) / max(1, n - 1))
    return result


# ---- 4 files ---------------------------------------------------------------------------------

COMMIT = "a29ff8e9a04bba4bd6588223785ce105328adc57"
URL = f"https://raw.githubusercontent.com/rowanz/hellaswag/{COMMIT}/data/hellaswag_{{}}.jsonl"
SHA256 = {  # val: git blob 0f5ee25d of that commit; train: as in TensorFlow Datasets
    "val": "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    "train": "dae5e69249868cb9fe4e23ff925c60b66169564cfb7072d793cd7356a2b69f8d",
}
FLAGS = {"val": "--data", "train": "--train"}  # that name another file


def read_split(split, path=""):
    """Rows of the file `path` or, where it is "", of the official file of the split "val" or
    "train". UserError where it cannot be had, is not what was published, or holds no item."""
    name = path or official_file(split)
    data = read_bytes(name)
    if not path and hashlib.sha256(data).hexdigest() != SHA256[split]:
        raise UserError(f"{name} is not the official file; remove it and run again")
    rows = list(json_lines(data.split(b"\n"), name, "a HellaSwag item", checked))
    if not rows:
        raise UserError(f"{name}: no items in it")
    return rows


def official_file(split):
    """The path of an official file, which is downloaded into data/hellaswag if it is not there."""
    folder = "data/hellaswag"
    name = f"{folder}/hellaswag_{split}.jsonl"
    if not os.path.exists(name):
        with only_writer(folder, wait=True):
            fetch_official(split, name)
    return name


def fetch_official(split, name):
    """Download an official file, unless another evaluation has while this one waited."""
    url = URL.format(split)
    try:
        if not os.path.exists(name):
            download(url, name, tries=3)
    except UserError as error:
        raise UserError(
            f"{error}; without a connection, save {url} as {name} yourself, or name a file "
            f"with {FLAGS[split]}"
        ) from None


def read_bytes(path):
    """The contents of a file, unpacked if its name ends in .gz. UserError if it is not readable."""
    opened = gzip.open if path.endswith(".gz") else open
    try:
        with opened(path, "rb") as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def checked(row):
    """A row of a HellaSwag file with an integer label. ValueError where it is none."""
    texts = [row["ctx"], row["ctx_a"], row["ctx_b"], row["activity_label"]] + row["endings"]
    if [type(text) for text in texts] != 8 * [str] or str(row["label"]) not in list("0123"):
        raise ValueError(
            "ctx, ctx_a, ctx_b, activity_label and four endings must be texts, label 0 to 3"
        )
    return {**row, "label": int(row["label"])}


# ---- 5 command line --------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHECKPOINT_HELP = "checkpoint, train.py's or a released one; for a run folder, its newest"


def checkpoint_file(path):
    """The path of a checkpoint, of a run folder its newest, so that results can name it."""
    return newest_checkpoint(path) if os.path.isdir(path) else path


def load_for_scoring(path, device):
    """The model of a checkpoint; UserError where its tokenizer has ids that it does not know."""
    model = load_checkpoint(path, device)
    config = model.config
    n_vocab = get_tokenizer(config.tokenizer).n_vocab
    if config.vocab_size < n_vocab:
        raise UserError(
            f"{path}: knows {config.vocab_size} token ids, but its tokenizer, {config.tokenizer}, "
            f"has {n_vocab}"
        )
    return model


def parse_arguments():
    """The command line as a namespace; argparse ends the program where it is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ckpt", required=True, help=CHECKPOINT_HELP)
    add("--shots", type=int, default=0, help="solved examples before each item; the paper uses 5")
    add("--style", choices=STYLES, default="lmeval", help="how items become text")
    add("--limit", type=int, help="score the first LIMIT items only")
    add("--data", default="", help="items, .jsonl or .jsonl.gz; default: the official file")
    add("--train", default="", help="where examples come from; default: the official file")
    add("--out", help="write label, scores and predictions of every item to this .jsonl file")
    add("--batch_tokens", type=int, default=8192, help="tokens in a batch; fewer need less memory")
    add("--device", default="auto", help="cuda, mps or cpu; auto takes the first there is")
    add("--dtype", choices=DTYPES, default="float32", help="precision of the layers")
    args = parser.parse_args()
    if args.shots < 0:
        parser.error("--shots must not be negative")
    if args.batch_tokens < 1 or (args.limit is not None and args.limit < 1):
        parser.error("--batch_tokens and --limit must be at least 1")
    if args.shots and args.style == "nanogpt":
        parser.error("--style=nanogpt has no examples; use --shots=0")
    return args


def main():
    """Score a checkpoint, print the accuracies with the convention they follow, write --out."""
    args = parse_arguments()
    check_writable(args.out)
    path = checkpoint_file(args.ckpt)
    model = load_for_scoring(path, choose_device(args.device))
    tokenizer = model.config.tokenizer
    items = load_items(args.data, args.shots, args.style, args.limit, args.train, tokenizer)
    scores = score(model, items, args.batch_tokens, DTYPES[args.dtype])
    predicted = predictions(items, scores)
    say(
        f"{path}: HellaSwag, {args.style} rendering, {args.shots}-shot, {len(items)} items, "
        f"{args.dtype} on {model.head.weight.device.type}"
    )
    report(items, predicted, model.config)
    if args.out:
        asked = {"style": args.style, "shots": args.shots}
        write_results(args.out, asked, items, scores, predicted)


def write_results(path, asked, items, scores, predicted):
    """A line of JSON for each item: how all were asked (style, shots), its index and label, the
    four scores, each metric's prediction."""
    with atomic_write(path) as file:
        for row, (item, values) in enumerate(zip(items, scores.tolist())):
            record = {**asked, "index": item.index, "label": item.label, "scores": values}
            for metric, choices in predicted.items():
                record[metric] = int(choices[row])
            file.write(f"{json.dumps(record)}\n".encode())


def report(items, predicted, config):
    """Print the three accuracies, and how many contexts were cut to the model's block_size."""
    cut = sum(item.length > config.block_size for item in items)
    if cut:
        say(f"{cut} contexts were cut on the left to block_size={config.block_size}")
    result = accuracy(items, predicted)
    for metric, divisor in METRICS.items():
        error = result[f"{metric}_stderr"]
        say(f"{metric:16} {result[metric]:6.2%} +- {error:.2%}   log-probability / {divisor}")


if __name__ == "__main__":
    command_line(main, InputError, memory="use a smaller --batch_tokens")
