"""What a phase costs, predicted: FLOPs and bytes by part, arithmetic intensity, what bounds it, and how long it takes
at least on a chip.

A step is two rooflines, one after the other: the products with weights, whose weights are read once for all rows, and
attention, whose keys and values belong to one row each. What a real step loses beside them (launches, norms, sampling)
is not in it: figures are floors, but on a chip that `pdx calibrate` measured, where they are estimates. Several chips
share weights, heads and cache evenly; what they tell one another is not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import jax.numpy as jnp

from pallas_kernels.hardware import Chip
from pdx.chips import MeasuredChip
from pdx.config import ModelConfig
from pdx.quant import Kind, Policy
from pdx.rates import Attention, Products, Work

Phase = Literal["prefill", "decode"]
# Of a chip's memory, for programs, temporaries and what is fragmented.
RESERVE = 0.05
SCALE_BYTES = 4
# Of a score that is kept in memory: written, read for the softmax, written as a probability and read again, in f32.
SCORE_BYTES = 16


@dataclass(frozen=True)
class Matrix:
    """One matrix of a model, [out, in]; `part` is what tables call the group it belongs to."""

    name: str
    part: str
    out: int
    columns: int

    @property
    def size(self) -> int:
        return self.out * self.columns


def matrices(cfg: ModelConfig) -> Iterator[Matrix]:
    """All matrices as `pdx.model.param_specs` declares them, the head too where it is tied to the embedding."""
    d, f, q, kv = cfg.d_model, cfg.d_ff, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    for i in range(cfg.num_layers):
        for name, out, columns in (("q_proj", q, d), ("k_proj", kv, d), ("v_proj", kv, d), ("o_proj", d, q)):
            yield Matrix(f"layers.{i}.{name}", "projections", out, columns)
        for name, out, columns in (("gate_proj", f, d), ("up_proj", f, d), ("down_proj", d, f)):
            yield Matrix(f"layers.{i}.{name}", "mlp", out, columns)
    yield Matrix("embed", "embedding", cfg.vocab_size, d)
    yield Matrix("lm_head", "head", cfg.vocab_size, d)


def _vectors(cfg: ModelConfig) -> tuple[int, int]:
    """Values of norms, which are f32, and of biases."""
    d, h = cfg.d_model, cfg.head_dim
    norms = cfg.num_layers * d * (4 if cfg.post_norms else 2) + d + (cfg.num_layers * 2 * h if cfg.qk_norm else 0)
    biases = (cfg.num_heads + 2 * cfg.num_kv_heads) * h if cfg.qkv_bias else 0
    biases += d if cfg.o_bias else 0
    biases += 2 * cfg.d_ff + d if cfg.mlp_bias else 0
    return norms, cfg.num_layers * biases


def matrix_bytes(matrix: Matrix, kind: Kind | None, dtype: str) -> int:
    """In memory, scales and offsets included."""
    if kind is None:
        return matrix.size * jnp.dtype(dtype).itemsize
    groups = matrix.columns // (kind.group_for(matrix.columns) or matrix.columns)
    return matrix.size * kind.bits // 8 + SCALE_BYTES * groups * matrix.out * (1 if kind.symmetric else 2)


def visible_pairs(new: int, held: int, window: int | None) -> int:
    """Pairs of a query and a key it sees: `new` queries behind `held` tokens, under a causal mask."""
    last = held + new
    if window is None or last <= window:
        return new * held + new * (new + 1) // 2
    short = max(0, window - 1 - held)  # queries that see all there is before their window is full
    short = min(short, new)
    return short * held + short * (short + 1) // 2 + (new - short) * window


@dataclass(frozen=True)
class Setup:
    """A model as it is stored and run: what every figure depends on beside the load.

    Attributes:
      dtype: of activations, and of weights that are not quantized.
      quantize: a policy of `pdx.quant`.
      kv_dtype: of the cache; None: dtype.
      flash: attention keeps its scores on the chip; without it, it computes those that the mask hides too, and writes
        and reads scores and probabilities in f32.
    """

    cfg: ModelConfig
    dtype: str = "bfloat16"
    quantize: str | Policy | None = None
    kv_dtype: str | None = None
    flash: bool = True

    @cached_property
    def policy(self) -> Policy:
        return Policy.parse(self.quantize).counted(self.cfg.num_layers)

    @cached_property
    def weights(self) -> dict[str, int]:
        """Bytes in memory by part. A head that is the embedding itself counts there."""
        found = dict.fromkeys(("embedding", "projections", "mlp", "head", "norms and biases"), 0)
        shared = self.cfg.tie_embeddings and self.policy.kind("lm_head") == self.policy.kind("embed")
        for m in matrices(self.cfg):
            if not (m.name == "lm_head" and shared):
                found[m.part] += matrix_bytes(m, self.policy.kind(m.name), self.dtype)
        norms, biases = _vectors(self.cfg)
        found["norms and biases"] = 4 * norms + biases * jnp.dtype(self.dtype).itemsize
        return found

    @property
    def kv_token_bytes(self) -> int:
        """Keys and values of one token in one layer, with their scales."""
        kind = jnp.dtype(self.kv_dtype or self.dtype)
        each = self.cfg.head_dim * kind.itemsize + (SCALE_BYTES if kind == jnp.int8 else 0)
        return 2 * self.cfg.num_kv_heads * each

    def cache_bytes(self, batch: int, context: int) -> int:
        """Keys and values of `batch` rows of `context` tokens; window layers hold no more than their window."""
        tokens = sum(min(context, w or context) for w in self.cfg.windows)
        return batch * tokens * self.kv_token_bytes

    def stored(self, name: str) -> str:
        """How a matrix is stored, as `pdx.rates` calls it."""
        kind = self.policy.kind(name)
        if kind is None:
            return self.dtype
        return "w8a8" if kind.activations == "int8" else f"int{kind.bits}"

    def multiplied(self, name: str) -> str:
        """The type in which the matrix units multiply a matrix's activations with it."""
        kind = self.policy.kind(name)
        return "int8" if kind is not None and kind.activations == "int8" else self.dtype

    def prefill(self, batch: int, prompt: int, held: int = 0) -> Cost:
        """`batch` prompts of `prompt` tokens behind `held` ones; the head for the last token alone."""
        return self._cost("prefill", [(prompt, held)] * batch, batch)

    def decode(self, batch: int, context: int) -> Cost:
        """One token a row, behind `context` - 1 others."""
        return self._cost("decode", [(1, context - 1)] * batch, batch)

    def verify(self, batch: int, context: int, draft: int) -> Cost:
        """`draft` + 1 tokens a row, all of them scored, the first behind `context` - 1 others."""
        return self._cost("decode", [(draft + 1, context - 1)] * batch, batch * (draft + 1))

    def _cost(self, phase: Phase, rows: Sequence[tuple[int, int]], kept: int) -> Cost:
        cfg, item = self.cfg, jnp.dtype(self.dtype).itemsize
        tokens = sum(new for new, _ in rows)
        flops: dict[str, dict[str, int]] = {}
        products: Counter[tuple[str, int, int]] = Counter()
        read, moved, width = 0, 0, 0
        for m in matrices(cfg):
            if m.part == "embedding":
                continue
            lines = kept if m.part == "head" else tokens
            by_dtype = flops.setdefault(m.part, {})
            dtype = self.multiplied(m.name)
            by_dtype[dtype] = by_dtype.get(dtype, 0) + 2 * lines * m.size
            read += matrix_bytes(m, self.policy.kind(m.name), self.dtype)
            moved += lines * (m.columns + m.out) * item
            width += 0 if m.part == "head" else m.columns + m.out
            products[self.stored(m.name), lines, m.size] += 1
        embed = Matrix("embed", "embedding", tokens, cfg.d_model)
        read += matrix_bytes(embed, self.policy.kind("embed"), self.dtype) + self.weights["norms and biases"]
        attention = list(self._attention(rows))
        flops["attention"] = {self.dtype: sum(a.flops for a in attention)}
        nbytes = {"weights": read, "kv read": sum(a.bytes for a in attention),
                  "kv written": tokens * cfg.num_layers * self.kv_token_bytes, "activations": moved}  # fmt: skip
        if not self.flash:
            nbytes["scores"] = SCORE_BYTES * sum(a.flops for a in attention) // (4 * cfg.head_dim)
        work = Work(tuple(Products(*which, count) for which, count in products.items()), tuple(attention),
                    cfg.num_layers, tokens, width // cfg.num_layers)  # fmt: skip
        return Cost(phase, len(rows), flops, nbytes, work)

    def _attention(self, rows: Sequence[tuple[int, int]]) -> Iterator[Attention]:
        """What attention reads and computes, layers and rows of a kind together."""
        cfg = self.cfg
        for (new, held), count in Counter(rows).items():
            for window, layers in Counter(cfg.windows).items():
                pairs = visible_pairs(new, held, window) if self.flash else new * (held + new)
                seen = min(held + new, window + new - 1 if window else held + new)
                yield Attention(
                    (self.kv_dtype or self.dtype) if self.flash else "not flash", layers, count, new, seen,
                    4 * pairs * count * layers * cfg.num_heads * cfg.head_dim,
                    seen * count * layers * self.kv_token_bytes,
                )  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What one step does: FLOPs of matrix products by part and by the type multiplied, bytes by part."""

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
        """FLOPs a byte."""
        return self.flops / self.bytes

    def parts(self, chip: Chip, chips: int = 1) -> dict[str, tuple[float, float]]:
        """Seconds of arithmetic and of memory traffic, of the products with weights and of attention."""
        compute = {"products": 0.0, "attention": 0.0}
        for part, types in self.flops_by_type.items():
            seconds = sum(flops / (chip.tflops(dtype) * 1e12) for dtype, flops in types.items())
            compute["attention" if part == "attention" else "products"] += seconds / chips
        cached = sum(self.bytes_by_part.get(part, 0) for part in ("kv read", "kv written", "scores"))
        rate = chip.hbm_gbps * 1e9 * chips
        return {"products": (compute["products"], (self.bytes - cached) / rate),
                "attention": (compute["attention"], cached / rate)}  # fmt: skip

    def floor(self, chip: Chip, chips: int = 1) -> float:
        """At least: each part is as fast as the slower of its arithmetic and its traffic."""
        return sum(max(pair) for pair in self.parts(chip, chips).values())

    def seconds(self, chip: Chip, chips: int = 1) -> float:
        """The floor; on one measured chip what the parts take at its rates, and the floor where it has none."""
        if not isinstance(chip, MeasuredChip) or chips > 1:
            return self.floor(chip, chips)
        floors = {part: max(pair) for part, pair in self.parts(chip).items()}
        measured = chip.rates.parts(self.work)
        return sum(floors.get(part, 0.0) if seconds is None else seconds for part, seconds in measured.items())

    def bound(self, chip: Chip) -> Literal["compute", "memory"]:
        """What most of that time is spent on."""
        pairs = self.parts(chip).values()
        compute = sum(a for a, b in pairs if a >= b)
        return "compute" if compute >= sum(b for a, b in pairs if b > a) else "memory"


def critical_batch(setup: Setup, chip: Chip) -> float:
    """Rows from which on the products of a decode step take longer to compute than their weights to read:
    peak / bandwidth x bytes a weight / 2. Activations, which mostly stay on the chip, are left out."""
    one = setup.decode(1, 1)
    return one.bytes_by_part["weights"] / (chip.hbm_gbps * 1e9) / one.parts(chip)["products"][0]


def room(setup: Setup, chip: Chip, chips: int = 1) -> int:
    """Bytes for caches on `chips` chips beside the weights; negative where not even these fit."""
    return int(chip.hbm_bytes * (1 - RESERVE)) * chips - sum(setup.weights.values())


def largest_batch(setup: Setup, chip: Chip, context: int, chips: int = 1) -> int:
    """Rows of `context` tokens that fit, 0 if none does."""
    return max(0, room(setup, chip, chips) // setup.cache_bytes(1, context))


def largest_context(setup: Setup, chip: Chip, batch: int, chips: int = 1) -> int:
    """Tokens a row that fit for `batch` rows, up to the model's own context."""
    low, high, left = 0, setup.cfg.max_context, room(setup, chip, chips)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if setup.cache_bytes(batch, middle) <= left else (low, middle - 1)
    return low


def best_batch(setup: Setup, chip: Chip, context: int, tpot: float, chips: int = 1) -> int:
    """The most rows that fit and decode a token within `tpot` seconds, 0 if not even one."""
    low, high = 0, largest_batch(setup, chip, context, chips)
    while low < high:
        middle = (low + high + 1) // 2
        ok = setup.decode(middle, context).seconds(chip, chips) <= tpot
        low, high = (middle, high) if ok else (low, middle - 1)
    return low


def speculation(acceptance: float, draft: int, draft_cost: float, verify_cost: float = 1.0) -> float:
    """Speed of speculative decoding over plain decoding.

    Args:
      acceptance: probability that a drafted token is accepted, each by itself.
      draft: tokens drafted a round.
      draft_cost, verify_cost: of one drafted token and of a verification, in decode steps.
    """
    tokens = draft + 1 if acceptance == 1 else (1 - acceptance ** (draft + 1)) / (1 - acceptance)
    return tokens / (draft * draft_cost + verify_cost)


def break_even(draft: int, draft_cost: float, verify_cost: float = 1.0) -> float | None:
    """The acceptance from which on speculation pays, None if it never does."""
    if speculation(1.0, draft, draft_cost, verify_cost) <= 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if speculation(middle, draft, draft_cost, verify_cost) >= 1 else (middle, high)
    return high


def verify_cost(setup: Setup, chip: Chip, batch: int, context: int, draft: int, chips: int = 1) -> float:
    """A verification of `draft` + 1 tokens a row in decode steps."""
    return setup.verify(batch, context, draft).seconds(chip, chips) / setup.decode(batch, context).seconds(chip, chips)


def end_to_end(ttft: float, tpot: float, tokens: int) -> float:
    """E2E = TTFT + (n - 1) TPOT."""
    return ttft + (tokens - 1) * tpot
