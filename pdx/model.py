"""The model: parameter declarations, initialisation and the one `forward` of every family.

Prefill, decode and verification are this `forward` with T = chunk, 1 and draft + 1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pdx.config import ModelConfig
from pdx.sharding import ArraySpec, is_spec

Params = dict


def param_specs(cfg: ModelConfig, dtype=jnp.float32) -> Params:
    """The parameters as declared: a tree of `ArraySpec`, one dict a layer (a list, not a stack).

    Matrices are stored ``[out, in]``. Norm weights are the factor itself, in f32: families that publish
    an offset from one (Gemma) have it added when they are loaded.
    """
    d, f, n, k, h = cfg.d_model, cfg.d_ff, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim

    def norm(size):
        return ArraySpec((size,), (None,), jnp.float32, init="ones")

    def rows(heads, axis):
        return ArraySpec((heads * h, d), (axis, None), dtype, units=(heads, d))

    def bias(size, axis=None, units=None):
        return ArraySpec((size,), (axis,), dtype, units=units, init="zeros")

    def layer() -> Params:
        p = {
            "attn_norm": norm(d),
            "q_proj": rows(n, "heads"),
            "k_proj": rows(k, "kv_heads"),
            "v_proj": rows(k, "kv_heads"),
            "o_proj": ArraySpec((d, n * h), (None, "heads"), dtype, units=(d, n)),
            "mlp_norm": norm(d),
            "gate_proj": ArraySpec((f, d), ("mlp", None), dtype),
            "up_proj": ArraySpec((f, d), ("mlp", None), dtype),
            "down_proj": ArraySpec((d, f), (None, "mlp"), dtype),
        }
        if cfg.qkv_bias:
            p["q_bias"] = bias(n * h, "heads", (n,))
            p["k_bias"] = bias(k * h, "kv_heads", (k,))
            p["v_bias"] = bias(k * h, "kv_heads", (k,))
        if cfg.o_bias:
            p["o_bias"] = bias(d)
        if cfg.mlp_bias:
            p["gate_bias"], p["up_bias"], p["down_bias"] = bias(f, "mlp"), bias(f, "mlp"), bias(d)
        if cfg.qk_norm:
            p["q_norm"], p["k_norm"] = norm(h), norm(h)
        if cfg.post_norms:
            p["attn_post_norm"], p["mlp_post_norm"] = norm(d), norm(d)
        return p

    specs: Params = {
        "embed": ArraySpec((cfg.vocab_size, d), ("vocab", None), dtype),
        "layers": [layer() for _ in range(cfg.num_layers)],
        "final_norm": norm(d),
    }
    if not cfg.tie_embeddings:
        specs["lm_head"] = ArraySpec((cfg.vocab_size, d), ("vocab", None), dtype)
    return specs


def init_params(cfg: ModelConfig, key: jax.Array, dtype=jnp.float32) -> Params:
    """Random parameters: normal with variance 1/in for matrices, ones for norms, zeros for biases."""
    leaves, tree = jax.tree.flatten(param_specs(cfg, dtype), is_leaf=is_spec)

    def make(spec: ArraySpec, key: jax.Array) -> jax.Array:
        if spec.init == "ones":
            return jnp.ones(spec.shape, spec.dtype)
        if spec.init == "zeros":
            return jnp.zeros(spec.shape, spec.dtype)
        return (jax.random.normal(key, spec.shape) * spec.shape[-1] ** -0.5).astype(spec.dtype)

    return jax.tree.unflatten(tree, [make(s, k) for s, k in zip(leaves, jax.random.split(key, len(leaves)), strict=True)])
