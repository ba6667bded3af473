"""The report as Markdown: names from files and arguments are shown as they are, whatever they hold."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest

from tests.benching import examples
from veneer.benching.report import files
from veneer.benching.report.markdown import markdown
from veneer.errors import SourceError

NAMES = ("<img src=x onerror=alert(1)>", "a|b\\|c", "x\n| y |\n\n# Title", "&lt;b&gt; `c` *d* [e](f) ~~g~~ $h$")


def test_names_bring_no_html_and_no_cells() -> None:
    text = markdown(examples.report(examples.setup(NAMES)))
    assert "<" not in text
    assert not re.search(r"&(?!(amp|lt|gt|#124);)", text)
    tables = [line for line in text.splitlines() if line.startswith("|")]
    for block in text.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1
    assert len([line for line in text.splitlines() if line.startswith("# ")]) == 1
    for name in NAMES:
        shown = " ".join(name.split())
        assert any(shown in unescape(row) for row in map(_unquoted, tables))


def _unquoted(row: str) -> str:
    """A row as a reader of Markdown shows it."""
    return re.sub(r"\\([\\`*_\[\]#~$])", lambda m: f"&#{ord(m[1])};", row)


def test_a_run_is_saved_in_its_folder(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    replace(examples.report(), made="../../outside").save(tmp_path / "in" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["out"]
    assert len(list((tmp_path / "in" / "out" / "runs").iterdir())) == 1


def test_the_prompts_are_not_replaced(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    examples.report().save(tmp_path)
    (tmp_path / "prompts.txt").symlink_to("report.md")
    files.check(tmp_path, [tmp_path / "other.txt"])
    with pytest.raises(SourceError, match=r"prompts\.txt is read"):
        files.check(tmp_path, [tmp_path / "prompts.txt"])
