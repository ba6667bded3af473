"""Writes ``docs/methods.md`` from the methods themselves: ``python -m tests.methods.document``.

What a method changes is the first line of its config, its equation and paper begin its module, its tensors and kinds of
layer are the class's, and the rest is what its cases hold the contract to.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import veneer.configs
from veneer.methods.method import Method
from veneer.methods.prompt import PROMPT, PromptMethod
from veneer.methods.routed import RoutedMethod
from veneer.sites import Site
from veneer.sites.conv import ConvSite
from veneer.sites.embedding import EmbeddingSite
from veneer.sites.linear import LinearSite

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
HEAD = """# The methods

Made by `make methods` from the methods' own files; a test fails when it is not current. What each `peft_type` changes,
on which layers, and what the tests hold it to: outputs as in peft 0.21.2 where that has the method, merged as unmerged,
saved bit for bit as it was loaded. `W`, of shape (out, in), is a layer's weight, and `b` its bias; primed they are what
the adapter makes of them.

"""
COLUMNS = ("`peft_type`", "changes", "linear", "convolution", "embedding", "merges", "mixed batch", "compared on")
YES, NO = "yes", "no"


def names() -> list[str]:
    """The ``peft_type`` of each of Veneer's own methods."""
    return sorted(module.name.upper() for module in pkgutil.iter_modules(veneer.configs.__path__))


def page() -> str:
    """The text of the page."""
    rows = [_cells(COLUMNS), _cells(["---"] * len(COLUMNS)), *(_cells(_row(name)) for name in names())]
    return HEAD + "\n".join(rows) + "\n\n" + "\n".join(map(_section, names()))


def _part(kind: str, name: str) -> Any:
    return importlib.import_module(f"veneer.{kind}.{name.lower()}")


def _cases(name: str) -> list[Any]:
    """The contract's cases of a method: none for one that today's peft does not have."""
    for prefix in ("case", "prompt"):
        if (Path(__file__).parent / f"{prefix}_{name.lower()}.py").exists():
            return list(importlib.import_module(f"tests.methods.{prefix}_{name.lower()}").CASES)
    return []


def _cells(values: Sequence[str]) -> str:
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"


def _row(name: str) -> list[str]:
    method = _part("methods", name).METHOD
    cases = _cases(name)
    networks = dict.fromkeys(getattr(case, "network", getattr(case, "arch", "")) for case in cases)
    mixed = all(getattr(case, "rows", True) for case in cases)
    return [
        f"[{name}](#{name.lower()})",
        _changes(name),
        *(_adapts(method, kind) for kind in (LinearSite, ConvSite, EmbeddingSite)),
        NO if isinstance(method, (PromptMethod, RoutedMethod)) else YES,
        YES if mixed else NO,
        ", ".join(networks) or "tests of its own",
    ]


def _adapts(method: Any, kind: type[Site]) -> str:
    if not isinstance(method, Method):
        return NO
    return YES if any(issubclass(kind, own) for own in method.kinds) else NO


def _changes(name: str) -> str:
    """The first sentence of the config's docstring, without the name and paper that begin it."""
    first = inspect.cleandoc(_part("configs", name).CONFIG.__doc__).partition("\n\n")[0]
    return " ".join(first.partition(": ")[2].split()).removesuffix(".").replace("``", "`")


def _section(name: str) -> str:
    module = _part("methods", name)
    text = f"## {name}\n\n{_upright(inspect.cleandoc(module.__doc__))}\n\n{_tensors(module.METHOD)}\n"
    differs = dict.fromkeys(c.ours_differs for c in _cases(name) if getattr(c, "ours_differs", None))
    return text + "".join(f"\nWhere peft differs: {reason}.\n" for reason in differs)


def _upright(text: str) -> str:
    """A docstring as Markdown: code between single backticks, the equation and other blocks between fences."""
    found: list[str] = []
    for index, paragraph in enumerate(text.split("\n\n")):
        # A formatter moves an equation that ends its docstring to the margin; it is the second paragraph everywhere.
        block = index == 1 or paragraph.startswith("    ")
        plain = inspect.cleandoc(paragraph.replace("``", "")) if block else paragraph.replace("``", "`")
        found.append(f"```text\n{plain}\n```" if block else plain)
    return "\n\n".join(found)


def _tensors(method: Any) -> str:
    if isinstance(method, PromptMethod):
        return f"Tensors: `{PROMPT}`."
    layer = ", ".join(f"`{leaf}`" for leaf in method.leaves)
    shared = ", ".join(f"`{leaf}`" for leaf in method.shared)
    return f"Tensors of a layer: {layer}." + (f" Of all layers together: {shared}." if shared else "")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
