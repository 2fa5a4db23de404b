"""What an attention call may be given at its edges: partial blocks, wrapped rings, rows past their memory, sinks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import decode_attention, flash_attention, paged_attention, reference_attention, write_pages
from pallas_kernels.attention.call import Call
from pallas_kernels.decode_attention import tpu as decode_tpu
from pallas_kernels.flash_attention import gpu as flash_gpu
from pallas_kernels.flash_attention import tpu as flash_tpu
from pallas_kernels.layouts import to_layout
from pallas_kernels.paged_attention.reference import attention as paged_reference

pytestmark = pytest.mark.thin(20)

LAYOUT = {"tpu": "folded", "gpu": "heads_last", "xla": "heads_first"}
DENSE = {"flash": flash_attention, "decode": decode_attention}
RUNS = [(op, name) for op in DENSE for name in LAYOUT]
IDS = [f"{op} {name}" for op, name in RUNS]

# Compiled once for all implementations that are held against them.
dense_reference = jax.jit(
    partial(reference_attention, layout="heads_last"),
    static_argnames=("scale", "causal", "window", "softcap", "return_lse"),
)
packed_reference = jax.jit(
    partial(paged_reference, layout="heads_last", kv_heads=2), static_argnames=("scale", "window", "return_lse")
)


def numbers(b, t, slots, heads=4, kv_heads=2, size=16, seed=0):
    """q, k and v as heads_last lays them."""
    rng = np.random.default_rng(seed)
    shapes = (b, t, heads, size), (b, slots, kv_heads, size), (b, slots, kv_heads, size)
    return [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]


def both(op, name, q, k, v, starts, lengths, config=None, interpret=True, **settings):
    """The op by an implementation and by the reference, each (out, lse); traced, so that no number is looked at."""
    arrays = {
        "q": q,
        "k": k,
        "v": v,
        "starts": jnp.asarray(starts),
        "lengths": None if lengths is None else jnp.asarray(lengths),
    }
    settings = {"scale": 0.3, "return_lse": True} | settings
    plain = {x: None if arrays[x] is None else np.asarray(arrays[x]).astype(np.int32) for x in ("starts", "lengths")}

    def run(arrays):
        laid = {x: to_layout(arrays[x], LAYOUT[name]) for x in "kv"}
        kernel = {} if name == "xla" else {"interpret": interpret, "config": config}
        return DENSE[op](
            **arrays | laid, **settings, layout=LAYOUT[name], kv_heads=k.shape[2], implementation=name, **kernel
        )

    return jax.jit(run)(arrays), dense_reference(**arrays | plain, **settings)


def same(found, right):
    for x, y in zip(found, right, strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("slots", [1, 100, 113])
@pytest.mark.parametrize(("op", "name"), [r for r in RUNS if r[1] != "tpu"], ids=[i for i in IDS if "tpu" not in i])
def test_the_last_partial_block_of_keys_is_read_without_lengths_and_mask(op, name, slots):
    q, k, v = numbers(2, 5, slots)
    same(*both(op, name, q, k, v, [0, 0], None, causal=False))


def test_no_block_of_keys_is_partial_where_they_divide_the_slots():
    q, k, v = numbers(1, 5, 96)
    same(*both("flash", "gpu", q, k, v, [0], None, causal=False, config=flash_gpu.Config(16, 32)))


@pytest.mark.parametrize("lengths", [None, [128, 60]], ids=["full", "ragged"])
@pytest.mark.parametrize(("op", "name"), RUNS, ids=IDS)
def test_without_a_causal_mask_every_query_sees_the_whole_row(op, name, lengths):
    """Cross attention: more queries than keys, wherever they are said to stand."""
    slots = 128 if name == "tpu" else 20
    t = 200 if op == "flash" and name != "tpu" else 16
    lengths = lengths and [min(n, slots) for n in lengths]
    q, k, v = numbers(2, t, slots)
    same(*both(op, name, q, k, v, [120, 500], lengths, causal=False))


# --- rows longer than their slots


@pytest.mark.parametrize("length", [257, 1000])
@pytest.mark.parametrize(("op", "name"), RUNS, ids=IDS)
def test_a_ring_that_wrapped_needs_no_window(op, name, length):
    """The row's last S tokens count, those of this chunk included; a neighbour has not wrapped."""
    t = 40 if op == "flash" else 9
    q, k, v = numbers(2, t, 256)
    config = {("flash", "tpu"): flash_tpu.Config(16, 128, 128), ("decode", "tpu"): decode_tpu.Config(128, 128)}
    same(*both(op, name, q, k, v, [length - t, 20], [length, 20 + t], config=config.get((op, name))))


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("length", [641, 1290])
def test_blocks_of_the_tpu_decode_kernel_stay_inside_a_ring_that_they_do_not_divide(length, splits):
    """The interpreter that checks bounds: 256 slots at once of 640."""
    q, k, v = numbers(2, 3, 640, size=64)
    config, interpret = decode_tpu.Config(256, 128, splits), pltpu.InterpretParams(dma_execution_mode="on_wait")
    same(*both("decode", "tpu", q, k, v, [length - 3, 98], [length, 101], config=config, interpret=interpret))


