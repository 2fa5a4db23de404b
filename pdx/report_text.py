"""How results are told to people: the summary of a generation, the fields of `--json`, the list of models."""

from __future__ import annotations

from typing import Any

from pdx.completion import Completion
from pdx.metrics import ServedTiming
from pdx.versions import check


def device_name(every: bool = True) -> str:
    """This process's default device, such as `cpu` or `tpu (TPU v5 lite) x4`; without `every` only the one."""
    check()
    import jax

    device, count = jax.devices()[0], len(jax.devices())
    kind = "" if device.device_kind.lower() == device.platform else f" ({device.device_kind})"
    return f"{device.platform}{kind}" + (f" x{count}" if every and count > 1 else "")


def kernel_paths(kernels: str) -> dict[str, str]:
    """Which attention path each phase took, and why."""
    from pdx.layers.attention import explain

    return explain(kernels)


def completion_fields(completion: Completion, kernels: str | dict[str, str]) -> dict[str, Any]:
    """The object of `--json`, and what an output row gains. `kernels`: the choice, or the paths taken."""
    timing = completion.timing
    fields: dict[str, Any] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
        "finish_reason": completion.finish_reason,
        "ttft_s": timing.ttft_s,
        "tpot_s": timing.tpot_s,
        "e2e_s": timing.e2e_s,
        "compile_s": completion.compile_s,
        "device": device_name(),
        "kernels": kernel_paths(kernels) if isinstance(kernels, str) else kernels,
    }
    if isinstance(timing, ServedTiming):
        fields |= {"queue_s": timing.queue_s, "hit_tokens": timing.hit_tokens, "preemptions": timing.preemptions}
    if completion.logprobs is not None:
        fields["logprobs"] = [
            {"token_id": t.token_id, "logprob": t.logprob, "top": [list(pair) for pair in t.top]}
            for t in completion.logprobs
        ]
    return fields


def summary(completion: Completion, kernels: str) -> str:
    """Lines for standard error behind the text."""
    timing, prompt = completion.timing, completion.prompt_tokens
    decode = "only one token"
    if timing.tpot_s is not None:
        decode = f"TPOT {timing.tpot_s * 1e3:.1f} ms = {1 / timing.tpot_s:.1f} tok/s"
    paths = kernel_paths(kernels)
    return "\n".join([
        f"prefill  {prompt} prompt tokens, TTFT {timing.ttft_s * 1e3:.0f} ms = {prompt / timing.ttft_s:.0f} tok/s",
        f"decode   {completion.completion_tokens} tokens, {decode}, finish: {completion.finish_reason}",
        f"E2E      {timing.e2e_s:.2f} s; compilation apart: {completion.compile_s:.2f} s",
        f"device   {device_name()}; {paths['prefill']}; {paths['decode']}",
    ])  # fmt: skip


def print_models(rows: list[dict[str, Any]]) -> None:
    """A table of what `pdx models` knows."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    Console(width=10_000).print(table)  # a row a line, however narrow the terminal: names and paths can be copied
    print("also: a .gguf file, a Hugging Face directory (safetensors), a hub id, a checkpoint of `pdx convert`")


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)
