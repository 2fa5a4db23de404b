"""What runs requests in batches: the compiled programs of a shape; and what a model keeps of programs and caches."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

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
from pdx.layers.kernels import explain, layout_for, settled
from pdx.sampling.sampler import NO_TOKEN, SampleOutput, SamplingState, sample
from pdx.shapes import bucket, round_up
from pdx.sharding import constrain_rows, is_spec, place_rows
from pdx.weights.load import Model

# Chunk lengths that programs are compiled for: each at most 1.5 times the one before, so that a prompt
# is padded by a fifth or less on average. None so short that its attention would be the op for decoding.
PREFILL_LADDER = (24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
SMALLEST_CAPACITY = 256
# Tokens of a prompt that one call takes: more than `DEFAULT_CHUNK`, which a cache has unless told. On a v6e, 512 tokens
# are fewer than the critical batch: by the cost model, 1024 tokens of Llama 3 8B take 1.38 times as long in two chunks.
# For a cache, 1024 would cost memory: 1.23 times the slots of Gemma 3 4B at a context of 4096, in rings.
PREFILL_CHUNK = PREFILL_LADDER[-1]
DEFAULT_ROWS = 8
# Tokens a dispatch of `decode_many`: enough to hide the host's work, few enough to stream and stop soon.
DECODE_TOKENS = 8
# Shapes whose programs a model keeps.
MOST_GENERATORS = 16


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
        self,
        model: Model,
        *,
        rows: int = DEFAULT_ROWS,
        capacity: int,
        kernels: str = "auto",
        kv_dtype=None,
        chunk: int = PREFILL_CHUNK,
        decode_tokens: int = DECODE_TOKENS,
        num_logprobs: int = 0,
        caches: IdleCaches | None = None,
    ):
        kernels = settled(kernels)
        explain(kernels)  # raises before anything is made
        self.config, self.params, self.mesh = model.config, model.params, model.mesh
        self.kernels, self.num_logprobs, self.decode_tokens = kernels, num_logprobs, decode_tokens
        self.rows = rows if self.mesh is None else round_up(rows, self.mesh.shape["data"])
        self._programs = Programs()
        kind = {"chunk": chunk, "dtype": cache_dtype(kv_dtype, model), "layout": layout_for(kernels)}
        self._make_cache = partial(init_cache, self.config, self.rows, capacity, mesh=self.mesh, **kind)
        declared = cache_specs(self.config, self.rows, capacity, mesh=self.mesh, **kind)
        self.capacity, self.chunk = declared.capacity, declared.chunk
        self._caches = IdleCaches() if caches is None else caches
        self._cache_key = (self.rows, self.capacity, *kind.values())
        self._cache_bytes = sum(spec.size_bytes for spec in jax.tree.leaves(declared, is_leaf=is_spec))
        self._ladder = (*(t for t in PREFILL_LADDER if t < self.chunk), self.chunk)

    @property
    def compile_s(self) -> float:
        return self._programs.compile_s

    def run(self, requests: Sequence[Row]) -> Iterator[Row]:
        """Generate for up to `rows` requests together; yields a request whenever it has new tokens.

        The run has a cache of its own until it ends: until it is exhausted, closed or collected.

        Raises:
          NotFiniteError: logits that are NaN or infinite; what came before them has been yielded.
        """
        if len(requests) > self.rows:
            raise ValueError(f"{len(requests)} requests for {self.rows} rows")
        with self._caches.lend(self._cache_key, self._cache_bytes, self._make_cache) as held:
            yield from self._run(requests, held, Clock())

    def _run(self, requests: Sequence[Row], held: Held, clock: Clock) -> Iterator[Row]:
        # Only between two steps is the cache fit for another run: a step that fails takes it along.
        cache, held.cache = held.cache, None
        prompts = [r.prompt for r in requests]
        sampling = SamplingState.create(
            [r.options for r in requests], self.config.vocab_size, prompts=prompts, batch=self.rows
        )
        sampling = place_rows(sampling, self.mesh)
        logits, cache = self._prefill(prompts, cache, clock)
        first, sampling = self._programs.call(
            "first",
            _draw,
            logits=logits,
            sampling=sampling,
            positions=cache.lengths,
            active=self._mask(requests),
            clock=clock,
            static={"num_logprobs": self.num_logprobs, "mesh": self.mesh},
        )
        got, n = jax.tree.map(lambda x: x[:, None], jax.device_get(first)), 1
        while True:
            held.cache = cache
            yield from _deliver(requests, got, n, clock)
            held.cache = None
            running = [r for r in requests if not r.finish_reason]
            if not running:
                break
            n = min(self.decode_tokens, max(r.options.max_tokens - len(r.token_ids) for r in running))
            tokens = np.zeros(self.rows, np.int32)
            tokens[: len(requests)] = [r.token_ids[-1] for r in requests]
            out = self._programs.call(
                "decode",
                steps.PROGRAMS["decode_many"],
                params=self.params,
                tokens=tokens,
                cache=cache,
                sampling=sampling,
                active=self._mask(requests),
                steps=np.int32(n),
                clock=clock,
                static={
                    "cfg": self.config,
                    "n": self.decode_tokens,
                    "num_logprobs": self.num_logprobs,
                    "kernels": self.kernels,
                },
            )
            cache, sampling = out.cache, out.sampling
            got = jax.device_get(SampleOutput(out.tokens, out.logprobs, out.top_ids, out.top_logprobs))
        held.cache = cache

    def _prefill(
        self, prompts: Sequence[Sequence[int]], cache: DenseCache, clock: Clock
    ) -> tuple[jax.Array, DenseCache]:
        """Feed all prompts, the long ones in chunks; the logits behind each prompt's last token."""
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
                ("prefill", width),
                steps.PROGRAMS["prefill"],
                params=self.params,
                tokens=tokens,
                lengths=lengths,
                cache=cache,
                clock=clock,
                static={"cfg": self.config, "kernels": self.kernels},
            )
            # A row whose prompt ended in an earlier chunk keeps the logits it had there.
            if logits is not None:
                new = self._programs.call("keep", _keep, old=logits, new=new, took_part=lengths > 0, clock=clock)
            logits = new
            held += width
        return logits, cache

    def _mask(self, requests: Sequence[Row]) -> np.ndarray:
        mask = np.zeros(self.rows, bool)
        mask[: len(requests)] = [not r.finish_reason for r in requests]
        return mask


