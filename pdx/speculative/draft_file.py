"""The files that `pdx distill` makes: checkpoints of pdx that draft for a target and are no models of their own.

A draft model has an output head over a small vocabulary, an EAGLE head one layer on the target's hidden states. Both
have a parameter `vocabulary`, the ids of the tokens that they can draft, and no tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pallas_kernels import QuantArray
from pdx.config import ModelConfig
from pdx.errors import ModelFileError, RequestError
from pdx.meshes import as_mesh
from pdx.model import Params, param_specs
from pdx.quant import declared_parts, name_of
from pdx.sharding import ArraySpec, is_spec
from pdx.speculative.eagle import head_config, head_specs
from pdx.weights.checkpoint import CheckpointFile
from pdx.weights.loaded import Model
from pdx.weights.resolve import CHECKPOINT_FILE


def draft_specs(cfg: ModelConfig, vocabulary: int, dtype=jnp.float32) -> Params:
    """Declare the parameters of a draft model that can draft `vocabulary` tokens."""
    head = ArraySpec((vocabulary, cfg.d_model), (None, None), dtype, part="head")
    ids = ArraySpec((vocabulary,), (None,), jnp.int32)
    return param_specs(cfg, dtype) | {"lm_head": head, "vocabulary": ids}


def is_draft_file(path: str | Path) -> bool:
    """Whether a folder holds what `pdx distill` made. A damaged checkpoint is left to `pdx.load` to describe."""
    path = Path(path).expanduser()
    try:
        return (path / CHECKPOINT_FILE).is_file() and "vocabulary" in CheckpointFile(path).names()
    except ModelFileError:
        return False


def load_draft(path: str | Path, kind: str, *, dtype: Any = jnp.float32, mesh: Any = None) -> Model:
    """Load a `draft` or an `eagle` that `pdx distill` made. The config of a head is that of its one layer.

    Args:
      dtype: in which it computes, as the target's.
      mesh: the target's.

    Raises:
      ModelFileError: the folder holds none of this kind.
    """
    mesh = as_mesh(mesh)
    path = Path(path).expanduser()
    file = CheckpointFile(path)
    there = set(file.names())
    if "vocabulary" not in there or ("fc" in there) != (kind == "eagle"):
        raise ModelFileError(f"{path} is no {kind} that `pdx distill` made: name its folder, draft:PATH or eagle:PATH")
    declare = head_specs if kind == "eagle" else draft_specs
    specs = declare(file.config, file.shape("vocabulary")[0], dtype)
    paths, tree = jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_spec)
    leaves = []
    for at, spec in paths:
        name = name_of(at)
        if name not in there or file.shape(name) != spec.shape:
            raise ModelFileError(f"{path}: parameter {name} is missing, or not of shape {list(spec.shape)}")
        read = file.read if file.stored_kind(name) is None else file.read_stored
        leaves.append(_placed(read(name, spec.dtype), spec, mesh))
    return Model(jax.tree.unflatten(tree, leaves), file.config, path.name, path, jnp.dtype(dtype), mesh=mesh)


def _placed(array: Any, spec: ArraySpec, mesh: Mesh | None) -> Any:
    """A parameter on a mesh, or on the default device."""
    if mesh is None:
        return jax.device_put(array)
    specs = declared_parts(array, spec) if isinstance(array, QuantArray) else spec
    return jax.tree.map(lambda s, x: jax.device_put(x, s.sharding(mesh)), specs, array, is_leaf=is_spec)


def check_head(head: Model, target: Model) -> None:
    """Raise RequestError unless an EAGLE head was made for a model of this shape."""
    wanted = head_config(target.config)
    if head.config != wanted:
        raise RequestError(
            f"{head.path} cannot draft for {target.name}: the head was made for another model, "
            f"{head.config.d_model} wide with {head.config.num_heads} heads; this one has {wanted.d_model} and "
            f"{wanted.num_heads}, or differs elsewhere"
        )
