"""The dense ring cache: what it holds, what it forgets, what it refuses; against a model that sees its whole text."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdx.cache.dense import cache_specs, init_cache
from pdx.cache.layer import LayerCache
from pdx.cache.rows import TokenRows
from pdx.errors import ContextLengthError
from pdx.shapes import layer_slots
from pdx.sharding import is_spec
from tests.support.history import CAPACITY, CHUNK, DRAFT, History, history_of
from tests.support.models import ALL, GEMMA, LLAMA, leaves_equal, snapshot

pytestmark = pytest.mark.thin(6)

each = pytest.mark.parametrize("cfg", ALL.values(), ids=ALL)


@each
@pytest.mark.parametrize("seed", [0, 1])
def test_any_way_of_feeding_equals_the_whole_text(cfg, seed):
    """Chunks, single tokens, drafts taken back, rows emptied: every logit on the way is the whole text's."""
    with history_of(cfg, seed) as history:
        rng, rows = history.rng, 4
        for _ in range(40):
            room = CAPACITY - history.lengths
            match rng.integers(0, 10):
                case 0 | 1 | 2 | 3 | 4:
                    history.prefill(np.minimum(rng.integers(0, CHUNK + 1, rows), room))
                case 5 | 6 | 7:
                    history.decode((rng.random(rows) < 0.7) & (room > 0))
                case 8:
                    drafted = np.minimum(rng.integers(0, DRAFT + 1, rows), room)
                    before = history.lengths
                    history.verify(drafted)
                    history.truncate(before + rng.integers(0, drafted + 1))
                case 9:
                    history.truncate(np.where(rng.random(rows) < 0.2, 0, history.lengths))
        history.decode(history.lengths < CAPACITY)


def test_generation_far_past_the_window():
    """Rings of 128 slots come round three times, in chunks longer than the window and then token by token."""
    with history_of(GEMMA) as history:
        assert history.cache.layers[0].k.shape[2] == 128
        assert max(w for w in GEMMA.windows if w) < CHUNK
        while history.lengths[0] + CHUNK <= 350:
            history.prefill([CHUNK, CHUNK, CHUNK // 2, 1])
        for _ in range(12):
            history.decode([True, True, True, True])


def lose_a_token(cache):
    return cache.replace(layers=tuple(c.replace(v=c.v.at[0, :, 20].set(0.0)) for c in cache.layers))


def mistake_rows(cache):
    return cache.replace(layers=tuple(c.replace(k=jnp.roll(c.k, 1, axis=0)) for c in cache.layers))


@pytest.mark.parametrize("damage", [lose_a_token, mistake_rows])
def test_agreement_with_the_whole_text_can_fail(damage):
    history = History(GEMMA)
    history.prefill([24, 20, 16, 9])
    history.check()
    history.cache = damage(history.cache)
    history.decode([True, True, True, True])
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        history.check()


def test_truncation_inside_a_ring_that_wrapped():
    with history_of(GEMMA) as history:
        for _ in range(8):
            history.prefill([CHUNK, CHUNK, 3, 0])
        for back in (0, 1, 7, 16):
            history.verify([5, 5, 5, 0])
            longest = int(np.asarray(history.cache.written)[0])
            history.truncate([longest - back - 1, longest - back - 3, history.lengths[2], 0])
            history.decode([True, True, True, False])
            history.prefill([24, 20, 0, 0])


def test_going_back_further_than_a_ring_holds_is_refused():
    with history_of(GEMMA) as history:
        for _ in range(10):
            history.prefill([CHUNK, 2, 0, 0])
        slots, window, written = 128, 8, 240
        earliest = written - slots + window - 1
        says = f"row 0 was 240 tokens long and cannot go back to {earliest - 1}.*keeps 128 positions.*{earliest}, or 0"
        with pytest.raises(ContextLengthError, match=says):
            history.cache.truncate(jnp.array([earliest - 1, 20, 0, 0]))
        # Shortened and grown again, the ring has still lost what it had overwritten.
        history.truncate([earliest + 5, 20, 0, 0])
        with pytest.raises(ContextLengthError, match="row 0 was 240 tokens long"):
            history.cache.truncate(jnp.array([earliest - 1, 20, 0, 0]))
        # The earliest one is right, not only allowed; and an empty row is new.
        history.truncate([earliest, 3, 0, 0])
        history.decode([True, True, False, False])
        history.truncate([0, 3, 0, 0])
        history.prefill([20, 20, 0, 0])
        history.truncate([1, 23, 0, 0])
        history.decode([True, True, False, False])


def test_a_draft_can_always_be_taken_back():
    """Whatever the window and the chunk, 16 tokens back lies in the ring."""
    for window in (1, 8, 100, 112, 113, 128, 500):
        for chunk in (1, 16, 17, 24, 128, 130):
            slots = layer_slots(window, 4096, chunk)
            assert slots % 128 == 0
            assert slots >= window - 1 + max(chunk, 17)
            assert slots - 128 < window - 1 + max(chunk, 17)
            written = 2000
            assert written - slots <= (written - 16) - window + 1
    assert layer_slots(None, 4096, 16) == 4096
    assert layer_slots(4000, 4096, 512) == 4096


@pytest.mark.parametrize("kind", ["full", "ring"])
def test_only_valid_tokens_are_written(kind):
    """Every slot starts as garbage; exactly those of the valid positions change."""
    slots, heads, dim = 128, 2, 4
    garbage = jnp.full((3, heads, slots, dim), 77.0)
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((3, 10, heads, dim)).astype(np.float32) for _ in "kv")
    start = np.array([0, 50, 0]) if kind == "full" else np.array([125, 250, 1000])
    counts = np.array([10, 4, 0])
    positions = start[:, None] + np.arange(10)
    rows = TokenRows.behind(jnp.asarray(start), jnp.asarray(counts), 10)
    np.testing.assert_array_equal(rows.positions, positions)
    out = LayerCache(garbage, garbage).append(k, v, rows)
    expected_k, expected_v = np.array(garbage), np.array(garbage)
    for row in range(3):
        for t in range(counts[row]):
            expected_k[row, :, positions[row, t] % slots] = k[row, t]
            expected_v[row, :, positions[row, t] % slots] = v[row, t]
    np.testing.assert_array_equal(np.asarray(out.k), expected_k)
    np.testing.assert_array_equal(np.asarray(out.v), expected_v)


def test_append_rounds_to_the_dtype_of_the_cache():
    out = LayerCache(*[jnp.zeros((1, 1, 128, 2), jnp.bfloat16)] * 2).append(
        jnp.full((1, 1, 1, 2), 1.001),
        jnp.full((1, 1, 1, 2), 3.0),
        TokenRows.behind(jnp.zeros(1, int), jnp.ones(1, int), 1),
    )
    assert out.k.dtype == jnp.bfloat16
    assert float(out.k[0, 0, 0, 0]) == 1.0
    assert float(out.v[0, 0, 0, 0]) == 3.0


def test_what_init_cache_makes():
    cache = init_cache(GEMMA, 3, 300, chunk=200, dtype=jnp.bfloat16)
    assert (cache.batch, cache.capacity, cache.chunk, cache.windows) == (3, 384, 200, GEMMA.windows)
    assert [c.k.shape for c in cache.layers] == [(3, 1, 256, 16), (3, 1, 384, 16), (3, 1, 256, 16)]
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(cache.layers))
    assert all((np.asarray(x, np.float32) == 0).all() for x in jax.tree.leaves(cache))
    assert init_cache(LLAMA, 1, 1).chunk == 128  # no chunk is larger than the cache
    # No two leaves share a buffer: each is donated by itself.
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache)]
    assert len(set(pointers)) == len(pointers)


