"""Bringing a prompt onto a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.attaching import Attaching, as_parameter
from veneer.adapters.collection import Adapters
from veneer.adapters.parts import PromptPart
from veneer.adapters.prompt_sizes import complete
from veneer.adapters.prompts import check_no_checkpointing
from veneer.base_model import sharding
from veneer.base_model.model_call import place_of, words_of
from veneer.checkpoints.binding_plan import Plan
from veneer.configs.base import PromptConfig
from veneer.methods import prompt_of
from veneer.methods.base.prompt_method import PromptEncoder


class AttachingPrompt(Attaching):
    """Brings a prompt onto a model."""

    def __init__(self, adapters: Adapters, adapter: Adapter, float32: bool, config: PromptConfig) -> None:
        super().__init__(adapters, adapter, float32)
        self.config, self.method = config, prompt_of(config)

    def complete_config(self) -> None:
        complete(self.config, self.method, self.adapters.model)

    def check_tied(self, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
        """Do nothing, for a prompt has no layers."""

    def restore(self, plan: Plan, tensors: dict[str, Tensor]) -> None:
        device, trainable = place_of(self.adapters.model), self.adapter.trainable
        parameters = {
            leaf: as_parameter(tensors[key], device, self.float32, trainable) for leaf, key in plan.shared.items()
        }
        self._place(self.method.restored(self.config, parameters))

    def create(self, roots: list[str], generator: torch.Generator | None) -> None:
        self.adapters.check_places([], roots)
        if self.method.fills_cache:
            check_no_checkpointing(self.adapters.model)
        model = self.adapters.model
        encoder = self.method.new(self.config, model if self.method.fills_cache else words_of(model), generator)
        if self.adapters.is_spread:
            sharding.agree(encoder.state_dict().values())
        self._place(encoder.to(place_of(model)))

    def _place(self, encoder: PromptEncoder) -> None:
        prompts = self.adapters.prompts
        prompts.add(self.adapter.name, self.config, self.method, encoder, self.adapters.model)
        self.adapter.prompt = PromptPart(prompts)
