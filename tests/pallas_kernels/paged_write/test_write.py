"""The page write: what lies where afterwards, what is dropped, and that the compiled program copies no pool."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter  # who keeps the races it found
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_write import tpu
from pallas_kernels.paged_write.api import write_pages
from pallas_kernels.quantize_kv import quantize_kv
from tests.support.paged_attention import pad_scale, to_layout

pytestmark = pytest.mark.thin(10)

rounded = jax.jit(quantize_kv)
LAYOUTS = ("folded", "heads_last", "heads_first")
PAGES, PAGE, HEADS, SIZE, VALUE = 6, 32, 3, 64, 32


def pools(rng, dtype, page=PAGE):
    """K and V as [P, p, K, H] and for int8 scales [P, K, p], numpy."""
    shapes = [(PAGES, page, HEADS, SIZE), (PAGES, page, HEADS, VALUE)]
    if dtype == "int8":
        return [rng.integers(-127, 128, s).astype(np.int8) for s in shapes] + [
            rng.random((PAGES, HEADS, page)).astype(np.float32) for _ in shapes
        ]
    return [rng.standard_normal(s).astype(jnp.dtype(dtype)) for s in shapes]


def tokens(rng, count, dtype):
    made = [rng.standard_normal((count, HEADS, s)).astype(np.float32) for s in (SIZE, VALUE)]
    if dtype == "int8":
        quantized = [rounded(x) for x in made]
        return [np.array(x) for x, _ in quantized] + [np.array(s) for _, s in quantized]
    return [x.astype(jnp.dtype(dtype)) for x in made]


def expected(before, new, slots, page=PAGE):
    after = [x.copy() for x in before]
    for token, slot in enumerate(slots):
        if 0 <= slot < PAGES * page:
            for i, pool in enumerate(after):
                where = (slot // page, slot % page) if i < 2 else (slot // page, slice(None), slot % page)
                pool[where] = new[i][token]
    return after


@cache
def caller(layout, **settings_):
    return jax.jit(partial(write_pages, layout=layout, **settings_))


def run(before, new, slots, layout, **settings_):
    names = ("new_k_scale", "new_v_scale")
    scales = dict(zip(names, map(jnp.asarray, new[2:]), strict=False))
    scales |= dict(zip(("k_scale", "v_scale"), [jnp.asarray(pad_scale(x)) for x in before[2:]], strict=False))
    pools_ = [jnp.asarray(to_layout(x, layout)) for x in before[:2]]
    call = caller(layout, **settings_)
    return call(*pools_, *map(jnp.asarray, new[:2]), slots=jnp.asarray(slots, jnp.int32), **scales)


def check(found, after, layout):
    for i, (x, wanted) in enumerate(zip(found, after, strict=True)):
        if i < 2:
            wanted = to_layout(wanted, layout)
            heads = (HEADS * (SIZE, VALUE)[i]) if layout == "folded" else None
            x, wanted = np.asarray(x)[..., :heads], wanted[..., :heads]
        else:
            x = np.asarray(x)[:, :HEADS]
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(wanted, np.float32))


SLOTS = {
    "one": [37],
    "a run over pages": list(range(25, 75)),
    "scattered": [191, 0, 64, 33, 100, 31, 32],
    "some dropped": [5, -1, 192, 70, -(2**31), 2**31 - 1, 6],
    "all dropped": [-1, -1, -1],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", SLOTS)
def test_xla(name, dtype):
    rng = np.random.default_rng(0)
    slots = SLOTS[name]
    before, new = pools(rng, dtype), tokens(rng, len(slots), dtype)
    after = expected(before, new, slots)
    for layout in LAYOUTS:
        check(run(before, new, slots, layout, implementation="xla"), after, layout)
    if name != "all dropped":
        with pytest.raises(AssertionError):
            check(
                run(before, new, [s + 1 for s in slots if s < 190] + [0] * sum(s >= 190 for s in slots), "folded"),
                after,
                "folded",
            )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.permutations(range(-3, PAGES * PAGE + 3)), st.sampled_from(["bfloat16", "int8"]))
def test_any_distinct_slots(order, dtype):
    slots = order[:20]
    rng = np.random.default_rng(1)
    before, new = pools(rng, dtype), tokens(rng, len(slots), dtype)
    check(run(before, new, slots, "folded", implementation="xla"), expected(before, new, slots), "folded")


def test_folding_writes_zeros_behind_the_heads():
    rng = np.random.default_rng(0)
    before, new = pools(rng, "float32"), tokens(rng, 1, "float32")
    out = run(before, new, [3], "folded")[0]
    assert out.shape[-1] == 256
    assert (np.asarray(out)[0, 3, HEADS * SIZE :] == 0).all()


def test_donated_pools_are_aliased():
    """On the CPU too: the program's outputs are its arguments."""
    pool = jax.ShapeDtypeStruct((64, 32, 256), jnp.float32)
    new = jax.ShapeDtypeStruct((8, 2, 128), jnp.float32)
    f = jax.jit(lambda k, v, a, b, s: write_pages(k, v, a, b, slots=s, layout="folded"), donate_argnums=(0, 1))
    compiled = f.lower(pool, pool, new, new, jax.ShapeDtypeStruct((8,), jnp.int32)).compile()
    nbytes = 2 * 64 * 32 * 256 * 4
    assert compiled.memory_analysis().alias_size_in_bytes == nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < nbytes / 100


