"""The networks that methods are compared on, tiny and random."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.models import build, inputs


class ConvNet(nn.Module):
    """Convolutions, an embedding and linear layers: input ids ``(2, 12)``, output ``(2, 12, 6)``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.norm = nn.LayerNorm(8)
        self.conv1 = nn.Conv1d(8, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 8, (3, 3), padding=1)
        self.point = nn.Conv2d(8, 4, 1)
        self.first = nn.Linear(12, 16)
        self.last = nn.Linear(16, 6, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.tanh(self.conv1(self.norm(self.embed(input_ids)).mT))
        image = x.unflatten(1, (4, 3))
        x = x + self.point(torch.tanh(self.conv2(image))).flatten(1, 2)
        return self.last(torch.tanh(self.first(x.mT)))


def _conv_net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ConvNet().eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model


_IDS = torch.randint(0, 30, (2, 12), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Network:
    """One network.

    Attributes:
        make: a fresh copy: float32, in eval mode, the same weights every time.
        batch: keyword arguments for two rows.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[], Mapping[str, Tensor]]

    def output(self, model: nn.Module) -> Tensor:
        """The model's output for the batch."""
        found = model(**self.batch())
        return found if isinstance(found, Tensor) else found.logits

    @torch.no_grad()
    def read(self, model: nn.Module) -> Tensor:
        """The same, without gradients, as float32."""
        return self.output(model).float()


NETWORKS: Mapping[str, Network] = {
    "llama": Network(lambda: build("llama"), lambda: inputs("llama")),
    "gpt2": Network(lambda: build("gpt2"), lambda: inputs("gpt2")),
    "bert": Network(lambda: build("bert"), lambda: inputs("bert")),
    "t5": Network(lambda: build("t5"), lambda: inputs("t5")),
    "llama with tasks": Network(lambda: build("llama"), lambda: {**inputs("llama"), "task_ids": torch.tensor([2, 0])}),
    "conv": Network(_conv_net, lambda: {"input_ids": _IDS}),
}
