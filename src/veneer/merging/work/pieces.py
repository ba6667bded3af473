"""Pieces of work of a merge: each reads the tensors that it needs, and hands finished bytes to a sink."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from veneer.base_model.sites.site import Site
from veneer.errors import MergeError
from veneer.merging.base.disk_base import StoredTensor
from veneer.merging.base.skeleton import Conversion
from veneer.merging.base.weight_files import NAMES, WeightFiles
from veneer.merging.work.adapter_changes import AdapterChanges
from veneer.merging.work.block_merge import BLOCK_VALUES, BlockMerge
from veneer.merging.work.rounding import Rounding, RoundingFigures, RoundingTally
from veneer.patches.patch import Patch, biases
from veneer.patches.weight_arithmetic import check_kept, matrices


class Sink(Protocol):
    """Takes finished bytes: writes them into the output's files, or compares them with files that are there."""

    def put(self, name: str, start: int, data: Tensor) -> None:
        """Take bytes of the output tensor ``name`` from its byte ``start`` on; ``data`` is contiguous."""
        ...

    def copy(self, names: Sequence[str], files: WeightFiles, file: str, start: int, count: int) -> None:
        """Take ``count`` bytes of a base's file from ``start`` on: tensors that are side by side in both files."""
        ...


class Piece(Protocol):
    """A piece of work, which finishes tensors of the output."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """The tensors that it finishes."""
        ...

    def run(self, sink: Sink) -> list[RoundingFigures]:
        """Do the work, and return the figures of each tensor that is changed."""
        ...


@dataclass(frozen=True)
class CopyBytes:
    """Copies unchanged tensors, side by side in the base's file and in the output's."""

    files: WeightFiles
    outputs: tuple[str, ...]
    file: str
    start: int
    count: int

    def run(self, sink: Sink) -> list[RoundingFigures]:
        """Copy them as one range of bytes."""
        sink.copy(self.outputs, self.files, self.file, self.start, self.count)
        return []


@dataclass(frozen=True)
class OneTensor:
    """Base of the pieces that finish one tensor.

    Attributes:
        name: the tensor's.
        dtype: of the output.
        rounding: how its values are rounded.
    """

    name: str
    dtype: torch.dtype
    rounding: Rounding

    @property
    def outputs(self) -> tuple[str, ...]:
        """The tensor."""
        return (self.name,)


@dataclass(frozen=True)
class CastTensor(OneTensor):
    """Changes only a tensor's dtype, or how many rows it has."""

    values: StoredTensor

    def run(self, sink: Sink) -> list[RoundingFigures]:
        """Round it, in blocks where it lies in the file as it is."""
        rounder, position = self.rounding.of(self.name), 0
        for block in self._blocks():
            data = rounder(block.float(), self.dtype) if block.dtype != torch.float64 else block.to(self.dtype)
            check_kept(block, data, self.name)
            sink.put(self.name, position, data.contiguous())
            position += data.numel() * data.element_size()
        return []

    def _blocks(self) -> Iterator[Tensor]:
        if not self.values.as_stored:
            yield self.values.whole()
            return
        files, name = self.values.files, self.values.name
        count = math.prod(files.shape(name))
        block = torch.empty(min(count, BLOCK_VALUES), dtype=files.dtype(name))
        for start in range(0, count, BLOCK_VALUES):
            yield self.values.rows(start, block[: count - start].view(-1, 1)).view(-1)


@dataclass(frozen=True)
class ReplaceTensor(OneTensor):
    """Puts a tensor that the adapter brings whole in the place of the base's."""

    tensor: Tensor
    before: StoredTensor | None

    def run(self, sink: Sink) -> list[RoundingFigures]:
        """Write it in the base's dtype."""
        before = None if self.before is None else self.before.whole()
        data, figures = _replaced(self.name, self.tensor, before, self.dtype, self.rounding)
        sink.put(self.name, 0, data.contiguous())
        return figures


