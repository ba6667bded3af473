"""Matches the regular expressions of a config as Python's ``re`` does, and in bounded time.

A checkpoint must not block the process that reads it, and an expression with nested repetitions can take longer than
anybody waits. ``re`` cannot be stopped; the package ``regex``, which transformers needs anyway, can. Both take the same
syntax once their few differences are escaped. Plain names, which nearly all expressions are, are left to ``re``.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

from veneer.errors import ConfigError

# Seconds of computing, for one match and for all matches of one config. An ordinary match takes microseconds.
_LONGEST = 0.25
_ALTOGETHER = 3.0
# Limits of an expression that is compiled in reasonable time: characters, and copies of repeated parts.
_MOST_CHARACTERS = 20_000
_MOST_COPIES = 1_000

# Letters, digits, dots and their escapes: an expression of these matches in one way only.
_PLAIN = re.compile(r"(?:[\w.-]|\\[.dw])*", re.ASCII)
# A name in braces, another escape, a set, an open brace.
_TOKENS = re.compile(r"\\N\{[^}]*\}|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(?:(\d*)(,?)(\d*)\})?", re.DOTALL)


class Form(NamedTuple):
    """A way of matching an expression with a name: a template around it, and the method of ``re``."""

    around: str
    method: str


WHOLE = Form("{}", "fullmatch")
PART = Form("{}", "search")
ENDING = Form(r"(.*\.)?({})$", "match")
BLOCK = Form(r"(?:.*?\.)??(?:{})\.(?P<block>\d+)\.", "match")


@dataclasses.dataclass
class _Allowance:
    """The seconds left for matching the expressions of some configs."""

    configs: tuple[Any, ...] = ()
    where: str = ""
    left: float = dataclasses.field(default_factory=lambda: _ALTOGETHER)

    def spend(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """Call ``action`` and subtract its time; raise ``_RefusedError`` when none is left."""
        started = time.thread_time()
        result = action(*arguments)
        self.left -= time.thread_time() - started
        if self.left < 0:
            raise _RefusedError("takes too long, with what was matched before")
        return result


_current: ContextVar[_Allowance | None] = ContextVar("allowance", default=None)


@contextmanager
def matching(*configs: Any, where: str = "") -> Iterator[None]:
    """Give all matches inside the ``with`` block one allowance of time.

    Args:
        *configs: the configs whose expressions are matched; errors name the option.
        where: the file that the configs come from, for errors.
    """
    token = _current.set(_Allowance(configs, where))
    try:
        yield
    finally:
        _current.reset(token)


def match(pattern: str, form: Form, name: str) -> Any:
    """Match a config's expression with a module's name as ``form`` says; return ``None`` when it does not match.

    Raises:
        ConfigError: it is no regular expression, or matching takes too long.
    """
    if _PLAIN.fullmatch(pattern):
        return _plain(pattern, form)(name)
    allowance = _current.get() or _Allowance()
    try:
        return allowance.spend(_match_in_time, pattern, form, name)
    except _RefusedError as error:
        raise _refused(pattern, str(error), allowance) from error


def check(option: str, value: Any, form: Form) -> None:
    """Raise ``ConfigError`` when an option's value is text, and no regular expression that can be matched."""
    if not isinstance(value, str) or _PLAIN.fullmatch(value):
        return
    allowance = _current.get() or _Allowance()
    try:
        allowance.spend(_bounded, value, form)
    except _RefusedError as error:
        raise ConfigError(f"{option}: {_short(value)} {error}.", hint=_HINT) from error


_HINT = "Escape dots and brackets with a backslash, or list the names instead."


class _RefusedError(Exception):
    """An expression cannot be matched; the text says why."""


def _match_in_time(pattern: str, form: Form, name: str) -> Any:
    try:
        return _bounded(pattern, form)(name, timeout=_LONGEST)
    except TimeoutError as error:
        raise _RefusedError("takes too long to match") from error


@lru_cache(maxsize=4096)
def _plain(pattern: str, form: Form) -> Any:
    return getattr(re.compile(form.around.format(pattern)), form.method)


@lru_cache(maxsize=1024)
def _bounded(pattern: str, form: Form) -> Any:
    import regex  # type: ignore[import-untyped]

    copies = math.prod(int(count) for count in re.findall(r"\{(\d{1,9})", pattern) if int(count))
    if len(pattern) > _MOST_CHARACTERS or copies > _MOST_COPIES:
        raise _RefusedError("is too long, or repeats too often")
    try:
        # Alone and in the template: ``a)|(b`` is an expression only in brackets, and a flag only at the beginning.
        re.compile(pattern)
        re.compile(form.around.format(pattern))
        return getattr(regex.compile(form.around.format(_TOKENS.sub(_spelt_out, pattern))), form.method)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise _RefusedError(f"is no regular expression: {error}") from error


def _spelt_out(token: re.Match[str]) -> str:
    r"""Escape a token that ``re`` and ``regex`` read differently.

    ``[[:alpha:]]`` is a class, and ``(ab){e}`` allows a mistake, to ``regex`` alone: ``[\[:alpha:]]``, ``(ab)\{e}``.
    """
    text = token[0]
    if text.startswith("["):
        return "[" + re.sub(r"(\\.)|\[", lambda part: part[1] or r"\[", text[1:], flags=re.DOTALL)
    if text == "{" or text == "{}":
        return "\\" + text
    if text.startswith("{") and not token[1]:
        return f"{{0,{token[3]}}}"
    return text


def _refused(pattern: str, why: str, allowance: _Allowance) -> ConfigError:
    options = [
        field.name
        for config in allowance.configs
        for field in dataclasses.fields(config)
        if _holds(getattr(config, field.name), pattern)
    ]
    named = ", ".join(dict.fromkeys(options)) or "the config's regular expression"
    prefix = f"{allowance.where}: " if allowance.where else ""
    return ConfigError(f"{prefix}{named}: {_short(pattern)} {why}.", hint=_HINT)


def _holds(value: Any, pattern: str) -> bool:
    return value == pattern or (isinstance(value, (list, tuple, set, Mapping)) and pattern in value)


def _short(pattern: str) -> str:
    return repr(pattern) if len(pattern) <= 60 else f"{pattern[:60]!r}…"
