"""
HellaSwag: four endings of a short story, of which a language model should find the true one the likeliest.

    python eval_hellaswag.py --ckpt=PATH                          # 0-shot, as lm-evaluation-harness renders it
    python eval_hellaswag.py --ckpt=PATH --shots=5 --out=exo.jsonl
    python eval_hellaswag.py --compare base.jsonl exo.jsonl       # is the difference more than chance?

Every number of this benchmark follows a convention: how an item becomes text, and what the summed log-probability of an
ending is divided by before the largest is taken. One scoring pass gives all three quotients.

    --style    text                                                               the number usually quoted
    lmeval     "activity: ctx_a Ctx_b", WikiHow's [title] marks cleaned away      acc, acc_norm (characters)
    nanogpt    the raw `ctx` (build-nanogpt, llm.c, modded-nanogpt)               acc_norm (tokens)

How it is made fast. The four endings share their context, so its first tokens run once and leave their keys and values
in a cache, of which each ending gets a copy; only the scored positions are multiplied with the head; and items of
similar length run together, padded on the right, where under a causal mask no scored token can see the padding.
"""
import argparse
import gzip
import hashlib
import json
import math
import os
import random
import re
import sys
import time
import zlib
from dataclasses import dataclass

import torch

from model import KVCache, choose_device, load_checkpoint
from prepare_fineweb import UserError, atomic_write, get_tokenizer

# --------------------------------------------------------------------------------------------------------------- 1 data



COMMIT = "a29ff8e9a04bba4bd6588223785ce105328adc57"
URL = f"https://raw.githubusercontent.com/rowanz/hellaswag/{COMMIT}/data/hellaswag_{{}}.jsonl"
OFFICIAL = {  # split: sha256; val's is that of git blob 0f5ee25d of that commit, train's is TensorFlow Datasets'
    "val": "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    "train": "dae5e69249868cb9fe4e23ff925c60b66169564cfb7072d793cd7356a2b69f8d",
}


def is_official(data, split):
    """Whether these bytes are the published file of the split, all of it."""
    return hashlib.sha256(data).hexdigest() == OFFICIAL[split]


def fetch(split, folder):
    """Path of the official file of a split, downloaded into `folder` if it is not there yet.

    It gets its name only after its checksum was right, so that half a download is never scored.
    """
    path = os.path.join(folder, f"hellaswag_{split}.jsonl")
    if not os.path.exists(path):
        data = download(URL.format(split))
        if not is_official(data, split):
            raise UserError(f"{URL.format(split)} sent {len(data)} bytes that are not the official file; try again")
        os.makedirs(folder, exist_ok=True)
        with atomic_write(path) as file:
            file.write(data)
    return path


def download(url):
    """The body behind a URL, as bytes."""
    import requests
    print(f"downloading {url}", flush=True)
    try:
        reply = requests.get(url, timeout=60)
        reply.raise_for_status()
        return reply.content
    except requests.RequestException as error:
        raise UserError(f"cannot download {url} ({type(error).__name__}); fetch it yourself and name it by "
                         "--data (validation) or --train") from None


def read_bytes(path):
    """The contents of a file, unpacked if it ends in .gz."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def read_split(split, path, folder):
    """Rows of the user's file `path`, or of the official one if it is ""; prints which. A damaged official one
    is refused."""
    name = path or fetch(split, folder)
    data = read_bytes(name)
    official = is_official(data, split)
    if not path and not official:
        raise UserError(f"{name} is not the official file any more; remove it and run again")
    print(f"{name}: {'the official' if official else 'not the official'} {split} file")
    return parse_rows(data, name)


def parse_rows(data, path):
    """The rows of a HellaSwag file as dicts with an integer label. UserError names the first bad line of `path`."""
    rows = [parse_row(line, f"{path}, line {n}") for n, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    if not rows:
        raise UserError(f"{path}: no items in it")
    return rows


def parse_row(line, place):
    """One line of a HellaSwag file -> dict."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not valid JSON ({error}); is the file cut off?") from None
    if problem := row_problem(row):
        raise UserError(f"{place}: {problem}")
    return {**row, "label": int(row["label"])}


