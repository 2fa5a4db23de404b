"""Rows of OpenAI's batch files: every field is served, refused by name, or of no effect; a bad row fails alone."""

import json

import pytest

from pdx.clients import batch_file, batch_job, openai_rows
from pdx.errors import RequestError
from pdx.sampling.options import SamplingOptions
from tests.support import tiny_model

HELLO = [{"role": "user", "content": "Hello"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def parse(url=CHAT, row=None, **body):
    body = ({"messages": HELLO} if url == CHAT else {"prompt": "Hello"}) | body
    return openai_rows.parse(
        3,
        {"custom_id": "a", "method": "POST", "url": url, "body": body} | (row or {}),
        SamplingOptions(max_tokens=7, top_p=0.5),
    )


@pytest.mark.parametrize("url", [CHAT, TEXT])
def test_null_is_the_default_of_every_field(url):
    table = openai_rows.URLS[url]
    nulls = dict.fromkeys(table.keys() - {"messages", "prompt"})
    request = parse(url, **nulls)
    assert request.options == SamplingOptions(max_tokens=7, top_p=0.5)
    assert request.template == {}
    assert parse(url, **{"no such field": None}).options == request.options


@pytest.mark.parametrize(
    ("url", "body", "wanted"),
    [
        (CHAT, {"max_tokens": 4}, {"max_tokens": 4}),
        (CHAT, {"max_tokens": 4, "max_completion_tokens": 5}, {"max_tokens": 5}),
        (CHAT, {"max_tokens": 4, "max_completion_tokens": None}, {"max_tokens": 4}),
        (CHAT, {"stop": "x"}, {"stop": ("x",)}),
        (CHAT, {"stop": ["x", "y"]}, {"stop": ("x", "y")}),
        (CHAT, {"stop": []}, {"stop": ()}),
        (CHAT, {"logit_bias": {"5": -100}}, {"logit_bias": {5: -100.0}}),
        (CHAT, {"seed": 5}, {"seed": 5}),
        (CHAT, {"seed": -1}, {"seed": 2**64 - 1}),
        (CHAT, {"temperature": 0.5, "top_p": 0.25}, {"temperature": 0.5, "top_p": 0.25}),
        (CHAT, {"presence_penalty": 1, "frequency_penalty": -1}, {"presence_penalty": 1.0, "frequency_penalty": -1.0}),
        (
            CHAT,
            {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True, "stop_token_ids": [3]},
            {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True, "stop_token_ids": (3,)},
        ),
        (CHAT, {"top_k": -1}, {"top_k": 0}),
        (CHAT, {"logprobs": True}, {"logprobs": 0}),
        (CHAT, {"logprobs": True, "top_logprobs": 20}, {"logprobs": 20}),
        (CHAT, {"logprobs": True, "top_logprobs": None}, {"logprobs": 0}),
        (CHAT, {"logprobs": False, "top_logprobs": 0}, {"logprobs": None}),
        (TEXT, {"logprobs": 5}, {"logprobs": 5}),
        (TEXT, {"logprobs": 0}, {"logprobs": 0}),
    ],
)
def test_settings_are_served(url, body, wanted):
    options = parse(url, **body).options
    assert {name: getattr(options, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("url", "body"),
    [
        (CHAT, {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "functions": [], "n": 1}),
        (CHAT, {"function_call": "auto", "modalities": ["text"], "parallel_tool_calls": False, "verbosity": "medium"}),
        (CHAT, {"user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "flex", "safety_identifier": "s"}),
        (
            CHAT,
            {
                "prompt_cache_key": "k",
                "prediction": {"type": "content", "content": "x"},
                "stream": False,
                "stream_options": {"include_usage": True},
            },
        ),
        (TEXT, {"echo": False, "suffix": "", "best_of": 1, "n": 1, "user": "u", "stream": False}),
    ],
)
def test_what_changes_no_answer_is_passed_over(url, body):
    assert parse(url, **body).options == parse(url).options


@pytest.mark.parametrize(
    ("url", "field", "value"),
    [
        (CHAT, "n", 2),
        (CHAT, "n", True),
        (CHAT, "stream", True),
        (CHAT, "tools", [{}]),
        (CHAT, "functions", [{}]),
        (CHAT, "tool_choice", "required"),
        (CHAT, "response_format", {"type": "json_object"}),
        (CHAT, "modalities", ["text", "audio"]),
        (CHAT, "audio", {"voice": "x"}),
        (CHAT, "web_search_options", {}),
        (CHAT, "verbosity", "low"),
        (CHAT, "continue_final_message", True),
        (CHAT, "chat_template", "x"),
        (CHAT, "min_tokens", 2),
        (CHAT, "guided_json", {}),
        (CHAT, "echo", True),
        (CHAT, "moderation", {"model": "m"}),
        (CHAT, "logprobs", 3),
        (CHAT, "top_logprobs", 2),
        (CHAT, "temperature", "hot"),
        (CHAT, "stop", ""),
        (CHAT, "max_tokens", 0),
        (CHAT, "chat_template_kwargs", []),
        (CHAT, "chat_template_kwargs", {"messages": []}),
        (CHAT, "add_generation_prompt", "yes"),
        (CHAT, "model", 5),
        (CHAT, "prompt", "x"),
        (CHAT, "temprature", 1),
        (CHAT, "messages", None),
        (CHAT, "messages", "Hello"),
        (CHAT, "messages", []),
        (CHAT, "seed", 1.5),
        (TEXT, "echo", True),
        (TEXT, "suffix", "x"),
        (TEXT, "best_of", 2),
        (TEXT, "logprobs", True),
        (TEXT, "logprobs", 21),
        (TEXT, "top_logprobs", 2),
        (TEXT, "prompt", ["a", "b"]),
        (TEXT, "prompt", []),
        (TEXT, "prompt", None),
        (TEXT, "prompt", [[1], [2]]),
        (TEXT, "prompt", [1, "a"]),
        (TEXT, "prompt", [True]),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(url, field, value):
    with pytest.raises(RequestError, match=field):
        parse(url, **{field: value})
    if field == "top_logprobs" and url == CHAT:
        with pytest.raises(RequestError, match="from 0 to 20"):
            parse(url, logprobs=True, top_logprobs=21)


def test_hints_say_what_was_meant():
    with pytest.raises(RequestError, match="did you mean temperature"):
        parse(temprature=1)
    with pytest.raises(RequestError, match="belongs to /v1/chat/completions"):
        parse(TEXT, top_logprobs=2)


@pytest.mark.parametrize("prompt", ["Hello", ["Hello"], [5, 6], [[5, 6]]])
def test_one_prompt_of_any_kind_is_taken(prompt):
    assert parse(TEXT, prompt=prompt).prompt == ("Hello" if "Hello" in prompt else [5, 6])


def test_what_a_template_is_given():
    thinks = {"enable_thinking": False}
    request = parse(chat_template_kwargs=thinks, reasoning_effort="low", add_generation_prompt=False)
    assert request.template == {"enable_thinking": False, "reasoning_effort": "low", "add_generation_prompt": False}
    assert parse(add_generation_prompt=True).template == {}
    with pytest.raises(RequestError, match="reasoning_effort is also in chat_template_kwargs"):
        parse(chat_template_kwargs={"reasoning_effort": "low"}, reasoning_effort="low")


VALUES = [True, 0, -1, 1.5, 1e400, float("nan"), 10**400, "", "x", [], [None], ["x"], [[1]], {}, {"a": None}]


@pytest.mark.parametrize("url", [CHAT, TEXT])
def test_no_value_of_a_field_is_more_than_an_error_of_its_row(url):
    refused = []
    for field in [*openai_rows.URLS[url], "", "custom_id", "url", "method", "body"]:
        for value in VALUES:
            of_row = field in ("custom_id", "url", "method", "body")
            try:
                parse(url, row={field: value}) if of_row else parse(url, **{field: value})
            except RequestError as error:
                refused.append(str(error))
    assert len(refused) > 100
    assert all(refused)


def read(tmp_path, *rows):
    source = tmp_path / "in.jsonl"
    source.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return batch_job.read(source, SamplingOptions())


def test_the_envelope_of_a_row(tmp_path):
    body = {"messages": HELLO}
    rows = [
        {"custom_id": "a", "body": body},
        {"custom_id": "b", "url": None, "method": None, "body": {"prompt": "x"}},
        {"custom_id": "c", "url": "/v1/responses", "body": body},
        {"custom_id": 4, "body": body},
        {"custom_id": "e", "body": None},
        {"custom_id": "f", "url": CHAT},
        {"body": body},
        [],
        7,
        {"custom_id": "g", "method": "GET", "body": body},
    ]
    requests = read(tmp_path, *rows)
    assert [r.line for r in requests if r.error] == [3, 4, 5, 6, 7, 8, 9, 10]
    assert "/v1/completions" in str(requests[2].error)
    assert "custom_id" in str(requests[3].error)


def test_rows_that_no_answer_can_name_are_refused_with_their_lines(tmp_path):
    with pytest.raises(RequestError, match="line 2 is not JSON"):
        read(tmp_path, {"prompt": "x"}, '{"prompt": "x"')
    row = {"custom_id": "a", "body": {"messages": HELLO}}
    with pytest.raises(RequestError, match=r"line 3: custom_id 'a' is also in line 1"):  # elsewhere the job never ends
        read(tmp_path, row, row | {"custom_id": "b"}, row)


def test_half_a_surrogate_pair_fails_its_row_and_the_answer_can_be_written(tmp_path):
    half = {"custom_id": "b\ud83d", "body": {"messages": [{"role": "user", "content": "cut \ud83d"}]}}
    well = {"custom_id": "a", "body": {"messages": [{"role": "user", "content": "whole \ud83d\ude00"}]}}
    good, bad, plain = read(tmp_path, well, half, {"prompt": "\ud83d", "mine": 1})
    assert good.error is None
    assert good.prompt[0]["content"] == "whole \U0001f600"
    for request in (bad, plain):
        assert "half a surrogate pair" in str(request.error)
        json.dumps(request.row, ensure_ascii=False).encode()
    assert plain.row == {"prompt": "?", "mine": 1}


def test_the_note_names_only_what_is_passed_over(tmp_path):
    from pdx.clients.batch_file import ignored_names

    class Model:
        class tokenizer:
            template_names = frozenset({"enable_thinking"})

    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "reasoning_effort": "low",
        "chat_template_kwargs": {"other": 1, "enable_thinkng": 1},
    }
    assert ignored_names(Model, read(tmp_path, {"custom_id": "a", "body": body})) == ["other"]


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("temprature", "temperature"),
        ("Temperature", "temperature"),
        ("maxTokens", "max_tokens"),
        ("top-p", "top_p"),
        ("max_new_tokens", "max_tokens"),
        ("max_completion_tokens", "max_tokens"),
        ("repeat_penalty", "repetition_penalty"),
        ("stop_sequences", "stop"),
        ("logprob", "logprobs"),
        ("topk", "top_k"),
        ("do_sample", "temperature"),
        ("ignore_EOS", "ignore_eos"),
        ("n", "no setting of pdx"),
        ("response_format", "no setting of pdx"),
    ],
)
def test_a_misspelt_setting_of_a_plain_row_is_refused_with_the_right_name(tmp_path, key, name):
    (request,) = read(tmp_path, {"prompt": "x", key: 5})
    with pytest.raises(RequestError, match=f"line 1: '{key}' is no setting.*{name}" if "no" not in name else name):
        raise request.error


def test_openai_rows_are_not_for_generate(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"custom_id": "a", "body": {"prompt": "x"}}))
    with pytest.raises(RequestError, match=r"line 1: .*OpenAI's batch format"):
        batch_file.read(source, SamplingOptions())


def test_keys_of_ones_own_and_nulls_stay(tmp_path):
    own = {
        "id": 1,
        "tag": "a",
        "topic": "b",
        "source": "c",
        "token_ids": [1],
        "prompt_tokens": 3,
        "step": 4,
        "user": 2,
        "metadata": {},
        "label": 1,
        "text": "",
        "seed": None,
        "temperature": None,
        "messages": None,
        "n": 1,
    }
    (request,) = read(tmp_path, {"prompt": "x", **own})
    assert request.error is None
    assert request.options == SamplingOptions()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tiny_model.make(tmp_path_factory.mktemp("rows") / "tiny")
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["chat_template"] += "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_a_file_of_all_kinds_is_answered_row_by_row(directory, tmp_path):
    from typer.testing import CliRunner

    from pdx.cli import app

    def row(name, url=CHAT, **body):
        start = {"messages": HELLO} if url == CHAT else {"prompt": "Hello"}
        return {"custom_id": name, "url": url, "body": start | {"max_tokens": 3, "ignore_eos": True} | body}

    rows = [
        row("plain"),
        row("thinks", chat_template_kwargs={"enable_thinking": False}),
        row("two", n=2),
        row("kwarg", chat_template_kwargs={"enable_thinkin": 1}),
        row("effort", reasoning_effort="low"),
        row("top", logprobs=True, top_logprobs=4),
        row("text", TEXT, logprobs=2),
        row("ids", TEXT, prompt=[5, 6]),
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    settings = ("-m", str(directory), "--slots", "2", "--token-budget", "16")
    done = CliRunner().invoke(app, ["batch", str(source), str(target), *settings])
    assert "3 of 8 requests failed" in str(done.exception)
    answers = {a["custom_id"]: a for a in map(json.loads, target.read_text("utf-8").splitlines())}
    errors = {name: a["error"] for name, a in answers.items() if a["error"]}
    assert {name: e["line"] for name, e in errors.items()} == {"two": 3, "kwarg": 4, "effort": 5}
    assert errors["two"]["message"].startswith("n is not supported")
    assert "did you mean enable_thinking" in errors["kwarg"]["message"]
    bodies = {name: a["response"]["body"] for name, a in answers.items() if not a["error"]}
    used = {name: body["usage"]["prompt_tokens"] for name, body in bodies.items()}
    assert used["thinks"] == used["plain"] + len("<think></think>")
    assert used["ids"] == 2
    chosen = bodies["top"]["choices"][0]["logprobs"]["content"]
    assert [len(c["top_logprobs"]) for c in chosen] == [4, 4, 4]
    assert chosen[0]["top_logprobs"][0]["logprob"] == chosen[0]["logprob"]
    assert bodies["plain"]["choices"][0]["logprobs"] is None
    lists = bodies["text"]["choices"][0]["logprobs"]
    assert {name: len(x) for name, x in lists.items()} == dict.fromkeys(
        ("tokens", "token_logprobs", "top_logprobs", "text_offset"), 3
    )
