"""The offline loop: prompts to completions, in batches, the two phases timed apart.

`generate` returns completions, `stream` yields text as it comes. Both drive a `Generator`, which owns
the compiled programs of one shape (rows, capacity) and keeps them for every later call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pdx.arguments import integer
from pdx.errors import ContextLengthError, RequestError
from pdx.generation.completion import Completion
from pdx.generation.generator import DEFAULT_ROWS
from pdx.generation.kept import generator
from pdx.generation.prompts import Prompt, as_list, options_of_each, requests_of
from pdx.layers.kernels import Kernels, settled
from pdx.meshes import on_own_mesh
from pdx.sampling.options import SamplingOptions
from pdx.speculative.options import Speculation, asked
from pdx.weights.load import Model


@dataclass(frozen=True)
class Piece:
    """Some text of one request as it comes; the last piece of a request carries its completion."""

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
    """Generate for one prompt or several; yields pieces of text as they come. Arguments and errors as `generate`.

    Streams may be interleaved, nested, and run in several threads. Each takes a cache of its own when it begins, an
    idle one or a new one, and gives it back when it is exhausted, closed or collected; none waits for another. A stream
    that is left half read holds its cache as long as it lives: close it. In a `pdx.Engine` requests share one cache.

    Example:
      >>> model = pdx.load()  # doctest: +SKIP
      >>> for piece in pdx.stream(model, "The capital of France is", max_tokens=16):  # doctest: +SKIP
      ...     print(piece.text, end="", flush=True)
    """
    if not isinstance(model, Model):
        raise RequestError(f"model is {model!r}: it must be what pdx.load returns")
    prompts, batch_size = as_list(prompts), integer("batch_size", batch_size, 1)
    speculation = asked(speculate, draft_length)
    rows = requests_of(model, prompts, options_of_each(options, settings, len(prompts)))
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
        kernels=settled(kernels),
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
    512 MiB together, or else the one used last. All of it goes with the model (`del model`).

    Args:
      model: what `pdx.load` returns.
      prompts: a text, chat messages, token ids (a list or a one-dimensional array), or a list of any of these.
      options: sampling settings, one for all or one a prompt; None: greedy, 128 tokens.
      settings: single fields of `SamplingOptions` (max_tokens=, temperature=, ...), and batch_size=,
        kernels=, kv_dtype=, capacity= (tokens a row can hold; None: what the requests need, rounded up),
        speculate= and draft_length= (see `pdx.speculative.options.Speculation`; None: a token a step).

    Returns:
      One completion a prompt, in the order of the prompts.

    Raises:
      RequestError: an empty prompt, what is no prompt, or a setting out of range.
      ContextLengthError: a prompt that, with what it is to generate, the context cannot hold.
      NotFiniteError: logits that are NaN or infinite; the text names the prompt and the token. `stream` has yielded
        what came before them.
      NotImplementedError: a kernel path that does not exist here.

    Example:
      >>> model = pdx.load()  # doctest: +SKIP
      >>> done = pdx.generate(model, ["The capital of France is", "Bonjour"], max_tokens=16)  # doctest: +SKIP
      >>> done[0].text, done[0].timing.ttft_s  # doctest: +SKIP
    """
    done = [piece.completion for piece in stream(model, prompts, options, **settings) if piece.completion]
    return sorted(done, key=lambda c: c.index)
