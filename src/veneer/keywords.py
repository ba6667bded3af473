"""The keywords of public calls: those that go by another name, and the refusal of those that are unknown.

A keyword that a call does not know is never swallowed: most are slips of the pen, and what was meant would not happen.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

from veneer.errors import ConfigError, UnknownKeywordError

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)
F = TypeVar("F")

# What says where an adapter's files are.
SOURCE = ("revision", "subfolder", "token", "local_files_only", "cache_dir", "force_download")

# What peft takes where an adapter is loaded, and what is already so here: its weights come straight from the file, in
# the dtype that they have there, to the device of the layer that they belong to. Nothing that comes with it is run.
SETTLED = (
    *("torch_device", "device_map", "max_memory", "offload_folder", "offload_dir", "offload_index"),
    *(
        "low_cpu_mem_usage",
        "ephemeral_gpu_offload",
        "dtype",
        "torch_dtype",
        "trust_remote_code",
        "resume_download",
        "import_allowlist",
    ),
)

# What says how an adapter is read.
READING = ("strict", "strict_base", "autocast_adapter_dtype", "key_mapping", "ignore_mismatched_sizes")

# Older name -> the name that took its place.
DTYPE = {"torch_dtype": "dtype"}
TOKEN = {"use_auth_token": "token"}


def takes(
    *more: str, renamed: Mapping[str, str] | None = None, others: bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a call take the keywords of its signature alone, and of its ``**options`` those named in ``more``.

    Args:
        *more: names beside those in the signature.
        renamed: other names -> the names that they stand for.
        others: whether any other goes to somebody else, who refuses it.

    Raises:
        UnknownKeywordError: from the call, for any other keyword. ConfigError: for two names of one thing, each with a
            value of its own.
    """

    def decorate(call: Callable[P, R]) -> Callable[P, R]:
        known = [*keywords(call), *more, *(renamed or ())]
        allowed = frozenset(known)

        @functools.wraps(call)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            if not (others or allowed.issuperset(kwargs)):
                raise unknown(f"{call.__qualname__}()", kwargs.keys() - allowed, known)
            if renamed and not renamed.keys().isdisjoint(kwargs):
                return call(*args, **_by_new_names(kwargs, renamed))
            return call(*args, **kwargs)

        return checked

    return decorate


def strict(kind: C) -> C:
    """Let every public method of a class take its own keywords alone; one with ``**options`` says which those are."""
    for name, value in list(vars(kind).items()):
        call = value.__func__ if isinstance(value, classmethod) else value
        if inspect.isfunction(call) and not name.startswith("_") and not _is_open(call):
            checked = takes()(call)
            setattr(kind, name, classmethod(checked) if isinstance(value, classmethod) else checked)
    return kind


def chosen(options: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those of ``options`` that are among ``names``."""
    return {name: options[name] for name in names if name in options}


def passed_on(call: Callable[..., Any], given: Iterable[str], to: Callable[..., Any]) -> None:
    """Check the keywords that ``call`` takes for ``to``.

    Raises:
        UnknownKeywordError: ``to`` does not take one of them.
    """
    if not _is_open(to):
        left = set(given).difference(keywords(to))
        if left:
            raise unknown(f"{call.__qualname__}()", left, keywords(to))


def unknown(call: str, names: Collection[str], known: Iterable[str]) -> UnknownKeywordError:
    """The error for keywords that a call does not take.

    Args:
        call: its public name, and what about it.
        names: the keywords.
        known: those that it takes.
    """
    listed = list(dict.fromkeys(known))
    near = [match for name in sorted(names) for match in difflib.get_close_matches(name, listed, n=1)]
    asked = ", ".join(f"{name}=" for name in sorted(names))
    return UnknownKeywordError(
        f"{call} does not take {asked}.",
        hint=f"Did you mean {' and '.join(f'{name}=' for name in near)}?"
        if near
        else f"It takes {', '.join(listed) or 'no keywords'}.",
    )


def keywords(call: Callable[..., Any]) -> list[str]:
    """The names that a call can be given as keywords."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        p.name
        for p in inspect.signature(call).parameters.values()
        if p.kind in by_name and p.name not in ("self", "cls")
    ]


def _is_open(call: Callable[..., Any]) -> bool:
    """Whether a call has ``**options``."""
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(call).parameters.values())


def _by_new_names(kwargs: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    found = {name: value for name, value in kwargs.items() if name not in renamed}
    for old, new in renamed.items():
        if old in kwargs and _plain(found.setdefault(new, kwargs[old])) != _plain(kwargs[old]):
            raise ConfigError(
                f"{new}={found[new]!r} and {old}={kwargs[old]!r} are two names of one thing.",
                hint=f"Give {new}= alone.",
            )
    return found


def _plain(value: Any) -> str:
    """What a dtype and its name have in common."""
    return str(value).removeprefix("torch.")


class Fields:
    """Lets a dataclass refuse keywords that are none of its fields."""

    def __new__(cls: type[F], *args: Any, **values: Any) -> F:
        """An empty instance, for ``__init__`` to fill."""
        known = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
        left = values.keys() - set(known)
        # A subclass may have an __init__ of its own.
        if left and not _is_open(cls.__init__) and (left := left.difference(keywords(cls.__init__))):
            raise unknown(f"{cls.__name__}()", left, known)
        return object.__new__(cls)
