"""Whole steps compiled by the chips' own compilers: kernels in place, the cache aliased, nothing large copied."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from pallas_kernels.analysis import targets

pytestmark = pytest.mark.aot
ROOT = Path(__file__).parents[2]
FULL = {
    "v5e": ("smollm2", "llama3-8b", "gemma3", "prefill", "verify", "float32"),
    "v6e": ("gemma3", "prefill"),
    "v5e:2x4": ("mesh", "mesh prefill"),
}
SMOKE = {name: ("smoke", "smoke prefill", "smoke mixed") for name in targets.NAMES}


@cache
def compiled(target: str, names: tuple[str, ...]) -> dict[str, dict]:
    """What the compiler made of the steps: one process for all of a target's, since a compiler can end it."""
    if why := targets.missing(target):
        pytest.skip(why)
    run = subprocess.run(
        [sys.executable, "-m", "tests.aot.step_child", target, *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | targets.environment() | {"XLA_FLAGS": ""},
        timeout=1500,
    )
    found = {x["name"]: x for x in map(json.loads, filter(None, run.stdout.splitlines()))}
    for name in names:
        found.setdefault(name, {"error": f"the process ended with {run.returncode}: {run.stderr[-2000:]}"})
    return found


def of(target: str, name: str, names: tuple[str, ...]) -> dict:
    found = compiled(target, names)[name]
    assert "error" not in found, found["error"]
    return found


def check(found: dict, target: str) -> None:
    assert found["kernels"] >= found["layers"], "a layer's attention is not a kernel"
    assert found["memory"]["alias"] >= found["cache"], "the cache is not aliased"
    assert not found["spills"]
    if targets.Target.get(target).chip.platform == "tpu":
        # A GPU's compiler lays weights out anew for its own matrix products; a TPU's has no reason to.
        assert not found["moved"], found["moved"]
        assert found["memory"]["argument"] <= found["declared"] * 1.01
    assert not found["not_ieee"]


@pytest.mark.parametrize(("target", "name"), [(t, n) for t, names in FULL.items() for n in names])
def test_a_step_moves_nothing_but_what_it_needs(target, name):
    found = of(target, name, FULL[target])
    check(found, target)
    arguments, temporary = (found["memory"][part] / found["declared"] for part in ("argument", "temp"))
    print(
        f"{target} {name}: {found['seconds']:.0f} s, of weights + cache arguments {arguments:.4f} and temporary "
        f"{temporary:.4f}, {found['kernels']} kernels, VMEM {found['vmem_bytes'] / 2**20:.1f} MiB"
    )
    if "prefill" not in name:
        assert found["memory"]["temp"] < 0.02 * found["declared"]
    if "mesh" not in name:
        assert found["memory"]["argument"] == pytest.approx(found["predicted"], rel=0.01)
    else:
        largest = max((size for _, size in found["collectives"]), default=0)
        assert 0 < largest < found["cache"] / found["layers"] / 2, f"a cache is gathered: {found['collectives']}"


@pytest.mark.parametrize("target", ["v5e", "h100"])
def test_smoke_a_verification_of_five_tokens_moves_what_a_decode_step_moves(target):
    """The arithmetic that a decode step leaves idle is what speculation lives on: few bytes more, and no copy."""
    names = ("decode 8b", "verify 8b")
    found = {name: of(target, name, names) for name in names}
    for each in found.values():
        check(each, target)

    def step_bytes(each):
        """Weights once, the kernels' own traffic, what is written between them and read again, and the result."""
        memory = each["memory"]
        result = memory["output"] - memory["alias"]
        return each["weights"] + each["layers"] * each["attention"] + 2 * memory["temp"] + result

    decode, verify = (step_bytes(found[name]) for name in names)
    print(
        f"{target}: decode {decode / 1e9:.3f} GB, verification of 5 tokens {verify / 1e9:.3f} GB, {verify / decode:.3f}"
    )
    assert verify <= 1.10 * decode
    assert found["verify 8b"]["memory"]["temp"] < found["verify 8b"]["cache"] / 2


MIXED = {
    "v5e": ("mixed smollm2", "mixed llama3-8b", "mixed decode", "mixed int8", "mixed gemma3"),
    "v5e:2x4": ("mixed mesh",),
}


@pytest.mark.parametrize(("target", "name"), [(t, n) for t, names in MIXED.items() for n in names])
def test_a_mixed_step_takes_pages_and_weights_as_they_lie(target, name):
    found = of(target, name, MIXED[target])
    check(found, target)
    temporary = found["memory"]["temp"] / found["declared"]
    print(
        f"{target} {name}: {found['seconds']:.0f} s, temporary {temporary:.4f} of weights + pages, "
        f"{found['kernels']} kernels, VMEM {found['vmem_bytes'] / 2**20:.1f} MiB"
    )
    assert temporary < 0.02
    if "mesh" in name:
        largest = max((size for _, size in found["collectives"]), default=0)
        assert 0 < largest < found["cache"] / found["layers"] / 2, f"pages are gathered: {found['collectives']}"


QUANTIZED = ("llama3-8b int8", "llama3-8b int4", "int8 alone", "w8a8", "int8 prefill", "int4 prefill")
# Of bf16: 2 bytes for each of the 8.03 billion weights, and for a cache of 8 rows of 2048 tokens.
LLAMA_WEIGHTS = 2 * (2 * 128256 * 4096 + 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096 * 2))
LLAMA_CACHE = 2 * 32 * 2 * 8 * 2048 * 1024


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_step_reads_small_weights_as_they_lie(name):
    found = of("v5e", name, QUANTIZED)
    # An attention, a write and seven products a layer, and the head.
    assert found["kernels"] == 9 * found["layers"] + 1, "a product is not a kernel"
    assert found["memory"]["alias"] >= found["cache"]
    assert found["memory"]["argument"] <= found["declared"] * 1.001
    assert found["memory"]["argument"] == pytest.approx(found["predicted"], rel=0.01)
    moved = [x for x in found["moved"] if "s8[" in x or "s4[" in x]
    wide = [x for x in found["moved"] if any(f"[{o},{i}]" in x.replace(" ", "") for o, i in SIDES)]
    assert not wide, f"weights are widened or laid out anew: {wide}"
    if "prefill" not in name:
        assert not found["moved"], found["moved"]
        assert found["memory"]["temp"] < 0.02 * found["declared"]
    else:  # the rows of the embedding that were looked up
        assert all("gather" in x or "copy-start" in x for x in moved), moved
    weights = found["weights"] / LLAMA_WEIGHTS
    both = found["memory"]["argument"] / (LLAMA_WEIGHTS + LLAMA_CACHE)
    if found["layers"] == 32:
        print(f"{name}: weights {weights:.4f} of bf16, with the cache {both:.4f}")
        assert weights <= (0.52 if "int8" in name else 0.30)
        assert both <= (0.55 if "int8" in name else 0.33)


