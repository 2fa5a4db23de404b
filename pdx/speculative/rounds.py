"""Rounds of speculation over a dense cache, in one program: tokens stay on the device between rounds.

1. The proposer says what it could draft; `choose` takes the round's level g, its draft length; 0 is a plain step.
2. The proposer drafts; one `forward` scores the newest token and the draft (T = g + 1).
3. `accept` keeps what plain decoding would have emitted; `truncate` drops the rest from the cache.

A level may also be a token tree: `accept_tree` goes down it, and `keep_path` closes up the nodes that stay before
`truncate` drops the others.

Each level has a loop of its own, which runs as long as its level is chosen: the cache is updated in place, as in
`decode_many`, where branches of a condition would copy it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pdx.cache.dense import DenseCache
from pdx.config import ModelConfig
from pdx.layers.kernels import Kernels
from pdx.model import Params, forward
from pdx.sampling.sampler import SampleOutput, SamplingState
from pdx.sharding import constrain_rows
from pdx.speculative.acceptance import Accepted, Drafted, accept, accept_tree
from pdx.speculative.drawing import Prepared, Rows
from pdx.speculative.lengths import Acceptance, choose, ratios
from pdx.speculative.proposers import Proposer
from pdx.speculative.shares import ALLOWED, GAIN, gained
from pdx.speculative.trees import Tree, depth_of
from pdx.steps.dense import finish


@struct.dataclass
class SpeculationState:
    """What lives from one call to the next.

    Attributes:
      history: the tokens of each row, prompt and answer, the newest included; the cache holds all but the newest.
      acceptance: of each row, so far.
      proposer: the state of the proposer; None where it has none.
    """

    history: Int[Array, "B S"]
    acceptance: Acceptance
    proposer: Any = None

    @classmethod
    def create(
        cls, texts: Sequence[Sequence[int]], rows: int, capacity: int, proposer: Proposer, state: Any = None
    ) -> SpeculationState:
        """The state of `rows` rows with room for `capacity` tokens each; the first rows have the tokens `texts`.

        Its arrays are on the host; `state` is the proposer's.
        """
        history = np.zeros((rows, capacity), np.int32)
        for row, ids in enumerate(texts):
            history[row, : len(ids)] = ids
        return cls(history, Acceptance.none(rows, proposer.prior), state)


@struct.dataclass
class Drafter:
    """Who drafts, how many tokens, with which parameters.

    Attributes:
      proposer: static.
      levels: static; draft lengths, ascending, the first 0; or a token tree in place of a length.
      params: of the draft model or the head; None where there is none.
    """

    proposer: Proposer = struct.field(pytree_node=False)
    levels: tuple[int | Tree, ...] = struct.field(pytree_node=False)
    params: Params | None = None


@struct.dataclass
class Speculated:
    """What `speculate_many` returns.

    Attributes:
      emitted: tokens [B, W] and their log-probabilities; the first `counts` of a row are new.
      rounds: that each row took part in, by level.
      drafted, kept: tokens of each row that were verified, and those of them that were kept.
      allowance: what drafts may lose from now on.
    """

    emitted: SampleOutput
    counts: Int[Array, " B"]
    rounds: Int[Array, "B levels"]
    drafted: Int[Array, " B"]
    kept: Int[Array, " B"]
    allowance: Float[Array, ""]
    cache: DenseCache
    sampling: SamplingState
    state: SpeculationState


@struct.dataclass
class _Carry:
    out: Speculated
    prepared: Prepared
    level: Int[Array, ""]


@partial(
    jax.jit, static_argnames=("cfg", "n", "num_logprobs", "kernels"), donate_argnames=("cache", "sampling", "state")
)
def speculate_many(
    params: Params,
    cfg: ModelConfig,
    cache: DenseCache,
    sampling: SamplingState,
    state: SpeculationState,
    n: int,
    *,
    limits: Int[Array, " B"],
    drafter: Drafter,
    costs: Float[Array, " levels"],
    allowance: Float[Array, ""] | float = ALLOWED,
    num_logprobs: int = 0,
    kernels: Kernels = "auto",
) -> Speculated:
    """Rounds until a row has n new tokens, or every row has as many as it may.

    Args:
      n: static; a row gets at most n + g tokens, where g is the largest level (of a tree, its depth).
      limits: the most new tokens of each row; the cache has room for them. 0: the row takes no part.
      costs: seconds of a round at each level; see `pdx.speculative.lengths.choose`.
      allowance: what drafts may lose, in plain steps (`pdx.speculative.shares.gained`); of a later call, what the call
        before left.
    """
    levels, rows = drafter.levels, cache.batch
    depths = tuple(map(depth_of, levels))
    most = depths[-1]
    logprobs = jnp.zeros((rows, n + most, num_logprobs))
    tokens = jnp.zeros((rows, n + most), jnp.int32)
    none = jnp.zeros(rows, jnp.int32)
    emitted = SampleOutput(tokens, tokens.astype(jnp.float32), logprobs.astype(jnp.int32), logprobs)
    rounds, allowance = jnp.zeros((rows, len(levels)), jnp.int32), jnp.asarray(allowance, jnp.float32)
    out = Speculated(emitted, none, rounds, none, none, allowance, cache, sampling, state)
    model = _Model(params, drafter, cfg, num_logprobs, kernels)

    def takes_part(out: Speculated) -> Bool[Array, " B"]:
        return out.counts < limits

    def left(out: Speculated) -> Int[Array, " B"]:
        return jnp.where(takes_part(out), limits - out.counts, 0)

    def prepared(out: Speculated) -> _Carry:
        rows = model.rows(out, takes_part(out))
        found = drafter.proposer.prepare(rows, out.state.proposer, most)
        # A round emits one token more than it keeps.
        found = found.replace(available=jnp.clip(limits - out.counts - 1, 0, found.available))
        acceptance = out.state.acceptance.of(found.confidence)
        return _Carry(out, found, choose(depths, costs, acceptance, found.available, left(out), out.allowance))

    def round(index: int, carry: _Carry) -> _Carry:
        before = carry.out
        out = model.round(index, carry, takes_part(before))
        progress = left(before).max() - left(out).max()  # all rows wait for the last one
        allowance = jnp.minimum(before.allowance + gained(progress, ratios(costs)[index]), GAIN)
        return prepared(out.replace(allowance=allowance))

    def goes_on(carry: _Carry):
        return jnp.any(takes_part(carry.out)) & (carry.out.counts.max() < n)

    def every_level(carry: _Carry) -> _Carry:
        for index in range(len(levels)):
            carry = lax.while_loop(lambda c, index=index: goes_on(c) & (c.level == index), partial(round, index), carry)
        return carry

    out = lax.while_loop(goes_on, every_level, prepared(out)).out
    sampling, emitted, history, counted = constrain_rows(
        (out.sampling, out.emitted, out.state.history, (out.counts, out.rounds, out.drafted, out.kept)), cache.mesh
    )
    own = out.state.proposer
    state = out.state.replace(history=history, proposer=None if own is None else own.placed())
    return Speculated(emitted, *counted, out.allowance, out.cache.placed(), sampling, state)


class _Model:
    """What does not change from round to round."""

    def __init__(self, params, drafter: Drafter, cfg: ModelConfig, num_logprobs: int, kernels: Kernels):
        self.params, self.drafter, self.cfg = params, drafter, cfg
        self.num_logprobs, self.kernels = num_logprobs, kernels

    def rows(self, out: Speculated, active: Bool[Array, " B"]) -> Rows:
        held = out.cache.lengths + 1
        return Rows(out.state.history, held, active, out.cache, out.sampling, self.params, self.drafter.params)

    def round(self, index: int, carry: _Carry, active: Bool[Array, " B"]) -> Speculated:
        """A round of the level at `index`: each row verifies up to so many tokens, or a tree."""
        out, prepared, level = carry.out, carry.prepared, self.drafter.levels[index]
        rows, state = self.rows(out, active), out.state
        held = rows.held
        if level:
            drafted, cache, own = self.drafter.proposer.draft(
                rows, state.proposer, prepared, level, self.cfg, self.kernels
            )
            drafted = drafted.replace(lengths=jnp.minimum(drafted.lengths, drafted.tokens.shape[1]))
        else:
            drafted = Drafted(jnp.zeros((held.shape[0], 0), jnp.int32), jnp.zeros_like(held))
            cache, own = out.cache, state.proposer
        done, hidden, cache = self.verify(rows, drafted, level, cache)
        own = self.drafter.proposer.observe(rows, own, hidden, done.counts, self.cfg, self.kernels)
        kept = jnp.where(active, done.counts - 1, 0)
        reached = drafted.lengths
        if isinstance(level, Tree):
            reached = jnp.array(level.depths)[drafted.lengths]
        tried = jnp.minimum(kept + 1, reached)
        accepted = kept
        if not level and prepared.tokens is not None:  # a plain step shows what the draft would have been worth
            tried = prepared.available > 0
            accepted = tried & (done.emitted.tokens[:, 0] == prepared.tokens[:, 0])
        acceptance = state.acceptance.observe(
            prepared.confidence, jnp.where(active, tried, 0), jnp.where(active, accepted, 0)
        )
        return out.replace(
            emitted=jax.tree.map(partial(put, at=out.counts, counts=done.counts), out.emitted, done.emitted),
            counts=out.counts + done.counts,
            rounds=out.rounds.at[:, index].add(active),
            drafted=out.drafted + jnp.where(active, drafted.lengths, 0),
            kept=out.kept + kept,
            cache=cache,
            sampling=done.sampling,
            state=state.replace(
                history=put(state.history, done.emitted.tokens, held, done.counts), acceptance=acceptance, proposer=own
            ),
        )

    def verify(
        self, rows: Rows, drafted: Drafted, level: int | Tree, cache: DenseCache
    ) -> tuple[Accepted, Float[Array, "B T D"], DenseCache]:
        """Score a draft and accept. Returns what stays: the tokens, the hidden states from the newest token on, and the
        cache."""
        held, active = rows.held, rows.active
        tokens = jnp.concatenate([rows.newest[:, None], drafted.tokens], axis=1)
        where = cache.rows(jnp.where(active, drafted.lengths + 1, 0), *tokens.shape)
        if isinstance(level, Tree):
            where = where.as_tree(np.array(level.mask))
        scored = forward(self.params, self.cfg, tokens, cache, rows=where, logits="all", kernels=self.kernels)
        logits, cache = finish(scored.logits, scored.cache)
        settings, hidden = {"num_logprobs": self.num_logprobs}, scored.final_hidden
        if isinstance(level, Tree):
            done, path = accept_tree(logits, drafted, level, rows.sampling, held, active, **settings)
            cache = cache.keep_path(held - 1, path, done.counts, self.cfg.head_dim)
            hidden = jnp.take_along_axis(hidden, path[..., None], axis=1)
        else:
            done = accept(logits, drafted, rows.sampling, held, active, **settings)
        # The newest token and the kept ones stay.
        return done, hidden, cache.truncate(jnp.where(active, held - 1 + done.counts, cache.lengths))


def put(into: Array, new: Array, at: Int[Array, " B"], counts: Int[Array, " B"]) -> Array:
    """The first `counts` columns of `new` [B, T, ...], written from column `at` of each row on."""
    b, t = new.shape[:2]
    columns = at[:, None] + jnp.arange(t)
    columns = jnp.where(jnp.arange(t) < counts[:, None], columns, into.shape[1])
    return into.at[jnp.arange(b)[:, None], columns].set(new, mode="drop")
