"""A generator that speculates: the proposer, its draft model, and what a round costs on this device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import jax
import numpy as np

from pdx.cache.dense import DenseCache
from pdx.errors import RequestError
from pdx.generation.completion import Row
from pdx.generation.generator import Decoding, Generator
from pdx.generation.programs import Clock
from pdx.metrics import SpeculationCounts
from pdx.sampling.sampler import SamplingState
from pdx.sharding import place_rows
from pdx.speculative.draft_file import check_head
from pdx.speculative.eagle import PREFILL, Eagle, EagleState
from pdx.speculative.lengths import LEVELS, NEVER, always
from pdx.speculative.options import Speculation
from pdx.speculative.proposers import DraftModel, NGram, Proposer, SelfDraft, Synthetic
from pdx.speculative.rounds import Drafter, Speculated, SpeculationState, speculate_many
from pdx.speculative.shares import ALLOWED
from pdx.speculative.trees import Tree, depth_of
from pdx.weights.load import Model

# To find what a round costs: tokens that a row may emit, and how often; medians count.
MEASURED = 2, 6
# Tokens of the made-up rows that are measured: enough for an n-gram to find a match.
MEASURED_HISTORY = 4


class SpeculativeGenerator(Generator):
    """A `Generator` whose steps verify drafts.

    Args:
      speculation: the draft model in it is loaded.

    Raises:
      RequestError: a draft model of another vocabulary, or more layers than the model has.
      NotImplementedError: a token tree that is deeper than the window of a layer; what `pdx distill` made, on a mesh.
    """

    def __init__(self, model: Model, *, speculation: Speculation, kv_dtype=None, **settings):
        super().__init__(model, kv_dtype=kv_dtype, **settings)
        self._dtype = model.dtype
        self.draft: Generator | None = None  # runs the draft model, or holds the head's cache
        self.proposer, draft = choose_proposer(model, speculation)
        if draft is not None and model.mesh is not None and "vocabulary" in draft.params:
            raise NotImplementedError(
                f"{draft.path}, which `pdx distill` made, drafts on a mesh in an engine only so far: load "
                f"{model.name} without a mesh, or use pdx.Engine"
            )
        if draft is not None:
            self.draft = Generator(
                draft, rows=self.rows, capacity=self.capacity, kernels=self.kernels, kv_dtype=kv_dtype, chunk=self.chunk
            )
        self.levels: tuple[int | Tree, ...] = LEVELS
        self.costs: np.ndarray | None = None  # not measured yet
        length = speculation.draft_length
        if not isinstance(length, str):
            self.levels, self.costs = always(length)
        if isinstance(length, Tree):
            _check_windows(length, model, draft)

    def empty_state(self) -> Any:
        """The proposer's state behind nothing; None where it has none."""
        if self.draft is None:
            return None
        cache = self.draft.new_cache()
        if isinstance(self.proposer, Eagle):
            return EagleState.create(cache, self.config.d_model, self._dtype)
        return cache

    @property
    def compile_s(self) -> float:
        return super().compile_s + (self.draft.compile_s if self.draft else 0.0)

    def begin(self, requests: Sequence[Row], cache: DenseCache, clock: Clock) -> tuple[Decoding, DenseCache]:
        if self.costs is None:
            self.costs, cache = self.measured_costs(cache, clock)
        return _Speculating(self, self.empty_state()), cache

    def speculate(
        self,
        cache: DenseCache,
        sampling: SamplingState,
        state: SpeculationState,
        left: np.ndarray,
        costs: np.ndarray,
        clock: Clock,
        allowance: float = ALLOWED,
    ) -> Speculated:
        """Dispatch rounds; each row may emit `left` tokens."""
        return self.programs.call(
            "speculate",
            speculate_many,
            params=self.params,
            cache=cache,
            sampling=sampling,
            state=state,
            limits=left,
            drafter=Drafter(self.proposer, self.levels, None if self.draft is None else self.draft.params),
            costs=costs,
            allowance=np.float32(allowance),
            clock=clock,
            static={
                "cfg": self.config,
                "n": self.decode_tokens,
                "num_logprobs": self.num_logprobs,
                "kernels": self.kernels,
            },
        )

    def state(self, texts: Sequence[Sequence[int]], own: Any) -> SpeculationState:
        """The state behind these tokens; `own`: the proposer's."""
        made = SpeculationState.create(texts, self.rows, self.capacity, self.proposer)
        history, acceptance = place_rows((made.history, made.acceptance), self.mesh)
        return SpeculationState(history, acceptance, own)

    def measured_costs(self, cache: DenseCache, clock: Clock) -> tuple[np.ndarray, DenseCache]:
        """Seconds of a round at each level, on this device and at this shape, with made-up rows; and the cache.

        It takes a few steps; they count as compilation.
        """
        begin, before = time.perf_counter(), clock.compile_s
        tokens, times = MEASURED
        if not isinstance(self.proposer, NGram | Synthetic):  # a model that drafts takes longer for a longer draft
            tokens, times = self.decode_tokens + depth_of(self.levels[-1]) + 1, 2
        left = np.full(self.rows, min(tokens, self.capacity - MEASURED_HISTORY), np.int32)
        texts, own = [[0] * MEASURED_HISTORY] * self.rows, self.empty_state()
        plain_s: list[float] = []
        ratios: list[list[float]] = [[] for _ in self.levels]
        for turn in range(1 + times):  # level by level, so that a disturbance affects all alike; the first warms up
            for level in range(len(self.levels)):
                only = np.where(np.arange(len(self.levels)) == level, 1.0, NEVER).astype(np.float32)
                state = self.state(texts, None if own is None else own.holding(MEASURED_HISTORY - 1))
                sampling = place_rows(SamplingState.create([], self.config.vocab_size, batch=self.rows), self.mesh)
                cache = cache.holding(MEASURED_HISTORY - 1)
                jax.block_until_ready((state, sampling, cache))
                start = time.perf_counter()
                out = jax.block_until_ready(self.speculate(cache, sampling, state, left, only, clock))
                seconds, rounds = time.perf_counter() - start, np.asarray(out.rounds).max(axis=0)
                cache, own = out.cache, out.state.proposer
                if not level:
                    plain = seconds / rounds[0]
                if turn and level:  # where nothing can be drafted, a round is a plain step
                    ratios[level].append((seconds - rounds[0] * plain) / rounds[level] / plain)
                elif turn:
                    plain_s.append(plain)
                    ratios[0].append(1.0)
        clock.compile_s = before + time.perf_counter() - begin
        return (np.median(plain_s) * np.median(ratios, axis=1)).astype(np.float32), cache


