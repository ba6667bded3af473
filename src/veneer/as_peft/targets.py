"""The functions by which peft finds the modules that a config means, over Veneer's own."""

from __future__ import annotations

from typing import Any

from torch import nn

from veneer.base_model.catalog import Catalog
from veneer.base_model.default_targets import REGISTERED, default_feedforward, default_targets, model_types
from veneer.base_model.targets import ALL_LINEAR, names_match, passes_filters
from veneer.configs.base import Names, TargetedConfig
from veneer.configs.names import PeftType

INCLUDE_LINEAR_LAYERS_SHORTHAND = ALL_LINEAR
DUMMY_TARGET_MODULES = "dummy-target-modules"
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]


def check_target_module_exists(config: TargetedConfig, key: str) -> bool:
    """Tell whether a config means the module with this name."""
    targets = config.target_modules
    return targets is not None and names_match(key, targets) and passes_filters(key, config, targets)


def inspect_matched_modules(tuner: Any, adapter_name: str = "default") -> dict[str, list[str]]:
    """Return the names of the base's modules that an adapter's config means, and of the others."""
    config = tuner.peft_config[adapter_name]
    names: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for name in tuner.adapters.catalog.modules:
        names["matched" if check_target_module_exists(config, name) else "unmatched"].append(name)
    return names


def _maybe_include_all_linear_layers(peft_config: TargetedConfig, model: nn.Module) -> TargetedConfig:
    """Write the names of a base's linear layers into a config that asks for ``"all-linear"``, and return it."""
    if peft_config.target_modules == ALL_LINEAR:
        catalog = Catalog(model)
        catalog.write_out_targets(peft_config, catalog.targets(peft_config))
    return peft_config


def _as_list(targets: Names | None) -> list[str] | str | None:
    return targets if isinstance(targets, str) or targets is None else sorted(targets)


# Method -> the name of the constant that holds model type -> what a config adapts which names nothing.
MAPPINGS = {
    kind: f"TRANSFORMERS_MODELS_TO_{'LNTUNING' if kind == 'LN_TUNING' else kind}_TARGET_MODULES_MAPPING"
    for kind in map(str, PeftType)
}
TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING = {
    model_type: _as_list(default_feedforward(model_type))
    for model_type in model_types("IA3")
    if default_feedforward(model_type) is not None
}


class UsualTargets(dict[str, Any]):
    """Model type -> what a config of a method adapts which names nothing; what a program adds counts from then on."""

    def __init__(self, kind: str) -> None:
        super().__init__({model_type: _as_list(default_targets(kind, model_type)) for model_type in model_types(kind)})
        self.kind = kind

    def __setitem__(self, model_type: str, targets: list[str] | str) -> None:
        super().__setitem__(model_type, targets)
        REGISTERED[self.kind, model_type] = targets if isinstance(targets, str) else set(targets)

    def __delitem__(self, model_type: str) -> None:
        super().__delitem__(model_type)
        REGISTERED.pop((self.kind, model_type), None)


globals().update({name: UsualTargets(kind) for kind, name in MAPPINGS.items()})
