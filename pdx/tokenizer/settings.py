"""The settings of a tokenizer that are not in `tokenizer.json`: named tokens, end tokens, chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdx.errors import ModelFileError

_FORMAT = 1


@dataclass(frozen=True)
class Settings:
    """The settings of a tokenizer that are not in `tokenizer.json`.

    Attributes:
      named: `bos_token`, `eos_token`, ... -> the token's text. Chat templates get them as variables.
      eos_ids: every token id that ends a generation.
      templates: name -> jinja2 source; the name is "default" unless the model has several.
      split_special_tokens: text that spells a special token stays plain text, unless a caller asks otherwise.
      control: added tokens that are control tokens in chats, besides the special ones; None: those that the chat
        template contains.
      source: the files' name in errors.
    """

    named: Mapping[str, str] = field(default_factory=dict)
    eos_ids: frozenset[int] = frozenset()
    templates: Mapping[str, str] = field(default_factory=dict)
    split_special_tokens: bool = False
    control: frozenset[str] | None = None
    source: str = "this model"

    def to_json(self) -> str:
        data = {
            "format": _FORMAT,
            "named": dict(self.named),
            "eos_ids": sorted(self.eos_ids),
            "templates": dict(self.templates),
            "split_special_tokens": self.split_special_tokens,
            "control": None if self.control is None else sorted(self.control),
        }
        return json.dumps(data, indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, source: str) -> Settings:
        """The inverse of `to_json`. Raises ModelFileError that names `source`."""
        try:
            data = json.loads(text)
            if data["format"] != _FORMAT:
                raise ModelFileError(
                    f"{source}: tokenizer format {data['format']!r} is not {_FORMAT}; convert the model again"
                )
            return cls(
                named=_strings(data["named"]),
                eos_ids=frozenset(int(i) for i in data["eos_ids"]),
                templates=_strings(data["templates"]),
                # Files of earlier versions lack these two.
                split_special_tokens=bool(data.get("split_special_tokens", False)),
                control=None if data.get("control") is None else frozenset(data["control"]),
                source=source,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelFileError(
                f"{source}: not a tokenizer description saved by pdx ({error}); convert the model again"
            ) from error


def _strings(mapping: Mapping[Any, Any]) -> dict[str, str]:
    for key, value in mapping.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"{key!r} should map to a string")
    return dict(mapping)


def read_json(path: Path, *, required: bool = False) -> dict[str, Any]:
    """The JSON object in `path`; {} if the file does not exist and is not required.

    Raises ModelFileError for a file that cannot be read, or whose content is not an object.
    """
    if not required and not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(data, dict):
        raise ModelFileError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data
