#!/usr/bin/env python3
"""Writes tests/golden/peft_train.{json,safetensors}: twenty AdamW steps of PEFT on a seeded random LLaMA.

Weights, starting adapters and documents come from seeded.py. Losses (mean over all supervised tokens of a step),
gradient norms before clipping, learning rates and the trained factors are stored. Everything in f32 on the CPU.

    peft_train.py
"""

import json
import pathlib
import tempfile

import numpy as np
import peft
import torch
import transformers
from transformers import AutoModelForCausalLM

import seeded

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden"
SEED, STEPS, DOCUMENTS, RANK, ALPHA, LR = 100, 20, 4, 8, 16, 1e-3
BOS, EOS = 1, 2
CONFIG = {
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
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "torch_dtype": "float32",
}
# b_std 0 is PEFT's own start; schedule and warm-up (steps) as transformers has them.
RUNS = [
    {"name": "cosine", "b_std": 0.0, "schedule": "cosine", "warmup": 2, "weight_decay": 0.0, "freeze_a": False},
    {"name": "linear_decay", "b_std": 0.02, "schedule": "linear", "warmup": 3, "weight_decay": 0.01, "freeze_a": False},
    {"name": "freeze_a", "b_std": 0.0, "schedule": "constant", "warmup": 0, "weight_decay": 0.0, "freeze_a": True},
]


def documents():
    """Two epochs' worth of half as many documents: (ids, index of the first supervised token)."""
    made = []
    for n in range(STEPS * DOCUMENTS // 2):
        length, prompt = seeded.ids(SEED, f"document.{n}.shape", 2, 1 << 16)
        length = 6 + length % 19
        inner = [3 + i for i in seeded.ids(SEED, f"document.{n}", length, CONFIG["vocab_size"] - 3)]
        # Every other document has a prompt that is not supervised; in the others all but BOS is.
        made.append(([BOS, *inner, EOS], 1 + prompt % (length - 2) if n % 2 else 1))
    return made


def start(name, shape, b_std):
    """The starting factor of a module: A is normal of standard deviation 0.1."""
    std = 0.1 if "lora_A" in name else b_std
    return seeded.normal(SEED, name, shape, 0.0, std)


def train(folder, run, dtype=torch.float32):
    """Losses, norms, learning rates and final factors of one run."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))
    factors = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    assert len(factors) == 2 * 7 * CONFIG["num_hidden_layers"]
    model = model.to(dtype).train()
    for name, p in factors.items():
        p.data.copy_(torch.from_numpy(start(name, list(p.shape), run["b_std"])))
        p.requires_grad_("lora_B" in name or not run["freeze_a"])
    trained = [p for p in factors.values() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=run["weight_decay"])
    kind = {"constant": "constant_with_warmup"}.get(run["schedule"], run["schedule"])
    schedule = transformers.get_scheduler(kind, optimizer, run["warmup"], STEPS)
    docs, losses, norms, rates = documents(), [], [], []
    for step in range(STEPS):
        batch = [docs[(step * DOCUMENTS + i) % len(docs)] for i in range(DOCUMENTS)]
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([i + [0] * (longest - len(i)) for i, _ in batch])
        mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i, _ in batch])
        labels = torch.tensor([[-100] * p + i[p:] + [-100] * (longest - len(i)) for i, p in batch])
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        losses.append(loss.item())
        norms.append(norm.item())
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses, norms, rates, {n: p.detach().to(torch.float64).numpy() for n, p in factors.items()}


def changes(final, run):
    """The learned change of each module's update s B A, s = alpha / r."""
    for name, a in final.items():
        if "lora_A" in name:
            b_name = name.replace("lora_A", "lora_B")
            b, a0, b0 = final[b_name], start(name, a.shape, 0.0), start(b_name, final[b_name].shape, run["b_std"])
            yield ALPHA / RANK * (b @ a - b0.astype(np.float64) @ a0.astype(np.float64))


def main():
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    stored, tensors = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        seeded.write_model(folder, CONFIG, SEED)
        for run in RUNS:
            losses, norms, rates, final = train(folder, run)
            exact_losses, _, _, exact = train(folder, run, torch.float64)
            worst_loss = max(abs(a / b - 1) for a, b in zip(losses, exact_losses))
            pairs = list(zip(changes(final, run), changes(exact, run)))
            worst = max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs)
            print(f"{run['name']:13} loss {losses[0]:.4f} -> {losses[-1]:.4f}, norms {min(norms):.2f}..{max(norms):.2f}, "
                  f"f64 run: losses {worst_loss:.1e}, learned change {worst:.1e} (worst module)")
            stored.append({**run, "losses": losses, "grad_norms": norms, "learning_rates": rates})
            for name, p in final.items():
                tensors.append((f"{run['name']}/{name}", "F32", list(p.shape), p.astype("<f4").tobytes()))
    out = {
        "peft": peft.__version__, "transformers": transformers.__version__, "seed": SEED, "rank": RANK, "alpha": ALPHA,
        "lr": LR, "max_grad_norm": 1.0, "steps": STEPS, "documents_per_step": DOCUMENTS, "a_std": 0.1, "config": CONFIG,
        "documents": [{"ids": i, "supervised_from": p} for i, p in documents()], "runs": stored,
    }
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in out.items())
    (GOLDEN / "peft_train.json").write_text(f"{{{lines}}}\n")
    seeded.write_safetensors(GOLDEN / "peft_train.safetensors", tensors)


if __name__ == "__main__":
    main()
