"""The Pallas kernels of prefill attention beyond the shared cases: small tiles, what is fetched, races."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter  # who keeps the races it found
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import flash_attention
from pallas_kernels.attention.call import Call, make_call
from pallas_kernels.attention.cases import Case
from pallas_kernels.flash_attention import gpu, tpu
from pallas_kernels.flash_attention.cases import LARGE
from pallas_kernels.flash_attention.tpu_steps import tables
from pallas_kernels.hardware import CHIPS
from tests.support.attention_problems import make

pytestmark = pytest.mark.thin(10)

TILES = {
    "tpu": (tpu.Config(16, 128, 128), tpu.Config(16, 256, 128, ones=True), tpu.Config(32, 128, 128, ones=True)),
    "gpu": (gpu.Config(16, 16), gpu.Config(32, 64)),
}
LAYOUT = {"tpu": "folded", "gpu": "heads_last"}
# Several query blocks and several key blocks of the tiles above, with ends and edges inside of them.
CASES = (
    Case("ragged chunks", (300, 0, 0, 71), (60, 60, 0, 5), 60, 512, group=3, head_dim=64),
    Case("a window over many blocks", (390, 0), (70, 33), 70, 512, window=150, head_dim=64),
    Case("a ring that wrapped, tiles across its seam", (1000, 200, 0), (60, 60, 9), 60, 256, window=190, head_dim=64),
    Case(
        "three KV heads in lanes of two, sinks",
        (300, 2),
        (40, 40),
        40,
        512,
        kv_heads=3,
        group=3,
        head_dim=64,
        sinks=True,
    ),
    Case("no mask but the rows' ends", (300, 2), (40, 40), 40, 512, causal=False, head_dim=64),
    Case("values of 128 behind keys of 192", (300, 2), (40, 17), 40, 512, kv_heads=3, head_dim=192, value_dim=128),
    Case("a tree over two blocks", (250, 2), (40, 17), 40, 512, tree=True, window=200, head_dim=64),
    Case("int8, soft cap", (300, 2), (40, 17), 40, 512, kv_dtype="int8", kv_heads=3, softcap=5.0, head_dim=64),
    Case("bf16, sixteen to one", (300, 2), (40, 17), 40, 512, kv_heads=1, group=16, head_dim=80, dtype="bfloat16"),
)
RUNS = [(name, config, case) for name, configs in TILES.items() for config in configs for case in CASES]


def call_of(problem, **changes):
    call = make_call("flash_attention", problem.arrays, **problem.case.settings(problem.layout))
    return replace(call, **changes)


@pytest.mark.parametrize(("name", "config", "case"), RUNS, ids=[f"{n} {c.name} {t}" for n, t, c in RUNS])
def test_small_tiles_agree_with_float64(name, config, case):
    problem = make(case, layout=LAYOUT[name])
    problem.check(*problem.run(flash_attention, implementation=name, interpret=True, config=config, return_lse=True))


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("causal", [True, False])
def test_full_rows_need_no_lengths(name, causal):
    case = Case("full", (216, 216), (40, 40), 40, 256, head_dim=64, causal=causal)
    problem = make(case, layout=LAYOUT[name])
    settings = {"implementation": name, "interpret": True, "config": TILES[name][0]}
    problem.check(problem.run(flash_attention, lengths=None, **settings))


# Two cores share the parallel axes of the grid: with one, nothing could race.
TWO_CORES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)


SHARED = Case("no mask, three blocks of queries", (440,), (72,), 72, 512, head_dim=64, causal=False, full=True)


@pytest.mark.parametrize("on", [None, "v5p"])
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[7], SHARED], ids=lambda c: c.name)
def test_tpu_interpreter_finds_no_race_and_no_unwritten_memory(case, on, monkeypatch):
    """The cores of a v5p share one device. With one group of lanes they share the query blocks."""
    monkeypatch.setattr(tpu, "detect", lambda _: CHIPS[on] if on else None)
    queries = min(case.queries, 72)
    problem = make(replace(case, queries=queries, new=tuple(min(n, queries) for n in case.new)), layout="folded")
    config = tpu.Config(32, 128, 128)
    assert tpu.plan_of(call_of(problem), config, tpu.detect("tpu")).parts == (2 if on and case.kv_heads < 3 else 1)
    problem.check(problem.run(flash_attention, implementation="tpu", interpret=TWO_CORES, config=config))
    assert not interpreter.races.races_found  # JAX 0.10 only notes them, later ones raise


def test_a_race_would_be_seen(monkeypatch):
    """The test above can fail: two cores that share the keys of one block of queries both write its result."""
    real = pltpu.CompilerParams
    monkeypatch.setattr(pltpu, "CompilerParams", lambda **k: real(**k | {"dimension_semantics": ("parallel",) * 4}))
    case = Case("one block of queries", (472,), (40,), 40, 512, head_dim=64, causal=False, full=True)
    problem = make(case, layout="folded")
    settings = {"implementation": "tpu", "interpret": TWO_CORES, "config": tpu.Config(64, 128, 128)}

    def attempt():
        jax.block_until_ready(
            jax.jit(lambda q: flash_attention(**problem.arguments(q=q), **settings))(problem.arrays["q"])
        )
        assert not interpreter.races.races_found, "RACE DETECTED"

    with pytest.raises((AssertionError, RuntimeError), match="RACE DETECTED"):  # noted or raised, by version
        attempt()


def fetched(case: Case, config: tpu.Config, starts, lengths) -> tuple[list, int]:
    """The blocks of K in the order they are fetched, and all bytes moved: a block moves when its index changes."""
    problem = make(case, layout="folded")
    call = call_of(problem)
    plan = tpu.plan_of(call, config, None)
    b, t = call.batch, max(call.queries, tpu.SMALLEST)
    arrays = {name: x for name, x in problem.arrays.items() if name in ("k", "v", "k_scale", "v_scale")}
    arrays["q"] = jnp.zeros((b, t, call.heads * call.head_dim), call.dtype)
    arrays["out"] = jnp.zeros((b, t, call.heads * call.value_dim), call.dtype)
    specs = tpu._specs(plan, arrays)
    axes, found = tables(plan, jnp.asarray(starts), jnp.asarray(lengths))
    found = [np.asarray(x) for x in found.values()]
    grid = (plan.parts, -(-call.kv_heads // plan.heads), *map(int, axes))
    keys, moved, before = [], 0, {}
    for step in itertools.product(*(map(np.int32, range(n)) for n in grid)):
        for name, x in arrays.items():
            index = tuple(int(i) for i in specs[name].index_map(*step, starts, lengths, *found))
            if index == before.get(name):
                continue
            before[name] = index
            shape = specs[name].block_shape
            held = [min(n, size - i * n) for i, n, size in zip(index, shape, x.shape, strict=True)]
            moved += int(np.prod(held)) * x.dtype.itemsize
            if name == "k":
                keys.append((int(plan.place(step[0], *step[2:], *found)[1]), index[1]))
    return keys, moved


BIG = Case("full rows", (0, 0), (512, 512), 512, 512, kv_heads=3, head_dim=64, dtype="bfloat16")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"held": (512, 512), "slots": 1024},
        {"window": 100},
        {"kv_dtype": "int8"},
        {"causal": False},
        {"head_dim": 192, "value_dim": 128},
    ],
    ids=str,
)
def test_cost_is_what_the_grid_moves(changes):
    case = replace(BIG, **changes)
    config = tpu.Config(64, 128, 128)
    starts, lengths = np.array(case.held, np.int32), np.full(2, case.slots, np.int32)
    _, moved = fetched(case, config, starts, lengths)
    call = call_of(make(case, layout="folded"))
    said = tpu.cost(tpu.plan_of(call, config, None)).bytes_accessed
    assert abs(said / moved - 1) < 0.05, (said, moved)


def test_only_visible_blocks_are_fetched():
    case = replace(BIG, held=(0,), new=(512,), kv_heads=1)
    starts, lengths = np.array([0], np.int32), np.array([512], np.int32)
    tiles = tpu.Config(128, 128, 128)
    keys, _ = fetched(case, tiles, starts, lengths)
    # Block 0 is still there when the second query block wants it.
    assert keys == [(0, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2), (3, 3)]
    # A window of 100 reaches into one block before its own, which is there too.
    keys, _ = fetched(replace(case, window=100), tiles, starts, lengths)
    assert keys == [(0, 0), (1, 1), (2, 2), (3, 3)]
    # The padding behind a row of 200 fetches nothing.
    keys, _ = fetched(case, tiles, starts, np.array([200], np.int32))
    assert keys == [(0, 0), (1, 1)]


def computed(plan, starts, lengths) -> int:
    """Pairs of a query block and a key block of which some query sees some key, by the definition of the mask."""
    call, tiles, found = plan.call, plan.config, 0
    for start, length in zip(starts, lengths, strict=True):
        for i in range(plan.query_blocks):
            queries = range(start + i * tiles.block_q, min(start + min((i + 1) * tiles.block_q, call.queries), length))
            if len(queries):
                first = max(queries[0] - call.window + 1, 0) if call.window else 0
                found += queries[-1] // tiles.block_k - first // tiles.block_k + 1
    return found


STEPS = ("few tokens of a large capacity", "rows of very different lengths", "3 8B, bf16", "Gemma")


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("on", [None, "v5p", "v6e"])
def test_grid_steps_follow_the_blocks_that_are_computed(name, on):
    (case,) = (c for c in LARGE if name in c.name and c.causal)
    on = CHIPS[on] if on else None
    call = Call(
        "flash_attention",
        len(case.held),
        case.queries,
        case.kv_heads * case.group,
        case.kv_heads,
        case.head_dim,
        case.head_dim,
        case.slots,
        case.dtype,
        case.dtype,
        "folded",
        window=case.window,
    )
    starts, lengths = np.array(case.held), np.array(case.held) + np.array(case.new)
    plan = tpu.plan_of(call, tpu.heuristic(call, on), on)
    axes, found = tables(plan, jnp.asarray(starts), jnp.asarray(lengths))
    steps, pairs = plan.parts * int(axes[0]) * int(axes[1]), computed(plan, starts, lengths)
    dead = plan.pairs - sum(-(-min(n, call.queries) // plan.config.block_q) for n in case.new)
    assert pairs <= steps <= 2 * pairs, (steps, pairs)
    if plan.parts == 1:  # nothing else has steps but blocks of padding, whose zeros are written
        assert steps == pairs + dead
    assert len(found["blocks"]) <= plan.parts * plan.most


def test_tables_that_do_not_fit_scalar_memory_are_refused():
    call = Call("flash_attention", 1, 2048, 32, 8, 128, 128, 2048, "bfloat16", "bfloat16", "folded")
    assert tpu.supported(call) is None
    assert "scalar memory" in tpu.supported(replace(call, batch=64, slots=2**20))


def test_garbage_in_blocks_that_nobody_sees_is_harmless():
    case = Case("window", (300,), (40,), 40, 512, window=20, head_dim=64)
    for name, configs in TILES.items():
        problem = make(case, layout=LAYOUT[name])
        k, v = (problem.arrays[x].at[:, :256].set(jnp.nan) for x in "kv")
        problem.check(problem.run(flash_attention, k=k, v=v, implementation=name, interpret=True, config=configs[0]))


@pytest.mark.parametrize(
    ("name", "make_config", "says"),
    [
        ("tpu", lambda: tpu.Config(16, 384, 128), "block_k must divide"),
        ("tpu", lambda: tpu.Config(16, 256, 96), "block_k must divide"),
        ("tpu", lambda: tpu.Config(20, 256, 128), "multiple of 16"),
        ("gpu", lambda: gpu.Config(48, 16), "power of two"),
    ],
)
def test_tiles_that_do_not_fit_are_named(name, make_config, says):
    problem = make(Case("small", (60,), (2,), 2, 256), layout=LAYOUT[name])
    with pytest.raises(ValueError, match=says):
        problem.run(flash_attention, implementation=name, interpret=True, config=make_config())


def test_heuristics_fit_their_chips():
    for case in CASES:
        problem = make(case, layout="folded")
        for chip in CHIPS.values():
            if chip.platform == "tpu":
                config = tpu.heuristic(call_of(problem), chip)
                assert case.slots % config.block_k == 0, (chip.name, config)
                assert config.block_k % config.tile_k == 0, (chip.name, config)
            else:
                gpu.heuristic(call_of(problem, layout="heads_last"), chip)


@pytest.mark.parametrize("name", TILES)
def test_a_derivative_is_refused(name):
    problem = make(Case("small", (60,), (2,), 2, 128), layout=LAYOUT[name])
    with pytest.raises(NotImplementedError, match="no derivative: use reference_attention"):
        jax.grad(lambda q: flash_attention(**problem.arguments(q=q), implementation=name, interpret=True).sum())(
            problem.arrays["q"]
        )
