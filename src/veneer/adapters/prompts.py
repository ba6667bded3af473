"""The runtime of the prompt methods: virtual tokens before the input, or prefixes in the cache.

    input            [virtual tokens; the input's embeddings]      decoder or encoder alone: the model's own call
                                                                   encoder-decoder: the encoder's call
    cache            [prefix; what the model puts there]           the first module that takes past_key_values

It works by hooks on the base's modules, so the base's own ``generate``, its beam search and its cache need to know
nothing: the first call of a sequence brings the prompt in, and later ones find it in the cache. Masks and positions
are lengthened to fit. Prompts are selected as adapters of layers are; rows of one batch may have different prompts or
none: a shorter one is masked, and positions are counted over the tokens that are not masked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.adapters.lengthened_call import check_even, fit_mask_and_positions, joined_mask, lengthen_labels
from veneer.adapters.prompt_sizes import own_key_sizes
from veneer.base_model.model_call import (
    cached_positions,
    call_size,
    encoder_of,
    is_encoder_decoder,
    module_called,
    named_call,
    new_cache,
    taken_names,
    words_of,
)
from veneer.configs.base import PromptConfig
from veneer.errors import AdapterError, UnsupportedError
from veneer.layers.any_names import AnyNames
from veneer.methods.base.prompt_method import IGNORED, AnyPrompt, PromptEncoder
from veneer.packages import stands_in_for_peft
from veneer.patches.active_selection import ActiveSelection
from veneer.patches.forward_call import current, forget_after, note
from veneer.printing import warn


class Prompts(AnyNames):
    """Holds the prompts on one model. Their tensors are named as in peft: ``<adapter>.embedding.weight``.

    Args:
        active_selection: the selection, shared with the model's layers.
    """

    def __init__(self, active_selection: ActiveSelection) -> None:
        super().__init__()
        self.active_selection = active_selection
        self.methods: dict[str, AnyPrompt] = {}
        self.configs: dict[str, PromptConfig] = {}
        self._hooks: list[Any] = []

    # -- the set -------------------------------------------------------------------------------------------

    def add(self, name: str, config: PromptConfig, method: AnyPrompt, encoder: PromptEncoder, model: nn.Module) -> None:
        """Add a prompt, with a config that is complete."""
        encoder.peft_type = str(config.peft_type)
        self._modules[name] = encoder.train(model.training)
        self.methods[name], self.configs[name] = method, config
        if not self._hooks:
            self._hook(model)

    def remove(self, name: str) -> None:
        """Remove a prompt, and with the last one the hooks."""
        del self._modules[name], self.methods[name], self.configs[name]
        while self._hooks and not self.methods:
            self._hooks.pop().remove()

    def rename(self, old: str, new: str) -> None:
        """Give a prompt another name."""
        self._modules[new] = self._modules.pop(old)
        self.methods[new], self.configs[new] = self.methods.pop(old), self.configs.pop(old)

    def clear(self) -> None:
        """Remove all prompts."""
        for name in list(self.methods):
            self.remove(name)

    def __contains__(self, name: object) -> bool:
        return name in self.methods

    def __getitem__(self, name: str) -> PromptEncoder:
        return self.encoder(name)

    def check_rows(self, names: Iterable[str]) -> None:
        """Raise ``AdapterError`` when the prompts among ``names`` cannot share a batch."""
        kinds = {self.methods[name].fills_cache: name for name in names if name in self}
        if len(kinds) > 1:
            raise AdapterError(
                f"{kinds[False]!r} lengthens the input and {kinds[True]!r} fills the cache; no batch holds both.",
                hint="Run their rows one after the other.",
            )

    def encoder(self, name: str) -> PromptEncoder:
        """Return the prompt of that name."""
        encoder = self._modules[name]
        assert isinstance(encoder, PromptEncoder)
        return encoder

    def _hook(self, model: nn.Module) -> None:
        front = encoder_of(model) if is_encoder_decoder(model) else model
        places = [(front, self._prepend)] + ([(model, self._cross)] if is_encoder_decoder(model) else [])
        try:
            places.append((module_called(model), self._fill))
        except UnsupportedError:
            places.append((model, self._refuse))
        self._hooks = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in places]
        self._hooks += [front.register_forward_hook(self._finish), forget_after(front, "weighted_labels")]

    # -- the hooks -----------------------------------------------------------------------------------------

    def _prepend(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Put virtual tokens before a call's input."""
        if not self._active(fills_cache=False):
            return None
        call = named_call(module, args, kwargs)
        rows, new, device = call_size(call)
        mask = self._mask(False, rows, device)
        if mask is None:
            return None
        check_even(module, mask)
        seen = cached_positions(call.get("past_key_values"))
        if not seen:
            if call.get("inputs_embeds") is None:
                call["inputs_embeds"] = words_of(module)(call["input_ids"])
            call["input_ids"] = None
            values = self._values(False, rows, mask.shape[1]).to(call["inputs_embeds"])
            call["inputs_embeds"] = torch.cat([values, call["inputs_embeds"]], dim=1)
            types, labels = call.pop("input_type_mask", None), call.get("labels")
            lengthen_labels(call, new, mask)
            self._weigh(call, labels, types)
        fit_mask_and_positions(module, call, mask, seen, new, "attention_mask")
        return (), call

    def _weigh(self, call: dict[str, Any], labels: Tensor | None, types: Tensor | None) -> None:
        """Note the labels of a prompt that has a loss of its own, for :meth:`_finish`."""
        names = self._active(fills_cache=False)
        name = names[0]
        weighted = None if labels is None else self.methods[name].counted(self.configs[name], labels, types)
        if weighted is None:
            return
        if self.active_selection.current.rows is not None:
            raise AdapterError(
                f"{name!r} has a loss of its own, which is not defined for rows under several adapters.",
                hint="Train it with set_adapter(...).",
            )
        call["labels"] = weighted[0]
        note(weighted_labels=weighted)

    def _finish(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Put a prompt's own loss in the place of the model's."""
        weighted = current().weighted_labels
        if weighted is not None:
            output.loss = weighted_loss(output.logits, *weighted)

    def _cross(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Lengthen the mask with which a decoder sees an encoder whose input was lengthened."""
        if not self._active(fills_cache=False):
            return None
        call = named_call(module, args, kwargs)
        encoded = call.get("encoder_outputs")
        if encoded is None:
            rows, length, device = call_size(call)
        else:
            (rows, length), device = encoded[0].shape[:2], encoded[0].device
        mask = self._mask(False, rows, device)
        if mask is None:
            return None
        others = length if encoded is None else length - mask.shape[1]
        call["attention_mask"] = joined_mask(mask, call.get("attention_mask"), others)
        return (), call

    def _fill(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Put a prefix into an empty cache."""
        if not self._active(fills_cache=True):
            return None
        call = named_call(module, args, kwargs)
        decoder = "decoder_" if "decoder_input_ids" in taken_names(module) else ""
        rows, new, device = call_size(call, decoder)
        mask = self._mask(True, rows, device)
        if mask is None:
            return None
        # Without caching the model still hands back the cache that holds the prefix; it is not to be continued.
        if call.get("past_key_values") is None or call.get("use_cache") is False:
            call["past_key_values"] = new_cache(module)
        cache = call["past_key_values"]
        seen = cached_positions(cache)
        if not seen:
            if module.training:
                check_no_checkpointing(module)
            self._fill_cache(cache, rows, mask.shape[1], module)
        fit_mask_and_positions(module, call, mask, seen, new, decoder + "attention_mask")
        return (), call

    def _refuse(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise ``UnsupportedError`` where a prefix is active, on a model that takes no cache."""
        if self._active(fills_cache=True):
            module_called(module)

    def _fill_cache(self, cache: Any, rows: int, tokens: int, module: nn.Module) -> None:
        config = next(self.configs[name] for name in self._active(fills_cache=True))
        layers, heads = config.num_layers or 0, config.num_attention_heads or 0
        reference = next(p for p in module.parameters() if p.is_floating_point())
        values = self._values(True, rows, tokens).to(reference)
        # (rows, tokens, layers * (keys, values) * heads * dim) -> for each of them (rows, heads, tokens, dim)
        values = values.view(rows, tokens, layers * 2, heads, -1).permute(2, 0, 3, 1, 4)
        decoder_cache = getattr(cache, "self_attention_cache", cache)
        # With two submodules peft deals the pairs out in fours, and checkpoints are trained that way.
        step = 2 if config.num_transformer_submodules == 2 else 1
        sizes = own_key_sizes(module, layers)
        fitting = [place for place, size in enumerate(sizes) if size[0] <= heads and size[1] <= values.shape[-1]]
        _check_layers(layers, len(sizes), fitting)
        for layer in fitting:
            pair, (own, width) = layer * step % layers, sizes[layer]
            keys, others = (values[2 * pair + kind, :, :own, :, :width] for kind in (0, 1))
            decoder_cache.update(keys, others, layer)

    def made(self, rows: int, model: nn.Module) -> Any:
        """Return the virtual tokens of the selected prompts for each row: embeddings, or a new cache.

        Raises:
            AdapterError: no prompt is selected.
        """
        for fills_cache in (True, False):
            mask = self._mask(fills_cache, rows, torch.device("cpu"))
            if mask is not None and not fills_cache:
                return self._values(False, rows, mask.shape[1])
            if mask is not None:
                module = module_called(model)
                cache = new_cache(module)
                self._fill_cache(cache, rows, mask.shape[1], module)
                return cache
        raise AdapterError("No prompt is active.", hint="Choose one with set_adapter(...).")

    # -- what the selection means --------------------------------------------------------------------------

    def _active(self, fills_cache: bool) -> list[str]:
        """Return the selected prompts of one kind."""
        names = self.active_selection.current.applied
        return [n for n in names if n in self.methods and self.methods[n].fills_cache == fills_cache]

    def _rows(self, fills_cache: bool, rows: int, device: torch.device) -> dict[str, Tensor | None]:
        """Return the indices of each prompt's rows; ``None`` for all rows."""
        selection, names = self.active_selection.current, self._active(fills_cache)
        if selection.rows is None:
            return dict.fromkeys(names)
        groups = selection.groups(rows, device)
        return {name: groups[name] for name in names}

    def tokens(self, name: str) -> int:
        """Return how many virtual tokens a prompt has."""
        return self.configs[name].num_virtual_tokens or 0

    def _mask(self, fills_cache: bool, rows: int, device: torch.device) -> Tensor | None:
        """Return the mask of each row's virtual tokens, ``(rows, tokens)``; ``None`` when there are none."""
        indices = self._rows(fills_cache, rows, device)
        if not indices:
            return None
        longest = max(map(self.tokens, indices))
        mask = torch.zeros(rows, longest, dtype=torch.long, device=device)
        for name, index in indices.items():
            # Shorter prompts are padded on the left, so that every prompt ends where the input begins.
            start = longest - self.tokens(name)
            mask[slice(None) if index is None else index, start:] = 1
        return mask

    def _values(self, fills_cache: bool, rows: int, tokens: int) -> Tensor:
        """Return the virtual tokens of each row, ``(rows, tokens, width)``."""
        device = next(self.parameters()).device
        tasks = self.active_selection.current.tasks(rows)
        total: Tensor | None = None
        for name, index in self._rows(fills_cache, rows, device).items():
            own_tasks = tasks if tasks is None or index is None else tasks.to(device)[index]
            values = self.encoder(name)(own_tasks)[..., : self.tokens(name), :]
            values = F.pad(values, (0, 0, tokens - values.shape[-2], 0))
            values = values.expand(rows if index is None else len(index), -1, -1)
            if index is not None:
                empty = values.new_zeros(rows, *values.shape[1:]) if total is None else total
                values = empty.index_copy(0, index, values.to(empty.dtype))
            total = values
        assert total is not None
        return total


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the mean over all labels of the next token's cross-entropy, each times its weight; computed in float32.

    Args:
        logits: shape ``(rows, tokens, vocabulary)``.
        labels: shape ``(rows, tokens)``; ``-100`` is none.
        weights: of the labels, the same shape.
    """
    labels, weights = labels[:, 1:].to(logits.device), weights[:, 1:].to(logits.device)
    losses = F.cross_entropy(logits[:, :-1].float().mT, labels, reduction="none", ignore_index=IGNORED)
    return (losses * weights).sum() / (labels != IGNORED).sum()


def _check_layers(layers: int, own: int, fitting: list[int]) -> None:
    """Warn of the layers in which a prefix is not, of ``own`` that have keys of their own; raise where it is in none.

    In peft's place those that use the keys of others are named too.
    """
    if not fitting:
        raise AdapterError(
            "The prefix skipped every layer: their keys have more or wider heads than it.",
            hint="Use it on the model that it was made for.",
        )
    skipped = [layer for layer in range(layers if stands_in_for_peft() else own) if layer not in fitting]
    if skipped:
        warn(
            f"The prefix is in the layers {fitting}, and skipped {skipped} due to KV shape: their keys have more or "
            "wider heads than it, or are those of other layers."
        )


def check_no_checkpointing(module: nn.Module) -> None:
    """Raise ``AdapterError`` where a model is to be trained with a prefix and with gradient checkpointing."""
    if any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
        raise AdapterError(
            "A prefix does not work with gradient checkpointing, which drops the cache, and with it the prefix.",
            hint="Turn it off: model.activation_checkpointing_disable().",
        )
