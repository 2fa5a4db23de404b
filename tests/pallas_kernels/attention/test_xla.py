"""Every attention op and the reference against float64 numpy, and against wrong answers that must not pass."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention, flash_attention, reference_attention
from pallas_kernels.attention.cases import Case
from pallas_kernels.decode_attention import cases as decode_cases
from pallas_kernels.flash_attention import cases as flash_cases
from pallas_kernels.layouts import LAYOUTS
from tests.support.attention_problems import make

pytestmark = pytest.mark.thin(10)

OPS = {"reference": reference_attention, "flash": flash_attention, "decode": decode_attention}
FEW, CHUNKS = flash_cases.FEW, flash_cases.CHUNKS
CASES = {
    "reference": decode_cases.CASES + flash_cases.CHUNKS + flash_cases.FEATURES + flash_cases.SHAPES,
    "flash": flash_cases.CASES,
    "decode": decode_cases.CASES,
}
RUNS = [(op, case) for op in OPS for case in CASES[op]]
RUN_IDS = [f"{op}: {case.name}, T={case.queries}" for op, case in RUNS]


@pytest.mark.parametrize(("op", "case"), RUNS, ids=RUN_IDS)
def test_agrees_with_float64(op, case):
    problem = make(case)
    out, lse = problem.run(OPS[op], return_lse=True)
    assert out.dtype == problem.arrays["q"].dtype
    problem.check(out, lse)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_every_layout_gives_the_same(op, layout):
    named = [c for c in CASES[op] if c.name in ("int8", "values of another size", "SmolLM2 135M, float32")]
    assert len(named) >= 3
    for case in named:
        problem = make(case, layout=layout)
        problem.check(problem.run(OPS[op]))


FAR = {"held": (3000, 60, 0, 61, 2999, 7), "kv_heads": 1, "group": 3, "window": 200}
FAR_APART = (
    Case("decode", new=(1, 1, 0, 1, 1, 1), queries=1, slots=3072, **FAR),
    Case("ring, draft, sinks", new=(4, 1, 0, 2, 3, 4), queries=4, slots=256, sinks=True, **FAR),
    Case("ring, tree, soft cap", new=(9, 5, 0, 2, 3, 9), queries=9, slots=384, tree=True, softcap=3.0, **FAR),
    Case("int8, sinks", new=(2, 1, 0, 2, 2, 2), queries=2, slots=3072, kv_dtype="int8", sinks=True, **FAR),
    Case("chunks of two query blocks", new=(300, 9, 0, 270, 1, 300), queries=300, slots=640, **FAR),
    Case("tree in a chunk, int8", new=(40, 9, 0, 40, 1, 3), queries=40, slots=256, tree=True, kv_dtype="int8", **FAR),
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", FAR_APART, ids=lambda c: c.name)
def test_windows_of_rows_that_are_far_apart(case, layout):
    """Each row has blocks of its own. Its neighbours do not change a bit of it, although they change the loop."""
    problem = make(case, layout=layout)
    op = decode_attention if case.queries <= 16 else flash_attention
    out, lse = problem.run(op, return_lse=True)
    problem.check(out, lse)
    for row in (0, 1):
        alone = jnp.where(jnp.arange(len(case.held)) == row, problem.arrays["lengths"], 0)
        np.testing.assert_array_equal(np.asarray(problem.run(op, lengths=alone))[row], np.asarray(out)[row])


@pytest.mark.parametrize("op", ["flash", "decode"])
@pytest.mark.parametrize("case", [c for c in FEW if not all(c.new)], ids=lambda c: c.name)
def test_rows_that_take_no_part_get_zeros(op, case):
    out = np.asarray(make(case).run(OPS[op]))
    idle = np.array(case.new) == 0
    assert idle.any()
    np.testing.assert_array_equal(out[idle], 0.0)


def test_the_reference_takes_bf16_without_jit():
    problem = make(next(c for c in FEW if c.name == "bf16"))
    problem.check(reference_attention(**problem.arguments()))


# --- the check itself: each wrong answer fails wherever the case has what it gets wrong


def zeros(problem):
    return np.zeros_like(problem.answer)


def swapped(problem):
    keys, values = problem.drawn.histories()
    return problem.float64(keys=values, values=keys)[0]


def shifted_heads(problem):
    keys, values = (np.roll(x, 1, axis=2) for x in problem.drawn.histories())
    return problem.float64(keys=keys, values=values)[0]


def own_key_hidden(problem):
    return problem.float64(positions=problem.case.positions - 1)[0]


def next_key_shown(problem):
    case = problem.case
    return problem.float64(positions=np.minimum(case.positions + 1, case.lengths[:, None] - 1))[0]


def no_window(problem):
    return problem.float64(window=None)[0]


def narrow_window(problem):
    return problem.float64(window=problem.case.window - 1)[0]


def wide_window(problem):
    return problem.float64(window=problem.case.window + 1)[0]


def no_softcap(problem):
    return problem.float64(softcap=None)[0]


def no_scale(problem):
    return problem.float64(scale=1.0)[0]


def no_sinks(problem):
    return problem.float64(sinks=None)[0]


def no_tree(problem):
    return problem.float64(tree=None)[0]


def window_by_place(problem):
    """As if the tokens of a tree lay one behind the other: they see too little of what came before."""
    return problem.float64(is_chain=True)[0]


def only_causal(problem):
    return problem.float64(causal=True)[0]


def no_key_scales(problem):
    return problem.float64(keys=problem.drawn.keys / 73)[0]


def no_value_scales(problem):
    return problem.float64(values=problem.drawn.values / 73)[0]


def some(rows):
    """The f32 cases in which a row that takes part is as `rows(case, held, new)` says.

    bf16's tolerance is too wide for one key more or less among a hundred.
    """
    return [
        c
        for c in FEW + CHUNKS
        if "bf16" not in c.name and any(n and rows(c, h, n) for h, n in zip(c.held, c.new, strict=True))
    ]


RARE = decode_cases.FEATURES + flash_cases.FEATURES
WRONG = [
    (zeros, [c for c in FEW + CHUNKS if any(c.new)]),
    (swapped, [c for c in FEW + CHUNKS if any(c.new)]),
    (shifted_heads, some(lambda c, h, n: c.kv_heads > 1)),
    (own_key_hidden, some(lambda c, h, n: True)),
    (next_key_shown, some(lambda c, h, n: n > 1)),
    (no_window, some(lambda c, h, n: c.window and h + n > c.window)),
    (narrow_window, some(lambda c, h, n: c.window and h + n >= c.window > 1)),
    (wide_window, some(lambda c, h, n: c.window and h + n > c.window)),
    (no_softcap, [c for c in FEW + CHUNKS if c.softcap]),
    (no_scale, some(lambda c, h, n: h + n > 1 and c.window != 1)),
    (no_sinks, [c for c in RARE if c.sinks and c.dtype == "float32"]),
    (no_tree, [c for c in RARE if c.tree]),
    (window_by_place, [c for c in RARE if c.tree and c.window]),
    (only_causal, [c for c in RARE if not c.causal]),
    (no_key_scales, [c for c in RARE if c.quantized]),
    (no_value_scales, [c for c in RARE if c.quantized]),
]


@pytest.mark.parametrize(("wrong", "cases"), WRONG, ids=[wrong.__name__ for wrong, _ in WRONG])
def test_a_wrong_answer_fails(wrong, cases):
    assert len(cases) >= 2
    for case in cases:
        problem = make(case)
        problem.check(problem.answer)
        with pytest.raises(AssertionError, match="differs by"):
            problem.check(wrong(problem))


def test_an_answer_that_is_not_finite_fails():
    problem = make(FEW[0])
    problem.answer[0, 0, 0, 0] = np.nan
    with pytest.raises(AssertionError, match="not finite"):
        problem.check(problem.answer)
