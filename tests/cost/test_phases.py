"""The cost model against what is declared, and the rules that follow from it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pdx
from pallas_kernels.hardware import chip
from pdx import cost
from pdx.cache.dense import cache_specs
from pdx.cost import Setup, tradeoffs, visible_pairs
from pdx.cost.planned_layers import Experts, Latent
from pdx.model import param_specs
from pdx.plan import published
from pdx.quant import Policy, quantized_specs
from pdx.sharding import is_spec
from tests.support import models

pytestmark = pytest.mark.thin(3)
CONFIGS = {"llama": models.LLAMA, "gemma": models.GEMMA}


@pytest.mark.parametrize(
    "quantize",
    [
        None,
        "int8",
        "w8a8,lm_head=none",
        "int8:g32,*.down_proj=int8",
        "int4:g32:affine,*.down_proj=int8",
        "none,layers.-1.*=int8",
    ],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_those_declared(name, quantize):
    cfg = CONFIGS[name]
    specs = quantized_specs(param_specs(cfg, jnp.bfloat16), Policy.parse(quantize))
    leaves = jax.tree.leaves(specs, is_leaf=is_spec)
    halves = [x for x in leaves if x.dtype == jnp.int4]  # counted as a byte each
    declared = sum(x.size_bytes for x in leaves) - sum(x.size_bytes // 2 for x in halves)
    assert sum(Setup(cfg, quantize=quantize).weights.values()) == declared


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("window", [None, 128])
def test_the_cache_is_that_declared(kv_dtype, window):
    cfg = replace(models.LLAMA, max_context=4096, windows=(window, None))
    specs = cache_specs(cfg, 3, 1024, dtype=jnp.dtype(kv_dtype), layout="heads_first")
    declared = sum(x.size_bytes for x in jax.tree.leaves(specs.layers, is_leaf=is_spec))
    assert Setup(cfg, kv_dtype=kv_dtype).cache_bytes(3, 1024) == declared


@settings(max_examples=60, deadline=None)
@given(new=st.integers(1, 40), held=st.integers(0, 60), window=st.none() | st.integers(1, 50))
def test_pairs_are_counted(new, held, window):
    queries = np.arange(held, held + new)[:, None]
    keys = np.arange(held + new)[None]
    seen = (keys <= queries) & (keys > queries - (window or held + new + 1))
    assert visible_pairs(new, held, window) == seen.sum()


LLAMA_8B = pdx.ModelConfig(
    family="llama",
    vocab_size=128256,
    d_model=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    d_ff=14336,
    max_context=8192,
    tie_embeddings=False,
)


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
    assert (
        cost.room(small, v5e) - small.cache_bytes(most, 2048)
        >= 0
        > cost.room(small, v5e) - small.cache_bytes(most + 1, 2048)
    )
    context = cost.largest_context(small, v5e, 16)
    assert small.cache_bytes(16, context) <= cost.room(small, v5e)
    fast = cost.best_batch(small, v5e, 2048, 0.0125)
    assert small.decode(fast, 2048).seconds(v5e) <= 0.0125 < small.decode(fast + 1, 2048).seconds(v5e)
    assert cost.best_batch(small, v5e, 2048, 0.001) == 0


def test_speculation_pays_from_its_break_even_on():
    assert tradeoffs.speculation(0.8, 4, 0.1) == pytest.approx((1 - 0.8**5) / 0.2 / 1.4)
    even = tradeoffs.break_even(4, 0.1)
    assert tradeoffs.speculation(even, 4, 0.1) == pytest.approx(1)
    assert tradeoffs.break_even(4, 1.0) is None
    setup, v5e = Setup(LLAMA_8B), chip("v5e")
    assert tradeoffs.verify_cost(setup, v5e, 1, 1024, 4) < 1.05  # one row: weights are read once all the same
    assert tradeoffs.verify_cost(setup, v5e, 256, 1024, 4) > 1.5


def test_more_chips_and_less_bytes_are_faster():
    v5e = chip("v5e")
    plain, small = (Setup(LLAMA_8B, quantize=q).decode(8, 2048) for q in (None, "int8"))
    assert plain.seconds(v5e, 8) == pytest.approx(plain.seconds(v5e) / 8)
    assert 1.7 < plain.seconds(v5e) / small.seconds(v5e) < 2
    prefill = [Setup(LLAMA_8B, quantize=q).prefill(1, 2048).seconds(v5e) for q in (None, "int8", "w8a8")]
    assert prefill[0] == pytest.approx(prefill[1], rel=0.05)
    assert prefill[2] < 0.6 * prefill[0]


def test_a_mixed_step_reads_its_weights_once():
    setup = Setup(LLAMA_8B)
    mixed = setup.mixed([(1, 2047)] * 8 + [(256, 512)])
    decode, chunk = setup.decode(8, 2048), setup.prefill(1, 256, 512)
    assert mixed.flops == decode.flops + chunk.flops
    read = {
        part: decode.bytes_by_part[part] + chunk.bytes_by_part[part] - mixed.bytes_by_part[part]
        for part in mixed.bytes_by_part
    }
    assert read == {"weights": setup.streamed(1), "kv read": 0, "kv written": 0, "activations": 0}


def test_what_chunks_cost_and_protect():
    setup, v5e = Setup(LLAMA_8B, quantize="int8"), chip("v5e")
    whole = setup.prefill(1, 8192).seconds(v5e)
    assert tradeoffs.chunked_prefill(setup, v5e, 8192, 8192) == whole
    times = [tradeoffs.chunked_prefill(setup, v5e, 8192, chunk) / whole for chunk in (1024, 256, 64)]
    assert times == sorted(times)
    assert times[0] < 1.01  # a chunk above the critical batch costs next to nothing
    assert times[-1] > 1.5  # one below reads weights for nothing
    stalls = [tradeoffs.longest_step(setup, v5e, 8, 2048, 8192, chunk) for chunk in (8192, 1024, 256)]
    assert stalls == sorted(stalls, reverse=True)
    assert stalls[0] > whole > 7 * stalls[1]


def test_the_largest_chunk_keeps_the_objective():
    setup, v5e = Setup(LLAMA_8B, quantize="int8"), chip("v5e")
    chunk = tradeoffs.largest_chunk(setup, v5e, 8, 2048, 0.030)

    def step(new):
        return setup.mixed([(1, 2047)] * 8 + [(new, 2048 - new)]).seconds(v5e)

    assert step(chunk) <= 0.030 < step(chunk + 1)
    assert 100 < chunk < tradeoffs.largest_chunk(setup, v5e, 8, 2048, 0.060)
    assert tradeoffs.largest_chunk(setup, v5e, 8, 2048, 0.005) == 0
    assert tradeoffs.largest_chunk(setup, v5e, 8, 2048, 60.0) == 2048


MIXTRAL = published.shape("mixtral-8x7b").setup()


def test_experts_are_read_as_they_are_picked():
    """Drawn at random: k different ones of E for each token."""
    rng, experts = np.random.default_rng(0), Experts(16, 3, 8)
    for tokens in (1, 4, 20):
        drawn = [len(set(np.concatenate([rng.permutation(16)[:3] for _ in range(tokens)]))) for _ in range(2000)]
        assert experts.read(tokens) * 16 == pytest.approx(np.mean(drawn), rel=0.02)
    one = MIXTRAL.decode(1, 1).bytes_by_part["weights"]
    assert one == pytest.approx(2 * 12.75e9, rel=0.002)
    assert MIXTRAL.decode(512, 1).bytes_by_part["weights"] == pytest.approx(2 * 46.57e9, rel=0.002)


def test_experts_raise_the_critical_batch():
    """By E / k, less what attention's matrices and the head, which are not experts, take of it."""
    v5e, experts = chip("v5e"), MIXTRAL.weights["experts"] / sum(MIXTRAL.weights.values())
    assert experts > 0.96
    dense = cost.critical_batch(Setup(LLAMA_8B), v5e)
    assert 3.5 * dense < cost.critical_batch(MIXTRAL, v5e) < 4 * dense
    only = replace(MIXTRAL, experts=replace(MIXTRAL.experts, num_experts=2))  # both, always: no mixture
    assert cost.critical_batch(only, v5e) == pytest.approx(dense, rel=0.01)
    assert only.decode(1, 1).bytes_by_part["weights"] == only.decode(9, 1).bytes_by_part["weights"] - 8 * 2 * 4096


