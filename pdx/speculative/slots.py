"""A round of speculation over an engine's pages, in two programs: draft and score, then emit.

The tokens of every slot's request are on the device, so a step can be dispatched before the host knows how many tokens
the step before it kept. The host says which rows take part, how many tokens each may draft, and in which pages; the
device knows where each row stands.

1. `score`: each round's row drafts tokens. They are packed behind its newest one with the other rows' tokens and
   scored in one `forward`.
2. `emit`: `accept` keeps what plain decoding would have emitted. The pages keep the rejected tokens' keys and values,
   which no query sees: the row's next tokens overwrite them.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from pdx.cache.paged import PagedCache
from pdx.cache.rows import PackedRows
from pdx.config import ModelConfig
from pdx.model import Params
from pdx.sampling.sampler import SampleOutput, SamplingState
from pdx.speculative.acceptance import Drafted, accept
from pdx.speculative.drawing import Prepared, Rows
from pdx.speculative.proposers import Proposer
from pdx.speculative.reading import Reader, ReadTokens
from pdx.speculative.rounds import put
from pdx.steps.packed import mixed, mixed_output


@struct.dataclass
class SlotState:
    """The tokens of each of S slots' requests, up to C each, and what the proposer knows.

    Attributes:
      history: tokens, prompt and answer; the first `held` count. The last of them is not in the pages yet.
      prepared: what the proposer could draft behind them.
      proposer: its state; None where it has none.
    """

    history: Int[Array, "S C"]
    held: Int[Array, " S"]
    prepared: Prepared
    proposer: Any = None

    @classmethod
    def empty(cls, slots: int, capacity: int, proposer: Proposer, most: int) -> SlotState:
        """Without requests, and without a state of the proposer."""
        history, held = jnp.zeros((slots, capacity), jnp.int32), jnp.zeros(slots, jnp.int32)
        shapes = jax.eval_shape(lambda: _prepare(proposer, history, held, None, most))
        return cls(history, held, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))

    def join(self, slot: Int[Array, ""], tokens: Int[Array, " C"], held: Int[Array, ""]) -> SlotState:
        """With a new request in `slot`, which has `held` tokens."""
        mine = jnp.arange(self.held.shape[0]) == slot
        own = None if self.proposer is None else self.proposer.emptied(mine)
        prepared = self.prepared.replace(available=jnp.where(mine, 0, self.prepared.available))
        return SlotState(self.history.at[slot].set(tokens), jnp.where(mine, held, self.held), prepared, own)


@struct.dataclass
class StepRows:
    """What the host says of a step: R rows, of which the first S are the slots', with M pages each in Gr page groups.

    Attributes:
      counts: tokens of each row without drafts; a round's row has its newest one.
      starts: the position of each row's first token; of a round's row the device knows it.
      slot_of: the slot whose request owns each row.
      logit_rows: the row whose last token each slot's next token is sampled behind.
      drafts: the most tokens that each slot's row drafts.
      rounds: slots whose row decodes.
    """

    block_tables: Int[Array, "Gr R M"]
    counts: Int[Array, " R"]
    starts: Int[Array, " R"]
    slot_of: Int[Array, " R"]
    logit_rows: Int[Array, " S"]
    drafts: Int[Array, " S"]
    rounds: Bool[Array, " S"]


@struct.dataclass
class Scored:
    """What `score` returns; g1 is the longest draft and one.

    Attributes:
      logits: packed; those of each slot lie `at`.
      hidden: the target's hidden states behind which each slot's tokens are sampled, for a `Reader`.
    """

    logits: Float[Array, "W V"]
    at: Int[Array, "S g1"]
    drafted: Drafted
    rounds: Bool[Array, " S"]
    hidden: Float[Array, "S g1 D"] | None = None


@struct.dataclass
class Emission:
    """What `emit` tells the host.

    Attributes:
      emitted: tokens [S, g + 1]; the first `counts` of each slot are new.
      counts: 0 for a slot that samples nothing.
      drafted, kept: tokens of each slot that were verified and kept.
      confidence: the class of the draft.
      tried, accepted: tokens of the draft; in a plain step its first one, which was not verified but could be compared.
      available, next_confidence: what it could draft next.
    """

    emitted: SampleOutput
    counts: Int[Array, " S"]
    drafted: Int[Array, " S"]
    kept: Int[Array, " S"]
    confidence: Int[Array, " S"]
    tried: Int[Array, " S"]
    accepted: Int[Array, " S"]
    available: Int[Array, " S"]
    next_confidence: Int[Array, " S"]


@struct.dataclass
class SlotPages:
    """The pages of an engine's slots, as a proposer that decodes with the target's layers sees them.

    Attributes:
      lengths: tokens of each slot that the pages hold.
    """

    cache: PagedCache
    block_tables: Int[Array, "Gr S M"]
    lengths: Int[Array, " S"]

    def first_layers(self, count: int) -> SlotPages:
        return self.replace(cache=self.cache.first_layers(count))

    def with_first(self, first: SlotPages) -> SlotPages:
        return self.replace(cache=self.cache.with_first(first.cache))

    def append(self, params: Params, cfg: ModelConfig, tokens: Int[Array, "S 1"], lengths: Int[Array, " S"], kernels):
        """Append one token to the slots of length 1; returns the logits behind it and the pages."""
        logits, cache = mixed(params, cfg, tokens[:, 0], self.one_each(lengths), self.cache, kernels)
        return logits, self.advanced(cache, lengths)

    def one_each(self, lengths: Int[Array, " S"]) -> PackedRows:
        """The rows of one new token in each slot of length 1."""
        slots = lengths.shape[0]
        held = jnp.where(lengths > 0, self.lengths + lengths, 0)
        return PackedRows.packed(slots, self.block_tables, held, jnp.arange(slots + 1, dtype=jnp.int32), slots, 1)

    def advanced(self, cache: PagedCache, lengths: Int[Array, " S"]) -> SlotPages:
        """With `cache`, to which `lengths` tokens were appended."""
        return self.replace(cache=cache, lengths=self.lengths + lengths)


def score(
    params: Params,
    cfg: ModelConfig,
    cache: PagedCache,
    slots: SlotState,
    sampling: SamplingState,
    step: StepRows,
    *,
    tokens: int,
    most: int,
    proposer: Proposer,
    draft_params: Params | None = None,
    as_plain: bool = False,
    kernels: Any = "auto",
) -> tuple[Scored, PagedCache, SlotState]:
    """Draft, and run the step's tokens. The cache and the slots are donated.

    Args:
      tokens: static; T, what the step's tokens are padded to, drafts included.
      most: static; the most tokens that a row drafts; 0: a step without drafts.
      as_plain: keep a draft only if it is the token that plain decoding draws, however it was drafted. Then a request's
        tokens do not depend on where its rounds begin.
    """
    count, held, history = slots.held.shape[0], slots.held, slots.history
    drafted = Drafted(jnp.zeros((count, most), jnp.int32), jnp.zeros(count, jnp.int32))
    if most:
        available = jnp.where(step.rounds, jnp.minimum(step.drafts, slots.prepared.available), 0)
        pages = SlotPages(cache, step.block_tables[:, :count], jnp.maximum(held - 1, 0))
        rows = Rows(history, held, step.rounds, pages, sampling, params, draft_params, steps=step.drafts.max())
        prepared = slots.prepared.replace(available=available)
        drafted, pages, own = proposer.draft(rows, slots.proposer, prepared, most, cfg, kernels)
        drafted = drafted.replace(lengths=jnp.minimum(drafted.lengths, available))
        if as_plain:
            drafted = drafted.replace(probabilities=None)
        cache, slots = pages.cache, slots.replace(proposer=own)
        history = put(history, drafted.tokens, held, drafted.lengths)
    rows = _packed(slots, step, drafted, tokens, most)
    at = places = _places(step, rows, most)
    if most and tokens > at.size:  # not all tokens' logits are wanted
        rows = rows.replace(wanted_tokens=at.reshape(-1))
        at = jnp.arange(at.size, dtype=jnp.int32).reshape(at.shape)
    elif most:
        rows = rows.replace(wanted_tokens=jnp.arange(tokens, dtype=jnp.int32))
    else:
        rows = rows.replace(wanted_tokens=at[:, 0])
        at = jnp.arange(count, dtype=jnp.int32)[:, None]
    positions = jnp.clip(rows.positions[0], 0, history.shape[1] - 1)
    packed = history[step.slot_of[rows.owner[0]], positions]
    out = mixed_output(params, cfg, packed, rows, cache.first_layers(cfg.num_layers), kernels)
    cache, logits, hidden = cache.with_first(cast(PagedCache, out.cache)), cast(Array, out.logits), None
    if isinstance(proposer, Reader):
        read = ReadTokens(packed, out.final_hidden[0], rows, step.slot_of)
        cache = proposer.read(read, slots.proposer, cache, params, draft_params, cfg, kernels)
        hidden = proposer.hidden_at(read, slots.proposer, places, step.counts[step.logit_rows] > 0)
    if most:  # of one shape for all sizes, so that `emit` is compiled once for them
        logits = jnp.pad(logits, ((0, at.size - logits.shape[0]), (0, 0)))
    return Scored(logits, at, drafted, step.rounds, hidden), cache, slots


def emit(
    scored: Scored,
    slots: SlotState,
    sampling: SamplingState,
    samples: Bool[Array, " S"],
    *,
    proposer: Proposer,
    most: int,
    num_logprobs: int = 0,
    allowed: Bool[Array, "S g1 V"] | None = None,
) -> tuple[Emission, SlotState, SamplingState]:
    """Emit tokens in the slots that sample, and look what could be drafted behind them.

    Args:
      most: static; of the engine's steps with drafts, whatever this step's is.
      allowed: tokens that may be chosen at each place of a slot; None: all.
    """
    drafted, before, held = scored.drafted, slots.prepared, slots.held
    done = accept(
        scored.logits, drafted, sampling, held, samples, at=scored.at, allowed=allowed, num_logprobs=num_logprobs
    )
    counts = jnp.where(samples, done.counts, 0)
    kept = jnp.maximum(counts - 1, 0)
    tried, accepted = jnp.minimum(kept + 1, drafted.lengths), kept
    if before.tokens is not None:  # a plain step shows what the draft would have been worth
        plain = (drafted.lengths == 0) & (before.available > 0)
        tried = jnp.where(plain, 1, tried)
        accepted = jnp.where(plain, done.emitted.tokens[:, 0] == before.tokens[:, 0], accepted)
    learns = samples & scored.rounds
    history, held = put(slots.history, done.emitted.tokens, held, counts), held + counts
    own = slots.proposer
    if isinstance(proposer, Reader):
        own = proposer.keep(own, cast(Array, scored.hidden), counts)
    prepared = _prepare(proposer, history, held, own, most)
    after = slots.replace(history=history, held=held, prepared=prepared, proposer=own)
    told = Emission(
        emitted=done.emitted,
        counts=counts,
        drafted=jnp.where(samples, drafted.lengths, 0),
        kept=kept,
        confidence=before.confidence,
        tried=jnp.where(learns, tried, 0),
        accepted=jnp.where(learns, accepted, 0).astype(jnp.int32),
        available=prepared.available,
        next_confidence=prepared.confidence,
    )
    return told, after, done.sampling


def _packed(slots: SlotState, step: StepRows, drafted: Drafted, tokens: int, most: int) -> PackedRows:
    """The rows of the step's tokens, drafts included."""
    count, rows = slots.held.shape[0], step.counts.shape[0]
    counts = step.counts.at[:count].add(drafted.lengths)
    starts = step.starts.at[:count].set(jnp.where(step.rounds, slots.held - 1, step.starts[:count]))
    held = jnp.where(counts > 0, starts + counts, 0)
    query_starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
    return PackedRows.packed(
        tokens,
        step.block_tables,
        held,
        query_starts,
        decode_rows=count,
        decode_queries=most + 1,
        max_queries=1 if rows == count and not most else tokens,
    )


def _places(step: StepRows, rows: PackedRows, most: int) -> Int[Array, "S g1"]:
    """The packed tokens behind which each slot's tokens are sampled: of a round all of the row's, else the last."""
    first, last = rows.query_starts[step.logit_rows], rows.query_starts[step.logit_rows + 1] - 1
    first = jnp.where(step.rounds, first, last)
    places = jnp.minimum(first[:, None] + jnp.arange(most + 1, dtype=jnp.int32), last[:, None])
    return jnp.maximum(places, 0)


def _prepare(proposer: Proposer, history, held, state: Any, most: int) -> Prepared:
    """What could be drafted; a proposer looks at the tokens alone for that."""
    return proposer.prepare(Rows(history, held, held > 0, None, None, None), state, most)  # type: ignore[arg-type]
