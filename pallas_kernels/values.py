"""What the numbers of a call must be: where each row stands, what it holds, which pages are its own.

They can be seen only in arrays that hold values. Under a trace nothing is checked: the ops then read nothing outside of
their arrays, and say in their docstrings what they give for such numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pallas_kernels.paged_attention.call import Call


def seen(*arrays: Any) -> list[np.ndarray] | None:
    """The arrays' numbers; None if one of them has none here: it is traced, only a shape, or on other hosts too."""
    for x in arrays:
        held = isinstance(x, np.ndarray) or (isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer))
        if not held or not getattr(x, "is_fully_addressable", True):
            return None
    return [np.asarray(x).astype(np.int64) for x in arrays]


def _refuse(wrong: np.ndarray, message: Callable[[int], str]) -> None:
    """Raise ValueError with the message of the first row that is wrong."""
    rows = np.flatnonzero(wrong)
    if rows.size:
        raise ValueError(message(int(rows[0])))


def check_rows(op: str, starts, lengths) -> None:
    """Raise ValueError for rows of a dense cache that stand or end below zero. Waits for the arrays."""
    found = seen(starts) if lengths is None else seen(starts, lengths)
    if found is None:
        return
    starts, lengths = found[0], found[-1]
    if len(found) == 2:
        _refuse(lengths < 0, lambda r: f"{op}: row {r} has length {lengths[r]}: give 0 for a row that takes no part")
    part = lengths > 0 if len(found) == 2 else np.ones_like(starts, bool)
    _refuse((starts < 0) & part, lambda r: f"{op}: row {r} starts at {starts[r]}: its first query's position, from 0")


def check_packed(call: Call, block_tables, lengths, query_starts) -> None:
    """Raise ValueError for packed rows that cannot be: out of order, longer than their table, without a page.

    Waits for the arrays.
    """
    op = "paged_attention"
    if (found := seen(query_starts)) is not None:
        (starts,) = found
        if starts[0] != 0 or (np.diff(starts) < 0).any() or starts[-1] > call.tokens:
            raise ValueError(
                f"{op}: query_starts must begin with 0, never fall and end at T = {call.tokens} or "
                f"before, got {_some(starts)}"
            )
        most = np.full(call.rows, call.max_queries)
        most[: call.decode_rows] = 1
        _refuse(
            np.diff(starts) > most,
            lambda r: (
                f"{op}: row {r} owns {np.diff(starts)[r]} queries, and decode_rows or max_queries promise "
                f"at most {most[r]}"
            ),
        )
    if (found := seen(lengths)) is not None:
        (held,) = found
        _refuse(held < 0, lambda r: f"{op}: row {r} has length {held[r]}: give 0 for a row that takes no part")
        _refuse(
            held > call.capacity,
            lambda r: (
                f"{op}: row {r} holds {held[r]} tokens, and its block table names {call.width} pages of "
                f"{call.page}: give it more"
            ),
        )
    if (found := seen(lengths, query_starts)) is not None:
        held, asked = found[0], np.diff(found[1])
        _refuse(
            (held > 0) & (asked > held),
            lambda r: (
                f"{op}: row {r} has {asked[r]} queries and only {held[r]} tokens: lengths count this step's tokens too"
            ),
        )
    if (found := seen(block_tables, lengths, query_starts)) is not None:
        tables, held, asked = found[0], found[1], np.diff(found[2])
        place = np.arange(call.width)
        first = np.zeros_like(held) if call.window is None else np.maximum(held - asked - call.window + 1, 0)
        read = (asked > 0) & (held > 0)
        read = read[:, None] & (place >= (first // call.page)[:, None]) & (place <= ((held - 1) // call.page)[:, None])
        outside = read & ((tables < 0) | (tables >= call.pages))
        _refuse(
            outside.any(1),
            lambda r: (
                f"{op}: row {r} reads page {tables[r, outside[r].argmax()]} by its block "
                f"table, and the pool has {call.pages}"
            ),
        )


def check_slots(end: int, slots) -> None:
    """Raise ValueError where two tokens are to be written to one of the slots below `end`. Waits for the array."""
    if (found := seen(slots)) is None:
        return
    kept = found[0][(found[0] >= 0) & (found[0] < end)]
    slot, count = np.unique(kept, return_counts=True)
    if (twice := slot[count > 1]).size:
        raise ValueError(
            f"write_pages: slots must be distinct, and two tokens are for slot {twice[0]}: give -1 to drop one"
        )


def _some(x: np.ndarray) -> str:
    """A few of the numbers, for a message."""
    return f"{x[:8].tolist()}{' ...' if len(x) > 8 else ''}"
