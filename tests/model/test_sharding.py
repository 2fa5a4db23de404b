"""Meshes: where each array lies, that the steps leave it there, and that the answer is one device's."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pdx import steps
from pdx.cache.dense import cache_specs, init_cache
from pdx.model import param_specs
from pdx.sampling.sampler import SamplingOptions, SamplingState
from pdx.sharding import ArraySpec, is_spec, make_mesh, mesh_axis, parse_mesh, place, place_rows, replicated
from tests.support.models import GEMMA, LLAMA, NINE, QWEN, close, params, tokens
from tests.support.programs import aliased_parameters

# Every axis divides over 8.
EIGHT = replace(QWEN, num_heads=16, num_kv_heads=8, head_dim=4, windows=(8, None), rope=LLAMA.rope)
B, CHUNK = 8, 24

pytestmark = [pytest.mark.thin(7), pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")]


# --- the declaration


def test_parse_mesh():
    assert parse_mesh("data=2,model=4") == {"data": 2, "model": 4}
    assert parse_mesh(" model=8 ") == {"model": 8}
    assert parse_mesh("") == {}


@pytest.mark.parametrize("text", ["tensor=2", "data", "data=0", "data=-1", "data=x", "data=2,data=4", "data=2;model=4"])
def test_parse_mesh_says_what_it_expects(text):
    with pytest.raises(ValueError, match="axes out of data, model"):
        parse_mesh(text)


def test_make_mesh():
    assert dict(make_mesh("data=2,model=4").shape) == {"data": 2, "model": 4}
    assert dict(make_mesh({"model": 2}).shape) == {"data": 1, "model": 2}
    one = make_mesh()
    assert dict(one.shape) == {"data": 1, "model": 1}
    assert one.devices.size == 1
    with pytest.raises(ValueError, match=r"'data': 4, 'model': 4\} .*16 .*8 \(cpu\)"):
        make_mesh("data=4,model=4")


def test_what_divides_is_dealt_out_and_the_rest_stays_whole():
    mesh = make_mesh("data=2,model=4")
    assert mesh_axis("heads", 8, mesh) == "model"
    assert mesh_axis("heads", 9, mesh) is None
    assert mesh_axis("batch", 8, mesh) == "data"
    assert mesh_axis(None, 8, mesh) is None
    assert mesh_axis("unheard of", 8, mesh) is None
    assert mesh_axis("heads", 8, make_mesh("data=8")) is None  # an axis of one device deals nothing out


def test_only_whole_heads_are_dealt_out():
    """36 rows divide over 4 devices, but 9 heads of 4 do not."""
    mesh = make_mesh("data=2,model=4")
    assert ArraySpec((36, 36), ("heads", None), jnp.float32, units=(9, 36)).partition(mesh) == P(None, None)
    assert ArraySpec((36, 36), ("heads", None), jnp.float32).partition(mesh) == P("model", None)


@pytest.mark.parametrize("wrong", [{"axes": ("heads",)}, {"units": (2,)}])
def test_a_declaration_has_one_axis_a_dimension(wrong):
    with pytest.raises(ValueError, match="differ in rank"):
        ArraySpec(**{"shape": (2, 3), "axes": ("heads", None), "dtype": jnp.float32} | wrong)


def test_abstract_arrays_carry_shape_dtype_and_place():
    spec = ArraySpec((8, 4), ("heads", None), jnp.bfloat16)
    mesh = make_mesh("model=4")
    assert spec.abstract() == jax.ShapeDtypeStruct((8, 4), jnp.bfloat16)
    assert spec.abstract(mesh).sharding == spec.sharding(mesh)
    assert spec.size_bytes == 64


def test_parameters_and_cache_lie_as_the_table_says():
    mesh = make_mesh("data=2,model=4")
    layer = param_specs(EIGHT)["layers"][0]
    where = {name: spec.partition(mesh) for name, spec in layer.items()}
    for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        assert where[name] == P("model", None), name
    for name in ("o_proj", "down_proj"):
        assert where[name] == P(None, "model"), name
    for name in ("q_bias", "k_bias", "v_bias", "gate_bias", "up_bias"):
        assert where[name] == P("model"), name
    for name in ("attn_norm", "mlp_norm", "o_bias", "down_bias"):
        assert where[name] == P(None), name
    assert param_specs(EIGHT)["embed"].partition(mesh) == P("model", None)
    specs = cache_specs(EIGHT, B, 128)
    assert specs.layers[0].k.partition(mesh) == P("data", "model", None, None)
    assert specs.lengths.partition(mesh) == P("data")


def test_what_stays_whole_is_said():
    mesh = make_mesh("data=2,model=4")
    specs = [
        *jax.tree.leaves(param_specs(NINE), is_leaf=is_spec),
        *jax.tree.leaves(cache_specs(NINE, 3, 128), is_leaf=is_spec),
    ]
    assert sorted(replicated(specs, mesh)) == [
        "batch (3) does not divide over data=2: replicated",
        "heads (9) does not divide over model=4: replicated",
        "kv_heads (3) does not divide over model=4: replicated",
    ]
    assert replicated(specs, make_mesh("model=3")) == []
    assert replicated(jax.tree.leaves(param_specs(EIGHT), is_leaf=is_spec), mesh) == []


def test_place_puts_arrays_where_they_are_declared():
    mesh, specs = make_mesh("data=2,model=4"), param_specs(EIGHT)
    placed = place(jax.tree.map(np.asarray, params(EIGHT)), specs, mesh)
    jax.tree.map(lambda s, x: _lies(x, s, mesh), specs, placed, is_leaf=is_spec)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), placed, params(EIGHT))
    held = {shard.data.size for shard in placed["layers"][0]["q_proj"].addressable_shards}
    assert held == {placed["layers"][0]["q_proj"].size // 4}


def test_one_device_is_a_mesh_too():
    mesh = make_mesh()
    store = init_cache(LLAMA, 2, 128, mesh=mesh)
    weights = place(params(LLAMA), param_specs(LLAMA), mesh)
    ids, lengths = tokens(LLAMA, 2, CHUNK), np.array([24, 5])
    logits, store = steps.prefill(weights, LLAMA, ids, lengths, store)
    alone, _ = steps.prefill(params(LLAMA), LLAMA, ids, lengths, init_cache(LLAMA, 2, 128))
    np.testing.assert_array_equal(np.asarray(logits), np.asarray(alone))
    _lies(store.layers[0].k, cache_specs(LLAMA, 2, 128).layers[0].k, mesh)


# --- the steps on a mesh


def _lies(x, spec, mesh):
    assert x.sharding.is_equivalent_to(spec.sharding(mesh), x.ndim), (x.sharding, spec.partition(mesh))


def test_an_array_in_the_wrong_place_is_noticed():
    mesh, spec = make_mesh("data=2,model=4"), ArraySpec((8, 8), ("batch", "heads"), jnp.float32)
    _lies(jax.device_put(np.ones((8, 8)), spec.sharding(mesh)), spec, mesh)
    for elsewhere in (P(), P("data"), P("model", "data")):
        with pytest.raises(AssertionError):
            _lies(jax.device_put(np.ones((8, 8)), jax.NamedSharding(mesh, elsewhere)), spec, mesh)


@cache
def run(cfg, mesh=None, batch=B, layout=None, kernels="auto"):
    """Prefill of a ragged batch and four greedy tokens; on a mesh, where everything lies is looked at."""
    specs = jax.tree.leaves(cache_specs(cfg, batch, 256, chunk=CHUNK, mesh=mesh, layout=layout), is_leaf=is_spec)
    store = init_cache(cfg, batch, 256, chunk=CHUNK, mesh=mesh, layout=layout)
    weights = params(cfg) if mesh is None else place(params(cfg), param_specs(cfg), mesh)
    lengths = np.array([24, 1, 9, 0, 17, 24, 3, 12])[:batch]

    def in_place(store):
        for spec, x in zip(specs if mesh else [], jax.tree.leaves(store) if mesh else [], strict=True):
            _lies(x, spec, mesh)
        return store

    ids = tokens(cfg, batch, CHUNK)
    logits, store = steps.prefill(weights, cfg, ids, lengths, in_place(store), kernels=kernels)
    seen = [np.where(lengths[:, None] > 0, logits, 0.0)]
    for _ in range(4):
        best = seen[-1].argmax(-1).astype(np.int32)
        logits, store = steps.decode_step(weights, cfg, best, np.ones(batch, bool), in_place(store), kernels=kernels)
        seen.append(np.asarray(logits))
    in_place(in_place(store).truncate(lengths))
    return np.stack(seen)


MESHES = {
    "eight heads": (EIGHT, ["data=2,model=4", "model=8", "data=8", "data=4,model=2"]),
    "nine heads": (NINE, ["data=2,model=4", "data=2,model=3"]),
    "one KV head, windows": (GEMMA, ["data=2,model=4"]),
}


@pytest.mark.filterwarnings("error:Some donated buffers were not usable")
@pytest.mark.parametrize(
    ("cfg", "mesh"),
    [(cfg, m) for cfg, meshes in MESHES.values() for m in meshes],
    ids=[f"{name} {m}" for name, (_, meshes) in MESHES.items() for m in meshes],
)
def test_a_mesh_answers_as_one_device_and_keeps_the_cache_in_its_place(cfg, mesh):
    close(run(cfg, make_mesh(mesh)), run(cfg))  # the tokens too: each step is given the one before's


@pytest.mark.slow
@pytest.mark.filterwarnings("error:Some donated buffers were not usable")
@pytest.mark.parametrize("layout", ["folded", "heads_last"])
@pytest.mark.parametrize("cfg", [EIGHT, NINE, GEMMA], ids=MESHES)
def test_every_layout_of_the_cache_answers_the_same(cfg, layout):
    close(run(cfg, layout=layout), run(cfg))
    close(run(cfg, make_mesh("data=2,model=4"), layout=layout), run(cfg))


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [EIGHT, GEMMA], ids=["eight heads", "one KV head, windows"])
def test_pallas_kernels_answer_as_xla_on_one_device_and_on_a_mesh(cfg):
    """The TPU's, interpreted."""
    close(run(cfg, layout="folded", kernels="pallas"), run(cfg))
    close(run(cfg, make_mesh("data=2,model=4"), layout="folded", kernels="pallas"), run(cfg))


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_replicated():
    close(run(LLAMA, make_mesh("data=2,model=2"), batch=3), run(LLAMA, batch=3))


