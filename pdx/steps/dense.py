"""Steps over a dense cache: `prefill`, `decode_step`, `decode_many` and `verify`."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pdx.arguments import integer
from pdx.cache.dense import DenseCache
from pdx.cache.given import check_alive
from pdx.config import ModelConfig
from pdx.errors import RequestError
from pdx.layers.kernels import Kernels, as_kernels
from pdx.meshes import check_mesh, on_own_mesh
from pdx.model import Params, forward
from pdx.sampling.sampler import SampleOutput, SamplingState, sample
from pdx.sharding import ArraySpec, constrain, constrain_rows, place_rows
from pdx.steps.arguments import chunk, newest


@on_own_mesh
def prefill(
    params: Params,
    cfg: ModelConfig,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    cache: DenseCache,
    *,
    kernels: Kernels = "auto",
    check: bool = True,
) -> tuple[Float[Array, "B V"], DenseCache]:
    """Append the first `lengths` tokens of each row after those it holds; compute-bound.

    A longer prompt is prefilled in chunks: call this again. A row of length 0 is untouched and its logits mean
    nothing. The cache given is donated: use the one returned.

    Args:
      check: check the values on the host: that the tokens fit and are in the vocabulary. This waits for the cache, so
        callers that count themselves switch it off. Unchecked, or under an outer `jit`, a row that overflows gets NaN
        logits; it is never cut short silently.

    Returns:
      Logits of the last new token of each row, f32, and the cache.

    Raises:
      ContextLengthError: a row has no room for its tokens.
      ValueError: T is larger than the cache's chunk, or a length is not one of 0 to T.
      RequestError: another shape or type (a list is taken), or with `check` a token outside the vocabulary.
      DonatedError: a cache that was given to an earlier step.

    Example:
      >>> cache = pdx.init_cache(cfg, batch=2, capacity=128)
      >>> logits, cache = pdx.prefill(params, cfg, tokens, lengths, cache)
      >>> logits.shape, cache.lengths.tolist()
      ((2, 64), [3, 2])
    """
    tokens, lengths = chunk(cfg, cache, tokens, lengths, check)
    check_mesh(params["final_norm"], cache.mesh)
    return _prefill(params, cfg, tokens, jnp.asarray(lengths, jnp.int32), cache, as_kernels(kernels))


@on_own_mesh
def decode_step(
    params: Params,
    cfg: ModelConfig,
    tokens: Int[Array, " B"],
    active: Bool[Array, " B"],
    cache: DenseCache,
    *,
    kernels: Kernels = "auto",
    check: bool = True,
) -> tuple[Float[Array, "B V"], DenseCache]:
    """Append one token to each active row; bound by reading the weights and the cache.

    Inactive rows neither grow nor are read; their logits mean nothing. See `prefill` for the rest.

    Example:
      >>> cache = pdx.init_cache(cfg, batch=2, capacity=128)
      >>> logits, cache = pdx.prefill(params, cfg, tokens, lengths, cache)
      >>> logits, cache = pdx.decode_step(params, cfg, logits.argmax(-1), jnp.array([True, False]), cache)
      >>> cache.lengths.tolist()
      [4, 2]
    """
    tokens, active = newest(cfg, cache, tokens, active, check)
    check_mesh(params["final_norm"], cache.mesh)
    return _decode_step(params, cfg, tokens, jnp.asarray(active), cache, as_kernels(kernels))


@struct.dataclass
class Decoded:
    """What `decode_many` returns: n tokens per row, and everything needed to go on."""

    # -1 (`NO_TOKEN`) where the logits were NaN or infinite: the model overflowed, or the cache was full (which `check`
    # refuses). Later tokens of such a row mean nothing.
    tokens: Int[Array, "B n"]
    logprobs: Float[Array, "B n"]
    top_ids: Int[Array, "B n m"]
    top_logprobs: Float[Array, "B n m"]
    last: Int[Array, " B"]  # the newest token of each row, not in the cache yet
    sampling: SamplingState
    cache: DenseCache


@on_own_mesh
def decode_many(
    params: Params,
    cfg: ModelConfig,
    tokens: Int[Array, " B"],
    cache: DenseCache,
    sampling: SamplingState,
    n: int,
    *,
    active: Bool[Array, " B"] | None = None,
    steps: int | Int[Array, ""] | None = None,
    num_logprobs: int = 0,
    kernels: Kernels = "auto",
    check: bool = True,
) -> Decoded:
    """Decode and sample n tokens per row in one program: tokens stay on the device between steps.

    Args:
      tokens: the newest token of each row, not in the cache yet.
      sampling: settings and counts of each row; donated, like the cache.
      n: static length of the result.
      steps: how many of the n to run; another value compiles nothing. The columns after it are 0. None: all.
      active: rows that take part; the others keep their token. None: all.
      num_logprobs: how many of the best alternatives to report for each token (static).

    Raises:
      ContextLengthError: as `prefill`, for n (or `steps`) more tokens.

    Example:
      >>> cache = pdx.init_cache(cfg, batch=2, capacity=128)
      >>> logits, cache = pdx.prefill(params, cfg, tokens, lengths, cache)
      >>> sampling = pdx.SamplingState.create([pdx.SamplingOptions()] * 2, cfg.vocab_size)  # greedy
      >>> out = pdx.decode_many(params, cfg, logits.argmax(-1), cache, sampling, n=4)
      >>> out.tokens.shape, out.cache.lengths.tolist()
      ((2, 4), [7, 6])
    """
    n = integer("n", n, 1)
    num_logprobs = integer("num_logprobs", num_logprobs, 0)
    if not isinstance(steps, jax.Array):
        steps = n if steps is None else integer("steps", steps, 0)
    everyone = active is None and isinstance(cache, DenseCache)
    tokens, active = newest(cfg, cache, tokens, np.ones(cache.batch, bool) if everyone else active, check, steps)
    check_mesh(params["final_norm"], cache.mesh)
    if not isinstance(sampling, SamplingState):
        raise RequestError(f"sampling is {type(sampling).__name__}: it must be what SamplingState.create returns")
    check_alive(sampling, "sampling state")
    steps = jnp.asarray(steps, jnp.int32)
    sampling = place_rows(sampling, cache.mesh)  # as the program returns it, so that the next call does not recompile
    active, kernels = jnp.asarray(active), as_kernels(kernels)
    return _decode_many(params, cfg, tokens, cache, sampling, n, active, steps, num_logprobs, kernels)


@on_own_mesh
def verify(
    params: Params,
    cfg: ModelConfig,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    cache: DenseCache,
    *,
    kernels: Kernels = "auto",
    check: bool = True,
) -> tuple[Float[Array, "B T V"], DenseCache]:
    """Append a draft and score each of its tokens. `cache.truncate(keep_lengths)` then drops what was rejected.

    `tokens` are the newest token and G drafted ones (T = G + 1); logits [:, i] predict the token after token i.
    See `prefill` for the rest.

    Example:
      >>> cache = pdx.init_cache(cfg, batch=2, capacity=128)
      >>> logits, cache = pdx.verify(params, cfg, tokens, lengths, cache)
      >>> logits.shape
      (2, 3, 64)
      >>> cache.truncate(jnp.array([2, 1])).lengths.tolist()  # the last token of each row was rejected
      [2, 1]
    """
    tokens, lengths = chunk(cfg, cache, tokens, lengths, check)
    check_mesh(params["final_norm"], cache.mesh)
    return _verify(params, cfg, tokens, jnp.asarray(lengths, jnp.int32), cache, as_kernels(kernels))


def finish(logits: jax.Array, cache: DenseCache) -> tuple[jax.Array, DenseCache]:
    """NaN logits for rows that overflow the cache, so that dropped tokens cannot go unnoticed."""
    full = cache.lengths > cache.capacity
    logits = jnp.where(full.reshape(-1, *[1] * (logits.ndim - 1)), jnp.nan, logits)
    axes = ("batch", *[None] * (logits.ndim - 2), "vocab")
    return constrain(logits, ArraySpec(logits.shape, axes, logits.dtype), cache.mesh), cache


@partial(jax.jit, static_argnames=("cfg", "kernels"), donate_argnames="cache")
def _prefill(params, cfg, tokens, lengths, cache, kernels):
    out = forward(params, cfg, tokens, cache, lengths=lengths, logits="last", kernels=kernels)
    return finish(out.logits, out.cache)


def _step(params, cfg, tokens, active, cache, kernels):
    lengths = active.astype(jnp.int32)
    out = forward(params, cfg, tokens[:, None], cache, lengths=lengths, logits="all", kernels=kernels)
    return finish(out.logits[:, 0], out.cache)


_decode_step = jax.jit(_step, static_argnames=("cfg", "kernels"), donate_argnames="cache")


@partial(jax.jit, static_argnames=("cfg", "kernels"), donate_argnames="cache")
def _verify(params, cfg, tokens, lengths, cache, kernels):
    out = forward(params, cfg, tokens, cache, lengths=lengths, logits="all", kernels=kernels)
    return finish(out.logits, out.cache)


@partial(jax.jit, static_argnames=("cfg", "n", "num_logprobs", "kernels"), donate_argnames=("cache", "sampling"))
def _decode_many(params, cfg, tokens, cache, sampling, n, active, steps, num_logprobs, kernels):
    b = tokens.shape[0]
    empty = SampleOutput(
        tokens=jnp.zeros((b, n), jnp.int32),
        logprob=jnp.zeros((b, n), jnp.float32),
        top_ids=jnp.zeros((b, n, num_logprobs), jnp.int32),
        top_logprobs=jnp.zeros((b, n, num_logprobs), jnp.float32),
    )

    def body(i, carry):
        tokens, cache, sampling, rows = carry
        logits, cache = _step(params, cfg, tokens, active, cache, kernels)
        # `cache.lengths` is the position of the token drawn now; its randomness depends on (seed, position).
        # Logits that are not finite (overflow of the model or of the cache) give NO_TOKEN, not a wrong token.
        drawn = sample(logits, sampling, cache.lengths, num_logprobs=num_logprobs, mark_broken=True)
        sampling = sampling.observe(drawn.tokens, active)
        rows = jax.tree.map(lambda all_, new: lax.dynamic_update_index_in_dim(all_, new, i, 1), rows, drawn)
        return jnp.where(active, drawn.tokens, tokens), cache, sampling, rows

    last, cache, sampling, rows = lax.fori_loop(0, jnp.minimum(steps, n), body, (tokens, cache, sampling, empty))
    # The loop's results are constrained again: constraints inside the loop do not reach them.
    last, sampling, rows = constrain_rows((last, sampling, rows), cache.mesh)
    return Decoded(rows.tokens, rows.logprob, rows.top_ids, rows.top_logprobs, last, sampling, cache.placed())


PROGRAMS = {"prefill": _prefill, "decode_step": _decode_step, "decode_many": _decode_many, "verify": _verify}
