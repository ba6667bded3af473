"""Sites of whole attention modules, for methods that give the queries more keys and values to attend to.

Such a method attends with a module's queries to keys and values that the module's own projections compute from trained
vectors. Those projections may carry adapters of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site, unsupported


class AttentionSite(Site):
    """One self-attention module. It has no weight of its own to change.

    Attributes:
        projection: the child that computes its keys.
    """

    projection: ClassVar[str]
    products = False

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module, f"{self.projection}.weight")

    @property
    def id(self) -> str:
        return self.name

    @property
    def device(self) -> torch.device:
        device = LinearSite(self.name, self.module.get_submodule(self.projection)).device
        # A model that adapters are only planned against is on the meta device.
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def shape(self) -> tuple[int, int]:
        width = int(self.module.config.hidden_size)  # type: ignore[union-attr, arg-type]
        return width, width

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return int(self.module.head_dim)  # type: ignore[arg-type]

    def canonical(self, stored: Tensor) -> Tensor:
        raise unsupported(self, "a change of the weight")

    def as_stored(self, matrix: Tensor) -> Tensor:
        raise unsupported(self, "a change of the weight")

    def heads(self, x: Tensor) -> Tensor:
        """Reshape ``(rows, length, heads * dim)`` to ``(rows, length, heads, dim)``."""
        split: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return split

    def queries(self, x: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Return the queries of an input, ``(rows, length, heads, dim)``; ``call`` is the rest of the call."""
        raise NotImplementedError

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values, without positions, of vectors ``(1, n, hidden)``: ``(1, n, key heads, dim)`` each."""
        raise NotImplementedError

    def output(self, x: Tensor) -> Tensor:
        """Return the change of the module's output for added heads ``(rows, length, heads * dim)``."""
        raise NotImplementedError


class SplitAttention(AttentionSite):
    """Llama's form: three projections, queries rotated by their positions, and an output projection."""

    projection = "k_proj"

    def queries(self, x: Tensor, call: Mapping[str, Any]) -> Tensor:
        query = self.heads(self.module.q_proj(x))  # type: ignore[operator]
        cos, sin = (part.unsqueeze(2) for part in call["position_embeddings"])
        first, second = query.chunk(2, -1)
        turned: Tensor = query * cos + torch.cat([-second, first], -1) * sin
        return turned

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.heads(self.module.k_proj(x)), self.heads(self.module.v_proj(x))  # type: ignore[operator]

    def output(self, x: Tensor) -> Tensor:
        projected: Tensor = self.module.o_proj(x)  # type: ignore[operator]
        return projected


class JoinedAttention(AttentionSite):
    """GPT-2's form: one projection for all three. Added heads bypass the output projection, as in peft."""

    projection = "c_attn"

    def queries(self, x: Tensor, call: Mapping[str, Any]) -> Tensor:
        return self.heads(self._projected(x)[0])

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, keys, values = self._projected(x)
        return self.heads(keys), self.heads(values)

    def output(self, x: Tensor) -> Tensor:
        return x

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        joined: Tensor = self.module.c_attn(x)  # type: ignore[operator]
        return joined.chunk(3, -1)


# Model type -> the form of its attention, and the name that its modules have.
FORMS: Mapping[str, tuple[type[AttentionSite], str]] = {
    "gpt2": (JoinedAttention, "attn"),
    "llama": (SplitAttention, "self_attn"),
    "mistral": (SplitAttention, "self_attn"),
}


def attention_site(name: str, module: nn.Module) -> AttentionSite | None:
    """Return the site of an attention module; ``None`` for other modules, and for forms that are not known."""
    form, _ = FORMS.get(str(getattr(getattr(module, "config", None), "model_type", None)), (None, ""))
    if form is None or not isinstance(getattr(module, form.projection, None), nn.Module):
        return None
    return form(name, module)
