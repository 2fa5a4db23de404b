"""What is particular to the decode kernels: their DMAs and bytes, splits, blocks, and the TPU interpreter's checks."""

from functools import partial
from itertools import zip_longest
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import decode_attention
from pallas_kernels.attention.call import make_call
from pallas_kernels.attention.cases import Case
from pallas_kernels.decode_attention import cases, gpu, tpu, tpu_fetch, tpu_kernel
from pallas_kernels.hardware import chip
from tests.support.attention_problems import make

pytestmark = pytest.mark.thin(10)

RING = Case("ring", (900, 40, 385, 2, 130), (5, 5, 2, 0, 1), 5, 384, window=300, kv_heads=3, group=3, head_dim=64)
LONG = Case("long", (600, 0, 20, 300), (1, 0, 1, 1), 1, 640, head_dim=64, dtype="bfloat16")
INT8 = Case("int8", (300, 0, 20), (1, 0, 1), 1, 384, head_dim=64, kv_dtype="int8", sinks=True)
TREE = Case("tree", (200, 7, 380), (6, 6, 4), 6, 512, group=3, tree=True, softcap=9.0, sinks=True)
TREE_RING = Case("tree in a ring", (900, 7, 380), (16, 9, 16), 16, 384, group=3, tree=True, window=130)
SMALL, WIDE, SPLIT = tpu.Config(128, 128), tpu.Config(384, 128), tpu.Config(128, 128, 2)
ON_TPU, ON_GPU = (partial(decode_attention, implementation=name) for name in ("tpu", "gpu"))
KERNELS = {
    "tpu": (ON_TPU, "folded", (SMALL, WIDE, SPLIT)),
    "gpu": (ON_GPU, "heads_last", (gpu.Config(16, block_rows=16), gpu.Config(64, splits=3))),
}
RUNS = [
    (name, case, config)
    for name, (_, _, configs) in KERNELS.items()
    for config in configs
    for case in (RING, LONG, INT8, TREE, TREE_RING)
]


def call_of(case: Case, layout: str, **settings):
    return make_call("decode_attention", case.abstract(layout), **case.settings(layout) | settings)


@pytest.mark.parametrize(("name", "case", "config"), RUNS, ids=[f"{n}, {c.name}, {k}" for n, c, k in RUNS])
def test_any_blocks_and_splits_give_the_same(name, case, config):
    if config is WIDE and case.slots % WIDE.block_k and case.window:
        pytest.skip("a ring takes blocks that divide it")
    attention, layout, _ = KERNELS[name]
    problem = make(case, layout=layout)
    out, lse = problem.run(attention, config=config, interpret=True, return_lse=True)
    problem.check(out, lse)
    assert not np.asarray(out)[np.array(case.new) == 0].any()


@pytest.mark.parametrize("mode", [pytest.param("eager", marks=pytest.mark.slow), "on_wait"])
@pytest.mark.parametrize("case", [RING, LONG, INT8], ids=lambda c: c.name)
def test_the_tpu_interpreter_finds_no_race_and_no_missing_wait(case, mode, capfd):
    """Memory starts as NaN; with `on_wait` a DMA happens no earlier than its wait, with `eager` at once."""
    problem = make(case, layout="folded")
    for config in (SMALL, SPLIT):
        params = pltpu.InterpretParams(detect_races=True, dma_execution_mode=mode)
        problem.check(*problem.run(ON_TPU, config=config, interpret=params, return_lse=True))
    assert "RACE" not in capfd.readouterr().out.upper()  # JAX 0.10 prints it, later ones raise


def test_the_tpu_interpreter_sees_a_missing_wait(monkeypatch):
    """The test above can fail: a copy that nobody waits for has not arrived."""
    real = tpu_kernel.transfer
    monkeypatch.setattr(tpu_kernel, "transfer", lambda *a, start: real(*a, start=True) if start else None)
    problem = make(LONG, layout="folded")
    params = pltpu.InterpretParams(dma_execution_mode="on_wait")
    settings = LONG.settings("folded") | {"config": SMALL, "interpret": params}
    with pytest.raises(AssertionError, match=r"not finite|differs"):
        problem.check(jax.jit(lambda arrays: ON_TPU(**arrays, **settings))(problem.arrays))


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_every_row_holds_all_slots_where_no_lengths_are_given(name):
    attention, layout, configs = KERNELS[name]
    case = Case("full", (254, 254), (2, 2), 2, 256, group=3, head_dim=64)
    problem = make(case, layout=layout)
    for config in (None, configs[-1]):
        problem.check(*problem.run(attention, config=config, interpret=True, return_lse=True, lengths=None))


