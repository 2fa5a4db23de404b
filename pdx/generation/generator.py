"""`Generator` runs a batch of requests with compiled programs of one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from pdx import steps
from pdx.cache import layer
from pdx.cache.dense import DenseCache, cache_specs, init_cache
from pdx.cache.idle import Held, IdleCaches
from pdx.cache.layer import CACHE_DTYPES
from pdx.errors import RequestError
from pdx.generation.completion import Row, TokenLogprobs, not_finite
from pdx.generation.programs import Clock, Programs
from pdx.layers.kernels import Kernels, as_kernels, explain, layout_for
from pdx.sampling.sampler import NO_TOKEN, SampleOutput, SamplingState, sample
from pdx.shapes import bucket, round_up
from pdx.sharding import constrain_rows, is_spec, place_rows
from pdx.weights.load import Model

# Chunk lengths that programs are compiled for. Each is at most 1.5 times the one before, so that padding adds a fifth
# or less on average. The shortest is longer than what the decode attention op takes.
PREFILL_LADDER = (24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
SMALLEST_CAPACITY = 256
# Tokens of a prompt that one call takes: more than `DEFAULT_CHUNK`, which a cache has unless told. On a v6e, 512 tokens
# are fewer than the critical batch: by the cost model, 1024 tokens of Llama 3 8B take 1.38 times as long in two chunks.
# For a cache, 1024 would cost memory: 1.23 times the slots of Gemma 3 4B at a context of 4096, in rings.
PREFILL_CHUNK = PREFILL_LADDER[-1]
DEFAULT_ROWS = 8
# Tokens per call of `decode_many`: enough to hide the host's work, few enough to stream and stop soon.
DECODE_TOKENS = 8


class Generator:
    """Compiled programs and a cache for `rows` requests at a time, of up to `capacity` tokens each.

    It compiles one prefill program per rung of `PREFILL_LADDER`, when a prompt first needs it, and one decode program.
    After that, nothing compiles. `compile_s`: seconds spent on compiling.

    Args:
      model: what `pdx.load` returns.
      rows: requests that run together.
      capacity: tokens of prompt and answer that a row can hold.
      kernels: see `pdx.generate`. Raises NotImplementedError for a kernel path that does not exist here.
      kv_dtype: type of the cache: `f32`, `bf16`, `int8` or a jax type; None or `auto`: the type of the parameters.
      chunk: the most tokens of a prompt in one prefill call.
      decode_tokens: the most tokens per decode call.
      num_logprobs: alternatives to report for each token.
      caches: idle caches shared with other generators; None: its own.
    """

    def __init__(
        self,
        model: Model,
        *,
        rows: int = DEFAULT_ROWS,
        capacity: int,
        kernels: Kernels = "auto",
        kv_dtype=None,
        chunk: int = PREFILL_CHUNK,
        decode_tokens: int = DECODE_TOKENS,
        num_logprobs: int = 0,
        caches: IdleCaches | None = None,
    ):
        self.kernels = as_kernels(kernels)
        explain(self.kernels)  # raises before anything is made
        self.config, self.params, self.mesh = model.config, model.params, model.mesh
        self.num_logprobs, self.decode_tokens = num_logprobs, decode_tokens
        self.rows = rows if self.mesh is None else round_up(rows, self.mesh.shape["data"])
        self.programs = Programs()
        kind = {"chunk": chunk, "dtype": cache_dtype(kv_dtype, model), "layout": layout_for(self.kernels)}
        self.new_cache = partial(init_cache, self.config, self.rows, capacity, mesh=self.mesh, **kind)
        declared = cache_specs(self.config, self.rows, capacity, mesh=self.mesh, **kind)
        self.capacity, self.chunk = declared.capacity, declared.chunk
        self._caches = IdleCaches() if caches is None else caches
        self._cache_key = (self.rows, self.capacity, *kind.values())
        self._cache_bytes = sum(spec.size_bytes for spec in jax.tree.leaves(declared, is_leaf=is_spec))
        self._ladder = (*(t for t in PREFILL_LADDER if t < self.chunk), self.chunk)

    @property
    def compile_s(self) -> float:
        return self.programs.compile_s

    def begin(self, requests: Sequence[Row], cache: DenseCache, clock: Clock) -> tuple[Decoding, DenseCache]:
        """What decodes a run, and the run's cache. Called before the prompts are prefilled."""
        return Decoding(self), cache

    def run(self, requests: Sequence[Row]) -> Iterator[Row]:
        """Generate for up to `rows` requests together; yields a request whenever it has new tokens.

        A run holds its own cache until the iterator is exhausted, closed or garbage-collected.

        Raises:
          NotFiniteError: logits are NaN or infinite. All tokens before them have been yielded.
        """
        if len(requests) > self.rows:
            raise ValueError(f"{len(requests)} requests for {self.rows} rows")
        with self._caches.lend(self._cache_key, self._cache_bytes, self.new_cache) as held:
            yield from self._run(requests, held, Clock())

    def _run(self, requests: Sequence[Row], held: Held, clock: Clock) -> Iterator[Row]:
        # `held.cache` is set only between steps: a step donates the cache, so after a failed one it is gone.
        cache, held.cache = cast(DenseCache, held.cache), None
        prompts = [r.prompt for r in requests]
        sampling = SamplingState.create(
            [r.options for r in requests], self.config.vocab_size, prompts=prompts, batch=self.rows
        )
        sampling = place_rows(sampling, self.mesh)
        decoding, cache = self.begin(requests, cache, clock)
        logits, cache = decoding.prefill(prompts, cache, clock)
        first, sampling = self.programs.call(
            "first",
            _sample_first,
            logits=logits,
            sampling=sampling,
            positions=cache.lengths,
            active=self._active(requests),
            clock=clock,
            static={"num_logprobs": self.num_logprobs, "mesh": self.mesh},
        )
        sampled, counts = jax.tree.map(lambda x: x[:, None], jax.device_get(first)), np.ones(self.rows, int)
        while True:
            held.cache = cache
            yield from _deliver(requests, sampled, counts, clock)
            held.cache = None
            if all(r.finish_reason for r in requests):
                break
            sampled, counts, cache, sampling = decoding.dispatch(requests, cache, sampling, clock)
        held.cache = cache

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        cache: DenseCache,
        clock: Clock,
        chunk: Callable[..., tuple[jax.Array, DenseCache]] | None = None,
    ) -> tuple[jax.Array, DenseCache]:
        """Prefill all prompts, long ones in chunks. Returns the logits [rows, V] of each prompt's last token, and the
        cache. `chunk`: what runs a chunk in place of `prefill_chunk`."""
        cache = cache.truncate(np.zeros(self.rows, np.int32))
        held = 0
        logits: Any = None  # of the first chunk
        longest = max(len(p) for p in prompts)
        while held < longest:
            width = bucket(min(longest - held, self.chunk), self._ladder)
            tokens, lengths = np.zeros((self.rows, width), np.int32), np.zeros(self.rows, np.int32)
            for row, prompt in enumerate(prompts):
                part = prompt[held : held + width]
                tokens[row, : len(part)], lengths[row] = part, len(part)
            new, cache = (chunk or self.prefill_chunk)(tokens, lengths, held, cache, clock)
            # A row whose prompt ended in an earlier chunk keeps the logits of that chunk.
            if logits is not None:
                new = self.programs.call("merge", _merge_logits, old=logits, new=new, appended=lengths > 0, clock=clock)
            logits = new
            held += width
        return logits, cache

    def prefill_chunk(self, tokens: np.ndarray, lengths: np.ndarray, held: int, cache: DenseCache, clock: Clock):
        """Prefill tokens [rows, T], the first `lengths` of each row, behind `held` tokens of its prompt."""
        return self.programs.call(
            ("prefill", tokens.shape[1]),
            steps.PROGRAMS["prefill"],
            params=self.params,
            tokens=tokens,
            lengths=lengths,
            cache=cache,
            clock=clock,
            static={"cfg": self.config, "kernels": self.kernels},
        )

    def _active(self, requests: Sequence[Row]) -> np.ndarray:
        """[rows] of bool: the rows whose request is not finished."""
        return self.left(requests) > 0

    def left(self, requests: Sequence[Row]) -> np.ndarray:
        """How many tokens each row may still generate, [rows]; 0 where none is running."""
        left = np.zeros(self.rows, np.int32)
        left[: len(requests)] = [0 if r.finish_reason else r.options.max_tokens - len(r.token_ids) for r in requests]
        return left