def row_problem(row):
    """What keeps this JSON value from being a HellaSwag item, or None."""
    if not isinstance(row, dict):
        return "not a JSON object"
    for field in ("ctx", "ctx_a", "ctx_b", "activity_label"):
        if not isinstance(row.get(field), str):
            return f"{field!r} is missing or not a string"
    endings = row.get("endings")
    if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(ending, str) for ending in endings):
        return f"'endings' must be four strings, not {str(endings)[:60]}"
    if str(row.get("label")) not in ("0", "1", "2", "3"):
        return f"'label' must be 0, 1, 2 or 3, not {row.get('label')!r} (the test split has none)"


# ---------------------------------------------------------------------------------------------------------- 2 rendering

@dataclass(frozen=True)
class Item:
    """One question in tokens. A row the model sees is context + one of the endings; the ending is scored."""
    index: int                     # place in the file, from 0
    label: int                     # the true ending, 0 to 3
    context: list[int]
    endings: list[list[int]]       # four
    characters: list[int]          # of the four endings, without the space that joins them to the context


def clean(text):
    """lm-eval's removal of WikiHow's marks; the order of the steps matters, and "  " is halved once only."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def render_lmeval(row):
    """(context, four endings) as text, in lm-evaluation-harness's way."""
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return clean(context), [clean(ending) for ending in row["endings"]]


def render_nanogpt(row):
    """(context, four endings) as text, in build-nanogpt's way: as the file has them."""
    return row["ctx"], row["endings"]


def encode_jointly(tokenizer, context, endings):
    """lm-eval: an ending's tokens are what context + ending has beyond the context; spaces between are the ending's."""
    stem = tokenizer.encode(context.rstrip())
    return stem, [tokenizer.encode(f"{context} {ending}")[len(stem):] for ending in endings]


def encode_apart(tokenizer, context, endings):
    """build-nanogpt: context and ending are encoded each by itself."""
    return tokenizer.encode(context), [tokenizer.encode(f" {ending}") for ending in endings]


STYLES = {"lmeval": (render_lmeval, encode_jointly), "nanogpt": (render_nanogpt, encode_apart)}


def draw_examples(train_rows, rows, shots, seed=1234):
    """For each row the text of `shots` solved training rows, drawn as lm-eval draws them.

    One generator serves the whole task and moves on once per row, so a row's examples depend on its place alone. One
    more is drawn than is needed: the row itself is left out if it is among them, else the last.
    """
    if shots >= len(train_rows):
        raise UserError(f"{shots} examples cannot be drawn from {len(train_rows)} training items")
    generator = random.Random(seed)
    drawn = (generator.sample(train_rows, shots + 1) for _ in rows)
    return ["".join(solved_example(r) for r in [r for r in some if r != row][:shots]) for row, some in zip(rows, drawn)]


def solved_example(row):
    """Context and true ending of a training row, and the blank line that ends an example."""
    context, endings = render_lmeval(row)
    return f"{context} {endings[row['label']]}\n\n"


def make_items(rows, style="lmeval", examples=None):
    """Rows of a HellaSwag file -> list of Item. `examples` holds one text per row, put in front of its context.

    An ending's tokens depend on the item's own text alone: no GPT-2 token spans the line break before it.
    """
    render, encode = STYLES[style]
    tokenizer = get_tokenizer("gpt2")
    items = []
    for index, row in enumerate(rows):
        context, endings = render(row)
        stem, tokens = encode(tokenizer, context, endings)
        if examples:
            stem = tokenizer.encode(examples[index] + context.rstrip())
        items.append(Item(index, row["label"], stem or [tokenizer.eot], tokens, [max(1, len(e)) for e in endings]))
    return items


def load_items(data="", shots=0, style="lmeval", limit=None, train="", folder="data/hellaswag"):
    """Items ready to be scored, from a file or, with data="", from the official one, which is downloaded once.

    shots > 0 puts solved examples of the `train` file (or the official one) in front of each context.
    """
    rows = read_split("val", data, folder)[:limit]
    examples = draw_examples(read_split("train", train, folder), rows, shots) if shots else None
    return make_items(rows, style, examples)


# ------------------------------------------------------------------------------------------------------------ 3 scoring

GRID = 8                           # shared prefixes are multiples of this many tokens, so that many are equally long
HEAD_ROWS = 128                    # scored positions multiplied with the head at once: 26 MB of logits, few enough that
                                   # malloc keeps them; fresh pages for larger ones cost as much as a small model's work


