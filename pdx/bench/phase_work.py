"""The two phases of a model as timed functions for `timing.interleaved`: each call runs one and returns its seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pdx import steps
from pdx.bench.timing import Timing, once
from pdx.cache.dense import DenseCache, init_cache
from pdx.generation.generator import PREFILL_CHUNK
from pdx.layers.kernels import layout_for
from pdx.sampling.options import SamplingOptions
from pdx.sampling.sampler import SamplingState
from pdx.weights.load import Model

DECODE_TOKENS = 32
DECODE_CONTEXT = 64


def prefill_work(
    model: Model,
    batch: int,
    tokens: int,
    kernels: str = "auto",
    *,
    chunk: int = PREFILL_CHUNK,
    kv_dtype=None,
    capacity: int | None = None,
) -> Callable[[], Timing]:
    """A timed function: prefill of `batch` prompts of `tokens` tokens into an empty cache; seconds of all chunks."""
    state = {"cache": _cache(model, batch, capacity or max(tokens, 256), kernels, kv_dtype)}
    chunk = min(tokens, chunk)
    ids = np.arange(batch * tokens, dtype=np.int32).reshape(batch, -1) % 1000 + 100

    def feed():
        for at in range(0, tokens, chunk):
            part = ids[:, at : at + chunk]
            logits, state["cache"] = steps.prefill(
                model.params,
                model.config,
                part,
                np.full(batch, part.shape[1], np.int32),
                state["cache"],
                kernels=kernels,
                check=False,
            )
        return logits

    def work() -> Timing:
        state["cache"] = _emptied(state["cache"])
        return once(feed)

    return work


def decode_work(
    model: Model, batch: int, kernels: str = "auto", options: SamplingOptions | None = None, capacity: int = 256
) -> Callable[[], Timing]:
    """A timed function: greedy (or sampled) decoding of `batch` rows after a prompt; seconds per step."""
    vocab = model.config.vocab_size
    state: dict[str, Any] = {
        "cache": _cache(model, batch, capacity, kernels),
        "sampling": SamplingState.create([options or SamplingOptions()] * batch, vocab, batch=batch),
    }
    ids = np.arange(batch * DECODE_CONTEXT, dtype=np.int32).reshape(batch, -1) % 1000 + 100

    def many():
        out = steps.decode_many(
            model.params,
            model.config,
            state["tokens"],
            state["cache"],
            state["sampling"],
            DECODE_TOKENS,
            kernels=kernels,
            check=False,
        )
        state["cache"], state["sampling"] = out.cache, out.sampling
        return out.tokens

    def work() -> Timing:
        lengths = np.full(batch, DECODE_CONTEXT, np.int32)
        logits, state["cache"] = steps.prefill(
            model.params, model.config, ids, lengths, _emptied(state["cache"]), kernels=kernels, check=False
        )
        state["tokens"] = jax.block_until_ready(jnp.argmax(logits, -1).astype(jnp.int32))
        return once(many).per(DECODE_TOKENS)

    return work


def _cache(model: Model, batch: int, capacity: int, kernels: str, kv_dtype=None) -> DenseCache:
    return init_cache(
        model.config,
        batch,
        capacity,
        chunk=PREFILL_CHUNK,
        dtype=kv_dtype or model.dtype,
        mesh=model.mesh,
        layout=layout_for(kernels),
    )


def _emptied(cache: DenseCache) -> DenseCache:
    return jax.block_until_ready(cache.truncate(np.zeros(cache.batch, np.int32)))
