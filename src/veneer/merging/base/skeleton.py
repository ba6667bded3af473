"""Builds the base model without its weights, and finds where each of its parameters lies in the checkpoint.

The model is built on the meta device, so that an adapter is planned against it exactly as against a live one. A
parameter is often stored under another name, and since transformers 5 some are made of several tensors (the experts
of a mixture are stored apart and held as one). transformers' own rules for loading say which; a conversion among them
is data movement only, so its inverse takes a changed parameter back to the tensors it was made of.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.base_model.meta_model import meta_model
from veneer.base_model.transformers_internals import conversions_of, in_loading_order, parameter_for, renamed
from veneer.checkpoints.checkpoint import Checkpoint
from veneer.checkpoints.model_class import class_for, labels_of
from veneer.errors import MergeError
from veneer.files.names import MODEL_CONFIG
from veneer.files.source import Source


def build_skeleton(
    source: Source,
    checkpoints: Sequence[Checkpoint],
    task: str | None,
    trust_remote_code: bool = False,
    **changes: Any,
) -> nn.Module:
    """Build the model of a base's config, on the meta device.

    Args:
        source: the base.
        checkpoints: the adapters; the first that names a task decides, and a head of theirs its number of labels.
        task: decides instead.
        trust_remote_code: run code that comes with the model.
        **changes: keys of the config to set.

    Raises:
        BaseModelError: transformers cannot build it.
    """
    kind = class_for(source, source.json(MODEL_CONFIG), checkpoints, task, trust_remote_code)
    labels = labels_of(list(checkpoints))
    if labels is not None:
        changes["num_labels"] = labels
    return meta_model(kind, source, trust_remote_code, **changes)


@dataclass(frozen=True)
class Conversion:
    """Parameters that transformers makes of other tensors.

    Attributes:
        converter: transformers' rule.
        first: the parameter that the rule is named by.
        sources: the stored tensors, each with the pattern of the rule that it matches, in order.
        renamed: stored tensor -> its name in the rule.
    """

    converter: Any
    first: str
    sources: tuple[tuple[str, str], ...]
    renamed: Mapping[str, str]

    def parameters(self, tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """Make the parameters of the stored tensors."""
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.first, name, pattern, tensors[name])
        parameters = converter.convert(self.first, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in parameters.items()}

    def stored(self, parameters: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """Take parameters apart into stored tensors; the inverse of :meth:`parameters`."""
        reverse = self.converter.reverse_transform()
        first = ""
        for name, tensor in parameters.items():
            renamed, pattern = reverse.rename_source_key(name)
            if pattern is None:
                raise _not_invertible(name)
            first = first or renamed
            reverse.add_tensor(renamed, name, pattern, tensor)
        tensors = reverse.convert(first, model=model, config=model.config)
        back = {renamed: name for name, renamed in self.renamed.items()}
        if tensors.keys() != back.keys():
            raise _not_invertible(self.first)
        return {back[name]: value[0] if isinstance(value, list) else value for name, value in tensors.items()}


def _not_invertible(name: str) -> MergeError:
    return MergeError(
        f"{name} is stored in a form that cannot be written back from the merged parameter.",
        hint="Merge in memory: veneer.load(..., merge=True).save_pretrained(...).",
    )


@dataclass(frozen=True)
class StoredNames:
    """The stored tensors of a model's parameters.

    Attributes:
        direct: parameter -> the stored tensor that is its value.
        converted: parameter -> how it is made of several stored tensors.
    """

    direct: Mapping[str, str]
    converted: Mapping[str, Conversion]


def stored_names(model: Any, names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> StoredNames:
    """Match a checkpoint's tensors with a model's parameters, by the rules that transformers loads by."""
    renamings, converters = conversions_of(model)
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state = model.state_dict()
    direct: dict[str, str] = {}
    collected: dict[str, list[tuple[str, str]]] = {}
    for name in in_loading_order(names):
        parameter, pattern = parameter_for(name, renamings, converters, model, state)
        if parameter not in state and name in state:
            parameter, pattern = parameter_for(name, [], [], model, state)
        if parameter in state and pattern is None:
            direct.setdefault(parameter, name)
        elif parameter in state and pattern is not None:
            collected.setdefault(parameter, []).append((name, pattern))
    converted: dict[str, Conversion] = {}
    for first, sources in collected.items():
        renamed_by = {name: renamed(name, renamings) for name, _ in sources}
        conversion = Conversion(of_pattern[sources[0][1]], first, tuple(sources), renamed_by)
        empty = {name: torch.empty(shapes[name], device="meta") for name, _ in sources}
        converted.update(dict.fromkeys(conversion.parameters(empty, model), conversion))
    return StoredNames(direct, converted)


def resize_vocabulary(model: Any, vocabulary: int, stored: StoredNames) -> dict[str, int]:
    """Resize a skeleton's vocabulary; return, by stored tensor, the first size that its parameter has then."""
    before = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return {
        stored.direct[name]: parameter.shape[0]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name in stored.direct and parameter.shape != before[name]
    }


class DiskReader:
    """Reads a model's parameters from its checkpoint, by their names in the model: a :class:`ParameterReader`.

    Args:
        model: the skeleton.
        stored: where they lie.
        read_stored: returns a stored tensor by its name.
    """

    def __init__(self, model: nn.Module, stored: StoredNames, read_stored: Callable[[str], Tensor]) -> None:
        self.model, self.stored, self.read_stored = model, stored, read_stored
        named = list(model.named_parameters(remove_duplicate=False))
        by_tensor = {id(parameter): name for name, parameter in named if name in stored.direct}
        self._twins = {name: by_tensor[id(parameter)] for name, parameter in named if id(parameter) in by_tensor}

    def read(self, layer: str, module: nn.Module, name: str, parameter: Tensor, *, below: bool = False) -> Tensor:
        """Return a layer's parameter, as its layer holds it."""
        return nn.Parameter(self(f"{layer}.{name}"), requires_grad=False)

    def device(self, module: nn.Module, parameter: Tensor) -> torch.device:
        """Return the CPU: the skeleton lies on the meta device, and arithmetic happens here."""
        return torch.device("cpu")

    def __call__(self, name: str) -> Tensor:
        """Return a parameter of the model, as its layer holds it."""
        stored_name = name if name in self.stored.direct else self._twins.get(name, name)
        if stored_name in self.stored.direct:
            return self.read_stored(self.stored.direct[stored_name])
        if stored_name in self.stored.converted:
            conversion = self.stored.converted[stored_name]
            tensors = {source: self.read_stored(source) for source, _ in conversion.sources}
            return conversion.parameters(tensors, self.model)[stored_name]
        raise MergeError(
            f"The adapter changes {name}, and the base has no such weight on disk.",
            hint="Give the base that the adapter was trained on, or another task=.",
        )
