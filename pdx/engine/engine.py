"""The engine: many requests, one device, tokens as they come.

    engine = pdx.Engine(model, pdx.EngineConfig(slots=8))
    with engine:                                            # compiles everything; leaving it finishes what is open
        completions = engine.generate(["Hello", "Bye"], max_tokens=32)
        stream = engine.submit("Hello", max_tokens=32)      # from any thread
        for output in stream:                               # or `async for`
            print(output.text, end="")
        print(stream.completion.timing, engine.metrics())

    async with engine:
        async for output in engine.stream("Hello", max_tokens=32): ...

A prompt is a text, chat messages, token ids, or an `EngineRequest`, which also has a priority, a timeout and a mask.
A thread of its own drives the steps. While the device computes one, the thread plans and dispatches the next; it takes
the tokens of a step when the one after it is under way, so that the device need not wait for Python.
"""

from __future__ import annotations

import asyncio
import atexit
import dataclasses
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pdx.completion import Completion, Row, TokenLogprobs
from pdx.engine.config import EngineConfig
from pdx.engine.plan import StepPlan
from pdx.engine.request import EngineRequest, Sequence, Status
from pdx.engine.runner import NO_TOKEN, Runner
from pdx.engine.scheduler import Output, Scheduler
from pdx.engine.sizing import settle
from pdx.engine.stats import Stats
from pdx.engine.stream import ClientError, RequestStream, StreamOutput
from pdx.errors import EngineError, QueueFullError, RequestError
from pdx.generation import Prompt, cache_dtype, encode, ends_of
from pdx.metrics import EngineMetrics
from pdx.sampling_options import SamplingOptions
from pdx.weights.load import Model
from pdx.weights.progress import Report, silent

COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclass
class Flight:
    """A step under way."""

    plan: StepPlan
    dispatched: float
    logits: Any = None
    drawn: Any = None


