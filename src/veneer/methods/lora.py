"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685, section 4).

    W' = W + scale * B A        A: (r, in), B: (out, r)

``scale`` is ``alpha / r``; rank-stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732) takes ``alpha / sqrt(r)``.
DoRA (Liu et al. 2024, arXiv:2402.09353, equation 5) gives each row of the result a trained length ``m``:

    W' = m / ||W + scale * B A||_row * (W + scale * B A)        m: (out,); the norm is taken as a constant

On a convolution in groups the norm is peft's, of the numbers of ``B A`` in other places.

aLoRA (Greenewald et al. 2025, arXiv:2504.12397) acts from the last ``alora_invocation_tokens`` of the prompt on: the
cache of the text before stays the base's own.

QA-LoRA (Xu et al. 2023, arXiv:2309.14717, section 3.3) gives one column of A to each group of ``g`` inputs; it reads
their mean, ``in / g`` times:

    W' = W + scale * B A P        P: (in / g, in), in / g^2 where an input is in a group, else 0

A start that is subtracted from the weight (``lora_starts/``) is kept beside A and B; the weight stays as it is. Saved,
the adapter is a plain one of twice the rank, for the base as it is on disk:

    W' = W + scale * (B A - B_0 A_0) = W + scale * [B | -B_0] [A ; A_0]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from veneer.base_model.sites.embedding import EmbeddingSite
from veneer.base_model.sites.site import Site, unsupported
from veneer.base_model.targets import pattern_value
from veneer.configs.lora_start_options import is_moved
from veneer.configs.methods.lora import LoraConfig
from veneer.errors import MergeError, UnsupportedError
from veneer.methods.base.abilities import (
    ActsFromTokens,
    ChangesWhenSaved,
    ChoosesLayers,
    Penalised,
    RefusesMerge,
    SettledByCheckpoint,
    SureToChange,
    TiesEmbeddings,
)
from veneer.methods.base.method import BaseLayer, Leaf, Method, MethodOnSites, NewLayer
from veneer.methods.base.replaced_weight import TOKEN_BASE
from veneer.methods.lora_starts import begin, can_be_repeated
from veneer.methods.lora_starts.start import StartLayer
from veneer.methods.lora_variants import LEAVES, variant_of
from veneer.methods.lora_variants.variant import LORA_A, LORA_B, Variant
from veneer.methods.shared.loftq_base import LOFTQ_BASE
from veneer.methods.shared.row_lengths import RowLengths, row_lengths
from veneer.methods.shared.token_rows import TOKENS
from veneer.packages import stands_in_for_peft
from veneer.patches.multipliers import Diagonal
from veneer.patches.patch import GATED, Patch
from veneer.patches.plain_calls import is_eager
from veneer.patches.token_gate import TokenGate
from veneer.printing import warn

if TYPE_CHECKING:
    from veneer.base_model.catalog import Catalog

A = LORA_A
B = LORA_B
B_BIAS = "lora_B.bias"
EMBEDDING_A, EMBEDDING_B = EmbeddingSite.low_rank_names
MAGNITUDE = "lora_magnitude_vector"
# Leaf -> its dimension of size r.
RANK_DIMS = {A: 0, B: 1, EMBEDDING_A: 0, EMBEDDING_B: 1}
# A row that is no longer than this has no direction.
_NO_LENGTH = torch.finfo(torch.float32).tiny
START_A = "lora_start_A.weight"
START_B = "lora_start_B.weight"


@dataclass(frozen=True)
class LoraSettings:
    """Holds a config's values for one layer.

    Attributes:
        scale: multiplies B A; a tensor where compiled code must be able to take another.
        invocation: the tokens from which on an aLoRA acts.
        group: the number of inputs that share a column of A.
        of_embedding: whether an output layer uses the tensors of the embedding whose weight it shares. The change is
            then that of the embedding, transposed.
        padded: whether the tensors in memory have zeros beyond the rank.
        row_lengths: measures the rows of a layer with DoRA.
    """

    r: int
    scale: float | Tensor
    dropout: float
    dora: bool = False
    bias: bool = False
    invocation: tuple[int, ...] = ()
    group: int = 1
    variant: Variant | None = None
    of_embedding: bool = False
    padded: bool = False
    row_lengths: RowLengths = field(default_factory=RowLengths, repr=False, compare=False)


