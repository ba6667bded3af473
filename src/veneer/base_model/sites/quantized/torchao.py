"""``nn.Linear`` with a weight that is one of torchao's tensors: int8, int4, and others that multiply by themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.base_model.sites.quantized.packed import PackedSite, blank_copy
from veneer.errors import MergeError


class TorchaoSite(PackedSite):
    """A weight of torchao's, of any kind; packing again is known for int8, and for int4 as CPUs have it."""

    def unpacked(self) -> Tensor:
        held: Any = self.stored.detach()
        if type(held).dequantize is not Tensor.dequantize:
            return held.dequantize().float()  # type: ignore[no-any-return]
        # Some layouts can only multiply: what they make of the identity is the matrix.
        identity = torch.eye(self.shape[1], dtype=held.dtype, device=held.device)
        return F.linear(identity, held).T.float().contiguous()

    def packed(self, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
        held: Any = self.stored
        pack = _PACK.get(type(held).__name__)
        if pack is None:
            raise MergeError(
                f"{self.name}: weights of the kind {type(held).__name__} cannot be packed again here.",
                hint='Merge with into="dequantized".',
            )
        own = blank_copy(self.module, bias)
        own.weight = nn.Parameter(pack(held, weight.to(held.dtype)), requires_grad=False)
        return own


def _int8(held: Any, weight: Tensor) -> Any:
    from torchao.quantization.granularity import PerGroup, PerRow

    group = held.block_size[-1]
    granularity = PerRow() if group == weight.shape[1] else PerGroup(group)
    kwargs = getattr(held, "act_quant_kwargs", None)
    return type(held).from_hp(weight, granularity, act_quant_kwargs=kwargs)


def _intx(held: Any, weight: Tensor) -> Any:
    from torchao.quantization.quant_primitives import MappingType

    kind = MappingType.ASYMMETRIC if bool(held.zero_point.any()) else MappingType.SYMMETRIC
    options = {"mapping_type": kind, "activation_quantization": held.activation_quantization}
    return type(held).from_hp(weight, tuple(held.block_size), held.target_dtype, **options)


def _int4(held: Any, weight: Tensor) -> Any:
    return type(held).from_hp(weight, list(held.block_size))


_PACK = {"Int8Tensor": _int8, "IntxUnpackedToInt8Tensor": _intx, "Int4OpaqueTensor": _int4}
