"""The device side of an engine: compiled programs, the paged cache and the sampling state.

A step is two dispatches. The forward pass takes its decode rows' tokens from the previous sampling on the device, so it
can be dispatched before the host knows them. Sampling is a separate program: a mask from the host (structured output)
may have to wait for a token, and the forward pass need not wait with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pdx import steps
from pdx.cache.paged import copy_pages, init_paged_cache
from pdx.cache.rows import PackedRows
from pdx.engine.config import EngineConfig
from pdx.engine.plan import StepPlan
from pdx.engine.request import Sequence
from pdx.generation.programs import Programs
from pdx.layers.kernels import as_kernels, explain_mixed, layout_for
from pdx.sampling.options import SamplingOptions
from pdx.sampling.sampler import NO_TOKEN, SampleOutput, SamplingState, sample
from pdx.sharding import constrain_rows, place_rows
from pdx.speculative.paged_head import paged_layers
from pdx.weights.load import Model
from pdx.weights.progress import Report, silent

# Page copies per dispatch.
COPIES = 4


@dataclass
class Emitted:
    """What a step emitted, on the host; None where it was not asked for.

    Attributes:
      tokens: by slot; the first `counts` of each count. None: one each.
    """

    tokens: np.ndarray
    logprob: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    counts: np.ndarray | None = None

    def of(self, slot: int) -> list[int]:
        return self.tokens[slot].tolist() if self.counts is None else self.tokens[slot, : self.counts[slot]].tolist()


class Runner:
    """The pages, each slot's sampling settings and newest token, and the programs that use them.

    Each program is compiled for one shape (`Programs`).
    """

    def __init__(self, model: Model, config: EngineConfig, kv_dtype):
        self.kernels = as_kernels(config.kernels)
        explain_mixed(self.kernels)  # raises before anything is allocated
        self.model, self.config, self.vocab_size = model, config, model.config.vocab_size
        self._programs = Programs()
        self._make_cache = partial(
            init_paged_cache,
            paged_layers(model.config, config.speculate),
            config.pages,
            page_size=config.page_size,
            dtype=kv_dtype,
            mesh=model.mesh,
            layout=layout_for(self.kernels),
        )
        self.reset()

    @property
    def compile_s(self) -> float:
        return self._programs.compile_s

    def reset(self) -> None:
        """Start with empty pages and slots, also after a failed step, which loses the buffers donated to it."""
        self.cache = self.sampling = self.last = None  # freed before the new ones are made
        self.cache = self._make_cache()
        slots, mesh = self.config.slots, self.model.mesh
        empty = SamplingState.create([], self.vocab_size, batch=slots)
        self.sampling = place_rows(empty, mesh)
        self.last = place_rows(jnp.zeros(slots, jnp.int32), mesh)

    def warmup(self, report: Report = silent) -> None:
        """Compile every program that a step can need, and run each once."""
        config = self.config
        plans = [empty_plan(config, shape, len(self.cache.groups)) for shape in config.ladder(config.max_context)]
        total = len(plans) + 4
        done = 0

        def tick():
            nonlocal done
            done += 1
            report("compiling the engine's programs", done, total)

        for plan in plans:
            logits = self.forward(plan)
            tick()
        places = 1 + self.most_drafts(plan)
        for allowed in (None, np.ones((config.slots, places, self.vocab_size), bool)):
            self.fetch(self.sample(plan, logits, allowed), logprobs=True)
            tick()
        self.join(0, SamplingOptions(seed=0), [0], [])
        tick()
        self._copy([(group, 0, NO_TOKEN) for group in range(len(self.cache.groups))])
        tick()
        self.reset()

    def forward(self, plan: StepPlan) -> Any:
        """Dispatch the page copies and the forward pass of a step; returns the logits [slots, V] to sample from."""
        if plan.copies:
            self._copy(plan.copies)
        rows = len(plan.lengths)
        host = np.concatenate(
            [
                x.ravel()
                for x in (
                    plan.tokens,
                    plan.sources,
                    plan.lengths,
                    plan.query_starts,
                    plan.logit_rows,
                    plan.block_tables,
                )
            ]
        )
        logits, self.cache = self._programs.call(
            ("step", plan.shape, rows),
            _step,
            params=self.model.params,
            cache=self.cache,
            last=self.last,
            host=host,
            static={
                "cfg": self.model.config,
                "shape": (plan.shape, rows, self.config.slots, len(self.cache.groups)),
                "decode_rows": plan.decode_rows,
                "max_queries": plan.max_queries,
                "kernels": self.kernels,
            },
        )
        return logits

    def sample(self, plan: StepPlan, logits: Any, allowed: np.ndarray | None = None) -> Any:
        """Dispatch sampling; `allowed` [slots, 1, V] if a request has a mask."""
        masked = {} if allowed is None else {"allowed": allowed[:, 0]}
        drawn, self.sampling, self.last = self._programs.call(
            ("sample", allowed is not None),
            _sample,
            logits=logits,
            sampling=self.sampling,
            last=self.last,
            positions=plan.positions,
            samples=plan.samples,
            **masked,
            static={"num_logprobs": self.config.num_logprobs, "mesh": self.model.mesh},
        )
        for x in jax.tree.leaves(drawn):
            x.copy_to_host_async()
        return drawn

    def is_ready(self, drawn: SampleOutput) -> bool:
        """Whether the step that sampled this has ended."""
        return drawn.tokens.is_ready()

    def most_drafts(self, plan: StepPlan) -> int:
        """The most tokens that a row of the step's program drafts."""
        return 0

    def drafts(self, logits: Any) -> list[list[int]]:
        """The tokens that the step drafted, by slot. Waits for the step. This runner drafts none."""
        return [[] for _ in range(self.config.slots)]

    def fetch(self, drawn: SampleOutput, *, logprobs: bool) -> Emitted:
        """Wait for the sampled tokens and return them on the host; with `logprobs`, log-probabilities too."""
        if not logprobs:
            return Emitted(np.asarray(drawn.tokens)[:, None])
        got = jax.device_get(drawn)
        return Emitted(got.tokens[:, None], got.logprob[:, None], got.top_ids[:, None], got.top_logprobs[:, None])

    def join(self, slot: int, options: SamplingOptions, prompt: list[int], outputs: list[int]) -> None:
        """Put a request's sampling settings, and the tokens that it has generated so far, into a slot."""
        # Made on the host: on the device it would queue behind the step that is running.
        one = SamplingState.create([options], self.vocab_size, prompts=[prompt], outputs=[outputs], on_host=True)
        self.sampling = self._programs.call(
            "join", _join, sampling=self.sampling, slot=np.int32(slot), one=one, static={"mesh": self.model.mesh}
        )

    def join_all(self, joins: tuple[tuple[int, Sequence], ...]) -> None:
        for slot, seq in joins:
            self.join(slot, seq.request.options, list(seq.request.prompt), seq.outputs)

    def _copy(self, copies) -> None:
        """Copy pages in order: a later copy may overwrite an earlier one's source, but not the reverse."""
        for group in range(len(self.cache.groups)):
            pairs = [(source, target) for g, source, target in copies if g == group]
            for at in range(0, len(pairs), COPIES):
                part = np.full((COPIES, 2), NO_TOKEN, np.int32)
                part[: len(pairs[at : at + COPIES])] = pairs[at : at + COPIES]
                self.cache = self._programs.call(
                    ("copy", group),
                    copy_pages.program,
                    cache=self.cache,
                    src=part[:, 0].copy(),
                    dst=part[:, 1].copy(),
                    static={"group": group},
                )


