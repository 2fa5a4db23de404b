"""A model's step under a load, which can be timed and predicted. Used by the calibration and the report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.hardware import Chip
from pdx import steps
from pdx.bench.timing import Timing, once
from pdx.cache.dense import DenseCache, init_cache
from pdx.config import ModelConfig
from pdx.cost import Cost, Phase, Setup, tradeoffs
from pdx.cost.chips import MeasuredChip
from pdx.generation.generator import PREFILL_CHUNK
from pdx.layers.kernels import as_kernels, layout_for
from pdx.sampling.options import SamplingOptions
from pdx.sampling.sampler import SamplingState
from pdx.speculative.lengths import always
from pdx.speculative.proposers import Synthetic
from pdx.speculative.rounds import Drafter, SpeculationState, speculate_many

DECODE_TOKENS = 8  # steps of one timed run


@dataclass(frozen=True)
class TimedWork:
    """A step under a load: how to time it, and its cost.

    Attributes:
      label: a description of the load.
      work: a timed function for `timing.interleaved`; seconds of one step.
      tokens: that a step reads or generates, of all rows.
      setup: the setup for the cost model.
      load: setup -> the costs of the calls in one run.
    """

    label: str
    phase: Phase
    work: Callable[[], Timing]
    tokens: float
    setup: Setup
    load: Callable[[Setup], list[Cost]]

    def costs(self, dtype: str | None = None) -> list[Cost]:
        """The costs of one run, in the setup's own type or in `dtype`."""
        kv = self.setup.kv_dtype if self.setup.kv_dtype != self.setup.dtype else None
        return self.load(replace(self.setup, dtype=dtype, kv_dtype=kv) if dtype else self.setup)

    def seconds(self, chip: Chip) -> float:
        """Predicted seconds: for a measured chip in the setup's type, for a published one in bf16 or, if it lacks that,
        f16."""
        dtype = None if isinstance(chip, MeasuredChip) else "bfloat16" if chip.bf16_tflops else "float16"
        return sum(cost.seconds(chip) for cost in self.costs(dtype))

    def floor(self, chip: Chip) -> float:
        """The least seconds at a chip's peaks, in the setup's type."""
        return sum(cost.floor(chip) for cost in self.costs())


