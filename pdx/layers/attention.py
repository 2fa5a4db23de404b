"""Attention with its projections: the only place that calls the attention kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, singledispatch
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from pallas_kernels import decode_attention, flash_attention, paged_attention, reference_attention
from pallas_kernels.decode_attention.api import MAX_QUERIES
from pallas_kernels.decode_attention.api import explain as explain_decode
from pallas_kernels.flash_attention.api import explain as explain_flash
from pallas_kernels.layouts import Layout
from pallas_kernels.paged_attention.api import explain as explain_paged
from pdx.cache.layer import LayerCache, default_layout
from pdx.cache.rows import PackedRows, TokenRows
from pdx.config import ModelConfig
from pdx.errors import RequestError
from pdx.layers.linear import linear, projections
from pdx.layers.norm import rms_norm
from pdx.layers.rope import rotate
from pdx.meshes import Devices, on_several_devices
from pdx.sharding import is_spec, mesh_axis

# The user chooses among auto, xla and pallas; tpu and gpu name a target that is compiled for but is not here. dense is
# attention as it is defined, with all its scores in memory, over the whole capacity: what the others are held against.
Kernels = Literal["auto", "xla", "pallas", "tpu", "gpu", "dense"]
PALLAS_OF_LAYOUT: dict[Layout, str] = {"folded": "tpu", "heads_last": "gpu"}


def layout_for(kernels: Kernels) -> Layout:
    """How a cache for these kernels lies in memory. Pallas kernels on a CPU, interpreted, are those of the TPU."""
    if kernels in ("tpu", "gpu"):
        return default_layout(kernels)
    layout = default_layout()
    return "folded" if kernels == "pallas" and layout not in PALLAS_OF_LAYOUT else layout


def implementation(kernels: Kernels, layout: Layout) -> tuple[str, bool]:
    """The kernel library's name for a choice over a cache of this layout, and whether it runs interpreted."""
    if kernels not in get_args(Kernels):
        raise RequestError(f"kernels {kernels!r} is not one of auto, xla, pallas")
    if kernels != "pallas":
        return kernels, False
    if layout not in PALLAS_OF_LAYOUT:
        raise NotImplementedError(
            f"the Pallas kernels read a cache that lies {' or '.join(PALLAS_OF_LAYOUT)}, this one lies {layout}: "
            f"make it with init_cache(..., layout={layout_for(kernels)!r}), or use kernels='xla'"
        )
    return PALLAS_OF_LAYOUT[layout], jax.default_backend() == "cpu"


def explain(kernels: Kernels) -> dict[str, str]:
    """Which path each phase's attention takes, and why. Raises NotImplementedError as the kernels would."""
    return _explained(kernels, {"prefill": explain_flash, "decode": explain_decode})


def explain_mixed(kernels: Kernels) -> str:
    """The same of a mixed step over pages."""
    return _explained(kernels, {"mixed": explain_paged})["mixed"]


def _explained(kernels: Kernels, ops: dict[str, Callable]) -> dict[str, str]:
    name, interpreted = implementation(kernels, layout_for(kernels))
    if name == "dense":
        return dict.fromkeys(("prefill", "decode"), "reference_attention: dense (asked for)")
    note = ", interpreted on the CPU" if interpreted else ""
    try:
        return {phase: f"{explain_op(name)}{note}" for phase, explain_op in ops.items()}
    except ValueError as error:  # what PDX_KERNELS says is no implementation
        raise RequestError(str(error)) from None


