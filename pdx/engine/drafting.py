"""How many tokens each row of an engine's step drafts. No jax."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import cast

from pdx.engine.config import EngineConfig
from pdx.engine.memory import PagedMemory
from pdx.engine.plan import StepBuilder, StepPlan
from pdx.engine.request import EngineRequest
from pdx.speculative.shares import ALLOWED, GAIN, Record, StepCosts, fixed, gained, shares


@dataclass
class Drafting:
    """The draft lengths of an engine.

    Attributes:
      prior: the proposer's acceptance by confidence class, before anything was seen. A new request begins with what all
        requests before it saw, so drafts that do not pay cost the first ones only.
      always: whether the proposer can draft behind any token.
      costs: of a step, as measured; None: each row drafts what it can.
      allowance: what drafts may lose, in plain steps (`pdx.speculative.shares.gained`).
    """

    config: EngineConfig
    prior: tuple[float, ...]
    always: bool
    costs: StepCosts | None = None
    allowance: float = ALLOWED

    def __post_init__(self):
        self.ladder = self.config.draft_ladder
        self._every = Record(self.prior)

    def record(self, request: EngineRequest) -> Record | None:
        """A new request's record; None: nothing is drafted for it."""
        if not request.speculate:
            return None
        self._every.fade()
        return Record(self._every.by_class, self.config.most_drafts if self.always else 0, every=self._every)

    def extend(self, step: StepBuilder, memory: PagedMemory, plain_size: int) -> None:
        """Draft tokens behind the step's decode rows, as many as pay. Drafts leave a free page for each row.

        Changes the rows' requests as if all drafts were kept. `plain_size`: what the step's tokens are padded to if
        nothing is drafted.
        """
        rows = [c for c in step.chunks if c.samples and c.count == 1 and c.sequence.record is not None]
        limits = [c.sequence.request.options.max_tokens - c.sequence.generated for c in rows]
        found = self.shares([cast(Record, c.sequence.record) for c in rows], limits, step.tokens, plain_size)
        for chunk, wanted in zip(rows, found, strict=True):
            seq = chunk.sequence
            count = min(wanted, memory.longest(seq, spare=len(rows)) - seq.computed)
            # Pages that fall out of a window with the row's newest token are still read by it.
            if count > 0 and memory.grow(seq, seq.computed + count, slide=False):
                step.draft(chunk, count)
                seq.computed, seq.pending, seq.unsure = seq.computed + count, seq.pending + count, seq.unsure + count
        self.spend(step, plain_size)

    def spend(self, step: StepBuilder, plain_size: int) -> None:
        """Take what the step costs from the allowance, as if nothing were kept."""
        plain_s = self.costs.plain.get(plain_size) if self.costs is not None else None
        if self.costs is not None and plain_s is not None:
            longest = max((c.drafts for c in step.chunks), default=0)
            ratio = self.costs.of(step.tokens, longest) / plain_s if longest else 1.0
            self._add(1.0, ratio)

    def settle(self, plan: StepPlan, kept: int) -> None:
        """`kept` drafted tokens of a step were kept."""
        self._add(kept / sum(c.count for c in plan.chunks), 0.0)

    def _add(self, progress: float, ratio: float) -> None:
        self.allowance = min(self.allowance + gained(progress, ratio), GAIN)

    def shares(self, records: Seq[Record], limits: Seq[int], taken: int, plain_size: int) -> list[int]:
        """Tokens to draft in each row.

        Args:
          limits: the most tokens that each request may draft.
          taken, plain_size: tokens that the step has without drafts, and what they are padded to.
        """
        limits = [min(limit, r.available, self.config.most_drafts) for limit, r in zip(limits, records, strict=True)]
        room = self.ladder[-1] - taken
        if room < 1 or not any(limit > 0 for limit in limits):
            return [0] * len(limits)
        if self.costs is None:
            return fixed(self.config.most_drafts, limits, room)
        plain_s = self.costs.plain.get(plain_size)
        if plain_s is None:  # larger than any step with drafts
            return [0] * len(limits)
        return shares(
            [r.acceptance for r in records],
            limits,
            taken,
            plain_s,
            self.costs,
            at_worst=[r.at_worst for r in records],
            allowance=self.allowance,
        )