class Lora(
    Method[LoraConfig, LoraSettings],
    ChoosesLayers,
    ChangesWhenSaved,
    SettledByCheckpoint,
    TiesEmbeddings,
    SureToChange,
    ActsFromTokens,
    RefusesMerge,
    Penalised,
):
    """Adapts layers by LoRA, rsLoRA, DoRA, and the variants in :mod:`veneer.methods.lora_variants`."""

    leaves = (
        Leaf(A),
        Leaf(B),
        Leaf(B_BIAS, moves_bias=True),
        Leaf(EMBEDDING_A),
        Leaf(EMBEDDING_B),
        Leaf(MAGNITUDE, memory_name=f"{MAGNITUDE}.weight"),
        Leaf(START_A, trained=False, saved=False),
        Leaf(START_B, trained=False, saved=False),
        *LEAVES,
    )

    def parts(self, config: LoraConfig, catalog: Catalog) -> list[MethodOnSites]:
        layers = catalog.sites(config)
        method = MICA if config.init_lora_weights == "mica" else self
        parameters = catalog.parameter_sites(config.target_parameters or ())
        parts = [MethodOnSites(method, [*layers, *parameters], companions=True)]
        if config.init_lora_weights == "loftq":
            plain = [site for site in layers if site.matrix_input and not site.is_packed]
            parts.insert(0, MethodOnSites(LOFTQ_BASE, plain))
        if config.trainable_token_indices:
            tokens = TOKENS.part(config, catalog, catalog.token_sites(config.trainable_token_indices))
            parts = [MethodOnSites(TOKEN_BASE, tokens.everywhere, optional=True), *parts, tokens]
        return parts

    def settings(self, config: LoraConfig, site: Site) -> LoraSettings:
        r = pattern_value(site.pattern_name, config.rank_pattern, config.r)
        alpha = pattern_value(site.pattern_name, config.alpha_pattern, config.lora_alpha)
        scale = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        self._check(config, site, r)
        dora, bias, invocation = bool(config.use_dora), bool(config.lora_bias), self.invocation(config)
        group = config.qalora_group_size if config.use_qalora else 1
        variant = variant_of(config, site, r)
        return LoraSettings(r, scale, config.lora_dropout, dora, bias, invocation, group, variant)

    def settings_from_shapes(
        self, config: LoraConfig, settings: LoraSettings, site: Site, shapes: Mapping[str, tuple[int, ...]]
    ) -> list[LoraSettings]:
        # peft has QA-LoRA on GPTQ layers only; on others it ignores the option and saves a plain LoRA.
        return [settings, replace(settings, group=1)] if settings.group > 1 else [settings]

    def tied_output_settings(self, embedding: LoraSettings, output: LoraSettings) -> LoraSettings | None:
        alike = (embedding.r, embedding.scale) == (output.r, output.scale)
        return replace(output, of_embedding=True) if alike and not output.dora and output.variant is None else None

    def _check(self, config: LoraConfig, site: Site, r: int) -> None:
        if r % site.groups:
            raise UnsupportedError(
                f"{site.name} has {site.groups} groups, and rank {r} is no multiple of it.",
                hint="Give it such a rank with rank_pattern, or leave it out with exclude_modules.",
            )
        if config.use_dora and isinstance(site.module, nn.MultiheadAttention):
            raise UnsupportedError(
                f"{site.name}: MultiheadAttention does not support DoRA (yet), please set use_dora to False.",
                hint="Or leave the layer out with exclude_modules.",
            )
        if config.use_dora and site.inside_layer:
            raise unsupported(site, "DoRA (use_dora)")
        if config.use_dora and config.init_lora_weights == "loftq" and not site.is_packed:
            raise unsupported(site, 'DoRA (use_dora) with init_lora_weights="loftq"')
        if config.alora_invocation_tokens and not site.matrix_input:
            raise unsupported(site, "alora_invocation_tokens")
        if config.use_qalora and not site.matrix_input:
            raise unsupported(site, "QA-LoRA (use_qalora)")
        if config.use_qalora and site.shape[1] % config.qalora_group_size:
            raise UnsupportedError(
                f"{site.name} has {site.shape[1]} inputs, no multiple of qalora_group_size={config.qalora_group_size}.",
                hint="Choose a size that divides them, or leave the layer out with exclude_modules.",
            )
        if config.lora_bias and (site.looks_up or site.inside_layer):
            raise unsupported(site, "lora_bias=True")

    def invocation(self, config: LoraConfig) -> tuple[int, ...]:
        return tuple(config.alora_invocation_tokens or ())

    def check_mergeable(self, settings: LoraSettings, site: Site) -> None:
        if settings.invocation:
            raise MergeError(GATED, hint="Keep the adapter unmerged.")

    def nonzero_means_change(self, settings: LoraSettings) -> bool:
        return bool(settings.scale)

    def shapes(self, settings: LoraSettings, site: Site) -> dict[str, tuple[int, ...]]:
        (out, inner), r = site.shape, settings.r
        if settings.of_embedding:
            return {EMBEDDING_A: (r, out), EMBEDDING_B: (inner, r)}
        shapes = dict(zip(site.low_rank_names, site.low_rank_shapes(r), strict=True))
        if settings.group > 1:
            shapes[A] = (r, inner // settings.group)
        if settings.dora:
            shapes[MAGNITUDE] = (1, out, *site.point) if site.kernel else (out,)
        if settings.bias:
            shapes[B_BIAS] = (out,)
        return shapes if settings.variant is None else settings.variant.shapes(shapes, site)

    def init(self, new: NewLayer[LoraConfig, LoraSettings]) -> dict[str, Tensor]:
        tensors = {leaf: torch.zeros(shape) for leaf, shape in self.shapes(new.settings, new.site).items()}
        start = new.config.init_lora_weights
        as_made = _values_as_made(tensors, new.site) if new.generator is None and stands_in_for_peft() else {}
        # EVA's start needs data: initialize_lora_eva_weights gives it to an adapter that begins as any other.
        if isinstance(start, str) and start not in ("gaussian", "eva"):
            tensors.update(self._start(new))
        elif start is False and as_made:
            tensors.update(as_made)
        else:
            _draw(tensors, new)
        if new.settings.bias and new.base.base_bias is None:
            kind = type(new.site.module).__name__
            warn(
                f"`lora_bias=True` was passed but the targeted layer of type {kind} has no bias: {new.site.name} gets "
                "one by a merge, which models of its class may not be able to load."
            )
        if new.settings.variant is not None:
            tensors.update(new.settings.variant.init(new.base, new.generator))
        if new.settings.dora:
            # The lengths of the weight's rows with B A: then a new adapter changes nothing.
            tensors[MAGNITUDE].copy_(
                _lengths(new.settings, self._low_rank(new.settings, tensors, new.base), new.base).view_as(
                    tensors[MAGNITUDE]
                )
            )
        return tensors

    def _start(self, new: NewLayer[LoraConfig, LoraSettings]) -> dict[str, Tensor]:
        """Return A and B of a starting point in ``lora_starts/``, and their copies if it is subtracted."""
        how, site = str(new.config.init_lora_weights), new.site
        if how == "loftq" and site.is_packed:
            raise UnsupportedError(
                f'{site.name}: init_lora_weights="loftq" needs the weight as it was before the base was quantised.',
                hint="Begin with True, then call replace_lora_weights_loftq(model).",
            )
        if not site.matrix_input and not (how == "mica" and site.looks_up):
            raise unsupported(site, f"init_lora_weights={how!r}")
        options = getattr(new.config, f"{how}_config", None)
        weight, settings = new.base.base_weight().float(), new.settings
        layer = StartLayer(
            site.name, weight, settings.r, float(settings.scale), how, options, site.module, new.generator
        )
        down, up = (tensor.cpu() for tensor in begin(layer))
        factors = dict(zip(site.low_rank_names, (down, up), strict=True))
        return {**factors, START_A: down.clone(), START_B: up.clone()} if is_moved(how) else factors

    def recomputed(
        self, config: LoraConfig, settings: LoraSettings, base: Callable[[], BaseLayer]
    ) -> dict[str, Tensor]:
        how = config.init_lora_weights
        if settings.variant is not None:
            return settings.variant.recomputed(base)
        if not is_moved(how):
            return {}
        layer = NewLayer(config, settings, base())
        if not can_be_repeated(how, layer.site.module):
            again = " If the data are there, call preprocess_corda(...) on the base first." if how == "corda" else ""
            raise UnsupportedError(
                f"This adapter says init_lora_weights={how!r}: it belongs to a base that was changed before training, "
                "by data or chance that are not saved with it.",
                hint="Convert it where it was trained (peft: save_pretrained with "
                "path_initial_model_for_weight_conversion); or, if its base is the changed one, set init_lora_weights "
                f"to true in its config.{again}",
            )
        start = self._start(layer)
        return {leaf: start[leaf] for leaf in (START_A, START_B)}

    def on_disk(self, settings: LoraSettings, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if settings.padded:
            tensors = _unpadded(settings.r, tensors)
        if settings.of_embedding:
            # Copies, since a file holds no tensor that shares its memory with another.
            shape = torch.contiguous_format
            return {
                A: tensors[EMBEDDING_B].T.clone(memory_format=shape),
                B: tensors[EMBEDDING_A].T.clone(memory_format=shape),
            }
        return {**tensors, **_without_start(tensors)} if START_A in tensors else tensors

    def start_off(self, settings: LoraSettings, tensors: Mapping[str, Tensor], site: Site) -> Patch:
        """Return the change that takes an adapter's start off the weight."""
        up, down = site.low_rank_factors(tensors[START_A], -tensors[START_B])
        return Patch(up=up, down=down, scale=float(settings.scale) * site.low_rank_gain)

    def saves_as_it_is(self, config: LoraConfig) -> bool:
        return not is_moved(config.init_lora_weights)

    def config_on_disk(self, config: LoraConfig) -> LoraConfig:
        if not is_moved(config.init_lora_weights):
            return config
        grown = math.sqrt(2) if config.use_rslora else 2
        return replace(
            config,
            r=config.r * 2,
            rank_pattern={pattern: r * 2 for pattern, r in config.rank_pattern.items()},
            lora_alpha=config.lora_alpha * grown,
            alpha_pattern={pattern: alpha * grown for pattern, alpha in config.alpha_pattern.items()},
            init_lora_weights=True,
            corda_config=None,
            lora_ga_config=None,
        )

    def lower(self, settings: LoraSettings, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        patch = self._low_rank(settings, tensors, base)
        if MAGNITUDE not in tensors:
            return patch
        lengths = _lengths(settings, patch, base).to(patch.down.device)  # type: ignore[union-attr]
        magnitude = tensors[MAGNITUDE].float().flatten()
        # A row of zeros has no direction to be given a length; it stays zero.
        outer = Diagonal(torch.where(lengths > _NO_LENGTH, magnitude / lengths, 1.0))
        return Patch(patch.up, patch.down, patch.scale, patch.dropout, outer=outer, shift=patch.shift)

    def _low_rank(self, settings: LoraSettings, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        shift = tensors[B_BIAS] * settings.scale if B_BIAS in tensors else None
        up, down = _factors(settings, tensors, base.site)
        scale = settings.scale * base.site.low_rank_gain
        if isinstance(scale, Tensor):
            up, scale = up.float() * scale, 1.0
        gate = TokenGate(settings.invocation) if settings.invocation else None
        patch = Patch(up=up, down=down, scale=scale, dropout=settings.dropout, shift=shift, gate=gate)
        return patch if settings.variant is None else settings.variant.patch(patch, tensors)

    def penalty(self, config: LoraConfig, layers: Sequence[tuple[LoraSettings, Mapping[str, Tensor]]]) -> Tensor | None:
        varied = [(settings.variant, tensors) for settings, tensors in layers if settings.variant is not None]
        return varied[0][0].penalty([tensors for _, tensors in varied]) if varied else None


class Mica(Lora):
    """Adapts layers by a LoRA whose ``B`` stays as it began (:mod:`veneer.methods.lora_starts.mica`)."""

    leaves = tuple(replace(leaf, trained=leaf.trained and leaf.name not in (B, EMBEDDING_B)) for leaf in Lora.leaves)


METHOD = Lora()
MICA = Mica()


def _factors(settings: LoraSettings, tensors: Mapping[str, Tensor], site: Site) -> tuple[Tensor, Tensor]:
    """Return ``U`` and ``V`` of a layer's canonical weight."""
    if settings.of_embedding:
        return tensors[EMBEDDING_A].T, tensors[EMBEDDING_B].T
    if START_A in tensors:
        tensors = _without_start(tensors)
    down, up = (tensors[leaf] for leaf in site.low_rank_names)
    if settings.group > 1:
        down = down.repeat_interleave(settings.group, 1) * (down.shape[1] / settings.group)
    return site.low_rank_factors(down, up)


def _draw(tensors: Mapping[str, Tensor], new: NewLayer[LoraConfig, LoraSettings]) -> None:
    """Fill ``A`` or ``B`` of a new adapter with random numbers, and the other too where it is to change the layer."""
    down, up, start = *new.site.low_rank_names, new.config.init_lora_weights
    if new.site.looks_up:
        # As peft has it, "gaussian" too: an embedding's A starts at zero and its B at random.
        tensors[up].normal_(generator=new.generator)
    elif start == "gaussian":
        tensors[down].normal_(std=1 / new.settings.r, generator=new.generator)
    else:
        torch.nn.init.kaiming_uniform_(tensors[down], a=math.sqrt(5), generator=new.generator)
    if start is False:
        tensors[down if new.site.looks_up else up].normal_(std=0.02, generator=new.generator)


def _values_as_made(tensors: Mapping[str, Tensor], site: Site) -> dict[str, Tensor]:
    """Draw the values of peft's modules when they are made, after which torch's generator draws on as it does there."""
    values = {leaf: torch.empty_like(tensors[leaf]) for leaf in (*site.low_rank_names, B_BIAS) if leaf in tensors}
    for leaf, tensor in values.items():
        if leaf == B_BIAS:
            bound = values[B].shape[1] ** -0.5
            tensor.uniform_(-bound, bound)
        elif site.looks_up:
            tensor.normal_()
        else:
            torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
    return values


def _unpadded(r: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the zeros that lie beyond rank ``r``: in each group of a convolution's ``A``."""
    cut = dict(tensors)
    for down, up in ((A, B), (EMBEDDING_A, EMBEDDING_B)):
        if down in tensors:
            groups = tensors[down].shape[0] // tensors[up].shape[1]
            cut[down] = tensors[down].unflatten(0, (groups, -1))[:, : r // groups].flatten(0, 1)
            cut[up] = tensors[up][:, : r // groups]
    return cut


def _without_start(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``A`` (2r, in) and ``B`` (out, 2r) of an adapter with its start subtracted."""
    start_down, start_up = tensors[START_A].to(tensors[A].dtype), tensors[START_B].to(tensors[B].dtype)
    return {A: torch.cat([tensors[A], start_down]), B: torch.cat([tensors[B], -start_up], 1)}


def _lengths(settings: LoraSettings, patch: Patch, base: BaseLayer) -> Tensor:
    """Return the length of each row of ``W + scale * B A``, shape ``(out,)``, float32."""
    assert patch.up is not None
    assert patch.down is not None
    weight, site = base.base_weight(), base.site
    # A new adapter's tensors are made on the CPU, wherever the base lies.
    up, down = patch.up.to(weight.device), patch.down.to(weight.device)
    if site.groups > 1:
        return _lengths_in_groups(weight.float(), up.float(), down.float(), patch.scale)
    if torch.is_grad_enabled() and down.requires_grad and is_eager(weight, up, down):
        lengths = settings.row_lengths.of(weight, not site.stored.requires_grad, up, down, patch.scale)
    else:
        with torch.no_grad():
            lengths = row_lengths(weight, up, down, patch.scale)
    return lengths.clamp_min(_NO_LENGTH)


@torch.no_grad()
def _lengths_in_groups(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    """Return the lengths by which peft divides on a convolution in groups, for adapters that were trained by them.

    They are those of ``W + scale * M``, where ``M`` has the numbers of ``B A`` with the numbers of ``B``, shape
    ``(out, r / groups)``, read as rows of length r.
    """
    change = (up.reshape(-1, len(down)) @ down).reshape(weight.shape)
    lengths: Tensor = (weight + scale * change).norm(dim=1)
    return lengths.clamp_min(_NO_LENGTH)
