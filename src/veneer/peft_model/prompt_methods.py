"""Gives a PeftModel peft's methods about its prompts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import Tensor

from veneer.errors import AdapterError
from veneer.methods.base.prompt_method import PROMPT

if TYPE_CHECKING:
    from veneer.adapters.collection import Adapters


class PromptMethods:
    """Holds the methods of a ``PeftModel`` that return virtual tokens."""

    adapters: Adapters

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Any:
        """Return the virtual tokens of the active prompt: embeddings, ``(rows, tokens, width)``, or a cache of keys.

        Args:
            batch_size: the number of rows.
            task_ids: the task of each row, shape ``(rows,)``, for prompts that keep several.
            max_cache_len: accepted for peft's sake; the cache grows.

        Raises:
            AdapterError: no prompt is active.
        """
        selection = self.adapters.active_selection.current
        with self.adapters.using(dataclasses.replace(selection, task_ids=task_ids)):
            return self.adapters.prompts.made(batch_size, self.adapters.model)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """Return the virtual tokens of a prompt as they are saved, on the CPU: shape ``(tokens, width)``.

        Raises:
            AdapterError: that adapter is no prompt.
        """
        if self.adapters.get(adapter_name).prompt is None:
            raise AdapterError(f"{adapter_name!r} is no prompt.", hint="Name one that is.")
        return self.adapters.prompts.encoder(adapter_name).tensors()[PROMPT].detach().cpu()
