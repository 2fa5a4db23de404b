"""Synthetic or recorded loads: arrival times, prompts and answer lengths.

A synthetic load is drawn from one seed before the measurement starts. Its arrivals are those of vLLM's benchmark: gaps
of a gamma distribution, scaled so that the average rate is exact.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from pdx.calibration import stdlib_texts
from pdx.errors import RequestError
from pdx.generation.prompts import encode
from pdx.io import inputs
from pdx.weights.load import Model

Arrival = Literal["poisson", "burst", "closed"]
ARRIVALS = ("poisson", "burst", "closed")
# Shape of the gamma distribution of the gaps: 1 is a Poisson process; below 1, requests arrive in clusters.
BURSTINESS = 0.25


@dataclass(frozen=True)
class Arriving:
    """A request of a load. `arrival_s`: seconds after the load's start; None: as soon as a client is free."""

    arrival_s: float | None
    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths in tokens. `text`: its notation."""

    text: str
    draw: Callable[[np.random.Generator, int], np.ndarray]

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Parse `128`, `uniform:LOW:HIGH` (both included), `normal:MEAN:SD`, `lognormal:MEDIAN:SIGMA`, or
        `zipf:LOW:HIGH:A`: k from LOW to HIGH with a probability proportional to (k - LOW + 1)^-A.

        Raises RequestError for any other text.
        """
        name, *rest = text.split(":") if ":" in text else ("fixed", text)
        try:
            numbers = [float(x) for x in rest]
            if not all(map(math.isfinite, numbers)):
                raise ValueError
            return cls(text, _KINDS[name](*numbers))
        except (KeyError, TypeError, ValueError):
            raise RequestError(
                f"{text!r} is not a distribution of lengths: give tokens, such as 128, or uniform:LOW:HIGH, "
                "normal:MEAN:SD, lognormal:MEDIAN:SIGMA or zipf:LOW:HIGH:EXPONENT with 1 <= LOW <= HIGH"
            ) from None

    def sample(self, rng: np.random.Generator, count: int) -> list[int]:
        """`count` lengths, whole numbers of at least 1."""
        return np.maximum(1, np.rint(self.draw(rng, count))).astype(int).tolist()


def _fixed(tokens: float):
    _check(tokens >= 1)
    return lambda rng, n: np.full(n, tokens)


def _uniform(low: float, high: float):
    _check(1 <= low <= high)
    return lambda rng, n: rng.integers(int(low), int(high), n, endpoint=True)


def _normal(mean: float, deviation: float):
    _check(mean >= 1 and deviation >= 0)
    return lambda rng, n: rng.normal(mean, deviation, n)


def _lognormal(median: float, sigma: float):
    _check(median >= 1 and sigma >= 0)
    return lambda rng, n: median * np.exp(sigma * rng.standard_normal(n))


def _zipf(low: float, high: float, exponent: float):
    _check(1 <= low <= high)
    values = np.arange(int(low), int(high) + 1)
    weights = (values - int(low) + 1.0) ** -exponent
    return lambda rng, n: rng.choice(values, n, p=weights / weights.sum())


def _check(ok: bool) -> None:
    if not ok:
        raise ValueError


_KINDS = {"fixed": _fixed, "uniform": _uniform, "normal": _normal, "lognormal": _lognormal, "zipf": _zipf}


class Prompts:
    """Prompts cut out of a text at random places. The first `shared` tokens of all prompts are equal."""

    def __init__(self, tokens: Sequence[int], rng: np.random.Generator, shared: int = 0):
        self.tokens, self.rng = list(tokens), rng
        self.shared = self._piece(shared)

    @classmethod
    def of(cls, model: Model, seed: int = 0, shared: int = 0, file: Path | None = None) -> Prompts:
        """Prompts from a file, or from Python's language reference, in the model's tokens."""
        return cls(encode(model, inputs.read(file, stdlib_texts.evaluation)), np.random.default_rng(seed), shared)

    def cut(self, length: int) -> tuple[int, ...]:
        """A prompt of `length` tokens, the shared ones first."""
        return (*self.shared[:length], *self._piece(max(0, length - len(self.shared))))

    def _piece(self, length: int) -> tuple[int, ...]:
        if length > len(self.tokens):
            raise RequestError(
                f"a prompt of {length} tokens cannot be cut out of a text of {len(self.tokens)}: ask for shorter "
                "prompts, or give a longer text"
            )
        at = int(self.rng.integers(0, len(self.tokens) - length, endpoint=True))
        return tuple(self.tokens[at : at + length])


