"""A request while its tokens come in: stops, limits, and text that is only shown when it is sure."""

import pytest

from pdx.generation.completion import Row, TokenLogprobs
from pdx.metrics import RequestTiming
from pdx.sampling.options import SamplingOptions


class Letters:
    """Token i is the letter i; 27 is half a character, 28 its other half."""

    def __init__(self):
        self.held = ""

    def push(self, token):
        if token == 27:
            self.held = "é"
            return ""
        text, self.held = (self.held, "") if token == 28 else (chr(97 + token), self.held)
        return text

    def flush(self):
        return self.held


def row(limit=100, ends=(), **options):
    return Row(0, [1, 2], SamplingOptions(max_tokens=limit, **options), Letters(), frozenset(ends))


def feed(r, tokens, now=1.0):
    r.push(tokens, [TokenLogprobs(t, 0.0) for t in tokens], now)
    return r.fresh_text()


def letters(text):
    return [ord(c) - 97 for c in text]


def test_limit_ends_and_drops_what_follows():
    r = row(limit=3)
    assert feed(r, letters("abcde")) == "abc"
    assert (r.finish_reason, r.token_ids) == ("length", letters("abc"))


def test_end_token_counts_but_says_nothing():
    r = row(ends=[25])
    assert feed(r, letters("abzc")) == "ab"
    assert (r.finish_reason, r.token_ids) == ("stop", letters("abz"))


@pytest.mark.parametrize("parts", [["xabcy"], ["xa", "bcy"], ["x", "a", "b", "c", "y"]])
def test_stop_string_across_tokens_is_cut_and_never_shown(parts):
    r = row(stop=("abc",))
    shown = "".join(feed(r, letters(p)) for p in parts)
    assert (shown, r.text, r.finish_reason) == ("x", "x", "stop")
    assert r.token_ids == letters("xabc")


def test_beginning_of_a_stop_string_is_held_back_until_it_is_none():
    r = row(stop=("abc",))
    assert feed(r, letters("xab")) == "x"
    assert feed(r, letters("d")) == "abd"
    assert r.finish_reason is None


def test_the_earliest_of_two_stop_strings_wins():
    r = row(stop=("de", "bcd"))
    feed(r, letters("abcdef"))
    assert r.text == "a"


def test_half_a_character_is_held_until_the_end():
    r = row(limit=2)
    assert feed(r, [0]) == "a"
    assert feed(r, [27]) == "é"  # the limit flushes it
    assert r.finish_reason == "length"


def test_timing_is_of_first_and_last_token():
    r = row(limit=4)
    feed(r, letters("a"), now=0.5)
    feed(r, letters("bcdefg"), now=2.0)
    timing = r.completion(0.25).timing
    assert timing == RequestTiming(4, 0.5, 2.0)
    assert timing.tpot_s == pytest.approx(0.5)
    assert RequestTiming(1, 0.5, 0.5).tpot_s is None
