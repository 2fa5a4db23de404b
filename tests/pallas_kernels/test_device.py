"""Every kernel on the accelerator of this process, compiled and run: every case against float64, and whole steps.

`pytest -m device`; a GPU needs `JAX_PLATFORMS=cuda`, since the tests' default is the CPU.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention, flash_attention, hardware
from pallas_kernels.analysis import problems
from pallas_kernels.attention.cases import Case
from pallas_kernels.decode_attention import cases as decode_cases
from pallas_kernels.flash_attention import cases as flash_cases
from pallas_kernels.paged_attention import cases as paged_cases
from pallas_kernels.quantized_matmul import cases as matmul_cases
from pallas_kernels.quantized_matmul import xla as matmul_xla
from pallas_kernels.quantized_matmul.api import quantized_matmul
from pdx import steps
from pdx.cache.dense import init_cache
from pdx.layers.kernels import layout_for
from tests.pallas_kernels.attention.test_pallas import refusal
from tests.pallas_kernels.paged_attention.test_xla import run as run_paged
from tests.pallas_kernels.quantized_matmul.test_matmul import TOLERANCE, drawn, error, expected
from tests.support.attention_problems import make
from tests.support.models import GEMMA, LLAMA, NINE, params, tokens
from tests.support.paged_attention import make as make_paged
from tests.support.paging import Desk

pytestmark = pytest.mark.device
DENSE = {"decode": (decode_attention, decode_cases.CASES), "flash": (flash_attention, flash_cases.CASES)}
DENSE_RUNS = [
    pytest.param(op, case, id=f"{op}: {case.name}, T={case.queries}")
    for op, (_, listed) in DENSE.items()
    for case in listed
]
MODELS = {"llama": LLAMA, "nine": NINE, "gemma": GEMMA}


@pytest.fixture(autouse=True)
def kernel():
    """The name of this device's Pallas kernels."""
    platform = hardware.platform_of()
    if platform not in ("tpu", "gpu"):
        pytest.skip(f"the device of this process is a {platform}: no Pallas kernel runs on it")
    return platform


@pytest.mark.parametrize(("op", "case"), DENSE_RUNS)
def test_dense_attention(op, case, kernel):
    problem = make(case, layout=problems.layout_of(f"{op}_attention", kernel))
    if reason := refusal(op, kernel, problem):
        pytest.skip(reason)
    out, lse = problem.run(DENSE[op][0], return_lse=True, implementation=kernel)
    assert out.dtype == problem.arrays["q"].dtype
    problem.check(out, lse)
    if op == "decode":
        assert not np.asarray(out, np.float32)[np.array(case.new) == 0].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_whole_prompts_by_cudnn(dtype):
    """Prompts of three lengths in a larger cache, NaN behind them, and a row that takes no part."""
    case = Case("prompts", (0,) * 4, (300, 17, 0, 1), 300, 512, 2, 4, 128, dtype=dtype)
    problem = make(case, layout="heads_last")
    arguments = problem.arguments(implementation="cudnn", starts=np.zeros(4, np.int32))
    if reason := refusal("flash", "cudnn", problem, starts=arguments["starts"]):
        pytest.skip(reason)
    arrays = {name: arguments.pop(name) for name in ("q", "k", "v", "lengths")}
    problem.check(jax.jit(lambda arrays: flash_attention(**arrays, **arguments))(arrays))


@pytest.mark.parametrize("case", paged_cases.CASES, ids=lambda c: c.name)
def test_paged_attention(case, kernel):
    problem = make_paged(case)
    out, lse = run_paged(problem, problems.layout_of("paged_attention", kernel), implementation=kernel, return_lse=True)
    problem.check(out, lse)
    assert (np.asarray(out, np.float64)[~problem.real] == 0).all()


@pytest.mark.parametrize("case", matmul_cases.CASES, ids=lambda c: c.name)
def test_quantized_matmul(case, kernel):
    x, w = drawn(case)
    y = jax.jit(lambda x, w: quantized_matmul(x, w, implementation=kernel))(x, w)
    assert y.dtype == x.dtype
    assert error(y, expected(x, w)) < TOLERANCE[case.dtype]


def test_integers_are_those_of_xla(kernel):
    """W8A8 with all scales one gives the int32 sums, exact in f32 below 2^24."""
    rng = np.random.default_rng(3)
    x, values = (jnp.asarray(rng.integers(-127, 128, shape), jnp.int8) for shape in ((6, 384), (256, 384)))
    exact = np.asarray(x, np.int64) @ np.asarray(values, np.int64).T
    case = dataclasses.replace(matmul_cases.CASES[5], rows=6, out=256, columns=384)
    call = problems.OPS["quantized_matmul"](case, kernel).call
    module = problems.OPS["quantized_matmul"](case, kernel).module
    arrays = {"x": x, "values": values, "scales": jnp.ones((1, 256)), "row_scale": jnp.ones((6, 1))}
    y = module.run(arrays, call, module.heuristic(call, hardware.detect()), False)
    np.testing.assert_array_equal(np.asarray(y), exact)
    np.testing.assert_array_equal(np.asarray(matmul_xla.integers(x, values)), exact)


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
@pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
def test_prefill_and_decode_equal_xlas(cfg, kv_dtype, kernel):
    """A ragged prompt and twelve decode steps in f32: logits of the Pallas path and of XLA's."""
    ids, lengths, rows = tokens(cfg, 2, 40), jnp.array([40, 17]), jnp.ones(2, bool)
    found = {}
    with jax.default_matmul_precision("highest"):
        for path in ("xla", "pallas"):
            cache = init_cache(cfg, 2, 128, chunk=40, dtype=jnp.dtype(kv_dtype), layout=layout_for(path))
            logits, cache = steps.prefill(params(cfg), cfg, ids, lengths, cache, kernels=path)
            seen = [logits]
            for i in range(12):
                logits, cache = steps.decode_step(params(cfg), cfg, ids[:, i], rows, cache, kernels=path)
                seen.append(logits)
            found[path] = np.stack([np.asarray(x) for x in seen])
    np.testing.assert_allclose(found["pallas"], found["xla"], atol=5e-4 if kv_dtype == "float32" else 2e-2)


@pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
def test_mixed_steps_equal_xlas(cfg, kernel):
    """Chunks and decode rows over pages, with the Pallas kernels and with XLA's attention."""
    ids = tokens(cfg, 3, 64, seed=3)
    found = {}
    with jax.default_matmul_precision("highest"):
        for path in ("xla", "pallas"):
            desk = Desk(cfg, kernels=path, layout=layout_for(path))
            first = desk.step({0: ids[0][:30], 1: ids[1][:5]}, 64)
            second = desk.step({0: ids[0][30:31], 1: ids[1][5:6], 2: ids[2][:40]}, 64, decode_rows=2)
            found[path] = np.stack([np.asarray(x) for x in [first[0], first[1], second[0], second[1], second[2]]])
    np.testing.assert_allclose(found["pallas"], found["xla"], atol=5e-4)
