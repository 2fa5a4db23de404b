"""Tiny model files in every format, made with the formats' own libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file, save_file

from pdx.errors import ModelFileError, UnsupportedModelError
from tests.support import tiny_model

GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tensors(directory: Path) -> dict[str, np.ndarray]:
    return load_file(directory / "model.safetensors")


def rewrite(directory: Path, change) -> None:
    """Save the tensors again as `change(tensors)` leaves them."""
    content = tensors(directory)
    change(content)
    save_file(content, directory / "model.safetensors")


def reconfigure(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(directory: Path, count: int = 2) -> None:
    """Turn the single file into `count` shards and an index."""
    content = tensors(directory)
    (directory / "model.safetensors").unlink()
    where = {}
    for i in range(count):
        name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = dict(list(content.items())[i::count])
        save_file(part, directory / name)
        where |= dict.fromkeys(part, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def permute(x: np.ndarray, heads: int) -> np.ndarray:
    """How llama.cpp's converter reorders query and key rows: pairs become neighbours."""
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write_gguf(path: Path, content: dict[str, np.ndarray], *, quantized: dict | None = None, **fields) -> Path:
    """A GGUF file of the model of `tiny_model` with these tensors, named as Hugging Face names them.

    `quantized` maps tensor names to ggml types; `fields` overrides metadata, `__` for a dot, None to leave out.
    """
    vocab = content["model.embed_tokens.weight"].shape[0]
    writer = gguf.GGUFWriter(path, "llama")
    head = {
        "llama.block_count": tiny_model.LAYERS,
        "llama.context_length": tiny_model.CONTEXT,
        "llama.embedding_length": tiny_model.WIDTH,
        "llama.feed_forward_length": tiny_model.FF,
        "llama.attention.head_count": tiny_model.HEADS,
        "llama.attention.head_count_kv": tiny_model.KV_HEADS,
    }
    for key, value in (head | {k.replace("__", "."): v for k, v in fields.items()}).items():
        if value is not None:
            writer.add_uint32(key, value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(vocab)])
    writer.add_token_types([1] * vocab)
    writer.add_token_merges(["t 0"])
    writer.add_eos_token_id(0)
    for name, value in content.items():
        target = gguf_name(name)
        if "q_proj" in name or "k_proj" in name:
            value = permute(value, tiny_model.HEADS if "q_proj" in name else tiny_model.KV_HEADS)
        kind = (quantized or {}).get(name)
        if kind is not None:
            writer.add_tensor(target, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    outside = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in outside:
        return outside[name]
    _, _, layer, rest = name.split(".", 3)
    rest, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{GGUF_NAMES[rest]}.{kind}"


def is_refused(kind: Callable, path: Path) -> bool:
    """Whether a file of this kind, opened and read to the last tensor, is refused by a clear error; others pass."""
    try:
        file = kind(path)
        for name in file.names():
            file.read(name, np.float32)
    except (ModelFileError, UnsupportedModelError):
        return True
    return False
