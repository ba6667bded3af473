"""``layer_replication``: repeats some of a model's blocks, their weights shared.

``[[0, 4], [2, 5]]`` makes blocks 0, 1, 2, 3, 2, 3, 4 of a model with five. Each copy is adapted on its own, and costs
no memory until adapters are merged for good: then each block has weights of its own, and can be saved.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from veneer.base_model.blocks import BlockList, find_blocks
from veneer.errors import ConfigError, UnsupportedError

# The keys of a config with an entry for each block; some families compute these instead.
_PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers")


class Replication:
    """Replaces a model's blocks by those of ``ranges``.

    Args:
        model: a base model with one list of blocks: Llama and its like, BERT, Falcon.
        ranges: pairs of a first block and the one after the last.

    Attributes:
        list: where the blocks lie.
        order: for each block that the model has now, its number before.

    Raises:
        ConfigError: a range is none of the model's. UnsupportedError: the model's blocks are not found.
    """

    def __init__(self, model: nn.Module, ranges: Sequence[Sequence[int]]) -> None:
        self.ranges = [list(pair) for pair in ranges]
        self.list = _blocks(model)
        self.before = self.list.blocks
        self.order = [index for pair in ranges for index in _indices(pair, len(self.before))]
        blocks = [_shared_copy(self.before[old], new) for new, old in enumerate(self.order)]
        setattr(self.list.stack, self.list.attribute, nn.ModuleList(blocks).train(self.before.training))
        self._restore = _resize_config(getattr(model, "config", None), self.order)

    def undo(self) -> None:
        """Give the model the blocks that it came with."""
        setattr(self.list.stack, self.list.attribute, self.before)
        self._restore()

    def settle(self) -> None:
        """Give each block weights of its own."""
        seen: set[int] = set()
        for module in self.list.blocks.modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None and id(tensor) in seen:
                    values = tensor.detach().clone()
                    is_parameter = isinstance(tensor, nn.Parameter)
                    setattr(module, name, nn.Parameter(values, tensor.requires_grad) if is_parameter else values)
                seen.add(id(tensor))


def _indices(pair: Sequence[int], count: int) -> range:
    if len(pair) != 2 or not 0 <= pair[0] < pair[1] <= count:
        raise ConfigError(
            f"layer_replication: {list(pair)!r} is no range of this model's {count} blocks.",
            hint="A range is [first, one after the last].",
        )
    return range(pair[0], pair[1])


def _blocks(model: nn.Module) -> BlockList:
    blocks = find_blocks(model)
    if blocks is None:
        raise UnsupportedError(
            f"layer_replication: the blocks of {type(model).__name__} were not found.",
            hint="It is for models with one list of blocks, such as Llama, BERT and Falcon.",
        )
    return blocks


def _shared_copy(block: nn.Module, index: int) -> nn.Module:
    """Return a copy of a block that shares its parameters."""
    shared = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}
    new = copy.deepcopy(block, shared)
    for module in new.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = index  # type: ignore[assignment]
    return new


def _resize_config(config: Any, order: Sequence[int]) -> Callable[[], None]:
    """Write the number of blocks and the type of each into the config; return what undoes it."""
    values = getattr(config, "__dict__", {})
    before: dict[str, Any] = {name: values[name] for name in _PER_BLOCK if values.get(name)}
    now: dict[str, Any] = {name: [values[index] for index in order] for name, values in before.items()}
    if hasattr(config, "num_hidden_layers"):
        before["num_hidden_layers"], now["num_hidden_layers"] = config.num_hidden_layers, len(order)

    def write(values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(config, name, value)

    write(now)
    return lambda: write(before)
