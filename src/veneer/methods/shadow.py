"""SHADOW: a small decoder runs beside the base, and its states move the inputs of the base's blocks (ShadowPEFT).

    h <- h + alpha * W_up W_down (h - s)        before a block, h its input
    s <- (1 - g) s + g T(h)                     after it, h its output        g = sigmoid(G(h))

    W_down: (r, hidden)    W_up: (hidden, r), zero at the start, so that nothing changes
    T, G: two linear layers with a GELU between, ``update_hidden_size`` wide

``s`` begins as the last states of the small decoder, ``shadow_backbone``, projected to the base's width where it has
another. Training adds the loss of its own prediction: of the base's output layer on those states, or, for sequence
classification, of a second classifier, ``shadow_head``, on the last of them. It reads the base's embeddings if it is as
wide and no model of its own (``shadow_model``); its keys and values lie behind the base's in the cache, so generation
works with it. Beside a diffusion transformer it is another small network, which makes ``s`` of the first block's input
and predicts nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.base_model.blocks import find_decoder_blocks
from veneer.base_model.sites.block import BlockSite
from veneer.base_model.sites.site import Site
from veneer.configs.methods.shadow import MIRROR, ShadowConfig
from veneer.configs.names import HEADS, TaskType
from veneer.errors import AdapterError, TargetError, UnsupportedError
from veneer.methods.base.abilities import ChoosesLayers, CompletesConfig, HoldsModules
from veneer.methods.base.method import BaseLayer, Leaf, MethodOnSites, NewLayer
from veneer.methods.base.routed_method import RoutedMethod
from veneer.methods.shared.shadow_decoder_files import embedding_leaves, shadow_source
from veneer.methods.shared.shadow_denoiser import (
    SharedModule,
    denoiser_start,
    embeds,
    is_denoiser,
    is_flux2_on_disk,
    small_denoiser,
)
from veneer.patches.forward_call import current
from veneer.patches.patch import Patch

if TYPE_CHECKING:
    from veneer.base_model.catalog import Catalog


BACKBONE = "shadow_backbone"
PROJECTION = "shadow_projection"
HEAD = "shadow_head"
# The adapter's name in peft's keys, whatever the adapter is called.
_NAMED = ".default."
DOWN, UP = (f"shadow_{end}{_NAMED}weight" for end in ("down", "up"))
TRANSFORM, GATE = (f"shadow_update_{kind}{_NAMED}" for kind in ("transform", "gate"))
_WIDENING = f"{PROJECTION}{_NAMED}weight"
_UPDATES = tuple(f"{net}{place}.{leaf}" for net in (TRANSFORM, GATE) for place in (0, 2) for leaf in ("weight", "bias"))

# The names of each size in the configs of transformers.
_SIZES: Mapping[str, tuple[str, ...]] = {
    "shadow_num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "shadow_hidden_size": ("hidden_size", "n_embd", "d_model"),
    "shadow_intermediate_size": ("intermediate_size", "ffn_dim", "n_inner"),
    "shadow_num_attention_heads": ("num_attention_heads", "n_head", "num_heads"),
}


@dataclass(frozen=True)
class ShadowRoute:
    """Adds to one block's input, from ``h - s``, ``(rows, length, hidden)``."""

    config: ShadowConfig
    tensors: Mapping[str, Tensor]

    def changes(self) -> bool:
        return self.config.shadow_alpha != 0 and bool(self.tensors[UP].count_nonzero())

    def take(self, rows: Tensor, whole: torch.Size) -> ShadowRoute:
        return self

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        x = F.dropout(x.float(), self.config.shadow_dropout, training)
        down, up = (self.tensors[leaf].float() for leaf in (DOWN, UP))
        return self.config.shadow_alpha * F.linear(F.linear(x, down), up)

    def moved_on(self, state: Tensor, h: Tensor) -> Tensor:
        """Return the state after the block, whose output is ``h``."""
        h = h.float()
        gate = self._network(GATE, h).sigmoid()
        return (1 - gate) * state.float() + gate * self._network(TRANSFORM, h)

    def _network(self, name: str, h: Tensor) -> Tensor:
        tensors = {leaf.removeprefix(name): t.float() for leaf, t in self.tensors.items() if leaf.startswith(name)}
        hidden = F.gelu(F.linear(h, tensors["0.weight"], tensors["0.bias"]))
        return F.linear(hidden, tensors["2.weight"], tensors["2.bias"])


