"""Decode attention as a Pallas kernel for TPU: v4, v5e, v5p, v6e and 7x.

A decode step is bound by the reading of K and V. The cache enters the kernel as it lies in HBM; every row costs the
tiles of 8 (f32), 16 (bf16) or 32 (int8) slots that its queries can see, once for all its query heads and queries.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int, Num

from pallas_kernels.attention.call import Call, describe
from pallas_kernels.attention.merge import merge
from pallas_kernels.decode_attention.tpu_kernel import Plan, Refs, body
from pallas_kernels.hardware import Chip
from pallas_kernels.layouts import LANES, SCALAR_BYTES, SUBLANES, Layout, fold, folded_width, round_up, unfold
from pallas_kernels.tiles import resolve

MAX_QUERIES = 16
TILE = {4: 8, 2: 16, 1: 32}  # slots of a tile in HBM by the bytes of an element


@dataclass(frozen=True)
class Config:
    """Tiles.

    Attributes:
      key_block: slots fetched together, a multiple of 128; two such blocks of K and of V lie in VMEM.
      compute_block: slots attended to at once, a multiple of 128 that divides key_block.
      splits: parts of a row's context, one for each core of the device.
    """

    key_block: int
    compute_block: int
    splits: int = 1

    def __post_init__(self):
        if self.key_block % LANES or self.compute_block % LANES or self.key_block % self.compute_block:
            raise ValueError(f"{self}: blocks must be multiples of {LANES}, and compute_block must divide key_block")
        if self.splits < 1:
            raise ValueError(f"{self}: splits must be at least 1")


def supported(call: Call) -> str | None:
    """None, or the reason why the TPU kernel cannot do the call."""
    kv = jnp.dtype(call.kv_dtype)
    if call.layout != "folded":
        return f"the TPU kernel reads the layout 'folded', not {call.layout!r}"
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
    # Where a row starts and ends, and its tree, whose last axis takes whole registers.
    if 4 * call.batch * (2 + (LANES if call.tree else 0)) > SCALAR_BYTES:
        return f"the scalars of {call.batch} rows do not fit the TPU's scalar memory: split the batch"
    return None


def heuristic(call: Call, chip: Chip | None) -> Config:
    """Tiles for a chip; None: as for a v5e.

    Bytes: neither block changes what is read, since only a row's own tiles are fetched. FLOPs: 2 T N (H + Hv) a key,
    for T*N/K up to some tens far below what the bandwidth leaves time for. What is left is latency: a step of the
    online softmax is one chain of matmul, maximum, exponential, matmul of some thousand cycles that nothing
    overlaps but the fetch of the next block. So a block should hold about 1 MiB of K and V, which takes 0.3 us
    (7x) to 1.3 us (v5e) to arrive. VMEM: two such blocks, and scores [rows of a pack, block] in f32 several times
    over, stay below 8 of the 16 MiB. Splits: where one device is several cores (v5p), each takes its part of every
    row, so that one long row fills the chip.
    """
    width = folded_width(call.kv_heads, call.head_dim) + folded_width(call.kv_heads, call.value_dim)
    token = width * jnp.dtype(call.kv_dtype).itemsize
    wanted = max(LANES, min((1 << 20) // token, 2048) // LANES * LANES)
    # A ring wraps between blocks only if they divide it; a cache that never wraps may take any block.
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
    """Why a Config does not suit a call, None if it does."""
    if call.window is not None and call.slots % config.key_block:
        return f"key_block must divide the ring's {call.slots} slots"
    return None


def plan_for(call: Call, config: Config, scale: float) -> Plan:
    """The kernel's static facts."""
    wide = jnp.float32 in (jnp.dtype(call.dtype), jnp.dtype(call.kv_dtype))
    shared = {f.name: getattr(call, f.name) for f in fields(Plan) if hasattr(call, f.name)}
    shared |= {f.name: getattr(config, f.name) for f in fields(config)}
    return Plan(
        **shared
        | {
            "tile": TILE[jnp.dtype(call.kv_dtype).itemsize],
            "scale": scale,
            "full": not call.lengths,
            "scaled": jnp.dtype(call.kv_dtype) == jnp.int8,
            "dtype": jnp.dtype(jnp.float32 if wide else jnp.bfloat16),
        }
    )


