"""Extracts a LoRA adapter from two full checkpoints: the best low-rank form of each layer's change.

    tuned - base  ~  B A        the first r singular triples (Eckart & Young 1936), each side times sqrt(singular value)

One pair of weights is in memory at a time. Modules whose change has no low rank (norms, biases, convolutions, fused
experts) are saved whole, as ``modules_to_save``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.base_model.sites import sites_for
from veneer.base_model.sites.site import Site
from veneer.base_model.targets import is_inside
from veneer.checkpoints.checkpoint import write_checkpoint
from veneer.checkpoints.model_class import dtype_of
from veneer.configs.methods.lora import LoraConfig
from veneer.configs.names import TaskType
from veneer.errors import BaseModelError, MergeError, UsageError
from veneer.files.base_digest import BASE_DIGEST_KEY, base_digest
from veneer.files.lookup_options import LookupOptions
from veneer.files.names import MODEL_CONFIG
from veneer.files.resolve import resolve
from veneer.files.source import Source
from veneer.files.tensor_keys import encode
from veneer.keywords import DTYPE, takes
from veneer.merging.base.skeleton import DiskReader, build_skeleton, stored_names
from veneer.merging.base.weight_files import WeightFiles
from veneer.merging.output.target import check_adapter_target, check_apart
from veneer.merging.work.adapter_changes import tie_groups
from veneer.patches.low_rank import balanced
from veneer.patches.weight_arithmetic import check_kept
from veneer.printing import Report, nbytes

# Up to this many rows or columns all singular values are computed; of larger weights the first, at random (Halko,
# Martinsson & Tropp 2011, arXiv:0909.4061), with some more than are kept for accuracy.
_EXACT = 1024
_OVERSAMPLED = 16


@dataclass(frozen=True)
class ExtractReport(Report):
    """The result of an extraction.

    Attributes:
        tuned: the tuned model.
        base: the model that it was tuned from.
        out: the adapter's folder.
        ranks: layer -> the rank that it got.
        whole: modules that are saved whole.
        error: norm of the change that the adapter leaves out, relative to the norm of the whole change.
        layer_errors: layer -> the same for the layer alone.
        nbytes: bytes of the adapter's weights.
    """

    tuned: str
    base: str
    out: str
    ranks: dict[str, int]
    whole: list[str]
    error: float
    layer_errors: dict[str, float]
    nbytes: int

    _title = "extract report"

    def _facts(self) -> list[tuple[str, str]]:
        low, high = min(self.ranks.values(), default=0), max(self.ranks.values(), default=0)
        worst = max(self.layer_errors, key=lambda name: self.layer_errors[name], default="")
        facts = [
            ("tuned", self.tuned),
            ("base", self.base),
            ("layers", f"{len(self.ranks)}, rank {low}" + (f" to {high}" if high != low else "")),
            ("whole", ", ".join(self.whole) or "nothing"),
            ("error", f"{100 * self.error:.3f} % of the change is left out"),
            ("out", f"{self.out}: {nbytes(self.nbytes)}"),
        ]
        if worst:
            facts.insert(5, ("worst layer", f"{worst}: {100 * self.layer_errors[worst]:.3f} %"))
        return facts


@takes(renamed=DTYPE)
def extract(
    tuned: str | Path,
    base: str | Path,
    *,
    out: str | Path,
    rank: int = 16,
    energy: float | None = None,
    dtype: Any = "float32",
    overwrite: bool = False,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    on_step: Callable[[str], None] = lambda step: None,
) -> ExtractReport:
    """Write a LoRA adapter that turns ``base`` into ``tuned``, as nearly as its rank allows.

    Args:
        tuned: the tuned model's folder or hub id.
        base: the model that it was tuned from; both hold the same tensors.
        out: the adapter's folder.
        rank: of each layer, at most.
        energy: share of a layer's change, as a sum of squares, that suffices: layers that need less rank get less.
        dtype: of the adapter's tensors.
        overwrite: replace an adapter that is at ``out``.
        local_files_only: never use the network.
        trust_remote_code: run code that comes with the base.
        on_step: called with the name of each step as it begins.

    Raises:
        OutputError: ``out`` is taken. MergeError: nothing differs. BaseModelError: the two are not of one shape.
    """
    _check(rank, energy)
    folder = Path(out)
    check_adapter_target(folder, overwrite)
    lookup = LookupOptions(local_files_only=local_files_only)
    sources = resolve(tuned, lookup, what="tuned model"), resolve(base, lookup, what="base")
    check_apart(folder, [("tuned model", sources[0].root), ("base", sources[1].root)])
    on_step("reading")
    model = build_skeleton(sources[1], [], None, trust_remote_code)
    with _open(sources[0]) as tuned_files, _open(sources[1]) as base_files:
        extraction = Extraction(_reader(model, tuned_files), _reader(model, base_files), rank, energy)
        extraction.compare_all(model, on_step)
    _check_ties(extraction, model)
    if not extraction.ranks:
        raise MergeError(
            f"{tuned} and {base} differ in no linear or embedding layer; there is no adapter to extract.",
            hint="Check that they are the tuned model and its base.",
        )
    tensors = _cast(extraction.tensors, dtype_of(dtype))
    config = _config(extraction, model, sources[1])
    write_checkpoint(folder, config, tensors, {BASE_DIGEST_KEY: base_digest(sources[1])})
    return ExtractReport(
        str(tuned),
        str(base),
        str(folder),
        extraction.ranks,
        extraction.whole,
        math.sqrt(extraction.left_out / extraction.change),
        extraction.errors,
        sum(tensor.nbytes for tensor in tensors.values()),
    )


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast tensors, and raise ``MergeError`` where one does not fit into the dtype."""
    cast = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        check_kept(tensor, cast[key], key)
    return cast


