"""Paged attention in XLA: an online softmax over blocks of pages.

Decode rows are computed together, as one batch. The other rows are computed one after the other, one block of queries
at a time, so that nothing is computed for queries that a row does not have. Loop bounds are dynamic: neither wide block
tables nor padding of the packed queries cost anything.
Source: Milakov & Gimelshein 2018 (online softmax).
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import lax

from pallas_kernels.hardware import platform_of
from pallas_kernels.masking import MASKED, START, precision_of, soft_cap
from pallas_kernels.paged_attention.call import Call
from pallas_kernels.paged_attention.reference import split_heads

NAME = "xla"
PLATFORM = "any"
# Keys per step: smaller blocks cost more loop overhead, larger ones read more keys past a row's end.
KEY_BLOCK = 128
# On a GPU each turn of the loop costs a round trip between host and device: few large blocks.
KEY_BLOCK_GPU = 2048
QUERY_BLOCK = 128


def gather(pages, ids, layout: str, kv_heads: int, size: int):
    """Gather pages `ids` [B, n] as keys [B, K, n*p, H]."""
    block = pages[jnp.clip(ids, 0, pages.shape[0] - 1)]
    if layout == "heads_first":
        block = block.transpose(0, 2, 1, 3, 4)
        return block.reshape(*block.shape[:2], -1, size)
    block = split_heads(block, layout, kv_heads, size)  # [B, n, p, K, H]
    return block.reshape(block.shape[0], -1, kv_heads, size).swapaxes(1, 2)


def gather_scale(scales, ids, kv_heads: int):
    """Gather the scales of pages `ids` [B, n] as [B, K, n*p]."""
    block = scales[jnp.clip(ids, 0, scales.shape[0] - 1), :kv_heads].swapaxes(1, 2)
    return block.reshape(*block.shape[:2], -1)


def shrinking(rows: int) -> tuple[int, ...]:
    """Batch sizes of successive loops: all rows, then only the longest ones, when the others have ended.

    Each size is a loop of its own in the program, which takes a CPU a second to compile for 30 layers: there are two.
    On a GPU each turn of a loop costs a round trip to the host: there is one."""
    if platform_of() == "gpu":
        return (rows,)
    return tuple(dict.fromkeys((rows, max(1, rows * 3 // 8))))


def ordered_sum(x):
    """The sum over the last axis, in an order that no other axis changes.

    XLA chooses the order of a reduction by the whole shape. Then a row's last bits would depend on how many rows are
    still being read beside it.
    """
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        rest = x[..., 2 * half :]
        x = x[..., :half] + x[..., half : 2 * half]
        if rest.shape[-1]:
            x = jnp.concatenate([x, rest], axis=-1)
    return x[..., 0]


def attend(q, positions, tables, first, end, *, call: Call, arrays):
    """Online softmax of B rows with t queries each: (out [B, t, N, Hv] f32, lse [B, t, N]).

    `positions` [B, t] are below zero for padding. Row b reads pages first[b] to end[b] - 1 of its table.
    """
    b, t, n, h = q.shape
    kv_heads, group, p, value_dim = call.kv_heads, call.group, call.page, call.value_dim
    sinks, scale = arrays.get("sinks"), arrays.get("scale", call.scale)
    per_step = max(1, (KEY_BLOCK_GPU if platform_of() == "gpu" else KEY_BLOCK) // p)
    keys_a_step = per_step * p
    dtype = jnp.promote_types(q.dtype, jnp.bfloat16 if call.scale_heads else call.kv_dtype)
    precision = precision_of(dtype)
    # Blocks of keys begin at the same positions whatever the queries see, so that a row's sums do not change with them.
    first = first // per_step * per_step
    steps = -(-(end - first) // per_step)
    order = jnp.argsort(-steps)  # longest first, so that rows still being read are contiguous
    q, positions, tables, first, steps = (x[order] for x in (q, positions, tables, first, steps))
    rows = q.astype(dtype).reshape(b, t, kv_heads, group, h).transpose(0, 2, 3, 1, 4).reshape(b, kv_heads, group * t, h)
    last = jnp.minimum(positions, call.capacity - 1)  # the last position that a query sees
    newest = last.max(1)
    oldest = jnp.zeros_like(newest) if call.window is None else positions.min(1) - (call.window - 1)

    def body(step, carry):
        top, total, acc = carry
        m = len(top)  # rows still being read
        columns = first[:m, None] + step * per_step + jnp.arange(per_step)
        ids = jnp.take_along_axis(tables[:m], jnp.minimum(columns, call.width - 1), axis=1)
        k = gather(arrays["k_pages"], ids, call.layout, kv_heads, h)
        v = gather(arrays["v_pages"], ids, call.layout, kv_heads, value_dim)
        key = ((first[:m] + step * per_step) * p)[:, None] + jnp.arange(keys_a_step)  # [m, S]
        held = (key >= oldest[:m, None]) & (key <= newest[:m, None])
        logits = jnp.einsum(
            "bkmh,bksh->bkms", rows[:m], k.astype(rows.dtype), precision=precision, preferred_element_type=jnp.float32
        )
        if call.scale_heads:
            logits = logits * gather_scale(arrays["k_scale"], ids, kv_heads)[:, :, None]
        logits = soft_cap(logits.reshape(m, kv_heads, group, t, keys_a_step) * scale, call.softcap)
        mask = key[:, None] <= last[:m, :, None]
        if call.window is not None:
            mask &= key[:, None] > positions[:m, :, None] - call.window
        logits = jnp.where(mask[:, None, None], logits, MASKED).reshape(m, kv_heads, group * t, keys_a_step)
        new_top = jnp.maximum(top, logits.max(-1))
        weights = jnp.exp(logits - new_top[..., None])
        fade = jnp.exp(top - new_top)
        total = total * fade + ordered_sum(weights)
        if call.scale_heads:  # past the row's tokens a scale may be NaN
            v_scale = jnp.where(held[:, None], gather_scale(arrays["v_scale"], ids, kv_heads), 0.0)
            weights = weights * v_scale[:, :, None]
        v = jnp.where(held[:, None, :, None], v, jnp.zeros((), v.dtype)).astype(rows.dtype)
        acc = acc * fade[..., None] + jnp.einsum(
            "bkms,bksh->bkmh", weights.astype(rows.dtype), v, precision=precision, preferred_element_type=jnp.float32
        )
        return new_top, total, acc

    m = group * t
    if sinks is None:
        top, total = jnp.full((b, kv_heads, m), START), jnp.zeros((b, kv_heads, m))
    else:
        sink = jnp.repeat(sinks.astype(jnp.float32).reshape(kv_heads, group), t, axis=1)
        sink = jnp.broadcast_to(sink, (b, kv_heads, m))
        top = jnp.maximum(sink, START)
        total = jnp.exp(sink - top)
    carry = (top.astype(jnp.float32), total.astype(jnp.float32), jnp.zeros((b, kv_heads, m, value_dim), jnp.float32))
    done, sizes = 0, shrinking(b)
    for size, smaller in zip(sizes, (*sizes[1:], 0), strict=True):
        until = jnp.maximum(done, steps[smaller])  # the first row that the next loop leaves out has ended
        part = lax.fori_loop(done, until, body, tuple(x[:size] for x in carry))
        carry = tuple(jnp.concatenate([new, old[size:]]) for new, old in zip(part, carry, strict=True))
        done = until
    top, total, acc = (x[jnp.argsort(order)] for x in carry)
    out = acc / jnp.where(total == 0, 1.0, total)[..., None]
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(jnp.where(total == 0, 1.0, total)))
    out = out.reshape(b, kv_heads, group, t, value_dim).transpose(0, 3, 1, 2, 4).reshape(b, t, n, value_dim)
    return out, lse.reshape(b, kv_heads, group, t).transpose(0, 3, 1, 2).reshape(b, t, n)


def span(positions, real, call: Call):
    """Per row [B]: the first page that its real queries [B, t] see, and one past the last."""
    end = jnp.max(jnp.where(real, jnp.minimum(positions, call.capacity - 1), -1), 1) // call.page + 1
    if call.window is None:
        return jnp.zeros_like(end), end
    earliest = jnp.min(jnp.where(real, positions, jnp.iinfo(jnp.int32).max), 1)
    return jnp.minimum(jnp.maximum(earliest - (call.window - 1), 0) // call.page, end), end


def run(arrays, call: Call, config=None, interpret=False):
    """See `api.paged_attention`. It takes every call, and has no tiles. Decode rows first, then the others."""
    q, block_tables, lengths, query_starts = (arrays[n] for n in ("q", "block_tables", "lengths", "query_starts"))
    t, n, _ = q.shape
    hv, sinks = call.value_dim, arrays.get("sinks")
    attend_rows = partial(attend, call=call, arrays=arrays)
    asked = jnp.where(lengths > 0, query_starts[1:] - query_starts[:-1], 0)
    # If many rows share the tokens, each has few: a larger block would compute padding.
    block = min(QUERY_BLOCK, call.max_queries, max(16, 2 * t // max(1, call.rows - call.decode_rows)))
    nothing = jnp.full((t + block, n), -jnp.inf)
    if sinks is not None:
        nothing = jnp.broadcast_to(sinks.astype(jnp.float32), nothing.shape)
    results = jnp.zeros((t + block, n, hv), q.dtype), nothing.astype(jnp.float32)
    d = call.decode_rows
    if d:
        offsets = jnp.arange(call.decode_queries)
        at, inside = query_starts[:d, None] + offsets, offsets < asked[:d, None]
        last = lengths[:d, None] - 1
        # With a window, padding gets the last query's position, so that it does not add keys to read.
        padding = -1 if call.window is None or call.decode_queries == 1 else last
        positions = jnp.where(inside, last + 1 - asked[:d, None] + offsets, padding)
        first, end = span(positions, inside, call)
        parts = attend_rows(q[jnp.clip(at, 0, t - 1)], positions, block_tables[:d], first, end)
        target = jnp.where(inside, at, t + block)
        results = tuple(r.at[target].set(x.astype(r.dtype), mode="drop") for r, x in zip(results, parts, strict=True))
    if d < call.rows:
        padded = jnp.pad(q, ((0, block), (0, 0), (0, 0)))
        results = chunks(padded, results, asked, block, attend_rows, arrays, call)
    out, lse = (x[:t] for x in results)
    return (out, lse) if call.return_lse else out


def chunks(q, results, asked, block, attend_rows, arrays, call: Call):
    """The rows after the decode rows: a loop over rows, and in it a loop over blocks of the row's queries."""
    block_tables, lengths, query_starts = (arrays[n] for n in ("block_tables", "lengths", "query_starts"))

    def one_block(row, i, results):
        at = query_starts[row] + i * block
        inside = i * block + jnp.arange(block) < asked[row]
        positions = jnp.where(inside, lengths[row] - asked[row] + i * block + jnp.arange(block), -1)[None]
        if call.window is not None:
            # Padding gets the last query's position, so that it does not add keys to read.
            positions = jnp.where(inside, positions, lengths[row] - 1)
        first, end = span(positions, inside[None], call)
        table = lax.dynamic_slice_in_dim(block_tables, row, 1)
        parts = attend_rows(lax.dynamic_slice_in_dim(q, at, block)[None], positions, table, first, end)

        def merge(old, new):
            kept = lax.dynamic_slice_in_dim(old, at, block)
            new = jnp.where(inside.reshape(-1, *[1] * (old.ndim - 1)), new[0].astype(old.dtype), kept)
            return lax.dynamic_update_slice_in_dim(old, new, at, 0)

        return tuple(merge(old, new) for old, new in zip(results, parts, strict=True))

    def one_row(row, results):
        return lax.fori_loop(0, -(-asked[row] // block), partial(one_block, row), results)

    return lax.fori_loop(call.decode_rows, call.rows, one_row, results)
