"""cuDNN for whole prompts: which calls `auto` gives it on a Hopper, what it refuses, and the call that it makes.

No GPU is needed: the device traced for is an abstract one, and JAX lowers the call without cuDNN. Nothing is run.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from pallas_kernels import flash_attention
from pallas_kernels.analysis.problems import problems
from pallas_kernels.analysis.targets import Target
from pallas_kernels.attention.call import Call, make_call
from pallas_kernels.dispatch import use
from pallas_kernels.flash_attention import cudnn
from pallas_kernels.flash_attention.api import explain

PROMPT = Call(
    op="flash_attention",
    batch=1,
    queries=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    value_dim=128,
    slots=8192,
    dtype="bfloat16",
    kv_dtype="bfloat16",
    layout="heads_last",
    whole=True,
)


@pytest.fixture
def installed(monkeypatch):
    """As if this process had cuDNN 9.10."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def shapes(queries=2048, slots=4096, heads=8, kv_heads=2, dim=128, dtype=jnp.bfloat16):
    q, kv = (2, queries, heads, dim), (2, slots, kv_heads, dim)
    return [jax.ShapeDtypeStruct(x, t) for x, t in ((q, dtype), (kv, dtype), (kv, dtype), ((2,), jnp.int32))]


def attend(q, k, v, lengths, **changes):
    settings = {"starts": np.zeros(2, np.int32), "scale": 0.1, "layout": "heads_last"} | changes
    return flash_attention(q, k, v, lengths=lengths, **settings)


def lowered(**settings) -> str:
    """The program for a CUDA device."""
    return jax.jit(partial(attend, **settings)).trace(*shapes()).lower(lowering_platforms=("cuda",)).as_text()


def test_auto_takes_it_for_whole_prompts_on_a_hopper(installed):
    for chip, name in (("h200", "cudnn"), ("h100", "cudnn"), ("a100", "gpu"), ("b200", "gpu"), ("v5e", "xla")):
        with Target.get(chip).tracing():
            choice = explain("auto", call=PROMPT)
            assert choice.implementation == name
            assert ("measured on an H200" in choice.reason) == (name == "cudnn")
    with Target.get("h200").tracing():
        assert "288 us against 341 with 4096 tokens" in explain(call=PROMPT).reason
        assert "476 us against 669" in explain(call=replace(PROMPT, causal=False, lengths=False)).reason
        assert explain(platform="gpu", call=PROMPT).implementation == "cudnn"
        assert explain(platform="tpu", call=replace(PROMPT, layout="folded")).implementation == "tpu"


