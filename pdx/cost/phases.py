"""The predicted cost of a phase: FLOPs and bytes by part, arithmetic intensity, bound, and the least time on a chip.

A step is two rooflines, one after the other: the products, whose weights are read once for all rows, and attention,
whose keys and values belong to one row each. Launches, norms and sampling are not counted, so times are floors; on a
chip that `pdx calibrate` measured they are estimates. Several chips share weights, heads and cache evenly; their
communication is not counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import jax.numpy as jnp

from pallas_kernels.hardware import Chip
from pallas_kernels.layouts import SUBLANES, Layout, folded_width
from pdx.config import ModelConfig
from pdx.cost.chips import MeasuredChip
from pdx.cost.measured_rates import Attention, Products, Work
from pdx.cost.model_matrices import PARTS, SCALE_BYTES, Matrix, matrices, vectors
from pdx.cost.planned_layers import Experts, Latent, planned_specs
from pdx.quant import Kind, Policy
from pdx.shapes import DEFAULT_CHUNK, layer_slots, round_up

Phase = Literal["prefill", "decode", "mixed"]
# Traffic of one f32 score kept in memory: written, read for the softmax, written as a probability, and read again.
SCORE_BYTES = 16


def visible_pairs(new: int, held: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees: `new` queries after `held` tokens, under a causal mask."""
    last = held + new
    if window is None or last <= window:
        return new * held + new * (new + 1) // 2
    short = max(0, window - 1 - held)  # queries whose window is not yet full
    short = min(short, new)
    return short * held + short * (short + 1) // 2 + (new - short) * window


