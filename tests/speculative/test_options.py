"""How speculation is asked for."""

import pytest

from pdx.errors import RequestError
from pdx.speculative.options import Speculation, asked


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("ngram", Speculation("ngram")),
        ("self:4", Speculation("self", layers=4)),
        ("draft:some/model:8bit", Speculation("draft", model="some/model:8bit")),
        ("synthetic:0.8", Speculation("synthetic", acceptance=0.8)),
        ("draft", Speculation("draft")),
        ("eagle", Speculation("eagle")),
        ("eagle:some/folder", Speculation("eagle", model="some/folder")),
        ("none", None),
    ],
)
def test_texts(text, made):
    assert Speculation.parse(text) == made


def test_draft_lengths():
    assert Speculation.parse("ngram", "5").draft_length == 5
    assert asked("ngram", 3).draft_length == 3
    assert asked(None) is asked("none") is None
    given = Speculation("ngram", 4)
    assert asked(given) is given


@pytest.mark.parametrize(
    ("text", "length", "says"),
    [
        ("medusa", "auto", "'medusa' is not one of"),
        ("", "auto", "is not one of"),
        ("ngram:3", "auto", "is not one of"),
        ("self", "auto", "needs layers"),
        ("self:x", "auto", "'x' is not a number"),
        ("self:0", "auto", "layers"),
        ("synthetic:2", "auto", "acceptance"),
        ("synthetic:x", "auto", "'x' is not a number"),
        ("synthetic:nan", "auto", "acceptance"),
        ("ngram", "x", "draft_length"),
        ("ngram", "0", "draft_length"),
        ("ngram", 16, "draft_length"),
        ("none", 3, "no effect"),
        (None, 3, "no effect"),
        (7, "auto", "speculate is 7"),
        (Speculation("ngram"), 3, "of its own"),
    ],
)
def test_what_makes_no_sense_is_refused(text, length, says):
    with pytest.raises(RequestError, match=says):
        asked(text, length)


@pytest.mark.parametrize("extra", [{"layers": 3}, {"model": "x"}, {"acceptance": 0.5}])
def test_settings_of_another_proposer_are_refused(extra):
    with pytest.raises(RequestError, match="does not belong"):
        Speculation("ngram", **extra)
