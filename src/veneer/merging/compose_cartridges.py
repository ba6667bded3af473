"""Joins cartridges into one: their tokens one after the other (Eyuboglu et al. 2025, arXiv:2506.06266, section 5)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch

from veneer.checkpoints.checkpoint import Draft, replacing
from veneer.configs.methods.cartridge import CartridgeConfig
from veneer.errors import UsageError
from veneer.keywords import takes
from veneer.merging.output.target import check_adapter_target
from veneer.methods.base.prompt_method import PROMPT
from veneer.peft_model.open_adapter import find_adapter, open_adapter


@takes()
def compose_cartridge_adapters(
    adapter_paths: Sequence[str | Path], *, output_path: str | Path, safe_serialization: bool = True
) -> None:
    """Write the cartridge whose tokens are those of several, one after the other.

    Args:
        adapter_paths: the folders or hub ids of cartridges for one base; the first one's config is used.
        output_path: the folder to write; it must not exist or be empty.
        safe_serialization: write safetensors; else a pickle.

    Raises:
        UsageError: there is none, one is no cartridge, or their sizes differ.
    """
    target = Path(output_path)
    check_adapter_target(target, overwrite=False)
    opened = [open_adapter(find_adapter(path, {})) for path in adapter_paths]
    if not opened:
        raise UsageError("There is no cartridge to compose.", hint="Give the folders of several.")
    others = [checkpoint.origin for checkpoint in opened if not isinstance(checkpoint.config, CartridgeConfig)]
    config = copy.copy(opened[0].config)
    if others or not isinstance(config, CartridgeConfig):
        raise UsageError(f"{others[0]} is no cartridge.", hint="Give adapters whose peft_type is CARTRIDGE.")
    tables = [checkpoint.read([PROMPT])[PROMPT] for checkpoint in opened]
    if len({table.shape[1] for table in tables}) > 1:
        raise UsageError("The cartridges are for different bases: their tokens differ in width.", hint="Give others.")
    table = torch.cat(tables)
    config.num_virtual_tokens = len(table)
    with replacing([Draft(target, config, {PROMPT: table}, {}, as_pickle=not safe_serialization)]):
        pass