class Decoding:
    """Decodes one run, one token per step."""

    def __init__(self, generator: Generator):
        self._generator = generator

    def prefill(
        self, prompts: Sequence[Sequence[int]], cache: DenseCache, clock: Clock
    ) -> tuple[jax.Array, DenseCache]:
        """As `Generator.prefill`."""
        return self._generator.prefill(prompts, cache, clock)

    def dispatch(self, requests: Sequence[Row], cache: DenseCache, sampling: SamplingState, clock: Clock):
        """Decode up to `decode_tokens` more tokens per row.

        Returns them on the host, how many of them each row has, the cache and the sampling state.
        """
        run = self._generator
        left, tokens = run.left(requests), np.zeros(run.rows, np.int32)
        tokens[: len(requests)] = [r.token_ids[-1] for r in requests]
        n = min(run.decode_tokens, int(left.max()))
        out = run.programs.call(
            "decode",
            steps.PROGRAMS["decode_many"],
            params=run.params,
            tokens=tokens,
            cache=cache,
            sampling=sampling,
            active=left > 0,
            steps=np.int32(n),
            clock=clock,
            static={
                "cfg": run.config,
                "n": run.decode_tokens,
                "num_logprobs": run.num_logprobs,
                "kernels": run.kernels,
            },
        )
        got = jax.device_get(SampleOutput(out.tokens, out.logprobs, out.top_ids, out.top_logprobs))
        return got, np.full(run.rows, n), out.cache, out.sampling


