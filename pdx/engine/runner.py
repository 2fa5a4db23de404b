"""The device's side of an engine: its compiled programs and what they work on.

A step is two dispatches. The forward pass takes the tokens of its decode rows from where the step before left them, so
that it can be dispatched before they are known; sampling is a program of its own, since a mask from the host
(structured output) may have to wait for a token that the forward pass need not wait for.
"""

from __future__ import annotations

from functools import partial

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
from pdx.layers.kernels import explain_mixed, layout_for, settled
from pdx.sampling.options import SamplingOptions
from pdx.sampling.sampler import NO_TOKEN, SampleOutput, SamplingState, sample
from pdx.sharding import constrain_rows, place_rows
from pdx.weights.load import Model
from pdx.weights.progress import Report, silent

# Page copies a dispatch.
COPIES = 4


class Runner:
    """Pages, sampling settings and the newest token of every slot, and the programs over them.

    Every program is compiled for its one shape (`Programs`).
    """

    def __init__(self, model: Model, config: EngineConfig, kv_dtype):
        self.kernels = settled(config.kernels)
        explain_mixed(self.kernels)  # raises before anything is made
        self.model, self.config, self.vocab_size = model, config, model.config.vocab_size
        self._programs = Programs()
        self._make_cache = partial(
            init_paged_cache,
            model.config,
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
        """Empty pages and slots, as after a step that failed: what it was given is lost with it."""
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
        for allowed in (None, np.ones((config.slots, self.vocab_size), bool)):
            self.fetch(self.sample(plan, logits, allowed), logprobs=True)
            tick()
        self.join(0, SamplingOptions(seed=0), [0], [])
        tick()
        self._copy([(group, 0, NO_TOKEN) for group in range(len(self.cache.groups))])
        tick()
        self.reset()

    def forward(self, plan: StepPlan) -> jax.Array:
        """Dispatch the page copies and the forward pass of a step; logits [slots, V] of what each slot samples from."""
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

    def sample(self, plan: StepPlan, logits: jax.Array, allowed: np.ndarray | None = None) -> SampleOutput:
        """Dispatch the choice of tokens; `allowed` [slots, V] where a request has a mask."""
        masked = {} if allowed is None else {"allowed": allowed}
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

    def fetch(self, drawn: SampleOutput, *, logprobs: bool) -> SampleOutput:
        """What was sampled, on the host, once it is there; without `logprobs` the tokens alone."""
        if logprobs:
            return jax.device_get(drawn)
        return SampleOutput(np.asarray(drawn.tokens), None, None, None)

    def join(self, slot: int, options: SamplingOptions, prompt: list[int], outputs: list[int]) -> None:
        """Put a request's sampling settings, and what it has generated already, into a slot."""
        # Made on the host: a device computes one thing after another, and would be asked in the middle of a step.
        one = SamplingState.create([options], self.vocab_size, prompts=[prompt], outputs=[outputs], on_host=True)
        self.sampling = self._programs.call(
            "join", _join, sampling=self.sampling, slot=np.int32(slot), one=one, static={"mesh": self.model.mesh}
        )

    def join_all(self, sequences: tuple[Sequence, ...]) -> None:
        for seq in sequences:
            self.join(seq.slot, seq.request.options, list(seq.request.prompt), seq.outputs)

    def _copy(self, copies) -> None:
        """In order: a page that is copied from may be written over by a later copy, never by an earlier one."""
        for group in range(len(self.cache.groups)):
            pairs = [(source, target) for g, source, target in copies if g == group]
            for at in range(0, len(pairs), COPIES):
                part = np.full((COPIES, 2), NO_TOKEN, np.int32)
                part[: len(pairs[at : at + COPIES])] = pairs[at : at + COPIES]
                self.cache = self._programs.call(
                    ("copy", group),
                    copy_pages,
                    cache=self.cache,
                    src=part[:, 0].copy(),
                    dst=part[:, 1].copy(),
                    static={"group": group},
                )


def empty_plan(config: EngineConfig, shape: int, groups: int) -> StepPlan:
    """A step of a shape in which no row takes part."""
    rows = config.slots if shape == config.slots and not config.deterministic else config.rows
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
    )


@partial(jax.jit, static_argnames=("cfg", "shape", "decode_rows", "max_queries", "kernels"), donate_argnames="cache")
def _step(params, cache, last, host, cfg, shape, decode_rows, max_queries, kernels):
    """The forward pass. What the host has to say comes as one array, since each array costs a transfer."""
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
