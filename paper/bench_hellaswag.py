"""Speed of eval_hellaswag.score beside a plain loop over the items: `python paper/bench.py hellaswag --data=FILE`."""
import os
import random
import statistics
import sys
import time

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import eval_hellaswag
from model import ExoFormer, variant_config


def plain_scores(model, item):
    """One item alone: four rows padded to the longest, all logits, log-softmax of all of them. (4,)"""
    rows = [item.context + ending for ending in item.endings]
    idx = torch.zeros(4, max(map(len, rows)), dtype=torch.long)
    scored = torch.zeros(idx.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        idx[i, :len(row)] = torch.tensor(row)
        scored[i, len(item.context):len(row)] = True
    log_probs = torch.log_softmax(model(idx)[:, :-1].float(), dim=-1)
    picked = log_probs.gather(2, idx[:, 1:, None])[..., 0]
    return torch.where(scored[:, 1:], picked, 0).double().sum(-1)


@torch.no_grad()
def bench_hellaswag(args):
    """Print and return items/s of both on the same items and model, timed in turns; fails where their scores differ."""
    torch.manual_seed(0)
    model = ExoFormer(variant_config(args.variant, n_layer=args.n_layer, n_embd=args.n_embd, n_head=args.n_embd // 64,
                                     vocab_size=50257)).eval()
    torch.nn.init.normal_(model.head.weight, std=0.02)
    rows = eval_hellaswag.read_split("val", args.data)
    rows = random.Random(0).sample(rows, min(args.items, len(rows)))
    examples = eval_hellaswag.draw_examples(rows, rows, args.shots) if args.shots else None
    items = eval_hellaswag.make_items(rows, examples=examples)
    ways = {"plain": lambda: torch.stack([plain_scores(model, item) for item in items]),
            "ours": lambda: eval_hellaswag.score(model, items)}
    seconds = {name: [] for name in ways}
    for _ in range(args.rounds):
        scores = {}
        for name, way in ways.items():
            start = time.perf_counter()
            scores[name] = way()
            seconds[name].append(time.perf_counter() - start)
        torch.testing.assert_close(scores["ours"], scores["plain"], rtol=1e-5, atol=1e-3)
    rate = {name: len(items) / statistics.median(taken) for name, taken in seconds.items()}
    print(f"hellaswag  {args.variant}, {args.n_layer} layers of {args.n_embd}, {args.shots}-shot, {len(items)} items, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}: plain loop {rate['plain']:.2f} items/s, "
          f"eval_hellaswag {rate['ours']:.2f} items/s, {rate['ours'] / rate['plain']:.2f} times as many")
    return rate


def add_hellaswag_parser(commands):
    """The sub-command `hellaswag` of paper/bench.py."""
    parser = commands.add_parser("hellaswag", help="HellaSwag items/s beside the plain loop")
    parser.add_argument("--variant", default="base", help="row of Table 3 that gives the architecture")
    parser.add_argument("--n_layer", type=int, default=4, help="layers")
    parser.add_argument("--n_embd", type=int, default=256, help="width")
    parser.add_argument("--data", default="", help="HellaSwag items, .jsonl or .jsonl.gz; default: the official file")
    parser.add_argument("--items", type=int, default=40, help="how many of them, drawn at random")
    parser.add_argument("--shots", type=int, default=0, help="solved examples in front of each, from the same items")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions; the median counts")
    parser.set_defaults(run=bench_hellaswag)
