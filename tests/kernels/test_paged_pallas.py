"""The Pallas kernels of paged attention, interpreted: every case against float64, and what they fetch."""

import numpy as np
import pytest

from pallas_kernels.paged_attention import gpu, tpu
from pallas_kernels.paged_attention.cases import SMALL
from tests.kernels.test_paged import ids, make_once, run

# Small tiles, so that small cases have several blocks, steps and units.
CONFIG = {"float32": tpu.Config(block=16, key_block=32, unit=16), "bfloat16": tpu.Config(32, 32, 16)}


def small_tiles(case):
    if case.stored == "int8":
        return tpu.Config(32, 128, 128)
    return CONFIG[case.dtype]


@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_tpu(case):
    problem = make_once(case)
    tiles = small_tiles(case)
    out, lse = run(problem, "folded", implementation="tpu", interpret=True, return_lse=True, config=tiles)
    problem.check(out, lse)
    assert (np.asarray(out, np.float64)[~problem.real] == 0).all()


@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_gpu(case):
    problem = make_once(case)
    settings = {"implementation": "gpu", "interpret": True, "return_lse": True}
    out, lse = run(problem, "heads_last", **settings, config=gpu.Config(block=8, key_block=16))
    problem.check(out, lse)
    assert (np.asarray(out, np.float64)[~problem.real] == 0).all()
