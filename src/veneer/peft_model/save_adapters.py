"""Saves adapters of a model to a folder, and uploads them to the hub."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.saved_embeddings import SaveEnds, ends_to_save
from veneer.base_model import sharding
from veneer.checkpoints import save_set
from veneer.checkpoints.checkpoint import Draft
from veneer.errors import AdapterError, UnsupportedError
from veneer.files import adapter_folders
from veneer.files.base_digest import BASE_DIGEST_KEY
from veneer.keywords import unknown_keywords
from veneer.peft_model.adapted_model import AdaptedModel
from veneer.peft_model.model_card import fetch_card, write_card
from veneer.peft_model.trainer_state import write_state

# What peft, transformers and accelerate hand to save_pretrained, and saving an adapter has no use for.
_SETTLED = (
    *("path_initial_model_for_weight_conversion", "save_function", "max_shard_size", "save_peft_format"),
    *("push_to_hub", "token"),
)


def check_keywords(given: Mapping[str, Any], known: Iterable[str], safe_serialization: bool) -> None:
    """Refuse keywords of ``save_pretrained`` that are unknown, or ask for what saving adapters cannot do."""
    unknown_names = given.keys() - set(_SETTLED)
    if unknown_names:
        raise unknown_keywords("PeftModel.save_pretrained()", unknown_names, [*known, *_SETTLED])
    if given.get("push_to_hub"):
        raise UnsupportedError(
            "save_pretrained(push_to_hub=True) would save without uploading.", hint="Call push_to_hub(repo_id) too."
        )
    if not safe_serialization:
        raise UnsupportedError(
            "safe_serialization=False would write a pickle; Veneer writes safetensors only.",
            hint="Leave it out: every current tool reads safetensors.",
        )


def save_adapters(
    model: AdaptedModel,
    folder: Path,
    names: Sequence[str] | None,
    state: Mapping[str, Tensor],
    ends: SaveEnds,
    is_main_process: bool,
) -> None:
    """Save the adapters of these names, or all, in the PEFT format; see :meth:`PeftModel.save_pretrained`."""
    adapters = model.adapters
    with adapters.switch.choosing:  # in another thread, none is renamed or deleted meanwhile
        entries = [adapters.get(name) for name in (adapters.by_name if names is None else names)]
        drafts = {entry.name: _draft(model, entry, folder, state, ends) for entry in entries}
        active, modules = adapters.switch.default.names, list(model.modules())
    with sharding.one_writer(modules) as first:
        if first and is_main_process:
            save_set.save(folder, drafts, active)
            write_state(model, folder, state)
            write_card(model, folder)


def tensors_to_save(
    model: AdaptedModel, adapter: Adapter, state: Mapping[str, Tensor], ends: SaveEnds
) -> dict[str, Tensor]:
    """Return checkpoint key -> tensor, in the dtype that it had on disk; from ``state`` where that has it."""
    embeddings = ends_to_save(model.adapters, adapter, ends)
    if adapter.unpadded:
        return {**embeddings, **adapter.unpadded}
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()} if state else {}

    def value(live: Tensor) -> Tensor:
        tensor: Tensor = sharding.whole(state.get(names.get(id(live), ""), live).detach())
        if not tensor.numel() and live.ndim:
            raise AdapterError(
                f"The tensors of adapter {adapter.name!r} are empty in this process; nothing was saved.",
                hint="Under ZeRO-3 or FSDP1 gather them first, and pass state_dict= with the whole tensors.",
            )
        return tensor

    named = adapter.named_tensors(value)
    tensors = {key: tensor.to(adapter.saved_dtypes.get(key, tensor.dtype)) for key, tensor in named}
    return {**{key: value(tensor) for key, tensor in embeddings.items() if key not in tensors}, **tensors}


def upload(
    model: AdaptedModel,
    repo_id: str,
    *,
    private: bool | None,
    token: str | None,
    tags: Sequence[str],
    saving: Mapping[str, Any],
    **options: Any,
) -> Any:
    """Save a model's adapters and upload them; see :meth:`PeftModel.push_to_hub`.

    Args:
        model: the model, whose ``save_pretrained`` is called.
        repo_id: ``owner/name``; made if it is missing.
        private: whether a repository that is made is private.
        token: for the hub.
        tags: more tags for the model card.
        saving: keywords for ``save_pretrained``.
        **options: as ``HfApi.upload_folder`` takes them.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        fetch_card(api, repo_id, options.get("revision"), folder)
        model.save_pretrained(folder, **saving)
        write_card(model, Path(folder), tags)
        return api.upload_folder(repo_id=repo_id, folder_path=folder, **options)


def _draft(model: AdaptedModel, adapter: Adapter, folder: Path, state: Mapping[str, Tensor], ends: SaveEnds) -> Draft:
    digest = adapter.base_digest or model.base_digest
    return Draft(
        adapter_folders.place(folder, adapter.name),
        adapter.config_on_disk(),
        tensors_to_save(model, adapter, state, ends),
        {} if digest is None else {BASE_DIGEST_KEY: digest},
    )
