"""A runner whose steps draft tokens and verify them.

The device holds the tokens of every slot's request (`SlotState`), so a step needs nothing that the host learns from the
step before it. A step with drafts is a program of its own, one for each size of `EngineConfig.draft_ladder`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from pdx.cache.dense import init_cache
from pdx.engine.config import EngineConfig
from pdx.engine.plan import StepPlan
from pdx.engine.runner import Emitted, Runner, empty_plan
from pdx.generation.speculation import choose_proposer
from pdx.layers.kernels import layout_for
from pdx.metrics import SpeculationCounts
from pdx.sampling.options import SamplingOptions
from pdx.sampling.sampler import SamplingState
from pdx.sharding import ArraySpec, constrain, constrain_rows, place_rows
from pdx.speculative.options import Speculation
from pdx.speculative.proposers import DraftModel, Proposer, SelfDraft
from pdx.speculative.shares import Record, StepCosts
from pdx.speculative.slots import Emission, Scored, SlotState, StepRows, emit, score
from pdx.weights.load import Model
from pdx.weights.progress import Report, silent

# How often a step is timed to find what it costs; the fastest time counts.
TIMED = 3
# Tokens of a prompt that a draft model reads at a time.
CATCH_UP = 64
# Proposers that need no more than tokens, or layers of the target.
OVER_PAGES = ("ngram", "draft", "self", "synthetic")
# The numbers that `Emission` has for each slot, in the order in which they are fetched.
NUMBERS = ("counts", "drafted", "kept", "confidence", "tried", "accepted", "available", "next_confidence")


@dataclass
class Speculated(Emitted):
    """What a step emitted, and what it taught about the proposer; `numbers` by name, each by slot."""

    numbers: dict[str, np.ndarray] | None = None

    def _of(self, slot: int, *names: str) -> list[int]:
        return [int(cast(dict, self.numbers)[name][slot]) for name in names]

    def teach(self, record: Record, slot: int) -> None:
        """Tell a request's record how its drafts did, and what could be drafted next."""
        record.observe(*self._of(slot, "confidence", "tried", "accepted"))
        record.available, record.confidence = self._of(slot, "available", "next_confidence")

    def counted(self, slot: int, emitted: int) -> SpeculationCounts:
        """Of a slot whose request took `emitted` tokens."""
        drafted, kept = self._of(slot, "drafted", "kept")
        return SpeculationCounts({drafted: 1}, drafted, min(kept, emitted - 1))


