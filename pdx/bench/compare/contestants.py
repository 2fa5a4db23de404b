"""The implementations that are compared on a case: XLA's, pdx's Pallas kernels, the user's, and other installed ones.

Random caches are made in the layout `heads_last`. Each implementation gets them in the layout that it reads; converting
them is not timed. pdx's paths read the layout of the device's caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.analysis.problem import Problem
from pdx.bench.compare import paths
from pdx.bench.compare.expected import Arrays, in_layout


@dataclass(frozen=True)
class Contestant:
    """An implementation that is compared: `fn(x, *held)`, on arrays in the layout that it reads.

    `result` converts its result to the op's shape.
    """

    path: str
    fn: Callable[..., jax.Array]
    x: jax.Array
    held: tuple[Any, ...]
    result: Callable[[jax.Array], jax.Array] = lambda out: out


def library_and_own(
    op: str, case: Any, arrays: Arrays, platform: str, extra: Mapping[str, Any] | None = None
) -> Iterator[Contestant]:
    """XLA's path and the kernels, the library's and the user's, that run on the platform.

    A case that one of them refuses raises when it is traced.
    """
    for path in paths.runnable_paths(op, platform, extra or {}):
        yield from_problem(path.name, path.problem(op, case, platform), arrays)


def from_problem(path: str, problem: Problem, arrays: Arrays, interpret: bool = False) -> Contestant:
    """A problem's own call, for arrays whose caches have the layout `heads_last`."""
    layout = getattr(problem.call, "layout", None)
    x, *held = (in_layout(arrays, layout) if layout else arrays).values()
    return Contestant(path, problem.fn(interpret=interpret), x, tuple(held))


def peers(op: str, case: Any, arrays: Arrays, platform: str) -> Iterator[Contestant]:
    """Implementations of other libraries that are installed and can compute the case."""
    if op in ("flash_attention", "decode_attention"):
        yield from _dense_peers(case, arrays, platform)
    elif op == "paged_attention" and platform in ("tpu", "gpu"):
        yield from _paged_peers(case, arrays, platform)


def missing_peers() -> list[str]:
    """Sentences about libraries that are not installed."""
    return [] if find_spec("tokamax") else ["tokamax is not installed, so it is not compared (pip install tokamax)"]


def _dense_peers(case: Any, arrays: Arrays, platform: str) -> Iterator[Contestant]:
    square, decode = is_square(case), is_decode(case)
    if not expressible(case):
        return
    q, k, v = (arrays[n] for n in "qkv")
    settings: dict[str, Any] = {"scale": case.settings()["scale"]}
    seen: dict[str, jax.Array] = {}
    if square:
        settings |= {"is_causal": case.causal}
        settings |= {"local_window_size": (case.window - 1, 0)} if case.window else {}
    elif decode:
        seen = {"key_value_seq_lengths": arrays["lengths"]}
    else:
        seen = {"mask": jnp.asarray(mask(case))}

    def call(function, **more):
        return lambda q, k, v, seen: function(q, k, v, **settings, **seen, **more)

    jax_nn = [("jax.nn", {"implementation": "xla"})]
    if platform == "gpu" and case.dtype != "float32":
        jax_nn.append(("jax.nn, cuDNN", {"implementation": "cudnn"}))
    for name, more in jax_nn:
        yield Contestant(name, call(jax.nn.dot_product_attention, **more), q, (k, v, seen))
    if find_spec("tokamax"):
        import tokamax

        yield Contestant("tokamax", call(tokamax.dot_product_attention), q, (k, v, seen))
    scale = settings["scale"]
    if platform == "gpu" and decode:
        from jax.experimental.pallas.ops.gpu.decode_attention import gqa

        yield Contestant(
            "jax Pallas gqa",
            lambda q, k, v, n: gqa(q, k, v, kv_seq_len=n, sm_scale=scale),
            q[:, 0],
            (k, v, arrays["lengths"]),
            lambda out: out[:, None],
        )
    if platform in ("tpu", "gpu") and square and not case.window:
        yield _square_kernel(case, q, k, v, platform, scale)


