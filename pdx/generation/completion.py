"""A running request (`Row`): its tokens, text, stop strings and limits. And `Completion`, its result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pdx.errors import NotFiniteError
from pdx.metrics import RequestTiming, SpeculationCounts
from pdx.sampling.options import SamplingOptions

# JSON has no infinity. This stands for -inf, the log-probability of an impossible token, as in OpenAI's API.
LOWEST_LOGPROB = -9999.0


@dataclass(frozen=True)
class TokenLogprobs:
    """The log-probability of one token, and `top`: (token, log-probability) of the best alternatives.

    An impossible token has -inf.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt.

    Attributes:
      index: which of the prompts it answers, from 0.
      text: the generated text without end tokens and stop strings.
      token_ids: all generated tokens, including an end token.
      finish_reason: `stop` (an end token or a stop string) or `length`.
      timing: TTFT, TPOT and E2E, in seconds.
      compile_s: seconds of compilation while its batch ran. No timing includes them.
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
    """A request in a batch. `decoder` turns tokens into text, `ends` are the tokens that end the request."""

    index: int
    prompt: list[int]
    options: SamplingOptions
    decoder: Any
    ends: frozenset[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    text: str = ""
    shown: int = 0  # characters of `text` that `fresh_text` has returned
    finish_reason: str | None = None
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    compile_s: float = 0.0  # seconds of compilation in its batch so far
    speculation: SpeculationCounts | None = None

    def push(self, tokens: Iterable[int], logprobs: Iterable[TokenLogprobs], now: float) -> None:
        """Append tokens that the device returned at second `now`. Tokens after the end of the request are dropped."""
        for token, logprob in zip(tokens, logprobs, strict=True):
            if self.finish_reason:
                return
            if not self.token_ids:
                self.ttft_s = now
            self.e2e_s = now
            self.token_ids.append(token)
            self.logprobs.append(logprob)
            self._append_text(token)

    def _append_text(self, token: int) -> None:
        """Append the token's text, and set `finish_reason` if the request ends with it."""
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
        """The text that was not returned before. A tail that may be the beginning of a stop string is held back."""
        end = len(self.text)
        if not self.finish_reason and self.options.stop:
            longest = max(len(s) for s in self.options.stop) - 1
            for at in range(max(self.shown, end - longest), end):
                if any(s.startswith(self.text[at:]) for s in self.options.stop):
                    end = at
                    break
        fresh, self.shown = self.text[self.shown : end], end
        return fresh

    def completion(self, compile_s: float) -> Completion:
        """The request as a `Completion`."""
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
    """A log-probability for JSON: at least `LOWEST_LOGPROB`.

    >>> json_logprob(float("-inf"))
    -9999.0
    """
    return max(value, LOWEST_LOGPROB)


def first_stop(text: str, stops: Sequence[str], new: int = 0) -> tuple[int, int] | None:
    """(begin, end) of the stop string that ends first in `text`; None if there is none.

    If several end at the same place, the first in the list wins. The result depends on the text alone, not on how it
    is divided into tokens. `new`: the characters before this index contain no complete stop string.

    >>> first_stop("one, two. three", [". ", ", "])
    (3, 5)
    """
    # A stop string may have begun in the text before `new`.
    begins = [(text.find(stop, max(new - len(stop) + 1, 0)), len(stop)) for stop in stops]
    found = [(at, at + size) for at, size in begins if at >= 0]
    return min(found, key=lambda span: span[1], default=None)


def not_finite(position: int, index: int | None = None) -> NotFiniteError:
    """The error of a request that has no next token, because its logits after token `position` are not finite.

    `index`: which of several prompts it is.
    """
    return NotFiniteError(
        f"the logits after token {position} of the request are NaN or infinite: the model overflows "
        "for this input (try another dtype)",
        index,
    )
