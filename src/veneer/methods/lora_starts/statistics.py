"""Records statistics of data on a base model's layers, for an adapter to begin from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from veneer.base_model.catalog import Catalog
from veneer.base_model.sites.site import Site
from veneer.configs.methods.lora import LoraConfig
from veneer.errors import ConfigError
from veneer.files.atomic_write import atomic_write

COVARIANCE = "covariance"
GRADIENT = "gradient"

# Begins the attributes of a layer that hold its statistics: a copy of the model has them too.
_ATTRIBUTE = "_veneer_"


def read(file: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Return what was measured of the layers with these names, from the file that :func:`write` wrote.

    Raises:
        ConfigError: it is of other layers.
    """
    from safetensors.torch import load_file

    measured = load_file(file)
    missing = [name for name in names if name not in measured]
    if missing:
        raise ConfigError(
            f"{file}: nothing was measured of {len(missing)} layers, such as {missing[0]}.",
            hint="It was measured for other layers: name another file.",
        )
    return measured


def write(file: Path, measured: Mapping[str, Tensor]) -> None:
    """Write what was measured of each layer, by the layers' names."""
    from safetensors.torch import save_file

    with atomic_write(file) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in measured.items()}, temporary)


def record(what: str, module: nn.Module, value: Tensor) -> None:
    """Record a statistic of a layer for the adapter that is made next."""
    vars(module)[_ATTRIBUTE + what] = value


def is_recorded(what: str, module: nn.Module) -> bool:
    """Tell whether a statistic of a layer is known."""
    return _ATTRIBUTE + what in vars(module)


def recorded(what: str, module: nn.Module, who: str, mend: str) -> Tensor:
    """Return the statistic of a layer.

    Raises:
        ConfigError: none was recorded; ``who`` needs it, the call ``mend`` records it.
    """
    if not is_recorded(what, module):
        raise ConfigError(f"{who} needs data, and none was given.", hint=f"Call {mend} on the base model first.")
    statistic: Tensor = vars(module)[_ATTRIBUTE + what]
    return statistic


def linear_sites(model: nn.Module, config: LoraConfig) -> dict[str, Site]:
    """Return the linear sites that a config means, by name."""
    return {site.name: site for site in Catalog(model).sites(config) if site.matrix_input}


def sites_to_measure(model: nn.Module, config: LoraConfig, who: str, start: str) -> dict[str, Site]:
    """Return the linear sites on which data are measured for a start, by name.

    Args:
        model: the base model.
        config: of the adapter to come.
        who: the function that measures, for errors.
        start: the start that it measures for.

    Raises:
        ConfigError: there are none, or the config is of another start.
    """
    if config.init_lora_weights != start:
        name = {"lora_ga": "LoRA-GA", "corda": "CorDA"}[start]
        raise ConfigError(
            f"{who}: the config has init_lora_weights={config.init_lora_weights!r}, which takes no such data.",
            hint=f'If you want to use {name}, make it with init_lora_weights="{start}".',
        )
    sites = linear_sites(model, config)
    if not sites:
        raise ConfigError(
            f"{who}: No supported layers found: target_modules={config.target_modules!r} means no linear layer.",
            hint="Name linear layers, or begin with another init_lora_weights.",
        )
    return sites


@contextmanager
def watching(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``see(name, input)`` whenever one of ``layers`` runs inside the ``with`` block."""

    def hook_for(name: str) -> Callable[..., None]:
        return lambda module, args, output: see(name, args[0].detach())

    handles = [module.register_forward_hook(hook_for(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
