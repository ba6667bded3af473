"""``docs/from-peft.md`` is true: its names and modules are those of peft and are there, and its first example runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import peft

import veneer
from tests.as_peft.process import ROOT, run
from tests.test_docs import blocks, world

__all__ = ["world"]

PAGE = ROOT / "docs" / "from-peft.md"
ROW = re.compile(r"^\| (`.+`) \| (.+) \|$", re.MULTILINE)


def section(title: str) -> str:
    return PAGE.read_text(encoding="utf-8").partition(f"# {title}\n")[2].partition("\n## ")[0]


def test_the_table_has_every_name_of_peft_once() -> None:
    rows = ROW.findall(section("Names").partition("### Modules")[0])
    names = [name for listed, _ in rows for name in re.findall(r"`(\w+)`", listed)]
    assert sorted(names) == sorted(peft.__all__)
    same = {n for listed, what in rows if what.startswith("the same") for n in re.findall(r"`(\w+)`", listed)}
    assert same <= set(veneer.__all__)
    assert not (set(names) - same) & set(veneer.__all__)


def test_the_versions_are_those_of_the_figures() -> None:
    told = dict(re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|", section("Clients"), re.MULTILINE))
    told |= dict(re.findall(r"(torch|peft) ([\d.]+\d)", section("Clients")))
    recorded = json.loads((ROOT / "tests" / "clients" / "recorded.json").read_text())["versions"]
    names = {"TRL": "trl", "lm-eval": "lm_eval"}
    assert {names.get(name, name): version for name, version in told.items()} == {
        name: version.partition("+")[0] for name, version in recorded.items() if name != "datasets"
    }


def test_the_tests_of_clients_are_there() -> None:
    files = {path.name for path in (ROOT / "tests" / "clients").glob("test_*.py")}
    named = set(re.findall(r"`(test_\w+\.py)`", section("Clients")))
    assert named
    assert named <= files


def test_the_table_has_every_module() -> None:
    code = """
    import veneer.as_peft
    from veneer.as_peft.names import METHOD_STEMS, MODULES, PROMPT_CLASSES
    methods = tuple(f"peft.tuners.{name}" for name in (*METHOD_STEMS, *PROMPT_CLASSES))
    print(*(name for name in MODULES if not name.startswith(methods) and name != "peft"))
    """
    listed = set(re.findall(r"`(peft[\w.]+)`", section("Modules")))
    found = run(code, "-c").stdout.split()
    assert found
    assert not [name for name in found if name not in listed and "._" not in name]


def test_the_import_means_veneer(world: Path, tmp_path: Path) -> None:
    """The examples with other libraries are run by tests/clients."""
    [code] = blocks(PAGE, "python as_peft")
    here = tmp_path / "docs"
    shutil.copytree(world, here)
    done = run(f"import os\nos.chdir({str(here)!r})\n{code}", "-c")
    assert done.returncode == 0, done.stderr[-3000:]
