"""`pdx chat`: turns, what is prefilled anew, and the commands."""

import io

import pytest

import pdx
from pdx.clients.chat import Chat, converse, turn_summary
from pdx.errors import ContextLengthError
from pdx.sampling.options import SamplingOptions
from tests.support import tiny_model


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    model = pdx.load(str(tiny_model.make(tmp_path_factory.mktemp("chat") / "tiny")))
    with pdx.Engine(model, pdx.EngineConfig(slots=1, prefill_rows=1, token_budget=16, page_size=8)) as engine:
        yield engine


def chat(engine, max_tokens=8, system=None, **options):
    return Chat(engine, SamplingOptions(max_tokens=max_tokens, ignore_eos=True, **options), system)


def test_turns_build_on_each_other_and_only_new_tokens_are_prefilled(engine):
    talk = chat(engine, system="You are brief, and you count your words before you speak.")
    first = talk.say("Hello there")
    second = talk.say("And again")
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert second.timing.hit_tokens >= first.prompt_tokens - 1, "the whole first turn lies in the cache"
    fresh = second.prompt_tokens - second.timing.hit_tokens
    assert f"prefilled {fresh} new of {second.prompt_tokens} tokens" in turn_summary(second)
    alone = pdx.generate(engine.model, [talk.messages[:4]], max_tokens=8, ignore_eos=True)[0]
    assert second.token_ids == alone.token_ids


def test_the_text_is_shown_as_it_comes_and_said_apart_from_what_it_took(engine):
    out, err = io.StringIO(), io.StringIO()
    talk = chat(engine)
    converse(talk, ["", "Hi", "/what", "/reset", "Hi", "/exit", "never"], out, err)
    first, second = out.getvalue().splitlines()
    assert first == second, "behind a reset the same question has the same answer"
    assert len(talk.messages) == 2
    assert err.getvalue().count("prefilled") == 2
    assert err.getvalue().count("/reset forgets") == 2


def test_an_answer_is_cut_to_what_the_context_holds_and_a_full_one_is_refused(engine):
    talk = chat(engine, max_tokens=500)
    done = talk.say("x" * 300)
    assert (done.finish_reason, done.prompt_tokens + done.completion_tokens) == ("length", 512)
    before = list(talk.messages)
    with pytest.raises(ContextLengthError, match="/reset"):
        talk.say("more")
    assert talk.messages == before
    err = io.StringIO()
    converse(talk, ["more", "/reset", "Hi"], io.StringIO(), err)
    assert "error: the conversation has" in err.getvalue()
    assert len(talk.messages) == 2


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(engine):
    talk, seen = chat(engine, max_tokens=400), []

    def show(piece):
        seen.append(piece)
        if len(seen) == 3:
            raise KeyboardInterrupt

    done = talk.say("Tell me all", show)
    assert done.finish_reason == "cancelled"
    assert 3 <= done.completion_tokens < 400
    assert talk.messages[-1]["content"] == done.text
    assert talk.say("Go on").completion_tokens > 0