@dataclass(frozen=True)
class Batch:
    """Items whose rows run together: the first `prefix` tokens once per item, then `width` tokens for each ending."""
    prefix: int
    width: int
    items: list[Item]

    def cost(self, extra=0):
        """Positions its rows would have without sharing, with `extra` items more; what memory is reckoned by."""
        return 4 * (len(self.items) + extra) * (self.prefix + self.width)


def shape_of(item, block_size):
    """(prefix, width) of an item. Its last context token is never in the prefix: its output predicts the ending.

    Where the longest row does not fit into block_size, each row loses tokens on its left, as in lm-eval, a different
    number each; such an item shares nothing.
    """
    longest = max(map(len, item.endings))
    if longest > block_size:
        raise UserError(f"item {item.index}: an ending of {longest} tokens does not fit into block_size={block_size}")
    length = len(item.context) + longest - 1                 # the last token of an ending predicts nothing
    prefix = (len(item.context) - 1) // GRID * GRID if length <= block_size else 0
    return prefix, min(block_size, length) - prefix


def plan(items, block_size, batch_tokens):
    """Batches of items of equal prefix and similar width, the costliest first, so that too large ones fail at once."""
    shaped = sorted(((*shape_of(item, block_size), item) for item in items), key=lambda shape: shape[:2], reverse=True)
    batches = []
    for prefix, width, item in shaped:
        if not batches or batches[-1].prefix != prefix or batches[-1].cost(extra=1) > batch_tokens:
            batches.append(Batch(prefix, width, []))
        batches[-1].items.append(item)
    return batches


def tail_rows(batch, block_size):
    """What follows the prefix: token rows (4 * items, width) padded on the right, and for each row (start, ending):
    the output at position start + i predicts token i of that ending."""
    idx = torch.zeros(4 * len(batch.items), batch.width, dtype=torch.long)
    spans = []
    for item in batch.items:
        for ending in item.endings:
            row = (item.context + ending)[-(block_size + 1):][:-1][batch.prefix:]
            idx[len(spans), :len(row)] = torch.tensor(row)
            spans.append((len(row) - len(ending), ending))
    return idx, spans


def score_batch(model, batch, device, dtype):
    """Summed log-probabilities (items, 4) of the endings, float64 on the CPU."""
    idx, spans = tail_rows(batch, model.config.block_size)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        hidden = model.trunk(idx.to(device), cache=prefix_cache(model, batch, device, dtype))
    picked = torch.cat([hidden[row, start:start + len(ending)] for row, (start, ending) in enumerate(spans)])
    targets = torch.tensor([token for _, ending in spans for token in ending], device=device)
    log_probs = token_log_probs(model, picked, targets).cpu().double()
    return torch.stack([part.sum() for part in log_probs.split([len(ending) for _, ending in spans])]).view(-1, 4)


def prefix_cache(model, batch, device, dtype):
    """Keys and values of the contexts' first tokens, one row for each ending; None if the batch shares no prefix."""
    if batch.prefix == 0:
        return None
    dtype = model.head.weight.dtype if dtype == torch.float32 else dtype
    cache = KVCache(model.config, len(batch.items), batch.prefix + batch.width, device, dtype)
    model.trunk(torch.tensor([item.context[:batch.prefix] for item in batch.items], device=device), cache=cache)
    return cache.repeat(4)


