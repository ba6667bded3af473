"""``layer_replication`` from disk to disk: the base's files, seen as those of a model with some blocks several times.

The view has the tensors of each block under every number that the block gets, all at the bytes where they lie. Whatever
plans and merges sees a deeper base, and gives each of its tensors bytes of its own.
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
class Repeated:
    """Which blocks of the base the output has.

    Attributes:
        name: of the model's list of blocks: ``layers``, ``layer`` or ``h``.
        order: for each block of the output, the base's that it comes from.
        config: keys of the base's config that the output has otherwise.
    """

    name: str
    order: Sequence[int]
    config: Mapping[str, Any]

    def seen_in(self, files: WeightFiles) -> WeightFiles:
        """The base's files with the output's blocks; what lies in no block comes first."""
        number = re.compile(rf"(?:^|\.){self.name}\.(\d+)\.")
        blocks: dict[int, list[tuple[str, str, TensorPlace]]] = {}
        places: dict[str, TensorPlace] = {}
        for name, place in files.places.items():
            found = number.search(name)
            if found is None:
                places[name] = place
            else:
                start, end = found.span(1)
                blocks.setdefault(int(found[1]), []).append((name[:start], name[end:], place))
        for new, old in enumerate(self.order):
            for before, after, place in blocks.get(old, ()):
                name = f"{before}{new}{after}"
                places[name] = replace(place, info=replace(place.info, name=name))
        return files.seen_as(places)

    def file_size(self, files: WeightFiles) -> int | None:
        """Bytes of tensors in a file of the output: those of the base's largest; all where the base has one file."""
        return max(header.nbytes for header in files.headers.values()) if len(files.headers) > 1 else None


def repeated_blocks(
    checkpoints: Sequence[Checkpoint], source: Source, build: Callable[..., nn.Module]
) -> Repeated | None:
    """The blocks that the adapters want; ``None`` when these are the base's own.

    Args:
        checkpoints: the adapters.
        source: the base.
        build: makes its model with some keys of the config set otherwise, without weights.

    Raises:
        MergeError: the adapters want different blocks. ConfigError: a range is none of the model's.
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
    changed |= {key: changed[own] for key, own in aliases.items() if own in changed and key in written}
    # Some families make every n-th block otherwise, or name those that are: a copy would be made as its number says.
    if _shapes(model) != _shapes(build(**changed)):
        raise UnsupportedError(
            f"The blocks of {type(model).__name__} differ by their number, so no config describes them repeated "
            "(layer_replication): what is merged would not load.",
            hint="Keep the adapter unmerged.",
        )
    return Repeated(replication.list.attribute, replication.order, changed)


def _ranges(checkpoints: Sequence[Checkpoint]) -> list[list[int]]:
    """The ranges that every adapter has."""
    wanted: list[list[list[int]]] = [getattr(c.config, "layer_replication", None) or [] for c in checkpoints]
    for checkpoint, ranges in zip(checkpoints, wanted, strict=True):
        if ranges != wanted[0]:
            raise MergeError(
                f"{checkpoints[0].origin} has layer_replication={wanted[0] or None}, and {checkpoint.origin} "
                f"{ranges or None}: they are for models of different blocks.",
                hint="Merge them one after the other, each into the base that it was trained on.",
            )
    return wanted[0]


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)}