def test_a_mixture_of_one_is_the_dense_model():
    """But for its router."""
    one = Setup(LLAMA_8B, experts=Experts(1, 1, LLAMA_8B.d_ff))
    dense, mixture = Setup(LLAMA_8B).prefill(3, 100), one.prefill(3, 100)
    router = 32 * 4096
    assert mixture.flops == dense.flops + 2 * 300 * router
    assert mixture.bytes_by_part["weights"] == dense.bytes_by_part["weights"] + 2 * router
    assert mixture.flops_by_part["routing"] == 2 * 300 * router


def test_latent_attention_by_its_two_orders():
    latent = Latent(1536, 512, 128, 64, 128)
    assert Setup(LLAMA_8B, latent=latent).kv_token_bytes == 2 * 576
    # One token: scores and sums over 512 latents and 64 positions a head. DeepSeek-V2, arXiv 2405.04434.
    assert latent.attention_flops(128, 4096, 4095) == 2 * 4096 * 128 * (512 + 64 + 512)
    # A whole prompt: heads of 192 and 128, nothing held to be made again.
    assert latent.attention_flops(128, 4096 * 4097 // 2, 0) == 4096 * 4097 * 128 * (192 + 128)
    v3 = published.shape("deepseek-v3").setup()
    assert v3.cache_bytes(1, 1) == 61 * 1152  # 70 KB a token, which the report gives
    with pytest.raises(ValueError, match="one of 1 to 2"):
        Experts(2, 3, 8)
    with pytest.raises(ValueError, match="at least 1"):
        Latent(1536, 512, 0, 64, 128)
