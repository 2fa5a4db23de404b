"""The product with a quantized matrix as a Pallas kernel for GPU, through Triton: A100, L4, H100 and B200.

One kernel serves both phases: a program takes one block of results and loops over the contraction. With one block of
rows (decode) every weight is read once. If the blocks of outputs are too few to fill the chip, the contraction is cut
into parts, whose sums are added afterwards, always in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels import hardware
from pallas_kernels.hardware import Chip
from pallas_kernels.quantized_matmul.call import Call
from pallas_kernels.quantized_matmul.gpu_kernel import Plan, body

NAME = "gpu"
PLATFORM = "gpu"
MOST_ELEMENTS = 2**31  # Pallas computes offsets in signed 32-bit integers
MOST_BLOCKS = 65535  # blocks of outputs: the limit of a grid's second axis
DECODE_ROWS = 64
# A program has 24 KiB in flight: three steps of 64 outputs in int8. An H100 needs 25 KiB per multiprocessor (3.35 TB/s
# times one microsecond, over 132): one program is hardly enough, two are.
PROGRAMS_A_CORE = 2
LEAST_PART = 512  # columns


@dataclass(frozen=True)
class Config:
    """Tiles.

    Attributes:
      block_rows: rows of activations of a program; a power of two, at least 16.
      block_out: outputs of a program; a power of two, at least 16.
      block_in: columns of a step; a power of two, at least 32; it divides a group or is a multiple of it.
      splits: parts of the contraction.
      num_warps, num_stages: Triton's; a stage holds a step's weights and activations in shared memory.
    """

    block_rows: int
    block_out: int
    block_in: int
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 4

    def __post_init__(self):
        for name, least in (("block_rows", 16), ("block_out", 16), ("block_in", 32)):
            size = getattr(self, name)
            if size < least or size & (size - 1):
                raise ValueError(f"{self}: {name} must be a power of two and at least {least}")
        if self.splits < 1:
            raise ValueError(f"{self}: splits must be at least 1")


def supported(call: Call) -> str | None:
    """None, or why the GPU kernel cannot do the call."""
    if call.dtype not in ("bfloat16", "float16", "float32"):
        return f"the GPU kernel takes activations in bfloat16, float16 or float32, not {call.dtype}"
    if call.groups > 1 and call.group % 32:
        return f"the GPU kernel takes groups of multiples of 32, not of {call.group}"
    if call.bits == 4 and call.columns % 2:
        return f"the GPU kernel reads int4 as bytes of two values, rows of {call.columns} columns do not end in one"
    stored = call.columns * call.bits // 8
    for what, elements in (
        ("the matrix", call.out * stored),
        ("the activations", call.rows * call.columns),
        ("the results", call.rows * call.out),
    ):
        if elements > MOST_ELEMENTS:
            return f"offsets into {elements} elements of {what} do not fit the 32 bits that Pallas gives them"
    if call.out > 16 * MOST_BLOCKS:
        return f"the GPU kernel takes at most {16 * MOST_BLOCKS} outputs, not {call.out}"
    return None


def heuristic(call: Call, chip: Chip | None) -> Config:
    """Tiles for a chip; None: an A100.

    Bytes: up to 64 rows are one block, so that weights are read once. A step takes 128 columns: whole cache lines of
    int8. A prompt's blocks of 128 x 128 do 128 FLOPs per byte of widened weights and of activations, from L2.
    Shared memory: a step of 64 outputs and 16 rows takes 12 KiB in bf16, three steps 36. 128 x 128 x 64 takes 24 KiB,
    or 40 if the widened block goes through shared memory; two steps take 80 of the 99 KiB of L4.
    Registers: with 8 warps, the sum of 128 x 128 takes 64 per thread, and a group's product as many again. 64 x 64 with
    4 warps spilled, and so did int4 with 128 columns. f32 has no tensor core, and its operands stay in registers: 32 x
    32.
    Splits: until every multiprocessor has two programs, but the sums stay below a quarter of the weights' bytes.
    Hopper, measured on an H200 for 8 rows of Llama 3 8B, each with some 10 us of launch. int8: 32 us with two stages of
    256 columns and 64 outputs, 37 us with three of 128 and 32. int4: 39 us with 128 outputs and two splits, 68 us with
    32 outputs and one. W8A8: 37 us with 64 outputs, 43 us with 32.
    """
    chip = chip or hardware.chip("a100")
    cores, hopper = chip.cores, chip.capability == (9, 0)
    wide = call.dtype == "float32" and not call.int8_activations
    rows = min(max(16, pl.next_power_of_2(call.rows)), 32 if wide else 64 if call.rows <= DECODE_ROWS else 128)
    decode = call.rows <= DECODE_ROWS
    out = 32 if wide else 64 if decode else 128
    columns = 32 if wide else 128 if call.int8_activations or (decode and (call.bits == 8 or rows < 64)) else 64

    def programs():
        return -(-call.rows // rows) * -(-call.out // out)

    if decode:
        full = 128 if call.bits == 4 else 64
        if rows == 16 and not wide and hopper and 2 * -(-call.out // full) >= cores:
            out = full
            columns = 256 if call.bits == 8 and not call.int8_activations else columns
        elif rows == 16 and programs() < PROGRAMS_A_CORE * cores:
            out = 32
    else:
        while programs() < cores and max(rows, out) > 64:
            rows, out = (rows // 2, out) if rows > out else (rows, out // 2)
    columns = _step(call, columns)
    splits = 1
    if decode:
        most = min(call.columns // LEAST_PART, call.columns * call.bits // 8 // (32 * call.rows))
        splits = max(1, min(round(PROGRAMS_A_CORE * cores / programs()), most))
    warps = 8 if rows * out >= 64 * 64 else 4
    return Config(rows, out, columns, splits, warps, num_stages=4 if decode and columns < 256 else 3)


def candidates(call: Call, chip: Chip) -> list[Config]:
    """Other tiles that suit the call."""
    first = heuristic(call, chip)
    rows = {first.block_rows, max(16, first.block_rows // 2)}
    made = [
        Config(m, n, _step(call, k), splits, warps, stages)
        for m in sorted(rows)
        for n in (16, 32, 64, 128)
        for k in (64, 128, 256)
        for splits in sorted({1, first.splits, 2 * first.splits})
        for warps in (4, 8)
        for stages in (2, 3, 4, 5)
    ]
    fits = [c for c in dict.fromkeys(made) if misfit(call, c) is None]
    return [c for c in fits if _shared(call, c) <= chip.smem_bytes and c.block_rows * c.block_out <= 128 * 128]


def misfit(call: Call, config: Config) -> str | None:
    """None, or why a Config does not suit a call."""
    if config.block_in not in (fits := _steps(call)):
        return f"block_in must be one of {', '.join(map(str, fits))}"
    if -(-call.out // config.block_out) > MOST_BLOCKS:
        return f"{call.out} outputs are more than {MOST_BLOCKS} blocks of {config.block_out}"
    if config.splits > -(-call.columns // config.block_in):
        return f"{call.columns} columns are fewer than {config.splits} steps of {config.block_in}"
    if config.splits * call.rows * call.out > MOST_ELEMENTS:
        return f"offsets into the sums of {config.splits} parts do not fit 32 bits"
    return None


def _steps(call: Call) -> list[int]:
    """The values that block_in may take. Without groups all: the end of a row is masked."""
    sizes = [32 << i for i in range(6)]
    if call.groups == 1:
        return sizes
    return [n for n in sizes if call.columns % n == 0 and (call.group % n == 0 or n % call.group == 0)]


def _step(call: Call, most: int) -> int:
    """Columns of a step, up to `most`. They divide a row if that gives at least 64, so that nothing is masked."""
    divides = call.columns & -call.columns
    if call.groups == 1 and divides < 64:
        return min(most, max(32, pl.next_power_of_2(call.columns)))
    return max(n for n in _steps(call) if n <= min(most, divides))


def _shared(call: Call, config: Config) -> int:
    """Bytes of shared memory: the steps in flight, and a widened block."""
    given = 1 if call.int8_activations else jnp.dtype(call.dtype).itemsize
    step = config.block_in * (config.block_out * call.bits // 8 + config.block_rows * given)
    return step * max(1, config.num_stages - 1) + config.block_in * config.block_out * given


def cost(plan: Plan, out_bytes: int) -> pl.CostEstimate:
    """All loads and stores: weights per block of rows, activations per block of outputs; L2 serves the repeats."""
    (m, n, _), call, splits = plan.grid, plan.call, plan.config.splits
    given = 1 if call.int8_activations else jnp.dtype(call.dtype).itemsize
    scales = call.columns // plan.width if call.groups > 1 else 1 if splits == 1 else 0
    nbytes = m * call.out * (call.columns * call.bits // 8 + 4 * scales)
    nbytes += n * call.rows * call.columns * given + splits * call.rows * call.out * out_bytes
    nbytes += 4 * n * call.rows if call.int8_activations and splits == 1 else 0
    return pl.CostEstimate(flops=2 * call.rows * call.columns * call.out, transcendentals=0, bytes_accessed=nbytes)


def run(arrays, call: Call, config: Config, interpret=False) -> Float[Array, "M out"]:
    """See `api.quantized_matmul`. Computes the parts of the contraction, and adds them."""
    kind = jnp.dtype(call.out_dtype)
    if config.splits > 1:
        kind = jnp.dtype(jnp.int32 if call.int8_activations else jnp.float32)
    parts = _parts(arrays, Plan(call, config), kind, interpret)
    if config.splits == 1:
        return parts[0]
    y = parts.sum(0).astype(jnp.float32)
    y = y * arrays["scales"] if call.groups == 1 else y
    return (y * arrays["row_scale"] if "row_scale" in arrays else y).astype(call.out_dtype)


def _parts(arrays, plan: Plan, kind, interpret):
    """The sums of the parts [splits, M, out]; a single part is scaled already."""
    call, config, values = plan.call, plan.config, arrays["values"]
    if call.bits == 4:  # no copy: int4 is stored two to a byte
        values = lax.bitcast_convert_type(values.reshape(call.out, call.columns // 2, 2), jnp.int8)
    inputs = [arrays["x"], values, arrays["scales"], *(arrays[name] for name in ("row_scale",) if name in arrays)]

    def kernel(x, w, scales, *rest):
        body(plan, x, w, scales, rest[0] if len(rest) == 2 else None, rest[-1])

    return pl.pallas_call(
        kernel,
        grid=plan.grid,
        out_shape=jax.ShapeDtypeStruct((config.splits, call.rows, call.out), kind),
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        cost_estimate=cost(plan, kind.itemsize),
        interpret=interpret,
        name="quantized_matmul",
    )(*inputs)
