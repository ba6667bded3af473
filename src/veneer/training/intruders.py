"""Takes from a trained LoRA the directions that the base does not have (Shuttleworth et al. 2024, arXiv:2410.21228).

With ``W = W0 + D`` the weight that a LoRA makes, a left singular vector ``u_i`` of ``W`` is an *intruder* if it is
nearly orthogonal to all of ``W0``'s. Each is taken off in part, which brings back what the base knew:

    D' = D - (1 - lambda) sum_i s_i u_i v_i^T        over the intruders i among the largest singular values s_i of W
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from veneer.adapters import attach
from veneer.checkpoints.checkpoint import in_memory_checkpoint
from veneer.configs.methods.lora import LoraConfig
from veneer.errors import UnsupportedError
from veneer.files.tensor_keys import encode
from veneer.keywords import takes
from veneer.layers.adapter_shares import LayerAdapters
from veneer.layers.weight_change import change_of
from veneer.methods.lora import LoraSettings
from veneer.patches.low_rank import truncated
from veneer.peft_model.adapted_model import adapted_model


@takes()
@torch.no_grad()
def reduce_intruder_dimension(
    peft_model: Any,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] | None = print,
) -> None:
    """Add a LoRA with less of another's intruders, of the same rank and dtype, and make it the active adapter.

    Args:
        peft_model: the model with adapters.
        old_adapter_name: the LoRA; it stays as it is.
        new_adapter_name: the name of the new one.
        top_k: look at so many of the largest singular values of each weight.
        threshold_epsilon: a vector is an intruder if its cosine with each of the base's stays below this.
        mitigation_lambda: the share of each intruder that stays.
        logging_sink: called with a line for each layer that has intruders; ``None`` for none.

    Raises:
        UnsupportedError: the adapter is no plain LoRA. UnknownAdapterError, DuplicateAdapterError: of the names.
    """
    model = adapted_model(peft_model)
    adapters = model.adapters
    adapter = adapters.get(old_adapter_name)
    adapters.check_new(new_adapter_name)
    config = adapter.config
    if not isinstance(config, LoraConfig) or adapter.whole_modules.names:
        raise UnsupportedError(
            f"{old_adapter_name!r} ({config.peft_type}) is no plain LoRA, which intruders are taken from.",
            hint="Convert it first: convert_to_lora(model, rank).",
        )
    tensors: dict[str, Tensor] = {}
    for layer, share in adapter.bound_layers():
        settings = share.settings
        if not isinstance(settings, LoraSettings) or settings.dora or settings.variant is not None or settings.bias:
            raise UnsupportedError(
                f"{layer.site.name}: intruders are taken from plain LoRA alone, without DoRA, variants and biases.",
                hint="Convert it first: convert_to_lora(model, rank).",
            )
        change, intruders = _reduced(layer, old_adapter_name, top_k, threshold_epsilon, mitigation_lambda)
        if intruders and logging_sink is not None:
            logging_sink(f"{layer.site.name}: {intruders} intruders among the first {top_k} singular vectors")
        up, down = truncated(change, settings.r)
        dtype = next(iter(layer.tensors(old_adapter_name, share).values())).dtype
        leaves = layer.site.as_low_rank(up / float(settings.scale), down)
        tensors.update({encode(layer.site.key, leaf): t.contiguous().to(dtype) for leaf, t in leaves.items()})
    new = copy.deepcopy(config)
    new.init_lora_weights = True
    attach.load(adapters, new_adapter_name, in_memory_checkpoint(new, tensors, old_adapter_name), trainable=False)
    adapters.select(new_adapter_name)
    model.load_log.sync()


def _reduced(layer: LayerAdapters, name: str, top_k: int, threshold: float, share: float) -> tuple[Tensor, int]:
    """Return an adapter's change of a layer without a share of its intruders, and the number of those."""
    base = layer.base_weight().float()
    change = change_of(layer, layer.weight_patches([name])).whole()
    left, values, right = torch.linalg.svd(base + change, full_matrices=False)
    known = torch.linalg.svd(base, full_matrices=False)[0]
    cosines = (known.mT @ left[..., :top_k]).abs().amax(dim=-2)
    taken = values[..., :top_k] * (cosines < threshold) * (1 - share)
    return change - (left[..., :top_k] * taken.unsqueeze(-2)) @ right[..., :top_k, :], int((taken > 0).sum())
