"""The write of int8 pages as a Pallas kernel for TPU: read, modify and write the tiles that hold new tokens.

XLA's scatter into an int8 array re-lays the whole pool, with temporaries of twice its bytes. Here the pools are aliased
to the results, and only tiles of 32 tokens that get new ones are touched, each once. The tokens are sorted by slot
before, so that those of one tile are neighbours and lie in two adjacent blocks of sorted tokens. Scalar memory bounds
the tokens of one run; more tokens take several runs.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.layouts import LANES, SCALAR_BYTES, SUBLANES, fold, round_up
from pallas_kernels.paged_write.call import Call

NAME = "tpu"
PLATFORM = "tpu"
LAYOUTS = ("folded",)
ROWS = 32  # tokens of an int8 tile
MOST_TOKENS = SCALAR_BYTES // 12  # tokens of one run, which takes three scalars each


def supported(call: Call) -> str | None:
    """None, or why the kernel cannot do the call."""
    if call.dtype != "int8":
        return f"the TPU kernel writes int8 pages; XLA writes {call.dtype} ones in place"
    if call.page % LANES or call.scale_heads % SUBLANES:
        return (
            f"the TPU kernel needs pages of a multiple of {LANES} tokens and the scales' heads rounded up to "
            f"{SUBLANES}, not {call.page} and {call.scale_heads}"
        )
    return None


def run(arrays, call: Call, config=None, interpret=False):
    """See `api.write_pages`."""
    pools, new = ([arrays[name] for name in names] for names in (call.pools, call.new))
    for begin in range(0, call.tokens, MOST_TOKENS):
        some = slice(begin, min(begin + MOST_TOKENS, call.tokens))
        part = replace(call, tokens=some.stop - some.start)
        pools = _write(pools, [x[some] for x in new], arrays["slots"][some], part, interpret)
    return tuple(pools)


def _write(pools, new, slots, call: Call, interpret):
    """One run of the kernel."""
    blocks = -(-call.tokens // ROWS)
    order, sorted_slots, first, tiles, count = plan(slots, call, blocks)
    values = [fold(x[order]).reshape(blocks, ROWS, -1) for x in new[:2]]
    padding = ((0, 0), (0, 0), (0, call.scale_heads - call.kv_heads))
    scales = [jnp.pad(x[order].reshape(blocks, ROWS, -1), padding, constant_values=1).swapaxes(1, 2) for x in new[2:]]
    lanes = sorted_slots.reshape(blocks, 1, ROWS)

    def near(i, first, *_):
        return first[i], 0, 0

    def behind(i, first, *_):
        return jnp.minimum(first[i] + 1, blocks - 1), 0, 0

    def pool_block(x, rows):
        a_page = call.page // rows
        if rows == ROWS:
            return pl.BlockSpec((1, ROWS, x.shape[2]), lambda i, f, t, s: (t[i] // a_page, t[i] % a_page, 0))
        tile = rows // ROWS
        return pl.BlockSpec(
            (1, x.shape[1], rows), lambda i, f, t, s: (t[i] // tile // a_page, 0, t[i] // tile % a_page)
        )

    pool_specs = [pool_block(x, rows) for x, rows in zip(pools, (ROWS, ROWS, LANES, LANES), strict=True)]
    arrays, specs = [], []
    for x in (lanes, *values, *scales):
        arrays += [x, x]
        specs += [pl.BlockSpec((1, *x.shape[1:]), index) for index in (near, behind)]
    scalars = (first, tiles, sorted_slots)
    if not interpret:  # else XLA copies whole pools of scales to VMEM and back
        pools = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in pools]
    written = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3, grid=(count,), in_specs=specs + pool_specs, out_specs=pool_specs
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pools],
        input_output_aliases={len(scalars) + len(arrays) + i: i for i in range(4)},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=cost(call),
        interpret=interpret,
        name="write_pages",
    )(*scalars, *arrays, *pools)
    # JAX 0.10.2 rejects these as results of a program: it takes their memory space for another one.
    return written if interpret else lax.optimization_barrier(written)


def plan(slots, call: Call, blocks: int):
    """Sort the tokens by slot, the dropped ones last, and list the tiles to write.

    Returns:
      order: [blocks * 32], the tokens in sorted order.
      slots: their slots; past the pool for dropped tokens and padding.
      first: for each tile, the block of sorted tokens that has its first token.
      tiles: the numbers of the tiles; count: how many there are.
    """
    end = call.pages * call.page
    slots = jnp.where((slots >= 0) & (slots < end), slots, end).astype(jnp.int32)
    slots = jnp.pad(slots, (0, blocks * ROWS - call.tokens), constant_values=end)
    slots, order = lax.sort((slots, jnp.arange(slots.shape[0], dtype=jnp.int32)), num_keys=1)
    tile = slots // ROWS
    begins = (slots < end) & (tile != jnp.concatenate([jnp.full((1,), -1, jnp.int32), tile[:-1]]))
    places = jnp.sort(jnp.where(begins, jnp.arange(slots.shape[0], dtype=jnp.int32), slots.shape[0]))
    places = jnp.minimum(places, slots.shape[0] - 1)
    # If all tokens are dropped, one tile is written unchanged.
    count = jnp.maximum(begins.sum(dtype=jnp.int32), 1)
    last = end // ROWS - 1
    return jnp.minimum(order, call.tokens - 1), slots, places // ROWS, jnp.minimum(tile[places], last), count


def kernel(first, tiles, slots, *refs):
    """Write one tile: each new token replaces the row of its slot, the other rows stay."""
    i = pl.program_id(0)
    (lanes, lanes2, k, k2, v, v2, ks, ks2, vs, vs2), pools = refs[:10], refs[10:]
    k_in, v_in, ks_in, vs_in, k_out, v_out, ks_out, vs_out = pools
    tile = tiles[i]
    row = tile * ROWS + lax.broadcasted_iota(jnp.int32, (ROWS, 1), 0)
    near, behind = lanes[0] == row, (lanes2[0] == row) & (first[i] + 1 < slots.shape[0] // ROWS)
    picks = [x.astype(jnp.float32) for x in (near, behind)]
    taken = sum(x.sum(1, keepdims=True) for x in picks) > 0
    for (a, b), old, out in (((k, k2), k_in, k_out), ((v, v2), v_in, v_out)):
        # A product with a one-hot matrix places the rows. It is exact: bf16 holds integers up to 127.
        rows = sum(
            jnp.dot(pick.astype(jnp.bfloat16), x[0].astype(jnp.bfloat16), preferred_element_type=jnp.float32)
            for pick, x in zip(picks, (a, b), strict=True)
        )
        kept = old[0].astype(jnp.float32)
        out[0] = jnp.where(taken, rows, kept).astype(jnp.int8)

    group = LANES // ROWS
    # Four tiles share a tile of scales. It is read for the first of them, and kept until the last.
    fresh = (i == 0) | (tiles[jnp.maximum(i - 1, 0)] // group != tile // group)

    @pl.when(fresh)
    def _():
        ks_out[...] = ks_in[...]
        vs_out[...] = vs_in[...]

    lane = tile // group * LANES + lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    for out, parts in ((ks_out, (ks, ks2)), (vs_out, (vs, vs2))):
        tile_scales = out[0]
        for b, part in enumerate(parts):
            block = jnp.minimum(first[i] + b, slots.shape[0] // ROWS - 1)
            for c in range(ROWS):
                tile_scales = jnp.where(lane == slots[block * ROWS + c], part[0, :, c : c + 1], tile_scales)
        out[0] = tile_scales


def cost(call: Call) -> pl.CostEstimate:
    """The cost if each token has a tile of its own: the tile read and written, and two blocks of tokens read."""
    columns = round_up(call.kv_heads * call.head_dim, LANES) + round_up(call.kv_heads * call.value_dim, LANES)
    tile = ROWS * columns + 2 * 4 * call.scale_heads * LANES
    fresh = 2 * (ROWS * columns + 2 * 4 * call.scale_heads * ROWS)
    return pl.CostEstimate(
        flops=call.tokens * 4 * ROWS * ROWS * columns,
        transcendentals=0,
        bytes_accessed=call.tokens * 2 * tile + -(-call.tokens // ROWS) * fresh,
    )
