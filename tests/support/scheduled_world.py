"""A scheduler with a fake device under it: requests go in, steps are run, and every end is checked."""

from __future__ import annotations

from collections import deque

from pdx.engine.config import EngineConfig
from pdx.engine.drafting import Drafting
from pdx.engine.request import EngineRequest
from pdx.engine.scheduler import Scheduler
from pdx.sampling.options import SamplingOptions
from pdx.speculative.shares import StepCosts
from tests.support.fake_device import END, FakeDevice, alone, check_pages

CONTEXT = 40


def step_costs(config: EngineConfig) -> StepCosts:
    """A step with drafts costs little more than one without."""
    plain = {n: 0.9 + n / 20 for n in config.ladder(CONTEXT)}
    return StepCosts(plain, {n: 0.95 + n / 20 for n in config.draft_ladder})


class World:
    """A scheduler, a device, `depth` steps under way, and what every request must end as."""

    def __init__(self, depth=1, windows=(None,), pages=None, costs=False, **settings):
        self.config = EngineConfig(**{"slots": 3, "token_budget": 12, "page_size": 4, "max_queue": 20} | settings)
        drafting = None
        if self.config.speculate is not None:
            drafting = Drafting(self.config, (0.5,), always=True, costs=step_costs(self.config) if costs else None)
        self.scheduler = Scheduler(self.config, windows, pages or [14] * len(windows), CONTEXT, drafting)
        self.device, self.depth, self.now = FakeDevice(self.scheduler), depth, 0.0
        self.under_way = deque()
        self.open: set = set()
        self.done = 0
        self.started: list[int] = []

    def submit(self, prompt, max_tokens=8, **more):
        request = EngineRequest(tuple(prompt), SamplingOptions(max_tokens=max_tokens), **more)
        seq = self.scheduler.submit(request, self.now, ends={END})
        self.open.add(seq)
        return seq

    def step(self):
        """Plan and run a step, and commit the oldest one if more than `depth` are under way or nothing was planned."""
        self.now += 1
        plan = self.scheduler.schedule(self.now)
        for seq in self.scheduler.take_timed_out():
            assert self.now >= seq.arrival + seq.request.timeout_s
            self.open.remove(seq)
        if plan:
            self._check(plan)
            self.under_way.append((plan, self.device.run(plan)))
        if self.under_way and (len(self.under_way) > self.depth or not plan):
            self.commit()
        return plan

    def commit(self):
        plan, tokens = self.under_way.popleft()
        for output in self.scheduler.commit(plan, tokens, self.now):
            seq = output.sequence
            if output.finish_reason:
                assert seq.outputs == alone(seq.request.prompt, seq.request.options.max_tokens)
                assert output.finish_reason == ("stop" if seq.outputs[-1] == END else "length")
                self.open.remove(seq)
                self.done += 1

    def cancel(self, seq):
        self.scheduler.finish(seq, "cancelled")
        self.open.discard(seq)

    def fail(self):
        for seq in self.scheduler.fail([plan for plan, _ in self.under_way]):
            self.open.remove(seq)
        self.under_way.clear()
        self.device = FakeDevice(self.scheduler)  # nothing of what the pages held is left

    def run(self, limit=10_000):
        while not self.scheduler.is_idle or self.under_way:
            self.step()
            limit -= 1
            assert limit, f"no end: {self.scheduler.running} {self.scheduler.waiting}"
        assert not self.open
        check_pages(self.scheduler)
        assert all(pool.used == 0 for pool in self.scheduler.memory.pools)

    def _check(self, plan):
        counts = [c.count for c in plan.chunks]
        assert len({c.sequence.id for c in plan.chunks}) == len(counts)
        drafts = sum(c.drafts for c in plan.chunks)
        assert plan.shape in (self.config.draft_ladder if drafts else self.scheduler.ladder)
        assert sum(counts) + drafts <= plan.shape
        assert all(c.samples and c.count == 1 for c in plan.chunks if c.drafts)
        if self.config.chunked_prefill:
            assert sum(counts) + drafts <= self.config.budget
        else:
            assert sum(counts) <= self.config.budget or sum(n > 1 for n in counts) == 1
        for chunk in plan.chunks:
            assert chunk.row == chunk.slot if chunk.count == 1 else chunk.row >= self.config.slots
            self._check_cut(chunk)
        self.started += [s.id for _, s in plan.joins if not s.preemptions]

    def _check_cut(self, chunk):
        size, length = self.config.fixed_chunk, chunk.sequence.prompt_length
        if size and chunk.start < length:
            assert chunk.start % size == 0
            assert chunk.count == min(size, length - chunk.start)
        elif size or not self.config.chunked_prefill:
            assert chunk.count == 1 or chunk.samples
