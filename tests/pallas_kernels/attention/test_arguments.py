"""What the attention ops over a dense cache refuse, and how they say it."""

from itertools import product

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import decode_attention, flash_attention

OPS = {"flash_attention": flash_attention, "decode_attention": decode_attention}


def arguments(b=2, t=2, n=4, kv_heads=2, slots=128, **changes):
    cache = jnp.zeros((b, kv_heads, slots, 8))
    return {
        "q": jnp.zeros((b, t, n, 8)),
        "k": cache,
        "v": cache,
        "starts": jnp.ones(b, jnp.int32),
        "lengths": jnp.full(b, 3, jnp.int32),
        "scale": 1.0,
    } | changes


INT32 = jnp.zeros((2, 2, 128, 8), jnp.int32)
WRONG = (
    ({"q": jnp.zeros((2, 2, 4, 8), jnp.int32)}, "q must be an array of floating type, got int32"),
    ({"q": [[1.0]]}, "q must be an array of floating type, got list: give jnp.asarray of it"),
    ({"k": INT32, "v": INT32}, "k must be an array of floating or int8 type, got int32"),
    ({"v": None}, "v must be an array of floating or int8 type, got NoneType"),
    ({"starts": [1, 1]}, "starts must be an array of integer type, got list: give jnp.asarray of it"),
    ({"starts": None}, "starts must be an array of integer type, got NoneType"),
    ({"starts": jnp.ones(2)}, "starts must be an array of integer type, got float32"),
    ({"lengths": [3, 3]}, "lengths must be an array of integer type, got list"),
    ({"lengths": jnp.ones(2)}, "lengths must be an array of integer type, got float32"),
    ({"tree": jnp.ones((2, 2, 2), jnp.int32)}, "tree must be an array of bool type, got int32"),
    ({"sinks": [0.0] * 4}, "sinks must be an array of floating type, got list"),
    ({"window": 2.5}, "window must be a whole number, got 2.5"),
    ({"window": 0}, "window must be at least 1"),
    ({"scale": None}, r"scale must be a finite number, such as head_dim \*\* -0.5, got None"),
    ({"scale": float("inf")}, "scale must be a finite number"),
    ({"softcap": float("inf")}, "softcap must be positive and finite, or None for no cap; got inf"),
    ({"softcap": float("nan")}, "softcap must be positive and finite"),
    ({"softcap": -1.0}, "softcap must be positive and finite"),
    ({"b": 0}, r"no axis may be empty, got q \(0, 2, 4, 8\)"),
    ({"t": 0}, r"no axis may be empty, got q \(2, 0, 4, 8\)"),
    ({"n": 0}, r"no axis may be empty, got q \(2, 2, 0, 8\)"),
    ({"kv_heads": 0}, r"no axis may be empty.* k \(2, 0, 128, 8\)"),
    ({"slots": 0}, r"no axis may be empty.* k \(2, 2, 0, 8\)"),
)


# Of one query a row; what is wrong may stand anywhere in the message.
MISFITS = (
    ({"q": jnp.zeros((2, 4, 8))}, r".*q must be \[B, T, N, H\]"),
    ({"k": jnp.zeros((3, 2, 128, 8))}, r".*k \(3, 2, 128, 8\) does not fit"),
    ({"k": jnp.zeros((2, 3, 128, 8))}, ".*N a multiple of K"),
    ({"k": jnp.zeros((2, 2, 128, 16))}, ".*does not fit"),
    ({"v": jnp.zeros((2, 2, 64, 8))}, r".*v must be .* beside k = \(2, 2, 128, 8\)"),
    ({"v": jnp.zeros((2, 2, 128, 8), jnp.bfloat16)}, ".*of one type"),
    ({"k": jnp.zeros((2, 2, 128, 8), jnp.int8), "v": jnp.zeros((2, 2, 128, 8), jnp.int8)}, ".*come with k_scale"),
    ({"k_scale": jnp.zeros((2, 2, 128))}, ".*come with k_scale"),
    ({"layout": "heads"}, ".*not one of heads_first"),
    ({"layout": "folded", "k": jnp.zeros((2, 128, 128)), "v": jnp.zeros((2, 128, 128))}, ".*give kv_heads"),
    ({"starts": jnp.zeros((2, 3), jnp.int32)}, r".*starts must be \[B\] = \(2,\)"),
    ({"tree": jnp.zeros((2, 3, 3), bool)}, r".*tree must be \[B, T, T\] = \(2, 1, 1\)"),
    ({"sinks": jnp.zeros((3,))}, r".*sinks must be \[N\] = \(4,\)"),
    ({"window": 3, "causal": False}, ".*window must be at least 1 and causal"),
    ({"lengths": jnp.zeros((3,), jnp.int32)}, r".*lengths must be \[B\] = \(2,\)"),
    ({"window": 0}, ".*window must be at least 1 and causal, got window 0"),
    ({"softcap": 0.0}, ".*softcap must be positive"),
)


@pytest.mark.parametrize(
    ("op", "wrong"),
    list(product(OPS, WRONG + tuple((c | {"t": 1}, s) for c, s in MISFITS))),
    ids=lambda x: x if isinstance(x, str) else x[1],
)
def test_bad_arguments_are_named(op, wrong):
    changes, says = wrong
    with pytest.raises(ValueError, match=f"^{op}: {says}"):
        OPS[op](**arguments(**changes))


@pytest.mark.parametrize("kv_heads", [0, 2.0])
def test_folded_heads_that_cannot_be_are_named(kv_heads):
    folded = {"layout": "folded", "k": jnp.zeros((2, 128, 128)), "v": jnp.zeros((2, 128, 128))}
    with pytest.raises(ValueError, match=r"flash_attention: .*kv_heads"):
        flash_attention(**arguments(**folded) | {"kv_heads": kv_heads})


@pytest.mark.parametrize("scale", [1, jnp.float32(0.5), jnp.asarray(0.5, jnp.bfloat16), jnp.ones(())])
def test_numbers_and_scalars_are_scales(scale):
    assert flash_attention(**arguments(scale=scale)).shape == (2, 2, 4, 8)


def test_a_scale_may_be_traced():
    assert jax.eval_shape(lambda scale: flash_attention(**arguments(scale=scale)), 0.5).shape == (2, 2, 4, 8)
