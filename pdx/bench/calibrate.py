"""`pdx calibrate`: measures this device's memory bandwidth, matmul rates, and the rates of the parts of a step.

It runs single products, single attention calls and one small artificial transformer, and no model that is predicted
later. `pdx report` then tests the predictions on real models.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import decode_attention, flash_attention
from pallas_kernels.decode_attention.api import MAX_QUERIES
from pallas_kernels.hardware import Chip, of_kind
from pallas_kernels.masking import precision_of
from pdx.bench import device
from pdx.bench.timed_work import ModelUnderTest
from pdx.bench.timing import Timing, interleaved, once, read_bandwidth
from pdx.config import ModelConfig
from pdx.cost import Setup
from pdx.cost.chips import MeasuredChip
from pdx.cost.measured_rates import Rates, Surface
from pdx.layers.linear import linear
from pdx.model import init_params
from pdx.quant import parse_kind, quantized
from pdx.weights.load import default_dtype
from pdx.weights.progress import Report, silent

# The artificial transformer; no published model has these widths.
MODEL = ModelConfig("llama", 512, 768, 6, 12, 4, 64, 2048, 8192)


@dataclass(frozen=True)
class Plan:
    """What is measured: enough points for errors of a few percent, in less than a minute on two cores."""

    bandwidth_mb: int = 512  # of the array that is read
    square: int = 1024  # side of the products that give the peaks
    sides: tuple[int, ...] = (384, 1024, 4096)  # of float matrices
    rows: tuple[int, ...] = (1, 2, 8, 32, 256, 1024)  # multiplied with them
    quantized_sides: tuple[int, ...] = (512, 2048)
    quantized_rows: tuple[int, ...] = (1, 8, 64, 512)
    new: tuple[int, ...] = (32, 256, 1024)  # queries of a prefill attention call
    more: tuple[int, ...] = (1, 4)  # keys per query of such a call
    batches: tuple[int, ...] = (1, 8)  # rows of a decode attention call
    seen: tuple[int, ...] = (64, 512, 4096)  # keys of such a row
    policies: tuple[str, ...] = ("w8a8", "int8", "int4:g64")  # the rates are used for other group sizes too
    model: ModelConfig = MODEL
    decode_rows: tuple[int, ...] = (1, 8)  # of its decode steps
    prefill_tokens: tuple[int, ...] = (64, 512)  # of its prefill steps
    stream_mb: int = 96  # size of weights or caches that are read in turn: more than a CPU's caches hold
    rounds: int = 2  # runs of a measurement in one pass
    passes: int = 2  # over all measurements, so that a disturbance of some seconds spoils only one of them


ACCELERATOR = Plan(
    2048, 8192, (1024, 4096, 8192), model=ModelConfig("llama", 512, 2048, 6, 16, 8, 128, 8192, 8192), stream_mb=512
)
TINY = Plan(
    1,
    64,
    (64,),
    (1, 64),
    (64,),
    (8,),
    (32,),
    (1,),
    (1,),
    (32, 64),
    ("w8a8",),
    ModelConfig("llama", 64, 32, 1, 4, 2, 8, 48, 512),
    (1,),
    (32,),
    1,
    1,
    1,
)


def calibrate(name: str | None = None, plan: Plan | None = None, progress: Report = silent) -> MeasuredChip:
    """Measure this process's default device, as `plan` says.

    Args:
      name: the chip's name; None: made from the device's.
      plan: what is measured; None: by the kind of device.
      progress: called after each measurement.

    Returns:
      The chip. Its peaks are the bandwidth of summing a large array and the rates of square products. Its `rates` are
      those of products with weights, of attention over caches, and of the rest of a layer. Other figures are from the
      published table, if the device is in it.
    """
    cpu = jax.default_backend() == "cpu"
    plan = plan or (Plan() if cpu else ACCELERATOR)
    dtype = jnp.dtype(default_dtype(jax.devices()[0]))
    jobs = list(_jobs(plan, dtype))
    found: dict[tuple, float] = {}
    turns = jobs * plan.passes
    for i, (key, run) in enumerate(turns):
        progress("calibrating", i, len(turns))
        found[key] = max(found.get(key, 0.0), _rounded(run()))
        gc.collect()  # frees the arrays of this measurement before the next one
    chip = _chip(name, found, plan, dtype)
    rest = {}
    for i, (tokens, cost, work) in enumerate(_steps(plan, dtype)):
        progress("calibrating layers", i, len(plan.decode_rows) + len(plan.prefill_tokens))
        parts = chip.rates.parts(cost.work)
        seconds = min(_measure(work, plan.rounds) for _ in range(plan.passes))
        # If products and attention by themselves take as long as the step, the rest is too short to be measured.
        remainder = max(seconds - parts["products"] - parts["attention"], 0.02 * seconds)
        rest[tokens] = _rounded(cost.work.layers * tokens * cost.work.width / remainder)
        width = cost.work.width
    surface = Surface(tuple(sorted(rest)), (width,), tuple((rest[t],) for t in sorted(rest)))
    return dataclasses.replace(chip, rates=dataclasses.replace(chip.rates, rest=surface))


def _chip(name: str | None, found: dict[tuple, float], plan: Plan, dtype) -> MeasuredChip:
    def surface(group: str, key: str, first: Sequence[int], second: Sequence[int]) -> Surface:
        values = (tuple(found[group, key, a, b] for b in second) for a in first)
        return Surface(tuple(first), tuple(second), tuple(values))

    def sizes(sides: Sequence[int]) -> list[int]:
        return [side * side for side in sides]

    products = {str(dtype): surface("products", str(dtype), plan.rows, sizes(plan.sides))}
    products |= {
        _stored(p): surface("products", _stored(p), plan.quantized_rows, sizes(plan.quantized_sides))
        for p in plan.policies
    }
    caches = (str(dtype), "int8")
    rates = Rates(
        products,
        {kv: surface("prefill", kv, plan.new, plan.more) for kv in caches},
        {kv: surface("decode", kv, plan.batches, plan.seen) for kv in caches},
        made=f"{device.machine()}; JAX {jax.__version__}; {datetime.date.today()}",
    )
    kind = jax.devices()[0].device_kind
    base = of_kind(kind) or Chip(
        "",
        {"cpu": "cpu", "tpu": "tpu"}.get(jax.default_backend(), "gpu"),
        (kind,),
        None,
        None,
        1.0,
        device.memory_gib(),
        os.cpu_count() or 1,
        1.0,
        1.0,
    )
    fields = {f.name: getattr(base, f.name) for f in dataclasses.fields(Chip)}
    fields |= {
        "name": name or device.file_name(),
        "hbm_gbps": found["bandwidth",],
        "f32_tflops": found["peak", "float32"],
        "bf16_tflops": found["peak", "bfloat16"],
        "int8_tops": found["peak", "int8"],
    }
    return MeasuredChip(**fields, rates=rates)


def _jobs(plan: Plan, dtype) -> Iterator[tuple[tuple, Callable[[], float]]]:
    """(key, measurement) of everything but the steps. A measurement returns its rate."""
    yield ("bandwidth",), partial(_bandwidth, plan)
    for of in ("float32", "bfloat16", "int8"):
        yield ("peak", of), partial(_peak, plan, of)
    for policy in (None, *plan.policies):
        sides, rows = (plan.quantized_sides, plan.quantized_rows) if policy else (plan.sides, plan.rows)
        stored = _stored(policy) if policy else str(dtype)
        for side in sides:
            for r in rows:
                yield ("products", stored, r, side * side), partial(_products, plan, dtype, policy, r, side)
    for kv in (str(dtype), "int8"):
        for new in plan.new:
            for more in plan.more:
                yield ("prefill", kv, new, more), partial(_attention, plan, dtype, kv, 1, new, new * more)
        for batch in plan.batches:
            for seen in plan.seen:
                yield ("decode", kv, batch, seen), partial(_attention, plan, dtype, kv, batch, 1, seen)


def _stored(policy: str) -> str:
    return policy.partition(":")[0]


def _rounded(rate: float) -> float:
    """Rounded to four digits, since measurements are not more exact."""
    return float(f"{rate:.4g}")


def _measure(work: Callable[[], Timing], rounds: int) -> float:
    return interleaved({"it": work}, rounds)["it"].median


def _bandwidth(plan: Plan) -> float:
    work = read_bandwidth(plan.bandwidth_mb)
    # The best run, here and in `_peak`, since a peak is what the device can do undisturbed.
    return work.bytes_read / interleaved({"it": work}, max(5, plan.rounds))["it"].best / 1e9


def _peak(plan: Plan, dtype: str, times: int = 8) -> float:
    """TFLOP/s of a chain of square products."""
    # A CPU emulates bf16 about fifty times as slowly; a smaller product measures that too.
    n = plan.square // 2 if dtype == "bfloat16" and jax.default_backend() == "cpu" else plan.square
    w = jax.random.normal(jax.random.key(0), (n, n)) * n**-0.5
    w = (w * 127).astype(jnp.int8) if dtype == "int8" else w.astype(dtype)
    settings = {"preferred_element_type": jnp.int32} if dtype == "int8" else {"precision": precision_of(w.dtype)}

    @jax.jit
    def run(x):
        return lax.fori_loop(0, times, lambda _, y: jnp.einsum("ai,oi->ao", y, w, **settings).astype(w.dtype), x)

    best = interleaved({"it": lambda: once(lambda: run(w))}, plan.rounds)["it"].best
    return 2 * n**3 * times / best / 1e12


def _products(plan: Plan, dtype, policy: str | None, rows: int, side: int) -> float:
    """Weights per second of a chain of products as in the model, each with another matrix.

    For a few rows, the matrices together are larger than a CPU's caches, as a model's are. Many rows are bound by
    arithmetic, so that two matrices suffice.
    """
    kind = parse_kind(policy) if policy else None
    each = side * side * (dtype.itemsize if kind is None else kind.bits / 8)
    few = rows <= 32
    wanted = max(2, int(plan.stream_mb * 1e6 / each)) if few else 2
    count = min(wanted, 24)  # matrices per call of the program; it is called with several sets
    w = jax.random.normal(jax.random.key(1), (side, side), dtype) * side**-0.5
    if kind is not None:
        w = quantized(w, kind, str(dtype))
    sets = [[jax.tree.map(jnp.copy, w) for _ in range(count)] for _ in range(-(-wanted // count))]

    @jax.jit
    def chain(x, weights):
        for w in weights:
            x = linear(x, w)
        return x

    x = jax.random.normal(jax.random.key(2), (rows, side), dtype)

    def through():
        y = x
        for weights in sets:
            y = chain(y, weights)
        return y

    return side * side * count * len(sets) / _measure(lambda: once(through), plan.rounds)


def _attention(plan: Plan, dtype, kv: str, batch: int, new: int, seen: int) -> float:
    """For many queries, FLOP/s of the unmasked pairs; for a few, bytes of keys and values per second."""
    one = Setup(dataclasses.replace(plan.model, num_layers=1, windows=()), str(dtype), kv_dtype=kv)
    few = new <= MAX_QUERIES
    cost = one.decode(batch, seen) if few else one.prefill(batch, new, seen - new)
    count = max(2, min(16, int(plan.stream_mb * 1e6 / cost.bytes_by_part["kv read"]))) if few else 1
    cfg, op = dataclasses.replace(one.cfg, num_layers=count, windows=()), decode_attention if few else flash_attention
    cache = ModelUnderTest(cfg, None, dtype, kv_dtype=kv).cache(batch, seen, seen)
    starts = jnp.full(batch, seen - new)

    @jax.jit
    def run(q, cache):
        for layer in cache.layers:
            q = op(
                q,
                layer.k,
                layer.v,
                starts=starts,
                lengths=cache.lengths,
                scale=cfg.attn_scale,
                layout=layer.layout,
                kv_heads=cfg.num_kv_heads,
                **layer.scales,
            )
        return q

    q = jax.random.normal(jax.random.key(4), (batch, new, cfg.num_heads, cfg.head_dim), dtype)
    seconds = _measure(lambda: once(lambda: run(q, cache)), plan.rounds) / count
    return (cost.bytes_by_part["kv read"] if few else cost.flops_by_part["attention"]) / seconds


def _steps(plan: Plan, dtype):
    """(tokens, cost, timed function) of a few steps of the artificial transformer."""
    model = ModelUnderTest(plan.model, init_params(plan.model, jax.random.key(5), dtype), dtype)
    for rows in plan.decode_rows:
        timed = model.decode(rows, 128)
        yield rows, timed.costs()[0], timed.work
    for tokens in plan.prefill_tokens:
        timed = model.prefill(1, tokens)
        yield tokens, timed.costs()[0], timed.work
