"""Prefill attention as a Pallas kernel for TPU: the grid, the block specs and the choice of tiles.

The cache is read in place: `folded`, [B, S, C]. A block of keys is `block_k` slots by a group of lanes: the fewest that
hold whole heads (one head of 128, two of 64, eight of 80), or all of them. The G query heads of a KV head are
stacked as rows, so that a block of keys is read and loaded into the matrix unit once for all of them. Queries and
result are [B, T, N*H], as projections make and take them.

The grid is (part, group of lanes, query block, key block), or with tables (part, group of lanes, step, 1), see
`tpu_steps`. Keys after the last query of a block, before its window or past the row's end are neither fetched nor
computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import gcd

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.call import Call
from pallas_kernels.flash_attention.tpu_kernel import Plan, body
from pallas_kernels.flash_attention.tpu_steps import scalars_needed, tables
from pallas_kernels.hardware import Chip, chip, detect
from pallas_kernels.layouts import LANES, SCALAR_BYTES, SUBLANES, folded_width, round_up

NAME = "tpu"
PLATFORM = "tpu"
LAYOUTS = ("folded",)
MIB = 2**20
SMALLEST = 16  # queries; a bf16 register has 16 rows
LONGEST_TREE = 512


@dataclass(frozen=True)
class Config:
    """Tiles."""

    block_q: int  # queries of one block, which has G times as many rows
    block_k: int  # slots fetched together
    tile_k: int  # keys computed together; divides block_k
    ones: bool = False  # row sums in the matrix unit, by columns of ones beside the values; False: in the vector unit
    vmem_bytes: int | None = None  # VMEM to ask for; None: the compiler's limit


def supported(call: Call) -> str | None:
    """None, or why this kernel cannot do the call."""
    if call.slots % LANES:
        return f"the TPU kernel takes slots in multiples of {LANES}, got {call.slots}"
    if call.dtype not in ("float32", "bfloat16") or call.kv_dtype not in ("float32", "bfloat16", "int8"):
        return f"the TPU kernel takes float32 and bfloat16, and int8 keys, got {call.dtype} and {call.kv_dtype}"
    if call.tree and call.queries > LONGEST_TREE:
        return f"the TPU kernel takes trees of up to {LONGEST_TREE} tokens, got {call.queries}"
    on = detect("tpu")
    if 4 * scalars_needed(plan_of(call, heuristic(call, on), on)) > SCALAR_BYTES:
        return f"the scalars of {call.batch} rows do not fit the TPU's scalar memory: split the batch"
    return None


def lane_heads(call: Call) -> int:
    """KV heads in one group of lanes: the fewest that fill whole registers of K and of V, or all heads."""
    fewest = max(LANES // gcd(LANES, call.head_dim), LANES // gcd(LANES, call.value_dim))
    return fewest if fewest < call.kv_heads else call.kv_heads


def heuristic(call: Call, on: Chip | None) -> Config:
    """Tiles for a chip; None: a v5e.

    FLOPs: the matrix unit holds a tile of K or V while `rows` rows of queries stream through it; 2048 rows hide the
    loading of the tile. Bytes: a block of K and V is read once per `rows` rows, which is `rows` FLOPs per byte in bf16;
    a chip is bound by arithmetic above 240 (v5e) to 560 (v6e). VMEM: logits of 2048 x 512 take 4 MiB in f32, their
    weights and the accumulators as much again; K and V of 2048 slots of 128 take 2 MiB, double-buffered.
    Static loops are long, so that the vector unit works on one chunk of keys while the matrix unit works on the next.
    Loops that follow the rows get smaller blocks, so that less is masked. On 256 x 256 units row sums are free: they
    are columns of the product with V that a head of 128 leaves empty.
    Ranked by the compiler's static cycles on v5e, v5p and v6e (docs/kernel_figures.md); not measured on a device.
    """
    on = on or chip("v5e")
    heads = lane_heads(call)
    small = on.vmem_capacity_mib < 32
    rows = 2048 // min(heads, 4)
    if small or "float32" in (call.dtype, call.kv_dtype):
        rows //= 2
    # Columns of ones use the columns that the last tile of V leaves empty, if any.
    ones = call.value_dim % on.mxu != 0
    fixed = not (call.causal or call.lengths)
    wanted_k, wanted_tile = (2048, 512) if fixed else (1024, 512)
    if fixed and on.mxu == 128 and not small and heads == 1 and call.dtype == "bfloat16":
        rows, wanted_k, wanted_tile = rows // 2, 4096, 512 if on.cores == 1 else 1024
    if call.window is not None and call.window < wanted_k:
        wanted_k = wanted_tile = max(LANES, min(512, call.window // LANES * LANES))
    block_q = min(max(rows // call.group // SMALLEST * SMALLEST, SMALLEST), round_up(call.queries, SMALLEST))
    block_k = _divisor(call.slots, max(LANES, wanted_k // 2) if small else wanted_k)
    vmem = None if small else (48 if on.vmem_capacity_mib >= 96 else 32) * MIB
    return Config(block_q, block_k, _divisor(block_k, wanted_tile), ones, vmem)


def _divisor(slots: int, most: int) -> int:
    """The largest multiple of LANES up to `most` that divides `slots`."""
    return max(n for n in range(LANES, min(slots, most) + 1, LANES) if slots % n == 0)


def misfit(call: Call, config: Config) -> str | None:
    """None, or why a Config does not suit a call."""
    if call.slots % config.block_k or config.block_k % config.tile_k or config.tile_k % LANES:
        return f"block_k must divide the {call.slots} slots, and tile_k, in whole {LANES}, block_k"
    if config.block_q % SMALLEST:
        return f"block_q must be a multiple of {SMALLEST}"
    return None


def plan_of(call: Call, config: Config, on: Chip | None) -> Plan:
    """The static inputs of the kernel for this call."""
    mxu = on.mxu if on else LANES
    query_blocks = pl.cdiv(max(call.queries, SMALLEST), config.block_q)
    heads = lane_heads(call)
    cores = on.device_cores if on else 1
    alone = -(-call.kv_heads // heads) % cores == 0 or call.batch * query_blocks < cores
    steps = call.slots // config.block_k
    if call.window is not None:
        # In a ring the oldest and the newest positions may share a block: one step more than there are blocks.
        span = query_blocks * config.block_q if call.tree else config.block_q  # see `Plan.key_blocks`
        steps = min(steps + 1, (span + call.window - 2) // config.block_k + 2)
    extra = 0
    if config.ones and not call.int8:
        extra = round_up(call.value_dim + 1, mxu if call.value_dim % LANES == 0 else LANES) - call.value_dim
    compute = jnp.promote_types(call.dtype, "bfloat16" if call.int8 else call.kv_dtype)
    tree = round_up(call.queries, LANES) if call.tree else 0
    return Plan(call, config, heads, query_blocks, 1 if alone else cores, steps, extra, tree, jnp.dtype(compute))


def fetches(plan: Plan, query_blocks: int, start: int) -> tuple[int, int]:
    """Key blocks that the query blocks of one full row compute, and fetch: a repeated block is not fetched again."""
    call, tiles = plan.call, plan.config
    blocks, computed, fetched, before = call.slots // tiles.block_k, 0, 0, None
    for i in range(query_blocks):
        low = start + i * tiles.block_q
        first, last = 0, blocks - 1
        if call.causal:
            last = min(low + tiles.block_q - 1, call.slots - 1) // tiles.block_k
        if call.window is not None:
            first = min(max(low - call.window + 1, 0) // tiles.block_k, last)
        for block in range(first, last + 1):
            computed += 1
            fetched += block != before
            before = block
    return computed, fetched


def cost(plan: Plan) -> pl.CostEstimate:
    """The cost of full rows, with the queries at their end: the blocks that the grid fetches and writes."""
    call, tiles = plan.call, plan.config
    queries = max(call.queries, SMALLEST)
    groups = -(-call.kv_heads // plan.heads)
    query_blocks = pl.cdiv(queries, tiles.block_q)
    computed, fetched = fetches(plan, query_blocks, max(call.slots - call.queries, 0))
    io, kv = jnp.dtype(call.dtype).itemsize, jnp.dtype(call.kv_dtype).itemsize
    lanes = folded_width(call.kv_heads, call.head_dim) + folded_width(call.kv_heads, call.value_dim)
    moved = (
        fetched
        * tiles.block_k
        * (lanes * kv + (2 * 4 * groups * round_up(call.kv_heads, SUBLANES) if call.int8 else 0))
    )
    moved += queries * call.heads * (call.head_dim + call.value_dim) * io
    if call.return_lse:
        moved += queries * groups * plan.heads * call.group * 4
    if plan.tree:
        moved += groups * queries * plan.tree * 2
    pairs = computed * tiles.block_k * tiles.block_q * call.heads
    return pl.CostEstimate(
        flops=2 * call.batch * pairs * (call.head_dim + call.value_dim),
        transcendentals=call.batch * pairs,
        bytes_accessed=call.batch * moved,
    )


def run(arrays, call: Call, config: Config, interpret=False):
    """See `api.flash_attention`. Lays queries and results out around the kernel."""
    on = detect("tpu")
    plan = plan_of(call, config, on)
    q = arrays["q"]
    b, t, n, _ = q.shape
    queries = max(t, SMALLEST)
    q = jnp.pad(q, ((0, 0), (0, queries - t), (0, 0), (0, 0))).reshape(b, queries, -1)
    inputs = {"q": q, "k": arrays["k"], "v": arrays["v"]}
    if call.int8:
        inputs |= {"k_scale": arrays["k_scale"], "v_scale": arrays["v_scale"]}
    if plan.tree:
        edges = ((0, 0), (0, queries - t), (0, plan.tree - t))
        inputs["tree"] = jnp.pad(arrays["tree"].astype(jnp.bfloat16), edges)
    lengths = arrays["lengths"] if call.lengths else jnp.zeros_like(arrays["starts"])
    axes, found = tables(plan, arrays["starts"], lengths)
    scalars = {"starts": arrays["starts"], "lengths": lengths} | found
    if call.sinks:
        scalars["sinks"] = arrays["sinks"]
    groups = -(-call.kv_heads // plan.heads)
    grid = (plan.parts, groups, *axes)
    specs = _specs(plan, inputs)
    outputs = {"out": jax.ShapeDtypeStruct((b, queries, n * call.value_dim), q.dtype)}
    if call.return_lse:
        outputs["lse"] = jax.ShapeDtypeStruct((b, groups, queries, plan.heads * call.group), jnp.float32)
    scratch = {
        "queries": pltpu.VMEM((plan.heads, plan.rows, call.head_dim), plan.compute),
        "top": pltpu.VMEM((plan.heads, plan.rows, LANES), jnp.float32),
        "acc": pltpu.VMEM((plan.heads, plan.rows, call.value_dim + plan.extra), jnp.float32),
    }
    if not plan.extra:
        scratch["total"] = pltpu.VMEM((plan.heads, plan.rows, LANES), jnp.float32)
    arrays = inputs.values()
    if not interpret:  # else the compiler copies small arrays to VMEM, beside the tiles, and may run out of it
        arrays = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in arrays]
    results = pl.pallas_call(
        partial(body, plan, (*scalars, *inputs, *outputs, *scratch)),
        out_shape=tuple(outputs.values()),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[specs[name] for name in inputs],
            out_specs=tuple(specs[name] for name in outputs),
            scratch_shapes=list(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=config.vmem_bytes
        ),
        cost_estimate=cost(plan),
        interpret=interpret,
        name="flash_attention",
    )(*scalars.values(), *arrays)
    out = results[0][:, :t].reshape(b, t, n, call.value_dim)
    if not call.return_lse:
        return out
    lse = results[1].transpose(0, 2, 1, 3).reshape(b, queries, -1)
    return out, lse[:, :t, :n]


def _specs(plan: Plan, inputs: dict) -> dict[str, pl.BlockSpec]:
    """The block specs: what each grid step fetches and writes."""
    call, tiles = plan.call, plan.config
    width = plan.heads * call.group

    def queries(part, g, step, key, starts, lengths, *found):
        row, i, _ = plan.place(part, step, key, *found)
        return row, i, g

    def keys(part, g, step, key, starts, lengths, *found):
        row, _, slot = plan.place(part, step, key, *found)
        return row, slot, g

    def scales(part, g, step, key, starts, lengths, *found):
        row, _, slot = plan.place(part, step, key, *found)
        return row, 0, slot

    def lse(part, g, step, key, starts, lengths, *found):
        row, i, _ = plan.place(part, step, key, *found)
        return row, g, i, 0

    def tree(part, g, step, key, starts, lengths, *found):
        row, i, _ = plan.place(part, step, key, *found)
        return row, i, 0

    def lanes(name, dim):
        return plan.heads * dim if plan.heads < call.kv_heads else inputs[name].shape[2]

    specs = {
        "q": pl.BlockSpec((1, tiles.block_q, width * call.head_dim), queries),
        "k": pl.BlockSpec((1, tiles.block_k, lanes("k", call.head_dim)), keys),
        "v": pl.BlockSpec((1, tiles.block_k, lanes("v", call.value_dim)), keys),
        "out": pl.BlockSpec((1, tiles.block_q, width * call.value_dim), queries),
        "lse": pl.BlockSpec((1, 1, tiles.block_q, width), lse),
    }
    if call.int8:
        shape = (1, inputs["k_scale"].shape[1], tiles.block_k)
        specs |= {"k_scale": pl.BlockSpec(shape, scales), "v_scale": pl.BlockSpec(shape, scales)}
    if plan.tree:
        specs["tree"] = pl.BlockSpec((1, tiles.block_q, plan.tree), tree)
    return specs
