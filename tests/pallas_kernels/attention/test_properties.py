"""Random contexts against float64: a few compiled shapes, any lengths, offsets and numbers."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import decode_attention, flash_attention
from pallas_kernels.attention.cases import Case
from tests.support.attention_problems import make

# Each is compiled once; what is drawn below are values, not shapes. A ring must hold window - 1 + T positions.
SHAPES = (
    {"queries": 1, "slots": 128, "window": 100, "group": 3},
    {"queries": 5, "slots": 384, "window": None, "group": 1},
    {"queries": 5, "slots": 256, "window": 40, "softcap": 3.0},
    {"queries": 40, "slots": 128, "window": 30},
)


@st.composite
def problems(draw):
    shape = draw(st.sampled_from(SHAPES))
    room = 700 if shape["window"] else shape["slots"] - shape["queries"]
    held = draw(st.tuples(*[st.integers(0, room)] * 3))
    new = draw(st.tuples(*[st.integers(0, shape["queries"])] * 3))
    return make(Case("drawn", held, new, **shape), seed=draw(st.integers(0, 1000)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_any_rows_agree_with_float64(problem):
    problem.check(problem.run(decode_attention if problem.case.queries <= 16 else flash_attention))