def pages(
    lengths, width, name, interpret, sinks=None, tables=None, traced=True, queries=None, kind="int32", **settings
):
    """Paged attention over pages of 16 by an implementation and by the reference, the last tokens of each row asked."""
    rng, rows = np.random.default_rng(0), len(lengths)
    queries = queries or [1] * rows
    tables = np.arange(rows * width).reshape(rows, width) if tables is None else tables
    arrays = {
        "q": jnp.asarray(rng.standard_normal((sum(queries), 4, 64)), jnp.float32),
        "block_tables": jnp.asarray(tables, kind),
        "lengths": jnp.asarray(lengths, kind),
        "query_starts": jnp.asarray(np.concatenate([[0], np.cumsum(queries)]), kind),
        "sinks": sinks,
    }
    plain = {x: np.asarray(arrays[x]).astype(np.int32) for x in ("block_tables", "lengths", "query_starts")}
    pool = jnp.asarray(rng.standard_normal((2, rows * width, 16, 2, 64)), jnp.float32)
    settings = {"scale": 0.2, "return_lse": True} | settings

    def run(arrays):
        k, v = (to_layout(x, LAYOUT[name]) for x in pool)
        return paged_attention(
            **arrays,
            k_pages=k,
            v_pages=v,
            layout=LAYOUT[name],
            kv_heads=2,
            implementation=name,
            interpret=interpret,
            **settings,
        )

    found = jax.jit(run)(arrays) if traced else run(arrays)
    return found, packed_reference(**arrays | plain, **settings, k_pages=pool[0], v_pages=pool[1])


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("lengths", [[33, 10], [32, 500]], ids=str)
@pytest.mark.parametrize("name", LAYOUT)
def test_a_row_longer_than_its_block_table_reads_nothing_past_it(name, lengths, window):
    same(*pages(lengths, 2, name, name != "xla", queries=[6, 3], window=window))


@pytest.mark.parametrize("lengths", [[33, 10], [10, 33]], ids=str)
def test_nor_does_it_for_the_interpreter_that_checks_bounds(lengths):
    same(*pages(lengths, 2, "tpu", pltpu.InterpretParams()))


@pytest.mark.parametrize("name", LAYOUT)
def test_pages_outside_of_the_pool_are_not_read(name):
    """A traced block table may name them: the nearest page is read."""
    tables = np.array([[0, 99], [-5, 3]])
    interpret = {"tpu": pltpu.InterpretParams(), "gpu": True, "xla": False}[name]
    same(*pages([20, 20], 2, name, interpret, tables=tables))


# --- more rows than a TPU's scalar memory


@pytest.mark.parametrize(
    ("module", "tree", "most"), [(decode_tpu, False, 98304), (decode_tpu, True, 1512), (flash_tpu, False, 98304)]
)
def test_more_rows_than_scalar_memory_holds_are_refused_by_the_tpu_kernels(module, tree, most):
    def call(rows):
        op = module.__name__.split(".")[1]
        return Call(op, rows, 4, 8, 8, 128, 128, 128, "bfloat16", "bfloat16", "folded", tree=tree)

    assert module.supported(call(most)) is None
    assert "do not fit the TPU's scalar memory: split the batch" in module.supported(call(most + 1))


# --- sinks


