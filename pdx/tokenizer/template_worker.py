"""Renders chat templates in a separate process, whose memory and processor time the operating system limits.

`render.py` runs this file as a script; it imports nothing of pdx. Requests and replies are one JSON object a line:

    {"template": source, "variables": {...}, "seconds": 5, "max_characters": 100000}
    {"text": prompt}  or  {"kind": "syntax" | "sandbox" | "refused" | "limit", "message": why}

A template comes with a model and is not trusted: it runs in jinja2's immutable sandbox and sees JSON values only.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; for a prompt its body is simply kept."""

    tags = {"generation"}  # noqa: RUF012  (its base class declares a set)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@lru_cache(maxsize=16)
def compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        # No template can be included. An empty loader, unlike none, makes an error that names the missing template.
        loader=jinja2.DictLoader({}),
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, loopcontrols],
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(source)


def render(template: str, variables: dict[str, Any], max_characters: int) -> dict[str, str]:
    """The reply to one request. An error of the template is a reply too."""
    try:
        text = compiled(template).render(variables)
    except (MemoryError, RecursionError) as error:
        what = "more memory" if isinstance(error, MemoryError) else "deeper recursion or nesting"
        return {"kind": "limit", "message": f"it asks for {what} than a chat template may have"}
    except jinja2.TemplateNotFound as error:
        return {"kind": "sandbox", "message": f"it asks for another template, {error}; it has to stand by itself"}
    except jinja2.TemplateSyntaxError as error:
        return {"kind": "syntax", "message": f"line {error.lineno} of the chat template is not jinja2: {error.message}"}
    except SyntaxError as error:  # the Python code that jinja2 generates is too deeply nested
        return {"kind": "limit", "message": f"it cannot be compiled ({error.msg})"}
    except jinja2.exceptions.SecurityError as error:
        return {"kind": "sandbox", "message": f"it does what its sandbox forbids: {error}"}
    except Exception as error:  # an error of the template must not end this process
        return {"kind": "refused", "message": str(error) or type(error).__name__}
    if len(text) > max_characters:
        return {
            "kind": "limit",
            "message": f"it makes {len(text):,} characters from messages for which {max_characters:,} are allowed",
        }
    return {"text": text}


def limit_memory(memory_bytes: int) -> None:
    """Limit the memory that this process may allocate from now on. No effect where the system has no such limit."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open("/proc/self/statm", encoding="ascii") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + memory_bytes, held + memory_bytes))


def limit_cpu_time(seconds: float) -> None:
    """Let the system end this process after this much more processor time. No effect where it has no such limit."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds) + 1, hard))


def main(memory_bytes: int) -> None:
    limit_memory(memory_bytes)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        limit_cpu_time(request["seconds"])
        reply = render(request["template"], request["variables"], request["max_characters"])
        if "message" in reply:  # one short line
            message = " ".join(reply["message"].split())
            reply["message"] = message if len(message) <= 500 else message[:500] + " ..."
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
