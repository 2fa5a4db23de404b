"""How many tokens each request of an engine's step drafts, by its acceptance so far and by what the step costs. No jax.

A step of an engine costs what its padded number of tokens costs, whoever owns them. So the drafted tokens of all rows
compete: the k-th draft of a row whose drafts are accepted with probability a is worth a^k tokens, and the step takes
the best ones, as many as make its tokens a second the most. Where none pays it takes none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# What a step with drafts must promise over one without: the costs are measured, and not exactly.
MARGIN = 1.1
# Tokens that the prior counts for, and how long what was seen is remembered, in tokens.
PRIOR_WEIGHT, MEMORY = 3.0, 64.0
# What is left of an engine's record with each new request: drafts that did not pay are tried again after some dozens.
KEPT = 0.95
# The most tokens that a row drafts where the length is chosen.
LONGEST_CHOSEN = 7
# What drafts may lose, in plain steps: ALLOWED at once, and LOSS more with each token. Of what they gained, GAIN is the
# most that they may lose again.
ALLOWED, LOSS, GAIN = 0.3, 0.005, 8.0


def gained(progress: Any, ratio: Any) -> Any:
    """What a step adds to the allowance of the drafts, in plain steps.

    Drafts are guesses, and a few that fail cost what it took many plain steps to gain. So a step may draft only while
    the allowance covers what it is likely to lose at worst. Then, whatever the text, the answer takes at most longer
    than without drafts by `ALLOWED` steps, by a share `LOSS`, and by one round that failed.

    Args:
      progress: the plain steps that would have done as much.
      ratio: the plain steps that would have taken as long.
    """
    return progress * (1 + LOSS) - ratio


def at_worst(accepted: Any, tried: Any) -> Any:
    """The probability that a token is accepted, less what it is uncertain by: a standard error of so many tokens."""
    share = accepted / tried
    return share - (share * (1 - share) / tried) ** 0.5


@dataclass
class Record:
    """How the drafts of one request did, by the proposer's confidence class; old ones count less and less.

    Accepted tokens count for surer classes too, rejected ones for less sure ones (`lengths.Acceptance`).

    Attributes:
      prior: the acceptance to assume of each class before anything was seen.
      available, confidence: what the proposer could draft behind the newest token that the host knows.
      every: the record of all requests, which sees what this one sees.
    """

    prior: tuple[float, ...]
    available: int = 0
    confidence: int = 0
    every: Record | None = None
    tried: list[float] = field(init=False)
    accepted: list[float] = field(init=False)

    def __post_init__(self):
        self.tried = [PRIOR_WEIGHT] * len(self.prior)
        self.accepted = [PRIOR_WEIGHT * a for a in self.prior]

    @property
    def by_class(self) -> tuple[float, ...]:
        """The probability that a drafted token is accepted."""
        return tuple(a / t for a, t in zip(self.accepted, self.tried, strict=True))

    @property
    def acceptance(self) -> float:
        """The probability that the next drafted token is accepted."""
        return self.by_class[self.confidence]

    @property
    def at_worst(self) -> float:
        """The same, less what it is uncertain by."""
        return at_worst(self.accepted[self.confidence], self.tried[self.confidence])

    def fade(self) -> None:
        """Go back a little towards the prior."""
        back = PRIOR_WEIGHT * (1 - KEPT)
        self.tried = [t * KEPT + back for t in self.tried]
        self.accepted = [a * KEPT + back * p for a, p in zip(self.accepted, self.prior, strict=True)]

    def observe(self, confidence: int, tried: int, accepted: int) -> None:
        """Add `tried` tokens, of which `accepted` were accepted; a token behind a rejected one was not tried."""
        for at in range(len(self.prior)):
            hits = accepted if at >= confidence else 0
            misses = tried - accepted if at <= confidence else 0
            keep = math.exp(-(hits + misses) / MEMORY)
            self.tried[at] = self.tried[at] * keep + hits + misses
            self.accepted[at] = self.accepted[at] * keep + hits
        if self.every is not None:
            self.every.observe(confidence, tried, accepted)


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a step.

    Attributes:
      plain: without drafts, by its padded number of tokens.
      drafted: with drafts, by its padded number of tokens; also what the proposer does in each such step.
      draft_s: more for each further token of the longest draft, where a model drafts them.
    """

    plain: Mapping[int, float]
    drafted: Mapping[int, float]
    draft_s: float = 0.0

    def of(self, tokens: int, longest: int) -> float:
        """Seconds of a step with drafts; it has `tokens` tokens, and the longest draft has `longest`."""
        size = next(n for n in self.drafted if n >= tokens)
        return self.drafted[size] + self.draft_s * (longest - 1)


def shares(
    acceptance: Sequence[float],
    limits: Sequence[int],
    taken: int,
    plain_s: float,
    costs: StepCosts,
    *,
    at_worst: Sequence[float] = (),
    allowance: float = math.inf,
) -> list[int]:
    """Tokens to draft in each row.

    Args:
      acceptance: of each row.
      limits: the most tokens of each row.
      taken: tokens that the step has without drafts.
      plain_s: seconds of the step without drafts.
      at_worst: the acceptance of each row at worst; none: `acceptance`.
      allowance: what drafts may lose, in plain steps (`gained`).

    Example, two rows of which one copies a text; a step of 4 tokens costs little more than one of 2:
      >>> from pdx.speculative.shares import StepCosts, shares
      >>> shares([0.9, 0.1], [7, 7], 2, 1.0, StepCosts({2: 1.0}, {4: 1.1, 8: 2.0}))
      [2, 0]
    """
    ordered = sorted(
        (
            (a**k, k, row)
            for row, (a, limit) in enumerate(zip(acceptance, limits, strict=True))
            for k in range(1, limit + 1)
        ),
        key=lambda gain: (-gain[0], gain[1]),
    )
    best, chosen = taken / plain_s, 0
    for size in costs.drafted:
        count = min(size - taken, len(ordered))
        if count < 1:
            continue
        taking = ordered[:count]
        seconds = costs.of(taken + count, max(k for _, k, _ in taking))
        rate = (taken + sum(gain for gain, _, _ in taking)) / seconds
        margin = MARGIN if seconds > plain_s and not chosen else 1.0
        least = sum((at_worst or acceptance)[row] ** k for _, k, row in taking)
        is_covered = allowance + gained(1 + least / taken, seconds / plain_s) >= 0
        if is_covered and rate > best * margin:
            best, chosen = rate, count
    return counted(ordered[:chosen], len(acceptance))


def fixed(length: int, limits: Sequence[int], room: int) -> list[int]:
    """The tokens of each row: `length`, or as many as its limit and the step's `room` leave, the first rows first."""
    found = []
    for limit in limits:
        found.append(max(0, min(length, limit, room)))
        room -= found[-1]
    return found


def counted(gains: Sequence[tuple[float, int, int]], rows: int) -> list[int]:
    """How many of the gains are of each row."""
    found = [0] * rows
    for _, _, row in gains:
        found[row] += 1
    return found
