"""Writes ``docs/methods.md`` from the methods themselves: ``python -m tests.methods.document``.

What a method changes is the first line of its config, its equation and paper begin its module, its tensors and kinds of
layer are the class's, and the rest is what its cases hold the contract to.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import veneer.configs.methods
from tests.methods.case import cases
from tests.methods.checks import recorded
from tests.methods.networks import NETWORKS
from veneer.base_model.sites.conv import ConvSite
from veneer.base_model.sites.embedding import EmbeddingSite
from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.base import config_class
from veneer.methods.base.method import Method
from veneer.methods.base.prompt_method import PROMPT, PromptMethod
from veneer.methods.base.routed_method import RoutedMethod

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "methods.md"
MEASURED = ROOT / "benchmarks" / "results.json"
HEAD = """# The methods

Made by `make methods` from the methods' own files; a test fails when it is not current. What each `peft_type` changes,
on which layers, and what the tests hold it to: outputs as in peft 0.21.2 where that has the method, merged as unmerged,
saved bit for bit as it was loaded. `W`, of shape (out, in), is a layer's weight, and `b` its bias; primed they are what
the adapter makes of them. Compared on: the models whose layers were adapted, and the kinds of layer in a network of
single ones. Unmerged: the time of decoding beside the base's, peft's in parentheses, from
[the benchmark](../benchmarks/RESULTS.md), where it was measured. [What was checked](#what-was-checked) is below.

"""
CHECKED = """## What was checked

By the contract that every method is held to (`tests/methods/test_contract.py`, `test_prompts.py` for prompts): in how
many of a method's cases a check passed. A dash: it does not apply, as merging what has no merged form, or the peer's
merge where that has none. The recorded run had no failure.

"""
APART = """## Tests of their own

What the contract's cases do not fit: tests by hand, which run with the others.

"""
# Method -> its tests, a part of their names, and the networks on which they compare it with peft.
OWN_TESTS: Mapping[str, tuple[str, str, str]] = {
    "BONE": ("tests/methods/test_readings.py", "bone", "llama, as MISS of the same values"),
    "SHADOW": ("tests/methods/test_shadow.py", "", "llama, gpt2, qwen3, opt, gpt_neox"),
    "XLORA": ("tests/methods/test_xlora.py", "", "llama"),
}
TEST = re.compile(r"^def test_(\w+)\(", re.MULTILINE)
COLUMNS = (
    "`peft_type`",
    "changes",
    "linear",
    "convolution",
    "embedding",
    "merges",
    "mixed batch",
    "unmerged",
    "compared on",
)
YES, NO = "yes", "no"
# The network that is no model, and has one layer or two of each kind.
LAYERS = "conv"


def names() -> list[str]:
    """The ``peft_type`` of each of Veneer's own methods."""
    return sorted(module.name.upper() for module in pkgutil.iter_modules(veneer.configs.methods.__path__))


def page() -> str:
    """The text of the page."""
    rows = [_cells(COLUMNS), _cells(["---"] * len(COLUMNS)), *(_cells(_row(name)) for name in names())]
    checked = [CHECKED + "\n\n".join(_tables()), "", APART + "\n".join(map(_apart, OWN_TESTS))]
    return "\n".join([HEAD + "\n".join(rows), "", *map(_section, names()), *checked]) + "\n"


def _tables() -> list[str]:
    """For weights and for prompts: the checks by number, and a row a method."""
    found = recorded()
    prompts = [name for name in found if isinstance(_part("methods", name).METHOD, PromptMethod)]
    return [_table({name: found[name] for name in own}) for own in (sorted(found.keys() - prompts), prompts) if own]


def _apart(name: str) -> str:
    """What a method's tests of its own are called."""
    file, part, _ = OWN_TESTS[name]
    found = [test.replace("_", " ") for test in TEST.findall((ROOT / file).read_text()) if part in test]
    return f"- {name} (`{file}`): {'; '.join(found)}."


def _table(found: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    checks = list(dict.fromkeys(check for own in found.values() for check in own))
    legend = [f"{number}. {check.removeprefix('test_').replace('_', ' ')}" for number, check in enumerate(checks, 1)]
    head = ["`peft_type`", "cases", *(str(number) for number in range(1, len(checks) + 1))]
    rows = [[name, str(count(own)), *(_outcome(own.get(check, {})) for check in checks)] for name, own in found.items()]
    return "\n".join([*legend, "", *(_cells(row) for row in (head, ["---"] * len(head), *rows))])


def count(own: Mapping[str, Mapping[str, int]]) -> int:
    """How many cases a method has: some checks run twice for each."""
    return min(sum(outcomes.values()) for outcomes in own.values())


def _outcome(outcomes: Mapping[str, int]) -> str:
    failed = outcomes.get("failed", 0)
    return f"{failed} failed" if failed else str(outcomes.get("passed", "-"))


def _part(kind: str, name: str) -> Any:
    return importlib.import_module(f"veneer.{kind}.{name.lower()}")


def _cases(name: str) -> list[Any]:
    """The contract's cases of a method: none for one that today's peft does not have."""
    return [case for kind in ("case", "prompt") for method, case in cases(kind) if method == name.lower()]


def _cells(values: Sequence[str]) -> str:
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"


def _row(name: str) -> list[str]:
    method = _part("methods", name).METHOD
    own = _cases(name)
    mixed = all(getattr(case, "rows", True) for case in own)
    return [
        f"[{name}](#{name.lower()})",
        _changes(name),
        *(_adapts(method, kind) for kind in (LinearSite, ConvSite, EmbeddingSite)),
        NO if isinstance(method, (PromptMethod, RoutedMethod)) else YES,
        YES if mixed else NO,
        _overhead(name),
        _compared(name),
    ]


def _compared(name: str) -> str:
    """The networks of a method's cases, and the kinds of layer of the small one that holds all kinds."""
    if name in OWN_TESTS:
        return f"{OWN_TESTS[name][2]} ([its own tests](#tests-of-their-own))"
    own = _cases(name)
    networks = dict.fromkeys(getattr(case, "network", getattr(case, "arch", "")) for case in own)
    targets = {end for case in own if getattr(case, "network", "") == LAYERS for end in case.options["target_modules"]}
    modules = [module for end, module in NETWORKS[LAYERS].make().named_children() if end in targets]
    kinds = dict.fromkeys(type(module).__name__ for module in modules)
    return ", ".join([*(network for network in networks if network != LAYERS), *(f"`{kind}`" for kind in kinds)])


def _overhead(name: str) -> str:
    """Decoding unmerged beside the base, by the benchmark's medians; its labels are the methods' names as written."""
    kept = json.loads(MEASURED.read_text())
    sides = next((kept[key] for key in kept if key.upper() == f"METHODS:{name} 135M BFLOAT16"), {})
    figures = {side: f"{statistics.median(run['decode'] for run in runs):.2f}" for side, runs in sides.items() if runs}
    if "veneer" not in figures:
        return ""
    return figures["veneer"] + (f" ({figures['peft']})" if "peft" in figures else "")


def _adapts(method: Any, kind: type[Site]) -> str:
    if not isinstance(method, Method):
        return NO
    return YES if any(issubclass(kind, own) for own in method.kinds) else NO


def _changes(name: str) -> str:
    """The first sentence of the config's docstring, without the name and paper that begin it."""
    first = inspect.cleandoc(config_class(name, "the page").__doc__ or "").partition("\n\n")[0]
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
    layer = ", ".join(f"`{leaf}`" for leaf in method.disk_names)
    shared = ", ".join(f"`{leaf.name}`" for leaf in getattr(method, "shared", ()))
    return f"Tensors of a layer: {layer}." + (f" Of all layers together: {shared}." if shared else "")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
