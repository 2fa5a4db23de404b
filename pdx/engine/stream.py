"""The client's side of a request: its outputs as they come, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from pdx.engine.request import Sequence
from pdx.errors import EngineError
from pdx.generation.completion import Completion, Row, TokenLogprobs
from pdx.metrics import ServedTiming


@dataclass(frozen=True)
class StreamOutput:
    """New tokens of a request and the text they add; the last output has the completion.

    If the request failed, a callback's last output has the error and no tokens; iterating raises the error.

    `text` may lag behind the tokens: incomplete characters and possible stop strings are held back.
    """

    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprobs] | None = None
    completion: Completion | None = None
    error: Exception | None = None


class RequestStream:
    """A request under way. Iterate over it (`for` or `async for`, one of the two), or wait for `result()`.

    The methods below the line are the engine's; it calls them from its own thread.
    """

    def __init__(self, row: Row, arrival: float, on_output: Callable[[StreamOutput], None] | None = None):
        self.row, self.completion, self.error = row, None, None
        self.cancel: Callable[[], None] = lambda: None  # set by the engine, as the thread that answers
        self.served_by: threading.Thread | None = None
        self._arrival, self._on_output = arrival, on_output
        self._times: list[float] = []
        self._outputs: deque[StreamOutput] = deque()
        self._ready = threading.Condition()
        self._wake: Callable[[], None] | None = None

    @property
    def is_over(self) -> bool:
        return self.completion is not None or self.error is not None

    def __iter__(self) -> Iterator[StreamOutput]:
        return self

    def __next__(self) -> StreamOutput:
        self._check_thread()
        with self._ready:
            self._ready.wait_for(lambda: self._outputs or self.is_over)
            output = self._take()
        if output is None:
            raise StopIteration
        return output

    def __aiter__(self) -> AsyncIterator[StreamOutput]:
        return self

    async def __anext__(self) -> StreamOutput:
        while True:
            with self._ready:
                if self._outputs or self.is_over:
                    output = self._take()
                    break
                loop = asyncio.get_running_loop()
                waiting = loop.create_future()
                self._wake = partial(loop.call_soon_threadsafe, _resolve, waiting)
            await waiting
        if output is None:
            raise StopAsyncIteration
        return output

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end. Raises EngineError if it failed, TimeoutError after `timeout` seconds."""
        self._check_thread()
        with self._ready:
            if not self._ready.wait_for(lambda: self.is_over, timeout):
                raise TimeoutError(f"the request is not finished after {timeout} seconds; it goes on")
            if self.error is not None:
                raise self.error
            return self.completion

    def _check_thread(self) -> None:
        """Raise EngineError where waiting would never end."""
        if threading.current_thread() is self.served_by and not self.is_over:
            raise EngineError(
                "a callback waits for a request of its own engine, whose thread runs the callback: give "
                "that request an on_output too, or wait for it in another thread"
            )

    def _take(self) -> StreamOutput | None:
        """The next output; None after the last one. Raises the request's error after the outputs that preceded it."""
        if self._outputs:
            return self._outputs.popleft()
        if self.error is not None:
            raise self.error
        return None

    # ------------------------------------------------------------------------------------------------------------------

    def push(self, seq: Sequence, token: TokenLogprobs, now: float) -> bool:
        """Add a token; returns whether the request has ended with it."""
        self.row.push([token.token_id], [token], now - self._arrival)
        self._times.append(now)
        if self.row.finish_reason:
            self.completion = self._complete(seq)
        asked = self.row.options.logprobs is not None
        self._put(StreamOutput([token.token_id], self.row.fresh_text(), [token] if asked else None, self.completion))
        return self.completion is not None

    def end(self, seq: Sequence, reason: str) -> None:
        """End the request with the tokens it has: cancelled, or timed out."""
        if not self.is_over:
            self.row.finish_reason = reason
            self.completion = self._complete(seq)
            self._put(StreamOutput([], self.row.fresh_text(), None, self.completion))

    def fail(self, error: Exception) -> None:
        """End the request with an error."""
        if not self.is_over:
            if self._on_output is not None:
                with suppress(Exception):  # the request has failed already; the callback's error changes nothing
                    self._on_output(StreamOutput([], "", error=error))
            self.error = error
            self._notify()

    def _complete(self, seq: Sequence) -> Completion:
        done, times = self.row.completion(0.0), self._times
        timing = ServedTiming(
            done.timing.tokens,
            done.timing.ttft_s,
            done.timing.e2e_s,
            queue_s=(seq.started if seq.started is not None else seq.arrival) - self._arrival,
            gaps_s=tuple(b - a for a, b in pairwise(times)),
            hit_tokens=seq.hit_tokens,
            preemptions=seq.preemptions,
        )
        return replace(done, timing=timing)

    def _put(self, output: StreamOutput) -> None:
        with self._ready:
            self._outputs.append(output)
        self._notify()
        if self._on_output is not None:
            try:
                self._on_output(output)
            except Exception as error:
                self._on_output = None  # not called again, not even about this
                raise ClientError(f"the request's callback raised {type(error).__name__}: {error}") from error

    def _notify(self) -> None:
        with self._ready:
            wake, self._wake = self._wake, None
            self._ready.notify_all()
        if wake is not None:
            try:
                wake()
            except RuntimeError as error:
                raise ClientError("the event loop that waited for the request is closed") from error


class ClientError(EngineError):
    """An error in the client's code; it ends only that client's request."""


def _resolve(waiting: asyncio.Future) -> None:
    if not waiting.done():
        waiting.set_result(None)
