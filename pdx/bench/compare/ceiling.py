"""The roofline of this process's device: published figures if the chip table has it, else measured ones."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hardware
from pallas_kernels.hardware import Chip
from pdx.bench.timing import interleaved, once, read_bandwidth
from pdx.installation.devices import device_name

RUNS = 5
SIDE = 2048  # of the square matrices whose product is timed


def device_roofline() -> tuple[Chip, str]:
    """(the device as a chip, the source of its figures)."""
    found = hardware.detect()
    return (found, "published figures") if found is not None else (measured(), "measured in this run")


def measured(megabytes: int = 512, side: int = SIDE) -> Chip:
    """A chip with the bandwidth of reading a large array and the rates of square products, the best of `RUNS` each."""
    read = read_bandwidth(megabytes)
    f32, int8 = (_product(side, dtype) for dtype in (jnp.float32, jnp.int8))
    times = interleaved({"read": read, "float32": lambda: once(f32), "int8": lambda: once(int8)}, RUNS)
    rate = {name: 2 * side**3 / times[name].best / 1e12 for name in ("float32", "int8")}
    device = jax.devices()[0]
    return Chip(
        device_name(every=False),
        device.platform,
        (device.device_kind,),
        bf16_tflops=None,
        int8_tops=rate["int8"],
        hbm_gbps=read.bytes_read / times["read"].best / 1e9,
        hbm_gib=0.0,
        cores=os.cpu_count() or 1,
        clock_ghz=0.0,
        f32_tflops=rate["float32"],
    )


def _product(side: int, dtype):
    a = jnp.ones((side, side), dtype)
    wide = jnp.int32 if dtype == jnp.int8 else None
    product = jax.jit(
        lambda a, b: lax.dot_general(
            a, b, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=wide
        )
    )
    return lambda: product(a, a)
