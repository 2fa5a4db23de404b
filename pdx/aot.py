"""Compile the steps for a chip that is not here: does a step fit, what does it move, which kernels does it run?

The real compilers (libtpu; XLA and ptxas for GPUs) run on a CPU. `pallas_kernels.analysis.targets` says what must be
installed, and which environment variables must be set before jax starts. Nothing here is a measured time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from pallas_kernels.analysis.targets import Compiled, Target
from pallas_kernels.layouts import Layout
from pdx import steps
from pdx.cache.dense import cache_specs
from pdx.cache.layer import default_layout
from pdx.cache.paged import paged_cache_specs
from pdx.config import ModelConfig
from pdx.layers.kernels import Kernels, as_kernels, layout_for
from pdx.meshes import make_mesh, on_own_mesh
from pdx.model import param_specs
from pdx.quant import Policy, quantized_specs
from pdx.shapes import DEFAULT_CHUNK
from pdx.sharding import ArraySpec, is_spec

Step = Literal["prefill", "decode_step", "verify", "mixed_step"]


@on_own_mesh
def compile_step(
    step: Step,
    cfg: ModelConfig,
    target: str,
    *,
    batch: int = 1,
    capacity: int = 2048,
    tokens: int = DEFAULT_CHUNK,
    dtype=jnp.bfloat16,
    kv_dtype=None,
    quantize: str | Policy | None = None,
    mesh: Mapping[str, int] | str | None = None,
    kernels: Kernels = "pallas",
) -> Compiled:
    """Compile one step of a model for `target`.

    Args:
      step: `prefill` and `verify` take `tokens` tokens per row, `decode_step` one. `mixed_step` packs `tokens` tokens:
        one for each of `batch` decode rows; any others are the chunk of one more row.
      cfg: of any model; weights are not needed.
      target: a chip (`v5e`, `h100`, ...) or a slice of several (`v5e:2x4`).
      batch, capacity: rows of the cache, and tokens that each can hold; a paged cache gets enough pages for them.
      dtype, kv_dtype: of parameters and cache (None: dtype).
      quantize: which weights are int8 or int4, see `pdx.quant`; None: none.
      mesh: sizes of the axes `data` and `model` over the slice's chips, or a text such as `model=8`; None: one chip.
      kernels: the target's Pallas kernels, XLA over the same cache layout, or one's own implementations by op
        (`pdx.layers.kernels`).

    Raises:
      ValueError: an unknown step or target, a policy that does not fit the model.
      pallas_kernels.analysis.targets.CompilerMissing: the target's compiler is not installed.
      NotImplementedError: a Pallas kernel that does not take this model.
      jax.errors.JaxRuntimeError: the compiler refuses the step, for example because it needs too much memory.
    """
    function, arguments = step_arguments(
        step,
        cfg,
        target,
        batch=batch,
        capacity=capacity,
        tokens=tokens,
        dtype=dtype,
        kv_dtype=kv_dtype,
        quantize=quantize,
        mesh=mesh,
        kernels=kernels,
    )
    name = Target.get(target).chip.platform if kernels == "pallas" else as_kernels(kernels)
    return Target.get(target).compile(
        function, **arguments, cfg=cfg, kernels=name, static_argnames=("cfg", "kernels", "decode_rows", "max_queries")
    )


def step_arguments(
    step: Step,
    cfg: ModelConfig,
    target: str,
    *,
    batch: int,
    capacity: int,
    tokens: int,
    dtype,
    kv_dtype=None,
    quantize: str | Policy | None = None,
    mesh: Mapping[str, int] | str | None = None,
    kernels: Kernels = "pallas",
) -> tuple[Any, dict[str, Any]]:
    """The jitted step and its arguments: abstract arrays placed on `target`'s chips, and static values."""
    if step not in get_args(Step):
        raise ValueError(f"step {step!r} is not one of {', '.join(get_args(Step))}")
    chips = Target.get(target)
    devices = make_mesh(mesh, chips.devices()) if mesh else None
    where = {"dtype": kv_dtype or dtype, "mesh": devices, "layout": _layout(kernels, chips.chip.platform)}

    def rows(dtype, *shape):
        return ArraySpec((batch, *shape), ("batch", *[None] * len(shape)), dtype)

    declared: dict[str, Any] = {"params": quantized_specs(param_specs(cfg, dtype), Policy.parse(quantize))}
    if step == "mixed_step":
        declared |= _packed(cfg, batch, capacity, tokens, where)
    else:
        cache = declared["cache"] = cache_specs(cfg, batch, capacity, chunk=tokens, **where)
        if step == "decode_step":
            declared |= {"tokens": rows(jnp.int32), "active": rows(jnp.bool_)}
        else:
            declared |= {"tokens": rows(jnp.int32, min(tokens, cache.chunk)), "lengths": rows(jnp.int32)}
    arguments = jax.tree.map(lambda x: x.abstract(devices) if is_spec(x) else x, declared, is_leaf=is_spec)
    return steps.PROGRAMS[step], arguments


def _layout(kernels: Kernels, platform: str) -> Layout:
    """The cache layout for a platform: its default, unless the caller's own kernels read another."""
    return default_layout(platform) if isinstance(kernels, str) else layout_for(kernels, platform)


def _packed(cfg: ModelConfig, decode_rows: int, capacity: int, tokens: int, where: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a mixed step: pages for the full capacity of its rows, the decode rows and one chunk."""
    if tokens < decode_rows:
        raise ValueError(f"a mixed step of {tokens} tokens has none for some of its {decode_rows} decode rows")
    count = decode_rows + (tokens > decode_rows)
    page = paged_cache_specs(cfg, 1, **where).page_size
    width = -(-capacity // page)
    cache = paged_cache_specs(cfg, count * width, **where)

    def ints(*shape):
        return ArraySpec(shape, (None,) * len(shape), jnp.int32)

    return {
        "tokens": ints(tokens),
        "cache": cache,
        "block_tables": ints(len(cache.groups), count, width),
        "lengths": ints(count),
        "query_starts": ints(count + 1),
        "decode_rows": decode_rows,
        "max_queries": max(1, tokens - decode_rows),
    }
