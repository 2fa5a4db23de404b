"""Quantized matrices and grouped heads on meshes: each device multiplies its own part, and one sum follows."""

import dataclasses
from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import pdx
from pallas_kernels.analysis import hlo
from pdx import steps
from pdx.cache.dense import cache_specs
from pdx.cache.layer import stored_heads
from pdx.cache.paged import paged_cache_specs
from pdx.engine import sizing
from pdx.generation.programs import Programs
from pdx.model import forward, param_specs
from pdx.quant import Policy, quantize_params, quantized_specs
from pdx.sharding import is_spec, make_mesh, place, replicated
from tests.support import tiny_model
from tests.support.models import LLAMA, QWEN, close, params, tokens
from tests.support.programs import equations

pytestmark = [pytest.mark.thin(10), pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")]
B, CHUNK = 4, 8

# Every matrix has groups of 32 that divide over 4 devices.
WIDE = dataclasses.replace(
    QWEN, num_layers=1, windows=(None,), d_model=64, num_heads=8, num_kv_heads=4, head_dim=16, d_ff=128, rope=LLAMA.rope
)
# d_ff has three groups.
THREE = dataclasses.replace(WIDE, d_ff=96)
POLICIES = ("int8", "int4:g32", "int4:g32:affine", "w8a8", "int8:g32,embed=int4:g32:affine,lm_head=int8:g32")
# The types and groups of GGUF's Q8_0, Q4_0 and Q4_1, mixed as files mix them.
GGUF = "int8:g32,*.q_proj=int4:g32,*.down_proj=int4:g32:affine,embed=int8:g32,lm_head=int4:g32"


@cache
def run(cfg, policy=None, sizes=None, step="decode"):
    """Logits of a prefill and of one more step of a kind, over the mesh of these sizes."""
    mesh = make_mesh(sizes) if sizes else None
    weights = params(cfg) if policy is None else quantize_params(params(cfg), policy)
    if mesh is not None:
        specs = quantized_specs(param_specs(cfg), Policy.parse(policy)) if policy else param_specs(cfg)
        weights = place(weights, specs, mesh)
    cache, ids = pdx.init_cache(cfg, B, 128, chunk=CHUNK, mesh=mesh), tokens(cfg, B, CHUNK)
    logits, cache = pdx.prefill(weights, cfg, ids, np.array([8, 1, 3, 5]), cache)
    if step == "verify":
        more, _ = pdx.verify(weights, cfg, ids[:, :3], np.full(B, 3), cache)
    else:
        more, _ = pdx.decode_step(weights, cfg, ids[:, 0], np.ones(B, bool), cache)
    return np.concatenate([np.asarray(logits).ravel(), np.asarray(more).ravel()])


@pytest.mark.parametrize("policy", [*POLICIES, GGUF])
def test_quantized_steps_answer_on_a_mesh_as_on_one_device(policy):
    # W8A8 rounds rows: a sum in another order moves some of them by a step.
    close(run(WIDE, policy, "data=2,model=4"), run(WIDE, policy), 3e-2 if policy == "w8a8" else 5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["int4:g32:affine", "int8:g32"])
def test_verify_and_groups_that_do_not_divide_answer_the_same(policy):
    close(run(WIDE, policy, "model=4", "verify"), run(WIDE, policy, None, "verify"), 5e-4)
    close(run(THREE, policy, "model=2"), run(THREE, policy), 5e-4)


@pytest.mark.parametrize("policy", ["int4:g32:affine", None])
def test_a_mixed_step_answers_the_same(policy):
    def mixed(mesh):
        weights = quantize_params(params(WIDE), policy) if policy else params(WIDE)
        if mesh is not None:
            specs = quantized_specs(param_specs(WIDE), Policy.parse(policy)) if policy else param_specs(WIDE)
            weights = place(weights, specs, mesh)
        pages = pdx.init_paged_cache(WIDE, 4, page_size=16, mesh=mesh)
        logits, _ = pdx.mixed_step(
            weights,
            WIDE,
            tokens(WIDE, 12),
            pages,
            block_tables=np.arange(2)[None, :, None],
            lengths=np.array([7, 4]),
            query_starts=np.array([0, 7, 11]),
        )
        return np.asarray(logits)

    close(mixed(make_mesh("model=8")), mixed(None), 5e-4)  # eight query heads to eight devices, four KV heads


def test_groups_lie_with_their_scales_and_offsets():
    mesh = make_mesh("data=2,model=4")
    layer = quantized_specs(param_specs(WIDE), Policy.parse("int4:g32:affine"))["layers"][0]
    where = jax.tree.map(lambda s: s.partition(mesh), layer, is_leaf=is_spec)
    for name in ("o_proj", "down_proj"):
        assert where[name].values == P(None, "model")
        assert where[name].scales == where[name].offsets == P("model", None)
    for name in ("q_proj", "gate_proj"):
        assert (where[name].values, where[name].scales) == (P("model", None), P(None, "model"))
    whole = quantized_specs(param_specs(WIDE), Policy.parse("int8"))["layers"][0]["down_proj"]
    assert (whole.values.partition(mesh), whole.scales.partition(mesh)) == (P(None, "model"), P(None, None))


def test_a_device_holds_no_part_of_a_group():
    """11008 columns in groups of 128 over four devices: 2752 each, but no device has 21.5 groups."""
    specs = param_specs(dataclasses.replace(WIDE, d_ff=11008))
    down = quantized_specs(specs, Policy.parse("none,*.down_proj=int4:g128"))["layers"][0]["down_proj"]
    assert down.groups == 86
    for sizes, where in (("model=4", None), ("model=2", "model")):
        mesh = make_mesh(sizes)
        assert (down.values.partition(mesh)[1], down.scales.partition(mesh)[0]) == (where, where)


def test_the_indivisible_piece_of_columns_is_a_group():
    """Three groups of 32 over two devices: 48 columns each would share a scale."""
    mesh = make_mesh("model=2")
    specs = quantized_specs(param_specs(THREE), Policy.parse("int4:g32"))
    down = specs["layers"][0]["down_proj"]
    assert (down.values.partition(mesh), down.scales.partition(mesh)) == (P(None, None), P(None, None))
    said = replicated(jax.tree.leaves(specs, is_leaf=is_spec), mesh)
    assert said == ["mlp (3) does not divide over model=2: replicated"]
    assert down.values.partition(make_mesh("model=3")) == P(None, "model")


def compiled(cfg, policy, sizes, step="decode_step"):
    """The text of a step over the mesh of these sizes."""
    mesh = make_mesh(sizes) if sizes else None
    specs = quantized_specs(param_specs(cfg), Policy.parse(policy)) if policy else param_specs(cfg)
    declared = specs, cache_specs(cfg, B, 128, chunk=CHUNK, mesh=mesh)
    weights, store = jax.tree.map(lambda s: s.abstract(mesh), declared, is_leaf=is_spec)
    counts, ids = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((B,), (B, CHUNK)))
    given = {"tokens": counts, "active": counts} if step == "decode_step" else {"tokens": ids, "lengths": counts}
    return steps.PROGRAMS[step].lower(params=weights, cfg=cfg, cache=store, kernels="auto", **given).compile()


