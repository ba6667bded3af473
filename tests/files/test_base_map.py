"""Where a base is that an adapter's config knows by another machine's name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import veneer
from tests.random_adapters import edit_config, saved, saved_base
from veneer.errors import BaseModelError, ConfigError
from veneer.files.base_map import VARIABLE, look_up

ELSEWHERE = "/workspace/models/tiny"


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    monkeypatch.delenv(VARIABLE, raising=False)
    saved_base(tmp_path / "here" / "tiny")
    folder = saved(tmp_path / "adapter")
    edit_config(folder, base_model_name_or_path=ELSEWHERE)
    return folder


def test_without_a_map_the_base_is_not_found(adapter: Path) -> None:
    with pytest.raises(BaseModelError, match="was not found"):
        veneer.load(adapter)
    assert [problem.code for problem in veneer.inspect(adapter).problems] == ["base-not-found"]


@pytest.mark.parametrize("key", [ELSEWHERE, "/workspace/models/"])
@pytest.mark.parametrize("way", ["the usual file", "a file", "the variable"])
def test_a_map_finds_it(adapter: Path, way: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = adapter.parent / "here" / ("tiny" if key == ELSEWHERE else "")
    text = json.dumps({key: str(place), "/workspace/": "/nowhere"})
    if way == "the usual file":
        file = adapter.parent / "settings" / "veneer" / "base_map.json"
        file.parent.mkdir(parents=True)
        file.write_text(text)
    elif way == "a file":
        (adapter.parent / "map.json").write_text(text)
        monkeypatch.setenv(VARIABLE, str(adapter.parent / "map.json"))
    else:
        monkeypatch.setenv(VARIABLE, f"{key}={place}; /workspace/=/nowhere")
    model = veneer.load(adapter)
    assert model.load_report is not None
    assert "the base map says" in model.load_report.base
    assert not veneer.inspect(adapter).problems


def test_a_base_that_is_given_comes_first(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f"{ELSEWHERE}=/nowhere")
    assert veneer.load(adapter, base=adapter.parent / "here" / "tiny").active_adapters == ["default"]
    with pytest.raises(BaseModelError, match="/nowhere"):
        veneer.load(adapter)
    (problem,) = veneer.inspect(adapter).problems
    assert "/nowhere" in problem.message


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": 1}', '{"": "x"}', '{"a": ""}'])
def test_a_map_that_says_nonsense(adapter: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (adapter.parent / "map.json").write_text(text)
    monkeypatch.setenv(VARIABLE, str(adapter.parent / "map.json"))
    with pytest.raises(ConfigError, match="base map"):
        veneer.load(adapter)
    assert [problem.code for problem in veneer.inspect(adapter).problems] == ["base-map"]


def test_a_map_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "/no/such/map.json")
    with pytest.raises(ConfigError, match=r"/no/such/map\.json cannot be read"):
        look_up("x")
    monkeypatch.setenv(VARIABLE, "")
    assert look_up("x") is None
