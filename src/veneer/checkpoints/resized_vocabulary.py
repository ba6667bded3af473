"""A vocabulary that was resized before training: found from the headers, before anything large is loaded."""

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
_ENDS = {
    **dict.fromkeys(("embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings"), INPUT),
    **dict.fromkeys(("lm_head", "embed_out"), OUTPUT),
}
# leaf -> the dimension of its tensor that counts tokens; the first three hold every token's vector
_SAVING = (TargetedConfig, PromptConfig)
_WHOLE = ("token_adapter.base_layer.weight", "base_layer.weight", "weight")
_LEAVES = {**dict.fromkeys(_WHOLE, 0), "lora_embedding_A": 1, "lora_B.weight": 0}


def required_vocabulary(
    checkpoints: Sequence[Checkpoint], base: Source, config: Mapping[str, Any], task: str | None
) -> int | None:
    """The vocabulary that the base must be given for these adapters; ``None`` when its own is right.

    Args:
        checkpoints: the adapters.
        base: the base's files.
        config: its config.
        task: what it is loaded for.

    Raises:
        BaseModelError: it would have to be resized, and the adapters do not bring what the new rows hold.
        CorruptFileError: a part of the config is no object.
    """
    own = vocabulary_of(config, base.origin)
    if own is None:
        return None
    needed, tied = _needed(base, task)
    found = [_wanted(checkpoint, own, tied) for checkpoint in checkpoints]
    sizes = {size for size, _ in found if size is not None}
    if not sizes - {own}:
        return None
    brought = set.intersection(*(rows for size, rows in found if size is not None))
    missing = [end for end in needed if end not in brought]
    if len(sizes) > 1 or missing:
        size = max(sizes)
        what = f"no rows for the {' and the '.join(missing)}" if missing else f"vocabularies of {sorted(sizes)}"
        raise BaseModelError(
            f"The adapter was trained on a vocabulary of {size} tokens, the base {base.origin} has {own}, and the "
            f"adapter brings {what}.",
            hint=f"Resize the base as before training (resize_token_embeddings({size})) and pass it as base=...; "
            "an adapter saved with save_embedding_layers=True, or with its embeddings in modules_to_save, needs none.",
        )
    return sizes.pop()


def vocabulary_of(config: Mapping[str, Any], origin: str) -> int | None:
    """The number of tokens that a model's config, from ``origin``, names."""
    own = config.get("vocab_size") or part_of(config, "text_config", origin).get("vocab_size")
    return own if isinstance(own, int) else None


def _wanted(checkpoint: Checkpoint, own: int, tied: bool) -> tuple[int | None, set[str]]:
    """The vocabulary that an adapter's tensors have, and the ends for which it brings every new token's vector.

    Where the base has one weight for both ends, its rows are those of both; a copy that the adapter trained is not.
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
    if any(token >= own for token in tokens):
        sizes.add(max(tokens) + 1)
        brought |= ({INPUT, OUTPUT} if tied else {INPUT}) if tokens.issuperset(range(own, max(tokens) + 1)) else set()
    return (max(sizes) if sizes else None), brought


def _tokens(checkpoint: Checkpoint) -> set[int]:
    config: Any = checkpoint.config
    wanted = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or ()
    lists: Iterable[Iterable[int]] = wanted.values() if isinstance(wanted, Mapping) else [wanted]
    return {token for tokens in lists for token in tokens}


def _needed(base: Source, task: str | None) -> tuple[list[str], bool]:
    """The ends of the model that is loaded, and whether they share their vectors."""
    if task not in (None, TaskType.CAUSAL_LM.value, TaskType.SEQ_2_SEQ_LM.value):
        return [INPUT], False
    names = [name for header in read_headers(base, MODEL_STEM) for name in header.tensors]
    untied = any(name.endswith(".weight") and _ENDS.get(name.split(".")[-2]) == OUTPUT for name in names if "." in name)
    return [INPUT, OUTPUT], not untied
