"""The entry of the attention ops over a dense cache: check the arguments, make the `Call`, run the op."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pallas_kernels.attention.call import as_given_to_kernels, check_rows, make_call
from pallas_kernels.dispatch import Implementation, Op


def attend(
    op: Op,
    arrays: Mapping[str, Any],
    settings: Mapping[str, Any],
    implementation: Implementation,
    config: Any,
    interpret: Any,
) -> Any:
    """Run `op`. `arrays` and `settings` are the arguments of `flash_attention` by name, arrays and the others."""
    call = make_call(op.name, arrays, **settings)
    check_rows(op.name, arrays["starts"], arrays["lengths"])
    arrays = as_given_to_kernels(arrays, settings["scale"], "starts", "lengths")
    return op.run(implementation, arrays, call, config, interpret)
