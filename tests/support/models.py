"""Tiny models of three kinds, with random weights in every leaf, and what the tests compare with."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from pdx.config import ModelConfig, RopeConfig
from pdx.model import forward, init_params

# f32 logits of two programs that compute the same thing, at another shape or in another order.
TOLERANCE = 2e-4

LLAMA = ModelConfig(
    family="llama",
    vocab_size=96,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=48,
    max_context=512,
)
# Rings of 128 slots in a cache of chunks up to 121 tokens.
GEMMA = ModelConfig(
    family="gemma3",
    vocab_size=96,
    d_model=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=1,
    head_dim=16,
    d_ff=48,
    max_context=512,
    windows=(8, None, 8),
    rope=RopeConfig(theta=1e6),
    rope_window=RopeConfig(theta=1e4),
    norm_eps=1e-6,
    activation="gelu_tanh",
    attn_scale=0.3,
    attn_softcap=2.0,
    logit_softcap=5.0,
    embed_scale=32**0.5,
    qk_norm=True,
    post_norms=True,
)
QWEN = ModelConfig(
    family="qwen2",
    vocab_size=96,
    d_model=32,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    d_ff=48,
    max_context=512,
    rope=RopeConfig(theta=1e5, divisors=(1.0, 1.0, 2.0, 4.0), attention_factor=1.1),
    tie_embeddings=False,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
)
# Heads that do not divide over most meshes.
NINE = ModelConfig(
    family="llama",
    vocab_size=96,
    d_model=36,
    num_layers=2,
    num_heads=9,
    num_kv_heads=3,
    head_dim=4,
    d_ff=48,
    max_context=512,
    qkv_bias=True,
)
ALL = {"llama": LLAMA, "gemma3": GEMMA, "qwen2": QWEN}


@cache
def params(cfg: ModelConfig, dtype: str = "float32"):
    """Random parameters in which norms are not ones and biases not zeros."""
    # A test may first ask for them while it is being traced.
    with jax.ensure_compile_time_eval():
        tree = init_params(cfg, jax.random.key(1), jnp.dtype(dtype))
        leaves, structure = jax.tree.flatten(tree)
        rng = np.random.default_rng(2)
        shaken = [x + rng.normal(0, 0.3, x.shape).astype(x.dtype) if x.ndim == 1 else x for x in leaves]
        return jax.tree.unflatten(structure, shaken)


def tokens(cfg: ModelConfig, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, shape, dtype=np.int32)


@partial(jax.jit, static_argnames=("cfg", "hidden_layers"))
def whole(weights, cfg, ids, hidden_layers=()):
    """`forward` without a cache, compiled: what every way through a cache must agree with."""
    return forward(weights, cfg, ids, hidden_layers=hidden_layers)


def close(a, b, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=tolerance)


def leaves_equal(a, b) -> None:
    """Two trees of one structure, equal bit for bit (NaN is itself)."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(bits(x), bits(y))


def bits(x) -> np.ndarray:
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}") if x.dtype.kind in "fV" else x


def snapshot(tree):
    """A copy on the host, so that the arrays can be donated."""
    return jax.tree.map(lambda x: np.array(x), tree)