class Engine:
    """Serves requests on one device or mesh.

    Args:
      model: what `pdx.load` returns.
      config: what is left open in it is chosen for the model and the device; `engine.config` tells.

    Raises:
      RequestError, NotImplementedError: a setting, or a kernel path, that is not possible here.
    """

    def __init__(self, model: Model, config: EngineConfig | None = None):
        kv_dtype = cache_dtype((config or EngineConfig()).kv_dtype, model)
        self.model, self.config = model, settle(config or EngineConfig(), model, kv_dtype)
        self.runner = Runner(model, self.config, kv_dtype)
        self.scheduler = Scheduler(self.config, self.runner.cache.groups, self.config.pages, self.config.max_context)
        self._streams: dict[Sequence, RequestStream] = {}
        self._stats = Stats(self.config.slots)
        self._work = threading.Condition()  # held to touch anything of the scheduler's
        self._thread: threading.Thread | None = None
        self._closing = False

    # What clients call, from any thread.

    def start(self, report: Report = silent) -> Engine:
        """Compile everything and start the thread; `report`: see `pdx.weights.progress.progress_bar`. Needed only to
        have it over with before the first request."""
        with self._work:
            if self._closing:
                raise EngineError("the engine is closed")
            if self._thread is None:
                begin = time.perf_counter()
                self.runner.warmup(report)
                self._stats.warmup_s = time.perf_counter() - begin
                self._thread = threading.Thread(target=self._run, name="pdx-engine", daemon=True)
                self._thread.start()
                atexit.register(self.close, cancel=True)
        return self

    def submit(
        self, prompt: Prompt | EngineRequest, options: SamplingOptions | None = None, *, index: int = 0,
        on_output: Callable[[StreamOutput], None] | None = None, **settings,
    ) -> RequestStream:  # fmt: skip
        """Hand a request in.

        Args:
          prompt: with an `EngineRequest`, `options` and `settings` must be left out.
          settings: single fields of `SamplingOptions`.
          index: what `completion.index` will be.
          on_output: called with each output from the engine's thread; it should be quick, and if it raises, the request
            ends with that error.

        Raises:
          QueueFullError: too many requests wait.
          RequestError, ContextLengthError: a request that cannot be served.
          EngineError: the engine is closed.
        """
        request = self._request(prompt, options, settings)
        self.start()
        row = Row(index, list(request.prompt), request.options, self.model.tokenizer.stream(),
                  ends_of(self.model, request.options))  # fmt: skip
        with self._work:
            if self._closing:
                raise EngineError("the engine is closed")
            now = time.perf_counter()
            seq = self.scheduler.submit(request, now, ends=row.ends)
            stream = self._streams[seq] = RequestStream(row, now, on_output)
            stream.cancel = lambda: self._cancel(seq)
            self._work.notify_all()
        return stream

    async def stream(
        self, prompt: Prompt | EngineRequest, options: SamplingOptions | None = None, **settings
    ) -> AsyncIterator[StreamOutput]:
        """Outputs of one request as they come; leaving the loop early cancels it. Arguments and errors as `submit`."""
        request = await asyncio.to_thread(self.submit, prompt, options, **settings)  # the first one compiles
        try:
            async for output in request:
                yield output
        finally:
            request.cancel()

    def generate(
        self, prompts: list[Prompt | EngineRequest], options: SamplingOptions | list[SamplingOptions] | None = None,
        **settings,
    ) -> list[Completion]:  # fmt: skip
        """Completions in the order of the prompts, however many: it waits where the queue is full.

        Raises what `submit` raises, and EngineError for a request that failed; the others are cancelled then.
        """
        each = options if isinstance(options, list) else [options] * len(prompts)
        streams: list[RequestStream] = []
        try:
            for index, (prompt, option) in enumerate(zip(prompts, each, strict=True)):
                while True:
                    try:
                        streams.append(self.submit(prompt, option, index=index, **settings))
                        break
                    except QueueFullError:
                        self._wait_for_one(streams)
            return [stream.result() for stream in streams]
        finally:
            for stream in streams:
                stream.cancel()

    @property
    def is_closed(self) -> bool:
        """Whether nothing can be submitted any more: it was closed, or broke down."""
        return self._closing

    def metrics(self) -> EngineMetrics:
        with self._work:
            return self._stats.snapshot(self.scheduler)

    def close(self, *, cancel: bool = False) -> None:
        """Finish what is open, or `cancel` it, and stop the thread. Nothing can be submitted from then on."""
        with self._work:
            self._closing = True
            if cancel:
                for seq in list(self._streams):
                    self._cancel(seq)
            self._work.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, kind, *_) -> None:
        self.close(cancel=kind is not None)

    async def __aenter__(self) -> Engine:
        return await asyncio.to_thread(self.start)

    async def __aexit__(self, kind, *_) -> None:
        await asyncio.to_thread(self.close, cancel=kind is not None)

    def _request(self, prompt, options: SamplingOptions | None, settings: dict) -> EngineRequest:
        if isinstance(prompt, EngineRequest):
            if options is not None or settings:
                raise RequestError("an EngineRequest has its own options: give it nothing beside it")
            request = prompt
        else:
            options = dataclasses.replace(options or SamplingOptions(), **settings)
            request = EngineRequest(tuple(encode(self.model, prompt)), options)
        encode(self.model, list(request.prompt))  # ids outside the vocabulary
        if bias := [i for i in request.options.logit_bias or () if i >= self.model.config.vocab_size]:
            raise RequestError(f"logit_bias names token {bias[0]} of {self.model.config.vocab_size}")
        if request.options.seed is None:  # the same one when it has to start anew
            seeded = dataclasses.replace(request.options, seed=secrets.randbits(64))
            request = dataclasses.replace(request, options=seeded)
        return request

    def _wait_for_one(self, streams: list[RequestStream]) -> None:
        with self._work:
            self._work.wait_for(
                lambda: len(self.scheduler.waiting) < self.config.max_queue or self._closing, timeout=1.0
            )

    def _cancel(self, seq: Sequence) -> None:
        with self._work:
            stream = self._streams.pop(seq, None)
            if stream is None:
                return
            self.scheduler.finish(seq, "cancelled")
            self._stats.cancelled += 1
            self._work.notify_all()
        self._tell(seq, stream, lambda: stream.end(seq, "cancelled"))

    # The thread.

    def _run(self) -> None:
        me = threading.get_ident()

        def compiled(name: str, _seconds: float, **_kwargs) -> None:
            if name == COMPILED and threading.get_ident() == me:
                self._stats.compiles += 1

        jax.monitoring.register_event_duration_secs_listener(compiled)
        try:
            self._drive()
        except BaseException as error:  # a defect of the engine itself: nobody may wait for it forever
            with self._work:
                self._closing = True
                lost, self._streams = self._streams, {}
            for seq, stream in lost.items():
                self._tell(seq, stream, lambda s=stream: s.fail(EngineError(f"the engine broke down: {error!r}")))
            raise
        finally:
            jax.monitoring.unregister_event_duration_listener(compiled)

    def _drive(self) -> None:
        flights: deque[Flight] = deque()
        depth = 1 if self.config.overlap else 0
        while True:
            with self._work:
                plan = self.scheduler.schedule(time.perf_counter())
                timed_out = [(s, self._streams.pop(s, None)) for s in self.scheduler.take_timed_out()]
                if plan is None and not flights and not timed_out:
                    if self._closing and self.scheduler.is_idle:
                        return
                    self._stats.rests()
                    self._work.wait(self._rest())
                    continue
            for seq, stream in timed_out:
                self._stats.cancelled += 1
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
        """Send a step to the device. One with masks samples only when all tokens before it are known."""
        plan = flight.plan
        before = flights[-2] if len(flights) > 1 else None
        self.runner.join_all(plan.joins)
        flight.logits = self.runner.forward(plan)
        is_late = before is None or before.drawn.tokens.is_ready()
        with self._work:
            self._stats.dispatched(plan, time.perf_counter(), is_late=is_late)
        masked = [c for c in plan.chunks if c.samples and c.sequence.request.mask is not None]
        if masked:
            while len(flights) > 1:
                self._collect(flights)
        flight.drawn = self.runner.sample(plan, flight.logits, self._allowed(masked) if masked else None)
        flight.logits = None

    def _allowed(self, chunks) -> np.ndarray:
        """The masks of a step's requests; one that gives none that makes sense fails alone."""
        allowed = np.ones((self.config.slots, self.model.config.vocab_size), bool)
        for chunk in chunks:
            seq = chunk.sequence
            if seq.status is Status.FINISHED:
                continue
            try:
                mask = seq.request.mask(list(seq.outputs))
                if mask is not None:
                    mask = np.asarray(mask, bool)
                    if mask.shape != allowed.shape[1:] or not mask.any():
                        raise RequestError(f"a mask must be bool [{allowed.shape[1]}] and allow at least one token, "
                                           f"got shape {mask.shape} with {int(mask.sum())} allowed")  # fmt: skip
                    allowed[chunk.slot] = mask
            except Exception as error:
                self._fail(seq, ClientError(f"the request's mask failed: {type(error).__name__}: {error}"))
        return allowed

    def _collect(self, flights: deque[Flight]) -> None:
        """Wait for the tokens of the oldest step and hand them out."""
        flight = flights[0]
        plan = flight.plan
        wanted = any(c.samples and c.sequence.request.options.logprobs is not None for c in plan.chunks)
        got = self.runner.fetch(flight.drawn, logprobs=wanted)
        flights.popleft()
        now = time.perf_counter()
        for chunk in plan.chunks:
            if chunk.samples and got.tokens[chunk.slot] == NO_TOKEN:
                self._fail(chunk.sequence, EngineError(
                    f"the logits behind token {chunk.start + chunk.count - 1} of the request are NaN: the model "
                    "overflows for this input (try another dtype)"))  # fmt: skip
        with self._work:
            self._stats.ended(flight.dispatched, now)
            slots = {c.sequence: c.slot for c in plan.chunks}
            outputs = self.scheduler.commit(plan, got.tokens, now)
            self._work.notify_all()  # whoever waits for room in the queue
        for output in outputs:
            self._deliver(output, _logprobs(got, slots[output.sequence], output), now)

    def _deliver(self, output: Output, token: TokenLogprobs, now: float) -> None:
        seq = output.sequence
        stream = self._streams.get(seq)
        if stream is None:
            return

        def push() -> None:
            if stream.push(seq, token, now):
                with self._work:
                    if self._streams.pop(seq, None) is not None:
                        self._stats.finished += 1
                    self.scheduler.finish(seq, "stop")  # a stop string, which only the text tells

        self._tell(seq, stream, push)

    def _tell(self, seq: Sequence, stream: RequestStream | None, what: Callable[[], Any]) -> None:
        """Call into a client's stream. What goes wrong there is the client's, and costs it the request."""
        if stream is None:
            return
        try:
            what()
        except Exception as error:
            self._fail(seq, error, stream)

    def _fail(self, seq: Sequence, error: Exception, stream: RequestStream | None = None) -> None:
        with self._work:
            stream = self._streams.pop(seq, stream)
            if seq.status is not Status.FINISHED:
                # What it computed may be unsound: nobody shall find it.
                self.scheduler.finish(seq, "error", keep=False)
                self.scheduler.memory.tree.clear()
            if stream is None or stream.is_over:
                return
            self._stats.failed += 1
        try:
            stream.fail(error)
        except ClientError:
            pass  # it has nobody to tell it to

    def _recover(self, flights: deque[Flight], error: Exception) -> None:
        """A step failed: its requests and those of the steps behind it end, everything else starts anew."""
        with self._work:
            lost = self.scheduler.fail([flight.plan for flight in flights])
            flights.clear()
            self._stats.rests()
        for seq in lost:
            self._fail(seq, EngineError(f"the step that computed the request failed: {type(error).__name__}: {error}"))
        self.runner.reset()


def _logprobs(got, slot: int, output: Output) -> TokenLogprobs:
    best = output.sequence.request.options.logprobs
    if best is None:
        return TokenLogprobs(output.token, float("inf"))
    top = zip(got.top_ids[slot, :best].tolist(), got.top_logprobs[slot, :best].tolist(), strict=True)
    return TokenLogprobs(output.token, float(got.logprob[slot]), tuple(top))