REFUSED = {
    "whole prompts: starts must be zeros": {"whole": False},
    "a window and a soft cap": {"window": 512, "softcap": 5.0},
    "without sinks": {"sinks": True},
    "without a tree": {"tree": True},
    "without a log-sum-exp": {"return_lse": True},
    "not bfloat16 and int8": {"kv_dtype": "int8"},
    "not float32 and float32": {"dtype": "float32", "kv_dtype": "float32"},
    "not 256 and 256": {"head_dim": 256, "value_dim": 256},
    "not 128 and 64": {"value_dim": 64},
    "lengths must be None": {"causal": False},
    "a scale that is a number": {"scale": None},
    "layout 'heads_last'": {"layout": "heads_first"},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_cannot_do_it_refuses_and_auto_leaves_alone(installed, reason):
    call = replace(PROMPT, **REFUSED[reason])
    with Target.get("h200").tracing():
        with pytest.raises(NotImplementedError, match=f"no cudnn implementation for this call: .*{reason}"):
            explain("cudnn", call=call)
        assert explain("auto", call=call).implementation != "cudnn"
        assert explain("cudnn", call=PROMPT).reason == "named by the caller"


def test_auto_prefers_it_only_near_what_was_measured(installed):
    with Target.get("h200").tracing():
        for changes in ({"queries": cudnn.PREFERRED_QUERIES - 1}, {"head_dim": 64, "value_dim": 64}):
            call = replace(PROMPT, **changes)
            assert explain("auto", call=call).implementation == "gpu"
            assert explain("cudnn", call=call).implementation == "cudnn"
        with use("gpu"):
            assert explain("auto", call=PROMPT).implementation == "gpu"


def test_it_needs_cudnn_and_a_hopper(monkeypatch):
    def missing():
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", missing)
    with Target.get("h200").tracing():
        assert explain("auto", call=PROMPT).implementation == "gpu"
        with pytest.raises(NotImplementedError, match=r"finds no cuDNN .*not detected"):
            explain("cudnn", call=PROMPT)
    with pytest.raises(NotImplementedError, match=r"compute capability 9\.0 .*use implementation='xla'"):
        attend(*(jnp.zeros(x.shape, x.dtype) for x in shapes(64, 64)), implementation="cudnn")


def test_zeros_that_are_not_traced_say_that_rows_are_whole():
    def whole(starts):
        q, k, v, _ = shapes(16, 16)
        return make_call("flash_attention", dict(q=q, k=k, v=v, starts=starts), scale=1.0, layout="heads_last").whole

    assert whole(np.zeros(2, np.int32))
    assert not whole(np.array([0, 1]))
    seen = []
    jax.jit(lambda starts: seen.append(whole(starts)))(jnp.zeros(2, jnp.int32))
    assert seen == [False]


def test_its_problems_are_the_whole_prompts(installed):
    with Target.get("h200").tracing():
        found = {p.case.name: p for p in problems("flash_attention", "cudnn", large_only=True)}
        can = {name for name, p in found.items() if not p.unsupported}
        whole = {"Llama 3 8B, bf16, no mask", "Llama 3 8B, bf16", "SmolLM2 135M, bf16"}
        assert can == whole | {"few tokens of a large capacity, bf16"}
        for name in can:
            fn, arrays = found[name].fn(), found[name].arrays.values()
            assert "__cudnn$fmha" in jax.jit(fn).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def test_the_program_calls_cudnn(installed):
    with Target.get("h200").tracing():
        for settings in ({}, {"implementation": "cudnn"}):
            text = lowered(**settings)
            assert "__cudnn$fmhaSoftmax" in text
            assert "triton" not in text
        text = lowered(starts=jnp.zeros(2, jnp.int32) + 1)
        assert "__cudnn" not in text
        assert "triton" in text
    with Target.get("a100").tracing():
        assert "__cudnn" not in lowered()


def test_memory_past_a_row_does_not_reach_it(monkeypatch):
    """What it hands to JAX, computed by JAX's own path: prompts of two lengths, NaN behind them, one row idle."""
    own, seen = jax.nn.dot_product_attention, {}

    def instead(q, k, v, **settings):
        seen.update(settings, keys=k.shape[1], finite=bool(jnp.isfinite(k).all() and jnp.isfinite(v).all()))
        return own(q, k, v, **settings | {"implementation": "xla"})

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((3, n, h, 8)), jnp.float32) for n, h in ((12, 4), (20, 2), (20, 2)))
    lengths = jnp.array([12, 5, 0])
    k, v = (jnp.where((jnp.arange(20) < lengths[:, None])[..., None, None], x, jnp.nan) for x in (k, v))
    arrays = dict(q=q, k=k, v=v, starts=np.zeros(3, np.int32), lengths=lengths)
    out = cudnn.run(arrays, make_call("flash_attention", arrays, scale=0.3, layout="heads_last"))
    right = flash_attention(**arrays, scale=0.3, layout="heads_last", implementation="xla")
    assert seen == {"scale": 0.3, "is_causal": True, "implementation": "cudnn", "keys": 12, "finite": True}
    assert np.isfinite(out).all()
    assert not np.asarray(out[2]).any()
    for row, length in enumerate((12, 5)):
        np.testing.assert_allclose(out[row, :length], right[row, :length], atol=1e-5)


def test_it_cannot_be_interpreted(installed):
    with Target.get("h200").tracing(), pytest.raises(NotImplementedError, match="cuDNN has no interpreter"):
        lowered(implementation="cudnn", interpret=True)
