"""The keys of the base's ``config.json`` that are others in the output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from veneer.adapters.merge.new_bias import NewBiases
from veneer.adapters.merge.untie import FLAG, asks_for_ties
from veneer.files.base_config import part_of
from veneer.files.names import MODEL_CONFIG
from veneer.merging.base.disk_base import DiskBase
from veneer.merging.work.adapter_changes import tie_groups
from veneer.merging.work.merge_plan import MergePlan


def output_config(base: DiskBase, plan: MergePlan, biases: NewBiases, dtype: torch.dtype | None) -> dict[str, Any]:
    """Return the keys of a base's config that the output has otherwise; ``...`` removes one.

    Args:
        base: the base.
        plan: the merge's plan.
        biases: that layers without one get.
        dtype: of the output; the base's own when ``None``.
    """
    if dtype is None and base.packed:
        dtype = base.common_dtype
    return {**_class_head_and_dtype(base, dtype), **base.config, **biases.config, **_untied(base, plan)}


def _class_head_and_dtype(base: DiskBase, dtype: torch.dtype | None) -> dict[str, Any]:
    """Return the keys for the output's class, head, dtype and form."""
    model: Any = base.model
    values, changed = base.source.json(MODEL_CONFIG), dict[str, Any]()
    kind = type(model).__name__
    if kind not in (values.get("architectures") or []):
        changed["architectures"] = [kind]
    of_model = model.config.to_dict()
    head = {key: of_model[key] for key in ("id2label", "label2id") if of_model.get(key)}
    if _labels(values, base.source.origin) != _labels(head, base.source.origin):
        changed.update({**head, "num_labels": ...} if "num_labels" in values else head)
    if "quantization_config" in values:
        changed["quantization_config"] = ...
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in values else "dtype"
        changed[key] = str(dtype).removeprefix("torch.")
    return changed


def _labels(config: Mapping[str, Any], origin: str) -> int:
    """Return how many labels a config names; two, as transformers has it, where it names none."""
    return len(part_of(config, "id2label", origin) or ()) or 2


def _untied(base: DiskBase, plan: MergePlan) -> dict[str, Any]:
    """Return the key which says that weights which the base shares differ in the output."""
    model: Any = base.model
    if not plan.untied or not getattr(model.config, FLAG, False) or asks_for_ties(model):
        return {}
    parameters = dict(base.build(**{FLAG: False}).named_parameters(remove_duplicate=False))
    others = [group for group in tie_groups(model) if not set(group) <= set(plan.untied)]
    # Some families (T5) tie against their config, and others tie more weights than the merge parted: those that the
    # file then lacks would be lost. Without the key their reader keeps apart what is stored apart.
    says_so = len({id(parameters[name]) for name in plan.untied}) > 1
    lost = any(len({id(parameters[name]) for name in group}) > 1 for group in others)
    return {FLAG: False} if says_so and not lost else {}
