"""Evaluates equations of a jaxpr on numpy values: in numpy for the frequent scalar ones, by JAX for the rest."""

from __future__ import annotations

import operator
from collections.abc import Callable

import jax
import numpy as np


def _divide(a, b):
    if np.issubdtype(np.asarray(a).dtype, np.integer):
        return (np.sign(a) * np.sign(b) * (np.abs(a) // np.maximum(np.abs(b), 1))).astype(np.asarray(a).dtype)
    return a / b


_NUMPY = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "max": np.maximum,
    "min": np.minimum,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": np.invert,
    "neg": operator.neg,
    "sign": np.sign,
    "abs": np.abs,
    "div": _divide,
    "rem": np.fmod,
    "select_n": lambda which, *cases: np.where(which, cases[1], cases[0]) if len(cases) == 2 else cases[int(which)],
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "shift_left": np.left_shift,
    "shift_right_arithmetic": np.right_shift,
    "multiple_of": lambda x: x,
    "stop_gradient": lambda x: x,
}


def evaluator(eqn) -> Callable[[list], list]:
    """A function of an equation's known operands: in numpy if the primitive is a frequent one, else by JAX."""
    name, params = eqn.primitive.name, eqn.params
    if name in _NUMPY:
        operation, dtype = _NUMPY[name], eqn.outvars[0].aval.dtype
        return lambda values: [np.asarray(operation(*values), dtype=dtype)]
    if name == "convert_element_type":
        return lambda values: [np.asarray(values[0]).astype(params["new_dtype"])]
    if name == "broadcast_in_dim":
        shape, dims = params["shape"], params["broadcast_dimensions"]

        def spread(values):
            lifted = [1] * len(shape)
            for axis, size in zip(dims, np.shape(values[0]), strict=True):
                lifted[axis] = size
            return [np.broadcast_to(np.reshape(values[0], lifted), shape)]

        return spread
    if name in ("reshape", "squeeze", "expand_dims"):
        return lambda values: [np.reshape(values[0], eqn.outvars[0].aval.shape)]
    if name == "broadcast_to":
        return lambda values: [np.broadcast_to(values[0], params["shape"])]
    if name == "iota":
        shape, axis = params["shape"], params["dimension"]
        lifted = [n if i == axis else 1 for i, n in enumerate(shape)]
        made = np.broadcast_to(np.arange(shape[axis], dtype=params["dtype"]).reshape(lifted), shape)
        return lambda values: [made]

    def bind(values):
        out = eqn.primitive.bind(*(jax.numpy.asarray(v) for v in values), **params)
        return [np.asarray(x) for x in (out if eqn.primitive.multiple_results else [out])]

    return bind
