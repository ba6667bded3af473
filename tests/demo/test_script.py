"""The demo runs, and fails where a claim does not hold."""

from __future__ import annotations

from pathlib import Path

import pytest

import veneer
from veneer.cli import main
from veneer.demo.facts import STYLES
from veneer.demo.script import Demo, DemoError


@pytest.mark.demo
def test_the_demo_runs(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--quick", "--workspace", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("load report", "merge report", "Arr, matey!", '{"topic":', "µs", "tokens/s", "claims held"):
        assert words in shown
    assert "Did you mean" in shown
    assert (tmp_path / "merged-json" / "model.safetensors").is_file()
    # What the README's examples begin with.
    assert "veneer generate adapters/pirate --base base" in shown
    assert veneer.inspect(tmp_path / "base").kind == "model"
    assert {path.name for path in (tmp_path / "adapters").iterdir()} == set(STYLES)


@pytest.mark.parametrize("make", ["folder", "file"])
def test_a_workspace_of_somebody_elses_is_left_alone(
    make: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "model"
    mine = place / "config.json" if make == "folder" else place
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("{}")
    assert main(["demo", "--quick", "--workspace", str(place)]) == 2
    assert "another --workspace" in capsys.readouterr().err
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == [mine]
    assert mine.read_text() == "{}"


def test_a_claim_that_does_not_hold_ends_it() -> None:
    from rich.console import Console

    demo = Demo(Console(quiet=True), repeats=1)
    demo.claim("true is true", True)
    with pytest.raises(DemoError, match="does not hold: two is three"):
        demo.claim("two is three", False)
    assert demo.claims == ["true is true"]
