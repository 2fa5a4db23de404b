"""Reference counts of pages, against a model that keeps sets of holders."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdx.engine.pool import PagePool

PAGES = 6


class Pools(RuleBasedStateMachine):
    """Sequences and a tree take and give back pages; `holders` is what must come out."""

    def __init__(self):
        super().__init__()
        self.idle_calls = []
        self.pool = PagePool(PAGES, self.idle_calls.append)
        self.holders: dict[int, int] = {}  # by sequences
        self.tree: set[int] = set()

    def _held(self, data, among):
        return data.draw(st.sampled_from(sorted(among)))

    @precondition(lambda self: self.pool.free)
    @rule()
    def allocate(self):
        page = self.pool.allocate()
        assert page not in self.holders
        assert page not in self.tree
        self.holders[page] = 1

    @precondition(lambda self: self.holders or self.tree)
    @rule(data=st.data())
    def share(self, data):
        page = self._held(data, self.holders.keys() | self.tree)
        self.pool.share(page)
        self.holders[page] = self.holders.get(page, 0) + 1

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data):
        page = self._held(data, self.holders)
        self.holders[page] -= 1
        before = len(self.idle_calls)
        self.pool.release(page)
        if not self.holders[page]:
            del self.holders[page]
        assert self.idle_calls[before:] == ([page] if page in self.tree and page not in self.holders else [])

    @precondition(lambda self: self.holders.keys() - self.tree)
    @rule(data=st.data())
    def cache(self, data):
        page = self._held(data, self.holders.keys() - self.tree)
        self.pool.cache(page)
        self.tree.add(page)

    @precondition(lambda self: self.tree)
    @rule(data=st.data())
    def uncache(self, data):
        page = self._held(data, self.tree)
        self.pool.uncache(page)
        self.tree.remove(page)

    @invariant()
    def counts_agree(self):
        for page in range(PAGES):
            assert self.pool.holders(page) == self.holders.get(page, 0) + (page in self.tree)
        assert self.pool.idle == len(self.tree - self.holders.keys())
        assert self.pool.free == PAGES - len(self.tree | self.holders.keys())
        assert self.pool.used == len(self.holders)


TestPools = Pools.TestCase
TestPools.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_what_nobody_holds_cannot_be_given_back():
    pool = PagePool(2)
    page = pool.allocate()
    pool.release(page)
    for wrong in (page, -1, 2):
        with pytest.raises(ValueError, match="held by nobody"):
            pool.release(wrong)
    with pytest.raises(ValueError, match="not in the tree"):
        pool.uncache(page)
    pool.cache(pool.allocate())
    with pytest.raises(ValueError, match="in the tree already"):
        pool.cache(page)


def test_an_empty_pool_says_so():
    pool = PagePool(1)
    pool.allocate()
    with pytest.raises(IndexError):
        pool.allocate()
