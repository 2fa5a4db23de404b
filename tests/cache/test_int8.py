"""The cache in int8: what is stored, what attention makes of it on every path, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.layouts import LAYOUTS, from_layout
from pdx import steps
from pdx.cache.dense import cache_specs, init_cache
from pdx.cache.rows import TokenRows
from pdx.sharding import is_spec, make_mesh
from tests.support.history import CHUNK
from tests.support.models import ALL, GEMMA, LLAMA, NINE, bits, params, tokens

pytestmark = pytest.mark.thin(6)

B, CAPACITY = 4, 256
# The scale of the logits of these models is about one. Rounding K and V to 1 in 254 moves them by this much.
NEAR = 0.05


def run(cfg, dtype=jnp.int8, layout=None, kernels="auto", mesh=None, n=6):
    """Logits behind two prefill chunks and n decoded tokens: [B, n + 2, V], and the cache."""
    cache = init_cache(cfg, B, CAPACITY, chunk=CHUNK, dtype=dtype, layout=layout, mesh=mesh)
    weights, found = params(cfg), []
    for i, counts in enumerate(([CHUNK, 9, 0, 17], [20, 0, 3, 24])):
        logits, cache = steps.prefill(
            weights, cfg, tokens(cfg, B, CHUNK, seed=i), np.array(counts, np.int32), cache, kernels=kernels
        )
        found.append(logits)
    for ids in tokens(cfg, n, B, seed=9):
        logits, cache = steps.decode_step(weights, cfg, ids, np.ones(B, bool), cache, kernels=kernels)
        found.append(logits)
    found = np.stack([np.asarray(x) for x in found], 1)
    found[2, 0] = 0  # a row that took no part in the first chunk
    return found, cache


@pytest.mark.parametrize("cfg", ALL.values(), ids=ALL)
def test_int8_is_near_the_float_cache_and_not_equal(cfg):
    exact, rounded = run(cfg, jnp.float32)[0], run(cfg)[0]
    assert np.isfinite(rounded).all()
    worst = np.abs(exact - rounded).max()
    assert 0 < worst < NEAR * max(1, np.abs(exact).max())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_appended_is_the_token_to_half_a_step(layout):
    layer = init_cache(LLAMA, 2, 128, dtype=jnp.int8, layout=layout).layers[0]
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(0, size, (2, 5, 2, 8)), jnp.float32) for size in (1.0, 30.0))
    out = layer.append(k, v, TokenRows.behind(jnp.array([126, 4]), jnp.array([5, 2]), 5))
    for name, new in (("k", k), ("v", v)):
        values = from_layout(getattr(out, name), layout, 2, 8).astype(jnp.float32)
        scales = getattr(out, f"{name}_scale")[:, :2].swapaxes(1, 2)[..., None]
        for row, places in ((0, [126, 127, 0, 1, 2]), (1, [4, 5])):  # a ring of 128
            held = np.asarray(values * scales)[row, places]
            off = np.abs(held - np.asarray(new)[row, : len(places)])
            assert (off <= 0.5001 * np.asarray(scales)[row, places]).all()
        untouched = np.ones((2, 128), bool)
        untouched[0, [126, 127, 0, 1, 2]], untouched[1, [4, 5]] = False, False
        assert not np.asarray(values)[untouched].any()


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [GEMMA, NINE], ids=["gemma3", "nine heads"])
def test_pallas_kernels_answer_as_xla_on_one_device_and_on_a_mesh(cfg):
    """Both read and write the cache as it lies: the same integers, but for ties that float noise breaks."""
    expected, cache = run(cfg, layout="folded")
    for mesh in (None, make_mesh("data=2,model=4")):
        found, other = run(cfg, layout="folded", kernels="pallas", mesh=mesh)
        np.testing.assert_allclose(found, expected, rtol=0, atol=NEAR / 5)
        if mesh is None:
            for x, y in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(other.layers), strict=True):
                differ = np.asarray(bits(x) != bits(y)) if x.dtype == jnp.int8 else np.abs(x - y) > 1e-4
                assert differ.mean() < 1e-3


def test_layouts_agree():
    found = [run(LLAMA, layout=layout)[0] for layout in LAYOUTS]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=NEAR / 5)


@pytest.mark.parametrize("damage", ["k_scale", "v_scale"])
def test_the_scales_matter(damage):
    _, cache = run(LLAMA)
    ids, active = tokens(LLAMA, B, seed=11), np.ones(B, bool)
    copies = [jax.tree.map(jnp.copy, cache) for _ in range(2)]
    layers = tuple(x.replace(**{damage: x.scales[damage] * 2}) for x in copies[1].layers)
    right, wrong = (
        steps.decode_step(params(LLAMA), LLAMA, ids, active, c)[0]
        for c in (copies[0], copies[1].replace(layers=layers))
    )
    assert np.abs(np.asarray(right - wrong)).max() > NEAR


def test_bytes_are_halved_against_bf16_but_for_the_scales():
    def size(dtype, **settings):
        specs = cache_specs(GEMMA, 8, 1024, dtype=dtype, **settings)
        return sum(s.size_bytes for s in jax.tree.leaves(specs.layers, is_leaf=is_spec))

    cells = size(jnp.int8) - size(jnp.bfloat16) / 2  # one f32 for each token, head, and of K and V
    assert cells == size(jnp.bfloat16) / 2 / GEMMA.head_dim * 4


def test_the_declared_cache_is_the_one_that_is_made():
    for layout in LAYOUTS:
        specs = cache_specs(NINE, 3, 300, dtype=jnp.int8, layout=layout)
        cache = init_cache(NINE, 3, 300, dtype=jnp.int8, layout=layout)
        jax.tree.map(
            lambda s, x: np.testing.assert_equal((s.shape, s.dtype), (x.shape, x.dtype)), specs, cache, is_leaf=is_spec
        )
        assert jax.tree.structure(cache.specs(), is_leaf=is_spec) == jax.tree.structure(cache)
