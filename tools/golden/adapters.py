#!/usr/bin/env python3
"""Writes tests/golden/adapters.{json,safetensors}: logits of a seeded LLaMA with adapters of several forms under PEFT.

The adapter's adapter_config.json is stored as PEFT wrote it; A and B come from seeded.py, like the model.

    adapters.py
"""

import json
import pathlib
import tempfile

import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import seeded
from peft_train import CONFIG

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden"
SEED, LENGTH = 300, 24
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FORMS = {
    "plain": {"r": 8, "lora_alpha": 16, "target_modules": ALL},
    "all_linear": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    # The first pattern that matches wins: layer 1's q_proj gets 5, not 3. (PEFT sorts the keys when it saves.)
    "patterns": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"],
        "rank_pattern": {"layers.0.mlp.down_proj": 6, "layers.1.self_attn.q_proj": 5, "q_proj": 3},
        "alpha_pattern": {".*1.self_attn.o_proj": 7, "k_proj": 4, "model.layers.0.mlp.down_proj": 2},
    },
    "rslora_patterns": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": ["v_proj", "up_proj"],
        "rank_pattern": {"up_proj": 9},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 5},
    },
    "some_layers": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1]},
}


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].numpy()


def main():
    transformers.logging.set_verbosity_error()
    ids = seeded.ids(SEED, "ids", LENGTH, CONFIG["vocab_size"])
    cases, tensors = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        seeded.write_model(folder, CONFIG, SEED)

        def base():
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

        plain = logits(base(), ids)
        for seed, (name, form) in enumerate(FORMS.items(), SEED + 1):
            config = peft.LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path="base", **form)
            made = folder / name
            peft.get_peft_model(base(), config).save_pretrained(made)
            stored = [(n, list(t.shape)) for n, t in sorted(load_file(made / "adapter_model.safetensors").items())]
            entries = [(n, "F32", s, seeded.stored(seeded.normal(seed, n, s, 0.0, 0.1), "F32")) for n, s in stored]
            seeded.write_safetensors(made / "adapter_model.safetensors", entries)
            got = logits(peft.PeftModel.from_pretrained(base(), made), ids)
            print(f"{name:16} {len(stored):3} tensors, moves the logits by {np.abs(got - plain).max() / np.abs(got).max():.3f}")
            text = json.loads((made / "adapter_config.json").read_text())
            text["base_model_name_or_path"] = "base"
            cases.append({"name": name, "seed": seed, "tensors": stored, "adapter_config": text})
            tensors.append((name, "F32", list(got.shape), got.astype("<f4").tobytes()))
    tensors.append(("base", "F32", list(plain.shape), plain.astype("<f4").tobytes()))
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    head = {"peft": peft.__version__, "seed": SEED, "ids": ids, "std": 0.1, "config": CONFIG}
    (GOLDEN / "adapters.json").write_text(f'{json.dumps(head)[:-1]}, "cases": [\n{lines}\n]}}\n')
    seeded.write_safetensors(GOLDEN / "adapters.safetensors", tensors)


if __name__ == "__main__":
    main()
