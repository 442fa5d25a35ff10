#!/usr/bin/env python3
"""Recovery of a pruned adapter and LoRA-CR of two from their factors, in PyTorch: rank 8 on the seven linears of every
layer of LLaMA-3-8B (0.6 pruned for the recovery).

    adapters.py [--device cuda] [--toy]
"""

import torch

import timing

RANK, EDGES = 8, 2


def linears(width, head, heads, groups, mlp):
    """(O, I) of a layer's linears."""
    q, kv = heads * head, groups * head
    return [(q, width), (kv, width), (kv, width), (width, q), (mlp, width), (mlp, width), (width, mlp)]


def recovery(full, pruned, device):
    """A call that puts each factor's kept rows or columns into zeros, as users write it: one tensor after the other."""
    work = []
    for (o, i), (kept_o, kept_i) in zip(full, pruned):
        a, b = torch.randn(RANK, kept_i, device=device), torch.randn(kept_o, RANK, device=device)
        columns = torch.arange(kept_i, device=device) * i // kept_i
        rows = torch.arange(kept_o, device=device) * o // kept_o
        work.append((a, columns, i, b, rows, o))

    def run():
        for a, columns, i, b, rows, o in work:
            torch.zeros(RANK, i, device=device).index_copy_(1, columns, a)
            torch.zeros(o, RANK, device=device).index_copy_(0, rows, b)

    return run


def resolution(full, device):
    """A call that resolves all modules in f64: Grams and maps one module after the other, the eigenproblems in one batch."""
    p = EDGES * RANK
    factors = [
        (torch.randn(o, p, device=device, dtype=torch.float64), torch.randn(p, i, device=device, dtype=torch.float64))
        for o, i in full
    ]
    own = torch.block_diag(*[torch.ones(RANK, RANK)] * EDGES).to(device, torch.float64)

    def run():
        gb = torch.stack([b.T @ b for b, _ in factors])
        ga = torch.stack([a @ a.T for _, a in factors])
        values, vectors = torch.linalg.eigh(gb)
        root = values.clamp_min(1e-300).sqrt()
        r = root[:, :, None] * vectors.mT
        _, e = torch.linalg.eigh(r @ (ga * own) @ r.mT)
        basis, coords = (vectors / root[:, None, :]) @ e, e.mT @ r
        split = coords.unflatten(2, (EDGES, RANK))
        h = torch.einsum("mkir,mirjs,mkjs->mkij", split, ga.unflatten(1, (EDGES, RANK)).unflatten(3, (EDGES, RANK)), split)
        size = h.diagonal(dim1=2, dim2=3).clamp_min(1e-300).sqrt()
        share = size / size.sum(2, keepdim=True)
        along = (h * share[..., None, :]).sum(3)
        consensus = (share * along).sum(2, keepdim=True).clamp_min(1e-300).sqrt()
        cosine = along / (size * consensus)
        conflict = (share * (1 - cosine)).sum(2, keepdim=True) / 2
        gate = (1 - conflict) * cosine.clamp_min(0)
        maps = basis @ (gate.repeat_interleave(RANK, 2) * coords)
        return [b @ w for (b, _), w in zip(factors, maps)]

    return run


def main():
    args = timing.arguments(__doc__)
    if args.toy:
        layers, full, pruned = 2, linears(64, 16, 4, 2, 224), linears(64, 16, 2, 1, 89)
    else:
        layers, full, pruned = 32, linears(4096, 128, 32, 8, 14336), linears(4096, 128, 16, 4, 5734)
    full, pruned = full * layers, pruned * layers
    cases = [
        {"case": "scatter", **timing.attempt(recovery(full, pruned, args.device), args.device)},
        {"case": "lora_cr", **timing.attempt(resolution(full, args.device), args.device)},
    ]
    timing.report(args.device, cases)


main()
