"""The config of P-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import PromptConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one, check_choice, check_share


@dataclass
class PromptEncoderConfig(PromptConfig, peft_type=PeftType.P_TUNING):
    """P-tuning (Liu et al. 2021, arXiv:2103.10385): prompt tuning through a small trained network.

    Args, beside those of :class:`PromptConfig`:
        encoder_reparameterization_type: the network: ``"MLP"`` (three layers) or ``"LSTM"``.
        encoder_hidden_size: its width; the model's own when ``None``.
        encoder_num_layers: layers of the LSTM.
        encoder_dropout: dropout between them while training.
    """

    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "encoder_hidden_size", "encoder_num_layers")
        check_share(self, "encoder_dropout")
        check_choice(self, "encoder_reparameterization_type", "MLP", "LSTM")