@pytest.mark.slow
def test_lanes_behind_the_last_head_may_hold_anything():
    case = Case("three heads of 64", (130, 20), (1, 1), 1, 256, kv_heads=3, group=3, head_dim=64)
    problem = make(case, layout="folded")
    k, v = (problem.arrays[x].at[..., 192:].set(jnp.nan) for x in "kv")
    problem.check(problem.run(ON_TPU, interpret=True, k=k, v=v))


@pytest.mark.parametrize("name", KERNELS)
def test_a_split_row_ignores_its_neighbours(name):
    """Splits follow from a row's own length: bit for bit the same beside a long row and beside an empty one."""
    attention, layout, configs = KERNELS[name]
    problem = make(Case("two", (500, 600), (1, 1), 1, 640, head_dim=64), layout=layout)
    lengths = problem.arrays["lengths"]
    both, alone = (
        np.asarray(problem.run(attention, config=configs[-1], interpret=True, lengths=x))
        for x in (lengths, lengths.at[1].set(0))
    )
    np.testing.assert_array_equal(both[0], alone[0])
    assert both[1].any()
    assert not alone[1].any()


# --- bytes


class Buffer:
    """Stands for a ref: indexing gives the number of bytes that the slice holds."""

    def __init__(self, shape, itemsize):
        self.shape, self.itemsize, self.at = shape, itemsize, self

    def __getitem__(self, index):
        total = self.itemsize
        for n, i in zip_longest(self.shape, index, fillvalue=slice(None)):
            if isinstance(i, slice):
                total *= n
            elif hasattr(i, "size") and hasattr(i, "stride"):  # pl.ds
                assert 0 <= i.start <= i.start + i.size <= n, f"{i} of {n} slots"
                total *= i.size
        return total


def fetched(monkeypatch, case: Case, config: tpu.Config) -> int:
    """Bytes of K, V and scales that the kernel's own DMAs bring for the rows of a case: its code, run on numbers."""
    call = call_of(case, "folded")
    plan = tpu.plan_for(call, config)
    arrays = case.abstract("folded")
    refs = dict.fromkeys(tpu_fetch.Refs.__dataclass_fields__) | {
        "starts": np.array(case.held),
        "lengths": case.lengths,
        "arrived": SimpleNamespace(at=np.zeros((2, 4))),
    }
    for name, buffer in (("k", "k_buffer"), ("v", "v_buffer"), ("k_scale", "k_scales"), ("v_scale", "v_scales")):
        if name in arrays:
            shape, itemsize = arrays[name].shape, arrays[name].dtype.itemsize
            refs[name] = Buffer(shape, itemsize)
            block = [2, *shape[1:]]
            block[1 if name in "kv" else 2] = config.block_k
            refs[buffer] = Buffer(block, itemsize)
    refs, total = tpu_fetch.Refs(**refs), 0

    def copy(source, target, _):
        nonlocal total
        assert source == target
        total += source
        return SimpleNamespace(start=lambda: None)

    with monkeypatch.context() as patch:
        patch.setattr(tpu_fetch.pl, "when", lambda condition: lambda f: f() if condition else None)
        patch.setattr(tpu_fetch.pl, "multiple_of", lambda x, n: x)
        patch.setattr(tpu_fetch.pltpu, "make_async_copy", copy)
        patch.setattr(tpu_fetch, "jnp", np_like())
        for split in range(plan.parts):
            for row in range(len(case.held)):
                span = tpu_fetch.span(plan, refs, row, split)
                for index in range(int(tpu_fetch.blocks_of(plan, *span))):
                    tpu_fetch.transfer(plan, refs, row, split, index, index % 2, start=True)
    return total


def np_like():
    return SimpleNamespace(maximum=np.maximum, minimum=np.minimum, where=np.where, int32=np.int32)


