"""The cases of prefill attention, shared by tests, the tuner, AOT compilation and benchmarks."""

from __future__ import annotations

from pallas_kernels.attention.cases import Case
from pallas_kernels.decode_attention.cases import FEW

# Chunks of a prompt. The XLA path's blocks have 256 queries and at most 256 keys.
CHUNKS = (
    Case("whole prompts, ragged", (0, 0, 0, 0), (40, 1, 0, 17), 40, 128, group=3),
    Case("chunk behind a context", (100, 0, 7), (28, 28, 3), 28, 128),
    Case("exactly one query block", (10,), (256,), 256, 384, kv_heads=1),
    Case("one query more than a block, ragged", (0, 30), (257, 90), 257, 384, kv_heads=1, group=1),
    Case("slots not a multiple of 128", (60, 0), (33, 20), 33, 100),
    Case("chunk longer than the window", (0, 50), (60, 40), 60, 128, window=7),
    Case("query blocks that see different keys", (100,), (280,), 280, 512, window=60, kv_heads=1),
    Case("ring that wrapped, rows far apart, chunks", (1000, 0, 129), (30, 30, 11), 30, 128, window=99, group=3),
    Case("ring that wraps inside the chunk", (110, 250), (40, 40), 40, 128, window=60),
    Case("soft cap", (20, 0), (40, 30), 40, 128, softcap=2.0, head_dim=64),
    Case("bf16, ring, soft cap", (500, 0), (40, 30), 40, 128, dtype="bfloat16", window=70, softcap=5.0),
)

FEATURES = (
    Case("attention sinks", (60, 0), (40, 17), 40, 128, sinks=True, group=3),
    Case("token tree", (60, 0), (40, 17), 40, 128, tree=True),
    Case("token tree in a ring", (200, 0), (40, 17), 40, 128, tree=True, window=60),
    Case("values of another size", (60, 0), (40, 17), 40, 128, head_dim=24, value_dim=16),
    Case("everything that is held, not only what came before", (60, 0), (40, 17), 40, 128, causal=False),
    Case("every slot held, no mask", (88, 120), (40, 8), 40, 128, causal=False, full=True),
    Case("int8", (60, 200), (40, 20), 40, 256, kv_dtype="int8", group=3, head_dim=64),
    Case(
        "int8, three KV heads, ring, soft cap, sinks",
        (300, 20, 7),
        (40, 20, 0),
        40,
        256,
        kv_dtype="int8",
        kv_heads=3,
        group=3,
        window=99,
        softcap=5.0,
        sinks=True,
    ),
    Case("int8, bf16 queries", (60, 200), (40, 20), 40, 256, dtype="bfloat16", kv_dtype="int8"),
)

# Head sizes and groupings of published models, at small lengths.
SHAPES = tuple(
    Case(f"{name}, {dtype}", (100, 0), (48, 17), 48, 256, kv_heads=k, group=g, head_dim=h, dtype=dtype)
    for dtype in ("float32", "bfloat16")
    for name, k, g, h in (
        ("SmolLM2 135M", 3, 3, 64),
        ("Gemma 3 270M", 1, 4, 256),
        ("Llama 3 8B", 8, 4, 128),
        ("sixteen to one", 1, 16, 64),
        ("head size 80", 2, 5, 80),
        ("head size 96", 4, 1, 96),
        ("head size 192", 2, 7, 192),
    )
)

# Real sizes, for the compilers.
LARGE = (
    Case("Llama 3 8B, bf16, no mask", (0,), (4096,), 4096, 4096, 8, 4, 128, dtype="bfloat16", causal=False, full=True),
    Case("Llama 3 8B, bf16", (0,), (4096,), 4096, 4096, 8, 4, 128, dtype="bfloat16", smoke=True),
    Case("Llama 3 8B, f32", (0,), (2048,), 2048, 2048, 8, 4, 128),
    Case("Llama 3 8B, int8", (0,), (2048,), 2048, 2048, 8, 4, 128, dtype="bfloat16", kv_dtype="int8", smoke=True),
    Case("SmolLM2 135M, bf16", (0,), (2048,), 2048, 2048, 3, 3, 64, dtype="bfloat16"),
    Case("Gemma 3 270M, window, bf16", (2048,), (512,), 512, 4096, 1, 4, 256, window=512, dtype="bfloat16"),
    Case("few tokens of a large capacity, bf16", (0,), (512,), 512, 131072, 8, 4, 128, dtype="bfloat16"),
    Case(
        "rows of very different lengths, bf16",
        (7680, 0, 0, 0, 0, 0, 0, 1024),
        (512, 512, 300, 17, 0, 512, 64, 200),
        512,
        8192,
        8,
        4,
        128,
        dtype="bfloat16",
    ),
    Case(
        "a chunk in a cache of half a gigabyte, bf16", (3584,) * 32, (512,) * 32, 512, 4096, 8, 4, 128, dtype="bfloat16"
    ),
)

CASES = FEW + CHUNKS + FEATURES + SHAPES
