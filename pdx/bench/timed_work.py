"""One model under a load, to be timed and predicted alike: what the calibration and the rows of the report run."""

from __future__ import annotations

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
from pdx.cost import Cost, Phase, Setup
from pdx.cost.chips import MeasuredChip
from pdx.generation.generator import PREFILL_CHUNK
from pdx.layers.kernels import layout_for
from pdx.sampling.options import SamplingOptions
from pdx.sampling.sampler import SamplingState

DECODE_TOKENS = 8  # steps of one timed run


@dataclass(frozen=True)
class TimedWork:
    """A step under a load: how to time it, and what it costs.

    Attributes:
      label: the load in words.
      work: a contestant of `timing.interleaved`; seconds of one step.
      tokens: that a step takes or makes, all rows together.
      setup, load: the cost model's view of it; `load` gives the calls that one run is made of.
    """

    label: str
    phase: Phase
    work: Callable[[], Timing]
    tokens: float
    setup: Setup
    load: Callable[[Setup], list[Cost]]

    def costs(self, dtype: str | None = None) -> list[Cost]:
        """In the setup's own type, or as the model would be run in `dtype`."""
        kv = self.setup.kv_dtype if self.setup.kv_dtype != self.setup.dtype else None
        return self.load(replace(self.setup, dtype=dtype, kv_dtype=kv) if dtype else self.setup)

    def seconds(self, chip: Chip) -> float:
        """Predicted: of a measured chip in the type that was run, of a published one in the type it is made for."""
        dtype = None if isinstance(chip, MeasuredChip) else "bfloat16" if chip.bf16_tflops else "float16"
        return sum(cost.seconds(chip) for cost in self.costs(dtype))

    def floor(self, chip: Chip) -> float:
        """What it takes at least at a chip's peaks, in the type that was run."""
        return sum(cost.floor(chip) for cost in self.costs())


@dataclass(frozen=True)
class ModelUnderTest:
    """A model on this device as it is stored and run; `params` may be quantized, which `quantize` says.

    `kernels` is that of the steps; with `dense`, attention is the reference, all scores in memory.
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
        """`batch` prompts of `tokens` tokens into an empty cache, `chunk` at a time: TTFT, but for sampling."""
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
        """The last and longest `chunk` tokens of a prompt of `tokens`, behind the others."""
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
        """Greedy steps of `batch` rows that hold `context` tokens in the end: TPOT."""
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
        """The scoring of `draft` + 1 tokens a row behind `context`."""
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


def token_ids(cfg: ModelConfig, batch: int, tokens: int) -> np.ndarray:
    """Token ids of any text: what a step costs does not depend on them."""
    return (np.arange(batch * tokens, dtype=np.int32).reshape(batch, tokens) * 7 + 100) % cfg.vocab_size


def filled(cache: DenseCache, held: int) -> DenseCache:
    """The cache as if its rows held `held` tokens, all alike: what attention over them costs is the same."""
    layers = jax.tree.map(lambda x: jnp.full_like(x, 1 if jnp.issubdtype(x.dtype, jnp.integer) else 0.01), cache.layers)
    return set_held(cache.replace(layers=layers), held)


def set_held(cache: DenseCache, held: int) -> DenseCache:
    """The cache with rows that hold `held` of the tokens that were in it."""
    lengths = jnp.full((cache.batch,), held, jnp.int32)
    return jax.block_until_ready(cache.replace(lengths=lengths, written=lengths + 0))
