"""Random calls of every attention op and implementation against float64: a few here, many with `-m slow`."""

import numpy as np
import pytest

from tests.support.random_calls import KINDS, draw

pytestmark = pytest.mark.thin(10)

SOME = range(100, 100 + len(KINDS))


@pytest.mark.parametrize("seed", SOME)
def test_a_random_call_agrees_with_float64(seed):
    draw(seed).check()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5000, 5000 + 4 * len(KINDS)))
def test_many_random_calls_agree_with_float64(seed):
    draw(seed).check()


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=[" ".join(kind) for kind in KINDS])
def test_a_wrong_answer_would_fail(kind):
    """The answer with one real query's result changed, and one query of padding that is not finite."""
    seed = next(s for s in range(300 + kind, 3000, len(KINDS)) if _has_both(draw(s)))
    attempt = draw(seed)
    out, lse = attempt.answer, attempt.lse
    attempt.run = lambda: (out, lse)
    attempt.check()
    wrong = out.copy()
    wrong[tuple(np.argwhere(attempt.real)[-1])] += 0.2
    attempt.run = lambda: (wrong, lse)
    with pytest.raises(AssertionError, match="differs by"):
        attempt.check()
    wrong = out.copy()
    wrong[tuple(np.argwhere(~attempt.real)[0])] = np.nan
    attempt.run = lambda: (wrong, lse)
    with pytest.raises(AssertionError, match="not finite"):
        attempt.check()


def _has_both(attempt) -> bool:
    return attempt.real.any() and not attempt.real.all()
