"""Which tiles a kernel takes: explicit > tuned table > heuristic.

A table is `tuned/<chip>.json`: op -> bucket -> the Config and how it was found (`tuning` makes them). A bucket is a
call with its sizes rounded up to powers of two, so that neighbours share an entry. Every kernel asks `resolve` once
a trace: a dictionary look-up.
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

ENVIRONMENT = "PDX_TUNED"  # another folder of tables, for a device whose packages cannot be written to
FOLDER = Path(__file__).parent / "tuned"
# Of a call: what tiles do not depend on, and sizes that neighbours share.
_IGNORED = ("op", "scale", "out_dtype")
_SIZES = ("batch", "queries", "slots", "tokens", "rows", "width", "pages", "max_queries", "decode_rows")
_PLAIN = (None, False, 0)


def bucket(call: Any) -> str:
    """The name under which a call's tiles are kept: its static facts, sizes rounded up to powers of two."""
    parts = []
    for f in fields(call):
        value = getattr(call, f.name)
        if f.name in _IGNORED or (value in _PLAIN and f.default in _PLAIN):
            continue
        if f.name in _SIZES and value:
            value = 1 << (int(value) - 1).bit_length()
        parts.append(f"{f.name}={value}")
    return " ".join(parts)


def folder_of(folder: Path | None = None) -> Path:
    """Where tables are: in `folder`, else in $PDX_TUNED, else in the package."""
    return folder or Path(os.environ.get(ENVIRONMENT) or FOLDER)


def path_of(chip: Chip, folder: Path | None = None) -> Path:
    """The table of a chip, see `folder_of`."""
    return folder_of(folder) / f"{chip.name}.json"


@cache
def _table(path: str) -> dict[str, Any]:
    return read(Path(path))


def read(path: Path) -> dict[str, Any]:
    """The table in a file, {} where there is none. Raises ValueError naming what in it is not a table of tiles."""
    if not path.exists():
        return {}
    remedy = "correct it, or remove the file and tune again"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
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
    """Read the tables again when they are asked next."""
    _table.cache_clear()


def lookup(op: str, call: Any, chip: Chip | None, folder: Path | None = None) -> dict[str, Any] | None:
    """The entry of a call's bucket: `config`, `rung`, `jax`, `date`, `figures`; None if there is none."""
    if chip is None:
        return None
    return _table(str(path_of(chip, folder))).get("ops", {}).get(op, {}).get(bucket(call))


def _config(op: str, call: Any, chip: Chip, entry: dict[str, Any], module: ModuleType, folder: Path | None) -> Any:
    """An entry's Config. Raises ValueError naming the entry, where its fields are not those of the kernel's Config."""
    try:
        return module.Config(**entry["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the tuned table {path_of(chip, folder)} has an entry that {op} cannot take, {bucket(call)!r}: "
            f"{entry['config']} ({error}); its fields are {', '.join(f.name for f in fields(module.Config))}: "
            f"remove the entry, or tune again"
        ) from error


def misfit(module: ModuleType, call: Any, config: Any) -> str | None:
    """Why a Config does not suit a call; None: it does, as every one that can be made if the kernel does not say."""
    return module.misfit(call, config) if hasattr(module, "misfit") else None


def entry_of(op: str, module: ModuleType) -> str:
    """Under what name a table keeps an implementation's tiles: the op, and for a platform's further ones their own."""
    name = getattr(module, "NAME", None)
    return op if name is None or name in platforms_of(module) else f"{op}/{name}"


def resolve(op: str, call: Any, config: Any, module: ModuleType, folder: Path | None = None) -> tuple[Any, str]:
    """The tiles of a call and where they come from: `explicit`, `tuned` or `heuristic`.

    Args:
      config: the caller's; None: not given.
      module: the implementation, with PLATFORM, `Config`, `heuristic(call, chip)` and, where not every Config suits
        every call, `misfit(call, config)`. The chip is this process' if it is of this platform; else none, for which
        the heuristic has a default. A bucket's tiles that do not suit this very call are passed over.

    Raises:
      ValueError: an explicit Config that does not suit the call; a table that cannot be read, by its file and entry.
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
