"""Initialises LoRA by EVA: ``A`` are the directions in which a layer's inputs vary.

Paischer et al. 2024, arXiv:2410.07170, section 3:

    X - mean = U S V^T, a layer's inputs on given data        A: the first rows of V^T, B = 0

All layers share one budget, the sum of their ranks in the config. It goes to the directions that explain most of the
variance of their own layer's inputs (algorithm 1). A layer gets ``rho`` times its rank at most; where it gets none, it
has no adapter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.collection import Adapters
from veneer.base_model.targets import pattern_value
from veneer.configs.lora_start_options import EvaConfig
from veneer.configs.methods.lora import LoraConfig
from veneer.errors import AdapterError, ConfigError, UnsupportedError
from veneer.files.tensor_keys import PREFIX
from veneer.keywords import takes
from veneer.layers.adapted_layer import AdaptedLayer
from veneer.layers.adapter_shares import BoundAdapter
from veneer.methods.lora import RANK_DIMS, Lora, LoraSettings
from veneer.methods.lora_starts.statistics import linear_sites, watching
from veneer.peft_model.peft_model import PeftModel
from veneer.printing import warn
from veneer.training.principal_directions import PrincipalDirections

# Passes over the data after which directions that still turn are an error.
_MAX_PASSES = 100

Rows = Callable[[Any, Any, str], Tensor]


@dataclass(frozen=True)
class _Ranks:
    """The rank that the config gives a layer, and the largest that it may get."""

    r: int
    largest: int


def used_tokens(inputs: Mapping[str, Tensor], config: LoraConfig) -> Tensor:
    """Return the positions ``(n, 2)`` of a batch's tokens that count: neither padding nor masked by the labels."""
    options = config.eva_config or EvaConfig()
    mask = inputs.get("attention_mask")
    mask = (torch.ones_like(inputs["input_ids"]) if mask is None else mask).bool()
    if options.use_label_mask and inputs.get("labels") is not None:
        mask = mask & (inputs["labels"] != options.label_mask_value)
    return mask.nonzero()


def rows_at(layer_input: Tensor, positions: Tensor | None, name: str) -> Tensor:
    """Return the vectors ``(n, in)`` of a layer's input at ``positions``; all of them where these are no tensor."""
    if not isinstance(positions, Tensor):
        return layer_input.flatten(0, -2)
    if layer_input.ndim != positions.shape[1] + 1:
        raise ConfigError(
            f"EVA: the input of {name} has the shape {tuple(layer_input.shape)}, which tells no tokens apart.",
            hint="Give a prepare_layer_inputs_fn, or prepare_model_inputs_fn=None to use every vector.",
        )
    return layer_input[positions.unbind(1)]


def _call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs)


