"""What comes along with an adapter in a checkpoint, whatever its method: biases, and embeddings saved whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from veneer.config import TargetedConfig
from veneer.errors import ConfigError
from veneer.methods.bias import ADAPTED_BIAS, OTHER_BIAS
from veneer.methods.method import Part
from veneer.methods.saved_weight import SAVED_BIAS, SAVED_WEIGHT

if TYPE_CHECKING:
    from veneer.catalog import Catalog


def with_companions(own: Part, config: TargetedConfig, catalog: Catalog) -> list[Part]:
    """``own`` and the parts of its companions, in the order in which they apply.

    Raises:
        ConfigError: ``bias`` is neither ``"none"``, ``"all"`` nor ``"<method>_only"``.
    """
    ends = [site for site in own.sites if catalog.is_end(site.name)]
    # The base's own rows, so those of all that shares them.
    parts = [Part(SAVED_WEIGHT, ends, {site.id: catalog.sharing(site.name) for site in ends}, optional=True), own]
    bias = getattr(config, "bias", "none")
    if bias not in ("none", "all") and not bias.endswith("_only"):
        method = str(config.peft_type).lower()
        raise ConfigError(f"bias={bias!r} is none of the choices.", hint=f'They are "none", "all", "{method}_only".')
    if bias == "none":
        parts.append(Part(SAVED_BIAS, [site for site in ends if site.bias is not None], optional=True))
    else:
        parts.append(Part(ADAPTED_BIAS, [site for site in own.sites if site.bias is not None]))
    if bias == "all":
        parts.append(Part(OTHER_BIAS, catalog.biased(config, without=own.sites)))
    return parts
