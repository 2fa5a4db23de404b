"""Stop strings: which of several counts, and a stream that shows the final text and never more."""

import random

import pytest

from pdx.generation.completion import Row, TokenLogprobs, first_stop
from pdx.sampling.options import SamplingOptions


class Pieces:
    """A decoder whose token i is the i-th piece of a text. A piece that ends in `~` is held until the next one."""

    def __init__(self, pieces):
        self.pieces, self.held = pieces, ""

    def push(self, token):
        text, self.held = self.held + self.pieces[token], ""
        if text.endswith("~"):
            self.held, text = text[:-1], ""
        return text

    def flush(self):
        return self.held


def said(pieces, stops, *, at_once=1, ends=()):
    """The final text, what a stream showed, and how it ended, for tokens that come `at_once` at a time."""
    row = Row(0, [1], SamplingOptions(max_tokens=len(pieces), stop=stops), Pieces(pieces), frozenset(ends))
    shown = []
    for at in range(0, len(pieces), at_once):
        if row.finish_reason:
            break
        tokens = list(range(at, min(at + at_once, len(pieces))))
        row.push(tokens, [TokenLogprobs(t, 0.0) for t in tokens], 0.0)
        shown.append(row.fresh_text())
    return row.text, "".join(shown), row.finish_reason


def by_hand(text, stops):
    """Read a character at a time: the first stop string that is complete ends the text before it."""
    for end in range(len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return text[: end - len(stop)]
    return text


@pytest.mark.parametrize("stops", [("lo", "ell"), ("ell", "lo")])
@pytest.mark.parametrize("pieces", [["hello"], ["hel", "lo"], ["h", "e", "l", "l", "o"]], ids=str)
def test_the_stop_string_that_is_complete_first_in_the_text_counts(pieces, stops):
    assert said(pieces, stops) == ("h", "h", "stop")


@pytest.mark.parametrize(("stops", "text"), [(("lo", "ello"), "hel"), (("ello", "lo"), "h")])
def test_of_two_that_are_complete_at_once_the_first_in_the_list_counts(stops, text):
    assert said(["hello"], stops) == (text, text, "stop")
    assert said(list("hello"), stops) == (text, text, "stop")


def test_a_stop_string_inside_another_counts_before_it():
    assert said(["xabcabd"], ("abcab", "ca")) == ("xab", "xab", "stop")
    assert first_stop("none here", ("x", "hey")) is None


def test_the_flushed_end_of_the_text_may_complete_several():
    assert said(["he", "llo~"], ("lo", "ell")) == ("h", "h", "stop")


@pytest.mark.parametrize("seed", range(40))
def test_any_stops_and_any_tokens_give_what_the_text_says(seed):
    rng = random.Random(seed)
    for _ in range(50):
        text = "".join(rng.choice("ab") for _ in range(rng.randint(1, 14)))
        stops = tuple("".join(rng.choice("ab") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 3)))
        cuts = sorted(rng.sample(range(1, len(text)), rng.randint(0, len(text) - 1))) if len(text) > 1 else []
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        expected = by_hand(text, stops)
        found, shown, reason = said(pieces, stops, at_once=rng.randint(1, 3))
        assert (found, shown) == (expected, expected), (pieces, stops)
        assert reason == ("stop" if any(s in text for s in stops) else "length")


def test_an_end_without_a_stop_shows_what_was_held_back_for_one():
    # llama.cpp 9867: the stream kept the last characters to itself, since they might have begun a stop string.
    assert said(["so, what", " now?", "end"], ("?\n",), ends=[2]) == ("so, what now?", "so, what now?", "stop")
    assert said(["so, what", " now?"], ("?\n",)) == ("so, what now?", "so, what now?", "length")


def test_tokens_behind_a_stop_never_reach_the_text():
    # vmlx-swift 109: tokens that were decoded before the stop took effect were flushed behind it.
    assert said(["one, ", "five", ", six~", "seven"], ("five",), at_once=4) == ("one, ", "one, ", "stop")
