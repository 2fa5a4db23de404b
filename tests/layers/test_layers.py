"""Each layer against its formula in float64 numpy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdx.config import RopeConfig
from pdx.layers.kernels import explain, implementation, layout_for
from pdx.layers.linear import _embed_columns, embed, linear, product, unembed, weight_first
from pdx.layers.mlp import mlp
from pdx.layers.norm import rms_norm
from pdx.layers.rope import frequencies, rotate, rotation
from tests.support.models import LLAMA, QWEN, close, params

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 5, 32))


def f32(x):
    return jnp.asarray(x, jnp.float32)


def test_linear():
    weight, bias = RNG.standard_normal((7, 32)), RNG.standard_normal(7)
    close(linear(f32(X), f32(weight)), X @ weight.T, 1e-5)
    close(linear(f32(X), f32(weight), f32(bias)), X @ weight.T + bias, 1e-5)
    assert linear(f32(X).astype(jnp.bfloat16), f32(weight).astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_rms_norm():
    factor = RNG.standard_normal(32)
    expected = X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-2) * factor
    close(rms_norm(f32(X), f32(factor), 1e-2), expected, 1e-5)


def test_rms_norm_of_bf16_is_computed_in_f32():
    x = (f32(X) * 1e-3).astype(jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    out = rms_norm(x, jnp.ones(32), 1e-6)
    assert out.dtype == jnp.bfloat16
    close(out.astype(jnp.float32), wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6), 2e-2)


@pytest.mark.parametrize(
    "rope",
    [RopeConfig(), RopeConfig(theta=100.0), RopeConfig(100.0, divisors=(1.0, 8.0, 2.0, 1.5), attention_factor=1.2)],
    ids=["default", "base", "scaled"],
)
def test_rotation_turns_each_pair_as_a_complex_number(rope):
    heads, positions = RNG.standard_normal((2, 3, 5, 8)), np.array([[0, 1, 500], [7, 2, 3]])
    i = np.arange(4)
    speed = rope.theta ** (-2 * i / 8) / np.array(rope.divisors or (1.0,) * 4)
    np.testing.assert_allclose(frequencies(rope, 8), speed, rtol=1e-6)
    turn = np.exp(1j * positions[:, :, None, None] * speed) * rope.attention_factor
    turned = (heads[..., :4] + 1j * heads[..., 4:]) * turn
    out = rotate(f32(heads), *rotation(rope, 8, jnp.asarray(positions)))
    # At position 500 the angle itself is only known to 500 units of f32's last place.
    close(out, np.concatenate([turned.real, turned.imag], axis=-1), 1e-4)


def test_rotated_dot_products_depend_on_the_distance_only():
    q, k = f32(RNG.standard_normal((2, 1, 1, 1, 8)))

    def product(i, j):
        turned = [rotate(x, *rotation(RopeConfig(), 8, jnp.array([[p]]))) for x, p in ((q, i), (k, j))]
        return float((turned[0] * turned[1]).sum())

    assert product(9, 4) == pytest.approx(product(25, 20), abs=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-2)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [False, True])
def test_mlp(activation, bias):
    cfg = QWEN if bias else LLAMA
    layer = params(cfg)["layers"][0]
    p = {name: np.asarray(x, np.float64) for name, x in layer.items()}
    gate, up = X @ p["gate_proj"].T + p.get("gate_bias", 0), X @ p["up_proj"].T + p.get("up_bias", 0)
    if activation == "silu":
        act = gate / (1 + np.exp(-gate))
    else:
        act = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    expected = (act * up) @ p["down_proj"].T + p.get("down_bias", 0)
    close(mlp(layer, replace(cfg, activation=activation), f32(X)), expected, 1e-5)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_product_is_the_same_with_either_operand_first(platform, monkeypatch):
    monkeypatch.setattr("pdx.layers.linear.platform_of", lambda: platform)
    weight = RNG.standard_normal((40, 32))
    close(product(f32(X), f32(weight)), X @ weight.T, 1e-5)
    assert product(f32(X), f32(weight), jnp.bfloat16).dtype == jnp.bfloat16


def test_a_cpu_multiplies_some_rows_with_the_weight_first(monkeypatch):
    def first(rows, dtype=jnp.float32):
        return weight_first(jnp.zeros((rows, 1, 32), dtype))

    assert [first(n) for n in (1, 2, 128, 129)] == [False, True, True, False]
    assert not first(8, jnp.bfloat16)
    # The form that is compiled: the weight's rows are the product's rows.
    text = jax.jit(product).lower(jnp.zeros((8, 32)), jnp.zeros((40, 32))).compile().as_text()
    assert "f32[40,8]" in text
    monkeypatch.setattr("pdx.layers.linear.platform_of", lambda: "tpu")
    assert not first(8)


def test_embed_scales_and_clips():
    table = f32(RNG.standard_normal((10, 4)))
    close(embed(table, jnp.array([[3, 9]]), 1.0), table[jnp.array([[3, 9]])], 0)
    close(embed(table, jnp.array([[3, 9]]), 2.5), 2.5 * np.asarray(table)[[[3, 9]]], 1e-6)
    close(embed(table, jnp.array([[-1, 10]]), 1.0), table[jnp.array([[0, 9]])], 0)


def test_columns_are_the_lookup():
    table, ids = f32(RNG.standard_normal((10, 4))), jnp.array([[3, -1], [10, 0]])
    np.testing.assert_array_equal(_embed_columns(table, ids), embed(table, ids, 1.0))


@pytest.mark.parametrize("cap", [None, 2.0])
def test_unembed_is_f32_and_capped(cap):
    table = RNG.standard_normal((10, 32))
    expected = X @ table.T
    close(unembed(f32(X), f32(table), cap), expected if cap is None else cap * np.tanh(expected / cap), 1e-5)
    assert unembed(f32(X).astype(jnp.bfloat16), f32(table).astype(jnp.bfloat16), cap).dtype == jnp.float32


def test_the_choice_of_kernels_is_explained():
    assert implementation("auto", "heads_first") == ("auto", False)
    assert implementation("xla", "folded") == ("xla", False)
    assert implementation("pallas", "folded") == ("tpu", True)
    assert implementation("pallas", "heads_last") == ("gpu", True)
    assert implementation("tpu", "folded") == ("tpu", False)
    assert [layout_for(k) for k in ("auto", "xla", "pallas", "tpu", "gpu")] == [
        "heads_first",
        "heads_first",
        "folded",
        "folded",
        "heads_last",
    ]
    with pytest.raises(NotImplementedError, match="this one lies heads_first"):
        implementation("pallas", "heads_first")
    with pytest.raises(ValueError, match="'triton' is not one of auto, xla, pallas"):
        implementation("triton", "folded")
    said = explain("xla")
    assert set(said) == {"prefill", "decode"}
    assert "flash_attention: xla" in said["prefill"]
    assert "decode_attention: xla" in said["decode"]
