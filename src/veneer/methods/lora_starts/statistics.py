"""What was measured of data on a base model's layers, kept until an adapter begins from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from veneer.base_model.catalog import Catalog
from veneer.base_model.sites.site import Site
from veneer.configs.methods.lora import LoraConfig
from veneer.errors import ConfigError

COVARIANCE = "covariance"
GRADIENT = "gradient"

# A layer that goes takes its figures with it.
_KEPT: dict[str, WeakKeyDictionary[nn.Module, Tensor]] = {
    COVARIANCE: WeakKeyDictionary(),
    GRADIENT: WeakKeyDictionary(),
}


def keep(what: str, module: nn.Module, value: Tensor) -> None:
    """Keep a figure of a layer for the adapter that is made next."""
    _KEPT[what][module] = value


def kept(what: str, module: nn.Module, who: str, mend: str) -> Tensor:
    """The figure of a layer.

    Raises:
        ConfigError: none was measured; ``who`` wants it, ``mend`` measures it.
    """
    if module not in _KEPT[what]:
        raise ConfigError(f"{who} needs data, and none was given.", hint=f"Call {mend} on the base model first.")
    return _KEPT[what][module]


def linear_sites(model: nn.Module, config: LoraConfig) -> dict[str, Site]:
    """The linear layers that a config means, by name."""
    return {site.name: site for site in Catalog(model).sites(config) if site.matrix_input}


def linear_layers(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The same, as live layers."""
    return {name: site.module for name, site in linear_sites(model, config).items()}


@contextmanager
def watching(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside the block, call ``see(name, input)`` whenever one of ``layers`` runs."""

    def hook_for(name: str) -> Callable[..., None]:
        return lambda module, args, output: see(name, args[0].detach())

    handles = [module.register_forward_hook(hook_for(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
