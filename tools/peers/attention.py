#!/usr/bin/env python3
"""The attention cases of our bench with PyTorch's scaled_dot_product_attention, its flash back end, causal, grouped heads.

    attention.py --cases ours.json [--device cuda]
"""

import argparse
import json
import re

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import timing

NAME = re.compile(r"(attention|attention_bwd)/(\d+) documents of up to (\d+), (\d+)/(\d+) heads of (\d+), BF16$")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    args = parser.parse_args()
    torch.manual_seed(0)
    cases = []
    for name in (row["case"] for row in json.load(open(args.cases))["cases"]):
        found = NAME.search(name)
        if not found:
            continue
        kind, *sizes = found.groups()
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
