"""Block tables: which pages hold the tokens of which request, over one pool per page group and one prefix tree. No jax.

A page is freed as soon as the plan that last reads it is made, even if the device has yet to run it. That is safe:
steps run in the order in which they are planned, so the next owner writes the page later.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from pdx.engine.config import EngineConfig
from pdx.engine.pool import PagePool
from pdx.engine.prefix import Match, Node, PrefixTree
from pdx.engine.request import Sequence

Copy = tuple[int, int, int]  # page group, source, destination


def demand(window: int | None, page_size: int, tokens: int, step: int) -> int:
    """The most pages that a request of `tokens` tokens holds at once in a page group.

    Without a window: all. With one: those that overlap the window before a step or the step's own `step` tokens.
    """
    every = -(-tokens // page_size)
    return every if window is None else min(every, -(-(window - 1 + min(step, tokens)) // page_size) + 1)


class PagedMemory:
    """Block tables and pools for requests of up to `max_context` tokens; `windows` and `pages` by page group."""

    def __init__(self, config: EngineConfig, windows: Seq[int | None], pages: Seq[int], max_context: int):
        self.page_size, self.windows = config.page_size, tuple(windows)
        self.pools = [PagePool(n) for n in pages]
        self.tree = PrefixTree(self.page_size, windows, self.pools)
        self.is_caching, self._fixed_chunk = config.prefix_cache, config.fixed_chunk
        self._most = config.most_unread(max_context)
        # [groups, slots, M]; entries that no query sees keep stale values.
        self.tables = np.zeros((len(self.pools), config.slots, -(-max_context // self.page_size)), np.int32)

    def demand(self, group: int, tokens: int) -> int:
        """The most pages that a request needs at once to hold `tokens` tokens."""
        return demand(self.windows[group], self.page_size, tokens, self._most)

    def missing(self, group: int, seq: Sequence) -> int:
        """Pages that the request still needs until all its tokens are computed."""
        rest = -(-seq.length // self.page_size) - len(seq.pages[group])
        return max(0, min(rest, self.demand(group, seq.length)))

    def share_prefix(self, seq: Sequence) -> list[Copy]:
        """Give a request without pages the longest cached prefix of its tokens; returns the page copies it needs."""
        multiple = self._fixed_chunk // self.page_size if self._fixed_chunk else 1
        found, limit = Match(), len(seq.tokens) - 1
        if self.is_caching:
            found = self.tree.match(seq.tokens, limit, multiple=multiple, parts=not self._fixed_chunk)
        self._share(seq, found)
        if not found.partial:
            return []
        copies = self._copy(seq, found.partial)
        if not copies:
            self.release(seq, keep=False)
            self._share(seq, self.tree.match(seq.tokens, limit, parts=False))
        return copies

    def grow(self, seq: Sequence, end: int, *, slide: bool = True) -> bool:
        """Allocate pages up to position `end`, and with `slide` free those that fell out of windows.

        Returns False, and allocates nothing, if there are too few pages.
        """
        if slide:
            self._slide(seq)
        wanted = [max(0, -(-end // self.page_size) - len(pages)) for pages in seq.pages]
        if any(n > pool.available for n, pool in zip(wanted, self.pools, strict=True)):
            return False
        for group, n in enumerate(wanted):
            for _ in range(n):
                self._append(seq, group, self._allocate(group))
        return True

    def longest(self, seq: Sequence, *, spare: int = 0) -> int:
        """The position up to which the request could grow with the pages available now, all but `spare` of them."""
        return min(
            (len(pages) + max(0, pool.available - spare)) * self.page_size
            for pages, pool in zip(seq.pages, self.pools, strict=True)
        )

    def register(self, seq: Sequence, *, planning: bool = False) -> None:
        """Register the request's full pages in the prefix tree; where the tree has an equal page, use that instead.

        `planning`: the step that fills the pages is being planned. Other rows of that step may share them, since it
        writes before it reads. They can be neither copied nor replaced by equal pages yet.
        """
        if not self.is_caching:
            return
        p = self.page_size
        while (seq.registered + 1) * p <= self._known(seq):
            if not seq.node.alive:  # possible where all page groups have windows
                seq.node, seq.registered = self.tree.root, 0
            at = seq.registered
            key = tuple(seq.tokens[at * p : (at + 1) * p])
            if planning and key in seq.node.children:
                return
            node = self.tree.insert(seq.node, key, self._held(seq, at))
            if planning:
                self.tree.fresh.add(node)
            for group, pages in enumerate(seq.pages):
                if at >= seq.first[group] and node.pages[group] not in (None, pages[at]):
                    self.pools[group].release(pages[at])
                    pages[at] = self.pools[group].share(node.pages[group])
                    self.tables[group, seq.slot, at] = pages[at]
            seq.node, seq.registered = node, at + 1

    def release(self, seq: Sequence, *, keep: bool = True) -> None:
        """Free all pages of a request. `keep`: register them in the tree first, the last, partial one too."""
        if keep:
            self.register(seq)
            self._register_rest(seq)
        for pool, pages, first in zip(self.pools, seq.pages, seq.first, strict=True):
            for page in pages[first:]:
                pool.release(page)
        seq.pages, seq.first, seq.node, seq.registered, seq.computed = [], [], None, 0, 0

    def _known(self, seq: Sequence) -> int:
        """The number of tokens whose ids are known and whose keys and values other requests may share."""
        known = min(seq.computed, len(seq.tokens))
        # Keys and values from decode rows may differ in the last bits from those of a prompt's chunk.
        return min(known, seq.prompt_length) if self._fixed_chunk else known

    def _held(self, seq: Sequence, at: int) -> list[int | None]:
        return [pages[at] if at >= first else None for pages, first in zip(seq.pages, seq.first, strict=True)]

    def _register_rest(self, seq: Sequence) -> None:
        begin = seq.registered * self.page_size
        rest = tuple(seq.tokens[begin : self._known(seq)])
        if not self.is_caching or self._fixed_chunk or not seq.node.alive:
            return
        if len(rest) < self.tree.worth_copying:
            return
        self.tree.insert(seq.node, rest, self._held(seq, seq.registered))

    def _share(self, seq: Sequence, found: Match) -> None:
        depth = len(found.nodes)
        seq.computed, seq.registered = depth * self.page_size + found.tokens, depth
        seq.node = found.nodes[-1] if depth else self.tree.root
        seq.pages, seq.first = [], []
        for group, pool in enumerate(self.pools):
            first = min(self._first_seen(group, seq.computed), depth)
            seq.pages.append([-1] * first + [pool.share(node.pages[group]) for node in found.nodes[first:]])
            seq.first.append(first)
            self.tables[group, seq.slot, :depth] = seq.pages[group]

    def _copy(self, seq: Sequence, node: Node) -> list[Copy]:
        """Copy on write: a page for the tokens that a cached page shares with the request. None if pages ran out."""
        sources = [pool.share(page) for pool, page in zip(self.pools, node.pages, strict=True)]
        copies = []
        if all(pool.available for pool in self.pools):
            for group, source in enumerate(sources):
                self._append(seq, group, self._allocate(group))
                copies.append((group, source, seq.pages[group][-1]))
        for pool, source in zip(self.pools, sources, strict=True):
            pool.release(source)
        return copies

    def _append(self, seq: Sequence, group: int, page: int) -> None:
        self.tables[group, seq.slot, len(seq.pages[group])] = page
        seq.pages[group].append(page)

    def _allocate(self, group: int) -> int:
        pool = self.pools[group]
        if not pool.free:
            self.tree.evict(group)
        return pool.allocate()

    def _first_seen(self, group: int, position: int) -> int:
        """The first page that a query at `position` or later sees."""
        window = self.windows[group]
        return 0 if window is None else max(0, position - window + 1) // self.page_size

    def _slide(self, seq: Sequence) -> None:
        for group, (pool, pages) in enumerate(zip(self.pools, seq.pages, strict=True)):
            seen = min(self._first_seen(group, seq.computed - seq.unsure), len(pages))
            for at in range(seq.first[group], seen):
                pool.release(pages[at])
                pages[at] = -1
            seq.first[group] = max(seq.first[group], seen)
