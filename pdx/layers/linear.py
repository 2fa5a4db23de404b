"""Matrix products with weights stored ``[out, in]``, the embedding lookup and the vocabulary head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import QuantArray
from pallas_kernels.hardware import platform_of
from pallas_kernels.layouts import LANES
from pallas_kernels.masking import precision_of, soft_cap
from pdx import quant
from pdx.config import ModelConfig
from pdx.meshes import ANY_DEVICES, Devices, on_one_device
from pdx.sharding import ArraySpec

Weight = Float[Array, "o i"] | QuantArray

# For these numbers of rows a CPU multiplies faster with the weight as the left operand: mostly 1.1 to 1.6 times (twice
# and more for large weights where XLA uses Eigen, not YNNPACK). It is equal at 256 rows and slower at 1024. One row has
# its own path.
WEIGHT_FIRST_ROWS = range(2, 129)


_watcher: ContextVar[Callable[[Weight, Array], None] | None] = ContextVar("pdx_watcher", default=None)


@contextmanager
def watching(see: Callable[[Weight, Array], None]) -> Iterator[None]:
    """Inside, `see(weight, x)` is called for each product while it is traced, with its weight and its input."""
    token = _watcher.set(see)
    try:
        yield
    finally:
        _watcher.reset(token)


def product(
    x: Float[Array, "*b i"], weight: Weight, dtype=None, spec: ArraySpec | None = None, mesh: Devices = ANY_DEVICES
) -> Float[Array, "*b o"]:
    """x @ weight.T in `dtype` (None: the operands' own) on the devices of `mesh`; `spec` declares the weight."""
    if (see := _watcher.get()) is not None:
        see(weight, x)
    if isinstance(weight, QuantArray):
        return quant.matmul(x, weight, dtype, spec, mesh)
    settings = {"precision": precision_of(x.dtype), "preferred_element_type": dtype}
    if not weight_first(x):
        return jnp.einsum("...i,oi->...o", x, weight, **settings)
    # The axis of size one keeps the compiler from swapping the operands again.
    y = jnp.einsum("poi,pri->por", weight[None], x.reshape(1, -1, x.shape[-1]), **settings)
    return y.transpose(2, 0, 1).reshape(*x.shape[:-1], weight.shape[0])


def weight_first(x: Float[Array, "*b i"]) -> bool:
    """Whether this device multiplies x faster as (weight @ x.T).T.

    A CPU's products pack their right operand in each call: packing few rows is cheaper than packing the whole weight.
    """
    return platform_of() == "cpu" and x.dtype == jnp.float32 and math.prod(x.shape[:-1]) in WEIGHT_FIRST_ROWS


def linear(
    x: Float[Array, "*b i"],
    weight: Weight,
    bias: Float[Array, " o"] | None = None,
    spec: ArraySpec | None = None,
    mesh: Devices = ANY_DEVICES,
) -> Float[Array, "*b o"]:
    """x @ weight.T + bias, accumulated in f32, in the dtype of x. `spec` and `mesh` as in `product`."""
    y = product(x, weight, None, spec, mesh)
    return y if bias is None else y + bias


# Up to this many tokens, a lookup on a TPU is made of slices where a gather would first copy the table. By the
# compiler's static cycles, 256 slices of a bf16 table of 49152 x 576 take 0.42 of that copy on a v5e and v6e, and a
# second to compile.
FEW_TOKENS = 256


def embed(table: Weight, tokens: Int[Array, "B T"], scale: float, mesh: Devices = ANY_DEVICES) -> Float[Array, "B T D"]:
    """Look tokens up and multiply by `scale` (Gemma's sqrt(D)), rounded to the table's dtype as in training."""
    narrow = table.shape[1] % LANES > 0
    if isinstance(table, QuantArray):
        x = quant.lookup(table, tokens, vocabulary(table), mesh)
    elif on_one_device(mesh) and narrow and tokens.size <= FEW_TOKENS and platform_of() == "tpu":
        x = _embed_columns(table, tokens)
    else:
        x = jnp.take(table, tokens, axis=0, mode="clip")
    return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)


def _embed_columns(table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Look tokens up by slicing columns. A TPU stores a table whose width is no multiple of 128 vocabulary-minor, and a
    gather would copy the whole table to the other order in each step."""
    columns, ids = table.T, jnp.clip(tokens.reshape(-1), 0, table.shape[0] - 1)
    found = [lax.dynamic_slice_in_dim(columns, ids[i], 1, axis=1) for i in range(tokens.size)]
    return jnp.concatenate(found, axis=1).T.reshape(*tokens.shape, table.shape[1])


def unembed(
    x: Float[Array, "*b D"], table: Weight, cap: float | None, mesh: Devices = ANY_DEVICES
) -> Float[Array, "*b V"]:
    """Vocabulary logits in f32."""
    return soft_cap(product(x, table, jnp.float32, vocabulary(table), mesh), cap)


def vocabulary(table: Weight) -> ArraySpec:
    """The declaration of an embedding or a head: one row per token of the vocabulary."""
    return ArraySpec(table.shape, ("vocab", None), table.dtype)


def projections(cfg: ModelConfig, dtype=jnp.float32) -> dict[str, ArraySpec]:
    """Declare the matrices of a layer. They shard by whole heads."""
    d, f, n, k, h = cfg.d_model, cfg.d_ff, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim

    def rows(heads, axis):
        return ArraySpec((heads * h, d), (axis, None), dtype, units=(heads, d), part="projections")

    return {
        "q_proj": rows(n, "heads"),
        "k_proj": rows(k, "kv_heads"),
        "v_proj": rows(k, "kv_heads"),
        "o_proj": ArraySpec((d, n * h), (None, "heads"), dtype, units=(d, n), part="projections"),
        "gate_proj": ArraySpec((f, d), ("mlp", None), dtype, part="mlp"),
        "up_proj": ArraySpec((f, d), ("mlp", None), dtype, part="mlp"),
        "down_proj": ArraySpec((d, f), (None, "mlp"), dtype, part="mlp"),
    }


ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}
