"""Rotations from skew-symmetric matrices, which OFT and BOFT share."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.base_model.sites.site import Site
from veneer.errors import UnsupportedError


def cayley(skew: Tensor) -> Tensor:
    """Return the rotations ``(1 - S) (1 + S)^-1`` of skew-symmetric ``S``, shape ``(..., n, n)``, in float32."""
    skew = skew.float()
    identity = torch.eye(skew.shape[-1], device=skew.device)
    turned: Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
    return turned


def neumann(skew: Tensor, terms: int) -> Tensor:
    """Return the first ``terms`` of ``(1 + S) (1 - S)^-1 = 1 + 2 S + 2 S^2 + ...``; of four or more the last once.

    With three terms and with four it is the same polynomial, as in peft: ``1 + 2 S + 2 S^2 + S^3``.
    """
    total = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype).expand_as(skew)
    if terms > 1:
        total = total + 2 * skew
    if terms > 2:
        power = skew
        for _ in range(max(terms - 3, 1)):
            power = power @ skew
            total = total + 2 * power
        total = total + power @ skew
    return total


def skew_of(entries: Tensor, size: int) -> Tensor:
    """Return skew-symmetric ``(n, size, size)`` with ``entries``, ``(n, size*(size-1)/2)``, above the diagonals."""
    rows, columns = torch.triu_indices(size, size, 1, device=entries.device)
    upper = entries.new_zeros(len(entries), size, size).index_put(
        (torch.arange(len(entries), device=entries.device)[:, None], rows, columns), entries
    )
    return upper - upper.mT


def check_groups(site: Site, what: str) -> None:
    """Raise ``UnsupportedError`` for a convolution in groups, whose rows see different channels."""
    if site.groups > 1:
        raise UnsupportedError(
            f"{site.name} has {site.groups} groups. {what} does not support {type(site.module).__name__} layers with "
            "groups > 1, for it turns all input channels together.",
            hint="Leave the layer out with exclude_modules.",
        )
