"""Matrix products with weights stored ``[out, in]``, the embedding lookup and the vocabulary head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.masking import precision_of, soft_cap


def linear(
    x: Float[Array, "*b i"], weight: Float[Array, "o i"], bias: Float[Array, " o"] | None = None
) -> Float[Array, "*b o"]:
    """x @ weight.T + bias, accumulated in f32, in the dtype of x."""
    y = jnp.einsum("...i,oi->...o", x, weight, precision=precision_of(x.dtype))
    return y if bias is None else y + bias


def embed(table: Float[Array, "V D"], tokens: Int[Array, "B T"], scale: float) -> Float[Array, "B T D"]:
    """Look tokens up; `scale` is Gemma's sqrt(D), in the dtype of the table as it was trained."""
    x = jnp.take(table, tokens, axis=0, mode="clip")
    return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)


def unembed(x: Float[Array, "*b D"], table: Float[Array, "V D"], cap: float | None) -> Float[Array, "*b V"]:
    """Vocabulary logits in f32."""
    logits = jnp.einsum("...d,vd->...v", x, table, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)
    return soft_cap(logits, cap)


ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}
