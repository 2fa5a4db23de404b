"""Decode attention as a Pallas kernel for GPU, through Triton: A100, L4, H100 and B200.

A decode step is bound by the reading of K and V. A program reads one part of one row's context for one KV head, once
for all its query heads and queries; parts are merged by their log-sum-exp outside.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int, Num

from pallas_kernels import hardware
from pallas_kernels.attention.call import Call, describe
from pallas_kernels.attention.merge import merge
from pallas_kernels.decode_attention.gpu_kernel import Plan, Refs, body, padded
from pallas_kernels.gradients import raising_under_grad
from pallas_kernels.hardware import Chip
from pallas_kernels.layouts import Layout
from pallas_kernels.tiles import resolve

MAX_QUERIES = 16
# Offsets in arrays of up to 2^32 bytes are 32-bit integers with a sign, in elements.
MOST_ELEMENTS = 2**31
# The least context of a part, in keys: for T*G rows it writes and reads again 8 T*G*Hv bytes of f32 result, which
# beside 4 * 64 T*G*H bytes of K and V in bf16 is 3%.
KEYS_OF_A_ROW = 64
LEAST_KEYS = 256
# A program holds about 40 KiB of shared memory and 4 warps: L4 runs two on a multiprocessor, A100 four, H100 five.
PROGRAMS_A_CORE = 4


@dataclass(frozen=True)
class Config:
    """Tiles.

    Attributes:
      key_block: keys attended to at once, a power of two, at least 16.
      splits: the most parts that a row's context is cut into; a short row is cut into fewer.
      row_block: the most queries of one KV head (T * G) in a program, a power of two, at least 16.
      num_warps, num_stages: of Triton; a stage holds key_block keys and values in shared memory.
    """

    key_block: int
    splits: int = 1
    row_block: int = 128
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self):
        for name in ("key_block", "row_block"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{self}: {name} must be a power of two and at least 16")
        if self.splits < 1:
            raise ValueError(f"{self}: splits must be at least 1")


def supported(call: Call) -> str | None:
    """None, or the reason why the GPU kernel cannot do the call."""
    if call.layout != "heads_last":
        return f"the GPU kernel reads the layout 'heads_last', not {call.layout!r}"
    if call.dtype not in ("bfloat16", "float16", "float32"):
        return f"the GPU kernel takes queries in bfloat16, float16 or float32, not {call.dtype}"
    if call.kv_dtype not in (call.dtype, "bfloat16", "float16", "float32", "int8"):
        return f"the GPU kernel takes K and V in bfloat16, float16, float32 or int8, not {call.kv_dtype}"
    if call.queries > MAX_QUERIES:
        return f"decode takes at most {MAX_QUERIES} queries a row, not {call.queries}: use flash_attention"
    if max(call.head_dim, call.value_dim) > 256:
        return f"the GPU kernel takes heads of at most 256, not {max(call.head_dim, call.value_dim)}"
    elements = call.batch * call.slots * call.kv_heads * max(call.head_dim, call.value_dim)
    if elements > MOST_ELEMENTS and elements * jnp.dtype(call.kv_dtype).itemsize <= 2**32:
        return f"offsets into {elements} elements of K or V do not fit the 32 bits that Pallas gives them"
    return None


def heuristic(call: Call, chip: Chip | None) -> Config:
    """Tiles for a chip; None: as for an A100.

    Bytes: only what a row holds is read, so that the block costs nothing but masked work in the last one. FLOPs: the
    tensor cores multiply 16 rows at least, T*G of which count, and at 16 rows they keep up with memory. Shared
    memory: a stage of K and V takes 32 KiB (64 keys of 128 in bf16), so that two stages and q fit the 99 KiB of L4
    even at 64 rows of 256. Registers: f32 has no tensor core and no room for more than 32 keys or 16 KiB a stage, and
    a program of 64 rows needs 8 warps: with 4, ptxas gave all 255 registers or spilled. Splits: PROGRAMS_A_CORE
    programs for every multiprocessor, as long as a part is worth its own result.
    """
    cores = chip.cores if chip else hardware.chip("a100").cores
    dtype = compute_dtype(call)
    width = padded(call.head_dim) + padded(call.value_dim)
    block, stage = 16, (16 if dtype == jnp.float32 else 32) << 10
    while block < (32 if dtype == jnp.float32 else 128) and 2 * block * width * dtype.itemsize <= stage:
        block *= 2
    rows = call.queries * call.group
    most = 32 if dtype == jnp.float32 else 128 if width <= 256 else 64
    row_block = min(most, padded(rows))
    programs = call.batch * call.kv_heads * -(-rows // row_block)
    visible = min(call.slots, call.window + call.queries - 1) if call.window else call.slots
    splits = max(1, min(-(-PROGRAMS_A_CORE * cores // programs), visible // _least_keys(call)))
    many = row_block >= 64 or dtype == jnp.float32
    return Config(block, splits, row_block, num_warps=8 if many else 4, num_stages=2)


def compute_dtype(call: Call) -> jnp.dtype:
    """What the dots multiply: the queries' type, f32 where K and V are f32 or another 16-bit type."""
    same = call.kv_dtype in (call.dtype, "int8")
    return jnp.dtype(call.dtype if same else jnp.float32)


