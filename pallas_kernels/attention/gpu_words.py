"""int8 values by words of four lanes, which the GPU kernels of decode rows share.

A tensor core takes V in pairs of keys, which do not lie side by side: int8 would be loaded from shared memory by the
byte. It is loaded by words of four lanes instead. Each of the four is widened by shifts and multiplied on its own, and
has its own sums: lanes i, i + 4, i + 8, ... of the result.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.masking import precision_of

LEAST_WORDS = 32  # with 16, half of four warps had no lanes of their own, and a B200's compiler spilled


def lanes_in_word(int8: bool, value_dim: int, padded_dim: int) -> int:
    """Lanes of V that a kernel loads as one element: four of int8 if a product is left enough words, else one."""
    return 4 if int8 and value_dim % 4 == 0 and padded_dim // 4 >= LEAST_WORDS else 1


def as_words(v: Array) -> Array:
    """[..., Hv] of int8 as [..., Hv / 4] of int32. No copy: a view of the same memory."""
    return lax.bitcast_convert_type(v.reshape(*v.shape[:-1], -1, 4), jnp.int32)


def add_values(sums: tuple, fade, weights, v) -> tuple:
    """The sums of each lane of a word [rows, words], faded, plus the weighted sum of a block of V [keys, words].

    One lane in a word: V has the type of the weights, else it holds words of four int8.
    """

    def lane(i: int):
        if len(sums) == 1:
            return v
        high = v << (24 - 8 * i) if i < 3 else v  # the byte with its sign on top
        return (high >> 24).astype(jnp.float32).astype(weights.dtype)

    return tuple(
        part * fade[:, None]
        + lax.dot_general(
            weights,
            lane(i),
            (((1,), (0,)), ((), ())),
            precision=precision_of(weights.dtype),
            preferred_element_type=jnp.float32,
        )
        for i, part in enumerate(sums)
    )
