"""Tests run on the CPU as eight virtual devices, with JAX's persistent compilation cache on.

Tests compile without LLVM's optimizations where no real model is run (`-m` unset, or with "not real" in it):
compilation is most of their time, and the programs are the same.
"""

import gc
import os
import tempfile
from collections import Counter
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "pdx-test-xla-cache"))
# Thousands of small programs take longer to compile than a few large ones.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # nothing reads them, and they slow tracing
if "PYTEST_XDIST_WORKER" in os.environ:  # torch's threads wait busily: two workers take twice as long with two each
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _add_xla_flag(name: str, value: str) -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    if name not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{name}={value}".strip()


def pytest_addoption(parser):
    parser.addoption("--thinner", type=int, default=1, help="keep this many times fewer cases of a `thin` test fast")
    parser.addoption("--every", type=int, default=1, help="of a test's slow cases, if more than two, run every n-th")


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config, items):
    """Of a parametrized test marked `thin(n)` every n-th set of parameters stays fast, the others become slow."""
    thinner = config.getoption("thinner")
    seen = Counter()
    for item in items:
        thin, test = item.get_closest_marker("thin"), item.nodeid.partition("[")[0]
        if thin is not None and "[" in item.nodeid:
            if seen[test] % (thin.args[0] * thinner):
                item.add_marker(pytest.mark.slow)
            seen[test] += 1
    _leave_out(config, items, config.getoption("every"))


def _leave_out(config, items, every: int) -> None:
    """All slow cases of a test but every n-th, where there are more than two; `--every`."""
    slow = {}
    for item in items if every > 1 else ():
        if item.get_closest_marker("slow"):
            slow.setdefault(item.nodeid.partition("[")[0], []).append(item)
    out = {item for cases in slow.values() if len(cases) > 2 for at, item in enumerate(cases) if at % every}
    if out:
        config.hook.pytest_deselected(items=list(out))
        items[:] = [item for item in items if item not in out]


def pytest_configure(config):
    if config.getoption("dist", "no") == "load":
        # `-n 2` alone: a file stays with one worker, so that its fixtures and programs are made once.
        config.option.dist = "loadfile"
    # Before any test module imports jax; the workers of xdist inherit the environment.
    _add_xla_flag("xla_force_host_platform_device_count", "8")
    chosen = config.getoption("markexpr") or ""
    if not chosen or "not slow" in chosen or "not real" in chosen:
        _add_xla_flag("xla_backend_optimization_level", "0")
        _add_xla_flag("xla_llvm_disable_expensive_passes", "true")
        # The programs are small, and the workers of xdist fill the cores.
        _add_xla_flag("xla_cpu_parallel_codegen_split_count", "1")
        # Twice as fast to compile; later releases have no such flag.
        if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
            _add_xla_flag("xla_cpu_use_fusion_emitters", "false")


def pytest_collection_finish():
    """Look for garbage more rarely, and never among the modules: tracing makes many objects that live on."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def _few_memory_maps():
    """Drop compiled programs before they fill the process: each holds memory maps, of which Linux allows 65530.

    Past that the compiler's next one is a segmentation fault.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
        import jax

        jax.clear_caches()


@pytest.fixture
def count_compiles():
    """A context manager whose result, called, is how many programs were compiled (or fetched) inside it."""
    import jax

    @contextmanager
    def count():
        events = []

        def listen(name, _duration, **_kwargs):
            if name == "/jax/core/compile/backend_compile_duration":
                events.append(name)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield lambda: len(events)
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    return count
