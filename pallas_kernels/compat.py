"""All code that depends on the JAX version (0.10.2 to 0.12)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import jax
from jax.sharding import AbstractDevice

if jax.__version_info__ >= (0, 11):
    # Importing Pallas changes the key of JAX's caches. The ops import their kernels at trace time; without this earlier
    # import the first programs would be traced and compiled twice.
    import jax.experimental.pallas.fuser


def abstract_device(kind: str, cores: int, platform: str, **facts) -> AbstractDevice:
    """A device that is not present. `facts` become its attributes, such as the `compute_capability` Mosaic asks for."""
    wanted = {"device_kind": kind, "num_cores": cores, "platform": platform}
    known = inspect.signature(AbstractDevice).parameters
    cls = type("AbstractDevice", (AbstractDevice,), facts) if facts else AbstractDevice
    return cls(**{name: value for name, value in wanted.items() if name in known})


def topology_arguments(platform: str) -> dict[str, object]:
    """Arguments of `get_topology_desc` beside the name. JAX 0.10 needs the host's bounds, later ones accept them."""
    return {"chips_per_host_bounds": (1, 1, 1)} if platform == "tpu" else {}


def without_cudnn() -> str | None:
    """Why JAX's attention cannot call cuDNN in this process; None if it can. Tracing the call asks for its version."""
    from jax._src.cudnn.fused_attention_stablehlo import check_cudnn_version  # slow to import

    try:
        check_cudnn_version()
    except RuntimeError as error:
        return f"JAX finds no cuDNN in this process ({error})"
    return None


def cost_dict(analysis: object) -> Mapping[str, float]:
    """`Compiled.cost_analysis()` as one mapping; some versions return a list with one entry per program."""
    if isinstance(analysis, list | tuple):
        analysis = analysis[0] if analysis else {}
    return analysis or {}


def scan_sizes(params: Mapping[str, object]) -> tuple[int, int]:
    """Number of constants and of carried values of a `scan` equation. Its operands begin with them, in this order."""
    if "ft_in" in params:  # JAX 0.12
        consts, carry, _ = params["ft_in"].unpack()
        return len(list(consts)), len(list(carry))
    return params["num_consts"], params["num_carry"]
