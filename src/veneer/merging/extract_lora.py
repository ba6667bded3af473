"""A LoRA adapter out of two full checkpoints: the best low-rank form of what training changed, layer by layer.

    tuned - base  ~  B A        the first r singular triples (Eckart & Young 1936), each side times sqrt(singular value)

One pair of weights is in memory at a time. What no low-rank factor holds (norms, biases, convolutions, fused experts)
comes whole, as ``modules_to_save``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.base_model.sites import sites_for
from veneer.base_model.sites.site import Site
from veneer.checkpoints.checkpoint import write_checkpoint
from veneer.checkpoints.model_class import dtype_of
from veneer.configs.methods.lora import LoraConfig
from veneer.configs.names import TaskType
from veneer.errors import BaseModelError, MergeError, OutputError, UsageError
from veneer.files.base_digest import BASE_DIGEST_KEY, base_digest
from veneer.files.lookup_options import LookupOptions
from veneer.files.names import ADAPTER_CONFIG, MODEL_CONFIG
from veneer.files.output_folder import check_output
from veneer.files.paths import is_file, is_folder
from veneer.files.resolve import resolve
from veneer.files.source import Source
from veneer.files.tensor_keys import encode
from veneer.keywords import DTYPE, takes
from veneer.merging.base.skeleton import DiskReader, build_skeleton, stored_names
from veneer.merging.base.weight_files import WeightFiles
from veneer.merging.output.staging import check_apart
from veneer.merging.work.adapter_changes import tie_groups
from veneer.patches.low_rank import balanced
from veneer.patches.weight_arithmetic import check_kept
from veneer.printing import Report, nbytes

# Up to this many rows or columns all singular values are computed; of larger weights the first, at random (Halko,
# Martinsson & Tropp 2011, arXiv:0909.4061), with some more than are kept for accuracy.
_EXACT = 1024
_MORE = 16


@dataclass(frozen=True)
class ExtractReport(Report):
    """What was extracted.

    Attributes:
        tuned: the tuned model.
        base: the model that it was tuned from.
        out: the adapter's folder.
        ranks: layer -> the rank that it got.
        whole: modules that come whole.
        error: norm of what the adapter leaves out, relative to the norm of the change.
        layer_errors: layer -> the same for it alone.
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


@dataclass
class _Found:
    """What is extracted so far; the squares of norms of the change, and of what is left out of it."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    change: float = 0.0
    left: float = 0.0


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
        on_step: called with what begins now.

    Raises:
        OutputError: ``out`` is taken. MergeError: nothing differs. BaseModelError: the two are not of one shape.
    """
    _check(rank, energy)
    folder = Path(out)
    check_output(folder, overwrite)
    if is_folder(folder) and any(folder.iterdir()) and not is_file(folder / ADAPTER_CONFIG):
        raise OutputError(f"{folder} holds no adapter; it is not replaced.", hint="Choose another folder.")
    lookup = LookupOptions(local_files_only=local_files_only)
    sources = resolve(tuned, lookup, what="tuned model"), resolve(base, lookup, what="base")
    check_apart(folder, [("tuned model", sources[0].root), ("base", sources[1].root)])
    on_step("reading")
    model = build_skeleton(sources[1], [], None, trust_remote_code)
    with _open(sources[0]) as tuned_files, _open(sources[1]) as base_files:
        read_tuned, read_base = _reader(model, tuned_files), _reader(model, base_files)
        found = _Found()
        for name, module in model.named_modules():
            if module._parameters and not any(name == root or name.startswith(root + ".") for root in found.whole):
                on_step(f"comparing {name}")
                _compare(found, name, module, read_tuned, read_base, rank, energy)
        _check_ties(found, model)
    if not found.ranks:
        raise MergeError(
            f"{tuned} and {base} differ in no linear or embedding layer; there is no adapter to extract.",
            hint="Check that they are the tuned model and its base.",
        )
    target = dtype_of(dtype)
    tensors = {key: tensor.to(target) for key, tensor in found.tensors.items()}
    for key, tensor in found.tensors.items():
        check_kept(tensor, tensors[key], key)
    write_checkpoint(folder, _config(found, model, sources[1]), tensors, {BASE_DIGEST_KEY: base_digest(sources[1])})
    return ExtractReport(
        str(tuned),
        str(base),
        str(folder),
        found.ranks,
        found.whole,
        math.sqrt(found.left / found.change),
        found.errors,
        sum(tensor.nbytes for tensor in tensors.values()),
    )


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


