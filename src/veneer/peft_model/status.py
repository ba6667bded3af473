"""Answers about the adapters on a model, as functions beside the methods of the same names."""

from __future__ import annotations

from typing import Any

from torch import nn

from veneer.adapters.collection import Adapters
from veneer.adapters.status import TunerLayerStatus, TunerModelStatus, layer_status, model_status
from veneer.keywords import takes
from veneer.layers.base_tuner_layer import SelectsForLayer
from veneer.peft_model.adapted_model import AdaptedModel, adapted_model


@takes()
def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """Return the status of each adapted layer: adapters, active and merged ones, their devices and gradients.

    Args:
        model: the model with adapters, compiled or not; or the base model in it, in which the names then are.

    Raises:
        BaseModelError: it is another model.
    """
    adapters, is_base = _adapters_of(model)
    return layer_status(adapters, "" if is_base else "model.")


@takes()
def get_model_status(model: nn.Module) -> TunerModelStatus:
    """Return the status of a model as a whole.

    Args:
        model: the model with adapters, compiled or not; or the base model in it.

    Raises:
        BaseModelError: it is another model.
    """
    adapters, is_base = _adapters_of(model)
    return model_status(adapters.model, adapters) if is_base else adapted_model(model).get_model_status()


def _adapters_of(model: nn.Module) -> tuple[Adapters, bool]:
    """Return the adapters on a model, and whether it is the base that carries them, with no PeftModel around it."""
    layer = _first_layer(model) if isinstance(model, nn.Module) and not isinstance(model, AdaptedModel) else None
    if layer is not None and layer.active_selection.adapters.model is model:
        return layer.active_selection.adapters, True
    return adapted_model(model).adapters, False


def _first_layer(model: nn.Module) -> Any:
    return next((module for module in model.modules() if isinstance(module, SelectsForLayer)), None)
