"""One request while its tokens come in: text, stops and limits; and the completion it ends as."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pdx.errors import NotFiniteError
from pdx.metrics import RequestTiming, SpeculationCounts
from pdx.sampling.options import SamplingOptions

# What -inf, the log-probability of a token that is impossible, is in JSON, which has no infinity. OpenAI's value.
LOWEST_LOGPROB = -9999.0


@dataclass(frozen=True)
class TokenLogprobs:
    """One token's log-probability under the model, and those of the best alternatives; -inf where it is impossible."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt.

    token_ids: all generated tokens, an end token included; `text` leaves end tokens and stop strings out.
    finish_reason: `stop` (an end token or a stop string) or `length`.
    compile_s: seconds of compilation while its batch ran; they are in none of the timings.
    speculation: what speculative decoding did; None without it.
    """

    index: int
    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str
    timing: RequestTiming
    compile_s: float
    logprobs: list[TokenLogprobs] | None = None
    speculation: SpeculationCounts | None = None

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)


@dataclass
class Row:
    """A request in a batch. `decoder` turns tokens into text, `ends` are the tokens that end it."""

    index: int
    prompt: list[int]
    options: SamplingOptions
    decoder: Any
    ends: frozenset[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    text: str = ""
    shown: int = 0
    finish_reason: str | None = None
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    compile_s: float = 0.0  # so far, in its batch
    speculation: SpeculationCounts | None = None

    def push(self, tokens: Iterable[int], logprobs: Iterable[TokenLogprobs], now: float) -> None:
        """Take tokens as they came from the device at second `now`; what follows the last one is dropped."""
        for token, logprob in zip(tokens, logprobs, strict=True):
            if self.finish_reason:
                return
            if not self.token_ids:
                self.ttft_s = now
            self.e2e_s = now
            self.token_ids.append(token)
            self.logprobs.append(logprob)
            self._read(token)

    def _read(self, token: int) -> None:
        before = len(self.text)
        if token in self.ends:
            self.finish_reason = "stop"
        else:
            self.text += self.decoder.push(token)
            if len(self.token_ids) >= self.options.max_tokens:
                self.finish_reason = "length"
        if self.finish_reason:
            self.text += self.decoder.flush()
        if found := first_stop(self.text, self.options.stop, before):
            self.text, self.finish_reason = self.text[: found[0]], "stop"

    def fresh_text(self) -> str:
        """Text not shown yet, less an end that may turn out to be the beginning of a stop string."""
        end = len(self.text)
        if not self.finish_reason and self.options.stop:
            reach = max(len(s) for s in self.options.stop) - 1
            for at in range(max(self.shown, end - reach), end):
                if any(s.startswith(self.text[at:]) for s in self.options.stop):
                    end = at
                    break
        fresh, self.shown = self.text[self.shown : end], end
        return fresh

    def completion(self, compile_s: float) -> Completion:
        """What it ended as."""
        return Completion(
            index=self.index,
            text=self.text,
            token_ids=self.token_ids,
            prompt_tokens=len(self.prompt),
            finish_reason=self.finish_reason or "length",
            timing=RequestTiming(len(self.token_ids), self.ttft_s, self.e2e_s),
            compile_s=compile_s,
            logprobs=self.logprobs if self.options.logprobs is not None else None,
            speculation=self.speculation,
        )


def json_logprob(value: float) -> float:
    """A log-probability as JSON has it: at least `LOWEST_LOGPROB`."""
    return max(value, LOWEST_LOGPROB)


def first_stop(text: str, stops: Sequence[str], new: int = 0) -> tuple[int, int] | None:
    """Begin and end of the stop string that is complete first in `text`, None if there is none. Of several that end at
    the same place, the first in the list counts.

    A token may be long enough to complete several. Which one counts depends on the text alone, not on where its tokens
    end. `new`: the text before it holds no whole stop string.
    """
    # A stop string may have begun in the text before `new`.
    begins = [(text.find(stop, max(new - len(stop) + 1, 0)), len(stop)) for stop in stops]
    found = [(at, at + size) for at, size in begins if at >= 0]
    return min(found, key=lambda span: span[1], default=None)


def not_finite(position: int, index: int | None = None) -> NotFiniteError:
    """The error of a request that has no next token, since the logits behind its token at `position` are not finite.

    `index`: which prompt it is, where there are several.
    """
    return NotFiniteError(
        f"the logits behind token {position} of the request are NaN or infinite: the model overflows "
        "for this input (try another dtype)",
        index,
    )
