"""The product with a quantized matrix as a Pallas kernel for TPU.

One kernel serves both phases. The grid is (blocks of rows, of outputs, of the contraction). With one block of rows
(decode) every weight is read once, in place, and widened in VMEM. W8A8 multiplies int8 by int8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels import hardware
from pallas_kernels.hardware import Chip
from pallas_kernels.layouts import LANES, SUBLANES, round_up
from pallas_kernels.quantized_matmul.call import Call
from pallas_kernels.quantized_matmul.tpu_kernel import Plan, arrange, body

NAME = "tpu"
PLATFORM = "tpu"
ROWS_BLOCK = 4 << 20  # bytes of activations, in whole rows, that stay in VMEM while the weights stream by
FEW_ROWS = 16  # up to these, the rows that `spread` and `digits` add are cheaper than the weights that they save
SCALED_ROWS = 384  # from these on, one product of scaled weights takes fewer cycles than one per group, on v6e
WEIGHT_BLOCK = 2 << 20  # bytes of a block of the matrix: 2.6 us at v5e's bandwidth, ten times a grid step's overhead


@dataclass(frozen=True)
class Config:
    """Tiles.

    Attributes:
      block_rows: rows of activations of a block.
      block_out: outputs of a block, a multiple of 128.
      block_in: columns of a block: all, or a divisor that is a multiple of 128 and of eight groups.
      vmem_bytes: VMEM to ask for.
      spread: groups that one product takes, each with rows of its own (see `tpu_kernel.arrange`).
      digits: int8 digits that stand for an activation in bf16; 0: the activation itself is multiplied.
      scaled: scale the weights in VMEM, round them to bf16 and take one product, instead of one per group.
    """

    block_rows: int
    block_out: int
    block_in: int
    vmem_bytes: int = 16 << 20
    spread: int = 1
    digits: int = 0
    scaled: bool = False


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
    Other forms, for a few rows of groups and for prompts on matrix units of 256, choose their own: see there.
    """
    if (found := _few_rows(call, chip) or _prompt(call, chip)) is not None:
        return found
    rows = min(call.rows, 512)
    most = WEIGHT_BLOCK if rows <= 64 else WEIGHT_BLOCK // 2
    out = next(n for n in (512, 256, 128) if call.out % n == 0)
    fits = [
        n
        for n in _contractions(call)
        if n * out * call.bits // 8 <= most and (call.groups == 1 or FEW_ROWS < rows <= 64 or n <= 2048)
    ]
    columns = max(fits, default=min(_contractions(call)))
    while rows > 32 and _vmem(call, Config(rows, out, columns)) > _room(chip):
        rows = -(-rows // 64) * 32
    return _asking(call, chip, Config(rows, out, columns))


def _few_rows(call: Call, chip: Chip | None) -> Config | None:
    """Tiles for a few rows of a matrix of int4 or of groups; None: another call.

    Taking the weights is most of a decode product's work on the matrix units, and int8 ones take half of it. So one
    product takes as many groups as fit the unit: on v6e, W8A16 in groups of 32 went from 214,956 to 50,201 bundles.
    On chips that multiply int8, digits took W4A16 of Llama's gate from 31,747 bundles and 68,123 static cycles to
    26,230 and 46,626, and with blocks of 1024 outputs to 23,450 and 41,728. With digits, 128 columns are enough: two
    groups of 128 took 25,130 bundles, eight of 32 54,910, four 49,960.
    """
    if call.rows > FEW_ROWS or call.int8_activations or (call.groups == 1 and call.bits == 8):
        return None
    digits = 3 if chip and chip.int8_tops and call.dtype == "bfloat16" else 0
    width = chip.mxu if chip and call.group >= LANES and not digits else LANES
    nbytes = call.columns * call.bits // 8
    large = nbytes * 1024 <= WEIGHT_BLOCK and call.out >= 8 * 1024
    out = next(n for n in (1024, 512, 256, 128) if call.out % n == 0 and (large or n <= 512))
    columns = max(
        (n for n in _contractions(call) if n * out * call.bits // 8 <= WEIGHT_BLOCK), default=min(_contractions(call))
    )
    groups = columns // call.group if call.groups > 1 else 1
    spread = next(n for n in (8, 4, 2, 1) if n * call.group <= max(width, call.group) and groups % n == 0)
    if spread == 1 and not digits:
        return None
    return _asking(call, chip, Config(call.rows, out, columns, spread=spread, digits=digits))


def _prompt(call: Call, chip: Chip | None) -> Config | None:
    """Tiles for many rows where VMEM holds all columns; None: another call.

    All columns in one block: no sum is kept in VMEM between blocks. W8A16 of 1024 rows of Llama's gate reached 0.74 of
    v6e's peak with 2048 columns and 512 rows, 0.87 with all columns and 0.90 with 1024 rows; W8A8 0.57, 0.71 and 0.88.
    Scaled weights, for W4A16: 0.44 with a product per group, 0.60 with 512 rows, 0.76 with 1024; 512
    outputs reach 0.83, but then compiling takes a minute, twice as long.
    v5e, whose units are 128 wide: W8A16 0.93 with 2048 columns, 0.97 with all; W8A8 0.87 and 0.96.
    """
    wide = call.dtype == "float32" and not call.int8_activations
    if chip is None or chip.vmem_capacity_mib < 64 or call.rows <= 64 or wide:
        return None
    large = chip.mxu == 256
    scaled = large and call.groups > 1
    if call.groups > 1 and (call.group % LANES or (scaled and call.rows < SCALED_ROWS)):
        return None
    for rows in (1024, 512, 256) if large else (512, 256):
        blocks = -(-call.rows // rows)
        rows = call.rows if blocks == 1 else round_up(-(-call.rows // blocks), 32)
        for out in (n for n in (512, 256, 128) if call.out % n == 0 and not (scaled and n > 256)):
            config = Config(rows, out, call.columns, scaled=scaled)
            if _vmem(call, config) <= _room(chip):
                return _asking(call, chip, config)
    return None


def _room(chip: Chip | None) -> int:
    """Bytes of VMEM that tiles may take by `_vmem`; the compiler's own temporaries need the rest."""
    return _capacity(chip) * 5 // 8


def _capacity(chip: Chip | None) -> int:
    return (chip.vmem_capacity_mib if chip else 16) << 20


def _asking(call: Call, chip: Chip | None, config: Config) -> Config:
    """The tiles, asking for the VMEM that they take."""
    return replace(config, vmem_bytes=max(16 << 20, min(_vmem(call, config) * 5 // 4, _capacity(chip))))


def candidates(call: Call, chip: Chip) -> list[Config]:
    """Other tiles that suit the call."""
    first = heuristic(call, chip)
    rows = sorted({min(call.rows, n) for n in (128, 256, 512, 1024)})
    outs = [n for n in (128, 256, 512, 1024) if call.out % n == 0]
    made = [
        replace(first, block_rows=m, block_out=n, block_in=k)
        for m in rows
        for n in outs
        for k in _contractions(call)
        if k >= 512
    ]
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
    return _misfit_form(call, config)


def _misfit_form(call: Call, config: Config) -> str | None:
    groups = config.block_in // call.group if call.groups > 1 else 1
    if config.spread < 1 or groups % config.spread:
        return f"spread must divide the {groups} groups of a block"
    if (config.spread > 1 or config.digits) and (config.block_rows != call.rows or call.int8_activations):
        return "spread and digits take all rows in one block, and activations that are floats"
    if config.digits and call.dtype != "bfloat16":
        return f"digits stand for activations in bfloat16, not {call.dtype}"
    chip = hardware.detect("tpu")
    if config.digits and chip is not None and chip.int8_tops is None:
        return f"{chip.name} multiplies no int8 by int8, as digits need"
    if config.scaled and (call.dtype != "bfloat16" or call.groups == 1 or config.spread > 1 or config.digits):
        return "scaled takes activations in bfloat16 and groups, without spread and digits"
    return None


def _vmem(call: Call, config: Config) -> int:
    """Bytes of VMEM that the tiles take."""
    m, n, k = config.block_rows, config.block_out, config.block_in
    plan = _plan(call, config)
    size = jnp.dtype(call.dtype).itemsize
    held = call.columns if plan.whole else k
    widened = n * k * size if config.scaled else n * min(k, max(call.group, LANES)) * (size + 4)
    weights = n * k * call.bits // 8 * 2 + widened
    return (
        weights
        + 2 * (plan.given_rows * held * plan.given_bytes + m * n * size)
        + 3 * m * n * 4
        + 16 * n * max(8, call.groups)
    )


def _blocks(call: Call, config: Config) -> tuple[int, int, int]:
    return (-(-call.rows // config.block_rows), call.out // config.block_out, call.columns // config.block_in)


def _whole(call: Call, config: Config) -> bool:
    """Whether whole rows of activations lie in VMEM."""
    size = config.block_rows * call.columns * jnp.dtype(call.dtype).itemsize
    return config.block_in == call.columns or config.spread > 1 or config.digits > 0 or size <= ROWS_BLOCK


def cost(call: Call, config: Config, out_bytes: int) -> pl.CostEstimate:
    """The blocks that the grid fetches. Activations are fetched again per block of outputs, unless whole rows stay."""
    m, n, _ = _blocks(call, config)
    plan = _plan(call, config)
    fetched = m * plan.given_rows * call.columns * plan.given_bytes * (1 if plan.whole else n)
    nbytes = fetched + m * config.block_rows * call.out * out_bytes
    nbytes += m * (call.out * call.columns * call.bits // 8 + 4 * call.groups * call.out)
    nbytes += 4 * m * config.block_rows if plan.integers else 0
    flops = 2 * plan.given_rows // config.block_rows * call.rows * call.columns * call.out
    return pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=nbytes)


def run(arrays, call: Call, config: Config, interpret=False) -> Float[Array, "M out"]:
    """See `api.quantized_matmul`."""
    x, values, scales, row_scale = (arrays.get(name) for name in ("x", "values", "scales", "row_scale"))
    out_dtype = jnp.dtype(call.out_dtype)
    m, n, k = config.block_rows, config.block_out, config.block_in
    plan = _plan(call, config)
    x, factor = arrange(x, plan)
    row_scale = row_scale if factor is None else factor
    given, every = plan.given_rows, (lambda i, j, c: (i, 0))
    rows = (
        pl.BlockSpec((given, call.columns), every) if plan.whole else pl.BlockSpec((given, k), lambda i, j, c: (i, c))
    )
    per_group = pl.BlockSpec((k // call.group, n), lambda i, j, c: (c, j))
    per_output = pl.BlockSpec((1, n), lambda i, j, c: (0, j))
    inputs = [(x, rows), (values, pl.BlockSpec((n, k), lambda i, j, c: (j, c)))]
    inputs.append((scales, per_group if call.groups > 1 else per_output))
    if row_scale is not None:
        inputs.append((row_scale, pl.BlockSpec((m, 1), every)))
    total = [pltpu.VMEM((m, n), jnp.int32 if call.int8_activations else jnp.float32)] if plan.steps > 1 else []
    return pl.pallas_call(
        partial(body, plan),
        grid=_blocks(call, config),
        in_specs=[spec for _, spec in inputs],
        out_specs=pl.BlockSpec((m, n), lambda i, j, c: (i, j)),
        out_shape=jax.ShapeDtypeStruct((call.rows, call.out), out_dtype),
        scratch_shapes=total,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=config.vmem_bytes
        ),
        cost_estimate=cost(call, config, out_dtype.itemsize),
        interpret=interpret,
        name="quantized_matmul",
    )(*(a for a, _ in inputs))


def _plan(call: Call, config: Config) -> Plan:
    m, n, k = config.block_rows, config.block_out, config.block_in
    whole = _whole(call, config)
    return Plan(call, m, n, k, call.columns // k, whole, config.spread, config.digits, config.scaled)