class _Speculating(Decoding):
    """The decoding of one run. `own`: the proposer's state behind the prompts."""

    def __init__(self, generator: SpeculativeGenerator, own: Any):
        self._speculative, self._own = generator, own
        self._state: SpeculationState | None = None
        self._allowance = ALLOWED

    def prefill(
        self, prompts: Sequence[Sequence[int]], cache: DenseCache, clock: Clock
    ) -> tuple[jax.Array, DenseCache]:
        """Prefill the prompts; what the proposer needs of them is part of TTFT."""
        run = self._speculative
        if isinstance(run.proposer, Eagle):
            return run.prefill(prompts, cache, clock, partial(self._prefill_chunk, prompts))
        if run.draft is not None:
            _, self._own = run.draft.prefill(prompts, self._own, clock)
        return run.prefill(prompts, cache, clock)

    def _prefill_chunk(
        self, prompts: Sequence[Sequence[int]], tokens, lengths, held: int, cache: DenseCache, clock: Clock
    ):
        """A chunk through the target and its head, which needs the token behind each."""
        run, following, taken = self._speculative, np.zeros_like(tokens), np.array(lengths)
        for row, prompt in enumerate(prompts):
            behind = prompt[held + 1 : held + 1 + tokens.shape[1]]
            following[row, : len(behind)], taken[row] = behind, min(int(lengths[row]), len(behind))
        logits, cache, self._own = run.programs.call(
            ("prefill with head", tokens.shape[1]),
            PREFILL,
            params=run.params,
            head=cast(Generator, run.draft).params,
            tokens=tokens,
            following=following,
            lengths=lengths,
            taken=taken,
            cache=cache,
            state=self._own,
            clock=clock,
            static={"cfg": run.config, "kernels": run.kernels},
        )
        return logits, cache

    def dispatch(self, requests: Sequence[Row], cache: DenseCache, sampling: SamplingState, clock: Clock):
        run = self._speculative
        if self._state is None:  # now the first token is known
            self._state = run.state([r.prompt + r.token_ids for r in requests], self._own)
            self._own = None
        left, costs = run.left(requests), cast(np.ndarray, run.costs)
        out = run.speculate(cache, sampling, self._state, left, costs, clock, self._allowance)
        self._state = out.state
        got, counts, rounds, self._allowance, *tokens = jax.device_get(
            (out.emitted, out.counts, out.rounds, out.allowance, out.drafted, out.kept)
        )
        for row, request in enumerate(requests):
            by_length = dict(zip(map(depth_of, run.levels), rounds[row].tolist(), strict=True))
            seen = SpeculationCounts(by_length, *(int(x[row]) for x in tokens))
            request.speculation = (request.speculation or SpeculationCounts()) + seen
        return got, counts, out.cache, out.sampling