@torch.no_grad()
@takes()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = _call,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = used_tokens,
    prepare_layer_inputs_fn: Rows | Mapping[str, Rows] | None = rows_at,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Compute the ``A`` that EVA gives to each linear layer: name -> shape ``(rank, in)``, of rank 0 for some layers.

    Args:
        model: a model with an adapter, or a base model.
        dataloader: batches of the training data, read again and again until the directions are steady.
        peft_config: the config for a base model, with its ``eva_config``.
        forward_fn: runs the model on a batch.
        prepare_model_inputs_fn: prepares a batch for the next function; by default the positions of tokens that are
            neither padding nor masked by the labels. ``None``: nothing.
        prepare_layer_inputs_fn: makes rows ``(n, in)`` of a layer's input, the prepared batch and the layer's name; or
            one function for each layer, by name.
        adapter_name: the adapter of ``model``.
        gather_distributed_inputs: accepted for peft's sake; each process uses the data that it is given.
        show_progress_bar: accepted for peft's sake; none is shown.

    Raises:
        ConfigError: no data, too few rows in each batch, or directions that do not become steady.
    """
    config, layers, disabled = _linear_layers(model, peft_config, adapter_name)
    options = config.eva_config or EvaConfig()
    search = _Search({name: _ranks(name, config, options.rho) for name in layers}, options.tau)
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))

    def run(names: Sequence[str], see: Callable[[str, Tensor], None], batch: Any) -> None:
        batch = _moved(batch, device)
        prepared = None if prepare_model_inputs_fn is None else prepare_model_inputs_fn(batch, config)

        def look(name: str, x: Tensor) -> None:
            prepare = prepare_layer_inputs_fn
            make_rows = (prepare.get(name) if isinstance(prepare, Mapping) else prepare) or rows_at
            see(name, make_rows(x, prepared, name).float())

        with watching({name: layers[name] for name in names}, look):
            forward_fn(model, batch)

    was_training = model.training
    model.eval()
    try:
        with disabled:
            search.read_all(dataloader, run)
    finally:
        model.train(was_training)
    return {name: rows.to(device) for name, rows in search.starts(options.whiten).items()}


def _linear_layers(
    model: nn.Module, peft_config: LoraConfig | None, adapter_name: str
) -> tuple[LoraConfig, dict[str, nn.Module], AbstractContextManager[None]]:
    """Return the config, the linear layers by name, and the context in which the base runs alone."""
    if isinstance(model, PeftModel):
        entry = _checked(model.adapters, adapter_name)
        config: LoraConfig = peft_config or entry.config  # type: ignore[assignment]
        layers: dict[str, nn.Module] = {PREFIX + layer.site.name: layer for layer, _ in _linear(model.adapters, entry)}
        return config, layers, model.disable_adapter()
    if peft_config is None:
        raise ConfigError("get_eva_state_dict needs a peft_config for a base model.", hint="Give the LoraConfig.")
    modules = {name: site.module for name, site in linear_sites(model, peft_config).items()}
    return peft_config, modules, nullcontext()


class _Search:
    """Searches the directions of each layer's inputs, and divides the ranks among the layers."""

    def __init__(self, layers: Mapping[str, _Ranks], tau: float) -> None:
        self.layers = layers
        self.tau = tau
        # A layer's name -> the first layer with the same input, which is watched for both.
        self.leaders: dict[str, str] = {}
        self.spectra: dict[str, PrincipalDirections] = {}
        self.ranks = {name: layer.largest for name, layer in layers.items()}

    def read_all(self, dataloader: Iterable[Any], run: Callable[..., None]) -> None:
        for _ in range(_MAX_PASSES):
            batches = 0
            for batch in dataloader:
                batches += 1
                if not self.leaders:
                    self._find_leaders(run, batch)
                unsteady = self._unsteady()
                if not unsteady:
                    return
                run(unsteady, self._see, batch)
                if all(spectrum.seen for spectrum in self.spectra.values()):
                    self.ranks = self._divided_ranks()
            self._check_pass(batches)
        raise ConfigError(
            f"EVA: after {_MAX_PASSES} passes over the data the directions of {self._unsteady()[0]} still turn.",
            hint="Give more or larger batches, a lower r or rho, or a lower tau in eva_config.",
        )

    def _find_leaders(self, run: Callable[..., None], batch: Any) -> None:
        """Find layers that get the same input, such as queries and keys; they run one after the other in a model."""
        last: list[tuple[str, Tensor]] = []

        def see(name: str, x: Tensor) -> None:
            if not last or last[0][1].shape != x.shape or not torch.equal(last[0][1], x):
                last[:] = [(name, x)]
            self.leaders.setdefault(name, last[0][0])

        run(list(self.layers), see, batch)
        missing = [name for name in self.layers if name not in self.leaders]
        if missing:
            raise ConfigError(
                f"EVA: {missing[0]} saw no data in the first batch.",
                hint="Let forward_fn run all of the model, or leave the layer out with exclude_modules.",
            )
        for leader in dict.fromkeys(self.leaders.values()):
            followers = [name for name, first in self.leaders.items() if first == leader]
            self.spectra[leader] = PrincipalDirections(max(self.layers[name].largest for name in followers))

    def _see(self, name: str, rows: Tensor) -> None:
        self.spectra[name].add(rows)

    def _unsteady(self) -> list[str]:
        ranks = dict.fromkeys(self.spectra, 0)
        for name, leader in self.leaders.items():
            ranks[leader] = max(ranks[leader], self.ranks[name])
        return [leader for leader, rank in ranks.items() if not self.spectra[leader].steady(rank, self.tau)]

    def _divided_ranks(self) -> dict[str, int]:
        """Return each layer's rank: the budget goes to the directions that explain most."""
        explained = {name: self.spectra[leader].explained() for name, leader in self.leaders.items()}
        owners = [name for name, ratios in explained.items() for _ in ratios]
        budget = sum(layer.r for layer in self.layers.values())
        best = torch.cat(list(explained.values())).argsort(descending=True, stable=True)[:budget]
        counts = Counter(owners[i] for i in best.tolist())
        return {name: counts[name] for name in self.layers}

    def _check_pass(self, batches: int) -> None:
        if not batches:
            raise ConfigError(
                "EVA: the dataloader gave no batch.",
                hint="Give a list or a DataLoader: something that can be gone through several times.",
            )
        starved = [name for name, spectrum in self.spectra.items() if not spectrum.seen]
        if starved:
            raise ConfigError(
                f"EVA: no batch has {self.spectra[starved[0]].size} rows for {starved[0]}.",
                hint="Give larger batches, a lower r or rho, or use_label_mask=False in eva_config.",
            )

    def starts(self, whiten: bool) -> dict[str, Tensor]:
        return {name: self.spectra[self.leaders[name]].rows(rank, whiten) for name, rank in self.ranks.items()}


