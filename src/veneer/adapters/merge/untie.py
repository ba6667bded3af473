"""Shares or parts the weights that several modules of a model shared before a merge changed some of them.

Those that are equal are shared again. Those that are not must stay apart when the model is saved and read again:
transformers ties by the config's ``tie_word_embeddings``, fills a weight that a file lacks from the one that it is tied
to, and keeps apart weights that the file holds with different values.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.packages import stands_in_for_peft
from veneer.printing import warn

FLAG = "tie_word_embeddings"

# The module that holds a parameter, and the parameter's name there.
Place = tuple[str, str]


def untie(model: nn.Module, groups: Sequence[Sequence[Place]], alike: Collection[str]) -> None:
    """Share equal weights again, and keep the others apart in a saved model too.

    Args:
        model: the merged model, without wrappers.
        groups: the places that shared a parameter before.
        alike: the modules that were changed alike, so that only rounding can part them.
    """
    ties = _ties(model)
    known = {*ties, *ties.values()}
    # Whoever lets other modules share weights, such as repeated blocks, sees to them.
    tied = [[(name, leaf) for name, leaf in group if f"{name}.{leaf}" in known] for group in groups]
    for group in tied:
        _share_again(model, group, alike)
    apart = {f"{name}.{leaf}" for group in tied if len(_distinct(model, group)) > 1 for name, leaf in group}
    if apart.intersection(ties):
        _say_so(model, apart)
        _write_apart(model, ties)


def asks_for_ties(model: nn.Module) -> bool:
    """Tell whether a model computes otherwise when its config ties weights, as Switch Transformers does."""
    kinds = {type(module) for module in model.modules()}
    return any(FLAG in _names(kind.forward) for kind in kinds)


def _names(function: Any) -> Collection[str]:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return () if code is None else code.co_names


def _share_again(model: nn.Module, group: Sequence[Place], alike: Collection[str]) -> None:
    distinct: list[tuple[str, Tensor]] = []
    for name, leaf in group:
        module = model.get_submodule(name)
        parameter = module._parameters[leaf]
        assert parameter is not None
        equals = (other for first, other in distinct if {first, name} <= set(alike) or _equal(parameter, other))
        same = next(equals, None)
        if same is None:
            distinct.append((name, parameter))
        elif same is not parameter:
            setattr(module, leaf, same)


def _equal(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    comparable = not (a.is_meta or b.is_meta) and (a.dtype, a.device) == (b.dtype, b.device)
    return comparable and torch.equal(a, b)


def _distinct(model: nn.Module, group: Sequence[Place]) -> set[int]:
    return {id(model.get_submodule(name)._parameters[leaf]) for name, leaf in group}


def _tying(model: nn.Module) -> list[tuple[str, Any]]:
    """List the parts of a model, itself included, that tie weights by a config."""
    return [(name, part) for name, part in model.named_modules() if hasattr(part, "get_expanded_tied_weights_keys")]


def _own_ties(name: str, part: Any) -> dict[str, str]:
    at = name + "." if name else ""
    listed = isinstance(part._tied_weights_keys, list)
    ties = _ties_to_embedding(part) if listed else part.get_expanded_tied_weights_keys()
    return {at + target: at + source for target, source in ties.items()}


def _ties_to_embedding(part: Any) -> dict[str, str]:
    """Map the parameters that a model of older transformers lists to the input embedding's weight."""
    embedding = part.get_input_embeddings() if part.config.tie_word_embeddings else None
    sources = [f"{name}.weight" for name, module in part.named_modules() if module is embedding]
    return {target: source for source in sources for target in part._tied_weights_keys if target != source}


def _ties(model: nn.Module) -> dict[str, str]:
    """Map each parameter to the one that transformers would tie it to."""
    return {target: source for name, part in _tying(model) for target, source in _own_ties(name, part).items()}


def _say_so(model: nn.Module, apart: Collection[str]) -> None:
    """Say in the config that weights differ, where it can be said and means nothing else."""
    if asks_for_ties(model):
        return
    for name, part in _tying(model):
        if not _own_ties(name, part).keys().isdisjoint(apart) and _can_say(part.config):
            setattr(part.config, FLAG, False)
            if stands_in_for_peft():
                warn(f"Setting {FLAG}=False in the config: the merged weights differ, and are saved apart.")


def _can_say(config: Any) -> bool:
    """Tell whether a config that is read again still says so: T5's and its kin's always say that weights are tied."""
    return not getattr(type(config).from_dict({**config.to_dict(), FLAG: False}), FLAG, False)


def _write_apart(model: nn.Module, ties: dict[str, str]) -> None:
    """Give each parameter that its reader would not tie to an equal one a tensor of its own, which is then saved."""
    remaining = _ties(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    users = Counter(map(id, parameters.values()))
    for target, source in ties.items():
        parameter = parameters[target]
        is_filled = target in remaining and parameter is parameters[source]
        if not is_filled and users[id(parameter)] > 1:
            users[id(parameter)] -= 1
            module, _, leaf = target.rpartition(".")
            copied = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            setattr(model.get_submodule(module), leaf, copied)
