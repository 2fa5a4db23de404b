"""Token trees: their shape, what a forward pass over one computes, and the path that a cache keeps."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdx.cache.dense import init_cache
from pdx.cache.layer import LayerCache
from pdx.cache.rows import TokenRows
from pdx.errors import RequestError
from pdx.meshes import make_mesh
from pdx.model import forward, param_specs
from pdx.sharding import place
from pdx.speculative.trees import Tree, depth_of
from tests.support.models import GEMMA, LLAMA, TOLERANCE, params

TREE = Tree.of((3, 2, 1))
UNEVEN = Tree((0, 0, 0, 1, 1, 2, 4, 4, 7))
HELD = [20, 7, 0, 131]
CAPACITY, CHUNK = 256, 64


def test_nodes_are_numbered_level_by_level():
    assert TREE.size == 16
    assert TREE.depth == depth_of(TREE) == 3
    assert [len(level) for level in TREE.levels] == [1, 3, 6, 6]
    assert TREE.children[1] == (4, 5)
    assert TREE.path(10) == (0, 1, 4, 10)
    assert UNEVEN.depths == (0, 1, 1, 1, 2, 2, 2, 3, 3, 4)
    assert UNEVEN.path(9) == (0, 1, 4, 7, 9)
    chain = Tree.of((1,) * 4)
    np.testing.assert_array_equal(chain.mask, np.tril(np.ones((5, 5), bool)))
    assert Tree.parse("1x1x1x1") == chain


def test_a_mask_shows_a_node_its_path():
    for tree in (TREE, UNEVEN):
        for node, row in enumerate(tree.mask):
            assert tuple(np.flatnonzero(row)) == tree.path(node)
        assert hash(tree) == hash(Tree(list(tree.parents)))


@pytest.mark.parametrize("tree", [TREE, Tree.of((1, 1)), Tree.of((15,)), Tree.of((2, 6))])
def test_its_text_is_parsed_again(tree):
    assert len(tree.parents) == 1 or Tree.of([int(n) for n in str(tree).split("x")]) == tree
    assert str(UNEVEN) == "tree 0,0,0,1,1,2,4,4,7"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Tree(()), "of 0 tokens"),
        (lambda: Tree.parse("4x4"), "of 20 tokens: 1 to 15"),
        (lambda: Tree.parse("9x99x999"), "1 to 15"),
        (lambda: Tree.parse("2x0"), "at least 1"),
        (lambda: Tree.parse("2xx"), "3x2x1"),
        (lambda: Tree((1,)), "before its children"),
        (lambda: Tree((0, 1, 0)), "level by level"),
        (lambda: Tree((-1,)), "before its children"),
    ],
)
def test_what_is_no_tree_is_refused(make, says):
    with pytest.raises(RequestError, match=says):
        make()


@partial(jax.jit, static_argnames="cfg")
def append(weights, cfg, ids, cache, lengths):
    return forward(weights, cfg, ids, cache, lengths=lengths, logits="none").cache


def texts(seed=0):
    return np.random.default_rng(seed).integers(0, 96, (len(HELD), max(HELD))).astype(np.int32)


def prefilled(cfg, weights, dtype=jnp.float32, layout=None, mesh=None):
    cache = init_cache(cfg, len(HELD), CAPACITY, chunk=CHUNK, dtype=dtype, layout=layout, mesh=mesh)
    for at in range(0, max(HELD), CHUNK):
        lengths = jnp.clip(jnp.array(HELD) - at, 0, CHUNK)
        ids = np.pad(texts(), ((0, 0), (0, CHUNK)))[:, at : at + CHUNK]
        cache = append(weights, cfg, ids, cache, lengths)
    return cache


def verified(cfg, weights, cache, tree, nodes, real=None):
    """A forward pass over the tree of each row, with `nodes` [B, size] as its tokens."""
    real = np.full(len(HELD), tree.size) if real is None else real
    rows = cache.rows(jnp.asarray(real), *nodes.shape).as_tree(np.array(tree.mask))
    return forward(weights, cfg, nodes, cache, rows=rows)


@pytest.mark.parametrize("tree", [TREE, pytest.param(UNEVEN, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8], ids=["f32", "int8"])
@pytest.mark.parametrize("cfg", [LLAMA, GEMMA], ids=["llama", "windows"])
def test_a_tree_has_the_logits_of_each_of_its_paths(cfg, dtype, tree):
    """In rings that wrapped, too: the last row is longer than the window's ring of 128 slots."""
    cache = prefilled(cfg, params(cfg), dtype)
    nodes = np.random.default_rng(1).integers(0, 96, (len(HELD), tree.size)).astype(np.int32)
    logits = verified(cfg, params(cfg), cache, tree, nodes).logits
    leaves = [node for node in range(tree.size) if not tree.children[node]]
    for node in leaves:
        path = np.array(tree.path(node))
        alone = forward(params(cfg), cfg, nodes[:, path], cache).logits
        np.testing.assert_allclose(logits[:, path], alone, atol=TOLERANCE if dtype == jnp.float32 else 2e-2)
    assert cfg.windows == (None,) * cfg.num_layers or cache.layers[0].slots < CAPACITY


