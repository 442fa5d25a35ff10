"""Writes the word-level tokenizer of the miniature as a Hugging Face `tokenizer.json`."""

from pathlib import Path

from model import write_json
from world import BOS, IDS


def definition():
    """`tokenizer.json`: words parted by spaces, newline a token of its own, `<s>` prepended by the post-processor."""
    special = ("<unk>", "<s>", "</s>")
    added = [
        {"id": IDS[t], "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for t in special
    ]

    def split(text, behavior):
        return {"type": "Split", "pattern": {"String": text}, "behavior": behavior, "invert": False}

    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split("\n", "Isolated"), split(" ", "Removed")]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, second],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": IDS, "unk_token": "<unk>"},
    }


def save(folder):
    """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer.json", definition())
    write_json(folder / "special_tokens_map.json", names)
    write_json(
        folder / "tokenizer_config.json",
        names
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 512,
            "add_bos_token": True,
            "add_eos_token": False,
        },
    )


