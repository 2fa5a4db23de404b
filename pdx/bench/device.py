"""Names and memory of the device that this process runs on."""

from __future__ import annotations

import os
import platform
import re

import jax

from pdx.installation.devices import device_name


def machine() -> str:
    """The name of this process's device; for a CPU with its model and cores."""
    name = device_name()
    if jax.default_backend() != "cpu":
        return name
    return f"{name} ({_cpu_model()}, {os.cpu_count()} cores)"


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def file_name() -> str:
    """The device's name for use in file names, such as `amd-epyc-2-cores` or `nvidia-l4`."""
    kind = f"{_cpu_model()} {os.cpu_count()} cores" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    return re.sub(r"[^a-z0-9.]+", "-", kind.lower()).strip("-")


def memory_gib() -> float:
    """Memory of one device in GiB: what an accelerator reports; for a CPU, the machine's memory."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 2**30
