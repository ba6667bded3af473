"""The rows of the embedding and the output layer that are saved beside an adapter (``save_embedding_layers``).

Where the vocabulary has grown since the base was saved, nobody else has the new rows. They lie under peft's keys.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal

from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.collection import Adapters
from veneer.base_model.catalog import Catalog
from veneer.base_model.sharding import is_sharded
from veneer.base_model.targets import ALL_LINEAR, names_match
from veneer.checkpoints.resized_vocabulary import vocabulary_of
from veneer.configs.base import AnyConfig
from veneer.errors import SourceError, UsageError
from veneer.files.lookup_options import OFFLINE
from veneer.files.names import MODEL_CONFIG
from veneer.files.resolve import resolve
from veneer.files.tensor_keys import encode
from veneer.methods.base.replaced_weight import TOKEN_BASE, WEIGHT, SavedWeight
from veneer.methods.shared.token_rows import TOKENS, TokenRows
from veneer.printing import warn

SaveEmbeddings = bool | Literal["auto"]

# The modules whose rows peft saves of its own accord when a config targets them.
_KNOWN = ("embed_tokens", "lm_head")


def embeddings_to_save(adapters: Adapters, adapter: Adapter, choice: SaveEmbeddings) -> dict[str, Tensor]:
    """Return the weights and biases of embeddings and output layers to be saved with an adapter, by checkpoint key.

    Args:
        adapters: the set it belongs to.
        adapter: the adapter.
        choice: save them or not; ``"auto"`` does where the vocabulary is not the base's, or the adapter is on one.

    Raises:
        UsageError: ``choice`` is none of these.
    """
    if choice not in (True, False, "auto"):
        raise UsageError(f"save_embedding_layers={choice!r} is none of the choices.", hint='True, False or "auto".')
    catalog, grown = adapters.catalog, vocabulary_differs(adapters, adapter)
    layers = [
        name
        for name in dict.fromkeys([*catalog.input_embeddings, *catalog.output_embeddings])
        if name not in adapter.whole_modules.copies
    ]
    methods = {name: _methods(adapters, adapter, name) for name in layers}
    by_token = any(isinstance(method, TokenRows) for name in layers for method in methods[name])
    if choice == "auto":
        targeted = not by_token and bool(layers) and _targets_embeddings(adapter.config, catalog)
        if targeted:
            warn(
                "Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`. Say True or "
                "False to choose."
            )
        choice = grown or targeted
    if not choice:
        return {}
    # The rows under an adapted layer are the base's own, and so are those of a layer that shares them.
    adapted = [name for name in layers if methods[name] and methods[name] != [TOKENS]]
    names = adapted if adapted and (catalog.tied_embeddings or not grown) else layers
    return {key: t for name in names for key, t in _tensors(adapters, adapter, name, methods[name])}


def _targets_embeddings(config: AnyConfig, catalog: Catalog) -> bool:
    """Tell whether a config's targets name an embedding or output layer that peft knows."""
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str):
        known = [name for name in catalog.modules if name.rpartition(".")[2] in _KNOWN]
        return targets != ALL_LINEAR and any(names_match(name, targets) for name in known)
    return not set(_KNOWN).isdisjoint(targets or ())


def vocabulary_differs(adapters: Adapters, adapter: Adapter) -> bool:
    """Tell whether a model's vocabulary differs from that of the base's files, where these are on this machine."""
    vocabulary = vocabulary_of(_as_dict(getattr(adapters.model, "config", None)), "the model")
    named = (adapter.config.base_model_name_or_path, getattr(adapters.model, "name_or_path", None))
    for place in filter(None, named):
        with contextlib.suppress(SourceError):
            source = resolve(place, OFFLINE, what="base")
            if source.has(MODEL_CONFIG):
                stored = vocabulary_of(source.json(MODEL_CONFIG), source.origin)
                return None not in (vocabulary, stored) and vocabulary != stored
    return False


def _as_dict(config: Any) -> dict[str, Any]:
    values: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}
    return values


def _methods(adapters: Adapters, adapter: Adapter, name: str) -> list[Any]:
    """Return the methods of an adapter's shares of a module, but for those that bring its rows."""
    layer = adapters.layers.get(name)
    shares = [] if layer is None else layer.bound.get(adapter.name, [])
    return [share.method for share in shares if not isinstance(share.method, SavedWeight)]


def _tensors(adapters: Adapters, adapter: Adapter, name: str, methods: list[Any]) -> list[tuple[str, Tensor]]:
    layer, module = adapters.layers.get(name), adapters.catalog.modules[name]
    # Where parameters are spread over processes it is for the caller to gather them.
    if layer is not None and is_sharded(layer.site.stored):
        layer = None
    weight = module._parameters.get("weight") if layer is None else layer.base_stored
    if weight is None or not weight.is_floating_point():  # packed: never grown
        return []
    if methods:
        return [(encode(name, TOKEN_BASE.leaves[0].name if TOKENS in methods else WEIGHT), weight)]
    bias = module._parameters.get("bias") if layer is None else layer.base_bias
    return [
        (encode(name, leaf, adapter.prefix), t) for leaf, t in (("weight", weight), ("bias", bias)) if t is not None
    ]
