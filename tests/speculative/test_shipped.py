"""The drafts that come with pdx: they are small, whole and described; a target without one is told what there is."""

import numpy as np
import pytest

import pdx
from pdx.errors import RequestError
from pdx.speculative import shipped
from pdx.speculative.draft_file import load_draft
from tests.support import tiny_model

KINDS = [(target, kind) for target, kinds in shipped.names().items() for kind in kinds]
MOST_BYTES = 20e6


def test_there_are_some():
    assert KINDS


@pytest.mark.parametrize(("target", "kind"), KINDS)
def test_it_is_small_and_described(target, kind):
    folder = shipped.find(target, kind)
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < MOST_BYTES
    card = (folder / "README.md").read_text(encoding="utf-8")
    for text in (target, "pdx distill", "Held-out", "| kept |", "steps"):
        assert text in card


@pytest.mark.parametrize(("target", "kind"), KINDS)
def test_it_loads_and_all_of_its_numbers_are_finite(target, kind):
    draft = load_draft(shipped.find(target, kind), kind)
    vocabulary = np.asarray(draft.params["vocabulary"])
    assert (np.diff(vocabulary) > 0).all()
    assert 0 <= vocabulary[0] <= vocabulary[-1] < draft.config.vocab_size
    assert draft.params["lm_head"].shape == (len(vocabulary), draft.config.d_model)
    for x in (draft.params["lm_head"].scales, draft.params["layers"][0]["q_proj"].scales):
        assert np.isfinite(x).all()
    assert draft.params["lm_head"].bits == 8


@pytest.mark.parametrize("kind", ["draft", "eagle"])
def test_a_target_without_one_is_told_what_there_is(tmp_path, kind):
    model = pdx.load(tiny_model.make(tmp_path / "mine"))
    with pytest.raises(RequestError, match=f"none comes with pdx for .*smollm2-135m-instruct: draft.*{kind}:PATH"):
        pdx.generate(model, "a", max_tokens=2, speculate=kind)
