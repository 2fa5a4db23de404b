"""A runner whose steps draft tokens and verify them.

The device holds the tokens of every slot's request (`SlotState`), so a step needs nothing that the host learns from the
step before it. A step with drafts is a program of its own, one for each size of `EngineConfig.draft_ladder`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np

from pallas_kernels.hardware import platform_of
from pdx.cache.dense import init_cache
from pdx.engine import speculative_programs as programs
from pdx.engine.config import EngineConfig
from pdx.engine.plan import StepPlan
from pdx.engine.request import Sequence
from pdx.engine.runner import Emitted, Runner, empty_plan
from pdx.generation.speculation import choose_proposer
from pdx.layers.kernels import layout_for
from pdx.metrics import SpeculationCounts
from pdx.sampling.options import SamplingOptions
from pdx.sampling.sampler import SamplingState
from pdx.sharding import place_rows
from pdx.speculative.eagle import Eagle
from pdx.speculative.options import Speculation
from pdx.speculative.paged_head import HeadState, PagedEagle, with_float_entries
from pdx.speculative.proposers import DraftModel, SelfDraft
from pdx.speculative.shares import Record, StepCosts
from pdx.speculative.slots import Emission, Scored, SlotState
from pdx.weights.load import Model
from pdx.weights.progress import Report, silent

# How often a step is timed to find what it costs; the fastest time counts.
TIMED = 3
# Tokens of a prompt that a draft model reads at a time.
CATCH_UP = 64


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
        if isinstance(self.proposer, Eagle):
            self.proposer, head = PagedEagle(self.proposer.cfg), cast(Model, self.draft)
            if model.mesh is None and platform_of() == "cpu":
                self.draft = dataclasses.replace(head, params=with_float_entries(head.params))
        self._unread: set[int] = set()
        self._kv_dtype = kv_dtype
        self.costs: StepCosts | None = None
        super().__init__(model, config, kv_dtype)

    def reset(self) -> None:
        super().reset()
        self.slots = None  # freed before the new one is made
        self._unread.clear()
        own = self._empty_state()
        made = SlotState.empty(self.config.slots, cast(int, self.config.max_context), self.proposer, self.most)
        made = place_rows(made, self.model.mesh)
        self.slots = made if own is None else made.replace(proposer=own)

    def _empty_state(self) -> Any:
        """The proposer's state without requests; None where it has none."""
        if isinstance(self.proposer, PagedEagle):
            return HeadState.create(self.config.slots, self.model.config.d_model, self.model.dtype, self.model.mesh)
        if self.draft is None:
            return None
        return init_cache(
            self.draft.config,
            self.config.slots,
            cast(int, self.config.max_context),
            chunk=CATCH_UP,
            dtype=self._kv_dtype,
            mesh=self.model.mesh,
            layout=layout_for(self.kernels),
        )

    def warmup(self, report: Report = silent) -> None:
        super().warmup(report)
        if isinstance(self.proposer, DraftModel):
            self._read_prompts(np.zeros(self.config.slots, bool))
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
        self._read_ended(plan)
        rows, slots = len(plan.lengths), self.config.slots
        counts = np.diff(plan.query_starts)
        rounds = plan.samples & (plan.logit_rows == np.arange(slots))
        parts = (counts, plan.lengths - counts, plan.slot_of, plan.logit_rows, plan.drafts, rounds, plan.block_tables)
        host = np.concatenate([np.asarray(x, np.int32).ravel() for x in parts])
        most = self.most_drafts(plan)
        form = programs.StepForm(
            self.model.config,
            (rows, slots, len(self.cache.groups)),
            plan.shape,
            most,
            self.proposer,
            self.config.deterministic,
            self.model.mesh,
            self.kernels,
        )
        scored, self.cache, self.slots = self._programs.call(
            ("step", plan.shape, rows, most),
            programs.score_step,
            params=self.model.params,
            cache=self.cache,
            slots=self.slots,
            sampling=self.sampling,
            host=host,
            draft_params=None if self.draft is None else self.draft.params,
            static={"form": form},
        )
        return scored

    def sample(self, plan: StepPlan, logits: Scored, allowed: np.ndarray | None = None) -> tuple[Emission, jax.Array]:
        masked = {} if allowed is None else {"allowed": allowed}
        told, numbers, self.slots, self.sampling = self._programs.call(
            ("sample", logits.at.shape, allowed is not None),
            programs.emit_step,
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
        numbers = {name: found[:, i] for i, name in enumerate(programs.NUMBERS)}
        got = Speculated(found[:, len(programs.NUMBERS) :], counts=numbers["counts"], numbers=numbers)
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
            programs.join_slot,
            sampling=self.sampling,
            slots=self.slots,
            slot=np.int32(slot),
            one=one,
            tokens=tokens,
            held=np.int32(held),
            static={"mesh": self.model.mesh},
        )

    def join_all(self, joins: tuple[tuple[int, Sequence], ...]) -> None:
        super().join_all(joins)
        if isinstance(self.proposer, DraftModel):
            self._unread.difference_update(slot for slot, _ in joins)
            self._unread.update(slot for slot, seq in joins if seq.record is not None)

    def _read_ended(self, plan: StepPlan) -> None:
        """Let the draft model read the prompts that end in this step: that time belongs to their first token."""
        if ended := {c.slot for c in plan.chunks if c.samples} & self._unread:
            self._unread -= ended
            self._read_prompts(np.isin(np.arange(self.config.slots), list(ended)))

    def _read_prompts(self, whose: np.ndarray) -> None:
        self.slots = self._programs.call(
            "read prompts",
            programs.read_prompts,
            slots=self.slots,
            whose=whose,
            draft_params=cast(Model, self.draft).params,
            static={"proposer": self.proposer, "mesh": self.model.mesh, "kernels": self.kernels},
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
        if isinstance(self.proposer, DraftModel | PagedEagle | SelfDraft):
            plan = plans[0]
            plan.drafts[:] = self.most
            draft_s = (_fastest(lambda: self._once(plan)) - drafted[plan.shape]) / max(1, self.most - 1)
        return StepCosts(plain, drafted, max(0.0, draft_s))


def _fastest(run: Callable[[], None]) -> float:
    """Seconds of the fastest of a few runs."""
    seconds = []
    for _ in range(TIMED):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
