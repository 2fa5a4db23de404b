"""Rows that are fed through a cache in any way, each answer held against the row's whole text at once."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np

from pdx import steps
from pdx.cache.dense import init_cache
from pdx.config import ModelConfig
from tests.support.models import close, params, whole

CAPACITY = 384
CHUNK = 24  # more than decode_attention takes: prefill goes through flash_attention
DRAFT = 5


class History:
    """A cache and, for each row, the tokens that should be in it."""

    def __init__(self, cfg: ModelConfig, rows: int = 4, seed: int = 0, layout=None, kernels="auto"):
        self.cfg, self.rng = cfg, np.random.default_rng(seed)
        self.cache, self.kernels = init_cache(cfg, rows, CAPACITY, chunk=CHUNK, layout=layout), kernels
        self.texts: list[list[int]] = [[] for _ in range(rows)]
        self._answers: list[tuple[int, int, np.ndarray]] = []  # row, position, logits behind it

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(t) for t in self.texts])

    def prefill(self, counts) -> None:
        """Random new tokens, `counts` a row."""
        ids, counts = self._new(CHUNK, counts)
        logits, self.cache = steps.prefill(params(self.cfg), self.cfg, ids, counts, self.cache, kernels=self.kernels)
        self._note(np.asarray(logits)[:, None], np.minimum(counts, 1))

    def decode(self, active) -> None:
        ids, counts = self._new(1, np.array(active, int))
        active = np.array(active)
        logits, self.cache = steps.decode_step(
            params(self.cfg), self.cfg, ids[:, 0], active, self.cache, kernels=self.kernels
        )
        self._note(np.asarray(logits)[:, None], counts)

    def verify(self, counts) -> None:
        ids, counts = self._new(DRAFT, counts)
        logits, self.cache = steps.verify(params(self.cfg), self.cfg, ids, counts, self.cache, kernels=self.kernels)
        self._note(np.asarray(logits), counts)

    def truncate(self, lengths) -> None:
        if any(n < len(text) for n, text in zip(lengths, self.texts, strict=True)):
            self.check()  # while the texts that were answered are still there
        self.cache = self.cache.truncate(np.asarray(lengths, np.int32))
        self.texts = [text[:n] for text, n in zip(self.texts, lengths, strict=True)]
        np.testing.assert_array_equal(np.asarray(self.cache.lengths), self.lengths)

    def _new(self, width: int, counts) -> tuple[np.ndarray, np.ndarray]:
        ids = self.rng.integers(0, self.cfg.vocab_size, (len(self.texts), width), dtype=np.int32)
        for row, n in enumerate(counts):
            self.texts[row] += ids[row, :n].tolist()
        return ids, np.asarray(counts, np.int32)

    def _note(self, logits: np.ndarray, counts: np.ndarray) -> None:
        """Keep logits [B, n, V], the first `counts` of which follow the last `counts` tokens of each row."""
        np.testing.assert_array_equal(np.asarray(self.cache.lengths), self.lengths)
        for row, n in enumerate(counts):
            for i in range(n):
                self._answers.append((row, len(self.texts[row]) - n + i, logits[row, i]))

    def check(self) -> None:
        """AssertionError unless every answer so far is that of `forward` over the whole text, without a cache."""
        if not self._answers:
            return
        rows, positions, logits = zip(*self._answers, strict=True)
        self._answers = []
        width = 128 if self.lengths.max() <= 128 else CAPACITY  # few shapes: few programs
        ids = np.zeros((len(self.texts), width), np.int32)
        for row, text in enumerate(self.texts):
            ids[row, : len(text)] = text
        expected = np.asarray(whole(params(self.cfg), self.cfg, ids).logits)
        close(np.stack(logits), expected[rows, positions])


@contextmanager
def history_of(cfg: ModelConfig, seed: int = 0):
    """A `History` that is checked at the end."""
    history = History(cfg, seed=seed)
    yield history
    assert history._answers, "nothing was asked"
    history.check()
