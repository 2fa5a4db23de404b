"""Model families: each maps published configurations and tensor names to `ModelConfig` and pdx's parameters.

A family is a module of this package with a tuple `FAMILIES`. It needs no registration.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from pdx.config import ModelConfig
from pdx.errors import ModelFileError, UnsupportedModelError
from pdx.families.common import Family, TensorFile
from pdx.families.fields import Fields, count_of, short

_HELPERS = ("common", "fields", "ignored_tensors", "rope")
# Prefixes of GGUF fields that describe encoders, not the text model.
_ENCODERS = ("vision.", "audio.", "mm.")


@cache
def families() -> tuple[Family, ...]:
    """Every family in this package."""
    modules = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _HELPERS)
    return tuple(family for name in modules for family in import_module(f"{__name__}.{name}").FAMILIES)


def _known(attribute: str) -> str:
    return ", ".join(sorted(x for family in families() for x in getattr(family, attribute)))


def family_of_hf(config: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json; `where` names the file in errors.

    Raises UnsupportedModelError for an architecture that pdx does not have, ModelFileError if none is named.
    """
    listed, kind = config.get("architectures"), config.get("model_type")
    if listed and not (isinstance(listed, list) and isinstance(listed[0], str)):
        raise Fields(config, where).wrong("architectures", listed, "a list of names")
    if not listed and not kind:
        raise ModelFileError(
            f"{where}: has neither architectures nor model_type, expected one of {_known('architectures')}"
        )
    for family in families():
        if (listed and listed[0] in family.architectures) or (not listed and kind in family.model_types):
            return family
    key, value, attribute = (
        ("architectures", listed[0], "architectures") if listed else ("model_type", kind, "model_types")
    )
    raise UnsupportedModelError(f"{where}: {key} = {short(value)} is not supported; pdx has {_known(attribute)}")


def family_of_gguf(metadata: Mapping[str, Any], where: str) -> Family:
    """The family of GGUF metadata; `where` names the file in errors. Raises as `family_of_hf`."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ModelFileError(f"{where}: general.architecture is missing, expected one of {_known('gguf')}")
    for family in families():
        if architecture in family.gguf:
            return family
    if architecture == "clip":
        raise UnsupportedModelError(
            f"{where}: this is the image encoder of a model (general.architecture = 'clip'); "
            "name the file of the text model, which is usually in the same folder"
        )
    raise UnsupportedModelError(
        f"{where}: general.architecture = {short(architecture)} is not supported; pdx has {_known('gguf')}"
    )


def config_from_hf(
    config: Mapping[str, Any], where: str = "config.json", notes: list[str] | None = None, tensors: int | None = None
) -> tuple[Family, ModelConfig]:
    """The family and `ModelConfig` of a Hugging Face config.json.

    Args:
      config: its content.
      where: its name in errors.
      notes: a sentence for each group of unknown fields is appended.
      tensors: the number of tensors in the model's files; None: unknown.

    Raises:
      ModelFileError: a field is missing or of the wrong type.
      UnsupportedModelError: a field asks for something that pdx does not implement. Both name file, field and value.
    """
    notes = [] if notes is None else notes
    family, fields = family_of_hf(config, where), Fields(config, where, held=tensors, notes=notes)
    cfg = _checked(family.from_hf, fields)
    if unused := fields.unused():
        said = ", ".join(f"{k} = {short(v)}" for k, v in unused.items())
        notes.append(f"config.json has fields pdx does not know: {said}")
    return family, cfg


def config_from_gguf(
    metadata: Mapping[str, Any], file: TensorFile, where: str, notes: list[str] | None = None
) -> tuple[Family, ModelConfig]:
    """The family and `ModelConfig` of GGUF metadata and the tensors in `file`.

    Every field under the architecture's name changes the model, so an unknown one is an error. Fields of an image or
    audio encoder are ignored, with a sentence in `notes`. Raises as `config_from_hf`.
    """
    family = family_of_gguf(metadata, where)
    prefix = f"{metadata['general.architecture']}."
    encoders = [key for key in metadata if key.startswith(("clip.", *(prefix + part for part in _ENCODERS)))]
    if encoders and notes is not None:
        notes.append(
            f"ignored {count_of(len(encoders), 'metadata field')} of an image or audio encoder, such as "
            f"{encoders[0]}: pdx runs the text model"
        )
    under = {
        key.removeprefix(prefix): _plain(value)
        for key, value in metadata.items()
        if key.startswith(prefix) and key not in encoders
    }
    fields = Fields(under, where, prefix, len(file.names()), notes, per_layer="block_count")
    cfg = _checked(family.from_gguf, fields, file)
    for key, value in fields.unused().items():
        raise fields.unsupported(key, value, "models without it")
    return family, cfg


def _plain(value: Any) -> Any:
    """numpy's arrays and scalars as lists and numbers of Python."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return [_plain(x) for x in value] if isinstance(value, list) else value


def _checked(build, fields: Fields, *rest) -> ModelConfig:
    try:
        return build(fields, *rest)
    except ValueError as error:  # ModelConfig's own checks
        raise ModelFileError(f"{fields.where}: {error}") from None
    except ArithmeticError as error:  # a RoPE base of 1, say
        raise ModelFileError(f"{fields.where}: the configuration holds impossible numbers ({error})") from None
