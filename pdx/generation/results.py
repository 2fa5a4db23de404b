"""A completion as a summary for a terminal, and as the fields of `--json`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pdx.generation.completion import Completion, json_logprob
from pdx.installation.devices import where_run
from pdx.metrics import ServedTiming, SpeculationCounts

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from pdx.layers.kernels import KernelName, Kernels


def kernel_paths(kernels: Kernels) -> dict[str, str]:
    """Which attention path each phase took, and why."""
    from pdx.layers.kernels import explain

    return explain(kernels)


def completion_fields(
    completion: Completion, kernels: KernelName | dict[str, str], mesh: Mesh | None = None
) -> dict[str, Any]:
    """The fields of a completion for `--json` and for output rows; seconds, and token counts.

    `kernels`: the user's choice, or the path of each phase.
    """
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
        "device": where_run(mesh),
        "kernels": kernel_paths(kernels) if isinstance(kernels, str) else kernels,
    }
    if isinstance(timing, ServedTiming):
        fields |= {"queue_s": timing.queue_s, "hit_tokens": timing.hit_tokens, "preemptions": timing.preemptions}
    if completion.speculation is not None:
        counts = completion.speculation
        fields["speculation"] = {
            "rounds": counts.rounds,
            "rounds_by_draft_length": {str(length): n for length, n in counts.by_length.items()},
            "drafted": counts.drafted,
            "kept": counts.kept,
            "acceptance": counts.acceptance,
            "tokens_per_round": counts.tokens_per_round,
        }
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


def summary(completion: Completion, kernels: Kernels, mesh: Mesh | None = None) -> str:
    """The lines on standard error after the text: tokens, seconds and rates of each phase."""
    timing, prompt = completion.timing, completion.prompt_tokens
    decode = "only one token"
    if timing.tpot_s is not None:
        decode = f"TPOT {timing.tpot_s * 1e3:.1f} ms = {1 / timing.tpot_s:.1f} tok/s"
    paths = kernel_paths(kernels)
    lines = [
        f"prefill  {prompt} prompt tokens, TTFT {timing.ttft_s * 1e3:.0f} ms = {prompt / timing.ttft_s:.0f} tok/s",
        f"decode   {completion.completion_tokens} tokens, {decode}, finish: {completion.finish_reason}",
        f"E2E      {timing.e2e_s:.2f} s; compilation, not included: {completion.compile_s:.2f} s",
        f"device   {where_run(mesh)}; {paths['prefill']}; {paths['decode']}",
    ]
    if completion.speculation is not None:
        lines.insert(2, f"drafts   {speculation_line(completion.speculation)}")
    return "\n".join(lines)


def speed_line(drafted: Completion, plain: Completion) -> str:
    """Two answers to the same prompt, with drafts and without."""
    parted = next((i for i, (a, b) in enumerate(zip(drafted.token_ids, plain.token_ids, strict=False)) if a != b), None)
    same = "the same tokens" if parted is None else f"other tokens from the {parted + 1}. on"
    if drafted.timing.tpot_s is None or plain.timing.tpot_s is None:
        return f"without drafts: {same}; one token has no TPOT"
    return (
        f"without drafts: TPOT {plain.timing.tpot_s * 1e3:.1f} ms, so drafts are "
        f"{plain.timing.tpot_s / drafted.timing.tpot_s:.2f}x as fast; {same}"
    )


def speculation_line(counts: SpeculationCounts) -> str:
    """Acceptance and tokens a round, in words."""
    if counts.tokens_per_round is None:
        return "none: only one token"
    kept = "none verified: nothing promised to pay"
    if counts.acceptance is not None:
        kept = f"{counts.kept} of {counts.drafted} verified tokens kept = {counts.acceptance:.0%}"
    return f"{kept}; {counts.rounds} rounds, {counts.tokens_per_round:.2f} tokens a round"
