"""Prefill attention as a Pallas kernel for GPU, through Triton: A100, L4, H100 and B200.

A program has one block of queries for one KV head; the G query heads stand beside one another in its rows, so that
even a short chunk fills the tensor cores. It loops over the key blocks that its queries can see, and masks only those
at the window's edge, on the diagonal and at the end of the row. A version for Hopper on Mosaic GPU has its place
beside this file.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int, Num

from pallas_kernels.attention.call import Call, describe
from pallas_kernels.flash_attention.gpu_kernel import Plan, Refs, body
from pallas_kernels.gradients import raising_under_grad
from pallas_kernels.hardware import Chip, chip
from pallas_kernels.layouts import Layout
from pallas_kernels.tiles import resolve

MOST_ELEMENTS = 2**31  # Pallas computes offsets in 32-bit integers with a sign
OPERANDS = ("starts", "lengths", "q", "k", "v", "k_scale", "v_scale", "sinks", "tree")


@dataclass(frozen=True)
class Config:
    """Tiles.

    Attributes:
      row_block: rows of a program, one a query and head; a power of two, at least 16.
      key_block: keys attended to at once; a power of two, at least 16.
      num_warps, num_stages: of Triton; a stage holds key_block keys and values in shared memory.
    """

    row_block: int
    key_block: int
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self):
        for name in ("row_block", "key_block"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{self}: {name} must be a power of two and at least 16")


def supported(call: Call) -> str | None:
    """None, or why this kernel cannot do the call."""
    if call.layout != "heads_last":
        return f"the GPU kernel reads the layout 'heads_last', not {call.layout!r}"
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
    """What the dots multiply: the queries' type, f32 where K and V are of another float type."""
    return jnp.dtype(call.dtype if call.kv_dtype in (call.dtype, "int8") else jnp.float32)


def heuristic(call: Call, on: Chip | None) -> Config:
    """Tiles for a chip; None: an A100.

    FLOPs: 128 rows of 16 bits make K and V count 128 FLOPs a byte, from L2, where the programs of a head meet.
    Shared memory: q takes row_block * H, a stage (H + Hv) * key_block, in the type of the dots; 128 rows and two
    stages of 64 keys of 128 in bf16 take 96 KiB, which L4's 99 just hold, others have room for a third stage.
    Registers: the accumulators of 128 rows of 128 take 64 a thread with 8 warps; wider heads take half the rows. f32
    has no tensor core, and its operands lie in registers: 32 rows.
    """
    on = on or chip("a100")
    dtype = compute_dtype(call)
    widest = pl.next_power_of_2(max(call.head_dim, call.value_dim))
    if dtype == jnp.float32:
        rows, keys = 32, 32 if widest <= 64 else 16
    else:
        rows, keys = (128, 64) if widest <= 128 else (64, 32)
    if call.tree:  # its addresses take registers: 128 rows spilled
        rows, keys = min(rows, 64), 32
    rows = min(rows, max(16, pl.next_power_of_2(call.queries * call.group)))
    keys = min(keys, max(16, pl.next_power_of_2(call.slots)))
    if call.kv_dtype == "int8" and widest < 128:  # spilled with 128 rows
        rows = min(rows, 64)
    stages = 3 if on.smem_kib >= 160 and dtype != jnp.float32 and widest <= 128 else 2
    # Small f32 heads leave little to do for 8 warps, which spilled on a B200.
    many = rows * widest >= 64 * 128 or (dtype == jnp.float32 and rows > 16 and widest > 16)
    return Config(rows, keys, num_warps=8 if many else 4, num_stages=stages)


def plan_for(call: Call, config: Config, scale: float) -> Plan:
    """The kernel's static facts."""
    shared = {f.name: getattr(call, f.name) for f in fields(Plan) if hasattr(call, f.name)}
    return Plan(
        **shared
        | {
            "row_block": config.row_block,
            "key_block": config.key_block,
            "scale": scale,
            "scaled": call.kv_dtype == "int8",
            "dtype": compute_dtype(call),
        }
    )


