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

1. `submit` encodes the prompt and puts the request into the scheduler's waiting queue.
2. The engine's thread (`Driver`) asks the `Scheduler` for a step: it admits requests, assigns slots and pages, and
   packs decode rows and prompt chunks into a `StepPlan`.
3. The `Runner` dispatches its forward pass (`mixed_step` over the paged cache) and then sampling.
4. While the device runs that step, the thread plans and dispatches the next one; only then it fetches the tokens.
5. `Scheduler.commit` records the tokens, and each `RequestStream` turns them into text for its client.
"""

from __future__ import annotations

import asyncio
import atexit
import dataclasses
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, cast

from pdx.cache.paged import PagedCache
from pdx.engine.config import EngineConfig
from pdx.engine.drafting import Drafting
from pdx.engine.driver import Driver
from pdx.engine.request import EngineRequest
from pdx.engine.runner import Runner
from pdx.engine.scheduler import Scheduler
from pdx.engine.sizing import fill_in
from pdx.engine.speculative_runner import SpeculativeRunner
from pdx.engine.stream import RequestStream, StreamOutput
from pdx.errors import EngineError, QueueFullError, RequestError
from pdx.generation.completion import Completion
from pdx.generation.generator import cache_dtype
from pdx.generation.kept import with_draft
from pdx.generation.prompts import Prompt, as_list, check_bias, encode, options_of_each, options_with, row_of
from pdx.meshes import on_own_mesh
from pdx.metrics import EngineMetrics
from pdx.sampling.options import SamplingOptions
from pdx.speculative.proposers import NGram
from pdx.weights.load import Model
from pdx.weights.progress import Report, silent


class Engine:
    """Serves requests on one device or mesh.

    Args:
      model: what `pdx.load` returns.
      config: settings that are None are chosen for the model and the device; `engine.config` has the choice.

    Raises:
      RequestError, NotImplementedError: a setting, or a kernel path, that is not possible here.

    Example:
      >>> model = pdx.load("smollm2-135m-instruct")  # doctest: +SKIP
      >>> with pdx.Engine(model, pdx.EngineConfig(slots=8)) as engine:  # doctest: +SKIP
      ...     done = engine.generate(["The capital of France is", "Bonjour"], max_tokens=16)
    """

    @on_own_mesh
    def __init__(self, model: Model, config: EngineConfig | None = None):
        config = EngineConfig() if config is None else config
        for name, value, kind in (("model", model, Model), ("config", config, EngineConfig)):
            if not isinstance(value, kind):
                raise RequestError(f"{name} is {type(value).__name__}: it must be a {kind.__module__}.{kind.__name__}")
        kv_dtype = cache_dtype(config.kv_dtype, model)
        draft = None
        if config.speculate is not None:
            loaded = with_draft(config.speculate, model)
            config, draft = dataclasses.replace(config, speculate=loaded), loaded.model
        self.model, self.config = model, fill_in(config, model, kv_dtype, cast(Model | None, draft))
        drafting = None
        if self.config.speculate is None:
            self.runner = Runner(model, self.config, kv_dtype)
        else:
            self.runner = speculative = SpeculativeRunner(model, self.config, kv_dtype)
            drafting = Drafting(
                self.config, speculative.proposer.prior, always=not isinstance(speculative.proposer, NGram)
            )
        pages, context = cast(Sequence[int], self.config.pages), cast(int, self.config.max_context)
        self.scheduler = Scheduler(self.config, cast(PagedCache, self.runner.cache).groups, pages, context, drafting)
        self._driver = Driver(self.scheduler, self.runner)
        self._work = self._driver.work
        self._thread: threading.Thread | None = None

    # What clients call, from any thread.

    @on_own_mesh
    def start(self, report: Report = silent) -> Engine:
        """Compile everything and start the thread. Optional: otherwise the first request does it.

        `report`: see `pdx.weights.progress.progress_bar`.
        """
        with self._work:
            if self._driver.closing:
                raise EngineError("the engine is closed")
            if self._thread is None:
                begin = time.perf_counter()
                self.runner.warmup(report)
                if self.scheduler.drafting is not None:
                    self.scheduler.drafting.costs = cast(SpeculativeRunner, self.runner).costs
                self._driver.stats.warmup_s = time.perf_counter() - begin
                self._thread = threading.Thread(target=self._driver.run, name="pdx-engine", daemon=True)
                self._thread.start()
                atexit.register(self.close, cancel=True)
        return self

    def submit(
        self,
        prompt: Prompt | EngineRequest,
        options: SamplingOptions | None = None,
        *,
        index: int = 0,
        on_output: Callable[[StreamOutput], None] | None = None,
        **settings,
    ) -> RequestStream:
        """Submit a request; returns at once.

        Args:
          prompt: with an `EngineRequest`, `options` and `settings` must be left out.
          settings: single fields of `SamplingOptions`.
          index: what `completion.index` will be.
          on_output: called from the engine's thread with each output; the last one has the completion or the error. It
            should be quick. If it raises, the request ends with that error.

        Raises:
          QueueFullError: too many requests wait.
          RequestError, ContextLengthError: a request that cannot be served.
          EngineError: the engine is closed.
        """
        request = self._request(prompt, options, settings)
        if on_output is not None and not callable(on_output):
            raise RequestError(f"on_output is {on_output!r}: it must be a function that takes an output")
        self.start()
        row = row_of(self.model, index, list(request.prompt), request.options)
        with self._work:
            if self._driver.closing:
                raise EngineError("the engine is closed")
            now = time.perf_counter()
            seq = self.scheduler.submit(request, now, ends=row.ends)
            stream = self._driver.streams[seq] = RequestStream(row, now, on_output)
            stream.served_by = self._thread
            stream.cancel = lambda: self._driver.cancel(seq)
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
        self,
        prompts: Prompt | EngineRequest | Sequence[Prompt | EngineRequest],
        options: SamplingOptions | Sequence[SamplingOptions] | None = None,
        **settings,
    ) -> list[Completion]:
        """Completions of one prompt or many, in their order. Waits while the queue is full.

        Raises what `submit` raises, and EngineError for a request that failed; the others are then cancelled.
        """
        given: list[Any] = [prompts] if isinstance(prompts, EngineRequest) else as_list(cast(Any, prompts))
        each: list[Any] = [options] * len(given)
        if isinstance(options, list | tuple):
            each, settings = options_of_each(options, settings, len(given)), {}
        streams: list[RequestStream] = []
        try:
            for index, (prompt, option) in enumerate(zip(given, each, strict=True)):
                while True:
                    try:
                        streams.append(self.submit(prompt, option, index=index, **settings))
                        break
                    except QueueFullError:
                        self._wait_for_room()
            return [stream.result() for stream in streams]
        finally:
            for stream in streams:
                stream.cancel()

    @property
    def is_closed(self) -> bool:
        """Whether the engine takes no more requests: it was closed, or it failed."""
        return self._driver.closing

    def metrics(self) -> EngineMetrics:
        with self._work:
            return self._driver.stats.snapshot(self.scheduler)

    def close(self, *, cancel: bool = False) -> None:
        """Finish open requests, or `cancel` them, and stop the thread. The engine then takes no more requests."""
        with self._work:
            self._driver.closing = True
            if cancel:
                for seq in list(self._driver.streams):
                    self._driver.cancel(seq)
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
            request = EngineRequest(tuple(encode(self.model, prompt)), options_with(options, settings))
        encode(self.model, list(request.prompt))  # ids outside the vocabulary
        check_bias(self.model, request.options)
        if request.options.seed is None:  # drawn once, so that a preempted request samples the same tokens again
            seeded = dataclasses.replace(request.options, seed=secrets.randbits(64))
            request = dataclasses.replace(request, options=seeded)
        return request

    def _wait_for_room(self) -> None:
        with self._work:
            self._work.wait_for(
                lambda: len(self.scheduler.waiting) < self.config.max_queue or self._driver.closing, timeout=1.0
            )
