"""Prefill attention of whole prompts by cuDNN, as `jax.nn.dot_product_attention` calls it: Hopper.

cuDNN uses Hopper's own matrix instructions, which Triton's kernel does not reach. Its causal mask counts queries and
keys from 0, so it takes prompts from their beginning, and no chunk behind a context.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import compat, hardware
from pallas_kernels.attention.call import Call

NAME = "cudnn"
PLATFORM = "gpu"
LAYOUTS = ("heads_last",)
HOPPER = (9, 0)
MOST_DIM = 128  # of a head; cuDNN takes more on Hopper, but JAX asks the devices of this process before it allows that
# `auto` prefers cuDNN for prompts of heads of 128 from this length on. Only 4096 tokens were measured.
PREFERRED_QUERIES = 2048
PREFERRED_DIM = 128


def supported(call: Call) -> str | None:
    """None, or why cuDNN cannot do the call."""
    if hardware.capability() != HOPPER:
        return "cuDNN is called on GPUs of compute capability 9.0 (Hopper) only: on others it was not measured"
    if call.dtype not in ("bfloat16", "float16") or call.kv_dtype != call.dtype:
        return f"cuDNN takes queries, K and V in bfloat16 or all in float16, not {call.dtype} and {call.kv_dtype}"
    if call.head_dim != call.value_dim or call.head_dim > MOST_DIM or call.head_dim % 8:
        sizes = f"{call.head_dim} and {call.value_dim}"
        return f"cuDNN takes heads of a multiple of 8 up to {MOST_DIM}, in V as in K, not {sizes}"
    features = {"a window": call.window, "a soft cap": call.softcap, "sinks": call.sinks, "a tree": call.tree}
    if asked := [name for name, given in (features | {"a log-sum-exp": call.return_lse}).items() if given]:
        return f"cuDNN is called without {' and '.join(asked)}"
    if call.causal and not (call.whole and call.queries <= call.slots):
        return "cuDNN takes whole prompts: starts must be zeros that are not traced, such as numpy.zeros(B, int32)"
    if not call.causal and call.lengths:
        return "without a causal mask, cuDNN is called for rows that are full: lengths must be None"
    return compat.without_cudnn()


def preferred(call: Call) -> str | None:
    """None, or why `auto` takes cuDNN before the Pallas kernel."""
    if call.head_dim != PREFERRED_DIM or call.queries < PREFERRED_QUERIES:
        return None
    times = "288 us against 341" if call.causal else "476 us against 669"
    return f"measured on an H200: cuDNN is faster for whole prompts, {times} with 4096 tokens"


def run(arrays, call: Call, config=None, interpret=False):
    """See `api.flash_attention`. It has no tiles."""
    if interpret:
        raise NotImplementedError("flash_attention: cuDNN has no interpreter; use implementation='xla'")
    k, v = arrays["k"], arrays["v"]
    if call.causal:
        k, v = (x[:, : call.queries] for x in (k, v))  # no query sees the slots behind
    if "lengths" in arrays:
        # The causal mask hides what is past a row's tokens from its queries, but memory there may hold NaN.
        held = jnp.arange(k.shape[1]) < arrays["lengths"][:, None]
        k, v = (jnp.where(held[..., None, None], x, 0) for x in (k, v))
    return jax.nn.dot_product_attention(
        arrays["q"], k, v, scale=call.scale, is_causal=call.causal, implementation="cudnn"
    )
