"""The chip table: peaks, memories and matmul types of every chip that the kernels are written for.

Sources. TPU peaks and HBM: Google Cloud's TPU pages and JAX's own table (`jax._src.tpu_info`). VMEM: the limits that
libtpu 0.0.50 names when a kernel exceeds them. GPU figures are dense (without structured sparsity) and come from
secondary tables of NVIDIA's datasheets: check the datasheet before relying on one. SM counts, clocks and shared
memory: the device descriptions inside XLA's CUDA plugin (L4 and T4: their whitepapers).

TPU clocks are the published peak over the FLOPs per cycle; for v6e and 7x this assumes two pushes per cycle to each
256x256 array. IEEE f32 takes six bf16 passes on a TPU (`precision=HIGHEST`), and one multiply-add per cycle and f32
lane on a GPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Cuda:
    """What XLA's CUDA backend asks about a GPU for which it compiles, beyond the fields of `Chip`."""

    lanes: int  # f32 lanes of an SM
    l2_bytes: int
    shared_bytes: int  # shared memory of an SM
    threads: int  # of an SM, at most
    memory_bytes: int  # of the device, as its driver reports them


@dataclass(frozen=True)
class Chip:
    """The published figures of one whole chip (not of one core, nor of one JAX device)."""

    name: str
    platform: str  # tpu | gpu
    kinds: tuple[str, ...]  # values of JAX's `device.device_kind`
    bf16_tflops: float | None  # None: no bf16 matrix unit
    int8_tops: float | None  # None: not native
    hbm_gbps: float  # 1e9 bytes per second
    hbm_gib: float
    cores: int  # TensorCores or streaming multiprocessors
    clock_ghz: float
    f32_tflops: float  # IEEE f32 matmuls
    fp16_tflops: float | None = None
    fp8_tflops: float | None = None
    devices: int = 1  # JAX devices that a topology shows for one chip
    mxu: int = 0  # TPU: rows and columns of one matrix unit
    vmem_mib: int = 0  # TPU: scoped VMEM of a core that a kernel has by default
    vmem_capacity_mib: int = 0  # TPU: VMEM of a core, the most that a kernel may ask for
    smem_kib: int = 0  # TPU: scalar memory of a core; GPU: shared memory a block may opt into
    capability: tuple[int, int] | None = None  # GPU: compute capability

    @property
    def axes(self) -> int:
        """TPU: axes of a slice."""
        return _AXES.get(self.name, 2)

    @property
    def device_cores(self) -> int:
        """Cores of one JAX device."""
        return self.cores // self.devices

    @property
    def cuda(self) -> Cuda | None:
        """What XLA's CUDA backend asks; None: Pallas does not compile for this chip."""
        return _CUDA.get(self.name)

    @property
    def hbm_bytes(self) -> int:
        return int(self.hbm_gib * 2**30)

    @property
    def vmem_bytes(self) -> int:
        """Scoped VMEM in bytes that a kernel has by default."""
        return self.vmem_mib * 2**20

    @property
    def smem_bytes(self) -> int:
        return self.smem_kib * 1024

    def tflops(self, dtype: str = "bfloat16") -> float:
        """Peak TFLOP/s of a matmul with both operands in `dtype`; a type that is not native runs at bf16's rate."""
        wide = self.bf16_tflops or self.fp16_tflops or self.f32_tflops
        if dtype == "float32":
            return self.f32_tflops
        if dtype == "bfloat16" and self.bf16_tflops is None:
            return self.f32_tflops
        native = {"int8": self.int8_tops, "float16": self.fp16_tflops}
        if dtype.startswith("float8"):
            return self.fp8_tflops or wide
        return native.get(dtype) or wide

    def floor_cycles(self, flops: float, dtype: str = "bfloat16") -> float:
        """Cycles of `flops` of matmul at the published peak, on one JAX device of this chip."""
        return flops * self.devices * self.clock_ghz * 1e9 / (self.tflops(dtype) * 1e12)

    def seconds(self, flops: float, nbytes: float, dtype: str = "bfloat16") -> float:
        """The roofline: the least seconds of one whole chip for `flops` and `nbytes` of HBM traffic."""
        return max(flops / (self.tflops(dtype) * 1e12), nbytes / (self.hbm_gbps * 1e9))


