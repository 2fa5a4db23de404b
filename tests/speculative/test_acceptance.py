"""The acceptance rules: what a round emits has the distribution of plain sampling, and greedy rows its very tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from pdx.sampling.options import SamplingOptions
from pdx.sampling.sampler import NO_TOKEN, SamplingState, filtered_logits, sample
from pdx.speculative.acceptance import Drafted, accept

VOCAB, ROWS = 12, 4000
# A statistic that a right rule exceeds once in a hundred thousand runs; the seeds are fixed.
UNLIKELY = 1e-5


def some_logits(seed, *shape):
    return 1.5 * jax.random.normal(jax.random.key(seed), (*shape, VOCAB))


def states(seed=0, **settings):
    """Rows with the same settings, each with its own seed."""
    return SamplingState.create([SamplingOptions(seed=seed * ROWS + i, **settings) for i in range(ROWS)], VOCAB)


def is_drawn_from(tokens, p):
    """Chi-square of the tokens against the distribution p; tokens of no probability must not come."""
    seen = np.bincount(np.asarray(tokens), minlength=VOCAB)
    expected = len(tokens) * np.asarray(p, np.float64)
    assert (seen[expected < 1e-9] == 0).all()
    some = expected >= 1e-9
    statistic = ((seen[some] - expected[some]) ** 2 / expected[some]).sum()
    return statistic < chi2.isf(UNLIKELY, some.sum() - 1)


def drafted_from(q_logits, seed, length):
    """Drafts of ROWS rows, drawn independently from q at each place."""
    q = jax.nn.softmax(q_logits, -1)
    tokens = jax.random.categorical(jax.random.key(seed), jnp.log(q), shape=(ROWS, length))
    return Drafted(tokens, jnp.full(ROWS, length), jnp.broadcast_to(q, (ROWS, length, VOCAB)))


SETTINGS = {
    "plain": {"temperature": 1.0},
    "cold": {"temperature": 0.6},
    "top-k": {"temperature": 1.0, "top_k": 4},
    "top-p": {"temperature": 1.2, "top_p": 0.8},
    "min-p": {"temperature": 1.0, "min_p": 0.1},
    "bias": {"temperature": 1.0, "logit_bias": {3: 2.0, 5: -100.0}},
}


ACCEPT = jax.jit(accept, static_argnames="num_logprobs")  # compiled once for all settings


def run(logits, drafted, sampling, **settings):
    rows = drafted.tokens.shape[0]
    return ACCEPT(logits, drafted, sampling, jnp.full(rows, 7), jnp.ones(rows, bool), **settings)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("is_random", [True, False], ids=["drawn", "certain"])
def test_what_is_emitted_has_the_distribution_of_plain_sampling(settings, is_random):
    """The first token; and the second, where a first draft was kept, whose logits do not depend on the first here."""
    logits = jnp.broadcast_to(some_logits(1, 3), (ROWS, 3, VOCAB))
    sampling = states(**settings)
    drafted = drafted_from(some_logits(2, 2), 3, 2)
    if not is_random:
        drafted = Drafted(jnp.broadcast_to(logits[0, :2].argmax(-1), (ROWS, 2)), drafted.lengths)
    done = run(logits, drafted, sampling)
    tokens, counts = np.asarray(done.emitted.tokens), np.asarray(done.counts)
    assert {1, 2} <= set(counts.tolist())
    p = [np.asarray(jax.nn.softmax(filtered_logits(logits[:, i], sampling), -1)[0]) for i in range(3)]
    for place in range(2):
        assert is_drawn_from(tokens[counts > place, place], p[place])


def test_a_rule_that_keeps_every_draft_fails_the_same_test():
    logits, sampling = some_logits(1, 3), states(temperature=1.0)
    p = jax.nn.softmax(filtered_logits(jnp.broadcast_to(logits[0], (ROWS, VOCAB)), sampling), -1)[0]
    assert not is_drawn_from(drafted_from(some_logits(2, 2), 3, 2).tokens[:, 0], p)


def test_a_rule_that_replaces_from_the_whole_distribution_fails_the_same_test():
    """Rejected drafts must be replaced from what p has more than q, not from p."""
    p, q = (np.asarray(jax.nn.softmax(some_logits(s, 1)[0])) for s in (1, 2))
    rng = np.random.default_rng(0)
    drafts, again = (rng.choice(VOCAB, ROWS, p=x / x.sum()) for x in (q.astype(float), p.astype(float)))
    kept = rng.random(ROWS) * q[drafts] < p[drafts]
    assert not is_drawn_from(np.where(kept, drafts, again), p)


def test_acceptance_is_what_the_two_distributions_share():
    """The rule keeps a draft with probability sum(min(p, q)): no rule keeps more."""
    logits, q_logits = some_logits(1, 2), some_logits(2, 1)
    done = run(jnp.broadcast_to(logits, (ROWS, 2, VOCAB)), drafted_from(q_logits, 5, 1), states(temperature=1.0))
    shared = np.minimum(jax.nn.softmax(logits[0]), jax.nn.softmax(q_logits[0])).sum()
    assert (np.asarray(done.counts) > 1).mean() == pytest.approx(shared, abs=4 * 0.5 / ROWS**0.5)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"temperature": 0.9, "seed": 5}, {"repetition_penalty": 1.7}]
)
def test_certain_drafts_leave_the_tokens_of_plain_decoding(settings):
    """Token for token, with the same seed: a right draft is kept, the first wrong one is replaced, the rest dropped."""
    logits, sampling = some_logits(4, 1, 4), SamplingState.create([SamplingOptions(**settings)], VOCAB)
    plain, state = [], sampling
    for i in range(4):
        plain.append(int(sample(logits[:, i], state, jnp.array([7 + i])).tokens[0]))
        state = state.observe(jnp.array([plain[-1]]), jnp.array([True]))
    for right in range(4):
        draft = [t if i < right else (t + 1) % VOCAB for i, t in enumerate(plain[:3])]
        done = run(logits, Drafted(jnp.array([draft]), jnp.array([3])), sampling)
        assert int(done.counts[0]) == right + 1
        assert done.emitted.tokens[0, : right + 1].tolist() == plain[: right + 1]
        assert done.sampling.output_counts.sum() == right + 1


def test_rows_of_other_lengths_and_rows_that_rest():
    logits = jax.nn.one_hot(jnp.array([[4, 5, 6]] * 4), VOCAB)
    drafted = Drafted(jnp.array([[4, 5]] * 4), jnp.array([2, 1, 0, 2]))
    greedy = SamplingState.create([], VOCAB, batch=4)
    done = accept(logits, drafted, greedy, jnp.zeros(4, jnp.int32), jnp.array([True, True, True, False]))
    assert done.counts.tolist() == [3, 2, 1, 0]
    assert done.emitted.tokens[0].tolist() == [4, 5, 6]
    assert done.sampling.output_counts.sum(-1).tolist() == [3, 2, 1, 0]


def test_log_probabilities_are_those_of_the_emitted_tokens():
    logits = some_logits(6, 1, 2)
    options = SamplingOptions(temperature=1.0, seed=3, logprobs=2)
    drafted = Drafted(jnp.array([[1]]), jnp.array([1]), jax.nn.one_hot(jnp.array([[1]]), VOCAB))
    done = run(logits, drafted, SamplingState.create([options], VOCAB), num_logprobs=2)
    for i in range(int(done.counts[0])):
        expected = jax.nn.log_softmax(logits[0, i])
        np.testing.assert_allclose(done.emitted.logprob[0, i], expected[done.emitted.tokens[0, i]], rtol=1e-5)
        np.testing.assert_allclose(done.emitted.top_logprobs[0, i], np.sort(expected)[::-1][:2], rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_end_the_row(temperature):
    logits = some_logits(8, 1, 3).at[0, 1].set(jnp.nan)
    options = SamplingOptions(temperature=temperature, seed=1)
    sampling = SamplingState.create([options], VOCAB)
    first = int(sample(logits[:, 0], sampling, jnp.array([7])).tokens[0])
    drafted = Drafted(jnp.array([[first, 2]]), jnp.array([2]), jax.nn.one_hot(jnp.array([[first, 2]]), VOCAB))
    certain = run(logits, Drafted(drafted.tokens, drafted.lengths), sampling)
    assert certain.emitted.tokens[0, :2].tolist() == [first, NO_TOKEN]
    drawn = run(logits, drafted, sampling)
    assert int(drawn.emitted.tokens[0, int(drawn.counts[0]) - 1]) == NO_TOKEN or int(drawn.counts[0]) == 1
