"""Paged attention as a Pallas kernel for GPU, through Triton: A100, L4, H100 and B200.

The packed queries are cut into pieces (`pieces.cut`): the queries of one row within one block of queries. A program
takes one piece, one KV head and one part of the context. Decode rows and chunks run side by side, a decode row in a
tile of 16 rows, a chunk in a larger one. The parts are merged afterwards by their log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import hardware
from pallas_kernels.attention.gpu_words import as_words
from pallas_kernels.attention.merge import merge
from pallas_kernels.hardware import Chip
from pallas_kernels.paged_attention.call import Call, known
from pallas_kernels.paged_attention.gpu_kernel import Plan, body
from pallas_kernels.paged_attention.pieces import cut, full_rows

NAME = "gpu"
PLATFORM = "gpu"
LAYOUTS = ("heads_last",)
# Pallas computes offsets, in elements, in signed 32-bit integers for arrays of up to 2^32 bytes.
MOST_ELEMENTS = 2**31
# The fewest keys of a part: its f32 result, written and read again, is then a few percent of its K and V.
LEAST_KEYS = 512
PROGRAMS_A_CORE = 4


@dataclass(frozen=True)
class Config:
    """Tiles.

    Attributes:
      block_q: queries of a block, the most that a piece has; a program has G rows for each.
      block_k: keys of one step; a power of two, at least 16.
      splits: the most parts of a row's context; a short row has fewer.
      num_warps, num_stages: Triton's; a stage holds block_k keys and values in shared memory.
    """

    block_q: int
    block_k: int
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self):
        if self.block_k < 16 or self.block_k & (self.block_k - 1):
            raise ValueError(f"{self}: block_k must be a power of two and at least 16")
        if self.block_q < 1 or self.splits < 1:
            raise ValueError(f"{self}: block_q and splits must be at least 1")


def supported(call: Call) -> str | None:
    """None, or why the GPU kernel cannot do the call."""
    if call.dtype not in ("bfloat16", "float16", "float32"):
        return f"the GPU kernel takes queries in bfloat16, float16 or float32, not {call.dtype}"
    if call.kv_dtype not in ("bfloat16", "float16", "float32", "int8"):
        return f"the GPU kernel takes pages in bfloat16, float16, float32 or int8, not {call.kv_dtype}"
    if max(call.head_dim, call.value_dim) > 256:
        return f"the GPU kernel takes heads of at most 256, not {max(call.head_dim, call.value_dim)}"
    elements = call.pages * call.page * call.kv_heads * max(call.head_dim, call.value_dim)
    if elements > MOST_ELEMENTS and elements * jnp.dtype(call.kv_dtype).itemsize <= 2**32:
        return f"offsets into {elements} elements of K or V do not fit the 32 bits that Pallas gives them"
    return None


def compute_dtype(call: Call) -> jnp.dtype:
    """The operand type of the dots: the queries', or f32 if K and V are f32 or another 16-bit type."""
    return jnp.dtype(call.dtype if call.kv_dtype in (call.dtype, "int8") else jnp.float32)