# What only compilers ask of a chip in the table: it is no part of a user's own chip.
_AXES: dict[str, int] = {}
_CUDA: dict[str, Cuda] = {}


def _tpu(name: str, kinds: tuple[str, ...], bf16: float, int8: float | None, axes: int = 2, **facts) -> Chip:
    _AXES[name] = axes
    return Chip(name, "tpu", kinds, bf16, int8, f32_tflops=bf16 / 6, smem_kib=1024, **facts)


def _gpu(name: str, kinds: tuple[str, ...], bf16: float | None, int8: float, lanes: int, **facts) -> Chip:
    if cuda := facts.pop("cuda", None):
        _CUDA[name] = cuda
    f32 = facts["cores"] * lanes * 2 * facts["clock_ghz"] / 1e3
    return Chip(name, "gpu", kinds, bf16, int8, f32_tflops=f32, fp16_tflops=facts.pop("fp16", bf16), **facts)


CHIPS: dict[str, Chip] = {
    c.name: c
    for c in (
        _tpu(
            "v4",
            ("TPU v4",),
            275,
            None,
            hbm_gbps=1200,
            hbm_gib=32,
            cores=2,
            devices=2,
            axes=3,
            clock_ghz=1.05,
            mxu=128,
            vmem_mib=16,
            vmem_capacity_mib=16,
        ),
        _tpu(
            "v5e",
            ("TPU v5 lite", "TPU v5e"),
            197,
            394,
            hbm_gbps=819,
            hbm_gib=16,
            cores=1,
            clock_ghz=1.5,
            mxu=128,
            vmem_mib=16,
            vmem_capacity_mib=128,
        ),
        _tpu(
            "v5p",
            ("TPU v5", "TPU v5p"),
            459,
            918,
            hbm_gbps=2765,
            hbm_gib=95,
            cores=2,
            axes=3,
            clock_ghz=1.75,
            mxu=128,
            vmem_mib=16,
            vmem_capacity_mib=64,
        ),
        _tpu(
            "v6e",
            ("TPU v6 lite", "TPU v6e"),
            918,
            1836,
            hbm_gbps=1640,
            hbm_gib=32,
            cores=1,
            clock_ghz=1.75,
            mxu=256,
            vmem_mib=32,
            vmem_capacity_mib=127,
        ),
        _tpu(
            "7x",
            ("TPU7x",),
            2307,
            None,
            fp8_tflops=4614,
            hbm_gbps=7380,
            hbm_gib=192,
            cores=2,
            devices=2,
            axes=3,
            clock_ghz=2.2,
            mxu=256,
            vmem_mib=32,
            vmem_capacity_mib=64,
        ),
        _gpu(
            "t4",
            ("Tesla T4", "NVIDIA T4"),
            None,
            130,
            64,
            fp16=65,
            hbm_gbps=320,
            hbm_gib=16,
            cores=40,
            clock_ghz=1.59,
            smem_kib=64,
            capability=(7, 5),
        ),
        _gpu(
            "l4",
            ("NVIDIA L4",),
            121,
            242,
            128,
            fp8_tflops=242,
            hbm_gbps=300,
            hbm_gib=24,
            cores=58,
            clock_ghz=2.04,
            smem_kib=99,
            capability=(8, 9),
            cuda=Cuda(128, 50331648, 102400, 1536, 23580639232),
        ),
        _gpu(
            "a100",
            ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
            312,
            624,
            64,
            hbm_gbps=2039,
            hbm_gib=80,
            cores=108,
            clock_ghz=1.41,
            smem_kib=163,
            capability=(8, 0),
            cuda=Cuda(64, 41943040, 167936, 2048, 85100068864),
        ),
        _gpu(
            "a100-40",
            ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
            312,
            624,
            64,
            hbm_gbps=1555,
            hbm_gib=40,
            cores=108,
            clock_ghz=1.41,
            smem_kib=163,
            capability=(8, 0),
            cuda=Cuda(64, 41943040, 167936, 2048, 42331013120),
        ),
        _gpu(
            "h100",
            ("NVIDIA H100 80GB HBM3",),
            989,
            1979,
            128,
            fp8_tflops=1979,
            hbm_gbps=3350,
            hbm_gib=80,
            cores=132,
            clock_ghz=1.98,
            smem_kib=227,
            capability=(9, 0),
            cuda=Cuda(128, 52428800, 233472, 2048, 84942979072),
        ),
        _gpu(
            "h200",
            ("NVIDIA H200", "NVIDIA H200 141GB HBM3e"),
            989,
            1979,
            128,
            fp8_tflops=1979,
            hbm_gbps=4800,
            hbm_gib=141,
            cores=132,
            clock_ghz=1.98,
            smem_kib=227,
            capability=(9, 0),
            cuda=Cuda(128, 62914560, 233472, 2048, 150109880320),
        ),
        _gpu(
            "b200",
            ("NVIDIA B200",),
            2250,
            4500,
            128,
            fp8_tflops=4500,
            hbm_gbps=8000,
            hbm_gib=192,
            cores=148,
            clock_ghz=1.965,
            smem_kib=227,
            capability=(10, 0),
            cuda=Cuda(128, 132644864, 233472, 2048, 191514411008),
        ),
    )
}

