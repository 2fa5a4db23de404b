"""`Model`: what `load` returns and `save` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from pdx.config import ModelConfig
from pdx.errors import ModelFileError
from pdx.meshes import as_mesh
from pdx.model import Params
from pdx.tokenizer import Tokenizer


@dataclass(eq=False)
class Model:
    """A loaded model: parameters on the device and everything needed to use them.

    Attributes:
      params: the tree that `pdx.model.param_specs` declares.
      dtype: of the matrices; norms are always f32.
      mesh: None on one device.
      notes: sentences for the user.
      terms: the notes that licences require to go along with every copy.
      sampling: the settings that the model's files recommend, by the names of `SamplingOptions` (see
        `sampling_defaults`).

    Example:
      >>> from pathlib import Path
      >>> model = pdx.Model(params, cfg, name="tiny", path=Path("tiny"), dtype=jnp.float32)
      >>> model.config.max_context, model.mesh
      (256, None)
    """

    params: Params = field(repr=False)
    config: ModelConfig
    name: str
    path: Path
    dtype: Any
    mesh: Mesh | None = None
    notes: list[str] = field(default_factory=list)
    license: str | None = None
    terms: tuple[str, ...] = ()
    make_tokenizer: Callable[[], Tokenizer] | None = field(default=None, repr=False)
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.mesh = as_mesh(self.mesh)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Built when first asked for: a large vocabulary takes about a second."""
        if self.make_tokenizer is None:
            raise ModelFileError(f"model {self.name} came without a tokenizer")
        return self.make_tokenizer()
