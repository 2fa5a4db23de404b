"""The grid steps of the TPU prefill kernel: which block of queries meets which block of keys in which step.

A row's capacity may be far above its length, rows differ in length, and a causal query sees only what came before it.
A skipped step still issues about 250 instruction words, and a capacity of 131072 slots has 128 steps for each block of
queries. So the grid has one step for each pair of blocks that is computed. Their number is data, and a table in scalar
memory tells the two blocks of each step. Where every block of queries sees all blocks of keys, there is no table, and
the grid is static.

Query blocks are numbered over all rows: row * query_blocks + i. On chips whose two cores share one device, the first
axis of the grid deals them out to the cores if the groups of lanes do not divide by two.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.flash_attention.tpu_kernel import Plan


def scalars_needed(plan: Plan) -> int:
    """Words of scalar memory: starts, lengths and the tables."""
    tables = 0 if plan.fixed else plan.parts * plan.most + plan.pairs
    return 2 * plan.call.batch + tables


def tables(plan: Plan, starts: Int[Array, " B"], lengths: Int[Array, " B"]) -> tuple[tuple, dict]:
    """The lengths of the grid's last two axes, and the kernel's tables by name.

    `blocks` [parts * most]: the query block and the key block of each step, see `Plan.unpack`. Index maps of each
    operand ask for them, so they are not computed there. `begins` [query blocks]: the first step of each.
    """
    if plan.fixed:
        return (plan.most // plan.steps, plan.steps), {}
    pairs = jnp.arange(plan.pairs)
    rows, i = pairs // plan.query_blocks, pairs % plan.query_blocks
    first, last, live = plan.key_blocks(starts[rows], plan.length(lengths, rows), i)
    counts = plan.count(first, last, live)
    counts = jnp.pad(counts, (0, -plan.pairs % plan.parts)).reshape(-1, plan.parts).T  # [parts, query blocks of a part]
    ends = jnp.cumsum(counts, axis=1)
    # A part with fewer steps than another repeats its last step: it fetches and writes nothing more.
    step = jnp.minimum(jnp.arange(plan.most), ends[:, -1:] - 1)  # [parts, most]
    block = (ends[:, None] <= step[:, :, None]).sum(axis=2, dtype=jnp.int32)
    block = block * plan.parts + jnp.arange(plan.parts, dtype=jnp.int32)[:, None]
    begins = (ends - counts).T.reshape(-1)[: plan.pairs]
    # A query block of padding fetches nothing new: the last key block of the row's last queries.
    begin_key = jnp.broadcast_to(jnp.where(live, first, last), pairs.shape)
    packed = plan.pack(block, begin_key[block] + step - begins[block])
    return (ends[:, -1].max(), 1), {"blocks": packed.reshape(-1), "begins": begins}