def arrivals(process: Arrival, rate: float, count: int, rng: np.random.Generator, burstiness: float) -> np.ndarray:
    """Arrival times [count] in seconds: the first is 0, and `rate` requests arrive per second on average.

    The gaps have a gamma distribution of shape `burstiness` (poisson: 1, the exponential distribution), scaled so that
    the count - 1 gaps take (count - 1) / rate seconds. With an infinite rate, all requests arrive at once.
    """
    if math.isinf(rate) or count == 1:
        return np.zeros(count)
    at = np.concatenate([[0.0], np.cumsum(rng.gamma(1.0 if process == "poisson" else burstiness, 1.0, count - 1))])
    return at * ((count - 1) / rate / at[-1]) if at[-1] > 0 else at


@dataclass(frozen=True)
class Load:
    """A load for an engine.

    Attributes:
      process: `poisson`, `burst`, `trace` (recorded), or `closed`: each client sends its next request when it has the
        answer to the previous one.
      pressure: requests per second, or clients of a closed load.
    """

    process: Literal["poisson", "burst", "closed", "trace"]
    pressure: float
    requests: tuple[Arriving, ...]

    @property
    def is_closed(self) -> bool:
        return self.process == "closed"

    @property
    def name(self) -> str:
        if self.process == "trace":
            return "trace"
        return f"{self.pressure:g} clients" if self.is_closed else f"{self.pressure:g} req/s"

    @property
    def longest(self) -> int:
        """The most tokens of prompt and answer that a request has."""
        return max(len(r.prompt) + r.output_tokens for r in self.requests)


def make(
    process: Arrival,
    pressure: float,
    count: int,
    prompt_len: Lengths,
    output_len: Lengths,
    prompts: Prompts,
    *,
    seed: int = 0,
    burstiness: float = BURSTINESS,
) -> Load:
    """A synthetic load of `count` requests. The lengths depend on the seed, not on the pressure.

    Raises RequestError for settings out of range.
    """
    if process not in ARRIVALS:
        raise RequestError(f"arrival {process!r} is not one of {', '.join(ARRIVALS)}")
    if count < 1:
        raise RequestError(f"requests is {count}: there must be at least one")
    if not pressure > 0:
        raise RequestError(
            f"the load is {pressure:g} {'clients' if process == 'closed' else 'requests per second'}: it must be above "
            "0"
        )
    if process == "closed" and pressure != int(pressure):
        raise RequestError(f"{pressure:g} clients: it must be a whole number")
    if not burstiness > 0:
        raise RequestError(f"burstiness is {burstiness:g}: it must be above 0; 1 is a Poisson process")
    sizes, times = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    lengths = zip(prompt_len.sample(sizes, count), output_len.sample(sizes, count), strict=True)
    at = [None] * count if process == "closed" else arrivals(process, pressure, count, times, burstiness).tolist()
    requests = tuple(Arriving(t, prompts.cut(p), o) for t, (p, o) in zip(at, lengths, strict=True))
    return Load(process, pressure, requests)


def read_trace(file: Path, prompts: Prompts, limit: int | None = None) -> Load:
    """A recorded load: JSON lines with `arrival_s`, `prompt_tokens` and `output_tokens`, in any order.

    Times are shifted so that the first request arrives at 0. `limit`: the first so many requests. Raises RequestError
    that names the line.
    """
    rows = sorted(_row(file, n, line) for n, line in enumerate(inputs.lines(file), 1) if line.strip())[:limit]
    if not rows:
        raise RequestError(f"{file} has no requests")
    begin, span = rows[0][0], rows[-1][0] - rows[0][0]
    requests = tuple(Arriving(at - begin, prompts.cut(p), o) for at, p, o in rows)
    return Load("trace", (len(rows) - 1) / span if span else math.inf, requests)


def _row(file: Path, number: int, line: str) -> tuple[float, int, int]:
    try:
        row = json.loads(line)
        at, prompt, output = (row[key] for key in ("arrival_s", "prompt_tokens", "output_tokens"))
        if any(isinstance(x, bool) or not isinstance(x, int) or x < 1 for x in (prompt, output)):
            raise ValueError("prompt_tokens and output_tokens must be whole numbers of at least 1")
        if isinstance(at, bool) or not isinstance(at, int | float) or not (math.isfinite(at) and at >= 0):
            raise ValueError("arrival_s must be seconds of at least 0")
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise RequestError(
            f'{file}:{number}: {reason}; a line is {{"arrival_s": 0.5, "prompt_tokens": 128, "output_tokens": 32}}'
        ) from None
    return float(at), prompt, output
