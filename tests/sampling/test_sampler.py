"""What `sample` draws: distributions, independence, penalties, log-probabilities, odd rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from pdx.errors import RequestError
from pdx.sampling.filters import CANDIDATES, GROUP
from pdx.sampling.sampler import SamplingOptions, SamplingState, filtered_logits, sample
from tests.support import sampling_reference as reference
from tests.support.sampling_reference import PENALTIES, SETTINGS, mixed_batch

pytestmark = pytest.mark.thin(6)

# With fixed seeds these tests always give the same answer; a right sampler had one chance in 10,000 each to fail.
ALPHA = 1e-4
INF = float("inf")
ROWS, STEPS = 512, 40


@jax.jit
def draw_many(logits, state):
    """ROWS x STEPS tokens of one distribution: every row has a seed of its own, every step a position."""

    def step(_, position):
        return None, sample(logits, state, jnp.full(logits.shape[0], position)).tokens

    return jax.lax.scan(step, None, jnp.arange(STEPS))[1]


def p_value(tokens, probability) -> float:
    """Of the chi-square test of tokens against a distribution; rare tokens are counted together."""
    seen = np.bincount(np.ravel(tokens), minlength=len(probability))
    assert not seen[probability == 0].any(), "a token that was dropped has been drawn"
    expected = probability * seen.sum()
    common = expected >= 5
    seen, expected = ([*a[common], a[~common].sum()] for a in (seen, expected))
    if expected[-1] < 5:  # too rare even together to say anything about
        seen, expected = seen[:-1], expected[:-1]
    return 1.0 if len(seen) == 1 else stats.chisquare(seen, np.array(expected) * sum(seen) / sum(expected)).pvalue


def draw_like(logits, options: SamplingOptions, prompt=(), output=()):
    state = SamplingState.create([options], len(logits), prompts=[prompt], outputs=[output])
    state = jax.tree.map(lambda x: jnp.repeat(x, ROWS, axis=0), state)
    state = state.replace(seeds=jnp.stack([jnp.zeros(ROWS, jnp.uint32), jnp.arange(ROWS, dtype=jnp.uint32)], axis=1))
    return np.asarray(draw_many(jnp.tile(jnp.asarray(logits, jnp.float32), (ROWS, 1)), state))


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()))
def test_tokens_follow_the_distribution(setting):
    options = SamplingOptions(**setting)
    logits = (np.random.default_rng(7).normal(size=12) * 1.5).astype(np.float32)
    history = {"prompt": [1, 1, 4, 9], "output": [0, 2, 2, 2, 9]}
    tokens = draw_like(logits, options, **history)
    assert p_value(tokens, reference.probabilities(logits, options, **history)) > ALPHA


def test_the_distribution_test_can_fail():
    logits = (np.random.default_rng(7).normal(size=12) * 1.5).astype(np.float32)
    tokens = draw_like(logits, SamplingOptions(temperature=1.0))
    for other in (SamplingOptions(temperature=1.15), SamplingOptions(temperature=1.0, min_p=0.05)):
        with pytest.raises(AssertionError):
            assert p_value(tokens, reference.probabilities(logits, other)) > ALPHA


@pytest.mark.parametrize("setting", [{}, {"top_k": 300}, {"top_p": 0.7}, {"min_p": 0.1}])
def test_tokens_of_many_groups_follow_the_distribution(setting):
    """The draw of a group, the draw inside it, and boundaries that only the search finds."""
    options = SamplingOptions(temperature=1.0, **setting)
    logits = np.random.default_rng(3).normal(size=5 * GROUP + 7).astype(np.float32)
    probability = reference.probabilities(logits, options)
    assert (probability > 0).sum() > CANDIDATES
    assert p_value(draw_like(logits, options), probability) > ALPHA


def take(out, rows):
    return jax.tree.map(lambda x: np.asarray(x)[rows], out)


def test_a_row_ignores_its_slot_and_its_neighbours():
    logits, options, prompts = mixed_batch()
    vocab, positions = logits.shape[1], jnp.arange(8) * 3
    together = sample(logits, SamplingState.create(options, vocab, prompts=prompts), positions, num_logprobs=3)
    order = np.array([3, 7, 0, 5, 1, 6, 2, 4])
    state = SamplingState.create([options[i] for i in order], vocab, prompts=[prompts[i] for i in order])
    moved = sample(logits[order], state, positions[order], num_logprobs=3)
    jax.tree.map(np.testing.assert_array_equal, take(together, order), take(moved, ...))
    for row in range(8):  # alone among rows that ask for nothing, so that no branch is taken for a neighbour
        alone = [o if i == row else SamplingOptions() for i, o in enumerate(options)]
        out = sample(logits, SamplingState.create(alone, vocab, prompts=prompts), positions, num_logprobs=3)
        jax.tree.map(np.testing.assert_array_equal, take(together, row), take(out, row))


def test_a_row_ignores_the_batch_size():
    logits, options, prompts = mixed_batch()
    vocab, positions = logits.shape[1], jnp.arange(8)
    together = sample(logits, SamplingState.create(options, vocab, prompts=prompts), positions, num_logprobs=3)
    three = SamplingState.create(options[4:7], vocab, prompts=prompts[4:7])
    few = sample(logits[4:7], three, positions[4:7], num_logprobs=3)
    np.testing.assert_array_equal(together.tokens[4:7], few.tokens)
    np.testing.assert_allclose(together.top_logprobs[4:7], few.top_logprobs, atol=1e-5)


def test_seeds_and_positions():
    logits = jnp.zeros((8, 1000))

    def draw(seeds, positions):
        state = SamplingState.create([SamplingOptions(temperature=1, seed=s) for s in seeds], 1000)
        return np.asarray(sample(logits, state, jnp.asarray(positions)).tokens)

    same = draw([9] * 8, [4] * 8)
    assert len(set(same)) == 1
    np.testing.assert_array_equal(draw([9] * 8, [4] * 8), same)
    assert len(set(draw([9] * 8, range(8)))) == 8
    assert len(set(draw(range(8), [4] * 8))) == 8
    assert len(set(draw([9 + (i << 32) for i in range(8)], [4] * 8))) == 8  # all 64 bits of a seed count
    assert len(set(draw([None] * 8, [4] * 8))) > 4  # seeds of their own; two may still draw one token
    assert set(draw([None] * 8, [4] * 8)) != set(draw([None] * 8, [4] * 8))


@pytest.mark.parametrize("setting", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-5}])
def test_degenerate_settings_are_greedy(setting):
    logits, _, _ = mixed_batch()
    options = [SamplingOptions(**{"temperature": 1.0, "seed": i, **setting}) for i in range(8)]
    state = SamplingState.create(options, 9000)
    for position in range(3):
        got = sample(logits, state, jnp.full(8, position)).tokens
        np.testing.assert_array_equal(got, np.argmax(logits, axis=1))


def test_a_state_made_on_the_host_is_the_same_and_asks_no_device():
    options = [
        SamplingOptions(temperature=0.5, top_k=10**6, seed=1 << 40, logit_bias={3: 1.0}, logprobs=2),
        SamplingOptions(repetition_penalty=1.5, presence_penalty=0.1, seed=2),
    ]
    seen = {"prompts": [[1, 2], [4]], "outputs": [[3], [3, 3]]}
    host, device = (SamplingState.create(options, 50, **seen, batch=3, on_host=on_host) for on_host in (True, False))
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(host))
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), host, device)
    assert all(jax.tree.leaves(same))


def test_greedy_takes_the_lower_of_equals():
    logits = np.zeros((4, 9000), np.float32)
    logits[0, [4000, 8999]], logits[1, [130, 129]], logits[2, 8999] = 1.0, 2.0, 3.0
    state = SamplingState.create([], 9000, batch=4)
    np.testing.assert_array_equal(sample(jnp.asarray(logits), state, jnp.zeros(4, int)).tokens, [4000, 129, 8999, 0])


def test_penalties_and_bias_against_the_reference():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 50)).astype(np.float32) * 3
    options = [
        SamplingOptions(temperature=1, **o)
        for o in (
            {},
            {"repetition_penalty": 1.7},
            {"presence_penalty": 0.9},
            {"frequency_penalty": -0.6},
            {"logit_bias": {0: -INF, 49: 5.0, 7: -1.25}},
            {**PENALTIES, "logit_bias": {2: 1.0}},
        )
    ]
    prompts = [rng.integers(0, 50, 9) for _ in options]
    outputs = [rng.integers(0, 20, 12) for _ in options]
    state = SamplingState.create(options, 50, prompts=prompts, outputs=outputs)
    got = np.asarray(filtered_logits(jnp.asarray(logits), state))
    for row, o in enumerate(options):
        expected = reference.adjust(logits[row], o, prompts[row], outputs[row])
        np.testing.assert_allclose(got[row], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(got[0], logits[0])  # nothing asked: the same bits


def test_penalties_apply_to_greedy_rows():
    logits = jnp.asarray([[3.0, 2.9, 0.0], [3.0, 2.9, 0.0]])
    state = SamplingState.create([SamplingOptions(presence_penalty=0.5), SamplingOptions()], 3, outputs=[[0], [0]])
    np.testing.assert_array_equal(sample(logits, state, jnp.zeros(2, int)).tokens, [1, 0])


def test_observe_counts_what_active_rows_emit():
    state = SamplingState.create([SamplingOptions()] * 4, 10, outputs=[[3], [], [], []])
    after = state.observe(jnp.array([3, 4, 5, -1]), jnp.array([True, True, False, True]))
    expected = np.zeros((4, 10), int)
    expected[0, 3], expected[1, 4] = 2, 1
    np.testing.assert_array_equal(after.output_counts, expected)


def test_put_replaces_one_row():
    _, options, prompts = mixed_batch()
    state = SamplingState.create(options, 9000, prompts=prompts)
    one = SamplingState.create(options[:1], 9000, prompts=prompts[:1])
    got = jax.jit(SamplingState.put)(state, 5, one)
    expected = SamplingState.create(
        [*options[:5], options[0], *options[6:]], 9000, prompts=[*prompts[:5], prompts[0], *prompts[6:]]
    )
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_logprobs_are_those_of_the_logits_as_given():
    logits, options, prompts = mixed_batch()
    state = SamplingState.create(options, 9000, prompts=prompts)
    out = sample(logits, state, jnp.arange(8), num_logprobs=5)
    exact = np.asarray(logits, np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    ids = np.argsort(-exact, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(out.top_ids, ids)
    np.testing.assert_allclose(out.top_logprobs, np.take_along_axis(exact, ids, 1), atol=2e-5)
    np.testing.assert_allclose(out.logprob, exact[np.arange(8), out.tokens], atol=2e-5)


def test_rows_that_did_not_ask_get_no_logprobs():
    state = SamplingState.create([SamplingOptions(logprobs=0), SamplingOptions()], 9)
    out = sample(jnp.zeros((2, 9)), state, jnp.zeros(2, int), num_logprobs=2)
    np.testing.assert_allclose(out.logprob, [-np.log(9), INF], rtol=1e-6)
    np.testing.assert_array_equal(out.top_ids, [[0, 1], [-1, -1]])
    with pytest.raises(ValueError, match="from 0 to 9"):
        sample(jnp.zeros((2, 9)), state, jnp.zeros(2, int), num_logprobs=10)


@pytest.mark.parametrize("setting", SETTINGS[:10], ids=str)
def test_rows_with_infinities_and_nan(setting):
    vocab = 300
    logits = np.full((6, vocab), -INF, np.float32)
    logits[0, 217] = -5.0  # one token is left
    logits[1] = np.nan
    logits[2, 50] = np.nan
    logits[4, 299] = INF
    logits[5, :] = np.linspace(0, 1, vocab)
    state = SamplingState.create([SamplingOptions(seed=1, **setting)] * 6, vocab)
    got = np.asarray(sample(jnp.asarray(logits), state, jnp.zeros(6, int)).tokens)
    assert got[0] == 217
    assert got[4] == 299
    assert ((got >= 0) & (got < vocab)).all()
    clean = jnp.asarray(np.tile(logits[5], (6, 1)))
    assert got[5] == sample(clean, state, jnp.zeros(6, int)).tokens[5]


def test_a_banned_token_never_comes():
    logits = np.array([9.0, 1.0, 0.0, 0.0], np.float32)
    for temperature in (0.0, 1.0):
        tokens = draw_like(logits, SamplingOptions(temperature=temperature, logit_bias={0: -INF}))
        assert not (tokens == 0).any()


@pytest.mark.parametrize("name", ["prompts", "outputs"])
def test_create_refuses_tokens_outside_the_vocabulary(name):
    with pytest.raises(RequestError, match=rf"{name} names token 10.*0 to 9"):
        SamplingState.create([SamplingOptions()], 10, **{name: [[3, 10]]})
    with pytest.raises(ValueError, match=r"2 .* for 1"):
        SamplingState.create([SamplingOptions()], 10, **{name: [[3], [4]]})


def test_create_refuses_what_does_not_fit():
    with pytest.raises(RequestError, match=r"logit_bias names token 12.*0 to 9"):
        SamplingState.create([SamplingOptions(logit_bias={12: 1.0})], 10)
    with pytest.raises(ValueError, match="3 requests do not fit a batch of 2"):
        SamplingState.create([SamplingOptions()] * 3, 10, batch=2)
