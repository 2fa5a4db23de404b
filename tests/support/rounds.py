"""Rounds of speculation until each row has as many new tokens as a test wants."""

from __future__ import annotations

from typing import Any

import numpy as np

from pdx.speculative.rounds import Speculated, speculate_many


def until(limit: int, params, cfg, cache, sampling, state, n: int = 8, **settings: Any):
    """The `limit` new tokens of each row, and what each call of `speculate_many` returned. The last call has the cache,
    sampling and state behind them. `settings`: of `speculate_many`."""
    got: list[list[int]] = [[] for _ in range(cache.batch)]
    calls: list[Speculated] = []
    while min(map(len, got)) < limit:
        left = np.array([limit - len(row) for row in got], np.int32)
        out = speculate_many(params, cfg, cache, sampling, state, n, limits=left, **settings)
        cache, sampling, state = out.cache, out.sampling, out.state
        for row, tokens in enumerate(got):
            tokens += np.asarray(out.emitted.tokens)[row, : int(out.counts[row])].tolist()
        calls.append(out)
    return got, calls
