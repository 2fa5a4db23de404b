"""Chips to plan for: published ones from the table, and a user's own from TOML, described or measured.

A user's chip is a file with the fields of `pallas_kernels.hardware.Chip`. It is named by its path, or by its name if it
is in `folder()`. A file that `pdx calibrate` wrote also has measured rates.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pallas_kernels import hardware
from pallas_kernels.hardware import Chip
from pdx.cost.measured_rates import Rates, Surface
from pdx.errors import RequestError
from pdx.installation.paths import home
from pdx.io import outputs

PLATFORMS = ("cpu", "gpu", "tpu")
REQUIRED = ("platform", "hbm_gbps", "hbm_gib", "f32_tflops")
# Fields that a description may leave out: only kernels need them, not the cost model.
DEFAULTS: dict[str, Any] = {"kinds": (), "bf16_tflops": None, "int8_tops": None, "cores": 1, "clock_ghz": 1.0}
INTEGERS = ("cores", "devices", "mxu", "vmem_mib", "vmem_capacity_mib", "smem_kib")


@dataclass(frozen=True)
class MeasuredChip(Chip):
    """A chip with measured peaks, and with measured rates of the parts of a step."""

    rates: Rates = dataclasses.field(default_factory=Rates, compare=False)


def folder() -> Path:
    """The folder in which a user's chips are found by name, and to which `pdx calibrate` saves them."""
    return home() / "chips"


def names() -> list[str]:
    """The names of the user's own chips."""
    return sorted(file.stem for file in folder().glob("*.toml"))


def chip(name: str | Path) -> Chip:
    """Find a chip: one of the user's own by name, a published one by name, or a file by its path.

    Raises:
      RequestError: an unknown name, or a file that describes no chip.
    """
    if str(name).endswith(".toml"):
        return read(Path(name))
    if str(name) in names():
        return read(folder() / f"{name}.toml")
    try:
        return hardware.chip(str(name))
    except ValueError as error:
        if Path(name).is_file():
            return read(Path(name))
        own = f"; your own: {', '.join(names())}" if names() else ""
        raise RequestError(f"{error}{own}; or a .toml file that describes one") from None


def read(file: Path) -> Chip:
    """A chip from TOML. Raises RequestError, naming the field that is wrong."""
    try:
        fields = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RequestError(f"{file}: not a chip ({error})") from None
    try:
        rates = fields.pop("rates", None)
        fields = DEFAULTS | {"name": file.stem} | fields
        _check(fields)
        fields["kinds"] = tuple(fields["kinds"])
        if fields.get("capability") is not None:
            fields["capability"] = tuple(fields["capability"])
        return Chip(**fields) if rates is None else MeasuredChip(**fields, rates=_rates(rates))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RequestError(f"{file}: not a chip: {error}") from None


def _check(fields: Mapping[str, Any]) -> None:
    known = {f.name for f in dataclasses.fields(Chip)}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"no field {unknown[0]!r}; the fields are {', '.join(sorted(known))}, and a table [rates]")
    if missing := [name for name in REQUIRED if fields.get(name) is None]:
        raise ValueError(f"{' and '.join(missing)} missing; every chip needs {', '.join(REQUIRED)}")
    if fields["platform"] not in PLATFORMS:
        raise ValueError(f"platform {fields['platform']!r} is not one of {', '.join(PLATFORMS)}")
    for name, value in fields.items():
        if value is None:
            continue
        if name in ("name", "platform"):
            if not isinstance(value, str):
                raise ValueError(f"{name} must be a text, not {value!r}")
        elif name in ("kinds", "capability"):
            inside, what = (str, "texts") if name == "kinds" else (int, "two numbers")
            if not isinstance(value, list | tuple) or not all(isinstance(x, inside) for x in value):
                raise ValueError(f"{name} must be a list of {what}, not {value!r}")
        else:
            whole = name in INTEGERS
            number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not number or not (value >= 0 if whole else 0 < value < math.inf):
                raise ValueError(f"{name} must be a {'whole' if whole else 'positive'} number, not {value!r}")


def _rates(table: Mapping[str, Any]) -> Rates:
    table = dict(table)
    rest, made = table.pop("rest", None), table.pop("made", "")
    groups = {
        name: {key: _surface(value) for key, value in table.pop(name, {}).items()}
        for name in ("products", "prefill_attention", "decode_attention")
    }
    if table:
        raise ValueError(f"[rates] has no {sorted(table)[0]!r}")
    return Rates(**groups, rest=rest and _surface(rest), made=str(made))


def _surface(table: Mapping[str, Any]) -> Surface:
    if wrong := set(table) ^ {"first", "second", "values"}:
        raise ValueError(f"a grid of rates has first, second and values; {sorted(wrong)[0]!r} is missing or unknown")
    return Surface(tuple(table["first"]), tuple(table["second"]), tuple(map(tuple, table["values"])))


def file_of(name: str) -> Path:
    """The file of a user's chip. Raises RequestError for an invalid name."""
    if not re.fullmatch(r"[\w.-]+", name):
        raise RequestError(f"a chip's name is letters, digits, dots, dashes and underscores, not {name!r}")
    return folder() / f"{name}.toml"


def save(what: Chip, file: Path | None = None) -> Path:
    """Write a chip, into the user's folder under its name unless a file is given. Returns the file."""
    file = file_of(what.name) if file is None else file
    file.parent.mkdir(parents=True, exist_ok=True)
    outputs.write_text(file, to_toml(what))
    return file


def to_toml(what: Chip) -> str:
    """The file that `read` reads."""
    lines = [
        f"{f.name} = {_value(x)}"
        for f in dataclasses.fields(Chip)
        if (x := getattr(what, f.name)) is not None and x != f.default
    ]
    if isinstance(what, MeasuredChip):
        rates = what.rates
        lines += ["", "[rates]", f"made = {_value(rates.made)}"]
        tables = {
            f"{group}.{key}": surface
            for group in ("products", "prefill_attention", "decode_attention")
            for key, surface in getattr(rates, group).items()
        }
        for name, surface in (tables | ({"rest": rates.rest} if rates.rest else {})).items():
            lines += [
                "",
                f"[rates.{name}]",
                *(f"{f.name} = {_value(getattr(surface, f.name))}" for f in dataclasses.fields(Surface)),
            ]
    return "\n".join([*lines, ""])


def _value(x: Any) -> str:
    if isinstance(x, tuple | list):
        return f"[{', '.join(map(_value, x))}]"
    return json.dumps(x)