def key_blocks(plan: Plan, start: int) -> int:
    """Key blocks that the programs of one full row and KV head compute, its queries from `start` on."""
    blocks = 0
    for i in range(plan.row_blocks):
        first = start + i * plan.row_block // plan.group
        last = start + min((i + 1) * plan.row_block - 1, plan.rows - 1) // plan.group
        end = min(last + 1, plan.slots) if plan.causal else plan.slots
        begin = 0 if plan.window is None else max(first - plan.window + 1, 0)
        blocks += -(-end // plan.key_block) - begin // plan.key_block
    return blocks


def cost(plan: Plan, call: Call) -> pl.CostEstimate:
    """Of full rows, whose queries are their last: what the programs read and write; much of it comes from L2."""
    blocks = key_blocks(plan, max(plan.slots - plan.queries, 0)) * plan.kv_heads
    io, kv = jnp.dtype(call.dtype).itemsize, jnp.dtype(call.kv_dtype).itemsize
    wide = plan.head_dim + plan.value_dim
    moved = blocks * plan.key_block * (wide * kv + (8 if plan.scaled else 0))
    moved += plan.queries * call.heads * (wide * io + (4 if call.return_lse else 0))
    pairs = call.batch * blocks * plan.key_block * plan.row_block
    return pl.CostEstimate(flops=2 * pairs * wide, transcendentals=pairs, bytes_accessed=call.batch * moved)


def attention(
    q: Float[Array, "B T N H"],
    k: Num[Array, "B S K H"],
    v: Num[Array, "B S K Hv"],
    *,
    starts: Int[Array, " B"],
    lengths: Int[Array, " B"] | None,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    k_scale: Float[Array, "B Kp S"] | None = None,
    v_scale: Float[Array, "B Kp S"] | None = None,
    tree: Bool[Array, "B T T"] | None = None,
    layout: Layout = "heads_last",
    kv_heads: int | None = None,
    value_dim: int | None = None,
    return_lse: bool = False,
    config: Config | None = None,
    interpret=False,
):
    """See `api.flash_attention`; K and V in the layout `heads_last`.

    Raises:
      ValueError: shapes that do not fit, or a Config that does not.
      NotImplementedError: a call that `supported` refuses, or a derivative.
    """
    call = describe(
        "flash_attention",
        q,
        k,
        v,
        starts=starts,
        lengths=lengths,
        causal=causal,
        window=window,
        softcap=softcap,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        tree=tree,
        layout=layout,
        kv_heads=kv_heads,
        value_dim=value_dim,
        return_lse=return_lse,
    )
    if (reason := supported(call)) is not None:
        raise NotImplementedError(f"flash_attention: {reason}; use implementation='xla'")
    config, _ = resolve("flash_attention", "gpu", call, config, sys.modules[__name__])
    plan = plan_for(call, config, float(scale))

    def run(*arrays):
        return _run(dict(zip(OPERANDS, arrays, strict=True)), call, plan, config, interpret)

    tree = None if tree is None else tree.astype(jnp.int8)
    return raising_under_grad(run, "flash_attention")(starts, lengths, q, k, v, k_scale, v_scale, sinks, tree)


def _run(arrays: dict, call: Call, plan: Plan, config: Config, interpret):
    inputs = {name: x for name, x in arrays.items() if x is not None}
    q = inputs["q"]
    outputs = {"out": jax.ShapeDtypeStruct((*q.shape[:3], plan.value_dim), q.dtype)}
    if call.return_lse:
        outputs["lse"] = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
    names = [*inputs, *outputs]

    def kernel(*refs):
        body(plan, Refs(**dict.fromkeys(f.name for f in fields(Refs)) | dict(zip(names, refs, strict=True))))

    found = pl.pallas_call(
        kernel,
        grid=(plan.row_blocks, plan.kv_heads, call.batch),
        out_shape=list(outputs.values()),
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        cost_estimate=cost(plan, call),
        interpret=interpret,
        name="flash_attention",
    )(*inputs.values())
    return tuple(found) if call.return_lse else found[0]
