"""Targets: compiles a function for an absent chip with the chip's real compiler, on a CPU.

    target = Target.get("v5e")                       # "v5e:2x4", "7x", "h100", "h100:8", ...
    compiled = target.compile(fn, jax.ShapeDtypeStruct((8, 128), jnp.bfloat16), donate_argnums=0)
    compiled.vmem_bytes, compiled.memory, compiled.text, compiled.kernels

libtpu compiles for every TPU generation, ptxas for every GPU from Ampere on. A compiler can end the process, and libtpu
reads its environment once: run this in a subprocess started with `environment(...)`. `seconds` is the time of
compiling; nothing here measures a time on a device.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh, SingleDeviceSharding, use_abstract_mesh

from pallas_kernels import compat
from pallas_kernels.analysis import hlo, ptx
from pallas_kernels.hardware import CHIPS, Chip, chip

TPUS = tuple(name for name, c in CHIPS.items() if c.platform == "tpu")
_OF_CAPABILITY = {c.capability: name for name, c in reversed(CHIPS.items()) if c.cuda}
# One GPU of each compute capability, the first in the table: kernels compile to the same for the others.
GPUS = tuple(_OF_CAPABILITY[capability] for capability in sorted(_OF_CAPABILITY))
NAMES = TPUS + GPUS

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # a hit would leave no dump to read
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

_DUMP = "--xla_jf_dump_to="


class CompilerMissing(RuntimeError):
    """The compiler of a target is not installed; the message says what to install."""


def environment(*, profile: str | os.PathLike | None = None, dump: str | os.PathLike | None = None) -> dict[str, str]:
    """The environment variables of a process that compiles for absent chips, to be set before it imports jax.

    Args:
      dump: an empty folder, which each compilation empties again; with it, `Compiled.schedules` has what libtpu issues.
      profile: a folder for libtpu's static profiles; with it, compiled texts have `estimated_cycles`. It can abort the
        process (all of v4, some DMAs on v5e): use one subprocess per kernel then.
    """
    said, flags = dict(_ENVIRONMENT), []
    if profile is not None:
        flags.append(f"--xla_jf_dump_static_llo_profile_to={os.fspath(profile)}")
    if dump is not None:
        folder = os.fspath(dump)
        flags += [f"{_DUMP}{folder}", f"--xla_mosaic_dump_to={folder}", "--xla_jf_dump_llo_text=true"]
    if flags:
        said["LIBTPU_INIT_ARGS"] = " ".join(flags)
    return said


def missing(name: str) -> str | None:
    """None, or why this installation cannot compile for the target, and what to install."""
    target = Target.get(name)
    if target.chip.platform == "tpu":
        if not _installed("libtpu"):
            return f"compiling for {name} needs libtpu: pip install 'pdx-inference[aot-tpu]'"
        return None
    if not _installed("jax_plugins.xla_cuda12"):
        return f"compiling for {name} needs JAX's CUDA plugin: pip install 'pdx-inference[aot-gpu]'"
    if ptx.tool("ptxas") is None:
        return f"compiling for {name} needs ptxas: pip install 'pdx-inference[aot-gpu]'"
    return None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is absent too
        return False


@dataclass(frozen=True)
class Compiled:
    """The result of compiling one function for one target."""

    target: str
    seconds: float  # lowering and compiling, on this machine
    text: str  # the optimized HLO
    memory: Mapping[str, int]  # bytes per device: argument, output, temp, alias, code
    cost: Mapping[str, float]  # XLA's own analysis; a Pallas call counts by its CostEstimate
    vmem_bytes: int = 0  # TPU: the most scoped VMEM that one kernel uses
    dump: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)  # GPU: files of XLA's by name
    schedules: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)  # TPU: bundles by kernel
    executable: Any = field(default=None, repr=False, compare=False)  # jax.stages.Compiled

    @cached_property
    def kernels(self) -> tuple[ptx.Kernel, ...]:
        """GPU: registers, spills, shared memory and tensor-core instructions of each kernel.

        ptxas and nvdisasm read every kernel when this is first asked for, which takes longer than the compilation.

        Raises:
          RuntimeError: ptxas is not installed, or rejects a file.
        """
        with tempfile.TemporaryDirectory() as folder:
            for name, text in self.dump.items():
                (Path(folder) / name).write_text(text)
            return ptx.read(Path(folder))


def _topology(known: Chip, shape: str) -> str:
    """The topology of a slice; of one chip if `shape` is empty. Raises ValueError: no such slice.

    The check is needed: libtpu also describes slices that do not exist, such as 9x9.
    """
    one = "x".join("1" * known.axes)
    if known.platform == "gpu":
        if shape and (not shape.isdecimal() or int(shape) < 1):
            raise ValueError(f"{known.name}:{shape} does not say how many GPUs: write {known.name}:8 for eight")
        return f"1x1x{shape or 1}"
    sizes, flat = [int(x) if x.isdecimal() else 0 for x in (shape or one).split("x")], one == "1x1"
    fits = {1, 2, 4, 8, 16} if flat else {1, 2, *range(4, 257, 4)}
    if len(sizes) != len(one.split("x")) or not fits.issuperset(sizes):
        has = "two axes of 1, 2, 4, 8 or 16 chips" if flat else "three axes of 1, 2 or a multiple of 4 chips"
        raise ValueError(
            f"{known.name} has no slice {shape}: slices are {has}, such as {known.name}:{'2x4' if flat else '2x2x2'}"
        )
    return shape or one


@dataclass(frozen=True)
class Target:
    """A chip, or a slice of them, to compile for."""

    name: str
    chip: Chip
    topology: str  # the shape of the slice, such as 2x4

    @staticmethod
    def get(name: str) -> Target:
        """`v5e`, `7x`, `h100`, ...; `v5e:2x4`, `v5p:2x2x2` or `h100:8` for several chips.

        Raises:
          ValueError: the chip is unknown, nothing compiles Pallas kernels for it, or it has no slice of that shape.
        """
        model, _, shape = name.partition(":")
        known = chip(model)
        if known.platform == "gpu" and known.cuda is None:
            raise ValueError(f"{known.name} has no Pallas compiler; targets are {', '.join(NAMES)}")
        return Target(name, known, _topology(known, shape))

    def devices(self) -> list[Any]:
        """The topology's devices.

        Raises:
          CompilerMissing: libtpu or the CUDA plugin is not installed.
          RuntimeError: this process started jax without `environment(...)`.
        """
        if (why := missing(self.name)) is not None:
            raise CompilerMissing(why)
        if self.chip.platform == "gpu":
            jax.devices("cpu")  # discovers the plugin
            config = _gpu_config(self.chip)
            described = topologies.get_topology_desc(
                platform="cuda", topology_name="", target_config=config, topology=self.topology
            )
            return list(described.devices)
        lacking = [key for key in _ENVIRONMENT if key.startswith("TPU_") and key not in os.environ]
        if lacking:
            raise RuntimeError(
                f"{', '.join(lacking)} must be set before jax starts: run this in a process that was started with "
                f"the variables of pallas_kernels.analysis.targets.environment()"
            )
        name = f"{'tpu7x' if self.chip.name == '7x' else self.chip.name}:{self.topology}"
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **compat.topology_arguments("tpu"))
        return list(described.devices)

    def mesh(self, axes: Mapping[str, int]) -> Mesh:
        """A mesh over the first devices of the slice, for NamedShardings of `compile`'s arguments."""
        devices = self.devices()[: prod(axes.values())]
        return Mesh(np.array(devices).reshape(tuple(axes.values())), tuple(axes))

    @contextmanager
    def tracing(self):
        """Within this context, code is traced for this chip: `hardware.detect()`, Mosaic and Triton see it.

        It needs no compiler: kernels can be traced and counted for a chip wherever jax runs.
        """
        facts = {}
        if self.chip.platform == "gpu":  # without a capability, Mosaic would assume Hopper
            facts["compute_capability"] = ".".join(map(str, self.chip.capability))
        device = compat.abstract_device(self.chip.kinds[0], self.chip.device_cores, self.chip.platform, **facts)
        with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            yield

    def compile(
        self,
        fn: Callable,
        *args: Any,
        donate_argnums: int | tuple[int, ...] = (),
        static_argnums: int | tuple[int, ...] = (),
        static_argnames: str | tuple[str, ...] = (),
        **kwargs: Any,
    ) -> Compiled:
        """Compile `fn(*args, **kwargs)`.

        Args:
          fn: the function; a jitted one keeps its own donated and static arguments.
          args: pytrees of arrays or ShapeDtypeStructs. One with a sharding keeps it, the others are on the slice's
            first device.
          donate_argnums, static_argnums, static_argnames: as of `jax.jit`.

        Raises:
          CompilerMissing: see `devices`.
          jax.errors.JaxRuntimeError: the compiler rejects the program (too much VMEM or HBM, ...); its own message.
        """
        first = self.devices()[0]
        if not hasattr(fn, "lower"):
            fn = jax.jit(
                fn, donate_argnums=donate_argnums, static_argnums=static_argnums, static_argnames=static_argnames
            )
        numbers = (static_argnums,) if isinstance(static_argnums, int) else static_argnums
        names = (static_argnames,) if isinstance(static_argnames, str) else static_argnames
        args = tuple(a if i in numbers else _abstract(a, first) for i, a in enumerate(args))
        kwargs = {k: v if k in names else _abstract(v, first) for k, v in kwargs.items()}
        schedules = _dump_folder() if self.chip.platform == "tpu" else None
        _emptied(schedules)
        started = time.perf_counter()
        with self.tracing(), tempfile.TemporaryDirectory() as dump:
            gpu = self.chip.platform == "gpu"
            options = {"xla_dump_to": dump, "xla_dump_emitter_re": "ptx"} if gpu else None
            executable = fn.lower(*args, **kwargs).compile(compiler_options=options)
            seconds = time.perf_counter() - started
            files = {path.name: path.read_text() for path in ptx.files(Path(dump))}
        text = executable.as_text()
        return Compiled(
            self.name,
            seconds,
            text,
            _memory(executable),
            compat.cost_dict(executable.cost_analysis()),
            hlo.vmem_bytes(text),
            files,
            _schedules(schedules, text),
            executable,
        )


