"""The problems of every op, made from its cases, for AOT compilation, counting, tuning and timing.

An op's package has `cases.py` with `CASES` (small, for every test) and `LARGE` (real sizes, for compilers and
counts). A case has `.name` and `.smoke` (bool, False if absent). `OPS[op](case, implementation)` makes a `Problem` of
it. A new op needs its cases and an entry in OPS. A new implementation needs nothing: it is found in the op's folder, or
given as a module or function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.analysis.problem import Problem, implementations, op_of
from pallas_kernels.implementation import load
from pallas_kernels.layouts import SUBLANES, Layout, cache_shape, folded_width, round_up


def _calling(
    op: str, implementation: Any, settings: Mapping[str, Any], known: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """`Problem.run`: the op's public function on arrays by the names of its arguments. `known`: in place of some."""

    def run(values, config, interpret=False):
        given = {"implementation": implementation, "config": config, "interpret": interpret}
        return op_of(op).public(**values | (known or {}), **settings, **given)

    return run


def _dense(op: str) -> Callable:
    def make(case: Any, implementation: Any, layout: Layout | None = None) -> Problem:
        from pallas_kernels.attention.call import make_call

        layout = layout or layout_of(op, implementation)
        arrays, settings = case.abstract(layout), case.settings(layout)
        rows = len(case.held)
        # cuDNN takes whole prompts, which a program knows only from starts that are not among its arguments.
        whole = implementation == "cudnn" and not any(case.held)
        known = {"starts": np.zeros(rows, np.int32)} if whole else {}
        call = make_call(op, arrays | known, **settings)
        absent = {"lengths": None} if case.full else {}  # an argument without a default
        run = _calling(op, implementation, settings | absent, known)
        scalars = {"starts": np.array(case.held, np.int32), "lengths": np.asarray(case.lengths)}
        full = {
            "starts": np.full(rows, max(case.slots - case.queries, 0), np.int32),
            "lengths": np.full(rows, case.slots, np.int32),
        }
        tokens, queries, pairs = _dense_needs(case)
        cache = tuple(n for n in ("k", "v", "k_scale", "v_scale") if n in arrays)
        return Problem(
            op,
            case.name,
            case.smoke,
            implementation,
            arrays,
            scalars,
            full,
            call,
            run,
            *_needs(call, tokens, queries, pairs),
            cache,
            bytes_stored=_stored(call, tokens, queries),
            case=case,
        )

    return make


def _dense_needs(case: Any) -> tuple[int, int, int]:
    """Counts of cached tokens that some query sees, of real queries, and of pairs of a query and a key that it sees."""
    tokens = queries = pairs = 0
    for held, new in zip(case.held, case.new, strict=True):
        if not new:
            continue
        positions, length = np.arange(held, held + new), held + new
        low = np.full(new, max(0, length - case.slots))
        if case.window:
            low = np.maximum(low, positions - case.window + 1)
        high = positions if case.causal else np.full(new, length - 1)
        tokens, queries = tokens + int(high.max() - low.min() + 1), queries + new
        pairs += int((high - low + 1).sum())
    return tokens, queries, pairs


