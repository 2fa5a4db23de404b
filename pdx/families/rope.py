"""RoPE scaling rules as one divisor per frequency, and the configuration fields that describe them."""

from __future__ import annotations

import math

from pdx.config import RopeConfig
from pdx.families.fields import Fields, short

# Keys of an entry that are not numbers of its rule. `finetuned` only says how the model was trained.
_NAMING = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned")
# The numbers of all rules. A rule ignores the numbers of other rules, as transformers does.
_NUMBERS = frozenset(
    """
    factor original_max_position_embeddings attention_factor attn_factor beta_fast beta_slow short_factor long_factor
    low_freq_factor high_freq_factor mscale mscale_all_dim truncate extrapolation_factor
    """.split()  # noqa: SIM905
)
_LAYER_TYPES = ("full_attention", "sliding_attention")


def linear(factor: float, head_dim: int) -> tuple[float, ...]:
    """Position interpolation: every angle is divided by `factor` (Chen et al., 2023)."""
    return (factor,) * (head_dim // 2)


def llama3(theta: float, head_dim: int, factor: float, low: float, high: float, original: int) -> tuple[float, ...]:
    """Llama 3.1's rule: low frequencies are divided by `factor`, high ones are kept, with a linear ramp between.

    The ramp lies between `low` and `high` rotations within the `original` context, in tokens.
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


def yarn(
    theta: float,
    head_dim: int,
    factor: float,
    original: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> tuple[float, ...]:
    """YaRN (Peng et al., 2023): frequencies with fewer than `beta_slow` rotations within the `original` context are
    divided by `factor`, those with more than `beta_fast` are kept, with a linear ramp over the index between."""

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


def _yarn_temperature(f: Fields, factor: float) -> float:
    """The factor on cos and sin of a YaRN entry.

    `attention_factor` replaces the rule's value. `attn_factor` multiplies it, as in YaRN's own code, vLLM and
    llama.cpp; published values make sense only so (0.878 with a factor of 4 cancels the rule's 1.139). transformers
    ignores `attn_factor`.
    """
    mscale, mscale_all = f.optional_number("mscale"), f.optional_number("mscale_all_dim")
    temperature = yarn_attention(factor)
    if mscale and mscale_all:
        temperature = yarn_attention(factor, mscale) / yarn_attention(factor, mscale_all)
    if f.get("attention_factor") is not None:
        return f.number("attention_factor")
    if (more := f.number("attn_factor", 1.0)) == 1:
        return temperature
    f.notes.append(
        f"{f.prefix}attn_factor = {more} multiplies YaRN's attention factor {temperature:.6g}, as in YaRN's "
        "own code, vLLM and llama.cpp; transformers ignores it"
    )
    return temperature * more


def _rule(f: Fields, kind: str, theta: float, head_dim: int, positions: int, original: int) -> tuple[RopeConfig, int]:
    """The `RopeConfig` of an entry with the rule `kind`, and the model's context in tokens.

    Entries of llama3 and yarn name the `original` context of the training, so `positions` (max_position_embeddings)
    may already include the scaling. With linear it does not; vLLM reads it the same way.
    """
    if kind == "linear":
        factor = f.number("factor")
        return RopeConfig(theta, linear(factor, head_dim)), max(positions, int(original * factor))
    if kind == "llama3":
        divisors = llama3(
            theta, head_dim, f.number("factor"), f.number("low_freq_factor"), f.number("high_freq_factor"), original
        )
        return RopeConfig(theta, divisors), positions
    if kind != "yarn":
        raise f.unsupported("rope_type", kind, "default, linear, llama3 and yarn")
    factor = f.number("factor", positions / original)
    divisors = yarn(
        theta,
        head_dim,
        factor,
        original,
        f.number("beta_fast", 32.0),
        f.number("beta_slow", 1.0),
        f.flag("truncate", True),
    )
    f.only("extrapolation_factor", 1)
    return RopeConfig(theta, divisors, _yarn_temperature(f, factor)), max(positions, int(original * factor))


def _scaled(f: Fields, theta: float, head_dim: int, positions: int, original: int | None) -> tuple[RopeConfig, int]:
    """One `rope_scaling` or `rope_parameters` entry, and the model's context in tokens.

    `original` is the `original_max_position_embeddings` outside the entry; it wins over the entry's own, as in
    transformers. Raises UnsupportedModelError for an unknown rule, and for a parameter that no rule has.
    """
    for key in _NAMING:
        f.used.add(key)
    theta = f.number("rope_theta", theta)
    f.only("partial_rotary_factor", 1, 1.0)
    kind = f.get("rope_type", f.get("type", "default"))
    if kind == "default":
        f.get("mrope_section")  # only images have positions in several sections
        rope, context = RopeConfig(theta), positions
    else:
        inside = f.integer("original_max_position_embeddings", positions)
        rope, context = _rule(f, kind, theta, head_dim, positions, original or inside)
    f.only("apply_yarn_scaling", True)
    for key, value in f.unused().items():
        if key not in _NUMBERS:
            raise f.unsupported(key, value, f"rope_type {kind} without it")
        f.notes.append(f"{f.prefix}{key} = {short(value)} is ignored: rope_type {kind} does not use it")
    return rope, context


def _parameters(f: Fields) -> Fields:
    """The fields of `rope_scaling`, the older name, or else of `rope_parameters`."""
    older, newer = (f.inner(f.get(key, {}), "rope_parameters.", key) for key in ("rope_scaling", "rope_parameters"))
    return older if older.data else newer


def rope_from_hf(
    f: Fields, head_dim: int, positions: int, theta: float = 10_000.0, window_theta: float | None = None
) -> tuple[RopeConfig, RopeConfig | None, int]:
    """The rotary embeddings of full and of window layers (None: the same), and the context in tokens.

    Reads the older fields (`rope_theta`, `rope_scaling`, `rope_local_base_freq`) and the newer `rope_parameters`, flat
    or with one entry per layer type. `theta` and `window_theta` are the family's defaults; `positions` is
    `max_position_embeddings`.
    """
    params, top_theta, original = _parameters(f), f.number("rope_theta", theta), None
    if f.get("original_max_position_embeddings") is not None:
        original = f.integer("original_max_position_embeddings")
    nested = {k: params.inner(params.get(k, {}), f"{k}.", k) for k in _LAYER_TYPES if k in params.data}
    flat = params.inner({k: v for k, v in params.data.items() if k not in nested}, "", "")

    def entry(kind: str, base: float) -> tuple[RopeConfig, int]:
        values = nested.get(kind, flat if kind == "full_attention" else flat.inner({}, "", ""))
        return _scaled(values, base, head_dim, positions, None if values is not flat else original)

    if nested:
        for key in sorted(flat.unused().keys() - {*_NAMING, *_NUMBERS}):
            raise flat.unsupported(key, flat.get(key), f"entries of {' and '.join(_LAYER_TYPES)}")
    full, context = entry("full_attention", top_theta)
    if window_theta is not None:  # Gemma 3: max_position_embeddings already includes the scaling of its full layers
        window, _ = entry("sliding_attention", f.number("rope_local_base_freq", window_theta))
        return full, window, positions
    window = entry("sliding_attention", top_theta)[0] if "sliding_attention" in nested else full
    return full, window if window != full else None, context


def rope_from_gguf(
    f: Fields, head_dim: int, max_context: int, freqs: tuple[float, ...] | None = None, theta: float = 10_000.0
) -> RopeConfig:
    """The rotary embedding that `{arch}.rope.*` describes; `freqs` are the divisors of a `rope_freqs.weight` tensor.

    `theta` is the family's base, used if the file has none. `context_length` already includes a scaling.
    """
    theta = f.number("rope.freq_base", theta)
    f.only("rope.dimension_count", head_dim)
    # A factor without a type means linear, as llama.cpp reads older files.
    kind = f.get("rope.scaling.type", "linear")
    factor = f.number("rope.scaling.factor", f.optional_number("rope.scale_linear") or 1.0)
    original = f.integer("rope.scaling.original_context_length", max_context)
    f.get("rope.scaling.finetuned")
    f.only("rope.scaling.yarn_attn_factor", 1.0)
    f.only("rope.scaling.yarn_log_multiplier", 0.0)
    if kind == "yarn":
        if freqs is not None:
            raise f.unsupported("rope.scaling.type", kind, "either it or rope_freqs.weight, not both")
        divisors = yarn(
            theta,
            head_dim,
            factor,
            original,
            f.number("rope.scaling.yarn_beta_fast", 32.0),
            f.number("rope.scaling.yarn_beta_slow", 1.0),
        )
        f.only("rope.scaling.yarn_ext_factor", 1.0)
        return RopeConfig(theta, divisors, f.number("rope.scaling.attn_factor", 1.0) * yarn_attention(factor))
    if kind not in ("none", "linear"):
        raise f.unsupported("rope.scaling.type", kind, "none, linear and yarn")
    f.only("rope.scaling.attn_factor", 1.0)
    if kind == "linear" and factor != 1:
        freqs = tuple(factor * d for d in freqs or (1.0,) * (head_dim // 2))
    return RopeConfig(theta, freqs)
