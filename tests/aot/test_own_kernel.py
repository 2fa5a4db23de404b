"""The kernel of one's own that docs/compare.md shows, compiled for a TPU and a GPU that are not here."""

import pytest

from pallas_kernels.analysis import static, targets
from tests.support import own_kernel

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("target", ["v5e", "h100"])
def test_smoke_the_documents_kernel_compiles(target, monkeypatch, tmp_path):
    if why := targets.missing(target):
        pytest.skip(why)
    own_kernel.module(monkeypatch, tmp_path)
    (row,) = static.table("decode_attention", target, "Llama 3 8B, bf16", exact=True, own="my_kernel:decode")
    assert "error" not in row, row
    assert row["pallas_calls"] == 1
    assert row["moved"] == []
    assert 1 <= static.ratios(row)["moved"] < 1.1
    assert not any(kernel["spill_bytes"] for kernel in row["kernels"])
