"""Weights of the tiny models from nothing but their names and shapes, in plain numpy.

So a golden model is a configuration, a list of shapes and logits: no weights are stored. The bits of
numpy's PCG64 are fixed for good (its distributions are not), so numbers are made from them directly.
"""

from __future__ import annotations

import hashlib
import zlib

import numpy as np

SEED = 20_240
# Standard deviations. Queries and keys are wide, so that attention is far from uniform and a wrong
# rotation, window, scale or cap shows; biases and norm weights are far from 0 and 1 for the same reason.
EMBEDDING, BIAS, QUERY_KEY, HEAD, OTHER = 0.4, 0.5, 1.4, 2.0, 1.0


def _uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of mean 0 and variance 1, a stream of its own for each name."""
    bits = np.random.PCG64([SEED, zlib.crc32(name.encode())]).random_raw(int(np.prod(shape)))
    unit = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return ((2 * unit - 1) * 3**0.5).reshape(shape)


def _tensor(name: str, shape: tuple[int, ...], norm_mean: float) -> np.ndarray:
    x = _uniform(name, shape)
    if name.endswith("norm.weight"):
        x = norm_mean + 0.3 * x
    elif name.endswith(".bias"):
        x = BIAS * x
    elif "embed_tokens" in name:
        x = EMBEDDING * x
    else:
        wide = "q_proj" in name or "k_proj" in name
        x = x * (QUERY_KEY if wide else HEAD if "lm_head" in name else OTHER) * shape[-1] ** -0.5
    return x.astype(np.float32)


def make_weights(shapes: dict[str, tuple[int, ...]], *, offset_norms: bool) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint under its own names; with `offset_norms`, norm weights are the offset from one."""
    return {name: _tensor(name, tuple(shape), 0.0 if offset_norms else 1.0) for name, shape in sorted(shapes.items())}


def digest(weights: dict[str, np.ndarray]) -> str:
    """sha256 over names and bytes."""
    sha = hashlib.sha256()
    for name, x in sorted(weights.items()):
        sha.update(name.encode())
        sha.update(np.ascontiguousarray(x).tobytes())
    return sha.hexdigest()
