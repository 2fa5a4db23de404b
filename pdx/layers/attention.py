"""Attention with its projections: the only place that calls the attention kernels."""

from __future__ import annotations

from typing import Literal

import jax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import decode_attention, flash_attention, reference_attention
from pallas_kernels.decode_attention.api import MAX_QUERIES
from pallas_kernels.decode_attention.api import explain as explain_decode
from pallas_kernels.flash_attention.api import explain as explain_flash
from pdx.cache.dense import LayerCache
from pdx.config import ModelConfig
from pdx.errors import RequestError
from pdx.layers.linear import linear
from pdx.layers.norm import rms_norm
from pdx.layers.rope import rotate

Kernels = Literal["auto", "xla", "pallas"]


def implementation(kernels: Kernels) -> str:
    """The kernel library's name for a choice of the user: `pallas` is the one of this device."""
    if kernels == "pallas":
        platform = jax.default_backend()
        return "tpu" if platform == "tpu" else "gpu"
    if kernels not in ("auto", "xla"):
        raise RequestError(f"kernels {kernels!r} is not one of auto, xla, pallas")
    return kernels


def explain(kernels: Kernels) -> dict[str, str]:
    """Which path each phase's attention takes, and why. Raises NotImplementedError as the kernels would."""
    name = implementation(kernels)
    return {"prefill": str(explain_flash(name)), "decode": str(explain_decode(name))}


def attention(
    p: dict,
    cfg: ModelConfig,
    x: Float[Array, "B T D"],
    *,
    window: int | None,
    rotation: tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    lengths: Int[Array, " B"],
    cache: LayerCache | None,
    kernels: Kernels,
) -> tuple[Float[Array, "B T D"], LayerCache | None]:
    """Project, rotate, append to the cache and attend over what it holds.

    `lengths` are the tokens a row holds with this chunk. Without a cache the chunk attends to itself
    through the dense reference, which differentiates.
    """
    b, t, _ = x.shape
    h = cfg.head_dim

    def heads(name, count):
        return linear(x, p[f"{name}_proj"], p.get(f"{name}_bias")).reshape(b, t, count, h)

    q, k, v = heads("q", cfg.num_heads), heads("k", cfg.num_kv_heads), heads("v", cfg.num_kv_heads)
    if cfg.qk_norm:
        q, k = rms_norm(q, p["q_norm"], cfg.norm_eps), rms_norm(k, p["k_norm"], cfg.norm_eps)
    q, k = rotate(q, *rotation), rotate(k, *rotation)
    settings = {
        "starts": positions[:, 0],
        "lengths": lengths,
        "scale": cfg.attn_scale,
        "window": window,
        "softcap": cfg.attn_softcap,
    }
    if cache is None:
        out = reference_attention(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), **settings)
    else:
        cache = cache.append(k, v, positions, valid)
        op = decode_attention if t <= MAX_QUERIES else flash_attention
        out = op(q, cache.k, cache.v, **settings, implementation=implementation(kernels))
    return linear(out.reshape(b, t, cfg.num_heads * h), p["o_proj"], p.get("o_bias")), cache
