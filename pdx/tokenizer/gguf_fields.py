"""Typed access to `tokenizer.ggml.*` of a GGUF file's metadata, with errors that name the file and the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pdx.errors import ModelFileError

_NO_TOKEN = (-1, 2**32 - 1)  # values that mean "no such token"


class Fields:
    """The fields of one file. A missing field is None; one of a wrong type raises ModelFileError."""

    def __init__(self, metadata: Mapping[str, Any], source: str):
        self.metadata = metadata
        self.source = source

    def error(self, key: str, problem: str) -> ModelFileError:
        return ModelFileError(f"{self.source}: tokenizer.ggml.{key} {problem}")

    def text(self, key: str) -> str | None:
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if value is not None and not isinstance(value, str):
            raise self.error(key, f"should be a string, is {type(value).__name__}")
        return value

    def flag(self, key: str) -> bool | None:
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return None
        if not isinstance(value, (bool, int, np.bool_, np.integer)):
            raise self.error(key, f"should be true or false, is {type(value).__name__}")
        return bool(value)

    def token_id(self, key: str, size: int) -> int | None:
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        return None if value is None else self._token_id(key, value, size)

    def token_ids(self, key: str, size: int) -> set[int]:
        """The ids in a list; an empty set if the field is missing."""
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        value = [] if value is None else value
        if not isinstance(value, (list, tuple, np.ndarray)):
            raise self.error(key, f"should be a list of token ids, is {type(value).__name__}")
        ids = (self._token_id(key, item, size) for item in value)
        return {token_id for token_id in ids if token_id is not None}

    def _token_id(self, key: str, value: Any, size: int) -> int | None:
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if whole and int(value) in _NO_TOKEN:
            return None
        if not whole or not 0 <= int(value) < size:
            raise self.error(key, f"is {value!r}, not a token id below {size}")
        return int(value)

    def strings(self, key: str) -> list[str] | None:
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "should be a list of strings")
        return list(value)

    def numbers(self, key: str, size: int) -> list[Any] | None:
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return None
        array = np.asarray(value)
        if array.shape != (size,) or array.dtype.kind not in "iuf":
            raise self.error(key, f"should be {size} numbers, one per token, is an array of shape {array.shape}")
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise self.error(key, "holds NaN")
        return array.tolist()
