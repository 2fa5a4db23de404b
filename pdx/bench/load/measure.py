"""Sends a load to an engine, at recorded times or from clients that wait for answers, and measures every request."""

from __future__ import annotations

import dataclasses
import itertools
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pdx.bench.load.workload import Arriving, Load
from pdx.engine.engine import Engine
from pdx.engine.request import EngineRequest
from pdx.errors import ContextLengthError, PdxError
from pdx.metrics import EngineMetrics, Objectives, ServedTiming, Spread, goodput
from pdx.sampling.options import SamplingOptions
from pdx.weights.progress import Report, silent


@dataclass(frozen=True)
class Served:
    """The outcome of a request: its timing, or the error that ended it.

    `late_s`: seconds by which the load generator sent it too late. They are not part of the timing.
    """

    prompt_tokens: int
    late_s: float
    timing: ServedTiming | None = None
    error: str | None = None


@dataclass(frozen=True)
class LoadResult:
    """The results of one load on one engine. `duration_s`: from the first submission to the end of the last request."""

    settings: str
    load: str
    pressure: float
    duration_s: float
    objectives: Objectives
    served: tuple[Served, ...]
    counted: Mapping[str, float] = field(default_factory=dict)  # the engine's own counts during the load

    @property
    def timings(self) -> list[ServedTiming]:
        return [s.timing for s in self.served if s.timing is not None]

    @property
    def failed(self) -> int:
        return sum(s.timing is None for s in self.served)

    @property
    def input_tokens_per_s(self) -> float:
        """Prompt tokens of finished requests per second, including those found in the prefix cache."""
        return sum(s.prompt_tokens for s in self.served if s.timing is not None) / self.duration_s

    @property
    def output_tokens_per_s(self) -> float:
        return sum(t.tokens for t in self.timings) / self.duration_s

    @property
    def requests_per_s(self) -> float:
        return len(self.timings) / self.duration_s

    @property
    def goodput(self) -> float:
        """Requests per second that met all objectives."""
        return goodput(self.timings, self.objectives, self.duration_s)

    @property
    def good_share(self) -> float:
        """The share of all requests, including failed ones, that met all objectives."""
        return sum(self.objectives.met(t) for t in self.timings) / len(self.served)

    def spreads(self) -> dict[str, Spread]:
        """The distributions of the requests' times in seconds; `itl`: of all gaps between two tokens."""
        timings = self.timings
        return {
            "queue": Spread.of(t.queue_s for t in timings),
            "ttft": Spread.of(t.ttft_s for t in timings),
            "tpot": Spread.of(t.tpot_s for t in timings if t.tpot_s is not None),
            "itl": Spread.of(gap for t in timings for gap in t.gaps_s),
            "e2e": Spread.of(t.e2e_s for t in timings),
        }

    def to_dict(self) -> dict[str, Any]:
        errors = sorted({s.error for s in self.served if s.error is not None})
        return {
            "settings": self.settings,
            "load": self.load,
            "pressure": self.pressure,
            "duration_s": self.duration_s,
            "requests": len(self.served),
            "failed": self.failed,
            "errors": errors,
            "late_s": max((s.late_s for s in self.served), default=0.0),
            "input_tokens_per_s": self.input_tokens_per_s,
            "output_tokens_per_s": self.output_tokens_per_s,
            "requests_per_s": self.requests_per_s,
            "goodput": self.goodput,
            "good_share": self.good_share,
            "objectives": dataclasses.asdict(self.objectives),
            **{f"{name}_s": dataclasses.asdict(spread) for name, spread in self.spreads().items()},
            "engine": dict(self.counted),
        }