def _deliver(requests: Sequence[Row], got: SampleOutput, n: int, clock: Clock) -> Iterator[Row]:
    """Hand the first n columns of `got` to the requests that are running; yields each of them that has new tokens.

    Raises NotFiniteError, when all have theirs, for the first that has no token where it needs one.
    """
    now, broken = clock.now(), None
    for row, request in enumerate(requests):
        if request.finish_reason:
            continue
        best = request.options.logprobs or 0  # a neighbour may have asked for more
        tokens = got.tokens[row, :n].tolist()
        tokens = tokens[: tokens.index(NO_TOKEN)] if NO_TOKEN in tokens else tokens
        logprobs = (
            TokenLogprobs(
                int(got.tokens[row, i]),
                float(got.logprob[row, i]),
                tuple(zip(got.top_ids[row, i, :best].tolist(), got.top_logprobs[row, i, :best].tolist(), strict=True)),
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
    """The type of the cache for a choice of the user. Raises RequestError for an unknown one."""
    if name is None or (isinstance(name, str) and name == "auto"):
        return model.dtype
    try:
        return layer.cache_dtype(name)
    except RequestError:
        raise RequestError(f"kv_dtype {name!r} is not one of auto, {', '.join(CACHE_DTYPES)}") from None


@partial(jax.jit, static_argnames=("num_logprobs", "mesh"), donate_argnames="sampling")
def _draw(logits, sampling, positions, active, num_logprobs, mesh):
    drawn = sample(logits, sampling, positions, num_logprobs=num_logprobs, mark_broken=True)
    return drawn, constrain_rows(sampling.observe(drawn.tokens, active), mesh)


@jax.jit
def _keep(old, new, took_part):
    return jnp.where(took_part[:, None], new, old)


@dataclass
class _Kept:
    """What a model keeps between calls: idle caches, and generators (programs) by shape, those used last at the end."""

    caches: IdleCaches = field(default_factory=IdleCaches)
    generators: OrderedDict[tuple, Generator] = field(default_factory=OrderedDict)


# It goes when the model goes.
_KEPT: weakref.WeakKeyDictionary[Model, _Kept] = weakref.WeakKeyDictionary()
_KEPT_LOCK = threading.Lock()


def generator(model: Model, *, rows: int, tokens: int, kv_dtype=None, **settings) -> Generator:
    """The model's generator for `rows` requests of up to `tokens` tokens; made when it is first asked for.

    The programs of the last `MOST_GENERATORS` shapes are kept.
    """
    capacity = SMALLEST_CAPACITY
    while capacity < tokens:
        capacity *= 2
    capacity = min(capacity, round_up(model.config.max_context, 128))
    kv_dtype = cache_dtype(kv_dtype, model)
    key = (rows, capacity, str(kv_dtype), *sorted(settings.items()))
    with _KEPT_LOCK:
        kept = _KEPT.setdefault(model, _Kept())
        if key not in kept.generators:
            kept.generators[key] = Generator(
                model, rows=rows, capacity=capacity, kv_dtype=kv_dtype, caches=kept.caches, **settings
            )
        kept.generators.move_to_end(key)
        while len(kept.generators) > MOST_GENERATORS:
            kept.generators.popitem(last=False)
        return kept.generators[key]
