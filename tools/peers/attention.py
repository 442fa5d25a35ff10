#!/usr/bin/env python3
"""The attention cases of our bench with PyTorch's scaled_dot_product_attention, its flash back end, causal, grouped heads.

    attention.py --cases ours.json [--device cuda]
"""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import timing

NAME = r"(attention|attention_bwd)/(\d+) documents of up to (\d+), (\d+)/(\d+) heads of (\d+), BF16$"


def main():
    args = timing.arguments(__doc__, cases=True)
    cases = []
    for name, (kind, *sizes) in timing.asked(args.cases, NAME):
        documents, length, heads, groups, width = map(int, sizes)
        grad = kind == "attention_bwd"

        def made(n):
            return torch.randn(
                documents, n, length, width, device=args.device, dtype=torch.bfloat16, requires_grad=grad
            )

        q, k, v = made(heads), made(groups), made(groups)

        def forward():
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        if grad:
            try:
                o = forward()
            except RuntimeError as error:
                cases.append({"case": name, "failed": str(error).splitlines()[0]})
                continue
            do = torch.randn_like(o)
            cases.append({"case": name, **timing.attempt(
                lambda: torch.autograd.grad(o, [q, k, v], do, retain_graph=True), args.device
            )})
        else:
            cases.append({"case": name, **timing.attempt(forward, args.device)})
    timing.report(args.device, cases)


main()
