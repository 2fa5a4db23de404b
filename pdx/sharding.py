"""Sharding: array declarations with logical axes, and the one table from logical axes to mesh axes.

Every parameter and cache leaf is declared as an `ArraySpec`: shape, dtype and logical axes together. Initialisation,
loading, placement and the abstract arguments of ahead-of-time compilation all derive from it. One device is a mesh of
one device, without special cases.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pdx.meshes import as_mesh, make_mesh, on_own_mesh, parse_mesh

__all__ = (
    "LOGICAL_TO_MESH",
    "ArraySpec",
    "constrain",
    "constrain_rows",
    "is_spec",
    "make_mesh",
    "mesh_axis",
    "parse_mesh",
    "place",
    "place_rows",
    "replicated",
    "row_spec",
)

# Logical axis -> mesh axis. An axis that is not listed, or None, is replicated.
LOGICAL_TO_MESH: dict[str, str] = {
    "batch": "data",
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",
    "vocab": "model",
}


@dataclass(frozen=True)
class ArraySpec:
    """The declaration of one array: what it is, without its data.

    `axes` names the logical axis of each dimension (None: never sharded). `units` is the number of indivisible pieces
    of each dimension, where that is not its size: a projection of N heads of H has N*H rows, but shards by whole heads.
    `part` is the cost model's name for the group of parameters (`pdx.cost.model_matrices.PARTS`).
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: Any
    units: tuple[int, ...] | None = None
    init: str = "normal"  # normal | ones | zeros
    part: str = ""

    def __post_init__(self):
        if len(self.axes) != len(self.shape) or (self.units and len(self.units) != len(self.shape)):
            raise ValueError(f"shape {self.shape}, axes {self.axes} and units {self.units} differ in rank")

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def held_bytes(self, mesh: Mesh | None) -> int:
        """Bytes on all devices of `mesh` together; replicated parts count once per device."""
        if mesh is None:
            return self.size_bytes
        return mesh.size * replace(self, shape=self.sharding(mesh).shard_shape(self.shape), units=None).size_bytes

    def partition(self, mesh: Mesh) -> PartitionSpec:
        """The mesh axis of each dimension on `mesh`; a dimension that does not divide evenly is replicated."""
        units = self.units or self.shape
        return PartitionSpec(*(mesh_axis(axis, n, mesh) for axis, n in zip(self.axes, units, strict=True)))

    def sharding(self, mesh: Mesh) -> NamedSharding:
        return NamedSharding(mesh, self.partition(mesh))

    def abstract(self, mesh: Mesh | None = None) -> jax.ShapeDtypeStruct:
        """Shape, dtype and sharding without data, for `jit(...).lower`."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.sharding(mesh) if mesh else None)


def mesh_axis(axis: str | None, units: int, mesh: Mesh) -> str | None:
    """The mesh axis for `units` pieces of a logical axis, or None if they do not divide evenly."""
    name = LOGICAL_TO_MESH.get(axis) if axis else None
    if name is None or name not in mesh.shape or mesh.shape[name] == 1 or units % mesh.shape[name]:
        return None
    return name


def is_spec(x: Any) -> bool:
    return isinstance(x, ArraySpec)


def replicated(specs: Iterable[ArraySpec], mesh: Mesh) -> list[str]:
    """Sentences for the user about logical axes that are replicated because they do not divide evenly."""
    said: dict[str, str] = {}
    for spec in specs:
        for axis, units in zip(spec.axes, spec.units or spec.shape, strict=True):
            name = LOGICAL_TO_MESH.get(axis) if axis else None
            if axis and name in mesh.shape and units % mesh.shape[name]:
                said[axis] = f"{axis} ({units}) does not divide over {name}={mesh.shape[name]}: replicated"
    return list(said.values())


def constrain(x: jax.Array, spec: ArraySpec, mesh: Mesh | None) -> jax.Array:
    """Constrain `x` to the placement of `spec` inside a jitted function; without a mesh, return it unchanged.

    A step must return its cache with the placement that it received. Otherwise the compiler may choose another one,
    which breaks the aliasing and recompiles the next call.
    """
    return x if mesh is None else jax.lax.with_sharding_constraint(x, spec.sharding(mesh))


def row_spec(x: Any) -> ArraySpec:
    """The declaration of an array with one row per request: the first axis is the batch."""
    return ArraySpec(x.shape, ("batch", *[None] * (x.ndim - 1)), x.dtype)


def constrain_rows(tree: Any, mesh: Mesh | None) -> Any:
    """`constrain` for a tree of arrays with one row per request."""
    return jax.tree.map(lambda x: constrain(x, row_spec(x), mesh), tree)


def place_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Put a tree of arrays with one row per request onto `mesh`."""
    return tree if mesh is None else jax.tree.map(lambda x: jax.device_put(x, row_spec(x).sharding(mesh)), tree)


@on_own_mesh
def place(tree: Any, specs: Any, mesh: Mesh | str | Mapping[str, int]) -> Any:
    """Put a tree of arrays (numpy or jax) onto `mesh` as `specs`, a tree of the same structure, declare."""
    own = as_mesh(mesh)
    return jax.tree.map(lambda s, x: jax.device_put(x, s.sharding(own)), specs, tree, is_leaf=is_spec)
