"""Names the modules of a base as the trainers of image models do: kohya's scripts, LyCORIS and ComfyUI.

They train models as their authors published them, and diffusers has renamed the modules of some: of SDXL, Flux and SD3.
A published layer can be several of diffusers': the queries, keys and values of an attention are the rows of one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count

from veneer.formats.format import Base


@dataclass(frozen=True)
class NetworkModule:
    """A module as a network of kohya's has it.

    Attributes:
        name: the module in the published model: ``double_blocks.0.img_attn.qkv``.
        paths: the modules of the base that are its rows, from the first row on.
        is_swapped: True where its two halves of rows are the base's in the other order: shift and scale.
    """

    name: str
    paths: tuple[str, ...]
    is_swapped: bool = False


Table = Mapping[str, tuple[str, ...]]

_FLUX_DOUBLE: Table = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_FLUX_SINGLE: Table = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
_FLUX_REST: Table = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_SD3_BLOCK: Table = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
_SD3_REST: Table = {
    "x_embedder.proj": ("pos_embed.proj",),
    "context_embedder": ("context_embedder",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
# Modules by which a model is known -> the published names of its blocks, diffusers' names of them, and what is in them.
_TRANSFORMERS: Mapping[tuple[str, ...], tuple[tuple[str, str, Table], ...]] = {
    (
        "single_transformer_blocks.0.proj_mlp",
        "transformer_blocks.0.attn.add_q_proj",
        "time_text_embed.text_embedder.linear_1",
    ): (
        ("double_blocks.", "transformer_blocks.", _FLUX_DOUBLE),
        ("single_blocks.", "single_transformer_blocks.", _FLUX_SINGLE),
        ("", "", _FLUX_REST),
    ),
    ("pos_embed.proj", "transformer_blocks.0.attn.add_q_proj", "time_text_embed.text_embedder.linear_1"): (
        ("joint_blocks.", "transformer_blocks.", _SD3_BLOCK),
        ("", "", _SD3_REST),
    ),
}
_SDXL = "add_embedding.linear_1"
_UNET_REST: Mapping[str, str] = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET: Mapping[str, str] = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_PART = re.compile(
    r"((?:down_blocks|up_blocks)\.\d+|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.\d+"
)


def layers(base: Base) -> list[str]:
    """Return the paths of a model's modules that have a matrix or a kernel."""
    ending = ".weight"
    return [
        name.removesuffix(ending) for name, shape in base.shapes.items() if name.endswith(ending) and len(shape) > 1
    ]


def is_of_pipelines(base: Base) -> bool:
    """Tell whether a model of transformers is a text encoder that kohya's scripts know: a CLIP or a T5."""
    return str(base.config.get("model_type")).startswith(("clip", "t5"))


def own_modules(base: Base) -> list[NetworkModule]:
    """Return the modules of a model under the names that diffusers and transformers give them."""
    return [NetworkModule(path, (path,)) for path in layers(base)]


def text_modules(base: Base) -> list[NetworkModule]:
    """Return the modules of a text encoder as files name them."""
    return [NetworkModule(in_files(path), (path,)) for path in layers(base)]


def in_files(path: str) -> str:
    """Return the name that files have for a module of a text encoder.

    Those of CLIP lost a prefix in memory, with transformers 5.6, and no file did.
    """
    return f"text_model.{path}" if path.startswith("encoder.layers.") else path


def published_modules(base: Base) -> list[NetworkModule]:
    """Return the modules of a model under the names of its authors; none for a model whose names are not known here."""
    paths = layers(base)
    if any(path.startswith("down_blocks.") for path in paths):
        return _unet(paths)
    known = set(paths)
    parts = next((parts for marks, parts in _TRANSFORMERS.items() if known.issuperset(marks)), ())
    modules = [module for part in parts for module in _part(*part, known)]
    return [NetworkModule(m.name, m.paths, _is_swapped(m, base)) for m in modules]


def network_modules(base: Base) -> list[NetworkModule]:
    """Return the modules of a model as kohya's scripts name them; none where that is not known here."""
    if "model_type" in base.config:
        return text_modules(base)
    paths = layers(base)
    if any(path.startswith("down_blocks.") for path in paths) and _SDXL not in paths:
        return own_modules(base)
    return published_modules(base)


def _part(published: str, ours: str, table: Table, known: set[str]) -> Iterable[NetworkModule]:
    indices = count() if ours else iter((None,))
    for index in indices:
        place = "" if index is None else f"{index}."
        named = {f"{published}{place}{name}": [f"{ours}{place}{p}" for p in paths] for name, paths in table.items()}
        modules = [NetworkModule(name, tuple(paths)) for name, paths in named.items() if known.issuperset(paths)]
        if not modules and index is not None:
            return
        yield from modules


def _is_swapped(module: NetworkModule, base: Base) -> bool:
    """Tell whether a modulation has shift and scale alone, which diffusers has in the other order."""
    rows, columns = base.shapes[f"{module.paths[0]}.weight"][:2]
    return module.name.endswith("adaLN_modulation.1") and rows == 2 * columns


def _unet(paths: Iterable[str]) -> list[NetworkModule]:
    listed = list(paths)
    parts = {match[0] for path in listed if (match := _UNET_PART.match(path))}
    places = {**_UNET_REST, **_down(parts), **_up(parts)}
    return [NetworkModule(name, (path,)) for path in listed if (name := _in_unet(path, places)) is not None]


def _in_unet(path: str, places: Mapping[str, str]) -> str | None:
    if path in places:
        return places[path]
    match = _UNET_PART.match(path)
    if match is None or match[0] not in places:
        return None
    inner = path[match.end() + 1 :]
    return f"{places[match[0]]}.{_RESNET.get(inner, inner) if match[2] == 'resnets' else inner}"


def _down(parts: set[str]) -> dict[str, str]:
    places: dict[str, str] = {}
    position = count(1)
    for block in _blocks("down_blocks", parts):
        for number in _numbers(block, parts):
            place = next(position)
            places[f"{block}.resnets.{number}"] = f"input_blocks.{place}.0"
            places[f"{block}.attentions.{number}"] = f"input_blocks.{place}.1"
        if f"{block}.downsamplers.0" in parts:
            places[f"{block}.downsamplers.0.conv"] = f"input_blocks.{next(position)}.0.op"
    return places


def _up(parts: set[str]) -> dict[str, str]:
    places: dict[str, str] = {}
    position = count()
    for block in _blocks("up_blocks", parts):
        place = 0
        for number in _numbers(block, parts):
            place = next(position)
            places[f"{block}.resnets.{number}"] = f"output_blocks.{place}.0"
            places[f"{block}.attentions.{number}"] = f"output_blocks.{place}.1"
        # It is in one block with the last layers before it.
        after = 2 if f"{block}.attentions.0" in parts else 1
        places[f"{block}.upsamplers.0.conv"] = f"output_blocks.{place}.{after}.conv"
    return places


def _blocks(name: str, parts: set[str]) -> list[str]:
    number = sum(f"{name}.{i}.resnets.0" in parts for i in range(len(parts)))
    return [f"{name}.{i}" for i in range(number)]


def _numbers(block: str, parts: set[str]) -> range:
    return range(sum(part.startswith(f"{block}.resnets.") for part in parts))
