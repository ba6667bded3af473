"""Sites of vectors, such as the weights of norms, as matrices of one column."""

from __future__ import annotations

from torch import Tensor, nn

from veneer.base_model.sites.site import Site


class ColumnSite(Site):
    """A parameter of shape ``(out,)``, canonically ``(out, 1)``."""

    has_low_rank_form = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape[0], 1

    def canonical(self, stored: Tensor) -> Tensor:
        return stored.unsqueeze(1)

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.squeeze(1)


class NormSite(ColumnSite):
    """A norm. It uses its weight inside its own ``forward``, so a patch acts through the whole changed weight."""

    products = False


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module has the form of a norm: nothing but a vector as its weight, and perhaps a bias."""
    weight = module._parameters.get("weight")
    plain = module._parameters.keys() <= {"weight", "bias"} and not module._modules and not module._buffers
    return plain and weight is not None and weight.ndim == 1 and weight.is_floating_point()
