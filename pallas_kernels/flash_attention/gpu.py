"""Prefill attention as a Pallas kernel for GPU, through Triton: A100, L4, H100 and B200.

A program takes one block of queries for one KV head. Its rows are the G query heads of each query, so that even a
short chunk fills the tensor cores. It loops over the key blocks that its queries see, and masks only those at the
window's edge, on the diagonal and at the end of the row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.attention.call import Call
from pallas_kernels.flash_attention.gpu_kernel import Plan, Refs, body
from pallas_kernels.hardware import Chip, chip
from pallas_kernels.masking import tree_depths

NAME = "gpu"
PLATFORM = "gpu"
LAYOUTS = ("heads_last",)
MOST_ELEMENTS = 2**31  # Pallas computes offsets in signed 32-bit integers


@dataclass(frozen=True)
class Config:
    """Tiles.

    Attributes:
      block_rows: rows of a program, one per query and head; a power of two, at least 16.
      block_k: keys of one step; a power of two, at least 16.
      num_warps, num_stages: Triton's; a stage holds block_k keys and values in shared memory.
    """

    block_rows: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self):
        for name in ("block_rows", "block_k"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{self}: {name} must be a power of two and at least 16")


def supported(call: Call) -> str | None:
    """None, or why this kernel cannot do the call."""
    if call.dtype not in ("bfloat16", "float16", "float32"):
        return f"the GPU kernel takes queries in bfloat16, float16 or float32, not {call.dtype}"
    if call.kv_dtype not in ("bfloat16", "float16", "float32", "int8"):
        return f"the GPU kernel takes K and V in bfloat16, float16, float32 or int8, not {call.kv_dtype}"
    if max(call.head_dim, call.value_dim) > 256:
        return f"the GPU kernel takes heads of at most 256, not {max(call.head_dim, call.value_dim)}"
    for what, elements in (("K or V", call.slots * call.kv_heads), ("the queries", call.queries * call.heads)):
        elements *= call.batch * max(call.head_dim, call.value_dim)
        if elements > MOST_ELEMENTS:
            return f"offsets into {elements} elements of {what} do not fit the 32 bits that Pallas gives them"
    return None


def compute_dtype(call: Call) -> jnp.dtype:
    """The operand type of the dots: the queries', or f32 if K and V have another float type."""
    return jnp.dtype(call.dtype if call.kv_dtype in (call.dtype, "int8") else jnp.float32)


def heuristic(call: Call, on: Chip | None) -> Config:
    """Tiles for a chip; None: an A100.

    FLOPs: with 128 rows, each byte of K and V in 16 bits gives 128 FLOPs. They come from L2, which the programs of a
    head share.
    Shared memory, in the type of the dots: block_rows * H for q, (H + Hv) * block_k per stage. In bf16, 128 rows and
    two stages of 64 keys of 128 take 96 KiB: L4 has 99, the others have room for a third stage.
    Registers: with 8 warps, the accumulators of 128 rows of 128 take 64 per thread; wider heads get half the rows. f32
    has no tensor core, and its operands stay in registers: 32 rows.
    """
    on = on or chip("a100")
    dtype = compute_dtype(call)
    widest = pl.next_power_of_2(max(call.head_dim, call.value_dim))
    if dtype == jnp.float32:
        rows, keys = 32, 32 if widest <= 64 else 16
    else:
        rows, keys = (128, 64) if widest <= 128 else (64, 32)
    if call.tree:  # the tree's addresses take registers: 128 rows spilled
        rows, keys = min(rows, 64), 32
    rows = min(rows, max(16, pl.next_power_of_2(call.queries * call.group)))
    keys = min(keys, max(16, pl.next_power_of_2(call.slots)))
    if call.kv_dtype == "int8" and widest < 128:  # spilled with 128 rows
        rows = min(rows, 64)
    stages = 3 if on.smem_kib >= 160 and dtype != jnp.float32 and widest <= 128 else 2
    # Small f32 heads get 4 warps: with 8, which have little to do there, a B200 spilled.
    many = rows * widest >= 64 * 128 or (dtype == jnp.float32 and rows > 16 and widest > 16)
    return Config(rows, keys, num_warps=8 if many else 4, num_stages=stages)


def key_blocks(plan: Plan, start: int) -> int:
    """Key blocks that the programs of one full row and KV head compute; its queries begin at position `start`."""
    call, tiles = plan.call, plan.config
    blocks = 0
    for i in range(plan.row_blocks):
        first = start + i * tiles.block_rows // call.group
        last = start + min((i + 1) * tiles.block_rows - 1, plan.rows - 1) // call.group
        end = min(last + 1, call.slots) if call.causal else call.slots
        begin = 0 if call.window is None else max(first - call.window + 1, 0)
        blocks += -(-end // tiles.block_k) - begin // tiles.block_k
    return blocks


def cost(plan: Plan) -> pl.CostEstimate:
    """The cost of full rows, with the queries at their end: all loads and stores, also those that L2 serves."""
    call, tiles = plan.call, plan.config
    blocks = key_blocks(plan, max(call.slots - call.queries, 0)) * call.kv_heads
    io, kv = jnp.dtype(call.dtype).itemsize, jnp.dtype(call.kv_dtype).itemsize
    wide = call.head_dim + call.value_dim
    moved = blocks * tiles.block_k * (wide * kv + (8 if call.int8 else 0))
    moved += call.queries * call.heads * (wide * io + (4 if call.return_lse else 0))
    pairs = call.batch * blocks * tiles.block_k * tiles.block_rows
    return pl.CostEstimate(flops=2 * pairs * wide, transcendentals=pairs, bytes_accessed=call.batch * moved)


def run(arrays, call: Call, config: Config, interpret=False):
    """See `api.flash_attention`."""
    plan = Plan(call, config, compute_dtype(call))
    order = ("starts", "lengths", "q", "k", "v", "k_scale", "v_scale", "sinks", "tree")
    inputs = {name: arrays[name] for name in order if name in arrays}
    if call.tree:
        inputs["tree"] = inputs["tree"].astype(jnp.int8)
        if call.window is not None:
            inputs["depths"] = tree_depths(arrays["tree"])
    q = inputs["q"]
    outputs = {"out": jax.ShapeDtypeStruct((*q.shape[:3], call.value_dim), q.dtype)}
    if call.return_lse:
        outputs["lse"] = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
    names = [*inputs, *outputs]

    def kernel(*refs):
        body(plan, Refs(**dict.fromkeys(f.name for f in fields(Refs)) | dict(zip(names, refs, strict=True))))

    found = pl.pallas_call(
        kernel,
        grid=(plan.row_blocks, call.kv_heads, call.batch),
        out_shape=list(outputs.values()),
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        cost_estimate=cost(plan),
        interpret=interpret,
        name="flash_attention",
    )(*inputs.values())
    return tuple(found) if call.return_lse else found[0]
