"""The kinds of base layer that can carry an adapter, behind one interface: :class:`Site`."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from veneer.base_model.sites.bias_only import ShiftSite
from veneer.base_model.sites.conv import ConvSite
from veneer.base_model.sites.embedding import EmbeddingSite
from veneer.base_model.sites.linear import Conv1DSite, LinearSite, is_conv1d
from veneer.base_model.sites.parameter import ParameterSite, VectorSite
from veneer.base_model.sites.quantized.bitsandbytes import bitsandbytes_site
from veneer.base_model.sites.quantized.hqq import HqqSite
from veneer.base_model.sites.quantized.packed import PackedSite, packer
from veneer.base_model.sites.quantized.torchao import TorchaoSite
from veneer.base_model.sites.site import Site
from veneer.base_model.sites.vector import NormSite, is_norm
from veneer.base_model.sites.whole_layer import WholeSite, is_whole

__all__ = [
    "PackedSite",
    "ParameterSite",
    "Site",
    "bias_site",
    "is_linear",
    "is_never_called",
    "is_router",
    "kinds",
    "packed_site",
    "refusal",
    "sites_for",
    "whole_sites",
]

# torch's layers that can carry an adapter, most common first.
_SITE_CLASSES: tuple[tuple[type, Callable[[str, nn.Module], Site]], ...] = (
    (nn.Linear, LinearSite),
    (nn.Embedding, EmbeddingSite),
    (nn.Conv2d, ConvSite),
    (nn.Conv1d, ConvSite),
    (nn.Conv3d, ConvSite),
)


def sites_for(name: str, module: nn.Module) -> list[Site]:
    """Return the sites of a layer: one, two for ``nn.MultiheadAttention``, none when its kind cannot carry an adapter.

    Layers whose weight is packed in a form unknown here, and layers whose ``forward`` is never called, have no site: an
    adapter there would be wrong, or do nothing. Routers have a parameter's, see ``target_parameters``.
    """
    if is_never_called(module) or is_router(module):
        return []
    if isinstance(module, nn.MultiheadAttention):
        return _attention(name, module)
    if packer(module) is not None:
        site = packed_site(name, module)
        return [] if site is None else [site]
    make, weight = _site_class(module), getattr(module, "weight", None)
    # Narrower floats come with scales of their own.
    usable = isinstance(weight, nn.Parameter) and weight.is_floating_point() and weight.itemsize > 1
    return [make(name, module)] if make is not None and usable else []


def _site_class(module: nn.Module) -> Callable[[str, nn.Module], Site] | None:
    """Return what makes the site of a layer whose weight is not packed; ``None`` for a kind that has none."""
    make = next((make for kind, make in _SITE_CLASSES if isinstance(module, kind)), None)
    return Conv1DSite if make is None and is_conv1d(module) else make


def whole_sites(name: str, module: nn.Module) -> list[Site]:
    """Return the same for a method that trains whole layers: norms have a site too, and any layer with one weight."""
    if is_norm(module):
        return [NormSite(name, module)]
    has_site = packer(module) is not None or _site_class(module) is not None
    return [WholeSite(name, module)] if is_whole(module) and not has_site else sites_for(name, module)


def packed_site(name: str, module: nn.Module) -> PackedSite | None:
    """Return the site of a linear layer with a packed weight; ``None`` for other layers, and for unknown packings."""
    library = packer(module)
    if library == "bitsandbytes":
        return bitsandbytes_site(name, module)
    if library == "torchao" and type(module) is nn.Linear:
        return TorchaoSite(name, module)
    return HqqSite(name, module) if library == "HQQ" and hasattr(module, "W_q") else None


def _attention(name: str, module: nn.MultiheadAttention) -> list[Site]:
    """Return the sites of the stacked and of the output projection, under the keys that peft gives them."""
    if module.in_proj_weight is None:  # keys and values of other sizes have a weight each
        return []
    return [
        ParameterSite(name, module, "out_proj.weight", f"{name}.base_layer.out_proj", gain=2.0),
        ParameterSite(name, module, "in_proj_weight", name),
    ]


def bias_site(name: str, module: nn.Module, parent: nn.Module, key: str) -> Site:
    """Return the site of a bias that is trained alone.

    Args:
        name: the layer's name.
        module: the layer.
        parent: the module that holds the layer.
        key: the prefix of its key in a checkpoint.
    """
    if not is_never_called(module):
        return ShiftSite(name, module)
    owner, _, child = name.rpartition(".")
    return VectorSite(owner, parent, f"{child}.bias", key)


def is_never_called(module: nn.Module) -> bool:
    """Tell whether a layer only holds its weight, for its parent to compute with."""
    return isinstance(module, NonDynamicallyQuantizableLinear)


def is_router(module: nn.Module) -> bool:
    """Tell whether a linear layer returns more than its product: the choice of experts (Llama 4, Phi-MoE)."""
    return isinstance(module, nn.Linear) and type(module).__name__.endswith("Router")


def is_linear(module: nn.Module) -> bool:
    """Tell whether "all-linear" means this layer."""
    if is_never_called(module) or is_router(module):
        return False
    # A packed layer is often no nn.Linear; all of them have a width.
    packed = hasattr(module, "in_features") and packer(module) is not None
    return isinstance(module, nn.Linear) or is_conv1d(module) or packed


def refusal(module: nn.Module) -> str | None:
    """Say why a layer without a site cannot carry an adapter, and the way out; ``None`` where its kind says it all."""
    if isinstance(module, nn.MultiheadAttention):
        return (
            "Only same embed for query/key/value is supported as of now for MultiheadAttention, and its kdim or vdim "
            "is another than embed_dim"
        )
    library = packer(module)
    if library is None:
        return None
    return (
        f"its weight is packed by {library} in a form that Veneer does not read; load the base in its original "
        "precision, dequantised (transformers: model.dequantize()), or quantised by bitsandbytes, torchao or HQQ"
    )


def kinds() -> str:
    """Name the kinds of layer that can carry an adapter, for an error."""
    return ", ".join([*(kind.__name__ for kind, _ in _SITE_CLASSES), "Conv1D", nn.MultiheadAttention.__name__])