def attention(
    p: dict,
    cfg: ModelConfig,
    x: Float[Array, "B T D"],
    cache: LayerCache | None,
    rows: TokenRows | PackedRows,
    *,
    window: int | None,
    rotation: tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]],
    mesh: Devices,
    kernels: Kernels,
) -> tuple[Float[Array, "B T D"], LayerCache | None]:
    """Project, rotate, append to the cache and attend over what it holds.

    Without a cache the chunk attends to itself through the dense reference, which differentiates. On a `mesh` each
    device appends and attends to its own rows and heads.
    """
    b, t, _ = x.shape
    h, specs = cfg.head_dim, projections(cfg)

    def heads(name, count):
        y = linear(x, p[f"{name}_proj"], p.get(f"{name}_bias"), specs[f"{name}_proj"], mesh)
        return y.reshape(b, t, count, h)

    q, k, v = heads("q", cfg.num_heads), heads("k", cfg.num_kv_heads), heads("v", cfg.num_kv_heads)
    if cfg.qk_norm:
        q, k = rms_norm(q, p["q_norm"], cfg.norm_eps), rms_norm(k, p["k_norm"], cfg.norm_eps)
    q, k = rotate(q, *rotation), rotate(k, *rotation)
    settings = {"scale": cfg.attn_scale, "window": window, "softcap": cfg.attn_softcap}
    if cache is None:
        out = reference_attention(
            q, k, v, starts=rows.positions[:, 0], lengths=rows.held_lengths, layout="heads_last", **settings
        )
    else:
        run = partial(_append_and_attend, kernels=kernels, **settings)
        if on_several_devices(mesh):
            run = _sharded(run, mesh, cache)
            if cache.kv_heads > cfg.num_kv_heads:
                k, v = (jnp.repeat(x, cache.kv_heads // cfg.num_kv_heads, axis=2) for x in (k, v))
        out, cache = run(q, k, v, rows, cache)
    out = out.reshape(b, t, cfg.num_heads * h)
    return linear(out, p["o_proj"], p.get("o_bias"), specs["o_proj"], mesh), cache


def _append_and_attend(q, k, v, rows: TokenRows | PackedRows, cache: LayerCache, kernels: Kernels, **settings):
    """Write the call's keys and values, and attend over all that its rows hold."""
    name, interpret = implementation(kernels, cache.layout)
    cache = cache.append(k, v, rows, *_writer(name, interpret, cache))
    settings |= {"layout": cache.layout, "kv_heads": k.shape[2]} | cache.scales
    if name != "dense":
        settings |= {"implementation": name, "interpret": interpret}
    return _attend(rows, q, cache, name == "dense", settings), cache


@singledispatch
def _attend(rows, q, cache: LayerCache, dense: bool, settings: dict) -> Float[Array, "B T N H"]:
    """Attend over what `rows` hold in the cache; `dense`: by the definition, with all scores in memory."""
    raise TypeError(f"rows are {type(rows).__name__}: they must be TokenRows or PackedRows")


@_attend.register
def _(rows: TokenRows, q, cache, dense, settings):
    op = decode_attention if q.shape[1] <= MAX_QUERIES else flash_attention
    op = reference_attention if dense else op
    return op(q, cache.k, cache.v, starts=rows.positions[:, 0], lengths=rows.held_lengths, **settings)


@_attend.register
def _(rows: PackedRows, q, cache, dense, settings):
    if dense:
        raise NotImplementedError("kernels='dense' has no attention over pages: use kernels='xla'")
    out = paged_attention(
        q[0],
        cache.k,
        cache.v,
        block_tables=rows.block_tables,
        lengths=rows.held_lengths,
        query_starts=rows.query_starts,
        decode_rows=rows.decode_rows,
        max_queries=rows.max_queries,
        **settings,
    )
    return out[None]


def _writer(name: str, interpret: bool, cache: LayerCache) -> tuple[str, bool]:
    """Implementation of the append beside that of the attention, and whether it is interpreted.

    The library chooses, but for the TPU's kernels on a CPU: the write of int8 runs interpreted with them.
    """
    if interpret and cache.layout == "folded" and cache.k_scale is not None:
        return "tpu", True
    return ("xla" if name in ("xla", "dense") else "auto"), False


def _sharded(run: Callable, mesh: Mesh, cache: LayerCache) -> Callable:
    """`run` on each device's own rows and heads: Mosaic kernels cannot be partitioned by the compiler.

    Nothing is communicated. Where query heads do not divide over the mesh, all heads are on every device.
    """
    specs = cache.specs()
    rows, heads = mesh_axis(cache.row_axis, specs.k.shape[0], mesh), mesh_axis("kv_heads", cache.kv_heads, mesh)
    each, row = PartitionSpec(rows, None, heads, None), PartitionSpec(rows)
    stored = jax.tree.map(lambda spec: spec.partition(mesh), specs, is_leaf=is_spec)
    return jax.shard_map(
        run, mesh=mesh, in_specs=(each, each, each, row, stored), out_specs=(each, stored), check_vma=False
    )
