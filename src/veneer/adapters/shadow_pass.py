"""The runtime of SHADOW: small decoders run before the base's own, and training adds their loss.

Hooks on the base's decoder run them when a SHADOW adapter is selected. With a cache, the small decoder keeps keys and
values of its own behind the model's layers in it, so what reorders or crops the one does so to the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from veneer.adapters.pass_hook import PassHook, own_cache
from veneer.base_model.blocks import find_decoder_blocks
from veneer.base_model.model_call import named_call, new_cache, wants_cache
from veneer.base_model.sites.site import call_with
from veneer.configs.methods.shadow import ShadowConfig
from veneer.configs.methods.xlora import XLoraConfig
from veneer.configs.names import TaskType
from veneer.errors import AdapterError
from veneer.methods.shadow import BACKBONE, HEAD, classifier, own_tensors, projected, shares, small_decoder
from veneer.patches.forward_call import current, forget_after, note
from veneer.patches.selection import Selection

if TYPE_CHECKING:
    from veneer.adapters.adapter import Adapter
    from veneer.adapters.collection import Adapters


class ShadowPass(PassHook):
    """Runs the small decoders of the SHADOW adapters on one model."""

    def __init__(self) -> None:
        super().__init__()
        # Adapter's name -> its config, and the decoder of that config, without values.
        self._decoders: dict[str, tuple[ShadowConfig, nn.Module]] = {}

    def is_for(self, adapter: Adapter) -> bool:
        return isinstance(adapter.config, ShadowConfig)

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        decoder = find_decoder_blocks(model)
        stack = model if decoder is None else decoder.stack
        return [
            stack.register_forward_pre_hook(self._before, with_kwargs=True),
            forget_after(stack, "shadow_states"),
            model.register_forward_hook(self._after, with_kwargs=True),
            forget_after(model, "first_shadow_states"),
        ]

    def refresh(self, adapters: Adapters) -> None:
        self._decoders = {name: known for name, known in self._decoders.items() if name in adapters.by_name}
        super().refresh(adapters)

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

    def _run(self, stack: nn.Module, call: Mapping[str, Any], adapter: Adapter) -> Tensor:
        """Return the small decoder's last states in the base's width, for all rows."""
        name, config, shared = adapter.name, _config_of(adapter), adapter.layers.shared
        tensors = own_tensors(shared, BACKBONE)
        decoder, like = self._decoder(name, config, stack), next(iter(tensors.values()))
        decoder.train(stack.training)
        for buffers in (module._buffers for module in decoder.modules()):
            buffers.update((leaf, b.to(like.device)) for leaf, b in buffers.items() if b is not None)
        given = call.get("inputs_embeds")
        if shares(config, stack):
            given = stack.get_input_embeddings()(call["input_ids"]) if given is None else given  # type: ignore[operator]
        elif given is not None:
            raise AdapterError(
                f"{name!r} (SHADOW) has embeddings of its own and reads tokens, and the call has embeddings.",
                hint="Give input_ids, without a prompt beside it; or train it with the base's (share_embeddings=True).",
            )
        arguments = {key: call[key] for key in ("attention_mask", "position_ids") if call.get(key) is not None}
        arguments |= {"input_ids": call["input_ids"]} if given is None else {"inputs_embeds": given.to(like)}
        cache = call.get("past_key_values")
        if cache is not None:
            arguments["past_key_values"] = own_cache(cache, adapter, stack, decoder)
        output = call_with(decoder, tensors, **arguments, use_cache=cache is not None, return_dict=True)
        return projected(output.last_hidden_state, shared)

    def _decoder(self, name: str, config: ShadowConfig, stack: nn.Module) -> nn.Module:
        """Return the small decoder without values, which are given with each call."""
        known = self._decoders.get(name)
        if known is not None and known[0] is config:
            return known[1]
        # Made on a real device, because its buffers are computed when it is made.
        with torch.random.fork_rng(devices=[]):
            decoder = small_decoder(config, stack)
        for module in decoder.modules():
            for leaf, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[leaf] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        self._decoders[name] = config, decoder
        return decoder

    def _after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        first, loss = current().first_shadow_states, getattr(output, "loss", None)
        call = named_call(module, args, kwargs)
        if first is None or loss is None or call.get("labels") is None or not module.training:
            return
        for name, state in first.items():
            config = _config_of(self.adapters.by_name[name])
            auxiliary = self._own_loss(name, config, state, call) if config.auxiliary_loss_weight > 0 else None
            if auxiliary is not None:
                loss = loss + config.auxiliary_loss_weight * auxiliary.to(loss.device)
        output.loss = loss

    def _own_loss(self, name: str, config: ShadowConfig, state: Tensor, call: Mapping[str, Any]) -> Tensor | None:
        """Return the loss of the small decoder's own prediction, if its task has one."""
        labels, mask = self._own_rows(name, call["labels"]), call.get("attention_mask")
        if config.task_type == TaskType.CAUSAL_LM:
            return _prediction_loss(self.adapters.model, state, labels)
        head, tensors = classifier(self.adapters.catalog), own_tensors(self.adapters.by_name[name].layers.shared, HEAD)
        if head is None or not tensors:
            return None
        last = _last_tokens(state, None if mask is None else self._own_rows(name, mask))
        logits: Tensor = call_with(head, tensors, last.to(next(iter(tensors.values()))))
        return _classification_loss(logits.float(), labels.to(logits.device))

    def _own_rows(self, name: str, value: Tensor) -> Tensor:
        rows = self.adapters.active_selection.current.rows_of(name, len(value), value.device)
        return value if rows is None else value[rows]


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


def _prediction_loss(model: nn.Module, state: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of the next tokens that the base's output layer predicts from ``state``."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    logits = head(state.to(head.weight.dtype)).float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device))


def _last_tokens(state: Tensor, mask: Tensor | None) -> Tensor:
    """Return the state of each row's last token that is no padding, ``(rows, hidden)``."""
    if mask is None:
        return state[:, -1]
    # A prefix in the cache has a part of the mask, and no states.
    mask = mask[:, -state.shape[1] :].to(state.device)
    last = (mask.ne(0) * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return state[torch.arange(len(state), device=state.device), last]


def _classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return transformers' loss of a number, of one class in several, or of several classes, as the labels are."""
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.flatten(), labels.flatten().to(logits.dtype))
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return F.cross_entropy(logits, labels.flatten())
