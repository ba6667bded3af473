"""Renders the chat templates that adapters bring, so that none of them can hold up or fill the server."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from veneer.printing import printable
from veneer.serving.prompt_tokens import own_template
from veneer.serving.serving_errors import AdapterInvalidError, InvalidRequestError, OverloadedError

# The path as here: `-c` alone would look for modules in the working directory first.
_PROGRAM = "import sys; sys.path[:] = {path!r}; from veneer.serving.template_child import main; main()"
# Seconds of computing that one rendering may take; ordinary ones take a millisecond.
_SECONDS = 2.0
# By the clock: where the processors are busy, the same takes longer.
_CLOCK_SECONDS = 10.0
_START_SECONDS = 120.0
# Seconds for which a template that took too long is refused to the caller who asked for it.
_REFUSED_SECONDS = 60.0
_MOST_REFUSED = 4096
# Compiled templates stay in the process, which is started anew above this size.
_MOST_KEPT = 1 << 30
_SMALL_CHAT = ({"role": "user", "content": "Hello"},)


@dataclass(frozen=True)
class TemplateInput:
    """A chat template, and what it is rendered with.

    Attributes:
        template: an adapter's own.
        messages: with the keys ``role`` and ``content``.
        variables: the names of special tokens, and what the template itself takes.
        generation_prompt: end with what begins an answer.
    """

    template: str
    messages: Sequence[Mapping[str, str]] = _SMALL_CHAT
    variables: Mapping[str, Any] = field(default_factory=dict)
    generation_prompt: bool = True


class TemplateProcess:
    """Renders templates in a process that is ended when one takes too long; any thread may call it.

    The process starts with the first template, and a new one after its end. One template is rendered at a time, in a
    thread of our own: chats whose adapters bring none do not wait.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "veneer-templates")
        self._process: subprocess.Popen[bytes] | None = None
        # A caller and the hash of a template -> until when it is refused.
        self._refused: OrderedDict[tuple[str, bytes], float] = OrderedDict()

    async def render(self, chat: TemplateInput, caller: str) -> str:
        """Return the text of a conversation.

        Args:
            chat: the template and its input.
            caller: whose request it is; a template that takes too long is refused to this caller for a while.

        Raises:
            InvalidRequestError: the template refuses the conversation.
            AdapterInvalidError: it takes too much time or memory, or is no template.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._render, chat, caller)

    def check(self, folder: Path) -> None:
        """Raise ``AdapterInvalidError`` where an adapter's chat template cannot be read, is none, or does not end."""
        template = own_template(folder)
        if template is not None:
            with suppress(InvalidRequestError):  # of another conversation it may think better
                self._thread.submit(self._render, TemplateInput(template), None).result()

    def close(self) -> None:
        """End the process."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        process = self._process
        if process is not None:
            process.kill()  # on which the thread, if it waits for an answer, ends too
        self._thread.shutdown()
        self._end()

    # -- on the thread -------------------------------------------------------------------------------------

    def _render(self, chat: TemplateInput, caller: str | None) -> str:
        key = (caller or "", hashlib.sha256(chat.template.encode("utf-8", "surrogatepass")).digest())
        if caller is not None and self._refused.get(key, 0.0) > time.monotonic():
            raise _exceeds(f" It is refused for {_REFUSED_SECONDS:g} s after that.")
        reply = self._reply(chat)
        if "text" in reply:
            return str(reply["text"])
        if "error" in reply:
            raise _refusal(reply)
        if caller is not None:
            self._refuse(key)
        raise _exceeds("")

    def _refuse(self, key: tuple[str, bytes]) -> None:
        self._refused.pop(key, None)
        self._refused[key] = time.monotonic() + _REFUSED_SECONDS
        if len(self._refused) > _MOST_REFUSED:
            self._refused.popitem(last=False)

    def _reply(self, chat: TemplateInput) -> dict[str, Any]:
        """Return what the process answers; nothing where it came to its end over the template."""
        process = self._started()
        request = {**vars(chat), "variables": dict(chat.variables), "seconds": _SECONDS}
        assert process.stdin is not None
        line = json.dumps(request, default=str).encode() + b"\n"
        reply: dict[str, Any] = {}
        with _ended_after(process, _CLOCK_SECONDS) as ended, suppress(OSError):
            process.stdin.write(line)
            process.stdin.flush()
            reply = _read(process)
        if ended.is_set() or not reply or _size(process) > _MOST_KEPT:
            self._end()
        return reply

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        process = self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # an interrupt at the terminal is the server's, which drains
        )
        with _ended_after(process, _START_SECONDS):
            is_ready = process.stdout is not None and process.stdout.readline()
        if not is_ready:
            self._end()
            raise OverloadedError(
                "The process that renders the adapters' chat templates does not start.",
                hint="Ask again.",
                retry_after=5,
            )
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        with suppress(OSError):  # what it did not read any more
            process.communicate()


@contextmanager
def _ended_after(process: subprocess.Popen[bytes], seconds: float) -> Iterator[threading.Event]:
    """End a process unless the block ends before; the event tells whether that was so."""
    ended = threading.Event()

    def end() -> None:
        ended.set()
        process.kill()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield ended
    finally:
        timer.cancel()
        timer.join()


def _read(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    return dict(json.loads(line)) if line.endswith(b"\n") else {}


def _size(process: subprocess.Popen[bytes]) -> int:
    with suppress(psutil.Error):  # it is gone
        return int(psutil.Process(process.pid).memory_info().rss)
    return 0


def _refusal(reply: Mapping[str, Any]) -> AdapterInvalidError | InvalidRequestError:
    message = printable(str(reply["error"])).rstrip(".")
    if not reply["is_syntax"]:
        return InvalidRequestError(
            f"The chat template refuses: {message}.", hint="Look at the roles and their order.", param="messages"
        )
    line = f", line {reply['line']}" if reply["line"] else ""
    return AdapterInvalidError(
        f"The adapter's chat template is not valid{line}: {message}.", hint="Mend it, and register the adapter again."
    )


def _exceeds(more: str) -> AdapterInvalidError:
    return AdapterInvalidError(
        f"The adapter's chat template takes more than {_SECONDS:g} s, or too much memory.{more}",
        hint="Mend the template, or send fewer messages.",
    )
