"""The plan of one step, as arrays for the device. No jax."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from pdx.engine.config import EngineConfig
from pdx.engine.memory import Copy
from pdx.engine.request import Sequence
from pdx.shapes import bucket


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `start + count` - 1 of one request, in `row` of the step. `samples`: sample after the last."""

    sequence: Sequence
    slot: int
    row: int
    start: int
    count: int
    samples: bool

    @property
    def is_decode(self) -> bool:
        """Whether its tokens are output tokens, not the prompt's."""
        return self.start >= self.sequence.prompt_length


@dataclass(frozen=True)
class StepPlan:
    """One step of static shape `tokens` [T] over R rows; see `pdx.steps.mixed_step` for its arguments.

    The first rows are the slots, with at most one token each; rows for chunks follow. A decode-only step has slots
    only.

    Attributes:
      sources: [T] -1: the token is in `tokens`. Else: the slot whose newest token is used, which a step that may still
        be running samples.
      logit_rows: [slots] the row of each slot's logits.
      positions: [slots] the position of the token sampled from them.
      samples: [slots] whether a token is sampled.
      joins: requests that this step puts into their slots.
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
    joins: tuple[Sequence, ...] = ()
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


@dataclass
class Draft:
    """A plan under construction: `left` tokens of the budget and `rows_left` chunk rows are still free."""

    config: EngineConfig
    left: int
    rows_left: int
    chunks: list[Chunk] = field(default_factory=list)
    joins: list[Sequence] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    drafted: set[int] = field(default_factory=set)

    @classmethod
    def empty(cls, config: EngineConfig) -> Draft:
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
        self.drafted.add(seq.id)
        self.left -= count
        return chunk

    def finish(self, tables: np.ndarray, ladder: Seq[int]) -> StepPlan:
        """Build the arrays. Requests are not changed."""
        slots, chunks = self.config.slots, sorted(self.chunks, key=lambda c: c.row)
        total = sum(c.count for c in chunks)
        if self.has_prefill or self.config.deterministic:
            rows, shape = self.config.rows, bucket(total, tuple(r for r in ladder if r > slots))
        else:
            rows, shape = slots, slots
        tokens, sources = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        lengths, counts, slot_of = np.zeros(rows, np.int32), np.zeros(rows, np.int32), np.zeros(rows, np.intp)
        slot_of[:slots] = np.arange(slots)
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
            tuple(self.joins),
            tuple(self.copies),
            decoded,
            total - decoded,
        )
