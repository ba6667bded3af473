"""Finds a model's list of blocks, which transformers holds under a few names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """Return the list of blocks of a model that is one stack of them, such as Llama or BERT; ``None`` for others."""
    return _first_list(model, {"": _OF_DECODERS, "encoder": _OF_ENCODERS})


def find_decoder_blocks(model: nn.Module) -> BlockList | None:
    """Return the list of blocks of a model's decoder; ``None`` for encoders, and where there are two stacks."""
    return _first_list(model, {"": _OF_DECODERS, "decoder": _OF_DECODERS})


def _first_list(model: nn.Module, places: Mapping[str, Sequence[str]]) -> BlockList | None:
    """Return the first list of blocks in a child of the model below its head: child -> the names it may have there."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    # transformers names the model below a head; elsewhere it is mostly called "model".
    for top in dict.fromkeys((str(getattr(model, "base_model_prefix", "")), "model", "")):
        for child, attributes in places.items():
            name = f"{top}.{child}".strip(".")
            stack = _child(model, name)
            for attribute in attributes:
                if isinstance(getattr(stack, attribute, None), nn.ModuleList):
                    return BlockList(cast(nn.Module, stack), name, attribute)
    return None


def _child(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
