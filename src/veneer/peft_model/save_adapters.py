"""Saves the adapters of a model to a folder, and uploads them to the hub."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.saved_embeddings import SaveEmbeddings, embeddings_to_save
from veneer.base_model import sharding
from veneer.checkpoints import save_set
from veneer.checkpoints.checkpoint import Draft
from veneer.configs.base import PeftConfig
from veneer.configs.methods.lora import LoraConfig
from veneer.errors import AdapterError, UnsupportedError
from veneer.files import adapter_folders
from veneer.files.atomic_write import writing
from veneer.files.base_digest import BASE_DIGEST_KEY
from veneer.files.paths import is_file
from veneer.files.tensor_keys import encode
from veneer.keywords import TOKEN, check_passed_on, keywords, takes, unknown_keywords
from veneer.peft_model.adapted_model import AdaptedModel
from veneer.peft_model.initial_adapter import converted, keeps_start, with_known_start, with_start
from veneer.peft_model.model_card import fetch_card, write_card
from veneer.peft_model.trainer_state import write_state
from veneer.printing import warn

# Keywords that peft, transformers and accelerate hand to save_pretrained, without effect on adapters.
_UNUSED = ("save_function", "max_shard_size", "save_peft_format", "push_to_hub", "token")

_GATHER = "Pass the whole state_dict(), gathered, or none at all and save in every process."


@dataclass(frozen=True)
class Saving:
    """Says how adapters are saved.

    Attributes:
        folder: the folder of the default adapter, in which any other has one of its name.
        state: the tensors to take instead of the model's, as named by ``state_dict()``.
        ends: save the rows of the embedding and of the output layer too.
        as_pickle: write a pickle instead of safetensors.
        initial: the folder of a LoRA as it was before training, which the saved one is to be without.
        convert: whether an adapter is saved without its start: see ``initial_adapter.keeps_start``.
        is_gathered: ``state`` has the tensors of a model that is spread over processes whole. Then none waits for
            another, for the first may be the only one that saves.
    """

    folder: Path
    state: Mapping[str, Tensor] = field(default_factory=dict)
    ends: SaveEmbeddings = "auto"
    as_pickle: bool = False
    initial: str | Path | None = None
    convert: bool | None = None
    is_gathered: bool = False


class SavingMethods(AdaptedModel):
    """Holds the methods of a ``PeftModel`` that save its adapters."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: SaveEmbeddings = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | Path | None = None,
        state_dict: dict[str, Tensor] | None = None,
        *,
        convert_start: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Save adapters in the PEFT format: ``default`` at the root, any other in a folder of its name.

        A model without adapters saves the base model instead, as transformers does. An adapter whose starting point
        takes a part of the base (``init_lora_weights="pissa"`` ...) is saved as a plain one of twice the rank, for the
        untouched base; with ``init_lora_weights`` set to ``True`` in its config before saving, as it is, for a base
        without the start.

        Args:
            save_directory: the folder.
            safe_serialization: write safetensors; if not, a pickle (``adapter_model.bin``), which Veneer itself reads
                only after :func:`veneer.convert_pickle`.
            selected_adapters: the adapters to save; all when ``None``.
            save_embedding_layers: save the rows of the embedding and of the output layer too; ``"auto"`` does so if
                the vocabulary differs from that of the base's files, or an adapter is on one of them.
            is_main_process: write nothing in other processes. Of a model that is spread over processes the first
                writes, and all of them have to call this, to gather the tensors together, unless ``state_dict`` has
                them whole.
            path_initial_model_for_weight_conversion: the folder of a LoRA as it was before training, where that was
                taken off the base. The adapter is then saved for the base as it was, with twice the rank.
            state_dict: take the tensors from here (as named by ``state_dict()``) where it has them.
            convert_start: with ``False`` such an adapter is saved at its own rank, for the untouched base, from which
                loading computes the start again (that of ``"corda"`` from the data, once they are measured on it).
                ``None`` converts it; in peft's place (see ``veneer.as_peft``) not where the base alone gives the start.
            **kwargs: passed on to transformers for a model without adapters. With adapters, keywords that accelerate
                and transformers pass along, and that have no effect: ``save_function``, ``max_shard_size`` ...

        Raises:
            UnknownKeywordError: one of ``kwargs`` is unknown. UnsupportedError: one asks for what is not available.
        """
        if not self.adapters.by_name:
            with writing(Path(save_directory)):
                if is_file(Path(save_directory)):  # which transformers only logs
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
                self.get_base_model().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
            return
        _check_keywords(kwargs)
        chosen = self.adapters.by_name if selected_adapters is None else selected_adapters
        initial, as_pickle = path_initial_model_for_weight_conversion, not safe_serialization
        gathered = state_dict is not None and self.adapters.is_spread
        folder, state = Path(save_directory), state_dict or {}
        saving = Saving(folder, state, save_embedding_layers, as_pickle, initial, convert_start, gathered)
        _save_adapters(self, saving, chosen, is_main_process)

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, save_embedding_layers: SaveEmbeddings = "auto"
    ) -> dict[str, Tensor]:
        """Return checkpoint key -> tensor of one adapter (the active one when ``None``), as saving writes it."""
        with self.adapters.active_selection.choosing:
            name = adapter_name or self.active_adapter
            return _tensors_to_save(self, self.adapters.get(name), {}, save_embedding_layers)

    @takes(renamed=TOKEN, others=True)
    def push_to_hub(
        self,
        repo_id: str,
        save_embedding_layers: SaveEmbeddings = "auto",
        *,
        private: bool | None = None,
        token: str | None = None,
        tags: Sequence[str] = (),
        max_shard_size: str | int | None = None,
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Save the adapters and upload them to a hub repository, which is made if it is missing.

        A model card that the repository has keeps its text.

        Args:
            repo_id: ``owner/name``.
            save_embedding_layers: as for :meth:`save_pretrained`.
            private: make a missing repository private.
            token: for the hub.
            tags: more tags for the model card.
            max_shard_size: accepted for peft's sake; an adapter is one file.
            safe_serialization: as for :meth:`save_pretrained`.
            **kwargs: as ``HfApi.upload_folder`` takes them: ``revision``, ``commit_message``, ``create_pr`` ...

        Raises:
            UnknownKeywordError: it does not take one of ``kwargs``.
        """
        from huggingface_hub import HfApi

        check_passed_on(SavingMethods.push_to_hub, kwargs, HfApi.upload_folder)
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            fetch_card(api, repo_id, kwargs.get("revision"), folder)
            self.save_pretrained(
                folder, safe_serialization=safe_serialization, save_embedding_layers=save_embedding_layers
            )
            write_card(self, Path(folder), tags)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs)

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Write ``README.md`` with the library, the base and tags; one that is there keeps its text."""
        write_card(self, Path(output_dir))


def _check_keywords(given: Mapping[str, Any]) -> None:
    """Refuse keywords of ``save_pretrained`` that are unknown, or ask for what saving adapters cannot do."""
    unknown_names = given.keys() - set(_UNUSED)
    if unknown_names:
        raise unknown_keywords(
            "PeftModel.save_pretrained()", unknown_names, [*keywords(SavingMethods.save_pretrained), *_UNUSED]
        )
    if given.get("push_to_hub"):
        raise UnsupportedError(
            "save_pretrained(push_to_hub=True) would save without uploading.", hint="Call push_to_hub(repo_id) too."
        )


def _save_adapters(
    model: AdaptedModel,
    saving: Saving,
    names: Iterable[str],
    is_main_process: bool,
) -> None:
    """Save adapters in the PEFT format; see :meth:`PeftModel.save_pretrained`."""
    if saving.is_gathered and not (is_main_process and sharding.is_first()):
        return
    if saving.is_gathered and not saving.state:
        raise AdapterError("state_dict has not all tensors: it is empty in this process.", hint=_GATHER)
    adapters = model.adapters
    with adapters.active_selection.choosing:  # in another thread, none is renamed or deleted meanwhile
        drafts = {name: _draft(model, adapters.get(name), saving) for name in names}
        active, modules = adapters.active_selection.default.names, list(model.modules())
    with nullcontext(True) if saving.is_gathered else sharding.one_writer(modules) as first:
        if first and is_main_process:
            save_set.save(saving.folder, drafts, active)
            write_state(model, saving.folder, saving.state)
            write_card(model, saving.folder)


def _tensors_to_save(
    model: AdaptedModel, adapter: Adapter, state: Mapping[str, Tensor], ends: SaveEmbeddings
) -> dict[str, Tensor]:
    """Return checkpoint key -> tensor, in the dtype that it had on disk; from ``state`` where that has it."""
    if ends is True and not hasattr(model.get_base_model(), "get_input_embeddings"):
        warn(
            "Could not identify embedding layer(s) because the model is not a 🤗 transformers model. They are not "
            "saved, as save_embedding_layers=True asks: name them in modules_to_save of a new adapter."
        )
    embeddings = embeddings_to_save(model.adapters, adapter, ends)
    value = value_of(model, adapter, state)
    named = adapter.named_tensors(value)
    tensors = {key: tensor.to(adapter.saved_dtypes.get(key, tensor.dtype)) for key, tensor in named}
    _warn_of_shards(adapter, tensors)
    return {**{key: value(tensor) for key, tensor in embeddings.items() if key not in tensors}, **tensors}


def _warn_of_shards(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Warn of tensors that have not the dimensions that their layers' shapes have, and so cannot be loaded."""
    expected = {
        encode(share.key, leaf): shape
        for layer, share in adapter.bound_layers()
        if share.key is not None
        for leaf, shape in share.method.shapes(share.settings, layer.site).items()
    }
    flat = [key for key, tensor in tensors.items() if key in expected and tensor.ndim != len(expected[key])]
    if flat:
        warn(
            f"{len(flat)} tensors of adapter {adapter.name!r} have the shapes of DeepSpeed ZeRO-3 / FSDP shards, and "
            f"what is saved will not load: {flat[0]} is {tuple(tensors[flat[0]].shape)}, not {expected[flat[0]]}. "
            "Gather them first, and pass state_dict= with the whole tensors."
        )


