"""Templates that ask for too much, escape or break: one sentence, in bounded time and memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from pdx.errors import ModelFileError, RequestError
from pdx.tokenizer import Tokenizer
from pdx.tokenizer.render import Renderer
from tests.support.tokenizer_fixtures import CHATML, byte_level_metadata

USER = {"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": True}


@pytest.fixture(scope="module")
def renderer():
    # Elapsed time must not stop a template here: on a busy machine a second of processor time takes minutes.
    renderer = Renderer(seconds=1, memory_bytes=1 << 28, wall_seconds=3600)
    yield renderer
    renderer.close()


MUCH = {
    "a string": "{{ 'a' * 10**11 }}",
    "doubling": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "a doubled list": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a doubling block": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set y %}{{ ns.x }}{{ ns.x }}"
    "{% endset %}{% set ns.x = y %}{% endfor %}",
    "a width": "{{ '%999999999d' % 3 }}{{ '{:>999999999}'.format(3) }}",
    "center": "{{ 'a' | center(10**9) }}",
    "indent": "{{ messages | tojson(indent=10**9) }}",
    "replace": "{{ ('a' * 100000) | replace('a', 'a' * 100000) }}",
    "translate": "{{ 'a'.translate({97: 'b' * 10**9}) }}",
    "fill": "{{ range(3) | batch(10**9, 'x') | list }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ 9**(9**9) }}",
    "output": "{% for a in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "lorem ipsum": "{{ lipsum(10**6) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursion by blocks": "{% block a %}{{ self.a() }}{% endblock %}",
    "a recursive loop": "{% for i in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "nesting": "{% if 1 %}" * 3000 + "x" + "{% endif %}" * 3000,
    "brackets": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "a deep value": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}"
    "{{ ns.x | tojson }}",
}


@pytest.mark.parametrize("what", MUCH)
def test_a_template_that_asks_for_too_much_is_stopped(what, renderer):
    with pytest.raises(ModelFileError, match=r"^model: the chat template was stopped: it [^\n]*$") as caught:
        renderer.render(MUCH[what], USER, "model")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("template", "error", "says"),
    [
        ("{% include 'x' %}", ModelFileError, "asks for another template, x"),
        ("{% import 'x' as y %}", ModelFileError, "asks for another template"),
        ("{% extends 'x' %}", ModelFileError, "asks for another template"),
        ("{% for %}", ModelFileError, "line 1 of the chat template is not jinja2"),
        ("a\n{{ x | nosuch }}", ModelFileError, "line 2 of the chat template is not jinja2: No filter named 'nosuch'"),
        ("\0{{", ModelFileError, "is not jinja2"),
        ("{{ messages.append(1) }}", ModelFileError, "sandbox forbids"),
        ("{{ raise_exception('a' * 10**7) }}", RequestError, r"refuses these messages: a{500} \.\.\."),
        ("{{ raise_exception(none) }}", RequestError, "refuses these messages: None"),
        ("{{ raise_exception('no\n tools') }}", RequestError, r"refuses these messages: no tools\."),
        ("{{ range(10**9) }}", RequestError, "Range too big"),
        ("{% include messages %}", RequestError, "refuses these messages"),
    ],
)
def test_a_template_that_breaks_says_why(template, error, says, renderer):
    with pytest.raises(error, match=says):
        renderer.render(template, USER, "model")


def test_after_a_stopped_template_others_work_and_it_is_not_run_again(renderer):
    for _ in range(2):
        with pytest.raises(ModelFileError, match="stopped"):
            renderer.render(MUCH["loops"], USER, "model")
        assert renderer.render(CHATML, USER, "model").startswith("<|im_start|>user\nHi")
    process = renderer._process
    with pytest.raises(ModelFileError, match="stopped"):
        renderer.render(MUCH["loops"], USER, "model")
    assert renderer._process is process


def test_a_process_that_is_ended_from_outside_condemns_no_template(renderer):
    template = "{% for a in range(99999) %}{% for b in range(900) %}{% endfor %}{% endfor %}x"
    renderer.render("x", USER, "model")
    process = renderer._process
    stdout = process.stdout

    class Killing:
        """Ends the process once it has the request and its reply is waited for."""

        def readline(self):
            process.kill()
            return stdout.readline()

        def close(self):
            stdout.close()

    process.stdout = Killing()
    with pytest.raises(ModelFileError, match=r"its process ended \(code -9\)"):
        renderer.render(template, USER, "model")
    assert template not in renderer._stopped


def test_a_large_chat_is_no_hostile_one(renderer):
    words = "word " * 400_000
    prompt = renderer.render(CHATML, USER | {"messages": [{"role": "user", "content": words}]}, "model")
    assert words in prompt


def test_messages_nested_too_deeply_are_named():
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    metadata = byte_level_metadata("smollm") | {"tokenizer.chat_template": "{{ messages[0].content }}"}
    with pytest.raises(RequestError, match=r"nested too deeply|cannot be given to a chat template"):
        Tokenizer.from_gguf(metadata).encode_chat([{"role": "user", "content": nested}])


def test_the_process_survives_ctrl_c_threads_and_its_own_death(renderer):
    renderer.render("x", USER, "model")
    os.kill(renderer._process.pid, signal.SIGKILL)
    renderer._process.wait()
    with ThreadPoolExecutor(4) as pool:
        texts = list(
            pool.map(
                lambda i: renderer.render("{{ messages[0].content }}", {"messages": [{"content": str(i)}]}, "model"),
                range(200),
            )
        )
    assert texts == [str(i) for i in range(200)]


def test_the_process_ends_with_its_owner():
    script = (
        "from pdx.tokenizer import render; render.render('x', {}, 'm'); "
        "print(render._default._process.pid, flush=True); import os; os._exit(0)"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    pid = int(shown.stdout)
    for _ in range(200):
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat", encoding="ascii") as file:
                if file.read().split()[2] == "Z":
                    return
        except (ProcessLookupError, FileNotFoundError):
            return
        subprocess.run(["sleep", "0.05"], check=True)
    pytest.fail("the rendering process outlives its owner")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_renders_whatever_the_parents_threads_do():
    script = """
import os, signal
from pdx.tokenizer import render
render.render("x", {}, "m")
render._default._lock.acquire()  # as a thread has it in the middle of a rendering
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(0 if render.render("{{ y }}", {"y": "child"}, "m") == "child" else 1)
ended = os.waitpid(child, 0)[1]
render._default._lock.release()
print(ended, render.render("{{ y }}", {"y": "parent"}, "m"))
"""
    shown = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout == "0 parent\n"


def test_a_python_that_greets_and_a_folder_that_is_gone_do_not_matter(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("print('hello from the machine')")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path, "no.path.but.a.finder"])
    renderer = Renderer()
    assert renderer.render("{{ y }}", {"y": "well"}, "m") == "well"
    renderer.close()


def test_no_python_to_start_says_what_to_do(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(RequestError, match=r"in a separate process.*give the prompt as text"):
        Renderer().render("x", {}, "model")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RequestError, match="does not start"):
        Renderer().render("x", {}, "model")
