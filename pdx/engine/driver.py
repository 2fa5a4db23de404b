"""The engine's thread: it plans steps, dispatches them, fetches their tokens and hands these to the clients.

While the device computes a step, the next one is planned and dispatched; only then are the step's tokens fetched. A
step that fails ends its own requests; a client's code that fails ends that client's request.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np

from pdx.engine.plan import Chunk, StepPlan
from pdx.engine.request import Sequence, Status
from pdx.engine.runner import Emitted, Runner
from pdx.engine.scheduler import Output, Scheduler
from pdx.engine.speculative_runner import Speculated
from pdx.engine.stats import Stats
from pdx.engine.stream import ClientError, RequestStream
from pdx.errors import EngineError, RequestError
from pdx.generation.completion import TokenLogprobs, not_finite
from pdx.metrics import SpeculationCounts
from pdx.sampling.sampler import NO_TOKEN

COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclass
class Flight:
    """A step under way."""

    plan: StepPlan
    dispatched: float
    logits: Any = None
    drawn: Any = None


class Driver:
    """Runs `scheduler` on `runner`.

    Attributes:
      work: the lock over scheduler and streams. It is notified when there is work, and when the queue has room.
      streams: the streams of all open requests.
      closing: True: no more requests are taken, and the thread ends with the last open one.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner):
        self.scheduler, self.runner, self.config = scheduler, runner, runner.config
        self.stats = Stats(self.config.slots)
        self.streams: dict[Sequence, RequestStream] = {}
        self.work = threading.Condition()
        self.closing = False

    def cancel(self, seq: Sequence) -> None:
        with self.work:
            stream = self.streams.pop(seq, None)
            if stream is None:
                return
            self.scheduler.finish(seq, "cancelled")
            self.stats.cancelled += 1
            self.work.notify_all()
        self._tell(seq, stream, lambda: stream.end(seq, "cancelled"))

    def run(self) -> None:
        me = threading.get_ident()

        def compiled(name: str, _seconds: float, **_kwargs) -> None:
            if name == COMPILED and threading.get_ident() == me:
                self.stats.compiles += 1

        jax.monitoring.register_event_duration_secs_listener(compiled)
        try:
            self._drive()
        except BaseException as error:  # a defect of the engine itself: no client may wait for it forever
            with self.work:
                self.closing = True
                lost, self.streams = self.streams, {}
            broken = EngineError(f"the engine broke down: {error!r}")
            for stream in lost.values():
                with suppress(ClientError):
                    stream.fail(broken)
            raise
        finally:
            jax.monitoring.unregister_event_duration_listener(compiled)

    def _drive(self) -> None:
        flights: deque[Flight] = deque()
        depth = 1 if self.config.overlap else 0
        while True:
            with self.work:
                plan = self.scheduler.schedule(time.perf_counter())
                timed_out = [(s, self.streams.pop(s, None)) for s in self.scheduler.take_timed_out()]
                if plan is None and not flights and not timed_out:
                    if self.closing and self.scheduler.is_idle:
                        return
                    self.stats.rests()
                    self.work.wait(self._rest())
                    continue
            for seq, stream in timed_out:
                self.stats.cancelled += 1
                self._tell(seq, stream, lambda seq=seq, stream=stream: stream.end(seq, "timeout"))
            try:
                if plan is not None:
                    flight = Flight(plan, time.perf_counter())
                    flights.append(flight)
                    self._dispatch(flight, flights)
                if flights and (len(flights) > depth or plan is None):
                    self._collect(flights)
            except Exception as error:
                self._recover(flights, error)

    def _rest(self) -> float | None:
        """Seconds to sleep when there is nothing to do: until the next request may time out."""
        deadline = self.scheduler.next_deadline
        return None if deadline is None else max(0.0, deadline - time.perf_counter())

    def _dispatch(self, flight: Flight, flights: deque[Flight]) -> None:
        """Send a step to the device. With masks, sampling waits until the tokens of all earlier steps are known."""
        plan = flight.plan
        before = flights[-2] if len(flights) > 1 else None
        seen_running = time.perf_counter() if before and not self.runner.is_ready(before.drawn) else None
        self.runner.join_all(plan.joins)
        flight.logits = self.runner.forward(plan)
        is_late = before is None or self.runner.is_ready(before.drawn)
        with self.work:
            self.stats.dispatched(plan, time.perf_counter(), is_late=is_late, seen_running=seen_running)
        masked = [c for c in plan.chunks if c.samples and c.sequence.request.mask is not None]
        if masked:
            while len(flights) > 1:
                self._collect(flights)
        allowed = None
        if masked:
            allowed = self._allowed(masked, self.runner.drafts(flight.logits), 1 + self.runner.most_drafts(plan))
        flight.drawn = self.runner.sample(plan, flight.logits, allowed)
        flight.logits = None

    def _allowed(self, chunks: Seq[Chunk], drafts: Seq[Seq[int]], places: int) -> np.ndarray:
        """The masks of a step's requests, [slots, places, V]; `drafts`: drafted tokens by slot.

        A request whose mask is invalid fails alone.
        """
        allowed = np.ones((self.config.slots, places, self.runner.vocab_size), bool)
        for chunk in chunks:
            seq = chunk.sequence
            if seq.status is Status.FINISHED:
                continue
            try:
                self._mask(seq, drafts[chunk.slot], allowed[chunk.slot])
            except Exception as error:
                self._fail(seq, ClientError(f"the request's mask failed: {type(error).__name__}: {error}"))
        return allowed

    def _mask(self, seq: Sequence, drafted: Seq[int], allowed: np.ndarray) -> None:
        """Fill in the masks [places, V] of one request: behind its tokens, and behind each drafted one."""
        never = [t for t, v in (seq.request.options.logit_bias or {}).items() if v == -math.inf]
        for place in range(len(drafted) + 1):
            found = cast(Any, seq.request.mask)([*seq.outputs, *drafted[:place]])
            if found is not None:
                mask, width = np.array(found, bool), allowed.shape[1]
                if mask.shape == (width,):
                    mask[never] = False
                if mask.shape != (width,) or not mask.any():
                    raise RequestError(
                        f"a mask must be bool [{width}] and allow at least one token, "
                        f"got shape {mask.shape} with {int(mask.sum())} allowed"
                    )
                allowed[place] = mask
            if place < len(drafted) and not allowed[place, drafted[place]]:
                break  # it is rejected, and what follows is not looked at

    def _collect(self, flights: deque[Flight]) -> None:
        """Wait for the tokens of the oldest step and deliver them."""
        flight = flights[0]
        plan = flight.plan
        wanted = any(c.samples and c.sequence.request.options.logprobs is not None for c in plan.chunks)
        got = self.runner.fetch(flight.drawn, logprobs=wanted)
        flights.popleft()
        now = time.perf_counter()
        for chunk in plan.chunks:
            if chunk.samples and NO_TOKEN in (tokens := got.of(chunk.slot)):
                self._fail(chunk.sequence, not_finite(len(chunk.sequence.tokens) - 1 + tokens.index(NO_TOKEN)))
        with self.work:
            self.stats.ended(flight.dispatched, now)
            slots = {c.sequence: c.slot for c in plan.chunks}
            outputs = self.scheduler.commit(plan, {c.slot: got.of(c.slot) for c in plan.chunks}, now)
            self._learn(plan, got, Counter(output.sequence for output in outputs))
            self.work.notify_all()  # whoever waits for room in the queue
        for output in outputs:
            self._deliver(output, _logprobs(got, slots[output.sequence], output), now)

    def _learn(self, plan: StepPlan, got: Emitted, emitted: Mapping[Sequence, int]) -> None:
        """Note how a step's drafts did. `emitted`: tokens that each request took; those behind its end are dropped."""
        if not isinstance(got, Speculated):
            return
        for chunk in plan.chunks:
            record, stream = chunk.sequence.record, self.streams.get(chunk.sequence)
            if record is not None and emitted[chunk.sequence]:
                got.teach(record, chunk.slot)
                if not chunk.is_decode:  # the first token comes from the prompt
                    continue
                counts = got.counted(chunk.slot, emitted[chunk.sequence])
                self.stats.speculation += counts
                self.stats.decode_tokens += counts.kept
                if stream is not None:
                    stream.row.speculation = (stream.row.speculation or SpeculationCounts()) + counts

    def _deliver(self, output: Output, token: TokenLogprobs, now: float) -> None:
        seq = output.sequence
        stream = self.streams.get(seq)
        if stream is None:
            return

        def push() -> None:
            if stream.push(seq, token, now):
                with self.work:
                    if self.streams.pop(seq, None) is not None:
                        self.stats.finished += 1
                    self.scheduler.finish(seq, "stop")  # a stop string, which only the text tells

        self._tell(seq, stream, push)

    def _tell(self, seq: Sequence, stream: RequestStream | None, what: Callable[[], Any]) -> None:
        """Call into a client's stream. An error there ends that client's request."""
        if stream is None:
            return
        try:
            what()
        except Exception as error:
            self._fail(seq, error, stream)

    def _fail(self, seq: Sequence, error: Exception, stream: RequestStream | None = None) -> None:
        with self.work:
            stream = self.streams.pop(seq, stream)
            if seq.status is not Status.FINISHED:
                # Its keys and values may be wrong: no other request may share them.
                self.scheduler.finish(seq, "error", keep=False)
                self.scheduler.memory.tree.clear()
            if stream is None or stream.is_over:
                return
            self.stats.failed += 1
        with suppress(ClientError):  # the client is gone: there is no one to tell
            stream.fail(error)

    def _recover(self, flights: deque[Flight], error: Exception) -> None:
        """Recover from a failed step: its requests and those of later steps end, all others are recomputed."""
        with self.work:
            lost = self.scheduler.fail([flight.plan for flight in flights])
            flights.clear()
            self.stats.rests()
        for seq in lost:
            self._fail(seq, EngineError(f"the step that computed the request failed: {type(error).__name__}: {error}"))
        self.runner.reset()


def _logprobs(got, slot: int, output: Output) -> TokenLogprobs:
    best = output.sequence.request.options.logprobs
    if best is None:
        return TokenLogprobs(output.token, float("inf"))
    at = slot, output.column
    top = zip(got.top_ids[at][:best].tolist(), got.top_logprobs[at][:best].tolist(), strict=True)
    return TokenLogprobs(output.token, float(got.logprob[at]), tuple(top))
