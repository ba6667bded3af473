"""Verifies a merged folder: merges again beside it, and compares the merged model's answers with the unmerged one's."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.base_model.transformers_errors import transformers_errors_as
from veneer.errors import MergeError, VeneerError
from veneer.files.lookup_options import LookupOptions
from veneer.files.resolve import resolve
from veneer.keywords import takes
from veneer.merging.base.hashing import digest_in_cache, matches
from veneer.merging.base.weight_files import WeightFiles
from veneer.merging.output.file_writer import run_all
from veneer.merging.output.manifest import read_manifest
from veneer.merging.work.inputs import AdapterPaths
from veneer.merging.work.merge_options import MergeOptions
from veneer.merging.work.prepare import find_adapters, prepare
from veneer.printing import Report

PROMPTS = (
    "The capital of France is",
    "Write one sentence about the sea.",
    "def fibonacci(n):",
    "Question: What is 17 + 25? Answer:",
)
# Mean divergence of the answers, in nats, up to which a merged model passes.
MAX_KL = 0.02


@dataclass(frozen=True)
class Answers:
    """The difference of the merged model's logits from the unmerged one's, over all positions of the prompts.

    Attributes:
        positions: how many were compared.
        max_drift: the largest difference of two logits.
        relative_drift: the same, relative to the largest logit.
        argmax_agreement: share of positions at which both models give the same token the largest logit.
        kl: mean Kullback-Leibler divergence of the merged from the unmerged distribution, in nats.
    """

    positions: int
    max_drift: float
    relative_drift: float
    argmax_agreement: float
    kl: float


@dataclass(frozen=True)
class VerifyReport(Report):
    """The result of a verification.

    Attributes:
        out: the merged folder.
        tensors: output tensors that were computed again and compared bit for bit.
        different: output tensors that adapters and base do not give.
        altered: files that have changed since the merge wrote them, or since the hub's cache named them.
        answers: the difference of the logits; ``None`` when they were not compared.
        max_kl: the limit up to which ``answers.kl`` passes.
        notes: steps that were left out, and why.
    """

    out: str
    tensors: int
    different: list[str]
    altered: list[str]
    answers: Answers | None
    max_kl: float
    notes: list[str] = field(default_factory=list)

    _title = "verify report"

    @property
    def passed(self) -> bool:
        """True if tensors, files and answers are all right."""
        return not self.different and not self.altered and (self.answers is None or self.answers.kl <= self.max_kl)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types."""
        return {"passed": self.passed, **super().to_dict()}

    def _facts(self) -> list[tuple[str, str]]:
        def row(bad: Sequence[str], good: str) -> str:
            return f"{len(bad)} differ: {', '.join(bad[:3])}" if bad else good

        facts = [
            ("out", self.out),
            ("tensors", row(self.different, f"{self.tensors} computed again, each bit the same")),
            ("files", row(self.altered, "as the merge wrote them")),
        ]
        if self.answers is not None:
            a = self.answers
            facts.append(("drift", f"{a.max_drift:.2e} at most ({a.relative_drift:.1e} of the largest logit)"))
            facts.append(("argmax", f"{100 * a.argmax_agreement:.1f} % of {a.positions} positions agree"))
            facts.append(("KL", f"{a.kl:.1e} nats on average (up to {self.max_kl:g} passes)"))
        return [*facts, ("result", "pass" if self.passed else "FAIL")]

    def _warnings(self) -> list[str]:
        return self.notes

    def _border(self) -> str:
        return "green" if self.passed else "red"


class CompareSink:
    """Compares the tensors that a merge would write with those of a folder."""

    def __init__(self, files: WeightFiles) -> None:
        self.files = files
        self.different: set[str] = set()
        self._lock = threading.Lock()

    def put(self, name: str, start: int, data: Tensor) -> None:
        """Compare bytes of a tensor."""
        expected = data.detach().reshape(-1).view(torch.uint8)
        place = self.files.places.get(name)
        fits = place is not None and start + len(expected) <= place.info.nbytes
        if not fits or not torch.equal(self.files.tensor_bytes(name, start, len(expected)), expected):
            with self._lock:
                self.different.add(name)

    def copy(self, names: Sequence[str], files: WeightFiles, file: str, start: int, count: int) -> None:
        """Compare a range of tensors, one by one."""
        for name in names:
            self.put(name, 0, files.tensor_bytes(name, 0, files.places[name].info.nbytes))


@takes()
def verify(
    out: str | Path,
    adapter: AdapterPaths | None = None,
    base: str | Path | None = None,
    *,
    sample: int | None = None,
    logits: bool = True,
    prompts: Sequence[str] | None = None,
    max_kl: float = MAX_KL,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    on_step: Callable[[str], None] = lambda step: None,
) -> VerifyReport:
    """Merge again beside a merged folder, compare bit for bit, and compare the answers of both models.

    Args:
        out: the merged folder; its ``merge_manifest.json`` says how it was made.
        adapter: the adapters; by default those that the manifest names. Their weights are the manifest's.
        base: the base; by default the one that the manifest names.
        sample: compute only about so many pieces again, spread over the model; all when ``None``.
        logits: whether to load both models, one after the other and in float32, and compare their logits.
        prompts: texts to compare on; some are built in. Without a tokenizer, random tokens are taken.
        max_kl: mean divergence in nats up to which the answers pass.
        local_files_only: never use the network.
        trust_remote_code: run code that comes with the base model.
        on_step: called with the name of each step as it begins.

    Raises:
        IncompleteCheckpointError: ``out`` has no manifest. SourceError, BindError ...: as merging raises.
    """
    folder = Path(out)
    manifest = read_manifest(folder)
    lookup = LookupOptions(local_files_only=local_files_only, trust_remote_code=trust_remote_code)
    adapters = _weighted(manifest, adapter, lookup)
    base = manifest["base"]["origin"] if base is None else base
    on_step("merging again")
    tensors, different, altered = _replayed(folder, adapters, base, MergeOptions(**manifest["options"]), lookup, sample)
    altered += [name for name, digest in manifest["outputs"]["digests"].items() if not matches(folder / name, digest)]
    answers, notes = None, []
    if logits:
        on_step("comparing answers")
        answers, note = _answers(folder, adapters, base, list(prompts or PROMPTS), lookup)
        notes = [note] if note else []
    return VerifyReport(str(folder), tensors, different, altered, answers, max_kl, notes)