def value_of(model: AdaptedModel, adapter: Adapter, state: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the function that gives an adapter's tensor whole, from ``state`` where that has it."""
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()} if state else {}

    def value(live: Tensor) -> Tensor:
        given = state.get(names.get(id(live), ""), live)
        if state and given is live and sharding.is_sharded(live):
            raise AdapterError(
                f"state_dict has not all tensors of adapter {adapter.name!r}, and this process has parts of them only.",
                hint=_GATHER,
            )
        tensor: Tensor = sharding.whole(given.detach())
        if not tensor.numel() and live.ndim:
            raise AdapterError(
                f"The tensors of adapter {adapter.name!r} are empty in this process; nothing was saved.",
                hint="Under ZeRO-3 or FSDP1 gather them first, and pass state_dict= with the whole tensors.",
            )
        return tensor

    return value


def _draft(model: AdaptedModel, adapter: Adapter, saving: Saving) -> Draft:
    folder, digest = adapter_folders.place(saving.folder, adapter.name), adapter.base_digest or model.base_digest
    config, tensors, fits_base = _contents(model, adapter, saving)
    metadata = {BASE_DIGEST_KEY: digest} if digest is not None and fits_base else {}
    return Draft(folder, config, tensors, metadata, saving.as_pickle)


def _contents(model: AdaptedModel, adapter: Adapter, saving: Saving) -> tuple[PeftConfig, dict[str, Tensor], bool]:
    """Return the config and tensors that are saved of an adapter, and whether they are for the base that it is on."""
    config, initial = adapter.saved_config or adapter.config, saving.initial
    if not isinstance(config, LoraConfig):
        return adapter.config_on_disk(), _tensors_to_save(model, adapter, saving.state, saving.ends), True
    known = with_known_start(adapter, config)
    as_it_is = config.init_lora_weights is True
    if known is None or (as_it_is and not initial):
        tensors = _tensors_to_save(model, adapter, saving.state, saving.ends)
        if initial and as_it_is:
            return *converted(config, tensors, initial), False
        return adapter.config_on_disk(), tensors, known is None
    if not initial and keeps_start(config, saving.convert):
        return config, _tensors_to_save(model, with_start(adapter, config), saving.state, saving.ends), True
    return known.config_on_disk(), _tensors_to_save(model, known, saving.state, saving.ends), True
