"""The abstract class of prompts: virtual tokens before the input, or their keys and values in the cache.

It changes no weight, so it has no patch and no merged form. The runtime that puts the tokens there is ``prompts.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from veneer.base_model.sites.site import Site
from veneer.configs.base import PromptConfig
from veneer.files.tensor_keys import SHARED_PREFIX
from veneer.methods.base.abilities import StoresShared
from veneer.methods.base.method import Leaf

ConfigT = TypeVar("ConfigT", bound=PromptConfig)

PROMPT = "prompt_embeddings"
# The label of a token that no loss is taken of.
IGNORED = -100


class PromptEncoder(nn.Module, ABC):
    """Holds the tensors of one prompt and makes its virtual tokens.

    Attributes:
        frozen: those of its parameters that are not trained.
        peft_type: the method that it is of, once that is known.
    """

    frozen: ClassVar[frozenset[str]] = frozenset()
    peft_type: str | None = None

    @abstractmethod
    def forward(self, tasks: Tensor | None) -> Tensor:
        """Return the virtual tokens, shape ``(tokens, width)``.

        Args:
            tasks: the task of each row, shape ``(rows,)``; where a method has tasks, the shape is
                ``(rows, tokens, width)``.
        """

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are saved, by their checkpoint keys."""
        with torch.no_grad():
            return {PROMPT: self(None)}

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that are trained."""
        return [parameter for name, parameter in self.named_parameters() if name not in self.frozen]


class EmbeddingTable(PromptEncoder):
    """Holds a table of the virtual tokens themselves; the parameter is named ``embedding.weight``, as in peft."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(values, freeze=not values.requires_grad)

    def forward(self, tasks: Tensor | None) -> Tensor:
        weight: Tensor = self.embedding.weight
        return weight

    def tensors(self) -> dict[str, Tensor]:
        return {PROMPT: self.embedding.weight}


def fresh(make: Callable[[], PromptEncoder], generator: torch.Generator | None) -> PromptEncoder:
    """Return a new prompt whose modules start as torch starts them, at random from ``generator``."""
    if generator is None:
        return make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        return make()


class PromptMethod(StoresShared, Generic[ConfigT]):
    """Makes prompts. Stateless, as a :class:`~veneer.methods.base.method.Method` is.

    Attributes:
        fills_cache: whether its tokens are keys and values in the cache; else they are embeddings before the input's.
        shared: the tensors that a checkpoint holds.
        prefix: the beginning of the checkpoint key of a module that is saved whole.
    """

    fills_cache: ClassVar[bool] = False
    shared: ClassVar[tuple[Leaf, ...]] = (Leaf(PROMPT),)
    prefix: ClassVar[str] = SHARED_PREFIX

    def shared_shapes(self, config: ConfigT, sites: Sequence[Site]) -> Mapping[str, tuple[int, ...]]:
        """Return each checkpoint key and the shape that it must have; ``config`` has the model's sizes."""
        return {PROMPT: self.size(config)}

    def size(self, config: ConfigT) -> tuple[int, int]:
        """Return the number of virtual tokens in a checkpoint, and the width of each."""
        tokens, width = config.num_virtual_tokens or 0, config.token_dim or 0
        if self.fills_cache:
            return tokens, 2 * width * (config.num_layers or 0)
        return tokens * (config.num_transformer_submodules or 1), width

    @abstractmethod
    def new(self, config: ConfigT, words: nn.Module, generator: torch.Generator | None) -> PromptEncoder:
        """Return a new prompt in float32.

        Args:
            config: completed with the model's sizes.
            words: the model's input embedding; for keys and values, which need none, the model.
            generator: of the random start.
        """

    def counted(self, config: ConfigT, labels: Tensor, types: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Return the labels of all tokens, virtual ones too, and their weights; ``None`` leaves the loss to the model.

        Args:
            config: the config.
            labels: of the input's tokens, shape ``(rows, tokens)``.
            types: the call's ``input_type_mask``, of the same shape.
        """
        return None

    def restored(self, config: ConfigT, tensors: Mapping[str, nn.Parameter]) -> PromptEncoder:
        """Return the prompt of a checkpoint's tensors, used as they are."""
        return EmbeddingTable(tensors[PROMPT])


AnyPrompt = PromptMethod[Any]
