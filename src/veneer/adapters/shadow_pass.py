"""The runtime of SHADOW: the small decoders run before the base's own, and training adds their loss.

Hooks on the base's decoder do it when a SHADOW adapter is selected. With a cache, the small decoder keeps keys and
values of its own behind the model's layers in it, so what reorders or crops the one does so to the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from veneer.base_model.model_call import named_call, new_cache, wants_cache
from veneer.base_model.sites.block import stack_name
from veneer.base_model.sites.site import call_with
from veneer.configs.methods.shadow import ShadowConfig
from veneer.configs.methods.xlora import XLoraConfig
from veneer.configs.names import TaskType
from veneer.errors import AdapterError
from veneer.methods.shadow import STATES

if TYPE_CHECKING:
    from veneer.adapters.collection import Adapters

_FIRST: ContextVar[Mapping[str, Tensor] | None] = ContextVar("veneer_shadow_first", default=None)
# Whose a layer of a cache is, where it is not the base's.
_OWNER = "veneer_owner"


class ShadowPass:
    """The small decoders of the SHADOW adapters on one model."""

    # Known while there is something to watch for, and no longer: a cycle keeps a model that is dropped, until Python
    # collects its garbage.
    adapters: Adapters

    def __init__(self) -> None:
        # Adapter's name -> its config, and the decoder that it means, without values.
        self._decoders: dict[str, tuple[ShadowConfig, nn.Module]] = {}
        self._hooks: list[RemovableHandle] = []

    @property
    def acts_by_place(self) -> bool:
        """Whether a row's place decides what an adapter does: it does not here."""
        return False

    def refresh(self, adapters: Adapters) -> None:
        """Run them from now on if there are any, and no longer if there are none."""
        entries = adapters.by_name
        wanted = any(isinstance(entry.config, ShadowConfig) for entry in entries.values())
        self._decoders = {name: made for name, made in self._decoders.items() if name in entries}
        if wanted and not self._hooks:
            self.adapters, model = adapters, adapters.model
            stack = model.get_submodule(stack_name(model) or "")
            self._hooks = [
                stack.register_forward_pre_hook(self._before, with_kwargs=True),
                stack.register_forward_hook(_after_stack, always_call=True),
                model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            ]
        if self._hooks and not wanted:
            del self.adapters
        while self._hooks and not wanted:
            self._hooks.pop().remove()

    def _selected(self) -> dict[str, ShadowConfig]:
        selection = self.adapters.switch.selection
        names = selection.applied
        configs = {name: self.adapters.by_name[name].config for name in names}
        found = {name: config for name, config in configs.items() if isinstance(config, ShadowConfig)}
        other = next((name for name in names if isinstance(configs[name], XLoraConfig)), None)
        if found and other is not None:
            raise AdapterError(
                f"{next(iter(found))!r} (SHADOW) and {other!r} (X-LoRA) cannot be active together: each makes a pass "
                "of its own.",
                hint="Select one of them.",
            )
        if found and selection.by_token:
            raise AdapterError(
                f"{next(iter(found))!r} (SHADOW) reads whole rows, and a packed sequence has parts under others.",
                hint='Give one name for each row: adapter_names=["a", "b"].',
            )
        return found

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        configs = self._selected()
        _FIRST.set(None)
        if not configs:
            return None
        call = named_call(module, args, kwargs)
        if wants_cache(module, call):
            call["past_key_values"] = new_cache(module)
        selection = self.adapters.switch.selection
        first = {}
        for name, config in configs.items():
            made = self._run(module, call, name, config)
            rows = selection.rows_of(name, len(made), made.device)
            first[name] = made if rows is None else made[rows]
        _FIRST.set(first)
        STATES.set(dict(first))
        return (), call

    def _run(self, stack: nn.Module, call: Mapping[str, Any], name: str, config: ShadowConfig) -> Tensor:
        """The small decoder's last states in the base's width, for all rows."""
        from veneer.methods.shadow import BACKBONE, own_tensors, projected, shares

        shared = self.adapters.by_name[name].layers.shared
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
        own = {key: call[key] for key in ("attention_mask", "position_ids") if call.get(key) is not None}
        own |= {"input_ids": call["input_ids"]} if given is None else {"inputs_embeds": given.to(like)}
        cache = call.get("past_key_values")
        if cache is not None:
            own["past_key_values"] = _own_cache(cache, stack, decoder, name)
        output = call_with(decoder, tensors, **own, use_cache=cache is not None, return_dict=True)
        return projected(output.last_hidden_state, shared)

    def _decoder(self, name: str, config: ShadowConfig, stack: nn.Module) -> nn.Module:
        """The small decoder without values: they are given with each call."""
        from veneer.methods.shadow import small_decoder

        kept = self._decoders.get(name)
        if kept is not None and kept[0] is config:
            return kept[1]
        # Made on a real device, for its buffers are worked out then.
        with torch.random.fork_rng(devices=[]):
            made = small_decoder(config, stack)
        for module in made.modules():
            for leaf, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[leaf] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        self._decoders[name] = config, made
        return made

    def _after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        first = _FIRST.get()
        _FIRST.set(None)
        call, loss = named_call(module, args, kwargs), getattr(output, "loss", None)
        if first is None or loss is None or call.get("labels") is None or not module.training:
            return
        for name, state in first.items():
            config = self.adapters.by_name[name].config
            assert isinstance(config, ShadowConfig)
            own = self._own_loss(name, config, state, call) if config.auxiliary_loss_weight > 0 else None
            if own is not None:
                loss = loss + config.auxiliary_loss_weight * own.to(loss.device)
        output.loss = loss

    def _own_loss(self, name: str, config: ShadowConfig, state: Tensor, call: Mapping[str, Any]) -> Tensor | None:
        """The loss of what the small decoder says alone, if its task has one."""
        from veneer.methods.shadow import HEAD, classifier, own_tensors

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
        rows = self.adapters.switch.selection.rows_of(name, len(value), value.device)
        return value if rows is None else value[rows]


def _after_stack(module: nn.Module, args: Any, output: Any) -> None:
    STATES.set(None)


def _prediction_loss(model: nn.Module, state: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of the next tokens that the base's output layer reads off ``(rows, length, hidden)``."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    logits = head(state.to(head.weight.dtype)).float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device))


def _last_tokens(state: Tensor, mask: Tensor | None) -> Tensor:
    """The state of each row's last token that is no padding, ``(rows, hidden)``."""
    if mask is None:
        return state[:, -1]
    # A prefix in the cache has a part of the mask, and no states.
    mask = mask[:, -state.shape[1] :].to(state.device)
    last = (mask.ne(0) * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return state[torch.arange(len(state), device=state.device), last]


def _classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """As transformers has it: of one number, of one class in several, or of several at once, by the labels given."""
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.flatten(), labels.flatten().to(logits.dtype))
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return F.cross_entropy(logits, labels.flatten())


def _own_cache(cache: Any, stack: nn.Module, decoder: nn.Module, name: str) -> Any:
    """The part of a cache for one small decoder: layers behind the base's own."""
    from transformers.cache_utils import Cache

    own = [layer for layer in cache.layers if getattr(layer, _OWNER, None) == name]
    if not own:
        if cache.get_seq_length():
            raise AdapterError(
                f"The cache was filled without {name!r} (SHADOW), which is active now.",
                hint="Begin with an empty cache, or give all tokens again.",
            )
        if not cache.layers:
            cache.layers.extend(new_cache(stack).layers)
        own = new_cache(decoder).layers
        for layer in own:
            setattr(layer, _OWNER, name)
        cache.layers.extend(own)
    return Cache(layers=own)