class SpeculativeRunner(Runner):
    """A `Runner` of an engine that speculates.

    Raises:
      RequestError: a draft model of another vocabulary, or more layers than the model has.
    """

    def __init__(self, model: Model, config: EngineConfig, kv_dtype):
        self.most = config.most_drafts
        speculation = cast(Speculation, config.drafts)
        self.proposer, self.draft = choose_proposer(model, speculation, catch_up=CATCH_UP)
        self._kv_dtype = kv_dtype
        self.costs: StepCosts | None = None
        super().__init__(model, config, kv_dtype)

    def reset(self) -> None:
        super().reset()
        self.slots = None  # freed before the new one is made
        own = None
        if self.draft is not None:
            own = init_cache(
                self.draft.config,
                self.config.slots,
                cast(int, self.config.max_context),
                chunk=CATCH_UP,
                dtype=self._kv_dtype,
                mesh=self.model.mesh,
                layout=layout_for(self.kernels),
            )
        made = SlotState.empty(self.config.slots, cast(int, self.config.max_context), self.proposer, self.most)
        made = place_rows(made, self.model.mesh)
        self.slots = made if own is None else made.replace(proposer=own)

    def warmup(self, report: Report = silent) -> None:
        super().warmup(report)
        groups = len(self.cache.groups)
        plans = [empty_plan(self.config, size, groups, is_mixed=True) for size in self.config.draft_ladder]
        for done, plan in enumerate(plans, 1):
            plan.drafts[:] = 1
            self._once(plan, masked=plan is plans[0])
            report("compiling the engine's programs for drafts", done, len(plans))
        if cast(Speculation, self.config.drafts).draft_length == "auto":
            self.costs = self._measured(plans)
        self.reset()

    def most_drafts(self, plan: StepPlan) -> int:
        return self.most if plan.has_drafts or self.config.deterministic else 0

    def drafts(self, logits: Any) -> list[list[int]]:
        tokens, lengths = jax.device_get((logits.drafted.tokens, logits.drafted.lengths))
        return [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]

    def forward(self, plan: StepPlan) -> Scored:
        if plan.copies:
            self._copy(plan.copies)
        rows, slots = len(plan.lengths), self.config.slots
        counts = np.diff(plan.query_starts)
        rounds = plan.samples & (plan.logit_rows == np.arange(slots))
        parts = (counts, plan.lengths - counts, plan.slot_of, plan.logit_rows, plan.drafts, rounds, plan.block_tables)
        host = np.concatenate([np.asarray(x, np.int32).ravel() for x in parts])
        most = self.most_drafts(plan)
        scored, self.cache, self.slots = self._programs.call(
            ("step", plan.shape, rows, most),
            _score,
            params=self.model.params,
            cache=self.cache,
            slots=self.slots,
            sampling=self.sampling,
            host=host,
            draft_params=None if self.draft is None else self.draft.params,
            static={
                "cfg": self.model.config,
                "shape": (rows, slots, len(self.cache.groups)),
                "tokens": plan.shape,
                "most": most,
                "proposer": self.proposer,
                "as_plain": self.config.deterministic,
                "mesh": self.model.mesh,
                "kernels": self.kernels,
            },
        )
        return scored

    def sample(self, plan: StepPlan, logits: Scored, allowed: np.ndarray | None = None) -> tuple[Emission, jax.Array]:
        masked = {} if allowed is None else {"allowed": allowed}
        told, numbers, self.slots, self.sampling = self._programs.call(
            ("sample", logits.at.shape, allowed is not None),
            _emit,
            scored=logits,
            slots=self.slots,
            sampling=self.sampling,
            samples=plan.samples,
            **masked,
            static={
                "proposer": self.proposer,
                "most": self.most,
                "num_logprobs": self.config.num_logprobs,
                "mesh": self.model.mesh,
            },
        )
        numbers.copy_to_host_async()
        return told, numbers

    def is_ready(self, drawn: tuple[Emission, jax.Array]) -> bool:
        return drawn[1].is_ready()

    def fetch(self, drawn: tuple[Emission, jax.Array], *, logprobs: bool) -> Speculated:
        told, packed = drawn
        found = np.asarray(packed)
        numbers = {name: found[:, i] for i, name in enumerate(NUMBERS)}
        got = Speculated(found[:, len(NUMBERS) :], counts=numbers["counts"], numbers=numbers)
        if logprobs:
            got.logprob, got.top_ids, got.top_logprobs = jax.device_get(
                (told.emitted.logprob, told.emitted.top_ids, told.emitted.top_logprobs)
            )
        return got

    def join(self, slot: int, options: SamplingOptions, prompt: list[int], outputs: list[int]) -> None:
        one = SamplingState.create([options], self.vocab_size, prompts=[prompt], outputs=[outputs], on_host=True)
        held = len(prompt) + len(outputs)
        tokens = np.zeros(cast(int, self.config.max_context), np.int32)
        tokens[:held] = [*prompt, *outputs]
        self.sampling, self.slots = self._programs.call(
            "join",
            _join,
            sampling=self.sampling,
            slots=self.slots,
            slot=np.int32(slot),
            one=one,
            tokens=tokens,
            held=np.int32(held),
            static={"mesh": self.model.mesh},
        )

    def _once(self, plan: StepPlan, *, masked: bool = False) -> None:
        """Run a step, sampling included, and wait for it; `masked`: also with masks."""
        scored = self.forward(plan)
        if masked:
            places = 1 + self.most_drafts(plan)
            self.fetch(
                self.sample(plan, scored, np.ones((self.config.slots, places, self.vocab_size), bool)), logprobs=True
            )
            scored = self.forward(plan)
        self.fetch(self.sample(plan, scored), logprobs=False)

    def _measured(self, plans: list[StepPlan]) -> StepCosts:
        """Time the steps with and without drafts, with empty rows: padding costs what tokens cost."""
        groups, top = len(self.cache.groups), plans[-1].shape
        sizes = [n for n in self.config.ladder(cast(int, self.config.max_context)) if n <= top]
        without = [empty_plan(self.config, n, groups) for n in sizes]
        for plan in (*plans, *without):
            plan.samples[:] = True
        plain = {plan.shape: _fastest(lambda plan=plan: self._once(plan)) for plan in without}
        drafted, draft_s = {}, 0.0
        for plan in plans:
            plan.drafts[:] = 0
            plan.drafts[0] = 1
            drafted[plan.shape] = _fastest(lambda plan=plan: self._once(plan))
        if isinstance(self.proposer, DraftModel | SelfDraft):
            plan = plans[0]
            plan.drafts[:] = self.most
            draft_s = (_fastest(lambda: self._once(plan)) - drafted[plan.shape]) / max(1, self.most - 1)
        return StepCosts(plain, drafted, max(0.0, draft_s))