@pytest.mark.slow
@pytest.mark.filterwarnings("error:Some donated buffers were not usable")
def test_decode_many_on_a_mesh(count_compiles):
    """The same tokens, everything where it was, and so the next call compiles nothing."""
    mesh, first = make_mesh("data=2,model=4"), tokens(EIGHT, B)
    weights = place(params(EIGHT), param_specs(EIGHT), mesh)
    sampling = SamplingState.create([SamplingOptions()] * B, EIGHT.vocab_size)
    alone = steps.decode_many(params(EIGHT), EIGHT, first, init_cache(EIGHT, B, 128, chunk=CHUNK), sampling, 3)
    sampling = place_rows(SamplingState.create([SamplingOptions()] * B, EIGHT.vocab_size), mesh)
    before = jax.tree.map(lambda x: x.sharding, sampling)
    out = steps.decode_many(weights, EIGHT, first, init_cache(EIGHT, B, 128, chunk=CHUNK, mesh=mesh), sampling, 3)
    np.testing.assert_array_equal(np.asarray(out.tokens), np.asarray(alone.tokens))
    specs = cache_specs(EIGHT, B, 128, chunk=CHUNK, mesh=mesh)
    jax.tree.map(lambda s, x: _lies(x, s, mesh), specs, out.cache, is_leaf=is_spec)
    assert all(jax.tree.leaves(jax.tree.map(lambda s, x: x.sharding.is_equivalent_to(s, x.ndim), before, out.sampling)))
    last = np.asarray(out.last)
    with count_compiles() as compiles:
        steps.decode_many(weights, EIGHT, last, out.cache, out.sampling, 3, check=False)
    assert compiles() == 0