def test_without_a_cache_a_tree_has_the_logits_of_its_paths_too():
    nodes = np.random.default_rng(1).integers(0, 96, (2, TREE.size)).astype(np.int32)
    rows = TokenRows.behind(jnp.zeros(2, jnp.int32), jnp.full(2, TREE.size), TREE.size).as_tree(np.array(TREE.mask))
    logits = forward(params(LLAMA), LLAMA, nodes, rows=rows).logits
    path = np.array(TREE.path(14))
    np.testing.assert_allclose(logits[:, path], forward(params(LLAMA), LLAMA, nodes[:, path]).logits, atol=TOLERANCE)


def test_a_tree_that_is_taken_for_a_chain_has_other_logits():
    """The test above can fail."""
    cache = prefilled(GEMMA, params(GEMMA))
    nodes = np.random.default_rng(1).integers(0, 96, (len(HELD), TREE.size)).astype(np.int32)
    right, chain = (
        verified(GEMMA, params(GEMMA), cache, TREE, nodes).logits,
        forward(params(GEMMA), GEMMA, nodes, cache),
    )
    assert np.abs(right - chain.logits)[:, 2:].max() > 100 * TOLERANCE


def stored(layer: LayerCache, row: int, positions) -> list[np.ndarray]:
    """What a layer keeps of a row's tokens at these positions, as stored."""
    slots = np.asarray(positions) % layer.slots
    k, v = (np.asarray(x[row]) for x in (layer.k, layer.v))
    found = [x[:, slots] if layer.layout == "heads_first" else x[slots] for x in (k, v)]
    return found + [np.asarray(x[row])[: layer.kv_heads, slots] for x in layer.scales.values()]


def kept_path(cfg, weights, cache, nodes, path, counts):
    """The cache after a tree was verified and the first `counts` nodes of `path` [B, M] were kept."""
    starts = cache.lengths
    after = jax.jit(lambda c: verified(cfg, weights, c, TREE, nodes).cache)(cache)
    closed = jax.jit(partial(type(after).keep_path, head_dim=cfg.head_dim))(after, starts, path, counts)
    return after, closed.truncate(starts + counts)


PATHS = np.array([TREE.path(15), TREE.path(10), TREE.path(12), TREE.path(13)])
COUNTS = np.array([4, 2, 1, 3])


@pytest.mark.thin(6)
@pytest.mark.parametrize(
    ("cfg", "dtype", "layout"),
    [
        (GEMMA, jnp.int8, "folded"),
        (LLAMA, jnp.float32, "folded"),
        (LLAMA, jnp.int8, "heads_first"),
        (GEMMA, jnp.float32, "heads_first"),
        (GEMMA, jnp.int8, "heads_last"),
        (LLAMA, jnp.float32, "heads_last"),
    ],
)
def test_the_path_that_stays_is_moved_bit_for_bit(cfg, dtype, layout):
    """And nothing before it changes, in any layout, in a ring too."""
    cache = prefilled(cfg, params(cfg), dtype, layout)
    nodes = np.random.default_rng(1).integers(0, 96, (len(HELD), TREE.size)).astype(np.int32)
    after, closed = kept_path(cfg, params(cfg), cache, nodes, PATHS, COUNTS)
    assert closed.lengths.tolist() == [h + c for h, c in zip(HELD, COUNTS, strict=True)]
    for row, (held, count) in enumerate(zip(HELD, COUNTS, strict=True)):
        for old, new in zip(after.layers, closed.layers, strict=True):
            kept = zip(
                stored(old, row, held + PATHS[row, :count]), stored(new, row, held + np.arange(count)), strict=True
            )
            before = np.arange(max(0, held - new.slots + TREE.size), held)
            same = zip(stored(old, row, before), stored(new, row, before), strict=True)
            for a, b in (*kept, *same):
                np.testing.assert_array_equal(a, b)