def _compare(
    found: _Found,
    name: str,
    module: nn.Module,
    read_tuned: Callable[[str], Tensor],
    read_base: Callable[[str], Tensor],
    rank: int,
    energy: float | None,
) -> None:
    """Add what training changed in one module."""
    changed: dict[str, tuple[Tensor, Tensor]] = {}
    for leaf in module._parameters:
        if module._parameters[leaf] is None:
            continue
        pair = read_tuned(f"{name}.{leaf}"), read_base(f"{name}.{leaf}")
        if pair[0].shape != pair[1].shape:
            raise BaseModelError(
                f"{name}.{leaf} is {tuple(pair[0].shape)} in the tuned model and {tuple(pair[1].shape)} in the base.",
                hint="Resize the base's vocabulary first, or give the base that it was tuned from.",
            )
        if not torch.equal(pair[0], pair[1].to(pair[0].dtype)):
            changed[leaf] = pair
    if not changed:
        return
    site = next(iter(sites_for(name, module)), None)
    if set(changed) == {"weight"} and site is not None and (site.matrix_input or site.looks_up):
        _add_layer(found, site, *changed["weight"], rank, energy)
        return
    found.whole.append(name)
    for leaf in module.state_dict(keep_vars=True):
        found.tensors[encode(name, leaf)] = read_tuned(f"{name}.{leaf}")
    found.change += sum(float((a.float() - b.float()).square().sum()) for a, b in changed.values())


def _add_layer(found: _Found, site: Site, tuned: Tensor, base: Tensor, rank: int, energy: float | None) -> None:
    change = site.canonical(tuned).float() - site.canonical(base).float()
    up, down = factors(change, rank, energy)
    total, left = float(change.square().sum()), float((change - up @ down).square().sum())
    found.change += total
    found.left += left
    found.ranks[site.name] = up.shape[1]
    found.errors[site.name] = math.sqrt(left / total)
    found.tensors.update({encode(site.name, leaf): tensor for leaf, tensor in site.as_low_rank(up, down).items()})


def factors(change: Tensor, rank: int, energy: float | None) -> tuple[Tensor, Tensor]:
    """``B``, ``(out, r)``, and ``A``, ``(r, in)``, whose product is the best of its rank for ``change``.

    Args:
        change: ``(out, in)``, float32.
        rank: at most.
        energy: share of the sum of squares that suffices.
    """
    most = min(change.shape)
    if most <= _EXACT:
        u, s, v = torch.linalg.svd(change, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, right = torch.svd_lowrank(change, q=min(rank + _MORE, most), niter=4)
        v = right.T
    keep = min(rank, most)
    if energy is not None:
        reached = s.double().square().cumsum(0) / change.double().square().sum()
        keep = min(keep, int((reached < energy).sum()) + 1)
    up, down = balanced(u[:, :keep], s[:keep], v[:keep])
    return up.contiguous(), down.contiguous()


def _check_ties(found: _Found, model: nn.Module) -> None:
    """A tied embedding that was trained has no LoRA of its own: both ends would have to carry it."""
    for group in tie_groups(model):
        if {name.rpartition(".")[0] for name in group} & found.ranks.keys():
            raise MergeError(
                f"{' and '.join(sorted(group))} are one weight, which was trained; LoRA on one of them parts them.",
                hint="Untie the embeddings of both models first.",
            )


def _config(found: _Found, model: nn.Module, base: Source) -> LoraConfig:
    names, common = list(found.ranks), max(found.ranks.values())
    other: Mapping[str, int] = {name: r for name, r in found.ranks.items() if r != common}
    kind = type(model).__name__
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM if kind.endswith(("ForCausalLM", "LMHeadModel")) else None,
        base_model_name_or_path=str(base.root.resolve()) if Path(base.origin).exists() else base.origin,
        target_modules=names,
        modules_to_save=found.whole or None,
        r=common,
        lora_alpha=common,
        rank_pattern=dict(other),
        alpha_pattern=dict(other),
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
    )
