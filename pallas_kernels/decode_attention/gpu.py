"""Decode attention as a Pallas kernel for GPU, through Triton: A100, L4, H100 and B200.

Reading K and V bounds a decode step. A program reads one part of one row's context for one KV head, once for all its
queries and query heads. The parts are merged afterwards by their log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import hardware
from pallas_kernels.attention.call import Call
from pallas_kernels.attention.gpu_words import as_words
from pallas_kernels.attention.merge import merge
from pallas_kernels.decode_attention.gpu_kernel import Plan, Refs, body, padded
from pallas_kernels.hardware import Chip
from pallas_kernels.masking import tree_bits

NAME = "gpu"
PLATFORM = "gpu"
LAYOUTS = ("heads_last",)
MAX_QUERIES = 16
# Pallas computes offsets, in elements, in signed 32-bit integers for arrays of up to 2^32 bytes.
MOST_ELEMENTS = 2**31
# The fewest keys of a part, per row. The part's f32 result is written and read again: for T*G rows 8 T*G*Hv bytes, 3%
# of the 4 * 64 T*G*H bytes of K and V in bf16.
KEYS_OF_A_ROW = 64
LEAST_KEYS = 256
# A program holds about 40 KiB of shared memory and 4 warps: L4 runs two on a multiprocessor, A100 four, H100 five.
PROGRAMS_A_CORE = 4


@dataclass(frozen=True)
class Config:
    """Tiles.

    Attributes:
      block_k: keys of one step; a power of two, at least 16.
      splits: the most parts of a row's context; a short row has fewer.
      block_rows: the most rows of a program, one per query and head (T * G); a power of two, at least 16.
      num_warps, num_stages: Triton's; a stage holds block_k keys and values in shared memory.
    """

    block_k: int
    splits: int = 1
    block_rows: int = 128
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self):
        for name in ("block_k", "block_rows"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{self}: {name} must be a power of two and at least 16")
        if self.splits < 1:
            raise ValueError(f"{self}: splits must be at least 1")


def supported(call: Call) -> str | None:
    """None, or why the GPU kernel cannot do the call."""
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
    """Tiles for a chip; None: an A100.

    Bytes: only what a row holds is read; a larger block only adds masked work in the row's last block.
    FLOPs: tensor cores multiply at least 16 rows, of which T*G are real; at 16 rows they keep up with memory.
    Shared memory: a stage of K and V takes 32 KiB (64 keys of 128 in bf16): two stages and q fit the 99 KiB of L4 even
    at 64 rows of 256.
    Registers: f32 has no tensor core, and no room for more than 32 keys or 16 KiB per stage. 64 rows need 8 warps: with
    4, ptxas used all 255 registers or spilled.
    Splits: PROGRAMS_A_CORE programs per multiprocessor, as long as a part is large beside its result.
    """
    cores = chip.cores if chip else hardware.chip("a100").cores
    dtype = compute_dtype(call)
    width = padded(call.head_dim) + padded(call.value_dim)
    block, stage = 16, (16 if dtype == jnp.float32 else 32) << 10
    while block < (32 if dtype == jnp.float32 else 128) and 2 * block * width * dtype.itemsize <= stage:
        block *= 2
    rows = call.queries * call.group
    most = 32 if dtype == jnp.float32 else 128 if width <= 256 else 64
    block_rows = min(most, padded(rows))
    programs = call.batch * call.kv_heads * -(-rows // block_rows)
    visible = min(call.slots, call.window + call.queries - 1) if call.window else call.slots
    splits = max(1, min(-(-PROGRAMS_A_CORE * cores // programs), visible // _least_keys(call)))
    many = block_rows >= 64 or dtype == jnp.float32
    return Config(block, splits, block_rows, num_warps=8 if many else 4, num_stages=2)


def compute_dtype(call: Call) -> jnp.dtype:
    """The operand type of the dots: the queries', or f32 if K and V are f32 or another 16-bit type."""
    same = call.kv_dtype in (call.dtype, "int8")
    return jnp.dtype(call.dtype if same else jnp.float32)


def _least_keys(call: Call) -> int:
    return max(LEAST_KEYS, KEYS_OF_A_ROW * call.queries * call.group)


def plan_for(call: Call, config: Config) -> Plan:
    """The static inputs of the kernel."""
    block_rows = min(config.block_rows, padded(call.queries * call.group))
    return Plan(call, config, block_rows, -(-_least_keys(call) // config.block_k), compute_dtype(call))


def cost(plan: Plan) -> pl.CostEstimate:
    """The cost of full rows: K and V that their queries see, scales, queries and results, once each."""
    call, splits = plan.call, plan.config.splits
    kv, io = jnp.dtype(call.kv_dtype).itemsize, jnp.dtype(call.dtype).itemsize
    seen = min(call.slots, call.window + call.queries - 1) if call.window else call.slots
    row_blocks = -(-plan.rows // plan.block_rows)
    row = seen * call.kv_heads * ((call.head_dim + call.value_dim) * kv + (8 if call.int8 else 0)) * row_blocks
    parts = min(splits, -(-seen // (plan.least_blocks * plan.config.block_k)))
    vectors = call.queries * call.heads
    row += vectors * (call.head_dim * io * splits + call.value_dim * (io if splits == 1 else 4 * parts))
    if splits > 1 or call.return_lse:
        row += vectors * 4 * splits
    pairs = call.batch * vectors * seen
    return pl.CostEstimate(
        flops=2 * pairs * (call.head_dim + call.value_dim), transcendentals=pairs, bytes_accessed=call.batch * row
    )


def run(arrays, call: Call, config: Config, interpret=False):
    """See `api.decode_attention`. Calls the kernel and merges its parts."""
    plan = plan_for(call, config)
    q, tree = arrays["q"], arrays.get("tree")
    b, t, n, _ = q.shape
    bits = None if tree is None else tree_bits(tree)
    names = ("starts", "lengths", "bits", "q", "k", "v", "k_scale", "v_scale", "sinks")
    inputs = {name: x for name, x in {**arrays, "bits": bits}.items() if name in names and x is not None}
    if plan.packed > 1:
        inputs["v"] = as_words(inputs["v"])
    partial = config.splits > 1
    shape = (config.splits, b, t, n)
    outputs = {"out": jax.ShapeDtypeStruct((*shape, call.value_dim), jnp.float32 if partial else q.dtype)}
    if partial or call.return_lse:
        outputs["lse"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    names = [*inputs, *outputs]

    def kernel(*refs):
        body(plan, Refs(**dict.fromkeys(f.name for f in fields(Refs)) | dict(zip(names, refs, strict=True))))

    found = pl.pallas_call(
        kernel,
        grid=(b, call.kv_heads * -(-plan.rows // plan.block_rows), config.splits),
        out_shape=list(outputs.values()),
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        cost_estimate=cost(plan),
        interpret=interpret,
        name="decode_attention",
    )(*inputs.values())
    if partial:
        out, lse = merge(*found)
        out = out.astype(q.dtype)
    else:
        out, lse = found[0][0], found[1][0] if call.return_lse else None
    return (out, lse) if call.return_lse else out