def _square_kernel(case: Any, q, k, v, platform: str, scale: float) -> Contestant:
    """JAX's own prefill kernels. They have no GQA, so K and V get as many heads as Q."""
    k, v = (jnp.repeat(x, case.group, axis=2) for x in (k, v))
    if platform == "gpu":
        from jax.experimental.pallas.ops.gpu.attention import mha

        return Contestant("jax Pallas mha", lambda q, k, v: mha(q, k, v, None, scale, case.causal), q, (k, v))
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    turned = [x.transpose(0, 2, 1, 3) for x in (q, k, v)]
    return Contestant(
        "jax Pallas flash",
        lambda q, k, v: flash_attention(q, k, v, causal=case.causal, sm_scale=scale),
        turned[0],
        tuple(turned[1:]),
        lambda out: out.transpose(0, 2, 1, 3),
    )


def _paged_peers(case: Any, arrays: Arrays, platform: str) -> Iterator[Contestant]:
    plain = not case.sinks and case.value_size == case.head_dim and case.stored == case.dtype
    if not plain or not all(case.queries):
        return
    k, v, tables, lengths = (arrays[n] for n in ("k_pages", "v_pages", "block_tables", "lengths"))
    scale = case.logit_scale
    if platform == "tpu":
        from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

        # Its pages hold K and V heads alternately.
        pages = jnp.stack([k, v], axis=3).reshape(*k.shape[:2], -1, case.head_dim)
        rows = jnp.array([len(case.lengths)], jnp.int32)

        def run(q, pages, lengths, tables, starts, rows):
            return ragged_paged_attention(
                q,
                pages,
                lengths,
                tables,
                starts,
                rows,
                sm_scale=scale,
                sliding_window=case.window,
                soft_cap=case.softcap,
            )

        yield Contestant("jax Pallas ragged", run, arrays["q"], (pages, lengths, tables, arrays["query_starts"], rows))
    elif case.max_queries == 1 and not case.window:
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

        def run(q, k, v, tables, lengths):  # it has no scale
            return paged_attention(
                (q * scale).astype(q.dtype), k, v, tables, lengths, attn_logits_soft_cap=case.softcap
            )

        yield Contestant(
            "jax Pallas paged", run, arrays["q"], (k.transpose(2, 0, 1, 3), v.transpose(2, 0, 1, 3), tables, lengths)
        )


def _plain(case: Any) -> bool:
    """Whether the case uses no feature that only pdx's ops have."""
    same = case.value_dim in (None, case.head_dim) and case.kv_dtype in (None, case.dtype)
    return same and not (case.softcap or case.sinks or case.tree or case.quantized)


def expressible(case: Any) -> bool:
    """Whether attention with a mask can compute it: the cache has not wrapped, so that a position is its slot."""
    return _plain(case) and max(case.lengths, default=0) <= case.slots


def mask(case: Any) -> np.ndarray:
    """[B, 1, T, S] of bool: the keys of each query. Padding gets key 0, so that no softmax is empty."""
    positions, keys = case.positions[:, :, None], np.arange(case.slots)
    seen = keys < np.asarray(case.lengths)[:, None, None]
    if case.causal:
        seen = seen & (keys <= positions)
    if case.window:
        seen = seen & (keys > positions - case.window)
    return (seen | (~case.real[:, :, None] & (keys == 0)))[:, None]


def is_square(case: Any) -> bool:
    """Whether all rows are whole prompts that fill the cache: query i is at position i, with T = S."""
    return _plain(case) and not any(case.held) and set(case.new) == {case.queries} == {case.slots}


def is_decode(case: Any) -> bool:
    """Whether each row has one query after all its keys, in a cache that has not wrapped."""
    simple = _plain(case) and case.queries == 1 and case.causal and not case.window and not case.full
    return simple and max(case.lengths) <= case.slots
