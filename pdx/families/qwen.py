"""Qwen2 and 2.5 (biases on queries, keys and values) and Qwen3 (query and key norms)."""

from __future__ import annotations

from functools import partial

from pdx.config import ModelConfig
from pdx.families.common import (
    GGUF_NAMES,
    HF_NAMES,
    Family,
    Names,
    TensorFile,
    gguf_shape,
    hf_shape,
    windows_from_types,
)
from pdx.families.fields import Fields
from pdx.families.rope import rope_from_hf

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}


def _from_hf(name: str, f: Fields) -> ModelConfig:
    shape = hf_shape(f, DEFAULTS if name == "qwen2" else {**DEFAULTS, "head_dim": 128})
    rope, _, shape["max_context"] = rope_from_hf(f, shape["head_dim"], shape["max_context"])
    # With `use_sliding_window`, the first `max_window_layers` layers see the whole context and the others a window.
    in_use, first = f.flag("use_sliding_window", False), f.integer("max_window_layers", 28, least=0)
    window = f.get("sliding_window", None if f.has("sliding_window") else 4096)
    window = f.integer("sliding_window", window) if in_use and window else None
    windows = windows_from_types(f, shape["num_layers"], window, lambda layer: layer >= first)
    bias = name == "qwen3" and f.flag("attention_bias", False)
    return ModelConfig(
        family=name,
        rope=rope,
        windows=windows,
        qkv_bias=name == "qwen2" or bias,
        o_bias=bias,
        qk_norm=name == "qwen3",
        **shape,
    )


def _from_gguf(name: str, f: Fields, file: TensorFile) -> ModelConfig:
    return ModelConfig(family=name, **gguf_shape(f, file))


FAMILIES = tuple(
    Family(
        name,
        (f"{title}ForCausalLM",),
        (name,),
        (name,),
        partial(_from_hf, name),
        partial(_from_gguf, name),
        Names(HF_NAMES),
        Names(GGUF_NAMES),
    )
    for name, title in (("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
)
