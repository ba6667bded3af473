"""The small network of SHADOW beside a diffusion transformer: it makes the first states of the first block's input.

    of Flux 2        single-stream blocks of the base's class, which begin as some of its own, cut to their width
    of all others    s = P h, then s <- s + B GELU(A norm(s)) for each of its layers

A Flux 2 of its own on disk (``shadow_model="path"``) takes the place of the cut one; of its tensors those that embed
are not trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from veneer.base_model.transformers_errors import transformers_errors_as
from veneer.configs.methods.shadow import MIRROR, ShadowConfig
from veneer.errors import ConfigError, UnsupportedError
from veneer.files.lookup_options import OFFLINE
from veneer.files.names import MODEL_CONFIG
from veneer.files.resolve import resolve

_FLUX = "Flux2Transformer2DModel"
# What both transformers have to agree in, so that one can read the other's inputs.
_SAME = (
    *("patch_size", "in_channels", "out_channels", "attention_head_dim", "joint_attention_dim"),
    *("timestep_guidance_channels", "axes_dims_rope", "rope_theta", "guidance_embeds"),
)
_EMBEDDERS = ("x_embedder", "context_embedder", "time_guidance_embed")
# The end of a layer's name -> the number of equal parts of which its output consists.
_OUT_PARTS = {
    "single_stream_modulation.linear.weight": 3,
    "double_stream_modulation_img.linear.weight": 6,
    "double_stream_modulation_txt.linear.weight": 6,
    "norm_out.linear.weight": 2,
}


def is_denoiser(model: nn.Module) -> bool:
    """Tell whether a model is a diffusion transformer, by its config; one of transformers is none."""
    config = getattr(model, "config", None)
    sizes = ("attention_head_dim", "num_attention_heads")
    return not hasattr(config, "get_text_config") and all(hasattr(config, size) for size in sizes)


class SharedModule(nn.Module):
    """Stands for a module of the base, which is no part of the small network."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # In a tuple, so that torch does not take it for a submodule.
        self._shared = (module,)

    @property
    def shared_module(self) -> nn.Module:
        """The base's module."""
        return self._shared[0]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_shared":
                raise
            return getattr(self.shared_module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base's module."""
        return self.shared_module(*args, **kwargs)


class TokenBackbone(nn.Module):
    """Makes states of tokens one by one; parameters are named as in peft.

    Args:
        base: the width of the base's states.
        width: its own.
        inner: the width between the linear layers of a block.
        layers: its number of blocks.
    """

    def __init__(self, base: int, width: int, inner: int, layers: int) -> None:
        super().__init__()
        self.width = width
        self.proj_in = nn.Linear(base, width)
        parts = (
            (nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width)) for _ in range(layers)
        )
        self.blocks = nn.ModuleList(nn.Sequential(*part) for part in parts)

    def forward(self, h: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Return states of a block's input, ``(rows, length, width)``; ``call`` is the rest of what it is given."""
        states: Tensor = self.proj_in(h.to(self.proj_in.weight.dtype))
        for block in self.blocks:
            states = states + block(states)
        return states


class Flux2Backbone(nn.Module):
    """Makes states by the single-stream blocks of a Flux 2; parameters are named as in peft."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.width = int(model.config.num_attention_heads * model.config.attention_head_dim)

    def forward(self, h: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Return states of a block's input, ``(rows, length, width)``; ``call`` is the rest of what it is given."""
        dtype = next(self.model.single_transformer_blocks.parameters()).dtype
        states = h[..., : self.width].to(dtype)
        # The shift, scale and gate of the base's width.
        modulation = [part[..., : self.width] for part in call["temb_mod"].chunk(3, dim=-1)]
        given = {**call, "temb_mod": torch.cat(modulation, dim=-1).to(dtype)}
        for block in self.model.single_transformer_blocks:
            states = block(hidden_states=states, **given)
        return states


def small_denoiser(config: ShadowConfig, base: Any) -> TokenBackbone | Flux2Backbone:
    """Return the small network of a config, with new values.

    Raises:
        ConfigError: its sizes do not fit the base. UnsupportedError: the network on disk does not.
    """
    if type(base).__name__ == _FLUX:
        return _flux2(config, base)
    if config.shadow_model != MIRROR:
        raise UnsupportedError(
            f"shadow_model={config.shadow_model!r} cannot run beside a {type(base).__name__}.",
            hint="Leave it out; only a Flux 2 takes a transformer of its own.",
        )
    base_width = width_of(base)
    width = config.shadow_hidden_size or base_width
    return TokenBackbone(
        base_width, width, config.shadow_intermediate_size or width, config.shadow_num_hidden_layers or 1
    )


def denoiser_start(config: ShadowConfig, base: Any) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return the values of a new small network by name, and of its projection if that does not begin at random."""
    backbone = small_denoiser(config, base)
    if not isinstance(backbone, Flux2Backbone):
        return backbone.state_dict(), None
    if config.shadow_model == MIRROR:
        _take_values(backbone.model, base)
    else:
        backbone = Flux2Backbone(_loaded(config.shadow_model, type(base)))
    return backbone.state_dict(), torch.eye(width_of(base), backbone.width)


def width_of(base: Any) -> int:
    """Return the width of a diffusion transformer's states."""
    return int(base.config.num_attention_heads * base.config.attention_head_dim)


def embeds(name: str) -> bool:
    """Tell whether a tensor of a Flux 2's small network, by its name, belongs to a layer that embeds."""
    return name.removeprefix("model.").startswith(_EMBEDDERS)


@lru_cache(maxsize=16)
def is_flux2_on_disk(path: str) -> bool:
    """Tell whether there is a Flux 2 transformer at a path or hub id."""
    return resolve(path, OFFLINE, what="shadow_model").json(MODEL_CONFIG).get("_class_name") == _FLUX


def _flux2(config: ShadowConfig, base: Any) -> Flux2Backbone:
    if config.shadow_model != MIRROR:
        source = resolve(config.shadow_model, OFFLINE, what="shadow_model")
        model = type(base).from_config(type(base).load_config(source.root, local_files_only=True))
        _check_same(model, base, config.shadow_model)
        return Flux2Backbone(model)
    model = type(base).from_config({**dict(base.config), **_flux2_sizes(config, base)})
    if config.share_embeddings and width_of(model) == width_of(base):
        for name in _EMBEDDERS:
            setattr(model, name, SharedModule(getattr(base, name)))
    return Flux2Backbone(model)


def _flux2_sizes(config: ShadowConfig, base: Any) -> dict[str, Any]:
    """Return the sizes of the cut transformer: with each double-stream block it has two single-stream ones."""
    head, most, layers = (
        base.config.attention_head_dim,
        base.config.num_attention_heads,
        config.shadow_num_hidden_layers or 1,
    )
    heads = config.shadow_num_attention_heads or (config.shadow_hidden_size or width_of(base)) // head
    width = heads * head
    if config.shadow_hidden_size not in (None, width):
        raise ConfigError(
            f"shadow_hidden_size={config.shadow_hidden_size} and {heads} heads do not preserve the base attention head "
            f"dimension, {head}.",
            hint=f"Give a multiple of {head}, and as many heads.",
        )
    if not 1 <= heads <= most:
        raise ConfigError(
            f"shadow_num_attention_heads={heads}: the number must be between 1 and {most}.", hint="Give fewer."
        )
    if layers > base.config.num_layers or 2 * layers > base.config.num_single_layers:
        raise ConfigError(
            f"shadow_num_hidden_layers={layers} takes {layers} of {base.config.num_layers} double-stream blocks and "
            f"{2 * layers} of {base.config.num_single_layers} single-stream ones.",
            hint="Give fewer.",
        )
    inner = config.shadow_intermediate_size or int(width_of(base) * base.config.mlp_ratio)
    counts = {"num_layers": layers, "num_single_layers": 2 * layers}
    return {**counts, "num_attention_heads": heads, "mlp_ratio": inner / width}


def _check_same(model: Any, base: Any, path: str) -> None:
    for name in _SAME:
        own, wanted = (_plain(getattr(each.config, name, None)) for each in (model, base))
        if own != wanted:
            raise ConfigError(
                f"shadow_model={path!r} has an incompatible `{name}`: {own}, and the base's is {wanted}.",
                hint="Give a transformer that reads the same inputs.",
            )
    if width_of(model) > width_of(base):
        raise ConfigError(f"shadow_model={path!r} is wider than the base.", hint="Give a narrower one.")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _loaded(path: str, kind: Any) -> Any:
    """Return the Flux 2 at a path or in the hub's cache."""
    hint = "It is a folder that its save_pretrained has written."
    with transformers_errors_as(UnsupportedError, f"diffusers cannot load shadow_model={path!r}", hint):
        source = resolve(path, OFFLINE, what="shadow_model")
        return kind.from_pretrained(
            source.root, local_files_only=True, torch_dtype=torch.float32, low_cpu_mem_usage=False
        )


@torch.no_grad()
def _take_values(model: Any, base: Any) -> None:
    """Give a cut transformer the first rows and columns of the base's; blocks of it, evenly spread, give theirs."""
    sources = {name.replace(".base_layer.", "."): tensor for name, tensor in base.state_dict().items()}
    for name, tensor in model.state_dict().items():
        value = sources[_source_name(name, model, base)]
        for dim, length in enumerate(tensor.shape):
            parts, kept = _parts(name, dim, value.shape[dim], base), _parts(name, dim, length, model)
            pieces = [piece.narrow(dim, 0, size) for piece, size in zip(value.split(parts, dim), kept, strict=True)]
            value = torch.cat(pieces, dim)
        tensor.copy_(value)


def _source_name(name: str, model: Any, base: Any) -> str:
    blocks, _, rest = name.partition(".")
    if blocks not in ("transformer_blocks", "single_transformer_blocks"):
        return name
    place, _, leaf = rest.partition(".")
    count, last = len(getattr(model, blocks)), len(getattr(base, blocks)) - 1
    return f"{blocks}.{last if count == 1 else round(int(place) * last / (count - 1))}.{leaf}"


def _parts(name: str, dim: int, length: int, model: Any) -> list[int]:
    """Return the sizes of the parts, one behind the other, of which a dimension of a tensor consists."""
    width = width_of(model)
    inner = int(width * model.config.mlp_ratio)
    if dim == 0 and name.endswith("attn.to_qkv_mlp_proj.weight"):
        return [width] * 3 + [inner] * 2
    if dim == 1 and name.endswith("attn.to_out.weight"):
        return [width, inner]
    count = next((n for end, n in _OUT_PARTS.items() if name.endswith(end)), 1) if dim == 0 else 1
    return [length // count] * count