def needed(case: Case) -> int:
    """Bytes of the K, V and scales that some query of each row sees, their lanes as they lie in memory."""
    arrays = case.abstract("folded")
    token = sum(arrays[x].shape[2] * arrays[x].dtype.itemsize for x in "kv")
    if case.quantized:
        token += 2 * 4 * arrays["k_scale"].shape[1]
    tokens = [
        min(n, case.window - 1 + new) if case.window else n
        for n, new in zip(case.lengths, case.new, strict=True)
        if new
    ]
    return token * sum(tokens)


def vectors(case: Case, splits: int = 1) -> int:
    """Bytes of queries and results; parts of a split row are f32, with their log-sum-exps."""
    arrays = case.abstract("folded")
    lines, itemsize = len(case.held) * case.queries * case.group, arrays["q"].dtype.itemsize
    q, out = (arrays[x].shape[2] for x in "kv")
    return lines * (q + out) * itemsize if splits == 1 else lines * splits * (q * itemsize + 4 * (out + 128))


SERVED = (  # what a batch of a server holds: contexts of all lengths, far from the capacity
    Case("SmolLM2 135M", (1000, 130, 517, 2011, 333, 0), (1, 1, 1, 1, 1, 0), 1, 8192, 3, 3, 64, dtype="bfloat16"),
    Case("Llama 3 8B", (1000, 130, 517, 2011, 333, 0), (1, 1, 1, 1, 1, 0), 1, 8192, 8, 4, 128, dtype="bfloat16"),
    Case("Llama 3 8B, f32, a draft", (1000, 130, 517, 2011), (5, 5, 3, 5), 5, 4096, 8, 4, 128),
    Case("Gemma 3 270M, window", (5000, 700, 600, 901), (1,) * 4, 1, 1024, 1, 4, 256, window=512, dtype="bfloat16"),
    Case("Llama 3 8B, int8", (1990, 1130, 917, 2011), (1,) * 4, 1, 4096, 8, 4, 128, dtype="bfloat16", kv_dtype="int8"),
)


@pytest.mark.parametrize("name", ["v5e", "v5p"])
@pytest.mark.parametrize("case", SERVED, ids=lambda c: c.name)
def test_a_row_costs_what_it_holds(monkeypatch, case, name):
    config = tpu.heuristic(call_of(case, "folded"), chip(name))
    moved, least = (
        fetched(monkeypatch, case, config) + vectors(case, tpu.plan_for(call_of(case, "folded"), config).parts),
        needed(case) + vectors(case),
    )
    print(f"{case.name} on {name}: {moved} bytes moved, {least} needed: {moved / least:.3f}")
    # Two cores each write a part of every row: beside a window of 512 that shows.
    assert 1.0 <= moved / least <= (1.05 if config.splits == 1 else 1.06)


def test_the_count_of_bytes_would_see_whole_blocks(monkeypatch):
    monkeypatch.setitem(tpu.TILE_ROWS, 2, 512)
    config = tpu.Config(512, 512)
    assert fetched(monkeypatch, SERVED[0], config) > 1.2 * needed(SERVED[0])


@pytest.mark.parametrize("name", ["v5e", "v5p"])
@pytest.mark.parametrize("case", cases.LARGE, ids=lambda c: c.name)
def test_the_cost_estimate_is_what_full_rows_move(monkeypatch, case, name):
    case = Case(**vars(case) | {"held": case.held[:2], "new": case.new[:2]})
    if not case.window:  # full rows
        case = Case(**vars(case) | {"held": (case.slots - case.queries,) * len(case.held)})
    call = call_of(case, "folded")
    config = tpu.heuristic(call, chip(name))
    plan = tpu.plan_for(call, config)
    moved = fetched(monkeypatch, case, config) + vectors(case, tpu.plan_for(call_of(case, "folded"), config).parts)
    said = tpu.cost(plan).bytes_accessed
    assert abs(said / moved - 1) <= 0.05


def test_a_config_says_what_is_wrong_with_it():
    for wrong in (lambda: tpu.Config(100, 100), lambda: tpu.Config(256, 384), lambda: tpu.Config(128, 128, 0)):
        with pytest.raises(ValueError, match=r"must be|must divide"):
            wrong()
    for wrong in (lambda: gpu.Config(48), lambda: gpu.Config(8), lambda: gpu.Config(64, splits=0)):
        with pytest.raises(ValueError, match="must be"):
            wrong()
