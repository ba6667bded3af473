"""Keys over HTTP: every address but two is behind them, and each key sees what it may."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.fake_engine import served
from tests.serving.http_service import call, one_adapter_service
from veneer.serving.auth import Keys, new_key

CHAT = {"model": "a", "messages": [{"role": "user", "content": "w1"}], "max_tokens": 2}
ROUTES = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/compare"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/a"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/adapters"),
    ("GET", "/v1/adapters/a"),
    ("POST", "/v1/adapters"),
    ("DELETE", "/v1/adapters/a"),
    ("POST", "/v1/adapters/a/pin"),
    ("POST", "/v1/adapters/a/unpin"),
    ("POST", "/v1/adapters/a/warm"),
    ("POST", "/v1/adapters/a/rollback"),
    ("POST", "/v1/adapters/a/alias"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("GET", "/metrics"),
]


def bearer(key: str) -> str:
    return f"Bearer {key}"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The file, and name -> key."""
    made = {name: new_key(name) for name in ("user", "admin", "scraper", "other")}
    entries = {name: entry for name, (_, entry) in made.items()}
    entries["admin"]["scopes"] = ["infer", "admin"]
    entries["scraper"]["scopes"] = ["metrics"]
    entries["other"]["adapters"] = ["other/*"]
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    file.write_text(json.dumps({"keys": list(entries.values())}))
    return file, {name: key for name, (key, _) in made.items()}


@pytest.fixture(scope="module")
def url(keys: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    service = one_adapter_service(tmp_path_factory.mktemp("adapter"), Keys(keys[0]), hosts=None)
    with served(service) as url:
        yield url


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_all_else_is_behind_a_key(url: str, method: str, path: str) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic dTpw"}):
        reply = call(url, method, path, {} if method == "POST" else None, **headers)
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"


def test_health_needs_none(url: str) -> None:
    assert call(url, "GET", "/health").status == 200
    assert call(url, "GET", "/ready").status == 200


def test_scopes(url: str, keys: tuple[Path, dict[str, str]]) -> None:
    def status(name: str, method: str, path: str, body: object = None) -> int:
        return call(url, method, path, body, authorization=bearer(keys[1][name])).status

    assert status("user", "POST", "/v1/chat/completions", CHAT) == 200
    assert status("user", "GET", "/v1/adapters") == 403
    assert status("user", "GET", "/metrics") == 403
    assert status("scraper", "GET", "/metrics") == 200
    assert status("scraper", "POST", "/v1/chat/completions", CHAT) == 403
    assert status("admin", "GET", "/v1/adapters") == 200
    assert status("admin", "GET", "/metrics") == 200


def test_an_adapter_that_a_key_may_not_use_is_not_there(url: str, keys: tuple[Path, dict[str, str]]) -> None:
    other = bearer(keys[1]["other"])
    assert call(url, "GET", "/v1/models", authorization=other).json["data"] == []
    assert call(url, "GET", "/v1/models/a", authorization=other).status == 404
    assert call(url, "POST", "/v1/chat/completions", CHAT, authorization=other).status == 404


def test_a_key_does_for_any_host(url: str, keys: tuple[Path, dict[str, str]]) -> None:
    reply = call(url, "GET", "/v1/models", authorization=bearer(keys[1]["user"]), host="serve.example")
    assert reply.status == 200
