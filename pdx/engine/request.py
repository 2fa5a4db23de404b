"""`EngineRequest`, what a client submits, and `Sequence`, its state in the scheduler. No jax, no clock."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from pdx.arguments import boolean, integer, number
from pdx.errors import RequestError
from pdx.sampling.options import SamplingOptions
from pdx.speculative.shares import Record


@dataclass(frozen=True)
class EngineRequest:
    """One prompt and the settings to continue it with.

    Attributes:
      prompt: token ids, at least one.
      priority: for the policy `priority`; larger goes first.
      timeout_s: seconds from submission until the request ends with finish reason `timeout`. None: never.
      mask: called before each token with the ids generated so far; returns bool [V], True where a token is
        allowed, or None to allow all. It runs on the host between two steps and can enforce structured output. Where
        tokens are drafted, it is called for each drafted token too.
      speculate: False: nothing is drafted for this request, whatever the engine does for others.

    Example:
      >>> request = pdx.EngineRequest([5, 9, 2], pdx.SamplingOptions(max_tokens=8), timeout_s=30)
      >>> request.prompt, request.timeout_s
      ((5, 9, 2), 30.0)
    """

    prompt: tuple[int, ...]
    options: SamplingOptions = field(default_factory=SamplingOptions)
    priority: float = 0
    timeout_s: float | None = None
    mask: Callable[[list[int]], Any] | None = None
    speculate: bool = True

    def __post_init__(self):
        if isinstance(self.prompt, str | bytes) or not isinstance(self.prompt, Iterable):
            raise RequestError(f"prompt is {self.prompt!r}: an EngineRequest takes token ids (tokenizer.encode)")
        ids = tuple(self.prompt)
        if not all(type(t) is int for t in ids):
            ids = tuple(integer("a token id of prompt", t, 0) for t in ids)
        object.__setattr__(self, "prompt", ids)
        if not isinstance(self.options, SamplingOptions):
            raise RequestError(f"options is {self.options!r}: it must be SamplingOptions")
        object.__setattr__(self, "priority", number("priority", self.priority, -math.inf, math.inf))
        if self.timeout_s is not None:
            object.__setattr__(self, "timeout_s", number("timeout_s", self.timeout_s, 0, math.inf))
        if self.mask is not None and not callable(self.mask):
            raise RequestError(f"mask is {self.mask!r}: it must be a function of the ids generated so far")
        object.__setattr__(self, "speculate", boolean("speculate", self.speculate))


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"  # has a slot and pages
    DRAINING = "draining"  # its last step is under way: slot and pages are free, its last token is not known yet
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """A request in the scheduler.

    Attributes:
      key: order of admission, smallest first. It never changes, so no request starves.
      tokens: prompt and output as far as the host knows them.
      pending: the most tokens that steps under way emit; the host does not know them yet.
      unsure: drafted ones among them, which may turn out to be rejected.
      computed: the most tokens that are computed, positions whose keys and values the pages hold, once all planned
        steps have run; `unsure` of them may be rejected.
      record: how the request's drafts did; None where it has none.
      pages: the block table of each page group, p positions per page; -1 for pages that fell out of a window.
      first: for each page group, the index of the first page that is still held.
      node, registered: the request's deepest node in the prefix tree, and how many full pages deep it is.
    """

    id: int
    request: EngineRequest
    ends: frozenset[int]
    arrival: float
    key: tuple[float, int]
    tokens: list[int]
    status: Status = Status.WAITING
    slot: int = -1
    pending: int = 0
    unsure: int = 0
    computed: int = 0
    pages: list[list[int]] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    node: Any = None
    registered: int = 0
    finish_reason: str | None = None
    record: Record | None = None
    # For the metrics.
    started: float | None = None  # when it was first admitted
    hit_tokens: int = 0
    preemptions: int = 0

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def outputs(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def length(self) -> int:
        """The most tokens that it has, pending ones included."""
        return len(self.tokens) + self.pending

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled: 1 for a row that decodes."""
        return self.length - self.computed

    @property
    def generated(self) -> int:
        """The most output tokens that it has, pending ones included."""
        return self.length - self.prompt_length

    @property
    def is_complete(self) -> bool:
        """Whether all tokens that it may generate are known or surely pending."""
        return self.generated - self.unsure >= self.request.options.max_tokens

    @property
    def is_full(self) -> bool:
        """Whether what is pending may be all that it may generate: a further step must wait until that is known."""
        return self.generated >= self.request.options.max_tokens
