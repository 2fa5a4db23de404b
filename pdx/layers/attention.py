"""Attention with its projections: the only place that calls the attention kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, singledispatch
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from pallas_kernels import decode_attention, flash_attention, paged_attention, reference_attention
from pallas_kernels.decode_attention.api import MAX_QUERIES
from pdx.cache.layer import LayerCache
from pdx.cache.rows import PackedRows, TokenRows
from pdx.config import ModelConfig
from pdx.layers.kernels import Kernels, implementation
from pdx.layers.linear import linear, projections
from pdx.layers.norm import rms_norm
from pdx.layers.rope import rotate
from pdx.meshes import Devices, on_several_devices
from pdx.sharding import is_spec, mesh_axis


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
    """Project to q, k, v; rotate; append k and v to the cache; attend over the cache; project back.

    Without a cache the chunk attends to itself through the dense reference, which can be differentiated. On a `mesh`
    each device appends and attends to its own rows and heads.
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
        out = reference_attention(q, k, v, **_asked(rows, q)[2], layout="heads_last", **settings)
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
    """Write the call's keys and values, then attend over everything that its rows hold."""
    op, queries, asked = _asked(rows, q)
    name, interpret = implementation(kernels, cache.layout, op.__name__)
    cache = cache.append(k, v, rows, *_writer(name, interpret, cache))
    settings |= {"layout": cache.layout, "kv_heads": k.shape[2]} | cache.scales | asked
    if isinstance(name, str) and name == "dense":
        if op is paged_attention:
            raise NotImplementedError("kernels='dense' has no attention over pages: use kernels='xla'")
        op = reference_attention
    else:
        settings |= {"implementation": name, "interpret": interpret}
    return op(queries, cache.k, cache.v, **settings).reshape(*q.shape[:3], -1), cache


@singledispatch
def _asked(rows, q: Float[Array, "B T N H"]) -> tuple[Callable, Array, dict]:
    """The attention op for these rows, its queries, and the arguments that describe the rows."""
    raise TypeError(f"rows are {type(rows).__name__}: they must be TokenRows or PackedRows")


@_asked.register
def _(rows: TokenRows, q):
    op = decode_attention if q.shape[1] <= MAX_QUERIES else flash_attention
    tree = {} if rows.tree is None else {"tree": rows.tree}
    return op, q, {"starts": rows.starts, "lengths": rows.held_lengths} | tree


@_asked.register
def _(rows: PackedRows, q):
    whose = {"block_tables": rows.block_tables, "lengths": rows.held_lengths, "query_starts": rows.query_starts}
    hints = {name: getattr(rows, name) for name in ("decode_rows", "decode_queries", "max_queries")}
    return paged_attention, q[0], whose | hints


def _writer(name: Any, interpret: bool, cache: LayerCache) -> tuple[str, bool]:
    """The implementation of the append, given that of the attention, and whether it is interpreted.

    The library chooses it, with one exception: when the TPU's kernels run interpreted on a CPU, so does the int8 write.
    """
    if interpret and cache.layout == "folded" and cache.k_scale is not None:
        return "tpu", True
    return ("xla" if isinstance(name, str) and name in ("xla", "dense") else "auto"), False


def _sharded(run: Callable, mesh: Mesh, cache: LayerCache) -> Callable:
    """`run` on each device's own rows and heads, since the compiler cannot partition Mosaic kernels.

    No communication. Where the mesh does not divide the query heads, every device has all heads.
    """
    specs = cache.specs()
    rows, heads = mesh_axis(cache.row_axis, specs.k.shape[0], mesh), mesh_axis("kv_heads", cache.kv_heads, mesh)
    each, row = PartitionSpec(rows, None, heads, None), PartitionSpec(rows)
    stored = jax.tree.map(lambda spec: spec.partition(mesh), specs, is_leaf=is_spec)
    return jax.shard_map(
        run, mesh=mesh, in_specs=(each, each, each, row, stored), out_specs=(each, stored), check_vma=False
    )
