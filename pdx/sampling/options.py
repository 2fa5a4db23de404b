"""The sampling settings of one request, as plain data on the host: no arrays, no jax."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

from pdx.arguments import boolean, integer, number, plain
from pdx.errors import RequestError

MAX_LOGPROBS = 20
# Rows of logit bias have this fixed width, so that no number of entries compiles a new program.
MAX_LOGIT_BIAS = 300
# The settings that say which tokens may be drawn: of no effect at temperature 0.
FILTERS = ("top_k", "top_p", "min_p")


@dataclass(frozen=True)
class SamplingOptions:
    """How the tokens of one request are chosen and when it ends.

    The defaults are greedy decoding. See `pdx.sampling.sampler` for the order in which the settings apply.

    Args:
      max_tokens: how many tokens to generate at most.
      temperature: divides the logits; 0 always takes the best token.
      top_k: keep only the k best tokens; 0 is off.
      top_p: keep only the smallest set of best tokens with this share of the probability; 1 is off.
      min_p: keep only tokens at least this probable, relative to the best one; 0 is off.
      repetition_penalty: divides positive and multiplies negative logits of every token that the prompt
        or the output holds (CTRL, arXiv:1909.05858); 1 is off.
      presence_penalty: subtracted from the logit of every token that the output holds.
      frequency_penalty: the same, times how often the output holds it.
      logit_bias: token id -> what to add to its logit; -inf bans the token.
      seed: the randomness depends on the seed and the position only. None: a new seed for each request.
      stop: texts that end the output; they are not part of it.
      stop_token_ids: tokens that end the output, besides the model's own.
      ignore_eos: continue after the model's own end tokens.
      logprobs: report the chosen token's log-probability and this many of the best alternatives;
        0 is the chosen token only, None is off.

    Raises:
      RequestError: a setting out of its range; the text names it, its value and the range.

    Example:
      >>> pdx.SamplingOptions(max_tokens=64, temperature=0.7, top_p=0.9, seed=1, stop="END").stop
      ('END',)
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self):
        self._set("max_tokens", integer("max_tokens", self.max_tokens, 1))
        self._set("temperature", number("temperature", self.temperature, 0, math.inf, "; 0 is greedy"))
        self._set("top_k", integer("top_k", self.top_k, 0, hint="; 0 switches it off"))
        top_p = number(
            "top_p",
            self.top_p,
            0,
            1,
            "; 1 switches it off, and for the best token only use temperature 0",
            open_below=True,
        )
        self._set("top_p", top_p)
        self._set("min_p", number("min_p", self.min_p, 0, 1, "; 0 switches it off"))
        self._set(
            "repetition_penalty",
            number("repetition_penalty", self.repetition_penalty, 0, math.inf, "; 1 switches it off", open_below=True),
        )
        for name in ("presence_penalty", "frequency_penalty"):
            self._set(name, number(name, getattr(self, name), -2, 2, "; 0 switches it off"))
        if self.logit_bias is not None:
            self._set("logit_bias", _bias(self.logit_bias))
        if self.seed is not None:
            self._set("seed", integer("seed", self.seed, 0, 2**64 - 1))
        if self.logprobs is not None:
            self._set("logprobs", integer("logprobs", self.logprobs, 0, MAX_LOGPROBS))
        stop = (self.stop,) if isinstance(self.stop, str) else _sequence("stop", self.stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise RequestError(f"stop is {self.stop!r}: it must be non-empty texts")
        self._set("stop", stop)
        ids = _sequence("stop_token_ids", self.stop_token_ids)
        self._set("stop_token_ids", tuple(integer("stop_token_ids", i, 0) for i in ids))
        self._set("ignore_eos", boolean("ignore_eos", self.ignore_eos))

    def _set(self, name: str, value) -> None:
        object.__setattr__(self, name, value)


def _sequence(name, value) -> tuple:
    try:
        return tuple(value)
    except TypeError:
        raise RequestError(f"{name} is {value!r}: it must be a list") from None


def _bias(bias) -> dict[int, float]:
    """The bias with integer keys, which JSON writes as text."""
    if not isinstance(bias, Mapping):
        raise RequestError(f"logit_bias is {bias!r}: it must map token ids to numbers")
    if len(bias) > MAX_LOGIT_BIAS:
        raise RequestError(f"logit_bias has {len(bias)} entries: it must have at most {MAX_LOGIT_BIAS}")
    clean = {}
    for token, value in bias.items():
        token = int(token) if isinstance(token, str) and token.isdecimal() else token
        token, value = integer("a token id of logit_bias", token, 0), plain(value)
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not is_number or not (value == -math.inf or abs(value) <= sys.float_info.max):
            raise RequestError(f"logit_bias of token {token} is {value!r}: it must be finite, or -inf for a ban")
        clean[token] = float(value)
    return clean