def _ranks(name: str, config: LoraConfig, rho: float) -> _Ranks:
    r = pattern_value(name.removeprefix(PREFIX), config.rank_pattern, config.r)
    return _Ranks(r, round(r * rho))


def _moved(batch: Any, device: torch.device) -> Any:
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    return type(batch)(_moved(value, device) for value in batch) if isinstance(batch, (list, tuple)) else batch


@torch.no_grad()
@takes()
def initialize_lora_eva_weights(
    model: PeftModel,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = _call,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = used_tokens,
    prepare_layer_inputs_fn: Rows | Mapping[str, Rows] | None = rows_at,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Give a new adapter with ``init_lora_weights="eva"`` its start: each layer's ``A`` and rank.

    The adapter's config then has the ranks and alphas in ``rank_pattern`` and ``alpha_pattern``, and does not name the
    layers that are left with none; saved, it is a plain adapter. Call it before the optimiser is made.

    Args:
        model: the model with the adapter.
        dataloader: batches of the training data.
        eva_state_dict: instead of data: what :func:`get_eva_state_dict` gave.
        forward_fn: as for :func:`get_eva_state_dict`, like the two that follow.
        prepare_model_inputs_fn: prepares a batch for the next function.
        prepare_layer_inputs_fn: makes rows of a layer's input.
        adapter_name: the adapter.
        gather_distributed_inputs: accepted for peft's sake, like what follows.
        show_progress_bar: none is shown.

    Raises:
        ConfigError: neither or too few data, or an ``A`` that fits no layer. AdapterError: the adapter has another
            start, or is merged.
    """
    adapters = model.adapters
    entry = _checked(adapters, adapter_name)
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("EVA needs data, and none was given.", hint="Give a dataloader or an eva_state_dict.")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            forward_fn=forward_fn,
            prepare_model_inputs_fn=prepare_model_inputs_fn,
            prepare_layer_inputs_fn=prepare_layer_inputs_fn,
            adapter_name=adapter_name,
        )
    _begin(adapters, entry, {name.removeprefix(PREFIX): rows for name, rows in eva_state_dict.items()})


def _checked(adapters: Adapters, name: str) -> Adapter:
    entry = adapters.get(name)
    if getattr(entry.config, "init_lora_weights", None) != "eva":
        raise AdapterError(f"{name!r} does not begin by EVA.", hint='Make it with LoraConfig(init_lora_weights="eva").')
    if entry.layers.merged(name):
        raise AdapterError(f"{name!r} is merged, and cannot begin anew.", hint="Call unmerge_adapter() first.")
    if adapters.is_spread:
        raise UnsupportedError(
            "EVA gives other ranks to layers, and this base is spread over processes.",
            hint="Begin on one process, save the adapter, and load it on the spread base.",
        )
    return entry


def _linear(adapters: Adapters, entry: Adapter) -> list[tuple[AdaptedLayer, BoundAdapter]]:
    """List the linear layers that a LoRA adapts, with its shares of them."""
    return [
        (layer, share)
        for layer in entry.layers.adapted
        for share in layer.bound[entry.name]
        if isinstance(share.method, Lora) and layer.site.matrix_input
    ]


def _begin(adapters: Adapters, entry: Adapter, starts: Mapping[str, Tensor]) -> None:
    """Set each layer's ``A``, write the ranks into the config, and take the adapter off layers that have none."""
    places = {layer.site.name: (layer, share) for layer, share in _linear(adapters, entry)}
    _check_fit(entry, places, starts)
    config = _with_ranks(adapters, entry, starts)
    for name in starts.keys() & places.keys():
        layer, share = places[name]
        if not len(starts[name]):
            continue
        settings = share.method.settings(config, layer.site)
        for leaf, shape in share.method.shapes(settings, layer.site).items():
            parameter = layer.tensors(entry.name, share)[leaf]
            if leaf in RANK_DIMS:
                start = starts[name] if RANK_DIMS[leaf] == 0 else torch.zeros(shape)
                parameter.data = start.to(parameter.device, parameter.dtype, copy=True)
        layer.reset(entry.name, share, settings)
    entry.layers.leave(entry, adapters, [name for name in places if name in starts and not len(starts[name])])
    entry.note_zero_layers()
    entry.config = config


def _check_fit(
    entry: Adapter, places: Mapping[str, tuple[AdaptedLayer, BoundAdapter]], starts: Mapping[str, Tensor]
) -> None:
    for name, rows in starts.items():
        inner = places[name][0].site.shape[1] if name in places else None
        if rows.ndim != 2 or rows.shape[1] != inner:
            what = "adapts no such linear layer" if inner is None else f"its inputs have {inner} entries there"
            raise ConfigError(
                f"eva_state_dict has {tuple(rows.shape)} for {name}, and {entry.name!r}: {what}.",
                hint="Take what get_eva_state_dict gives for this model and config.",
            )
    if getattr(entry.config, "bias", "none") == "all" and not all(len(rows) for rows in starts.values()):
        raise UnsupportedError(
            'EVA leaves some layers without a rank, and bias="all" trains their biases.',
            hint='Set bias="none", or rho=1.0 in eva_config: then every layer keeps its rank.',
        )
    missing = [name for name in places if name not in starts]
    if missing:
        warn(f"EVA: {len(missing)} linear layers keep their random start (first: {missing[0]}).")


def _with_ranks(adapters: Adapters, entry: Adapter, starts: Mapping[str, Tensor]) -> LoraConfig:
    """Return the adapter's config with the new ranks and alphas, written out by name."""
    old = entry.config
    assert isinstance(old, LoraConfig)
    adjust = (old.eva_config or EvaConfig()).adjust_scaling_factors
    ranks: dict[str, int] = {}
    alphas: dict[str, int | float] = {}
    for layer in entry.layers:
        site = layer.site
        if not any(isinstance(share.settings, LoraSettings) for share in layer.bound[entry.name]):
            continue
        r = pattern_value(site.pattern_name, old.rank_pattern, old.r)
        alpha = pattern_value(site.pattern_name, old.alpha_pattern, old.lora_alpha)
        new = len(starts[site.name]) if site.name in starts else r
        if new and new != old.r:
            ranks[site.pattern_name] = new
        if new and (alpha := alpha * new / r if adjust and new != r else alpha) != old.lora_alpha:
            alphas[site.pattern_name] = alpha
    config = replace(old, rank_pattern=ranks, alpha_pattern=alphas)
    gone = {name for name, rows in starts.items() if not len(rows)}
    if gone:
        left = [name for name in adapters.catalog.targets(old) if name not in gone]
        config.target_modules = None
        adapters.catalog.write_out_targets(config, left)
    return config
