"""A small LLaMA in plain PyTorch: start, forward pass with width masks and LoRA, and the Hugging Face folder.

Parameters are a flat dict: `embed` [V, D], `head` [V, D], `norm` [D], and for each layer l `l.norm1`, `l.norm2` [D] and
the seven linears `l.q` [H·K, D], `l.k`, `l.v` [G·K, D], `l.o` [D, H·K], `l.gate`, `l.up` [F, D], `l.down` [D, F].
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from world import BOS, EOS, VOCABULARY_SIZE

D, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN = 192, 4, 16, 8, 32, 512
THETA, EPSILON, POSITIONS = 10000.0, 1e-5, 512
LINEARS = ["q", "k", "v", "o", "gate", "up", "down"]
SHAPES = {
    "q": (HEADS * HEAD_DIM, D),
    "k": (KV_HEADS * HEAD_DIM, D),
    "v": (KV_HEADS * HEAD_DIM, D),
    "o": (D, HEADS * HEAD_DIM),
    "gate": (FFN, D),
    "up": (FFN, D),
    "down": (D, FFN),
}


def start(seed):
    """Parameters to start from: random, with positional heads in layer 0 and same-token heads above.

    Looking a value up in a list of options needs a head that copies from a fixed distance and, above it, one that finds
    an equal token. From a purely random start their discovery takes hundreds of steps at chance; here both are laid out
    roughly, and training does the rest.
    """
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape, std: torch.randn(*shape, generator=g) * std
    p = {"embed": normal(VOCABULARY_SIZE, D, std=0.7), "head": normal(VOCABULARY_SIZE, D, std=0.02), "norm": torch.ones(D)}
    out = 0.3 / math.sqrt(2 * LAYERS)
    for l in range(LAYERS):
        p[f"{l}.norm1"], p[f"{l}.norm2"] = torch.ones(D), torch.ones(D)
        for name, (o, i) in SHAPES.items():
            std = {"o": out / math.sqrt(D), "down": out / math.sqrt(FFN)}.get(name, 1 / math.sqrt(D))
            p[f"{l}.{name}"] = normal(o, i, std=std)

    # A direction u that every embedding shares gives the positional heads something constant to rotate.
    u = torch.randn(D, generator=g)
    u /= u.norm()
    p["embed"] += u * (0.35 * math.sqrt(D)) - (p["embed"] @ u)[:, None] * u
    constant = 0.5 / math.sqrt(1.25) * math.sqrt(D)  # its size after RMSNorm
    half, low, gain = HEAD_DIM // 2, 4, 7.0
    frequency = THETA ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
    amplitude = math.sqrt(gain * math.sqrt(HEAD_DIM)) / constant
    rep = HEADS // KV_HEADS
    for group, offset in enumerate((1, 1, 2, 2)):
        k, q = torch.zeros(HEAD_DIM), torch.zeros(HEAD_DIM)
        k[:low] = amplitude
        q[:low] = amplitude * torch.cos(-frequency[:low] * offset)
        q[half : half + low] = amplitude * torch.sin(-frequency[:low] * offset)
        rows = slice(group * HEAD_DIM, (group + 1) * HEAD_DIM)
        p["0.k"][rows] = p["0.k"][rows] * 0.3 + k[:, None] * u
        wide = slice(group * rep * HEAD_DIM, (group + 1) * rep * HEAD_DIM)
        p["0.q"][wide] = p["0.q"][wide] * 0.3 + (q[:, None] * u).repeat(rep, 1)
        p["0.o"][:, wide] *= 4
    for l in range(1, LAYERS):
        for group in range(KV_HEADS // 2):
            same = torch.randn(HEAD_DIM, D, generator=g) / math.sqrt(D) * 1.5
            same[:8], same[half : half + 8] = 0, 0  # the fast rotations would blur a match at a distance
            same -= (same @ u)[:, None] * u
            wide = slice(group * rep * HEAD_DIM, (group + 1) * rep * HEAD_DIM)
            p[f"{l}.k"][group * HEAD_DIM : (group + 1) * HEAD_DIM] = same
            p[f"{l}.q"][wide] = same.repeat(rep, 1)
            p[f"{l}.o"][:, wide] *= 4
    return p


_ROPE = {}


def _rope(length):
    if length not in _ROPE:
        frequency = THETA ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
        angle = torch.outer(torch.arange(length).float(), frequency).repeat(1, 2)
        _ROPE[length] = (angle.cos(), angle.sin())
    return _ROPE[length]


def _rotate(x, rope):
    cos, sin = rope
    half = HEAD_DIM // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def rms_norm(x, weight):
    return F.rms_norm(x, (x.shape[-1],), weight, EPSILON)


def forward(p, ids, lora=None, scale=2.0, masks=None, rows=None, early=None):
    """Logits of `ids` [B, T]: [B, T, V], or [R, V] for `rows` = (batch indices, positions).

    `early` = {layers: rows}: also {layers: [R, V]}, how much those rows look like each token's embedding at that height.

    `lora`: {(layer, linear): (A, B)}. `masks`: for each layer (kv heads [B, G], channels [B, F]), 1 keeps and 0 drops.
    Sizes are read off the parameters, so that pruned ones work too.
    """
    batch, length = ids.shape
    h, rope, rep = p["embed"][ids], _rope(length), HEADS // KV_HEADS
    thought = {}
    future = torch.full((length, length), -math.inf).triu(1)

    def linear(l, name, x):
        y = F.linear(x, p[f"{l}.{name}"])
        if lora is not None:
            a, b = lora[l, name]
            y = y + F.linear(F.linear(x, a), b) * scale
        return y

    def heads(x):
        return x.float().view(batch, length, -1, HEAD_DIM).transpose(1, 2)

    for l in range(LAYERS):
        x = rms_norm(h, p[f"{l}.norm1"])
        q, k, v = (heads(linear(l, name, x)) for name in "qkv")
        with torch.autocast("cpu", enabled=False):  # attention in f32, and spelt out: faster than torch's at this length
            k, v = _rotate(k, rope).repeat_interleave(rep, 1), v.repeat_interleave(rep, 1)
            scores = _rotate(q, rope) @ (k / math.sqrt(HEAD_DIM)).transpose(2, 3) + future
            x = scores.softmax(-1) @ v
        if masks is not None:
            x = x * masks[l][0].repeat_interleave(rep, 1)[:, :, None, None]
        h = h + linear(l, "o", x.transpose(1, 2).reshape(batch, length, -1))
        x = rms_norm(h, p[f"{l}.norm2"])
        x = F.silu(linear(l, "gate", x)) * linear(l, "up", x)
        if masks is not None:
            x = x * masks[l][1][:, None, :].to(x.dtype)
        h = h + linear(l, "down", x)
        if early and l + 1 in early:
            thought[l + 1] = F.linear(rms_norm(h[early[l + 1]], None), p["embed"].detach() / math.sqrt(D))
    if rows is not None:
        h = h[rows]
    logits = F.linear(rms_norm(h, p["norm"]), p["head"])
    return logits if early is None else (logits, thought)


def pad(documents):
    """Token lists as one tensor [B, T], padded on the right with `<unk>`."""
    length = max(map(len, documents))
    return torch.tensor([d + [0] * (length - len(d)) for d in documents])


def _names():
    names = {"embed": "model.embed_tokens", "head": "lm_head", "norm": "model.norm"}
    for l in range(LAYERS):
        names[f"{l}.norm1"] = f"model.layers.{l}.input_layernorm"
        names[f"{l}.norm2"] = f"model.layers.{l}.post_attention_layernorm"
        for n in LINEARS:
            names[f"{l}.{n}"] = f"model.layers.{l}.{'self_attn' if n in 'qkvo' else 'mlp'}.{n}_proj"
    return {ours: theirs + ".weight" for ours, theirs in names.items()}


def config():
    """The `config.json` of the base, with the spellings of transformers 4 and 5."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": D,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.02,
        "rms_norm_eps": EPSILON,
        "use_cache": True,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rope_theta": THETA,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": None,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }


def save(p, folder):
    """Write weights (BF16), `config.json` and `generation_config.json` of a Hugging Face folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = _names()
    tensors = {names[k]: v.detach().to(torch.bfloat16).contiguous() for k, v in p.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config())
    write_json(folder / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": False})


def load(folder):
    """Parameters of a folder that `save` wrote, in f32."""
    tensors = load_file(Path(folder) / "model.safetensors")
    return {ours: tensors[theirs].float() for ours, theirs in _names().items()}


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
