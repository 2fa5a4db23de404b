"""Llama 2, 3, 3.1 and later, and models of the same architecture (SmolLM2)."""

from __future__ import annotations

from pdx.config import ModelConfig
from pdx.families.common import GGUF_NAMES, HF_NAMES, Family, Names, TensorFile, gguf_shape, gguf_windows, hf_shape
from pdx.families.fields import Fields
from pdx.families.rope import rope_from_hf

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
# llama.cpp rotates neighbouring rows for this architecture, so its files store query and key rows in that order.
PAIRS = Names(GGUF_NAMES, interleaved=("q_proj", "k_proj", "q_bias", "k_bias"))


def from_hf(f: Fields) -> ModelConfig:
    shape = hf_shape(f, DEFAULTS)
    f.only("sliding_window")
    rope, _, shape["max_context"] = rope_from_hf(f, shape["head_dim"], shape["max_context"])
    bias, mlp_bias = f.flag("attention_bias", False), f.flag("mlp_bias", False)
    return ModelConfig(family="llama", rope=rope, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias, **shape)


def from_gguf(f: Fields, file: TensorFile) -> ModelConfig:
    """A GGUF file. Mistral's files name this architecture too and may have a window on every layer."""
    shape = gguf_shape(f, file)
    return ModelConfig(family="llama", windows=gguf_windows(f, shape["num_layers"], lambda layer: True), **shape)


FAMILIES = (Family("llama", ("LlamaForCausalLM",), ("llama",), ("llama",), from_hf, from_gguf, Names(HF_NAMES), PAIRS),)
