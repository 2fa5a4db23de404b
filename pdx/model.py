"""The model: parameter declarations, initialisation and the one `forward` of every family.

1. `embed` looks up tokens [B, T]; `cache.rows` says where each stands in its row and which are real.
2. Each `layer` appends keys and values to its part of the cache, attends over it, and runs the MLP.
3. The last norm and the head turn the wanted rows into logits; `cache.advance` records the new lengths.

Prefill, decode and verification are this `forward` with T = chunk, 1 and draft + 1.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from pdx.cache.dense import DenseCache
from pdx.cache.given import as_new_lengths, check_cache, whole_numbers
from pdx.cache.layer import LayerCache
from pdx.cache.paged import PagedCache
from pdx.cache.rows import PackedRows, TokenRows
from pdx.config import ModelConfig
from pdx.layers.attention import attention
from pdx.layers.kernels import Kernels, as_kernels
from pdx.layers.linear import embed, projections, unembed
from pdx.layers.mlp import mlp
from pdx.layers.norm import rms_norm
from pdx.layers.rope import rotation
from pdx.meshes import ANY_DEVICES, Devices
from pdx.sharding import ArraySpec, is_spec

Params = dict


def param_specs(cfg: ModelConfig, dtype=jnp.float32) -> Params:
    """Declare the parameters: a tree of `ArraySpec`, with a list of one dict per layer (not stacked).

    Matrices are stored ``[out, in]``. Norm weights are the factor itself, in f32; for families that publish an offset
    from one (Gemma), loading adds the one. The cost model counts what is declared here, by `part`.
    """
    d, f, n, k, h = cfg.d_model, cfg.d_ff, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim

    def norm(size):
        return ArraySpec((size,), (None,), jnp.float32, init="ones", part="norms")

    def bias(size, axis=None, units=None):
        return ArraySpec((size,), (axis,), dtype, units=units, init="zeros", part="biases")

    def one_layer() -> Params:
        p = {"attn_norm": norm(d), "mlp_norm": norm(d)} | projections(cfg, dtype)
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
        "embed": ArraySpec((cfg.vocab_size, d), ("vocab", None), dtype, part="embedding"),
        "layers": [one_layer() for _ in range(cfg.num_layers)],
        "final_norm": norm(d),
    }
    if not cfg.tie_embeddings:
        specs["lm_head"] = ArraySpec((cfg.vocab_size, d), ("vocab", None), dtype, part="head")
    return specs


def init_params(cfg: ModelConfig, key: jax.Array, dtype=jnp.float32) -> Params:
    """Random parameters: normal with variance 1/in for matrices, ones for norms, zeros for biases.

    Example:
      >>> params = pdx.init_params(cfg, jax.random.key(0))
      >>> params["embed"].shape, params["layers"][0]["k_proj"].shape
      ((64, 32), (16, 32))
    """
    leaves, tree = jax.tree.flatten(param_specs(cfg, dtype), is_leaf=is_spec)

    def make(spec: ArraySpec, key: jax.Array) -> jax.Array:
        if spec.init == "ones":
            return jnp.ones(spec.shape, spec.dtype)
        if spec.init == "zeros":
            return jnp.zeros(spec.shape, spec.dtype)
        return (jax.random.normal(key, spec.shape) * spec.shape[-1] ** -0.5).astype(spec.dtype)

    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(tree, [make(s, k) for s, k in zip(leaves, keys, strict=True)])


@struct.dataclass
class ForwardOutput:
    """What `forward` returns; a field that was not asked for is None (or empty)."""

    logits: Float[Array, "B V"] | Float[Array, "B T V"] | None
    cache: DenseCache | PagedCache | None
    final_hidden: Float[Array, "B T D"]  # after the last norm, before the head
    hidden: dict[int, Float[Array, "B T D"]]  # residual stream: 0 is the embedding, i is after layer i


def forward(
    params: Params,
    cfg: ModelConfig,
    tokens: Int[Array, "B T"],
    cache: DenseCache | PagedCache | None = None,
    *,
    lengths: Int[Array, " B"] | None = None,
    rows: TokenRows | PackedRows | None = None,
    logits: Literal["last", "all", "none"] = "all",
    hidden_layers: tuple[int, ...] = (),
    kernels: Kernels = "auto",
) -> ForwardOutput:
    """Run T new tokens per row after those in the cache, or on their own without a cache.

    Over a paged cache the tokens of many requests are packed into one row [1, T], and `rows` says which request owns
    each; "last" logits are then those of each request's last token, [R, V].

    Args:
      params: as `param_specs` declares them.
      tokens: token ids; ids outside the vocabulary are clipped into it.
      cache: appended to and returned. None: causal attention inside the chunk only, with static shapes, so the result
        can be differentiated and vmapped.
      lengths: how many of the T tokens of each row are real; the rest is padding, which is neither written nor
        attended to. None: all.
      rows: positions and owners of the tokens, in place of `lengths`; None: the cache makes them from `lengths`.
      logits: of the last real token of each row [B, V], of all positions [B, T, V], or none.
        A row of length 0 has no last token: its logits mean nothing.
      hidden_layers: residual streams to return: 0 is the embedding, i is after layer i, up to L.
      kernels: auto, xla or pallas, for attention over a cache; or one's own implementations by op
        (`pdx.layers.kernels`).

    Raises:
      ValueError: a layer that does not exist, no tokens, or a chunk larger than the cache was made for.
      RequestError: tokens or lengths of another shape or type; DonatedError: a cache that a step has used up.

    Example:
      >>> out = pdx.forward(params, cfg, tokens, lengths=lengths, hidden_layers=(0, 2))
      >>> out.logits.shape, out.hidden[2].shape
      ((2, 3, 64), (2, 3, 32))
      >>> grads = jax.grad(lambda p: pdx.forward(p, cfg, tokens).logits.mean())(params)
    """
    kernels = as_kernels(kernels)
    if cache is not None:
        check_cache(cache, DenseCache, PagedCache)
    tokens = jnp.asarray(whole_numbers("tokens", tokens, (None, None), "[B, T]"))
    b, t = tokens.shape
    if any(not 0 <= i <= cfg.num_layers for i in hidden_layers):
        raise ValueError(f"hidden_layers {hidden_layers}: a model of {cfg.num_layers} layers has 0 to {cfg.num_layers}")
    if t < 1:
        raise ValueError(f"tokens {tokens.shape} are empty: a call takes at least one token a row")
    if rows is not None:
        _check_rows(rows, lengths, tokens.shape, cache)
    elif cache is not None:
        rows = cache.rows(lengths, b, t)
    else:
        rows = TokenRows.behind(jnp.zeros(b, jnp.int32), as_new_lengths(lengths, b, t), t)
    layer_rows = [rows] * cfg.num_layers if cache is None else cache.layer_rows(cast(Any, rows))
    rotations = {r: rotation(r, cfg.head_dim, rows.positions) for r in map(cfg.layer_rope, range(cfg.num_layers))}

    # Without a cache nothing says on which devices the parameters are.
    mesh: Devices = ANY_DEVICES if cache is None else cache.mesh
    x = embed(params["embed"], tokens, cfg.embed_scale, mesh)
    hidden = {0: x} if 0 in hidden_layers else {}
    layers = []
    for i, p in enumerate(params["layers"]):
        x, layer_cache = layer(
            p,
            x,
            cache.layers[i] if cache is not None else None,
            layer_rows[i],
            rotations[cfg.layer_rope(i)],
            cfg=cfg,
            window=cfg.windows[i],
            mesh=mesh,
            kernels=kernels,
        )
        layers.append(layer_cache)
        if i + 1 in hidden_layers:
            hidden[i + 1] = x
    x = rms_norm(x, params["final_norm"], cfg.norm_eps)
    return ForwardOutput(
        logits=_logits(params, cfg, x, rows, logits, mesh),
        cache=None if cache is None else cache.advance(cast(Any, rows), tuple(layers)),
        final_hidden=x,
        hidden=hidden,
    )


def _check_rows(rows: TokenRows | PackedRows, lengths, shape: tuple[int, ...], cache) -> None:
    """Raise ValueError unless `rows` are of the kind that the cache takes and describe these tokens."""
    wanted = TokenRows if cache is None else cache.ROWS
    if not isinstance(rows, wanted) or rows.positions.shape != shape:
        where = f" for tokens {rows.positions.shape}" if isinstance(rows, TokenRows | PackedRows) else ""
        raise ValueError(f"rows must be {wanted.__name__} for tokens {shape}, got {type(rows).__name__}{where}")
    if lengths is not None:
        raise ValueError("lengths and rows both say which tokens are real: give one of them")


# Jitted on its own so that layers of one kind are traced and lowered once, however many there are. The compiler
# inlines the calls.
@partial(jax.jit, static_argnames=("cfg", "window", "mesh", "kernels"))
def layer(
    p,
    x: Float[Array, "B T D"],
    cache: LayerCache | None,
    rows: TokenRows | PackedRows,
    rotation,
    *,
    cfg: ModelConfig,
    window: int | None,
    mesh: Devices,
    kernels: Kernels,
):
    """One layer: attention and MLP, each added to the residual stream. Returns the stream and the layer's cache.

    Jitted, so it is traced once for all layers with the same configuration and window.
    """
    y, cache = attention(
        p,
        cfg,
        rms_norm(x, p["attn_norm"], cfg.norm_eps),
        cache,
        rows,
        window=window,
        rotation=rotation,
        mesh=mesh,
        kernels=kernels,
    )
    x = x + (rms_norm(y, p["attn_post_norm"], cfg.norm_eps) if cfg.post_norms else y)
    y = mlp(p, cfg, rms_norm(x, p["mlp_norm"], cfg.norm_eps), mesh)
    return x + (rms_norm(y, p["mlp_post_norm"], cfg.norm_eps) if cfg.post_norms else y), cache


def _logits(
    params: Params, cfg: ModelConfig, x: Float[Array, "B T D"], rows: TokenRows | PackedRows, which: str, mesh: Devices
):
    if which == "none":
        return None
    head = params.get("lm_head", params["embed"])
    if which == "last":
        x = jnp.take_along_axis(x, jnp.maximum(rows.wanted, 0)[..., None], axis=1)
        x = x.reshape(-1, x.shape[-1])
    elif which != "all":
        raise ValueError(f"logits {which!r} is not one of last, all, none")
    return unembed(x, head, cfg.logit_softcap, mesh)
