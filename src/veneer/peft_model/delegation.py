"""Makes a PeftModel look like the model that it wraps.

Trainer, pipelines and users' code ask a model for its class, its attributes and the signature of its
``forward``. So a PeftModel's class is fitted to its base: a subclass of both, in which the base itself answers for
every attribute that its class defines. The adapters sit inside the base's own layers, so the base's methods
(``generate``, ``get_input_embeddings`` ...) are already right.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import nn


class Delegated:
    """Reads an attribute from the base model, and sets it there."""

    def __init__(self, base_class: type, name: str) -> None:
        self.base_class = base_class
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Return the base model's attribute; on the class, the base class's."""
        if instance is None:
            return getattr(self.base_class, self.name)
        return getattr(instance.get_base_model(), self.name)

    def __set__(self, instance: Any, value: Any) -> None:
        """Set it on the base model."""
        setattr(instance.get_base_model(), self.name, value)


def stands_for_peft(model: Any) -> bool:
    """Tell whether other libraries take a model for one of peft's, in whose place Veneer is: see ``veneer.as_peft``."""
    return isinstance(model, getattr(sys.modules.get("peft"), "PeftModel", ()))


def fitted_class(peft_class: type[nn.Module], base_class: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of ``peft_class`` for bases of ``base_class``, of the same name.

    A transformers model's wrapper is a ``PreTrainedModel`` too, so that ``Trainer`` saves adapters through
    ``save_pretrained`` instead of the whole state dict.
    """
    key = peft_class, base_class
    if key not in _FITTED:
        _FITTED[key] = _fit(peft_class, base_class)
    return _FITTED[key]


_FITTED: dict[tuple[type, type], type[nn.Module]] = {}


def _fit(peft_class: type[nn.Module], base_class: type[nn.Module]) -> type[nn.Module]:
    from transformers import PreTrainedModel

    namespace: dict[str, Any] = {"__module__": peft_class.__module__, "__doc__": peft_class.__doc__, "fitted": True}
    namespace["forward"] = _forward_like(peft_class, base_class)
    bases: tuple[type[nn.Module], ...] = (peft_class,)
    if issubclass(base_class, PreTrainedModel):
        bases = (peft_class, base_class)
        defined = set(dir(peft_class))
        foreign = [name for name in dir(base_class) if name not in defined and not name.startswith("__")]
        namespace.update({name: Delegated(base_class, name) for name in foreign})
    return type(peft_class.__name__, bases, namespace)


def _forward_like(peft_class: type[nn.Module], base_class: type[nn.Module]) -> Any:
    """Return ``peft_class.forward`` with the signature of the base's, and the adapters' own arguments."""
    plain = peft_class.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(self, *args, **kwargs)

    signature = inspect.signature(base_class.forward)
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in ("adapter_names", "task_ids")
    ]
    parameters = list(signature.parameters.values())
    last = len(parameters) - any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    parameters[last:last] = [p for p in extra if p.name not in signature.parameters]
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    forward.__doc__ = plain.__doc__
    return forward