def token_log_probs(model, hidden, targets):
    """log p(target) for hidden states (N, C) and targets (N,), in float32, a slice of positions at a time."""
    parts = []
    for h, t in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS)):
        logits = model.logits(h.to(model.head.weight.dtype)).float()
        parts.append(logits.gather(1, t[:, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(parts)


def check_model(model):
    """UserError if the model's token ids are not GPT-2's."""
    config = model.config
    if config.tokenizer != "gpt2":
        raise UserError(f"HellaSwag is scored in GPT-2 tokens; this model's tokenizer is {config.tokenizer!r}")
    if config.vocab_size < 50257:
        raise UserError(f"HellaSwag needs GPT-2's 50,257 token ids; this model knows {config.vocab_size:,}")


@torch.no_grad()
def score(model, items, batch_tokens=8192, dtype=torch.float32, progress=None):
    """Summed log-probabilities (len(items), 4) of the endings, float64 on the CPU.

    model         an ExoFormer, not compiled; its train/eval mode is restored and no random number is drawn
    batch_tokens  positions in one batch, counting a shared prefix four times
    dtype         torch.float32, or torch.bfloat16 to run the layers under autocast (log-probabilities stay float32)
    progress      called after each batch with (items done, all items, positions done, all positions)
    """
    check_model(model)
    device, was_training = next(model.parameters()).device, model.training
    batches = plan(items, model.config.block_size, batch_tokens)
    scores, done, total = {}, 0, sum(batch.cost() for batch in batches)
    model.eval()
    try:
        for batch in batches:
            with torch.autocast(device.type, enabled=False):                   # whatever the caller runs under
                scores.update(zip((item.index for item in batch.items), score_batch(model, batch, device, dtype)))
            done += batch.cost()
            if progress:
                progress(len(scores), len(items), done, total)
    finally:
        model.train(was_training)
    result = torch.stack([scores[item.index] for item in items])
    if not result.isfinite().all():
        raise UserError("the model gives log-probabilities that are not finite; its weights are damaged")
    return result


# --------------------------------------------------------------------------------------------------------- 4 statistics

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
    """{metric: accuracy, metric_stderr: its standard error, "items": how many}; sample variance, as in lm-eval."""
    n, result = len(items), {"items": len(items)}
    for metric, choice in predicted.items():
        mean = sum(int(c) == item.label for c, item in zip(choice, items)) / n
        result[metric], result[f"{metric}_stderr"] = mean, math.sqrt(mean * (1 - mean) / max(1, n - 1))
    return result


def evaluate(model, items, batch_tokens=8192, dtype=torch.float32, progress=None):
    """What train.py calls: `score`, then `accuracy`. Arguments as in `score`."""
    return accuracy(items, predictions(items, score(model, items, batch_tokens, dtype, progress)))


def mcnemar(only_a, only_b):
    """Exact two-sided p-value: the chance that fair coins split only_a + only_b items at least as unevenly."""
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2 ** n)


def paired(right_a, right_b):
    """Compare two lists of 0 and 1 on the same items: mean of b - a, its 95 % interval, and who alone was right."""
    n, differences = len(right_a), [b - a for a, b in zip(right_a, right_b)]
    mean = sum(differences) / n
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / max(1, n - 1) / n)
    only_a, only_b = differences.count(-1), differences.count(1)
    return {"difference": mean, "low": mean - 1.96 * error, "high": mean + 1.96 * error,
            "only_a": only_a, "only_b": only_b, "p": mcnemar(only_a, only_b)}


# ------------------------------------------------------------------------------------------------------- 5 command line

def item_lines(items, scores, predicted):
    """The lines of --out: one JSON object per item."""
    for row, (item, values) in enumerate(zip(items, scores.tolist())):
        yield json.dumps({"index": item.index, "label": item.label, "scores": values,
                          **{metric: int(choice[row]) for metric, choice in predicted.items()}})


def read_results(path):
    """{index: record} of a file written with --out."""
    records = {}
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        try:
            record = json.loads(line)
            records[record["index"]] = {"label": record["label"], **{metric: record[metric] for metric in METRICS}}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: not a line of --out ({error})") from None
    if not records:
        raise UserError(f"{path}: no items in it")
    return records


def compare(path_a, path_b):
    """Print the paired difference of two --out files for each metric."""
    a, b = read_results(path_a), read_results(path_b)
    if {i: r["label"] for i, r in a.items()} != {i: r["label"] for i, r in b.items()}:
        raise UserError(f"{path_a} ({len(a)} items) and {path_b} ({len(b)} items) do not hold the same items")
    print(f"A = {path_a}\nB = {path_b}\n{len(a)} items")
    for metric in METRICS:
        right_a, right_b = ([int(r[i][metric] == r[i]["label"]) for i in sorted(a)] for r in (a, b))
        c = paired(right_a, right_b)
        print(f"{metric:16} A {sum(right_a) / len(a):6.2%}  B {sum(right_b) / len(a):6.2%}  "
              f"B - A {100 * c['difference']:+.2f} points, 95 % interval [{100 * c['low']:+.2f}, "
              f"{100 * c['high']:+.2f}]; right alone: A {c['only_a']}, B {c['only_b']}; McNemar exact p = {c['p']:.3g}")


class Progress:
    """Prints items done, rate and time left, every few seconds at most; time is judged by positions, not items."""

    def __init__(self, every=5.0):
        self.start = self.said = time.time()
        self.every = every

    def __call__(self, items, all_items, tokens, all_tokens):
        now = time.time()
        if now - self.said >= self.every:
            spent = now - self.start
            left = spent * (all_tokens / tokens - 1)
            print(f"{items}/{all_items} items, {items / spent:.1f} items/s, {left:.0f} s left", flush=True)
            self.said = now


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description="HellaSwag accuracy of a checkpoint, or a comparison of two results.")
    parser.add_argument("--ckpt", help="checkpoint to score: one of train.py, or one released with the paper")
    parser.add_argument("--shots", type=int, default=0, help="solved examples in front of each item; the paper uses 5")
    parser.add_argument("--style", choices=STYLES, default="lmeval", help="how items become text")
    parser.add_argument("--limit", type=int, help="score the first LIMIT items only")
    parser.add_argument("--data", default="", help="items, .jsonl or .jsonl.gz; default: the official file, downloaded")
    parser.add_argument("--train", default="", help="where examples come from; default: the official file, downloaded")
    parser.add_argument("--folder", default="data/hellaswag", help="where downloaded files are kept")
    parser.add_argument("--out", help="write label, scores and predictions of every item to this .jsonl file")
    parser.add_argument("--batch_tokens", type=int, default=8192, help="positions in one batch; fewer need less memory")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="precision of the layers")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="compare two files written with --out, and stop")
    args = parser.parse_args(argv)
    if not args.ckpt and not args.compare:
        parser.error("give --ckpt=PATH or --compare A B")
    if args.shots < 0 or args.batch_tokens < 1 or (args.limit is not None and args.limit < 1):
        parser.error("--shots must not be negative; --batch_tokens and --limit must be at least 1")
    if args.shots and args.style == "nanogpt":
        parser.error("--style=nanogpt has no examples; use --shots=0")
    return args


