"""The scheduler: which requests compute which tokens in the next step. A state machine without a clock or jax.

`schedule(now)` makes a plan; `commit(plan, tokens, now)` records the tokens that the plan sampled. Several plans may be
under way: a decoding request is scheduled again before its newest token is known, and the device takes that token from
the sampling before. So the end of a request is noticed one step late, and the surplus token is dropped.

A step is filled in this order:

1. decode rows, the oldest request first;
2. chunks of running prompts, up to the token budget (Sarathi, Agrawal et al. 2023);
3. waiting requests, admitted in the order of their fixed keys while there are slots and pages.

When pages run out, the youngest request is preempted: it frees its pages and waits with the tokens it has. Admitted
again, it recomputes them, or finds them in the prefix tree, and goes on.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from pdx.engine.config import EngineConfig
from pdx.engine.memory import PagedMemory
from pdx.engine.plan import Draft, StepPlan
from pdx.engine.policies import POLICIES
from pdx.engine.request import EngineRequest, Sequence, Status
from pdx.errors import ContextLengthError, QueueFullError, RequestError


@dataclass(frozen=True)
class Output:
    """A new token of a request, and the finish reason if the request ends with it."""

    sequence: Sequence
    token: int
    finish_reason: str | None


class Scheduler:
    """The requests of an engine.

    Args:
      config: its token budget must be chosen.
      windows: one per page group, as `pdx.cache.paged.page_groups` gives them.
      pages: number of pages of each page group.
      max_context: the most tokens of one request, prompt and answer.
    """

    def __init__(self, config: EngineConfig, windows: Seq[int | None], pages: Seq[int], max_context: int):
        self.config, self.max_context = config, max_context
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
        self._check(request)
        if len(self.waiting) >= self.config.max_queue:
            raise QueueFullError(
                f"{len(self.waiting)} requests are waiting, which is all that may (max_queue): try again later"
            )
        seq = Sequence(self._next_id, request, frozenset(ends), now, self._key(request, now), list(request.prompt))
        self._next_id += 1
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
        draft = Draft.empty(self.config)
        self.memory.tree.fresh.clear()
        oldest_first = sorted(self.running, key=lambda s: s.key)
        for seq in oldest_first:
            if seq.status is Status.RUNNING and seq.remaining == 1:
                self._decode(seq, draft)
        draft.left = self._fitting(draft)
        for seq in oldest_first:
            if seq.status is Status.RUNNING and seq.id not in draft.drafted:
                self._prefill(seq, draft)
        self._admit(draft, now)
        if not draft.chunks:
            return None
        plan = draft.finish(self.memory.tables, self.ladder)
        for chunk in plan.chunks:
            self.memory.register(chunk.sequence)
        return plan

    def commit(self, plan: StepPlan, tokens: Seq[int] | Mapping[int, int], now: float) -> list[Output]:
        """Record the tokens that a step sampled, by slot. Plans are committed in the order in which they were made."""
        outputs = []
        for chunk in plan.chunks:
            seq = chunk.sequence
            if not chunk.samples:
                continue
            seq.pending -= 1
            if seq.status is Status.FINISHED:
                continue
            token = int(tokens[chunk.slot])
            seq.tokens.append(token)
            reason = None
            if token in seq.ends:
                reason = "stop"
            elif len(seq.tokens) - seq.prompt_length >= seq.request.options.max_tokens:
                reason = "length"
            if reason:
                self.finish(seq, reason)
            elif seq.status is Status.RUNNING:
                self.memory.register(seq)
            outputs.append(Output(seq, token, reason))
        return outputs

    def fail(self, plans: Iterable[StepPlan]) -> list[Sequence]:
        """Handle failed steps, whose pages are lost: their requests end, all other running ones are preempted."""
        lost = []
        for chunk in (c for plan in plans for c in plan.chunks):
            seq = chunk.sequence
            seq.pending -= chunk.samples
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

    def _check(self, request: EngineRequest) -> None:
        if not request.prompt:
            raise RequestError("the prompt is empty: give it at least one token")
        if (request.options.logprobs or 0) > self.config.num_logprobs:
            raise RequestError(
                f"logprobs is {request.options.logprobs}, but this engine reports up to {self.config.num_logprobs} "
                "alternatives (num_logprobs)"
            )
        total = len(request.prompt) + request.options.max_tokens
        if total > self.max_context:
            raise ContextLengthError(
                f"the prompt has {len(request.prompt)} tokens and asks for {request.options.max_tokens} more, but a "
                f"request may have {self.max_context} (max_context)"
            )
        for group, pool in enumerate(self.memory.pools):
            if (need := self.memory.demand(group, total)) > pool.pages:
                raise ContextLengthError(
                    f"{total} tokens need {need} pages, but there are {pool.pages}: ask for less or give more (pages)"
                )

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

    def _decode(self, seq: Sequence, draft: Draft) -> None:
        while not self.memory.grow(seq, seq.computed + 1):
            victim = self._youngest(draft)
            self._preempt(victim)
            if victim is seq:
                return
        self._add(seq, 1, draft)

    def _prefill(self, seq: Sequence, draft: Draft) -> None:
        count = self._count(seq, draft)
        if count > 1 and not draft.rows_left:
            return
        while count > 0 and not self.memory.grow(seq, seq.computed + count):
            victim = self._youngest(draft)
            if victim.key > seq.key:
                self._preempt(victim)
            elif self._is_elastic:
                count = min(count, self.memory.longest(seq) - seq.computed)
            else:
                return
        if count > 0:
            self._add(seq, count, draft)

    def _add(self, seq: Sequence, count: int, draft: Draft) -> None:
        chunk = draft.add(seq, count)
        seq.computed += count
        seq.pending += chunk.samples
        self.memory.register(seq, planning=True)

    @property
    def _is_elastic(self) -> bool:
        """Whether a chunk may have any length."""
        return self.config.chunked_prefill and not self.config.deterministic

    def _fitting(self, draft: Draft) -> int:
        """Tokens that prompts may take in this step: what the budget leaves, or fewer, to avoid padding.

        Padding costs as much as tokens. So where the prompts would fill less than half of the gap between two step
        sizes, they fill the smaller size and leave the rest to the next step. They take at least half of what waits.
        """
        if not self._is_elastic:
            return draft.left
        prompts = [s for s in self.running if s.id not in draft.drafted] + self.waiting[: len(self._slots)]
        wanted = min(sum(s.remaining for s in prompts[: draft.rows_left]), draft.left)
        taken = self.config.budget - draft.left
        below = max((size for size in self.ladder[1:] if size < taken + wanted), default=0)
        above = next(size for size in self.ladder if size >= taken + wanted)
        is_little = taken + wanted - below < (above - below) / 2 and below - taken >= wanted / 2
        return below - taken if below and is_little else draft.left

    def _count(self, seq: Sequence, draft: Draft) -> int:
        """The length of the request's next chunk by the budget; 0 if none fits."""
        if chunk := self.config.fixed_chunk:
            # After preemption, output tokens are recomputed as they were the first time: one per step.
            rest = seq.prompt_length - seq.computed
            wanted = min(chunk - seq.computed % chunk, rest) if rest > 0 else 1
            return wanted if wanted <= draft.left else 0
        if self.config.chunked_prefill:
            return min(seq.remaining, draft.left)
        return seq.remaining if seq.remaining <= draft.left or not draft.has_prefill else 0

    def _admit(self, draft: Draft, now: float) -> None:
        # A request that was preempted with a pending token waits for it, and blocks those behind it.
        while self.waiting and self._slots and draft.left > 0 and draft.rows_left and not self.waiting[0].pending:
            seq = self.waiting[0]
            seq.slot = self._slots[-1]
            copies = self.memory.share_prefix(seq)
            if not self._count(seq, draft) or not self._has_room(seq):
                self.memory.release(seq, keep=False)
                return
            self.waiting.pop(0)
            self._slots.pop()
            self.running.append(seq)
            seq.status = Status.RUNNING
            draft.joins.append(seq)
            draft.copies.extend(copies)
            if seq.started is None:
                seq.started, seq.hit_tokens = now, seq.computed
            self._prefill(seq, draft)

    def _has_room(self, seq: Sequence) -> bool:
        """Whether the pages suffice for this request and for the running ones until their tokens are computed."""
        if not self.running:
            return True  # `submit` checked that it fits alone
        return all(
            sum(self.memory.missing(group, s) for s in (seq, *self.running)) <= pool.available
            for group, pool in enumerate(self.memory.pools)
        )

    def _youngest(self, draft: Draft) -> Sequence:
        return max((s for s in self.running if s.id not in draft.drafted), key=lambda s: s.key)

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