def test_a_quantized_step_compiles_for_a_mesh():
    """Its products are XLA's, its attention is the kernel; each chip holds its share of the int8 weights."""
    found = of("v5e:2x4", "mesh int8", ("mesh int8",))
    assert found["layers"] <= found["kernels"] < 9 * found["layers"]
    assert found["memory"]["alias"] >= found["cache"]
    assert found["memory"]["argument"] <= found["declared"] * 1.01


POLICIES = ("int8", "int8:g128", "int4", "int4:g128:affine", "w8a8")


@pytest.mark.parametrize("step", ["prefill", "decode_step", "verify", "mixed_step"])
def test_a_quantized_step_over_eight_chips_has_the_collectives_of_bf16(step):
    """One sum for the embedding and two a layer, of activations: no weight moves."""
    names = tuple(f"{policy} over 8: {step}" for policy in ("bf16", *POLICIES))
    found = {name.split()[0]: of("v5e:2x4", name, names) for name in names}
    plain = sorted(found["bf16"]["collectives"])
    assert [name for name, _ in plain] == ["all-reduce"] * (1 + 2 * found["bf16"]["layers"])
    for policy in POLICIES:
        collectives = sorted(found[policy]["collectives"])
        if policy != "w8a8":
            assert collectives == plain, policy
        else:  # its sums are int32, and the scale of a row is that of the whole row: one number a row before each
            assert [name for name, _ in collectives] == ["all-reduce"] * (1 + 4 * found[policy]["layers"])
            assert sum(size for _, size in collectives) <= 2.1 * sum(size for _, size in plain)


# [out, in] of Llama 3 8B.
SIDES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096))


def test_llama_3_8b_fits_a_v5e_in_int8_alone():
    memory = of("v5e", "llama3-8b int8", QUANTIZED)["memory"]
    assert memory["argument"] + memory["output"] - memory["alias"] + memory["temp"] < 16 << 30
    refused = compiled("v5e", ("llama3-8b bf16",))["llama3-8b bf16"]
    assert "RESOURCE_EXHAUSTED" in refused["error"], refused


@pytest.mark.parametrize("name", ["smoke", "smoke prefill", "smoke mixed"])
@pytest.mark.parametrize("target", SMOKE)
def test_smoke_every_target_compiles_each_step(target, name):
    found = of(target, name, SMOKE[target])
    assert found["kernels"] >= found["layers"]
    assert found["memory"]["alias"] >= found["cache"]
    assert not found["spills"]
