"""Defaults that depend on model and device: pages from the device's memory, the token budget from the cost model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp

from pallas_kernels.hardware import detect
from pdx.cache.dense import cache_specs
from pdx.cache.paged import PAGE_SIZES, PagedCache, page_groups, paged_cache_specs
from pdx.cost import Setup
from pdx.cost.tradeoffs import largest_chunk
from pdx.engine.config import EngineConfig
from pdx.engine.memory import demand
from pdx.errors import RequestError
from pdx.layers.kernels import layout_for
from pdx.quant import Policy
from pdx.sharding import is_spec
from pdx.speculative.options import Speculation
from pdx.speculative.paged_head import paged_layers
from pdx.weights.load import Model

# The cost model needs a chip in the table. A CPU has none, and reaches its prefill rate with few tokens.
CPU_BUDGET = 128
CHUNK_STEP, LARGEST_CHUNK = 64, 8192
# The share of a host's memory for pages, since the host has other work.
HOST_SHARE = 1 / 8


def fill_in(config: EngineConfig, model: Model, kv_dtype, draft: Model | None = None) -> EngineConfig:
    """Fill in what the configuration leaves open: context, page size, token budget, and pages of each page group.

    `draft`: a draft model, whose dense cache needs memory too, or a head, whose layer lies in the pages; loaded.

    Raises RequestError where the memory does not suffice for one request of `max_context` tokens.
    """
    context = config.max_context or model.config.max_context
    if context > model.config.max_context:
        raise RequestError(f"max_context is {context}, but the context of {model.name} is {model.config.max_context}")
    filled = dataclasses.replace(
        config, max_context=context, page_size=config.page_size or PAGE_SIZES[layout_for(config.kernels)]
    )
    if filled.token_budget is None:
        least = filled.slots + filled.page_size
        filled = dataclasses.replace(filled, token_budget=max(least, budget(model, filled, kv_dtype)))
    if not isinstance(filled.pages, tuple):
        filled = dataclasses.replace(filled, pages=pages(model, filled, kv_dtype, draft))
    return filled


def budget(model: Model, config: EngineConfig, kv_dtype) -> int:
    """The token budget: one token per slot plus the largest chunk, a multiple of `CHUNK_STEP`, for which the cost model
    predicts a step of at most `tpot_s` at half the context."""
    chip = detect()
    if chip is None:
        return CPU_BUDGET
    setup = Setup(model.config, jnp.dtype(model.dtype).name, Policy.of(model.params), jnp.dtype(kv_dtype).name)
    chips = 1 if model.mesh is None else model.mesh.size
    chunk = largest_chunk(setup, chip, config.slots, config.max_context // 2, config.tpot_s, chips)
    return config.slots + max(CHUNK_STEP, min(chunk, LARGEST_CHUNK) // CHUNK_STEP * CHUNK_STEP)


def pages(model: Model, config: EngineConfig, kv_dtype, draft: Model | None = None) -> tuple[int, ...]:
    """Pages of each page group; a head's layer is one of its group. Window groups get twice what their slots need, so
    that cached prefixes survive. Full groups get the rest of the memory, up to what `slots` requests of `max_context`
    tokens need."""
    held = paged_layers(model.config, config.speculate)
    groups = page_groups(held)
    if config.pages is not None:
        return (config.pages,) * len(groups)
    one = paged_cache_specs(
        held, 1, page_size=config.page_size, dtype=kv_dtype, mesh=model.mesh, layout=layout_for(config.kernels)
    )
    most = config.most_unread(config.max_context)
    alone = [demand(w, config.page_size, config.max_context, most) for w in groups]
    counts = [n * config.slots * (1 if w is None else 2) for n, w in zip(alone, groups, strict=True)]
    room = free_bytes(model) * config.memory_share
    if draft is not None and cast(Speculation, config.speculate).proposer == "draft":
        specs = cache_specs(draft.config, config.slots, config.max_context, dtype=kv_dtype, mesh=model.mesh)
        room -= sum(spec.held_bytes(model.mesh) for spec in jax.tree.leaves(specs, is_leaf=is_spec))
    return _within(room, counts, alone, groups, one)


def _within(room: float, counts: list[int], alone: Sequence[int], groups, one: PagedCache) -> tuple[int, ...]:
    """Shrink the full groups' pages (or all, if every group has a window) until everything fits into `room` bytes."""
    size = one.page_bytes
    squeezed = [g for g, w in enumerate(groups) if w is None] or list(range(len(groups)))
    kept = sum(n * size[g] for g, n in enumerate(counts) if g not in squeezed)
    wanted = sum(counts[g] * size[g] for g in squeezed)
    share = min(1.0, (room - kept) / wanted)
    for g in squeezed:
        counts[g] = int(counts[g] * share)
        if counts[g] < alone[g]:
            raise RequestError(
                f"the memory left for pages, {room / 1e9:.2f} GB, does not hold one request of the whole context: "
                "lower max_context or slots, or take kv_dtype='int8'"
            )
    return tuple(counts)


def free_bytes(model: Model) -> float:
    """Free bytes for pages, on all devices of the model together."""
    devices = [jax.devices()[0]] if model.mesh is None else list(model.mesh.devices.flat)
    stats = [d.memory_stats() for d in devices if d.platform != "cpu"]
    if not stats or not all(s and "bytes_limit" in s for s in stats):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * HOST_SHARE
    return len(devices) * min(s["bytes_limit"] - s["bytes_in_use"] for s in stats)  # each device holds an equal share