ALIASES = {
    "v5litepod": "v5e",
    "v5lite": "v5e",
    "v5": "v5p",
    "v6lite": "v6e",
    "trillium": "v6e",
    "v7x": "7x",
    "7": "7x",
    "ironwood": "7x",
    "a100-80": "a100",
    "a100-80gb": "a100",
    "a100-40gb": "a100-40",
}


def chip(name: str) -> Chip:
    """The chip called `name` (`v5e`, `tpu7x`, `A100`, ...) or whose JAX device kind it is.

    Raises:
      ValueError: the table has no such chip; the message lists its chips.
    """
    if (found := of_kind(name)) is not None:
        return found
    short = name.lower().replace(" ", "").removeprefix("tpu").removeprefix("nvidia")
    short = ALIASES.get(short, short)
    if short not in CHIPS:
        raise ValueError(f"no chip {name!r} in the table of pallas_kernels.hardware; it has {', '.join(CHIPS)}")
    return CHIPS[short]


def of_kind(device_kind: str) -> Chip | None:
    """The chip with this JAX `device_kind`; None if it is not in the table (a GPU slice, another vendor)."""
    return next((c for c in CHIPS.values() if device_kind in c.kinds), None)


def detect(platform: str | None = None) -> Chip | None:
    """The chip traced for: the abstract mesh's under AOT, else that of the default device.

    Args:
      platform: accept only a `tpu` or only a `gpu`; None: any.

    Returns:
      None for a CPU, for a chip that is not in the table, and for one of another platform.
    """
    kind = _device_kind()
    found = of_kind(kind) if kind else None
    return found if found is not None and platform in (None, found.platform) else None


def platform_of(device: object | None = None) -> str:
    """`cpu`, `gpu` or `tpu`: of a JAX device, or of the one traced for (see `detect`)."""
    if device is None:
        abstract = _abstract_device()
        if abstract is not None and (known := of_kind(abstract.device_kind)) is not None:
            return known.platform
        device = abstract if getattr(abstract, "platform", None) else _default_device()
    return {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)


def capability() -> tuple[int, int] | None:
    """The compute capability of the NVIDIA GPU traced for; None for another device, or if nothing says it."""
    if platform_of() != "gpu":
        return None
    said = re.match(r"(\d+)\.(\d+)", str(getattr(_device(), "compute_capability", None)))
    if said:
        return int(said[1]), int(said[2])
    known = of_kind(_device_kind() or "")
    return known.capability if known else None


def without_pallas() -> str | None:
    """Why the GPU traced for runs no Pallas kernel; None if it runs them, or if it is not a GPU."""
    found = capability()
    if found is None or found >= (8, 0):
        return None
    kind = _device_kind() or "this GPU"
    return f"Pallas needs a GPU of compute capability 8.0 or newer, {kind} has {found[0]}.{found[1]}"


def _device_kind() -> str | None:
    return getattr(_device(), "device_kind", None)


def _device():
    """The device traced for: the abstract one under AOT, else the default one."""
    abstract = _abstract_device()
    return _default_device() if abstract is None else abstract


def _abstract_device():
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def _default_device():
    chosen = jax.config.jax_default_device
    if chosen is None or isinstance(chosen, str):
        return jax.devices(chosen)[0]
    return chosen
