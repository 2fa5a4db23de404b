"""Figures of a GPU program from ptxas: registers, spills, shared memory, tensor-core instructions, innermost loops.

It reads the folder that XLA dumps PTX into (`xla_dump_to`, `xla_dump_emitter_re=ptx`).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pallas_kernels.analysis.sass import Loop, loops

# Matrix instructions: in PTX (mma.sync, wgmma, tcgen05.mma), and in SASS (HMMA, IMMA, HGMMA, IGMMA, UTCHMMA, ...).
_PTX_MMA = re.compile(r"^\s*(?:@%?\w+\s+)?((?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.[\w.:]+)", re.MULTILINE)
_SASS_MMA = re.compile(r"\b(UTC[A-Z]*MMA|[HIDQO]G?MMA)\b")
_WHEELS = {"ptxas": ("nvidia.cuda_nvcc", "nvidia.cu13"), "nvdisasm": ("nvidia.cuda_nvdisasm", "nvidia.cu13")}


@dataclass(frozen=True)
class Kernel:
    """One entry function of a compiled GPU program."""

    name: str
    arch: str  # sm_80, sm_90a, ...
    registers: int  # a thread
    spill_bytes: int  # stores and loads, per thread
    stack_bytes: int
    shared_bytes: int  # static and dynamic, per block
    mma: Mapping[str, int] = field(default_factory=dict)  # PTX matrix instructions, without their operands
    sass: Mapping[str, int] | None = None  # SASS matrix instructions; None: nvdisasm is not installed
    loops: tuple[Loop, ...] = ()  # the innermost ones in SASS

    @property
    def tensor_cores(self) -> bool:
        return bool(self.mma if self.sass is None else self.sass)

    @property
    def loop(self) -> Loop | None:
        """The innermost loop with the most instructions; None if there is none, or nvdisasm is not installed."""
        return max(self.loops, key=lambda x: x.instructions, default=None)

    def figures(self) -> dict[str, Any]:
        """The fields and what follows from them, for JSON."""
        inner = [asdict(x) | {"per_byte": x.per_byte} for x in self.loops]
        return vars(self) | {"tensor_cores": self.tensor_cores, "loops": inner}


@functools.cache
def tool(name: str) -> str | None:
    """The path of `ptxas` or `nvdisasm`, from NVIDIA's wheels (extra `aot-gpu`) or a CUDA installation.

    It is the newest one: XLA writes PTX for the newest that it finds, and an older ptxas rejects that.
    """
    found = [path for path in (*_in_wheels(name), shutil.which(name)) if path and os.path.exists(path)]
    return max(found, key=_version, default=None)


def _in_wheels(name: str) -> Iterator[str]:
    for package in _WHEELS[name]:
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            continue
        yield from (os.path.join(folder, "bin", name) for folder in (spec and spec.submodule_search_locations) or ())


def _version(path: str) -> tuple[int, ...]:
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    number = re.search(r"V(\d+(?:\.\d+)+)", said)
    return tuple(int(n) for n in number.group(1).split(".")) if number else ()


def files(folder: Path) -> list[Path]:
    """The files of a dump that `read` needs."""
    return [*folder.glob("*.ptx"), *folder.glob("*thunk_sequence.txt")]


def read(folder: Path) -> tuple[Kernel, ...]:
    """The kernels of every PTX file in `folder`.

    Raises:
      RuntimeError: ptxas is not installed, or rejects a file; the message is its own.
    """
    dynamic = _dynamic_shared(folder)
    found: list[Kernel] = []
    for path in sorted(folder.glob("*.ptx")):
        text = path.read_text()
        if ".entry" in text:
            found += _assemble(path, text, dynamic)
    return tuple(found)


def _dynamic_shared(folder: Path) -> dict[str, int]:
    """Dynamic shared memory of each launch. ptxas does not know it: Triton's is `extern`, sized at launch."""
    line = re.compile(r"kCustomKernel.*?\]\s+(\S+)\s+grid:.*?shared_memory: (\d+) bytes")
    said = "\n".join(path.read_text() for path in folder.glob("*thunk_sequence.txt"))
    return {name: int(size) for name, size in line.findall(said)}


def _assemble(path: Path, text: str, dynamic: Mapping[str, int]) -> list[Kernel]:
    ptxas = tool("ptxas")
    if ptxas is None:
        raise RuntimeError("ptxas is missing: pip install 'pdx-inference[aot-gpu]'")
    arch = re.search(r"^\.target (\w+)", text, re.MULTILINE).group(1)
    cubin = path.with_suffix(".cubin")
    done = subprocess.run(
        [ptxas, str(path), f"-arch={arch}", "-v", "-o", str(cubin)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"ptxas refuses {path.name}: {done.stderr.strip()}")
    sass, mma = _sass(cubin), _by_entry(text)
    kernels = []
    entry = re.compile(r"Compiling entry function '(\S+)' for.*?\n(.*?)(?=Compiling entry|\Z)", re.DOTALL)
    for name, said in entry.findall(done.stderr):

        def number(pattern, said=said):
            return sum(int(n) for n in re.findall(pattern, said))

        kernels.append(
            Kernel(
                name,
                arch,
                number(r"Used (\d+) registers"),
                number(r"(\d+) bytes spill (?:stores|loads)"),
                number(r"(\d+) bytes stack frame"),
                number(r"(\d+) bytes smem") + dynamic.get(name, 0),
                mma.get(name, {}),
                None if sass is None else Counter(_SASS_MMA.findall(sass.get(name, ""))),
                () if sass is None else loops(sass.get(name, "")),
            )
        )
    return kernels


def _by_entry(text: str) -> dict[str, Counter]:
    """Matrix instructions per entry function of a PTX text."""
    parts = re.split(r"\.entry\s+([\w$]+)\s*\(", text)
    return {name: Counter(_PTX_MMA.findall(body)) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def _sass(cubin: Path) -> dict[str, str] | None:
    """The SASS of each entry function; None: nvdisasm is not installed, or does not read the file."""
    nvdisasm = tool("nvdisasm")
    if nvdisasm is None:
        return None
    done = subprocess.run([nvdisasm, str(cubin)], capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    parts = re.split(r"^\.text\.([\w$]+):", done.stdout, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))
