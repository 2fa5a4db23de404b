"""The page pool of one page group: reference counts. Plain Python, every operation in constant time.

A page is free, or it is held by sequences, by the prefix tree, or by both. A page that only the tree holds is idle: it
can be evicted when needed. Only a sequence that holds a page alone writes it; a shared page is copied first (copy on
write).
"""

from __future__ import annotations

from collections.abc import Callable


class PagePool:
    """Reference counts of `pages` pages. `on_idle` is called with each page that becomes idle."""

    def __init__(self, pages: int, on_idle: Callable[[int], None] = lambda page: None):
        self.pages, self.on_idle = pages, on_idle
        self._free = list(range(pages - 1, -1, -1))
        self._holders = [0] * pages
        self._in_tree = bytearray(pages)
        self.idle = 0

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def available(self) -> int:
        """Pages that can be allocated: free ones, and idle ones after eviction."""
        return len(self._free) + self.idle

    @property
    def used(self) -> int:
        """Pages that sequences hold."""
        return self.pages - self.available

    def allocate(self) -> int:
        """Take a free page, with one holder. Raises IndexError if none is free: evict an idle one first."""
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def share(self, page: int) -> int:
        """Add a holder; returns the page."""
        self._check(page)
        if self.is_idle(page):
            self.idle -= 1
        self._holders[page] += 1
        return page

    def release(self, page: int) -> None:
        """Remove a holder; a page without holders is free."""
        self._check(page)
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.append(page)
        elif self.is_idle(page):
            self.idle += 1
            self.on_idle(page)

    def cache(self, page: int) -> None:
        """The tree becomes a holder of a page that a sequence holds."""
        if self._in_tree[page]:
            raise ValueError(f"page {page} is in the tree already")
        self.share(page)
        self._in_tree[page] = 1

    def uncache(self, page: int) -> None:
        """The tree stops holding a page, which is free if no sequence holds it."""
        if not self._in_tree[page]:
            raise ValueError(f"page {page} is not in the tree")
        if self.is_idle(page):
            self.idle -= 1
        self._in_tree[page] = 0
        self.release(page)

    def holders(self, page: int) -> int:
        return self._holders[page]

    def is_idle(self, page: int) -> bool:
        """Whether only the tree holds it."""
        return bool(self._in_tree[page]) and self._holders[page] == 1

    def _check(self, page: int) -> None:
        if not 0 <= page < self.pages or not self._holders[page]:
            raise ValueError(f"page {page} is held by nobody")
