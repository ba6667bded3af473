"""Tells transformers' own ``load_adapter`` where the tensors of a checkpoint belong in a model with an adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from veneer.adapters.expert_names import HELD
from veneer.base_model.targets import names_match
from veneer.base_model.transformers_internals import conversion_classes
from veneer.checkpoints.layouts.stacked_experts import ExpertFactor, StackedTensor
from veneer.configs.base import PeftConfig
from veneer.configs.methods.lora import LoraConfig
from veneer.files.tensor_keys import PREFIX
from veneer.methods import method_of
from veneer.methods.base.method import around_adapter

ConversionOps, WeightConverter, WeightRenaming = conversion_classes()

LEAVES = ("lora_A", "lora_B")


def build_peft_weight_mapping(
    weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: PeftConfig | None = None
) -> list[Any]:
    """Return the conversions from a checkpoint's tensors to those of an adapter on the model.

    Args:
        weight_conversions: transformers' own for the base's weights, whose renamings of modules adapters follow.
        adapter_name: the adapter.
        peft_config: its config.
    """
    conversions: list[Any] = [WeightRenaming(f"^{re.escape(PREFIX)}", "")]
    conversions += [conversion for conversion in weight_conversions or () if isinstance(conversion, WeightRenaming)]
    if peft_config is None:
        return conversions
    for leaf in method_of(peft_config).leaves:
        head, tail = around_adapter(leaf.memory_name)
        name = ".".join(filter(None, (head, adapter_name, tail)))
        conversions.append(WeightRenaming(rf"\.{re.escape(leaf.name)}$", f".{name}"))
    if isinstance(peft_config, LoraConfig) and any(map(_stacks_experts, weight_conversions or ())):
        conversions += _stackings(peft_config, adapter_name)
    return conversions


class StackExperts(ConversionOps):  # type: ignore[misc,valid-type]
    """Stacks the LoRA of single experts for the one parameter that holds them: see ``stacked_experts.py``."""

    def __init__(self, is_down: bool) -> None:
        self.is_down = is_down

    def convert(
        self, input_dict: Mapping[str, list[Tensor]], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Any]:
        """Return the stack of the tensors of all experts, which are in order, of one matrix after another."""
        tensors: dict[str, Tensor] = {}
        factors: list[ExpertFactor] = []
        rank = width = height = 0
        for pattern in source_patterns:
            for expert, tensor in enumerate(input_dict[pattern]):
                key = f"{pattern} {expert}"
                tensors[key] = tensor
                factors.append(ExpertFactor(key, expert, rank, height))
            rows, columns = input_dict[pattern][0].shape
            rank += rows if self.is_down else columns
            height, width = height + rows, columns
        experts = len(input_dict[source_patterns[0]])
        shape = (experts, rank, width) if self.is_down else (experts, height, rank)
        return {target_patterns[0]: StackedTensor(shape, tuple(factors), self.is_down).make(tensors)}


def _stacks_experts(conversion: Any) -> bool:
    return isinstance(conversion, WeightConverter) and any("experts.*." in s for s in conversion.source_patterns)


def _stackings(config: LoraConfig, adapter_name: str) -> list[Any]:
    """Return the conversions for checkpoints from before transformers 5, in whose config single experts are named."""
    found = [[_named(names, config) for names in parts] for parts in HELD.values()]
    targeted = [[name for name in names if name] for names in found if all(names)]
    stackings = []
    for depth, names in enumerate(reversed(targeted)):
        # The parameter that comes first is the innermost.
        place = "experts." + "base_layer." * depth
        for leaf in LEAVES:
            sources = [rf"experts.*.{name}.{leaf}.{re.escape(adapter_name)}.weight" for name in names]
            target = f"{place}{leaf}.{adapter_name}.weight"
            stackings.append(WeightConverter(sources, target, [StackExperts(is_down=leaf == "lora_A")]))
    return stackings


def _named(names: Sequence[str], config: LoraConfig) -> str | None:
    """Return which of the names of an expert's layer a config targets."""
    targets = config.target_modules
    if isinstance(targets, str):
        return next((name for name in names if re.search(rf"\b{name}\b", targets)), None)
    return next((name for name in names if names_match(f"experts.0.{name}", targets)), None)
