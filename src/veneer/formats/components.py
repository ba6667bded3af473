"""Tells the components of a pipeline of diffusers apart: the denoiser and the text encoders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from veneer.errors import UsageError
from veneer.formats.format import Base

if TYPE_CHECKING:
    from veneer.formats.canonical import CanonicalAdapter

DENOISERS = ("unet", "transformer", "transformer_2", "prior")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
COMPONENTS = (*DENOISERS, *TEXT_ENCODERS)

_BLOCKS = ("transformer_blocks.", "single_transformer_blocks.", "blocks.", "layers.")


def component_of(base: Base | None, modules: Iterable[str] = ()) -> str:
    """Return the component that a model is in a pipeline, or the one of a pipeline that an adapter is for.

    Args:
        base: the model, or the pipeline.
        modules: the modules that the adapter changes.

    Raises:
        UsageError: nothing tells it.
    """
    if base is not None and base.components:
        paths = [f"{module}.weight" for module in modules]
        fits = [name for name, model in base.components.items() if all(path in model.shapes for path in paths)]
        if len(fits) == 1:
            return fits[0]
    elif base is not None:
        if "model_type" in base.config:
            return "text_encoder"
        if any(name.startswith("down_blocks.") for name in base.shapes):
            return "unet"
        if any(name.startswith(_BLOCKS) for name in base.shapes):
            return "transformer"
    whose = "the adapter is for" if base is None or base.components else f"{base.origin} is"
    raise UsageError(
        f"Nothing tells which component of a pipeline {whose}.", hint=f"Say it: --component {' | '.join(COMPONENTS)}"
    )


def models_of(base: Base, component: str | None = None) -> Mapping[str, Base]:
    """Return the models of a base by component: those of a pipeline, or the one that it is itself.

    Args:
        base: the base.
        component: the only one that is wanted; it also tells what a model alone is.

    Raises:
        UsageError: the pipeline has no such component, or nothing tells which one a model is.
    """
    if not base.components:
        return {component or component_of(base): base}
    if component is None:
        return base.components
    if component not in base.components:
        raise UsageError(
            f"{base.origin} has no component {component!r}.", hint=f"It has: {', '.join(base.components)}."
        )
    return {component: base.components[component]}


def model_of(base: Base | None, component: str) -> Base | None:
    """Return the model that a base has for a component: a pipeline's, or itself; ``None`` where it has none."""
    if base is None or not base.components:
        return base
    return base.components.get(component)


def by_component(adapters: Mapping[str, CanonicalAdapter], base: Base | None) -> dict[str, CanonicalAdapter]:
    """Return adapters by the components that they are for; one under ``""`` is for the component that the base is."""
    return {component or component_of(base, adapter.modules): adapter for component, adapter in adapters.items()}


def is_t5(base: Base) -> bool:
    """Tell whether a text encoder is a T5."""
    return any(name.startswith("encoder.block.0.") for name in base.shapes)
