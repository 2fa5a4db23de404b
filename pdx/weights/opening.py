"""`OpenModel`: one interface to configuration, tensors and tokenizer of a GGUF file, a Hugging Face directory or a
checkpoint of pdx."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pallas_kernels import QuantArray
from pdx.config import ModelConfig
from pdx.errors import ModelFileError
from pdx.families import config_from_gguf, config_from_hf, family_of_hf
from pdx.families.common import Names, QuantizedFile, Source, TensorFile
from pdx.families.ignored_tensors import explain_unknown, is_buffer, part_of, skipped_parts
from pdx.sampling import defaults
from pdx.sampling.defaults import Recommended
from pdx.tokenizer import Tokenizer
from pdx.tokenizer.settings import read_json
from pdx.weights.arrays import nonfinite
from pdx.weights.builtin import BUILTIN
from pdx.weights.checkpoint import CheckpointFile
from pdx.weights.gguf_file import GgufFile
from pdx.weights.resolve import ModelFiles
from pdx.weights.safetensors_file import open_safetensors

ROWS_COMPARED = 4096  # rows of an embedding and an output head that are compared at a time
# (leaf, layer; None: outside the layers) -> the tensor of that parameter.
SourceOf = Callable[[str, int | None], Source]


@dataclass(frozen=True)
class OpenModel:
    """The opened files of a model.

    Attributes:
      source: finds a parameter's tensor in `file`.
      ignores: whether the text model does not need a tensor of this name.
      terms: sentences that the licence requires with every copy.
      make_tokenizer: None for a checkpoint without one, such as a draft model's.
      notes: sentences about what is ignored in the files.
      sampling: the sampling settings that the files recommend.
    """

    file: TensorFile
    config: ModelConfig
    source: SourceOf
    ignores: Callable[[str], bool]
    make_tokenizer: Callable[[], Tokenizer] | None
    license: str | None = None
    terms: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sampling: Recommended = field(default_factory=Recommended)


def open_model(files: ModelFiles) -> OpenModel:
    """Open the files of a model and read its configuration.

    No weights are read, with one exception: if the configuration ties the output head to the embedding and the files
    hold both, they are compared. Raises ModelFileError and UnsupportedModelError as `pdx.load`.
    """
    return {"gguf": _open_gguf, "hf": _open_hf, "pdx": _open_checkpoint}[files.kind](files)


def _open_gguf(files: ModelFiles) -> OpenModel:
    file, notes = GgufFile(files.path), list(files.notes)
    family, cfg = config_from_gguf(file.metadata, file, str(files.path), notes)
    notes += skipped_parts(file.names())
    license = BUILTIN[files.name].license if files.name in BUILTIN else file.metadata.get("general.license")
    license = license if isinstance(license, str) else None  # a list, or a number, in damaged files
    tokenizer = partial(Tokenizer.from_gguf, file.metadata, source=str(files.path))
    return OpenModel(
        file,
        cfg,
        _source_finder(family.gguf_names, cfg, file),
        _ignore_rule(file),
        tokenizer,
        license,
        notes=tuple(notes),
        sampling=defaults.from_gguf(file.metadata),
    )


def _open_hf(files: ModelFiles) -> OpenModel:
    path = files.path / "config.json"
    notes: list[str] = []
    config = _read_config(path)
    family_of_hf(config, str(path))  # refuse an unknown family before looking at its weights
    file = open_safetensors(files.path, notes)
    family, cfg = config_from_hf(config, str(path), notes, len(file.names()))
    drafts = config.get("num_nextn_predict_layers")
    draft_layers = range(cfg.num_layers, cfg.num_layers + (drafts if isinstance(drafts, int) else 0))
    notes += skipped_parts(file.names(), draft_layers)
    source = _source_finder(family.hf_names, cfg, file)
    if cfg.tie_embeddings and _head_differs(file, *(source(leaf, None).name for leaf in ("embed", "lm_head"))):
        notes.append(
            f"config.json ties {source('lm_head', None).name} to {source('embed', None).name}, but in the files the "
            "two differ: the files' output head is used, as transformers does"
        )
        cfg = dataclasses.replace(cfg, tie_embeddings=False)
        source = _source_finder(family.hf_names, cfg, file)
    recommended = defaults.from_generation_config(read_json(files.path / "generation_config.json"))
    return OpenModel(
        file,
        cfg,
        source,
        _ignore_rule(file, draft_layers),
        partial(Tokenizer.from_hf_dir, files.path),
        notes=tuple(notes),
        sampling=recommended,
    )


def _open_checkpoint(files: ModelFiles) -> OpenModel:
    saved = CheckpointFile(files.path)
    return OpenModel(
        saved,
        saved.config,
        lambda leaf, i: Source(leaf if i is None else f"layers.{i}.{leaf}"),
        lambda name: False,
        partial(Tokenizer.load, files.path / "tokenizer") if (files.path / "tokenizer").is_dir() else None,
        saved.license,
        saved.terms,
        sampling=defaults.from_saved(saved.sampling),
    )


def _source_finder(names: Names, cfg: ModelConfig, file: TensorFile) -> SourceOf:
    present = set(file.names())
    prefix = names.find_prefix(file.names())

    def source(leaf: str, layer: int | None) -> Source:
        found = names.source(leaf, layer, cfg, prefix)
        if leaf == "embed" and cfg.tie_embeddings and found.name not in present:
            # A tied model may store its embedding under the output head's name.
            head = names.source("lm_head", None, cfg, prefix)
            return head if head.name in present else found
        return found

    return source


def _ignore_rule(file: TensorFile, draft_layers: range = range(0)) -> Callable[[str], bool]:
    """A function of a tensor's name: whether the text model does not need that tensor."""
    return lambda name: part_of(name, draft_layers) is not None or is_buffer(name, file.shape(name))


