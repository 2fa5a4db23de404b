"""Matrix products with weights stored ``[out, in]``, the embedding lookup and the vocabulary head."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from pallas_kernels import QuantArray
from pallas_kernels.hardware import platform_of
from pallas_kernels.layouts import LANES
from pallas_kernels.masking import precision_of, soft_cap
from pdx import quant

Weight = Float[Array, "o i"] | QuantArray

# Rows up to which the CPU's form below pays: 1.5x at 8, 2x at 16, nothing at 64; one row has a path of its own.
FEW_ROWS = range(2, 33)


_watcher: ContextVar[Callable[[Weight, Array], None] | None] = ContextVar("pdx_watcher", default=None)


@contextmanager
def watching(see: Callable[[Weight, Array], None]) -> Iterator[None]:
    """Inside, `see` is told of each product's weight and what it is multiplied with, while it is traced."""
    token = _watcher.set(see)
    try:
        yield
    finally:
        _watcher.reset(token)


def product(x: Float[Array, "*b i"], weight: Weight, parts: int = 1, dtype=None) -> Float[Array, "*b o"]:
    """x @ weight.T in `dtype` (None: what the operands give), with the weight's rows in `parts` equal blocks.

    XLA on the CPU packs both sides of a product of a few rows on one thread, the weight too. With the weight on the
    left and in blocks, each core takes some of them and nothing large is packed.
    """
    if (see := _watcher.get()) is not None:
        see(weight, x)
    if isinstance(weight, QuantArray):
        return quant.matmul(x, weight, dtype)
    settings = {"precision": precision_of(x.dtype), "preferred_element_type": dtype}
    if parts == 1:
        return jnp.einsum("...i,oi->...o", x, weight, **settings)
    blocks = weight.reshape(parts, -1, weight.shape[1])
    rows = jnp.broadcast_to(x.reshape(-1, x.shape[-1]), (parts, math.prod(x.shape[:-1]), x.shape[-1]))
    y = jnp.einsum("poi,pri->por", blocks, rows, **settings)
    return y.transpose(2, 0, 1).reshape(*x.shape[:-1], weight.shape[0])


def parts_for(x: Float[Array, "*b i"], weight: Weight) -> int:
    """In how many blocks the device at hand multiplies best: one for each core of a CPU, for a few rows of f32."""
    # Several CPU devices are a mesh: reshaping a sharded weight would gather it.
    if platform_of() != "cpu" or jax.device_count() > 1 or x.dtype != jnp.float32 or weight.dtype != jnp.float32:
        return 1
    if isinstance(weight, QuantArray) or math.prod(x.shape[:-1]) not in FEW_ROWS:
        return 1
    return max(n for n in range(1, (os.cpu_count() or 1) + 1) if weight.shape[0] % n == 0)


def linear(
    x: Float[Array, "*b i"], weight: Weight, bias: Float[Array, " o"] | None = None
) -> Float[Array, "*b o"]:
    """x @ weight.T + bias, accumulated in f32, in the dtype of x."""
    y = product(x, weight, parts_for(x, weight))
    return y if bias is None else y + bias


# Tokens up to which a lookup on a TPU is made of slices, where it would otherwise copy the table.
FEW_TOKENS = 64


def embed(
    table: Weight, tokens: Int[Array, "B T"], scale: float, mesh: Mesh | None = None
) -> Float[Array, "B T D"]:
    """Look tokens up; `scale` is Gemma's sqrt(D), in the dtype of the table as it was trained."""
    alone, narrow = mesh is None or mesh.size == 1, table.shape[1] % LANES > 0
    if isinstance(table, QuantArray):
        x = quant.lookup(table, tokens)
    elif alone and narrow and tokens.size <= FEW_TOKENS and platform_of() == "tpu":
        x = _embed_columns(table, tokens)
    else:
        x = jnp.take(table, tokens, axis=0, mode="clip")
    return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)


def _embed_columns(table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """A width that is no multiple of 128 lies vocabulary-minor on a TPU, and a gather would first copy the table to
    the other order, each step: columns are sliced out of it as it lies."""
    columns, ids = table.T, jnp.clip(tokens.reshape(-1), 0, table.shape[0] - 1)
    found = [lax.dynamic_slice_in_dim(columns, ids[i], 1, axis=1) for i in range(tokens.size)]
    return jnp.concatenate(found, axis=1).T.reshape(*tokens.shape, table.shape[1])


def unembed(x: Float[Array, "*b D"], table: Weight, cap: float | None) -> Float[Array, "*b V"]:
    """Vocabulary logits in f32."""
    return soft_cap(product(x, table, parts_for(x, table), jnp.float32), cap)


ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}