class Shadow(RoutedMethod[ShadowConfig, ShadowConfig], HoldsModules, ChoosesLayers, CompletesConfig):
    """Adapts the blocks of a decoder."""

    leaves = tuple(Leaf(name, memory_name=name.replace(_NAMED, ".")) for name in (DOWN, UP, *_UPDATES))
    kinds = (BlockSite,)
    shared = (Leaf(BACKBONE), Leaf(PROJECTION), Leaf(HEAD))

    def trains_shared(self, config: ShadowConfig, name: str) -> bool:
        if config.shadow_model == MIRROR:
            return True
        # As in peft: embeddings may be most of a model of its own.
        leaf = name.removeprefix(f"{BACKBONE}{_NAMED}")
        if is_flux2_on_disk(config.shadow_model):
            return not embeds(leaf)
        return leaf not in embedding_leaves(config.shadow_model)

    def complete(self, config: ShadowConfig, catalog: Catalog) -> None:
        blocks = list(_blocks(catalog))
        if config.target_modules is None:
            layers = config.layers_to_transform
            places = [layers] if isinstance(layers, int) else layers
            # Of several lists the one whose blocks give one tensor, the joined text's and picture's.
            blocks = [name for name in blocks if name.startswith("single_")] or blocks
            config.target_modules = [n for i, n in enumerate(blocks) if places is None or i in places]

    def parts(self, config: ShadowConfig, catalog: Catalog) -> list[MethodOnSites]:
        self.complete(config, catalog)
        blocks, targets = _blocks(catalog), catalog.targets(config)
        if any(name not in blocks for name in targets):
            raise TargetError(
                f"target_modules={config.target_modules!r} means {next(n for n in targets if n not in blocks)}, which "
                "is no block of the decoder.",
                hint=f"SHADOW adapts whole blocks, such as {next(iter(blocks))}; leave it out to adapt all.",
            )
        return [MethodOnSites(self, [blocks[name] for name in targets])]

    def settings(self, config: ShadowConfig, site: Site) -> ShadowConfig:
        return config

    def shapes(self, settings: ShadowConfig, site: Site) -> dict[str, tuple[int, ...]]:
        width, _ = site.shape
        inner = settings.update_hidden_size or settings.r
        shapes: dict[str, tuple[int, ...]] = {DOWN: (settings.r, width), UP: (width, settings.r)}
        for net in (TRANSFORM, GATE):
            shapes |= {f"{net}0.weight": (inner, width), f"{net}0.bias": (inner,)}
            shapes |= {f"{net}2.weight": (width, inner), f"{net}2.bias": (width,)}
        return shapes

    def shared_shapes(self, config: ShadowConfig, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
        if not sites:
            return {}
        site = cast(BlockSite, sites[0])
        with torch.device("meta"):
            decoder = small_decoder(config, site.decoder)
        tensors = {**stored(decoder.state_dict(), config, site.decoder), **_head_start(config, site)}
        shapes = {leaf: tuple(tensor.shape) for leaf, tensor in tensors.items()}
        decoder_width, width = _width_of(decoder), site.shape[0]
        if decoder_width != width or _brings_projection(config, site.decoder):
            shapes[_WIDENING] = (width, decoder_width)
        return shapes

    def make_shared(
        self, config: ShadowConfig, bases: Sequence[BaseLayer], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        site = cast(BlockSite, bases[0].site)
        seed = int(torch.randint(2**31, (), generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            values, projection = _start(config, site.decoder)
        tensors = {**stored(values, config, site.decoder), **_head_start(config, site)}
        shape = self.shared_shapes(config, [site]).get(_WIDENING)
        if shape is not None:
            tensors[_WIDENING] = _uniform(shape, shape[1], generator) if projection is None else projection
            _check_widening(tensors[_WIDENING], shape, config)
        # Copies, since the classifier stays the base's.
        return {leaf: tensor.detach().float().clone() for leaf, tensor in tensors.items()}

    def modules(
        self, config: ShadowConfig, sites: Sequence[Site], tensors: Mapping[str, nn.Parameter]
    ) -> dict[str, nn.Module | None]:
        site = cast(BlockSite, sites[0])
        backbone = _backbone(config, site.decoder, own_tensors(tensors, BACKBONE))
        values = own_tensors(tensors, HEAD)
        head = _filled(copy.deepcopy(site.head), values) if values and site.head is not None else None
        projection = _projection(tensors.get(_WIDENING))
        return {BACKBONE: backbone.train(site.decoder.training), PROJECTION: projection, HEAD: head}

    def init(self, new: NewLayer[ShadowConfig, ShadowConfig]) -> dict[str, Tensor]:
        shapes = self.shapes(new.settings, new.site)
        tensors = {
            leaf: _uniform(shape, shapes[leaf.replace("bias", "weight")][1], new.generator)
            for leaf, shape in shapes.items()
        }
        return {**tensors, UP: torch.zeros(shapes[UP])} if new.config.init_weights else tensors

    def lower(self, settings: ShadowConfig, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        return Patch(route=ShadowRoute(settings, {leaf: tensors[leaf] for leaf in self.by_name}))


METHOD = Shadow()


def small_decoder(config: ShadowConfig, stack: nn.Module) -> nn.Module:
    """Return the small decoder, of the class of the base's or of a model of its own, with new values.

    Raises:
        SourceError: there is no such model.
        UnsupportedError: it is no decoder, or the base's config has no such size.
    """
    if is_denoiser(stack):
        return small_denoiser(config, stack)
    if config.shadow_model != MIRROR:
        return shadow_source(config.shadow_model).decoder()
    sizes: Any = copy.deepcopy(stack.config)
    chosen = {key: getattr(config, key) for key in _SIZES} | {
        "shadow_num_hidden_layers": config.shadow_num_hidden_layers or 1
    }
    for key, value in chosen.items():
        if value is None:
            continue
        name = next((name for name in _SIZES[key] if hasattr(sizes, name)), None)
        if name is None:
            raise UnsupportedError(
                f"{key}={value}: the config of {type(stack).__name__} has no such size.", hint="Leave it out."
            )
        setattr(sizes, name, value)
    _fit_lists(sizes, chosen["shadow_num_hidden_layers"])
    decoder: nn.Module = type(stack)(sizes)
    return decoder


def _fit_lists(sizes: Any, count: int) -> None:
    """Cut or lengthen what a config says of each block to the number of blocks."""
    kinds = list(getattr(sizes, "layer_types", None) or ())
    if kinds:
        sizes.layer_types = (kinds + kinds[-1:] * count)[:count]
    if isinstance(getattr(sizes, "max_window_layers", None), int):
        sizes.max_window_layers = min(sizes.max_window_layers, count)


def shares(config: ShadowConfig, stack: nn.Module) -> bool:
    """Tell whether the small decoder reads the base's embeddings."""
    if is_denoiser(stack):
        return False
    as_wide = config.shadow_hidden_size in (None, stack.config.hidden_size)  # type: ignore[union-attr]
    return config.share_embeddings and config.shadow_model == MIRROR and as_wide


def stored(tensors: Mapping[str, Tensor], config: ShadowConfig, stack: nn.Module) -> dict[str, Tensor]:
    """Return the small decoder's tensors, given by their names in it, by the names of their shared leaves."""
    # Where it reads the base's embeddings, peft leaves out its own of this name, and saves unused ones of any other.
    unused = "embed_tokens." if shares(config, stack) else None
    return {
        f"{BACKBONE}{_NAMED}{leaf}": tensor
        for leaf, tensor in tensors.items()
        if unused is None or not leaf.startswith(unused)
    }


def own_tensors(tensors: Mapping[str, nn.Parameter], part: str) -> dict[str, nn.Parameter]:
    """Return the tensors of :data:`BACKBONE` or :data:`HEAD` among the shared ones, by their names in that module."""
    start = f"{part}{_NAMED}"
    return {leaf.removeprefix(start): tensor for leaf, tensor in tensors.items() if leaf.startswith(start)}


def _backbone(config: ShadowConfig, stack: nn.Module, tensors: Mapping[str, nn.Parameter]) -> nn.Module:
    """Return the small decoder with these tensors, on their device."""
    with torch.random.fork_rng(devices=[]):
        decoder = small_decoder(config, stack)
    if shares(config, stack) and "embed_tokens" in decoder._modules:
        decoder._modules["embed_tokens"] = SharedModule(stack.get_input_embeddings())  # type: ignore[operator]
    return _filled(decoder.to(next(iter(tensors.values())).device), tensors)


def _projection(weight: nn.Parameter | None) -> nn.Module:
    """Return the module that takes the small decoder's states to the base's width."""
    if weight is None:
        return nn.Identity()
    width, inner = weight.shape
    return _filled(nn.Linear(inner, width, bias=False, device="meta"), {"weight": weight})


def _filled(module: nn.Module, tensors: Mapping[str, nn.Parameter]) -> nn.Module:
    """Let a module use these parameters; where it has a buffer of that name, their values."""
    for name, parameter in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if leaf in owner._parameters:
            owner._parameters[leaf] = parameter
        else:
            owner._buffers[leaf] = parameter.detach()
    return module


def classifier(catalog: Catalog) -> nn.Module | None:
    """Return the base's own classifier, if it has one."""
    return next((catalog.modules[name] for name in HEADS[TaskType.SEQ_CLS] if name in catalog.modules), None)


def _head_start(config: ShadowConfig, site: BlockSite) -> dict[str, Tensor]:
    """Return the second classifier as it starts: the base's own, for sequence classification; else nothing."""
    if site.head is None or config.task_type != TaskType.SEQ_CLS:
        return {}
    return {f"{HEAD}{_NAMED}{leaf}": tensor for leaf, tensor in site.head.state_dict().items()}


def _start(config: ShadowConfig, stack: nn.Module) -> tuple[Mapping[str, Tensor], Tensor | None]:
    """Return the small decoder's tensors as it starts, and its projection where one comes with it."""
    if is_denoiser(stack):
        return denoiser_start(config, stack)
    if config.shadow_model != MIRROR:
        return shadow_source(config.shadow_model).values()
    return small_decoder(config, stack).state_dict(), None


def _check_widening(weight: Tensor, shape: tuple[int, ...], config: ShadowConfig) -> None:
    if tuple(weight.shape) != shape:
        raise UnsupportedError(
            f"The projection of shadow_model={config.shadow_model!r} is {tuple(weight.shape)}, and this base wants "
            f"{shape}.",
            hint="It was made for a base of another width; take one that fits.",
        )


def _blocks(catalog: Catalog) -> dict[str, BlockSite]:
    """Return the decoder's blocks by their names."""
    decoder = find_decoder_blocks(catalog.model)
    if decoder is None and is_denoiser(catalog.model):
        return _denoiser_blocks(catalog)
    if decoder is None:
        raise UnsupportedError(
            f"SHADOW runs beside a decoder of transformers, and {catalog.describe()} has no list of blocks that it "
            "knows.",
            hint="Use it on a causal language model, or on a diffusion transformer of diffusers.",
        )
    head = classifier(catalog)
    names = [f"{decoder.name}.{index}" for index in range(len(decoder.blocks))]
    # The base's own modules, as in the catalog: those in the list may be adapted layers.
    return {name: BlockSite(name, catalog.modules[name], decoder.stack, head) for name in names}


def _denoiser_blocks(catalog: Catalog) -> dict[str, BlockSite]:
    """Return the blocks of a diffusion transformer by their names: the entries of its lists of modules."""
    model = catalog.model
    lists = [name for name, module in model.named_children() if isinstance(module, nn.ModuleList)]
    names = [f"{name}.{place}" for name in lists for place in range(len(getattr(model, name)))]
    return {name: BlockSite(name, catalog.modules[name], model) for name in names}


def _width_of(decoder: nn.Module) -> int:
    width: Any = decoder.width if hasattr(decoder, "width") else decoder.config.hidden_size  # type: ignore[union-attr]
    return int(width)


def _brings_projection(config: ShadowConfig, stack: nn.Module) -> bool:
    """Tell whether a small decoder of its own comes with a projection."""
    return config.shadow_model != MIRROR and not is_denoiser(stack) and shadow_source(config.shadow_model).projected


def _uniform(shape: tuple[int, ...], inner: int, generator: torch.Generator | None) -> Tensor:
    bound = 1 / math.sqrt(inner)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def current_states() -> dict[str, Tensor]:
    """Return the states of the call that is under way, by their adapters' names; blocks put new ones in their place."""
    states = current().shadow_states
    if states is None:
        raise AdapterError(
            "A SHADOW adapter is active, and its small decoder was not run for this call.",
            hint="Call the model, or its decoder, as a whole.",
        )
    return states