def run(args):
    """Score a checkpoint, print the accuracies, write --out."""
    if args.out and not os.access(os.path.dirname(args.out) or ".", os.W_OK):
        raise UserError(f"--out={args.out}: its folder does not exist or cannot be written")      # not after the work
    device = choose_device(args.device, among=("cuda", "cpu"))
    model = load_checkpoint(args.ckpt, device)
    check_model(model)
    items = load_items(args.data, args.shots, args.style, args.limit, args.train, args.folder)
    start = time.time()
    scores = score(model, items, args.batch_tokens, getattr(torch, args.dtype), Progress())
    seconds, predicted = time.time() - start, predictions(items, scores)
    if args.out:
        with atomic_write(args.out) as file:
            file.writelines(f"{line}\n".encode() for line in item_lines(items, scores, predicted))
    report(args, model, items, accuracy(items, predicted), seconds, device)


def report(args, model, items, result, seconds, device):
    """Print the three accuracies with the convention they follow."""
    cut = sum(len(item.context) + max(map(len, item.endings)) - 1 > model.config.block_size for item in items)
    print(f"HellaSwag, {args.style} rendering, {args.shots}-shot, {len(items)} items, {args.dtype} on {device}"
          + (f"; {cut} contexts cut on the left to block_size={model.config.block_size}" if cut else ""))
    for metric, divisor in METRICS.items():
        print(f"{metric:16} {result[metric]:6.2%} +- {result[metric + '_stderr']:.2%}   log-probability / {divisor}")
    print(f"{len(items) / seconds:.1f} items/s, {seconds:.1f} s")


def main(argv=None):
    args = parse_arguments(argv)
    try:
        compare(*args.compare) if args.compare else run(args)
    except torch.OutOfMemoryError:
        sys.exit(f"eval_hellaswag.py: the GPU's memory is full; halve --batch_tokens={args.batch_tokens}")
    except UserError as error:
        sys.exit(f"eval_hellaswag.py: {error}")


if __name__ == "__main__":
    main()
