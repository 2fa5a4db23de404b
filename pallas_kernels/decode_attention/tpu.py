"""Decode attention as a Pallas kernel for TPU: v4, v5e, v5p, v6e and 7x.

Reading K and V bounds a decode step. The cache stays in HBM, and the kernel reads it in place: per row the tiles of 8
(f32), 16 (bf16) or 32 (int8) slots that its queries see, once for all its queries and query heads.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.attention.call import Call
from pallas_kernels.attention.merge import merge
from pallas_kernels.decode_attention.tpu_kernel import Plan, Refs, body
from pallas_kernels.hardware import Chip
from pallas_kernels.layouts import LANES, SCALAR_BYTES, SUBLANES, fold, folded_width, round_up, unfold
from pallas_kernels.masking import tree_bits

NAME = "tpu"
PLATFORM = "tpu"
LAYOUTS = ("folded",)
MAX_QUERIES = 16
TILE = {4: 8, 2: 16, 1: 32}  # bytes of an element: slots of a tile in HBM


@dataclass(frozen=True)
class Config:
    """Tiles.

    Attributes:
      block_k: slots fetched together, a multiple of 128; VMEM holds two such blocks of K and of V.
      tile_k: slots computed together, a multiple of 128 that divides block_k.
      splits: parts of a row's context, one per core of the device.
    """

    block_k: int
    tile_k: int
    splits: int = 1

    def __post_init__(self):
        if self.block_k % LANES or self.tile_k % LANES or self.block_k % self.tile_k:
            raise ValueError(f"{self}: blocks must be multiples of {LANES}, and tile_k must divide block_k")
        if self.splits < 1:
            raise ValueError(f"{self}: splits must be at least 1")


def supported(call: Call) -> str | None:
    """None, or why the TPU kernel cannot do the call."""
    kv = jnp.dtype(call.kv_dtype)
    if jnp.dtype(call.dtype) not in (jnp.bfloat16, jnp.float32):
        return f"the TPU kernel takes queries in bfloat16 or float32, not {call.dtype}"
    if kv not in (jnp.bfloat16, jnp.float32, jnp.int8):
        return f"the TPU kernel takes K and V in bfloat16, float32 or int8, not {call.kv_dtype}"
    if call.slots % LANES:
        return f"the TPU kernel needs a multiple of {LANES} slots, not {call.slots}"
    if call.queries > MAX_QUERIES:
        return f"decode takes at most {MAX_QUERIES} queries a row, not {call.queries}: use flash_attention"
    if call.kv_heads > LANES:
        return f"the TPU kernel takes at most {LANES} KV heads, not {call.kv_heads}"
    # Two scalars per row, and its tree, whose last axis is padded to whole registers.
    if 4 * call.batch * (2 + (LANES if call.tree else 0)) > SCALAR_BYTES:
        return f"the scalars of {call.batch} rows do not fit the TPU's scalar memory: split the batch"
    return None


def heuristic(call: Call, chip: Chip | None) -> Config:
    """Tiles for a chip; None: a v5e.

    Bytes: the tiles do not change them, since only a row's own slots are fetched.
    FLOPs: 2 T N (H + Hv) per key. Up to some tens of queries per KV head, they take far less time than the fetch.
    Latency: a step of the online softmax is one chain (matmul, maximum, exponential, matmul) of some thousand cycles,
    which only the fetch of the next block overlaps. So a block holds about 1 MiB of K and V, which takes 0.3 us (7x) to
    1.3 us (v5e) to arrive.
    VMEM: two such blocks, and a few copies of the logits [rows of a pack, block] in f32, take less than 8 of 16 MiB.
    Splits: where a device has several cores (v5p), each takes a part of every row, so that one long row fills the chip.
    """
    width = folded_width(call.kv_heads, call.head_dim) + folded_width(call.kv_heads, call.value_dim)
    token = width * jnp.dtype(call.kv_dtype).itemsize
    wanted = max(LANES, min((1 << 20) // token, 2048) // LANES * LANES)
    # Blocks must divide a ring, so that it wraps between two of them. A cache that never wraps takes any block.
    fitting = [n for n in range(LANES, min(wanted, call.slots) + 1, LANES) if call.slots % n == 0]
    block = fitting[-1]
    if call.window is None and block < wanted // 2:
        block = min(wanted, call.slots)
    rows = call.queries * call.heads
    compute = max(
        n for n in range(LANES, block + 1, LANES) if block % n == 0 and (n == LANES or rows * n * 4 <= 1 << 19)
    )
    return Config(block, compute, splits=chip.cores // chip.devices if chip else 1)


def misfit(call: Call, config: Config) -> str | None:
    """None, or why a Config does not suit a call."""
    if call.window is not None and call.slots % config.block_k:
        return f"block_k must divide the ring's {call.slots} slots"
    return None


def plan_for(call: Call, config: Config) -> Plan:
    """The static inputs of the kernel."""
    wide = jnp.float32 in (jnp.dtype(call.dtype), jnp.dtype(call.kv_dtype))
    dtype = jnp.dtype(jnp.float32 if wide else jnp.bfloat16)
    return Plan(call, config, TILE[jnp.dtype(call.kv_dtype).itemsize], dtype)


def cost(plan: Plan) -> pl.CostEstimate:
    """The cost of full rows: K and V in whole tiles (a window's only), scales, queries and results, once each."""
    call, splits = plan.call, plan.config.splits
    kv, io = jnp.dtype(call.kv_dtype).itemsize, jnp.dtype(call.dtype).itemsize
    seen = call.slots
    if call.window:
        seen = min(seen, round_up(call.window + call.queries - 1, plan.tile) + plan.tile // 2)
    k_width = folded_width(call.kv_heads, call.head_dim)
    v_width = folded_width(call.kv_heads, call.value_dim)
    row = seen * (k_width + v_width) * kv + plan.rows * (k_width * io * splits + v_width * io)
    if call.int8:
        row += 2 * 4 * round_up(call.kv_heads, SUBLANES) * min(call.slots, round_up(seen, LANES))
    if splits > 1:
        row += plan.rows * (splits * (v_width + LANES) * 4 - v_width * io)
    elif call.return_lse:
        row += plan.rows * LANES * 4
    pairs = call.batch * call.queries * call.heads * seen
    return pl.CostEstimate(
        flops=2 * pairs * (call.head_dim + call.value_dim), transcendentals=pairs, bytes_accessed=call.batch * row
    )


def run(arrays, call: Call, config: Config, interpret=False):
    """See `api.decode_attention`. Folds the queries, unfolds and merges the results: small arrays beside K and V."""
    plan = plan_for(call, config)
    q, k, v, tree = (arrays.get(name) for name in ("q", "k", "v", "tree"))
    b, t, n, h = q.shape
    heads, group, rows = call.kv_heads, call.group, plan.rows
    width, value_width = k.shape[2], v.shape[2]
    folded = fold(q.reshape(b, t, heads, group, h).swapaxes(2, 3)).reshape(b, rows, width)
    scalars = {name: arrays[name] for name in ("starts", "lengths") if name in arrays}
    if tree is not None:
        scalars["bits"] = tree_bits(tree)
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    inputs = {"q": (folded, pl.BlockSpec((1, rows, width), lambda s, b, *_: (b, 0, 0))), "k": (k, hbm), "v": (v, hbm)}
    inputs |= {name: (arrays[name], hbm) for name in ("k_scale", "v_scale") if name in arrays}
    lines = plan.pack * plan.padded_rows
    if call.sinks:
        packed = _packed_sinks(plan, arrays["sinks"])
        inputs["sinks"] = (packed, pl.BlockSpec(packed.shape, lambda s, b, *_: (0, 0, 0)))

    def result(lanes, dtype):
        spec = pl.BlockSpec((1, 1, rows, lanes), lambda s, b, *_: (s, b, 0, 0))
        return jax.ShapeDtypeStruct((config.splits, b, rows, lanes), dtype), spec

    partial = config.splits > 1
    outputs = {"out": result(value_width, jnp.float32 if partial else q.dtype)}
    if call.return_lse or partial:
        outputs["lse"] = result(LANES, jnp.float32)
    scratch = {
        "k_buffer": pltpu.VMEM((2, config.block_k, width), k.dtype),
        "v_buffer": pltpu.VMEM((2, config.block_k, value_width), v.dtype),
        "queries": pltpu.VMEM((len(plan.packs), lines, plan.pack * h), jnp.float32),
        "top": pltpu.VMEM((len(plan.packs), lines, LANES), jnp.float32),
        "total": pltpu.VMEM((len(plan.packs), lines, LANES), jnp.float32),
        "acc": pltpu.VMEM((len(plan.packs), lines, plan.pack * call.value_dim), jnp.float32),
        "slot": pltpu.SMEM((1,), jnp.int32),
        "arrived": pltpu.SemaphoreType.DMA((2, 4)),
    }
    if call.int8:
        buffer = pltpu.VMEM((2, arrays["k_scale"].shape[1], config.block_k), jnp.float32)
        scratch |= {"k_scales": buffer, "v_scales": buffer}
    names = [*scalars, *inputs, *outputs, *scratch]

    def kernel(*refs):
        body(plan, Refs(**dict.fromkeys(f.name for f in fields(Refs)) | dict(zip(names, refs, strict=True))))

    call_kernel = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(config.splits, b),
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=[spec for _, spec in outputs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[shape for shape, _ in outputs.values()],
        # Rows run in order, since each prefetches for the next; splits run in parallel, one per core.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=cost(plan),
        interpret=interpret,
        name="decode_attention",
    )
    found = call_kernel(*scalars.values(), *(x for x, _ in inputs.values()))

    def spread(x, dim):
        return unfold(x, heads, dim).reshape(b, t, group, heads, dim).swapaxes(2, 3).reshape(b, t, n, dim)

    if partial:
        out, lse = _merged(plan, *found)
        out, lse = spread(out.astype(q.dtype), call.value_dim), spread(lse, 1)[..., 0]
    else:
        out = spread(found[0][0], call.value_dim)
        lse = spread(found[1][0], 1)[..., 0] if call.return_lse else None
    return (out, lse) if call.return_lse else out


def _merged(
    plan: Plan, out: Float[Array, "P B R C"], lse: Float[Array, "P B R lanes"]
) -> tuple[Float[Array, "B R K*Hv"], Float[Array, "B R K"]]:
    """Merge the parts of a context, in f32. Heads stay folded in the lanes, as the kernel wrote them: an axis of heads
    would make XLA re-lay each part, at twice the width of the result."""
    dim = plan.call.value_dim
    heads = [merge(out[..., k * dim : (k + 1) * dim], lse[..., k]) for k in range(plan.call.kv_heads)]
    return jnp.concatenate([values for values, _ in heads], -1), jnp.stack([total for _, total in heads], -1)


def _packed_sinks(plan: Plan, sinks: Float[Array, " N"]) -> Float[Array, "packs rows lanes"]:
    """Each row's sink, per pack and in every lane; -inf for rows of padding."""
    each = jnp.tile(
        sinks.astype(jnp.float32).reshape(plan.call.kv_heads, 1, plan.call.group), (1, plan.call.queries, 1)
    )
    each = each.reshape(plan.call.kv_heads, plan.rows)
    padding = ((0, len(plan.packs) * plan.pack - plan.call.kv_heads), (0, plan.padded_rows - plan.rows))
    each = jnp.pad(each, padding, constant_values=-jnp.inf)
    each = each.reshape(len(plan.packs), plan.pack * plan.padded_rows, 1)
    return jnp.broadcast_to(each, (*each.shape[:2], LANES))
