"""Sites of ``HQQLinear``: half-quadratic quantisation (Badri and Shaji 2023). The layer is no ``nn.Linear``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from veneer.base_model.sites.quantized.packed import PackedSite, dequantised_bias
from veneer.errors import MergeError


class HqqSite(PackedSite):
    """``HQQLinear``: its packed values lie in ``W_q``."""

    @property
    def stored(self) -> nn.Parameter:
        """The packed values."""
        values: Any = self.module.W_q
        return values  # type: ignore[no-any-return]

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, shape ``(out,)``, which HQQ keeps as a plain tensor."""
        return dequantised_bias(self)

    def unpacked(self) -> Tensor:
        layer: Any = self.module
        return layer.dequantize().detach().float()  # type: ignore[no-any-return]

    def packed(self, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
        layer: Any = self.module
        if layer.quant_config is None:
            raise MergeError(
                f"{self.name}: HQQ did not keep how this layer was packed, so it cannot be packed again.",
                hint='Merge with into="dequantized".',
            )
        plain = self.plain(weight, bias, layer.compute_dtype)
        settings = {**layer.quant_config, "offload_meta": False}
        device = str(self.stored.device)
        packed: nn.Module = type(layer)(plain, settings, compute_dtype=layer.compute_dtype, device=device)
        return packed.train(layer.training)
