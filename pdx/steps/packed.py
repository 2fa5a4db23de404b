"""The step over a paged cache: packed tokens of many requests, decode rows and prompt chunks in one program."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pdx.arguments import integer
from pdx.cache.given import check_cache, whole_numbers
from pdx.cache.paged import PagedCache
from pdx.cache.rows import PackedRows
from pdx.config import ModelConfig
from pdx.layers.kernels import Kernels, as_kernels
from pdx.meshes import check_mesh, on_own_mesh
from pdx.model import ForwardOutput, Params, forward
from pdx.sharding import ArraySpec, constrain


@on_own_mesh
def mixed_step(
    params: Params,
    cfg: ModelConfig,
    tokens: Int[Array, " T"],
    cache: PagedCache,
    *,
    block_tables: Int[Array, "Gr R M"],
    lengths: Int[Array, " R"],
    query_starts: Int[Array, " R1"],
    decode_rows: int = 0,
    max_queries: int | None = None,
    kernels: Kernels = "auto",
) -> tuple[Float[Array, "R V"], PagedCache]:
    """Append packed tokens of R requests to their pages: decode rows and prompt chunks in one step.

    The weights are read once for all of them, so a chunk uses the arithmetic that decode rows leave idle (Sarathi,
    Agrawal et al. 2023). The cache is donated: use the one returned.

    Args:
      tokens: row r owns tokens query_starts[r] to query_starts[r+1] - 1. Tokens after the last row are padding.
      block_tables: position t of row r is in page block_tables[g, r, t // p] of page group g (`page_groups`), where p
        is the page size. Entries that no query of the row sees may be anything.
      lengths: tokens that each row holds, this step's included; 0: the row takes no part.
      decode_rows: static; the first `decode_rows` rows own at most one token each and are attended together.
      max_queries: static; the most tokens that one row owns; None: up to T. A wrong hint gives wrong results.

    Returns:
      Logits of the last token of each row, f32, and the cache. Logits are NaN where a row is longer than its block
      table, and mean nothing where a row takes no part.

    Raises:
      ValueError: shapes that do not fit.

    Example, one request with a chunk of three tokens and one that decodes its fifth:
      >>> cache = pdx.init_paged_cache(cfg, pages=4)
      >>> logits, cache = pdx.mixed_step(
      ...     params, cfg, jnp.array([9, 5, 9, 2]), cache, block_tables=jnp.array([[[0], [1]]]),
      ...     lengths=jnp.array([5, 3]), query_starts=jnp.array([0, 1, 4]))
      >>> logits.shape
      (2, 64)
    """
    check_cache(cache, PagedCache)
    check_mesh(params["final_norm"], cache.mesh)
    groups, rows = len(cache.groups), np.shape(lengths)[0] if np.ndim(lengths) else 0
    if np.shape(block_tables)[:2] != (groups, rows) or np.shape(query_starts) != (rows + 1,) or np.ndim(tokens) != 1:
        raise ValueError(
            f"tokens [T], block_tables [{groups}, R, M], lengths [R] and query_starts [R+1] must agree, got "
            f"{np.shape(tokens)}, {np.shape(block_tables)}, {np.shape(lengths)} and {np.shape(query_starts)}"
        )
    tokens, lengths = whole_numbers("tokens", tokens, (None,), "[T]"), whole_numbers("lengths", lengths, (rows,), "[R]")
    block_tables = whole_numbers("block_tables", block_tables, (groups, rows, None), "[Gr, R, M]")
    query_starts = whole_numbers("query_starts", query_starts, (rows + 1,), "[R+1]")
    tokens, *packed = (jnp.asarray(x, jnp.int32) for x in (tokens, block_tables, lengths, query_starts))
    hints = (
        integer("decode_rows", decode_rows, 0),
        max_queries if max_queries is None else integer("max_queries", max_queries, 1),
    )
    return _mixed_step(params, cfg, tokens, cache, *packed, *hints, as_kernels(kernels))


def mixed(params, cfg, tokens, rows: PackedRows, cache: PagedCache, kernels):
    """`mixed_step`, to be traced inside a larger program."""
    out = mixed_output(params, cfg, tokens, rows, cache, kernels)
    return out.logits, out.cache


def mixed_output(params, cfg, tokens, rows: PackedRows, cache: PagedCache, kernels) -> ForwardOutput:
    """`mixed`, with the final hidden states of the packed tokens, [1, T, D]."""
    out = forward(params, cfg, tokens[None], cache, rows=rows, logits="last", kernels=kernels)
    full = rows.held_lengths > rows.block_tables.shape[-1] * cache.page_size
    if rows.wanted_tokens is not None:
        full = full[rows.owner[0, rows.wanted_tokens]]
    logits = jnp.where(full[:, None], jnp.nan, cast(Array, out.logits))
    logits = constrain(logits, ArraySpec(logits.shape, (None, "vocab"), logits.dtype), cache.mesh)
    return replace(out, logits=logits)


@partial(jax.jit, static_argnames=("cfg", "decode_rows", "max_queries", "kernels"), donate_argnames="cache")
def _mixed_step(params, cfg, tokens, cache, block_tables, lengths, query_starts, decode_rows, max_queries, kernels):
    rows = PackedRows.packed(tokens.shape[0], block_tables, lengths, query_starts, decode_rows, max_queries)
    return mixed(params, cfg, tokens, rows, cache, kernels)


PROGRAMS = {"mixed_step": _mixed_step}
