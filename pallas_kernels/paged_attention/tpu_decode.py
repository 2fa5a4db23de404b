"""Decode rows of paged attention on TPU: the kernel of `decode_attention`, which fetches pages in place of slots.

A decode row owns one query, or a few with drafted ones: too few for the tiles of a chunk. So it is a row of a decode
batch, as over a dense cache. With one query a row, the kernel reads its query and writes its result where they lie
among the packed ones; with several, they are gathered before and after.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import call as dense
from pallas_kernels.decode_attention import tpu as decode
from pallas_kernels.decode_attention.tpu_fetch import Pages, Plan
from pallas_kernels.paged_attention.call import Call, known


def queries_of(call: Call) -> int:
    """Queries of each row; those that a row does not own are computed, and dropped."""
    return min(call.decode_queries, call.max_queries)


def as_dense(call: Call) -> dense.Call:
    """The call over a dense cache that decodes the same rows."""
    return dense.Call(
        "decode_attention",
        call.rows,
        queries_of(call),
        call.heads,
        call.kv_heads,
        call.head_dim,
        call.value_dim,
        call.capacity,
        call.dtype,
        call.kv_dtype,
        "folded",
        window=call.window,
        softcap=call.softcap,
        sinks=call.sinks,
        return_lse=call.return_lse,
        scale=call.scale,
    )


def plan_for(call: Call, config: decode.Config) -> Plan:
    """The static inputs of the kernel."""
    plan = decode.plan_for(as_dense(call), config)
    return Plan(plan.call, config, plan.tile, plan.dtype, Pages(call.page, call.width))


def moved_bytes(
    call: Call, config: decode.Config, query_starts: Int[np.ndarray, " R1"], lengths: Int[np.ndarray, " R"]
) -> int:
    """HBM bytes of a concrete call: K and V in whole tiles, scales in whole units, queries and results."""
    plan = plan_for(call, config)
    queries = np.diff(query_starts)
    held = np.where(queries > 0, np.minimum(lengths, call.capacity), 0)
    low = np.zeros_like(held) if call.window is None else np.maximum(lengths - queries - call.window + 1, 0)

    def tokens(unit: int) -> int:
        return int((np.where(held > 0, -(-held // unit) - low // unit, 0) * unit).sum())

    scales = 2 * 4 * call.scale_heads
    kept = tokens(plan.tile) * (call.kv_bytes - scales) + (tokens(plan.unit) * scales if scales else 0)
    return kept + call.rows * decode.vector_bytes(plan)


def run(arrays, call: Call, config: decode.Config, interpret, estimate: pl.CostEstimate):
    """Decode the rows.

    Returns:
      Results [T, N*Hv], folded, and the log-sum-exps [T, N] or None.
    """
    plan = plan_for(call, config)
    starts, lengths = arrays["query_starts"], arrays["lengths"]
    asked = starts[1:] - starts[:-1]
    scalars = {
        "starts": lengths - asked,
        "lengths": jnp.where(asked > 0, lengths, 0),
        "tables": known(arrays["block_tables"], call).reshape(-1),
    }
    packed = plan.call.queries == 1
    if packed:  # a row without a query has the place behind the packed ones
        scalars["rows"] = jnp.where(asked > 0, starts[:-1], call.tokens)
    q = arrays["q"] if packed else arrays["q"][_places(call, starts)]
    pools = {"k": arrays["k_pages"], "v": arrays["v_pages"]}
    pools |= {name: arrays[name] for name in ("k_scale", "v_scale") if arrays.get(name) is not None}
    given = {name: _in_hbm(x, interpret) for name, x in pools.items()}
    given |= {"q": q.reshape(-1, plan.call.queries, *q.shape[-2:]), "sinks": arrays.get("sinks")}
    out, lse = decode.attend(plan, given, scalars, estimate, interpret)
    if lse is None:
        return _packed(call, plan, starts, out, 0), None
    nothing = -jnp.inf if given["sinks"] is None else given["sinks"]
    return _packed(call, plan, starts, out, 0), _packed(call, plan, starts, lse, nothing)


def _places(call: Call, starts: Int[Array, " R1"]) -> Int[Array, "R T"]:
    """The packed query at each place of the rows."""
    return jnp.clip(starts[:-1, None] + jnp.arange(queries_of(call)), 0, call.tokens - 1)


def _packed(
    call: Call, plan: Plan, starts: Int[Array, " R1"], x: Float[Array, "P T *a"], nothing
) -> Float[Array, "tokens c"]:
    """The results of the packed queries, folded; those of padding are `nothing`."""
    token = jnp.arange(call.tokens)
    if plan.call.queries == 1:
        found = x[: call.tokens, 0]
    else:
        row = jnp.clip(jnp.searchsorted(starts[1:], token, side="right"), 0, call.rows - 1)
        found = x[row, jnp.clip(token - starts[row], 0, plan.call.queries - 1)]
    return jnp.where((token < starts[-1])[:, None], found.reshape(call.tokens, -1), jnp.asarray(nothing, x.dtype))


def _in_hbm(x, interpret):
    """Keep a pool in HBM: XLA would copy a small one whole to faster memory, once for each run of a kernel."""
    return x if interpret else pltpu.with_memory_space_constraint(x, pltpu.HBM)