def _weighted(manifest: dict[str, Any], adapter: AdapterPaths | None, lookup: LookupOptions) -> dict[str | Path, float]:
    weights = [merged["weight"] for merged in manifest["adapters"]]
    if adapter is None:
        paths: list[str | Path] = [merged["origin"] for merged in manifest["adapters"]]
    else:
        paths = [source.file or source.root for source in find_adapters(adapter, lookup)[0]]
    if len(paths) != len(weights):
        raise MergeError(
            f"{len(paths)} adapters are given, and {len(weights)} were merged.", hint="Give those, in their order."
        )
    return dict(zip(paths, weights, strict=True))


def _replayed(
    folder: Path,
    adapters: AdapterPaths,
    base: str | Path,
    options: MergeOptions,
    lookup: LookupOptions,
    sample: int | None,
) -> tuple[int, list[str], list[str]]:
    """Merge again, and return how many tensors were computed, which differ, and which files of the base are damaged."""
    with prepare(adapters, base, options, lookup) as prepared, WeightFiles.open(resolve(folder)) as files:
        pieces = prepared.plan.pieces
        if sample is not None:
            pieces = pieces[:: max(1, len(pieces) // max(sample, 1))]
        sink = CompareSink(files)
        for _ in run_all(pieces, sink):
            pass
        planned = {
            name: (info.dtype, info.shape) for file in prepared.plan.files for name, info in file.tensors.items()
        }
        present = {name: (place.info.dtype, place.info.shape) for name, place in files.places.items()}
        odd = {name for name in planned.keys() | present.keys() if planned.get(name) != present.get(name)}
        return sum(len(piece.outputs) for piece in pieces), sorted(sink.different | odd), _damaged(prepared.files)


def _damaged(base: WeightFiles) -> list[str]:
    """Return the files of the base whose blob in the hub's cache has not the digest that is its name."""
    digests = {path: digest_in_cache(path) for path in base.paths.values()}
    return [str(path) for path, digest in digests.items() if digest is not None and not matches(path, digest)]


def _answers(
    folder: Path, adapters: dict[str | Path, float], base: str | Path, prompts: list[str], lookup: LookupOptions
) -> tuple[Answers | None, str]:
    """Compare the answers, or tell why they cannot be compared."""
    from veneer.peft_model.load import load

    if any(weight != 1.0 for weight in adapters.values()):
        return None, "Answers are not compared: weights other than 1 have no unmerged form."
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "local_files_only": lookup.local_files_only,
        "trust_remote_code": lookup.trust_remote_code,
    }
    first, *others = adapters
    model = load(first, base=base, adapter_name="a0", **options)
    for index, path in enumerate(others, start=1):
        model.load_adapter(path, adapter_name=f"a{index}")
    model.set_adapter([f"a{index}" for index in range(len(adapters))])
    batches = _batches(folder, model, prompts)
    if not batches:
        return None, f"Answers are not compared: {type(model.get_base_model()).__name__} reads no text."
    unmerged = _logits(model, batches)
    del model
    gc.collect()
    return _compared(unmerged, _logits(load(folder, **options), batches)), ""


def _batches(folder: Path, model: Any, prompts: list[str]) -> list[dict[str, Tensor]]:
    base = model.get_base_model()
    if getattr(base, "main_input_name", "") != "input_ids":
        return []
    batches = [{"input_ids": ids} for ids in _ids(folder, base.get_input_embeddings().weight.shape[0], prompts)]
    if base.config.is_encoder_decoder:
        batches = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in batches]
    return batches


def _ids(folder: Path, vocabulary: int, prompts: list[str]) -> list[Tensor]:
    """Return the prompts' tokens; random ones where there is no tokenizer."""
    from transformers import AutoTokenizer

    if (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file():
        # The tokenizer may be the adapter's: its code is never run, even where the base's is trusted.
        with transformers_errors_as(VeneerError, f"{folder}: its tokenizer cannot be used", "Use --no-logits."):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            ids = [tokenizer(text, return_tensors="pt")["input_ids"] for text in prompts]
        return [tokens for tokens in ids if tokens.numel()]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, (1, 16), generator=generator) for _ in range(4)]


@torch.inference_mode()
def _logits(model: Any, batches: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    return [model(**batch).logits.float() for batch in batches]


def _compared(unmerged: Sequence[Tensor], merged: Sequence[Tensor]) -> Answers:
    a, b = (torch.cat([t.reshape(-1, t.shape[-1]) for t in side]) for side in (unmerged, merged))
    drift = float((a - b).abs().max())
    kl = torch.nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    return Answers(
        positions=len(a),
        max_drift=drift,
        relative_drift=drift / float(a.abs().max()),
        argmax_agreement=float((a.argmax(-1) == b.argmax(-1)).float().mean()),
        kl=max(0.0, float(kl.mean())),
    )
