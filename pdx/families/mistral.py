"""Mistral: Llama with a sliding window on every layer (7B v0.1) or on none. Its GGUF files say `llama`."""

from __future__ import annotations

from pdx.config import ModelConfig
from pdx.families.common import HF_NAMES, Family, Names, hf_shape, windows_from_types
from pdx.families.fields import Fields
from pdx.families.llama import PAIRS, from_gguf
from pdx.families.rope import rope_from_hf

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


def from_hf(f: Fields) -> ModelConfig:
    shape = hf_shape(f, DEFAULTS)
    rope, _, shape["max_context"] = rope_from_hf(f, shape["head_dim"], shape["max_context"])
    window = f.integer("sliding_window", 0 if f.has("sliding_window") else 4096, least=0) or None
    windows = windows_from_types(f, shape["num_layers"], window, lambda layer: True)
    if len(set(windows)) > 1:  # transformers warns and then ignores such a list
        raise f.unsupported("layer_types", f.get("layer_types"), "Mistral models whose layers are all alike")
    return ModelConfig(family="mistral", rope=rope, windows=windows, **shape)


FAMILIES = (Family("mistral", ("MistralForCausalLM",), ("mistral",), (), from_hf, from_gguf, Names(HF_NAMES), PAIRS),)
