"""How many tokens a round drafts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdx.cost import tradeoffs
from pdx.speculative.lengths import MARGIN, NEVER, PRIOR_WEIGHT, Acceptance, choose, expected_tokens, ratios
from pdx.speculative.shares import ALLOWED, GAIN, LOSS, Record, StepCosts, at_worst, gained, shares

LEVELS = (0, 3, 7)


def chosen(costs, acceptance, available=(7, 7), left=(100, 100)):
    found = choose(LEVELS, jnp.array(costs), jnp.array([acceptance] * 2), jnp.array(available), jnp.array(left))
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
            found = choose(
                (0, 3), jnp.array([1.0, verify]), jnp.full((2, 1), acceptance), jnp.array([3]), jnp.array([9])
            )
            if abs(gain / MARGIN - 1) > 1e-3:
                assert int(found) == (gain > MARGIN)


def test_tokens_of_a_round():
    np.testing.assert_allclose(
        expected_tokens(jnp.array([0.0, 0.5, 1.0]), jnp.array([3, 2, 4])), [1, 1.75, 5], rtol=1e-3
    )


def test_acceptance_forgets_its_prior_and_keeps_rows_apart():
    seen = jax.tree.map(jnp.asarray, Acceptance.none(2, (0.2, 0.8)))
    assert seen.of(jnp.array([0, 1]))[0].tolist() == pytest.approx([0.2, 0.8])
    for _ in range(200):
        seen = seen.observe(jnp.array([1, 1]), jnp.array([4, 0]), jnp.array([1, 0]))
    assert seen.of(jnp.array([1, 1]))[0].tolist() == pytest.approx([0.25, 0.8], abs=0.01)
    assert float(seen.of(jnp.array([0, 0]))[0, 1]) == pytest.approx(0.2)
    one = jax.tree.map(jnp.asarray, Acceptance.none(1, (0.5,))).observe(jnp.array([0]), jnp.array([2]), jnp.array([2]))
    assert float(one.of(jnp.array([0]))[0, 0]) == pytest.approx((0.5 * PRIOR_WEIGHT + 2) / (PRIOR_WEIGHT + 2), abs=0.01)


def test_a_class_learns_from_surer_and_less_sure_ones():
    """A miss counts for the classes below it, a hit for those above; host and device count alike."""
    prior = (0.2, 0.5, 0.8)
    device, host = jax.tree.map(jnp.asarray, Acceptance.none(1, prior)), Record(prior)

    def both(confidence, tried, accepted):
        nonlocal device
        device = device.observe(*(jnp.array([x]) for x in (confidence, tried, accepted)))
        host.observe(confidence, tried, accepted)
        found = []
        for at in range(3):
            host.confidence = at
            mean, worst = device.of(jnp.array([at]))[:, 0].tolist()
            assert (mean, worst) == pytest.approx((host.acceptance, host.at_worst), abs=1e-5)
            found.append(mean)
        return found

    less, mine, more = both(1, 4, 0)
    assert less < 0.2
    assert mine < 0.5
    assert more == pytest.approx(0.8)
    again = both(1, 4, 4)  # the hits are remembered, and what came before fades
    assert again[0] == pytest.approx(less)
    assert again[1] > mine
    assert again[2] > more


def test_a_record_of_all_requests_sees_each_and_goes_back_to_its_prior():
    every = Record((0.6,))
    for _ in range(5):
        Record(every.by_class, every=every).observe(0, 10, 1)
    assert every.by_class[0] < 0.2
    for _ in range(200):
        every.fade()
    assert every.by_class[0] == pytest.approx(0.6, abs=0.01)


STEPS = 300


def steps_with_failing_drafts(verify, allowance):
    """What STEPS tokens take, in plain steps, where no draft is kept though plain steps say that it would be."""
    costs, taken = jnp.array([1.0, verify]), 0.0
    seen, one = jax.tree.map(jnp.asarray, Acceptance.none(1, (0.9,))), jnp.array([1])
    for _ in range(STEPS):
        level = int(choose((0, 3), costs, seen.of(one * 0), one * 3, one * STEPS, allowance))
        ratio = float(ratios(costs)[level])
        taken, allowance = taken + ratio, min(allowance + gained(1.0, ratio), GAIN)
        seen = seen.observe(one * 0, one, one * (level == 0))
    return taken


@pytest.mark.parametrize("verify", [1.2, 1.6, 2.4])
def test_what_failing_drafts_cost_is_bounded(verify):
    """By half a hundredth, and one round that was expected to keep more. Without the bound it is more."""
    assert steps_with_failing_drafts(verify, ALLOWED) <= STEPS * (1 + LOSS) + ALLOWED + 3
    assert steps_with_failing_drafts(verify, NEVER) > STEPS * 1.03


def test_a_step_of_an_engine_drafts_what_its_allowance_covers():
    costs, rows = StepCosts({2: 1.0}, {4: 1.5}), ([0.9, 0.1], [7, 7], 2, 1.0)
    assert shares(*rows, costs, allowance=0.0) == [2, 0]  # 2 + 0.9 + 0.81 tokens in the time of 1.5 steps
    assert shares(*rows, costs, at_worst=[0.1, 0.1], allowance=0.4) == [0, 0]
    assert shares(*rows, costs, at_worst=[0.1, 0.1], allowance=0.5) == [2, 0]


def test_at_worst_is_less_than_the_share_until_much_was_seen():
    assert at_worst(1.5, 3.0) == pytest.approx(0.5 - 0.2887, abs=1e-4)
    assert at_worst(500.0, 1000.0) == pytest.approx(0.484, abs=1e-3)
    assert at_worst(3.0, 3.0) == 1.0
