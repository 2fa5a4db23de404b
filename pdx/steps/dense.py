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
from pdx.layers.kernels import Kernels, settled
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
    """Append `lengths` new tokens of each row behind what the row holds; compute-bound.

    A longer prompt is fed in chunks by calling this again. A row of length 0 is untouched and its
    logits mean nothing. The cache given is donated: use the one returned.

    Args:
      check: look, on the host, at the values: whether the tokens fit and are of the vocabulary. It waits for the cache;
        callers that keep count themselves switch it off. A row that overflows unchecked, or under an
        outer `jit`, gets NaN logits: never a silent truncation.

    Returns:
      Logits behind the last new token of each row, f32, and the cache.

    Raises:
      ContextLengthError: a row has no room for its tokens.
      ValueError: T is larger than the cache's chunk, or a length is not one of 0 to T.
      RequestError: another shape or type (a list is taken), or with `check` a token outside the vocabulary.
      DonatedError: a cache that was given to an earlier step.
    """
    tokens, lengths = chunk(cfg, cache, tokens, lengths, check)
    check_mesh(params["final_norm"], cache.mesh)
    return _prefill(params, cfg, tokens, jnp.asarray(lengths, jnp.int32), cache, settled(kernels))


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
    """
    tokens, active = newest(cfg, cache, tokens, active, check)
    check_mesh(params["final_norm"], cache.mesh)
    return _decode_step(params, cfg, tokens, jnp.asarray(active), cache, settled(kernels))


@struct.dataclass
class Decoded:
    """What `decode_many` returns: n tokens a row, and everything needed to go on."""

    # -1 (`NO_TOKEN`) where the logits were NaN or infinite: the model overflows, or the cache had no room left, which
    # `check` would have refused. What follows a -1 in its row means nothing.
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
    """Decode and sample n tokens a row in one program: tokens stay on the device between steps.

    Args:
      tokens: the newest token of each row, not in the cache yet.
      sampling: settings and counts of each row; donated, as the cache is.
      n: static length of the result.
      steps: how many of the n to run, a number that may change without a new program; the columns
        behind it are 0. None: all.
      active: rows that take part; the others keep their token. None: all.
      num_logprobs: how many of the best alternatives to report for each token (static).

    Raises:
      ContextLengthError: as `prefill`, for n (or `steps`) more tokens.
    """
    n = integer("n", n, 1)
    num_logprobs = integer("num_logprobs", num_logprobs, 0)
    if not isinstance(steps, jax.Array):
        steps = n if steps is None else integer("steps", steps, 0)
    active = np.ones(cache.batch, bool) if active is None and isinstance(cache, DenseCache) else active
    tokens, active = newest(cfg, cache, tokens, active, check, steps)
    check_mesh(params["final_norm"], cache.mesh)
    if not isinstance(sampling, SamplingState):
        raise RequestError(f"sampling is {type(sampling).__name__}: it must be what SamplingState.create returns")
    check_alive(sampling, "sampling state")
    steps = jnp.asarray(steps, jnp.int32)
    sampling = place_rows(sampling, cache.mesh)  # as it will come back, so that the next call is the same program
    active, kernels = jnp.asarray(active), settled(kernels)
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
    """Append a draft and score every token of it; then `cache.truncate(lengths)` drops what was rejected.

    `tokens` are the newest token and G drafted ones (T = G + 1); logits [:, i] follow token i.
    See `prefill` for the rest.
    """
    tokens, lengths = chunk(cfg, cache, tokens, lengths, check)
    check_mesh(params["final_norm"], cache.mesh)
    return _verify(params, cfg, tokens, jnp.asarray(lengths, jnp.int32), cache, settled(kernels))


def _finish(logits: jax.Array, cache: DenseCache) -> tuple[jax.Array, DenseCache]:
    """NaN for rows that hold more than fits: what was dropped must not pass for an answer."""
    full = cache.lengths > cache.capacity
    logits = jnp.where(full.reshape(-1, *[1] * (logits.ndim - 1)), jnp.nan, logits)
    axes = ("batch", *[None] * (logits.ndim - 2), "vocab")
    return constrain(logits, ArraySpec(logits.shape, axes, logits.dtype), cache.mesh), cache


@partial(jax.jit, static_argnames=("cfg", "kernels"), donate_argnames="cache")
def _prefill(params, cfg, tokens, lengths, cache, kernels):
    out = forward(params, cfg, tokens, cache, lengths=lengths, logits="last", kernels=kernels)
    return _finish(out.logits, out.cache)


def _step(params, cfg, tokens, active, cache, kernels):
    lengths = active.astype(jnp.int32)
    out = forward(params, cfg, tokens[:, None], cache, lengths=lengths, logits="all", kernels=kernels)
    return _finish(out.logits[:, 0], out.cache)


_decode_step = jax.jit(_step, static_argnames=("cfg", "kernels"), donate_argnames="cache")


@partial(jax.jit, static_argnames=("cfg", "kernels"), donate_argnames="cache")
def _verify(params, cfg, tokens, lengths, cache, kernels):
    out = forward(params, cfg, tokens, cache, lengths=lengths, logits="all", kernels=kernels)
    return _finish(out.logits, out.cache)


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
        # The token drawn now will stand at this position: its randomness is that of (seed, position).
        # Logits that are not finite (the model overflows, or there was no room) give no token, not a wrong one.
        drawn = sample(logits, sampling, cache.lengths, num_logprobs=num_logprobs, mark_broken=True)
        sampling = sampling.observe(drawn.tokens, active)
        rows = jax.tree.map(lambda all_, new: lax.dynamic_update_index_in_dim(all_, new, i, 1), rows, drawn)
        return jnp.where(active, drawn.tokens, tokens), cache, sampling, rows

    last, cache, sampling, rows = lax.fori_loop(0, jnp.minimum(steps, n), body, (tokens, cache, sampling, empty))
    # What comes out of the loop is placed anew: a constraint inside it does not reach its result.
    last, sampling, rows = constrain_rows((last, sampling, rows), cache.mesh)
    return Decoded(rows.tokens, rows.logprob, rows.top_ids, rows.top_logprobs, last, sampling, cache.placed())


PROGRAMS = {"prefill": _prefill, "decode_step": _decode_step, "decode_many": _decode_many, "verify": _verify}
