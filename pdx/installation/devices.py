"""Names of this process's devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdx.installation.versions import check

if TYPE_CHECKING:
    from jax.sharding import Mesh


def where_run(mesh: Mesh | None) -> str:
    """The name of the devices that a model on `mesh` runs on; without a mesh, of the default device."""
    return device_name(every=mesh is not None, mesh=mesh)


def device_name(every: bool = True, mesh: Mesh | None = None) -> str:
    """This process's devices, such as `cpu` or `tpu (TPU v5 lite) x4`; without `every`, only the default device.

    With a `mesh`, its devices and axes, such as `cpu x8 (data=2, model=4)`.
    """
    check()
    import jax

    devices = jax.devices() if mesh is None else list(mesh.devices.flat)
    device, count = devices[0], len(devices)
    kind = "" if device.device_kind.lower() == device.platform else f" ({device.device_kind})"
    axes = "" if mesh is None else f" ({', '.join(f'{axis}={size}' for axis, size in mesh.shape.items())})"
    return f"{device.platform}{kind}" + (f" x{count}" if every and count > 1 else "") + axes
