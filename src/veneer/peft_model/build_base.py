"""Builds the base model of adapters with transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from veneer.base_model.gguf_config import gguf_config
from veneer.base_model.transformers_errors import ANOTHER_CLASS, transformers_errors_as
from veneer.base_model.transformers_internals import set_name
from veneer.checkpoints.checkpoint import Checkpoint
from veneer.checkpoints.model_class import class_for, dtype_of, labels_of, note_of, wanted_task
from veneer.checkpoints.resized_vocabulary import required_vocabulary
from veneer.errors import BaseModelError, SourceError
from veneer.files.base_config import is_of_diffusers
from veneer.files.base_folder import origin_of, without_adapter
from veneer.files.names import DIFFUSERS_STEM, MODEL_CONFIG, MODEL_STEM
from veneer.files.source import Source
from veneer.files.tensor_keys import PREFIX, SHARED_PREFIX
from veneer.files.torch_dtypes import DTYPES
from veneer.files.weight_files import read_headers
from veneer.packages import require

# The keywords that a model of diffusers is loaded with beside those of BuildOptions.
_OF_DIFFUSERS = ("disable_mmap", "low_cpu_mem_usage", "quantization_config", "variant")


@dataclass(frozen=True)
class BuildOptions:
    """Says how transformers builds a base.

    Attributes:
        task: the task of the model; by default the adapters' task, then that of the base's class.
        dtype: the dtype of its weights; ``"auto"`` keeps that of its files.
        device_map: the devices that it goes to, as in transformers.
        trust_remote_code: run code that comes with it.
        model_kwargs: passed on to transformers.
    """

    task: str | None
    dtype: Any
    device_map: Any
    trust_remote_code: bool
    model_kwargs: Mapping[str, Any]

    @property
    def gguf_file(self) -> str | None:
        """The GGUF file in the base's folder that holds it."""
        return self.model_kwargs.get("gguf_file")


def build_base(source: Source, checkpoints: list[Checkpoint], options: BuildOptions) -> tuple[Any, list[str]]:
    """Build a base for its adapters, and return it with warnings for the user.

    Raises:
        BaseModelError: transformers cannot load it, or it does not fit the adapters' vocabulary.
    """
    gguf = options.gguf_file
    config = source.json(MODEL_CONFIG) if gguf is None else gguf_config(source, gguf)
    if is_of_diffusers(config):
        return _by_diffusers(source, config["_class_name"], options), []
    kind = class_for(source, config, checkpoints, options.task, options.trust_remote_code)
    warnings = note_of(kind, config, checkpoints, options.task)
    arguments = _arguments(options, labels_of(checkpoints))
    vocabulary = None
    if gguf is None:
        vocabulary = required_vocabulary(checkpoints, source, config, wanted_task(options.task, checkpoints))
    what = f"transformers cannot load {source.origin} as {kind.__name__}"
    with without_adapter(source) as folder, transformers_errors_as(BaseModelError, what, ANOTHER_CLASS):
        model, info = kind.from_pretrained(folder, output_loading_info=True, **arguments)
    set_name(model, origin_of(source))
    model.eval()
    if vocabulary is not None:
        warnings.append(_resize(model, vocabulary))
    return model, [*warnings, *_random_weights(kind, info["missing_keys"], checkpoints)]


def _by_diffusers(source: Source, kind: str, options: BuildOptions) -> Any:
    """Build a model of diffusers."""
    require("A base of diffusers", "diffusers", extra="clients", error=BaseModelError)
    import diffusers

    arguments = {**options.model_kwargs, "trust_remote_code": options.trust_remote_code, "local_files_only": True}
    if options.device_map is not None:
        arguments["device_map"] = options.device_map
    dtype = dtype_of(options.dtype)
    what = f"diffusers cannot load {source.origin} as {kind}"
    with transformers_errors_as(BaseModelError, what, "Is its folder whole, and diffusers new enough for it?"):
        for name in options.model_kwargs:
            if name not in _OF_DIFFUSERS:
                raise TypeError(f"got an unexpected keyword argument '{name}'")  # of which it takes no notice itself
        model = diffusers.AutoModel.from_pretrained(
            str(source.root), torch_dtype=_stored_dtype(source) if dtype == "auto" else dtype, **arguments
        )
    return model.eval()


def _stored_dtype(source: Source) -> torch.dtype | None:
    """Return the dtype of the first weight of a model of diffusers."""
    names = (info.dtype for header in read_headers(source, DIFFUSERS_STEM) for info in header.tensors.values())
    return next((DTYPES[name] for name in names if name in DTYPES), None)


def copied_dtypes(base: Source) -> frozenset[torch.dtype]:
    """Return the dtypes in which weights in memory are copies of those in a base's files, and not mapped files.

    Writing to a mapped page costs more than new memory, and the page that is given up costs nothing.
    """
    try:
        headers = read_headers(base, MODEL_STEM)
    except SourceError:  # other files than safetensors
        return frozenset()
    stored = {DTYPES.get(info.dtype) for header in headers for info in header.tensors.values()}
    return frozenset({torch.float32, torch.bfloat16, torch.float16} - stored)


def _arguments(options: BuildOptions, labels: int | None) -> dict[str, Any]:
    """Return the keywords for transformers' ``from_pretrained``; ``labels`` is how many an adapter's head has."""
    arguments: dict[str, Any] = {
        "dtype": dtype_of(options.dtype),
        "trust_remote_code": options.trust_remote_code,
        "local_files_only": True,
        **options.model_kwargs,
    }
    if options.device_map is not None:
        require("device_map=", "accelerate", extra="device-map", error=BaseModelError)
        arguments["device_map"] = options.device_map
    if options.gguf_file is not None:
        import transformers

        # Left packed it would need kernels that few machines have, and could not be merged.
        if hasattr(transformers, "GgufConfig"):
            arguments.setdefault("quantization_config", transformers.GgufConfig(dequantize=True))
    if labels is not None and "num_labels" not in arguments:
        arguments["num_labels"] = labels
        arguments.setdefault("ignore_mismatched_sizes", True)
    return arguments


def _resize(model: Any, vocabulary: int) -> str:
    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return f"The base's vocabulary was resized from {before} to {vocabulary} tokens, as the adapter's."


def _random_weights(kind: type, missing: Sequence[str], checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Warn of weights that neither the base's files nor the adapters have."""
    brought = {key.removeprefix(PREFIX).removeprefix(SHARED_PREFIX) for c in checkpoints for key in c.tensors}
    random = sorted(set(missing) - brought)
    if not random:
        return []
    names = ", ".join(random[:3])
    return [f"{len(random)} weights of {kind.__name__} are not in the base and start random: {names}."]