def choose_proposer(model: Model, speculation: Speculation, **settings: Any) -> tuple[Proposer, Model | None]:
    """The proposer that was asked for, and its draft model or head if it has one, which must be loaded.

    `settings`: of `DraftModel`.

    Raises:
      RequestError: a draft model of another vocabulary, or more layers than the model has.
    """
    if speculation.layers is not None:
        if speculation.layers >= model.config.num_layers:
            raise RequestError(
                f"speculate 'self:{speculation.layers}': the draft must be a part of the {model.config.num_layers} "
                f"layers of {model.name}"
            )
        return SelfDraft(speculation.layers), None
    if speculation.acceptance is not None:
        return Synthetic(speculation.acceptance), None
    if speculation.proposer == "ngram":
        return NGram(), None
    draft = cast(Model, speculation.model)
    _check_tokens(draft, model)
    if speculation.proposer == "eagle":
        check_head(draft, model)
        return Eagle(draft.config), draft
    return DraftModel(draft.config, **settings), draft


def _check_windows(tree: Tree, *models: Model | None) -> None:
    """Raise NotImplementedError where a layer's window is shorter than the tree is deep."""
    for model in models:
        shortest = min((w for w in model.config.windows if w is not None), default=None) if model else None
        if model and shortest is not None and shortest <= tree.depth:
            raise NotImplementedError(
                f"draft_length {tree}: a token tree must not be deeper than a window, and {model.name} has a window of "
                f"{shortest} tokens"
            )


def _check_tokens(draft: Model, target: Model) -> None:
    """Raise RequestError unless the draft model has the target's tokens."""
    if draft.config.vocab_size != target.config.vocab_size or not _same_tokens(draft, target):
        raise RequestError(
            f"{draft.name} cannot draft for {target.name}: a draft model must have the same tokens "
            f"(it has {draft.config.vocab_size} of them, the model {target.config.vocab_size})"
        )


def _same_tokens(draft: Model, target: Model) -> bool:
    """Whether both read a text as the same tokens; a model without a tokenizer has those of its vocabulary."""
    if draft.make_tokenizer is None or target.make_tokenizer is None:
        return True
    text = "Prefill reads 1024 tokens; d\u00e9coder \u7ffb\u8bd1 {x: [1, 2]}\n\tend"
    return draft.tokenizer.encode(text) == target.tokenizer.encode(text)