def _head_differs(file: TensorFile, embed: str, head: str) -> bool:
    """Whether the files hold an output head that differs from the embedding."""
    if embed == head or not {embed, head} <= set(file.names()):
        return False
    if file.shape(embed) != file.shape(head) or len(file.shape(head)) != 2:
        return True  # reading it reports the wrong shape
    count = file.shape(head)[0]
    pieces = (np.arange(at, min(at + ROWS_COMPARED, count)) for at in range(0, count, ROWS_COMPARED))
    return any(
        not np.array_equal(file.read(embed, np.float32, rows), file.read(head, np.float32, rows)) for rows in pieces
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(config, dict):
        raise ModelFileError(f"{path}: expected a JSON object")
    return config


def check_names(model: OpenModel, wanted: set[str]) -> None:
    """Compare the tensor names of a model with those that its configuration asks for.

    Raises ModelFileError for a missing tensor, and for one that is neither needed nor ignored.
    """
    file, names = model.file, model.file.names()
    missing = sorted(wanted - set(names))
    if missing:
        where = file.path_of(names[0]) if names else "the model"
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        held = getattr(file, "unlisted", {}).get(missing[0])
        there = f"; {held} holds one, which the index does not name" if held else ""
        raise ModelFileError(f"{where}: tensor {missing[0]}{others} is missing, the configuration asks for it{there}")
    head = model.source("lm_head", None).name if model.config.tie_embeddings else None
    for name in names:
        if name not in wanted and name != head and not model.ignores(name):
            raise ModelFileError(
                f"{file.path_of(name)}: the configuration does not ask for tensor {name}: {explain_unknown(name)}"
            )


def read_tensor(
    file: TensorFile, source: Source, shape: tuple[int, ...], dtype: Any, part: range | None = None
) -> np.ndarray:
    """One parameter on the host, [*shape] in `dtype`, or only the rows in `part`.

    Raises ModelFileError, naming file and tensor, for another shape and for values that are not finite.
    """
    check_shape(file, source, shape)
    rows = source.rows
    if part is not None and len(part) < shape[0]:
        rows = np.arange(part.start, part.stop) if rows is None else rows[part.start : part.stop]
    array = file.read(source.name, dtype, rows)
    if source.offset:
        array += array.dtype.type(source.offset)
    _check_finite(file, source.name, array, first_row=part.start if part else 0)
    return array


def read_stored(file: QuantizedFile, source: Source, shape: tuple[int, ...], dtype: Any) -> QuantArray:
    """One matrix on the host, quantized as in the file. Raises as `read_tensor`."""
    check_shape(file, source, shape)
    found = file.read_stored(source.name, dtype, source.rows)
    _check_finite(file, source.name, np.asarray(found.scales), "scales ")
    if found.offsets is not None:
        _check_finite(file, source.name, np.asarray(found.offsets), "offsets ")
    return found


def check_shape(file: TensorFile, source: Source, shape: tuple[int, ...]) -> None:
    """Raises ModelFileError if the tensor does not fit a parameter of this shape."""
    name = source.name
    expected = shape if source.stored_rows is None else (source.stored_rows, *shape[1:])
    if file.shape(name) != expected:
        raise ModelFileError(
            f"{file.path_of(name)}: tensor {name} has shape {list(file.shape(name))}, "
            f"expected {list(expected)} from the configuration"
        )


def _check_finite(file: TensorFile, name: str, array: np.ndarray, part: str = "", first_row: int = 0) -> None:
    bad = nonfinite(array)
    if bad is not None:
        index = [int(i) for i in np.unravel_index(bad[1], array.shape)]
        index[0] += first_row
        raise ModelFileError(
            f"{file.path_of(name)}: tensor {name} has {bad[0]} {part or 'values '}that are NaN or "
            f"infinite, the first of them at {index}; expected finite numbers"
        )
