"""Variants of LoRA that have tensors or a training of their own: one file each, chosen by an option of the config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from veneer.base_model.sites.site import Site, unsupported
from veneer.configs.lora_start_options import is_moved
from veneer.configs.methods.lora import VARIANTS, LoraConfig
from veneer.errors import UnsupportedError
from veneer.methods.lora_variants.bdlora import block_diagonal
from veneer.methods.lora_variants.kasa import Kasa
from veneer.methods.lora_variants.monteclora import MonteClora
from veneer.methods.lora_variants.variant import Variant
from veneer.methods.lora_variants.velora import Velora

__all__ = ["LEAVES", "Variant", "variant_of"]

_KINDS: tuple[type[Variant], ...] = (Velora, MonteClora, Kasa)
LEAVES = tuple(leaf for kind in _KINDS for leaf in kind.leaves)

_MAKE: dict[str, Callable[[Any, Site, int], Variant | None]] = {
    "use_bdlora": lambda options, site, r: block_diagonal(options, site, r),
    "kasa_config": lambda options, site, r: Kasa.on(site, r, options),
    "monteclora_config": lambda options, site, r: MonteClora(r, options),
    "velora_config": lambda options, site, r: Velora(options),
}


def variant_of(config: LoraConfig, site: Site, r: int) -> Variant | None:
    """Return the variant that ``config`` asks for on a layer, if any.

    Raises:
        UnsupportedError: it is not defined on this kind of layer, or not with the config's start.
    """
    for name in VARIANTS:
        options = getattr(config, name)
        if options is None:
            continue
        if not site.matrix_input:
            raise unsupported(site, name)
        if is_moved(config.init_lora_weights) or config.init_lora_weights == "mica":
            raise UnsupportedError(
                f"{name} with init_lora_weights={config.init_lora_weights!r}: that start is a plain LoRA's.",
                hint="Leave one of the two out.",
            )
        return _MAKE[name](options, site, r)
    return None
