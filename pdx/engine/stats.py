"""Counts and clocks of an engine, kept by its thread."""

from __future__ import annotations

from collections import deque

from pdx.engine.plan import StepPlan
from pdx.engine.scheduler import Scheduler
from pdx.metrics import EngineMetrics, SpeculationCounts, percentile

KEPT = 4096  # steps whose times are remembered


class Stats:
    """Counters of the engine; `snapshot` returns them as `EngineMetrics`.

    A step lasts from when it could begin (it was dispatched, and the step before had ended) until its tokens were on
    the host. If no step was running when it was dispatched, although there was work, the device was idle for a gap. The
    gap is at most the time since the previous step was last seen running or its tokens were fetched.
    """

    def __init__(self, slots: int):
        self.slots = slots
        self.steps = self.finished = self.failed = self.cancelled = self.preemptions = 0
        self.decode_tokens = self.prefill_tokens = self.hit_tokens = self.rows = self.late = self.compiles = 0
        self.speculation = SpeculationCounts()
        self.warmup_s = self.busy_s = self.idle_s = 0.0
        self._times: deque[float] = deque(maxlen=KEPT)
        self._ended: float | None = None

    def dispatched(self, plan: StepPlan, now: float, *, is_late: bool, seen_running: float | None = None) -> None:
        """Count a dispatched step. `is_late`: the step before had already ended; `seen_running`: when it last ran."""
        self.steps += 1
        self.decode_tokens += plan.decode_tokens
        self.prefill_tokens += plan.prefill_tokens
        self.rows += len({c.slot for c in plan.chunks})
        self.preemptions += sum(s.preemptions > 0 for _, s in plan.joins)
        self.hit_tokens += sum(s.hit_tokens for _, s in plan.joins if not s.preemptions)
        self.late += is_late
        if is_late and self._ended is not None:
            self.idle_s += max(0.0, now - (seen_running or self._ended))

    def ended(self, dispatched: float, now: float) -> None:
        began = dispatched if self._ended is None else max(dispatched, self._ended)
        self.busy_s += now - began
        self._times.append(now - began)
        self._ended = now

    def rests(self) -> None:
        """There is no work: the time until the next step does not count as idle."""
        self._ended = None

    def snapshot(self, scheduler: Scheduler) -> EngineMetrics:
        pools, steps, times = scheduler.memory.pools, max(self.steps, 1), list(self._times)
        mean = sum(times) / len(times) if times else float("nan")
        return EngineMetrics(
            steps=self.steps,
            finished=self.finished,
            failed=self.failed,
            cancelled=self.cancelled,
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            decode_tokens=self.decode_tokens,
            prefill_tokens=self.prefill_tokens,
            hit_tokens=self.hit_tokens,
            occupancy=self.rows / (steps * self.slots),
            preemptions=self.preemptions,
            pages_used=sum(p.used for p in pools),
            pages_cached=sum(p.idle for p in pools),
            pages=sum(p.pages for p in pools),
            step_s=(mean, percentile(times, 0.5), percentile(times, 0.99)),
            gap_s=self.idle_s / steps,
            idle_share=self.idle_s / max(self.busy_s + self.idle_s, 1e-9),
            late=self.late / steps,
            compiles=self.compiles,
            warmup_s=self.warmup_s,
            speculation=self.speculation,
        )
