"""P-tuning: prompt tuning through a small trained network (Liu et al. 2021, arXiv:2103.10385, section 3).

    X' = [f(P); X]        P: (tokens, dim)

``f`` is a multilayer perceptron, or a bidirectional LSTM and a perceptron (equation 6). A checkpoint holds ``f(P)``
alone, so that what is loaded is a table of virtual tokens; trained further, the table itself is trained.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from veneer.configs.methods.p_tuning import PromptEncoderConfig
from veneer.methods.base.prompt_method import PromptEncoder, PromptMethod, fresh


class Network(PromptEncoder):
    """Holds a table and the network that makes the virtual tokens of it; parameters are named as in peft."""

    def __init__(self, config: PromptEncoderConfig, size: tuple[int, int]) -> None:
        super().__init__()
        dim, hidden = size[1], config.encoder_hidden_size or size[1]
        self.embedding = nn.Embedding(*size)
        self.lstm_head: nn.Module | None = None
        if config.encoder_reparameterization_type == "LSTM":
            self.lstm_head = nn.LSTM(
                dim,
                hidden,
                num_layers=config.encoder_num_layers,
                dropout=config.encoder_dropout,
                bidirectional=True,
                batch_first=True,
            )
            widths = [2 * hidden, 2 * hidden, dim]
        else:
            widths = [dim, hidden, hidden, dim]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.mlp_head = nn.Sequential(*layers[:-1])

    def forward(self, tasks: Tensor | None) -> Tensor:
        values: Tensor = self.embedding.weight
        if self.lstm_head is not None:
            values = self.lstm_head(values.unsqueeze(0))[0].squeeze(0)
        tokens: Tensor = self.mlp_head(values)
        return tokens


class PTuning(PromptMethod[PromptEncoderConfig]):
    """Makes prompts by a small trained network."""

    def new(self, config: PromptEncoderConfig, words: nn.Module, generator: torch.Generator | None) -> PromptEncoder:
        return fresh(lambda: Network(config, self.size(config)), generator)


METHOD = PTuning()