def _replaced(
    name: str, tensor: Tensor, before: Tensor | None, dtype: torch.dtype, rounding: Rounding
) -> tuple[Tensor, list[RoundingFigures]]:
    """Return a tensor that takes a stored one's place, in the output's dtype, and the figures of the change."""
    if not tensor.is_floating_point():
        data = tensor.to(dtype)
        check_kept(tensor, data, name)
        return data, []
    after, tally = tensor.float(), RoundingTally()
    data = rounding.of(name)(after, dtype)
    check_kept(tensor, data, name)
    tally.add(before.float() if before is not None and before.shape == after.shape else torch.zeros(()), after, data)
    return data, [_checked(tally.figures(name, NAMES[dtype]))]


@dataclass(frozen=True)
class ChangedLayer:
    """One weight that adapters change, and the bias beside it, by the sites that view the weight, in order."""

    sites: tuple[Site, ...]
    changes: AdapterChanges

    @property
    def site(self) -> Site:
        """The first site; all view the weight alike."""
        return self.sites[0]

    def patches(self) -> list[Patch]:
        """Return the patches that the adapters apply to it."""
        return [site.in_weight(patch) for site in self.sites for patch in self.changes.patches(site.id)]


@dataclass(frozen=True)
class OutputTensor:
    """An output tensor and the stored values that it is made of."""

    name: str
    values: StoredTensor
    dtype: torch.dtype


@dataclass(frozen=True)
class AddBias(OneTensor):
    """Adds a bias to a layer that has none in the base: the adapters' shift of its output, or zeros."""

    layer: ChangedLayer | None
    shape: tuple[int, ...]

    @torch.no_grad()
    def run(self, sink: Sink) -> list[RoundingFigures]:
        """Compute the bias and write it."""
        shift = None if self.layer is None else biases(None, self.layer.patches())[-1]
        after, tally = torch.zeros(self.shape) if shift is None else shift, RoundingTally()
        rounded = self.rounding.of(self.name)(after, self.dtype)
        tally.add(torch.zeros(self.shape), after, rounded)
        sink.put(self.name, 0, rounded.contiguous())
        return [_checked(tally.figures(self.name, NAMES[self.dtype]))]


@dataclass(frozen=True)
class MergeLayer:
    """Merges a layer whose weight and bias each are a stored tensor."""

    layer: ChangedLayer
    weight: OutputTensor | None
    bias: OutputTensor | None
    rounding: Rounding

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(target.name for target in (self.weight, self.bias) if target is not None)

    def run(self, sink: Sink) -> list[RoundingFigures]:
        """Merge block by block."""
        patches = self.layer.patches()
        figures = []
        if self.weight is not None:
            figures.append(self._weight(self.weight, patches, sink))
        if self.bias is not None:
            figures.append(_bias(self.bias, self.bias.values.whole(), patches, self.rounding, sink))
        return figures

    def _weight(self, target: OutputTensor, patches: Sequence[Patch], sink: Sink) -> RoundingFigures:
        site, values = self.layer.site, target.values
        empty = site.canonical(torch.empty(site.stored.shape, device="meta"))
        if not values.as_stored or not empty.is_contiguous() or not all(patch.by_rows for patch in patches):
            return self._whole(target, patches, sink)
        rows, columns = empty.shape[-2:]
        blocks = BlockMerge(rows, columns, target.dtype, self.rounding.of(target.name))
        stored = torch.empty((blocks.step, columns), dtype=values.files.dtype(values.name))

        def read(index: int, start: int, stop: int) -> Tensor:
            return values.rows(index * rows + start, stored[: stop - start])

        def write(index: int, start: int, stop: int, merged: Tensor) -> None:
            sink.put(target.name, (index * rows + start) * columns * target.dtype.itemsize, merged)

        blocks.run(empty, patches, read, write)
        return _checked(blocks.tally.figures(target.name, NAMES[target.dtype]))

    def _whole(self, target: OutputTensor, patches: Sequence[Patch], sink: Sink) -> RoundingFigures:
        stored = target.values.whole()
        result, figures = merged_whole(self.layer.site, stored, patches, target, self.rounding)
        sink.put(target.name, 0, result)
        return figures


