"""Prefill attention: a chunk of queries against a dense cache.

The way of a call:
  arguments       `attention.call.make_call` checks them and gathers the static facts in a `Call`
  Call            `OP.run` (`dispatch`) chooses the implementation and its tiles
  implementation  `xla` loops over blocks of queries and keys; `tpu` and `gpu` lay arrays out and set up the grid
  kernel          `tpu_kernel`, `gpu_kernel`: one block of queries against the blocks of keys that it sees
  result          [B, T, N, Hv], with `return_lse` also the log-sum-exp [B, T, N]
"""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.entry import attend
from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.layouts import Layout

OP = Op("flash_attention")
explain = OP.explain


def flash_attention(
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
    """Softmax attention of a chunk of queries against what each row's cache holds.

    Args:
      q: T queries a row; N = K * G query heads, G to a KV head.
      k, v: the cache in `layout` (`pallas_kernels.layouts`), S slots a row. It holds this chunk's keys and values
        already. Position p lies in slot p mod S: a ring, which keeps the last S tokens of a longer row. Slots
        that hold none of the row's positions may hold anything, NaN included. The head sizes of k and v may differ.
      starts: position of each row's first query, from 0; query t has position starts + t. Zeros that are not traced
        (of numpy, under `jit`) say that the rows are whole prompts, which cuDNN takes.
      lengths: tokens of each row, this chunk included; more than S where the ring has wrapped; 0 for an inactive
        row. A causal query at or past its row's length is padding: its result is zero or finite, and nothing is
        read for it. None: every row holds S tokens.
      scale: multiplies the logits.
      causal: a query sees the positions up to its own. False: it sees all that its row holds (cross attention).
      window: a query sees this many positions, its own included; None: all before it. A ring needs at least
        window - 1 + T slots.
      softcap: bounds the logits to cap * tanh(logits / cap).
      sinks: one logit per query head that joins the softmax and has no value (gpt-oss). -inf: no sink. NaN or
        infinity: the head's results are NaN.
      k_scale, v_scale: f32 scales of int8 keys and values, one per token and head. k_scale multiplies the logits,
        v_scale the probabilities.
      tree: among the chunk's own tokens, query i sees key j only where tree[b, i, j], whatever the window. The window
        then counts from a query's depth: position starts + the number of earlier tokens of the chunk that it sees.
      kv_heads, value_dim: KV heads, and the head size of v (None: that of q). A folded array does not show them.
      return_lse: also return the log-sum-exp of the logits, in f32. Where a query sees nothing it is -inf, or the sink.
      implementation: see `pallas_kernels.dispatch`.
      interpret: run a Pallas kernel interpreted on the CPU: True, or `pltpu.InterpretParams` for TPU kernels.
      config: tiles of a Pallas kernel, its module's `Config`. None: those of the tuned table, else of the heuristic.

    Returns:
      One vector per query and head, in the dtype of q; softmax and accumulation are in f32.

    Raises:
      ValueError: shapes that do not fit; starts or lengths below zero in arrays that are not traced. Under `jit`
        such rows get finite values, and nothing outside of the arrays is read.
      NotImplementedError: a named implementation that cannot take this call, or the gradient of a kernel.

    Under `jit` the XLA path has no gradient either, and JAX says so. `reference_attention` always has one.

    Example: equal keys give equal weights, so each query gets the mean of the values that it sees.
      >>> from functools import partial
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from pallas_kernels import flash_attention
      >>> q, k = jnp.ones((1, 3, 4, 8)), jnp.zeros((1, 2, 16, 8))  # [B, T, N, H], [B, K, S, H]
      >>> v = jnp.ones((1, 2, 16, 8)) * jnp.arange(16.0)[:, None]  # the value of position p is p
      >>> attend = jax.jit(partial(flash_attention, scale=8**-0.5, window=4))
      >>> out = attend(q, k, v, starts=jnp.array([5]), lengths=jnp.array([8]))
      >>> out[0, :, 0, 0].tolist()  # the queries at positions 5, 6 and 7 see four positions each
      [3.5, 4.5, 5.5]

    Source: Dao et al. 2022 (FlashAttention); the meaning is `reference.attention`.
    """
    cache = dict(k=k, v=v, k_scale=k_scale, v_scale=v_scale)
    arrays = cache | dict(q=q, starts=starts, lengths=lengths, sinks=sinks, tree=tree)
    mask = dict(causal=causal, window=window, softcap=softcap)
    settings = mask | dict(scale=scale, layout=layout, kv_heads=kv_heads, value_dim=value_dim, return_lse=return_lse)
    return attend(OP, arrays, settings, implementation, config, interpret)
