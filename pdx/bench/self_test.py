"""The part of `pdx doctor` that needs the device: its name, the kernel of each op, and whether XLA and Pallas agree.

    python -m pdx.bench.self_test

prints one JSON object per line: `{"devices": ...}`, `{"kernels": ...}`, `{"self_test": ...}`. It is a separate process,
since a broken runtime can crash it. The lines printed until then show how far it came.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import jax

# Imported before anything is compiled, because the import changes the keys of JAX's caches.
import jax.experimental.pallas.tpu
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention import api as decode_attention
from pallas_kernels.flash_attention import api as flash_attention
from pallas_kernels.paged_attention import api as paged_attention
from pallas_kernels.paged_write import api as write_pages
from pallas_kernels.quantized_matmul import api as quantized_matmul
from pdx.cache.dense import init_cache
from pdx.config import ModelConfig
from pdx.installation.compilation_cache import enable_cache
from pdx.layers.kernels import layout_for
from pdx.model import param_specs
from pdx.sharding import is_spec
from pdx.steps import decode_step, prefill

OPS = (flash_attention, decode_attention, paged_attention, write_pages, quantized_matmul)
# One layer with a shape that all kernels support: heads of 64, two query heads per KV head.
MODEL = ModelConfig(
    family="llama",
    vocab_size=512,
    d_model=256,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    d_ff=512,
    max_context=256,
)
ROWS, PROMPT, STEPS, CAPACITY = 2, 24, 4, 128
TOLERANCE = 1e-3  # of f32 logits, relative to the largest one


def sections() -> Iterator[tuple[str, Any]]:
    """(name, content) of each section, as soon as it is known."""
    yield "devices", devices()
    yield (
        "kernels",
        [{"op": c.op, "implementation": c.implementation, "reason": c.reason} for c in (op.explain() for op in OPS)],
    )
    yield "self_test", self_test()


def devices() -> dict[str, Any]:
    """The backend and its devices, with the memory of each in bytes (None if it does not report it)."""
    found = []
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        found.append(
            {
                "id": device.id,
                "kind": device.device_kind,
                "memory_bytes": stats.get("bytes_limit"),
                "memory_in_use_bytes": stats.get("bytes_in_use"),
            }
        )
    return {"backend": jax.default_backend(), "count": jax.device_count(), "local": found}


def self_test(kernels: tuple[str, str] = ("xla", "pallas")) -> dict[str, Any]:
    """Prefill and decode of a small random model with both kinds of kernels, in f32, with the same tokens.

    Returns:
      `passed` (None if there is nothing to compare) and, unless it is True, `reason`; `relative_difference`, the
      largest difference of logits over the largest logit; for each kind, the seconds of a prefill, of a decode step,
      and of the first run, which compiles.
    """
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, MODEL.vocab_size, (ROWS, PROMPT + STEPS), dtype=np.int32)
    # Not `init_params`, whose compilation would take longer than the test.
    params = jax.tree.map(
        lambda spec: jnp.asarray(rng.normal(0, 0.05, spec.shape), jnp.float32),
        param_specs(MODEL, jnp.float32),
        is_leaf=is_spec,
    )
    logits, said = {}, {"passed": None, "reason": None, "relative_difference": None, "relative_tolerance": TOLERANCE}
    for name in kernels:
        try:
            first = time.perf_counter()
            run(params, tokens, name)
            first = time.perf_counter() - first
            logits[name], prefill_s, decode_s = run(params, tokens, name)
        except NotImplementedError as error:
            return said | {"reason": f"{name} does not run here: {error}"}
        said[name] = {
            "prefill_s": prefill_s,
            "decode_step_s": decode_s,
            "with_compilation_s": first,
            "interpreted": name == "pallas" and jax.default_backend() == "cpu",
        }
    return said | compare(*(logits[name] for name in kernels))


def run(params, tokens: np.ndarray, kernels: str) -> tuple[np.ndarray, float, float]:
    """Logits of the prompt's last token and of each further token, [1 + STEPS, ROWS, V]; seconds of both phases."""
    cache = init_cache(MODEL, ROWS, CAPACITY, layout=layout_for(kernels))
    begun = time.perf_counter()
    logits, cache = prefill(
        params, MODEL, jnp.asarray(tokens[:, :PROMPT]), jnp.full(ROWS, PROMPT), cache, kernels=kernels
    )
    found, active = [np.asarray(logits)], jnp.ones(ROWS, bool)
    between = time.perf_counter()
    for step in range(PROMPT, PROMPT + STEPS):
        logits, cache = decode_step(params, MODEL, jnp.asarray(tokens[:, step]), active, cache, kernels=kernels)
        found.append(np.asarray(logits))
    return np.stack(found), between - begun, (time.perf_counter() - between) / STEPS


def compare(one: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Whether the logits of two runs are finite, not all zero, and equal within the tolerance."""
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return {"passed": False, "reason": "logits that are NaN or infinite"}
    if not one.any() or not other.any():
        return {"passed": False, "reason": "all logits are zero"}
    difference = float(np.abs(one - other).max() / np.abs(one).max())
    if difference > TOLERANCE:
        return {"passed": False, "reason": "the two paths compute different logits", "relative_difference": difference}
    return {"passed": True, "relative_difference": difference}


if __name__ == "__main__":
    enable_cache()
    for section, content in sections():
        print(json.dumps({section: content}), flush=True)
