"""Lets a base layer's own bias be the one that an adapter trains: ``bias="all"``, ``"lora_only"``.

The parameter stays the same object, and so do its ties to other modules; its values are the adapter's, and the base's
are kept beside. One adapter at a time has this place. Other adapters, and the base alone, are run with the values
that are kept: no selection needs a change of the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from veneer.base_model.sites import offload
from veneer.base_model.sites.quantized.packed import packer
from veneer.layers.adapter_shares import BiasInPlace, parameter_like
from veneer.layers.held_tensors import HeldTensors
from veneer.methods.base.trained_bias import TRAINED_BIAS, Bias
from veneer.patches.watched_parameters import WatchedBase


class HeldBias(HeldTensors):
    """A module that holds adapters' tensors, of whose biases one may lie in the base layer."""

    @property
    def own_bias(self) -> nn.Parameter | None:
        """The parameter that is the base layer's bias while nothing is merged into it."""
        if self.original:
            return self.original[0 if self.site.is_bias else 1]
        return self.site.stored if self.site.is_bias else self.site.bias

    @property
    def trained_bias(self) -> Tensor:
        """The bias that is in place, as the layer computes with it."""
        assert self.bias_in_place is not None
        own, dtype = self._own, self.bias_in_place.original.dtype
        return own if own.dtype == dtype else own.to(dtype)

    @property
    def computed_alone(self) -> tuple[str, ...] | None:
        """The adapters under which the layer gives what the base layer computes as it is now."""
        if self.bias_in_place is None or self.merged:
            return self.merged
        if self.original:
            return ()
        shares = self.bound[self.bias_in_place.adapter]
        alone = self.trained_bias is self.own_bias and all(isinstance(share.method, Bias) for share in shares)
        return (self.bias_in_place.adapter,) if alone else None

    def trains_bias(self, adapter: str) -> bool:
        """Tell whether an adapter trains this layer's bias."""
        return any(leaf.memory_name == TRAINED_BIAS for share in self.bound[adapter] for leaf in share.leaves)

    def can_place_bias(self) -> bool:
        """Tell whether the layer's own bias can be an adapter's: it lies in memory, whole, in a layer of torch.

        Libraries that pack weights do not all run a bias that is trained.
        """
        module = self.site.module
        if packer(module) is not None or offload.offloading_hook(module) is not None:
            return False
        return type(self.own_bias) in (nn.Parameter, WatchedBase)

    def place_bias(self, adapter: str) -> None:
        """Let the base layer's bias be the one that an adapter trains."""
        own, trained = self._own, self._holder(TRAINED_BIAS)._parameters.pop(adapter)
        assert trained is not None
        self._drop_empty(TRAINED_BIAS)
        self.bias_in_place = BiasInPlace(adapter, nn.Parameter(own.data, requires_grad=False))
        own.data = trained.data
        own.requires_grad_(trained.requires_grad)
        self.forget_cached()

    def take_out_bias(self) -> None:
        """Give the base layer's bias its own values back; the adapter keeps what it has trained."""
        if self.bias_in_place is None:
            return
        own, in_place = self._own, self.bias_in_place
        self.bias_in_place = None
        trained = nn.Parameter(own.data, requires_grad=own.requires_grad)
        self._place(in_place.adapter, TRAINED_BIAS, trained, is_buffer=False)
        own.data, own.grad = in_place.original.data, None
        own.requires_grad_(False)
        self.forget_cached()

    @property
    def _own(self) -> nn.Parameter:
        own = self.own_bias
        assert own is not None
        return own

    def placed(self, adapter: str, name: str) -> nn.Parameter:
        if self.bias_in_place is not None and name == TRAINED_BIAS and adapter == self.bias_in_place.adapter:
            return self._own
        return super().placed(adapter, name)

    def own_tensors(self, adapter: str) -> dict[str, Tensor]:
        tensors = super().own_tensors(adapter)
        if self.bias_in_place is not None and adapter == self.bias_in_place.adapter:
            tensors[TRAINED_BIAS] = self._own
        return tensors

    def unbind(self, adapter: str) -> None:
        if self.bias_in_place is not None and adapter == self.bias_in_place.adapter:
            self.take_out_bias()
        super().unbind(adapter)

    def rename(self, old: str, new: str) -> None:
        is_in_place = self.bias_in_place is not None and old == self.bias_in_place.adapter
        if is_in_place:
            self.take_out_bias()
        super().rename(old, new)
        if is_in_place:
            self.place_bias(new)

    def _move_originals(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply a move or a cast to the parameters that are none of the module's now."""
        own = None if self.bias_in_place is None else self.own_bias
        self.original = [_moved(p, fn, p is own) for p in self.original]
        if self.bias_in_place is not None:
            self.bias_in_place.original = _moved(self.bias_in_place.original, fn)


def _moved(parameter: Any, fn: Callable[[Tensor], Tensor], trained: bool = False) -> Any:
    if parameter is None:
        return None
    moved = fn(parameter.detach())
    if not trained:
        return parameter_like(moved, parameter)
    parameter.data = moved  # an optimizer holds it
    return parameter
