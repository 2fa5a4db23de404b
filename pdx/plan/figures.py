"""A model on some chips under a load: all that is predicted of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pallas_kernels.hardware import Chip
from pdx import cost, tradeoffs
from pdx.cache.dense import default_layout
from pdx.chips import MeasuredChip, chip
from pdx.config import ModelConfig
from pdx.cost import Setup
from pdx.errors import RequestError
from pdx.known import Shape
from pdx.model import param_specs
from pdx.quant import STORED, Policy, quantized_specs
from pdx.shapes import DEFAULT_CHUNK
from pdx.sharding import ArraySpec


@dataclass(frozen=True)
class Chunking:
    """A prompt in chunks, beside rows that decode; seconds."""

    chunk: int
    ttft: float  # of the prompt alone, chunk after chunk
    whole: float  # the longest step of the others if the prompt is one chunk
    longest: float  # the same with chunks


@dataclass(frozen=True)
class Plan:
    """A model on some chips under a load; times in seconds: floors, but on one measured chip estimates."""

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
        """Whether times are what the chip was measured to take."""
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
        """Bytes for weights and caches."""
        return int(self.capacity * (1 - cost.RESERVE))

    @property
    def fits(self) -> bool:
        return self.needed <= self.usable

    @cached_property
    def prefill(self) -> cost.Cost:
        """Of one prompt."""
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
        """Of a row that is `context` tokens long, among `batch` such rows."""
        return self.seconds(self.decode)

    @property
    def e2e(self) -> float:
        return cost.end_to_end(self.ttft, self.tpot, self.output_tokens)

    @property
    def within_slo(self) -> int | None:
        """The most rows that fit and keep the TPOT asked for; None where none is asked for."""
        if self.slo_tpot is None:
            return None
        return cost.best_batch(self.setup, self.chip, self.context, self.slo_tpot, self.chips)

    @cached_property
    def largest_chunk(self) -> int | None:
        """The most prompt tokens in a step of the whole batch that keeps the TPOT asked for; None as above."""
        if self.slo_tpot is None:
            return None
        return tradeoffs.largest_chunk(self.setup, self.chip, self.batch, self.context, self.slo_tpot, self.chips)

    @cached_property
    def chunking(self) -> Chunking:
        """In the largest chunks that keep the TPOT asked for, else in the cache's own."""
        chunk = min(self.largest_chunk or DEFAULT_CHUNK, self.prompt)
        on = self.setup, self.chip
        whole, longest = (tradeoffs.longest_step(*on, self.batch, self.context, self.prompt, size, self.chips)
                          for size in (self.prompt, chunk))  # fmt: skip
        return Chunking(chunk, tradeoffs.chunked_prefill(*on, self.prompt, chunk, self.chips), whole, longest)

    def with_setup(self, **changes: Any) -> Plan:
        """The same load on the model stored otherwise, say with `quantize="int8"`."""
        return replace(self, setup=replace(self.setup, **changes))

    def phase(self, step: cost.Cost) -> dict[str, Any]:
        """What `--json` says of a step."""
        compute, memory = step.shares(self.chip, self.chips)
        return {"flops": step.flops, "bytes": step.bytes, "intensity": step.intensity, "bound": step.bound(self.chip),
                "seconds": self.seconds(step), "of_peak": compute, "of_bandwidth": memory,
                "flops_by_part": step.flops_by_part, "bytes_by_part": dict(step.bytes_by_part)}  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints, but for the advice."""
        on = self.setup, self.chip
        every, active = self.setup.parameters
        objectives = (("ttft", self.slo_ttft, self.ttft), ("tpot", self.slo_tpot, self.tpot))
        return {
            "model": self.model, "chip": self.chip.name, "chips": self.chips, "batch": self.batch,
            "prompt": self.prompt, "context": self.context, "output_tokens": self.output_tokens,
            "parameters": every, "active_parameters": active,
            "fits": self.fits, "hbm_bytes": self.needed, "hbm_capacity_bytes": self.capacity,
            "weights_by_part": self.setup.weights,
            "cache_bytes": self.setup.cache_bytes(self.batch, self.context),
            "prefill": self.phase(self.prefill), "decode": self.phase(self.decode),
            "ttft": self.ttft, "tpot": self.tpot, "e2e": self.e2e,
            "critical_batch": cost.critical_batch(*on),
            "largest_batch": cost.largest_batch(*on, self.context, self.chips),
            "largest_context": cost.largest_context(*on, self.batch, self.chips),
            "batch_within_slo": self.within_slo, "largest_chunk_within_slo": self.largest_chunk,
            "slo": {name: {"asked": asked, "predicted": got, "met": got <= asked}
                    for name, asked, got in objectives if asked is not None},
            "chunked_prefill": {"chunk": self.chunking.chunk, "ttft": self.chunking.ttft,
                                "longest_step": self.chunking.longest,
                                "longest_step_unchunked": self.chunking.whole},
        }  # fmt: skip


def make(
    model: str, shape: Shape | ModelConfig, on: str, *, quantize: str | Policy | None = None,
    kv_dtype: str | None = None, dtype: str = "bfloat16", batch: int = 1, prompt: int = 1024, context: int = 2048,
    output_tokens: int = 256, slo_ttft: float | None = None, slo_tpot: float | None = None,
) -> Plan:  # fmt: skip
    """A plan on `on`: a chip, or so many of it (`v5e-8`); objectives in seconds.

    Raises:
      RequestError: an unknown chip, a load that makes no sense, a policy that does not fit the model.
    """
    found, chips = _chips(on)
    shape = Shape(shape) if isinstance(shape, ModelConfig) else shape
    if min(chips, batch, prompt, context, output_tokens) < 1:
        raise RequestError("chips, batch, prompt, context and output tokens must be at least 1")
    if max(prompt, context) > shape.config.max_context:
        raise RequestError(f"{model} has a context of {shape.config.max_context} tokens, not of "
                           f"{max(prompt, context)}")  # fmt: skip
    setup = shape.setup(dtype, quantize, kv_dtype, default_layout(found.platform))
    _check(setup, shape)
    return Plan(model, setup, found, chips, batch, prompt, context, output_tokens, slo_ttft, slo_tpot)


def _chips(on: str) -> tuple[Chip, int]:
    """`v5e` or `v5e-8`; a chip's own name may end in a number too (`a100-40`). Raises RequestError."""
    name, _, count = on.rpartition("-")
    for text, chips in ((on, 1), *([(name, int(count))] if name and count.isdigit() else [])):
        try:
            return chip(text), chips
        except RequestError as error:
            why = error
    raise RequestError(f"{why}; several as v5e-8")


def _check(setup: Setup, shape: Shape) -> None:
    """Raise RequestError for a policy that does not fit the model."""
    if shape.runs:
        quantized_specs(param_specs(shape.config, setup.dtype), setup.policy)
        return
    policy = setup.policy
    if shape.experts and shape.experts.stored_bits:  # what is published is known
        policy = Policy(tuple((pattern, None if kind == STORED else kind) for pattern, kind in policy.rules))
    specs: dict[str, Any] = {"layers": [{} for _ in range(shape.config.num_layers)]}
    for m in setup.matrices:
        where, _, name = m.name.removeprefix("layers.").partition(".")
        spec = ArraySpec((m.out, m.columns), (None, None), setup.dtype)
        (specs["layers"][int(where)] if name else specs)[name or where] = spec
    quantized_specs(specs, policy)
