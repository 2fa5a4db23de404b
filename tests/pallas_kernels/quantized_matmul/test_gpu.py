"""The GPU kernel of quantized products beyond the shared cases: models' odd shapes, tiles, parts, what is moved."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.analysis import problems, traffic
from pallas_kernels.analysis.problem import nbytes
from pallas_kernels.analysis.targets import GPUS, Target
from pallas_kernels.hardware import CHIPS
from pallas_kernels.quant_array import QuantArray
from pallas_kernels.quantized_matmul import gpu, xla
from pallas_kernels.quantized_matmul.api import explain
from pallas_kernels.quantized_matmul.call import Call
from tests.pallas_kernels.quantized_matmul.test_matmul import TOLERANCE, error, expected, product, rounded

pytestmark = pytest.mark.thin(10)

LARGE = problems.problems("quantized_matmul", "gpu", large_only=True)
# Rows, outputs, columns of SmolLM2 135M and Gemma 3 270M, and sizes that no tile divides.
SHAPES = (
    (1, 192, 576),
    (3, 576, 192),
    (5, 1536, 576),
    (2, 576, 1536),
    (7, 640, 2048),
    (4, 2048, 640),
    (17, 100, 96),
    (70, 72, 160),
)
KINDS = {
    "W8A16": {},
    "W8A16, groups of 32": {"group": 32},
    "W8A8": {"activations": "int8"},
    "W4A16": {"bits": 4},
    "W4A16, affine of 32": {"bits": 4, "group": 32, "symmetric": False},
}
CALL = Call(8, 256, 384, 1, 8, False, False, "bfloat16")


def draw(rows, out, columns, dtype="float32", **kind):
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.standard_normal((rows, columns)), dtype)
    return x, rounded(jnp.asarray(rng.standard_normal((out, columns)) + 0.1, jnp.float32), **kind)


def run(x, w, config=None):
    return product(x, w, implementation="gpu", interpret=True, config=config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_of_models(shape, kind):
    x, w = draw(*shape, **KINDS[kind])
    assert error(run(x, w), expected(x, w)) < TOLERANCE["float32"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_types_of_16_bits(kind, dtype):
    x, w = draw(6, 192, 576, dtype, **KINDS[kind])
    y = run(x, w)
    assert y.dtype == dtype
    assert error(y, expected(x, w)) < TOLERANCE["bfloat16"]


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_and_parts_change_nothing(kind, splits):
    x, w = draw(21, 200, 576, **KINDS[kind])
    for tiles in ((16, 32, 32), (32, 64, 64)):
        y = run(x, w, gpu.Config(*tiles, splits))
        assert error(y, expected(x, w)) < TOLERANCE["float32"]
        np.testing.assert_array_equal(y, run(x, w, gpu.Config(*tiles, splits)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_value_is_widened_exactly(bits, dtype):
    low, high = (-8, 7) if bits == 4 else (-128, 127)
    values = np.resize(np.arange(low, high + 1), (48, 64))
    w = QuantArray(jnp.asarray(values, jnp.int8).astype(jnp.int4 if bits == 4 else jnp.int8), jnp.ones((1, 48)))
    np.testing.assert_array_equal(np.asarray(run(jnp.eye(64, dtype=dtype), w), np.float32), values.T)


def test_integers_of_parts_are_those_of_xla():
    rng = np.random.default_rng(5)
    x, values = (jnp.asarray(rng.integers(-127, 128, shape), jnp.int8) for shape in ((9, 576), (192, 576)))
    plan = gpu.Plan(Call(9, 192, 576, 1, 8, False, True, "bfloat16"), gpu.Config(16, 64, 64, splits=3))
    arrays = {"x": x, "values": values, "scales": jnp.ones((1, 192)), "row_scale": jnp.ones((9, 1))}
    parts = gpu._parts(arrays, plan, jnp.dtype(jnp.int32), True)
    assert parts.shape == (3, 9, 192)
    np.testing.assert_array_equal(parts.sum(0), xla.integers(x, values))
    assert np.asarray(parts).any(axis=(1, 2)).all()


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("problem", LARGE, ids=lambda p: p.name)
def test_the_cost_estimate_is_what_moves(problem, target):
    with Target.get(target).tracing():
        assert problem.unsupported is None
        (call,) = traffic.count(problem.fn(), *problem.arguments(), platform="gpu").calls
    assert call.declared.bytes_accessed == pytest.approx(call.bytes, rel=0.01)
    assert (call.grid[0] == 1) == (problem.call.rows <= 64)
    # A prompt's blocks of rows share the weights, the others read each once.
    assert call.operands["args[1]"] == call.grid[0] * nbytes(problem.arrays["values"])
    assert call.grid[2] == 1 or problem.call.rows <= 64


@pytest.mark.parametrize("problem", LARGE, ids=lambda p: p.name)
@pytest.mark.parametrize("chip", [None, *(CHIPS[name] for name in GPUS)], ids=str)
def test_tiles_suit_their_chips(problem, chip):
    config = gpu.heuristic(problem.call, chip)
    assert gpu.misfit(problem.call, config) is None
    assert gpu._shared(problem.call, config) <= (chip or CHIPS["l4"]).smem_bytes
    if chip is not None:
        others = gpu.candidates(problem.call, chip)
        assert 4 < len(others) < 1000
        assert all(gpu.misfit(problem.call, c) is None for c in others)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dtype": "float64"}, "bfloat16, float16 or float32, not float64"),
        ({"columns": 240, "groups": 5}, "groups of multiples of 32, not of 48"),
        ({"bits": 4, "columns": 63}, "bytes of two values"),
        ({"out": 1 << 20, "columns": 4096}, "elements of the matrix do not fit the 32 bits"),
        ({"rows": 1 << 22, "columns": 1024}, "elements of the activations do not fit"),
        ({"rows": 1 << 20, "out": 1 << 14}, "elements of the results do not fit"),
        ({"out": 1 << 20, "columns": 64}, "at most 1048560 outputs"),
    ],
)
def test_refusals_give_the_reason(changes, says):
    call = replace(CALL, **changes)
    assert says in gpu.supported(call)
    assert says in explain("auto", "gpu", call).reason
    with pytest.raises(NotImplementedError, match=says):
        explain("gpu", call=call)


def test_int4_counts_bytes_towards_the_offsets():
    assert gpu.supported(replace(CALL, out=1 << 19, columns=8192, bits=4)) is None
    assert gpu.supported(replace(CALL, out=1 << 19, columns=8192)) is not None
    assert explain("auto", "gpu", CALL).implementation == "gpu"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (gpu.Config(16, 64, 128), "block_in must be one of 32, 64"),
        (gpu.Config(16, 64, 64, splits=10), "fewer than 10 steps"),
    ],
)
def test_configs_that_do_not_suit_are_refused(config, says):
    x, w = draw(1, 64, 576, group=64)
    with pytest.raises(ValueError, match=says):
        run(x, w, config)
    with pytest.raises(ValueError, match="power of two"):
        gpu.Config(16, 48, 64)
    with pytest.raises(ValueError, match="splits"):
        gpu.Config(16, 64, 64, splits=0)


@pytest.mark.parametrize(
    ("chip", "changes", "runs"),
    [
        ("h200", {"rows": 1024}, "xla"),
        ("h100", {"rows": xla.PREFERRED_ROWS}, "xla"),
        ("h200", {"rows": xla.PREFERRED_ROWS - 1}, "gpu"),
        ("h200", {"rows": 8}, "gpu"),
        ("h200", {"rows": 1024, "int8_activations": True}, "gpu"),
        ("h200", {"rows": 1024, "bits": 4, "groups": 3}, "gpu"),
        ("h200", {"rows": 1024, "dtype": "float32"}, "gpu"),
        ("a100", {"rows": 1024}, "gpu"),
        ("v5e", {"rows": 1024}, "tpu"),
    ],
)
def test_auto_takes_what_was_measured_to_be_faster(chip, changes, runs):
    with Target.get(chip).tracing():
        choice = explain("auto", call=replace(CALL, **changes))
        assert choice.implementation == runs
        assert ("measured on an H200" in choice.reason) == (runs == "xla")
        assert explain("gpu", call=replace(CALL, rows=1024)).implementation == "gpu"
