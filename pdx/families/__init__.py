"""Model families: each module here maps published configurations and tensor names onto the one model.

A new family is one file with a tuple `FAMILIES`; it is found by being here.
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
from pdx.families.fields import Fields, counted, short

_SHARED = ("common", "fields", "passed_over", "rope")
# Fields of a GGUF architecture that belong to encoders beside the text model.
_ENCODERS = ("vision.", "audio.", "mm.")


@cache
def families() -> tuple[Family, ...]:
    """Every family in this package."""
    modules = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _SHARED)
    return tuple(family for name in modules for family in import_module(f"{__name__}.{name}").FAMILIES)


def _known(attribute: str) -> str:
    return ", ".join(sorted(x for family in families() for x in getattr(family, attribute)))


def family_of_hf(config: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json. Raises UnsupportedModelError for an architecture pdx does not have."""
    listed, kind = config.get("architectures"), config.get("model_type")
    if listed and not (isinstance(listed, list) and isinstance(listed[0], str)):
        raise Fields(config, where).wrong("architectures", listed, "a list of names")
    if not listed and not kind:
        raise ModelFileError(
            f"{where}: neither architectures nor model_type is there, expected one of {_known('architectures')}"
        )
    for family in families():
        if (listed and listed[0] in family.architectures) or (not listed and kind in family.model_types):
            return family
    key, value, attribute = (
        ("architectures", listed[0], "architectures") if listed else ("model_type", kind, "model_types")
    )
    raise UnsupportedModelError(f"{where}: {key} = {short(value)} is not supported; pdx has {_known(attribute)}")


def family_of_gguf(metadata: Mapping[str, Any], where: str) -> Family:
    """The family of GGUF metadata. Raises UnsupportedModelError for an architecture pdx does not have."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ModelFileError(f"{where}: general.architecture is missing, expected one of {_known('gguf')}")
    for family in families():
        if architecture in family.gguf:
            return family
    if architecture == "clip":
        raise UnsupportedModelError(
            f"{where}: this is the image encoder of a model (general.architecture = 'clip'); "
            "name the file of the text model that lies beside it"
        )
    raise UnsupportedModelError(
        f"{where}: general.architecture = {short(architecture)} is not supported; pdx has {_known('gguf')}"
    )


def config_from_hf(
    config: Mapping[str, Any], where: str = "config.json", notes: list[str] | None = None, tensors: int | None = None
) -> tuple[Family, ModelConfig]:
    """Map a Hugging Face config.json; `tensors` is how many the model's files hold, where that is known.

    Fields that pdx does not know go to `notes`, in words. Raises ModelFileError for a field that is missing or of the
    wrong type and UnsupportedModelError for what pdx does not implement, both naming file, field and value.
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
    """Map GGUF metadata; `file` says which tensors there are.

    Every field under the architecture's name shapes the model, so an unknown one is an error here. Those of an encoder
    for images or sound beside the text model are passed over, which `notes` is told. Raises as `config_from_hf`.
    """
    family = family_of_gguf(metadata, where)
    prefix = f"{metadata['general.architecture']}."
    encoders = [key for key in metadata if key.startswith(("clip.", *(prefix + part for part in _ENCODERS)))]
    if encoders and notes is not None:
        notes.append(
            f"{counted(len(encoders), 'metadata field')} of an encoder for images or sound passed over, such "
            f"as {encoders[0]}: pdx runs the text model"
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
    """Arrays and scalars of numpy as Python's own lists and numbers."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return [_plain(x) for x in value] if isinstance(value, list) else value


def _checked(build, fields: Fields, *rest) -> ModelConfig:
    try:
        return build(fields, *rest)
    except ValueError as error:  # ModelConfig's own checks
        raise ModelFileError(f"{fields.where}: {error}") from None
    except ArithmeticError as error:  # a RoPE base of 1, say
        raise ModelFileError(
            f"{fields.where}: the numbers of the configuration cannot be computed with ({error})"
        ) from None
