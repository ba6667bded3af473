"""Reads the base of a merge from disk to disk: its model without weights, and how each parameter is stored.

Only headers are read. The model has what the adapters ask of the base: repeated blocks, a resized vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.checkpoints.checkpoint import Checkpoint
from veneer.checkpoints.model_class import note_of, wanted_task
from veneer.checkpoints.resized_vocabulary import required_vocabulary
from veneer.errors import BaseModelError
from veneer.files.names import MODEL_CONFIG
from veneer.files.source import Source
from veneer.files.torch_dtypes import DTYPES
from veneer.merging.base.plain_skeleton import plain_skeleton, plainly_stored
from veneer.merging.base.quantized_tensors import Packed, as_in_model, packed_tensors
from veneer.merging.base.repeated_files import repeated_blocks
from veneer.merging.base.skeleton import DiskReader, StoredNames, build_skeleton, resize_vocabulary, stored_names
from veneer.merging.base.weight_files import FLOATS, WeightFiles


@dataclass(frozen=True)
class StoredTensor:
    """Reads a stored tensor's values, dequantised where it is quantised.

    Attributes:
        files: the base's.
        name: the tensor's.
        packed: how it is quantised, where it is.
        length: its first size where the output's is another: rows of zeros are added, or the last left out.
    """

    files: WeightFiles
    name: str
    packed: Packed | None = None
    length: int | None = None

    @property
    def as_stored(self) -> bool:
        """True if the tensor's values lie in the file as they are."""
        return self.packed is None and self.length is None

    def whole(self) -> Tensor:
        """Read all of it, in the shape that it is stored in but for its length; float32 where it was quantised."""
        tensor = self.files.read(self.name) if self.packed is None else self.packed.values(self.files, self.name)
        if self.length is None:
            return tensor
        missing = max(self.length - tensor.shape[0], 0)
        return torch.cat([tensor[: self.length], tensor.new_zeros(missing, *tensor.shape[1:])])

    def rows(self, start: int, into: Tensor) -> Tensor:
        """Fill ``into`` with rows of it, seen as a matrix of as many columns, from the row ``start`` on."""
        return self.files.fill(into, self.name, start * into.shape[1] * into.element_size())


class DiskBase:
    """The base of a merge, as the adapters need it.

    Args:
        source: its folder.
        files: its weight files.
        checkpoints: the adapters.
        task: what the output is for; by default an adapter's task.
        dequantize: whether a quantised base is turned into plain numbers.
        trust_remote_code: run code that comes with the base.

    Attributes:
        files: the weight files, which show repeated blocks under each of their numbers.
        file_size: bytes of tensors in a file of the output, where it has other blocks than the base.
        config: keys of the base's config that the adapters change.
        build: makes the model without weights, with some keys of its config changed.
        model: the model without weights.
        stored: where its parameters lie.
        packed: quantised tensor -> how it is quantised.
        lengths: stored tensor -> its first size in the output, where the vocabulary was resized.
        notes: warnings for the user.

    Raises:
        BaseModelError: the base has no tensor of its own model class. MergeError, UnsupportedError: it cannot be merged
            into.
    """

    def __init__(
        self,
        source: Source,
        files: WeightFiles,
        checkpoints: Sequence[Checkpoint],
        task: str | None,
        dequantize: bool,
        trust_remote_code: bool,
    ) -> None:
        self.source, self.checkpoints, self.task = source, checkpoints, task
        self.files = files
        self.file_size: int | None = None
        self.config: dict[str, Any] = {}
        self.notes: list[str] = []
        self.build: Callable[..., nn.Module] = partial(build_skeleton, source, checkpoints, task, trust_remote_code)
        self._repeat_blocks()
        self.packed: Mapping[str, Packed] = packed_tensors(source, self.files, dequantize)
        vocabulary = required_vocabulary(checkpoints, source, source.json(MODEL_CONFIG), wanted_task(task, checkpoints))
        plain = self._plain_model() if vocabulary is None else None
        self.model, self.stored = plain or self._transformers_model()
        self.packed = as_in_model(self.packed, self.model, self.stored.direct)
        self.lengths: Mapping[str, int] = {} if vocabulary is None else self._resize_vocabulary(vocabulary)

    def _repeat_blocks(self) -> None:
        repeated = repeated_blocks(self.checkpoints, self.source, self.build)
        if repeated is None:
            return
        self.file_size = repeated.file_size(self.files)
        self.files = repeated.view(self.files)
        self.config.update(repeated.config)
        self.build = partial(self.build, **repeated.config)
        self.notes.append(
            f"The output has {len(repeated.order)} blocks, each from one of the base's (layer_replication)."
        )

    def _plain_model(self) -> tuple[nn.Module, StoredNames] | None:
        model = plain_skeleton(self.source, self.files, self.checkpoints, self.task, **self.config)
        return None if model is None else (model, plainly_stored(self.files))

    def _transformers_model(self) -> tuple[nn.Module, StoredNames]:
        model = self.build()
        self.notes += note_of(type(model), self.source.json(MODEL_CONFIG), self.checkpoints, self.task)
        shapes = {name: place.info.shape for name, place in self.files.places.items() if name not in self.parts}
        shapes |= {name: packed.shape for name, packed in self.packed.items()}
        stored = stored_names(model, shapes, shapes)
        if not stored.direct and not stored.converted:
            raise BaseModelError(
                f"No tensor of {self.source.origin} belongs to its own model class, {type(model).__name__}.",
                hint="Check that config and weights are from the same model.",
            )
        return model, stored

    def _resize_vocabulary(self, vocabulary: int) -> dict[str, int]:
        self.config["vocab_size"] = vocabulary
        self.notes.append(f"The base's vocabulary was resized to {vocabulary} tokens, as the adapter's.")
        return resize_vocabulary(self.model, vocabulary, self.stored)

    @cached_property
    def parts(self) -> frozenset[str]:
        """The tensors that belong to quantised ones, such as scales."""
        return frozenset(part for packed in self.packed.values() for part in packed.parts)

    @cached_property
    def common_dtype(self) -> torch.dtype:
        """The dtype of most of its plain values."""
        counts = Counter[str]()
        for name, place in self.files.places.items():
            plain = place.info.dtype in FLOATS and name not in self.parts and name not in self.packed
            counts[place.info.dtype] += place.info.numel if plain else 0
        return DTYPES[counts.most_common(1)[0][0]] if counts.total() else torch.bfloat16

    def tensor(self, name: str) -> StoredTensor:
        """Return a stored tensor, of which nothing is read yet."""
        return StoredTensor(self.files, name, self.packed.get(name), self.lengths.get(name))

    @property
    def reader(self) -> DiskReader:
        """The reader of the model's parameters."""
        return DiskReader(self.model, self.stored, lambda name: self.tensor(name).whole())
