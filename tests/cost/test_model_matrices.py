"""The cost model counts what the model declares: every parameter says which part it is of."""

from dataclasses import replace

import pytest

from pdx.cost.model_matrices import PARTS, VECTORS, declared, matrices
from pdx.cost.planned_layers import Experts, Latent, planned_specs
from pdx.model import param_specs
from tests.support import models

EVERYTHING = replace(
    models.GEMMA, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True, post_norms=True, tie_embeddings=False
)


def test_every_parameter_is_of_a_part():
    specs = planned_specs(EVERYTHING, "float32", Experts(4, 2, 8, d_shared=16, dense_layers=1), Latent(8, 8, 4, 4, 4))
    parts = {name: spec.part for name, spec in declared(specs)}
    assert set(parts.values()) == {*PARTS, *VECTORS}
    assert parts["layers.0.gate_proj"] == parts["layers.1.shared.gate_proj"] == "mlp"
    assert (parts["layers.1.experts.down_proj"], parts["layers.1.experts.down_bias"]) == ("experts", "biases")
    assert "layers.1.gate_bias" not in parts


def test_a_parameter_that_says_no_part_is_named():
    specs = param_specs(models.LLAMA)
    specs["layers"][1]["new_proj"] = replace(specs["layers"][1]["q_proj"], part="")
    with pytest.raises(ValueError, match=r"layers\.1\.new_proj .*''"):
        list(matrices(specs))
    specs["layers"][1]["new_proj"] = specs["layers"][1]["q_proj"]
    assert "layers.1.new_proj" in [m.name for m in matrices(specs)]
