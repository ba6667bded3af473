"""Which layers a config means, and with which rank and scale, on models of random names: as peft chooses them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import peft
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import veneer
from veneer.errors import TargetError

pytestmark = pytest.mark.oracle

LEAVES = ("q_proj", "v_proj", "proj", "q", "my_q")
PLACES = ("attn", "mlp", "experts.0", "experts.1", "layers.0", "layers.1")
HEADS = ("lm_head", "model.top.proj")


def tree(names: Sequence[str]) -> nn.Module:
    """A model whose linear layers have these names."""
    root = nn.Module()
    for name in names:
        *parents, leaf = name.split(".")
        owner = root
        for part in parents:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(leaf, nn.Linear(1, 1))
    return root


def subset(values: Sequence[Any], least: int = 0) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(values), min_size=least, max_size=4, unique=True)


blocks = st.tuples(
    st.sampled_from(["layers", "h"]), st.sampled_from([0, 1, 2, 10]), st.sampled_from(PLACES), st.sampled_from(LEAVES)
).map(lambda parts: "model.{}.{}.{}.{}".format(*parts))
models = st.lists(blocks, min_size=3, max_size=12, unique=True).map(lambda names: [*names, *HEADS])
EXPRESSIONS = ("all-linear", r".*q_proj", r".*\.(q|v)_proj", r"model\.layers\.[01]\..*proj", r"q_proj", r".*(1|2)\..*q")


def endings(names: Sequence[str]) -> list[str]:
    """Every dotted ending of some names, whole names included, and some that stop inside a part."""
    parts = [name.split(".") for name in names]
    return sorted({".".join(p[i:]) for p in parts for i in range(len(p))} | {"proj", "roj", "attn", "0"})


@st.composite
def configs(draw: st.DrawFn) -> tuple[list[str], dict[str, Any]]:
    names = draw(models)
    ends = endings(names)
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["target_modules"] = draw(st.sampled_from(EXPRESSIONS))
    else:
        options["target_modules"] = draw(subset(ends, 1))
        options["layers_to_transform"] = draw(st.none() | st.sampled_from([0, 2]) | subset([0, 1, 2, 10]))
        if options["layers_to_transform"]:
            options["layers_pattern"] = draw(st.none() | st.sampled_from(["layers", "h"]) | subset(["h", "experts"]))
    options["exclude_modules"] = draw(st.none() | st.sampled_from(EXPRESSIONS[1:]) | subset(ends))
    if draw(st.integers(0, 3)) == 0:
        options["modules_to_save"] = draw(st.sampled_from([["top"], ["lm_head"], ["model.top"]]))
    patterns = st.dictionaries(st.sampled_from([*ends, r".*q", r"layers\.1\..*"]), st.integers(1, 9), max_size=3)
    return names, {**options, "rank_pattern": draw(patterns), "alpha_pattern": draw(patterns)}


def of_peft(names: Sequence[str], options: Mapping[str, Any]) -> dict[str, tuple[int, float]] | None:
    """Layer -> rank and scale; ``None`` where it finds nothing."""
    model = tree(names)
    try:
        peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=5, **options), model)
    except ValueError:
        return None
    layers = {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return {name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()}


def of_veneer(names: Sequence[str], options: Mapping[str, Any]) -> dict[str, tuple[int, float]] | None:
    config = veneer.LoraConfig(r=3, lora_alpha=5, **options)
    try:
        model = veneer.get_peft_model(tree(names), config)
    except TargetError:
        return None
    found = {name: layer.bound["default"][0].settings for name, layer in model.adapters.layers.items()}
    return {name: (settings.r, settings.scale) for name, settings in found.items()}


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(configs())
def test_the_layers_are_those_that_peft_chooses(drawn: tuple[list[str], dict[str, Any]]) -> None:
    names, options = drawn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert of_veneer(names, options) == of_peft(names, options)
