"""Offline generation: prompts to completions, in static batches, with prefill and decode timed separately.

`generate` returns completions, `stream` yields text as it is generated. Both use a `Generator`, which keeps the
compiled programs of one shape (rows, capacity) for later calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pdx.arguments import integer
from pdx.errors import ContextLengthError, RequestError
from pdx.generation.completion import Completion
from pdx.generation.generator import DEFAULT_ROWS
from pdx.generation.kept import generator
from pdx.generation.prompts import Prompt, as_list, options_of_each, prepared_rows
from pdx.layers.kernels import Kernels, as_kernels
from pdx.meshes import on_own_mesh
from pdx.sampling.options import SamplingOptions
from pdx.speculative.options import Speculation, asked
from pdx.weights.load import Model


@dataclass(frozen=True)
class Piece:
    """New text of the prompt `index`. The last piece of a prompt carries its completion."""

    index: int
    text: str
    completion: Completion | None = None


@on_own_mesh
def stream(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    options: SamplingOptions | Sequence[SamplingOptions] | None = None,
    *,
    batch_size: int = DEFAULT_ROWS,
    kernels: Kernels = "auto",
    kv_dtype=None,
    capacity: int | None = None,
    speculate: Speculation | str | None = None,
    draft_length: int | str = "auto",
    **settings,
) -> Iterator[Piece]:
    """Generate for one prompt or several; yields pieces of text as they are generated.

    Arguments and errors are those of `generate`. Streams may be interleaved, nested, and run in several threads; none
    waits for another. Each holds its own cache from its first piece until it is exhausted, closed or garbage-collected.
    So close a stream that you stop reading. (In a `pdx.Engine`, requests share one cache.)

    Example:
      >>> model = pdx.load()  # doctest: +SKIP
      >>> for piece in pdx.stream(model, "The capital of France is", max_tokens=16):  # doctest: +SKIP
      ...     print(piece.text, end="", flush=True)
    """
    if not isinstance(model, Model):
        raise RequestError(f"model is {model!r}: it must be what pdx.load returns")
    prompts, batch_size = as_list(prompts), integer("batch_size", batch_size, 1)
    speculation = asked(speculate, draft_length)
    rows = prepared_rows(model, prompts, options_of_each(options, settings, len(prompts)))
    if not rows:
        return
    longest = max(len(r.prompt) + r.options.max_tokens for r in rows)
    capacity = longest if capacity is None else integer("capacity", capacity, 1)
    if capacity < longest:
        raise ContextLengthError(f"a request needs {longest} tokens of capacity, {capacity} were asked for")
    run = generator(
        model,
        rows=min(batch_size, len(rows)),
        tokens=capacity,
        kernels=as_kernels(kernels),
        kv_dtype=kv_dtype,
        num_logprobs=max(r.options.logprobs or 0 for r in rows),
        speculation=speculation,
    )
    for at in range(0, len(rows), run.rows):
        for row in run.run(rows[at : at + run.rows]):
            done = row.completion(row.compile_s) if row.finish_reason else None
            yield Piece(row.index, row.fresh_text(), done)


def generate(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    options: SamplingOptions | Sequence[SamplingOptions] | None = None,
    **settings,
) -> list[Completion]:
    """Complete one prompt or several. Any number of threads may call it.

    A model keeps the programs of the last 16 shapes (rows, capacity, log-probabilities), and idle caches of up to
    512 MiB in total (at least the one used last). `del model` frees them.

    Args:
      model: what `pdx.load` returns.
      prompts: a text, chat messages, token ids (a list or a one-dimensional array), or a list of any of these.
      options: sampling settings, one for all prompts or one per prompt; None: greedy, 128 tokens.
      settings: single fields of `SamplingOptions` (max_tokens=, temperature=, ...), and those of `stream`:
        batch_size= (prompts that run together), kernels= (`auto`, `xla`, `pallas`, `tpu`, `gpu`, `dense`, or
        {op: implementation}), kv_dtype= (`f32`, `bf16`, `int8`, `auto`), capacity= (tokens a row can hold; None:
        what the requests need, rounded up), speculate= and draft_length= (see `pdx.Speculation`; None: one token per
        step).

    Returns:
      One completion per prompt, in the order of the prompts.

    Raises:
      RequestError: a prompt is empty or of another type, or a setting is out of range.
      ContextLengthError: prompt and max_tokens together exceed the context.
      NotFiniteError: logits are NaN or infinite; the message names the prompt and the token. `stream` has yielded
        all tokens before them.
      NotImplementedError: a kernel path that does not exist here.

    Example:
      >>> model = pdx.load()  # doctest: +SKIP
      >>> done = pdx.generate(model, ["The capital of France is", "Bonjour"], max_tokens=16)  # doctest: +SKIP
      >>> done[0].text, done[0].timing.ttft_s  # doctest: +SKIP
    """
    done = [piece.completion for piece in stream(model, prompts, options, **settings) if piece.completion]
    return sorted(done, key=lambda c: c.index)
