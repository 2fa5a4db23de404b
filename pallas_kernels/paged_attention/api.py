"""Paged attention: decode rows and prefill chunks of many requests in one call, K and V in pages."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.attention.call import as_given_to_kernels
from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.layouts import Layout
from pallas_kernels.paged_attention.call import check_packed, make_call

OP = Op("paged_attention")
explain = OP.explain


def paged_attention(
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
    layout: Layout,
    kv_heads: int | None = None,
    value_dim: int | None = None,
    decode_rows: int = 0,
    max_queries: int | None = None,
    return_lse: bool = False,
    implementation: Implementation = "auto",
    interpret=False,
    config=None,
) -> Float[Array, "T N Hv"] | tuple[Float[Array, "T N Hv"], Float[Array, "T N"]]:
    """Causal softmax attention of packed queries, each over the pages of its row.

    There is no `tree` mask here: drafts are verified over the dense cache, by `flash_attention` and `decode_attention`.

    Args:
      q: the queries of all rows, one row behind the other; N = K * G heads, G to a KV head.
      k_pages, v_pages: the pool, with this step's keys and values in it; V's head size Hv may differ. By `layout`:
        "folded" [P, p, C], the TPU's: head h in lanes h*H to (h+1)*H, C is K*H rounded up to 128;
        "heads_last" [P, p, K, H], the GPU's; "heads_first" [P, K, p, H], for XLA on a CPU.
      block_tables: position t of row r lies in page block_tables[r, t // p] at t % p. Rows may share pages.
        Entries for positions that no query of the row sees (past the row's length, before every window) may
        be any number: they are not read.
      lengths: tokens each row holds, this step's included, at most M * p; 0 for a row that takes no part.
      query_starts: row r owns queries query_starts[r] to query_starts[r+1] - 1; the last of them stands at
        position lengths[r] - 1. It begins with 0 and never falls. Queries at or past query_starts[R], and those of rows
        without a part, are padding: their output is zero.
      scale: multiplies the logits.
      window: a query sees this many positions, itself included; None: all before it.
      softcap: bounds the logits to cap * tanh(logits / cap).
      sinks: exp(sinks[n]) joins the denominator of head n, with no value; NaN or infinity: its results are NaN.
      k_scale, v_scale: for int8 pages, [P, Kp, p] with Kp at least K (the TPU: a multiple of 8); a value stands
        for value * scale.
      kv_heads: K; folded pages do not tell it. value_dim: Hv; None: H for folded pages.
      decode_rows: static; the first rows, so many, own at most one query each. A hint for speed: such rows are
        computed together. max_queries: static; the most queries any row owns; None: up to T. 1 makes all
        rows decode rows. A wrong hint gives wrong results.
      return_lse: also log(sum(exp(logits))), sinks included, natural; where a query sees nothing, -inf or its sink.
      implementation, interpret: see `pallas_kernels.dispatch`; config: the tiles of a Pallas implementation.

    Returns:
      One vector a query and head, in the dtype of q; softmax and accumulation are in f32.

    Raises:
      ValueError: shapes or settings that do not fit; in arrays that are not traced also numbers that cannot be:
        `query_starts` out of order or past T, lengths below zero, above M * p or below the row's queries, pages outside
        of the pool where a query sees them, more queries than the hints promise. Under `jit` these cannot be seen:
        nothing past a block table is read, the nearest page stands for one outside of the pool, queries before a row's
        first token get zeros, and the results of rows out of order differ between implementations.
      NotImplementedError: a named implementation that cannot take this call, or a gradient: there is none over pages.

    Source: Kwon et al. 2023 (PagedAttention); the meaning is `reference.attention`.
    """
    arrays = {
        **{"q": q, "k_pages": k_pages, "v_pages": v_pages},
        **{"block_tables": block_tables, "lengths": lengths, "query_starts": query_starts},
        **{"sinks": sinks, "k_scale": k_scale, "v_scale": v_scale},
    }
    call = make_call(
        arrays,
        scale=scale,
        window=window,
        softcap=softcap,
        layout=layout,
        kv_heads=kv_heads,
        value_dim=value_dim,
        return_lse=return_lse,
        decode_rows=decode_rows,
        max_queries=max_queries,
    )
    check_packed(call, block_tables, lengths, query_starts)
    arrays = as_given_to_kernels(arrays, scale, "block_tables", "lengths", "query_starts")
    return OP.run(implementation, arrays, call, config, interpret)
