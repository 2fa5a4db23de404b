"""Published RoPE scalings as one divisor per frequency, and where configurations keep them."""

from __future__ import annotations

import math
from typing import Any

from pdx.config import RopeConfig
from pdx.families.fields import Fields

# What `rope_scaling` may hold besides numbers that each rule reads itself.
_NAMING = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def linear(factor: float, head_dim: int) -> tuple[float, ...]:
    """Position interpolation: every angle is divided by `factor` (Chen et al., 2023)."""
    return (factor,) * (head_dim // 2)


def llama3(theta: float, head_dim: int, factor: float, low: float, high: float, original: int) -> tuple[float, ...]:
    """Llama 3.1's rule: long wavelengths are divided by `factor`, short ones kept, a ramp between.

    `low` and `high` are the numbers of rotations within the `original` context that bound the ramp.
    """
    divisors = []
    for i in range(head_dim // 2):
        rotations = original / (2 * math.pi * theta ** (2 * i / head_dim))
        if rotations < low:
            divisors.append(factor)
        elif rotations > high:
            divisors.append(1.0)
        else:
            smooth = (rotations - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(divisors)


def yarn(theta: float, head_dim: int, factor: float, original: int, beta_fast: float = 32.0, beta_slow: float = 1.0,
         truncate: bool = True) -> tuple[float, ...]:
    """YaRN (Peng et al., 2023): frequencies that turn fewer than `beta_slow` times within the `original`
    context are divided by `factor`, those above `beta_fast` kept, a ramp over their index between."""

    def index(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(beta_fast), index(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = max(high - low, 0.001)
    ramps = (min(max((i - low) / span, 0.0), 1.0) for i in range(head_dim // 2))
    return tuple(1 / (ramp / factor + 1 - ramp) for ramp in ramps)


def yarn_attention(factor: float, mscale: float = 1.0) -> float:
    """YaRN's temperature as a factor on cos and sin."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _scaled(f: Fields, theta: float, head_dim: int, max_context: int, original: int | None) -> RopeConfig:
    """One `rope_scaling` or `rope_parameters` entry. Raises UnsupportedModelError for a rule pdx does not have."""
    for key in _NAMING:
        f.used.add(key)
    theta = f.number("rope_theta", theta)
    f.only("partial_rotary_factor", 1, 1.0)
    kind = f.get("rope_type") or f.get("type", "default")
    if kind == "default":
        return RopeConfig(theta)
    original = f.integer("original_max_position_embeddings", original or max_context)
    attention = 1.0
    if kind == "linear":
        divisors = linear(f.number("factor"), head_dim)
    elif kind == "llama3":
        divisors = llama3(theta, head_dim, f.number("factor"), f.number("low_freq_factor"),
                          f.number("high_freq_factor"), original)
    elif kind == "yarn":
        factor = f.number("factor", max_context / original)
        divisors = yarn(theta, head_dim, factor, original, f.number("beta_fast", 32.0), f.number("beta_slow", 1.0),
                        f.flag("truncate", True))
        mscale, mscale_all = f.optional_number("mscale"), f.optional_number("mscale_all_dim")
        attention = yarn_attention(factor)
        if mscale and mscale_all:
            attention = yarn_attention(factor, mscale) / yarn_attention(factor, mscale_all)
        attention = f.number("attention_factor", attention)
    else:
        raise f.unsupported("rope_type", kind, "default, linear, llama3 and yarn")
    for key, value in f.unused().items():
        raise f.unsupported(key, value, f"rope_type {kind} without it")
    return RopeConfig(theta, divisors, attention)


def _parameters(f: Fields) -> dict[str, Any]:
    """The scaling under its older name, which wins where both are there, or its newer one."""
    older, newer = f.get("rope_scaling", {}), f.get("rope_parameters", {})
    for key, value in (("rope_scaling", older), ("rope_parameters", newer)):
        if not isinstance(value, dict):
            raise f.wrong(key, value, "an object")
    return older or newer


def extended_context(f: Fields, max_context: int) -> int:
    """`max_position_embeddings`, or what YaRN stretches the trained context to where that is more."""
    params = _parameters(f)
    original, factor = params.get("original_max_position_embeddings"), params.get("factor")
    if params.get("rope_type", params.get("type")) == "yarn" and original and factor:
        return max(max_context, round(original * factor))
    return max_context


def rope_from_hf(f: Fields, head_dim: int, max_context: int, theta: float = 10_000.0,
                 window_theta: float | None = None) -> tuple[RopeConfig, RopeConfig | None]:
    """The rotary embeddings of full and of window layers (None: the same).

    Reads both spellings: `rope_theta`, `rope_scaling`, `rope_local_base_freq`, and the newer
    `rope_parameters`, flat or one entry a layer type. `theta` and `window_theta` are the family's defaults.
    """
    params = _parameters(f)
    top_theta = f.number("rope_theta", theta)
    original = f.get("original_max_position_embeddings")
    nested = {k: v or {} for k, v in params.items() if k in ("full_attention", "sliding_attention")}

    def entry(values: dict[str, Any], base: float) -> RopeConfig:
        return _scaled(Fields(values, f.where, f"{f.prefix}rope_parameters."), base, head_dim, max_context, original)

    if window_theta is not None:
        window_theta = f.number("rope_local_base_freq", window_theta)
        full = nested.get("full_attention") or {k: v for k, v in params.items() if k not in nested}
        return entry(full, top_theta), entry(nested.get("sliding_attention", {}), window_theta)
    if nested:
        full, window = (entry(nested.get(k, {}), top_theta) for k in ("full_attention", "sliding_attention"))
        return full, window if window != full and "sliding_attention" in nested else None
    return entry(params, top_theta), None


def rope_from_gguf(f: Fields, head_dim: int, max_context: int, freqs: tuple[float, ...] | None = None) -> RopeConfig:
    """The rotary embedding of `{arch}.rope.*`; `freqs` are the divisors of a `rope_freqs.weight` tensor, if any."""
    theta = f.number("rope.freq_base", 10_000.0)
    f.only("rope.dimension_count", head_dim)
    # A factor without a type means linear: llama.cpp's reading of older files.
    kind = f.get("rope.scaling.type", "linear")
    factor = f.number("rope.scaling.factor", f.optional_number("rope.scale_linear") or 1.0)
    original = f.integer("rope.scaling.original_context_length", max_context)
    f.get("rope.scaling.finetuned")
    if kind == "yarn":
        if freqs is not None:
            raise f.unsupported("rope.scaling.type", kind, "either it or rope_freqs.weight, not both")
        divisors = yarn(theta, head_dim, factor, original, f.number("rope.scaling.yarn_beta_fast", 32.0),
                        f.number("rope.scaling.yarn_beta_slow", 1.0))
        f.only("rope.scaling.yarn_ext_factor", 1.0)
        return RopeConfig(theta, divisors, f.number("rope.scaling.attn_factor", 1.0) * yarn_attention(factor))
    if kind not in ("none", "linear"):
        raise f.unsupported("rope.scaling.type", kind, "none, linear and yarn")
    f.only("rope.scaling.attn_factor", 1.0)
    if kind == "linear" and factor != 1:
        freqs = tuple(factor * d for d in freqs or (1.0,) * (head_dim // 2))
    return RopeConfig(theta, freqs)
