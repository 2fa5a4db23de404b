"""Log-probabilities in OpenAI's shapes: part of a character keeps its bytes, and tokens of one text stay apart."""

import json

import pytest

from pdx.clients.batch_file import Request
from pdx.clients.openai_answers import answer_row, error_row
from pdx.generation.completion import Completion, TokenLogprobs
from pdx.metrics import RequestTiming
from pdx.sampling.options import SamplingOptions
from pdx.tokenizer import Tokenizer
from tests.support import tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_hf_dir(tiny_model.make(tmp_path_factory.mktemp("answers") / "tiny"))


def choice(tokenizer, logprobs, text, *, is_chat):
    prompt = [{"role": "user", "content": "x"}] if is_chat else "x"
    request = Request(2, {"custom_id": "a", "body": {}}, prompt, SamplingOptions())
    done = Completion(0, text, [t.token_id for t in logprobs], 1, "stop", RequestTiming(1, 0.1, 0.1), 0.0, logprobs)
    return answer_row(request, done, {}, tokenizer, "m")["response"]["body"]["choices"][0]


def tokens(tokenizer, text):
    ids = tokenizer.encode(text)
    return [TokenLogprobs(i, -1.0, ((i, -1.0),)) for i in ids]


def test_part_of_a_character_keeps_its_bytes(tokenizer):
    """Servers of others give U+FFFD and its bytes, so that the character is lost."""
    smile = "a\N{SMILING FACE WITH SUNGLASSES}"
    content = choice(tokenizer, tokens(tokenizer, smile), smile, is_chat=True)["logprobs"]["content"]
    assert bytes(b for entry in content for b in entry["bytes"]).decode() == smile
    assert [entry["token"] for entry in content] == ["a", *"\ufffd" * 4]
    lists = choice(tokenizer, tokens(tokenizer, smile), smile, is_chat=False)["logprobs"]
    assert lists["tokens"] == ["a", r"bytes:\xf0", r"bytes:\x9f", r"bytes:\x98", r"bytes:\x8e"]
    assert lists["text_offset"] == [0, 1, 1, 1, 1]


def test_alternatives_of_one_text_stay_apart(tokenizer, monkeypatch):
    """A dict by text would keep one of them, and the worse one."""
    (a, b, c) = tokenizer.encode("abc")
    monkeypatch.setattr(Tokenizer, "token_bytes", lambda self, i: b"same" if i in (a, b) else b"c")
    given = [TokenLogprobs(c, -3.0, ((a, -0.5), (b, -1.0)))]
    lists = choice(tokenizer, given, "c", is_chat=False)["logprobs"]
    assert lists["top_logprobs"] == [{"same": -0.5, f"token_id:{b}": -1.0, "c": -3.0}]


def test_offsets_stay_in_a_text_that_a_stop_string_cut(tokenizer):
    lists = choice(tokenizer, tokens(tokenizer, "hello"), "he", is_chat=False)["logprobs"]
    assert lists["text_offset"] == [0, 1, 2, 2, 2]


def test_no_infinity_reaches_the_file(tokenizer):
    given = [TokenLogprobs(5, float("-inf"), ((5, float("-inf")),))]
    for is_chat in (True, False):
        text = json.dumps(choice(tokenizer, given, "x", is_chat=is_chat), allow_nan=False)
        assert "-9999.0" in text


def test_an_error_says_which_row_it_is_of():
    row = error_row(Request(4, {"custom_id": "a"}, None, SamplingOptions()), ValueError("broken"))
    assert row["custom_id"] == "a"
    assert row["error"] == {"code": "ValueError", "message": "broken", "line": 4}
    assert error_row(Request(4, {"body": {}}, None, SamplingOptions()), ValueError("x"))["custom_id"] is None
