"""Sites of ``nn.Linear`` whose weight is a tensor of torchao: int8, int4, and others that multiply by themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.base_model.sites.quantized.packed import PackedSite, blank_copy
from veneer.errors import MergeError


class TorchaoSite(PackedSite):
    """``nn.Linear`` with a weight of torchao; int8, and the int4 of CPUs, can be packed again."""

    def unpacked(self) -> Tensor:
        weight: Any = self.stored.detach()
        if type(weight).dequantize is not Tensor.dequantize:
            return weight.dequantize().float()  # type: ignore[no-any-return]
        # Some layouts can only multiply: times the identity they give the matrix.
        identity = torch.eye(self.shape[1], dtype=weight.dtype, device=weight.device)
        return F.linear(identity, weight).T.float().contiguous()

    def packed(self, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
        old: Any = self.stored
        pack = _PACK.get(type(old).__name__)
        if pack is None:
            raise MergeError(
                f"{self.name}: weights of the kind {type(old).__name__} cannot be packed again here.",
                hint='Merge with into="dequantized".',
            )
        layer = blank_copy(self.module, bias)
        layer.weight = nn.Parameter(pack(old, weight.to(old.dtype)), requires_grad=False)
        return layer


def _int8(old: Any, weight: Tensor) -> Any:
    from torchao.quantization.granularity import PerGroup, PerRow

    group = old.block_size[-1]
    granularity = PerRow() if group == weight.shape[1] else PerGroup(group)
    kwargs = getattr(old, "act_quant_kwargs", None)
    return type(old).from_hp(weight, granularity, act_quant_kwargs=kwargs)


def _intx(old: Any, weight: Tensor) -> Any:
    from torchao.quantization.quant_primitives import MappingType

    kind = MappingType.ASYMMETRIC if bool(old.zero_point.any()) else MappingType.SYMMETRIC
    options = {"mapping_type": kind, "activation_quantization": old.activation_quantization}
    return type(old).from_hp(weight, tuple(old.block_size), old.target_dtype, **options)


def _int4(old: Any, weight: Tensor) -> Any:
    return type(old).from_hp(weight, list(old.block_size))


_PACK = {"Int8Tensor": _int8, "IntxUnpackedToInt8Tensor": _intx, "Int4OpaqueTensor": _int4}
