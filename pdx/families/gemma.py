"""Gemma 2 and the text side of Gemma 3: norms around both halves of a layer, windows, a scaled embedding."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

from pdx.config import ModelConfig, RopeConfig
from pdx.families.common import (
    GGUF_NAMES,
    HF_NAMES,
    Family,
    Names,
    TensorFile,
    gguf_shape,
    gguf_windows,
    hf_shape,
    windows_from_types,
)
from pdx.families.fields import REFUSED, Fields
from pdx.families.rope import linear, rope_from_hf

DEFAULTS = {
    "gemma2": {
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
}
DEFAULTS["gemma3"] = {**DEFAULTS["gemma2"], "vocab_size": 262208, "max_position_embeddings": 131072}
# Every n-th layer attends to the whole context, the others to a window.
PERIOD = {"gemma2": 2, "gemma3": 6}
LOCAL_THETA = 10_000.0  # the base of Gemma 3's window layers
LONG_CONTEXT, LONG_FACTOR = 131_072, 8.0  # the context of Gemma 3's larger models, and their linear RoPE scaling

HF = Names(
    {
        **HF_NAMES,
        "attn_post_norm": "model.layers.{i}.post_attention_layernorm.weight",
        "mlp_norm": "model.layers.{i}.pre_feedforward_layernorm.weight",
        "mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm.weight",
    },
    minus_one=("final_norm", "attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm", "q_norm", "k_norm"),
    # Checkpoints with an image encoder nest the text model; how depends on the version that wrote them.
    prefixes=("model.", "language_model.model.", "model.language_model.", ""),
)


def _scale(d_model: int) -> float:
    return math.sqrt(d_model)


def _from_hf(name: str, f: Fields) -> ModelConfig:
    if f.get("text_config") is not None:
        return _from_multimodal(name, f)
    shape = hf_shape(f, DEFAULTS[name], "hidden_activation")
    f.get("hidden_act")  # a leftover of Gemma 1; hidden_activation is what counts
    window = f.integer("sliding_window", 0 if f.has("sliding_window") else 4096, least=0) or None
    period = f.integer("sliding_window_pattern", f.get("_sliding_window_pattern", PERIOD[name]))
    windows = windows_from_types(f, shape["num_layers"], window, lambda layer: (layer + 1) % period != 0)
    thetas = (1_000_000.0, LOCAL_THETA) if name == "gemma3" else (10_000.0, None)
    rope, rope_window, shape["max_context"] = rope_from_hf(f, shape["head_dim"], shape["max_context"], *thetas)
    if name == "gemma3":  # its published code accepts the field and does not use it
        f.only("attn_logit_softcapping", 0)
    bias = f.flag("attention_bias", False)
    return ModelConfig(
        family=name,
        rope=rope,
        rope_window=rope_window,
        windows=windows,
        qkv_bias=bias,
        o_bias=bias,
        attn_scale=f.number("query_pre_attn_scalar", 256) ** -0.5,
        attn_softcap=f.optional_number("attn_logit_softcapping", 50.0) if name == "gemma2" else None,
        logit_softcap=f.optional_number("final_logit_softcapping", 30.0 if name == "gemma2" else None),
        embed_scale=_scale(shape["d_model"]),
        qk_norm=name == "gemma3",
        post_norms=True,
        **shape,
    )


def _from_multimodal(name: str, f: Fields) -> ModelConfig:
    """The text side of a model with an image encoder. Fields about images are ignored on purpose."""
    for key, harmless in REFUSED.items():
        f.only(key, *harmless)
    for key in f.data:
        if key in ("vision_config", "mm_tokens_per_image") or key.endswith(("_token_index", "_token_id")):
            f.get(key)
    text = f.inner(f.get("text_config"), "text_config.", "text_config")
    tied = f.flag("tie_word_embeddings", text.flag("tie_word_embeddings", True))
    inner = text.inner({**text.data, "tie_word_embeddings": tied}, "", "")
    cfg = _from_hf(name, inner)
    f.data = {**f.data, **{f"text_config.{k}": v for k, v in inner.unused().items()}}
    return cfg


def _from_gguf(name: str, f: Fields, file: TensorFile) -> ModelConfig:
    """A GGUF file. llama.cpp has already added one to the norms. Missing fields are derived as llama.cpp does."""
    if name == "gemma2":
        shape = gguf_shape(f, file)
    else:  # Ollama's files leave out what all Gemma 3 models share, or use other field names
        shape = gguf_shape(f, file, f.number("rope.global.freq_base", 1_000_000.0), eps=1e-6)
        _add_scaling(f, shape)
    layers = shape["num_layers"]
    windows = gguf_windows(f, layers, lambda layer: (layer + 1) % PERIOD[name] != 0, 4096 if name == "gemma2" else 0)
    # The 27B models scale queries by their width per head instead of by the head dimension.
    wide = layers == {"gemma2": 46, "gemma3": 62}[name]
    per_head = shape["d_model"] // shape["num_heads"] if wide else shape["head_dim"]
    cfg = ModelConfig(
        family=name,
        activation="gelu_tanh",
        windows=windows,
        attn_scale=per_head**-0.5,
        attn_softcap=f.optional_number("attn_logit_softcapping", 50.0 if name == "gemma2" else None),
        logit_softcap=f.optional_number("final_logit_softcapping", 30.0 if name == "gemma2" else None),
        embed_scale=_scale(shape["d_model"]),
        post_norms=True,
        **shape,
    )
    if name == "gemma2":
        return cfg
    local = f.number("rope.freq_base_swa", f.number("rope.local.freq_base", LOCAL_THETA))
    return dataclasses.replace(cfg, rope_window=RopeConfig(local))


def _add_scaling(f: Fields, shape: dict[str, Any]) -> None:
    """Add the RoPE scaling of Gemma 3's large models (context 131072) if the file has no field about RoPE."""
    f.only("rope.freq_scale", 1.0)
    told = f.has("rope.freq_base") or any(key.startswith("rope.scal") for key in f.data)
    if not told and shape["max_context"] >= LONG_CONTEXT:
        shape["rope"] = RopeConfig(shape["rope"].theta, linear(LONG_FACTOR, shape["head_dim"]))
        f.notes.append(
            f"the file has no RoPE scaling: full layers get the factor {LONG_FACTOR:g}, as in "
            f"every published Gemma 3 with a context of {LONG_CONTEXT} tokens"
        )


FAMILIES = (
    Family(
        "gemma2",
        ("Gemma2ForCausalLM",),
        ("gemma2",),
        ("gemma2",),
        partial(_from_hf, "gemma2"),
        partial(_from_gguf, "gemma2"),
        HF,
        Names(GGUF_NAMES),
    ),
    Family(
        "gemma3",
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        ("gemma3_text", "gemma3"),
        ("gemma3",),
        partial(_from_hf, "gemma3"),
        partial(_from_gguf, "gemma3"),
        HF,
        Names(GGUF_NAMES),
    ),
)
