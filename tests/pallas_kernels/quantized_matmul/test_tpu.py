"""The forms of the TPU kernel of quantized products: several groups a product, digits, scaled weights."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.analysis import problems
from pallas_kernels.analysis.targets import Target
from pallas_kernels.hardware import CHIPS
from pallas_kernels.quant_array import QuantArray
from pallas_kernels.quantized_matmul import tpu
from pallas_kernels.quantized_matmul.api import quantized_matmul
from pallas_kernels.quantized_matmul.call import Call
from tests.pallas_kernels.quantized_matmul.test_matmul import TOLERANCE, error, expected, rounded

pytestmark = pytest.mark.thin(10)
compiled = jax.jit(quantized_matmul, static_argnames=("implementation", "interpret", "config", "out_dtype"))

# Each with the largest error against float64, over the largest result, that its products in f32 may have. Digits keep
# an activation to 2^-21 of its row's maximum; scaled weights are rounded to bf16, 2^-9 of each.
FORMS = (
    (tpu.Config(5, 128, 2048, spread=2), TOLERANCE["float32"]),
    (tpu.Config(5, 128, 1024, spread=4), TOLERANCE["float32"]),
    (tpu.Config(5, 256, 2048, digits=3), TOLERANCE["float32"]),
    (tpu.Config(5, 128, 1024, spread=4, digits=3), TOLERANCE["float32"]),
    (tpu.Config(5, 256, 2048, scaled=True), 4e-3),
    (tpu.Config(5, 128, 1024, scaled=True), 4e-3),
)


def draw(group=128, bits=4, rows=5, **kind):
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.standard_normal((rows, 2048)), jnp.bfloat16)
    return x, rounded(jnp.asarray(rng.standard_normal((256, 2048)) + 0.1, jnp.float32), bits, group, **kind)


def run(x, w, config, out_dtype=None):
    return compiled(x, w, implementation="tpu", interpret=True, config=config, out_dtype=out_dtype)


@pytest.mark.parametrize("kind", [{}, {"bits": 8}, {"group": 32}, {"group": 32, "symmetric": False}], ids=str)
@pytest.mark.parametrize(("config", "most"), FORMS, ids=str)
def test_forms_agree_with_float64(config, most, kind):
    x, w = draw(**kind)
    assert error(run(x, w, config, jnp.float32), expected(x, w)) < most
    y = run(x, w, config)
    assert y.dtype == x.dtype
    assert error(y, expected(x, w)) < TOLERANCE["bfloat16"]


@pytest.mark.parametrize("rows", [1, 8, 9, 16])
def test_any_few_rows_may_be_spread(rows):
    x, w = draw(rows=rows)
    for digits in (0, 3):
        y = run(x, w, tpu.Config(rows, 128, 2048, spread=2, digits=digits), jnp.float32)
        assert error(y, expected(x, w)) < TOLERANCE["float32"]


def test_digits_of_one_scale_per_output_and_of_rows_with_outliers():
    x, w = draw(group=None)
    config = tpu.Config(5, 128, 1024, digits=3)
    assert error(run(x, w, config, jnp.float32), expected(x, w)) < TOLERANCE["float32"]
    x = x.at[0, 7].set(1000.0).at[1].set(0.0)  # the largest of 2048 activations is a thousand times the others
    values = w.values.at[:, 7].set(0)
    w = QuantArray(values, w.scales)
    y, want = np.asarray(run(x, w, config, jnp.float32)), expected(x, w)
    assert error(y[0], want[0]) < 1e-3
    assert not y[1].any()


def test_the_largest_sums_fit():
    """Digits and weights of the largest magnitude, all of one sign: a group's sum in int32 does not overflow."""
    x = jnp.full((2, 2048), -3.0, jnp.bfloat16)
    w = QuantArray(jnp.full((256, 2048), -8, jnp.int4), jnp.ones((16, 256)))
    y = run(x, w, tpu.Config(2, 128, 2048, digits=3), jnp.float32)
    np.testing.assert_allclose(y, np.full((2, 256), 24.0 * 2048), rtol=1e-6)


@pytest.mark.parametrize("wrong", [{"scales": jnp.ones((16, 256))}, {"values": jnp.zeros((256, 2048), jnp.int4)}])
def test_wrong_forms_would_fail(wrong):
    x, w = draw()
    want = expected(x, w)
    parts = {"values": w.values, "scales": w.scales} | wrong
    for config, most in FORMS:
        assert error(run(x, QuantArray(**parts), config, jnp.float32), want) > 10 * most


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (tpu.Config(5, 128, 2048, spread=3), "spread must divide the 16 groups"),
        (tpu.Config(5, 128, 2048, spread=2, scaled=True), "without spread and digits"),
    ],
)
def test_forms_that_do_not_suit_are_refused(config, says):
    x, w = draw()
    with pytest.raises(ValueError, match=says):
        run(x, w, config)


@pytest.mark.parametrize(
    ("changes", "config", "says"),
    [
        ({"rows": 64}, tpu.Config(32, 128, 2048, digits=3), "all rows in one block"),
        ({"dtype": "float32"}, tpu.Config(8, 128, 2048, digits=3), "activations in bfloat16, not float32"),
        ({"dtype": "float32"}, tpu.Config(8, 128, 2048, scaled=True), "activations in bfloat16 and groups"),
    ],
)
def test_calls_that_forms_do_not_take(changes, config, says):
    call = replace(Call(8, 256, 2048, 16, 4, False, False, "bfloat16"), **changes)
    assert says in tpu.misfit(call, config)
    with Target.get("7x").tracing():
        assert "7x multiplies no int8" in tpu.misfit(
            replace(call, rows=8, dtype="bfloat16"), tpu.Config(8, 128, 2048, digits=3)
        )


@pytest.mark.parametrize("problem", problems.problems("quantized_matmul", "tpu", large_only=True), ids=lambda p: p.name)
@pytest.mark.parametrize("chip", [None, "v4", "v5e", "v5p", "v6e", "7x"])
def test_tiles_suit_their_chips(problem, chip):
    call, chip = problem.call, chip and CHIPS[chip]
    if tpu.supported(call):
        return
    config = tpu.heuristic(call, chip)
    assert tpu.misfit(call, config) is None
    assert config.vmem_bytes <= (chip.vmem_capacity_mib if chip else 16) << 20
    assert not config.digits or chip.int8_tops
    if call.dtype == "float32" or (call.bits == 8 and call.groups == 1):
        assert (config.digits, config.scaled) == (0, False)  # these products are exact
    if chip is not None:
        assert all(tpu.misfit(call, c) is None for c in tpu.candidates(call, chip))
