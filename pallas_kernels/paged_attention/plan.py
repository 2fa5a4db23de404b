"""How packed queries are cut into work: pieces of one row within one block of queries.

Both Pallas kernels walk this list, and `fetched_tokens` counts from it what they move.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class Pieces(NamedTuple):
    """One entry a piece, in the order of the packed queries; a piece that reads no keys has first == end."""

    row: Int[Array, " I"]
    start: Int[Array, " I"]  # its first packed query
    stop: Int[Array, " I"]  # one past its last
    position: Int[Array, " I"]  # of its first query
    first: Int[Array, " I"]  # first unit of keys that its queries see
    end: Int[Array, " I"]  # one past the last


def count(tokens: int, rows: int, block: int) -> int:
    """How many pieces a call can have: each begins where a block, a row or the padding begins."""
    return -(-tokens // block) + rows + 1


def pieces(
    query_starts: Int[Array, " R1"],
    lengths: Int[Array, " R"],
    *,
    tokens: int,
    block: int,
    window: int | None,
    unit: int,
) -> Pieces:
    """Cut at every start of a block of `block` queries and of a row; keys are counted in units of `unit` tokens."""
    rows, blocks = lengths.shape[0], -(-tokens // block)
    edge = jnp.int32(blocks * block)
    starts = query_starts.astype(jnp.int32)
    cuts = jnp.sort(jnp.concatenate([jnp.arange(blocks, dtype=jnp.int32) * block, jnp.minimum(starts, edge)]))
    stops = jnp.concatenate([cuts[1:], edge[None]])
    row = jnp.searchsorted(starts, cuts, side="right", method="compare_all").astype(jnp.int32) - 1
    own = jnp.clip(row, 0, rows - 1)
    length = lengths.astype(jnp.int32)[own]
    active = (stops > cuts) & (row >= 0) & (row < rows) & (length > 0)
    position = length - (starts[own + 1] - cuts)
    last = position + (stops - cuts) - 1
    oldest = jnp.zeros_like(position) if window is None else jnp.maximum(position - (window - 1), 0)
    first = oldest // unit
    end = jnp.where(active & (last >= oldest), last // unit + 1, first)
    return Pieces(own, cuts, stops, position, first, end)


def fetched_tokens(plan: Pieces, unit: int) -> int:
    """Tokens of K and V that a kernel fetches for a concrete plan."""
    return int((plan.end - plan.first).sum()) * unit
