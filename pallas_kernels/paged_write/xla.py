"""The page write as XLA scatters. They are in place under donation, except for int8 on a TPU."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.layouts import Layout, fold
from pallas_kernels.paged_write.call import Call

NAME = "xla"
PLATFORM = "any"


def place(slots, pages: int, page: int):
    """Page and offset of each token; dropped tokens get a page past the pool."""
    kept = (slots >= 0) & (slots < pages * page)
    return jnp.where(kept, slots // page, pages), jnp.where(kept, slots % page, 0)


def scatter(pages, new, at, offset, layout: Layout):
    """Write tokens `new` [T, K, H] at (page, offset)."""
    new = new.astype(pages.dtype)
    if layout == "heads_first":
        return pages.at[at, :, offset].set(new, mode="drop")
    return pages.at[at, offset].set(fold(new) if layout == "folded" else new, mode="drop")


def scatter_scale(scales, new, at, offset):
    """Write scales `new` [T, K] at (page, :, offset); the pool's padding heads get 1."""
    padding = scales.shape[1] - new.shape[1]
    new = jnp.pad(new.astype(scales.dtype), ((0, 0), (0, padding)), constant_values=1)
    return scales.at[at, :, offset].set(new, mode="drop")


def run(arrays, call: Call, config=None, interpret=False):
    """See `api.write_pages`. On a TPU an int8 scatter re-lays the pool: `auto` takes the kernel there."""
    pools, new = ([arrays[name] for name in names] for names in (call.pools, call.new))
    at, offset = place(arrays["slots"], call.pages, call.page)
    written = [scatter(pool, x, at, offset, call.layout) for pool, x in zip(pools[:2], new[:2], strict=True)]
    written += [scatter_scale(pool, x, at, offset) for pool, x in zip(pools[2:], new[2:], strict=True)]
    return tuple(written)
