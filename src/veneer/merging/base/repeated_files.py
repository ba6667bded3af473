"""Shows a base's files as those of a deeper model, some blocks repeated: ``layer_replication`` from disk to disk.

The view has the tensors of each block under every number that the block gets, all at the same bytes. The planner sees a
deeper base, and gives each of its tensors bytes of its own in the output.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from veneer.base_model.repeated_blocks import Replication
from veneer.checkpoints.checkpoint import Checkpoint
from veneer.errors import MergeError, UnsupportedError
from veneer.files.names import MODEL_CONFIG
from veneer.files.source import Source
from veneer.merging.base.weight_files import TensorPlace, WeightFiles


@dataclass(frozen=True)
class RepeatedBlocks:
    """The blocks of the base that the output has.

    Attributes:
        name: of the model's list of blocks: ``layers``, ``layer`` or ``h``.
        order: for each block of the output, the base's that it comes from.
        config: keys of the base's config that the output has otherwise.
    """

    name: str
    order: Sequence[int]
    config: Mapping[str, Any]

    def view(self, files: WeightFiles) -> WeightFiles:
        """Return the base's files with the output's blocks; tensors outside of blocks come first."""
        number = re.compile(rf"(?:^|\.){self.name}\.(\d+)\.")
        blocks: dict[int, list[tuple[str, str, TensorPlace]]] = {}
        places: dict[str, TensorPlace] = {}
        for name, place in files.places.items():
            match = number.search(name)
            if match is None:
                places[name] = place
            else:
                start, end = match.span(1)
                blocks.setdefault(int(match[1]), []).append((name[:start], name[end:], place))
        for new, old in enumerate(self.order):
            for before, after, place in blocks.get(old, ()):
                name = f"{before}{new}{after}"
                places[name] = replace(place, info=replace(place.info, name=name))
        return files.with_places(places)

    def file_size(self, files: WeightFiles) -> int | None:
        """Return the bytes of the base's largest file, for the output's files; ``None`` where the base has one file."""
        return max(header.nbytes for header in files.headers.values()) if len(files.headers) > 1 else None


def repeated_blocks(
    checkpoints: Sequence[Checkpoint], source: Source, build: Callable[..., nn.Module]
) -> RepeatedBlocks | None:
    """Find the blocks that the adapters ask for; ``None`` when these are the base's own.

    Args:
        checkpoints: the adapters.
        source: the base.
        build: makes its model with some keys of the config set otherwise, without weights.

    Raises:
        MergeError: the adapters ask for different blocks. ConfigError: a range is none of the model's.
        UnsupportedError: the model's blocks are not found, or its config cannot describe the output's.
    """
    ranges = _ranges(checkpoints)
    if not ranges:
        return None
    model: Any = build()
    before = model.config.to_dict()
    replication = Replication(model, ranges)
    changed = {key: value for key, value in model.config.to_dict().items() if value != before.get(key)}
    aliases: Mapping[str, str] = getattr(model.config, "attribute_map", {})
    written = source.json(MODEL_CONFIG)
    changed |= {alias: changed[key] for alias, key in aliases.items() if key in changed and alias in written}
    # Some families make every n-th block otherwise, or name those that are: a copy would be made as its number says.
    if _shapes(model) != _shapes(build(**changed)):
        raise UnsupportedError(
            f"The blocks of {type(model).__name__} differ by their number, so no config describes them repeated "
            "(layer_replication): the merged model would not load.",
            hint="Keep the adapter unmerged.",
        )
    return RepeatedBlocks(replication.list.attribute, replication.order, changed)


def _ranges(checkpoints: Sequence[Checkpoint]) -> list[list[int]]:
    """Return the ranges of blocks that every adapter has."""
    all_ranges: list[list[list[int]]] = [getattr(c.config, "layer_replication", None) or [] for c in checkpoints]
    for checkpoint, ranges in zip(checkpoints, all_ranges, strict=True):
        if ranges != all_ranges[0]:
            raise MergeError(
                f"{checkpoints[0].origin} has layer_replication={all_ranges[0] or None}, and {checkpoint.origin} "
                f"{ranges or None}: they are for models of different blocks.",
                hint="Merge them one after the other, each into the base that it was trained on.",
            )
    return all_ranges[0]


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)}
