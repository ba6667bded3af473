"""A small decoder that is a model of its own on disk (SHADOW's ``shadow_model="path"``).

A plain checkpoint is any model of transformers, with an output layer or without. A *projected* one holds a decoder and
a matrix that takes its states to the width of a larger base:

    config.json          model_type "causal_lm_with_hidden_projection"; the decoder's own config: shadow_model_config
    model.safetensors    shadow_model.*; shadow_hidden_projection.weight (the base's width, its own)

Neither the network nor code from the checkpoint is used: what is on the hub must be in its cache.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.base_model.transformers_errors import transformers_errors_as
from veneer.errors import CorruptFileError, IncompleteCheckpointError, UnsupportedError
from veneer.files.lookup_options import OFFLINE
from veneer.files.names import MODEL_CONFIG, MODEL_STEM
from veneer.files.resolve import resolve
from veneer.files.source import Source
from veneer.files.weight_files import read_checked_headers

PROJECTED = "causal_lm_with_hidden_projection"
_DECODER = "shadow_model."
_PROJECTION = "shadow_hidden_projection.weight"
_AGAIN = "Copy or download it again."


@dataclass(frozen=True)
class ShadowSource:
    """Reads a decoder from disk.

    Attributes:
        source: its files.
        config: its config, as transformers reads it.
        projected: whether a projection comes with it.
    """

    source: Source
    config: Any
    projected: bool

    def decoder(self) -> nn.Module:
        """Return the decoder in float32, with new values."""
        import transformers

        auto: Any = transformers.AutoModel
        with _reading(self.source.origin):
            decoder: nn.Module = auto.from_config(
                copy.deepcopy(self.config), dtype=torch.float32, trust_remote_code=False
            )
        return decoder

    def values(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return its tensors by name, and its projection, shape ``(base's width, its own)``, if one comes with it.

        Raises:
            SourceError: the weights are missing, damaged, of another model, or there only as a pickle.
        """
        files = [header.path for header in read_checked_headers(self.source, MODEL_STEM)]
        return self._projected_values(files) if self.projected else (self._plain_values(), None)

    def _plain_values(self) -> dict[str, Tensor]:
        import transformers

        from veneer.files.base_folder import without_adapter

        auto: Any = transformers.AutoModel
        with without_adapter(self.source) as folder, _reading(self.source.origin):
            model, info = auto.from_pretrained(
                folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True, output_loading_info=True
            )
        missing = sorted(info["missing_keys"])
        if missing:
            raise IncompleteCheckpointError(
                f"{self.source.origin}: {len(missing)} weights of {type(model).__name__} are missing; the first is "
                f"{missing[0]}.",
                hint=_AGAIN,
            )
        values: dict[str, Tensor] = model.state_dict()
        return values

    def _projected_values(self, files: Sequence[Path]) -> tuple[dict[str, Tensor], Tensor]:
        from safetensors.torch import load_file

        stored = {key: tensor for file in files for key, tensor in load_file(file).items()}
        tensors = {key.removeprefix(_DECODER): tensor for key, tensor in stored.items() if key.startswith(_DECODER)}
        with torch.device("meta"):
            expected = self.decoder().state_dict()
        odd = [key for key in tensors.keys() | expected.keys() if _shape(tensors.get(key)) != _shape(expected.get(key))]
        if odd or _PROJECTION not in stored:
            what = _DECODER + min(odd) if odd else _PROJECTION
            raise CorruptFileError(f"{self.source.origin}: {what} is not as its config says.", hint=_AGAIN)
        return tensors, stored[_PROJECTION]


def shadow_source(path: str) -> ShadowSource:
    """Return the decoder at a local path, or at a hub id that is in the cache.

    Raises:
        SourceError: it is not there, or its config is damaged.
        UnsupportedError: it is no decoder that transformers has a class for.
    """
    import transformers

    source = resolve(path, OFFLINE, what="shadow_model")
    values = source.json(MODEL_CONFIG)
    projected = values.get("model_type") == PROJECTED
    auto: Any = transformers.AutoConfig
    if projected:
        inner = values.get("shadow_model_config")
        if not isinstance(inner, dict) or not isinstance(inner.get("model_type"), str):
            raise CorruptFileError(f"{path}/{MODEL_CONFIG}: shadow_model_config names no model_type.", hint=_AGAIN)
        with _reading(path):
            config = auto.for_model(**inner)
    else:
        with _reading(path):
            config = auto.from_pretrained(source.root, local_files_only=True, trust_remote_code=False)
    _check_decoder(config, path)
    return ShadowSource(source, config, projected)


@lru_cache(maxsize=16)
def embedding_leaves(path: str) -> frozenset[str]:
    """Return the names of the embedding's parameters in the decoder at a path."""
    with torch.device("meta"):
        decoder: Any = shadow_source(path).decoder()
    words = decoder.get_input_embeddings()
    place = next(name for name, module in decoder.named_modules() if module is words)
    return frozenset(f"{place}.{leaf}" for leaf, _ in words.named_parameters())


def _check_decoder(config: Any, path: str) -> None:
    why = None
    if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "hidden_size"):
        why = f"a {config.model_type} is no decoder of tokens"
    elif getattr(config, "quantization_config", None) is not None:
        why = "its weights are quantised, and they are to be trained"
    if why is not None:
        raise UnsupportedError(
            f"shadow_model={path!r} cannot run beside a base: {why}.", hint="Give a causal language model's folder."
        )


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _reading(path: str) -> AbstractContextManager[None]:
    """Name the decoder in the error when transformers cannot read it."""
    return transformers_errors_as(
        UnsupportedError,
        f"transformers cannot load shadow_model={path!r}",
        "It is a model's folder, of a class that transformers has; code that comes with it is not run.",
    )
