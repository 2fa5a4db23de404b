"""What the compiler made of the steps: caches updated in place, IEEE f32 in every product, nothing compiled twice."""

import dataclasses
import gc
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.analysis.targets import Target
from pdx import steps
from pdx.cache.dense import cache_specs, init_cache
from pdx.cache.layer import default_layout
from pdx.cache.paged import init_paged_cache
from pdx.config import ModelConfig
from pdx.generation import programs
from pdx.model import forward, param_specs
from pdx.sampling.sampler import SamplingOptions, SamplingState
from pdx.sharding import is_spec
from tests.support.models import ALL, GEMMA, LLAMA, params, tokens
from tests.support.programs import aliased_parameters, check_in_place, equations

pytestmark = pytest.mark.thin(3)

# Head sizes and a cache as real ones are; few layers and a small vocabulary, to compile fast.
REAL = ModelConfig(
    family="llama",
    vocab_size=512,
    d_model=576,
    num_layers=2,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    d_ff=256,
    max_context=8192,
    windows=(None, 512),
)
B, CAPACITY, CHUNK = 8, 4096, 24


def abstract(specs):
    return jax.tree.map(lambda s: s.abstract(), specs, is_leaf=is_spec)


def arguments(cfg, dtype=jnp.float32):
    """Of every step, without data: parameters, cache, and the arguments that make it prefill, decode or verify."""
    weights, cache = abstract(param_specs(cfg, dtype)), abstract(cache_specs(cfg, B, CAPACITY, chunk=128, dtype=dtype))
    ids, flags = partial(jax.ShapeDtypeStruct, dtype=jnp.int32), partial(jax.ShapeDtypeStruct, dtype=bool)
    sampling = jax.eval_shape(lambda: SamplingState.create([SamplingOptions(seed=0)] * B, cfg.vocab_size))
    return (
        {
            "prefill": (steps.PROGRAMS["prefill"], (weights, cfg, ids((B, CHUNK)), ids((B,)), cache, "auto")),
            "decode": (steps.PROGRAMS["decode_step"], (weights, cfg, ids((B,)), flags((B,)), cache, "auto")),
            "verify": (steps.PROGRAMS["verify"], (weights, cfg, ids((B, 5)), ids((B,)), cache, "auto")),
            "decode_many": (
                steps.PROGRAMS["decode_many"],
                (weights, cfg, ids((B,)), cache, sampling, 8, flags((B,)), ids(()), 0, "auto"),
            ),
        },
        cache,
        sampling,
    )


STEPS = ["prefill", "decode", "verify", "decode_many"]


@pytest.mark.parametrize("step", STEPS)
def test_the_cache_is_updated_in_place(step):
    calls, cache, sampling = arguments(REAL)
    function, args = calls[step]
    compiled = function.lower(*args).compile()
    check_in_place(compiled, "cache", cache)
    if step == "decode_many":
        given = aliased_parameters(compiled)
        assert len(given) >= len(jax.tree.leaves(cache)) + len(jax.tree.leaves(sampling))


def test_a_cache_that_is_copied_is_noticed():
    calls, cache, _ = arguments(REAL)
    _, (weights, cfg, ids, active, _, kernels) = calls["decode"]
    kept = jax.jit(steps.dense._step, static_argnames=("cfg", "kernels")).lower(
        weights, cfg, ids, active, cache, kernels
    )
    with pytest.raises(AssertionError, match="not reused"):
        check_in_place(kept.compile(), "cache", cache)

    def scaled(cache):
        # Read by the sum after it was written: the old array must be kept beside the new one.
        new = jax.tree.map(lambda x: x.at[:1].set(x[-1:]), cache)
        return new, sum(jnp.sum(x * y) for x, y in zip(jax.tree.leaves(cache), jax.tree.leaves(new), strict=True))

    copied = jax.jit(scaled, donate_argnums=0).lower(cache).compile()
    with pytest.raises(AssertionError, match=r"temporaries|copied"):
        check_in_place(copied, "cache", cache)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("cfg", ALL.values(), ids=ALL)
