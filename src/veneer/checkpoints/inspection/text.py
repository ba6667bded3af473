"""Shows an inspection on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import RenderableType
from rich.text import Text

from veneer.checkpoints.inspection.facts import PEFT, AdapterFacts, ModelFacts, PathFacts, Weights
from veneer.printing import nbytes, panel, printable

_TITLES = {"model": "full model", "adapter": "adapter", "model+adapter": "full model and adapter", "unknown": "unknown"}
_BORDERS = {"model": "green", "adapter": "cyan", "model+adapter": "yellow", "unknown": "red"}


def as_panel(inspection: PathFacts) -> RenderableType:
    """Make a panel of one row a fact, and one a problem."""
    problems = [
        (Text("problem", "yellow"), Text.assemble(printable(problem.message), " ", (printable(problem.hint), "dim")))
        for problem in inspection.problems
    ]
    kind = "set of adapters" if inspection.adapters else _TITLES[inspection.kind]
    title = Text.assemble((printable(inspection.path), "bold"), f": {kind}")
    return panel(title, [*_facts(inspection), *problems], border=_BORDERS[inspection.kind])


def _facts(inspection: PathFacts) -> Iterable[tuple[str, str]]:
    if inspection.adapter is not None:
        yield from _adapter(inspection.adapter)
    if inspection.model is not None:
        yield from _model(inspection.model)
    for name, member in inspection.adapters.items():
        yield f"in {name}/", _one_line(member)
    if inspection.commit:
        yield "commit", inspection.commit
    if inspection.memory is not None:
        yield "memory", f"{nbytes(inspection.memory)} to load it" + (" with its base" if inspection.adapter else "")
    elif inspection.next_command and inspection.kind == "adapter":
        yield "memory", "its base is not on this machine"
    if inspection.next_command:
        yield "next", inspection.next_command


def _adapter(facts: AdapterFacts) -> Iterable[tuple[str, str]]:
    if facts.format != PEFT:
        yield "format", facts.format
    yield "method", f"{facts.peft_type or 'unknown'}" + (f" for {facts.task}" if facts.task else "")
    yield "base", (facts.base or "not named") + (f" at {facts.base_revision}" if facts.base_revision else "")
    if facts.base_digest:
        yield "base digest", facts.base_digest
    if facts.ranks:
        alpha = f", alpha {_number(facts.alpha)}" if facts.alpha is not None else ""
        yield "rank", _counts(facts.ranks, "layers") + alpha
    for name, value in facts.options.items():
        yield name, str(value)
    if facts.target_modules:
        targets = facts.target_modules
        yield "targets", targets if isinstance(targets, str) else ", ".join(targets)
    if facts.modules_to_save:
        yield "whole modules", ", ".join(facts.modules_to_save)
    if facts.virtual_tokens:
        yield "virtual tokens", str(facts.virtual_tokens)
    if facts.layers:
        yield "layers", f"{facts.layers} adapted"
    yield "weights", _weights(facts.weights)


def _model(facts: ModelFacts) -> Iterable[tuple[str, str]]:
    kind = facts.architecture or "unknown class"
    yield "model", f"{kind} ({facts.model_type})" if facts.model_type else kind
    if facts.quantization:
        yield "quantised", str(facts.quantization.get("quant_method", "yes"))
    if facts.tied_embeddings is not None:
        yield "embeddings", "tied" if facts.tied_embeddings else "not tied"
    yield "weights", _weights(facts.weights)


def _weights(weights: Weights | None) -> str:
    if weights is None:
        return "cannot be read"
    dtypes = _counts(weights.dtypes, "values") if len(weights.dtypes) > 1 else "".join(weights.dtypes)
    counted = f"{weights.parameters:,} parameters in {weights.tensors} tensors, {dtypes}"
    return (
        f"{counted if dtypes else f'{weights.tensors} tensors'}, {nbytes(weights.nbytes)} in "
        f"{len(weights.files)} file{'s' if len(weights.files) != 1 else ''}"
    )


def _one_line(inspection: PathFacts) -> str:
    facts = inspection.adapter
    if facts is None:
        return inspection.kind
    parts = [facts.peft_type or "unknown", f"rank {_counts(facts.ranks, 'layers')}" if facts.ranks else ""]
    parts.append(f"{facts.layers} layers, {nbytes(facts.weights.nbytes)}" if facts.weights else "no weights")
    return ", ".join(part for part in parts if part)


def _counts(counts: Mapping[int, int] | Mapping[str, int], what: str) -> str:
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{value} ({number:,} {what})" for value, number in counts.items())


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