@pytest.mark.parametrize("step", ["decode_step", "prefill", "verify"])
@pytest.mark.parametrize("policy", ["int8", "int8:g32", "int4:g32:affine"])
def test_collectives_of_a_quantized_step_are_those_of_a_plain_one(policy, step):
    texts = (compiled(WIDE, p, "data=2,model=4", step).as_text() for p in (policy, None))
    found, plain = (sorted(hlo.collectives(text)) for text in texts)
    assert found == plain
    assert Counter(name for name, _ in found) == {"all-reduce": 1 + 2 * WIDE.num_layers}


def test_w8a8_asks_the_other_devices_for_the_scale_of_a_row_and_nothing_else():
    found, plain = (hlo.collectives(compiled(WIDE, p, "model=4").as_text()) for p in ("w8a8", None))
    assert Counter(name for name, _ in found) == {"all-reduce": 1 + 4 * WIDE.num_layers}
    assert sum(size for _, size in found) - sum(size for _, size in plain) == 2 * WIDE.num_layers * B * 4


@pytest.mark.parametrize("policy", ["int8", "int8:g32"])
def test_a_model_that_is_quantized_on_its_mesh_answers_the_same(policy):
    specs = param_specs(WIDE)
    weights = quantize_params(place(params(WIDE), specs, mesh := make_mesh("model=4")), policy)
    cache = pdx.init_cache(WIDE, B, 128, mesh=mesh)
    logits, _ = pdx.prefill(weights, WIDE, tokens(WIDE, B, CHUNK), np.array([8, 1, 3, 5]), cache)
    close(np.asarray(logits).ravel(), run(WIDE, policy)[: B * WIDE.vocab_size], 5e-4)


