"""The options of LoRA that are compared with peft, each as what it asks of one architecture's config."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from tests.models import CASES, Case

Make = Callable[[Case, nn.Module], dict[str, Any]]


def plain(case: Case, model: nn.Module) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6, "target_modules": list(case.targets)}


def rslora(case: Case, model: nn.Module) -> dict[str, Any]:
    return {**plain(case, model), "use_rslora": True}


def patterns(case: Case, model: nn.Module) -> dict[str, Any]:
    first, last = case.targets[0], case.targets[-1]
    return {
        **plain(case, model),
        # A dotted ending, and a regular expression that means one block only; the first that fits counts.
        "rank_pattern": {rf".*\.{case.blocks}\.1\..*{re.escape(first)}": 6, first: 2},
        "alpha_pattern": {last: 12, rf".*{first}": 3},
    }


def dropout(case: Case, model: nn.Module) -> dict[str, Any]:
    return {**plain(case, model), "lora_dropout": 0.5}


def regex(case: Case, model: nn.Module) -> dict[str, Any]:
    endings = "|".join(map(re.escape, case.targets))
    return {**plain(case, model), "target_modules": rf".*\.{case.blocks}\.0\.(.*\.)?({endings})"}


def all_linear(case: Case, model: nn.Module) -> dict[str, Any]:
    return {**plain(case, model), "target_modules": "all-linear"}


def full_names(case: Case, model: nn.Module) -> dict[str, Any]:
    endings = tuple("." + target for target in case.targets)
    names = [name for name, _ in model.named_modules() if name.endswith(endings)]
    return {**plain(case, model), "target_modules": names[1::2]}


def exclude_names(case: Case, model: nn.Module) -> dict[str, Any]:
    return {**plain(case, model), "exclude_modules": [case.targets[0]]}


def exclude_regex(case: Case, model: nn.Module) -> dict[str, Any]:
    return {**all_linear(case, model), "exclude_modules": rf".*\.{case.blocks}\.1\..*"}


def one_block(case: Case, model: nn.Module) -> dict[str, Any]:
    return {**plain(case, model), "layers_to_transform": [1], "layers_pattern": case.blocks}


def any_block(case: Case, model: nn.Module) -> dict[str, Any]:
    return {**plain(case, model), "layers_to_transform": 0}


def usual_targets(case: Case, model: nn.Module) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6}


def whole_head(case: Case, model: nn.Module) -> dict[str, Any]:
    return {**plain(case, model), "modules_to_save": [case.head]}


OPTIONS: Mapping[str, Make] = {
    "plain": plain,
    "rslora": rslora,
    "patterns": patterns,
    "dropout": dropout,
    "regex": regex,
    "all-linear": all_linear,
    "full names": full_names,
    "exclude names": exclude_names,
    "exclude regex": exclude_regex,
    "one block": one_block,
    "any block": any_block,
    "usual targets": usual_targets,
    "whole head": whole_head,
    # Not the config's: the tensors are in bfloat16 on disk.
    "bfloat16": plain,
}

ABSENT = {
    # peft knows no usual targets for these, or not as transformers 5 names their layers.
    ("vit", "usual targets"),
    ("whisper", "usual targets"),
    # The others have tied heads, or (BERT) bring theirs with every option.
    *((arch, "whole head") for arch, case in CASES.items() if case.head is None),
}
