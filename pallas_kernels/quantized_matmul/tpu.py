"""The product with a quantized matrix as a Pallas kernel for TPU.

One kernel serves both phases. The grid is (blocks of rows, of outputs, of the contraction). With one block of rows
(decode) every weight is read once, in place, and widened in VMEM. W8A8 multiplies int8 by int8.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels import hardware
from pallas_kernels.hardware import Chip
from pallas_kernels.layouts import LANES, SUBLANES
from pallas_kernels.masking import precision_of
from pallas_kernels.quantized_matmul.call import Call

NAME = "tpu"
PLATFORM = "tpu"
ROWS_BLOCK = 4 << 20  # bytes of activations, in whole rows, that stay in VMEM while the weights stream by
WEIGHT_BLOCK = 2 << 20  # bytes of a block of the matrix: 2.6 us at v5e's bandwidth, ten times a grid step's overhead


@dataclass(frozen=True)
class Config:
    """Tiles.

    Attributes:
      block_rows: rows of activations of a block.
      block_out: outputs of a block, a multiple of 128.
      block_in: columns of a block: all, or a divisor that is a multiple of 128 and of eight groups.
      vmem_bytes: VMEM to ask for.
    """

    block_rows: int
    block_out: int
    block_in: int
    vmem_bytes: int = 16 << 20


def supported(call: Call) -> str | None:
    """None, or why the TPU kernel cannot do the call."""
    if call.dtype not in ("bfloat16", "float32"):
        return f"the TPU kernel takes activations in bfloat16 or float32, not {call.dtype}"
    if call.columns % LANES or call.out % LANES:
        return (
            f"a matrix of {call.out} x {call.columns} does not lie in whole registers of {LANES} lanes: it would "
            "be copied before every call"
        )
    chip = hardware.detect("tpu")
    if call.int8_activations and chip is not None and chip.int8_tops is None:
        return f"{chip.name} multiplies no int8 by int8; int8 weights with float activations (W8A16) do"
    return None


def heuristic(call: Call, chip: Chip | None) -> Config:
    """Tiles for a chip; None: for any.

    Bytes: up to 512 rows are one block, so that weights are read once. A prompt's rows are in blocks of 512, each of
    which reads the weights again: 1024 FLOPs per byte of int8, above what any chip needs (240 to 560).
    VMEM: two blocks of weights of at most 2 MiB each and a widened copy, two blocks of activations, two of results, and
    the sum.
    """
    rows = min(call.rows, 512)
    most = WEIGHT_BLOCK if rows <= 64 else WEIGHT_BLOCK // 2
    out = next(n for n in (512, 256, 128) if call.out % n == 0)
    fits = [n for n in _contractions(call) if n * out * call.bits // 8 <= most and (call.groups == 1 or n <= 2048)]
    columns = max(fits, default=min(_contractions(call)))
    capacity = (chip.vmem_capacity_mib if chip else 16) << 20
    while rows > 32 and _vmem(call, Config(rows, out, columns)) > capacity * 5 // 8:
        rows = -(-rows // 64) * 32
    return Config(rows, out, columns, max(16 << 20, min(_vmem(call, Config(rows, out, columns)) * 5 // 4, capacity)))


def candidates(call: Call, chip: Chip) -> list[Config]:
    """Other tiles that suit the call."""
    first = heuristic(call, chip)
    rows = sorted({min(call.rows, n) for n in (128, 256, 512, 1024)})
    outs = [n for n in (128, 256, 512, 1024) if call.out % n == 0]
    made = [Config(m, n, k, first.vmem_bytes) for m in rows for n in outs for k in _contractions(call) if k >= 512]
    return [c for c in made if misfit(call, c) is None and _vmem(call, c) <= c.vmem_bytes]


def _contractions(call: Call) -> list[int]:
    """The values that block_in may take."""
    step = LANES if call.groups == 1 else max(LANES, SUBLANES * call.group)
    return sorted({n for n in range(step, call.columns, step) if call.columns % n == 0} | {call.columns})


def misfit(call: Call, config: Config) -> str | None:
    """None, or why a Config does not suit a call."""
    if config.block_rows != call.rows and (config.block_rows % 32 or config.block_rows > call.rows):
        return f"block_rows must be all {call.rows} rows, or a multiple of 32 below"
    if config.block_out % LANES or call.out % config.block_out:
        return f"block_out must be a multiple of {LANES} that divides {call.out}"
    if config.block_in not in _contractions(call):
        return f"block_in must be one of {', '.join(map(str, _contractions(call)))}"
    return None


def _vmem(call: Call, config: Config) -> int:
    """Bytes of VMEM that the tiles take."""
    m, n, k = config.block_rows, config.block_out, config.block_in
    wide = jnp.dtype(call.dtype).itemsize
    held = call.columns if _whole(call, config) else k
    weights = n * k * call.bits // 8 * 2 + n * min(k, max(call.group, LANES)) * (wide + 4)
    return weights + 2 * m * (held + n) * wide + 3 * m * n * 4 + 16 * n * max(8, call.groups)


def _blocks(call: Call, config: Config) -> tuple[int, int, int]:
    return (-(-call.rows // config.block_rows), call.out // config.block_out, call.columns // config.block_in)


def _whole(call: Call, config: Config) -> bool:
    """Whether whole rows of activations lie in VMEM."""
    size = config.block_rows * call.columns * jnp.dtype(call.dtype).itemsize
    return config.block_in == call.columns or size <= ROWS_BLOCK


def cost(call: Call, config: Config, out_bytes: int) -> pl.CostEstimate:
    """The blocks that the grid fetches. Activations are fetched again per block of outputs, unless whole rows stay."""
    m, n, _ = _blocks(call, config)
    rows = m * config.block_rows
    given = 1 if call.int8_activations else jnp.dtype(call.dtype).itemsize
    nbytes = rows * call.columns * given * (1 if _whole(call, config) else n) + rows * call.out * out_bytes
    nbytes += m * (call.out * call.columns * call.bits // 8 + 4 * call.groups * call.out)
    nbytes += 4 * rows if call.int8_activations else 0
    return pl.CostEstimate(flops=2 * call.rows * call.columns * call.out, transcendentals=0, bytes_accessed=nbytes)


def run(arrays, call: Call, config: Config, interpret=False) -> Float[Array, "M out"]:
    """See `api.quantized_matmul`."""
    x, values, scales, row_scale = (arrays.get(name) for name in ("x", "values", "scales", "row_scale"))
    out_dtype = jnp.dtype(call.out_dtype)
    m, n, k = config.block_rows, config.block_out, config.block_in
    grid = _blocks(call, config)
    grouped = call.groups > 1
    rows = (
        pl.BlockSpec((m, call.columns), lambda i, j, c: (i, 0))
        if _whole(call, config)
        else pl.BlockSpec((m, k), lambda i, j, c: (i, c))
    )
    inputs = [(x, rows), (values, pl.BlockSpec((n, k), lambda i, j, c: (j, c)))]
    inputs.append(
        (
            scales,
            pl.BlockSpec((k // call.group, n), lambda i, j, c: (c, j))
            if grouped
            else pl.BlockSpec((1, n), lambda i, j, c: (0, j)),
        )
    )
    if row_scale is not None:
        inputs.append((row_scale, pl.BlockSpec((m, 1), lambda i, j, c: (i, 0))))
    return pl.pallas_call(
        partial(_kernel, call, config),
        grid=grid,
        in_specs=[spec for _, spec in inputs],
        out_specs=pl.BlockSpec((m, n), lambda i, j, c: (i, j)),
        out_shape=jax.ShapeDtypeStruct((call.rows, call.out), out_dtype),
        scratch_shapes=[pltpu.VMEM((m, n), jnp.int32 if call.int8_activations else jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=config.vmem_bytes
        ),
        cost_estimate=cost(call, config, out_dtype.itemsize),
        interpret=interpret,
        name="quantized_matmul",
    )(*(a for a, _ in inputs))


def _kernel(call: Call, config: Config, x, w, scales, *rest) -> None:
    """One grid step: add the scaled product of each group to the sum; the last step of a contraction writes it."""
    row_scale, out, total = (None, *rest) if len(rest) == 2 else rest
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    cut = config.block_in < call.columns and _whole(call, config)
    x = x[:, pl.ds(pl.multiple_of(step * config.block_in, LANES), config.block_in)] if cut else x[...]
    size = config.block_in if call.groups == 1 else call.group
    for g in range(config.block_in // size):
        at = slice(g * size, (g + 1) * size)
        if call.int8_activations:
            part = lax.dot_general(x[:, at], w[:, at], (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        else:
            part = lax.dot_general(
                x[:, at],
                w[:, at].astype(x.dtype),
                (((1,), (1,)), ((), ())),
                precision=precision_of(x.dtype),
                preferred_element_type=jnp.float32,
            )
        total[...] += part * scales[g : g + 1] if call.groups > 1 else part

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        y = total[...].astype(jnp.float32)
        if call.groups == 1:
            y = y * scales[...]
        if row_scale is not None:
            y = y * row_scale[...]
        out[...] = y.astype(out.dtype)
