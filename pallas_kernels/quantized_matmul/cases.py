"""The cases of quantized products, shared by tests, the tuner, AOT compilation and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One product. `activations` int8 is W8A8; `group` None is one scale per row."""

    name: str
    rows: int
    out: int
    columns: int
    bits: int = 8
    group: int | None = None
    symmetric: bool = True
    activations: str = "float"
    dtype: str = "float32"
    smoke: bool = False


# Small enough to interpret.
CASES = (
    Case("W8A16, one row", 1, 128, 256),
    Case("W8A16, rows of no tile", 5, 256, 384),
    Case("W8A16, a prompt", 600, 128, 128),
    Case("W8A16, groups of 32", 3, 128, 512, group=32),
    Case("W8A16, bf16", 9, 256, 256, dtype="bfloat16"),
    Case("W8A8, one row", 1, 128, 256, activations="int8"),
    Case("W8A8, rows", 37, 256, 384, activations="int8"),
    Case("W8A8, bf16", 4, 128, 256, activations="int8", dtype="bfloat16"),
    Case("W4A16, groups of 32", 2, 128, 512, bits=4, group=32),
    Case("W4A16, groups of 64", 7, 256, 1024, bits=4, group=64),
    Case("W4A16, groups of 128, bf16", 5, 128, 640, bits=4, group=128, dtype="bfloat16"),
    Case("W4A16, affine", 3, 128, 256, bits=4, group=32, symmetric=False),
    Case("W4A16, affine, a prompt", 520, 128, 256, bits=4, group=64, symmetric=False),
    Case("W4A16, a scale a row", 2, 128, 256, bits=4),
)

# Llama 3 8B, Gemma 3 270M and SmolLM2 135M (the TPU kernel refuses its rows of 576): compiled, never interpreted.
LARGE = (
    Case("llama gate, W8A16, decode", 8, 14336, 4096, dtype="bfloat16", smoke=True),
    Case("llama down, W8A16, decode", 8, 4096, 14336, dtype="bfloat16"),
    Case("llama head, W8A16, decode", 1, 128256, 4096, dtype="bfloat16"),
    Case("llama gate, W8A16, prompt", 1024, 14336, 4096, dtype="bfloat16"),
    Case("llama gate, W8A16, f32", 8, 14336, 4096),
    Case("llama gate, W8A16, groups of 32", 8, 14336, 4096, group=32, dtype="bfloat16"),
    Case("llama gate, W8A8, decode", 8, 14336, 4096, activations="int8", dtype="bfloat16", smoke=True),
    Case("llama gate, W8A8, prompt", 1024, 14336, 4096, activations="int8", dtype="bfloat16"),
    Case("llama gate, W4A16, decode", 8, 14336, 4096, bits=4, group=128, dtype="bfloat16", smoke=True),
    Case("llama down, W4A16, decode", 64, 4096, 14336, bits=4, group=128, dtype="bfloat16"),
    Case("llama gate, W4A16, prompt", 1024, 14336, 4096, bits=4, group=128, dtype="bfloat16"),
    Case("llama gate, W4A16, affine of 32", 8, 14336, 4096, bits=4, group=32, symmetric=False, dtype="bfloat16"),
    Case("gemma up, W4A16, groups of 128", 8, 2048, 640, bits=4, group=128, dtype="bfloat16"),
    Case("smollm2 gate, W8A16, decode", 1, 1536, 576, dtype="bfloat16"),
    Case("smollm2 down, W4A16, groups of 64", 8, 576, 1536, bits=4, group=64, dtype="bfloat16"),
    Case("smollm2 k, W8A8, decode", 8, 192, 576, activations="int8", dtype="bfloat16"),
    Case("smollm2 gate, W8A16, prompt", 500, 1536, 576, dtype="bfloat16"),
    Case("smollm2 head, W4A16, groups of 64", 8, 49152, 576, bits=4, group=64, dtype="bfloat16"),
)
