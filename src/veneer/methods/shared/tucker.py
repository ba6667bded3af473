"""Kernels of a Tucker decomposition, which LoHa and LoKr share, and the choice of a low-rank form."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.base_model.sites.site import Site, unsupported


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the kernels ``(out, in, k1, k2)`` of a ``core`` ``(r, r, k1, k2)``, ``a`` (r, out) and ``b`` (r, in)."""
    return torch.einsum("ijkl,io,jn->onkl", core, a, b)


def core_kernel(site: Site, decompose: bool) -> tuple[int, int] | None:
    """Return the two last sizes of a core on a layer; ``None`` where its matrices are not decomposed further.

    Args:
        site: the layer.
        decompose: the config's ``use_effective_conv2d``.
    """
    if not decompose or site.kernel == site.point:
        return None
    if len(site.kernel) > 2:
        raise unsupported(site, "use_effective_conv2d")
    return site.kernel[0], (site.kernel[1] if len(site.kernel) == 2 else 1)


def as_low_rank(rank: int, site: Site) -> bool:
    """Tell whether a change of this rank is better held as two factors than as a matrix: at half its size or less.

    On a convolution it is a matrix: what it adds may stay within groups of channels, which two factors do not.
    """
    out, inner = site.shape
    return site.matrix_input and 2 * rank * (out + inner) <= out * inner
