"""The methods, found by the ``peft_type`` that stands in a config. To add one: CONTRIBUTING.md."""

from __future__ import annotations

from collections.abc import Mapping

from veneer.config import PeftConfig
from veneer.errors import UnknownMethodError
from veneer.methods.lora import Lora
from veneer.methods.method import AnyMethod, Method

__all__ = ["METHODS", "AnyMethod", "Method", "method_of"]

METHODS: Mapping[str, AnyMethod] = {method.peft_type: method for method in (Lora(),)}


def method_of(config: PeftConfig) -> AnyMethod:
    """The method of a config."""
    method = METHODS.get(str(config.peft_type))
    if method is None:
        raise UnknownMethodError(
            f"peft_type {config.peft_type!r} names no method of this version of Veneer.",
            hint=f"Use one of the config classes: known are {', '.join(sorted(METHODS))}.",
        )
    return method