def test_the_declared_cache_is_the_one_that_is_made():
    specs, cache = cache_specs(GEMMA, 3, 300, chunk=200), init_cache(GEMMA, 3, 300, chunk=200)
    assert jax.tree.structure(specs, is_leaf=is_spec) == jax.tree.structure(cache)
    jax.tree.map(
        lambda s, x: np.testing.assert_equal((s.shape, s.dtype), (x.shape, x.dtype)), specs, cache, is_leaf=is_spec
    )


@pytest.mark.parametrize(("batch", "capacity", "chunk"), [(0, 128, 1), (1, 0, 1), (1, 128, 0)])
def test_sizes_below_one_are_refused(batch, capacity, chunk):
    with pytest.raises(ValueError, match=f"batch {batch}, capacity {capacity} and chunk {chunk} must be at least 1"):
        init_cache(LLAMA, batch, capacity, chunk=chunk)


def test_truncate_moves_nothing_and_never_lengthens():
    history = History(LLAMA)
    history.prefill([10, 5, 0, 24])
    before = snapshot(history.cache.layers)
    shorter = history.cache.truncate(jnp.array([4, 9, 3, 0]))
    np.testing.assert_array_equal(np.asarray(shorter.lengths), [4, 5, 0, 0])
    np.testing.assert_array_equal(np.asarray(shorter.written), [10, 5, 0, 0])
    leaves_equal(snapshot(shorter.layers), before)


def test_truncate_inside_a_program():
    """Under a trace there is nothing to look at, so nothing is refused: the caller keeps count."""
    history = History(GEMMA)
    for _ in range(6):
        history.prefill([CHUNK, 2, 0, 0])
    out = jax.jit(lambda cache, n: cache.truncate(n))(history.cache, jnp.array([3, 5, 0, 0]))
    np.testing.assert_array_equal(np.asarray(out.lengths), [3, 5, 0, 0])


def test_a_cache_is_a_pytree_of_its_arrays():
    cache = init_cache(GEMMA, 2, 128)
    assert len(jax.tree.leaves(cache)) == 2 * GEMMA.num_layers + 2
    other = init_cache(replace(GEMMA, windows=(None,) * 3), 2, 128)
    assert jax.tree.structure(cache) != jax.tree.structure(other)  # another program
