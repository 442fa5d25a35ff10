#!/usr/bin/env python3
"""Writes a LLaMA with random bf16 weights and data of known tokens: what a training step is timed with.

The weights are made on the device and go to the file tensor by tensor. Default: LLaMA-3-8B pruned by 0.6, 8 GB.

    random_model.py --out DIR [--device cuda] [--toy]
"""

import argparse
import json
import math
import pathlib
import struct
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "golden"))
import seeded  # noqa: E402

FULL = {"hidden_size": 4096, "head_dim": 128, "num_attention_heads": 16, "num_key_value_heads": 4,
        "intermediate_size": 5734, "num_hidden_layers": 32, "vocab_size": 128256}
TOY = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
       "intermediate_size": 89, "num_hidden_layers": 2, "vocab_size": 300}
COMMON = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
          "rope_theta": 500000.0, "max_position_embeddings": 8192, "tie_word_embeddings": False, "bos_token_id": 1,
          "eos_token_id": 2, "torch_dtype": "bfloat16"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--rows", type=int, default=64, help="lines of data")
    parser.add_argument("--seq", type=int, default=2048, help="tokens of a line")
    parser.add_argument("--toy", action="store_true", help="a model for a machine without a GPU")
    args = parser.parse_args()
    config = {**COMMON, **(TOY if args.toy else FULL)}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "config.json").write_text(json.dumps(config, indent=1))
    seeded.write_tokenizer(args.out, config["vocab_size"])
    header, at = {"__metadata__": {"format": "pt"}}, 0
    tensors = [(name, shape, mean) for name, shape, mean, _ in seeded.shapes(config)]
    for name, shape, _ in tensors:
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    torch.manual_seed(0)
    with open(args.out / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, shape, mean in tensors:
            std = 0.0 if mean else 0.02
            values = torch.randn(shape, device=args.device).mul_(std).add_(mean).bfloat16()
            file.write(values.view(torch.int16).cpu().numpy().data)
    with open(args.out / "data.jsonl", "w") as file:
        for row in range(args.rows):
            inner = [3 + i for i in seeded.ids(0, f"row.{row}", args.seq - 2, config["vocab_size"] - 3)]
            file.write(json.dumps({"text": seeded.words(inner)}) + "\n")


main()
