"""Finds by the headers whether a vocabulary was resized before training, so that the base is resized too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from veneer.base_model.targets import names_match
from veneer.checkpoints.checkpoint import Checkpoint
from veneer.configs.base import PromptConfig, TargetedConfig
from veneer.configs.names import TaskType
from veneer.errors import BaseModelError
from veneer.files.base_config import part_of
from veneer.files.names import MODEL_STEM
from veneer.files.source import Source
from veneer.files.tensor_keys import PREFIX, SHARED_PREFIX
from veneer.files.weight_files import read_headers
from veneer.methods import method_of
from veneer.methods.base.abilities import shared_names

INPUT, OUTPUT = "input embedding", "output layer"
# Last word of a module's name -> the end of the model that it is.
_ENDS = {
    **dict.fromkeys(("embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings"), INPUT),
    **dict.fromkeys(("lm_head", "embed_out"), OUTPUT),
}
# Configs with ``modules_to_save``.
_SAVING = (TargetedConfig, PromptConfig)
# Leaves that hold every token's vector.
_WHOLE = ("token_adapter.base_layer.weight", "base_layer.weight", "weight")
# Leaf -> the dimension of its tensor that counts tokens.
_LEAVES = {**dict.fromkeys(_WHOLE, 0), "lora_embedding_A": 1, "lora_B.weight": 0}


def required_vocabulary(
    checkpoints: Sequence[Checkpoint], base: Source, config: Mapping[str, Any], task: str | None
) -> int | None:
    """Return the vocabulary size that the base must be given for these adapters; ``None`` when its own is right.

    Args:
        checkpoints: the adapters.
        base: the base's files.
        config: its config.
        task: the task that it is loaded for.

    Raises:
        BaseModelError: it would have to be resized, and the adapters do not bring the new rows.
        CorruptFileError: a part of the config is no object.
    """
    size_of_base = vocabulary_of(config, base.origin)
    if size_of_base is None:
        return None
    needed, tied = _needed(base, task)
    trained = [_trained_vocabulary(checkpoint, size_of_base, tied) for checkpoint in checkpoints]
    sizes = {size for size, _ in trained if size is not None}
    if not sizes - {size_of_base}:
        return None
    brought = set.intersection(*(rows for size, rows in trained if size is not None))
    missing = [end for end in needed if end not in brought]
    if len(sizes) > 1 or missing:
        size = max(sizes)
        what = f"no rows for the {' and the '.join(missing)}" if missing else f"vocabularies of {sorted(sizes)}"
        raise BaseModelError(
            f"The adapter was trained on a vocabulary of {size} tokens, the base {base.origin} has {size_of_base}, and "
            f"the adapter brings {what}.",
            hint=f"Resize the base as before training (resize_token_embeddings({size})) and pass it as base=...; "
            "an adapter saved with save_embedding_layers=True, or with its embeddings in modules_to_save, needs none.",
        )
    return sizes.pop()


def vocabulary_of(config: Mapping[str, Any], origin: str) -> int | None:
    """Return the number of tokens that a model's config, from ``origin``, names."""
    size = config.get("vocab_size") or part_of(config, "text_config", origin).get("vocab_size")
    return size if isinstance(size, int) else None


def _trained_vocabulary(checkpoint: Checkpoint, size_of_base: int, tied: bool) -> tuple[int | None, set[str]]:
    """Return the vocabulary size of an adapter's tensors, and the ends for which it brings every new token's vector.

    Where the base has one weight for both ends, its rows serve both; those of a copy that the adapter trained do not.
    """
    sizes: set[int] = set()
    brought: set[str] = set()
    config = checkpoint.config
    shared = shared_names(method_of(config))
    for key, info in checkpoint.tensors.items():
        if key.removeprefix(SHARED_PREFIX).partition(".")[0] in shared:
            continue  # of no module of the base: a small decoder of the adapter's has a vocabulary of its own
        name = key.removeprefix(PREFIX)
        for leaf, dimension in _LEAVES.items():
            module = name.removesuffix("." + leaf)
            end = _ENDS.get(module.rpartition(".")[2]) if module != name else None
            if end is not None and len(info.shape) == 2 and not (leaf == "lora_B.weight" and end == INPUT):
                sizes.add(info.shape[dimension])
                is_copy = names_match(module, config.modules_to_save if isinstance(config, _SAVING) else None)
                rows = {end} if is_copy or not tied else {INPUT, OUTPUT}
                brought |= rows if leaf in _WHOLE else set()
    tokens = _tokens(checkpoint)
    if any(token >= size_of_base for token in tokens):
        size = max(tokens) + 1
        sizes.add(size)
        if tokens.issuperset(range(size_of_base, size)):
            brought |= {INPUT, OUTPUT} if tied else {INPUT}
    return (max(sizes) if sizes else None), brought


def _tokens(checkpoint: Checkpoint) -> set[int]:
    config: Any = checkpoint.config
    indices = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or ()
    lists: Iterable[Iterable[int]] = indices.values() if isinstance(indices, Mapping) else [indices]
    return {token for tokens in lists for token in tokens}


def _needed(base: Source, task: str | None) -> tuple[list[str], bool]:
    """Return the ends of the model that is loaded, and whether they share their vectors."""
    if task not in (None, TaskType.CAUSAL_LM.value, TaskType.SEQ_2_SEQ_LM.value):
        return [INPUT], False
    names = [name for header in read_headers(base, MODEL_STEM) for name in header.tensors]
    untied = any(name.endswith(".weight") and _ENDS.get(name.split(".")[-2]) == OUTPUT for name in names if "." in name)
    return [INPUT, OUTPUT], not untied
