"""`pdx doctor`: checks that the installation is complete and computes correctly, and reports what it runs on.

Nothing here imports jax, so that the report works even if jax cannot be imported or would crash. Checks that need the
device run in a separate process, `pdx.bench.self_test`.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pdx
from pdx.installation import versions
from pdx.installation.compilation_cache import cache_folder
from pdx.installation.paths import home, models_home

TIMEOUT_S = 300  # the first start of a TPU takes a minute
OTHERS = ("flax", "numpy", "ml_dtypes", "tokenizers", "transformers", "torch")
LIBRARY = {"tpu": "libtpu", "gpu": "a CUDA plugin"}


def examine(timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """Everything that `pdx doctor` reports, as one JSON object; `problems` is empty if all is well.

    `devices`, `kernels` and `self_test` are None if they could not be checked; the reason is in `problems`.
    """
    started = time.perf_counter()
    misfits = versions.misfits()
    problems = [x.says for x in misfits] + _unmet()
    remedy = None
    if misfits:
        remedy = "restart Python" if all(x.restart for x in misfits) else versions.remedy(misfits)
    found: dict[str, Any] = {"devices": None, "kernels": None, "self_test": None}
    if misfits and not versions.ignored():
        problems.append("device, kernels and self-test were not tried: releases that do not fit can end the process")
    else:
        on_device, trouble = _ask_device(timeout_s)
        found |= on_device
        problems += trouble + _of_device(found)
    return {
        "ok": not problems,
        "problems": problems,
        "remedy": remedy,
        "pdx": {"version": pdx.__version__, "folder": str(Path(pdx.__file__).parent)},
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "versions": {"fit": not misfits, "jax_and_parts": versions.installed(), "others": _others()},
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("JAX_", "XLA_", "PDX_", "TPU_"))},
        "host_memory": _host_memory(),
        "caches": _caches(),
        **found,
        "seconds": time.perf_counter() - started,
    }


def _unmet() -> list[str]:
    """Sentences about missing requirements of pdx and, on a GPU, of JAX's plugin."""
    jax = ("jax ", "jaxlib ")  # checked by `versions`
    said = [x for x in versions.unmet("pdx-inference") if not x.startswith(jax)]
    for name in versions.installed():
        if name.endswith("-plugin"):
            said += [x for x in versions.unmet(name, "with-cuda", absent=False) if not x.startswith("jax-")]
    return said


def _ask_device(timeout_s: float) -> tuple[dict[str, Any], list[str]]:
    """The sections that `pdx.bench.self_test` reported, and the reason if some are missing."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pdx.bench.self_test"],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=_environment(),
            check=False,
        )
        out, code, error = done.stdout, done.returncode, done.stderr
    except subprocess.TimeoutExpired as late:
        out, code, error = (late.stdout or b"").decode(errors="replace"), None, ""
    said: dict[str, Any] = {}
    for line in out.splitlines():
        if line.startswith("{"):
            said |= json.loads(line)
    if code == 0:
        return said, []
    missing = next((x for x in ("devices", "kernels", "self_test") if x not in said), "self_test").replace("_", "-")
    if code is None:
        return said, [f"{missing}: no answer within {timeout_s:.0f} s; does another process hold the device?"]
    if code < 0:
        return said, [f"{missing}: the process was ended by signal {-code} ({signal.Signals(-code).name})"]
    lines = [line for line in error.splitlines() if line.strip()]
    return said, [f"{missing}: {lines[-1].strip() if lines else f'exit code {code}'}"]


def _environment() -> dict[str, str]:
    """The environment of the self-test. It imports this pdx, not one in the working folder."""
    path = [str(Path(pdx.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    flags = os.environ.get("XLA_FLAGS", "")
    if _accelerator() is None and "optimization_level" not in flags:
        # On a CPU, compiling interpreted kernels takes most of the time. Without optimizations it takes half.
        flags = f"{flags} --xla_backend_optimization_level=0".strip()
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1", "XLA_FLAGS": flags}


def _of_device(found: dict[str, Any]) -> list[str]:
    """Problems of a device that answered."""
    said = []
    test, devices = found["self_test"], found["devices"]
    if test and test["passed"] is False:
        said.append(f"self-test: {test['reason']}")
    if devices and devices["backend"] == "cpu" and not os.environ.get("JAX_PLATFORMS") and (part := _accelerator()):
        said.append(
            f"this machine has a {part.upper()}, but jax runs on the CPU: check that {LIBRARY[part]} is installed and "
            f"that no other process uses the device"
        )
    return said


def _accelerator() -> str | None:
    """`tpu` or `gpu` if the machine has a device file for one; else None."""
    if any(Path("/dev").glob("accel[0-9]*")) or os.environ.get("COLAB_TPU_1VM"):
        return "tpu"
    return "gpu" if any(Path("/dev").glob("nvidia[0-9]*")) else None


def _others() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in OTHERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _host_memory() -> dict[str, int | None]:
    """Bytes of the machine's memory, and how many are free for a new process."""
    names = {"total_bytes": "SC_PHYS_PAGES", "available_bytes": "SC_AVPHYS_PAGES"}
    sizes: dict[str, int | None] = dict.fromkeys(names)
    for name, key in names.items():
        if key in getattr(os, "sysconf_names", {}):
            sizes[name] = os.sysconf(key) * os.sysconf("SC_PAGE_SIZE")
    return sizes