def _deliver(requests: Sequence[Row], sampled: SampleOutput, counts: np.ndarray, clock: Clock) -> Iterator[Row]:
    """Append the first `counts` columns of `sampled` to the running requests; yields each one that has new tokens.

    Raises NotFiniteError for the first request without a token for its next position, after all others were yielded.
    """
    now, broken = clock.now(), None
    for row, request in enumerate(requests):
        if request.finish_reason:
            continue
        best, n = request.options.logprobs or 0, counts[row]  # a neighbour may have asked for more alternatives
        tokens = sampled.tokens[row, :n].tolist()
        tokens = tokens[: tokens.index(NO_TOKEN)] if NO_TOKEN in tokens else tokens
        logprobs = (
            TokenLogprobs(
                int(sampled.tokens[row, i]),
                float(sampled.logprob[row, i]),
                tuple(
                    zip(
                        sampled.top_ids[row, i, :best].tolist(),
                        sampled.top_logprobs[row, i, :best].tolist(),
                        strict=True,
                    )
                ),
            )
            for i in range(len(tokens))
        )
        request.push(tokens, logprobs, now)
        request.compile_s = clock.compile_s
        if len(tokens) < n and not request.finish_reason:
            broken = broken or not_finite(len(request.prompt) + len(request.token_ids) - 1, request.index)
        if tokens:
            yield request
    if broken:
        raise broken


def cache_dtype(name, model: Model):
    """The cache's type for a user's `kv_dtype`; None and `auto` mean the model's. Raises RequestError otherwise."""
    if name is None or (isinstance(name, str) and name == "auto"):
        return model.dtype
    try:
        return layer.cache_dtype(name)
    except RequestError:
        raise RequestError(f"kv_dtype {name!r} is not one of auto, {', '.join(CACHE_DTYPES)}") from None


@partial(jax.jit, static_argnames=("num_logprobs", "mesh"), donate_argnames="sampling")
def _sample_first(logits, sampling, positions, active, num_logprobs, mesh):
    """The first token of each row, and the sampling state after it."""
    drawn = sample(logits, sampling, positions, num_logprobs=num_logprobs, mark_broken=True)
    return drawn, constrain_rows(sampling.observe(drawn.tokens, active), mesh)


@jax.jit
def _merge_logits(old, new, appended):
    return jnp.where(appended[:, None], new, old)
