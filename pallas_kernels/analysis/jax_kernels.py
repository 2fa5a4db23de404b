"""Kernels that JAX ships, called with the cases of this library: peers for the static figures."""

from __future__ import annotations

from collections.abc import Callable

import jax

from pallas_kernels.analysis.problem import Problem

# Query, KV and inner KV block of JAX's prefill kernel, best first, by static cycles on v5e, v5p and v6e.
JAX_FLASH_TILES = ((1024, 2048, 1024), (512, 2048, 512), (1024, 1024, 1024), (512, 1024, 512), (512, 512, 512))


def jax_flash(problem: Problem, tiles: tuple[int, int, int]) -> tuple[Callable, list[jax.ShapeDtypeStruct]]:
    """`jax.experimental.pallas.ops.tpu.flash_attention` for an unmasked case, and its arguments.

    It has no GQA: K and V get as many heads as Q, which costs it bytes but no FLOPs.

    Raises:
      ValueError: the case has a mask, or a feature that this kernel lacks.
    """
    from jax.experimental.pallas.ops.tpu import flash_attention as ops

    call = problem.call
    if call.causal or call.lengths or call.window or call.softcap or call.sinks or call.tree:
        raise ValueError(f"{problem.name}: JAX's own kernel is compared on cases without a mask")
    q, k, inner = tiles
    sizes = ops.BlockSizes(block_q=q, block_k_major=k, block_k=inner, block_b=1)

    def run(q, k, v):
        return ops.flash_attention(q, k, v, causal=False, sm_scale=call.head_dim**-0.5, block_sizes=sizes)

    def shape(tokens: int, size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((call.batch, call.heads, tokens, size), call.dtype)

    return run, [
        shape(call.queries, call.head_dim),
        shape(call.slots, call.head_dim),
        shape(call.slots, call.value_dim),
    ]
