"""Initialises LoRA by LoftQ on a base that is packed (quantised): ``scale * B A`` is the part that packing lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.collection import Adapters
from veneer.errors import AdapterError, BaseModelError, SourceError, UnsupportedError
from veneer.files.lookup_options import OFFLINE
from veneer.files.resolve import resolve
from veneer.keywords import takes
from veneer.layers.adapter_shares import BoundAdapter, LayerAdapters
from veneer.merging.base.skeleton import stored_names
from veneer.merging.base.weight_files import FLOATS, WeightFiles
from veneer.methods.lora import A, B, Lora
from veneer.patches.low_rank import truncated
from veneer.peft_model.peft_model import PeftModel


@torch.no_grad()
@takes(renamed={"peft_model": "model"})
def replace_lora_weights_loftq(
    model: PeftModel,
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[PeftModel, str], bool] | None = None,
) -> None:
    """Initialise a LoRA on a packed base so that the two are as near to the original weights as its rank allows.

    The weights are read from safetensors files, one layer at a time. The saved adapter is a plain one for the packed
    base.

    Args:
        model: the model, its base packed by bitsandbytes, torchao or HQQ.
        model_path: the original model: a folder, a file, or a cached hub id; the base's own name when ``None``.
        adapter_name: the adapter.
        callback: called with the model and a layer's name when that layer has been replaced; where it gives ``False``
            the layer gets its old values back.

    Raises:
        AdapterError: the adapter has no packed layer, or is merged. BaseModelError: ``model_path`` is not the original.
        UnsupportedError: the adapter is a DoRA.
    """
    adapters = model.adapters
    places = _packed(adapters, adapters.get(adapter_name))
    origin = str(model_path or getattr(model.get_base_model(), "name_or_path", "") or "")
    if not origin:
        raise SourceError("The base does not say where it is from.", hint="Give the original model as model_path.")
    source = resolve(origin, OFFLINE, what="base")
    with WeightFiles.open(source) as files:
        for layer, share, weight in _with_weights(model, places, files, origin):
            _replace(model, adapter_name, layer, share, weight, callback)
    adapters.get(adapter_name).note_zero_layers()


def _packed(adapters: Adapters, entry: Adapter) -> list[tuple[LayerAdapters, BoundAdapter]]:
    shares = [
        (layer, share)
        for layer, share in entry.bound_layers()
        if layer.site.is_packed and isinstance(share.method, Lora)
    ]
    if not shares or any(entry.name in layer.merged for layer, _ in shares):
        what = "is merged" if shares else "has no LoRA on a packed (quantised) layer"
        raise AdapterError(
            f"{entry.name!r} {what}.",
            hint="Call unmerge_adapter()." if shares else 'For a base that is not packed: init_lora_weights="loftq".',
        )
    if any(share.settings.dora for _, share in shares):
        raise UnsupportedError("LoftQ is not defined for DoRA.", hint="Turn use_dora off.")
    return shares


def _with_weights(
    model: PeftModel, places: list[tuple[LayerAdapters, BoundAdapter]], files: WeightFiles, origin: str
) -> Iterator[tuple[LayerAdapters, BoundAdapter, Tensor]]:
    shapes = {name: place.info.shape for name, place in files.places.items()}
    names = stored_names(model.get_base_model(), shapes, shapes).direct
    weights = {layer.site.name: f"{layer.site.name}.weight" for layer, _ in places}
    stored_names_of = {name: names.get(weight, weight) for name, weight in weights.items()}
    for layer, _ in places:
        stored = stored_names_of[layer.site.name]
        if (
            stored not in files
            or files.shape(stored) != layer.site.shape
            or files.places[stored].info.dtype not in FLOATS
        ):
            raise BaseModelError(
                f"{origin} has no {stored} of shape {layer.site.shape} in floating point.",
                hint="Give the model that the base was quantised from as model_path.",
            )
    for layer, share in places:
        yield layer, share, files.read(stored_names_of[layer.site.name]).float()


def _replace(
    model: PeftModel,
    adapter: str,
    layer: LayerAdapters,
    share: BoundAdapter,
    weight: Tensor,
    callback: Callable[[PeftModel, str], bool] | None,
) -> None:
    tensors = layer.tensors(adapter, share)
    packed = layer.base_weight().float()
    up, down = truncated(weight.to(packed.device) - packed, share.settings.r, float(share.settings.scale))
    before = {leaf: tensors[leaf].clone() for leaf in (A, B)}
    tensors[A].copy_(down)
    tensors[B].copy_(up)
    layer.reset(adapter, share, share.settings)
    if callback is not None and not callback(model, layer.site.name):
        for leaf, tensor in before.items():
            tensors[leaf].copy_(tensor)
        layer.reset(adapter, share, share.settings)
