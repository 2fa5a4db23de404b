"""The cases of decode attention, shared by tests, the tuner, AOT compilation and benchmarks."""

from __future__ import annotations

from pallas_kernels.attention.cases import Case

# Rows and rings. Prefill attention takes these too.
FEW = (
    Case("one token, ragged", (0, 5, 127, 40), (1, 1, 1, 1), 1, 128, group=3, kv_heads=1, head_dim=64),
    Case("one query head a KV head", (7, 100), (1, 1), 1, 128, group=1, kv_heads=4),
    Case("eight query heads a KV head", (130, 3), (1, 1), 1, 256, group=8, kv_heads=1, head_dim=64),
    Case("rows that take no part", (9, 0, 20, 0), (1, 0, 0, 1), 1, 128, group=3),
    Case("nobody takes part", (9, 0), (0, 0), 2, 128),
    Case("draft of four, ragged", (60, 2, 127), (5, 1, 3), 5, 256, group=3),
    Case("a prime number of slots", (70, 112), (1, 1), 1, 113),
    Case("slots that are not whole blocks, a scale", (350, 20), (2, 2), 2, 384, scale=0.05),
    Case("window of one", (60, 2), (3, 3), 3, 128, window=1),
    Case("window smaller than a block", (200, 2, 90), (4, 4, 4), 4, 256, window=20, group=3),
    Case("window of exactly a block", (300, 127), (2, 2), 2, 384, window=128),
    Case("window larger than a block", (330, 10), (2, 2), 2, 384, window=300),
    Case("ring that wrapped, rows far apart", (1000, 5, 131, 127, 700), (1, 1, 1, 1, 0), 1, 128, window=100, group=3),
    Case("ring of several blocks, rows far apart", (900, 40, 385), (5, 5, 2), 5, 384, window=364),
    Case("soft cap and window", (200, 2), (3, 3), 3, 256, softcap=2.0, window=50, head_dim=64),
    Case("bf16", (60, 200), (1, 1), 1, 256, dtype="bfloat16", head_dim=64, group=3),
    Case("bf16 cache, f32 queries", (60, 200), (3, 2), 3, 256, kv_dtype="bfloat16"),
    Case("bf16, window, soft cap", (300, 20), (4, 2), 4, 256, dtype="bfloat16", window=99, softcap=5.0),
)

# Features and models that the list above does not cover.
FEATURES = (
    Case("attention sinks", (60, 2), (2, 1), 2, 128, sinks=True, group=3),
    Case("attention sinks and a window, nobody in row one", (200, 9, 0), (1, 0, 1), 1, 256, sinks=True, window=30),
    Case("token tree", (60, 0, 120), (6, 4, 5), 6, 256, tree=True, group=3),
    Case("token tree in a ring that wrapped", (600, 3, 130), (16, 9, 16), 16, 128, tree=True, window=40, group=3),
    Case("values of another size", (60, 2), (2, 1), 2, 128, head_dim=24, value_dim=16),
    Case("everything that is held, not only what came before", (60, 2), (3, 2), 3, 128, causal=False),
    Case(
        "slots that large blocks do not divide, bf16",
        (1100, 20),
        (2, 1),
        2,
        1152,
        kv_heads=3,
        group=3,
        head_dim=64,
        dtype="bfloat16",
    ),
    Case("every slot held, no mask", (125, 127), (3, 1), 3, 128, causal=False, full=True),
    Case("int8", (60, 200), (1, 1), 1, 256, kv_dtype="int8", group=3, head_dim=64),
    Case(
        "int8, three KV heads, window, soft cap",
        (300, 20, 7),
        (4, 2, 0),
        4,
        256,
        kv_dtype="int8",
        kv_heads=3,
        group=3,
        window=99,
        softcap=5.0,
    ),
    Case("int8, heads of 128, values of 96", (60, 200), (2, 1), 2, 256, 2, 3, 128, value_dim=96, kv_dtype="int8"),
    Case("int8, bf16, heads of 128", (60, 0, 200), (1, 0, 1), 1, 256, 2, 4, 128, dtype="bfloat16", kv_dtype="int8"),
    Case("int8, bf16 queries, sinks", (60, 200), (1, 1), 1, 256, dtype="bfloat16", kv_dtype="int8", sinks=True),
)

# Head sizes and groupings of published models, at small lengths.
SHAPES = tuple(
    Case(f"{name}, {dtype}", (130, 0, 37), (1, 0, 1), 1, 256, kv_heads=k, group=g, head_dim=h, dtype=dtype)
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

# Real sizes, for the compilers. A cache of half a gigabyte or more shows whether it is copied.
LARGE = (
    Case("Llama 3 8B, bf16", (2047,) * 64, (1,) * 64, 1, 2048, 8, 4, 128, dtype="bfloat16", smoke=True),
    Case("SmolLM2 135M, bf16", (8191,) * 64, (1,) * 64, 1, 8192, 3, 3, 64, dtype="bfloat16"),
    Case("SmolLM2 135M, f32", (8191,) * 32, (1,) * 32, 1, 8192, 3, 3, 64),
    Case("Gemma 3 270M, window, bf16", (8191,) * 64, (1,) * 64, 1, 8192, 1, 4, 256, window=512, dtype="bfloat16"),
    Case(
        "Llama 3 8B, int8", (4095,) * 64, (1,) * 64, 1, 4096, 8, 4, 128, dtype="bfloat16", kv_dtype="int8", smoke=True
    ),
    Case("a draft of eight, bf16", (2039,) * 64, (8,) * 64, 8, 2048, 8, 4, 128, dtype="bfloat16"),
    Case("one long row, bf16", (131071,), (1,), 1, 131072, 8, 4, 128, dtype="bfloat16"),
)

CASES = FEW + FEATURES + SHAPES
