"""Gives a PeftModel the methods of peft's SHADOW models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from veneer.adapters.adapter import Adapter
from veneer.base_model.blocks import find_decoder_blocks
from veneer.configs.methods.shadow import ShadowConfig
from veneer.configs.names import TaskType
from veneer.errors import AdapterError, UnsupportedError
from veneer.methods.shadow import HEAD, shares

if TYPE_CHECKING:
    from veneer.adapters.collection import Adapters
    from veneer.adapters.detached_shadow import DetachedShadowModel
    from veneer.adapters.shadow_pass import ShadowPass


class ShadowMethods:
    """Holds the methods of a ``PeftModel`` about the small decoders of its SHADOW adapters."""

    adapters: Adapters
    shadow_pass: ShadowPass

    @property
    def last_shadow_loss(self) -> Tensor | None:
        """The loss of the small decoder's own prediction in the last call that had labels, without its weight."""
        return self.shadow_pass.last_loss

    def unload_shadow(self, adapter_name: str | None = None, copy: bool = False) -> DetachedShadowModel:
        """Return the small decoder of a SHADOW adapter as a model of its own; this model stays as it is.

        It predicts as the adapter's own loss trained it to: by the base's output layer, or the second classifier.

        Args:
            adapter_name: the adapter; the active one when ``None``.
            copy: give it memory of its own. Without that it shares its modules with this model, and its state lacks
                the embedding where this is the base's.

        Raises:
            AdapterError: that adapter is no SHADOW, or its task is neither ``"CAUSAL_LM"`` nor ``"SEQ_CLS"``.
        """
        from veneer.adapters.detached_shadow import DetachedShadowClassifier, DetachedShadowModel, complete_copy

        adapter = self.adapters.get(adapter_name or self._active_shadow())
        config = adapter.config
        if not isinstance(config, ShadowConfig):
            raise AdapterError(f"{adapter.name!r} is no SHADOW but {config.peft_type}.", hint="Name one that is.")
        decoder = find_decoder_blocks(self.adapters.model)
        if decoder is None:
            raise UnsupportedError(
                "unload_shadow is not supported for Diffusers models: a small network beside one predicts nothing by "
                "itself.",
                hint="Use it with the model.",
            )
        modules = adapter.beside.modules(adapter.name)
        head = modules.get(HEAD) or self._output_layer(adapter)
        stack: Any = decoder.stack
        words = stack.get_input_embeddings() if shares(config, stack) else None
        detached = DetachedShadowClassifier if config.task_type == TaskType.SEQ_CLS else DetachedShadowModel
        model = detached(modules, head, words)
        return complete_copy(model) if copy else model

    def _active_shadow(self) -> str:
        names = [n for n in self.adapters.active if isinstance(self.adapters.get(n).config, ShadowConfig)]
        if not names:
            raise AdapterError("No SHADOW adapter is active.", hint="Name one with adapter_name.")
        return names[0]

    def _output_layer(self, adapter: Adapter) -> nn.Module:
        """Return the base's output layer, or the adapter's copy of it."""
        name = next(iter(self.adapters.catalog.output_embeddings), None)
        if name is None:
            raise AdapterError(
                f"{adapter.name!r} has nothing that predicts from the states of its small decoder.",
                hint='Train it on a causal language model, or as a classifier with task_type="SEQ_CLS".',
            )
        copies = adapter.whole_modules.copies
        return adapter.whole_modules.copy_of(name, adapter) if name in copies else self.adapters.standing_at(name)
