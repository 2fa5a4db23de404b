"""The scheduler: which requests compute which tokens in the next step. A state machine without a clock or jax.

`schedule(now)` makes a plan; `commit(plan, tokens, now)` records the tokens that the plan sampled. Several plans may be
under way: a decoding request is scheduled again before its newest token is known, and the device takes that token from
the sampling before. So the end of a request is noticed one step late, and the surplus token is dropped.

A step is filled in this order:

1. decode rows, the oldest request first;
2. chunks of running prompts, up to the token budget (Sarathi, Agrawal et al. 2023);
3. waiting requests, admitted in the order of their fixed keys while there are slots and pages;
4. with speculation, drafted tokens behind the decode rows.

How many drafted tokens a step keeps is known late, too. Until then a request counts as if all were kept: it has pages
for them and may not grow past `max_tokens`. `commit` takes back what was rejected.

When pages run out, the youngest request is preempted: it frees its pages and waits with the tokens it has. Admitted
again, it recomputes them, or finds them in the prefix tree, and goes on.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from pdx.engine.admission import check_fits
from pdx.engine.config import EngineConfig
from pdx.engine.drafting import Drafting
from pdx.engine.memory import PagedMemory
from pdx.engine.plan import StepBuilder, StepPlan
from pdx.engine.policies import POLICIES
from pdx.engine.request import EngineRequest, Sequence, Status
from pdx.errors import QueueFullError


@dataclass(frozen=True)
class Output:
    """A new token of a request, and the finish reason if the request ends with it.

    `column`: which of the tokens that the step emitted for the request.
    """

    sequence: Sequence
    token: int
    finish_reason: str | None
    column: int = 0


class Scheduler:
    """The requests of an engine.

    Args:
      config: its token budget must be chosen.
      windows: one per page group, as `pdx.cache.paged.page_groups` gives them.
      pages: number of pages of each page group.
      max_context: the most tokens of one request, prompt and answer.
      drafting: decides how many tokens are drafted; None: none.
    """

    def __init__(
        self,
        config: EngineConfig,
        windows: Seq[int | None],
        pages: Seq[int],
        max_context: int,
        drafting: Drafting | None = None,
    ):
        self.config, self.max_context, self.drafting = config, max_context, drafting
        self.memory = PagedMemory(config, windows, pages, max_context)
        self.ladder = config.ladder(max_context)
        self.waiting: list[Sequence] = []  # by key
        self.running: list[Sequence] = []
        self.draining: set[Sequence] = set()
        self._slots = list(range(config.slots - 1, -1, -1))
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._timed_out: list[Sequence] = []
        self._next_id = 0

    @property
    def is_idle(self) -> bool:
        """Whether no request is left."""
        return not (self.waiting or self.running or self.draining)

    def submit(self, request: EngineRequest, now: float, *, ends: Iterable[int] = ()) -> Sequence:
        """Queue a request, which ends at any of the tokens `ends`.

        Raises:
          QueueFullError: the queue is full.
          ContextLengthError: the request would not fit even alone.
          RequestError: an empty prompt, or more alternatives than the engine reports.
        """
        check_fits(request, self.config, self.memory, self.max_context)
        if len(self.waiting) >= self.config.max_queue:
            raise QueueFullError(
                f"{len(self.waiting)} requests are waiting, which is all that may (max_queue): try again later"
            )
        seq = Sequence(self._next_id, request, frozenset(ends), now, self._key(request, now), list(request.prompt))
        self._next_id += 1
        if self.drafting is not None:
            seq.record = self.drafting.record(request)
        self._enqueue(seq)
        if request.timeout_s is not None:
            heapq.heappush(self._deadlines, (now + request.timeout_s, seq.id, seq))
        return seq

    def finish(self, seq: Sequence, reason: str, *, keep: bool = True) -> None:
        """End a request at any time and free its slot and pages. `keep`: its pages are valid and may be shared."""
        if seq.status is Status.WAITING:
            self.waiting.remove(seq)
        elif seq.status is Status.RUNNING:
            self._leave(seq, keep=keep)
        elif seq.status is Status.FINISHED:
            return
        self.draining.discard(seq)
        seq.status, seq.finish_reason = Status.FINISHED, reason

    def schedule(self, now: float) -> StepPlan | None:
        """Plan the next step; None if there is nothing to compute. The plan after it assumes that this one has run."""
        self._expire(now)
        for seq in [s for s in self.running if s.is_complete]:
            self._leave(seq)
            seq.status = Status.DRAINING
            self.draining.add(seq)
        step = StepBuilder.empty(self.config)
        self.memory.tree.fresh.clear()
        oldest_first = sorted(self.running, key=lambda s: s.key)
        for seq in oldest_first:
            if seq.status is Status.RUNNING and seq.remaining == 1 and not seq.is_full:
                self._decode(seq, step)
        step.left = self._fitting(step)
        for seq in oldest_first:
            if seq.status is Status.RUNNING and seq.id not in step.planned and not seq.is_full:
                self._prefill(seq, step)
        self._admit(step, now)
        if not step.chunks:
            return None
        draft_ladder: Seq[int] = ()
        if self.drafting is not None:
            self.drafting.extend(step, self.memory, step.plain_size(self.ladder))
            draft_ladder = self.drafting.ladder
        plan = step.finish(self.memory.tables, self.ladder, draft_ladder)
        for chunk in plan.chunks:
            self.memory.register(chunk.sequence)
        return plan

    def commit(self, plan: StepPlan, tokens: Seq[Seq[int]] | Mapping[int, Seq[int]], now: float) -> list[Output]:
        """Record the tokens that a step emitted, by slot. Plans are committed in the order in which they were made."""
        outputs: list[Output] = []
        if self.drafting is not None:
            self.drafting.settle(plan, sum(max(0, len(tokens[c.slot]) - 1) for c in plan.chunks if c.drafts))
        for chunk in plan.chunks:
            seq = chunk.sequence
            if not chunk.samples:
                continue
            emitted = tokens[chunk.slot]
            seq.pending -= 1 + chunk.drafts
            seq.unsure -= chunk.drafts
            if seq.status is Status.FINISHED:
                continue
            if seq.status is Status.RUNNING:  # else it holds no pages
                seq.computed -= 1 + chunk.drafts - len(emitted)
            for column, token in enumerate(map(int, emitted)):
                seq.tokens.append(token)
                reason = None
                if token in seq.ends:
                    reason = "stop"
                elif len(seq.tokens) - seq.prompt_length >= seq.request.options.max_tokens:
                    reason = "length"
                outputs.append(Output(seq, token, reason, column))
                if reason:  # tokens behind it are dropped
                    self.finish(seq, reason)
                    break
            else:
                if seq.status is Status.RUNNING:
                    self.memory.register(seq)
        return outputs

    def fail(self, plans: Iterable[StepPlan]) -> list[Sequence]:
        """Handle failed steps, whose pages are lost: their requests end, all other running ones are preempted."""
        lost = []
        for chunk in (c for plan in plans for c in plan.chunks):
            seq = chunk.sequence
            seq.pending -= chunk.samples + chunk.drafts
            seq.unsure -= chunk.drafts
            if seq.status is not Status.FINISHED:
                self.finish(seq, "error", keep=False)
                lost.append(seq)
        for seq in list(self.running):
            self._preempt(seq, keep=False)
        self.memory.tree.clear()
        return lost

    @property
    def next_deadline(self) -> float | None:
        """When the next request may time out."""
        return self._deadlines[0][0] if self._deadlines else None

    def take_timed_out(self) -> list[Sequence]:
        """Requests that timed out since the last call."""
        found, self._timed_out = self._timed_out, []
        return found

    def _key(self, request: EngineRequest, now: float) -> tuple[float, int]:
        """The order of admission. It never changes, so no request starves."""
        return now - POLICIES[self.config.policy](request, self.config.budget, self.config.aging_s), self._next_id

    def _enqueue(self, seq: Sequence) -> None:
        bisect.insort(self.waiting, seq, key=lambda s: s.key)

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            seq = heapq.heappop(self._deadlines)[2]
            if seq.status is not Status.FINISHED:
                self.finish(seq, "timeout")
                self._timed_out.append(seq)

    def _decode(self, seq: Sequence, step: StepBuilder) -> None:
        while not self.memory.grow(seq, seq.computed + 1):
            victim = self._youngest(step)
            self._preempt(victim)
            if victim is seq:
                return
        self._add(seq, 1, step)

    def _prefill(self, seq: Sequence, step: StepBuilder) -> None:
        count = self._count(seq, step)
        if count > 1 and not step.rows_left:
            return
        while count > 0 and not self.memory.grow(seq, seq.computed + count):
            victim = self._youngest(step)
            if victim.key > seq.key:
                self._preempt(victim)
            elif self._is_elastic:
                count = min(count, self.memory.longest(seq) - seq.computed)
            else:
                return
        if count > 0:
            self._add(seq, count, step)

    def _add(self, seq: Sequence, count: int, step: StepBuilder) -> None:
        chunk = step.add(seq, count)
        seq.computed += count
        seq.pending += chunk.samples
        self.memory.register(seq, planning=True)

    @property
    def _is_elastic(self) -> bool:
        """Whether a chunk may have any length."""
        return self.config.chunked_prefill and not self.config.deterministic

    def _fitting(self, step: StepBuilder) -> int:
        """Tokens that prompts may take in this step: what the budget leaves, or fewer, to avoid padding.

        Padding costs as much as tokens. So where the prompts would fill less than half of the gap between two step
        sizes, they fill the smaller size and leave the rest to the next step. They take at least half of what waits.
        """
        if not self._is_elastic:
            return step.left
        prompts = [s for s in self.running if s.id not in step.planned and not s.is_full] + self.waiting[
            : len(self._slots)
        ]
        wanted = min(sum(s.remaining for s in prompts[: step.rows_left]), step.left)
        taken = self.config.budget - step.left
        below = max((size for size in self.ladder[1:] if size < taken + wanted), default=0)
        above = next(size for size in self.ladder if size >= taken + wanted)
        is_little = taken + wanted - below < (above - below) / 2 and below - taken >= wanted / 2
        return below - taken if below and is_little else step.left

    def _count(self, seq: Sequence, step: StepBuilder) -> int:
        """The length of the request's next chunk by the budget; 0 if none fits."""
        if chunk := self.config.fixed_chunk:
            # After preemption, output tokens are recomputed as they were the first time: one per step.
            rest = seq.prompt_length - seq.computed
            wanted = min(chunk - seq.computed % chunk, rest) if rest > 0 else 1
            return wanted if wanted <= step.left else 0
        if self.config.chunked_prefill:
            return min(seq.remaining, step.left)
        return seq.remaining if seq.remaining <= step.left or not step.has_prefill else 0

    def _admit(self, step: StepBuilder, now: float) -> None:
        # A request that was preempted with a pending token waits for it, and blocks those behind it.
        while self.waiting and self._slots and step.left > 0 and step.rows_left and not self.waiting[0].pending:
            seq = self.waiting[0]
            seq.slot = self._slots[-1]
            copies = self.memory.share_prefix(seq)
            if not self._count(seq, step) or not self._has_room(seq):
                self.memory.release(seq, keep=False)
                return
            self.waiting.pop(0)
            self._slots.pop()
            self.running.append(seq)
            seq.status = Status.RUNNING
            step.joins.append((seq.slot, seq))
            step.copies.extend(copies)
            if seq.started is None:
                seq.started, seq.hit_tokens = now, seq.computed
            self._prefill(seq, step)

    def _has_room(self, seq: Sequence) -> bool:
        """Whether the pages suffice for this request and for the running ones until their tokens are computed."""
        if not self.running:
            return True  # `submit` checked that it fits alone
        return all(
            sum(self.memory.missing(group, s) for s in (seq, *self.running)) <= pool.available
            for group, pool in enumerate(self.memory.pools)
        )

    def _youngest(self, step: StepBuilder) -> Sequence:
        return max((s for s in self.running if s.id not in step.planned), key=lambda s: s.key)

    def _preempt(self, seq: Sequence, *, keep: bool = True) -> None:
        self._leave(seq, keep=keep)
        seq.status = Status.WAITING
        seq.preemptions += 1
        self._enqueue(seq)

    def _leave(self, seq: Sequence, *, keep: bool = True) -> None:
        self.memory.release(seq, keep=keep)
        self.running.remove(seq)
        self._slots.append(seq.slot)
        seq.slot = -1