def run(
    engine: Engine,
    load: Load,
    objectives: Objectives | None = None,
    *,
    settings: str = "",
    sampling: SamplingOptions | None = None,
    report: Report = silent,
) -> LoadResult:
    """Send a load to an engine and wait until all requests have ended. Refused and failed requests are counted.

    Args:
      settings: the name of the engine's settings in the results.
      sampling: settings of all requests. `max_tokens` is replaced and end tokens are ignored, so that every answer has
        the length of the load.
      report: called after each request.

    Raises:
      ContextLengthError: a request is longer than the engine's context.
    """
    check_fits(load.longest, engine.config.max_context)
    sampling = sampling or SamplingOptions()
    requests = [
        EngineRequest(r.prompt, dataclasses.replace(sampling, max_tokens=r.output_tokens, ignore_eos=True))
        for r in load.requests
    ]
    label, done = f"{settings or 'engine'}: {load.name}", itertools.count(1)
    report(label, 0, len(requests))
    tick = lambda: report(label, next(done), len(requests))  # noqa: E731
    before, start = engine.metrics(), time.perf_counter()
    if load.is_closed:
        served = _clients(engine, requests, min(int(load.pressure), len(requests)), tick)
    else:
        served = _by_clock(engine, load.requests, requests, start, tick)
    duration = time.perf_counter() - start
    return LoadResult(
        settings,
        load.name,
        load.pressure,
        duration,
        objectives or Objectives(),
        tuple(served),
        counted(before, engine.metrics()),
    )


def check_fits(longest: int, most: int) -> None:
    """Raise ContextLengthError if the longest request exceeds an engine's context."""
    if longest > most:
        raise ContextLengthError(
            f"a request of the load has {longest} tokens with its answer, but the context is "
            f"{most}: ask for shorter ones"
        )


def _by_clock(
    engine: Engine, arriving: Sequence[Arriving], requests: Sequence[EngineRequest], start: float, tick: Callable
) -> list[Served]:
    """Send each request when it is due, without waiting for others."""
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    served: list[Served] = []

    def collect() -> None:
        while (item := waiting.get()) is not None:
            served.append(_result(*item))
            tick()

    collector = threading.Thread(target=collect, name="pdx-load", daemon=True)
    collector.start()
    for due, request in zip(arriving, requests, strict=True):
        if (left := start + due.arrival_s - time.perf_counter()) > 0:
            time.sleep(left)
        late = max(0.0, time.perf_counter() - start - due.arrival_s)
        waiting.put((request, late, _submit(engine, request)))
    waiting.put(None)
    collector.join()
    return served


def _clients(engine: Engine, requests: Sequence[EngineRequest], clients: int, tick: Callable) -> list[Served]:
    """Send requests from one thread per client. Each waits for its answer before it sends the next request."""
    left, lock = iter(enumerate(requests)), threading.Lock()
    served: dict[int, Served] = {}

    def client() -> None:
        while True:
            with lock:
                index, request = next(left, (None, None))
            if request is None:
                return
            served[index] = _result(request, 0.0, _submit(engine, request))
            with lock:
                tick()

    threads = [threading.Thread(target=client, name=f"pdx-client-{i}", daemon=True) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [served[index] for index in range(len(requests))]


def _submit(engine: Engine, request: EngineRequest) -> Any:
    """The request's stream, or the error with which the engine refused it."""
    try:
        return engine.submit(request)
    except PdxError as error:
        return error


def _result(request: EngineRequest, late: float, stream: Any) -> Served:
    try:
        if isinstance(stream, PdxError):
            raise stream
        return Served(len(request.prompt), late, stream.result().timing)
    except PdxError as error:
        return Served(len(request.prompt), late, error=f"{type(error).__name__}: {error}")


def counted(before: EngineMetrics, after: EngineMetrics) -> dict[str, float]:
    """The differences of an engine's counters between two snapshots."""
    names = ("steps", "decode_tokens", "prefill_tokens", "hit_tokens", "preemptions", "compiles")
    found: dict[str, float] = {name: getattr(after, name) - getattr(before, name) for name in names}
    steps = max(found["steps"], 1)
    drafts, seen = after.speculation, before.speculation
    found |= {"drafted_tokens": drafts.drafted - seen.drafted, "kept_tokens": drafts.kept - seen.kept}
    found["occupancy"] = (after.occupancy * after.steps - before.occupancy * before.steps) / steps
    return found