@pytest.mark.parametrize(("op", "name"), RUNS, ids=IDS)
def test_a_sink_of_minus_infinity_is_none(op, name):
    """Also for queries that see nothing: the tree hides even their own token, and the row holds no other."""
    q, k, v = numbers(2, 4, 128)
    tree = jnp.asarray(np.tril(np.ones((2, 4, 4), bool), -1))
    sinks = jnp.asarray([-jnp.inf, 0.5, -jnp.inf, -3.0])
    (out, lse), right = both(op, name, q, k, v, [0, 50], [4, 54], sinks=sinks, tree=tree)
    same((out, lse), right)
    np.testing.assert_array_equal(np.asarray(out)[0, 0], 0)
    np.testing.assert_array_equal(np.asarray(lse)[0, 0], sinks)
    plain, _ = both(op, name, q, k, v, [0, 50], [4, 54], tree=tree)
    np.testing.assert_allclose(np.asarray(out)[:, :, ::2], np.asarray(plain[0])[:, :, ::2], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("sink", [np.nan, np.inf])
@pytest.mark.parametrize(("op", "name"), RUNS, ids=IDS)
def test_a_sink_that_is_no_number_gives_none(op, name, sink):
    """NaN for its head, and nothing of it for the others."""
    q, k, v = numbers(1, 4, 128)
    sinks = jnp.asarray([0.5, sink, 0.1, 0.2])
    for out, lse in both(op, name, q, k, v, [50], [54], sinks=sinks):
        assert np.isnan(np.asarray(out)[:, :, 1]).all()
        assert np.isnan(np.asarray(lse)[:, :, 1]).all()
        assert np.isfinite(np.asarray(out)[:, :, [0, 2, 3]]).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUT)
def test_sinks_of_pages_are_taken_alike(name):
    interpret = name != "xla"
    same(*pages([20, 33, 0], 3, name, interpret, sinks=jnp.asarray([-jnp.inf, 0.5, -jnp.inf, -3.0]), queries=[3, 9, 2]))
    for sink in (np.nan, np.inf):
        for out, lse in pages([20, 33], 3, name, interpret, sinks=jnp.asarray([0.5, sink, 0.1, 0.2]), queries=[3, 9]):
            assert np.isnan(np.asarray(out)[:, 1]).all()
            assert np.isnan(np.asarray(lse)[:, 1]).all()
            assert np.isfinite(np.asarray(out)[:, [0, 2, 3]]).all()


# --- what others' kernels got wrong


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUT)
def test_a_row_with_more_queries_than_tokens_has_some_that_see_nothing(name):
    """Zeros and -inf for them, be they the first of a block (FlashInfer #4452: a finite log-sum-exp)."""
    (out, lse), right = pages([3, 20], 2, name, name != "xla", queries=[9, 4])
    same((out, lse), right)
    np.testing.assert_array_equal(np.asarray(out)[:6], 0)
    np.testing.assert_array_equal(np.asarray(lse)[:6], -np.inf)
    assert np.asarray(out)[6:].all()


@pytest.mark.parametrize(("op", "name"), RUNS, ids=IDS)
def test_leading_queries_that_see_nothing_get_their_sink(op, name):
    """A whole block of them, zeros (ik_llama.cpp #2344: NaN); the tree hides all of the chunk's tokens."""
    q, k, v = numbers(1, 16, 128)
    tree = jnp.zeros((1, 16, 16), bool).at[:, 15].set(True)
    sinks = jnp.asarray([0.5, -1.0, 2.0, 0.0])
    (out, lse), right = both(op, name, q, k, v, [0], [16], sinks=sinks, tree=tree)
    same((out, lse), right)
    np.testing.assert_array_equal(np.asarray(out)[0, :15], 0)
    np.testing.assert_allclose(np.asarray(lse)[0, :15], np.tile(sinks, (15, 1)), rtol=1e-6)


@pytest.mark.parametrize(("op", "name"), RUNS, ids=IDS)
def test_logits_below_what_others_mask_with_still_count(op, name):
    """FlashInfer #4267: real logits below its -5e4 lost to masked ones."""
    q, k, v = numbers(1, 3, 128)
    q, k = jnp.full_like(q, -1e20 / 16), jnp.ones_like(k)
    (out, _), _ = both(op, name, q, k, v, [20], [23], scale=1.0)
    for t in range(3):
        mean = np.repeat(np.asarray(v)[0, : 21 + t].mean(0), 2, axis=0)
        np.testing.assert_allclose(np.asarray(out)[0, t], mean, rtol=1e-4, atol=1e-5)


# --- numbers that cannot be, where they can be seen

DENSE_WRONG = (
    ([-1, 0], [3, 3], "row 0 starts at -1"),
    ([0, -2], None, "row 1 starts at -2"),
    ([0, 0], [3, -3], "row 1 has length -3: give 0 for a row that takes no part"),
)


@pytest.mark.parametrize(("starts", "lengths", "says"), DENSE_WRONG)
@pytest.mark.parametrize("op", DENSE)
def test_rows_below_zero_are_refused(op, starts, lengths, says):
    q, k, v = numbers(2, 2, 8)
    starts, lengths = np.array(starts, np.int32), None if lengths is None else jnp.asarray(lengths)
    with pytest.raises(ValueError, match=f"{op}_attention: {says}"):
        DENSE[op](q, k, v, starts=starts, lengths=lengths, scale=1.0, layout="heads_last")


