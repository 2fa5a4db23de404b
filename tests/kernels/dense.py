"""Attention written a second time, to judge the first: plain numpy in float64, one query after another.

It knows nothing of slots, blocks or masks. A row is its history, the keys and values of positions
0 .. length - 1, and the query at position p looks at the history from its window's first position to p.
`ring` lays such a history out as a cache by writing it token after token.
"""

from __future__ import annotations

import numpy as np


def attend(q, keys, values, positions, lengths, *, scale, window=None, softcap=None):
    """[B, T, N, H] of float64 from q [B, T, N, H] and histories [B, length, K, H]; zeros for queries outside a row."""
    q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
    out = np.zeros(q.shape)
    group = q.shape[2] // keys.shape[2]
    for b, t in np.ndindex(q.shape[:2]):
        p = int(positions[b, t])
        if not 0 <= p < lengths[b]:
            continue
        first = 0 if window is None else max(0, p - window + 1)
        for n in range(q.shape[2]):
            seen, told = keys[b, first : p + 1, n // group], values[b, first : p + 1, n // group]
            logits = seen @ q[b, t, n] * scale
            if softcap is not None:
                logits = softcap * np.tanh(logits / softcap)
            weights = np.exp(logits - logits.max())
            out[b, t, n] = weights @ told / weights.sum()
    return out


def ring(history, lengths, slots: int, unwritten=0.0):
    """The cache [B, K, S, H] after a row's tokens were written one by one, `unwritten` where none has been."""
    b, _, k, h = history.shape
    cache = np.full((b, k, slots, h), unwritten, np.float32)
    for row, length in enumerate(lengths):
        for position in range(length):
            cache[row, :, position % slots] = history[row, position]
    return cache