def empty_plan(config: EngineConfig, shape: int, groups: int, *, is_mixed: bool | None = None) -> StepPlan:
    """A step of the given shape in which no row takes part, for warm-up."""
    if is_mixed is None:
        is_mixed = shape != config.slots or config.deterministic
    rows = config.rows if is_mixed else config.slots
    width = -(-config.max_context // config.page_size)
    slots = np.arange(config.slots, dtype=np.int32)
    return StepPlan(
        (),
        np.zeros(shape, np.int32),
        np.zeros((groups, rows, width), np.int32),
        np.zeros(rows, np.int32),
        np.zeros(rows + 1, np.int32),
        config.slots,
        np.full(shape, -1, np.int32),
        slots,
        np.zeros_like(slots),
        np.zeros(config.slots, bool),
        np.zeros(rows, np.int32),
        np.zeros_like(slots),
    )


@partial(jax.jit, static_argnames=("cfg", "shape", "decode_rows", "max_queries", "kernels"), donate_argnames="cache")
def _step(params, cache, last, host, cfg, shape, decode_rows, max_queries, kernels):
    """The forward pass. The host's inputs come packed in one array, since each array costs a transfer."""
    t, r, slots, groups = shape
    ends = np.cumsum([t, t, r, r + 1, slots])
    tokens, sources, lengths, starts, logit_rows, tables = jnp.split(host, ends)
    tokens = jnp.where(sources >= 0, last[jnp.maximum(sources, 0)], tokens)
    rows = PackedRows.packed(t, tables.reshape(groups, r, -1), lengths, starts, decode_rows, max_queries)
    logits, cache = steps.packed.mixed(params, cfg, tokens, rows, cache, kernels)
    return logits[logit_rows], cache


@partial(jax.jit, static_argnames=("num_logprobs", "mesh"), donate_argnames=("sampling", "last"))
def _sample(logits, sampling, last, positions, samples, num_logprobs, mesh, allowed=None):
    drawn = sample(logits, sampling, positions, num_logprobs=num_logprobs, allowed=allowed, mark_broken=True)
    sampling, last = sampling.observe(drawn.tokens, samples), jnp.where(samples, drawn.tokens, last)
    return drawn, constrain_rows(sampling, mesh), constrain_rows(last, mesh)


@partial(jax.jit, static_argnames="mesh", donate_argnames="sampling")
def _join(sampling, slot, one, mesh):
    return constrain_rows(sampling.put(slot, one), mesh)
