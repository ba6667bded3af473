"""Plans the pieces of work and the output's files, from a base's headers and the adapters' changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from veneer.adapters.merge.new_bias import NewBiases
from veneer.base_model.sites.site import Site
from veneer.errors import MergeError
from veneer.merging.base.disk_base import DiskBase
from veneer.merging.base.weight_files import FLOATS, NAMES, WeightFiles
from veneer.merging.work.adapter_changes import AdapterChanges, module_id, tie_groups
from veneer.merging.work.file_layout import OutputFile, PlannedTensor, lay_out
from veneer.merging.work.pieces import (
    AddBias,
    CastTensor,
    ChangedLayer,
    CopyBytes,
    MergeConverted,
    MergeLayer,
    OutputTensor,
    Piece,
    ReplaceTensor,
)
from veneer.merging.work.rounding import Rounding

# Bytes that one piece of copying moves at most, so that several cores take part.
_RUN = 1 << 26


@dataclass
class MergePlan:
    """The pieces of work of a merge, and the files that they fill.

    Attributes:
        files: the output's weight files.
        pieces: the work, in the order of the tensors that they finish.
        untied: the parameters that share a tensor in the base and not in the output.
        missing: parameters that neither the base nor an adapter has.
        dtype: of most of the output's values, as safetensors calls it.
    """

    files: list[OutputFile]
    pieces: list[Piece]
    untied: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    dtype: str = "F32"


class Planner:
    """Makes a :class:`MergePlan`.

    Args:
        base: the base.
        changes: the adapters' changes.
        dtype: of the output; the base's own when ``None``.
        rounding: how values are rounded.
        biases: for layers that have none.
    """

    def __init__(
        self,
        base: DiskBase,
        changes: AdapterChanges,
        dtype: torch.dtype | None,
        rounding: Rounding,
        biases: NewBiases,
    ) -> None:
        self.base, self.changes, self.biases = base, changes, biases
        self.dtype, self.rounding = dtype, rounding
        self.model, self.stored, self.files = base.model, base.stored, base.files
        self.layers = self._layers()
        self.groups = {name: group for group in tie_groups(base.model) for name in group}
        self.pieces: list[Piece] = []
        self.shapes = {name: packed.shape for name, packed in base.packed.items()}
        self.shapes |= {
            name: (length, *self.shapes.get(name, base.files.shape(name))[1:]) for name, length in base.lengths.items()
        }
        self.new: list[PlannedTensor] = []
        self.untied: list[str] = []

    def plan(self, limit: int | None) -> MergePlan:
        """Return the plan, with at most ``limit`` bytes of tensors in a file."""
        for name in self._written(self._changed()):
            self._plan_parameter(name)
        for name, shape in self.biases.shapes.items():
            self._plan_bias(name, shape)
        if self.untied:
            self._part_biases()
        tensors = self._base_tensors()
        self._plan_casts(tensors)
        headers = {file: header.metadata for file, header in self.files.headers.items()}
        files = lay_out([*tensors, *self.new], headers, limit)
        self.pieces += _copies(self.files, files, self._finished())
        order = {name: i for i, name in enumerate(name for file in files for name in file.tensors)}
        self.pieces.sort(key=lambda piece: min(order[name] for name in piece.outputs))
        return MergePlan(files, self.pieces, self.untied, self._missing(), NAMES[self.dtype or self.base.common_dtype])

    def _base_tensors(self) -> list[PlannedTensor]:
        """Return the base's tensors that the output has too: all but what belongs to quantised ones."""
        dropped = set(self.base.parts)
        if self.base.packed:
            dropped |= {name for name in self.files.places if name.endswith("activation_scale")}
        return [
            PlannedTensor(
                name,
                NAMES[self.out_dtype(name)] if self._casts(name) else place.info.dtype,
                self.shapes.get(name, place.info.shape),
                place.file,
            )
            for name, place in self.files.places.items()
            if name not in dropped
        ]

    def _plan_casts(self, tensors: Sequence[PlannedTensor]) -> None:
        """Plan the tensors that no adapter changes and that have another dtype or shape in the output."""
        finished = self._finished()
        for tensor in tensors:
            info = self.files.places[tensor.name].info
            if tensor.name not in finished and (tensor.dtype, tensor.shape) != (info.dtype, info.shape):
                self._plan_cast(tensor.name, tensor.name)

    def _plan_cast(self, source: str, target: str) -> None:
        self.pieces.append(CastTensor(target, self.out_dtype(source), self.rounding, self.base.tensor(source)))

    def _finished(self) -> set[str]:
        """Return the output's tensors that are planned so far."""
        return {name for piece in self.pieces for name in piece.outputs}

    # -- dtypes and values ---------------------------------------------------------------------------------

    def _casts(self, name: str) -> bool:
        return name in self.base.packed or self.files.places[name].info.dtype in FLOATS

    def out_dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a stored tensor gets."""
        if name in self.base.packed:
            return self.dtype or self.base.common_dtype
        return self.dtype if self.dtype is not None and self._casts(name) else self.files.dtype(name)

    def _check_floats(self, name: str, why: str) -> None:
        """Raise ``MergeError`` where a stored tensor is of a dtype that holds no merged weight."""
        if not self._casts(name):
            raise MergeError(
                f"{why} {name}, which the base stores as {self.files.places[name].info.dtype}: no dtype of weights.",
                hint="Use another copy of the base.",
            )

    # -- changes -------------------------------------------------------------------------------------------

    def _layers(self) -> dict[str, ChangedLayer]:
        """Map each parameter to the layer that changes it; a bias is reached through the weight beside it."""
        sites_of: dict[str, list[Site]] = {}
        for site in (layer.site for layer in self.changes.layers.values()):
            leaf = "bias" if site.shift_only else site.parameter
            sites_of.setdefault(f"{site.name}.{leaf}", []).append(site)
        return {name: ChangedLayer(tuple(sites), self.changes) for name, sites in sites_of.items()}

    def _changed(self) -> list[str]:
        """Return the names of the parameters that the adapters change or replace."""
        return list(dict.fromkeys([*self.layers, *self.changes.replacements]))

    def _are_alike(self, first: str, second: str) -> bool:
        """Tell whether equal tensors change two parameters that share a tensor, in the same way."""
        if first in self.changes.replacements or second in self.changes.replacements:
            return False
        left, right = self._parts(first), self._parts(second)
        if [(kind, len(tensors)) for kind, tensors in left] != [(kind, len(tensors)) for kind, tensors in right]:
            return False
        lists = [[tensor for _, tensors in parts for tensor in tensors] for parts in (left, right)]
        return all(a is b or torch.equal(a, b) for a, b in zip(*lists, strict=True))

    def _parts(self, name: str) -> list[tuple[object, list[Tensor]]]:
        sites = self.layers[name].sites if name in self.layers else ()
        return [part for site in sites for part in self.changes.parts(site.id)]

    def _written(self, changed: Sequence[str]) -> list[str]:
        """Return the parameters to write; those that share a tensor get one each as soon as they differ."""
        written: list[str] = []
        for name in changed:
            group = self.groups.get(name, [name])
            by_module = {module_id(self.model, tied): tied for tied in reversed(group)}
            first, *others = by_module.values()
            if not all(self._are_alike(first, other) for other in others):
                self.untied += group
                written += by_module.values()
            elif self._is_written_by_name(name, group, changed):
                written.append(name)
        self.untied = list(dict.fromkeys(self.untied))
        return list(dict.fromkeys(written))

    def _is_written_by_name(self, name: str, group: Sequence[str], changed: Sequence[str]) -> bool:
        """Tell whether a changed parameter is written by its own name, not by another name of the same tensor."""
        is_stored = name in self.stored.direct or name in self.stored.converted
        return is_stored or not any(other in changed and other in self.stored.direct for other in group)

    def _stored_for(self, group: Sequence[str]) -> str | None:
        """Return the stored tensor from which a group of tied parameters is read."""
        return next((self.stored.direct[name] for name in group if name in self.stored.direct), None)

    def _plan_parameter(self, name: str) -> None:
        if name in self.stored.converted:
            self._plan_conversion(name)
            return
        stored = self.stored.direct.get(name)
        source = stored or self._stored_for(self.groups.get(name, [name]))
        target = stored or (source if source is not None and name not in self.untied else name)
        if source is not None and (name in self.layers or self._brings_floats(name)):
            self._check_floats(source, "The adapter changes")
        dtype = (self.dtype or self.base.common_dtype) if source is None else self.out_dtype(source)
        if name in self.changes.replacements:
            self._plan_replacement(name, target, source, dtype)
        elif source is None:
            raise MergeError(
                f"The adapter changes {name}, and the base {type(self.model).__name__} has no such weight on disk.",
                hint="Give the base that the adapter was trained on, or another task=.",
            )
        elif name in self.layers:
            self._plan_layer(self.layers[name], OutputTensor(target, self.base.tensor(source), dtype))
        elif stored is None:
            self._plan_cast(source, target)
        if target not in self.files:
            self._add(target, dtype, self._shape(name, source))

    def _shape(self, name: str, source: str | None) -> tuple[int, ...]:
        """Return a parameter's shape in the output, read from the stored tensor ``source`` or brought by an adapter."""
        if name in self.changes.replacements:
            return tuple(self.changes.replacements[name].shape)
        return () if source is None else self.shapes.get(source) or self.files.shape(source)

    def _add(self, target: str, dtype: torch.dtype, shape: tuple[int, ...], file: str | None = None) -> None:
        """Add a tensor that the base does not have to the output, in the last file unless one is given."""
        self.new.append(PlannedTensor(target, NAMES[dtype], shape, file or list(self.files.paths)[-1]))

    def _brings_floats(self, name: str) -> bool:
        """Tell whether an adapter replaces a parameter by plain numbers."""
        return name in self.changes.replacements and self.changes.replacements[name].is_floating_point()

    def _plan_replacement(self, name: str, target: str, source: str | None, dtype: torch.dtype) -> None:
        tensor = self.changes.replacements[name]
        if not tensor.is_floating_point():
            dtype = tensor.dtype if source is None else self.out_dtype(source)
        before = None if source is None else self.base.tensor(source)
        self.shapes[target] = tuple(tensor.shape)
        self.pieces.append(ReplaceTensor(target, dtype, self.rounding, tensor, before))

    def _plan_layer(self, layer: ChangedLayer, weight: OutputTensor) -> None:
        site = layer.site
        if site.shift_only:
            self.pieces.append(MergeLayer(layer, None, weight, self.rounding))
            return
        bias = None if site.bias is None else self._bias(f"{site.name}.bias")
        self.pieces.append(MergeLayer(layer, weight, bias, self.rounding))

    def _bias(self, name: str) -> OutputTensor:
        """Return where the bias of a layer is read and written."""
        stored = self.stored.direct.get(name)
        # BERT's output layer shares its bias with the module around it, under whose name it is stored.
        source = stored or self._stored_for(self.groups.get(name, []))
        if source is None:
            raise MergeError(f"The base has no {name} on disk.", hint="Copy or download it again.")
        self._check_floats(source, "The adapter changes the layer of")
        target = name if stored is None and self.untied else source
        self._add_like(target, source)
        return OutputTensor(target, self.base.tensor(source), self.out_dtype(source))

    def _add_like(self, target: str, source: str) -> None:
        """Add a tensor of another's shape and dtype to the output, unless the base has one of that name."""
        if target not in self.files:
            self._add(target, self.out_dtype(source), self.files.shape(source))

    def _part_biases(self) -> None:
        """Write shared biases apart where the weights beside them are: the config ties both or neither."""
        finished = self._finished()
        for name, group in self.groups.items():
            source = self._stored_for(group)
            if source is None or not name.endswith(".bias"):
                continue
            if name not in self.stored.direct and name not in finished:
                self._plan_cast(source, name)
                self._add_like(name, source)

    def _plan_bias(self, name: str, shape: tuple[int, ...]) -> None:
        weight = self.stored.direct.get(f"{name}.weight")
        target = f"{name}.bias" if weight is None else weight.removesuffix("weight") + "bias"
        dtype = (self.dtype or self.base.common_dtype) if weight is None else self.out_dtype(weight)
        self.pieces.append(AddBias(target, dtype, self.rounding, self.layers.get(f"{name}.weight"), shape))
        self._add(target, dtype, shape, None if weight is None else self.files.places[weight].file)

    def _plan_conversion(self, name: str) -> None:
        conversion = self.stored.converted[name]
        sources = [source for source, _ in conversion.sources]
        if not self._finished().isdisjoint(sources):
            return
        names = [name for name, rule in self.stored.converted.items() if rule is conversion]
        replacements = {n: self.changes.replacements[n] for n in names if n in self.changes.replacements}
        layers = {n: self.layers[n] for n in names if n in self.layers}
        for source in sources:
            self._check_floats(source, f"{name} is changed by the adapter and made of")
        dtypes = {self.out_dtype(source) for source in sources}
        if len(dtypes) > 1 or any(layer.site.bias is not None for layer in layers.values()):
            raise MergeError(
                f"{name} is made of tensors that cannot be written back one by one.",
                hint="Merge in memory: veneer.load(..., merge=True).save_pretrained(...).",
            )
        values = {source: self.base.tensor(source) for source in sources}
        self.pieces.append(
            MergeConverted(conversion, values, layers, replacements, dtypes.pop(), self.model, self.rounding)
        )

    def _missing(self) -> list[str]:
        """Return the parameters that neither the base nor an adapter has."""
        present = {*self.stored.direct, *self.stored.converted, *self.changes.replacements}
        return [
            name
            for name, _ in self.model.named_parameters()
            if name not in present and not present.intersection(self.groups.get(name, ()))
        ]


def _copies(base: WeightFiles, files: Sequence[OutputFile], finished: set[str]) -> list[Piece]:
    """Return the pieces that copy unchanged tensors, neighbours together."""
    pieces: list[Piece] = []
    for file in files:
        names: list[str] = []
        for name in file.tensors:
            if name in finished:
                continue
            place = base.places[name]
            last = base.places[names[-1]] if names else None
            joined_in_base = last is not None and (last.file, last.start + last.info.nbytes) == (
                place.file,
                place.start,
            )
            joined_in_output = names and file.tensors[names[-1]].end == file.tensors[name].start
            if names and not (joined_in_base and joined_in_output and _length(base, names) < _RUN):
                pieces.append(_copy(base, names))
                names = []
            names.append(name)
        if names:
            pieces.append(_copy(base, names))
    return pieces


def _length(base: WeightFiles, names: Sequence[str]) -> int:
    return sum(base.places[name].info.nbytes for name in names)


def _copy(base: WeightFiles, names: Sequence[str]) -> CopyBytes:
    first = base.places[names[0]]
    return CopyBytes(base, tuple(names), first.file, first.start, _length(base, names))