@dataclass
class Part:
    """Per-token cost of a group of matrices: FLOPs by operand dtype, values read and written, and its weight bytes."""

    flops: Counter = field(default_factory=Counter)
    numbers: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Setup:
    """A model and how it is stored and run: everything but the load.

    Attributes:
      dtype: of activations, and of weights that are not quantized.
      quantize: a policy of `pdx.quant`; `stored` means experts as published and the rest in dtype.
      kv_dtype: of the cache; None: dtype.
      layout: of the cache. `folded` (on a TPU) rounds a token's heads up to whole lanes of 128, and those of int8's
        scales to 8; None: nothing is rounded.
      experts, latent: layers that `cfg` cannot describe, see `pdx.cost.planned_layers`; None: those of `pdx.model`.
      flash: attention keeps its scores on the chip. Otherwise it also computes masked scores, and writes and reads
        scores and probabilities in f32.
    """

    cfg: ModelConfig
    dtype: str = "bfloat16"
    quantize: str | Policy | None = None
    kv_dtype: str | None = None
    layout: Layout | None = None
    experts: Experts | None = None
    latent: Latent | None = None
    flash: bool = True

    @cached_property
    def policy(self) -> Policy:
        return Policy.parse(self.quantize).resolve_layers(self.cfg.num_layers)

    @cached_property
    def specs(self) -> dict:
        """The parameters' declarations, in floats."""
        return planned_specs(self.cfg, self.dtype, self.experts, self.latent)

    @cached_property
    def matrices(self) -> dict[Matrix, Kind | None]:
        """All matrices, and how each is stored."""
        return {m: self.policy.kind(m.name) for m in matrices(self.specs, self.experts)}

    @cached_property
    def weights(self) -> dict[str, int]:
        """Bytes in memory by part. A head that is tied to the embedding counts as embedding."""
        found = dict.fromkeys((*PARTS, "norms and biases"), 0)
        shared = self.cfg.tie_embeddings and self.policy.kind("lm_head") == self.policy.kind("embed")
        for m, kind in self.matrices.items():
            if not (m.name == "lm_head" and shared):
                found[m.part] += m.bytes(kind, self.dtype)
        found["norms and biases"] = sum(spec.size_bytes for spec in vectors(self.specs))
        return found

    @property
    def parameters(self) -> tuple[int, int]:
        """Parameters in all, and active ones per token (a lookup has none); a tied head counts once."""
        every = sum(m.size for m in self.matrices if not (m.name == "lm_head" and self.cfg.tie_embeddings))
        every += sum(math.prod(spec.shape) for spec in vectors(self.specs))
        return every, sum(m.active for m in self.matrices if m.part != "embedding")

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of keys and values of one token in one layer, with their scales."""
        kind, heads = jnp.dtype(self.kv_dtype or self.dtype), self.cfg.num_kv_heads
        scale = SCALE_BYTES if kind == jnp.int8 else 0
        if self.latent:
            return self.latent.cached * kind.itemsize + scale
        if self.layout == "folded":
            return 2 * (folded_width(heads, self.cfg.head_dim) * kind.itemsize + round_up(heads, SUBLANES) * scale)
        return 2 * heads * (self.cfg.head_dim * kind.itemsize + scale)

    def cache_bytes(self, batch: int, context: int) -> int:
        """Bytes of keys and values of `batch` rows of `context` tokens; window layers hold their window and a chunk."""
        slots = sum(layer_slots(w, context, DEFAULT_CHUNK) for w in self.cfg.windows)
        return batch * slots * self.kv_token_bytes

    def prefill(self, batch: int, prompt: int, held: int = 0) -> Cost:
        """`batch` prompts of `prompt` tokens after `held` ones; the head only for the last token of each."""
        return self._cost("prefill", [(prompt, held)] * batch)

    def decode(self, batch: int, context: int) -> Cost:
        """One token per row, after `context` - 1 others."""
        return self._cost("decode", [(1, context - 1)] * batch)

    def verify(self, batch: int, context: int, draft: int) -> Cost:
        """`draft` + 1 tokens per row, the first after `context` - 1 others; the head for all of them."""
        return self._cost("decode", [(draft + 1, context - 1)] * batch, batch * (draft + 1))

    def mixed(self, rows: Sequence[tuple[int, int]]) -> Cost:
        """One step over rows of (new, held) tokens: decode rows (1, held) and prompt chunks. Weights are read once for
        all. Sarathi-Serve, arXiv 2403.02310."""
        return self._cost("mixed", rows)

    @cached_property
    def _parts(self) -> dict[str, Part]:
        found: dict[str, Part] = {}
        for m, kind in self.matrices.items():
            if m.part == "embedding":
                continue
            part = found.setdefault(m.part, Part())
            # The operand type of the matrix unit: int8 if the activations are quantized too.
            multiplied = "int8" if kind is not None and kind.activations == "int8" else self.dtype
            part.flops[multiplied] += 2 * m.active
            if kind is not None and not kind.symmetric:  # offsets times the sums of each group's activations
                part.flops["float32"] += 2 * m.out * m.groups(kind) * m.used
            part.numbers += (m.columns + m.out) * m.used
            part.bytes += m.bytes(kind, self.dtype)
        return found

    @cached_property
    def _products(self) -> Counter[tuple[str, str, int]]:
        """The number of matrices by part, storage type (as in `pdx.cost.measured_rates`) and size."""
        return Counter(
            (m.part, _stored(kind, self.dtype), m.size) for m, kind in self.matrices.items() if m.part != "embedding"
        )

    def streamed(self, tokens: float) -> int:
        """Bytes of weights that a step of `tokens` tokens reads, without lookups; of the experts, those expected to be
        picked."""
        share = self.experts.read(tokens) if self.experts else 1
        return self.weights["norms and biases"] + sum(
            round(part.bytes * share) if name == "experts" else part.bytes for name, part in self._parts.items()
        )

    @property
    def _attended(self) -> str:
        """The type in which attention multiplies: the wider of activations and cache; an int8 cache is widened."""
        cached = self.dtype if self.kv_dtype in (None, "int8") else self.kv_dtype
        return str(jnp.promote_types(self.dtype, cached))

    def _attention_flops(self, new: int, held: int, window: int | None) -> int:
        pairs = visible_pairs(new, held, window) if self.flash else new * (held + new)
        if self.latent:
            return self.latent.attention_flops(self.cfg.num_heads, pairs, held)
        return 4 * pairs * self.cfg.num_heads * self.cfg.head_dim

    def _cost(self, phase: Phase, rows: Sequence[tuple[int, int]], kept: int | None = None) -> Cost:
        """A step over rows of (new, held) tokens that keeps `kept` rows of logits (None: one per row)."""
        cfg = self.cfg
        tokens, kept = sum(new for new, _ in rows), len(rows) if kept is None else kept
        lines = {name: kept if name == "head" else tokens for name in self._parts}
        flops = {
            name: {dtype: n * lines[name] for dtype, n in part.flops.items()} for name, part in self._parts.items()
        }
        moved = sum(part.numbers * lines[name] for name, part in self._parts.items())
        attention = tuple(self._attention(rows))
        flops["attention"] = {self._attended: sum(a.flops for a in attention)}
        lookups = Matrix("embed", "embedding", tokens, cfg.d_model).bytes(self.policy.kind("embed"), self.dtype)
        nbytes = {
            "weights": self.streamed(tokens) + lookups,
            "kv read": sum(a.bytes for a in attention),
            "kv written": tokens * cfg.num_layers * self.kv_token_bytes,
            "activations": moved * jnp.dtype(self.dtype).itemsize,
        }
        if not self.flash:
            nbytes["scores"] = SCORE_BYTES * flops["attention"][self._attended] // (4 * cfg.head_dim)
        products = tuple(
            Products(stored, lines[part], size, count) for (part, stored, size), count in self._products.items()
        )
        width = sum(part.numbers for name, part in self._parts.items() if name != "head") // cfg.num_layers
        return Cost(phase, len(rows), flops, nbytes, Work(products, attention, cfg.num_layers, tokens, width))

    def _attention(self, rows: Sequence[tuple[int, int]]) -> Iterator[Attention]:
        """The attention of the step, with equal layers and rows counted together."""
        cached = (self.kv_dtype or self.dtype) if self.flash else "not flash"
        for (new, held), count in Counter(rows).items():
            for window, layers in Counter(self.cfg.windows).items():
                seen = min(held + new, window + new - 1 if window else held + new)
                flops = count * layers * self._attention_flops(new, held, window)
                yield Attention(cached, layers, count, new, seen, flops, seen * count * layers * self.kv_token_bytes)


def _stored(kind: Kind | None, dtype: str) -> str:
    if kind is None:
        return dtype
    return "w8a8" if kind.activations == "int8" else f"int{kind.bits}"


@dataclass(frozen=True)
class Cost:
    """What one step does: FLOPs of matrix products by part and operand dtype, bytes by part."""

    phase: Phase
    rows: int
    flops_by_type: Mapping[str, Mapping[str, int]]
    bytes_by_part: Mapping[str, int]
    work: Work = field(compare=False, repr=False)

    @property
    def flops_by_part(self) -> dict[str, int]:
        return {part: sum(types.values()) for part, types in self.flops_by_type.items()}

    @property
    def flops(self) -> int:
        return sum(self.flops_by_part.values())

    @property
    def bytes(self) -> int:
        return sum(self.bytes_by_part.values())

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes

    def parts(self, chip: Chip, chips: int = 1) -> dict[str, tuple[float, float]]:
        """Seconds of arithmetic and of memory traffic, of the products with weights and of attention."""
        compute = {"products": 0.0, "attention": 0.0}
        for part, types in self.flops_by_type.items():
            seconds = sum(flops / (chip.tflops(dtype) * 1e12) for dtype, flops in types.items())
            compute["attention" if part == "attention" else "products"] += seconds / chips
        cached = sum(self.bytes_by_part.get(part, 0) for part in ("kv read", "kv written", "scores"))
        rate = chip.hbm_gbps * 1e9 * chips
        return {
            "products": (compute["products"], (self.bytes - cached) / rate),
            "attention": (compute["attention"], cached / rate),
        }

    def floor(self, chip: Chip, chips: int = 1) -> float:
        """The least seconds: each part takes the longer of its arithmetic and its traffic."""
        return sum(max(pair) for pair in self.parts(chip, chips).values())

    def seconds_by_part(self, chip: Chip, chips: int = 1) -> dict[str, float]:
        """The floor of each part. On one measured chip: what it takes at its measured rate, if it has one."""
        floors = {part: max(pair) for part, pair in self.parts(chip, chips).items()}
        if not isinstance(chip, MeasuredChip) or chips > 1:
            return floors
        measured = chip.rates.parts(self.work)
        return {part: floors.get(part, 0.0) if seconds is None else seconds for part, seconds in measured.items()}

    def seconds(self, chip: Chip, chips: int = 1) -> float:
        """The floor. On one measured chip: each part at its measured rate, or its floor if it has none."""
        return sum(self.seconds_by_part(chip, chips).values())

    def shares(self, chip: Chip, chips: int = 1) -> tuple[float, float]:
        """The shares of peak and of bandwidth that the step reaches if it takes `seconds`."""
        compute, memory = (sum(x) for x in zip(*self.parts(chip, chips).values(), strict=True))
        return compute / self.seconds(chip, chips), memory / self.seconds(chip, chips)

    def bound(self, chip: Chip) -> Literal["compute", "memory"]:
        """What most of the time is spent on."""
        pairs = self.parts(chip).values()
        compute = sum(a for a, b in pairs if a >= b)
        return "compute" if compute >= sum(b for a, b in pairs if b > a) else "memory"
