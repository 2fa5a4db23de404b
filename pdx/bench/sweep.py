"""Times both phases of a model at several batch sizes, and plots them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdx.bench.phase_work import decode_work, prefill_work
from pdx.bench.timing import interleaved
from pdx.weights.load import Model


@dataclass(frozen=True)
class BatchPoint:
    """Median seconds of one prefill of `batch` prompts (TTFT) and of one decode step of `batch` rows (TPOT)."""

    batch: int
    prompt_tokens: int
    ttft_s: float
    tpot_s: float

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.batch * self.prompt_tokens / self.ttft_s

    @property
    def decode_tokens_per_s(self) -> float:
        return self.batch / self.tpot_s


def batch_sweep(
    model: Model, batches: Sequence[int] = (1, 2, 4, 8), *, prompt_tokens: int = 64, rounds: int = 3
) -> list[BatchPoint]:
    """Time both phases at every batch size, in turn, so that a disturbance affects all alike."""
    work = {}
    for batch in batches:
        work["prefill", batch] = prefill_work(model, batch, prompt_tokens)
        work["decode", batch] = decode_work(model, batch)
    times = interleaved(work, rounds)
    return [BatchPoint(b, prompt_tokens, times["prefill", b].median, times["decode", b].median) for b in batches]


def table(points: Sequence[BatchPoint]) -> str:
    """The points as a Markdown table."""
    head = "| batch | TTFT | prefill tok/s | TPOT | decode tok/s |\n|---|---|---|---|---|"
    rows = [
        f"| {p.batch} | {p.ttft_s * 1e3:.0f} ms | {p.prefill_tokens_per_s:.0f} | {p.tpot_s * 1e3:.1f} ms "
        f"| {p.decode_tokens_per_s:.0f} |"
        for p in points
    ]
    return "\n".join([head, *rows])


def picture(points: Sequence[BatchPoint], title: str = ""):
    """A matplotlib figure: TTFT and TPOT by batch size, and the throughput of each phase relative to the smallest."""
    import matplotlib.pyplot as plt

    figure, (seconds, rate) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    plt.close(figure)  # a notebook would show it twice
    batches = [p.batch for p in points]
    seconds.plot(
        batches, [p.ttft_s * 1e3 for p in points], "o-", label=f"TTFT, {points[0].prompt_tokens} tokens per row"
    )
    seconds.plot(batches, [p.tpot_s * 1e3 for p in points], "s-", label="TPOT")
    seconds.set(xlabel="batch", ylabel="milliseconds", yscale="log", title="latency")
    for label, values in (
        ("prefill", [p.prefill_tokens_per_s for p in points]),
        ("decode", [p.decode_tokens_per_s for p in points]),
    ):
        rate.plot(batches, [v / values[0] for v in values], "o-", label=label)
    rate.plot(batches, [b / batches[0] for b in batches], "k:", label="proportional to the batch")
    rate.set(xlabel="batch", ylabel="tokens/s relative to the smallest batch", title="throughput")
    for axes in (seconds, rate):
        axes.set_xticks(batches)
        axes.legend()
    figure.suptitle(title)
    return figure
