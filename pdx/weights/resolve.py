"""From a model argument (a name, a path or a hub id) to the model's files; suggestions for an unknown name."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pdx.errors import DownloadError, ModelNotFoundError
from pdx.families.ignored_tensors import MERGE
from pdx.installation.paths import models_home
from pdx.weights.builtin import BUILTIN
from pdx.weights.download import ensure
from pdx.weights.progress import Report
from pdx.weights.safetensors_file import PICKLED, has_weights

Kind = Literal["gguf", "hf", "pdx"]
CHECKPOINT_FILE = "pdx.json"  # a directory with this file is a checkpoint of pdx
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
# Only these files are fetched from a hub: no pickles, no second copy of the weights, nothing in subfolders.
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "*.txt"]
_HUB_IGNORED = ["*/*", "consolidated*"]


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model: its name, their kind and their path."""

    name: str
    kind: Kind
    path: Path
    notes: tuple[str, ...] = ()


def resolve(model: str | Path, report: Report | None = None) -> ModelFiles:
    """Find the files of a model argument, fetching those of a built-in model or a hub id if necessary.

    Tried in this order: a built-in name, a name in the models folder (see `PDX_HOME`), a path, a hub id `owner/name` or
    `owner/name@revision`. `report` is called during the download of a built-in model; None draws a bar.

    Raises ModelNotFoundError, with known and similar names, if the argument names no model or more than one;
    DownloadError if a download fails.
    """
    text = str(model)
    if not text.strip():
        raise _not_found(text, "the name is empty")
    path = Path(model).expanduser()
    if isinstance(model, str) and text in BUILTIN:
        if file_kind(path) is not None:
            raise ModelNotFoundError(
                f"{text!r} is a built-in model and also a path here: write ./{text} for the path, or rename it"
            )
        builtin = BUILTIN[text]
        return ModelFiles(text, "gguf", ensure(builtin, report), builtin.notes)
    saved = models_home() / text
    if _is_name(text) and file_kind(saved) is not None and saved.resolve() != path.resolve():
        if file_kind(path) is not None:
            raise ModelNotFoundError(
                f"{text!r} is in {models_home()} and also a path here: write ./{text} for the path"
            )
        return _from_path(saved)
    if path.exists():
        return _from_path(path)
    if isinstance(model, str) and _HUB_ID.fullmatch(text) and not text.endswith(".gguf"):
        return _from_hub(text)
    raise _not_found(text)


def _is_name(text: str) -> bool:
    return re.fullmatch(r"[\w.-]*\w[\w.-]*", text) is not None


def file_kind(path: Path) -> Kind | None:
    """The kind of model files at `path`; None if there are none."""
    if path.is_file():
        return "gguf" if path.suffix == ".gguf" else None
    if not path.is_dir():
        return None
    if (path / CHECKPOINT_FILE).is_file():
        return "pdx"
    if (path / "config.json").is_file():
        return "hf"
    return "gguf" if len(list(path.glob("*.gguf"))) == 1 else None


def _from_path(path: Path) -> ModelFiles:
    kind = file_kind(path)
    name = path.resolve().stem if path.is_file() else path.resolve().name
    if kind == "gguf" and path.is_dir():
        return ModelFiles(name, kind, next(path.glob("*.gguf")))
    if kind is not None:
        return ModelFiles(name, kind, path)
    if path.is_dir():
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        if ggufs:
            raise ModelNotFoundError(f"{path} has {len(ggufs)} GGUF files; name one of them: {', '.join(ggufs)}")
        _refuse_adapter(str(path), path)
        has = "safetensors but no config.json: copy that too" if has_weights(path) else "none of these"
        raise ModelNotFoundError(
            f"{path} is a directory, but not of a model: expected config.json with safetensors, "
            f"a .gguf file, or a checkpoint of `pdx convert`; it has {has}"
        )
    if path.suffix == ".safetensors":
        raise ModelNotFoundError(f"{path}: name the directory, its config.json and tokenizer are needed too")
    if path.suffix in PICKLED:
        raise ModelNotFoundError(
            f"{path}: pickled and other framework files are not read; pdx reads .gguf files and "
            "directories with config.json and safetensors"
        )
    raise ModelNotFoundError(f"{path} is a file, but its name does not end in .gguf")


def _from_hub(text: str) -> ModelFiles:
    """Download a repository through `huggingface_hub`, which honours HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, HF_HOME."""
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    repo, _, revision = text.partition("@")
    try:
        path = Path(
            snapshot_download(repo, revision=revision or None, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED)
        )
    except hub.GatedRepoError:
        raise ModelNotFoundError(f"{repo} is gated: accept its terms on the hub and set HF_TOKEN") from None
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError) as error:
        raise _not_found(
            text,
            f"the hub has no such repository or revision, or it is private and needs HF_TOKEN ({_first_line(error)})",
        ) from None
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled):
        raise _not_found(
            text,
            "it is not in the hub's cache and the hub cannot be reached (no network, or HF_HUB_OFFLINE is set)",
            DownloadError,
        ) from None
    except (hub.HfHubHTTPError, OSError) as error:
        raise DownloadError(f"could not fetch {text} from the hub: {_first_line(error)}") from error
    if not (path / "config.json").is_file() or not has_weights(path):
        _refuse_adapter(text, path)
        raise ModelNotFoundError(
            f"{text} on the hub has no config.json with safetensors at its top; "
            "download a .gguf file by hand and name that"
        )
    return ModelFiles(text, "hf", path)


def _refuse_adapter(model: str, path: Path) -> None:
    """Raises ModelNotFoundError for a directory that holds a LoRA adapter instead of a model."""
    if (path / "adapter_config.json").is_file():
        raise ModelNotFoundError(f"{model} is a LoRA adapter, which pdx does not apply: {MERGE} and name the result")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _not_found(text: str, why: str = "", error: type = ModelNotFoundError) -> Exception:
    known = known_names()
    near = difflib.get_close_matches(text.lower(), known, n=3, cutoff=0.5)
    parent = Path(text).expanduser().parent
    if parent.is_dir() and "/" in text:
        beside = [str(p) for p in parent.iterdir()]
        near += difflib.get_close_matches(str(Path(text).expanduser()), beside, n=2, cutoff=0.8)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return error(
        f"no model {text!r}: {why or 'no file, directory or known name'}.{hint} Known by name: "
        f"{', '.join(known)}. Also accepted: a .gguf file, a Hugging Face directory, a hub id (owner/name), or a "
        "checkpoint of `pdx convert`."
    )


def known_names() -> list[str]:
    """The names of the built-in models, then those of the models in the models folder."""
    folder = models_home()
    saved = sorted(p.name for p in folder.iterdir() if file_kind(p)) if folder.is_dir() else []
    return [*BUILTIN, *(name for name in saved if name not in BUILTIN)]
