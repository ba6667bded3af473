"""Keys: who calls, what he may do, and how a file of them is read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from veneer.errors import ConfigError, PathNotFoundError, VeneerError
from veneer.serving.auth import ANONYMOUS, Caller, Keys, new_key
from veneer.serving.serving_errors import InvalidApiKeyError, NotAllowedError


def entry(key: str, **values: Any) -> dict[str, Any]:
    return {"id": key, "sha256": hashlib.sha256(key.encode()).hexdigest(), **values}


def written(path: Path, *entries: Any) -> Path:
    path.write_text(json.dumps({"keys": entries}))
    return path


def test_a_key_is_known_by_its_hash_and_has_what_the_file_says(tmp_path: Path) -> None:
    full = {
        "tenant": "acme",
        "scopes": ["infer", "admin"],
        "adapters": ["acme/*", "pirate"],
        "requests_per_minute": 10,
        "tokens_per_minute": 1000,
        "running": 2,
        "expires": "2027-01-31T00:00:00Z",
    }
    keys = Keys(written(tmp_path / "keys.json", entry("one", **full), entry("two")), clock=lambda: 0.0)
    caller = keys.authenticate("Bearer one")
    assert caller == Caller(
        "one", "acme", frozenset({"infer", "admin"}), ("acme/*", "pirate"), 10.0, 1000.0, 2, 1801353600.0
    )
    assert keys.authenticate("bearer  two ").scopes == {"infer"}
    assert b"one" not in json.dumps([list(map(repr, keys._callers))]).encode()


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "one", "Basic one", "Bearer One", "Bearer one one", "Bearer ä\ud800"]
)
def test_no_key_and_no_such_key_are_refused(tmp_path: Path, header: str | None) -> None:
    keys = Keys(written(tmp_path / "keys.json", entry("one")))
    with pytest.raises(InvalidApiKeyError):
        keys.authenticate(header)


def test_a_key_expires(tmp_path: Path) -> None:
    now = [0.0]
    keys = Keys(written(tmp_path / "k", entry("one", expires="1970-01-01T00:01:00")), clock=lambda: now[0])
    keys.authenticate("Bearer one")
    now[0] = 60.0
    with pytest.raises(InvalidApiKeyError, match="expired"):
        keys.authenticate("Bearer one")


def test_reading_again_takes_a_key_away_and_a_damaged_file_changes_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "keys.json", entry("one"), entry("two"))
    keys = Keys(path)
    path.write_text('{"keys": [')
    with pytest.raises(VeneerError):
        keys.reload()
    keys.authenticate("Bearer one")
    written(path, entry("two"))
    keys.reload()
    with pytest.raises(InvalidApiKeyError):
        keys.authenticate("Bearer one")
    keys.authenticate("Bearer two")
    path.unlink()
    with pytest.raises(PathNotFoundError):
        keys.reload()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "no list"),
        ([5], "no object"),
        ([{"id": "a"}], "sha256"),
        ([entry("a", sha256="12")], "sha256"),
        ([entry("a", sha256=None)], "sha256"),
        ([entry("a", id="")], "'id'"),
        ([entry("a", tennant="x")], "unknown field 'tennant'"),
        ([entry("a", scopes="admin")], "list of texts"),
        ([entry("a", scopes=["root"])], "'root'"),
        ([entry("a", adapters=[1])], "list of texts"),
        ([entry("a", adapters=[""])], "list of texts"),
        ([entry("a", requests_per_minute=0)], "above 0"),
        ([entry("a", tokens_per_minute=True)], "above 0"),
        ([entry("a", running="many")], "above 0"),
        ([entry("a", running=0.5)], "whole number"),
        ([entry("a", expires="soon")], "a time"),
        ([entry("a", expires=5)], "a time"),
        ([entry("a", tenant="a/b")], "tenant"),
        ([entry("a"), entry("a")], "twice"),
    ],
)
def test_a_file_that_says_what_is_no_key_is_refused_with_the_place(tmp_path: Path, wrong: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Keys(written(tmp_path / "keys.json", *wrong))


def test_a_new_key_works_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    key, values = new_key("web")
    assert key not in json.dumps(values)
    assert Keys(written(tmp_path / "k", values)).authenticate(f"Bearer {key}").id == "web"
    assert new_key("web")[0] != key


def test_what_a_caller_may_do() -> None:
    admin = Caller("a", "acme", frozenset({"infer", "admin"}), ("acme/*", "pirate"))
    assert admin.may_use("acme/x")
    assert admin.may_use("pirate")
    assert not admin.may_use("other/x")
    assert admin.may_manage("acme/x")
    assert not admin.may_manage("pirate")
    assert not Caller("u", "acme", frozenset({"infer"})).may_manage("acme/x")
    with pytest.raises(NotAllowedError, match="'metrics'"):
        admin.check_scope("metrics")
    assert Keys().authenticate(None) is ANONYMOUS
    assert ANONYMOUS.may_manage("anything/at-all")
