"""Kernels by what the compiler lets them issue: bundles beside the cycles of the memory, or of the matrix units.

A kernel that issues more bundles than the memory takes cycles cannot reach the memory's speed, whatever it moves.
"""

from functools import cache

import pytest

from pallas_kernels.analysis import problems, schedule, static, targets
from pallas_kernels.paged_attention import tpu

pytestmark = pytest.mark.aot
TPUS = ("v4", "v5e", "v5p", "v6e", "7x")
# Op, case, and the most bundles over the memory's cycles at the published bandwidth, by target.
DECODE = [
    ("paged_attention", "llama-3-8b decode", dict.fromkeys(TPUS, 1.0)),
    ("decode_attention", "Llama 3 8B, bf16", dict.fromkeys(TPUS, 1.0)),
    ("decode_attention", "one long row, bf16", dict.fromkeys(TPUS, 1.0)),
    ("decode_attention", "SmolLM2 135M, bf16", dict.fromkeys(TPUS, 1.0) | {"7x": 1.3}),
    ("decode_attention", "Gemma 3 270M, window, bf16", dict.fromkeys(TPUS, 1.0) | {"7x": 2.0}),
    ("decode_attention", "Llama 3 8B, int8", {"v5e": 1.0, "v5p": 1.0, "v6e": 1.0, "7x": 1.1}),
]
HELD = [(op, case, target, most) for op, case, limits in DECODE for target, most in limits.items()]
# The least share of the peak at which the loop over keys of a paged chunk runs where it needs no mask.
CHUNK, LEAST = "llama-3-8b mixed", {"v5e": 0.75, "v6e": 0.27}


@cache
def row_of(op: str, case: str, target: str) -> dict:
    if why := targets.missing(target):
        pytest.skip(why)
    (row,) = static.table(op, target, case, exact=True)
    assert "error" not in row, row["error"]
    return row


@pytest.mark.parametrize("target", ["v5e", "v6e"])
def test_smoke(target):
    test_decode_issues_no_more_bundles_than_the_memory_takes_cycles(*DECODE[0][:2], target, 1.0)


@pytest.mark.parametrize(("op", "case", "target", "most"), HELD)
def test_decode_issues_no_more_bundles_than_the_memory_takes_cycles(op, case, target, most):
    row = row_of(op, case, target)
    over = row["bundles"] / row["memory_cycles"]
    print(f"{op}, {case}, {target}: {row['bundles']} bundles, {over:.2f} of the memory's cycles")
    assert 0 < over <= most


def test_decode_fills_both_cores():
    (kernel,) = row_of("paged_attention", "llama-3-8b decode", "v5p")["issued"]
    assert len(kernel["bundles"]) == 2
    assert min(kernel["bundles"]) > 0.9 * max(kernel["bundles"])


@pytest.mark.parametrize("target", LEAST)
def test_chunks_keep_the_matrix_units_busy(target):
    """The loop over tiles of queries has two bodies, with and without a mask. A turn takes one of them: half of it."""
    row, chip = row_of("paged_attention", CHUNK, target), targets.Target.get(target).chip
    (problem,) = problems.problems("paged_attention", "tpu", CHUNK, large_only=True)[:1]
    call, tiles = problem.call, tpu.heuristic(problem.call, chip)
    inner = [
        x for k in row["issued"] for x in k["loops"] if x["depth"] == 3 and x["turns"] and "matmuls" in x["counts"]
    ]
    loop = max(inner, key=lambda x: x["turns"] * x["bundles"])
    rows = tiles.tile_q * call.group * tiles.block_heads
    flops = 2 * rows * tiles.block_k * (call.head_dim + call.value_dim)
    share = chip.floor_cycles(flops) / (loop["bundles"] / 2)
    print(f"{target}: {loop['bundles']} bundles in both bodies, {share:.2f} of the peak")
    assert LEAST[target] <= share <= 1


def test_memory_cycles_are_those_of_the_published_bandwidth():
    chips = {name: targets.Target.get(name).chip for name in ("v5e", "v6e", "7x")}
    per_mib = {name: schedule.memory_cycles(chip, 1 << 20) for name, chip in chips.items()}
    assert {name: round(n) for name, n in per_mib.items()} == {"v5e": 1920, "v6e": 1119, "7x": 625}
