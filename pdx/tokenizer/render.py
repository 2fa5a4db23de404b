"""Rendering chat templates in a separate process with limits. It is started on first use and kept.

A template is an untrusted program that comes with a model. jinja2's sandbox blocks access to files and Python, but not
`'a' * 10**10` or endless loops. Only the operating system can stop those (`template_worker.py`).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any, cast

from pdx.errors import ModelFileError, RequestError

_WORKER = Path(__file__).with_name("template_worker.py")
_SMALL = 1_000_000  # characters of messages and tools that every template must be able to render
_WALL_SECONDS = 60.0  # for systems without a limit on processor time, and for a process that hangs


class Renderer:
    """Renders templates, one at a time. Threads may share one.

    Args:
      seconds: processor time for one rendering, including the template's compilation.
      memory_bytes: the most memory of the process beyond that of an empty interpreter.
      wall_seconds: elapsed time after which a rendering is ended, whatever processor time it had.
    """

    def __init__(self, seconds: float = 5.0, memory_bytes: int = 1 << 29, wall_seconds: float = _WALL_SECONDS):
        self._seconds, self._memory, self._wall = seconds, memory_bytes, wall_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped: dict[str, str] = {}
        if hasattr(os, "register_at_fork"):
            after_fork = weakref.WeakMethod(self._after_fork)
            os.register_at_fork(after_in_child=lambda: (forget := after_fork()) and forget())

    def render(self, template: str, variables: Mapping[str, Any], source: str) -> str:
        """The template's text for these JSON values. `source` names the model in errors.

        Raises RequestError for messages that the template refuses, ModelFileError for a template that is not jinja2,
        tries to leave the sandbox, or exceeds the limits on time, memory or text.
        """
        try:
            values = json.dumps(variables)
        except (ValueError, TypeError, RecursionError) as error:
            raise RequestError(f"the messages or tools cannot be given to a chat template ({error})") from error
        request = json.dumps(
            {
                "template": template,
                "seconds": self._seconds,
                # A normal template repeats its variables at most a few times.
                "max_characters": 1_000_000 + 16 * (len(values) + len(template)),
            }
        )
        if template in self._stopped:
            raise ModelFileError(f"{source}: the chat template was stopped: {self._stopped[template]}")
        reply = self._exchange(f'{request[:-1]}, "variables": {values}}}\n'.encode("ascii"))
        if "text" in reply:
            return reply["text"]
        kind, message = reply["kind"], reply["message"]
        if kind == "limit" and len(values) < _SMALL:  # the template is at fault, not the messages: no retry
            self._stopped[template] = message
        if kind == "refused":
            raise RequestError(
                f"the chat template of {source} refuses these messages: {message}. "
                "Check the roles, their order, and that this model accepts each kind of content."
            )
        if kind == "syntax":
            raise ModelFileError(f"{source}: {message}")
        raise ModelFileError(f"{source}: the chat template was stopped: {message}")

    def close(self) -> None:
        """End the process. The next rendering starts a new one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in _pipes(process):
            with contextlib.suppress(OSError):  # flushing to the ended process fails
                pipe.close()

    def _after_fork(self) -> None:
        """In a forked child: leave the process to the parent, which may be in the middle of a rendering."""
        process, self._process = self._process, None
        self._lock = threading.Lock()
        if process is not None:
            for pipe in _pipes(process):
                pipe.raw.close()  # without flushing, since the parent will flush the same bytes

    def _exchange(self, request: bytes) -> dict[str, str]:
        with self._lock:
            process = self._started()
            stdin, stdout = _pipes(process)
            timer = threading.Timer(self._wall, process.kill)
            timer.daemon = True
            timer.start()
            try:
                stdin.write(request)
                stdin.flush()
                line = stdout.readline()
            except OSError:  # the process ended during the write
                line = b""
            except BaseException:  # such as Ctrl-C: the pending reply would be taken for the next request's
                self.close()
                raise
            finally:
                timer.cancel()
            reply = json.loads(line) if line else self._ended(process)
            if reply.get("kind") == "limit":  # the memory that it holds would count against the next rendering
                self.close()
            return reply

    def _ended(self, process: subprocess.Popen[bytes]) -> dict[str, str]:
        """The reply for a rendering during which the process ended."""
        self.close()
        if process.returncode == -getattr(signal, "SIGXCPU", 0):
            return {"kind": "limit", "message": f"it takes more than {self._seconds:g} seconds of processor time"}
        return {
            "kind": "ended",
            "message": f"its process ended (code {process.returncode}): it used too much time or memory, or was killed",
        }

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        # The worker sees the same packages as this process. -P keeps the script's folder off its path.
        found = [os.path.abspath(entry) for entry in sys.path if os.path.exists(entry)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(found)}
        try:
            process = subprocess.Popen(
                [sys.executable or "", "-P", str(_WORKER), str(self._memory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C on a terminal is for pdx
            )
        except OSError as error:
            raise RequestError(
                f"chat templates are rendered in a separate process, which cannot be started "
                f"({error}): give the prompt as text"
            ) from error
        self._process = process
        # Some installations of Python print lines at their start; these are skipped.
        if not any(line.strip() == b"ready" for line in iter(_pipes(process)[1].readline, b"")):
            self.close()
            raise RequestError(
                f"chat templates are rendered in a separate process ({sys.executable} {_WORKER}), "
                "which does not start: give the prompt as text"
            )
        return process


def _pipes(process: subprocess.Popen[bytes]) -> tuple[BufferedWriter, BufferedReader]:
    """Standard input and output of a process that was started with pipes."""
    return cast(BufferedWriter, process.stdin), cast(BufferedReader, process.stdout)


_default = Renderer()
atexit.register(_default.close)


def render(template: str, variables: Mapping[str, Any], source: str) -> str:
    """`Renderer.render` with one process for all models."""
    return _default.render(template, variables, source)