def test_quantize_kv_rounds_halves_to_even():
    x = jnp.asarray([[127.0, 0.5, 1.5, -2.5, -126.5], [0.0] * 5, [1e-30, 0, 0, 0, -1e-30]])
    values, scale = quantize_kv(x)
    np.testing.assert_array_equal(np.asarray(values), [[127, 0, 2, -2, -126], [0] * 5, [127, 0, 0, 0, -127]])
    np.testing.assert_allclose(np.asarray(scale), [1.0, 0.0, 1e-30 / 127], rtol=1e-6)
    drawn = np.random.default_rng(0).standard_normal((50, 3, 64)).astype(np.float32)
    values, scale = (np.asarray(y) for y in quantize_kv(jnp.asarray(drawn)))
    assert (np.abs(values * scale[..., None] - drawn) <= scale[..., None] * 0.5001).all()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"k": jnp.zeros((2, 64))}, r"k must be \[T, K, H\]"),
        ({"k": jnp.zeros((2, 2, 128))}, r"k_pages must be \[P, p, C\] = \(4, 32, 256\)"),
        ({"slots": jnp.zeros(3, jnp.int32)}, r"slots must be \[T\] = \(2,\)"),
        ({"slots": jnp.asarray([7, 7])}, "slots must be distinct, and two tokens are for slot 7"),
        ({"slots": jnp.zeros(2)}, "slots must be an array of integer type, got float32"),
        ({"slots": [0, 1]}, "slots must be an array of integer type, got list"),
        ({"k": jnp.zeros((2, 2, 64), jnp.int32)}, "k must be an array of floating or int8 type, got int32"),
        ({"new_k_scale": jnp.zeros((2, 2))}, "new_k_scale must be"),
        ({"k": jnp.zeros((2, 2, 64), jnp.int8)}, "int8 pages take int8"),
        ({"layout": "flat"}, "'flat' is not one of"),
        ({"layout": "heads_last"}, "pages must be"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments_are_named(changes, says):
    pages = jnp.zeros((4, 32, 128))
    given_ = {
        "k_pages": pages,
        "v_pages": pages,
        "k": jnp.zeros((2, 2, 64)),
        "v": jnp.zeros((2, 2, 64)),
        "slots": jnp.asarray([0, 1]),
        "layout": "folded",
    }
    with pytest.raises(ValueError, match=says):
        write_pages(**given_ | changes)


# --- the kernel of int8 pages


@pytest.mark.parametrize("name", SLOTS)
def test_tpu(name):
    rng = np.random.default_rng(0)
    slots = [s * 4 + 1 if 0 <= s < 192 else s if s < 0 else s + 4 * 192 for s in SLOTS[name]]
    slots = list(range(250, 300)) if name == "a run over pages" else [min(s, 2**31 - 1) for s in slots]
    before, new = pools(rng, "int8", 128), tokens(rng, len(slots), "int8")
    new[2][0] = np.nan  # another token's scale must not suffer from it
    found = run(before, new, slots, "folded", implementation="tpu", interpret=True)
    check(found, expected(before, new, slots, 128), "folded")


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.permutations(range(-3, PAGES * 128 + 3)))
def test_tpu_takes_any_distinct_slots(order):
    slots = order[:40]
    rng = np.random.default_rng(1)
    before, new = pools(rng, "int8", 128), tokens(rng, len(slots), "int8")
    found = run(before, new, slots, "folded", implementation="tpu", interpret=True)
    check(found, expected(before, new, slots, 128), "folded")


@pytest.mark.slow
@pytest.mark.parametrize("count", [32, 33, 64, 100])
def test_tpu_writes_more_tokens_than_one_run_takes(monkeypatch, count):
    """Runs follow each other, also over one tile; what scalar memory holds is 65536 tokens."""
    monkeypatch.setattr(tpu, "MOST_TOKENS", 32)
    rng = np.random.default_rng(2)
    slots = rng.permutation(200)[:count] + 100
    slots[::9] = -1
    before, new = pools(rng, "int8", 128), tokens(rng, count, "int8")
    arrays = [jnp.asarray(to_layout(x, "folded")) for x in before[:2]]
    scales = [jnp.asarray(pad_scale(x)) for x in before[2:]]
    runs = str(
        jax.make_jaxpr(partial(write_pages, layout="folded", implementation="tpu", interpret=True))(
            *arrays,
            *map(jnp.asarray, new[:2]),
            slots=jnp.asarray(slots),
            k_scale=scales[0],
            v_scale=scales[1],
            new_k_scale=jnp.asarray(new[2]),
            new_v_scale=jnp.asarray(new[3]),
        )
    ).count("name=write_pages")
    assert runs == -(-count // 32)
    caller.cache_clear()
    found = run(before, new, slots, "folded", implementation="tpu", interpret=True)
    caller.cache_clear()
    check(found, expected(before, new, slots, 128), "folded")


def test_the_kernel_says_what_it_cannot_do():
    rng = np.random.default_rng(0)
    for dtype, page, says in (("bfloat16", 128, "XLA writes bfloat16 ones in place"), ("int8", 32, "multiple of 128")):
        before, new = pools(rng, dtype, page), tokens(rng, 1, dtype)
        with pytest.raises(NotImplementedError, match=says):
            run(before, new, [3], "folded", implementation="tpu", interpret=True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["on_wait", "eager"])
def test_tpu_without_races(mode):
    rng = np.random.default_rng(0)
    slots = [5, 40, 41, 300, 7, -1, 130, 767, 131]
    before, new = pools(rng, "int8", 128), tokens(rng, len(slots), "int8")
    interpret = pltpu.InterpretParams(detect_races=True, dma_execution_mode=mode, uninitialized_memory="nan")
    found = run(before, new, slots, "folded", implementation="tpu", interpret=interpret)
    check(found, expected(before, new, slots, 128), "folded")
    assert not interpreter.races.races_found
