"""Requests over pages, by hand: what an engine's host does, in its plainest form, for tests of the paged cache."""

from __future__ import annotations

import numpy as np

from pdx import steps
from pdx.cache.paged import init_paged_cache, page_groups
from tests.support.models import params


class Desk:
    """`rows` requests over a paged cache: pages are handed out in a shuffled order, one step at a time."""

    def __init__(self, cfg, rows=4, *, width=8, page=16, seed=0, spare=3, cache=None, **settings):
        self.cfg, self.rows, self.page, self.settings = cfg, rows, page, {}
        self.groups, pages = len(page_groups(cfg)), rows * width + spare
        if "kernels" in settings:
            self.settings["kernels"] = settings.pop("kernels")
        self.cache = init_paged_cache(cfg, pages, page_size=page, **settings) if cache is None else cache
        rng = np.random.default_rng(seed)
        order = np.stack([rng.permutation(pages)[: rows * width] for _ in range(self.groups)])
        self.tables = order.reshape(self.groups, rows, width).astype(np.int32)
        self.held = np.zeros(rows, np.int32)

    def step(self, new: dict[int, np.ndarray], tokens: int, *, decode_rows=0, max_queries=None):
        """Feed each row of `new` its tokens, packed into T = `tokens`; logits [R, V] as numpy."""
        counts = np.array([len(new.get(r, ())) for r in range(self.rows)], np.int32)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        packed = np.full(tokens, 7, np.int32)  # what follows the last row must not matter
        for row, ids in new.items():
            packed[starts[row] : starts[row + 1]] = ids
        self.held = self.held + counts
        logits, self.cache = steps.mixed_step(
            params(self.cfg),
            self.cfg,
            packed,
            self.cache,
            block_tables=self.tables,
            lengths=np.where(counts > 0, self.held, 0),
            query_starts=starts,
            decode_rows=decode_rows,
            max_queries=max_queries,
            **self.settings,
        )
        return np.asarray(logits)
