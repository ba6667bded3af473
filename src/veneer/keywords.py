"""Checks the keywords of public calls: older names are translated, and unknown ones refused.

A keyword that a call does not know is never swallowed: most are typing errors, and what was meant would not happen.
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

# Keywords that say where an adapter's files are.
SOURCE = ("revision", "subfolder", "token", "local_files_only", "cache_dir", "force_download")

# Keywords of downloads that huggingface_hub took before 1.0, and that transformers still passes on.
PAST_SOURCE = ("proxies", "tqdm_class")

# Keywords of peft's loading that have no effect here: weights come straight from the file, in the dtype that they have
# there, to the device of their layer, and no code that comes with an adapter is run.
IGNORED = (
    *("torch_device", "device_map", "max_memory", "offload_folder", "offload_dir", "offload_index"),
    *(
        "low_cpu_mem_usage",
        "ephemeral_gpu_offload",
        "dtype",
        "torch_dtype",
        "trust_remote_code",
        "resume_download",
        "import_allowlist",
        "safe_serialization",
    ),
)

# Keywords that say how an adapter is read.
READING = ("strict", "strict_base", "autocast_adapter_dtype", "key_mapping", "ignore_mismatched_sizes")

# Older name -> the name that took its place.
DTYPE = {"torch_dtype": "dtype"}
TOKEN = {"use_auth_token": "token"}


def takes(
    *more: str, renamed: Mapping[str, str] | None = None, others: bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a call accept the keywords of its signature only, and of its ``**options`` those named in ``more``.

    Args:
        *more: names beside those in the signature.
        renamed: older name -> today's name.
        others: pass all other keywords on, to a call that refuses those that it does not know.

    Raises:
        UnknownKeywordError: by the call, for any other keyword.
        ConfigError: by the call, for an older and a newer name with different values.
    """

    def decorate(call: Callable[P, R]) -> Callable[P, R]:
        known = [*keywords(call), *more, *(renamed or ())]
        allowed = frozenset(known)

        @functools.wraps(call)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            if not (others or allowed.issuperset(kwargs)):
                raise unknown_keywords(f"{call.__qualname__}()", kwargs.keys() - allowed, known)
            if renamed and not renamed.keys().isdisjoint(kwargs):
                return call(*args, **_by_new_names(kwargs, renamed))
            return call(*args, **kwargs)

        checked.keywords = allowed  # type: ignore[attr-defined]
        return checked

    return decorate


def strict(kind: C) -> C:
    """Let every public method of a class accept its own keywords only; those with ``**options`` use :func:`takes`.

    A method that it has from another class of Veneer's goes by the name of this class in errors.
    """
    bases = [base for base in reversed(kind.__mro__) if base.__module__.startswith("veneer.")]
    members = {name: (base, value) for base in bases for name, value in vars(base).items() if not name.startswith("_")}
    for name, (base, value) in members.items():
        call = value.__func__ if isinstance(value, classmethod) else value
        if not inspect.isfunction(call):
            continue
        if base is not kind:
            call.__qualname__ = inspect.unwrap(call).__qualname__ = f"{kind.__name__}.{name}"
        if not _is_open(call):
            checked = takes()(call)
            setattr(kind, name, classmethod(checked) if isinstance(value, classmethod) else checked)
    return kind


def subset(options: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return those of ``options`` that are among ``names``."""
    return {name: options[name] for name in names if name in options}


def check_passed_on(call: Callable[..., Any], names: Iterable[str], to: Callable[..., Any]) -> None:
    """Check the names of keywords that ``call`` passes on to another call.

    Raises:
        UnknownKeywordError: ``to`` does not take one of them.
    """
    if not _is_open(to):
        refused = set(names).difference(keywords(to))
        if refused:
            raise unknown_keywords(f"{call.__qualname__}()", refused, keywords(to))


def unknown_keywords(call: str, names: Collection[str], known: Iterable[str]) -> UnknownKeywordError:
    """Make the error for keywords that a call does not take.

    Args:
        call: the call as it is shown to the user.
        names: the keywords that it does not take.
        known: the keywords that it takes.
    """
    listed = list(dict.fromkeys(known))
    near = [match for name in sorted(names) for match in difflib.get_close_matches(name, listed, n=1)]
    refused = ", ".join(f"{name}=" for name in sorted(names))
    return UnknownKeywordError(
        f"{call} does not take {refused}.",
        hint=f"Did you mean {' and '.join(f'{name}=' for name in near)}?"
        if near
        else f"It takes {', '.join(listed) or 'no keywords'}.",
    )


def keywords(call: Callable[..., Any]) -> list[str]:
    """Return the names that a call accepts as keywords."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        p.name
        for p in inspect.signature(call).parameters.values()
        if p.kind in by_name and p.name not in ("self", "cls")
    ]


def _is_open(call: Callable[..., Any]) -> bool:
    """Tell whether a call has ``**options``."""
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(call).parameters.values())


def _by_new_names(kwargs: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Return keywords with today's names in the places of older ones."""
    translated = {name: value for name, value in kwargs.items() if name not in renamed}
    for old, new in renamed.items():
        if old in kwargs and _plain(translated.setdefault(new, kwargs[old])) != _plain(kwargs[old]):
            raise ConfigError(
                f"{new}={translated[new]!r} and {old}={kwargs[old]!r} are two names of one thing.",
                hint=f"Give {new}= alone.",
            )
    return translated


def _plain(value: Any) -> str:
    """Return a value's text, which is the same for a dtype and its name."""
    return str(value).removeprefix("torch.")


class Fields:
    """Lets a dataclass refuse keywords that are not its fields."""

    def __new__(cls: type[F], *args: Any, **values: Any) -> F:
        """Make an empty instance, for ``__init__`` to fill."""
        known = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
        refused = values.keys() - set(known)
        # A subclass may have an __init__ of its own.
        if refused and not _is_open(cls.__init__) and (refused := refused.difference(keywords(cls.__init__))):
            raise unknown_keywords(f"{cls.__name__}()", refused, known)
        return object.__new__(cls)
