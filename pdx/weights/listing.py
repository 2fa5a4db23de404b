"""The models that can be loaded: built-in, in the models folder, in the hub's cache. Reads no weights, needs no jax."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pdx.errors import PdxError
from pdx.families import family_of_hf
from pdx.installation.paths import models_home
from pdx.weights.builtin import BUILTIN, DEFAULT_MODEL
from pdx.weights.download import cached_path, is_cached
from pdx.weights.resolve import CHECKPOINT_FILE, file_kind, known_names
from pdx.weights.safetensors_file import has_weights


def list_models() -> list[dict[str, Any]]:
    """One dict per model, the default model first.

    Keys: `name`, `kind`, `size_mb` (10^6 bytes of the files, or of the download of a model that is not cached),
    `cached` (bool), `license` and `where` (the path).
    """
    rows = [_builtin(name) for name in sorted(BUILTIN, key=lambda n: n != DEFAULT_MODEL)]
    rows += [_saved(name) for name in known_names() if name not in BUILTIN]
    return rows + _hub_cache()


def _row(name: str, kind: str, size: int, cached: bool, terms: str | None, where: str) -> dict[str, Any]:
    megabytes = round(size / 1e6)
    return {"name": name, "kind": kind, "size_mb": megabytes, "cached": cached, "license": terms, "where": where}


def _builtin(name: str) -> dict[str, Any]:
    model = BUILTIN[name]
    cached = is_cached(model)
    terms = f"{model.license} ({model.terms})" if model.terms else model.license
    where = str(cached_path(model)) if cached else "fetched on first use"
    return _row(name, "built in", model.size if cached else model.download_size, cached, terms, where)


def _saved(name: str) -> dict[str, Any]:
    path = models_home() / name
    kind = {"pdx": "checkpoint", "hf": "hf directory", "gguf": "gguf", None: ""}[file_kind(path)]
    terms = None
    if kind == "checkpoint":
        terms = _json(path / CHECKPOINT_FILE).get("license")
    return _row(name, kind, _size(path), True, terms, str(path))


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _hub_cache() -> list[dict[str, Any]]:
    """The complete repositories in the hub's cache whose architecture pdx has."""
    import huggingface_hub

    try:
        cache = huggingface_hub.scan_cache_dir(huggingface_hub.constants.HF_HUB_CACHE)
    except huggingface_hub.errors.CacheNotFound:
        return []
    rows = []
    for repo in sorted(cache.repos, key=lambda r: r.repo_id):
        if repo.repo_type != "model":
            continue
        for revision in repo.revisions:
            path = Path(revision.snapshot_path)
            if has_weights(path) and _supported(path):
                terms = _license_tag(path)
                rows.append(_row(repo.repo_id, "hub cache", revision.size_on_disk, True, terms, str(path)))
                break
    return rows


def _supported(path: Path) -> bool:
    try:
        family_of_hf(_json(path / "config.json"), str(path))
    except PdxError:
        return False
    return True


def _license_tag(path: Path) -> str | None:
    """The value of the `license:` line at the top of a model card; None without a card or such a line."""
    card = path / "README.md"
    if not card.is_file():
        return None
    head = card.read_text(encoding="utf-8", errors="replace")[:4000].splitlines()
    return next((line.partition(":")[2].strip() for line in head if line.startswith("license:")), None)
