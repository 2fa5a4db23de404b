"""The paged cache by itself: how it is declared, where tokens are written, how pages are copied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdx.cache.paged import copy_pages, init_paged_cache, page_groups, paged_cache_specs
from pdx.cache.rows import PackedRows
from pdx.errors import RequestError
from pdx.sharding import is_spec, make_mesh
from tests.support.models import GEMMA, LLAMA, snapshot
from tests.support.programs import check_in_place


def test_layers_of_one_window_are_a_group():
    assert page_groups(LLAMA) == (None,)
    assert page_groups(GEMMA) == (8, None)
    cache = init_paged_cache(GEMMA, (3, 5), page_size=16)
    assert cache.group_of_layer == (0, 1, 0)
    assert cache.pages == (3, 5)
    assert [x.k.shape[0] for x in cache.layers] == [3, 5, 3]
    # K and V of one head of 16 in f32, through two layers and one.
    assert cache.page_bytes == (2 * 2 * 16 * 16 * 4, 2 * 16 * 16 * 4)


def test_where_tokens_are_written():
    """Rows of three tokens, none, one and two; the last has a table entry too few. Two tokens are padding."""
    tables = np.array([[5, 9], [7, 7], [2, 2], [4, 1]])
    rows = PackedRows.packed(8, jnp.asarray(tables), jnp.array([5, 0, 1, 9]), jnp.array([0, 3, 3, 4, 6]))
    assert rows.real[0].tolist() == [True] * 6 + [False] * 2
    assert rows.owner[0, :6].tolist() == [0, 0, 0, 2, 3, 3]
    assert rows.positions[0, :6].tolist() == [2, 3, 4, 0, 7, 8]
    assert rows.wanted[0].tolist() == [2, 2, 3, 5]
    assert rows.slots(4).tolist() == [5 * 4 + 2, 5 * 4 + 3, 9 * 4, 2 * 4, 1 * 4 + 3, -1, -1, -1]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_copies_read_before_they_write_and_keep_to_their_group(dtype):
    """A swap, and copies to no page before, between and behind: page 0 and the others stay as they are."""
    cache = init_paged_cache(GEMMA, 5, page_size=8, dtype=jnp.dtype(dtype))
    rng = np.random.default_rng(1)
    filled = [jax.tree.map(lambda x: jnp.asarray(rng.integers(-99, 99, x.shape), x.dtype), y) for y in cache.layers]
    before = snapshot(cache.replace(layers=tuple(filled)))
    src, dst = np.array([4, 1, 3, 2, 4, 3]), np.array([-1, 2, 5, 1, 99, 0])
    after = copy_pages(jax.tree.map(jnp.asarray, before), 0, src, dst)
    for old, new, group in zip(before.layers, after.layers, after.group_of_layer, strict=True):
        for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            np.testing.assert_array_equal(a[[3, 2, 1, 3, 4]] if group == 0 else a, np.asarray(b))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_pages_are_copied_in_place(dtype):
    specs = paged_cache_specs(GEMMA, 2000, page_size=16, dtype=jnp.dtype(dtype))
    abstract = jax.tree.map(lambda s: s.abstract(), specs, is_leaf=is_spec)
    ids = jax.ShapeDtypeStruct((4,), jnp.int32)
    check_in_place(copy_pages.lower(abstract, 1, ids, ids).compile(), "cache", abstract)


def test_a_copy_on_a_mesh_leaves_the_cache_where_it_lies():
    mesh = make_mesh("model=2")
    cache = init_paged_cache(LLAMA, 4, page_size=16, mesh=mesh)
    before = [x.sharding for x in jax.tree.leaves(cache)]
    after = copy_pages(cache, 0, np.array([1]), np.array([2]))
    for x, sharding in zip(jax.tree.leaves(after), before, strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)


def test_what_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match="page groups"):
        init_paged_cache(GEMMA, (4, 4, 4))
    with pytest.raises(ValueError, match="at least 1"):
        init_paged_cache(LLAMA, 0)
    with pytest.raises(RequestError, match="data=1"):
        init_paged_cache(LLAMA, 4, mesh=make_mesh("data=2"))