# --- programs that are compiled before they run


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["model=1", "model=2", "data=2,model=2", None])
def test_int4_on_a_mesh_generates_and_serves(tmp_path, sizes, count_compiles):
    """JAX 0.10 hands no compiled program an int4 array that is committed to devices."""
    directory = tiny_model.make(tmp_path)
    expected = pdx.generate(pdx.load(directory, quantize="int4"), ["Hello", "a"], max_tokens=6, ignore_eos=True)
    model = pdx.load(directory, quantize="int4", mesh=sizes)
    first = pdx.generate(model, ["Hello", "a"], max_tokens=6, ignore_eos=True)
    with count_compiles() as compiles:
        again = pdx.generate(model, ["Hello", "a"], max_tokens=6, ignore_eos=True)
    assert compiles() == 0
    assert (first[0].compile_s > 0, again[0].compile_s) == (True, 0)
    assert [c.token_ids for c in first] == [c.token_ids for c in again] == [c.token_ids for c in expected]


@pytest.mark.slow
def test_int4_on_a_mesh_serves_without_compiling_anew(tmp_path):
    model = pdx.load(tiny_model.make(tmp_path), quantize="int4", mesh="model=2")
    expected = pdx.generate(model, "Hello", max_tokens=6, ignore_eos=True)[0]
    with pdx.Engine(model, pdx.EngineConfig(slots=2, pages=8, max_context=64, token_budget=32)) as engine:
        assert engine.generate(["Hello"], max_tokens=6, ignore_eos=True)[0].token_ids == expected.token_ids
        assert engine.metrics().compiles == 0
        assert engine.runner.compile_s > 0


def test_a_program_is_compiled_once_and_its_time_kept_apart(count_compiles):
    programs = Programs()
    mesh = make_mesh("model=2")
    weight = jax.device_put(jnp.ones((4, 8), jnp.int4), jax.NamedSharding(mesh, P(None, "model")))
    double = jax.jit(lambda w, x, n: (w.astype(jnp.float32) @ x) * n, static_argnames="n")
    with count_compiles() as compiles:
        first = programs.call("double", double, w=weight, x=np.ones(8, np.float32), static={"n": 2})
        spent = programs.compile_s
        again = programs.call("double", double, w=weight, x=np.ones(8, np.float32), static={"n": 2})
    assert np.asarray(first).tolist() == np.asarray(again).tolist() == [16] * 4
    assert (compiles(), programs.compile_s, len(programs)) == (1, spent, 1)
    assert spent > 0


# --- query heads whose KV heads do not divide

