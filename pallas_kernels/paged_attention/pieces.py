"""Cuts packed queries into pieces: the queries of one row within one block of queries.

Both Pallas kernels run over the list of pieces, and their bytes are counted from it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels.paged_attention.call import Call


class Pieces(NamedTuple):
    """One entry per piece, in the order of the packed queries. A piece that reads no keys has first == end."""

    row: Int[Array, " I"]
    start: Int[Array, " I"]  # its first packed query
    stop: Int[Array, " I"]  # one past its last
    position: Int[Array, " I"]  # of its first query
    first: Int[Array, " I"]  # first unit of keys that its queries see
    end: Int[Array, " I"]  # one past the last


def count(tokens: int, rows: int, block_q: int) -> int:
    """The most pieces of a call: one begins with each block, each row and the padding."""
    return -(-tokens // block_q) + rows + 1


def cut(query_starts: Int[Array, " R1"], lengths: Int[Array, " R"], call: Call, *, block_q: int, unit: int) -> Pieces:
    """Cut at the start of each row and of each block of `block_q` queries. Keys count in units of `unit` tokens.

    There are no keys past the capacity of a block table, also if a row's length and queries are past it.
    """
    xp = np if isinstance(query_starts, np.ndarray) else jnp  # numpy: for counting a concrete call's bytes
    rows, blocks = lengths.shape[0], -(-call.tokens // block_q)
    starts = query_starts.astype(xp.int32)
    edge = xp.full((1,), blocks * block_q, xp.int32)
    cuts = xp.sort(xp.concatenate([xp.arange(blocks, dtype=xp.int32) * block_q, xp.minimum(starts, edge)]))
    stops = xp.concatenate([cuts[1:], edge])
    row = (starts[None] <= cuts[:, None]).sum(1, dtype=xp.int32) - 1
    own = xp.clip(row, 0, rows - 1)
    length = lengths.astype(xp.int32)[own]
    active = (stops > cuts) & (row >= 0) & (row < rows) & (length > 0)
    position = length - (starts[own + 1] - cuts)
    last = xp.minimum(position + (stops - cuts), call.capacity) - 1
    oldest = xp.zeros_like(position) if call.window is None else xp.maximum(position - (call.window - 1), 0)
    first = oldest // unit
    end = xp.where(active & (last >= oldest), last // unit + 1, first)
    return Pieces(own, cuts, stops, position, first, end)


def full_rows(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """(query_starts, lengths) of the largest call: every row full, T queries spread over all rows."""
    single = call.single_rows
    decode = min(single, call.tokens)
    others = call.rows - single
    queries = np.zeros(call.rows, np.int32)
    queries[:decode] = 1
    if others:
        left = min(call.tokens - decode, others * call.max_queries)
        queries[single:] = left // others
        queries[single : single + left % others] += 1
    lengths = np.full(call.rows, call.capacity, np.int32)
    return np.concatenate([[0], np.cumsum(queries)]).astype(np.int32), lengths
