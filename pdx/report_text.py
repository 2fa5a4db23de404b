"""How results are told to people: the summary of a generation, the fields of `--json`, the list of models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pdx.completion import Completion, json_logprob
from pdx.metrics import ServedTiming
from pdx.versions import check

if TYPE_CHECKING:
    from jax.sharding import Mesh


def device_name(every: bool = True, mesh: Mesh | None = None) -> str:
    """This process's devices, such as `cpu` or `tpu (TPU v5 lite) x4`; without `every` the default one alone.

    With a `mesh`, its devices and axes, such as `cpu x8 (data=2, model=4)`.
    """
    check()
    import jax

    devices = jax.devices() if mesh is None else list(mesh.devices.flat)
    device, count = devices[0], len(devices)
    kind = "" if device.device_kind.lower() == device.platform else f" ({device.device_kind})"
    axes = "" if mesh is None else f" ({', '.join(f'{axis}={size}' for axis, size in mesh.shape.items())})"
    return f"{device.platform}{kind}" + (f" x{count}" if every and count > 1 else "") + axes


def kernel_paths(kernels: str) -> dict[str, str]:
    """Which attention path each phase took, and why."""
    from pdx.layers.attention import explain

    return explain(kernels)


def completion_fields(
    completion: Completion, kernels: str | dict[str, str], mesh: Mesh | None = None
) -> dict[str, Any]:
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
        "device": device_name(mesh=mesh),
        "kernels": kernel_paths(kernels) if isinstance(kernels, str) else kernels,
    }
    if isinstance(timing, ServedTiming):
        fields |= {"queue_s": timing.queue_s, "hit_tokens": timing.hit_tokens, "preemptions": timing.preemptions}
    if completion.logprobs is not None:
        fields["logprobs"] = [
            {
                "token_id": t.token_id,
                "logprob": json_logprob(t.logprob),
                "top": [[token, json_logprob(value)] for token, value in t.top],
            }
            for t in completion.logprobs
        ]
    return fields


def summary(completion: Completion, kernels: str, mesh: Mesh | None = None) -> str:
    """Lines for standard error behind the text."""
    timing, prompt = completion.timing, completion.prompt_tokens
    decode = "only one token"
    if timing.tpot_s is not None:
        decode = f"TPOT {timing.tpot_s * 1e3:.1f} ms = {1 / timing.tpot_s:.1f} tok/s"
    paths = kernel_paths(kernels)
    return "\n".join(
        [
            f"prefill  {prompt} prompt tokens, TTFT {timing.ttft_s * 1e3:.0f} ms = {prompt / timing.ttft_s:.0f} tok/s",
            f"decode   {completion.completion_tokens} tokens, {decode}, finish: {completion.finish_reason}",
            f"E2E      {timing.e2e_s:.2f} s; compilation apart: {completion.compile_s:.2f} s",
            f"device   {device_name(mesh=mesh)}; {paths['prefill']}; {paths['decode']}",
        ]
    )


def print_models(rows: list[dict[str, Any]]) -> None:
    """A table of what `pdx models` knows."""
    from rich.markup import escape

    from pdx.tables import Table

    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[escape(_cell(row.get(column))) for column in columns] for row in rows]
    Table(columns, cells, left=set(columns) - {"size_mb"}).show()
    print("also: a .gguf file, a Hugging Face directory (safetensors), a hub id,\nor a checkpoint of `pdx convert`")


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)