def cost(plan: Plan, call: Call) -> pl.CostEstimate:
    """Of full rows: their K and V (of a window's slots, whole tiles), scales, queries and results, once each."""
    kv, io = jnp.dtype(call.kv_dtype).itemsize, jnp.dtype(call.dtype).itemsize
    seen = plan.slots
    if plan.window:
        seen = min(seen, round_up(plan.window + plan.queries - 1, plan.tile) + plan.tile // 2)
    k_width = folded_width(plan.kv_heads, plan.head_dim)
    v_width = folded_width(plan.kv_heads, plan.value_dim)
    row = seen * (k_width + v_width) * kv + plan.rows * (k_width * io * plan.splits + v_width * io)
    if plan.scaled:
        row += 2 * 4 * round_up(plan.kv_heads, SUBLANES) * min(plan.slots, round_up(seen, LANES))
    if plan.splits > 1:
        row += plan.rows * (plan.splits * (v_width + LANES) * 4 - v_width * io)
    elif call.return_lse:
        row += plan.rows * LANES * 4
    pairs = plan.batch * plan.queries * call.heads * seen
    return pl.CostEstimate(
        flops=2 * pairs * (plan.head_dim + plan.value_dim), transcendentals=pairs, bytes_accessed=plan.batch * row
    )


def attention(
    q: Float[Array, "B T N H"],
    k: Num[Array, "B S C"],
    v: Num[Array, "B S Cv"],
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
    layout: Layout = "folded",
    kv_heads: int,
    value_dim: int | None = None,
    return_lse: bool = False,
    config: Config | None = None,
    interpret=False,
):
    """See `api.decode_attention`; K and V in the layout `folded`.

    Raises:
      ValueError: shapes that do not fit, or a Config that does not.
      NotImplementedError: a call that `supported` refuses, or a derivative.
    """
    call = describe(
        "decode_attention",
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
        raise NotImplementedError(f"decode_attention: {reason}; use implementation='xla'")
    config, _ = resolve("decode_attention", "tpu", call, config, sys.modules[__name__])
    plan = plan_for(call, config, scale)

    out, lse = _run(plan, call, q, k, v, starts, lengths, sinks, k_scale, v_scale, tree, interpret)
    return (out, lse) if return_lse else out


def _run(plan: Plan, call: Call, q, k, v, starts, lengths, sinks, k_scale, v_scale, tree, interpret):
    """Fold the queries, call the kernel, unfold and merge: all of it small beside K and V."""
    b, t, n, h = q.shape
    heads, group, rows = plan.kv_heads, plan.group, plan.rows
    width, value_width = k.shape[2], v.shape[2]
    folded = fold(q.reshape(b, t, heads, group, h).swapaxes(2, 3)).reshape(b, rows, width)
    scalars = {"starts": starts.astype(jnp.int32)}
    if lengths is not None:
        scalars["lengths"] = lengths.astype(jnp.int32)
    if tree is not None:
        scalars["bits"] = (tree.astype(jnp.int32) << jnp.arange(t)).sum(2, dtype=jnp.int32)
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    inputs = {"q": (folded, pl.BlockSpec((1, rows, width), lambda s, b, *_: (b, 0, 0))), "k": (k, hbm), "v": (v, hbm)}
    if plan.scaled:
        inputs |= {"k_scale": (k_scale, hbm), "v_scale": (v_scale, hbm)}
    lines = plan.pack * plan.padded_rows
    if sinks is not None:
        packed = _packed_sinks(plan, sinks)
        inputs["sinks"] = (packed, pl.BlockSpec(packed.shape, lambda s, b, *_: (0, 0, 0)))

    def result(lanes, dtype):
        spec = pl.BlockSpec((1, 1, rows, lanes), lambda s, b, *_: (s, b, 0, 0))
        return jax.ShapeDtypeStruct((plan.splits, b, rows, lanes), dtype), spec

    partial = plan.splits > 1
    outputs = {"out": result(value_width, jnp.float32 if partial else q.dtype)}
    if call.return_lse or partial:
        outputs["lse"] = result(LANES, jnp.float32)
    scratch = {
        "k_buffer": pltpu.VMEM((2, plan.key_block, width), k.dtype),
        "v_buffer": pltpu.VMEM((2, plan.key_block, value_width), v.dtype),
        "queries": pltpu.VMEM((len(plan.packs), lines, plan.pack * h), jnp.float32),
        "top": pltpu.VMEM((len(plan.packs), lines, LANES), jnp.float32),
        "total": pltpu.VMEM((len(plan.packs), lines, LANES), jnp.float32),
        "acc": pltpu.VMEM((len(plan.packs), lines, plan.pack * plan.value_dim), jnp.float32),
        "slot": pltpu.SMEM((1,), jnp.int32),
        "arrived": pltpu.SemaphoreType.DMA((2, 4)),
    }
    if plan.scaled:
        buffer = pltpu.VMEM((2, k_scale.shape[1], plan.key_block), jnp.float32)
        scratch |= {"k_scales": buffer, "v_scales": buffer}
    names = [*scalars, *inputs, *outputs, *scratch]

    def kernel(*refs):
        body(plan, Refs(**dict.fromkeys(f.name for f in fields(Refs)) | dict(zip(names, refs, strict=True))))

    call_kernel = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(plan.splits, b),
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=[spec for _, spec in outputs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[shape for shape, _ in outputs.values()],
        # Rows follow each other, since each fetches for the next; the splits are one for each core.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=cost(plan, call),
        interpret=interpret,
        name="decode_attention",
    )
    found = call_kernel(*scalars.values(), *(x for x, _ in inputs.values()))

    def spread(x, dim):
        return unfold(x, heads, dim).reshape(b, t, group, heads, dim).swapaxes(2, 3).reshape(b, t, n, dim)

    if partial:
        out, lse = _merged(plan, *found)
        return spread(out.astype(q.dtype), plan.value_dim), spread(lse, 1)[..., 0]
    return spread(found[0][0], plan.value_dim), spread(found[1][0], 1)[..., 0] if len(found) > 1 else None


def _merged(
    plan: Plan, out: Float[Array, "P B R C"], lse: Float[Array, "P B R lanes"]
) -> tuple[Float[Array, "B R K*Hv"], Float[Array, "B R K"]]:
    """The parts of a context as one, f32. Head by head on the lanes as the kernel wrote them: heads as an axis of their
    own would be laid out anew, once for each part and twice as wide as the result."""
    dim = plan.value_dim
    heads = [merge(out[..., k * dim : (k + 1) * dim], lse[..., k]) for k in range(plan.kv_heads)]
    return jnp.concatenate([values for values, _ in heads], -1), jnp.stack([total for _, total in heads], -1)


def _packed_sinks(plan: Plan, sinks: Float[Array, " N"]) -> Float[Array, "packs rows lanes"]:
    """The sink of each row of each pack, in every lane; rows of padding have none."""
    each = jnp.tile(sinks.astype(jnp.float32).reshape(plan.kv_heads, 1, plan.group), (1, plan.queries, 1))
    each = each.reshape(plan.kv_heads, plan.rows)
    padding = ((0, len(plan.packs) * plan.pack - plan.kv_heads), (0, plan.padded_rows - plan.rows))
    each = jnp.pad(each, padding, constant_values=-jnp.inf)
    each = each.reshape(len(plan.packs), plan.pack * plan.padded_rows, 1)
    return jnp.broadcast_to(each, (*each.shape[:2], LANES))
