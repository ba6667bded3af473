"""The map of the source is true: its picture is the contract's, and what it names is there."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

import veneer.extending as extending

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "veneer"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STOPS = re.findall(r"`([\w/]+\.py)` · `([\w.]+)`", PAGE)


def drawing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_layers", ROOT / "tools" / "draw_layers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def defined(tree: ast.AST) -> set[str]:
    """The classes and functions of a module, and of its classes."""
    own = {node.name: node for node in ast.iter_child_nodes(tree) if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    return own.keys() | {f"{name}.{inner}" for name, node in own.items() for inner in defined(node)}


def test_the_picture_is_the_contract() -> None:
    module = drawing()
    assert module.PICTURE.read_text(encoding="utf-8") == module.picture(), "run `make architecture`"


def test_every_room_is_told() -> None:
    rooms = {room for layer in drawing().layers() for room in layer}
    assert {path.stem for path in SOURCE.iterdir() if path.suffix in ("", ".py") and path.stem[0] != "_"} == rooms
    for room in rooms:
        assert re.search(rf"`{room}(/|\.py)`", PAGE), room


@pytest.mark.parametrize(("file", "name"), STOPS)
def test_each_stop_is_there(file: str, name: str) -> None:
    assert name in defined(ast.parse((SOURCE / file).read_text(encoding="utf-8")))


def test_each_way_has_its_stops() -> None:
    ways = PAGE[PAGE.index("## The ways of the data") :].split("\n**")[1:]
    assert len(ways) == 5
    for way in ways:
        assert 6 <= len(re.findall(r"^\d+\. ", way, re.MULTILINE)) <= 10


def test_few_modules_lie_flat_and_no_class_name_stands_twice() -> None:
    assert len([path for path in SOURCE.glob("*.py") if path.stem != "__init__"]) <= 8
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCE.rglob("*.py")]
    names = Counter(node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef))
    assert not [name for name, count in names.items() if count > 1]


def test_the_names_for_other_peoples_methods() -> None:
    assert list(extending.__all__) == sorted(extending.__all__)
    for name in extending.__all__:
        assert getattr(extending, name).__doc__, name