def _least_keys(call: Call) -> int:
    return max(LEAST_KEYS, KEYS_OF_A_ROW * call.queries * call.group)


def plan_for(call: Call, config: Config, scale: float) -> Plan:
    """The kernel's static facts."""
    shared = {f.name: getattr(call, f.name) for f in fields(Plan) if hasattr(call, f.name)}
    return Plan(
        **shared
        | {
            "key_block": config.key_block,
            "splits": config.splits,
            "row_block": min(config.row_block, padded(call.queries * call.group)),
            "least_blocks": -(-_least_keys(call) // config.key_block),
            "scale": scale,
            "full": not call.lengths,
            "scaled": call.kv_dtype == "int8",
            "dtype": compute_dtype(call),
        }
    )


def cost(plan: Plan, call: Call) -> pl.CostEstimate:
    """Of full rows: what their queries see of K and V, scales, queries and results, once each."""
    kv, io = jnp.dtype(call.kv_dtype).itemsize, jnp.dtype(call.dtype).itemsize
    seen = min(plan.slots, plan.window + plan.queries - 1) if plan.window else plan.slots
    row_blocks = -(-plan.rows // plan.row_block)
    row = seen * plan.kv_heads * ((plan.head_dim + plan.value_dim) * kv + (8 if plan.scaled else 0)) * row_blocks
    parts = min(plan.splits, -(-seen // (plan.least_blocks * plan.key_block)))
    vectors = plan.queries * plan.heads
    row += vectors * (plan.head_dim * io * plan.splits + plan.value_dim * (io if plan.splits == 1 else 4 * parts))
    if plan.splits > 1 or call.return_lse:
        row += vectors * 4 * plan.splits
    pairs = call.batch * vectors * seen
    return pl.CostEstimate(
        flops=2 * pairs * (plan.head_dim + plan.value_dim), transcendentals=pairs, bytes_accessed=call.batch * row
    )


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
    """See `api.decode_attention`; K and V in the layout `heads_last`.

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
    config, _ = resolve("decode_attention", "gpu", call, config, sys.modules[__name__])
    plan = plan_for(call, config, scale)

    def run(*arrays):
        return _run(plan, call, config, *arrays, interpret)

    out, lse = raising_under_grad(run, "decode_attention")(q, k, v, starts, lengths, sinks, k_scale, v_scale, tree)
    return (out, lse) if return_lse else out


def _run(plan: Plan, call: Call, config: Config, q, k, v, starts, lengths, sinks, k_scale, v_scale, tree, interpret):
    """Call the kernel and merge its parts."""
    b, t, n, _ = q.shape
    bits = None if tree is None else (tree.astype(jnp.int32) << jnp.arange(t)).sum(2, dtype=jnp.int32)
    inputs = {
        "starts": starts.astype(jnp.int32),
        "lengths": None if lengths is None else lengths.astype(jnp.int32),
        "bits": bits,
        "q": q,
        "k": k,
        "v": v,
        "k_scale": k_scale,
        "v_scale": v_scale,
        "sinks": sinks,
    }
    inputs = {name: x for name, x in inputs.items() if x is not None}
    partial = plan.splits > 1
    shape = (plan.splits, b, t, n)
    outputs = {"out": jax.ShapeDtypeStruct((*shape, plan.value_dim), jnp.float32 if partial else q.dtype)}
    if partial or call.return_lse:
        outputs["lse"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    names = [*inputs, *outputs]

    def kernel(*refs):
        body(plan, Refs(**dict.fromkeys(f.name for f in fields(Refs)) | dict(zip(names, refs, strict=True))))

    found = pl.pallas_call(
        kernel,
        grid=(b, plan.kv_heads * -(-plan.rows // plan.row_block), plan.splits),
        out_shape=list(outputs.values()),
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        cost_estimate=cost(plan, call),
        interpret=interpret,
        name="decode_attention",
    )(*inputs.values())
    if partial:
        out, lse = merge(*found)
        return out.astype(q.dtype), lse
    return found[0][0], found[1][0] if call.return_lse else None
