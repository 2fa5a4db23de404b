"""How many tokens a round drafts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdx.cost import tradeoffs
from pdx.speculative.lengths import MARGIN, PRIOR_WEIGHT, Acceptance, choose, expected_tokens

LEVELS = (0, 3, 7)


def chosen(costs, acceptance, available=(7, 7), left=(100, 100)):
    found = choose(LEVELS, jnp.array(costs), jnp.array(acceptance), jnp.array(available), jnp.array(left))
    return LEVELS[int(found)]


@pytest.mark.parametrize(
    ("costs", "acceptance", "length"),
    [
        ((1.0, 1.0, 1.0), (0.9, 0.9), 7),  # verification is free: as many as possible
        ((1.0, 2.0, 2.5), (0.9, 0.9), 7),
        ((1.0, 2.0, 8.0), (0.9, 0.9), 3),
        ((1.0, 2.0, 2.5), (0.2, 0.2), 0),
        ((1.0, 8.0, 16.0), (0.99, 0.99), 0),  # bound by arithmetic
    ],
)
def test_the_length_at_which_the_rows_end_first_is_taken(costs, acceptance, length):
    assert chosen(costs, acceptance) == length


def test_rows_that_rest_or_have_no_draft_do_not_count():
    costs, acceptance = (1.0, 2.0, 2.5), (0.99, 0.01)
    assert chosen(costs, acceptance, available=(0, 7)) == 0
    assert chosen(costs, acceptance, left=(0, 100)) == 0
    assert chosen(costs, acceptance, left=(100, 0)) == 7
    assert chosen((1e30, 1.0, 1e30), (0.0, 0.0)) == 3
    assert chosen((1e30, 1.0, 1e30), (0.9, 0.9), available=(0, 0)) == 0


def test_a_batch_waits_for_its_last_row():
    """A row that drafts well gains nothing for a batch whose other row goes on alone."""
    costs, acceptance = (1.0, 2.0, 2.5), (0.99, 0.01)
    assert chosen(costs, acceptance) == 0
    assert chosen(costs, acceptance, left=(1000, 100)) == 7


def test_it_agrees_with_the_cost_model():
    """The level is taken where the cost model promises more than the margin."""
    for acceptance in np.linspace(0.05, 0.95, 10):
        for verify in (1.0, 1.5, 2.5):
            gain = tradeoffs.speculation(float(acceptance), 3, 0.0, verify)
            found = choose((0, 3), jnp.array([1.0, verify]), jnp.full(1, acceptance), jnp.array([3]), jnp.array([9]))
            if abs(gain / MARGIN - 1) > 1e-3:
                assert int(found) == (gain > MARGIN)


def test_tokens_of_a_round():
    np.testing.assert_allclose(
        expected_tokens(jnp.array([0.0, 0.5, 1.0]), jnp.array([3, 2, 4])), [1, 1.75, 5], rtol=1e-3
    )


def test_acceptance_forgets_its_prior_and_keeps_rows_and_classes_apart():
    seen = jax.tree.map(jnp.asarray, Acceptance.none(2, (0.2, 0.8)))
    assert seen.of(jnp.array([0, 1])).tolist() == pytest.approx([0.2, 0.8])
    for _ in range(200):
        seen = seen.observe(jnp.array([1, 1]), jnp.array([4, 0]), jnp.array([1, 0]))
    assert seen.of(jnp.array([1, 1])).tolist() == pytest.approx([0.25, 0.8], abs=0.01)
    assert seen.of(jnp.array([0, 0])).tolist() == pytest.approx([0.2, 0.2])
    one = jax.tree.map(jnp.asarray, Acceptance.none(1, (0.5,))).observe(jnp.array([0]), jnp.array([2]), jnp.array([2]))
    assert float(one.of(jnp.array([0]))[0]) == pytest.approx((0.5 * PRIOR_WEIGHT + 2) / (PRIOR_WEIGHT + 2), abs=0.01)