def _check(rank: int, energy: float | None) -> None:
    if rank < 1:
        raise UsageError(f"rank={rank} is no rank.", hint="Give a whole number of at least 1.")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise UsageError(f"energy={energy} is no share.", hint="Give one above 0 and up to 1, such as 0.95.")


def _open(source: Source) -> WeightFiles:
    source.json(MODEL_CONFIG)
    return WeightFiles.open(source)


def _reader(model: nn.Module, files: WeightFiles) -> Callable[[str], Tensor]:
    shapes = {name: place.info.shape for name, place in files.places.items()}
    packed = next((name for name, place in files.places.items() if place.info.dtype.startswith("F8_E")), None)
    if packed is not None:
        raise BaseModelError(f"{packed} is quantised.", hint="Dequantise the model first.")
    return DiskReader(model, stored_names(model, shapes, shapes), files.read)


class Extraction:
    """Compares two models module by module, and collects the tensors of the adapter that makes one of the other.

    Args:
        read_tuned: reads a parameter of the tuned model by its name.
        read_base: reads a parameter of the base by its name.
        rank: of each layer, at most.
        energy: share of a layer's change, as a sum of squares, that suffices.

    Attributes:
        tensors: checkpoint key -> tensor.
        ranks: layer -> its rank.
        errors: layer -> norm of the change that is left out, relative to the norm of the change.
        whole: the modules that are saved whole.
        change: the squared norm of the whole change.
        left_out: the squared norm of the change that is left out.
    """

    def __init__(
        self, read_tuned: Callable[[str], Tensor], read_base: Callable[[str], Tensor], rank: int, energy: float | None
    ) -> None:
        self.read_tuned, self.read_base, self.rank, self.energy = read_tuned, read_base, rank, energy
        self.tensors: dict[str, Tensor] = {}
        self.ranks: dict[str, int] = {}
        self.errors: dict[str, float] = {}
        self.whole: list[str] = []
        self.change = self.left_out = 0.0

    def compare_all(self, model: nn.Module, on_step: Callable[[str], None]) -> None:
        """Add the changes of all modules of a model; ``on_step`` is called with the name of each."""
        for name, module in model.named_modules():
            if module._parameters and not is_inside(name, self.whole):
                on_step(f"comparing {name}")
                self._compare(name, module)

    def _compare(self, name: str, module: nn.Module) -> None:
        changed = self._changed(name, module)
        site = next(iter(sites_for(name, module)), None)
        if set(changed) == {"weight"} and site is not None and (site.matrix_input or site.looks_up):
            self._add_layer(site, *changed["weight"])
        elif changed:
            self._add_whole(name, module, changed)

    def _changed(self, name: str, module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the module's parameters that differ, of the tuned model and of the base."""
        changed: dict[str, tuple[Tensor, Tensor]] = {}
        for leaf in (leaf for leaf, parameter in module._parameters.items() if parameter is not None):
            tuned, base = self.read_tuned(f"{name}.{leaf}"), self.read_base(f"{name}.{leaf}")
            if tuned.shape != base.shape:
                raise BaseModelError(
                    f"{name}.{leaf} is {tuple(tuned.shape)} in the tuned model and {tuple(base.shape)} in the base.",
                    hint="Resize the base's vocabulary first, or give the base that it was tuned from.",
                )
            if not torch.equal(tuned, base.to(tuned.dtype)):
                changed[leaf] = tuned, base
        return changed

    def _add_layer(self, site: Site, tuned: Tensor, base: Tensor) -> None:
        change = site.canonical(tuned).float() - site.canonical(base).float()
        up, down = factors(change, self.rank, self.energy)
        total, left_out = float(change.square().sum()), float((change - up @ down).square().sum())
        self.change += total
        self.left_out += left_out
        self.ranks[site.name] = up.shape[1]
        self.errors[site.name] = math.sqrt(left_out / total)
        self.tensors.update({encode(site.name, leaf): tensor for leaf, tensor in site.as_low_rank(up, down).items()})

    def _add_whole(self, name: str, module: nn.Module, changed: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.whole.append(name)
        for leaf in module.state_dict(keep_vars=True):
            self.tensors[encode(name, leaf)] = self.read_tuned(f"{name}.{leaf}")
        self.change += sum(float((a.float() - b.float()).square().sum()) for a, b in changed.values())


def factors(change: Tensor, rank: int, energy: float | None) -> tuple[Tensor, Tensor]:
    """Return ``B``, ``(out, r)``, and ``A``, ``(r, in)``, whose product is of its rank the nearest to ``change``.

    Args:
        change: ``(out, in)``, float32.
        rank: at most.
        energy: share of the sum of squares that suffices.
    """
    full = min(change.shape)
    if full <= _EXACT:
        u, s, v = torch.linalg.svd(change, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, right = torch.svd_lowrank(change, q=min(rank + _OVERSAMPLED, full), niter=4)
        v = right.T
    keep = min(rank, full)
    if energy is not None:
        reached = s.double().square().cumsum(0) / change.double().square().sum()
        keep = min(keep, int((reached < energy).sum()) + 1)
    up, down = balanced(u[:, :keep], s[:keep], v[:keep])
    return up.contiguous(), down.contiguous()


def _check_ties(extraction: Extraction, model: nn.Module) -> None:
    """Raise ``MergeError`` for a tied embedding that was trained: a LoRA on either end would part the two."""
    for group in tie_groups(model):
        if {name.rpartition(".")[0] for name in group} & extraction.ranks.keys():
            raise MergeError(
                f"{' and '.join(sorted(group))} are one weight, which was trained; LoRA on one of them parts them.",
                hint="Untie the embeddings of both models first.",
            )


def _config(extraction: Extraction, model: nn.Module, base: Source) -> LoraConfig:
    common = max(extraction.ranks.values())
    other_ranks: Mapping[str, int] = {name: r for name, r in extraction.ranks.items() if r != common}
    kind = type(model).__name__
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM if kind.endswith(("ForCausalLM", "LMHeadModel")) else None,
        base_model_name_or_path=str(base.root.resolve()) if Path(base.origin).exists() else base.origin,
        target_modules=list(extraction.ranks),
        modules_to_save=extraction.whole or None,
        r=common,
        lora_alpha=common,
        rank_pattern=dict(other_ranks),
        alpha_pattern=dict(other_ranks),
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
    )
