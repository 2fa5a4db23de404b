"""Attention written a second time, to judge the first: plain numpy in float64, one query after another.

It knows nothing of slots, blocks or masks. A row is its history, the keys and values of positions
0 .. length - 1, and the query at position p looks at the history from its window's first position to p.
"""

from __future__ import annotations

import numpy as np


def attend(
    q,
    keys,
    values,
    positions,
    lengths,
    *,
    scale,
    window=None,
    softcap=None,
    sinks=None,
    tree=None,
    causal=True,
    is_chain=False,
):
    """Attention of q [B, T, N, H] over histories [B, length, K, H], in float64.

    `is_chain`: wrongly, a window counts from a token's place in the chunk, and not from its depth in the tree.
    Returns [B, T, N, Hv] and the log-sum-exp [B, T, N]; zeros and -inf for queries outside a row.
    """
    q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
    out = np.zeros((*q.shape[:3], values.shape[3]))
    lse = np.full(q.shape[:3], -np.inf)
    group = q.shape[2] // keys.shape[2]
    for b, t in np.ndindex(q.shape[:2]):
        p = int(positions[b, t])
        if not 0 <= p < lengths[b]:
            continue
        first = 0 if window is None else max(0, p - window + 1)
        seen = np.arange(first, p + 1 if causal else lengths[b])
        if tree is not None:
            start = int(positions[b, 0])
            own = [s for s in range(start, p + 1) if tree[b, t, s - start]]
            depth = t if is_chain else len([s for s in own if s < p])
            oldest = 0 if window is None else start + depth - window + 1
            seen = np.array([*range(max(0, oldest), start), *own], int)
        for n in range(q.shape[2]):
            logits = keys[b, seen, n // group] @ q[b, t, n] * scale
            if softcap is not None:
                logits = softcap * np.tanh(logits / softcap)
            sink = -np.inf if sinks is None else float(sinks[n])
            top = max(logits.max(), sink)
            weights = np.exp(logits - top)
            total = weights.sum() + np.exp(sink - top)
            out[b, t, n] = weights @ values[b, seen, n // group] / total
            lse[b, t, n] = top + np.log(total)
    return out, lse
