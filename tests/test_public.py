"""The public face: names, laziness, docstrings."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest

import veneer
from veneer import errors

REFERENCE = Path(__file__).parent.parent / "docs" / "reference"
ENTRY = re.compile(r"^\.\. (?:auto)?(?:class|data|exception|function):: (\w+)$", re.MULTILINE)


def test_every_public_name_exists_and_is_described() -> None:
    assert list(veneer.__all__) == sorted(veneer.__all__)
    for name in veneer.__all__:
        assert getattr(veneer, name).__doc__, name
    assert set(veneer.__all__) <= set(dir(veneer))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = veneer.nothing  # type: ignore[attr-defined]


def test_each_public_name_stands_on_one_page_of_the_reference() -> None:
    entries = Counter(name for page in REFERENCE.glob("*.rst") for name in ENTRY.findall(page.read_text("utf-8")))
    missing, unknown = set(veneer.__all__) - entries.keys(), entries.keys() - set(veneer.__all__)
    assert not missing, f"add them to a page of docs/reference, such as `.. autofunction:: name`: {sorted(missing)}"
    assert not unknown, f"these are not public: {sorted(unknown)}"
    assert set(entries.values()) == {1}


def test_the_version_is_the_packages() -> None:
    assert veneer.__version__ == version("veneer")


def test_every_error_is_public_and_drawn_in_the_tree() -> None:
    family = {
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert family == {name for name in veneer.__all__ if name.endswith("Error")}
    assert errors.__doc__ is not None
    for name in family:
        assert issubclass(getattr(errors, name), errors.VeneerError)
        assert name in errors.__doc__


def test_an_error_says_what_and_how_to_mend_it() -> None:
    error = errors.PathNotFoundError("There is no x.", hint="Try y.")
    assert (str(error), error.message, error.hint) == ("There is no x. Try y.", "There is no x.", "Try y.")
    assert isinstance(error, FileNotFoundError)
    assert isinstance(errors.ConfigError("x"), ValueError)
    assert isinstance(errors.UsageError("x"), errors.ConfigError)  # what a command's mistakes raised earlier


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, veneer; print([m for m in ('torch', 'transformers', 'numpy', 'rich') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