def _paged(case: Any, implementation: Any, layout: Layout | None = None) -> Problem:
    from pallas_kernels.paged_attention.call import make_call
    from pallas_kernels.paged_attention.pieces import full_rows

    layout, rows, width = layout or layout_of("paged_attention", implementation), len(case.lengths), case.table_width
    # As in the op's tests: each row has pages of its own, and there are spare ones.
    pages = sum(-(-n // case.page) for n in case.lengths) + case.spare
    dtype, kv = jnp.dtype(case.dtype), jnp.dtype(case.stored)
    shapes = {
        "q": ((case.packed, case.kv_heads * case.group, case.head_dim), dtype),
        "k_pages": (cache_shape(layout, pages, case.page, case.kv_heads, case.head_dim), kv),
        "v_pages": (cache_shape(layout, pages, case.page, case.kv_heads, case.value_size), kv),
        "block_tables": ((rows, width), jnp.int32),
        "lengths": ((rows,), jnp.int32),
        "query_starts": ((rows + 1,), jnp.int32),
    }
    if case.sinks:
        shapes["sinks"] = ((case.kv_heads * case.group,), jnp.float32)
    if case.stored == "int8":
        scale = ((pages, round_up(case.kv_heads, SUBLANES), case.page), jnp.float32)
        shapes |= {"k_scale": scale, "v_scale": scale}
    arrays = {name: jax.ShapeDtypeStruct(*x) for name, x in shapes.items()}
    settings = {
        "window": case.window,
        "softcap": case.softcap,
        "layout": layout,
        "kv_heads": case.kv_heads,
        "value_dim": case.value_size,
        "decode_rows": case.decode_rows,
        "decode_queries": case.decode_queries,
        "max_queries": case.max_queries,
    }
    call = make_call(arrays, **settings, scale=case.logit_scale)

    run = _calling("paged_attention", implementation, settings | {"scale": case.logit_scale})

    # Each row has pages of its own, so that timed reads come from memory. Unused entries name other rows' pages.
    tables = np.arange(rows * width, dtype=np.int32).reshape(rows, width) % pages
    at = 0
    for row, n in enumerate(case.lengths):
        held = -(-n // case.page)
        tables[row, :held] = np.arange(at, at + held)
        at += held
    starts = np.concatenate([[0], np.cumsum(case.queries)]).astype(np.int32)
    scalars = {"block_tables": tables, "lengths": np.array(case.lengths, np.int32), "query_starts": starts}
    most_starts, most_lengths = full_rows(call)
    full = {"block_tables": tables, "lengths": most_lengths, "query_starts": most_starts}
    tokens = pairs = 0
    for length, n in zip(case.lengths, case.queries, strict=True):
        if n:
            positions = np.arange(length - n, length)
            low = np.maximum(0, positions - case.window + 1) if case.window else np.zeros(n, int)
            tokens, pairs = tokens + length - int(low.min()), pairs + int((positions - low + 1).sum())
    cache = tuple(n for n in ("k_pages", "v_pages", "k_scale", "v_scale") if n in arrays)
    return Problem(
        "paged_attention",
        case.name,
        getattr(case, "smoke", False),
        implementation,
        arrays,
        scalars,
        full,
        call,
        run,
        *_needs(call, tokens, sum(case.queries), pairs),
        cache,
        bytes_stored=_stored(call, tokens, call.tokens),
        case=case,
    )


def _needs(call: Any, tokens: int, queries: int, pairs: int) -> tuple[int, int]:
    """Needed bytes and FLOPs of `tokens` cached tokens, `queries` queries and `pairs` of a query and a key."""
    kv, io = jnp.dtype(call.kv_dtype).itemsize, jnp.dtype(call.dtype).itemsize
    sizes = call.head_dim + call.value_dim
    scales = 8 if call.kv_dtype == "int8" else 0
    held = tokens * call.kv_heads * (sizes * kv + scales) + queries * call.heads * sizes * io
    return held, 2 * pairs * call.heads * sizes


def _stored(call: Any, tokens: int, queries: int) -> int:
    """Bytes of `tokens` cached tokens in memory, padding included, and of `queries` queries and results."""
    folded = call.layout == "folded"
    sizes = call.head_dim, call.value_dim
    columns = sum(folded_width(call.kv_heads, n) if folded else call.kv_heads * n for n in sizes)
    scales = 8 * (round_up(call.kv_heads, SUBLANES) if folded else call.kv_heads) if call.kv_dtype == "int8" else 0
    held = tokens * (columns * jnp.dtype(call.kv_dtype).itemsize + scales)
    return held + queries * call.heads * sum(sizes) * jnp.dtype(call.dtype).itemsize


def _matmul(case: Any, implementation: Any, layout: Layout | None = None) -> Problem:
    from pallas_kernels.quant_array import DTYPES, QuantArray
    from pallas_kernels.quantized_matmul.api import quantized_matmul
    from pallas_kernels.quantized_matmul.call import make_call

    groups = case.columns // (case.group or case.columns)
    scale = jax.ShapeDtypeStruct((groups, case.out), jnp.float32)
    arrays = {
        "x": jax.ShapeDtypeStruct((case.rows, case.columns), case.dtype),
        "values": jax.ShapeDtypeStruct((case.out, case.columns), DTYPES[case.bits]),
        "scales": scale,
    }
    if not case.symmetric:
        arrays["offsets"] = scale

    def weight(values):
        return QuantArray(values["values"], values["scales"], values.get("offsets"), case.activations, case.dtype)

    def run(values, config, interpret=False):
        return quantized_matmul(
            values["x"], weight(values), config=config, implementation=implementation, interpret=interpret
        )

    call = make_call(arrays["x"], weight(arrays))
    io = case.rows * (case.columns + case.out) * jnp.dtype(case.dtype).itemsize
    return Problem(
        "quantized_matmul",
        case.name,
        case.smoke,
        implementation,
        arrays,
        {},
        {},
        call,
        run,
        call.weight_bytes + io,
        2 * case.rows * case.columns * case.out,
        ("values",),
        case=case,
    )


# (case, implementation[, layout of the cache, if not the implementation's]) -> Problem
OPS: dict[str, Callable[..., Problem]] = {
    "flash_attention": _dense("flash_attention"),
    "decode_attention": _dense("decode_attention"),
    "paged_attention": _paged,
    "quantized_matmul": _matmul,
}


def named(op: str, platform: str, reference: str | None) -> Any:
    """The implementation of a command's argument: None is the platform's first, `package.module:name` a user's own.

    Raises:
      ValueError: there is no such implementation.
    """
    if reference is None:
        return for_platform(op, platform)[0]
    known = implementations(op)
    if reference in known:
        return reference
    if not {":", "."} & set(reference) and find_spec(reference) is None:
        raise ValueError(f"{op} has no implementation {reference!r}; it has {', '.join(known)}")
    return load(reference)


def layout_of(op: str, given: Any) -> Layout:
    """The layout that an implementation gets: the first that it declares, or the op's default if it reads all."""
    return (getattr(op_of(op).find(given), "LAYOUTS", None) or ("heads_first",))[0]


def for_platform(op: str, platform: str) -> list[str]:
    """The names of an op's implementations for a platform, in the order in which `auto` tries them."""
    found = op_of(op).implementations
    return [name for name in found if platform in found.platforms(name)]


def ops(platform: str | None = None) -> list[str]:
    """The ops with cases; with a platform, those that have a kernel for it."""
    return [op for op in OPS if platform is None or for_platform(op, platform)]


def problems(
    op: str, implementation: Any, name: str | None = None, large_only: bool = False, layout: Layout | None = None
) -> list[Problem]:
    """The problems of an op for an implementation, real sizes first.

    Args:
      name: only cases whose name contains it.
      large_only: leave the small cases out.
      layout: of K and V; None: `layout_of` the implementation.

    Raises:
      ValueError: no such op.
    """
    found = [c for c in cases(op, large_only) if name is None or name in c.name]
    return [OPS[op](c, implementation, layout) for c in found]


def cases(op: str, large_only: bool = False) -> list[Any]:
    """The cases of an op, real sizes first. Raises ValueError: no such op."""
    if op not in OPS:
        raise ValueError(f"no op {op!r}; there are {', '.join(ops())}")
    listed = import_module(f"pallas_kernels.{op}.cases")
    small = getattr(listed, "CASES", None) or getattr(listed, "SMALL", ())
    return [*listed.LARGE, *(() if large_only else [c for c in small if c not in listed.LARGE])]
