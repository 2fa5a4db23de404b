"""`pdx bench model`: times prefill and decode of a model, and compares them with their ceilings and transformers."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import jax
import numpy as np

from pdx.bench.device import machine
from pdx.bench.peer import llama_cpp_or_reason, transformers_or_reason
from pdx.bench.phase_work import DECODE_CONTEXT, DECODE_TOKENS, decode_work, prefill_work
from pdx.bench.timing import Timing, interleaved, matmul_rate, read_bandwidth
from pdx.cost import Setup
from pdx.io.tables import Table
from pdx.sampling.options import SamplingOptions
from pdx.weights.load import Model

LLAMA = "llama.cpp, as the file stores it"
ROUNDS = 5
PEER_DECODE_TOKENS = 12
SAMPLED = SamplingOptions(temperature=0.8, top_k=50, top_p=0.95, min_p=0.02, repetition_penalty=1.1, seed=1)


@dataclass(frozen=True)
class Line:
    """One row of the table. Seconds are the median: of a whole prefill, or of one decode step."""

    phase: str
    shape: str
    seconds: float
    best_seconds: float
    tokens_per_s: float
    _: KW_ONLY
    gb_per_s: float | None = None  # weights and KV read per second
    share_of_bandwidth: float | None = None
    gflop_per_s: float | None = None  # FLOPs of the model's products per second
    share_of_peak: float | None = None  # relative to a large f32 product in the same rounds
    peer_seconds: float | None = None  # of transformers
    plain_seconds: float | None = None  # of the model without this quantization

    @property
    def speedup(self) -> float | None:
        return self.peer_seconds / self.seconds if self.peer_seconds else None

    @property
    def gain(self) -> float | None:
        """Speed relative to the model without this quantization."""
        return self.plain_seconds / self.seconds if self.plain_seconds else None


@dataclass
class Result:
    """The results of a run, with the machine's ceilings."""

    model: str
    device: str
    dtype: str
    bandwidth_gb_per_s: float
    peak_gflop_per_s: float
    versions: dict[str, str]
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        rows = [dataclasses.asdict(line) | {"speedup": line.speedup, "gain": line.gain} for line in self.lines]
        return dataclasses.asdict(self) | {"lines": rows}

    def table(self) -> Table:
        """A row for each line."""
        head = ("phase", "shape", "median", "tok/s", "ceiling reached", "transformers", "speedup", f"over {self.dtype}")
        rows = [
            (
                x.phase,
                x.shape,
                f"{x.seconds * 1e3:.1f} ms",
                f"{x.tokens_per_s:.0f}",
                _ceiling(x),
                _number(x.peer_seconds, ms=True),
                _number(x.speedup, unit="x"),
                _number(x.gain, unit="x"),
            )
            for x in self.lines
        ]
        return Table(head, rows, keys=2)

    def heading(self) -> str:
        """What was measured, where, and the machine's ceilings."""
        versions = ", ".join(f"{k} {v}" for k, v in self.versions.items())
        return (
            f"{self.model}, {self.dtype}, on {self.device}; {versions}.\n"
            f"Measured in the same run: reading {self.bandwidth_gb_per_s:.1f} GB/s, multiplying f32 "
            f"{self.peak_gflop_per_s:.0f} GFLOP/s.\n"
        )


def _number(value: float | None, *, ms: bool = False, unit: str = "") -> str:
    if value is None:
        return ""
    return f"{value * 1e3:.1f} ms" if ms else f"{value:.2f}{unit}"


def _ceiling(line: Line) -> str:
    if line.share_of_bandwidth is not None:
        return f"{line.share_of_bandwidth:.0%} ({line.gb_per_s:.1f} GB/s)"
    return "" if line.share_of_peak is None else f"{line.share_of_peak:.0%} ({line.gflop_per_s:.0f} GFLOP/s)"


def run(
    model: Model,
    prompt_tokens: Sequence[int],
    batches: Sequence[int],
    *,
    peer: bool,
    kernels: str,
    others: Mapping[str, Model] | None = None,
) -> Result:
    """Time prefills of `prompt_tokens` and decode steps of `batches`. All variants of a shape run in turn, in rounds.

    Args:
      peer: also time transformers on the same file, and with `others`, llama.cpp.
      kernels: of the steps.
      others: the same model with other quantizations, by name.
    """
    bandwidth, others = read_bandwidth(), others or {}
    other, reason = transformers_or_reason(model.path) if peer else (None, "")
    llama, why = llama_cpp_or_reason(model.path) if peer and others else (None, "")
    versions = {"jax": jax.__version__}
    versions |= {"torch": other.torch.__version__} if other else {}
    versions |= {"llama-cpp-python": llama.version} if llama else {}
    result = Result(model.name, machine(), str(model.dtype), 0.0, 0.0, versions, notes=[x for x in (reason, why) if x])
    reads: list[float] = []
    rates: list[float] = []
    multiply = matmul_rate()
    for tokens in prompt_tokens:
        _say(f"prefill of {tokens} tokens")
        result.lines.extend(_prefill_lines(model, tokens, kernels, other, multiply, rates, others, llama))
    for batch in batches:
        _say(f"decode at batch {batch}")
        result.lines.extend(_decode_lines(model, batch, kernels, other, bandwidth, reads, others, llama))
    _say("decode in a large cache")
    result.lines.append(_capacity_line(model, kernels, bandwidth))
    result.bandwidth_gb_per_s, result.peak_gflop_per_s = (float(np.median(x)) if x else 0.0 for x in (reads, rates))
    return result


