"""Which attention kernels a step runs: what `kernels=` accepts, the cache layout they need, and why a path is taken.

`kernels` is one word for all ops (auto, xla, pallas), or a user's own implementations for some of them:

    prefill(params, cfg, tokens, lengths, cache, kernels={"decode_attention": mine})

where `mine` is anything that `pallas_kernels.implementation` describes: a module, an object with `run`, or a function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax

from pallas_kernels import hardware
from pallas_kernels.decode_attention.api import OP as DECODE
from pallas_kernels.dispatch import Op
from pallas_kernels.flash_attention.api import OP as FLASH
from pallas_kernels.implementation import runs_on
from pallas_kernels.layouts import LAYOUTS, Layout
from pallas_kernels.paged_attention.api import OP as PAGED
from pdx.cache.dense import default_layout
from pdx.errors import RequestError

# Users choose among auto, xla and pallas. tpu and gpu are for compiling for a chip that is not here. dense is the
# reference that the others are compared with: all scores in memory, over the whole capacity.
KernelName = Literal["auto", "xla", "pallas", "tpu", "gpu", "dense"]
PALLAS_OF_LAYOUT: dict[Layout, str] = {"folded": "tpu", "heads_last": "gpu"}
OPS: dict[str, Op] = {op.name: op for op in (FLASH, DECODE, PAGED)}


@dataclass(frozen=True)
class OwnKernels:
    """A user's own implementations by op; other ops are `auto`. Hashable, since a step is compiled for them."""

    by_op: tuple[tuple[str, Any], ...]

    def of(self, op: str) -> Any:
        """What `implementation=` of an op is: `auto` for one that is not named."""
        return OPS[op].implementation(dict(self.by_op).get(op, "auto"))

    def found(self) -> dict[str, Any]:
        """The implementations themselves by op; an op that is `auto` is left out."""
        return {op: OPS[op].find(given) for op, given in self.by_op if given != "auto"}


Kernels = KernelName | Mapping[str, Any] | OwnKernels


def as_kernels(kernels: Kernels) -> KernelName | OwnKernels:
    """Check `kernels` and make it hashable, so that a step can be compiled for it.

    Raises:
      RequestError: an unknown word, an op that is no attention op, or something that is no implementation.
    """
    if isinstance(kernels, OwnKernels):
        return kernels
    if isinstance(kernels, Mapping):
        for op, given in kernels.items():
            if op not in OPS:
                raise RequestError(f"kernels names the op {op!r}: a step's own kernels are for {', '.join(OPS)}")
            _checked(OPS[op], given)
        return OwnKernels(tuple(sorted(kernels.items(), key=lambda item: item[0])))
    if kernels not in get_args(KernelName):
        raise RequestError(f"kernels {kernels!r} is not one of auto, xla, pallas, nor a dict of ops to implementations")
    return kernels


def _checked(op: Op, given: Any) -> None:
    try:
        op.explain(given)
    except ValueError as error:
        raise RequestError(str(error)) from None


def layout_for(kernels: Kernels, platform: str | None = None) -> Layout:
    """The cache layout that these kernels read. On a CPU `pallas` means the TPU's kernels, interpreted.

    Args:
      platform: where the cache will be; None: this process's devices.

    Raises:
      RequestError: the user's own kernels have no layout in common.
    """
    kernels = as_kernels(kernels)
    if isinstance(kernels, OwnKernels):
        return _common_layout(kernels, platform)
    if kernels in ("tpu", "gpu"):
        return default_layout(kernels)
    layout = default_layout(platform)
    return "folded" if kernels == "pallas" and layout not in PALLAS_OF_LAYOUT else layout


def _common_layout(kernels: OwnKernels, platform: str | None) -> Layout:
    reads = {op: getattr(found, "LAYOUTS", None) or LAYOUTS for op, found in kernels.found().items()}
    for layout in (default_layout(platform), *LAYOUTS):
        if all(layout in layouts for layouts in reads.values()):
            return layout
    each = "; ".join(f"{op} reads {' or '.join(layouts)}" for op, layouts in reads.items())
    raise RequestError(f"one cache serves all of a step's kernels, and these have no layout in common: {each}")


def implementation(kernels: Kernels, layout: Layout, op: str | None = None) -> tuple[Any, bool]:
    """The `implementation=` for the kernel library, and whether it runs interpreted.

    Args:
      layout: the cache's.
      op: the op's name, which only a user's own kernels depend on.
    """
    kernels = as_kernels(kernels)
    if isinstance(kernels, OwnKernels):
        found, here = kernels.found().get(op), hardware.platform_of()
        return kernels.of(op), found is not None and here == "cpu" and not runs_on(found, here)
    if kernels != "pallas":
        return kernels, False
    if layout not in PALLAS_OF_LAYOUT:
        raise NotImplementedError(
            f"the Pallas kernels read a cache that lies {' or '.join(PALLAS_OF_LAYOUT)}, this one lies {layout}: "
            f"make it with init_cache(..., layout={layout_for(kernels)!r}), or use kernels='xla'"
        )
    return PALLAS_OF_LAYOUT[layout], jax.default_backend() == "cpu"


def explain(kernels: Kernels) -> dict[str, str]:
    """The path that each phase's attention takes, and why. Raises NotImplementedError where the kernels would."""
    return _explained(kernels, {"prefill": FLASH, "decode": DECODE})


def explain_mixed(kernels: Kernels) -> str:
    """As `explain`, for a mixed step over pages."""
    return _explained(kernels, {"mixed": PAGED})["mixed"]


def _explained(kernels: Kernels, ops: dict[str, Op]) -> dict[str, str]:
    layout, found = layout_for(kernels), {}
    for phase, op in ops.items():
        name, interpreted = implementation(kernels, layout, op.name)
        if isinstance(name, str) and name == "dense":
            return dict.fromkeys(("prefill", "decode"), "reference_attention: dense (asked for)")
        try:
            found[phase] = f"{op.explain(name)}{', interpreted on the CPU' if interpreted else ''}"
        except ValueError as error:  # PDX_KERNELS names no implementation
            raise RequestError(str(error)) from None
    return found
