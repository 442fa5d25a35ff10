#!/usr/bin/env python3
"""Writes tests/golden/logits.{json,safetensors}: logits of transformers on seeded random checkpoints.

One case per architecture variant. Weights come from seeded.py and are not stored. Each case names a feature and an
alternative config with that feature off ("off"), whose logits are at least 1e-2 of the largest logit away, so that a
test can show that it would notice. Computed in f32 on the CPU with eager attention.

    logits.py            write
    logits.py --check    compare with what is stored, write nothing (any transformers version)
"""

import argparse
import json
import pathlib
import tempfile

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

import seeded

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden"

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 85,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 101,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}


def config(drop=(), **changes):
    """BASE with changes; `drop` names keys that the file leaves out."""
    made = {**BASE, **changes}
    return {k: v for k, v in made.items() if k not in drop}


def v5(rope_type, theta=10000.0, **more):
    """The v5 spelling: one rope_parameters object and no rope_theta or rope_scaling of its own."""
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **more}}


def cases():
    """(name, feature, config, config with the feature off, length, dtype); `off` may be a special word."""
    old = ("rope_theta",)
    plain = config()
    yield "llama_mha", "heads of their own keys", config(num_key_value_heads=6), config(num_key_value_heads=3), 24, "F32"
    yield "llama_gqa", "gqa map", plain, "gqa map", 32, "F32"
    minimal = ("num_key_value_heads", "head_dim", "rope_theta", "attention_bias", "mlp_bias", "tie_word_embeddings")
    yield "llama_defaults", "rms_norm_eps", config(minimal, rms_norm_eps=1e-2), config(minimal, rms_norm_eps=1e-6), 24, "F32"
    wide = config(hidden_size=40, num_attention_heads=4, head_dim=14)
    yield "llama_head_dim", "head_dim", wide, {**wide, "head_dim": 10}, 32, "F32"
    yield "llama_tied", "tie", config(tie_word_embeddings=True), plain, 24, "F32"
    yield "llama_attention_bias", "attention bias", config(attention_bias=True), plain, 24, "F32"
    yield "llama_mlp_bias", "mlp bias", config(mlp_bias=True), plain, 24, "F32"
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    no_bias = ("attention_bias", "mlp_bias")
    # 44 % 6 != 0: the form of a pruned model, which transformers takes as mistral only.
    pruned = config(no_bias, **mistral, hidden_size=44, sliding_window=None, rope_theta=1e6)
    yield "mistral_pruned", "rope theta", pruned, {**pruned, "rope_theta": 1e4}, 32, "F32"
    window = config(no_bias + old, **mistral, **v5("default"), sliding_window=4096, num_hidden_layers=3)
    yield "mistral_window", "gqa map", window, "gqa map", 40, "BF16"
    yield "theta_v4", "rope theta", config(rope_theta=500.0), plain, 40, "F32"
    yield "theta_v5", "rope theta", config(old, **v5("default", 500.0)), config(old, **v5("default")), 40, "F32"
    yield "linear_v4", "rope kind", config(rope_scaling={"rope_type": "linear", "factor": 4.0}), plain, 40, "F32"
    yield "linear_type", "rope kind", config(rope_scaling={"type": "linear", "factor": 2.5}), plain, 40, "F32"
    yield "linear_v5", "rope kind", config(old, **v5("linear", 500.0, factor=4.0)), config(old, **v5("default", 500.0)), 40, "F32"
    short = {"max_position_embeddings": 16}
    dynamic = config(**short, rope_scaling={"type": "dynamic", "factor": 4.0})
    # Without the kind, 64 tokens are too long for 16 positions: the alternative allows them.
    yield "dynamic_type", "rope kind", dynamic, config(max_position_embeddings=64), 64, "F32"
    yield "dynamic_v5", "rope kind", config(old, **short, **v5("dynamic", factor=3.0)), config(old, **v5("default")), 41, "F16"
    yield "dynamic_short", "rope kind", dynamic, config(**short, rope_scaling={"type": "linear", "factor": 4.0}), 16, "F32"
    yield "llama3_v4", "rope kind", config(rope_scaling={"rope_type": "llama3", **LLAMA3}), plain, 48, "F32"
    low = {**LLAMA3, "factor": 32.0, "low_freq_factor": 0.5, "original_max_position_embeddings": 24}
    yield "llama3_v5", "rope kind", config(old, **v5("llama3", 100.0, **low)), config(old, **v5("default", 100.0)), 96, "BF16"
    yield "yarn_type", "rope kind", config(rope_scaling={"type": "yarn", **YARN}), plain, 48, "F32"
    ramp = config(old, head_dim=16, **v5("yarn", 100.0, **YARN, beta_fast=4.0, beta_slow=0.5))
    yield "yarn_v5", "rope kind", ramp, {**ramp, **v5("default", 100.0)}, 64, "F32"
    mscale = {"truncate": False, "mscale": 1.5, "mscale_all_dim": 0.5, "beta_fast": 3.0, "beta_slow": 1.0}
    fine = config(old, head_dim=16, **v5("yarn", 100.0, **YARN, **mscale))
    yield "yarn_mscale", "rope kind", fine, {**fine, **v5("yarn", 100.0, **YARN, **{**mscale, "truncate": True, "mscale": 0.5})}, 64, "F32"
    factor = config(old, **v5("yarn", **YARN, attention_factor=1.4))
    yield "yarn_attention_factor", "rope kind", factor, config(old, **v5("yarn", **YARN)), 48, "F32"
    # Both spellings, which agree: what a pruned model's config.json holds.
    every = config(
        num_hidden_layers=3, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=12,
        vocab_size=103, intermediate_size=91, num_attention_heads=4,
        rope_theta=500.0, rope_scaling={"rope_type": "llama3", **LLAMA3}, **v5("llama3", 500.0, **LLAMA3),
    )
    for dtype in ("F32", "F16", "BF16"):
        yield f"everything_{dtype.lower()}", "tie", every, {**every, "tie_word_embeddings": False}, 56, dtype


