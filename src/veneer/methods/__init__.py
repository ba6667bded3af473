"""Finds the method of a config by its ``peft_type``. To add one: CONTRIBUTING.md.

A method ``XYZ`` is two small files: ``configs/methods/xyz.py`` with its config, which needs no torch, and
``methods/xyz.py`` with its maths as ``METHOD``. They are imported when they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from veneer.configs.base import PeftConfig, PromptConfig, registered
from veneer.errors import UnknownMethodError
from veneer.methods.base.method import AnyMethod, Method

if TYPE_CHECKING:
    from veneer.methods.base.prompt_method import PromptMethod

__all__ = ["AnyMethod", "Method", "method_of", "prompt_of", "register_method"]

_METHODS: dict[str, Any] = {}


def register_method(peft_type: str, method: AnyMethod | PromptMethod[Any]) -> None:
    """Let configs of ``peft_type`` be served by ``method``; their class is registered with ``register_config``."""
    _METHODS[peft_type] = method


def method_of(config: PeftConfig) -> AnyMethod:
    """Return the method of a config.

    Raises:
        UnknownMethodError: its ``peft_type`` is none of this version's.
    """
    method: AnyMethod = _lookup(config)
    return method


def prompt_of(config: PromptConfig) -> PromptMethod[Any]:
    """Return the method of a config that describes a prompt; raise as :func:`method_of` does."""
    method: PromptMethod[Any] = _lookup(config)
    return method


def _lookup(config: PeftConfig) -> Any:
    name = config.method_name
    if name not in _METHODS:
        if str(config.peft_type) not in registered():
            raise UnknownMethodError(
                f"peft_type {str(config.peft_type)!r} names no method of this version of Veneer.",
                hint=f"Use one of the config classes: known are {', '.join(registered())}.",
            )
        _METHODS[name] = importlib.import_module(f"veneer.methods.{name.lower()}").METHOD
    return _METHODS[name]