def test_f32_products_are_ieee_f32(cfg, step):
    function, args = arguments(cfg)[0][step]
    traced = function.trace(*args)
    products = list(equations(traced.jaxpr.jaxpr, "dot_general"))
    # Seven matrices and two attention products a layer, and the head.
    assert len(products) >= 7 + 2 + 1
    for eqn in products:
        assert all(x.aval.dtype == jnp.float32 for x in eqn.invars)
        assert eqn.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2, eqn
    # The lowered text says so too: nothing was found that the walk did not see.
    text = traced.lower().as_text()
    assert text.count("stablehlo.dot_general") == text.count("precision = [HIGHEST, HIGHEST]")


def test_without_a_cache_too():
    traced = jax.jit(lambda p, x: forward(p, GEMMA, x).logits).trace(params(GEMMA), tokens(GEMMA, 2, 8))
    products = list(equations(traced.jaxpr.jaxpr, "dot_general"))
    assert len(products) >= 10
    assert all(eqn.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2 for eqn in products)


def test_the_walk_finds_what_is_hidden():
    def inner(i, x):
        return jax.lax.cond(i > 1, lambda: x @ x, lambda: jnp.einsum("ij,kj->ik", x, x, precision="highest"))

    jaxpr = jax.make_jaxpr(lambda x: jax.jit(lambda y: jax.lax.fori_loop(0, 3, inner, y))(x))(jnp.ones((2, 2)))
    found = [eqn.params["precision"] for eqn in equations(jaxpr.jaxpr, "dot_general")]
    assert sorted(p is None for p in found) == [False, True]


def test_bf16_products_are_left_to_the_device():
    function, args = arguments(LLAMA, jnp.bfloat16)[0]["decode"]
    for eqn in equations(function.trace(*args).jaxpr.jaxpr, "dot_general"):
        assert all(x.aval.dtype == jnp.bfloat16 for x in eqn.invars)
        assert eqn.params["precision"] in (None, (jax.lax.Precision.DEFAULT,) * 2)


# --- nothing is compiled twice


def test_the_counter_sees_a_compilation(count_compiles):
    double = jax.jit(lambda x: x * 2 + 0.123)
    x = np.ones(3, np.float32)
    with count_compiles() as compiles:
        double(x)
    assert compiles() == 1
    with count_compiles() as compiles:
        double(x)
    assert compiles() == 0
    with count_compiles() as compiles:
        double(np.ones(4, np.float32))
    assert compiles() == 1


@pytest.mark.slow
def test_a_second_request_compiles_nothing(count_compiles):
    """Other lengths, other active rows, other settings, another number of steps: the same programs."""
    cfg, weights = GEMMA, params(GEMMA)

    def request(cache, lengths, active, options, k, back):
        rows = len(lengths)
        sampling = SamplingState.create(options, cfg.vocab_size)
        ids = tokens(cfg, rows, CHUNK, seed=k)
        for check in (True, False):
            _, cache = steps.prefill(weights, cfg, ids, np.array(lengths), cache, check=check)
            _, cache = steps.decode_step(weights, cfg, ids[:, 0], np.array(active), cache, check=check)
            out = steps.decode_many(
                weights, cfg, ids[:, 1], cache, sampling, 4, active=np.array(active), steps=k, check=check
            )
            cache, sampling = out.cache, out.sampling
            _, cache = steps.verify(weights, cfg, ids[:, :5], np.minimum(lengths, 5), cache, check=check)
            cache = cache.truncate(np.asarray(cache.lengths) - np.minimum(lengths, back))
        return jax.block_until_ready(cache)

    plain = [SamplingOptions(seed=1)] * 3
    mixed = [
        SamplingOptions(temperature=0.7, top_k=5, seed=1),
        SamplingOptions(logprobs=3),
        SamplingOptions(top_p=0.5, temperature=1.0, repetition_penalty=1.3, logit_bias={3: 1.0}, seed=2),
    ]
    cache = request(init_cache(cfg, 3, 256, chunk=CHUNK), [3, 24, 1], [True, True, False], plain, 2, 0)
    with count_compiles() as compiles:
        cache = cache.truncate(np.zeros(3, np.int32))
        for k in (1, 3, 4):
            cache = request(cache, [24, k, 7], [k > 1, True, True], mixed, k, 3)
    assert compiles() == 0


