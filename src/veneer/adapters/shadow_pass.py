"""The runtime of SHADOW: small decoders run before the base's own, and training adds their loss.

Hooks on the base's decoder run them when a SHADOW adapter is selected. With a cache, the small decoder keeps keys and
values of its own behind the model's layers in it, so what reorders or crops the one does so to the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer.adapters.pass_hook import PassHook, own_cache
from veneer.base_model.blocks import find_decoder_blocks
from veneer.base_model.model_call import named_call, new_cache, wants_cache
from veneer.configs.methods.shadow import ShadowConfig
from veneer.configs.methods.xlora import XLoraConfig
from veneer.configs.names import TaskType
from veneer.errors import AdapterError
from veneer.methods.shadow import BACKBONE, HEAD, PROJECTION, shares
from veneer.methods.shared.shadow_prediction import classification_loss, last_tokens, prediction_loss, projected
from veneer.patches.forward_call import current, forget_after, note
from veneer.patches.selection import Selection

if TYPE_CHECKING:
    from veneer.adapters.adapter import Adapter


class ShadowPass(PassHook):
    """Runs the small decoders of the SHADOW adapters on one model."""

    def __init__(self) -> None:
        super().__init__()
        # The loss of the small decoder's own prediction in the last call that had labels, without its weight.
        self.last_loss: Tensor | None = None

    def is_for(self, adapter: Adapter) -> bool:
        return isinstance(adapter.config, ShadowConfig)

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        decoder = find_decoder_blocks(model)
        if decoder is None:
            hook = model.register_forward_pre_hook(self._before_denoiser, with_kwargs=True)
            return [hook, forget_after(model, "shadow_states", "shadow_seeds")]
        stack = decoder.stack
        return [
            stack.register_forward_pre_hook(self._before, with_kwargs=True),
            forget_after(stack, "shadow_states"),
            model.register_forward_hook(self._after, with_kwargs=True),
            forget_after(model, "first_shadow_states"),
        ]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        adapters = self.selected()
        names = [name for name, adapter in adapters.items() if self.is_for(adapter)]
        if current().first_shadow_states is not None:  # left by a pass of the stack alone
            note(first_shadow_states=None)
        if not names:
            return None
        selection = self.adapters.active_selection.current
        _check_alone(names[0], adapters.values(), selection)
        call = named_call(module, args, kwargs)
        if wants_cache(module, call):
            call["past_key_values"] = new_cache(module)
        first = {}
        for name in names:
            states = self._run(module, call, adapters[name])
            rows = selection.rows_of(name, len(states), states.device)
            first[name] = states if rows is None else states[rows]
        note(first_shadow_states=first, shadow_states=dict(first))
        return (), call

    def _before_denoiser(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        adapters = self.selected()
        names = [name for name, adapter in adapters.items() if self.is_for(adapter)]
        if names:
            _check_alone(names[0], adapters.values(), self.adapters.active_selection.current)
            modules = {name: adapters[name].beside.modules(name) for name in names}
            note(shadow_states={}, shadow_seeds={name: partial(_seed, own) for name, own in modules.items()})

    def _run(self, stack: nn.Module, call: Mapping[str, Any], adapter: Adapter) -> Tensor:
        """Return the small decoder's last states in the base's width, for all rows."""
        config, modules = _config_of(adapter), adapter.beside.modules(adapter.name)
        decoder = modules[BACKBONE]
        given = call.get("inputs_embeds")
        if shares(config, stack):
            given = stack.get_input_embeddings()(call["input_ids"]) if given is None else given  # type: ignore[operator]
        elif given is not None:
            raise AdapterError(
                f"{adapter.name!r} (SHADOW) has embeddings of its own and reads tokens, and the call has embeddings.",
                hint="Give input_ids, without a prompt beside it; or train it with the base's (share_embeddings=True).",
            )
        arguments = {key: call[key] for key in ("attention_mask", "position_ids") if call.get(key) is not None}
        like = next(decoder.parameters())
        arguments |= {"input_ids": call["input_ids"]} if given is None else {"inputs_embeds": given.to(like)}
        cache = call.get("past_key_values")
        if cache is not None:
            arguments["past_key_values"] = own_cache(cache, adapter, stack, decoder)
        output = decoder(**arguments, use_cache=cache is not None, return_dict=True)
        return projected(output.last_hidden_state, modules[PROJECTION])

    def _after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        first, loss = current().first_shadow_states, getattr(output, "loss", None)
        call = named_call(module, args, kwargs)
        self.last_loss = None
        if first is None or loss is None or call.get("labels") is None:
            return
        for name, state in first.items():
            loss = self._with_own_loss(name, state, call, loss)
        output.shadow_loss = self.last_loss
        # An evaluation, which has no gradients, is of the model's own prediction.
        if module.training or torch.is_grad_enabled():
            output.loss = loss

    def _with_own_loss(self, name: str, state: Tensor, call: Mapping[str, Any], loss: Tensor) -> Tensor:
        """Return the loss with that of an adapter's small decoder added, and note this one."""
        config = _config_of(self.adapters.by_name[name])
        auxiliary = self._own_loss(name, config, state, call) if config.auxiliary_loss_weight > 0 else None
        if auxiliary is None:
            return loss
        noted = auxiliary.detach()
        self.last_loss = noted if self.last_loss is None else self.last_loss + noted
        return loss + config.auxiliary_loss_weight * auxiliary.to(loss.device)

    def _own_loss(self, name: str, config: ShadowConfig, state: Tensor, call: Mapping[str, Any]) -> Tensor | None:
        """Return the loss of the small decoder's own prediction, if its task has one."""
        labels, mask = self._own_rows(name, call["labels"]), call.get("attention_mask")
        if config.task_type == TaskType.CAUSAL_LM:
            head: Any = self.adapters.model.get_output_embeddings()  # type: ignore[operator]
            return prediction_loss(head(state.to(head.weight.dtype)), labels)
        head = self.adapters.by_name[name].beside.modules(name).get(HEAD)
        if head is None:
            return None
        last = last_tokens(state, None if mask is None else self._own_rows(name, mask))
        return classification_loss(head(last.to(next(head.parameters()).dtype)), labels)

    def _own_rows(self, name: str, value: Tensor) -> Tensor:
        rows = self.adapters.active_selection.current.rows_of(name, len(value), value.device)
        return value if rows is None else value[rows]


def _seed(modules: Mapping[str, nn.Module], h: Tensor, call: Mapping[str, Any]) -> Tensor:
    """Return the first states beside a diffusion transformer, of the first block's input and the rest of its call."""
    return projected(modules[BACKBONE](h, call), modules[PROJECTION])


def _config_of(adapter: Adapter) -> ShadowConfig:
    assert isinstance(adapter.config, ShadowConfig)
    return adapter.config


def _check_alone(name: str, adapters: Iterable[Adapter], selection: Selection) -> None:
    """Raise ``AdapterError`` where the SHADOW adapter ``name`` cannot run as it is selected."""
    mixing = next((adapter for adapter in adapters if isinstance(adapter.config, XLoraConfig)), None)
    if mixing is not None:
        raise AdapterError(
            f"{name!r} (SHADOW) and {mixing.name!r} (X-LoRA) cannot be active together: each makes a pass of its own.",
            hint="Select one of them.",
        )
    if selection.by_token:
        raise AdapterError(
            f"{name!r} (SHADOW) reads whole rows, and a packed sequence has parts under others.",
            hint='Give one name for each row: adapter_names=["a", "b"].',
        )
