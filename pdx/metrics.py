"""The timing of requests, with the two phases separate. No clock and no I/O in here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pdx.errors import RequestError


@dataclass(frozen=True)
class RequestTiming:
    """Seconds of one request, counted from the start of its prefill, without compilation.

    ttft_s: until the first token was on the host (prefill).
    e2e_s: until the last token was on the host.
    """

    tokens: int
    ttft_s: float
    e2e_s: float

    @property
    def tpot_s(self) -> float | None:
        """Seconds per token after the first (decode): (E2E - TTFT) / (n - 1). None for fewer than two tokens."""
        return (self.e2e_s - self.ttft_s) / (self.tokens - 1) if self.tokens > 1 else None


@dataclass(frozen=True)
class SpeculationCounts:
    """What speculation did for a request.

    by_length: the rounds that its tokens took, by the most tokens that a round drafted; 0 is a plain step, and a token
    tree counts by its depth.
    drafted, kept: tokens that were verified, and those of them that were kept.
    """

    by_length: Mapping[int, int] = field(default_factory=dict)
    drafted: int = 0
    kept: int = 0

    def __add__(self, other: SpeculationCounts) -> SpeculationCounts:
        lengths = sorted(self.by_length | other.by_length)
        rounds = {n: self.by_length.get(n, 0) + other.by_length.get(n, 0) for n in lengths}
        return SpeculationCounts(rounds, self.drafted + other.drafted, self.kept + other.kept)

    @property
    def rounds(self) -> int:
        return sum(self.by_length.values())

    @property
    def acceptance(self) -> float | None:
        """The share of drafted tokens that was kept; None if none was drafted."""
        return self.kept / self.drafted if self.drafted else None

    @property
    def tokens_per_round(self) -> float | None:
        """A round emits one token more than it keeps; None without a round."""
        return (self.rounds + self.kept) / self.rounds if self.rounds else None


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie, linear between two; NaN of none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class ServedTiming(RequestTiming):
    """Seconds of a request that an engine served, counted from its submission: TTFT includes the queue.

    queue_s: until it was first admitted.
    gaps_s: between one token and the next on the host (inter-token latency).
    hit_tokens: prompt tokens found in the prefix cache; preemptions: how often it was preempted.
    """

    queue_s: float = 0.0
    gaps_s: tuple[float, ...] = ()
    hit_tokens: int = 0
    preemptions: int = 0

    def gap_s(self, share: float) -> float | None:
        """A percentile of the inter-token latency; None for fewer than two tokens."""
        return percentile(self.gaps_s, share) if self.gaps_s else None


@dataclass(frozen=True)
class Spread:
    """The summary of a distribution: `count` values, their mean, percentiles (linear between two values, numpy's
    default) and the largest. NaN without values."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    largest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = sorted(values)
        mean = sum(values) / len(values) if values else math.nan
        return cls(len(values), mean, *(percentile(values, share) for share in (0.5, 0.9, 0.99, 1.0)))


@dataclass(frozen=True)
class Objectives:
    """The upper limits that a good request meets, in seconds; None: no limit.

    As in vLLM's benchmark, a request of one token meets any `tpot_s`. Raises RequestError for an objective that is not
    above zero.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("TTFT", self.ttft_s), ("TPOT", self.tpot_s), ("E2E", self.e2e_s)):
            if value is not None and not 0 < value < math.inf:
                raise RequestError(f"the objective for {name} is {value * 1e3:g} ms: it must be above 0 milliseconds")

    def met(self, timing: RequestTiming) -> bool:
        pairs = (timing.ttft_s, self.ttft_s), (timing.tpot_s or 0.0, self.tpot_s), (timing.e2e_s, self.e2e_s)
        return all(limit is None or value <= limit for value, limit in pairs)


def goodput(timings: Iterable[RequestTiming], objectives: Objectives, duration_s: float) -> float:
    """Requests per second that met all objectives."""
    return sum(objectives.met(t) for t in timings) / duration_s


@dataclass(frozen=True)
class EngineMetrics:
    """An engine's counters since its warm-up, and its present state.

    Attributes:
      finished, failed, cancelled: requests; a timeout counts as cancelled.
      decode_tokens, prefill_tokens: tokens computed, by phase; of drafted ones those that were kept.
      hit_tokens: prompt tokens found in the prefix cache, so not computed.
      occupancy: mean share of slots with a row in a step.
      preemptions: of all requests.
      pages_used, pages_cached, pages: held by requests, held by the prefix tree alone, in all; over all page groups.
      step_s: seconds per step on the host: mean, median and 99th percentile of the last few thousand steps.
      gap_s: mean seconds from the end of a step to the dispatch of the next; 0 if that was dispatched earlier.
      idle_share: the share of the time with work in which the device had no step dispatched.
      late: the share of steps that were dispatched after the step before had ended.
      compiles: programs compiled since the warm-up, 0 if all is well. A step of a shape without a program fails.
      warmup_s: seconds of the warm-up.
      speculation: what was drafted and kept, over all requests that speculate.
    """

    steps: int
    finished: int
    failed: int
    cancelled: int
    waiting: int
    running: int
    decode_tokens: int
    prefill_tokens: int
    hit_tokens: int
    occupancy: float
    preemptions: int
    pages_used: int
    pages_cached: int
    pages: int
    step_s: tuple[float, float, float]
    gap_s: float
    idle_share: float
    late: float
    compiles: int
    warmup_s: float
    speculation: SpeculationCounts = field(default_factory=SpeculationCounts)