def expand_heads(folder, made, seed, dtype, wrong):
    """The same model with a key and value head for each query head: h // (H / G), or h % G if `wrong`."""
    h, g, k = made["num_attention_heads"], made["num_key_value_heads"], made["head_dim"]
    entries = []
    for name, shape, mean, std in seeded.shapes(made):
        values = seeded.normal(seed, name, shape, mean, std)
        if "k_proj" in name or "v_proj" in name:
            heads = values.reshape([g, k] + shape[1:])
            values = heads[[i % g if wrong else i // (h // g) for i in range(h)]].reshape([h * k] + shape[1:])
        entries.append((name, dtype, list(values.shape), seeded.stored(np.ascontiguousarray(values), dtype)))
    (folder / "config.json").write_text(json.dumps({**made, "num_key_value_heads": h}))
    seeded.write_safetensors(folder / "model.safetensors", entries)


def logits(folder, ids, dtype=torch.float32):
    """[T, V] of the folder as transformers reads it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.to(dtype).eval()(torch.tensor([ids])).logits[0].to(torch.float64).numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    stored = None
    if args.check:
        from safetensors.numpy import load_file

        stored = load_file(GOLDEN / "logits.safetensors")
    index, tensors = [], []
    for seed, (name, feature, made, off, length, dtype) in enumerate(cases()):
        ids = seeded.ids(seed, "ids", length, made["vocab_size"])
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(temporary)
            seeded.write_model(folder, made, seed, dtype)
            got = logits(folder, ids)
            largest = np.abs(got).max()
            noise = np.abs(logits(folder, ids, torch.float64) - got).max() / largest
            if off == "gqa map":
                expand_heads(folder, made, seed, dtype, wrong=False)
                assert np.abs(logits(folder, ids) - got).max() <= 1e-5 * largest, name
                expand_heads(folder, made, seed, dtype, wrong=True)
            else:
                seeded.write_model(folder, off, seed, dtype)
            moved = np.abs(logits(folder, ids) - got).max() / largest
        line = f"{name:24} {feature:24} T {length:3} {dtype:5} largest {largest:7.3f} off moves {moved:.3f} f64 differs {noise:.1e}"
        if args.check:
            line += f" from stored {np.abs(stored[name] - got).max() / largest:.1e}"
        else:
            assert moved >= 2e-2, line
        print(line)
        index.append({"name": name, "seed": seed, "dtype": dtype, "ids": ids, "feature": feature, "config": made, "off": off})
        tensors.append((name, "F32", list(got.shape), got.astype("<f4").tobytes()))
    if not args.check:
        lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in index)
        (GOLDEN / "logits.json").write_text(f'{{"transformers": "{transformers.__version__}", "cases": [\n{lines}\n]}}\n')
        seeded.write_safetensors(GOLDEN / "logits.safetensors", tensors)


if __name__ == "__main__":
    main()
