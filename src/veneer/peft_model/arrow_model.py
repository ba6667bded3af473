"""Makes a model whose tokens go to several LoRA adapters by Arrow routing; see :mod:`veneer.methods.arrow`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from veneer.base_model.sites.linear import LinearSite
from veneer.configs.arrow_options import ArrowConfig
from veneer.configs.methods.lora import LoraConfig
from veneer.errors import AdapterError, ConfigTypeError
from veneer.keywords import IGNORED, READING, SOURCE, TOKEN, takes
from veneer.peft_model.peft_model import PeftModel

ROUTER = "arrow_router"


@takes(*SOURCE, *IGNORED, *READING, "is_trainable", renamed=TOKEN)
def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str | Path],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str | Path] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """Load LoRA adapters onto a base model and let each token go to those that would change it most.

    The adapters are named ``task_0``, ``task_1`` ... and ``gks_0`` ... as in peft, and the one that routes
    ``"arrow_router"``; it is the active one. Nothing needs training.

    Args:
        base_model: the base model in memory.
        task_specific_adapter_paths: the LoRAs' folders or hub ids.
        arrow_config: the options of the routing. The adapters' names are filled into a copy.
        general_adapter_paths: with ``use_gks``, the LoRAs of general text.
        **adapter_kwargs: as for :meth:`~veneer.peft_model.peft_model.PeftModel.load_adapter`.

    Raises:
        AdapterError: no adapters are given. UnsupportedError: one is no plain LoRA. ConfigTypeError: one is on layers
            that are not linear.
    """
    general = list(general_adapter_paths or ()) if arrow_config.use_gks else []
    if not task_specific_adapter_paths or (arrow_config.use_gks and not general):
        what = "general_adapter_paths" if task_specific_adapter_paths else "task_specific_adapter_paths"
        raise AdapterError(f"{what} is empty.", hint="Name the folders of LoRA adapters for this base.")
    paths = {f"task_{i}": path for i, path in enumerate(task_specific_adapter_paths)}
    paths |= {f"gks_{i}": path for i, path in enumerate(general)}
    first, *others = paths
    model = PeftModel.from_pretrained(base_model, paths[first], adapter_name=first, **adapter_kwargs)
    for name in others:
        model.load_adapter(paths[name], adapter_name=name, **adapter_kwargs)
    _check_linear(model, paths)
    names = {kind: [name for name in paths if name.startswith(kind)] for kind in ("task_", "gks_")}
    filled = replace(arrow_config, task_adapter_names=names["task_"], gks_adapter_names=names["gks_"])
    rank = getattr(model.peft_config[first], "r", 8)
    model.add_adapter(ROUTER, LoraConfig(r=rank, arrow_config=filled))
    model.set_adapter(ROUTER)
    return model


def _check_linear(model: PeftModel, names: Iterable[str]) -> None:
    """Raise where an adapter is on another kind of layer, and leave the base as it was."""
    for name in names:
        for layer in model.adapters.get(name).layers:
            if not isinstance(layer.site, LinearSite):
                model.unload()
                raise ConfigTypeError(
                    f"{name!r} is on {layer.site.name}, which is no linear layer. In Arrow, LoRA adapters must only "
                    "target Linear layers.",
                    hint="Train it without that layer, or leave it out.",
                )
