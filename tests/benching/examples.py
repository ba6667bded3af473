"""Runs with made-up figures, for what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veneer.benching.bench_report import BenchReport
from veneer.benching.decide.cost_model import Requirements
from veneer.benching.decide.recommendation import recommend
from veneer.benching.result import Fidelity, Figure, Machine, MeasuredAdapter, Perplexity, Setup

# How repeated times of a quiet machine lie around their median.
JITTER = (1.0, 1.002, 0.998, 1.001, 0.999)
NAMES = ("pirate", "json", "brief")


def setup(names: Sequence[str] = NAMES, kind: str = "causal", **changes: Any) -> Setup:
    """A small model and its adapters."""
    facts = tuple(MeasuredAdapter(name, f"adapters/{name}", "LORA", 2_000_000, 210) for name in names)
    text = kind != "forward"
    values = {
        "path": "adapters",
        "base": "base",
        "model_class": "LlamaForCausalLM",
        "kind": kind,
        "unit": "token" if text else "image",
        "parameters": 134_515_008,
        "dtype": "bfloat16",
        "device": "cpu",
        "adapters": facts,
        "batch": (1, 8),
        "lengths": (128,) if text else (),
        "new_tokens": 33 if text else 0,
        "repeats": 5,
        "prompts": "random token ids",
    }
    return Setup(**{**values, **changes})


def figures(
    of: Setup,
    unmerged: float = 1.1,
    mixed: float = 1.2,
    merge: float = 0.1,
    jitter: Any = JITTER,
    resident: float | None = None,
) -> Any:
    """Times of a model that decodes a row in 20 ms and eight in 27, and a factor for each variant."""
    factors = {"base": 1.0, "merged": 1.0, "unmerged": unmerged}
    if resident is not None:
        factors["resident"] = resident
    if len(of.adapters) > 1:
        factors |= {"switching": unmerged, "mixed": mixed}
    found = []

    def add(quantity: str, variant: str, value: float, unit: str = "s", batch: Any = None, length: Any = None) -> None:
        samples = tuple(value * j for j in (jitter if unit == "s" else (1.0,)))
        found.append(Figure(quantity, variant, unit, samples, batch, length))

    for variant, factor in factors.items():
        for batch in of.batch:
            if variant == "mixed" and batch == 1:
                continue
            for length in of.lengths or (None,):
                step = factor * (0.019 + 0.001 * batch)
                if of.kind == "forward":
                    add("forward", variant, step, "s", batch, length)
                    continue
                add("decode", variant, step, "s", batch, length)
                add("first", variant, factor * 0.001 * batch * (length or 100), "s", batch, length)
    add("merge", "merged", merge)
    add("unmerge", "merged", merge / 100)
    add("attach", "unmerged", 0.01)
    if resident is not None:
        add("keep", "resident", merge)
    for variant, load in (("base", 0.4), ("unmerged", 0.42), ("merged", 0.6)):
        add("load", variant, load)
        add("peak", variant, 8e8, "B")
        add("serving", variant, 9e8 if variant == "merged" else 7e8, "B")
    for variant in ("base", "merged"):
        add("weights", variant, 270_000_000, "B")
        add("disk", variant, 270_000_000, "B")
    add("weights", "kept", 210_000_000, "B")
    for adapter in of.adapters:
        add("weights", f"adapter {adapter.name}", adapter.nbytes, "B")
    return tuple(found)


def fidelity(of: Setup, agreement: float = 1.0) -> tuple[Fidelity, ...]:
    """Merged against unmerged."""
    texts = None if of.kind == "forward" else round(8 * agreement)
    return tuple(Fidelity(adapter.name, 8, 400, 0.01, 0.02, agreement, texts) for adapter in of.adapters)


def requirements(of: Setup, **changes: Any) -> Requirements:
    """Equal traffic, plenty of memory."""
    traffic = {adapter.name: 1 / len(of.adapters) for adapter in of.adapters}
    return Requirements(**{"traffic": traffic, "memory": 16e9, "in_flight": 8, **changes})


def report(
    of: Setup | None = None,
    agreement: float = 1.0,
    limits: Any = None,
    perplexity: Sequence[Perplexity] = (),
    **changes: Any,
) -> BenchReport:
    """A whole run."""
    of = of or setup()
    measured, compared = figures(of, **changes), fidelity(of, agreement)
    return BenchReport(
        made="2026-01-31T12:00:00+00:00",
        setup=of,
        machine=Machine("A Processor", 2, 2, 16 * 10**9, None, "Linux x86_64", {"python": "3.11.2", "torch": "2.13.0"}),
        figures=measured,
        fidelity=compared,
        recommendation=recommend(of, measured, compared, requirements(of, **(limits or {})), (), perplexity),
        seconds=65.0,
        perplexity=tuple(perplexity),
    )