def check_proposer(speculation: Speculation) -> None:
    """Raise NotImplementedError for a proposer that cannot draft over pages."""
    if speculation.proposer not in OVER_PAGES:
        raise NotImplementedError(
            f"speculate {speculation.proposer!r}: an engine drafts with {', '.join(OVER_PAGES)}; a head needs the "
            "hidden states of whole prompts, which only `pdx generate` keeps"
        )


def _fastest(run: Callable[[], None]) -> float:
    """Seconds of the fastest of a few runs."""
    seconds = []
    for _ in range(TIMED):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


@partial(
    jax.jit,
    static_argnames=("cfg", "shape", "tokens", "most", "proposer", "as_plain", "mesh", "kernels"),
    donate_argnames=("cache", "slots"),
)
def _score(
    params, cache, slots, sampling, host, draft_params, cfg, shape, tokens, most, proposer, as_plain, mesh, kernels
):
    """The forward pass. The host's inputs come packed in one array, since each array costs a transfer."""
    r, s, groups = shape
    counts, starts, slot_of, logit_rows, drafts, rounds, tables = jnp.split(host, np.cumsum([r, r, r, s, s, s]))
    step = StepRows(tables.reshape(groups, r, -1), counts, starts, slot_of, logit_rows, drafts, rounds > 0)
    scored, cache, slots = score(
        params,
        cfg,
        cache,
        slots,
        sampling,
        step,
        tokens=tokens,
        most=most,
        proposer=proposer,
        draft_params=draft_params,
        as_plain=as_plain,
        kernels=kernels,
    )
    logits = constrain(scored.logits, ArraySpec(scored.logits.shape, (None, "vocab"), scored.logits.dtype), mesh)
    at, drafted, rounds = constrain_rows((scored.at, scored.drafted, scored.rounds), mesh)
    return Scored(logits, at, drafted, rounds), cache, _placed(slots, mesh)


@partial(jax.jit, static_argnames=("proposer", "most", "num_logprobs", "mesh"), donate_argnames=("slots", "sampling"))
def _emit(scored, slots, sampling, samples, proposer: Proposer, most, num_logprobs, mesh, allowed=None):
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
def _join(sampling, slots, slot, one, tokens, held, mesh):
    return constrain_rows(sampling.put(slot, one), mesh), _placed(slots.join(slot, tokens, held), mesh)
