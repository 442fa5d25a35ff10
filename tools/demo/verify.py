"""Runs the flow of the demo in PyTorch on the shipped files, and checks the accuracies that the demo is to reach.

Prune by first-order Taylor scores, train a LoRA adapter for each domain and one on each pair's pooled data, recover
them to full width, fuse, and evaluate. It reads nothing but the files of `assets/demo`, so what it measures is them.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import model
from base import accuracy
from model import FFN, HEAD_DIM, HEADS, KV_HEADS, LAYERS, LINEARS, SHAPES
from world import BOS, DOMAINS, EOS, PAIRS, encode

RANK, ALPHA = 8, 16
SCALE = ALPHA / RANK


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# Pruning ------------------------------------------------------------------------------------------------------------


def importance(p, documents):
    """Taylor scores sum |w g| of every kv group and every channel, a pair for each layer."""
    p = {k: v.clone().requires_grad_() for k, v in p.items()}
    ids = model.pad(documents)
    logits = model.forward(p, ids[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0).backward()
    scores = []
    for l in range(LAYERS):
        s = {n: (p[f"{l}.{n}"] * p[f"{l}.{n}"].grad).abs().detach() for n in LINEARS}
        narrow = s["k"].sum(1) + s["v"].sum(1)
        wide = s["q"].sum(1) + s["o"].sum(0)
        heads = narrow.view(KV_HEADS, -1).sum(1) + wide.view(KV_HEADS, -1).sum(1)
        scores.append((heads, s["gate"].sum(1) + s["up"].sum(1) + s["down"].sum(0)))
    return scores


def kept(scores, ratio):
    """Rows or columns to keep: for each layer {linear: (axis, indices)}."""
    heads = KV_HEADS - (KV_HEADS * HEAD_DIM - math.trunc(KV_HEADS * HEAD_DIM * (1 - ratio))) // HEAD_DIM
    channels = math.trunc(FFN * (1 - ratio))
    wide, plans = HEADS // KV_HEADS * HEAD_DIM, []
    for head_scores, channel_scores in scores:
        g = head_scores.argsort(descending=True)[:heads].sort().values
        m = channel_scores.argsort(descending=True)[:channels].sort().values
        kv = (g[:, None] * HEAD_DIM + torch.arange(HEAD_DIM)).flatten()
        q = (g[:, None] * wide + torch.arange(wide)).flatten()
        plans.append({"q": (0, q), "k": (0, kv), "v": (0, kv), "o": (1, q), "gate": (0, m), "up": (0, m), "down": (1, m)})
    return plans


def prune(p, plans):
    small = dict(p)
    for l, plan in enumerate(plans):
        for n, (axis, indices) in plan.items():
            small[f"{l}.{n}"] = p[f"{l}.{n}"].index_select(axis, indices)
    return small


# Training -----------------------------------------------------------------------------------------------------------


def common_a(seed):
    """The common start A₀ at full width, PEFT's U(−1/√I, 1/√I)."""
    g = torch.Generator().manual_seed(seed)
    return {
        (l, n): (torch.rand(RANK, SHAPES[n][1], generator=g) * 2 - 1) / math.sqrt(SHAPES[n][1])
        for l in range(LAYERS)
        for n in LINEARS
    }


def train(p, plans, items, a0, steps, size, rate, warmup=20, seed=0):
    """A LoRA adapter for the pruned model `p`: `steps` of `size` items, shuffled anew in each epoch; loss on completions."""
    lora = {}
    for (l, n), a in a0.items():
        axis, indices = plans[l][n]
        a = a.index_select(1, indices) if axis == 1 else a.clone()
        lora[l, n] = (a.requires_grad_(), torch.zeros(p[f"{l}.{n}"].shape[0], RANK, requires_grad=True))
    parameters = [x for pair in lora.values() for x in pair]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    documents = [([BOS] + encode(x["prompt"]), encode(x["completion"]) + [EOS]) for x in items]
    draw, queue, losses = random.Random(seed), [], []
    for step in range(steps):
        if len(queue) < size:
            queue += draw.sample(documents, len(documents))
        batch, queue = queue[:size], queue[size:]
        now = step / warmup if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate * now
        rows, columns, targets = [], [], []
        for i, (prompt, completion) in enumerate(batch):
            for j, token in enumerate(completion):
                rows.append(i)
                columns.append(len(prompt) - 1 + j)
                targets.append(token)
        ids = model.pad([prompt + completion[:-1] for prompt, completion in batch])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.forward(p, ids, lora, SCALE, rows=(torch.tensor(rows), torch.tensor(columns)))
        loss = F.cross_entropy(logits.float(), torch.tensor(targets))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return {k: (a.detach(), b.detach()) for k, (a, b) in lora.items()}, losses


def recover(lora, plans):
    """The adapter at full width: zeros where the pruned model had nothing."""
    full = {}
    for (l, n), (a, b) in lora.items():
        axis, indices = plans[l][n]
        if axis == 0:
            full[l, n] = (a, torch.zeros(SHAPES[n][0], RANK).index_copy(0, indices, b))
        else:
            full[l, n] = (torch.zeros(RANK, SHAPES[n][1]).index_copy(1, indices, a), b)
    return full


# Fusion -------------------------------------------------------------------------------------------------------------


