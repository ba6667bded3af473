"""Sites of layers whose bias alone is adapted: norms, and the layers beside the targets with ``bias="all"``."""

from __future__ import annotations

from torch import Tensor, nn

from veneer.base_model.sites.site import Site

_CHANNELS_FIRST = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)


class ShiftSite(Site):
    """A layer ``y = f(x) + b`` of any kind."""

    shift_only = True

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module, "weight" if isinstance(getattr(module, "weight", None), Tensor) else "bias")
        self.channel = 1 if isinstance(module, _CHANNELS_FIRST) else -1  # type: ignore[misc]

    @property
    def shape(self) -> tuple[int, int]:
        assert self.bias is not None
        return self.bias.shape[0], 0

    def canonical(self, stored: Tensor) -> Tensor:
        return stored

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix
