"""The prefix cache: a radix tree over pages. Plain Python.

A node is one page of tokens after those of its ancestors, and holds that page in every page group. Its key is its p
token ids, so requests with equal prefixes share nodes. A partial node has fewer than p tokens, the end of some request.
It has no children, and other requests use it by copying its page.

Window layers see only the last W positions, so their pages are kept and evicted independently: a prefix is usable if
every window group still has the last W positions of it. Groups without a window hold a page for every node and evict
leaves only. In each group, the page that has been idle longest is evicted first.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pdx.engine.pool import PagePool

# Copying a page costs a dispatch: fewer tokens than these are cheaper to compute.
WORTH_COPYING = 4


@dataclass(eq=False)
class Node:
    """`pages`, None where evicted, and `stamps`, when the page became idle, by page group."""

    parent: Node | None
    key: tuple[int, ...]
    pages: list[int | None]
    stamps: list[int]
    queued: list[bool]
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    alive: bool = True


@dataclass(frozen=True)
class Match:
    """The longest usable prefix: whole pages, and the first `tokens` of a `partial` page that must be copied."""

    nodes: tuple[Node, ...] = ()
    partial: Node | None = None
    tokens: int = 0


class PrefixTree:
    """The cached pages of finished and running requests; `windows` and `pools` by page group."""

    def __init__(self, page_size: int, windows: Sequence[int | None], pools: Sequence[PagePool]):
        self.page_size, self.windows, self.pools = page_size, tuple(windows), tuple(pools)
        self.worth_copying = min(WORTH_COPYING, max(1, page_size // 2))
        groups = len(self.pools)
        self.root = Node(None, (), [None] * groups, [0] * groups, [False] * groups)
        self.fresh: set[Node] = set()  # filled by the step being planned: can be shared, but not copied yet
        self._clock = 0
        self._owners: list[dict[int, Node]] = [{} for _ in self.pools]
        self._queues: list[list[tuple[int, int, Node]]] = [[] for _ in self.pools]
        for group, pool in enumerate(self.pools):
            pool.on_idle = lambda page, group=group: self._stamp(group, page)

    def nodes(self) -> Iterator[Node]:
        """All nodes but the root."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node

    def match(self, tokens: Sequence[int], limit: int, *, multiple: int = 1, parts: bool = True) -> Match:
        """The longest usable prefix of tokens[:limit]: a multiple of `multiple` whole pages and, with `parts`, part
        of one more. It does not hold the pages: the caller must share them."""
        p, path, node = self.page_size, [], self.root
        while (len(path) + 1) * p <= limit:
            child = node.children.get(tuple(tokens[len(path) * p : (len(path) + 1) * p]))
            if child is None:
                break
            path.append(child)
            node = child
        rest = tokens[len(path) * p : min((len(path) + 1) * p, limit)] if parts else ()
        partial, shared = self._longest_part(node, rest)
        if partial and self._is_usable([*path, partial], len(path) * p + shared):
            return Match(tuple(path), partial, shared)
        while path and (len(path) % multiple or not self._is_usable(path, len(path) * p)):
            path.pop()
        return Match(tuple(path))

    def insert(self, parent: Node, key: tuple[int, ...], pages: Sequence[int | None]) -> Node:
        """Add a node with these pages below `parent`; the tree then holds them.

        If the node exists, only its evicted pages are replaced. The caller may switch to the pages of the node
        returned.
        """
        node = parent.children.get(key)
        if node is None:
            groups = len(self.pools)
            node = Node(parent, key, [None] * groups, [0] * groups, [False] * groups)
            parent.children[key] = node
        for group, page in enumerate(pages):
            if node.pages[group] is None and page is not None:
                self.pools[group].cache(page)
                node.pages[group], self._owners[group][page] = page, node
        return node

    def evict(self, group: int) -> bool:
        """Evict the page of `group` that has been idle longest; returns whether there was one."""
        queue = self._queues[group]
        while queue:
            stamp, _, node = heapq.heappop(queue)
            node.queued[group] = False
            page = node.pages[group]
            if page is None or not self.pools[group].is_idle(page) or self._is_needed(group, node):
                continue  # it is queued again when that changes
            if stamp != node.stamps[group]:
                self._queue(group, node)
                continue
            self._give_up(group, node)
            self._prune(node)
            return True
        return False

    def clear(self) -> None:
        """Remove all nodes and stop holding their pages."""
        for node in list(self.nodes()):
            for group in range(len(self.pools)):
                self._give_up(group, node)
            node.alive, node.children = False, {}
        self.root.children = {}
        self._queues = [[] for _ in self.pools]

    def _longest_part(self, node: Node, rest: Sequence[int]) -> tuple[Node | None, int]:
        """The child with the longest common prefix with `rest`, and the length of that prefix in tokens."""
        best, shared = None, self.worth_copying - 1
        for key, child in node.children.items():
            if not rest or key[0] != rest[0] or child in self.fresh or any(page is None for page in child.pages):
                continue
            unequal = (i for i, (a, b) in enumerate(zip(key, rest, strict=False)) if a != b)
            same = next(unequal, min(len(key), len(rest)))
            if same > shared:
                best, shared = child, same
        return best, shared if best else 0

    def _is_usable(self, path: Sequence[Node], position: int) -> bool:
        """Whether these nodes hold every page that a query at `position` sees."""
        for group, window in enumerate(self.windows):
            first = 0 if window is None else max(0, position - window + 1) // self.page_size
            if any(node.pages[group] is None for node in path[first:]):
                return False
        return True

    def _stamp(self, group: int, page: int) -> None:
        node = self._owners[group][page]
        self._clock += 1
        node.stamps[group] = self._clock
        if not self._is_needed(group, node):
            self._queue(group, node)

    def _queue(self, group: int, node: Node) -> None:
        queue = self._queues[group]
        if not node.queued[group]:
            node.queued[group] = True
            self._clock += 1
            heapq.heappush(queue, (node.stamps[group], self._clock, node))
        if len(queue) > 2 * self.pools[group].pages:  # most entries are nodes that another group's eviction removed
            queue[:] = [entry for entry in queue if entry[2].alive]
            heapq.heapify(queue)

    def _is_needed(self, group: int, node: Node) -> bool:
        return self.windows[group] is None and bool(node.children)

    def _give_up(self, group: int, node: Node) -> None:
        page = node.pages[group]
        if page is not None:
            node.pages[group] = None
            del self._owners[group][page]
            self.pools[group].uncache(page)

    def _prune(self, node: Node) -> None:
        """Remove a leaf that no request can use any more, and then its ancestors while the same holds for them."""
        while node.parent is not None and not node.children and self._is_useless(node):
            for group in range(len(self.pools)):
                self._give_up(group, node)
            node.alive = False
            del node.parent.children[node.key]
            node = node.parent
            for group, page in enumerate(node.pages):
                if page is not None and self.pools[group].is_idle(page) and not node.children:
                    self._queue(group, node)

    def _is_useless(self, node: Node) -> bool:
        return any(w is None and page is None for w, page in zip(self.windows, node.pages, strict=True)) or all(
            page is None for page in node.pages
        )