def merged(p, updates):
    """The model with dense updates {(layer, linear): ΔW} added."""
    return p | {f"{l}.{n}": p[f"{l}.{n}"] + update for (l, n), update in updates.items()}


def product(lora, weight=1.0):
    return {k: weight * SCALE * b @ a for k, (a, b) in lora.items()}


def exact_sum(one, other, weight=1.0):
    first, second = product(one, weight), product(other, weight)
    return {k: first[k] + second[k] for k in first}


def factor_mean(one, other):
    """FedAvg of the factors: the product of the mean factors."""
    mean = {k: ((one[k][0] + other[k][0]) / 2, (one[k][1] + other[k][1]) / 2) for k in one}
    return product(mean)


def on_common_a(one, other, a0):
    """FFA's form: the mean B on the common A₀."""
    return product({k: (a0[k], (one[k][1] + other[k][1]) / 2) for k in one})


# The flow -----------------------------------------------------------------------------------------------------------


def questions(assets, name):
    return [(x["prompt"], x["answer"]) for x in read(assets / f"{name}.jsonl")]


def run(assets, ratio, steps, size, rate, seed, pairs, samples=32, joint_steps=None, log=print):
    """The whole flow; returns {row: {task: accuracy in per cent}}."""
    p = model.load(assets / "base")
    documents = [[BOS] + encode(x["text"]) + [EOS] for x in read(assets / "calibration.jsonl")[:samples]]
    plans = kept(importance(p, documents), ratio)
    small, a0, rows = prune(p, plans), common_a(seed), {}

    def mark(row, weights, *tasks):
        rows[row] = {t: 100 * accuracy(weights, questions(assets, t)) for t in tasks}
        log(f"{row:40s}" + "  ".join(f"{t} {v:.1f}" for t, v in rows[row].items()))

    domains = [d for d in DOMAINS if any(d in pair for pair in pairs)]
    own = [name for d in domains for name in (d, f"{d}.true")]
    names = ["_".join(pair) for pair in pairs]
    mark("base", p, *own, *names, "general")
    mark("pruned base", small, "general")
    data = {d: read(assets / f"{d}.train.jsonl") for d in domains}

    def edge(name, items, steps, *tasks):
        begun = time.time()
        lora, losses = train(small, plans, items, a0, steps, size, rate, seed=seed)
        log(f"{name}: {time.time() - begun:.0f} s, loss {losses[0]:.2f} … {sum(losses[-10:]) / 10:.3f}")
        full = recover(lora, plans)
        mark(f"{name}, on the pruned model", merged(small, product(lora)), *tasks)
        mark(f"{name}, recovered", merged(p, product(full)), *tasks)
        return full

    edges = {d: edge(d, data[d], steps, d, f"{d}.true", *[n for n in names if d in n], "general") for d in domains}
    for one, other in pairs:
        tasks = (f"{one}_{other}", one, other, "general")
        name, a, b = tasks[0], edges[one], edges[other]
        mark(f"{name}: mean of factors", merged(p, factor_mean(a, b)), *tasks)
        mark(f"{name}: mean of B on the common A", merged(p, on_common_a(a, b, a0)), *tasks)
        mark(f"{name}: exact mean", merged(p, exact_sum(a, b, 0.5)), *tasks)
        mark(f"{name}: exact sum", merged(p, exact_sum(a, b)), *tasks)
        if joint_steps != 0:
            edge(f"{name}: joint", data[one] + data[other], joint_steps or 2 * steps, *tasks)
    return rows


def failures(rows, pairs):
    """What of the acceptance does not hold, as sentences."""
    base, wrong = rows["base"], []

    def at_least(what, value, limit):
        if not value >= limit:
            wrong.append(f"{what}: {value:.1f}, expected at least {limit:.1f}")

    at_least("base, general", base["general"], 97)
    at_least("pruned base, general", rows["pruned base"]["general"], 90)
    for d in {d for pair in pairs for d in pair}:
        at_least(f"base, 40 less {d}", 40 - base[d], 0)
        edge = rows[f"{d}, recovered"]
        at_least(f"{d}, own", edge[d], base[d] + 25)
        at_least(f"{d}, own which-is-true", edge[f"{d}.true"], base[f"{d}.true"] + 30)
    for name in map("_".join, pairs):
        at_least(f"base, 35 less {name}", 35 - base[name], 0)
        at_least(f"{name}, exact sum", rows[f"{name}: exact sum"][name], base[name] + 25)
        if f"{name}: joint, recovered" in rows:
            at_least(f"{name}, joint", rows[f"{name}: joint, recovered"][name], 85)
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path(__file__).parents[2] / "assets" / "demo")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--joint-steps", type=int, help="default: twice --steps; 0: no joint adapter")
    parser.add_argument("--items", type=int, default=48, help="items in a step")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=len(PAIRS), help="how many of the pairs")
    parser.add_argument("--samples", type=int, default=32, help="calibration documents")
    parser.add_argument("--threads", type=int, default=2)
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    log = lambda line: print(line, flush=True)
    pairs = PAIRS[: o.pairs]
    rows = run(o.assets, o.ratio, o.steps, o.items, o.rate, o.seed, pairs, o.samples, o.joint_steps, log)
    wrong = failures(rows, pairs)
    print("\n".join(wrong) or "all accuracies hold")
    raise SystemExit(bool(wrong))
