"""The shapes of well-known models, from `configs/`: enough to plan with, without weights."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from pathlib import Path

from pallas_kernels.layouts import Layout
from pdx.config import ModelConfig
from pdx.cost import Setup
from pdx.cost.planned_layers import Experts, Latent
from pdx.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from pdx.installation.paths import config_folders
from pdx.quant import Policy


@dataclass(frozen=True)
class Shape:
    """A model to plan with: a configuration, and the layers of those that pdx cannot run yet."""

    config: ModelConfig
    experts: Experts | None = None
    latent: Latent | None = None

    @property
    def runs(self) -> bool:
        """Whether `pdx.model` is such a model."""
        return self.experts is None and self.latent is None

    def setup(
        self,
        dtype: str = "bfloat16",
        quantize: str | Policy | None = None,
        kv_dtype: str | None = None,
        layout: Layout | None = None,
    ) -> Setup:
        """The model as it is stored and run, for the cost model."""
        return Setup(self.config, dtype, quantize, kv_dtype, layout, self.experts, self.latent)


def names() -> list[str]:
    """Of all shapes, sorted."""
    return sorted({file.stem for folder in config_folders() for file in folder.glob("*.toml")})


def config(model: str | Path) -> ModelConfig:
    """The configuration of a model that pdx runs. Raises as `shape`, and UnsupportedModelError for one that is only
    planned with."""
    found = shape(model)
    if not found.runs:
        raise UnsupportedModelError(
            f"{model} has layers that pdx plans with and cannot run yet "
            f"({'experts' if found.experts else 'latent attention'})"
        )
    return found.config


def shape(model: str | Path) -> Shape:
    """The shape of a known name, of a TOML file, or of anything that `pdx.load` takes, whose weights are not read.

    Raises:
      ModelNotFoundError: nothing of that name; the message lists the known ones.
      ModelFileError: a file that is no configuration.
    """
    for folder in config_folders():
        if (file := folder / f"{model}.toml").is_file():
            return read(file)
    if str(model).endswith(".toml"):
        return read(Path(model))
    from pdx.weights.opening import open_model
    from pdx.weights.resolve import resolve

    try:
        return Shape(open_model(resolve(model)).config)
    except ModelNotFoundError as error:
        near = difflib.get_close_matches(str(model), names(), n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ModelNotFoundError(f"{error}\nShapes to plan with: {hint}{', '.join(names())}") from None


def read(file: Path) -> Shape:
    """A shape from TOML: the fields of `ModelConfig`; `window` and `full_every` (each so many layers one without a
    window) in the place of `windows`; tables [experts] and [latent] of the fields of `Experts` and `Latent`. Raises
    ModelFileError."""
    try:
        fields = tomllib.loads(file.read_text(encoding="utf-8"))
        window, every = fields.pop("window", None), fields.pop("full_every", None)
        if window is not None:
            full = [every is not None and (i + 1) % every == 0 for i in range(fields["num_layers"])]
            fields["windows"] = tuple(None if whole else window for whole in full)
        experts, latent = fields.pop("experts", None), fields.pop("latent", None)
        return Shape(
            ModelConfig(**fields), Experts(**experts) if experts else None, Latent(**latent) if latent else None
        )
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"{file}: not the shape of a model ({error})") from None
