"""Renders chat templates in a process of its own, which :mod:`veneer.serving.template_process` starts.

A template is a program of whoever made the adapter. Only the end of its process certainly ends it, so the kernel ends
this one when a rendering takes too long, even if the server is gone meanwhile.
"""

from __future__ import annotations

import json
import signal
import sys
from contextlib import suppress
from typing import Any

import jinja2
import psutil
from transformers.utils.chat_template_utils import render_jinja_template

from veneer.printing import first_line

# As much text as a client may send itself, see BODY_BYTES of veneer.serving.http_guard.
_MOST_TEXT = 8 << 20
_MOST_MEMORY = 512 << 20


def main() -> None:
    """Answer each line of the standard input, a request in JSON, by a line; the first line says that it is ready."""
    _write({})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        _set_timer(request.pop("seconds"))
        _limit_memory()
        reply = _reply(request)
        _set_timer(0.0)
        _write(reply)


def _write(reply: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
    sys.stdout.buffer.flush()


def _set_timer(seconds: float) -> None:
    """End the process after so many seconds of computing, 0 for never; nothing in it can keep the signal off."""
    if hasattr(signal, "ITIMER_PROF"):  # not on Windows, where the server's own clock ends it
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_memory() -> None:
    """Let the process have a certain amount of memory more than it has."""
    with suppress(ImportError, OSError, ValueError):  # Windows has no such limit, and macOS takes none
        import resource

        most = psutil.Process().memory_info().vms + _MOST_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _reply(request: dict[str, Any]) -> dict[str, Any]:
    """Return the text, or why there is none; memory may also run out over a long message."""
    try:
        return _rendered(request)
    except MemoryError:
        return {"exceeds": True}


def _rendered(request: dict[str, Any]) -> dict[str, Any]:
    try:
        rendered: Any = render_jinja_template(
            [request["messages"]],
            chat_template=request["template"],
            add_generation_prompt=request["generation_prompt"],
            **request["variables"],
        )
    except MemoryError:
        raise
    except (jinja2.TemplateSyntaxError, SyntaxError) as error:  # the second of loops nested too deeply for Python
        line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else None
        return {"error": first_line(error)[:1000], "is_syntax": True, "line": line}
    except Exception as error:
        return {"error": first_line(error)[:1000], "is_syntax": False}
    text = rendered[0][0]
    return {"exceeds": True} if len(text) > _MOST_TEXT else {"text": text}