def _dump_folder() -> Path | None:
    """The folder that libtpu of this process dumps to, see `environment`."""
    flags = os.environ.get("LIBTPU_INIT_ARGS", "").split()
    return next((Path(flag.removeprefix(_DUMP)) for flag in flags if flag.startswith(_DUMP)), None)


def _emptied(folder: Path | None) -> None:
    for path in folder.iterdir() if folder is not None else ():
        if path.is_file():
            path.unlink()


def _schedules(folder: Path | None, text: str) -> dict[str, str]:
    """The final bundles of each kernel in a program. Its dump is large: the folder is emptied."""
    found = {}
    for name in hlo.pallas_calls(text) if folder is not None else ():
        for path in folder.glob(f"*-{name}-*-final_bundles.txt"):  # type: ignore[union-attr]
            found[name] = path.read_text()
    _emptied(folder)
    return found


def _abstract(tree: Any, device: Any) -> Any:
    def one(leaf):
        if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None:
            return leaf
        if not hasattr(leaf, "shape"):
            leaf = np.asarray(leaf)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(device))

    return jax.tree.map(one, tree)


def _memory(executable: Any) -> dict[str, int]:
    stats = executable.memory_analysis()
    parts = {"argument": "argument", "output": "output", "temp": "temp", "alias": "alias", "code": "generated_code"}
    return {name: getattr(stats, f"{part}_size_in_bytes") for name, part in parts.items()}


def _gpu_config(c: Chip) -> str:
    """XLA's `GpuTargetConfigProto` as text."""
    cuda, (major, minor) = c.cuda, c.capability
    accelerated = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {cuda.threads}
      shared_memory_per_block: 49152 shared_memory_per_block_optin: {c.smem_bytes}
      shared_memory_per_core: {cuda.shared_bytes}
      core_count: {c.cores} fpus_per_core: {cuda.lanes} clock_rate_ghz: {c.clock_ghz} l2_cache_size: {cuda.l2_bytes}
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {int(c.hbm_gbps * 1e9)} device_memory_size: {cuda.memory_bytes}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      cuda_compute_capability {{ major: {major} minor: {minor}{accelerated} }}
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
    device_description_str: "{c.kinds[0]}" """