@pytest.mark.thin(4)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8], ids=["f32", "int8"])
@pytest.mark.parametrize("cfg", [LLAMA, GEMMA], ids=["llama", "windows"])
def test_rejected_nodes_leave_no_trace(cfg, dtype):
    """The cache holds what one holds that was given the path alone, and the next logits are equal.

    Up to the last bits: the products of 16 tokens add in another order than those of 4. int8 then may round otherwise.
    """
    cache = prefilled(cfg, params(cfg), dtype)
    nodes = np.random.default_rng(1).integers(0, 96, (len(HELD), TREE.size)).astype(np.int32)
    _, closed = kept_path(cfg, params(cfg), cache, nodes, PATHS, COUNTS)
    alone = np.take_along_axis(nodes, PATHS, axis=1)
    clean = forward(params(cfg), cfg, alone, cache, lengths=jnp.asarray(COUNTS), logits="none").cache
    np.testing.assert_array_equal(closed.lengths, clean.lengths)
    if dtype == jnp.float32:
        for row, total in enumerate(np.asarray(clean.lengths)):
            for a, b in zip(closed.layers, clean.layers, strict=True):
                last = np.arange(max(0, total - (8 if a.slots < CAPACITY else CAPACITY)), total)
                for x, y in zip(stored(a, row, last), stored(b, row, last), strict=True):
                    np.testing.assert_allclose(x, y, atol=TOLERANCE)
    a, b = (forward(params(cfg), cfg, np.full((len(HELD), 1), 5), c).logits for c in (closed, clean))
    np.testing.assert_allclose(a, b, atol=TOLERANCE if dtype == jnp.float32 else 2e-2)
    stale = verified(cfg, params(cfg), cache, TREE, nodes).cache.truncate(closed.lengths)
    left = forward(params(cfg), cfg, np.full((len(HELD), 1), 5), stale).logits
    assert np.abs(left - b).max() > 10 * TOLERANCE  # without the move the cache holds other tokens


def test_nodes_past_the_end_of_the_cache_are_not_written():
    """A row near its end verifies the first nodes only: the others see nothing and change nothing."""
    cfg = replace(LLAMA, num_layers=1, windows=())
    weights = params(cfg)
    cache = init_cache(cfg, 1, 128, chunk=128)
    cache = forward(weights, cfg, texts()[3:, :124], cache, logits="none").cache
    nodes = np.random.default_rng(1).integers(0, 96, (1, TREE.size)).astype(np.int32)
    rows = cache.rows(jnp.array([4]), *nodes.shape).as_tree(np.array(TREE.mask))
    out = forward(weights, cfg, nodes, cache, rows=rows)
    for node in range(4):
        path = np.array(TREE.path(node))
        alone = forward(weights, cfg, nodes[:, path], cache).logits
        np.testing.assert_allclose(out.logits[:, path], alone, atol=TOLERANCE)
    for a, b in zip(stored(cache.layers[0], 0, range(124)), stored(out.cache.layers[0], 0, range(124)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")
@pytest.mark.thin(4)
@pytest.mark.parametrize(("sizes", "dtype"), [("data=2,model=2", jnp.float32), ("data=2,model=4", jnp.int8)])
@pytest.mark.parametrize("layout", ["heads_first", "folded"])
def test_a_mesh_keeps_the_same_path(sizes, dtype, layout):
    """Each device moves its own rows and heads, repeated KV heads too."""
    mesh = make_mesh(sizes)
    weights = place(params(LLAMA), param_specs(LLAMA), mesh)
    nodes = np.random.default_rng(1).integers(0, 96, (len(HELD), TREE.size)).astype(np.int32)
    caches = [
        kept_path(LLAMA, w, prefilled(LLAMA, w, dtype, layout, m), nodes, PATHS, COUNTS)[1]
        for w, m in ((weights, mesh), (params(LLAMA), None))
    ]
    assert caches[0].layers[0].k.sharding.mesh.shape == mesh.shape
    a, b = (
        forward(w, LLAMA, np.full((len(HELD), 1), 5), c).logits
        for w, c in zip((weights, params(LLAMA)), caches, strict=True)
    )
    np.testing.assert_allclose(a, b, atol=TOLERANCE if dtype == jnp.float32 else 2e-2)
