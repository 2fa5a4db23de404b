"""`Plan`: all predictions for a model on one or several chips under a load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax

from pallas_kernels.hardware import Chip
from pdx import cost
from pdx.cache.layer import default_layout
from pdx.config import ModelConfig
from pdx.cost import Setup, tradeoffs
from pdx.cost.chips import MeasuredChip, chip
from pdx.errors import RequestError
from pdx.metrics import Objectives
from pdx.plan.published import Shape
from pdx.quant import STORED, Policy, quantized_specs
from pdx.shapes import DEFAULT_CHUNK
from pdx.sharding import ArraySpec, is_spec

CONTEXT, OUTPUT = 2048, 256  # default tokens that a row holds, and of an answer
TYPES = {"f32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Chunking:
    """A prompt that is prefilled in chunks while other rows decode; times in seconds."""

    chunk: int  # tokens
    ttft: float  # of the prompt by itself, in chunks
    whole: float  # the longest step of the decoding rows if the prompt is one chunk
    longest: float  # the longest step of the decoding rows with chunks


@dataclass(frozen=True)
class Plan:
    """A model on one or several chips under a load.

    Times are in seconds. They are floors, or estimates for a single measured chip. Token counts: `prompt`, `context`
    (what a row holds while it decodes), `output_tokens`.
    """

    model: str
    setup: Setup
    chip: Chip
    chips: int
    batch: int
    prompt: int
    context: int
    output_tokens: int = 256
    slo_ttft: float | None = None
    slo_tpot: float | None = None

    @property
    def is_measured(self) -> bool:
        """Whether times are estimates from the chip's measured rates."""
        return isinstance(self.chip, MeasuredChip) and self.chips == 1

    @property
    def capacity(self) -> int:
        return self.chip.hbm_bytes * self.chips

    @property
    def needed(self) -> int:
        """Bytes of weights and of the whole batch's cache."""
        return sum(self.setup.weights.values()) + self.setup.cache_bytes(self.batch, self.context)

    @property
    def usable(self) -> int:
        """Bytes that weights and caches may take: the capacity without a reserve for programs and temporaries."""
        return int(self.capacity * (1 - cost.RESERVE))

    @property
    def fits(self) -> bool:
        return self.needed <= self.usable

    @cached_property
    def prefill(self) -> cost.Cost:
        """The cost of one prompt's prefill."""
        return self.setup.prefill(1, self.prompt)

    @cached_property
    def decode(self) -> cost.Cost:
        return self.setup.decode(self.batch, self.context)

    def seconds(self, step: cost.Cost) -> float:
        return step.seconds(self.chip, self.chips)

    @property
    def ttft(self) -> float:
        return self.seconds(self.prefill)

    @property
    def tpot(self) -> float:
        """Seconds of a decode step of `batch` rows, each `context` tokens long."""
        return self.seconds(self.decode)

    @property
    def e2e(self) -> float:
        return cost.end_to_end(self.ttft, self.tpot, self.output_tokens)

    @property
    def within_slo(self) -> int | None:
        """The most rows that fit and meet the TPOT objective; None without an objective."""
        if self.slo_tpot is None:
            return None
        return cost.best_batch(self.setup, self.chip, self.context, self.slo_tpot, self.chips)

    @cached_property
    def largest_chunk(self) -> int | None:
        """The most prompt tokens in a step with the whole batch that meets the TPOT objective; None without one."""
        if self.slo_tpot is None:
            return None
        return tradeoffs.largest_chunk(self.setup, self.chip, self.batch, self.context, self.slo_tpot, self.chips)

    @cached_property
    def chunking(self) -> Chunking:
        """The prompt in `largest_chunk`s, or in the cache's default chunks without a TPOT objective."""
        chunk = min(self.largest_chunk or DEFAULT_CHUNK, self.prompt)
        on = self.setup, self.chip
        whole, longest = (
            tradeoffs.longest_step(*on, self.batch, self.context, self.prompt, size, self.chips)
            for size in (self.prompt, chunk)
        )
        return Chunking(chunk, tradeoffs.chunked_prefill(*on, self.prompt, chunk, self.chips), whole, longest)

    def with_setup(self, **changes: Any) -> Plan:
        """The same load with a changed setup, such as `quantize="int8"`."""
        return replace(self, setup=replace(self.setup, **changes))

    def phase(self, step: cost.Cost) -> dict[str, Any]:
        """A step as `--json` prints it."""
        compute, memory = step.shares(self.chip, self.chips)
        return {
            "flops": step.flops,
            "bytes": step.bytes,
            "intensity_flops_per_byte": step.intensity,
            "bound": step.bound(self.chip),
            "seconds": self.seconds(step),
            "of_peak": compute,
            "of_bandwidth": memory,
            "flops_by_part": step.flops_by_part,
            "bytes_by_part": dict(step.bytes_by_part),
        }

    def to_dict(self) -> dict[str, Any]:
        """The plan as `--json` prints it, without the advice."""
        on = self.setup, self.chip
        every, active = self.setup.parameters
        objectives = (("ttft", self.slo_ttft, self.ttft), ("tpot", self.slo_tpot, self.tpot))
        return {
            "model": self.model,
            "chip": self.chip.name,
            "chips": self.chips,
            "batch": self.batch,
            "prompt_tokens": self.prompt,
            "context_tokens": self.context,
            "output_tokens": self.output_tokens,
            "parameters": every,
            "active_parameters": active,
            "fits": self.fits,
            "hbm_bytes": self.needed,
            "hbm_capacity_bytes": self.capacity,
            "weights_by_part_bytes": self.setup.weights,
            "cache_bytes": self.setup.cache_bytes(self.batch, self.context),
            "prefill": self.phase(self.prefill),
            "decode": self.phase(self.decode),
            "ttft_s": self.ttft,
            "tpot_s": self.tpot,
            "e2e_s": self.e2e,
            "critical_batch": cost.critical_batch(*on),
            "largest_batch": cost.largest_batch(*on, self.context, self.chips),
            "largest_context_tokens": cost.largest_context(*on, self.batch, self.chips),
            "batch_within_slo": self.within_slo,
            "largest_chunk_within_slo_tokens": self.largest_chunk,
            "slo": {
                name: {"asked_s": asked, "predicted_s": got, "met": got <= asked}
                for name, asked, got in objectives
                if asked is not None
            },
            "chunked_prefill": {
                "chunk_tokens": self.chunking.chunk,
                "ttft_s": self.chunking.ttft,
                "longest_step_s": self.chunking.longest,
                "longest_step_unchunked_s": self.chunking.whole,
            },
        }