def _caches() -> list[dict[str, Any]]:
    """The folders that pdx writes to and their size in bytes; `folder` is None for a cache that is off."""
    folders = {"models": models_home(), "compiled programs": cache_folder(), "chips": home() / "chips"}
    return [
        {"what": what, "folder": folder and str(folder), "bytes": _size(folder)} for what, folder in folders.items()
    ]


def _size(folder: Path | None) -> int:
    if folder is None:
        return 0
    sizes = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            try:
                sizes += os.stat(os.path.join(parent, name)).st_size
            except OSError:  # deleted meanwhile
                continue
    return sizes


def text(found: dict[str, Any]) -> str:
    """The result of `examine` as text: one fact per line, problems last."""
    rows = [
        ("pdx", f"{found['pdx']['version']} in {found['pdx']['folder']}"),
        ("Python", f"{found['python']['version']} ({found['python']['executable']})"),
        ("versions", "fit" if found["versions"]["fit"] else "do not fit"),
    ]
    packages = found["versions"]["jax_and_parts"] | found["versions"]["others"]
    rows += [("", f"{name} {version}") for name, version in packages.items() if version]
    rows += _device_rows(found)
    memory = found["host_memory"]
    if memory["total_bytes"] is not None:
        total, free = (memory[key] / 2**30 for key in ("total_bytes", "available_bytes"))
        rows.append(("memory", f"{total:.1f} GiB, {free:.1f} free"))
    for cache in found["caches"]:
        rows.append(
            (
                "cache",
                f"{cache['what']}: {cache['bytes'] / 1e6:.1f} MB in {cache['folder']}"
                if cache["folder"]
                else f"{cache['what']}: off",
            )
        )
    rows += [("problem", problem) for problem in found["problems"]] or [("result", "no problem found")]
    if found["remedy"]:
        rows.append(("remedy", found["remedy"]))
    return "\n".join(f"{name:10} {said}" for name, said in rows)


def _device_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if devices := found["devices"]:
        for device in devices["local"]:
            memory = device["memory_bytes"]
            rows.append(
                (
                    "device",
                    f"{devices['backend']} {device['id']}: {device['kind']}"
                    + (f", {memory / 2**30:.1f} GiB" if memory else ""),
                )
            )
    rows += [("kernel", f"{x['op']}: {x['implementation']} ({x['reason']})") for x in found["kernels"] or ()]
    if (test := found["self_test"]) is None:
        return rows
    for name in ("xla", "pallas"):
        if name in test:
            path = test[name]
            how = ", interpreted" if path["interpreted"] else ""
            prefill, decode = _short(path["prefill_s"] * 1e3), _short(path["decode_step_s"] * 1e3)
            first = _short(path["with_compilation_s"])
            rows.append(("self-test", f"{name}{how}: prefill {prefill}, decode {decode} ms, first run {first} s"))
    verdict = {True: "passed", False: "FAILED", None: "not compared"}[test["passed"]]
    if (difference := test["relative_difference"]) is not None:
        verdict += f", logits differ by {difference:.1e} of the largest (allowed {test['relative_tolerance']:.0e})"
    return [*rows, ("self-test", verdict + (f": {test['reason']}" if test["reason"] else ""))]


def _short(number: float) -> str:
    return f"{number:.1f}" if number < 100 else f"{number:.0f}"
