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
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.call import Call
from pallas_kernels.attention.merge import merge
from pallas_kernels.decode_attention.tpu_fetch import Plan, Refs
from pallas_kernels.decode_attention.tpu_kernel import body
from pallas_kernels.hardware import Chip
from pallas_kernels.layouts import LANES, SCALAR_BYTES, SUBLANES, TILE_ROWS, fold, folded_width, round_up, unfold
from pallas_kernels.masking import tree_bits

NAME = "tpu"
PLATFORM = "tpu"
LAYOUTS = ("folded",)
MAX_QUERIES = 16


@dataclass(frozen=True)
class Config:
    """Tiles.

    Attributes:
      block_k: slots fetched together, a multiple of 128; VMEM holds two such blocks of K and of V.
      tile_k: slots computed together, a multiple of 128 that divides block_k.
      splits: cores of the device that share the work: each takes a part of every row's context, or with a window a
        part of the rows.
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
    Bundles: a tile's softmax costs some hundred bundles beside those of its keys. Llama 3 8B on a v6e takes 735 bundles
    for 256 keys in tiles of 256, 475 in tiles of 512 and 435 in tiles of 1024; the memory takes 1119 cycles. Larger
    tiles compute more slots that a short row does not hold. So a tile has 512 keys, and more where there are few
    queries: as many as make 64 KiB of logits.
    Latency: a step of the online softmax is one chain (matmul, maximum, exponential, matmul), which only the fetch of
    the next block overlaps. So a block holds up to 4 MiB of K and V, and several tiles.
    VMEM: two such blocks, and a few copies of the logits [rows of a pack, tile] in f32, take less than 12 of 16 MiB.
    Splits: where a device has several cores (v5p), each takes a part of every row, so that one long row fills the chip;
    with a window, whole rows.
    """
    wanted = wanted_block(call)
    # Blocks must divide a ring, so that it wraps between two of them. A cache that never wraps takes any block.
    fitting = [n for n in range(LANES, min(wanted, call.slots) + 1, LANES) if call.slots % n == 0]
    block = fitting[-1]
    if call.window is None and block < wanted // 2:
        block = min(wanted, call.slots)
    return Config(block, tile_of(call, block), splits_on(chip))


