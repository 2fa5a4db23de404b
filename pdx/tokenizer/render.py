"""Rendering chat templates within limits, in a separate process that is started on first use and kept.

A template is a program that comes with a model. Its sandbox keeps it from files and from Python, but does not stop
`'a' * 10**10` or endless loops; only the operating system can (`template_worker.py`).
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
from pathlib import Path
from typing import Any

from pdx.errors import ModelFileError, RequestError

_WORKER = Path(__file__).with_name("template_worker.py")
_SMALL = 1_000_000  # characters of messages and tools
_WALL_SECONDS = 60.0  # where the system does not bound processor time, and for a process that hangs


class Renderer:
    """Renders templates, one at a time. Threads may share one.

    Args:
      seconds: processor time for one rendering, compilation included.
      memory_bytes: what all renderings may hold beyond an empty interpreter.
      wall_seconds: elapsed time after which a rendering is ended whatever processor time it had.
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
        """The text that a template makes of JSON values. `source` names the model in errors.

        Raises RequestError for what the template refuses, ModelFileError for a template that is not jinja2, leaves
        its sandbox, or takes more time, memory or text than a chat template may.
        """
        try:
            values = json.dumps(variables)
        except (ValueError, TypeError, RecursionError) as error:
            raise RequestError(f"the messages or tools cannot be given to a chat template ({error})") from error
        request = json.dumps(
            {
                "template": template,
                "seconds": self._seconds,
                # A template repeats what it is given at most a few times.
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
                "Check the roles, their order, and that each content is of a kind this model takes."
            )
        if kind == "syntax":
            raise ModelFileError(f"{source}: {message}")
        raise ModelFileError(f"{source}: the chat template was stopped: {message}")

    def close(self) -> None:
        """End the process; the next rendering starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # what was not sent yet
                pipe.close()

    def _after_fork(self) -> None:
        """Leave the process to the parent, whose other threads may have been in the middle of a rendering."""
        process, self._process = self._process, None
        self._lock = threading.Lock()
        if process is not None:
            for pipe in (process.stdin, process.stdout):
                pipe.raw.close()  # without sending what the parent is about to send

    def _exchange(self, request: bytes) -> dict[str, str]:
        with self._lock:
            process = self._started()
            timer = threading.Timer(self._wall, process.kill)
            timer.daemon = True
            timer.start()
            try:
                process.stdin.write(request)
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:  # it ended while it was written to
                line = b""
            except BaseException:  # Ctrl-C: its reply would answer the next request
                self.close()
                raise
            finally:
                timer.cancel()
            reply = json.loads(line) if line else self._ended(process)
            if reply.get("kind") == "limit":  # what the process holds would count against the next
                self.close()
            return reply

    def _ended(self, process: subprocess.Popen[bytes]) -> dict[str, str]:
        """The reply in place of a process that a template has ended."""
        self.close()
        if process.returncode == -getattr(signal, "SIGXCPU", 0):
            return {"kind": "limit", "message": f"it takes more than {self._seconds:g} seconds of processor time"}
        return {
            "kind": "ended",
            "message": f"its process ended (code {process.returncode}): it takes more time or "
            "memory than there is, or was ended from outside",
        }

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        # The same packages as here, however they were found; -P keeps the worker's own folder out.
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
                f"chat templates are rendered in a process of their own, which cannot be started "
                f"({error}): give the prompt as text"
            ) from error
        self._process = process
        # What a machine's own Python prints as it starts comes before.
        if not any(line.strip() == b"ready" for line in iter(process.stdout.readline, b"")):
            self.close()
            raise RequestError(
                f"chat templates are rendered in a process of their own ({sys.executable} {_WORKER}), "
                "which does not start: give the prompt as text"
            )
        return process


_default = Renderer()
atexit.register(_default.close)


def render(template: str, variables: Mapping[str, Any], source: str) -> str:
    """`Renderer.render` in the process that all models share."""
    return _default.render(template, variables, source)