def _say(what: str) -> None:
    print(f"measuring {what}", file=sys.stderr, flush=True)


def _prefill_lines(
    model: Model, tokens: int, kernels: str, other, multiply, rates: list[float], others: Mapping[str, Model], llama
) -> list[Line]:
    contestants = {"pdx": prefill_work(model, 1, tokens, kernels), "multiply": multiply}
    contestants |= {f"weights {name}": prefill_work(m, 1, tokens, kernels) for name, m in others.items()}
    if other:
        contestants["peer"] = other.prefill(tokens)
    if llama:
        contestants[LLAMA] = llama.prefill(tokens)
    times = interleaved(contestants, ROUNDS)
    mine = times["pdx"]
    peak = multiply.flops / times["multiply"].median / 1e9
    rates.append(peak)
    rate = Setup(model.config).prefill(1, tokens).flops / mine.median / 1e9
    lines = [
        Line(
            "prefill",
            f"{tokens} tokens",
            mine.median,
            mine.best,
            tokens / mine.median,
            gflop_per_s=rate,
            share_of_peak=rate / peak,
            peer_seconds=times["peer"].median if other else None,
        )
    ]
    return lines + [
        Line("prefill", f"{tokens} tokens, {name}", t.median, t.best, tokens / t.median, plain_seconds=mine.median)
        for name, t in times.items()
        if name not in ("pdx", "peer", "multiply")
    ]


def _decode_lines(
    model: Model, batch: int, kernels: str, other, bandwidth, reads: list[float], others: Mapping[str, Model], llama
) -> list[Line]:
    greedy, sampled = (decode_work(model, batch, kernels, options) for options in (SamplingOptions(), SAMPLED))
    contestants: dict[str, Callable[[], Timing]] = {"pdx": greedy, "sampled": sampled, "read": bandwidth}
    contestants |= {f"weights {name}": decode_work(m, batch, kernels) for name, m in others.items()}
    if other:
        contestants["peer"] = other.decode(batch, DECODE_CONTEXT, PEER_DECODE_TOKENS)
    if llama and batch == 1:
        contestants[LLAMA] = llama.decode(DECODE_CONTEXT, DECODE_TOKENS)
    times = interleaved(contestants, ROUNDS)
    read = bandwidth.bytes_read / times["read"].median / 1e9
    reads.append(read)
    plain, peer_seconds = times["pdx"].median, times["peer"].median if other else None
    sampled_shape = f"batch {batch}, sampled (top-k, top-p, min-p, penalty)"
    lines = [
        _decode_line(model, batch, f"batch {batch}", times["pdx"], read, peer_seconds),
        _decode_line(model, batch, sampled_shape, times["sampled"], read, None),
    ]
    for name, m in others.items():
        line = _decode_line(m, batch, f"batch {batch}, weights {name}", times[f"weights {name}"], read, None)
        lines.append(dataclasses.replace(line, plain_seconds=plain))
    if LLAMA in times:
        t = times[LLAMA]
        lines.append(Line("decode", f"batch 1, {LLAMA}", t.median, t.best, 1 / t.median, plain_seconds=plain))
    return lines


def _decode_line(model: Model, batch: int, shape: str, times: Timing, read: float, peer_seconds) -> Line:
    rate = _step_bytes(model, batch) / times.median / 1e9
    return Line(
        "decode",
        shape,
        times.median,
        times.best,
        batch / times.median,
        gb_per_s=rate,
        share_of_bandwidth=rate / read,
        peer_seconds=peer_seconds,
    )


def _capacity_line(model: Model, kernels: str, bandwidth) -> Line:
    """A decode step in a cache 32 times as large. Its time should depend on the context, not on the capacity."""
    large = min(8192, model.config.max_context)
    times = interleaved(
        {
            "small": decode_work(model, 1, kernels),
            "large": decode_work(model, 1, kernels, capacity=large),
            "read": bandwidth,
        },
        ROUNDS,
    )
    read = bandwidth.bytes_read / times["read"].median / 1e9
    extra = times["large"].median / times["small"].median - 1
    return _decode_line(model, 1, f"batch 1, capacity {large} ({extra:+.0%} against 256)", times["large"], read, None)


def _step_bytes(model: Model, batch: int) -> float:
    """Bytes that a decode step must read: every weight once, and the keys and values of the mean context."""
    cfg = model.config
    weights = sum(x.nbytes for x in jax.tree.leaves(model.params))
    if "lm_head" in model.params:
        weights -= model.params["embed"].nbytes  # only looked up
    context = DECODE_CONTEXT + DECODE_TOKENS / 2
    seen = sum(min(context, w or context) for w in cfg.windows)
    return weights + batch * seen * 2 * cfg.num_kv_heads * cfg.head_dim * np.dtype(model.dtype).itemsize
