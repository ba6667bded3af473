"""Answers about the adapters on a model, as functions beside the methods of the same names."""

from __future__ import annotations

from torch import nn

from veneer.adapters.status import TunerLayerStatus, TunerModelStatus
from veneer.keywords import takes
from veneer.peft_model.adapted_model import adapted_model


@takes()
def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """Return the status of each adapted layer: adapters, active and merged ones, their devices and gradients.

    Args:
        model: the model with adapters, compiled or not.

    Raises:
        BaseModelError: it is another model.
    """
    return adapted_model(model).get_layer_status()


@takes()
def get_model_status(model: nn.Module) -> TunerModelStatus:
    """Return the status of a model as a whole.

    Args:
        model: the model with adapters, compiled or not.

    Raises:
        BaseModelError: it is another model.
    """
    return adapted_model(model).get_model_status()
