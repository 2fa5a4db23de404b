"""The programs of a `SpeculativeRunner`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pdx.config import ModelConfig
from pdx.layers.kernels import Kernels
from pdx.sharding import ArraySpec, constrain, constrain_rows
from pdx.speculative.drawing import Rows
from pdx.speculative.proposers import DraftModel, Proposer
from pdx.speculative.slots import Scored, SlotState, StepRows, emit, score

# The numbers that `Emission` has for each slot, in the order in which they are fetched.
NUMBERS = ("counts", "drafted", "kept", "confidence", "tried", "accepted", "available", "next_confidence")


@dataclass(frozen=True)
class StepForm:
    """What is static in a step.

    Attributes:
      shape: rows, slots and page groups of the host's inputs.
      tokens, most, as_plain: as in `pdx.speculative.slots.score`.
    """

    cfg: ModelConfig
    shape: tuple[int, int, int]
    tokens: int
    most: int
    proposer: Proposer
    as_plain: bool
    mesh: Mesh | None
    kernels: Kernels


@partial(jax.jit, static_argnames="form", donate_argnames=("cache", "slots"))
def score_step(params, cache, slots, sampling, host, draft_params, form: StepForm):
    """The forward pass. The host's inputs come packed in one array, since each array costs a transfer."""
    r, s, groups = form.shape
    counts, starts, slot_of, logit_rows, drafts, rounds, tables = jnp.split(host, np.cumsum([r, r, r, s, s, s]))
    step = StepRows(tables.reshape(groups, r, -1), counts, starts, slot_of, logit_rows, drafts, rounds > 0)
    scored, cache, slots = score(
        params,
        form.cfg,
        cache,
        slots,
        sampling,
        step,
        tokens=form.tokens,
        most=form.most,
        proposer=form.proposer,
        draft_params=draft_params,
        as_plain=form.as_plain,
        kernels=form.kernels,
    )
    logits = constrain(scored.logits, ArraySpec(scored.logits.shape, (None, "vocab"), scored.logits.dtype), form.mesh)
    others = constrain_rows((scored.at, scored.drafted, scored.rounds, scored.hidden), form.mesh)
    return Scored(logits, *others), cache, _placed(slots, form.mesh)


@partial(jax.jit, static_argnames=("proposer", "mesh", "kernels"), donate_argnames="slots")
def read_prompts(slots, whose, draft_params, proposer: DraftModel, mesh, kernels):
    """Let a draft model read all that the slots of `whose` hold but their last tokens."""
    rows = Rows(slots.history, slots.held, whose, None, None, None, draft_params)  # type: ignore[arg-type]
    return _placed(slots.replace(proposer=proposer.caught_up(rows, slots.proposer, kernels)), mesh)


@partial(jax.jit, static_argnames=("proposer", "most", "num_logprobs", "mesh"), donate_argnames=("slots", "sampling"))
def emit_step(scored, slots, sampling, samples, proposer: Proposer, most, num_logprobs, mesh, allowed=None):
    told, slots, sampling = emit(
        scored, slots, sampling, samples, proposer=proposer, most=most, num_logprobs=num_logprobs, allowed=allowed
    )
    numbers = jnp.stack([getattr(told, name) for name in NUMBERS], axis=1)
    packed = jnp.concatenate([numbers, told.emitted.tokens], axis=1).astype(jnp.int32)
    return told, packed, _placed(slots, mesh), constrain_rows(sampling, mesh)


def _placed(slots: SlotState, mesh) -> SlotState:
    """The slots constrained to their placement; a program must return them so, or the next one is not for them."""
    own, slots = slots.proposer, constrain_rows(slots.replace(proposer=None), mesh)
    return slots.replace(proposer=None if own is None else own.placed())


@partial(jax.jit, static_argnames="mesh", donate_argnames=("sampling", "slots"))
def join_slot(sampling, slots, slot, one, tokens, held, mesh):
    return constrain_rows(sampling.put(slot, one), mesh), _placed(slots.join(slot, tokens, held), mesh)
