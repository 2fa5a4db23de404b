"""Checks of what a step is given: a cache that is still alive, integers and booleans of the right shape."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pdx.errors import DonatedError, RequestError


def check_cache(cache: Any, *kinds: type) -> None:
    """Raise RequestError unless `cache` is one of these kinds, DonatedError if it was donated to a step."""
    if not isinstance(cache, kinds):
        made = {"DenseCache": "pdx.init_cache", "PagedCache": "pdx.init_paged_cache"}
        wanted = " or ".join(f"a {kind.__name__}, which {made[kind.__name__]} makes" for kind in kinds)
        raise RequestError(f"cache is {type(cache).__name__}: it must be {wanted}")
    check_alive(cache)


def check_alive(cache: Any, what: str = "cache") -> None:
    """Raise DonatedError for a cache, or a sampling state, that was donated to an earlier step."""
    leaf = cache.layers[0].k if what == "cache" else cache.output_counts
    # A tracer cannot tell, and an `ArraySpec` is no array.
    if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted():
        raise DonatedError(
            f"this {what} was given to an earlier step, which wrote into its memory: use the {what} that the step "
            "returned, or make a new one"
        )


def whole_numbers(name: str, value: Any, shape: tuple[int | None, ...], dims: str) -> Any:
    """`value` as an array. Raises RequestError unless it holds integers and has this shape (None: any size).

    `dims`: the shape in letters. Values are not checked: a device may still be computing them.
    """
    return _array(name, value, shape, dims, "iu", "whole numbers")


def as_new_lengths(lengths: Any, batch: int, tokens: int) -> jax.Array:
    """How many of each row's `tokens` are real, [B]; None: all. Raises RequestError."""
    if lengths is None:
        return jnp.full((batch,), tokens, jnp.int32)
    return jnp.asarray(whole_numbers("lengths", lengths, (batch,), "[B]"), jnp.int32)


def flags(name: str, value: Any, shape: tuple[int | None, ...], dims: str) -> Any:
    """As `whole_numbers`, for booleans."""
    return _array(name, value, shape, dims, "b", "bool")


def _array(name: str, value: Any, shape: tuple[int | None, ...], dims: str, kinds: str, what: str) -> Any:
    if not isinstance(value, np.ndarray | jax.Array):
        try:
            value = np.asarray(value)
        except (ValueError, TypeError) as error:
            raise RequestError(f"{name} must be {what} {dims}, and cannot be made an array: {error}") from None
    if value.dtype.kind not in kinds:
        raise RequestError(f"{name} must be {what} {dims}, not {value.dtype}")
    if value.shape != shape and not _fits(value.shape, shape):
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise RequestError(f"{name} must be {what} {dims} = [{sizes}], not of shape {list(value.shape)}")
    return value


def _fits(found: tuple[int, ...], shape: tuple[int | None, ...]) -> bool:
    return len(found) == len(shape) and all(s in (None, n) for n, s in zip(found, shape, strict=True))