# N query heads, K KV heads, devices -> KV heads that a device holds. In all of them N divides and K does not.
GROUPED = {(8, 2, 4): 1, (8, 2, 8): 1, (6, 2, 3): 2, (12, 6, 4): 3, (8, 1, 8): 1, (12, 3, 2): 3}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ways", "layout"),
    [*((*grouped, "heads_first") for grouped in GROUPED), (12, 6, 4, "folded"), (8, 2, 4, "heads_last")],
)
def test_query_heads_are_dealt_out_where_kv_heads_are_not(heads, kv_heads, ways, layout):
    cfg = dataclasses.replace(LLAMA, num_layers=1, windows=(None,), num_heads=heads, num_kv_heads=kv_heads)
    mesh = make_mesh({"model": ways})
    assert stored_heads(cfg, mesh) == ways * GROUPED[heads, kv_heads, ways] <= ways * kv_heads

    def logits(mesh, dtype):
        weights = params(cfg) if mesh is None else place(params(cfg), param_specs(cfg), mesh)
        cache, seen = pdx.init_cache(cfg, B, 128, chunk=CHUNK, mesh=mesh, layout=layout, dtype=dtype), []
        for lengths in ([8, 1, 3, 5], [1, 8, 0, 2]):
            out, cache = pdx.prefill(weights, cfg, tokens(cfg, B, CHUNK), np.array(lengths), cache)
            seen.append(np.where(np.array(lengths)[:, None] > 0, out, 0))
        return np.stack([*seen, pdx.decode_step(weights, cfg, np.zeros(B, np.int32), np.ones(B, bool), cache)[0]])

    dtype = jnp.int8 if layout == "folded" else jnp.float32
    close(logits(mesh, dtype), logits(None, dtype))


@pytest.mark.slow
def test_more_devices_than_kv_heads_with_normed_keys_and_biases():
    cfg = dataclasses.replace(QWEN, num_layers=1, windows=(None,), num_heads=8, num_kv_heads=2, qk_norm=True)
    close(run(cfg, None, "model=8"), run(cfg))


def test_a_device_computes_attention_for_its_own_query_heads_alone():
    """Eight query heads over two KV heads, to four devices: two of them, and one KV head, each."""
    cfg = dataclasses.replace(LLAMA, num_heads=8, num_kv_heads=2)
    mesh = make_mesh("model=4")
    declared = param_specs(cfg), cache_specs(cfg, B, 128, chunk=CHUNK, mesh=mesh, layout="heads_first")
    weights, store = jax.tree.map(lambda s: s.abstract(mesh), declared, is_leaf=is_spec)
    counts = jax.ShapeDtypeStruct((B,), jnp.int32)
    traced = steps.PROGRAMS["decode_step"].trace(
        params=weights, cfg=cfg, tokens=counts, active=counts, cache=store, kernels="auto"
    )
    for call in (found := list(equations(traced.jaxpr.jaxpr, "shard_map"))):
        q, k, v = (x.aval.shape for x in call.params["jaxpr"].invars[:3])
        assert (q, k, v) == ((B, 1, 2, 8), (B, 1, 1, 8), (B, 1, 1, 8))
    assert found


def test_an_engine_takes_no_more_pages_than_fit(tmp_path, monkeypatch):
    """Three query heads over four devices: each device holds every page."""
    cfg = dataclasses.replace(LLAMA, num_heads=3, num_kv_heads=3)
    mesh = make_mesh("model=4")
    one = paged_cache_specs(cfg, 1, page_size=16, mesh=mesh)
    alone = paged_cache_specs(cfg, 1, page_size=16)
    assert one.page_bytes == (4 * alone.page_bytes[0],)
    assert paged_cache_specs(cfg, 1, page_size=16, mesh=make_mesh("model=3")).page_bytes == alone.page_bytes
    room = 40 * one.page_bytes[0] + 1
    monkeypatch.setattr(sizing, "free_bytes", lambda model: room)
    model = pdx.Model({}, cfg, "tiny", tmp_path, jnp.float32, mesh)
    config = pdx.EngineConfig(slots=64, page_size=16, max_context=128, token_budget=128, memory_share=1.0)
    (count,) = sizing.pages(model, config, jnp.float32)
    held = pdx.init_paged_cache(cfg, count, page_size=16, mesh=mesh)
    assert count == 40
    assert sum(s.data.nbytes for x in jax.tree.leaves(held) for s in x.addressable_shards) <= room


def test_a_forward_without_a_cache_still_takes_quantized_weights_of_a_mesh():
    specs = quantized_specs(param_specs(WIDE), Policy.parse("int4:g32"))
    weights = quantize_params(params(WIDE), "int4:g32")
    ids = tokens(WIDE, B, CHUNK)
    run = jax.jit(lambda w: forward(w, WIDE, ids).logits)
    close(run(place(weights, specs, make_mesh("model=4"))), run(weights), 5e-4)
