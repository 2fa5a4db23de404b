"""The mixed step over pages: equal to the dense cache however tokens are packed, cut and paged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdx import steps
from pdx.cache.paged import copy_pages, init_paged_cache, page_groups, paged_cache_specs
from pdx.cache.rows import PackedRows
from pdx.model import forward
from pdx.sharding import is_spec, make_mesh, place
from tests.support.models import ALL, GEMMA, LLAMA, NINE, bits, close, leaves_equal, params, snapshot, tokens, whole
from tests.support.paging import Desk
from tests.support.programs import check_in_place

pytestmark = pytest.mark.thin(10)

# Beside the three kinds, a window everywhere (Mistral), and windows with soft caps and one rope base (Gemma 2).
MISTRAL = dataclasses.replace(LLAMA, windows=(24, 24))
GEMMA2 = dataclasses.replace(GEMMA, qk_norm=False, rope_window=None, windows=(8, None, 8))
FAMILIES = ALL | {"mistral": MISTRAL, "gemma2": GEMMA2}
each = pytest.mark.parametrize("cfg", FAMILIES.values(), ids=FAMILIES)
LENGTHS = (37, 9, 50, 1)
T = 64


def prompts(cfg, seed=0):
    ids = tokens(cfg, 4, 64, seed=seed)
    return [ids[r, :n] for r, n in enumerate(LENGTHS)]


def expected(cfg, ids):
    """Logits behind each token of one request by itself, without a cache."""
    return np.asarray(whole(params(cfg), cfg, ids[None]).logits[0])


def fed(desk, ids, **changes):
    """All prompts in one step of 100 tokens."""
    return desk.step(dict(enumerate(ids)), 100, **changes)


@each
def test_prompts_of_many_requests_in_one_step(cfg):
    ids = prompts(cfg)
    logits = fed(Desk(cfg), ids)
    for row, prompt in enumerate(ids):
        close(logits[row], expected(cfg, prompt)[-1])


@each
def test_chunks_and_decode_rows_share_a_step(cfg):
    """Two rows decode while the prompts of two others come in chunks: every logit is that of the request alone."""
    desk, ids = Desk(cfg), prompts(cfg, seed=3)
    desk.step({0: ids[0][:20], 1: ids[1][:5]}, T, decode_rows=0)
    at = {0: 20, 1: 5, 2: 0}
    for take in (17, 1, 16, 16):
        new = {0: ids[0][at[0] : at[0] + 1], 2: ids[2][at[2] : at[2] + take]}
        if at[1] < len(ids[1]):
            new[1] = ids[1][at[1] : at[1] + 1]
        logits = desk.step(new, T, decode_rows=2, max_queries=17)
        for row in new:
            at[row] += len(new[row])
            close(logits[row], expected(cfg, ids[row])[at[row] - 1])
    assert at[2] == 50


@each
def test_decoding_far_past_a_window(cfg):
    desk, ids = Desk(cfg), tokens(cfg, 100, seed=5)
    wanted = expected(cfg, ids)
    desk.step({2: ids[:8]}, T)
    for i in range(8, 100):
        logits = desk.step({2: ids[i : i + 1]}, 4, decode_rows=4)
        close(logits[2], wanted[i])


def test_what_a_window_has_left_behind_is_not_read():
    """Table entries before the window may be anything, and pages that were given away may hold NaN."""
    cfg, ids = GEMMA, tokens(GEMMA, 60, seed=6)
    wanted = expected(cfg, ids)
    assert page_groups(cfg) == (8, None)
    desk = Desk(cfg)
    desk.step({1: ids[:48]}, T)
    poisoned = [
        jax.tree.map(lambda x: x.at[desk.tables[0, 1, :2]].set(jnp.nan), layer) if g == 0 else layer
        for layer, g in zip(desk.cache.layers, desk.cache.group_of_layer, strict=True)
    ]
    desk.cache = desk.cache.replace(layers=tuple(poisoned))
    desk.tables[0, 1, :2] = 2**30
    for i in range(48, 60):
        close(desk.step({1: ids[i : i + 1]}, 4, decode_rows=4)[1], wanted[i])


@each
def test_pages_of_others_and_padding_do_not_matter(cfg):
    """NaN in every page that no row owns, garbage in tables behind a row's end: the same bits."""
    plain, dirty = Desk(cfg), Desk(cfg)
    owned = [np.unique(plain.tables[g, r, : -(-n // 16)]) for g in range(plain.groups) for r, n in enumerate(LENGTHS)]
    layers = []
    for layer, g in zip(dirty.cache.layers, dirty.cache.group_of_layer, strict=True):
        mine = np.concatenate(owned[g * 4 : g * 4 + 4])
        rest = np.setdiff1d(np.arange(layer.k.shape[0]), mine)
        layers.append(jax.tree.map(lambda x, rest=rest: x.at[rest].set(jnp.nan), layer))
    dirty.cache = dirty.cache.replace(layers=tuple(layers))
    for r, n in enumerate(LENGTHS):
        dirty.tables[:, r, -(-n // 16) :] = -7
    a, b = fed(plain, prompts(cfg)), fed(dirty, prompts(cfg))
    leaves_equal(a, b)


@each
@pytest.mark.parametrize("decode_rows", [0, 4])
def test_a_row_ignores_its_slot_and_its_neighbours(cfg, decode_rows):
    """Bit for bit, in one compiled step: alone in row 0, and in row 3 beside three longer requests."""
    ids, one = prompts(cfg, seed=8), tokens(cfg, 30, seed=9)

    def last(desk, row, others):
        desk.step({row: one[:29]} | {r: x[:-1] for r, x in others.items()}, 160)
        return desk.step({row: one[29:]} | {r: x[-1:] for r, x in others.items()}, 8, decode_rows=decode_rows)[row]

    alone = last(Desk(cfg, seed=1), 0, {})
    crowd = {r: np.tile(x, 3)[:40] for r, x in enumerate(ids[:3])}
    np.testing.assert_array_equal(bits(alone), bits(last(Desk(cfg, seed=2), 3, crowd)))


def test_rows_without_a_part_are_untouched():
    desk, ids = Desk(LLAMA), prompts(LLAMA)
    fed(desk, ids)
    before = snapshot(desk.cache)
    lengths = desk.held.copy()
    logits = desk.step({}, 8, decode_rows=4)
    assert np.isfinite(logits).all()
    leaves_equal(before, snapshot(desk.cache))
    desk.held = lengths
    desk.step({1: ids[1][:1]}, 8, decode_rows=4)
    changed = np.asarray(desk.cache.layers[0].k != before.layers[0].k).any(axis=(1, 2, 3))
    assert changed.nonzero()[0].tolist() == [desk.tables[0, 1, 0]]


def test_shared_and_copied_pages():
    """Two requests begin alike: the second reads the first one's full page and goes on in a copy of its last."""
    desk, ids = Desk(LLAMA), tokens(LLAMA, 40, seed=11)
    desk.step({0: ids[:24]}, T)
    theirs = desk.tables[0, 0]
    desk.cache = copy_pages(desk.cache, 0, np.array([theirs[1], 0]), np.array([desk.tables[0, 1, 1], -1]))
    desk.tables[0, 1, 0] = theirs[0]
    desk.held[1] = 20
    other = np.concatenate([ids[:20], ids[:3]])
    logits = desk.step({0: ids[24:30], 1: other[20:]}, T)
    close(logits[0], expected(LLAMA, ids[:30])[-1])
    close(logits[1], expected(LLAMA, other)[-1])


@each
def test_int8_pages(cfg):
    """Close to the f32 pages, as the dense int8 cache is; and not the same."""
    ids = prompts(cfg)
    plain, narrow = fed(Desk(cfg), ids), fed(Desk(cfg, dtype=jnp.int8), ids)
    assert 0 < np.abs(plain - narrow).max() < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_pallas_interpreted_gives_what_xla_gives(dtype):
    page = {"page": 128, "width": 1} if dtype == "int8" else {"page": 16, "width": 4}
    # One layer in int8: a second one's keys come from the first's attention, and where two paths differ in the last
    # bit, a key near the middle of two steps is rounded to one or the other.
    cfg = dataclasses.replace(LLAMA, num_layers=1, windows=()) if dtype == "int8" else LLAMA
    ids = prompts(cfg)
    plain = Desk(cfg, dtype=jnp.dtype(dtype), **page)
    kernel = Desk(cfg, dtype=jnp.dtype(dtype), kernels="pallas", layout="folded", **page)
    for new, t, decode_rows in ((dict(enumerate(ids)), 100, 0), ({r: x[-1:] for r, x in enumerate(ids)}, 8, 4)):
        a, b = plain.step(new, t, decode_rows=decode_rows), kernel.step(new, t, decode_rows=decode_rows)
        close(a, b)


MESHES = {
    "llama": (LLAMA, 2),
    "nine heads": (NINE, 2),
    "gemma3": (GEMMA, 2),
    "llama over 4": (LLAMA, 4),
    "gemma3 over 4": (GEMMA, 4),
}
# Interpreted they take long to compile.
ON_MESHES = [
    pytest.param(kernels, *of, id=f"{kernels}-{name}", marks=pytest.mark.slow if kernels == "pallas" else [])
    for kernels in ("xla", "pallas")
    for name, of in MESHES.items()
]


@pytest.mark.parametrize(("kernels", "cfg", "model"), ON_MESHES)
def test_on_a_mesh(cfg, model, kernels):
    """Heads go over `model` where they divide; tables and tokens are on every device."""
    from pdx.layers.kernels import layout_for
    from pdx.model import param_specs

    mesh = make_mesh(f"model={model}")
    ids, layout = prompts(cfg), layout_for(kernels)
    weights = place(params(cfg), param_specs(cfg), mesh)
    cache = init_paged_cache(cfg, 40, page_size=16, mesh=mesh, layout=layout)
    desk = Desk(cfg)
    counts = np.array(LENGTHS, np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    packed = np.zeros(100, np.int32)
    packed[: counts.sum()] = np.concatenate(ids)
    logits, after = steps.mixed_step(
        weights, cfg, packed, cache, block_tables=desk.tables, lengths=counts, query_starts=starts, kernels=kernels
    )
    close(np.asarray(logits), fed(desk, ids))
    specs = paged_cache_specs(cfg, 40, page_size=16, mesh=mesh, layout=layout)
    for x, spec in zip(jax.tree.leaves(after), jax.tree.leaves(specs, is_leaf=is_spec), strict=True):
        assert x.sharding.is_equivalent_to(spec.sharding(mesh), x.ndim)


def test_a_second_call_compiles_nothing(count_compiles):
    desk, ids = Desk(GEMMA), prompts(GEMMA)
    fed(desk, ids)
    desk.step({0: ids[0][:1]}, 8, decode_rows=4)
    with count_compiles() as count:
        desk.step({r: x[:3] for r, x in enumerate(ids)}, 100)
        desk.step({3: ids[3][:1], 1: ids[1][:1]}, 8, decode_rows=4)
    assert count() == 0


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("decode_rows", [0, 4])
def test_pages_are_updated_in_place(dtype, decode_rows):
    specs = paged_cache_specs(GEMMA, 2000, page_size=16, dtype=jnp.dtype(dtype))
    abstract = jax.tree.map(lambda s: s.abstract(), specs, is_leaf=is_spec)
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    packed = ints(2, 4, 8), ints(4), ints(5), decode_rows, None
    compiled = steps.PROGRAMS["mixed_step"].lower(params(GEMMA), GEMMA, ints(16), abstract, *packed, "xla").compile()
    check_in_place(compiled, "cache", abstract)


def test_what_does_not_fit_is_refused():
    desk = Desk(LLAMA, width=1)
    assert np.isnan(desk.step({0: tokens(LLAMA, 20)}, T)[0]).all(), "20 tokens in a page of 16 pass for an answer"
    cache = init_paged_cache(LLAMA, 4)
    with pytest.raises(ValueError, match="must agree"):
        steps.mixed_step(
            params(LLAMA),
            LLAMA,
            np.zeros(4, np.int32),
            cache,
            block_tables=np.zeros((1, 2, 1)),
            lengths=np.zeros(2),
            query_starts=np.zeros(2),
        )
    with pytest.raises(ValueError, match="PackedRows"):
        forward(params(LLAMA), LLAMA, tokens(LLAMA, 1, 4), cache)
    packed = PackedRows.packed(4, jnp.zeros((1, 1, 2), int), jnp.array([4]), jnp.array([0, 4]))
    with pytest.raises(ValueError, match=r"PackedRows for tokens \(2, 4\)"):
        forward(params(LLAMA), LLAMA, tokens(LLAMA, 2, 4), cache, rows=packed)
    with pytest.raises(ValueError, match="must be TokenRows"):
        forward(params(LLAMA), LLAMA, tokens(LLAMA, 1, 4), rows=packed)
    with pytest.raises(ValueError, match="give one of them"):
        forward(params(LLAMA), LLAMA, tokens(LLAMA, 1, 4), cache, lengths=np.array([4]), rows=packed)
