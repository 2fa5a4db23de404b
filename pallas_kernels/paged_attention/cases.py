"""The cases of paged attention, shared by tests, the tuner, AOT compilation and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """Rows of `lengths` tokens, of which the last `queries` are this call's queries; T is padded to `tokens`."""

    name: str
    lengths: tuple[int, ...]
    queries: tuple[int, ...]
    page: int = 16
    tokens: int | None = None  # None: no padding
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 64
    value_dim: int | None = None  # None: head_dim
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    scale: float | None = None
    dtype: str = "float32"
    kv_dtype: str | None = None  # None: dtype
    decode_rows: int = 0
    decode_queries: int = 1
    max_queries: int | None = None
    width: int | None = None  # pages of a block table's row; None: one more than the longest row needs
    spare: int = 3  # pages that no row holds
    smoke: bool = False  # part of the short list for AOT compilation

    @property
    def packed(self) -> int:
        return self.tokens or sum(self.queries)

    @property
    def table_width(self) -> int:
        return self.width or max(-(-n // self.page) for n in self.lengths) + 1

    @property
    def value_size(self) -> int:
        return self.value_dim or self.head_dim

    @property
    def stored(self) -> str:
        return self.kv_dtype or self.dtype

    @property
    def logit_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale


# Small enough to interpret.
CASES = (
    Case("decode rows, ragged", (1, 6, 33, 70), (1, 1, 1, 1), group=3, max_queries=1),
    Case("three KV heads of 64, nine query heads", (5, 40), (1, 1), kv_heads=3, group=3, max_queries=1),
    Case("one KV head of 256", (20, 50), (1, 3), kv_heads=1, group=4, head_dim=256),
    Case("decode rows and chunks", (40, 9, 30, 55), (1, 1, 17, 20), group=2, decode_rows=2),
    Case("a chunk behind a context, padding", (70, 21), (25, 21), tokens=60, group=1, kv_heads=4),
    Case("rows without a part", (0, 12, 0, 33, 0), (0, 1, 0, 5, 0), tokens=9),
    Case("rows that hold but ask nothing", (30, 12, 8), (0, 1, 0), tokens=4),
    Case("nobody", (0, 0), (0, 0), tokens=3),
    Case("many rows in one block of queries", (9, 3, 17, 40, 2, 5, 31), (2, 3, 1, 4, 2, 5, 1), head_dim=128),
    Case("heads of 80", (30, 44), (1, 9), head_dim=80, kv_heads=3),
    Case("heads of 96", (30, 44), (1, 9), head_dim=96, kv_heads=3, group=1),
    Case("heads of 192, values of 128", (30, 44), (1, 9), head_dim=192, value_dim=128),
    Case("window of one", (60, 20), (3, 3), window=1),
    Case("window inside a page", (60, 20, 5), (1, 4, 5), window=7, group=3),
    Case("window over pages", (75, 50, 12), (1, 20, 12), window=33, decode_rows=1),
    Case("soft cap", (30, 44), (1, 9), softcap=2.0),
    Case("sinks", (30, 44, 0), (1, 9, 0), sinks=True, tokens=12),
    Case("sinks, window, soft cap, a scale", (70, 44), (1, 9), sinks=True, window=20, softcap=5.0, scale=0.2),
    Case("bf16", (40, 9, 30), (1, 1, 17), dtype="bfloat16", decode_rows=2, group=4),
    Case("bf16 pages, f32 queries", (40, 9, 30), (1, 1, 17), kv_dtype="bfloat16"),
    Case("bf16, sixteen query heads a KV head", (40, 9, 30), (1, 1, 9), dtype="bfloat16", kv_heads=1, group=16),
    Case("int8", (140, 9, 30), (1, 1, 17), page=128, kv_dtype="int8", decode_rows=2),
    Case("int8, heads of 128", (140, 9, 30), (1, 1, 17), head_dim=128, page=128, kv_dtype="int8", decode_rows=2),
    Case(
        "int8, bf16 queries, window, sinks",
        (300, 9, 150),
        (1, 1, 17),
        page=128,
        dtype="bfloat16",
        kv_dtype="int8",
        window=100,
        sinks=True,
        kv_heads=3,
    ),
    Case("pages of 128", (300, 129, 20), (1, 6, 20), page=128, head_dim=128),
    Case(
        "chunks of several tiles, window, sinks",
        (90, 70, 3, 61),
        (1, 60, 1, 37),
        tokens=104,
        head_dim=128,
        window=40,
        sinks=True,
        decode_rows=1,
    ),
    Case(
        "int8, four KV heads, decode rows and chunks",
        (140, 0, 200, 30),
        (1, 0, 50, 9),
        page=128,
        kv_dtype="int8",
        kv_heads=4,
        decode_rows=2,
    ),
    Case("eight KV heads, one query head each", (30, 44, 0), (1, 9, 0), kv_heads=8, group=1, tokens=12),
    Case(
        "eight KV heads, two query heads each, bf16",
        (40, 9, 30),
        (1, 1, 17),
        dtype="bfloat16",
        kv_heads=8,
        decode_rows=2,
    ),
    Case("five query heads a KV head", (40, 9, 30), (1, 1, 17), group=5, head_dim=128, decode_rows=2),
    Case("seven query heads a KV head, bf16", (33, 70, 6), (1, 9, 4), dtype="bfloat16", group=7),
    Case(
        "int8, eight query heads a KV head, eight KV heads",
        (140, 9, 30),
        (1, 1, 6),
        page=128,
        dtype="bfloat16",
        kv_dtype="int8",
        kv_heads=8,
        group=8,
        decode_rows=2,
    ),
    Case("seven query heads a KV head, decode rows", (1, 33, 0, 70), (1, 1, 0, 1), group=7, max_queries=1),
    Case(
        "decode rows of several blocks", (600, 0, 129, 128, 300), (1, 0, 1, 1, 1), tokens=6, max_queries=1, sinks=True
    ),
    Case(
        "decode rows of several blocks, window, pages of 48, bf16",
        (600, 40, 257, 300),
        (1, 1, 0, 1),
        page=48,
        window=200,
        dtype="bfloat16",
        group=3,
        kv_heads=3,
        decode_rows=4,
        max_queries=1,
    ),
    Case(
        "drafts of several blocks, a window, int8",
        (600, 300, 9, 0, 131),
        (5, 1, 3, 0, 2),
        page=128,
        window=300,
        kv_dtype="int8",
        tokens=14,
        decode_rows=5,
        decode_queries=5,
        max_queries=5,
    ),
    Case(
        "drafts, a soft cap, pages of 256, and a chunk",
        (600, 300, 9, 270),
        (3, 1, 2, 20),
        page=256,
        softcap=5.0,
        group=4,
        decode_rows=3,
        decode_queries=3,
    ),
    Case("drafts and plain rows", (70, 33, 0, 9), (4, 1, 0, 3), decode_rows=4, decode_queries=4, tokens=12),
    Case("drafts and a chunk, window", (70, 33, 40), (4, 2, 20), decode_rows=2, decode_queries=4, window=20),
    Case(
        "drafts, int8, bf16",
        (140, 9),
        (8, 3),
        page=128,
        dtype="bfloat16",
        kv_dtype="int8",
        max_queries=8,
        decode_rows=2,
        decode_queries=8,
    ),
)

# Steps of a server, with at least 512 MB of K and V: compiled for real targets, never interpreted.
LARGE = (
    Case(
        "llama-3-8b decode",
        (1000,) * 64,
        (1,) * 64,
        page=128,
        kv_heads=8,
        group=4,
        head_dim=128,
        max_queries=1,
        dtype="bfloat16",
        width=64,
        spare=1024,
    ),
    Case(
        "llama-3-8b mixed",
        (1000,) * 32 + (2048, 768),
        (1,) * 32 + (640, 352),
        tokens=1024,
        page=128,
        kv_heads=8,
        group=4,
        head_dim=128,
        dtype="bfloat16",
        decode_rows=32,
        width=64,
        spare=1024,
        smoke=True,
    ),
    Case(
        "llama-3-8b mixed, int8",
        (1000,) * 32 + (2048, 768),
        (1,) * 32 + (640, 352),
        tokens=1024,
        page=128,
        kv_heads=8,
        group=4,
        head_dim=128,
        dtype="bfloat16",
        kv_dtype="int8",
        decode_rows=32,
        width=64,
        spare=2048,
        smoke=True,
    ),
    Case(
        "smollm2 mixed",
        (900,) * 16 + (700,),
        (1,) * 16 + (240,),
        tokens=256,
        page=64,
        kv_heads=3,
        group=3,
        dtype="bfloat16",
        decode_rows=16,
        width=64,
        spare=8192,
        smoke=True,
    ),
    Case(
        "gemma-3 window",
        (5000,) * 16 + (700,),
        (1,) * 16 + (240,),
        tokens=256,
        page=64,
        kv_heads=1,
        group=4,
        head_dim=256,
        dtype="bfloat16",
        window=512,
        decode_rows=16,
        width=128,
        spare=8192,
    ),
)
