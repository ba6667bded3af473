"""Finds a model's list of blocks, which transformers holds under a few names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import nn

# The attributes that hold a decoder's blocks, and an encoder's.
_OF_DECODERS = ("layers", "h")
_OF_ENCODERS = ("layer",)


@dataclass(frozen=True)
class BlockList:
    """A model's list of blocks.

    Attributes:
        stack: the module that holds it, such as a decoder.
        stack_name: that module's name in the model.
        attribute: the list's name in that module.
    """

    stack: nn.Module
    stack_name: str
    attribute: str

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in order."""
        return cast(nn.ModuleList, getattr(self.stack, self.attribute))

    @property
    def name(self) -> str:
        """The list's name in the model."""
        return f"{self.stack_name}.{self.attribute}".lstrip(".")


def find_blocks(model: nn.Module) -> BlockList | None:
    """Return the list of blocks of a model that has one; ``None`` for others, such as those with two stacks."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    stacks = ((name, stack, lists) for name, lists in _places(model) if (stack := _child(model, name)) is not None)
    return next(
        (
            BlockList(stack, name, attribute)
            for name, stack, lists in stacks
            for attribute in lists
            if isinstance(getattr(stack, attribute, None), nn.ModuleList)
        ),
        None,
    )


def find_decoder_blocks(model: nn.Module) -> BlockList | None:
    """Return the same if it is that of a decoder."""
    found = find_blocks(model)
    return found if found is not None and found.attribute in _OF_DECODERS else None


def _places(model: nn.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the names that a stack may have, each with the names that its list may have."""
    # transformers names the model below a head; elsewhere it is mostly called "model".
    for top in dict.fromkeys((str(getattr(model, "base_model_prefix", "")), "model", "")):
        yield top, _OF_DECODERS
        yield f"{top}.decoder".lstrip("."), _OF_DECODERS
        yield f"{top}.encoder".lstrip("."), _OF_ENCODERS


def _child(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
