#!/usr/bin/env python3
"""Writes tests/golden/mmlu_sample.json: option log-probabilities of stories260K on 500 items of MMLU test.

Prompt, tokenisation and scoring are lm-evaluation-harness's `mmlu` with no shots, BOS as the tokenizer prepends it:
context and context + continuation are encoded, and parted at the context's token count. Scores come from transformers
in f32. Items of which context + longest option - 1 tokens do not fit the model's positions are counted per subject.

    mmlu_sample.py ../shared/data
"""

import csv
import json
import pathlib
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import seeded

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden"
SAMPLE, SEED = 500, 200
LETTERS = "ABCD"


def context(subject, row):
    """Description, question, options and the word that the letter follows."""
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, row[1:5]))
    about = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {about}.\n\n{row[0].strip()}{options}\nAnswer:"


def encoded(tokenizer, text):
    """Context ids and the continuation's ids of each option."""
    ids = tokenizer(text)["input_ids"]
    return ids, [tokenizer(f"{text} {letter}")["input_ids"][len(ids) :] for letter in LETTERS]


def main():
    data = pathlib.Path(sys.argv[1])
    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(data / "stories260K-hf")
    model = AutoModelForCausalLM.from_pretrained(data / "stories260K-hf", dtype=torch.float32, attn_implementation="eager")
    positions = model.config.max_position_embeddings
    fit, too_long = [], {}
    for path in sorted((data / "mmlu" / "test").glob("*_test.csv")):
        subject = path.name.removesuffix("_test.csv")
        with open(path, newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.reader(file)):
                ids, options = encoded(tokenizer, context(subject, row))
                assert ids[0] == tokenizer.bos_token_id and ids.count(ids[0]) == 1 and all(options)
                if len(ids) + max(map(len, options)) - 1 <= positions:
                    fit.append((subject, number, LETTERS.index(row[5]), ids, options))
                else:
                    too_long[subject] = too_long.get(subject, 0) + 1
    print(f"{len(fit)} fit, {sum(too_long.values())} do not; option lengths {sorted({len(o) for f in fit for o in f[4]})}")
    # A seeded order without repeats, then file order.
    order = seeded.bits(SEED, "sample", len(fit)).argsort()[:SAMPLE]
    items = []
    for subject, number, gold, ids, options in (fit[i] for i in sorted(order)):
        scores = []
        for option in options:
            with torch.no_grad():
                logits = model(torch.tensor([ids + option[:-1]])).logits[0, -len(option) :]
            rows = torch.log_softmax(logits.to(torch.float32), dim=-1)
            scores.append(rows[torch.arange(len(option)), option].sum().item())
        items.append([subject, number, gold, len(ids), [round(s, 6) for s in scores]])
    margins = sorted(sorted(i[4])[-1] - sorted(i[4])[-2] for i in items)
    right = sum(max(range(4), key=i[4].__getitem__) == i[2] for i in items)
    print(f"{right} of {len(items)} right, smallest margin between the best two {margins[:5]}")
    lines = ",\n".join(json.dumps(i, separators=(",", ":")) for i in items)
    (GOLDEN / "mmlu_sample.json").write_text(
        f'{{"transformers": "{transformers.__version__}", "fit": {len(fit)}, "too_long": {sum(too_long.values())},\n'
        f'"too_long_by_subject": {json.dumps(too_long)},\n'
        f'"columns": ["subject", "row", "gold", "context_tokens", "logprobs"],\n"items": [\n{lines}\n]}}\n'
    )


if __name__ == "__main__":
    main()
