"""The settings of an engine, as frozen data without jax, so that profiles can be read and checked anywhere.

A setting is declared once: its annotation says what is checked. An `int` is at least 1 and a `float` is above 0;
`limited` sets other limits, and `one_of` lists the words that a setting may be.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints

from pdx.arguments import boolean, integer, number
from pdx.engine.policies import POLICIES
from pdx.errors import RequestError
from pdx.installation.paths import config_folders
from pdx.sampling.options import MAX_LOGPROBS
from pdx.shapes import round_up
from pdx.speculative.options import Speculation, as_length, asked
from pdx.speculative.shares import LONGEST_CHOSEN
from pdx.speculative.trees import Tree

SMALLEST_MIXED = 16
SMALLEST_DRAFTED = 2  # as a power of two


def limited(default: Any, low: float, high: float) -> Any:
    """A number with these limits. An `int` may equal `low`; a `float` must be above it."""
    return field(default=default, metadata={"low": low, "high": high})


def one_of(default: str, choices: Iterable[str]) -> Any:
    """A word of these."""
    return field(default=default, metadata={"choices": tuple(choices)})


@dataclass(frozen=True)
class EngineConfig:
    """What an engine holds and how it schedules.

    Attributes:
      slots: requests that decode together.
      prefill_rows: prompts of which one step may take a chunk.
      token_budget: the most tokens of a step. Decode rows come first; prompt chunks fill the rest. None: chosen by the
        cost model so that a step takes at most `tpot_s` (see `pdx.engine.sizing`).
      tpot_s: the target time between two tokens, in seconds; used where `token_budget` is None.
      page_size: tokens per page, p. None: what suits the device.
      pages: pages of each page group. None: from the device's memory, at most what `slots` requests of `max_context`
        need.
      memory_share: the share for pages of the memory that the weights leave; used where `pages` is None.
      max_context: the most tokens of one request, prompt and answer. None: the model's context.
      kv_dtype, kernels: as in `pdx.generate`.
      policy: order of admission. `fcfs`: arrival. `priority`: each level counts as `aging_s` seconds of waiting.
        `shortest`: the shortest prompt first; `token_budget` tokens count as `aging_s` seconds. No request starves.
      prefix_cache: keep the pages of finished requests for later ones with the same prefix.
      chunked_prefill: False: a prompt is prefilled in one step, however long, and all others wait for it.
      max_queue: the most waiting requests; one more is refused with QueueFullError.
      num_logprobs: the most alternatives that a request may ask for.
      overlap: plan and dispatch a step while the one before it runs.
      deterministic: all steps have one shape and prompts are always split at the same positions, so that tokens and
        log-probabilities are equal bit for bit under any load. It costs time: each decode step computes
        `token_budget` tokens.
      speculate, draft_length: who drafts tokens, and how many a round, as in `pdx.generate`; or a `pdx.Speculation`.
        `draft_length` None: what `speculate` says. Single requests can opt out (`EngineRequest.speculate`).

    Raises:
      RequestError: a setting out of range; the text names it.

    Example:
      >>> config = pdx.EngineConfig(slots=4, token_budget=64, policy="shortest")
      >>> config.slots, config.prefix_cache
      (4, True)
    """

    slots: int = 8
    prefill_rows: int = 2
    token_budget: int | None = None
    tpot_s: float = 0.1
    page_size: int | None = None
    pages: int | tuple[int, ...] | None = None
    memory_share: float = limited(0.9, 0, 1)
    max_context: int | None = None
    kv_dtype: str = "auto"
    kernels: str = "auto"
    policy: str = one_of("fcfs", POLICIES)
    aging_s: float = 10.0
    prefix_cache: bool = True
    chunked_prefill: bool = True
    max_queue: int = 1024
    num_logprobs: int = limited(0, 0, MAX_LOGPROBS)
    overlap: bool = True
    deterministic: bool = False
    speculate: Speculation | None = None
    draft_length: Any = None

    def __post_init__(self):
        object.__setattr__(self, "speculate", asked(cast(Any, self.speculate)))
        if self.draft_length is not None:
            object.__setattr__(self, "draft_length", as_length(self.draft_length))
        for declared in dataclasses.fields(self):
            object.__setattr__(self, declared.name, _checked(declared, getattr(self, declared.name)))
        if self.drafts is not None and isinstance(self.drafts.draft_length, Tree):
            raise NotImplementedError(
                f"draft_length {self.drafts.draft_length}: an engine's pages take no token tree; give a number of "
                "tokens or auto, or use `pdx generate`"
            )
        if self.token_budget is not None and self.token_budget <= self.slots:
            raise RequestError(
                f"token_budget is {self.token_budget}: {self.slots} slots decode first, it must be above {self.slots}"
            )
        if self.deterministic and not self.chunked_prefill:
            raise RequestError("deterministic needs chunked_prefill: all its steps have one shape")
        if self.deterministic and None not in (self.token_budget, self.page_size):
            least = self.slots + self.page_size
            if self.token_budget < least:
                raise RequestError(
                    f"token_budget is {self.token_budget}: deterministic prompts come in whole pages beside the decode "
                    f"rows, so it must be at least {least}"
                )

    @cached_property
    def drafts(self) -> Speculation | None:
        """Who drafts tokens, and how many; None: nobody."""
        if self.speculate is None or self.draft_length is None:
            return self.speculate
        return dataclasses.replace(self.speculate, draft_length=self.draft_length)

    @classmethod
    def from_toml(cls, name: str | Path, **changes) -> EngineConfig:
        """Load a profile by name (`configs/engines/NAME.toml`) or path, with changes. Raises RequestError."""
        shipped = (folder / "engines" / f"{name}.toml" for folder in config_folders())
        file = next((f for f in shipped if f.is_file()), Path(name))
        try:
            fields = tomllib.loads(file.read_text(encoding="utf-8")) | changes
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            known = ", ".join(profiles())
            raise RequestError(f"{name} is no profile of an engine ({error}); there are {known}") from None
        if unknown := fields.keys() - {f.name for f in dataclasses.fields(cls)}:
            raise RequestError(f"{file} sets {', '.join(sorted(unknown))}, which an engine does not have")
        return cls(**fields)

    @property
    def budget(self) -> int:
        """The token budget. Raises ValueError while it is not chosen."""
        if self.token_budget is None:
            raise ValueError("token_budget is not chosen: give a number, or let pdx.Engine choose one")
        return self.token_budget

    @property
    def rows(self) -> int:
        """R, the rows of a mixed step: one per slot, then `prefill_rows` for chunks."""
        return self.slots + self.prefill_rows

    def whole(self, max_context: int) -> int:
        """Tokens of the largest step: the budget, or a prompt of any length beside all other slots."""
        return self.budget if self.chunked_prefill else max(self.budget, max_context + self.slots)

    def ladder(self, max_context: int) -> tuple[int, ...]:
        """The sizes T that steps are padded to, in tokens: `slots` for decode rows alone, then doubling."""
        top = self.whole(max_context)
        if self.deterministic:
            return (top,)
        rungs = [self.slots]
        rung = max(SMALLEST_MIXED, round_up(self.slots + 1, SMALLEST_MIXED))
        while rung < top:
            rungs.append(rung)
            rung *= 2
        return (*rungs, top)

    @property
    def most_drafts(self) -> int:
        """The most tokens that a request drafts in a step; 0 without speculation."""
        if self.drafts is None:
            return 0
        length = self.drafts.draft_length
        return length if isinstance(length, int) else LONGEST_CHOSEN

    def most_unread(self, max_context: int) -> int:
        """The most tokens of one request in a step, or in two with drafts: one is planned while the other runs."""
        return max(self.whole(max_context), 1 + 2 * self.most_drafts)

    @property
    def draft_ladder(self) -> tuple[int, ...]:
        """The sizes T that steps with drafts are padded to, in tokens."""
        top = min(self.slots * (1 + self.most_drafts), self.budget)
        if self.deterministic:
            return (self.budget,)
        powers = (2**n for n in range(SMALLEST_DRAFTED, top.bit_length()))
        return (*(n for n in powers if self.slots < n < top), top)

    @cached_property
    def fixed_chunk(self) -> int | None:
        """With `deterministic`: the chunk length at whose multiples every prompt is split; else None."""
        if not self.deterministic:
            return None
        page_size = cast(int, self.page_size)
        return (self.budget - self.slots) // page_size * page_size


@cache
def types_of(name: str) -> tuple[Any, ...]:
    """The types that a setting is annotated with: `(int, NoneType)` for `int | None`."""
    hint = get_type_hints(EngineConfig)[name]
    return get_args(hint) if isinstance(hint, UnionType) else (hint,)


def _checked(declared: dataclasses.Field, value: Any) -> Any:
    """A setting's value, made plain. Raises RequestError if its declaration does not allow it."""
    kind, *others = types_of(declared.name)
    if value is None and NoneType in others:
        return None
    is_row = isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 1
    if is_row and any(get_origin(other) is tuple for other in others):
        return tuple(_plain(declared, kind, x) for x in value)
    return _plain(declared, kind, value)


def _plain(declared: dataclasses.Field, kind: Any, value: Any) -> Any:
    name, limits = declared.name, declared.metadata
    if kind is bool:
        return boolean(name, value)
    if kind is int:
        return integer(name, value, limits.get("low", 1), limits.get("high"))
    if kind is float:
        return number(name, value, limits.get("low", 0), limits.get("high", math.inf), open_below=True)
    if (choices := declared.metadata.get("choices")) and value not in choices:
        raise RequestError(f"{name} {value!r} is not one of {', '.join(choices)}")
    return value


def profiles() -> list[str]:
    """Names of all engine profiles, sorted."""
    return sorted({file.stem for folder in config_folders() for file in (folder / "engines").glob("*.toml")})