def heuristic(call: Call, chip: Chip | None) -> Config:
    """Tiles for a chip; None: an A100.

    Bytes: only what a row holds is read, once per block of its queries. The blocks of a chunk run at the same time and
    share reads in the L2 cache.
    FLOPs: 64 rows give 64 FLOPs per byte of bf16, enough for the bandwidth of L2.
    Shared memory: a stage of K and V takes 32 KiB (64 keys of 128 in bf16): two stages and q fit the 99 KiB of L4 even
    for heads of 256.
    Registers: with 4 warps, 64 rows take all 255 registers and spill. They get 8 warps and at most 64 keys, heads of
    256 half the rows. f32 has no tensor core and spilled at 32 rows: it gets 16, smaller stages, and 8 warps unless its
    heads of 256 need neither padding nor conversion.
    Hopper multiplies 64 rows with one warpgroup: an H200 took 155 us with 4 warps, 226 us with 8. Heads of 256 spill
    with 4.
    Splits: only if all rows are decode rows: about PROGRAMS_A_CORE programs per multiprocessor, as long as a part is
    large beside its result. An H200 took 69 us with 512 programs, 83 us with twice as many and their merge.
    """
    chip = chip or hardware.chip("a100")
    dtype = compute_dtype(call)
    width = pl.next_power_of_2(call.head_dim) + pl.next_power_of_2(call.value_dim)
    wide = dtype == jnp.float32
    rows = 16 if wide else 32 if width >= 512 else 64
    block_q = max(1, min(call.max_queries, rows // call.group))
    many = block_q * call.group > 16
    block_k, stage = 16, (16 if wide else 32) << 10
    while block_k < (64 if many else 128) and 2 * block_k * width * dtype.itemsize <= stage:
        block_k *= 2
    splits = 1
    if call.single_rows == call.rows:
        seen = min(call.capacity, call.window or call.capacity)
        programs = call.rows * call.kv_heads
        splits = max(1, min(round(PROGRAMS_A_CORE * chip.cores / programs), seen // LEAST_KEYS))
    odd = max(pl.next_power_of_2(d) - d for d in (call.head_dim, call.value_dim)) > 0
    crowded = wide and (width < 512 or odd or call.kv_dtype != "float32")
    many = many and (chip.capability != (9, 0) or width >= 512)
    return Config(block_q, block_k, splits, num_warps=8 if crowded or many else 4)


def moved_bytes(call: Call, config: Config, query_starts: np.ndarray, lengths: np.ndarray) -> int:
    """Bytes that the programs of a concrete call load and store; L2 serves the repeats within a chunk."""
    found = cut(np.asarray(query_starts), np.asarray(lengths), call, block_q=config.block_q, unit=1)
    tokens = found.end - found.first
    parts = np.minimum(config.splits, -(-tokens // least_keys(config)))
    size = jnp.dtype(call.dtype).itemsize
    pair = 2 * 4 if call.scale_heads else 0
    kv = call.kv_heads * ((call.head_dim + call.value_dim) * jnp.dtype(call.kv_dtype).itemsize + pair)
    total = int(tokens.sum()) * kv + call.tokens * call.heads * call.head_dim * size * config.splits
    if config.splits > 1:
        wrote = int((parts * (found.stop - found.start)).sum())
        return total + wrote * call.heads * call.value_dim * 4 + call.tokens * call.heads * 4 * config.splits
    return total + call.tokens * call.heads * (call.value_dim * size + (4 if call.return_lse else 0))


def least_keys(config: Config) -> int:
    return max(LEAST_KEYS, config.block_k)


def cost(call: Call, config: Config) -> pl.CostEstimate:
    """The cost of full rows with equally many queries each."""
    starts, lengths = full_rows(call)
    seen = np.minimum(lengths, call.window or lengths)
    pairs = int(((starts[1:] - starts[:-1]) * seen).sum()) * call.heads
    return pl.CostEstimate(
        flops=2 * pairs * (call.head_dim + call.value_dim),
        transcendentals=pairs,
        bytes_accessed=moved_bytes(call, config, starts, lengths),
    )


def run(arrays, call: Call, config: Config, interpret=False):
    """See `api.paged_attention`. Cuts the pieces, calls the kernel and merges its parts."""
    q, lengths, query_starts = (arrays[name] for name in ("q", "lengths", "query_starts"))
    found = cut(query_starts, lengths, call, block_q=config.block_q, unit=1)
    pieces = jnp.stack([x.astype(jnp.int32) for x in found])
    plan = Plan(call, config, -(-least_keys(config) // config.block_k), compute_dtype(call))
    tables = known(arrays["block_tables"], call)
    inputs = {"pieces": pieces, "tables": tables, "q": q, "k": arrays["k_pages"], "v": arrays["v_pages"]}
    inputs |= {name: arrays[name] for name in ("k_scale", "v_scale", "sinks") if name in arrays}
    if plan.packed > 1:
        inputs["v_words"] = as_words(arrays["v_pages"])
    partial = config.splits > 1
    shape = (config.splits, call.tokens, call.heads)
    outputs = {"out": jax.ShapeDtypeStruct((*shape, call.value_dim), jnp.float32 if partial else q.dtype)}
    if partial or call.return_lse:
        outputs["lse"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    names = [*inputs, *outputs]
    absent = dict.fromkeys(("k_scale", "v_scale", "sinks", "lse"))

    def kernel(*refs):
        body(plan, SimpleNamespace(**absent | dict(zip(names, refs, strict=True))))

    results = pl.pallas_call(
        kernel,
        grid=(pieces.shape[1], call.kv_heads, config.splits),
        out_shape=list(outputs.values()),
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        cost_estimate=cost(call, config),
        interpret=interpret,
        name="paged_attention",
    )(*inputs.values())
    if partial:
        out, lse = merge(*(x[:, None] for x in results))
        out, lse = out[0].astype(q.dtype), lse[0]
    else:
        out, lse = results[0][0], results[1][0] if call.return_lse else None
    return (out, lse) if call.return_lse else out
