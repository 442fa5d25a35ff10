#!/usr/bin/env python3
"""Times PEFT's `svd` combination and mergekit's arithmetic on the adapters of one layer.

PEFT: `add_weighted_adapter(combination_type="svd")` at the adapters' rank. mergekit: its own functions for task arithmetic
and TIES (density 0.2, sign by sum) on the layer's dense updates, which mergekit-pytorch would read as merged models.
Prints one JSON line: seconds of each, versions.

    fuse_layer.py --adapters DIR... --threads 2 --methods svd,task-arithmetic,ties
"""

import argparse
import json
import time
from importlib import metadata

import peft
import torch
from mergekit.merge_methods.generalized_task_arithmetic import get_mask
from mergekit.sparsify import SparsificationMethod, sparsify
from safetensors.torch import load_file

TARGETS = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}


class Layer(torch.nn.Module):
    """The seven linears of a layer under the names that the adapters know."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Module()
        layer = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList([layer])
        for name, (out, inner) in TARGETS.items():
            block, linear = name.split(".")
            if not hasattr(layer, block):
                setattr(layer, block, torch.nn.Module())
            setattr(getattr(layer, block), linear, torch.nn.Linear(inner, out, bias=False))

    def prepare_inputs_for_generation(self):
        """PEFT asks every causal model whether it has this, and nothing is generated."""


def svd(paths):
    """Seconds of the combination alone; loading is not counted."""
    with torch.no_grad():
        model = peft.PeftModel.from_pretrained(Layer(), paths[0], adapter_name="0")
        for e, path in enumerate(paths[1:], 1):
            model.load_adapter(path, adapter_name=str(e))
        names = [str(e) for e in range(len(paths))]
        start = time.perf_counter()
        model.base_model.add_weighted_adapter(names, [1 / len(names)] * len(names), "fused", combination_type="svd")
        return time.perf_counter() - start


def dense(paths, ties):
    """Seconds of mergekit's arithmetic over the dense updates, the updates' own products counted too."""
    files = [load_file(f"{path}/adapter_model.safetensors") for path in paths]
    scales = []
    for path in paths:
        config = json.load(open(f"{path}/adapter_config.json"))
        scales.append(config["lora_alpha"] / config["r"])
    total = 0.0
    for name, shape in TARGETS.items():
        key = f"base_model.model.model.layers.0.{name}"
        start = time.perf_counter()
        deltas = torch.empty(len(files), *shape)
        for e, (file, scale) in enumerate(zip(files, scales)):
            delta = scale * file[f"{key}.lora_B.weight"] @ file[f"{key}.lora_A.weight"]
            if ties:
                delta = sparsify(delta, density=0.2, method=SparsificationMethod.magnitude, rescale_norm=None)
            deltas[e] = delta
        weights = torch.full((len(files), 1, 1), 1 / len(files))
        deltas.mul_(weights)
        if ties:
            mask = get_mask(deltas, method="sum", mask_dtype=deltas.dtype)
            mixed, divisor = (deltas * mask).sum(dim=0), (weights * mask).sum(dim=0)
            divisor[divisor == 0] = 1
            mixed /= divisor
        else:
            mixed = deltas.sum(dim=0)
        total += time.perf_counter() - start
        del deltas, mixed
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", nargs="+", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", default="svd,task-arithmetic,ties")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    how = {
        "svd": lambda: svd(args.adapters),
        "task-arithmetic": lambda: dense(args.adapters, False),
        "ties": lambda: dense(args.adapters, True),
    }
    seconds = {method: how[method]() for method in args.methods.split(",")}
    versions = {name: metadata.version(name) for name in ("torch", "peft", "mergekit")}
    print(json.dumps({"seconds": seconds, "versions": versions}))


main()
