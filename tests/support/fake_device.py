"""A device and a model in a page of Python: pages hold, for each position, a hash of all tokens up to there.

Every row checks that the pages its block table names hold exactly what its own tokens should have left there, in every
position its queries see. So a page owned twice, freed too early, copied late or shared wrongly is found at once.
"""

from __future__ import annotations

import random
from functools import cache

from pdx.engine.request import Status

VOCAB, END = 7, 0
GARBAGE = -1


@cache
def chain(prompt: tuple[int, ...], n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The prompt with n tokens that the model goes on with, and the hash behind each."""
    tokens, hashes, state = list(prompt), [], 17
    for at in range(len(prompt) + n):
        state = hash((state, tokens[at]))
        hashes.append(state)
        if at >= len(prompt) - 1:
            tokens.append(next_token(state))
    return tuple(tokens[: len(prompt) + n]), tuple(hashes)


def next_token(state: int) -> int:
    return random.Random(state).randrange(VOCAB)


def alone(prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    """What a request gets by itself."""
    tokens = list(chain(prompt, max_tokens)[0][len(prompt) :])
    return tokens[: tokens.index(END) + 1] if END in tokens else tokens


class FakeDevice:
    """Runs plans in the order they come; tokens are there at once, it is up to the test to take them late.

    Of what a row drafts it keeps as many tokens as chance says; only the device knows how many, as with a real one.
    """

    def __init__(self, scheduler, seed=0):
        memory = scheduler.memory
        self.speculates, self.random = scheduler.drafting is not None, random.Random(seed)
        self.held: dict[int, int] = {}
        self.kept: dict = {}
        self.page_size, self.windows = memory.page_size, memory.windows
        self.pages = [[[GARBAGE] * self.page_size for _ in range(pool.pages)] for pool in memory.pools]
        self.last = [GARBAGE] * scheduler.config.slots

    def run(self, plan) -> dict[int, list[int]]:
        """The tokens emitted, by slot."""
        for slot, seq in plan.joins:
            self.held[slot] = len(seq.tokens)
        self.kept = {c: self.random.randint(0, c.drafts) for c in plan.chunks}
        for group, source, target in plan.copies:
            self.pages[group][target] = list(self.pages[group][source])
        sampled = {}
        written = [page for chunk in plan.chunks for page in self._write(plan, chunk)]
        assert len(written) == len(set(written)), "two rows write the same page"
        for chunk in plan.chunks:
            self._check(plan, chunk)
            if chunk.samples:
                assert plan.samples[chunk.slot]
                assert plan.logit_rows[chunk.slot] == chunk.row
                assert plan.positions[chunk.slot] == chunk.start + chunk.count
                assert plan.drafts[chunk.slot] == chunk.drafts
                end = self._start(chunk) + chunk.count
                sampled[chunk.slot] = [next_token(h) for h in self._truth(chunk)[end - 1 : end + self.kept[chunk]]]
                assert len(sampled[chunk.slot]) == 1 + self.kept[chunk]
        assert sum(plan.samples) == len(sampled)
        for slot, tokens in sampled.items():
            self.last[slot] = tokens[-1]
            self.held[slot] += len(tokens)
        return sampled

    def _start(self, chunk) -> int:
        """Where a chunk really starts."""
        if not self.speculates or not chunk.samples or chunk.count > 1:
            return chunk.start
        start = self.held[chunk.slot] - 1
        assert start <= chunk.start
        return start

    def _truth(self, chunk):
        request = chunk.sequence.request
        return chain(request.prompt, request.options.max_tokens)[1]

    def _write(self, plan, chunk):
        begin, start = plan.query_starts[chunk.row], self._start(chunk)
        assert plan.query_starts[chunk.row + 1] - begin == chunk.count
        assert plan.lengths[chunk.row] == chunk.start + chunk.count
        request = chunk.sequence.request
        truth, hashes = chain(request.prompt, request.options.max_tokens)
        assert start + chunk.count + chunk.drafts < len(truth)  # no more than it may generate
        for at in range(chunk.count + chunk.drafts):
            position = start + at
            if not self.speculates:  # else the device has the tokens
                source = plan.sources[begin + at]
                token = self.last[source] if source >= 0 else plan.tokens[begin + at]
                assert token == truth[position], (chunk, position)
            for group in range(len(self.windows)):
                page = plan.block_tables[group, chunk.row, position // self.page_size]
                is_kept = at < chunk.count + self.kept[chunk]
                self.pages[group][page][position % self.page_size] = hashes[position] if is_kept else GARBAGE
        last = start + chunk.count + chunk.drafts - 1
        pages = range(start // self.page_size, last // self.page_size + 1)
        return [(g, plan.block_tables[g, chunk.row, at]) for g in range(len(self.windows)) for at in pages]

    def _check(self, plan, chunk):
        hashes, start = self._truth(chunk), self._start(chunk)
        for group, window in enumerate(self.windows):
            first = 0 if window is None else max(0, start - window + 1)
            for position in range(first, start + chunk.count + self.kept[chunk]):
                page = plan.block_tables[group, chunk.row, position // self.page_size]
                held = self.pages[group][page][position % self.page_size]
                assert held == hashes[position], f"{chunk}: group {group}, position {position}, page {page}"


def check_pages(scheduler) -> None:
    """Every page is free, in the tree, or held by whom its count says; a page that will be written by one alone."""
    memory = scheduler.memory
    for group, pool in enumerate(memory.pools):
        holders = [0] * pool.pages
        for node in memory.tree.nodes():
            if node.pages[group] is not None:
                holders[node.pages[group]] += 1
        for seq in scheduler.running:
            for page in seq.pages[group][seq.first[group] :]:
                holders[page] += 1
        assert holders == [pool.holders(page) for page in range(pool.pages)]
        assert sorted(pool._free) == [page for page in range(pool.pages) if not holders[page]]
        for seq in scheduler.running:
            for page in seq.pages[group][(seq.computed - seq.unsure) // memory.page_size :]:
                assert pool.holders(page) == 1, "a page that is still to be written is shared"
    slots = [seq.slot for seq in scheduler.running]
    assert sorted([*slots, *scheduler._slots]) == list(range(scheduler.config.slots))
    assert all(seq.status is Status.RUNNING for seq in scheduler.running)
    assert all(seq.status is Status.WAITING and not seq.pages for seq in scheduler.waiting)
