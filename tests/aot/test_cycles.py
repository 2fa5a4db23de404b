"""Prefill attention by the compiler's static cycles: against the matrix units, and beside JAX's own kernel."""

import pytest

from pallas_kernels.analysis import jax_kernels, problems, static, targets

pytestmark = pytest.mark.aot
CASE = "Llama 3 8B, bf16, no mask"
LEAST = {"v5e": 0.80, "v5p": 0.80, "v6e": 0.75}  # of what the matrix units need for heads of this size


@pytest.mark.parametrize("name", LEAST)
def test_prefill_keeps_the_matrix_units_busy_and_takes_fewer_cycles_than_jax(name):
    if why := targets.missing(name):
        pytest.skip(why)
    target = targets.Target.get(name)
    (problem,) = problems.problems("flash_attention", "tpu", CASE)
    mine = static.cycles(problem, target, timeout=600)
    theirs = static.cycles(problem, target, timeout=600, peer=jax_kernels.JAX_FLASH_TILES[0])
    assert None not in (mine, theirs), "the compiler gave no cycles"
    chip = target.chip
    needed = chip.floor_cycles(problem.flops_needed) / problem.mxu_share(chip.mxu)
    assert LEAST[name] <= needed / mine <= 1
    assert mine < theirs
