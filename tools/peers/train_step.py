#!/usr/bin/env python3
"""Times LoRA training steps of PyTorch + PEFT: rank 8 on all linears, AdamW, every token but the first supervised.

Prints one JSON line: seconds of each step, losses, versions.

    train_step.py --model DIR --data FILE --batch 4 --steps 6 --threads 2 --precision f32
    train_step.py --model DIR --data FILE --batch 4 --steps 8 --device cuda --precision bf16
"""

import argparse
import json
import time

import peft
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    dtype = torch.float32 if args.precision == "f32" else torch.bfloat16
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{args.model}/tokenizer.json")
    eos = json.load(open(f"{args.model}/config.json"))["eos_token_id"]
    rows = [tokenizer(json.loads(line)["text"])["input_ids"] + [eos] for line in open(args.data)]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa").to(args.device)
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.0)
    seconds, losses = [], []
    for step in range(args.steps):
        ids = torch.tensor([rows[(step * args.batch + i) % len(rows)] for i in range(args.batch)], device=args.device)
        started = time.perf_counter()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    versions = {"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__}
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else None
    print(json.dumps({"seconds": seconds, "losses": losses, "tokens": ids.numel(), "device_bytes": peak, **versions}))


if __name__ == "__main__":
    main()
