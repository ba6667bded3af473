"""Sites of bitsandbytes' layers: 8 bits (Dettmers et al. 2022, arXiv:2208.07339), 4 bits (2023, arXiv:2305.14314)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from veneer.base_model.sites.quantized.packed import PackedSite, blank_copy


class Bits8Site(PackedSite):
    """``Linear8bitLt``: int8 values, one scale a row. It rounds its input to int8 too."""

    def unpacked(self) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        state: Any = self.module.state
        weight: Any = self.stored
        # The first forward pass moves values and scales from the parameter to the layer's state.
        values, scales = (weight.CB, weight.SCB) if state.CB is None else (state.CB, state.SCB)
        matrix: Tensor = int8_vectorwise_dequant(values, scales)
        return matrix

    def packed(self, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
        from bitsandbytes import MatmulLtState
        from bitsandbytes.nn import Int8Params

        layer: Any = blank_copy(self.module, bias)
        old: Any = self.module.state
        layer.state = MatmulLtState()
        layer.state.threshold, layer.state.has_fp16_weights = old.threshold, old.has_fp16_weights
        layer.state.use_pool = old.use_pool
        layer.weight = Int8Params(weight, requires_grad=False).to(self.stored.device)
        return layer  # type: ignore[no-any-return]


class Bits4Site(PackedSite):
    """``Linear4bit``: blocks of NF4 or FP4 values, a scale a block."""

    def unpacked(self) -> Tensor:
        from bitsandbytes import functional

        weight: Any = self.stored
        data, state = weight.data, copy.copy(weight.quant_state)
        # Processors with bfloat16 products get a layout of their own at the first forward pass.
        if getattr(state, "packing_format_for_cpu", False):
            state.original_nested = False
            data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
            # The way back (0.50) leaves the scales as that layout has them: a row for each column of blocks.
            state.absmax = state.absmax.T.reshape(-1).float()
        state.dtype = torch.float32
        matrix: Tensor = functional.dequantize_4bit(data, state)
        return matrix

    def packed(self, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
        from bitsandbytes.nn import Params4bit

        layer: Any = blank_copy(self.module, bias)
        old: Any = self.stored
        layer.weight = Params4bit(
            weight.contiguous(),
            requires_grad=False,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            module=layer,
        ).to(old.device)
        layer.weight.quant_state.dtype = old.quant_state.dtype
        return layer  # type: ignore[no-any-return]


def bitsandbytes_site(name: str, module: nn.Module) -> PackedSite | None:
    """Return the site of a layer of bitsandbytes; ``None`` when its weight is not packed (yet), or of another kind."""
    weight = module._parameters.get("weight")
    kinds = {kind.__name__ for kind in type(module).__mro__}
    if "Linear4bit" in kinds and getattr(weight, "quant_state", None) is not None:
        return Bits4Site(name, module)
    if "Linear8bitLt" in kinds and weight is not None and weight.dtype is torch.int8:
        return Bits8Site(name, module)
    return None
