"""From a base's headers and the adapters' changes to the pieces of work and the output's layout."""

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
from veneer.merging.work.file_layout import OutFile, Wanted, lay_out
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
    """What is to be done.

    Attributes:
        files: the output's weight files.
        pieces: the work, in the order of the tensors that they finish.
        untied: the parameters that shared a tensor and no longer do.
        missing: parameters that neither the base nor an adapter has.
        dtype: that most of the output's values have, as safetensors calls it.
    """

    files: list[OutFile]
    pieces: list[Piece]
    untied: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    dtype: str = "F32"


class Planner:
    """Works out a :class:`MergePlan`.

    Args:
        base: the base.
        changes: what the adapters do.
        dtype: of the output; the base's own when ``None``.
        rounding: how values are rounded.
        biases: that layers without one get.
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
        self.new: list[Wanted] = []
        self.untied: list[str] = []

    def plan(self, limit: int | None) -> MergePlan:
        """Return the plan, with at most ``limit`` bytes of tensors in a file."""
        for name in self._owned(self._touched()):
            self._plan_parameter(name)
        for name, shape in self.biases.shapes.items():
            self._plan_bias(name, shape)
        if self.untied:
            self._part_biases()
        kept = self._kept()
        self._plan_casts(kept)
        headers = {file: header.metadata for file, header in self.files.headers.items()}
        files = lay_out([*kept, *self.new], headers, limit)
        self.pieces += _copies(self.files, files, self._finished())
        order = {name: i for i, name in enumerate(name for file in files for name in file.tensors)}
        self.pieces.sort(key=lambda piece: min(order[name] for name in piece.outputs))
        return MergePlan(files, self.pieces, self.untied, self._missing(), NAMES[self.dtype or self.base.common_dtype])

    def _kept(self) -> list[Wanted]:
        """Return the base's tensors that the output has too: all but what belongs to quantised ones."""
        dropped = set(self.base.parts)
        if self.base.packed:
            dropped |= {name for name in self.files.places if name.endswith("activation_scale")}
        return [
            Wanted(
                name,
                NAMES[self.out_dtype(name)] if self._casts(name) else place.info.dtype,
                self.shapes.get(name, place.info.shape),
                place.file,
            )
            for name, place in self.files.places.items()
            if name not in dropped
        ]

    def _plan_casts(self, kept: Sequence[Wanted]) -> None:
        """Plan the tensors that no adapter changes and that have another dtype or shape in the output."""
        finished = self._finished()
        for tensor in kept:
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
        """The dtype that a stored tensor gets."""
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

    # -- what is changed -----------------------------------------------------------------------------------

    def _layers(self) -> dict[str, ChangedLayer]:
        """Parameter -> what changes it; a layer's bias is reached through its weight where it has one."""
        found: dict[str, list[Site]] = {}
        for site in (layer.site for layer in self.changes.layers.values()):
            leaf = "bias" if site.shift_only else site.parameter
            found.setdefault(f"{site.name}.{leaf}", []).append(site)
        return {name: ChangedLayer(tuple(sites), self.changes) for name, sites in found.items()}

    def _touched(self) -> list[str]:
        return list(dict.fromkeys([*self.layers, *self.changes.saved]))

    def _are_alike(self, one: str, other: str) -> bool:
        """Whether two parameters that share a tensor are changed by the same, or by equal tensors in the same way."""
        if one in self.changes.saved or other in self.changes.saved:
            return False
        left, right = self._parts(one), self._parts(other)
        tensors = [[tensor for _, own in parts for tensor in own] for parts in (left, right)]
        same_kinds = [(kind, len(own)) for kind, own in left] == [(kind, len(own)) for kind, own in right]
        return same_kinds and all(a is b or torch.equal(a, b) for a, b in zip(*tensors, strict=True))

    def _parts(self, name: str) -> list[tuple[object, list[Tensor]]]:
        sites = self.layers[name].sites if name in self.layers else ()
        return [part for site in sites for part in self.changes.parts(site.id)]

    def _owned(self, touched: Sequence[str]) -> list[str]:
        """The parameters to write. Those that share a tensor get one each as soon as they differ."""
        found: list[str] = []
        for name in touched:
            group = self.groups.get(name, [name])
            owners = {module_id(self.model, other): other for other in reversed(group)}
            first, *others = owners.values()
            if not all(self._are_alike(first, other) for other in others):
                self.untied += [other for other in group if other not in self.untied]
                found += [other for other in owners.values() if other not in found]
            elif self._is_own(name, group, touched):
                found.append(name)
        return list(dict.fromkeys(found))

    def _is_own(self, name: str, group: Sequence[str], touched: Sequence[str]) -> bool:
        """Whether a changed parameter is written itself, and not by another name of the same tensor."""
        lies = name in self.stored.direct or name in self.stored.converted
        return lies or not any(other in touched and other in self.stored.direct for other in group)

    def _lies(self, group: Sequence[str]) -> str | None:
        """The stored tensor that a group of tied parameters is read from."""
        return next((self.stored.direct[name] for name in group if name in self.stored.direct), None)

    def _plan_parameter(self, name: str) -> None:
        if name in self.stored.converted:
            self._plan_conversion(name)
            return
        lies = self.stored.direct.get(name)
        source = lies or self._lies(self.groups.get(name, [name]))
        shared = name not in self.untied and lies is None and source is not None
        target = lies or (source if shared and source is not None else name)
        if source is not None and (name in self.layers or self._brings_floats(name)):
            self._check_floats(source, "The adapter changes")
        dtype = (self.dtype or self.base.common_dtype) if source is None else self.out_dtype(source)
        if name in self.changes.saved:
            self._plan_saved(name, target, source, dtype)
        elif source is None:
            raise MergeError(
                f"The adapter changes {name}, and the base {type(self.model).__name__} has no such weight on disk.",
                hint="Give the base that the adapter was trained on, or another task=.",
            )
        elif name in self.layers:
            self._plan_layer(self.layers[name], OutputTensor(target, self.base.tensor(source), dtype))
        elif lies is None:
            self._plan_cast(source, target)
        if target not in self.files:
            own = self.shapes.get(str(source)) or self.files.shape(str(source)) if source else ()
            shape = self.changes.saved[name].shape if name in self.changes.saved else own
            self.new.append(Wanted(target, NAMES[dtype], tuple(shape), list(self.files.paths)[-1]))

    def _brings_floats(self, name: str) -> bool:
        return name in self.changes.saved and self.changes.saved[name].is_floating_point()

    def _plan_saved(self, name: str, target: str, source: str | None, dtype: torch.dtype) -> None:
        tensor = self.changes.saved[name]
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
        bias_name = f"{site.name}.bias"
        bias = None
        if site.bias is not None:
            lies = self.stored.direct.get(bias_name)
            # BERT's output layer shares its bias with the module around it, under whose name it lies.
            source = lies or self._lies(self.groups.get(bias_name, []))
            if source is None:
                raise MergeError(f"The base has no {bias_name} on disk.", hint="Copy or download it again.")
            self._check_floats(source, "The adapter changes the layer of")
            target = bias_name if lies is None and self.untied else source
            bias = OutputTensor(target, self.base.tensor(source), self.out_dtype(source))
            self._want_new(target, source)
        self.pieces.append(MergeLayer(layer, weight, bias, self.rounding))

    def _want_new(self, target: str, source: str) -> None:
        """Give the output a tensor of another's shape and dtype, unless the base has one of that name."""
        if target not in self.files:
            shape, dtype = self.files.shape(source), NAMES[self.out_dtype(source)]
            self.new.append(Wanted(target, dtype, shape, list(self.files.paths)[-1]))

    def _part_biases(self) -> None:
        """Write apart the biases that are one where the weights beside them are; the config ties both or neither."""
        finished = self._finished()
        for name, group in self.groups.items():
            source = self._lies(group)
            if source is None or not name.endswith(".bias"):
                continue
            if name not in self.stored.direct and name not in finished:
                self._plan_cast(source, name)
                self._want_new(name, source)

    def _plan_bias(self, name: str, shape: tuple[int, ...]) -> None:
        weight = self.stored.direct.get(f"{name}.weight")
        target = f"{name}.bias" if weight is None else weight.removesuffix("weight") + "bias"
        dtype = (self.dtype or self.base.common_dtype) if weight is None else self.out_dtype(weight)
        self.pieces.append(AddBias(target, dtype, self.rounding, self.layers.get(f"{name}.weight"), shape))
        file = list(self.files.paths)[-1] if weight is None else self.files.places[weight].file
        self.new.append(Wanted(target, NAMES[dtype], shape, file))

    def _plan_conversion(self, name: str) -> None:
        conversion = self.stored.converted[name]
        names = [other for other, made in self.stored.converted.items() if made is conversion]
        if any(set(piece.outputs) & {source for source, _ in conversion.sources} for piece in self.pieces):
            return
        sources = [source for source, _ in conversion.sources]
        saved: dict[str, Tensor] = {n: self.changes.saved[n] for n in names if n in self.changes.saved}
        layers = {n: self.layers[n] for n in names if n in self.layers}
        odd = next((layer.site.name for layer in layers.values() if layer.site.bias is not None), None)
        for source in sources:
            self._check_floats(source, f"{name} is changed by the adapter and made of")
        dtypes = {self.out_dtype(source) for source in sources}
        if odd is not None or len(dtypes) > 1:
            raise MergeError(
                f"{name} is made of tensors that cannot be written back one by one.",
                hint="Merge in memory: veneer.load(..., merge=True).save_pretrained(...).",
            )
        values = {source: self.base.tensor(source) for source in sources}
        self.pieces.append(MergeConverted(conversion, values, layers, saved, dtypes.pop(), self.model, self.rounding))

    def _missing(self) -> list[str]:
        have = {*self.stored.direct, *self.stored.converted, *self.changes.saved}
        return [
            name
            for name, _ in self.model.named_parameters()
            if name not in have and not have.intersection(self.groups.get(name, ()))
        ]


def _copies(base: WeightFiles, files: Sequence[OutFile], done: set[str]) -> list[Piece]:
    """What stays as it is, neighbours together."""
    found: list[Piece] = []
    for file in files:
        names: list[str] = []
        for name in file.tensors:
            if name in done:
                continue
            place = base.places[name]
            last = base.places[names[-1]] if names else None
            joined = last is not None and (last.file, last.start + last.info.nbytes) == (place.file, place.start)
            ahead = names and file.tensors[names[-1]].end == file.tensors[name].start
            if names and not (joined and ahead and _length(base, names) < _RUN):
                found.append(_copy(base, names))
                names = []
            names.append(name)
        if names:
            found.append(_copy(base, names))
    return found


def _length(base: WeightFiles, names: Sequence[str]) -> int:
    return sum(base.places[name].info.nbytes for name in names)


def _copy(base: WeightFiles, names: Sequence[str]) -> CopyBytes:
    first = base.places[names[0]]
    return CopyBytes(base, tuple(names), first.file, first.start, _length(base, names))
