"""The set of tokens that each filter keeps, against sorting; through `filtered_logits`."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pdx.sampling.filters import CANDIDATES, GROUP, candidates, pad
from pdx.sampling.options import SamplingOptions
from pdx.sampling.sampler import SamplingState, filtered_logits
from tests.support import sampling_reference as reference

pytestmark = pytest.mark.thin(3)

SMALL, LARGE = 40, 20_000  # one group; more groups than candidates, and not a multiple of a group
assert LARGE > CANDIDATES * GROUP


def kept(logits, options) -> np.ndarray:
    """Which tokens of each row survive its options; rows beyond `options` use the first."""
    logits = np.atleast_2d(np.asarray(logits, np.float32))
    state = SamplingState.create(options, logits.shape[1])
    return np.asarray(filtered_logits(jnp.asarray(logits), state)) > -np.inf


def filters():
    return st.builds(
        SamplingOptions,
        temperature=st.sampled_from([0.3, 0.7, 1.0, 1.5, 3.0]),
        top_k=st.sampled_from([0, 0, 1, 2, 5, 17, 39, 40, 64, 65, 300, 5000]),
        top_p=st.sampled_from([1.0, 1.0, 1e-6, 0.1, 0.5, 0.9, 0.95, 0.999]),
        min_p=st.sampled_from([0.0, 0.0, 1e-4, 0.05, 0.3, 1.0]),
    )


def logits_of(values):
    # Eighths: either equal or apart by more than rounding, in float32 and after any temperature above.
    return st.lists(values, min_size=SMALL, max_size=SMALL).map(lambda v: np.array(v, np.float32) / 8)


@settings(max_examples=150, deadline=None)
@given(
    logits=st.one_of(logits_of(st.integers(-80, 80)), logits_of(st.integers(-4, 4)), logits_of(st.integers(0, 1))),
    options=filters(),
)
def test_small_vocabulary(logits, options):
    expected, margin = reference.keep(logits.astype(np.float64), options)
    assume(margin > 1e-6)
    options = dataclasses.replace(options, top_k=options.top_k if options.top_k < SMALL else 0)
    np.testing.assert_array_equal(kept(logits, [options])[0], expected)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.2, 1.0, 3.0, 8.0]),
    grid=st.sampled_from([1.0, 8.0, 64.0, 4096.0]),
    shift=st.sampled_from([-50.0, 0.0, 30.0]),
    banned=st.booleans(),
    options=filters(),
)
def test_large_vocabulary(seed, spread, grid, shift, banned, options):
    rng = np.random.default_rng(seed)
    logits = (np.round(rng.normal(size=LARGE) * spread * grid) / grid + shift).astype(np.float32)
    if banned:
        logits[rng.random(LARGE) < 0.3] = -np.inf
    expected, margin = reference.keep(logits.astype(np.float64), options)
    assume(margin > 2e-6)
    got = kept(logits, [options])[0]
    # What underflows to probability 0 in float32 may be dropped by top-p either way.
    weights = np.exp((logits - logits.max()) / options.temperature)
    np.testing.assert_array_equal(got & (weights > 0), expected & (weights > 0))
    if options.top_k and options == SamplingOptions(temperature=options.temperature, top_k=options.top_k):
        assert got.sum() == min(options.top_k, np.isfinite(logits).sum())


@pytest.mark.parametrize("vocab", [SMALL, LARGE])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.975])
def test_ties_go_to_lower_ids(vocab, share):
    count = int(vocab * share)
    logits = np.full((2, vocab), 1.5)
    options = [SamplingOptions(temperature=1, top_k=count), SamplingOptions(temperature=1, top_p=(count - 0.5) / vocab)]
    expected = np.broadcast_to(np.arange(vocab) < count, (2, vocab))
    np.testing.assert_array_equal(kept(logits, options), expected)


def test_ties_below_distinct_tokens_and_across_groups():
    logits = np.full(LARGE, -3.0)
    logits[LARGE - 10 :] = np.arange(10)
    got = kept(logits, [SamplingOptions(temperature=1, top_k=1000)])[0]
    np.testing.assert_array_equal(np.flatnonzero(got), [*range(990), *range(LARGE - 10, LARGE)])


@pytest.mark.parametrize("vocab", [SMALL, LARGE])
def test_zeros_of_both_signs_are_ties(vocab):
    logits = np.where(np.arange(vocab) % 2, 0.0, -0.0)
    for k in (1, 3, 30):
        got = kept(logits, [SamplingOptions(temperature=1, top_k=k)])[0]
        np.testing.assert_array_equal(np.flatnonzero(got), np.arange(k))


def test_top_k_across_extreme_magnitudes():
    rng = np.random.default_rng(0)
    logits = np.sign(rng.normal(size=LARGE)) * np.exp(rng.uniform(-80, 80, LARGE))
    logits[:5000] = np.finfo(np.float32).min
    logits = logits.astype(np.float32)
    order = np.lexsort((np.arange(LARGE), -logits))
    for k in (65, 3000, 7000, 14_000, 17_000):
        got = kept(logits, [SamplingOptions(temperature=1, top_k=k)])[0]
        np.testing.assert_array_equal(np.sort(order[:k]), np.flatnonzero(got))


def test_top_p_over_a_long_tail():
    """A nucleus of thousands with a smooth boundary: its size is right to the rounding of the sum."""
    logits = -0.9 * np.log(np.arange(1, LARGE + 1))
    for p in (0.5, 0.9, 0.99, 0.9999):
        got = kept(logits, [SamplingOptions(temperature=1, top_p=p)])[0]
        probability = np.exp(logits.astype(np.float32).astype(np.float64))
        probability /= probability.sum()
        size = got.sum()
        assert got[:size].all()
        assert probability[: size - 1].sum() - 1e-6 < p < probability[:size].sum() + 1e-6


def test_min_p_is_relative_to_the_best_token_after_temperature():
    logits = np.log(np.array([0.4, 0.21, 0.19, 0.1, 0.1]))
    assert kept(logits, [SamplingOptions(temperature=1, min_p=0.5)])[0].tolist() == [True, True, False, False, False]
    assert kept(logits, [SamplingOptions(temperature=2, min_p=0.5)])[0].tolist() == [True] * 4 + [True]
    assert kept(logits, [SamplingOptions(temperature=1, min_p=1.0)])[0].tolist() == [True] + [False] * 4


def test_top_p_counts_what_top_k_leaves():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    # 0.4 / 0.7 = 0.57: of the best two, one is enough for p = 0.5, and of all four, two are needed.
    assert kept(logits, [SamplingOptions(temperature=1, top_p=0.5)])[0].sum() == 2
    assert kept(logits, [SamplingOptions(temperature=1, top_p=0.5, top_k=2)])[0].sum() == 1


@pytest.mark.parametrize("vocab", [100, 8192, LARGE])
def test_candidates_are_the_head_of_the_sorted_row(vocab):
    rng = np.random.default_rng(vocab)
    x = np.round(rng.normal(size=(4, vocab)) * 3, 1).astype(np.float32)
    values, ids = candidates(pad(jnp.asarray(x)))
    for row in range(4):
        expected = np.lexsort((np.arange(vocab), -x[row]))[:CANDIDATES]
        np.testing.assert_array_equal(ids[row, : min(vocab, CANDIDATES)], expected)
        np.testing.assert_array_equal(values[row, : min(vocab, CANDIDATES)], x[row, expected])
