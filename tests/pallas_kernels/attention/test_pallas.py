"""Every case of every op through its Pallas kernels, interpreted, against float64; and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention, flash_attention, implementation, reference_attention
from pallas_kernels.attention.call import make_call
from pallas_kernels.attention.cases import Case
from pallas_kernels.decode_attention import cases as decode_cases
from pallas_kernels.decode_attention.api import OP as DECODE
from pallas_kernels.flash_attention import cases as flash_cases
from pallas_kernels.flash_attention.api import OP as FLASH
from tests.support.attention_problems import make

pytestmark = pytest.mark.thin(20)

LAYOUT = {"tpu": "folded", "gpu": "heads_last"}
OPS = {"decode": (decode_attention, DECODE, decode_cases.CASES), "flash": (flash_attention, FLASH, flash_cases.CASES)}
KERNELS = [(op, name) for op, (_, of, _) in OPS.items() for name in of.implementations if name in LAYOUT]
# An interpreted kernel takes seconds to compile: of the ordinary cases every fourth runs by default, all with `slow`.
FEATURES = decode_cases.FEATURES + flash_cases.FEATURES
RUNS = [
    pytest.param(
        op,
        name,
        case,
        id=f"{op} {name}: {case.name}, T={case.queries}",
        marks=[] if i % 4 == 0 or case in FEATURES else pytest.mark.slow,
    )
    for op, name in KERNELS
    for i, case in enumerate(OPS[op][2])
]


def refusal(op, name, problem, **changes) -> str | None:
    """Why the implementation says it cannot do the problem; `changes` replace arrays."""
    call = make_call(op, problem.arrays | changes, **problem.case.settings(problem.layout))
    return implementation.refusal(OPS[op][1].implementations[name], call)


@pytest.mark.parametrize(("op", "name", "case"), RUNS)
def test_agrees_with_float64(op, name, case):
    problem = make(case, layout=LAYOUT[name])
    settings = {"return_lse": True, "implementation": name, "interpret": True}
    if reason := refusal(op, name, problem):
        assert case.slots % 128, f"{name} refuses an ordinary case: {reason}"
        with pytest.raises(NotImplementedError, match="use implementation='xla'"):
            problem.run(OPS[op][0], **settings)
        return
    out, lse = problem.run(OPS[op][0], **settings)
    assert out.dtype == problem.arrays["q"].dtype
    problem.check(out, lse)


@pytest.mark.parametrize(("op", "name"), KERNELS)
def test_a_row_ignores_its_neighbours_bit_for_bit(op, name):
    case = Case("three rows", (60, 200, 100), (2, 2, 2), 2, 256, group=3, head_dim=64)
    problem, settings = make(case, layout=LAYOUT[name]), {"implementation": name, "interpret": True}
    out = np.asarray(problem.run(OPS[op][0], **settings))
    k, v = (problem.arrays[x].at[1].set(jnp.nan) for x in "kv")
    beside = np.asarray(problem.run(OPS[op][0], k=k, v=v, **settings))
    np.testing.assert_array_equal(out[[0, 2]], beside[[0, 2]])
    swapped = {x: jnp.flip(problem.arrays[x], 0) for x in ("q", "k", "v", "starts", "lengths")}
    np.testing.assert_array_equal(out, np.asarray(problem.run(OPS[op][0], **swapped, **settings))[::-1])


@pytest.mark.parametrize(("op", "name"), KERNELS)
def test_a_derivative_is_refused_and_what_has_one_is_named(op, name):
    problem = make(Case("small", (60,), (2,), 2, 128), layout=LAYOUT[name])

    def loss(q):
        return OPS[op][0](**problem.arguments(q=q), implementation=name, interpret=True).sum()

    with pytest.raises(NotImplementedError, match=f"{op}_attention: .* no derivative: use reference_attention, or"):
        jax.grad(loss)(problem.arrays["q"])
    case = make(Case("small", (60,), (2,), 2, 128), unwritten=0.0, layout=LAYOUT[name])
    slope = jax.jit(jax.grad(lambda q: reference_attention(**case.arguments(q=q)).sum()))(case.arrays["q"])
    assert np.isfinite(slope).all()
    assert np.any(slope)


@pytest.mark.parametrize(("op", "name"), KERNELS)
def test_another_layout_is_refused(op, name):
    problem = make(Case("small", (60,), (2,), 2, 128), layout="heads_first")
    with pytest.raises(NotImplementedError, match=f"{LAYOUT[name]}.*use implementation='xla'"):
        problem.run(OPS[op][0], implementation=name, interpret=True)
