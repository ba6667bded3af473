"""The small decoder of a SHADOW adapter as a model of its own, without the base."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput

from veneer.methods.shadow import BACKBONE, PROJECTION
from veneer.methods.shared.shadow_denoiser import SharedModule
from veneer.methods.shared.shadow_prediction import classification_loss, last_tokens, prediction_loss, projected


class DetachedShadowModel(PreTrainedModel, GenerationMixin):
    """Predicts tokens by the small decoder alone: by an output layer on its last states.

    Args:
        modules: of the adapter: the decoder and its projection.
        head: the output layer.
        words: the embedding to read tokens with, where the decoder does not read with one of its own.
    """

    is_classification = False
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, modules: dict[str, nn.Module], head: nn.Module, words: nn.Module | None) -> None:
        config: Any = modules[BACKBONE].config
        super().__init__(copy.deepcopy(config))
        self.backbone, self.shadow_hidden_projection = modules[BACKBONE], modules[PROJECTION]
        self.head = head
        # In a tuple, so that torch does not take it for a submodule.
        self._words = (words,)
        self.config.tie_word_embeddings = False
        self.training = self.backbone.training

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding that tokens are read with."""
        own: nn.Module = self.backbone.get_input_embeddings()  # type: ignore[operator]
        return self._words[0] or own

    def get_output_embeddings(self) -> nn.Module:
        """Return the output layer."""
        return self.head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Predict the next tokens; arguments and results are those of a causal language model of transformers."""
        call = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        output = self._run(input_ids, inputs_embeds, use_cache=use_cache, **call)
        states = projected(output.last_hidden_state, self.shadow_hidden_projection)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._predicted(states[:, kept])
        loss = None if labels is None else prediction_loss(logits, labels)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=output.get("past_key_values"))

    def _run(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, **call: Any) -> Any:
        if inputs_embeds is None and self._words[0] is not None:
            inputs_embeds = self._words[0](input_ids)
        if inputs_embeds is not None:
            input_ids, inputs_embeds = None, inputs_embeds.to(next(self.backbone.parameters()).dtype)
        call = {name: value for name, value in call.items() if value is not None}
        return self.backbone(input_ids=input_ids, inputs_embeds=inputs_embeds, return_dict=True, **call)

    def _predicted(self, states: Tensor) -> Tensor:
        logits: Tensor = self.head(states.to(next(self.head.parameters(), states).dtype))
        return logits


class DetachedShadowClassifier(DetachedShadowModel):
    """Classifies by the small decoder alone: by the adapter's second classifier on the state of the last token."""

    is_classification = True

    @classmethod
    def can_generate(cls) -> bool:
        """Return False, for it predicts no tokens."""
        return False

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Classify each row; arguments and results are those of a classifier of transformers."""
        output = self._run(input_ids, inputs_embeds, attention_mask=attention_mask, position_ids=position_ids)
        states = projected(output.last_hidden_state, self.shadow_hidden_projection)
        logits = self._predicted(last_tokens(states, attention_mask))
        loss = None if labels is None else classification_loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def complete_copy(model: DetachedShadowModel) -> DetachedShadowModel:
    """Return a copy with memory of its own, which has the embedding that it reads with among its modules."""
    (words,) = model._words
    copied = copy.deepcopy(model, memo={id(words): words})
    if words is None:
        return copied
    words = copy.deepcopy(words)
    if isinstance(copied.backbone.get_input_embeddings(), SharedModule):  # type: ignore[operator]
        copied.backbone.set_input_embeddings(words)  # type: ignore[operator]
        copied._words = (None,)
    else:
        copied._words, copied.embedding = (words,), words
    return copied
