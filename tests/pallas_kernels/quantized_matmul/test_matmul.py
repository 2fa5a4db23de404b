"""Products with quantized matrices against float64, and the matrices themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import quant_array
from pallas_kernels.analysis import problems, traffic
from pallas_kernels.analysis.targets import Target
from pallas_kernels.quant_array import QuantArray, dequantize, from_blocks, quantize, quantize_rows, take_rows
from pallas_kernels.quantized_matmul import gpu, tpu, xla
from pallas_kernels.quantized_matmul.api import explain, quantized_matmul
from pallas_kernels.quantized_matmul.call import Call
from pallas_kernels.quantized_matmul.cases import CASES

pytestmark = pytest.mark.thin(10)

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
# Compiled whole: op by op they are ten programs each.
rounded = jax.jit(quantize, static_argnames=("bits", "group", "symmetric", "activations"))
product = jax.jit(quantized_matmul, static_argnames=("implementation", "interpret", "config"))


def drawn(case, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((case.rows, case.columns)), case.dtype)
    w = jnp.asarray(rng.standard_normal((case.out, case.columns)) + 0.1, case.dtype)
    return x, rounded(w, case.bits, case.group, case.symmetric, case.activations)


def meaning(w):
    """The matrix in float64, group by group, written apart from the library."""
    values, scales = np.asarray(w.values).astype(np.float64), np.asarray(w.scales, np.float64)
    out = np.empty_like(values)
    size = values.shape[1] // scales.shape[0]
    for g in range(scales.shape[0]):
        at = slice(g * size, (g + 1) * size)
        out[:, at] = values[:, at] * scales[g][:, None]
        if w.offsets is not None:
            out[:, at] += np.asarray(w.offsets, np.float64)[g][:, None]
    return out


def expected(x, w):
    rows = np.asarray(x).astype(np.float64)
    if w.activations == "int8":
        scale = np.abs(rows).max(1, keepdims=True).astype(np.float32) / np.float32(127)
        rows = np.round(rows / np.where(scale > 0, scale, 1)) * scale.astype(np.float64)
    return rows @ meaning(w).T


def error(y, want):
    return np.abs(np.asarray(y).astype(np.float32) - want).max() / np.abs(want).max()


@pytest.mark.parametrize("name", ["xla", "tpu", "gpu"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_agrees_with_float64(case, name):
    x, w = drawn(case)
    settings = {} if name == "xla" else {"interpret": True}
    y = product(x, w, implementation=name, **settings)
    assert y.dtype == x.dtype
    assert y.shape == (case.rows, case.out)
    assert error(y, expected(x, w)) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("config", [(5, 128, 1024), (5, 256, 3072), (5, 128, 3072)])
def test_tiles_change_nothing(config):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((5, 3072)), jnp.float32)
    for bits, group in ((8, None), (4, 128)):
        w = rounded(jnp.asarray(rng.standard_normal((256, 3072)), jnp.float32), bits, group)
        y = product(x, w, implementation="tpu", interpret=True, config=tpu.Config(*config))
        assert error(y, expected(x, w)) < TOLERANCE["float32"]
    with pytest.raises(ValueError, match="block_in must be one of"):
        quantized_matmul(x, w, implementation="tpu", interpret=True, config=tpu.Config(5, 128, 96))


@pytest.mark.parametrize("wrong", ["zero", "scales", "offsets", "neighbours"])
def test_wrong_kernels_would_fail(wrong):
    case = next(c for c in CASES if c.name == "W4A16, affine")
    x, w = drawn(case)
    want = expected(x, w)
    swapped = w.values.reshape(case.out, -1, 2)[..., ::-1].reshape(w.shape)
    y = {
        "zero": lambda: np.zeros_like(want),
        "scales": lambda: product(x, QuantArray(w.values, jnp.ones_like(w.scales), w.offsets)),
        "offsets": lambda: product(x, QuantArray(w.values, w.scales)),
        "neighbours": lambda: product(x, QuantArray(swapped, w.scales, w.offsets)),
    }[wrong]()
    assert error(y, want) > 100 * TOLERANCE[case.dtype]


def test_integers_are_equal_bit_for_bit():
    rng = np.random.default_rng(3)
    x, values = (jnp.asarray(rng.integers(-127, 128, shape), jnp.int8) for shape in ((6, 384), (256, 384)))
    exact = np.asarray(x, np.int64) @ np.asarray(values, np.int64).T
    assert (np.asarray(xla.integers(x, values)) == exact).all()
    assert (np.asarray(xla.integers(x[:1], values)) == exact[:1]).all()
    # With all scales one the results are the integers, exact in f32 below 2^24.
    ones, rows = jnp.ones((1, 256)), jnp.ones((6, 1))
    call = Call(6, 256, 384, 1, 8, False, True, "float32")
    arrays = {"x": x, "values": values, "scales": ones, "row_scale": rows}
    for kernel, configs in ((tpu, []), (gpu, [gpu.Config(16, 32, 64, splits=4), gpu.Config(16, 64, 128)])):
        for config in [kernel.heuristic(call, None), *configs]:
            y = kernel.run(arrays, call, config, True)
            assert (np.asarray(y) == exact).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 32), (4, 32), (4, 64)])
def test_rounding_is_within_half_a_step(bits, group, symmetric):
    if bits == 8 and not symmetric:
        with pytest.raises(ValueError, match="int8 is symmetric"):
            quantize(jnp.ones((2, 64)), 8, group, symmetric=False)
        return
    w = jax.random.normal(jax.random.key(0), (16, 128))
    q = quantize(w, bits, group, symmetric)
    step = np.repeat(np.asarray(q.scales).T, q.group, 1)
    assert (np.abs(np.asarray(dequantize(q)) - np.asarray(w)) <= step * 0.5001).all()
    assert q.nbytes == 16 * 128 * bits // 8 + 4 * q.groups * 16 * (1 if symmetric else 2)
    np.testing.assert_allclose(take_rows(q, jnp.array([3, 0, 99])), np.asarray(dequantize(q))[[3, 0, 15]], rtol=1e-6)
    np.testing.assert_allclose(take_rows(q, jnp.array([[3]])), np.asarray(dequantize(q))[[[3]]], rtol=1e-6)


def test_rows_are_rounded_half_to_even():
    x = jnp.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [0.0] * 6])
    values, scale = quantize_rows(x)
    assert values.tolist() == [[127, 0, 2, 2, 0, -2], [0] * 6]
    assert scale.ravel().tolist() == [1.0, 0.0]


def test_a_zero_matrix_stays_zero():
    for bits in (4, 8):
        assert not np.asarray(dequantize(quantize(jnp.zeros((4, 64)), bits, 32))).any()
    assert (np.asarray(dequantize(quantize(jnp.full((4, 64), 3.0), 4, 32, symmetric=False))) == 3.0).all()


def test_blocks_keep_their_values():
    rng = np.random.default_rng(1)
    values, scales, offsets = rng.integers(-8, 8, (6, 64)), rng.random((6, 2)), rng.random((6, 2))
    w = from_blocks(values, scales, offsets, bits=4)
    spread = lambda x: np.repeat(x.astype(np.float32), 32, 1)  # noqa: E731
    np.testing.assert_array_equal(dequantize(w), values.astype(np.float32) * spread(scales) + spread(offsets))
    with pytest.raises(ValueError, match="are not int4"):
        from_blocks(values + 8, scales, bits=4)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"scales": None}, "needs scales"),
        ({"values": jnp.zeros((8, 64))}, "holds int8 or int4"),
        ({"scales": jnp.zeros((2, 7))}, "scales \\[in/g, out\\]"),
        ({"scales": jnp.zeros((3, 8))}, "3 groups do not divide the 64"),
        ({"offsets": jnp.zeros((1, 8))}, "must be of one shape"),
        ({"activations": "int8"}, "symmetric, with one scale"),
        ({"activations": "int4"}, "not one of float, int8"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, says):
    whole = {"values": jnp.zeros((8, 64), jnp.int8), "scales": jnp.zeros((2, 8)), "offsets": None}
    with pytest.raises(ValueError, match=says):
        quantized_matmul(jnp.zeros((1, 64)), QuantArray(**whole | parts))


def test_refusals_say_what_to_do():
    with pytest.raises(ValueError, match="groups of 128 do not divide rows of 576; 32 or 64 would"):
        quantize(jnp.zeros((2, 576)), 4, 128)
    with pytest.raises(ValueError, match="8 or 4 bits, not 3"):
        quantize(jnp.zeros((2, 64)), 3)
    w = quantize(jnp.ones((64, 576)))
    with pytest.raises(ValueError, match="must end in the matrix's 576 columns"):
        quantized_matmul(jnp.zeros((1, 64)), w)
    with pytest.raises(ValueError, match="floating type"):
        quantized_matmul(jnp.zeros((1, 576), jnp.int8), w)
    with pytest.raises(NotImplementedError, match="whole registers"):
        quantized_matmul(jnp.zeros((1, 576)), w, implementation="tpu")
    wide = quantize(jnp.ones((128, 128)))
    slope = jax.grad(lambda x: quantized_matmul(x, wide, implementation="tpu", interpret=True).sum())
    with pytest.raises(NotImplementedError, match="no derivative: use implementation='xla'"):
        slope(jnp.ones((1, 128)))
    assert jax.jit(jax.grad(lambda x: quantized_matmul(x, wide, implementation="xla").sum()))(jnp.ones((1, 128))).all()
    assert explain("auto", "cpu").implementation == "xla"


def test_int8_products_need_a_chip_that_has_them():
    call = problems.problems("quantized_matmul", "tpu", "W8A8, rows")[0].call
    for name, has in {"v4": False, "v5e": True, "v6e": True, "7x": False}.items():
        with Target.get(name).tracing():
            assert (tpu.supported(call) is None) == has


def test_jit_vmap_and_shapes():
    w = quantize(jax.random.normal(jax.random.key(0), (32, 64)), 4, 32)
    x = jax.random.normal(jax.random.key(1), (3, 5, 64))
    y = jax.jit(quantized_matmul)(x, w)
    assert y.shape == (3, 5, 32)
    np.testing.assert_allclose(jax.vmap(lambda x: quantized_matmul(x, w))(x), y, atol=1e-4)
    assert jax.eval_shape(quantize, jax.ShapeDtypeStruct((32, 64), jnp.float32)).values.dtype == jnp.int8
    assert jax.tree.map(lambda a: a, w).activations == "float"
    assert quantized_matmul(x, w, out_dtype=jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_shape(data):
    rows, out = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 40))
    group = data.draw(st.sampled_from([None, 32, 64]))
    columns = data.draw(st.integers(1, 5)) * (group or 24)
    bits = data.draw(st.sampled_from([4, 8]))
    symmetric = bits == 8 or data.draw(st.booleans())
    rng = np.random.default_rng(0)
    compiled = jax.jit(quantize, static_argnums=(1, 2, 3))
    w = compiled(rng.standard_normal((out, columns), np.float32), bits, group, symmetric)
    x = jnp.asarray(rng.standard_normal((rows, columns)), jnp.float32)
    want = expected(x, w)
    assert np.abs(np.asarray(jax.jit(quantized_matmul)(x, w)) - want).max() <= 2e-5 * max(1, np.abs(want).max())


@pytest.mark.parametrize("target", ["v5e", "v6e", "7x"])
@pytest.mark.parametrize("case", [p.name for p in problems.problems("quantized_matmul", "tpu", large_only=True)])
def test_the_cost_estimate_is_what_moves(case, target):
    (problem,) = [p for p in problems.problems("quantized_matmul", "tpu", large_only=True) if p.name == case]
    with Target.get(target).tracing():
        if problem.call.int8_activations and target == "7x":
            assert problem.unsupported
            return
        assert (problem.unsupported is None) == (problem.call.columns % 128 == problem.call.out % 128 == 0)
        if problem.unsupported:
            return
        found = traffic.count(problem.fn(), *problem.arguments())
    assert found.declared_bytes == pytest.approx(found.bytes, rel=0.05)
    if problem.call.rows <= 64:  # decode: every weight once
        assert found.bytes <= 1.05 * problem.bytes_needed


def test_levels_are_what_is_documented():
    assert quant_array.LEVELS == {8: 127, 4: 7}
