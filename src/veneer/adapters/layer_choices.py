"""The adapters that one layer of a model is asked for, where libraries visit a model layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from veneer.layers.adapted_layer import AdaptedLayer
from veneer.patches.active_selection import ActiveSelection, LayerSelection
from veneer.patches.selection import LayerChoice, Selection
from veneer.patches.watched_parameters import unwatch, watch


class LayerChoices:
    """Chooses, enables and freezes adapters on one layer; where all layers agree, the model does.

    Args:
        adapters: the set of adapters of the model.
        layer: an adapted layer, or a module that adapters bring whole.
    """

    def __init__(self, adapters: Any, layer: Any) -> None:
        self.adapters = adapters
        self.layer = layer
        self.active: ActiveSelection = adapters.active_selection

    def select(self, names: tuple[str, ...]) -> None:
        """Choose the adapters of the layer; those that are to be trained get gradients here, all others none.

        Raises:
            AdapterError: they cannot be active together.
        """
        selection = self.adapters.selection([name for name in names if name in self.adapters.by_name])
        self._change(lambda choice: LayerChoice(names, selection, choice.enabled))
        if self.active.default.by_layer and self.adapters.trains:
            for name, adapter in self.adapters.by_name.items():
                if adapter.trainable:
                    self._require_grad(name, name in selection.names)

    def enable(self, enabled: bool) -> None:
        """Run the adapters on the layer, or the layer as in the base."""
        self._change(lambda choice: replace(choice, enabled=enabled))

    def require_grad(self, name: str, required: bool) -> None:
        """Make an adapter trainable on the layer, or freeze it there."""
        adapter = self.adapters.get(name)
        self._require_grad(name, required)
        # Another choice gives gradients to an adapter again as long as any of it is trained.
        adapter.trainable = required or any(parameter.requires_grad for parameter in adapter.parameters())
        self.adapters.trains = self.adapters.trains or adapter.trainable

    def _require_grad(self, name: str, required: bool) -> None:
        parameters = [*self.layer.trained(name)]
        if required:
            unwatch(parameters)
        for parameter in parameters:
            parameter.requires_grad_(required)
        if isinstance(self.layer, AdaptedLayer) and not required:
            watch(parameters)

    def _change(self, change: Callable[[LayerChoice], LayerChoice]) -> None:
        with self.active.choosing:
            model, own = self._of_model(), self._own(self.layer)
            by_layer = dict(self.active.default.by_layer)
            before = by_layer.get(own, model)
            choice = change(before)
            if choice == before:
                return
            if choice.enabled and not model.enabled:
                by_layer = {layer: by_layer.get(layer, model) for layer in map(self._own, self._layers())}
                model = replace(model, enabled=True)
            by_layer[own] = choice
            self._store(model, {layer: choice for layer, choice in by_layer.items() if choice != model})

    def _of_model(self) -> LayerChoice:
        default = self.active.default
        return LayerChoice(tuple(self.active.asked_of(default)), Selection(default.names), self.active.enabled)

    def _store(self, model: LayerChoice, by_layer: dict[object, LayerChoice]) -> None:
        """Make the layers' choices part of the model's selection; where all are the same, the model's itself."""
        common = self._common(by_layer)
        if common is None:
            self.active.enabled = model.enabled
            self.active.set_by_layer(by_layer)
            return
        self.active.enable(common.enabled)
        self.adapters.select(common.selection.names)
        self.active.note_asked(common.asked)

    def _common(self, by_layer: dict[object, LayerChoice]) -> LayerChoice | None:
        """Return the choice that all layers of the model have made, if it is the same."""
        if len(by_layer) < len(self.adapters.layers) + len(self.adapters.module_copies):
            return None
        choices = [by_layer.get(layer.active_selection) for layer in self._layers()]
        return choices[0] if all(choice == choices[0] for choice in choices) else None

    def _layers(self) -> Sequence[Any]:
        return [*self.adapters.adapted_layers, *self.adapters.module_copies.values()]

    def _own(self, layer: Any) -> LayerSelection:
        """Return a layer's own selection, which takes the place of the model's when it is first asked for."""
        if not isinstance(layer.active_selection, LayerSelection):
            vars(layer)["active_selection"] = LayerSelection(self.active)
        own: LayerSelection = layer.active_selection
        return own
