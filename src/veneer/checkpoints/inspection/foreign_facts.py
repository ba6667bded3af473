"""Finds the facts of an adapter in another tool's format, by file names and headers."""

from __future__ import annotations

import math
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from veneer.checkpoints.inspection.facts import AdapterFacts, Problem, Weights
from veneer.checkpoints.inspection.problems import problem_of
from veneer.checkpoints.inspection.weights import weights_of
from veneer.errors import CorruptFileError, SourceError
from veneer.files.json_file import COPY_AGAIN, is_number
from veneer.files.names import ADAPTER_CONFIG, FOREIGN_FILES, LITGPT_WEIGHTS, SAFETENSORS
from veneer.files.safetensors_header import Header, TensorInfo, read_header
from veneer.files.source import Source
from veneer.formats.unreadable import UnreadableFormat

if TYPE_CHECKING:
    from veneer.formats.format import Format

# How the name of a module's one factor ends in some format -> the dimension that is the rank.
_DOWN: Mapping[str, int] = {
    ".lora_a": 1,
    ".lora_a.weight": 0,
    ".A": 1,
    ".lora_down.weight": 0,
    ".lora.down.weight": 0,
    ".lora_linear_layer.down.weight": 0,
    "_lora.down.weight": 0,
    ".lora_A.weight": 0,
    ".hada_w1_b": 0,
}
# How the name of a module's one tensor ends -> its method.
_METHODS: Mapping[str, str] = {
    **dict.fromkeys(_DOWN, "LORA"),
    ".hada_w1_b": "LOHA",
    ".lokr_w1": "LOKR",
    ".lokr_w1_b": "LOKR",
    ".on_input": "IA3",
}
_NUMBERS = ("lora_alpha", "alpha")
# Format -> its pickle, of which only the list of contents is looked at.
_PICKLES: Mapping[str, str] = {"litgpt": LITGPT_WEIGHTS, "torchtune": "adapter_model.pt"}
_PICKLED_TENSOR = re.compile(r".*/data/\d+")


def foreign_facts(source: Source, other_format: Format, problems: list[Problem]) -> AdapterFacts:
    """Return the facts of an adapter in another tool's format; what is wrong with it joins ``problems``."""
    if other_format.name == "gguf":
        return _gguf_facts(source, other_format)
    if isinstance(other_format, UnreadableFormat):
        problems.append(Problem("not-read", f"{other_format.title} is not read.", other_format.way_out))
    pickled = _pickled(source, other_format)
    headers = [] if pickled or not other_format.reads else _headers(source, problems)
    if other_format.reads and not (pickled or headers or problems):
        problems += _no_weights(source, other_format)
    tensors = [info for header in headers for info in header.tensors.values()]
    ranks = _ranks(tensors)
    values = _config(source)
    return AdapterFacts(
        peft_type="LORA" if pickled else _method(tensors),
        base=next((values[key] for key in ("base_model_name_or_path", "model") if _is_text(values.get(key))), None),
        base_revision=None,
        base_digest=None,
        task=None,
        ranks=ranks,
        alpha=_alpha(values),
        options={},
        target_modules=None,
        modules_to_save=None,
        layers=sum(ranks.values()),
        weights=weights_of(headers) if headers else pickled,
        format=other_format.title,
    )


def _pickled(source: Source, other_format: Format) -> Weights | None:
    """Count the tensors of a pickle by the list of what it contains; nothing in it is run."""
    name = _PICKLES.get(other_format.name)
    if name is None or not source.has(name) or (source.file is not None and source.file.name != name):
        return None
    path = source.path(name)
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = [info.file_size for info in archive.infolist() if _PICKLED_TENSOR.fullmatch(info.filename)]
    except (OSError, zipfile.BadZipFile) as error:
        raise CorruptFileError(f"{path} is damaged, or no pickle.", hint=COPY_AGAIN) from error
    return Weights([name], len(sizes), 0, sum(sizes), {})


def _alpha(values: Mapping[str, Any]) -> float | None:
    """Return the alpha that a config says; of MLX-LM's, the one that gives its scale."""
    parameters = values.get("lora_parameters")
    if isinstance(parameters, Mapping) and is_number(parameters.get("scale")) and is_number(parameters.get("rank")):
        return float(parameters["scale"] * parameters["rank"])
    return next((values[key] for key in _NUMBERS if is_number(values.get(key))), None)


def _gguf_facts(source: Source, other_format: Format) -> AdapterFacts:
    from veneer.formats.gguf import adapter_header, base_name

    header = adapter_header(source)
    tensors = list(header.tensors.values())
    ranks = dict(sorted(Counter(info.shape[-1] for info in tensors if info.name.endswith(".lora_b")).items()))
    values: Counter[str] = Counter()
    for info in tensors:
        values[info.dtype] += math.prod(info.shape)
    return AdapterFacts(
        peft_type="LORA",
        base=base_name(header),
        base_revision=None,
        base_digest=None,
        task=None,
        ranks=ranks,
        alpha=header.values.get("adapter.lora.alpha"),
        options={},
        target_modules=None,
        modules_to_save=None,
        layers=sum(ranks.values()),
        weights=Weights([header.path.name], len(tensors), values.total(), header.size, dict(values)),
        format=other_format.title,
    )


def _headers(source: Source, problems: list[Problem]) -> list[Header]:
    names = [source.file.name] if source.file is not None else source.files()
    headers: list[Header] = []
    for name in names:
        if name.endswith(SAFETENSORS):
            try:
                headers.append(read_header(source.path(name)))
            except SourceError as error:
                problems.append(problem_of("damaged", error))
    return headers


def _no_weights(source: Source, other_format: Format) -> list[Problem]:
    """Return the problem of a config without weights, or with weights that are not read."""
    if other_format.name == "mlx":
        from veneer.formats.mlx import no_weights

        return [problem_of("no-weights", no_weights(source))]
    names = [source.file.name] if source.file is not None else source.files()
    if any(name.endswith(tuple(FOREIGN_FILES)) for name in names):
        return []
    return [Problem("no-weights", f"{source.origin}: there is a config and no weights.", "Copy them there.")]


def _ranks(tensors: Iterable[TensorInfo]) -> dict[int, int]:
    """Return rank -> number of modules that have it."""
    counts = Counter(
        info.shape[dimension]
        for info in tensors
        for ending, dimension in _DOWN.items()
        if info.name.endswith(ending) and len(info.shape) > 1
    )
    return dict(sorted(counts.items()))


def _method(tensors: Iterable[TensorInfo]) -> str | None:
    """Return the method, or the methods that a file mixes; ``None`` where the names tell none."""
    names = {method for info in tensors for ending, method in _METHODS.items() if info.name.endswith(ending)}
    return " and ".join(sorted(names)) or None


def _config(source: Source) -> Mapping[str, Any]:
    """Return the config beside the weights; an empty one where there is none that can be read."""
    try:
        return source.json(ADAPTER_CONFIG) if source.file is None and source.has(ADAPTER_CONFIG) else {}
    except SourceError:
        return {}


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)
