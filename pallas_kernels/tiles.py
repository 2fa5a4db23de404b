"""The tiles of a kernel: the caller's, else those of the chip's tuned table, else those of the heuristic.

A table is `tuned/<chip>.json`: op -> bucket -> the Config and how it was found (`analysis.tuning` makes tables). A
bucket is a call with its sizes rounded up to powers of two, so that similar calls share an entry. Each call asks
`resolve` once per trace, which costs a dictionary look-up.
"""

from __future__ import annotations

import json
import os
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from pallas_kernels import hardware
from pallas_kernels.hardware import Chip
from pallas_kernels.implementation import platforms_of, runs_on

ENVIRONMENT = "PDX_TUNED"  # another folder of tables, where the package's own is read-only
FOLDER = Path(__file__).parent / "tuned"
# Fields of a call: those that tiles do not depend on, and sizes that are rounded.
_IGNORED = ("op", "scale", "out_dtype")
_SIZES = ("batch", "queries", "slots", "tokens", "rows", "width", "pages", "max_queries", "decode_rows")
# A decode row owns one query unless tokens were drafted.
_USUAL = {"decode_queries": 1}
_PLAIN = (None, False, 0)


def bucket(call: Any) -> str:
    """The key of a call in a table: its static facts, with sizes rounded up to powers of two."""
    parts = []
    for f in fields(call):
        value = getattr(call, f.name)
        if f.name in _IGNORED or (value in _PLAIN and f.default in _PLAIN) or _USUAL.get(f.name) == value:
            continue
        if f.name in _SIZES and value:
            value = 1 << (int(value) - 1).bit_length()
        parts.append(f"{f.name}={value}")
    return " ".join(parts)


def folder_of(folder: Path | None = None) -> Path:
    """The folder of the tables: `folder`, else $PDX_TUNED, else the package's."""
    return folder or Path(os.environ.get(ENVIRONMENT) or FOLDER)


def path_of(chip: Chip, folder: Path | None = None) -> Path:
    """The file of a chip's table, in `folder_of(folder)`."""
    return folder_of(folder) / f"{chip.name}.json"


@cache
def _table(path: str) -> dict[str, Any]:
    return read(Path(path))


def read(path: Path) -> dict[str, Any]:
    """The table in a file; {} if there is no file. Raises ValueError naming what is wrong in it."""
    if not path.exists():
        return {}
    remedy = "correct it, or remove the file and tune again"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not text
        raise ValueError(f"the tuned table {path} is not JSON ({error}): {remedy}") from error
    if not isinstance(table, dict) or not isinstance(table.get("ops"), dict):
        raise ValueError(f'the tuned table {path} must be an object with "ops", an object of ops: {remedy}')
    for op, entries in table["ops"].items():
        if not isinstance(entries, dict):
            raise ValueError(f"the tuned table {path} must have an object of entries under {op}: {remedy}")
        for key, entry in entries.items():
            if not isinstance(entry, dict) or not isinstance(entry.get("config"), dict):
                raise ValueError(
                    f'the tuned table {path} has an entry without a "config" object, {op}, {key!r}: {remedy}'
                )
    return table


def forget() -> None:
    """Drop the tables that were read: the next look-up reads the files again."""
    _table.cache_clear()


def lookup(op: str, call: Any, chip: Chip | None, folder: Path | None = None) -> dict[str, Any] | None:
    """The entry of a call's bucket: `config`, `rung`, `jax`, `date`, `figures`; None if there is none."""
    if chip is None:
        return None
    return _table(str(path_of(chip, folder))).get("ops", {}).get(op, {}).get(bucket(call))


def _config(op: str, call: Any, chip: Chip, entry: dict[str, Any], module: ModuleType, folder: Path | None) -> Any:
    """An entry's Config. Raises ValueError naming the entry if its fields are not those of the kernel's Config."""
    kind = module.config_class(call) if hasattr(module, "config_class") else module.Config
    try:
        return kind(**entry["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the tuned table {path_of(chip, folder)} has an entry that {op} cannot take, {bucket(call)!r}: "
            f"{entry['config']} ({error}); its fields are {', '.join(f.name for f in fields(kind))}: "
            f"remove the entry, or tune again"
        ) from error


def misfit(module: ModuleType, call: Any, config: Any) -> str | None:
    """None, or why a Config does not suit a call. A kernel without `misfit` takes every Config."""
    return module.misfit(call, config) if hasattr(module, "misfit") else None


def entry_of(op: str, module: ModuleType) -> str:
    """The key of an implementation in a table: the op, and its own name too if that is not its platform's."""
    name = getattr(module, "NAME", None)
    return op if name is None or name in platforms_of(module) else f"{op}/{name}"


def resolve(op: str, call: Any, config: Any, module: ModuleType, folder: Path | None = None) -> tuple[Any, str]:
    """The tiles of a call and their source: `explicit`, `tuned` or `heuristic`.

    The chip is the one traced for, if it is of the implementation's platform; else None, for which the heuristic has
    a default. Tuned tiles of the bucket that do not suit this call are ignored.

    Args:
      config: the caller's; None: not given.
      module: the implementation, with PLATFORM, `Config`, `heuristic(call, chip)` and, if not every Config suits every
        call, `misfit(call, config)`; with more than one Config, `config_class(call)`.

    Raises:
      ValueError: an explicit Config that does not suit the call; a table that cannot be read, with file and entry.
    """
    if config is not None:
        if (why := misfit(module, call, config)) is not None:
            raise ValueError(f"{op}: {config} does not fit: {why}")
        return config, "explicit"
    chip = hardware.detect()
    chip = chip if chip and runs_on(module, chip.platform) else None
    entry = lookup(entry_of(op, module), call, chip, folder)
    if entry is not None:
        found = _config(op, call, chip, entry, module, folder)
        if misfit(module, call, found) is None:
            return found, "tuned"
    return module.heuristic(call, chip), "heuristic"
