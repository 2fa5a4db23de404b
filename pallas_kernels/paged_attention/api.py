"""Paged attention: decode rows and prefill chunks of many requests in one call, K and V in pages.

The way of a call:
  arguments       `call.make_call` checks them and gathers the static facts in a `Call`; `check_packed` checks the rows
  Call            `OP.run` (`dispatch`) chooses the implementation and its tiles
  implementation  `xla` loops over blocks of pages; `tpu` and `gpu` cut the packed queries into pieces (`pieces`)
  kernel          `tpu_kernel`, `gpu_kernel`: one piece against the pages of its row, found by the block table
  result          [T, N, Hv], with `return_lse` also the log-sum-exp [T, N]
"""

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
    decode_queries: int = 1,
    max_queries: int | None = None,
    return_lse: bool = False,
    implementation: Implementation = "auto",
    interpret=False,
    config=None,
) -> Float[Array, "T N Hv"] | tuple[Float[Array, "T N Hv"], Float[Array, "T N"]]:
    """Causal softmax attention of packed queries, each over the pages of its row.

    There is no `tree` mask: trees of drafts are verified over the dense cache, by `decode_attention`.

    Args:
      q: the packed queries of all rows, row after row; N = K * G query heads, G to a KV head.
      k_pages, v_pages: the pool, which holds this step's keys and values already. The head size Hv of v may differ.
        By `layout`: "folded" [P, p, C] for TPUs, head h in lanes h*H to (h+1)*H, C = K*H rounded up to 128;
        "heads_last" [P, p, K, H] for GPUs; "heads_first" [P, K, p, H] for XLA on a CPU.
      block_tables: position t of row r lies in page block_tables[r, t // p] at t % p. Rows may share pages. Entries
        for positions that no query of the row sees (past its length, before its windows) are not read.
      lengths: tokens each row holds, this step's included, at most M * p; 0 for an inactive row.
      query_starts: R + 1 numbers from 0 in rising order. Row r owns queries query_starts[r] to query_starts[r+1] - 1;
        the last of them has position lengths[r] - 1. Queries from query_starts[R] on, and those of inactive rows,
        are padding: their output is zero.
      scale: multiplies the logits.
      window: a query sees this many positions, its own included; None: all before it.
      softcap: bounds the logits to cap * tanh(logits / cap).
      sinks: exp(sinks[n]) joins the denominator of head n, with no value. NaN or infinity: the head's results are NaN.
      k_scale, v_scale: f32 scales of int8 pages, [P, Kp, p], Kp at least K (on a TPU a multiple of 8).
      kv_heads, value_dim: K, and Hv (None: H). Folded pages do not show them.
      decode_rows, decode_queries: static; the first `decode_rows` rows own at most `decode_queries` queries each: the
        newest token, and what was drafted behind it. They are computed together.
      max_queries: static; the most queries that a row owns; None: up to T. 1 makes all rows decode rows. All three are
        hints for speed; a wrong one gives wrong results.
      return_lse: also return the natural log-sum-exp of the logits, sinks included. Where a query sees nothing it is
        -inf, or the sink.
      implementation, interpret: see `pallas_kernels.dispatch`.
      config: tiles of a Pallas kernel, its module's `Config`. None: those of the tuned table, else of the heuristic.

    Returns:
      One vector per query and head, in the dtype of q; softmax and accumulation are in f32.

    Raises:
      ValueError: shapes or settings that do not fit. In arrays that are not traced also impossible numbers:
        `query_starts` out of order or past T; lengths below zero, above M * p or below the row's queries; pages outside
        of the pool that a query sees; more queries than the hints promise. Under `jit` the numbers are not checked:
        nothing past a block table is read, a page outside of the pool is replaced by the nearest one, queries before a
        row's first token get zeros, and for rows out of order the implementations differ.
      NotImplementedError: a named implementation that cannot take this call, or a gradient: there is none over pages.

    Example: a decode row of 3 tokens in page 2, and a chunk of two queries whose 6 tokens lie in pages 0 and 3.
      >>> from functools import partial
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from pallas_kernels import paged_attention
      >>> q, k_pages = jnp.ones((3, 1, 8)), jnp.zeros((4, 1, 4, 8))  # [T, N, H], [P, K, p, H]
      >>> v_pages = jnp.ones((4, 1, 4, 8)) * jnp.array([0.0, 10.0, 20.0, 30.0])[:, None, None, None]
      >>> attend = jax.jit(partial(paged_attention, scale=1.0, layout="heads_first"))
      >>> out = attend(
      ...     q,
      ...     k_pages,
      ...     v_pages,
      ...     block_tables=jnp.array([[2, 0], [0, 3]]),
      ...     lengths=jnp.array([3, 6]),
      ...     query_starts=jnp.array([0, 1, 3]),
      ... )
      >>> out[:, 0, 0].tolist()  # 20; (4*0 + 30) / 5; (4*0 + 2*30) / 6
      [20.0, 6.0, 10.0]

    Source: Kwon et al. 2023 (PagedAttention); the meaning is `reference.attention`.
    """
    pools = dict(k_pages=k_pages, v_pages=v_pages, k_scale=k_scale, v_scale=v_scale)
    rows = dict(block_tables=block_tables, lengths=lengths, query_starts=query_starts)
    arrays = dict(q=q, sinks=sinks) | pools | rows
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
        decode_queries=decode_queries,
        max_queries=max_queries,
    )
    check_packed(call, block_tables, lengths, query_starts)
    arrays = as_given_to_kernels(arrays, scale, "block_tables", "lengths", "query_starts")
    return OP.run(implementation, arrays, call, config, interpret)
