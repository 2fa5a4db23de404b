"""Meshes of devices: which are accepted, and how they are converted. One device is a mesh of one device."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import wraps
from inspect import isgeneratorfunction
from typing import Any, Final, Literal, ParamSpec, TypeGuard, TypeVar, cast

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from pdx.errors import RequestError

P = ParamSpec("P")
R = TypeVar("R")

MESH_AXES = ("data", "model")

# A program is traced for a mesh, for one device (None), or for the unknown devices of its arguments.
ANY_DEVICES: Final = "any devices"
Devices = Mesh | None | Literal["any devices"]
MESH_HELP = "expected axes out of data, model with a size each, such as data=2,model=4"


def parse_mesh(text: str) -> dict[str, int]:
    """Read `data=2,model=4`. Raises RequestError for an unknown axis or a size below 1."""
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, size = (x.strip() for x in part.partition("="))
        if name not in MESH_AXES or name in sizes or not (size.isascii() and size.isdigit()) or int(size) < 1:
            raise RequestError(f"mesh {text!r}: {MESH_HELP}")
        sizes[name] = int(size)
    return sizes


def make_mesh(sizes: str | Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `data` and `model`; an axis that is not named has size 1.

    Uses the first data*model devices. Raises RequestError when there are fewer, and for other axes or sizes.
    """
    if isinstance(sizes, str):
        sizes = parse_mesh(sizes)
    if sizes is not None and not isinstance(sizes, Mapping):
        raise RequestError(f"mesh {sizes!r} of type {type(sizes).__name__} does not say how many devices: {MESH_HELP}")
    given = {axis: _size(n) for axis, n in (sizes or {}).items()}
    if not set(given) <= set(MESH_AXES) or None in given.values():
        raise RequestError(f"mesh {dict(sizes or {})!r}: {MESH_HELP}")
    shape = tuple(given.get(axis) or 1 for axis in MESH_AXES)
    devices = list(devices if devices is not None else jax.devices())
    count = math.prod(shape)
    if count > len(devices):
        raise RequestError(
            f"a mesh of {dict(zip(MESH_AXES, shape, strict=True))} needs {count} devices, "
            f"there are {len(devices)} ({devices[0].platform}); for virtual CPU devices set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return Mesh(np.array(devices[:count]).reshape(shape), MESH_AXES)


def _size(n: Any) -> int | None:
    """`n` as a number of devices; None if it is none."""
    with suppress(TypeError):
        if not isinstance(n, bool | np.bool_) and (n := operator.index(n)) > 0:
            return n
    return None


def as_mesh(mesh: Mesh | str | Mapping[str, int] | None) -> Mesh | None:
    """Convert any mesh that a user may pass to pdx's own: axes `data` and `model`, placed by the compiler.

    Devices keep their order. An axis that is missing gets size 1, axes of size 1 with other names are dropped, and
    explicit axes (the default of `jax.make_mesh`) become automatic. None stays None.

        >>> as_mesh({"model": 1}).shape
        OrderedDict({'data': 1, 'model': 1})

    Raises:
      RequestError: other axes, an abstract mesh, a repeated device, or something that is no mesh.
    """
    if mesh is None:
        return None
    if isinstance(mesh, str | Mapping):
        return make_mesh(mesh)
    if isinstance(mesh, AbstractMesh):
        raise RequestError(f"{mesh} has no devices: give a mesh over devices, or sizes such as data=2,model=4")
    if not isinstance(mesh, Mesh):
        raise RequestError(f"mesh {mesh!r} of type {type(mesh).__name__} is no mesh: {MESH_HELP}")
    if other := [name for name, size in mesh.shape.items() if size > 1 and name not in MESH_AXES]:
        raise RequestError(
            f"the mesh {dict(mesh.shape)} has the axis {other[0]!r}, which pdx does not know: "
            "name its axes data (for requests) and model (for heads and matrices), such as "
            "jax.make_mesh((2, 4), ('data', 'model'))"
        )
    if len(set(mesh.devices.flat)) < max(mesh.devices.size, 1):
        wrong = "names a device twice" if mesh.devices.size else "is empty"
        raise RequestError(f"the mesh {dict(mesh.shape)} {wrong}: give each of its places a device of its own")
    order = [mesh.axis_names.index(name) for name in MESH_AXES if name in mesh.axis_names]
    rest = [i for i in range(len(mesh.axis_names)) if i not in order]
    devices = mesh.devices.transpose(order + rest)
    return Mesh(devices.reshape([mesh.shape.get(name, 1) for name in MESH_AXES]), MESH_AXES)


def on_several_devices(mesh: Devices) -> TypeGuard[Mesh]:
    """Whether this is a mesh of more than one device."""
    return isinstance(mesh, Mesh) and mesh.size > 1


def on_one_device(mesh: Devices) -> bool:
    """Whether arguments are on one device: `mesh` says so, or the process has only one."""
    return jax.device_count() == 1 if mesh == ANY_DEVICES else not on_several_devices(mesh)


@contextmanager
def no_ambient_mesh() -> Iterator[None]:
    """Inside, a mesh that the caller has set with `jax.set_mesh` is ignored, since pdx's arrays name their own.

    Under a trace it stays, since it cannot be changed there.
    """
    with ExitStack() as stack:
        if not jax.sharding.get_abstract_mesh().empty:
            with suppress(ValueError):  # traced
                stack.enter_context(jax.set_mesh(None))
        yield


_END = object()


def on_own_mesh(function: Callable[P, R]) -> Callable[P, R]:
    """`function` with `no_ambient_mesh` around each call, or around each piece that a generator yields."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with no_ambient_mesh():
            return function(*args, **kwargs)

    @wraps(function)
    def each(*args: P.args, **kwargs: P.kwargs) -> Iterator[Any]:
        generator = cast("Generator[Any]", function(*args, **kwargs))
        with closing(generator) as pieces:
            while True:
                with no_ambient_mesh():
                    piece = next(pieces, _END)
                if piece is _END:
                    return
                yield piece

    return cast("Callable[P, R]", each if isgeneratorfunction(function) else call)


def check_mesh(parameter: Any, mesh: Mesh | None) -> None:
    """Raise RequestError if the cache is on `mesh` and the parameter on another mesh."""
    sharding = None if isinstance(parameter, jax.core.Tracer) else getattr(parameter, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh == mesh or sharding.mesh.size == 1:
        return
    theirs, ours = dict(sharding.mesh.shape), "one device" if mesh is None else dict(mesh.shape)
    raise RequestError(
        f"the parameters lie on a mesh of {theirs}, the cache on {ours}"
        f"{' in another order' if theirs == ours else ''}: give both the same mesh, such as "
        "init_cache(..., mesh=model.mesh)"
    )