@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_on_a_mesh_nothing_of_the_cache_is_gathered_or_copied(step):
    """A device aliases its share of every leaf, and no collective moves keys or values."""
    mesh = make_mesh("data=2,model=4")
    specs = param_specs(EIGHT), cache_specs(EIGHT, B, 16384, chunk=CHUNK, mesh=mesh)
    weights, store = jax.tree.map(lambda s: s.abstract(mesh), specs, is_leaf=is_spec)
    ids, counts = jax.ShapeDtypeStruct((B, CHUNK), jnp.int32), jax.ShapeDtypeStruct((B,), jnp.int32)
    if step == "prefill":
        lowered = steps.PROGRAMS["prefill"].lower(weights, EIGHT, ids, counts, store, "auto")
    else:
        lowered = steps.PROGRAMS["decode_step"].lower(weights, EIGHT, counts, counts, store, "auto")
    compiled = lowered.compile()
    assert len(aliased_parameters(compiled)) == len(jax.tree.leaves(store))
    share = min(x.size * x.dtype.itemsize for x in jax.tree.leaves(store.layers[1])) // 8
    moved = [line for line in compiled.as_text().splitlines() if " all-gather(" in line or " all-to-all(" in line]
    for line in moved:
        dims = [int(n) for n in line.split("[", 1)[1].split("]", 1)[0].split(",") if n]
        assert 4 * np.prod(dims) < share, line
    assert compiled.memory_analysis().temp_size_in_bytes < share
