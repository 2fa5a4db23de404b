"""The definition of attention over pages, in a page of jnp: gathers each query's whole row, full score matrix.

It is plain array operations with static shapes. Its memory grows with T times the width of the block tables.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.layouts import as_int32, unfold
from pallas_kernels.masking import sink_logits, soft_cap


def split_heads(pages: Array, layout: str, kv_heads: int, size: int) -> Array:
    """Pages of any layout, with any leading axes, as [..., p, K, H]."""
    if layout == "folded":
        return unfold(pages, kv_heads, size)
    return jnp.swapaxes(pages, -2, -3) if layout == "heads_first" else pages


def query_rows(query_starts: Int[Array, " R1"], tokens: int) -> Int[Array, " T"]:
    """The row that owns each packed query; R for padding."""
    return jnp.searchsorted(query_starts, jnp.arange(tokens), side="right", method="compare_all") - 1


def attention(
    q: Float[Array, "T N H"],
    k_pages: Array,
    v_pages: Array,
    *,
    block_tables: Int[Array, "R M"],
    lengths: Int[Array, " R"],
    query_starts: Int[Array, " R1"],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    k_scale: Float[Array, "P Kp p"] | None = None,
    v_scale: Float[Array, "P Kp p"] | None = None,
    layout: str,
    kv_heads: int,
    value_dim: int | None = None,
    return_lse: bool = False,
):
    """Softmax attention of packed queries over what their rows hold. Arguments are those of `paged_attention`."""
    t, n, h = q.shape
    rows = block_tables.shape[0]
    block_tables, lengths, query_starts = map(as_int32, (block_tables, lengths, query_starts))
    row = query_rows(query_starts, t)
    own = jnp.clip(row, 0, rows - 1)
    position = lengths[own] - query_starts[own + 1] + jnp.arange(t)
    taking_part = (row < rows) & (lengths[own] > 0)

    def dense(pages, size, scales):
        pages = split_heads(pages, layout, kv_heads, size).astype(jnp.float32)
        if scales is not None:
            pages = pages * scales[:, :kv_heads].transpose(0, 2, 1)[..., None]
        return pages[jnp.clip(block_tables, 0, pages.shape[0] - 1)].reshape(rows, -1, kv_heads, size)

    k, v = dense(k_pages, h, k_scale), dense(v_pages, value_dim or h, v_scale)
    key = jnp.arange(k.shape[1])
    mask = (key <= position[:, None]) & taking_part[:, None]  # [T, S]
    if window is not None:
        mask &= key > position[:, None] - window
    grouped = q.reshape(t, kv_heads, n // kv_heads, h).astype(jnp.float32)
    logits = jnp.einsum("tkgh,tskh->tkgs", grouped, k[own], precision=jax.lax.Precision.HIGHEST)
    logits = soft_cap(logits * scale, softcap)
    logits = jnp.where(mask[:, None, None], logits, -jnp.inf)  # memory past a row's tokens may hold NaN
    if sinks is not None:
        sink = jnp.broadcast_to(sink_logits(sinks).reshape(kv_heads, -1, 1), (*logits.shape[:3], 1))
        logits = jnp.concatenate([logits, sink], -1)
    lse = jax.nn.logsumexp(logits, -1, keepdims=True)
    weights = jnp.where(lse == -jnp.inf, 0.0, jnp.exp(logits - lse))[..., : k.shape[1]]
    held = jnp.where(mask[:, :, None, None], v[own], 0.0)
    out = jnp.einsum("tkgs,tskh->tkgh", weights, held, precision=jax.lax.Precision.HIGHEST)
    out = out.reshape(t, n, -1).astype(q.dtype)
    return (out, lse.reshape(t, n)) if return_lse else out