@dataclass(frozen=True)
class ModelUnderTest:
    """A model on this device, with its quantization, cache type and kernels.

    `quantize` must describe how `params` are quantized. With `kernels="dense"`, attention is the dense reference.
    """

    cfg: ModelConfig
    params: Any
    dtype: Any
    quantize: str | None = None
    kv_dtype: Any = None
    kernels: str = "auto"

    @property
    def setup(self) -> Setup:
        kv = None if self.kv_dtype is None else str(jnp.dtype(self.kv_dtype))
        return Setup(self.cfg, str(jnp.dtype(self.dtype)), self.quantize, kv, flash=self.kernels != "dense")

    def cache(self, batch: int, capacity: int, held: int = 0, chunk: int = PREFILL_CHUNK) -> DenseCache:
        """A cache of this setup whose rows hold `held` tokens."""
        dtype = self.kv_dtype or self.dtype
        cache = init_cache(self.cfg, batch, capacity, chunk=chunk, dtype=dtype, layout=layout_for(self.kernels))
        return filled(cache, held) if held else cache

    def prefill(self, batch: int, tokens: int, chunk: int = PREFILL_CHUNK, capacity: int | None = None) -> TimedWork:
        """Prefill of `batch` prompts of `tokens` tokens into an empty cache, in chunks: TTFT without sampling."""
        chunk = min(chunk, tokens)
        state = {"cache": self.cache(batch, capacity or tokens, chunk=chunk)}
        ids = token_ids(self.cfg, batch, tokens)

        def feed():
            for at in range(0, tokens, chunk):
                part = ids[:, at : at + chunk]
                logits, state["cache"] = steps.prefill(
                    self.params,
                    self.cfg,
                    part,
                    np.full(batch, part.shape[1]),
                    state["cache"],
                    kernels=self.kernels,
                    check=False,
                )
            return logits

        def work() -> Timing:
            state["cache"] = jax.block_until_ready(state["cache"].truncate(np.zeros(batch, np.int32)))
            return once(feed)

        def load(setup: Setup) -> list[Cost]:
            return [setup.prefill(batch, min(chunk, tokens - at), at) for at in range(0, tokens, chunk)]

        label = f"{batch} x {tokens} tokens" if batch > 1 else f"{tokens} tokens"
        return TimedWork(label, "prefill", work, batch * tokens, self.setup, load)

    def last_chunk(self, tokens: int, chunk: int) -> TimedWork:
        """Prefill of the last `chunk` tokens of a prompt of `tokens`: its longest step."""
        held = tokens - chunk
        state = {"cache": self.cache(1, tokens, held, chunk)}
        ids = token_ids(self.cfg, 1, chunk)

        def feed():
            logits, state["cache"] = steps.prefill(
                self.params, self.cfg, ids, np.full(1, chunk), state["cache"], kernels=self.kernels, check=False
            )
            return logits

        def work() -> Timing:
            state["cache"] = set_held(state["cache"], held)
            return once(feed)

        return TimedWork(
            f"{chunk} of {tokens} tokens",
            "prefill",
            work,
            chunk,
            self.setup,
            lambda setup: [setup.prefill(1, chunk, held)],
        )

    def decode(self, batch: int, context: int, tokens: int = DECODE_TOKENS) -> TimedWork:
        """Greedy decode steps of `batch` rows that hold `context` tokens at the end: TPOT."""
        begin = context - tokens
        sampling = SamplingState.create([SamplingOptions()] * batch, self.cfg.vocab_size, batch=batch)
        state = {"cache": self.cache(batch, context, begin), "sampling": sampling}
        first = jnp.asarray(token_ids(self.cfg, batch, 1)[:, 0])

        def many():
            out = steps.decode_many(
                self.params,
                self.cfg,
                first,
                state["cache"],
                state["sampling"],
                tokens,
                kernels=self.kernels,
                check=False,
            )
            state["cache"], state["sampling"] = out.cache, out.sampling
            return out.tokens

        def work() -> Timing:
            state["cache"] = set_held(state["cache"], begin)
            return once(many).per(tokens)

        return TimedWork(
            f"batch {batch}, context {context}",
            "decode",
            work,
            batch,
            self.setup,
            lambda setup: [setup.decode(batch, context - tokens // 2)],
        )

    def verify(self, batch: int, context: int, draft: int) -> TimedWork:
        """Verification of `draft` + 1 tokens per row after `context` tokens."""
        width = draft + 1
        state = {"cache": self.cache(batch, context + width, context)}
        ids = token_ids(self.cfg, batch, width)

        def score():
            logits, state["cache"] = steps.verify(
                self.params, self.cfg, ids, np.full(batch, width), state["cache"], kernels=self.kernels, check=False
            )
            return logits

        def work() -> Timing:
            state["cache"] = set_held(state["cache"], context)
            return once(score)

        return TimedWork(
            f"batch {batch}, context {context}, {width} tokens",
            "decode",
            work,
            batch * width,
            self.setup,
            lambda setup: [setup.verify(batch, context + 1, draft)],
        )

    def speculate(self, batch: int, context: int, draft: int, acceptance: float) -> TimedWork:
        """Rounds of speculation behind `context` tokens a row, whose drafts cost nothing and are kept by chance.

        The seconds are those of a round that emits as many tokens as the acceptance promises.
        """
        emitted, n = tradeoffs.tokens_per_round(acceptance, draft), 2 * DECODE_TOKENS
        proposer, (levels, costs) = Synthetic(acceptance), always(draft)
        begin, capacity = context - n, context + draft
        options = [SamplingOptions(seed=row) for row in range(batch)]
        state = {
            "cache": self.cache(batch, capacity, begin),
            "sampling": SamplingState.create(options, self.cfg.vocab_size),
        }

        def work() -> Timing:
            cache = set_held(state["cache"], begin)
            told = SpeculationState.create([[1] * (begin + 1)] * batch, batch, capacity, proposer)
            start = time.perf_counter()
            out = speculate_many(
                self.params,
                self.cfg,
                cache,
                state["sampling"],
                told,
                n,
                limits=np.full(batch, n, np.int32),
                drafter=Drafter(proposer, levels),
                costs=costs,
                kernels=as_kernels(self.kernels),
            )
            counts = np.asarray(out.counts)
            seconds = time.perf_counter() - start
            state["cache"], state["sampling"] = out.cache, out.sampling
            return Timing((seconds / counts.mean() * emitted,))

        return TimedWork(
            f"batch {batch}, context {context}, drafts of {draft} kept with {acceptance:.0%} each (made up, free)",
            "decode",
            work,
            batch * emitted,
            self.setup,
            lambda setup: [setup.verify(batch, context - n // 2, draft)],
        )


def token_ids(cfg: ModelConfig, batch: int, tokens: int) -> np.ndarray:
    """Arbitrary token ids [batch, tokens]; the cost of a step does not depend on them."""
    return (np.arange(batch * tokens, dtype=np.int32).reshape(batch, tokens) * 7 + 100) % cfg.vocab_size


def filled(cache: DenseCache, held: int) -> DenseCache:
    """The cache with `held` equal tokens in each row; the cost of attention does not depend on their values."""
    layers = jax.tree.map(lambda x: jnp.full_like(x, 1 if jnp.issubdtype(x.dtype, jnp.integer) else 0.01), cache.layers)
    return set_held(cache.replace(layers=layers), held)


def set_held(cache: DenseCache, held: int) -> DenseCache:
    """The cache with each row's length set to `held`, without clearing its content."""
    return jax.block_until_ready(cache.holding(held))