def test_where_a_row_without_part_starts_is_not_looked_at():
    q, k, v = numbers(2, 2, 8)
    out = flash_attention(
        q, k, v, starts=np.array([-7, 0], np.int32), lengths=jnp.asarray([0, 2]), scale=1.0, layout="heads_last"
    )
    np.testing.assert_array_equal(np.asarray(out)[0], 0)


def packed(**changes):
    pool = jnp.zeros((5, 16, 2, 8))
    return {
        "q": jnp.zeros((6, 2, 8)),
        "k_pages": pool,
        "v_pages": pool,
        "block_tables": np.array([[0, 1], [2, 3]]),
        "lengths": np.array([20, 30]),
        "query_starts": np.array([0, 2, 6]),
        "scale": 1.0,
        "layout": "heads_last",
    } | changes


PACKED_WRONG = (
    ({"query_starts": np.array([0, 4, 2])}, r"query_starts must begin with 0, never fall .* got \[0, 4, 2\]"),
    ({"query_starts": np.array([1, 2, 6])}, "query_starts must begin with 0"),
    ({"query_starts": np.array([0, 2, 7])}, "query_starts .* end at T = 6 or before"),
    ({"lengths": np.array([20, -1])}, "row 1 has length -1"),
    ({"lengths": np.array([33, 30])}, "row 0 holds 33 tokens, and its block table names 2 pages of 16"),
    ({"lengths": np.array([20, 3])}, "row 1 has 4 queries and only 3 tokens"),
    ({"block_tables": np.array([[0, 5], [2, 3]])}, "row 0 reads page 5 .* the pool has 5"),
    ({"block_tables": np.array([[0, 1], [-1, 3]])}, "row 1 reads page -1"),
    ({"max_queries": 3}, "row 1 owns 4 queries, .*max_queries promise at most 3"),
    ({"decode_rows": 1}, "row 0 owns 2 queries, .* at most 1"),
)


@pytest.mark.parametrize(("changes", "says"), PACKED_WRONG, ids=[says for _, says in PACKED_WRONG])
def test_packed_rows_that_cannot_be_are_refused(changes, says):
    paged_attention(**packed())
    with pytest.raises(ValueError, match=f"paged_attention: {says}"):
        paged_attention(**packed(**changes))


def test_pages_that_nobody_looks_at_may_be_any():
    paged_attention(**packed(block_tables=np.array([[0, 1], [-1, 3]]), window=5))
    paged_attention(**packed(block_tables=np.array([[99, 99], [2, 3]]), lengths=np.array([0, 30])))
    paged_attention(**packed(block_tables=np.array([[0, -1], [2, 3]]), lengths=np.array([16, 30])))


# --- the type of numbers that say where things are


@pytest.mark.parametrize(("kind", "window"), [("uint32", None), ("uint8", 5), ("int8", 5)])
@pytest.mark.parametrize(("op", "name"), RUNS, ids=IDS)
def test_positions_may_be_of_any_integer_type(op, name, kind, window):
    """Rows shorter than what is subtracted from them, and one that stands where sums leave the smallest types."""
    q, k, v = numbers(3, 9, 128)
    given = {x: jnp.asarray(n, kind) for x, n in (("starts", [0, 0, 118]), ("lengths", [0, 9, 127]))}
    found, right = both(op, name, q, k, v, **given, window=window)
    same(found, right)
    same(reference_attention(q, k, v, **given, scale=0.3, window=window, layout="heads_last", return_lse=True), right)


@pytest.mark.parametrize("kind", ["uint32", "uint8"])
@pytest.mark.parametrize("name", LAYOUT)
def test_so_may_those_of_pages(name, kind):
    found, right = pages([0, 5, 130], 9, name, interpret=name != "xla", queries=[2, 3, 1], kind=kind)
    same(found, right)


@pytest.mark.parametrize("kind", ["uint8", "uint32", "int8"])
def test_and_of_slots(kind):
    pool, new = jnp.zeros((20, 16, 1, 8)), jnp.ones((3, 1, 8))
    written, _ = write_pages(pool, pool, new, new, slots=jnp.asarray([100, 7, 127], kind), layout="heads_last")
    np.testing.assert_array_equal(np.flatnonzero(written[..., 0, 0]), [7, 100, 127])


def test_a_number_beyond_int32_stays_beyond():
    """2^32 is dropped, and not slot 0."""
    pool, new = jnp.zeros((2, 16, 1, 8)), jnp.ones((2, 1, 8))
    written, _ = write_pages(pool, pool, new, new, slots=np.array([2**32, -(2**32)]), layout="heads_last")
    assert not written.any()
