"""Decode attention: one query a row, or the few of a draft, against a long dense cache.

The way of a call:
  arguments       `attention.call.make_call` checks them and gathers the static facts in a `Call`
  Call            `OP.run` (`dispatch`) chooses the implementation and its tiles
  implementation  `xla` loops over blocks of keys; `tpu` and `gpu` lay queries out and set up the grid
  kernel          `tpu_kernel`, `gpu_kernel`: one part of a row's context; `attention.merge` joins the parts
  result          [B, T, N, Hv], with `return_lse` also the log-sum-exp [B, T, N]
"""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.entry import attend
from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.layouts import Layout

MAX_QUERIES = 16
OP = Op("decode_attention")
explain = OP.explain


def decode_attention(
    q: Float[Array, "B T N H"],
    k: Array,
    v: Array,
    *,
    starts: Int[Array, " B"],
    lengths: Int[Array, " B"] | None,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    k_scale: Float[Array, "B Kp S"] | None = None,
    v_scale: Float[Array, "B Kp S"] | None = None,
    tree: Bool[Array, "B T T"] | None = None,
    layout: Layout = "heads_first",
    kv_heads: int | None = None,
    value_dim: int | None = None,
    return_lse: bool = False,
    implementation: Implementation = "auto",
    interpret=False,
    config=None,
) -> Float[Array, "B T N Hv"] | tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Softmax attention of 1 to 16 queries a row. Reading K and V bounds its time.

    The arguments are those of `flash_attention`. The G query heads of a KV head share one read of it. The bytes read
    follow what the rows hold, not the capacity.

    Raises:
      ValueError: shapes that do not fit, or more than 16 queries a row.
      NotImplementedError: a named implementation that cannot take this call, or the gradient of a kernel.

    Example: equal keys give equal weights, so a query gets the mean of the values that it sees.
      >>> from functools import partial
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from pallas_kernels import decode_attention
      >>> q, k = jnp.ones((1, 1, 4, 8)), jnp.zeros((1, 2, 16, 8))  # [B, T, N, H], [B, K, S, H]
      >>> v = jnp.ones((1, 2, 16, 8)) * jnp.arange(16.0)[:, None]  # the value of position p is p
      >>> attend = jax.jit(partial(decode_attention, scale=8**-0.5))
      >>> out = attend(q, k, v, starts=jnp.array([7]), lengths=jnp.array([8]))  # the mean of 0 to 7
      >>> out.shape, float(out[0, 0, 0, 0])
      ((1, 1, 4, 8), 3.5)

    Source: Dao et al. 2023 (Flash-Decoding); the meaning is `flash_attention.reference.attention`.
    """
    if getattr(q, "ndim", 0) == 4 and q.shape[1] > MAX_QUERIES:
        raise ValueError(
            f"decode_attention takes 1 to {MAX_QUERIES} queries a row, got {q.shape[1]}: use flash_attention"
        )
    cache = dict(k=k, v=v, k_scale=k_scale, v_scale=v_scale)
    arrays = cache | dict(q=q, starts=starts, lengths=lengths, sinks=sinks, tree=tree)
    mask = dict(causal=causal, window=window, softcap=softcap)
    settings = mask | dict(scale=scale, layout=layout, kv_heads=kv_heads, value_dim=value_dim, return_lse=return_lse)
    return attend(OP, arrays, settings, implementation, config, interpret)
