"""The arithmetic of a merge: float32 throughout, rounded once to the weight's own dtype.

The peer's default adds a low-precision delta, and its ``safe_merge`` rounds twice; here the sum of the weight and
every delta is formed in float32, in blocks of rows so that the working memory stays small.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.patch import Patch

# Rows of a weight that are worked on at a time: 512 x 4096 float32 values are 8 MB, about a core's cache.
BLOCK = 512


@torch.no_grad()
def merged(weight: Tensor, patches: Sequence[Patch]) -> Tensor:
    """A new weight with ``patches`` merged in, in their order.

    Args:
        weight: canonical, shape ``(out, in)``, any floating dtype; not changed.
        patches: on the same device.

    Returns:
        The merged weight, of ``weight``'s shape, dtype and memory layout.
    """
    result = torch.empty_like(weight)
    for start in range(0, weight.shape[0], BLOCK):
        stop = min(start + BLOCK, weight.shape[0])
        rows = weight[start:stop].to(torch.float32, copy=True)
        for patch in patches:
            patch.add_to_weight(rows, start, stop)
        result[start:stop] = rows.to(weight.dtype)
    return result
