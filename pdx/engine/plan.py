"""The plan of one step, as arrays for the device. No jax."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

import numpy as np

from pdx.engine.config import EngineConfig
from pdx.engine.memory import Copy
from pdx.engine.request import Sequence
from pdx.shapes import bucket


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `start + count` - 1 of one request, in `row` of the step.

    Attributes:
      samples: sample after the last.
      drafts: the most tokens that are drafted and verified behind the last. Then, and while an earlier step of the
        request has drafts and is under way, `start` is the largest that it can be; the device knows the real one.
    """

    sequence: Sequence
    slot: int
    row: int
    start: int
    count: int
    samples: bool
    drafts: int = 0

    @property
    def is_decode(self) -> bool:
        """Whether its tokens are output tokens, not the prompt's."""
        return self.start >= self.sequence.prompt_length


@dataclass(frozen=True)
class StepPlan:
    """One step of static shape `tokens` [T] over R rows; see `pdx.steps.mixed_step` for its arguments.

    The first rows are the slots, with at most one token each, and what is drafted behind it; rows for chunks follow. A
    decode-only step without drafts has slots only.

    Attributes:
      tokens, lengths, query_starts: without the drafted tokens, but `tokens` has room for them.
      sources: [T] -1: the token is in `tokens`. Else: the slot whose newest token is used, which a step that may still
        be running samples.
      logit_rows: [slots] the row of each slot's logits.
      positions: [slots] the position of the token sampled from them.
      samples: [slots] whether a token is sampled.
      slot_of: [R] the slot whose request owns each row.
      drafts: [slots] the most tokens that each slot's row drafts.
      joins: slots with the requests that this step puts there. A request may lose its slot before that happens.
      copies: page copies to run before the step, in this order.
    """

    chunks: tuple[Chunk, ...]
    tokens: np.ndarray
    block_tables: np.ndarray
    lengths: np.ndarray
    query_starts: np.ndarray
    decode_rows: int
    sources: np.ndarray
    logit_rows: np.ndarray
    positions: np.ndarray
    samples: np.ndarray
    slot_of: np.ndarray
    drafts: np.ndarray
    joins: tuple[tuple[int, Sequence], ...] = ()
    copies: tuple[Copy, ...] = ()
    decode_tokens: int = 0
    prefill_tokens: int = 0

    @property
    def shape(self) -> int:
        """T, the padded number of tokens; with the number of rows it selects the compiled program."""
        return len(self.tokens)

    @property
    def max_queries(self) -> int:
        return 1 if self.decode_rows == len(self.lengths) else self.shape

    @property
    def has_drafts(self) -> bool:
        return bool(self.drafts.any())


@dataclass
class StepBuilder:
    """A plan under construction: `left` tokens of the budget and `rows_left` chunk rows are still free."""

    config: EngineConfig
    left: int
    rows_left: int
    chunks: list[Chunk] = field(default_factory=list)
    joins: list[tuple[int, Sequence]] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    planned: set[int] = field(default_factory=set)

    @classmethod
    def empty(cls, config: EngineConfig) -> StepBuilder:
        return cls(config, config.budget, config.prefill_rows)

    @property
    def has_prefill(self) -> bool:
        return self.rows_left < self.config.prefill_rows

    def add(self, seq: Sequence, count: int) -> Chunk:
        """Add the next `count` tokens of a request to the step."""
        row = seq.slot
        if count > 1:
            row = self.config.rows - self.rows_left
            self.rows_left -= 1
        chunk = Chunk(seq, seq.slot, row, seq.computed, count, count == seq.remaining)
        self.chunks.append(chunk)
        self.planned.add(seq.id)
        self.left -= count
        return chunk

    @property
    def is_mixed(self) -> bool:
        """Whether the step has rows for chunks."""
        return self.has_prefill or self.config.deterministic

    def plain_size(self, ladder: Seq[int]) -> int:
        """The number of tokens that the step is padded to if nothing is drafted."""
        slots = self.config.slots
        return bucket(self.tokens, tuple(r for r in ladder if r > slots)) if self.is_mixed else slots

    @property
    def tokens(self) -> int:
        """Tokens of the step so far, with those that are drafted."""
        return sum(c.count + c.drafts for c in self.chunks)

    def draft(self, chunk: Chunk, drafts: int) -> None:
        """Draft tokens behind a chunk of the step."""
        self.chunks[self.chunks.index(chunk)] = replace(chunk, drafts=drafts)

    def finish(self, tables: np.ndarray, ladder: Seq[int], draft_ladder: Seq[int] = ()) -> StepPlan:
        """Build the arrays. Requests are not changed. `draft_ladder`: the sizes of steps with drafts."""
        slots, chunks = self.config.slots, sorted(self.chunks, key=lambda c: c.row)
        has_drafts = any(c.drafts for c in chunks)
        shape = bucket(self.tokens, tuple(draft_ladder)) if has_drafts else self.plain_size(ladder)
        rows = self.config.rows if has_drafts or self.is_mixed else slots
        tokens, sources = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        lengths, counts, slot_of = (np.zeros(rows, np.int32) for _ in range(3))
        slot_of[:slots] = np.arange(slots)
        drafts = np.zeros(slots, np.int32)
        logit_rows, positions, samples = np.arange(slots), np.zeros(slots, np.int32), np.zeros(slots, bool)
        at = 0
        for c in chunks:
            known = c.sequence.tokens[c.start : c.start + c.count]
            tokens[at : at + len(known)] = known
            if len(known) < c.count:
                sources[at] = c.slot
            at += c.count
            lengths[c.row], counts[c.row], slot_of[c.row] = c.start + c.count, c.count, c.slot
            logit_rows[c.slot], positions[c.slot], samples[c.slot] = c.row, c.start + c.count, c.samples
            drafts[c.slot] = c.drafts
        starts = np.zeros(rows + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        decoded = sum(c.count for c in chunks if c.is_decode)
        return StepPlan(
            tuple(chunks),
            tokens,
            tables[:, slot_of],
            lengths,
            starts,
            slots,
            sources,
            logit_rows.astype(np.int32),
            positions,
            samples,
            slot_of,
            drafts,
            tuple(self.joins),
            tuple(self.copies),
            decoded,
            sum(c.count for c in chunks) - decoded,
        )