def make(
    model: str,
    shape: Shape | ModelConfig,
    on: str,
    *,
    quantize: str | Policy | None = None,
    kv_dtype: str | None = None,
    dtype: str = "auto",
    batch: int = 1,
    prompt: int = 1024,
    context: int | None = None,
    output_tokens: int | None = None,
    slo_ttft: float | None = None,
    slo_tpot: float | None = None,
) -> Plan:
    """Make a plan.

    Args:
      model: its name in messages.
      shape: a `Shape`, or the configuration of a model.
      on: a chip (`v5e`) or several (`v5e-8`).
      quantize: see `pdx.load`.
      kv_dtype: f32, bf16, int8; None or auto: as dtype.
      dtype: f32, bf16, or auto: the dtype that `pdx.load` chooses on such a chip.
      batch: rows that decode together.
      prompt: tokens of a prompt.
      context: tokens that a row holds while it decodes; None: 2048, or what prompt and answer need.
      output_tokens: tokens of an answer; None: 256, or what the context leaves.
      slo_ttft, slo_tpot: objectives in seconds.

    Raises:
      RequestError: an unknown chip or dtype, an impossible load, or a policy that does not fit the model.
    """
    found, chips = _chips(on)
    shape = Shape(shape) if isinstance(shape, ModelConfig) else shape
    if min(chips, batch, *(x for x in (prompt, context, output_tokens) if x is not None)) < 1:
        raise RequestError("chips, batch, prompt, context and output tokens must be at least 1")
    context, output_tokens = _lengths(model, shape.config.max_context, prompt, context, output_tokens)
    Objectives(slo_ttft, slo_tpot)  # checks them
    setup = shape.setup(_dtype(dtype, found), quantize, _kv_dtype(kv_dtype), default_layout(found.platform))
    _check(setup, shape)
    return Plan(model, setup, found, chips, batch, prompt, context, output_tokens, slo_ttft, slo_tpot)


def _lengths(model: str, most: int, prompt: int, context: int | None, output: int | None) -> tuple[int, int]:
    """Tokens of a row and of an answer. Raises RequestError if the row or the model's context is too short."""
    needed = prompt + (output or 0)
    if max(needed, context or 0) > most:
        raise RequestError(f"{model} has a context of {most} tokens, not of {max(needed, context or 0)}")
    if context is not None and needed > context:
        raise RequestError(
            f"a row of {context} tokens cannot hold {needed}: set --context to at least prompt plus answer"
        )
    output = output or max(1, min(OUTPUT, (context or most) - prompt))
    return context or min(max(CONTEXT, prompt + output), most), output


def _dtype(name: str, on: Chip) -> str:
    """The type of activations and unquantized weights. Raises RequestError for an unknown name."""
    if name == "auto":
        return "float32" if on.platform == "cpu" or on.bf16_tflops is None else "bfloat16"
    return _named(name, "dtype", TYPES)


def _kv_dtype(name: str | None) -> str | None:
    """The type of the cache; None: as the activations. Raises RequestError for an unknown name."""
    return None if name in (None, "auto") else _named(name, "kv_dtype", TYPES | {"int8": "int8"})


def _named(name: str, what: str, known: Mapping[str, str]) -> str:
    if name not in known and name not in known.values():
        raise RequestError(f"{what} {name!r} is not one of auto, {', '.join(known)}")
    return known.get(name, name)


def _chips(on: str) -> tuple[Chip, int]:
    """The chip and how many, from `v5e` or `v5e-8`. A chip's own name may end in a number too (`a100-40`).

    Raises RequestError for an unknown chip.
    """
    name, _, count = on.rpartition("-")
    for text, chips in ((on, 1), *([(name, int(count))] if name and count.isdigit() else [])):
        try:
            return chip(text), chips
        except RequestError as error:
            why = error
    raise RequestError(f"{why}; several chips are written as v5e-8")


def _check(setup: Setup, shape: Shape) -> None:
    """Raise RequestError for a policy that does not fit the model."""
    if shape.runs:
        quantized_specs(setup.specs, setup.policy)
        return
    policy = setup.policy
    if shape.experts and shape.experts.stored_bits:  # the shape says how experts are stored, so `stored` always fits
        policy = Policy(tuple((pattern, None if kind == STORED else kind) for pattern, kind in policy.rules))

    def of_one_expert(spec: ArraySpec) -> ArraySpec:
        return replace(spec, shape=spec.shape[-2:], axes=spec.axes[-2:])

    quantized_specs(jax.tree.map(of_one_expert, setup.specs, is_leaf=is_spec), policy)