FRESH = """
import jax, numpy as np
import pdx
from tests.support.models import LLAMA, params

events = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, _, **kwargs: events.append(name) if name == "/jax/core/compile/backend_compile_duration" else None)
double = jax.jit(lambda x: x * 2 + 0.123)
double(np.ones(3, np.float32))
for run in range(2):
    del events[:]
    cache = pdx.init_cache(LLAMA, 1, 128, layout="folded")
    _, cache = pdx.prefill(params(LLAMA), LLAMA, np.ones((1, 8), np.int32), np.array([8]), cache, kernels="pallas")
    pdx.decode_step(params(LLAMA), LLAMA, np.ones(1, np.int32), np.array([True]), cache, kernels="pallas")
assert not events, f"{len(events)} programs of the first run were compiled anew in the second"
import jax.experimental.pallas.triton, jax.experimental.pallas.fuser
double(np.ones(3, np.float32))
assert not events, "importing Pallas made JAX forget its programs"
"""


@pytest.mark.slow
def test_kernels_imported_while_they_are_traced_compile_nothing_twice():
    """In a process of its own: in JAX 0.12 importing Pallas changes the key of JAX's caches, once."""
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8], ids=["bf16", "int8"])
@pytest.mark.parametrize(("target", "means"), [("v5e", "tpu"), ("a100", "gpu"), ("v5e", "xla"), ("a100", "xla")])
def test_steps_take_the_path_that_auto_was_made_to_mean(target, means, dtype):
    """Traced for a chip, dense and paged, the write of new keys and values too, which has no kernel of most kinds."""
    # A configuration that nothing else traces: what was traced before would stand.
    cfg = dataclasses.replace(LLAMA, max_context=1000 + sum(map(ord, target + means)))
    layout = default_layout(Target.get(target).chip.platform)
    given = abstract(param_specs(cfg, jnp.bfloat16))
    dense = init_cache(cfg, 2, 256, chunk=64, dtype=dtype, layout=layout)
    paged = init_paged_cache(cfg, 4, page_size=128, dtype=dtype, layout=layout)
    rows, starts = jnp.ones(2, jnp.int32), jnp.arange(3, dtype=jnp.int32)
    packed = jnp.zeros((1, 2, 2), jnp.int32), rows, starts, 0, None

    def run(params, dense, paged):
        return (
            steps.PROGRAMS["prefill"](params, cfg, jnp.zeros((2, 64), jnp.int32), rows, dense, "auto"),
            steps.PROGRAMS["decode_step"](params, cfg, rows, rows > 0, dense, "auto"),
            steps.PROGRAMS["mixed_step"](params, cfg, jnp.zeros(24, jnp.int32), paged, *packed, "auto"),
        )

    with Target.get(target).tracing(), dispatch.use(means):
        text = str(jax.make_jaxpr(run)(given, dense, paged))
    assert ("pallas_call" in text) == (means != "xla")


def test_a_program_goes_with_what_kept_it():
    """JAX's caches hold on to what a living function was compiled to: the step lives on, its program must not."""
    known, double = programs.Programs(), jax.jit(lambda x: 2 * x, donate_argnames="x")
    x = jnp.ones(3)
    assert known.call("double", double, x=x).tolist() == [2, 2, 2]
    assert x.is_deleted(), "the program donates what the function donates"
    kept = jax.devices()[0].client.live_executables
    before = len(kept())
    del known
    gc.collect()
    assert len(kept()) == before - 1


def test_memory_is_handed_back_where_the_system_can_take_it(monkeypatch):
    programs._return_free_memory()
    monkeypatch.setattr(programs.ctypes, "CDLL", lambda name: object())
    programs._return_free_memory()
