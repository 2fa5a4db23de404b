"""Prefill attention on TPU, in Pallas: the grid, what each step of it fetches, and the choice of its tiles.

The cache is read as it lies: `folded`, [B, S, C]. A block of keys is `block_k` slots of as many lanes as hold whole
heads (one head of 128, two of 64, eight of 80; the whole row where none do). The G query heads of a KV head stand
below one another, so that a block of keys is read and loaded into the matrix unit once for all of them. Queries and
result are [B, T, N*H], as projections make and take them.

The grid is (row, lanes, query block, key block). Its index maps stop at the blocks that a query block can see: what
lies after its last query, before its window or behind its row's end is neither fetched nor computed.
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
from pallas_kernels.hardware import Chip, chip, detect
from pallas_kernels.layouts import LANES, SCALAR_BYTES, SUBLANES, folded_width, round_up

NAME = "tpu"
PLATFORM = "tpu"
LAYOUTS = ("folded",)
MIB = 2**20
SMALLEST = 16  # queries: rows of a bf16 register
LONGEST_TREE = 512


@dataclass(frozen=True)
class Config:
    """Tiles."""

    block_q: int  # queries of one block; its matrices have G times as many rows
    block_k: int  # slots fetched at once
    tile_k: int  # keys of one matrix of logits; divides block_k
    ones: bool = False  # row sums by columns of ones behind the values, in the matrix unit; False: by the vector unit
    vmem_bytes: int | None = None  # what the kernel may use; None: the compiler's limit


def supported(call: Call) -> str | None:
    """None, or why this kernel cannot do the call."""
    if call.slots % LANES:
        return f"the TPU kernel takes slots in multiples of {LANES}, got {call.slots}"
    if call.dtype not in ("float32", "bfloat16") or call.kv_dtype not in ("float32", "bfloat16", "int8"):
        return f"the TPU kernel takes float32 and bfloat16, and int8 keys, got {call.dtype} and {call.kv_dtype}"
    if call.tree and call.queries > LONGEST_TREE:
        return f"the TPU kernel takes trees of up to {LONGEST_TREE} tokens, got {call.queries}"
    if 4 * 2 * call.batch > SCALAR_BYTES:
        return f"the scalars of {call.batch} rows do not fit the TPU's scalar memory: split the batch"
    return None


def lane_heads(call: Call) -> int:
    """KV heads in one block of lanes: as few as fill whole registers of K and of V, or all of them."""
    fewest = max(LANES // gcd(LANES, call.head_dim), LANES // gcd(LANES, call.value_dim))
    return fewest if fewest < call.kv_heads else call.kv_heads


def heuristic(call: Call, on: Chip | None) -> Config:
    """Tiles for a chip; None: a v5e.

    FLOPs: the matrix unit keeps its weights, a tile of K or V, while `rows` lines pass it: 2048 of them hide the
    loading. Bytes: every block of K and V is read once for `rows` lines, `rows` FLOPs a byte in bf16, above the 240
    (v5e) to 560 (v6e) that a chip needs to be bound by arithmetic. VMEM: a matrix of logits of 2048 x 512 is 4 MiB in
    f32, and its weights and the accumulators as much again; K and V of 2048 slots of 128 are 2 MiB with both buffers.
    Where loops are static, longer ones let the vector unit work on one chunk while the matrix unit has the next.
    Where they follow the rows, smaller blocks leave fewer of them to be masked. On 256 x 256 units the sums come
    free, as columns of the product with V that a head of 128 leaves empty.
    Ranked by the compiler's static cycles on v5e, v5p and v6e (docs/kernel_figures.md); not measured on a device.
    """
    on = on or chip("v5e")
    heads = lane_heads(call)
    small = on.vmem_capacity_mib < 32
    rows = 2048 // min(heads, 4)
    if small or "float32" in (call.dtype, call.kv_dtype):
        rows //= 2
    # Columns of ones fill up what the last tile of V leaves empty, if it leaves any.
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
    """Why a Config does not suit a call, None if it does."""
    if call.slots % config.block_k or config.block_k % config.tile_k or config.tile_k % LANES:
        return f"block_k must divide the {call.slots} slots, and tile_k, in whole {LANES}, block_k"
    if config.block_q % SMALLEST:
        return f"block_q must be a multiple of {SMALLEST}"
    return None


def plan_of(call: Call, config: Config, mxu: int) -> Plan:
    """Everything static of the kernel for this call."""
    steps = call.slots // config.block_k
    if call.window is not None:
        # A ring's oldest and newest positions may share a block, hence one block more than it has.
        steps = min(steps + 1, (config.block_q + call.window - 2) // config.block_k + 2)
    extra = 0
    if config.ones and not call.int8:
        extra = round_up(call.value_dim + 1, mxu if call.value_dim % LANES == 0 else LANES) - call.value_dim
    compute = jnp.promote_types(call.dtype, "bfloat16" if call.int8 else call.kv_dtype)
    tree = round_up(call.queries, LANES) if call.tree else 0
    return Plan(call, config, lane_heads(call), steps, extra, tree, jnp.dtype(compute))


def fetches(plan: Plan, query_blocks: int, start: int) -> tuple[int, int]:
    """Key blocks that one full row's query blocks compute, and those that are fetched: not twice in a run."""
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
    """Of full rows, whose queries are their last: the blocks that the grid fetches and writes."""
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
    """See `api.flash_attention`: lay queries out, call the kernel, and lay its results out."""
    on = detect("tpu")
    plan = plan_of(call, config, on.mxu if on else LANES)
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
    scalars = {"starts": arrays["starts"], "lengths": lengths}
    if call.sinks:
        scalars["sinks"] = arrays["sinks"]
    groups = -(-call.kv_heads // plan.heads)
    grid = (b, groups, pl.cdiv(queries, config.block_q), plan.steps)
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
    if not interpret:  # else the compiler moves small ones to VMEM whole, beside the tiles, and may run out of it
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
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=config.vmem_bytes
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
    """What each grid step fetches and writes."""
    call, tiles = plan.call, plan.config
    blocks = call.slots // tiles.block_k
    width = plan.heads * call.group

    def slot_block(b, i, j, starts, lengths):
        if plan.static:
            return j
        first, last, live = plan.key_blocks(starts[b], plan.length(lengths, b), i)
        return jnp.where(live, jnp.minimum(first + j, last), last) % blocks

    def queries(b, g, i, j, *_):
        return b, i, g

    def keys(b, g, i, j, starts, lengths, *_):
        return b, slot_block(b, i, j, starts, lengths), g

    def scales(b, g, i, j, starts, lengths, *_):
        return b, 0, slot_block(b, i, j, starts, lengths)

    def lanes(name, dim):
        return plan.heads * dim if plan.heads < call.kv_heads else inputs[name].shape[2]

    specs = {
        "q": pl.BlockSpec((1, tiles.block_q, width * call.head_dim), queries),
        "k": pl.BlockSpec((1, tiles.block_k, lanes("k", call.head_dim)), keys),
        "v": pl.BlockSpec((1, tiles.block_k, lanes("v", call.value_dim)), keys),
        "out": pl.BlockSpec((1, tiles.block_q, width * call.value_dim), queries),
        "lse": pl.BlockSpec((1, 1, tiles.block_q, width), lambda b, g, i, j, *_: (b, g, i, 0)),
    }
    if call.int8:
        shape = (1, inputs["k_scale"].shape[1], tiles.block_k)
        specs |= {"k_scale": pl.BlockSpec(shape, scales), "v_scale": pl.BlockSpec(shape, scales)}
    if plan.tree:
        specs["tree"] = pl.BlockSpec((1, tiles.block_q, plan.tree), lambda b, g, i, j, *_: (b, i, 0))
    return specs
