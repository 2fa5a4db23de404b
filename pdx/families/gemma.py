"""Gemma 2 and the text side of Gemma 3: norms around both halves of a layer, windows, a scaled embedding."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

from pdx.config import ModelConfig, RopeConfig
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
from pdx.families.fields import REFUSED, Fields
from pdx.families.rope import rope_from_hf

DEFAULTS = {
    "gemma2": {
        "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
}
DEFAULTS["gemma3"] = {**DEFAULTS["gemma2"], "vocab_size": 262208, "max_position_embeddings": 131072}
# Every n-th layer sees the whole context, the others a window.
PERIOD = {"gemma2": 2, "gemma3": 6}
LOCAL_THETA = 10_000.0  # the base of Gemma 3's window layers

HF = Names(
    {
        **HF_NAMES,
        "attn_post_norm": "model.layers.{i}.post_attention_layernorm.weight",
        "mlp_norm": "model.layers.{i}.pre_feedforward_layernorm.weight",
        "mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm.weight",
    },
    minus_one=("final_norm", "attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm", "q_norm", "k_norm"),
    # Checkpoints with an image encoder nest the text model, the way depends on the version that wrote them.
    prefixes=("model.", "language_model.model.", "model.language_model."),
    ignorable=(r"(model\.)?(vision_tower|multi_modal_projector)\..*",),
)


def _scale(d_model: int) -> float:
    return math.sqrt(d_model)


def _from_hf(name: str, f: Fields) -> ModelConfig:
    if f.has("text_config"):
        return _from_multimodal(name, f)
    shape = hf_shape(f, DEFAULTS[name], "hidden_activation")
    f.get("hidden_act")  # a leftover of Gemma 1; hidden_activation is what counts
    window = f.optional_number("sliding_window", 4096)
    period = f.integer("sliding_window_pattern", f.get("_sliding_window_pattern", PERIOD[name]))
    windows = windows_from_types(f, shape["num_layers"], int(window) if window else None,
                                 lambda layer: (layer + 1) % period != 0)
    thetas = (1_000_000.0, LOCAL_THETA) if name == "gemma3" else (10_000.0, None)
    rope, rope_window = rope_from_hf(f, shape["head_dim"], shape["max_context"], *thetas)
    if name == "gemma3":  # its published code accepts the field and does not use it
        f.only("attn_logit_softcapping", 0)
    bias = f.flag("attention_bias", False)
    return ModelConfig(
        family=name, rope=rope, rope_window=rope_window, windows=windows, qkv_bias=bias, o_bias=bias,
        attn_scale=f.number("query_pre_attn_scalar", 256) ** -0.5,
        attn_softcap=f.optional_number("attn_logit_softcapping", 50.0) if name == "gemma2" else None,
        logit_softcap=f.optional_number("final_logit_softcapping", 30.0 if name == "gemma2" else None),
        embed_scale=_scale(shape["d_model"]), qk_norm=name == "gemma3", post_norms=True, **shape,
    )


def _from_multimodal(name: str, f: Fields) -> ModelConfig:
    """The text side of a model with an image encoder; what belongs to images is left out on purpose."""
    for key, harmless in REFUSED.items():
        f.only(key, *harmless)
    for key in f.data:
        if key in ("vision_config", "mm_tokens_per_image") or key.endswith(("_token_index", "_token_id")):
            f.get(key)
    tied = f.flag("tie_word_embeddings", f.get("text_config").get("tie_word_embeddings", True))
    inner = Fields({**f.get("text_config"), "tie_word_embeddings": tied}, f.where, "text_config.", f.held)
    cfg = _from_hf(name, inner)
    f.data = {**f.data, **{f"text_config.{k}": v for k, v in inner.unused().items()}}
    return cfg


def _from_gguf(name: str, f: Fields, file: TensorFile) -> ModelConfig:
    """llama.cpp has already added one to the norms, and derives what its files do not say as is done here."""
    shape = gguf_shape(f, file)
    layers, local = shape["num_layers"], f.get("attention.sliding_window_pattern")
    if not isinstance(local, list):
        period = f.integer("attention.sliding_window_pattern", PERIOD[name])
        local = [(i + 1) % period != 0 for i in range(layers)]
    window = f.optional_number("attention.sliding_window", 4096 if name == "gemma2" else None)
    windows = tuple(int(window) if window and is_local else None for is_local in local)
    # The 27B models scale queries by their width per head instead of by the head dimension.
    wide = layers == {"gemma2": 46, "gemma3": 62}[name]
    per_head = shape["d_model"] // shape["num_heads"] if wide else shape["head_dim"]
    cfg = ModelConfig(
        family=name, activation="gelu_tanh", windows=windows, attn_scale=per_head**-0.5,
        attn_softcap=f.optional_number("attn_logit_softcapping", 50.0 if name == "gemma2" else None),
        logit_softcap=f.optional_number("final_logit_softcapping", 30.0 if name == "gemma2" else None),
        embed_scale=_scale(shape["d_model"]), post_norms=True, **shape,
    )
    if name == "gemma2":
        return cfg
    return dataclasses.replace(cfg, rope_window=RopeConfig(f.number("rope.freq_base_swa", LOCAL_THETA)))


FAMILIES = (
    Family("gemma2", ("Gemma2ForCausalLM",), ("gemma2",), ("gemma2",), partial(_from_hf, "gemma2"),
           partial(_from_gguf, "gemma2"), HF, Names(GGUF_NAMES)),
    Family("gemma3", ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"), ("gemma3_text", "gemma3"), ("gemma3",),
           partial(_from_hf, "gemma3"), partial(_from_gguf, "gemma3"), HF, Names(GGUF_NAMES)),
)
