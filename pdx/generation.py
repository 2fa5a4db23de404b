"""The offline loop: prompts to completions, in batches, the two phases timed apart.

`generate` returns completions, `stream` yields text as it comes. Both drive a `Generator`, which owns
the compiled programs of one shape (rows, capacity) and keeps them for every later call.
"""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pdx import steps
from pdx.cache.dense import DenseCache, init_cache
from pdx.completion import Completion, Row, TokenLogprobs
from pdx.errors import ContextLengthError, PdxError, RequestError
from pdx.layers.attention import explain, layout_for
from pdx.meshes import on_own_mesh
from pdx.programs import Programs
from pdx.prompts import Prompt, as_list, check_bias, encode, spread
from pdx.sampling import SampleOutput, SamplingState, sample
from pdx.sampling_options import SamplingOptions
from pdx.shapes import bucket, round_up
from pdx.sharding import constrain_rows, place_rows
from pdx.weights.load import DTYPES, Model

# Chunk lengths that programs are compiled for: each at most 1.5 times the one before, so that a prompt
# is padded by a fifth or less on average. None so short that its attention would be the op for decoding.
PREFILL_LADDER = (24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
SMALLEST_CAPACITY = 256
DEFAULT_CHUNK = PREFILL_LADDER[-1]
DEFAULT_ROWS = 8
# Tokens a dispatch of `decode_many`: enough to hide the host's work, few enough to stream and stop soon.
DECODE_TOKENS = 8


@dataclass(frozen=True)
class Piece:
    """Some text of one request as it comes; the last piece of a request carries its completion."""

    index: int
    text: str
    completion: Completion | None = None


class Generator:
    """Programs and a cache for `rows` requests at a time, with room for `capacity` tokens each.

    Once it has met its shapes (a rung of the prefill ladder each, and one decode program), a generation
    of any length compiles nothing. `compile_s` counts the seconds spent on compiling.

    Args:
      model: what `pdx.load` returns.
      rows: requests that run together.
      capacity: tokens of prompt and answer that a row can hold.
      kernels: auto, xla or pallas. Raises NotImplementedError for a path that does not exist.
      kv_dtype: of the cache, `f32`, `bf16`, `int8` or a jax type; None or `auto`: the parameters'.
      chunk: the most tokens of a prompt that one prefill call takes.
      decode_tokens: tokens a dispatch.
      num_logprobs: alternatives to report for each token.
    """

    def __init__(
        self, model: Model, *, rows: int = DEFAULT_ROWS, capacity: int, kernels: str = "auto", kv_dtype=None,
        chunk: int = DEFAULT_CHUNK, decode_tokens: int = DECODE_TOKENS, num_logprobs: int = 0,
    ):  # fmt: skip
        explain(kernels)  # raises before anything is made
        self.config, self.params, self.mesh = model.config, model.params, model.mesh
        self.kernels, self.num_logprobs, self.decode_tokens = kernels, num_logprobs, decode_tokens
        self.rows = rows if self.mesh is None else round_up(rows, self.mesh.shape["data"])
        self._programs = Programs()
        self._make_cache = partial(
            init_cache, self.config, self.rows, capacity, chunk=chunk, mesh=self.mesh,
            dtype=cache_dtype(kv_dtype, model), layout=layout_for(kernels),
        )  # fmt: skip
        self._cache: DenseCache | None = self._make_cache()
        self.capacity, self.chunk = self._cache.capacity, self._cache.chunk
        self._ladder = (*(t for t in PREFILL_LADDER if t < self.chunk), self.chunk)

    @property
    def compile_s(self) -> float:
        return self._programs.compile_s

    def run(self, requests: Sequence[Row]) -> Iterator[Row]:
        """Generate for up to `rows` requests together; yields a request whenever it has new tokens."""
        if len(requests) > self.rows:
            raise ValueError(f"{len(requests)} requests for {self.rows} rows")
        begin, compiled = time.perf_counter(), self.compile_s

        def now() -> float:
            return time.perf_counter() - begin - (self.compile_s - compiled)

        prompts = [r.prompt for r in requests]
        sampling = SamplingState.create(
            [r.options for r in requests], self.config.vocab_size, prompts=prompts, batch=self.rows
        )
        sampling = place_rows(sampling, self.mesh)
        logits, cache = self._prefill(prompts)
        first, sampling = self._programs.call(
            "first", _draw, logits=logits, sampling=sampling, positions=cache.lengths,
            active=self._mask(requests), static={"num_logprobs": self.num_logprobs, "mesh": self.mesh},
        )  # fmt: skip
        got = jax.tree.map(lambda x: x[:, None], jax.device_get(first))
        yield from _deliver(requests, got, 1, now())
        while running := [r for r in requests if not r.finish_reason]:
            n = min(self.decode_tokens, max(r.options.max_tokens - len(r.token_ids) for r in running))
            tokens = np.zeros(self.rows, np.int32)
            tokens[: len(requests)] = [r.token_ids[-1] for r in requests]
            out = self._programs.call(
                "decode", steps.PROGRAMS["decode_many"], params=self.params, tokens=tokens, cache=cache,
                sampling=sampling, active=self._mask(requests), steps=np.int32(n),
                static={"cfg": self.config, "n": self.decode_tokens, "num_logprobs": self.num_logprobs,
                        "kernels": self.kernels},
            )  # fmt: skip
            cache, sampling = out.cache, out.sampling
            self._cache = cache
            got = jax.device_get(SampleOutput(out.tokens, out.logprobs, out.top_ids, out.top_logprobs))
            yield from _deliver(requests, got, n, now())

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[jax.Array, DenseCache]:
        """Feed all prompts, the long ones in chunks; the logits behind each prompt's last token."""
        # Until the first program has returned a cache, a failure leaves none: the next run makes another.
        cache, self._cache = self._cache or self._make_cache(), None
        cache = cache.truncate(np.zeros(self.rows, np.int32))
        held, logits = 0, None
        longest = max(len(p) for p in prompts)
        while held < longest:
            width = bucket(min(longest - held, self.chunk), self._ladder)
            tokens, lengths = np.zeros((self.rows, width), np.int32), np.zeros(self.rows, np.int32)
            for row, prompt in enumerate(prompts):
                part = prompt[held : held + width]
                tokens[row, : len(part)], lengths[row] = part, len(part)
            new, cache = self._programs.call(
                ("prefill", width), steps.PROGRAMS["prefill"], params=self.params, tokens=tokens, lengths=lengths,
                cache=cache, static={"cfg": self.config, "kernels": self.kernels},
            )  # fmt: skip
            # A row whose prompt ended in an earlier chunk keeps the logits it had there.
            if logits is not None:
                new = self._programs.call("keep", _keep, old=logits, new=new, took_part=lengths > 0)
            logits = new
            held += width
        self._cache = cache
        return logits, cache

    def _mask(self, requests: Sequence[Row]) -> np.ndarray:
        mask = np.zeros(self.rows, bool)
        mask[: len(requests)] = [not r.finish_reason for r in requests]
        return mask


def _deliver(requests: Sequence[Row], got: SampleOutput, n: int, now: float) -> Iterator[Row]:
    """Hand the first n columns of `got` to the requests that are running; yields each of them."""
    for row, request in enumerate(requests):
        if request.finish_reason:
            continue
        best = request.options.logprobs or 0  # a neighbour may have asked for more
        logprobs = (
            TokenLogprobs(
                int(got.tokens[row, i]),
                float(got.logprob[row, i]),
                tuple(zip(got.top_ids[row, i, :best].tolist(), got.top_logprobs[row, i, :best].tolist(), strict=True)),
            )
            for i in range(n)
        )
        request.push(got.tokens[row, :n].tolist(), logprobs, now)
        yield request


def cache_dtype(name, model: Model):
    """The type of the cache for a choice of the user. Raises RequestError for an unknown one."""
    if name is None or name == "auto":
        return model.dtype
    known = DTYPES | {"int8": jnp.dtype(jnp.int8)}
    if isinstance(name, str) and name not in known:
        raise RequestError(f"kv_dtype {name!r} is not one of auto, {', '.join(known)}")
    return known[name] if isinstance(name, str) else jnp.dtype(name)


@partial(jax.jit, static_argnames=("num_logprobs", "mesh"), donate_argnames="sampling")
def _draw(logits, sampling, positions, active, num_logprobs, mesh):
    drawn = sample(logits, sampling, positions, num_logprobs=num_logprobs)
    return drawn, constrain_rows(sampling.observe(drawn.tokens, active), mesh)


@jax.jit
def _keep(old, new, took_part):
    return jnp.where(took_part[:, None], new, old)


# A model's generators by shape; they hold programs and a cache, and go when the model goes.
_GENERATORS: weakref.WeakKeyDictionary[Model, dict] = weakref.WeakKeyDictionary()


def generator(model: Model, *, rows: int, tokens: int, **settings) -> Generator:
    """The model's generator for `rows` requests of up to `tokens` tokens; made when it is first asked for."""
    capacity = SMALLEST_CAPACITY
    while capacity < tokens:
        capacity *= 2
    key = (rows, min(capacity, round_up(model.config.max_context, 128)), *sorted(settings.items()))
    known = _GENERATORS.setdefault(model, {})
    if key not in known:
        known[key] = Generator(model, rows=rows, capacity=key[1], **settings)
    return known[key]


def requests_of(model: Model, prompts: Sequence[Prompt], options: Sequence[SamplingOptions]) -> list[Row]:
    """Tokenize and check requests. Raises RequestError or ContextLengthError, naming the request."""
    rows = []
    for i, (prompt, option) in enumerate(zip(prompts, options, strict=True)):
        try:
            ids = checked_ids(model, prompt, option)
        except PdxError as error:
            raise type(error)(f"prompt {i}: {error}") from error
        rows.append(Row(i, ids, option, model.tokenizer.stream(), ends_of(model, option)))
    return rows


def checked_ids(model: Model, prompt: Prompt, options: SamplingOptions) -> list[int]:
    """The token ids of a prompt that can be served with these options.

    Raises RequestError or ContextLengthError.
    """
    context, ids = model.config.max_context, encode(model, prompt)
    check_bias(model, options)
    if not ids:
        raise RequestError("the prompt is empty: give it at least one token")
    if len(ids) >= context:
        raise ContextLengthError(f"{len(ids)} tokens, but the context of {model.name} is {context}: shorten it")
    if len(ids) + options.max_tokens > context:
        raise ContextLengthError(
            f"{len(ids)} tokens and {options.max_tokens} more asked for, but the context of {model.name} is "
            f"{context}: ask for at most {context - len(ids)} (max_tokens)"
        )
    return ids


def ends_of(model: Model, options: SamplingOptions) -> frozenset[int]:
    """The tokens that end a request."""
    return frozenset(options.stop_token_ids) | (frozenset() if options.ignore_eos else model.tokenizer.eos_ids)


@on_own_mesh
def stream(
    model: Model, prompts: Prompt | Sequence[Prompt],
    options: SamplingOptions | Sequence[SamplingOptions] | None = None,
    *, batch_size: int = DEFAULT_ROWS, kernels: str = "auto", kv_dtype=None, capacity: int | None = None, **settings,
) -> Iterator[Piece]:  # fmt: skip
    """Generate for one prompt or several; yields pieces of text as they come. Arguments as `generate`."""
    prompts = as_list(prompts)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise RequestError(f"batch_size is {batch_size!r}: it must be a whole number of at least 1")
    if options is None or isinstance(options, SamplingOptions):
        options = dataclasses.replace(options or SamplingOptions(), **settings)
    elif settings:
        raise RequestError(f"give {', '.join(settings)} in each request's options, or one set for all")
    rows = requests_of(model, prompts, spread(options, len(prompts)))
    if not rows:
        return
    longest = max(len(r.prompt) + r.options.max_tokens for r in rows)
    if capacity is not None and capacity < longest:
        raise ContextLengthError(f"a request needs {longest} tokens of capacity, {capacity} were asked for")
    run = generator(
        model, rows=min(batch_size, len(rows)), tokens=capacity or longest, kernels=kernels, kv_dtype=kv_dtype,
        num_logprobs=max(r.options.logprobs or 0 for r in rows),
    )  # fmt: skip
    for at in range(0, len(rows), run.rows):
        compiled = run.compile_s
        for row in run.run(rows[at : at + run.rows]):
            done = row.completion(run.compile_s - compiled) if row.finish_reason else None
            yield Piece(row.index, row.fresh_text(), done)


def generate(
    model: Model, prompts: Prompt | Sequence[Prompt],
    options: SamplingOptions | Sequence[SamplingOptions] | None = None,
    **settings,
) -> list[Completion]:  # fmt: skip
    """Complete one prompt or several.

    Args:
      model: what `pdx.load` returns.
      prompts: a text, chat messages, token ids (a list or a one-dimensional array), or a list of any of these.
      options: sampling settings, one for all or one a prompt; None: greedy, 128 tokens.
      settings: single fields of `SamplingOptions` (max_tokens=, temperature=, ...), and batch_size=,
        kernels=, kv_dtype=, capacity= (tokens a row can hold; None: what the requests need, rounded up).

    Returns:
      One completion a prompt, in the order of the prompts.

    Raises:
      RequestError: an empty prompt, what is no prompt, or a setting out of range.
      ContextLengthError: a prompt that, with what it is to generate, the context cannot hold.
      NotImplementedError: a kernel path that does not exist here.
    """
    done = [piece.completion for piece in stream(model, prompts, options, **settings) if piece.completion]
    return sorted(done, key=lambda c: c.index)
