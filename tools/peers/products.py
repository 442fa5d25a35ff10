#!/usr/bin/env python3
"""The products of our bench in PyTorch: F.linear of a frozen weight, PEFT's LoRA linear, and their backward passes.

Reads the names of our cases, so that both sides measure the same shapes, and prints the seconds of each under its name.
Weights are what a pruned checkpoint gives: rows as wide as they are, not padded, in the dtype of the activations.
Whether ours are packed before is no matter of theirs. Adapters are f32, of bf16 under autocast, as PEFT makes them.

    products.py --cases ours.json [--device cuda]
"""

import peft
import torch
import torch.nn.functional as F

import timing

NAME = r"(linear|linear_bwd)/(\d+)×(\d+)→([\d+]+), (?:frozen|rank (\d+))(, dropout)?(?:, packed)?, (BF16|F32)$"


class Linears(torch.nn.Module):
    """Linears that read one x."""

    def __init__(self, inner, outs, dtype, device):
        super().__init__()
        made = [torch.nn.Linear(inner, out, bias=False, dtype=dtype, device=device) for out in outs]
        self.linears = torch.nn.ModuleList(made)

    def forward(self, x):
        ys = [linear(x) for linear in self.linears]
        # Two outputs of one width are gate and up.
        if len(ys) == 2 and ys[0].shape == ys[1].shape:
            return ys + [F.silu(ys[0]) * ys[1]]
        return ys


def case(kind, tokens, inner, outs, rank, dropout, dtype, device):
    """What is timed, as a call."""
    model = Linears(inner, outs, dtype, device)
    if rank:
        config = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.1 if dropout else 0.0, init_lora_weights=False,
            target_modules=[f"linears.{n}" for n in range(len(outs))],
        )
        model = peft.get_peft_model(model, config).train()
    else:
        model.requires_grad_(False)
    x = torch.randn(tokens, inner, device=device, dtype=dtype)
    autocast = torch.autocast(device, torch.bfloat16, enabled=rank > 0 and dtype == torch.bfloat16)
    if kind == "linear":

        def forward():
            with torch.no_grad(), autocast:
                model(x)

        return forward
    # The gradient comes to the outputs themselves, to gate and up and not to what is made of them.
    x.requires_grad_(True)
    with autocast:
        ys = model(x)[: len(outs)]
    dys = [torch.randn_like(y) for y in ys]
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(ys, wanted, dys, retain_graph=True)


def main():
    args = timing.arguments(__doc__, cases=True)
    cases = []
    for name, (kind, tokens, inner, outs, rank, dropout, dtype) in timing.asked(args.cases, NAME):
        outs = [int(o) for o in outs.split("+")]
        dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[dtype]
        run = case(kind, int(tokens), int(inner), outs, int(rank or 0), bool(dropout), dtype, args.device)
        cases.append({"case": name, **timing.attempt(run, args.device)})
        del run
    sides = [64] if args.device == "cpu" else [4096, 8192]
    for side in sides:
        x, w = (torch.randn(side, side, device=args.device, dtype=torch.bfloat16) for _ in range(2))
        cases.append({"case": f"square/{side}", **timing.attempt(lambda: F.linear(x, w), args.device)})
    timing.report(args.device, cases, peft=peft.__version__)


main()
