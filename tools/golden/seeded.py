"""Seeded weights that need no framework: the twin of tests/common/seeded.rs.

Value i of a tensor is mean + std * z(i), rounded to f32 and then to the stored dtype. z is the sum of the four
16-bit parts of splitmix64(key + (i + 1) * GOLDEN), centred and scaled to variance 1; key depends on the seed and on
the tensor's name. No transcendental function takes part, so that every language gives the same bits.
"""

import json
import math
import struct

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1
# Four uniform 16-bit parts have the mean 4 * 65535 / 2 and the variance 4 * (65536^2 - 1) / 12.
MEAN = 131070.0
SCALE = 1.0 / math.sqrt((65536.0 * 65536.0 - 1.0) / 3.0)


def mix(x):
    """splitmix64's output function on a uint64 array."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def bits(seed, name, count):
    """`count` words of 64 random bits for the tensor `name`."""
    fnv = 0xCBF29CE484222325
    for byte in name.encode():
        fnv = ((fnv ^ byte) * 0x100000001B3) & MASK
    start = np.array([(fnv + (seed + 1) * GOLDEN) & MASK], dtype=np.uint64)
    with np.errstate(over="ignore"):
        key = mix(start)
        return mix(key + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN))


def normal(seed, name, shape, mean, std):
    """An f32 array of the given shape."""
    words = bits(seed, name, math.prod(shape))
    total = sum((words >> np.uint64(16 * k)) & np.uint64(0xFFFF) for k in range(4))
    z = (total.astype(np.float64) - MEAN) * SCALE
    return (mean + std * z).astype(np.float32).reshape(shape)


def ids(seed, name, count, vocab):
    """`count` token ids below `vocab`."""
    return [int(w % np.uint64(vocab)) for w in bits(seed, name, count)]


def stored(array, dtype):
    """The bytes of an f32 array in a safetensors dtype, to nearest even."""
    if dtype == "F32":
        return array.astype("<f4").tobytes()
    if dtype == "F16":
        return array.astype("<f2").tobytes()
    assert dtype == "BF16", dtype
    b = array.view(np.uint32).astype(np.uint64)
    return ((b + np.uint64(0x7FFF) + ((b >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype("<u2").tobytes()


def shapes(config):
    """(name, shape, mean, std) of every tensor that `config` asks for, standard deviation 0.2."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    h = config["num_attention_heads"]
    g = config.get("num_key_value_heads", h)
    k = config.get("head_dim", d // h)
    tensors = [("model.embed_tokens.weight", [v, d], 0.0, 0.2)]
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        linears = [
            ("self_attn.q_proj", h * k, d, "attention_bias"),
            ("self_attn.k_proj", g * k, d, "attention_bias"),
            ("self_attn.v_proj", g * k, d, "attention_bias"),
            ("self_attn.o_proj", d, h * k, "attention_bias"),
            ("mlp.gate_proj", f, d, "mlp_bias"),
            ("mlp.up_proj", f, d, "mlp_bias"),
            ("mlp.down_proj", d, f, "mlp_bias"),
        ]
        for name, o, i, bias in linears:
            tensors.append((f"{p}{name}.weight", [o, i], 0.0, 0.2))
            if config.get(bias):
                tensors.append((f"{p}{name}.bias", [o], 0.0, 0.2))
        tensors.append((f"{p}input_layernorm.weight", [d], 1.0, 0.2))
        tensors.append((f"{p}post_attention_layernorm.weight", [d], 1.0, 0.2))
    tensors.append(("model.norm.weight", [d], 1.0, 0.2))
    if not config.get("tie_word_embeddings"):
        tensors.append(("lm_head.weight", [v, d], 0.0, 0.2))
    return tensors


def write_safetensors(path, tensors):
    """Writes (name, dtype, shape, bytes) entries."""
    header, data, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name, dtype, shape, raw in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(raw)]}
        at += len(raw)
        data.append(raw)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for raw in data:
            file.write(raw)


def write_model(folder, config, seed, dtype="F32"):
    """A Hugging Face folder with seeded weights: config.json and model.safetensors."""
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    entries = [(n, dtype, s, stored(normal(seed, n, s, m, sd), dtype)) for n, s, m, sd in shapes(config)]
    write_safetensors(folder / "model.safetensors", entries)


def word_tokenizer(vocab):
    """tokenizer.json whose token i is the word "ti", with BOS (1) put before a text; for data of known ids."""
    special = {0: "<unk>", 1: "<s>", 2: "</s>"}
    added = [
        {"id": i, "content": w, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for i, w in special.items()
    ]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, second],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {special.get(i, f"t{i}"): i for i in range(vocab)}, "unk_token": "<unk>"},
    }


def words(token_ids):
    """The text that `word_tokenizer` turns into these ids (none of them special)."""
    return " ".join(f"t{i}" for i in token_ids)


def write_tokenizer(folder, vocab):
    """tokenizer.json and tokenizer_config.json of `word_tokenizer`."""
    (folder / "tokenizer.json").write_text(json.dumps(word_tokenizer(vocab)))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
