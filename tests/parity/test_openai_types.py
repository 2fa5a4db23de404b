"""OpenAI's batch rows held to the types that the `openai` package publishes; needs it, a part of the extra `parity`."""

import json
from typing import get_args, get_type_hints

import pytest

from pdx.clients import openai_rows
from pdx.clients.batch_file import Request
from pdx.clients.openai_answers import answer_row
from pdx.generation.completion import Completion, TokenLogprobs
from pdx.metrics import RequestTiming
from pdx.sampling.options import SamplingOptions
from pdx.tokenizer import Tokenizer
from pdx.tokenizer.messages import check_messages, template_messages
from pdx.tokenizer.traits import Traits
from tests.support import tiny_model

pytest.importorskip("openai", reason="the openai package is not installed: pip install 'pdx-inference[parity]'")
pytestmark = pytest.mark.parity


def fields_of(module) -> set[str]:
    """Every field that a request may have, streamed or not."""
    found: set[str] = set()
    for name in ("CompletionCreateParamsBase", "CompletionCreateParamsNonStreaming", "CompletionCreateParamsStreaming"):
        found |= set(getattr(module, name).__annotations__)
    return found


def test_every_field_of_the_api_is_in_the_table():
    from openai.types import completion_create_params
    from openai.types.chat import completion_create_params as chat_create_params

    assert fields_of(chat_create_params) - openai_rows.CHAT.keys() == set()
    assert fields_of(completion_create_params) - openai_rows.COMPLETIONS.keys() == set()


def test_the_endpoints_are_those_of_batches():
    from openai.types import batch_create_params

    hint = get_type_hints(batch_create_params.BatchCreateParams, include_extras=False)["endpoint"]
    assert openai_rows.URLS.keys() <= {*get_args(hint)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_hf_dir(tiny_model.make(tmp_path_factory.mktemp("openai") / "tiny"))


# "é" is two tokens of a byte each, neither of which is text by itself; the last token ends the answer.
LOGPROBS = [
    TokenLogprobs(t, p, ((t, p), (other, -3.0)))
    for t, p, other in [(100, -0.5, 101), (130, -1.0, 131), (131, float("-inf"), 130), (0, -0.25, 5)]
]


@pytest.mark.parametrize("asked", [None, LOGPROBS])
@pytest.mark.parametrize("is_chat", [True, False])
def test_answers_are_what_the_package_reads(tokenizer, is_chat, asked):
    from openai.types import Completion as TextAnswer
    from openai.types.chat import ChatCompletion as ChatAnswer

    prompt = [{"role": "user", "content": "x"}] if is_chat else "x"
    request = Request(2, {"custom_id": "a", "body": {"model": None}}, prompt, SamplingOptions())
    text = tokenizer.decode([t.token_id for t in LOGPROBS])
    done = Completion(0, text, [t.token_id for t in LOGPROBS], 3, "stop", RequestTiming(4, 0.1, 0.2), 0.0, asked)
    row = json.loads(json.dumps(answer_row(request, done, {"ttft_s": 0.1}, tokenizer, "tiny"), allow_nan=False))
    answer = (ChatAnswer if is_chat else TextAnswer).model_validate(row["response"]["body"], strict=True)
    assert (answer.model, answer.usage.total_tokens) == ("tiny", 7)
    logprobs = answer.choices[0].logprobs
    if asked is None:
        assert logprobs is None
    elif is_chat:
        assert b"".join(bytes(t.bytes) for t in logprobs.content[:-1]).decode("utf-8", "replace") == text
        assert [len(t.top_logprobs) for t in logprobs.content] == [2, 2, 2, 2]
        assert logprobs.content[2].logprob == -9999.0
        assert logprobs.content[3].token == "<|end|>"
    else:
        assert logprobs.text_offset[0] == 0
        assert max(logprobs.text_offset) <= len(text)
        assert [len(top) for top in logprobs.top_logprobs] == [2, 2, 2, 2]


def test_every_kind_of_message_is_read():
    """A message of each role, with every field its type has, passes or is refused in words of ours."""
    from openai.types.chat import chat_completion_message_param as params

    from pdx.errors import RequestError

    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    values = {
        "content": "x",
        "name": "n",
        "tool_calls": [call],
        "tool_call_id": "c",
        "refusal": "no",
        "function_call": {"name": "f", "arguments": "{}"},
        "audio": {"id": "a"},
    }
    traits = Traits("{{ messages }}", lambda messages: str(messages))
    for kind in params.ChatCompletionMessageParam.__args__:
        (role,) = get_args(get_type_hints(kind)["role"])
        fields = kind.__annotations__.keys() - {"role"}
        assert fields <= values.keys(), f"{role} messages have a new field: {fields - values.keys()}"
        message = {"role": role} | {name: values[name] for name in fields - {"audio"}}
        assert template_messages([message], traits)
        if "audio" in fields:
            with pytest.raises(RequestError, match="audio"):
                check_messages([message | {"audio": values["audio"]}])


def test_every_kind_of_content_part_is_read_or_refused():
    from openai.types.chat import chat_completion_content_part_param as params

    from pdx.errors import RequestError

    for kind in params.ChatCompletionContentPartParam.__args__:
        (name,) = get_args(get_type_hints(kind)["type"])
        message = {"role": "user", "content": [{"type": name, name: "x"}]}
        if name == "text":
            check_messages([message])
        else:
            with pytest.raises(RequestError, match=r"messages\[0\]\.content\[0\] is an? (image|audio|file)"):
                check_messages([message])
