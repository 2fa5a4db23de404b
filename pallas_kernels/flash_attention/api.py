"""Prefill attention: a block of queries, at an offset, against a dense cache."""

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
      k, v: the cache as stored in `layout` (`pallas_kernels.layouts`), S slots a row; position p lies in slot
        p mod S (a ring: of a row longer than S its last S tokens are left, with a window or without). This chunk's
        own keys and values are in it already. Slots that hold none of the row's positions may hold anything,
        NaN included. The head size of v may differ from that of k.
      starts: position of each row's first query, from 0; query t stands at starts + t.
      lengths: tokens of each row, this chunk included (more than S where its ring has wrapped); 0 for a row that
        takes no part. A causal query at or past its row's length is padding: it is given zeros or finite values, and
        nothing is read for it. None: every row holds S tokens.
      scale: multiplies the logits.
      causal: a query sees the positions up to its own; False: all that its row holds, wherever the query is said
        to stand (cross attention).
      window: a query sees this many positions, itself included; None: all before it. A ring must hold
        at least window - 1 + T of them.
      softcap: bounds the logits to cap * tanh(logits / cap).
      sinks: a logit for each query head that joins the softmax and has no value (gpt-oss). -inf: none; NaN or
        infinity: the head's results are NaN.
      k_scale, v_scale: f32 scales of int8 keys and values, one a token and head: the first multiply the logits,
        the second the probabilities.
      tree: among the chunk's own tokens, query i sees key j only where tree[b, i, j].
      kv_heads, value_dim: what a folded array does not tell: KV heads, and the head size of v (None: that of q).
      return_lse: return the log-sum-exp of the logits too, f32; -inf, or the sink, where a query sees nothing.
      implementation: see `pallas_kernels.dispatch`.
      interpret: run a Pallas kernel interpreted on the CPU: True, or `pltpu.InterpretParams` for TPU kernels.
      config: tiles of a Pallas kernel, its module's `Config`; None: tuned, else by its heuristic.

    Returns:
      One vector a query and head, in the dtype of q; softmax and accumulation are in f32.

    Raises:
      ValueError: shapes that do not fit; starts or lengths below zero, in arrays that are not traced (under `jit`
        such rows get finite values, and nothing outside of the arrays is read).
      NotImplementedError: a named implementation that does not exist for this call, or the gradient of a kernel.

    Inside of jit the XLA path has no gradient either (JAX says so); `reference_attention` has one everywhere.

    Source: Dao et al. 2022 (FlashAttention); the meaning is `reference.attention`.
    """
    arrays = {
        **{"q": q, "k": k, "v": v, "starts": starts, "lengths": lengths, "sinks": sinks},
        **{"k_scale": k_scale, "v_scale": v_scale, "tree": tree},
    }
    settings = {
        **{"scale": scale, "causal": causal, "window": window, "softcap": softcap},
        **{"layout": layout, "kv_heads": kv_heads, "value_dim": value_dim, "return_lse": return_lse},
    }
    return attend(OP, arrays, settings, implementation, config, interpret)