def wanted_block(call: Call) -> int:
    """Slots of a block, see `heuristic`; a window fills one or two blocks."""
    width = folded_width(call.kv_heads, call.head_dim) + folded_width(call.kv_heads, call.value_dim)
    token = width * jnp.dtype(call.kv_dtype).itemsize
    most = 2048 if call.window is None else round_up(min(call.window, 2048), LANES)
    return max(LANES, min((4 << 20) // token, most) // LANES * LANES)


def splits_on(chip: Chip | None) -> int:
    """One part of a context for each core of a device."""
    return chip.device_cores if chip else 1


def tile_of(call: Call, block: int) -> int:
    """Keys computed together: see `heuristic`. It divides the block."""
    rows = call.queries * call.heads
    most = max(min(512, (1 << 19) // (4 * rows)), (1 << 16) // (4 * rows), LANES)
    return max(n for n in range(LANES, block + 1, LANES) if block % n == 0 and (n == LANES or n <= most))


def misfit(call: Call, config: Config) -> str | None:
    """None, or why a Config does not suit a call."""
    if call.window is not None and call.slots % config.block_k:
        return f"block_k must divide the ring's {call.slots} slots"
    return None


def plan_for(call: Call, config: Config) -> Plan:
    """The static inputs of the kernel."""
    wide = jnp.float32 in (jnp.dtype(call.dtype), jnp.dtype(call.kv_dtype))
    dtype = jnp.dtype(jnp.float32 if wide else jnp.bfloat16)
    return Plan(call, config, TILE_ROWS[jnp.dtype(call.kv_dtype).itemsize], dtype)


def vector_bytes(plan: Plan) -> int:
    """Bytes of a row's queries, results and log-sum-exps; parts of a context are in f32, each with log-sum-exps."""
    call, parts = plan.call, plan.parts
    k_width, v_width = (folded_width(call.kv_heads, n) for n in (call.head_dim, call.value_dim))
    io = jnp.dtype(call.dtype).itemsize
    written = parts * (v_width + LANES) * 4 if parts > 1 else v_width * io + 4 * LANES * call.return_lse
    return plan.rows * (parts * k_width * io + written)


def cost(plan: Plan) -> pl.CostEstimate:
    """The cost of full rows: K and V in whole tiles (a window's only), scales, queries and results, once each."""
    call, kv = plan.call, jnp.dtype(plan.call.kv_dtype).itemsize
    seen = call.slots
    if call.window:
        seen = min(seen, round_up(call.window + call.queries - 1, plan.tile) + plan.tile // 2)
    width = folded_width(call.kv_heads, call.head_dim) + folded_width(call.kv_heads, call.value_dim)
    row = seen * width * kv + vector_bytes(plan)
    if call.int8:
        row += 2 * 4 * round_up(call.kv_heads, SUBLANES) * min(call.slots, round_up(seen, LANES))
    pairs = call.batch * call.queries * call.heads * seen
    return pl.CostEstimate(
        flops=2 * pairs * (call.head_dim + call.value_dim), transcendentals=pairs, bytes_accessed=call.batch * row
    )


def run(arrays, call: Call, config: Config, interpret=False):
    """See `api.decode_attention`."""
    plan = plan_for(call, config)
    scalars = {name: arrays[name] for name in ("starts", "lengths") if name in arrays}
    if arrays.get("tree") is not None:
        scalars["bits"] = tree_bits(arrays["tree"])
    out, lse = attend(plan, arrays, scalars, cost(plan), interpret)
    return (out, lse) if call.return_lse else out


def attend(
    plan: Plan, arrays, scalars: dict[str, Int[Array, ...]], estimate: pl.CostEstimate, interpret
) -> tuple[Float[Array, "P T N Hv"], Float[Array, "P T N"] | None]:
    """Call the kernel. Folds the queries, unfolds and merges the results: small arrays beside K and V.

    Args:
      arrays: q [Q, T, N, H], k and v, and where there are any k_scale, v_scale and sinks.
      scalars: what the kernel reads before all else, by the names of `Refs`. With `rows`, row r reads its queries at
        q[rows[r]] and writes its results there; rows[r] = Q: it has none. Without, q has a place for each row.

    Returns:
      Results and their log-sum-exps, if the call asks for them, for Q places, and with `rows` one more.
    """
    call, q = plan.call, arrays["q"]
    places, t, n, h = q.shape
    heads, group = call.kv_heads, call.group
    folded = fold(q.reshape(places, t, heads, group, h).swapaxes(2, 3)).reshape(places, plan.rows, -1)
    which = list(scalars).index("rows") if "rows" in scalars else None

    def place(core, step, prefetched):
        row = core * plan.steps + step if plan.by_row else step
        return row if which is None else prefetched[which][row]

    def queries(core, step, *prefetched):
        return jnp.minimum(place(core, step, prefetched), places - 1), 0, 0

    def results(core, step, *prefetched):
        return core if plan.parts > 1 else 0, place(core, step, prefetched), 0, 0

    hbm = pl.BlockSpec(memory_space=pl.ANY)
    inputs = {"q": (folded, pl.BlockSpec((1, plan.rows, folded.shape[2]), queries))}
    inputs |= {name: (arrays[name], hbm) for name in ("k", "v", "k_scale", "v_scale") if name in arrays}
    if call.sinks:
        packed = _packed_sinks(plan, arrays["sinks"])
        inputs["sinks"] = (packed, pl.BlockSpec(packed.shape, lambda s, b, *_: (0, 0, 0)))
    written = places + (which is not None)

    def result(lanes, dtype):
        spec = pl.BlockSpec((1, 1, plan.rows, lanes), results)
        return jax.ShapeDtypeStruct((plan.parts, written, plan.rows, lanes), dtype), spec

    partial = plan.parts > 1
    outputs = {"out": result(arrays["v"].shape[2], jnp.float32 if partial else q.dtype)}
    if call.return_lse or partial:
        outputs["lse"] = result(LANES, jnp.float32)
    found = _kernel(plan, scalars, inputs, outputs, estimate, interpret)

    def spread(x, dim):
        return unfold(x, heads, dim).reshape(written, t, group, heads, dim).swapaxes(2, 3).reshape(written, t, n, dim)

    if partial:
        out, lse = _merged(plan, *found)
        return spread(out.astype(q.dtype), call.value_dim), spread(lse, 1)[..., 0] if call.return_lse else None
    return spread(found[0][0], call.value_dim), spread(found[1][0], 1)[..., 0] if call.return_lse else None


def _kernel(plan: Plan, scalars, inputs, outputs, estimate: pl.CostEstimate, interpret):
    """The results of the kernel, in the order of `outputs`. Inputs come with their specs, outputs with theirs."""
    call, config = plan.call, plan.config
    k, v = inputs["k"][0], inputs["v"][0]
    lines = (len(plan.packs), plan.lines)
    scratch = {
        "k_buffer": pltpu.VMEM((2, config.block_k, k.shape[2]), k.dtype),
        "v_buffer": pltpu.VMEM((2, config.block_k, v.shape[2]), v.dtype),
        "queries": pltpu.VMEM((*lines, plan.pack * call.head_dim), jnp.float32),
        "top": pltpu.VMEM((*lines, LANES), jnp.float32),
        "total": pltpu.VMEM((*lines, LANES), jnp.float32),
        "acc": pltpu.VMEM((*lines, plan.pack * call.value_dim), jnp.float32),
        "slot": pltpu.SMEM((1,), jnp.int32),
        "arrived": pltpu.SemaphoreType.DMA((2, 4)),
    }
    if call.int8:
        buffer = pltpu.VMEM((2, inputs["k_scale"][0].shape[1], config.block_k), jnp.float32)
        scratch |= {"k_scales": buffer, "v_scales": buffer}
    names = [*scalars, *inputs, *outputs, *scratch]

    def kernel(*refs):
        body(plan, Refs(**dict.fromkeys(f.name for f in fields(Refs)) | dict(zip(names, refs, strict=True))))

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(config.splits, plan.steps),
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=[spec for _, spec in outputs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[shape for shape, _ in outputs.values()],
        # A core's rows run in order, since each prefetches for the next; cores run in parallel. Every DMA lies in
        # its array: spans end where a row's tokens or its block table do, and pages are clipped to the pool.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), disable_bounds_checks=True),
        cost_estimate=estimate,
        interpret=interpret,
        name="paged_attention" if plan.pages else "decode_attention",
    )(*scalars.values(), *(x for x, _ in inputs.values()))


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
    padding = ((0, len(plan.packs) * plan.pack - plan.call.kv_heads), (0, 0))
    each = jnp.pad(each, padding, constant_values=-jnp.inf)
    each = each.reshape(len(plan.packs), plan.lines, 1)
    return jnp.broadcast_to(each, (*each.shape[:2], LANES))