def merged_whole(
    site: Site, stored: Tensor, patches: Sequence[Patch], target: OutputTensor, rounding: Rounding
) -> tuple[Tensor, RoundingFigures]:
    """Merge ``patches`` into a weight as stored, in memory: for layouts that have no rows in the file."""
    result = torch.empty(stored.shape, dtype=target.dtype)
    weight = site.canonical(stored)
    before, after = matrices(weight), matrices(site.canonical(result))
    by_rows = all(patch.by_rows for patch in patches)
    blocks = BlockMerge(weight.shape[-2], weight.shape[-1], target.dtype, rounding.of(target.name), by_rows)

    def read(index: int, start: int, stop: int) -> Tensor:
        return before[index][start:stop]

    def write(index: int, start: int, stop: int, merged: Tensor) -> None:
        after[index][start:stop] = merged

    blocks.run(weight, patches, read, write)
    return result, _checked(blocks.tally.figures(target.name, NAMES[target.dtype]))


def _bias(
    target: OutputTensor, bias: Tensor, patches: Sequence[Patch], rounding: Rounding, sink: Sink
) -> RoundingFigures:
    after = biases(bias, patches)[-1]
    assert after is not None
    rounded = rounding.of(target.name)(after.detach(), target.dtype)
    tally = RoundingTally()
    tally.add(bias.float(), after, rounded)
    sink.put(target.name, 0, rounded.contiguous())
    return _checked(tally.figures(target.name, NAMES[target.dtype]))


def _checked(figures: RoundingFigures) -> RoundingFigures:
    if not math.isfinite(figures.change) or not math.isfinite(figures.rounding_error):
        raise MergeError(
            f"Merging gives NaN or infinite values in {figures.name}; nothing was merged.",
            hint="The weight's dtype may be too small for the change: merge with --dtype bfloat16 or float32.",
        )
    return figures


@dataclass(frozen=True)
class MergeConverted:
    """Makes parameters of several stored tensors, merges them, and takes them apart again.

    Attributes:
        conversion: how they are made.
        values: stored tensor -> its values.
        layers: parameter -> the layer whose adapters change it.
        replacements: parameter -> the adapter's tensor that takes its place.
        dtype: of the output.
        model: the skeleton.
        rounding: how values are rounded.
    """

    conversion: Conversion
    values: Mapping[str, StoredTensor]
    layers: Mapping[str, ChangedLayer]
    replacements: Mapping[str, Tensor]
    dtype: torch.dtype
    model: Any
    rounding: Rounding

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.conversion.sources)

    def run(self, sink: Sink) -> list[RoundingFigures]:
        """Merge each parameter whole."""
        tensors = {name: values.whole() for name, values in self.values.items()}
        parameters = self.conversion.parameters(tensors, self.model)
        del tensors
        figures: list[RoundingFigures] = []
        for name in list(parameters):
            parameters[name] = self._changed(name, parameters[name], figures)
        for name, tensor in self.conversion.stored(parameters, self.model).items():
            sink.put(name, 0, tensor.contiguous())
        return figures

    def _changed(self, name: str, stored: Tensor, figures: list[RoundingFigures]) -> Tensor:
        if name in self.replacements:
            data, replaced = _replaced(name, self.replacements[name], stored, self.dtype, self.rounding)
            figures += replaced
            return data
        if name not in self.layers:
            data = stored if stored.dtype == self.dtype else self.rounding.of(name)(stored.float(), self.dtype)
            check_kept(stored, data, name)
            return data
        layer = self.layers[name]
        target = OutputTensor(name, next(iter(self.values.values())), self.dtype)
        result, merged = merged_whole(layer.site, stored, layer.patches(), target, self.rounding)
        figures.append(merged)
        return result
