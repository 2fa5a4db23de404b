"""What the sampling program contains, where it runs and how often it is compiled."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pdx.sampling.filters import CANDIDATES, GROUP
from pdx.sampling.sampler import SamplingOptions, SamplingState, sample
from pdx.sharding import make_mesh, place_rows
from tests.support.sampling_reference import SETTINGS, mixed_batch

pytestmark = pytest.mark.thin(3)


def test_observe_is_in_place_where_the_state_is_donated():
    state = SamplingState.create([SamplingOptions()] * 2, 4096)
    step = jax.jit(SamplingState.observe, donate_argnums=0)
    compiled = step.lower(state, jnp.zeros(2, jnp.int32), jnp.ones(2, bool)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= state.output_counts.nbytes
    assert memory.temp_size_in_bytes < state.output_counts.nbytes / 4


def test_every_setting_runs_in_one_program(count_compiles):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 777)), jnp.float32)
    states = [
        SamplingState.create([SamplingOptions(seed=i, **setting) for i in range(3)], 777, batch=4)
        for setting in SETTINGS
    ]
    positions = [jnp.full(4, i) for i in range(len(states))]
    step = jax.jit(lambda logits, state, at: sample(logits, state, at, num_logprobs=2))
    step(logits, states[0], positions[0])
    with count_compiles() as compiled:
        for state, at in zip(states, positions, strict=True):
            step(logits, state, at)
        assert compiled() == 0
    assert step._cache_size() == 1


def equations(jaxpr, inside=()):
    """All equations with the primitives that enclose each."""
    for eqn in jaxpr.eqns:
        yield eqn, inside
        for sub in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from equations(sub, (*inside, eqn.primitive.name))


def branches_of(jaxpr):
    """The branches of the first `cond` in a jaxpr, looked for through nested calls."""
    for eqn, _ in equations(jaxpr):
        if eqn.primitive.name == "cond":
            return [b.jaxpr for b in eqn.params["branches"]]
    raise AssertionError("there is no cond")


@pytest.mark.parametrize("vocab", [49_152, 50_257])
def test_nothing_sorts_the_vocabulary_and_greedy_steps_do_next_to_nothing(vocab):
    state = SamplingState.create([], vocab, batch=8)
    traced = sample.trace(jnp.zeros((8, vocab)), state, jnp.zeros(8, jnp.int32), num_logprobs=5)
    names = set()
    for eqn, inside in equations(traced.jaxpr.jaxpr):
        names.add(eqn.primitive.name)
        if eqn.primitive.name in ("top_k", "approx_top_k"):
            assert eqn.invars[0].aval.shape[-1] <= CANDIDATES * GROUP
        if "cond" not in inside and eqn.primitive.name not in ("jit", "pjit", "cond"):
            assert all(v.aval.size < vocab for v in (*eqn.invars, *eqn.outvars)), eqn
    assert "top_k" in names
    assert not names & {"sort", "cumlogsumexp"}
    choose, plain = branches_of(traced.jaxpr.jaxpr)
    done = {eqn.primitive.name for eqn, _ in equations(plain)}
    assert {"reduce_max", "argmax"} <= done
    assert not done & {"exp", "log", "while", "top_k", "threefry2x32", "random_bits", "scatter-add", "div", "cond"}
    assert {"exp", "while", "top_k"} <= {eqn.primitive.name for eqn, _ in equations(choose)}


def test_the_compiled_program_sorts_candidates_only():
    vocab = 20_000
    state = SamplingState.create([SamplingOptions()], vocab)
    text = sample.lower(jnp.zeros((1, vocab)), state, jnp.zeros(1, int), num_logprobs=5).compile().as_text()
    assert "TopK" in text
    for line in text.splitlines():
        if " sort(" in line:
            assert str(vocab) not in line.split(" sort(")[0], line


@pytest.mark.slow
def test_sampling_under_vmap():
    logits, options, _ = mixed_batch(vocab=500)
    state = SamplingState.create(options, 500)
    positions = jnp.arange(24).reshape(3, 8)
    got = jax.vmap(lambda at: sample(logits, state, at).tokens)(positions)
    for i in range(3):
        np.testing.assert_array_equal(got[i], sample(logits, state, positions[i]).tokens)


def test_sampling_inside_a_loop():
    logits, options, prompts = mixed_batch()
    state = SamplingState.create(options, 9000, prompts=prompts)

    @jax.jit
    def loop(state):
        def step(state, i):
            tokens = sample(logits, state, jnp.full(8, i)).tokens
            return state.observe(tokens, jnp.ones(8, bool)), tokens

        return jax.lax.scan(step, state, jnp.arange(4))

    after, tokens = loop(state)
    for i in range(4):
        expected = sample(logits, state, jnp.full(8, i)).tokens
        np.testing.assert_array_equal(tokens[i], expected)
        state = state.observe(expected, jnp.ones(8, bool))
    np.testing.assert_array_equal(after.output_counts, state.output_counts)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["data=2,model=4", "model=8"])
def test_logits_sharded_over_a_mesh_give_the_same_tokens(sizes):
    logits, options, prompts = mixed_batch(vocab=9216)
    state = SamplingState.create(options, 9216, prompts=prompts)
    expected = sample(logits, state, jnp.arange(8), num_logprobs=3)
    mesh = make_mesh(sizes)
    axes = PartitionSpec("data" if "data" in sizes else None, "model")
    got = sample(
        jax.device_put(logits, NamedSharding(mesh, axes)),
        place_rows(state, mesh),
        place_rows(jnp.arange(8), mesh),
        num_logprobs=3,
    )
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_array_equal(got.top_ids, expected.top_ids)
    np.testing.assert_allclose(got.logprob, expected.logprob, atol=1e-5)
