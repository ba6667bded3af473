"""Sites: one interface to every kind of base layer that can carry an adapter.

A weight is *canonical* as a matrix ``(out, in)``, however its layer stores it. A site is that view of one live
parameter of a layer; the layer itself is left as it is.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from veneer.base_model.sites import offload
from veneer.base_model.sites.parameter_reader import LIVE, ParameterReader
from veneer.errors import UnsupportedError
from veneer.patches.patch import Patch


class Site(ABC):
    """One parameter of a base layer, ``y = W x + b``, that an adapter changes.

    Args:
        name: the layer's name in the base model.
        module: the live layer.
        parameter: the weight's name in the layer, dotted if it lies in a child.
        key: the prefix of the adapter's tensors in a checkpoint; the layer's name in most cases.

    Attributes:
        reader: reads the values of the layer's parameters.
        channel: the dimension of the layer's output that has ``out`` entries.
        matrix_input: whether the layer's input is ``(..., in)``, so that a multiplier can be applied to it.
        products: whether :meth:`product` is possible; without it a patch is applied through the whole weight.
        shift_only: whether a patch can only move the bias here.
        looks_up: whether the layer looks rows of its stored weight up, as an embedding does.
        inside_layer: whether the weight is one of several in a larger layer, which uses it in its own ``forward``.
        is_bias: whether the parameter is a bias that a larger layer uses itself.
        is_packed: whether another library has packed (quantised) the weight.
        low_rank_names: the names of a LoRA's ``A`` and ``B`` on this kind of layer in a checkpoint.
        low_rank_gain: the factor by which the layer multiplies a LoRA.
    """

    channel: ClassVar[int] = -1
    matrix_input: ClassVar[bool] = False
    products: ClassVar[bool] = True
    shift_only: ClassVar[bool] = False
    looks_up: ClassVar[bool] = False
    inside_layer: ClassVar[bool] = False
    is_bias: ClassVar[bool] = False
    is_packed: ClassVar[bool] = False
    low_rank_names: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")
    low_rank_gain: float = 1.0

    def __init__(self, name: str, module: nn.Module, parameter: str = "weight", key: str | None = None) -> None:
        self.name = name
        self.module = module
        self.parameter = parameter
        self.key = name if key is None else key
        self.reader: ParameterReader = LIVE

    @property
    def id(self) -> str:
        """The site's name among all of the model: its layer's name, unless the parameter is no plain weight."""
        return self.name if self.parameter == "weight" else f"{self.name}:{self.parameter}"

    @property
    def pattern_name(self) -> str:
        """The name that ``rank_pattern`` and its like are matched with."""
        return self.name

    # -- the parameters ------------------------------------------------------------------------------------

    @property
    def stored(self) -> nn.Parameter:
        """The weight as the layer holds it."""
        weight = _find(self.module, self.parameter)
        # FSDP1 puts a plain tensor in a parameter's place while the model is called.
        assert isinstance(weight, Tensor)
        return weight  # type: ignore[return-value]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the weight as stored; of a packed weight, the shape before packing."""
        return tuple(self.stored.shape)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, shape ``(out,)``, if the layer has one."""
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """The device that the layer computes on; an offloaded weight lies elsewhere between calls."""
        return self.reader.device(self.module, self.stored)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """The canonical shape ``(out, in)``."""

    @abstractmethod
    def canonical(self, stored: Tensor) -> Tensor:
        """Return a view of a stored weight as ``(out, in)``."""

    @abstractmethod
    def as_stored(self, matrix: Tensor) -> Tensor:
        """Return a canonical matrix in the stored form: the inverse of :meth:`canonical`."""

    @property
    def groups(self) -> int:
        """The number of groups that a convolution's channels are cut into; 1 for other layers."""
        return 1

    @property
    def kernel(self) -> tuple[int, ...]:
        """The size of a convolution's kernel, one number a spatial dimension; empty for other layers."""
        return ()

    @property
    def point(self) -> tuple[int, ...]:
        """The size of a kernel of 1."""
        return (1,) * len(self.kernel)

    @property
    def channels(self) -> int:
        """The number of input channels that a row of the weight sees; without a kernel, its columns."""
        return self.shape[1]

    @property
    def padding(self) -> int | None:
        """The token whose vector no look-up trains."""
        return None

    @property
    def stack(self) -> int | None:
        """The number of stacked matrices; ``None`` for a single one."""
        return None

    # -- low-rank changes ----------------------------------------------------------------------------------

    @property
    def has_low_rank_form(self) -> bool:
        """True if every low-rank change of the weight has a LoRA."""
        return True

    def low_rank_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of a LoRA's ``A`` and ``B``, as stored."""
        out, inner = self.shape
        return (r, inner), (out, r)

    def low_rank_factors(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Return the canonical ``U`` and ``V`` of a LoRA's stored ``A`` and ``B``, without :attr:`low_rank_gain`."""
        return up, down

    def as_low_rank(self, up: Tensor, down: Tensor) -> dict[str, Tensor]:
        """Return the tensors, as stored, of a LoRA of scale 1 that changes the canonical weight by ``up @ down``.

        Args:
            up: shape ``(out, r)``, or ``(n, out, r)`` for a stack of matrices.
            down: shape ``(r, in)``, or ``(n, r, in)``.

        Raises:
            UnsupportedError: no LoRA holds every change of this layer's weight.
        """
        self.check_low_rank()
        return dict(zip(self.low_rank_names, self._stored_low_rank(up, down), strict=True))

    def _stored_low_rank(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``A`` and ``B`` as stored; the inverse of :meth:`low_rank_factors`."""
        return down, up

    def check_low_rank(self) -> None:
        """Raise ``UnsupportedError`` unless :attr:`has_low_rank_form`."""
        if not self.has_low_rank_form:
            raise unsupported(self, "a LoRA made from a change of the weight")

    # -- the weight ----------------------------------------------------------------------------------------

    def weight(self) -> Tensor:
        """Return the weight as a canonical matrix, in the dtype in which the layer holds it."""
        return self.canonical(self.resident(self.stored, self.parameter).detach())

    def resident(self, tensor: Any, name: str, *, below: bool = False) -> Any:
        """Return a parameter's values on the device that the layer computes on: see :class:`.ParameterReader`."""
        return tensor if tensor is None else self.reader.read(self.name, self.module, name, tensor, below=below)

    def store(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        """Put parameters (as stored) into the layer. Another layer that shares the old ones keeps them."""
        if offload.offloading_hook(self.module) is not None:
            offload.lay_over(self.module, self.parameter, weight)
        else:
            _replace(self.module, self.parameter, weight)
        if bias is not None or self.bias is not None:
            self.store_bias(bias)

    def store_bias(self, bias: nn.Parameter | None) -> None:
        """Put a bias into the layer, or with ``None`` remove its bias."""
        if offload.offloading_hook(self.module) is not None:
            offload.lay_over(self.module, "bias", bias)
        else:
            self.module.register_parameter("bias", bias)

    # -- applying ------------------------------------------------------------------------------------------

    def base(self, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's own output."""
        return self.module(*args, **kwargs)

    def base_with(self, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's output with another weight (as stored) and bias. Other threads do not see these."""
        tensors = {self.parameter: weight}
        if self.bias is not None or bias is not None:
            tensors["bias"] = bias  # type: ignore[assignment]
        return call_with(self.module, tensors, *args, **kwargs)

    def base_with_bias(self, bias: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's output with another bias. Other threads do not see it."""
        return call_with(self.module, {"bias": bias}, *args, **kwargs)

    def product(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Apply ``matrix``, shape ``(rows, in)``, to the layer's input as the layer applies its weight."""
        raise NotImplementedError(f"{type(self).__name__} has no product")

    def mix(self, hidden: Tensor, matrix: Tensor) -> Tensor:
        """Apply ``matrix``, shape ``(out, rows)``, to the result of :meth:`product`."""
        return nn.functional.linear(hidden, matrix)

    def in_weight(self, patch: Patch) -> Patch:
        """Return ``patch`` in a form that changes the layer's weight: itself, unless the layer has :attr:`groups`.

        Raises:
            MergeError: no weight of the layer can hold the change.
        """
        return patch

    def vectors(self, places: Tensor, table: Tensor, padding: int | None) -> Tensor:
        """Look rows of ``table`` up as the layer does; of an embedding alone. Row ``padding`` gets no gradient."""
        raise NotImplementedError(f"{type(self).__name__} looks up no rows")

    def expand(self, vector: Tensor, output: Tensor) -> Tensor:
        """Give a vector ``(out,)`` the shape that broadcasts over the layer's output."""
        if self.channel == -1:
            return vector
        return vector.view(-1, *[1] * (output.ndim - self.channel - 1))


def call_with(module: nn.Module, tensors: Mapping[str, Tensor | None], *args: Any, **kwargs: Any) -> Any:
    """Call a module with other tensors in the place of its parameters, leaving the module alone.

    A shallow copy is called, so that threads do not see each other's tensors. Where a hook has replaced the module's
    ``forward``, that is bound to the original, so torch's ``functional_call`` is used; but the hook of an offloaded
    module would load its own weights over the given ones, so it is left out.
    """
    if offload.offloading_hook(module) is not None:
        module = offload.without_hook(copy_with(module, {**offload.own_tensors(module), **tensors}))
        return module(*args, **kwargs)
    if "forward" in module.__dict__:
        return functional_call(module, {k: v for k, v in tensors.items() if v is not None}, args, kwargs)
    return copy_with(module, tensors)(*args, **kwargs)


def copy_with(module: nn.Module, tensors: Mapping[str, Tensor | None]) -> nn.Module:
    """Return a shallow copy of a module with other tensors in the place of its parameters."""
    copied = copy.copy(module)
    copied.__dict__["_parameters"] = parameters = dict(module._parameters)
    copied.__dict__["_modules"] = modules = dict(module._modules)
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".")
        if rest:
            child = modules[head]
            assert child is not None
            modules[head] = copy_with(child, {rest: tensor})
        else:
            parameters[name] = tensor  # type: ignore[assignment]
            # Where FSDP1 lays a plain tensor over the parameter for a call, that would be found first.
            copied.__dict__.pop(name, None)
    return copied


def _find(module: nn.Module, parameter: str) -> Any:
    owner, _, leaf = parameter.rpartition(".")
    return getattr(module.get_submodule(owner) if owner else module, leaf)


def _replace(module: nn.Module, parameter: str, value: nn.Parameter) -> None:
    owner, _, leaf = parameter.rpartition(".")
    setattr(module.get_submodule(owner), leaf, value)


def unsupported(site: Site, what: str) -> UnsupportedError:
    """Return the error for an option or method that a kind of layer cannot carry."""
    return UnsupportedError(
        f"{site.name}: {what} is not supported for {type(site.module).__name__} layers.",
        hint="Leave the layer out with exclude_modules, or turn the option off.",
    )
