"""The cost model against what is declared, traced and compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pdx
from pallas_kernels.hardware import chip
from pallas_kernels.traffic import dot_flops, dots
from pdx import cost
from pdx.cache.dense import cache_specs
from pdx.cost import Setup, visible_pairs
from pdx.model import param_specs
from pdx.quant import Policy, quantized_specs
from pdx.sharding import is_spec
from tests import models

CONFIGS = {"llama": models.LLAMA, "gemma": models.GEMMA}


@pytest.mark.parametrize("quantize", [None, "int8", "w8a8,lm_head=none", "int8:g32,*.down_proj=int8",
                                      "int4:g32:affine,*.down_proj=int8", "none,layers.-1.*=int8"])  # fmt: skip
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_those_declared(name, quantize):
    cfg = CONFIGS[name]
    specs = quantized_specs(param_specs(cfg, jnp.bfloat16), Policy.parse(quantize))
    leaves = jax.tree.leaves(specs, is_leaf=is_spec)
    halves = [x for x in leaves if x.dtype == jnp.int4]  # counted as a byte each
    declared = sum(x.size_bytes for x in leaves) - sum(x.size_bytes // 2 for x in halves)
    assert sum(Setup(cfg, quantize=quantize).weights.values()) == declared


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_the_cache_is_that_declared_where_slots_are_whole(kv_dtype):
    """Not so in window layers, which hold their window rounded up, and a chunk."""
    cfg = models.LLAMA
    specs = cache_specs(cfg, 3, 256, dtype=jnp.dtype(kv_dtype), layout="heads_first")
    declared = sum(x.size_bytes for x in jax.tree.leaves(specs.layers, is_leaf=is_spec))
    assert Setup(cfg, kv_dtype=kv_dtype).cache_bytes(3, 256) == declared


@settings(max_examples=60, deadline=None)
@given(new=st.integers(1, 40), held=st.integers(0, 60), window=st.none() | st.integers(1, 50))
def test_pairs_are_counted(new, held, window):
    queries = np.arange(held, held + new)[:, None]
    keys = np.arange(held + new)[None]
    seen = (keys <= queries) & (keys > queries - (window or held + new + 1))
    assert visible_pairs(new, held, window) == seen.sum()


@pytest.mark.parametrize("quantize", [None, "w8a8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_those_of_the_traced_program(name, quantize):
    """All of a chunk's products; the reference attends to every key, seen or not."""
    cfg, rows, tokens = CONFIGS[name], 2, 12
    params = pdx.init_params(cfg, jax.random.key(0))
    if quantize:
        params = pdx.quant.quantize_params(params, quantize)
    ids = jnp.zeros((rows, tokens), jnp.int32)
    traced = jax.make_jaxpr(lambda p, x: pdx.forward(p, cfg, x, logits="last").logits)(params, ids)
    model = Setup(cfg, "float32", quantize).prefill(rows, tokens)
    everything = 4 * rows * tokens * tokens * cfg.num_heads * cfg.head_dim * cfg.num_layers
    # Two rows are kept, since the CPU makes two of one row of int8.
    assert sum(map(dot_flops, dots(traced))) == model.flops - model.flops_by_part["attention"] + everything
    pairs = sum(visible_pairs(tokens, 0, w) for w in cfg.windows)
    assert model.flops_by_part["attention"] == 4 * rows * pairs * cfg.num_heads * cfg.head_dim


LLAMA_8B = pdx.ModelConfig(family="llama", vocab_size=128256, d_model=4096, num_layers=32, num_heads=32,
                           num_kv_heads=8, head_dim=128, d_ff=14336, max_context=8192,
                           tie_embeddings=False)  # fmt: skip


def test_published_rules_come_out():
    """2 N FLOPs a token, KV bytes a token, and critical batches of the literature."""
    setup, v5e = Setup(LLAMA_8B), chip("v5e")
    assert sum(setup.weights.values()) == pytest.approx(16.06e9, rel=1e-3)
    assert setup.cache_bytes(1, 1) == 131072
    decode = setup.decode(1, 1)
    assert decode.flops == pytest.approx(2 * 7.5e9, rel=0.01)
    assert cost.critical_batch(setup, v5e) == pytest.approx(240, rel=0.05)
    assert cost.critical_batch(Setup(LLAMA_8B, quantize="int8"), v5e) == pytest.approx(120, rel=0.05)
    assert cost.critical_batch(Setup(LLAMA_8B, quantize="w8a8"), v5e) == pytest.approx(240, rel=0.05)
    assert decode.bound(v5e) == "memory"
    assert setup.prefill(1, 2048).bound(v5e) == "compute"
    # Attention of a decode step has an intensity of the query heads a KV head.
    long = setup.decode(1, 8192)
    assert long.flops_by_part["attention"] / long.bytes_by_part["kv read"] == pytest.approx(4)


def test_what_fits():
    v5e = chip("v5e")
    assert cost.largest_batch(Setup(LLAMA_8B), v5e, 2048) == 0
    small = Setup(LLAMA_8B, quantize="int8", kv_dtype="int8")
    most = cost.largest_batch(small, v5e, 2048)
    assert 32 <= most <= 64
    assert cost.room(small, v5e) - small.cache_bytes(most, 2048) >= 0 > cost.room(small, v5e) - small.cache_bytes(
        most + 1, 2048)  # fmt: skip
    context = cost.largest_context(small, v5e, 16)
    assert small.cache_bytes(16, context) <= cost.room(small, v5e)
    fast = cost.best_batch(small, v5e, 2048, 0.0125)
    assert small.decode(fast, 2048).seconds(v5e) <= 0.0125 < small.decode(fast + 1, 2048).seconds(v5e)
    assert cost.best_batch(small, v5e, 2048, 0.001) == 0


def test_speculation_pays_from_its_break_even_on():
    assert cost.speculation(0.8, 4, 0.1) == pytest.approx((1 - 0.8**5) / 0.2 / 1.4)
    even = cost.break_even(4, 0.1)
    assert cost.speculation(even, 4, 0.1) == pytest.approx(1)
    assert cost.break_even(4, 1.0) is None
    setup, v5e = Setup(LLAMA_8B), chip("v5e")
    assert cost.verify_cost(setup, v5e, 1, 1024, 4) < 1.05  # one row: weights are read once all the same
    assert cost.verify_cost(setup, v5e, 256, 1024, 4) > 1.5


def test_more_chips_and_less_bytes_are_faster():
    v5e = chip("v5e")
    plain, small = (Setup(LLAMA_8B, quantize=q).decode(8, 2048) for q in (None, "int8"))
    assert plain.seconds(v5e, 8) == pytest.approx(plain.seconds(v5e) / 8)
    assert 1.7 < plain.seconds(v5e) / small.seconds(v5e) < 2
    prefill = [Setup(LLAMA_8B, quantize=q).prefill(1, 2048).seconds(v5e) for q in (None, "int8", "w8a8")]
    assert prefill[0] == pytest.approx(prefill[1], rel=0.05)
    assert prefill[2] < 0.6 * prefill[0]
