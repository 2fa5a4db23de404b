"""The chip table: complete, consistent with the published numbers, found by every name, light to import."""

import subprocess
import sys

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.hardware import ALIASES, CHIPS, Chip, chip, detect, of_kind, platform_of


@pytest.mark.parametrize("name", CHIPS)
def test_every_chip_is_whole(name):
    c = chip(name)
    assert c.platform in ("tpu", "gpu")
    assert c.kinds
    assert c.hbm_gbps > 0
    assert c.smem_kib > 0
    assert (c.vmem_mib > 0) == (c.mxu > 0) == (c.platform == "tpu")
    assert (c.capability is None) == (c.platform == "tpu")
    assert 0 < c.tflops("float32") < c.tflops("float16") <= c.tflops("int8")


# The table of shared facts: peak over bandwidth, times half the bytes of a weight (bf16; fp16 on the T4).
CRITICAL_BATCH = {
    "v4": 229,
    "v5e": 240,
    "v5p": 166,
    "v6e": 560,
    "7x": 313,
    "t4": 203,
    "l4": 403,
    "a100": 153,
    "h100": 295,
    "h200": 206,
    "b200": 281,
}


@pytest.mark.parametrize("name", CRITICAL_BATCH)
def test_peaks_and_bandwidth_give_the_known_critical_batch(name):
    c = chip(name)
    peak = c.tflops("bfloat16" if c.bf16_tflops else "float16")
    assert peak * 1e3 / c.hbm_gbps == pytest.approx(CRITICAL_BATCH[name], abs=1)


@pytest.mark.parametrize("name", [n for n in CHIPS if chip(n).platform == "tpu"])
def test_clocks_are_what_the_matrix_units_need_for_the_peak(name):
    c = chip(name)
    pushes = c.cores * 4 * c.mxu**2 * 2  # four 128x128 arrays, or two of 256x256 pushed twice a cycle
    assert c.bf16_tflops * 1e3 / pushes == pytest.approx(c.clock_ghz, rel=0.01)


def test_names_aliases_and_device_kinds_find_a_chip():
    assert chip("V5E") is chip("v5litepod") is chip("TPU v5 lite") is CHIPS["v5e"]
    assert chip("tpu7x") is chip("TPU7x") is CHIPS["7x"]
    assert chip("NVIDIA A100-SXM4-40GB").hbm_gib == 40
    assert set(ALIASES.values()) <= set(CHIPS)
    assert of_kind("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    with pytest.raises(ValueError, match=r"no chip 'v9'.*v5e.*b200"):
        chip("v9")


def test_types_that_are_not_native_run_at_the_wide_rate():
    assert chip("v4").tflops("int8") == chip("v4").tflops("bfloat16")
    assert chip("v5e").tflops("int8") == 394
    assert chip("7x").tflops("float8_e4m3fn") == 4614
    assert chip("t4").tflops("bfloat16") == chip("t4").tflops("float32")


def test_roofline_and_floor():
    c = chip("v5e")
    assert c.seconds(197e12, 1) == 1.0
    assert c.seconds(1, 819e9) == 1.0
    assert c.floor_cycles(197e12) == pytest.approx(1.5e9)
    assert chip("7x").floor_cycles(2307e12) == pytest.approx(2 * 2.2e9)  # one device is half the chip


def test_detect_sees_the_device_and_the_abstract_mesh():
    assert detect() is None
    assert platform_of() == "cpu"
    device = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        assert detect() is chip("v6e")
        assert platform_of() == "tpu"
        assert platform_of(jax.devices()[0]) == "cpu"
    with jax.default_device(jax.devices("cpu")[0]):
        assert detect() is None


def test_importing_the_table_starts_no_backend():
    code = (
        "import pallas_kernels.hardware as h; from jax._src import xla_bridge; "
        "assert h.chip('v5e'); assert not xla_bridge._backends, xla_bridge._backends"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_chip_cannot_be_changed():
    with pytest.raises(AttributeError):
        chip("v5e").hbm_gib = 1
    assert isinstance(chip("l4"), Chip)
