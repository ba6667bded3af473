"""``veneer serve``: what it refuses before anything is loaded."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from tests.cli.conftest import Result
from veneer.cli.generate_command import generate
from veneer.cli.serve_command import serve as command
from veneer.serving import server
from veneer.serving.auth import Keys
from veneer.serving.server_options import ServerOptions

REFUSED: dict[str, tuple[list[str], str]] = {
    "no base": ([], "There is no base to serve."),
    "another address": (["base", "--host", "0.0.0.0"], "--api-keys FILE"),
    "a name for all addresses": (["base", "--host", "serve.example"], "--insecure"),
    "an adapter without a name": (["base", "--adapter", "adapters/pirate"], "NAME=SOURCE"),
    "an adapter without a source": (["base", "--adapter", "pirate="], "NAME=SOURCE"),
    "ranks": (["base", "--rank-buckets", "8,many"], "are no ranks"),
    "a name given twice": (["base", "--adapter", "a=x", "--adapter", "a=y"], "'a' twice"),
    "no folder": (
        ["base", "--adapters", "none"],
        "none is no folder: it does not exist. There is no 'none'",
    ),
    "a folder beside": (["base", "--adapters", "shelves"], "does not exist. Did you mean shelf?"),
    "a file of adapters": (["base", "--adapters", "shelf/notes.txt"], "is no folder: it is a file. Give the folder"),
    "an adapter of adapters": (
        ["base", "--adapters", "shelf/pirate"],
        "is one adapter. Give --adapter NAME=",
    ),
    "an adapter beside": (
        ["base", "--adapter", "a=shelf/pirat"],
        "Did you mean shelf/pirate? If the hub's is",
    ),
    "an adapter beside of a path": (["base", "--adapter", "a=./pirat"], "./pirat does not exist. There is no 'pirat'"),
    "a file as an adapter": (
        ["base", "--adapter", "a=shelf/notes.txt"],
        "is a file. Give its folder, shelf.",
    ),
    "no adapter": (["base", "--adapter", "a=shelf/empty"], "has no adapter_config.json, so it is no adapter. Give the"),
    "several adapters": (["base", "--adapter", "a=shelf"], "Did you mean shelf/pirate? `--adapters shelf` serves each"),
    "an adapter of nobody": (["base", "--adapter", "a=~nobody-here/x"], "cannot be looked up"),
    "no config": (["--config", "shlf"], "cannot be read: No such file or directory. Did you mean shelf?"),
    "a config that is a folder": (["--config", "shelf"], "cannot be read: Is a directory. Give a TOML file."),
    "a store that is a file": (["base", "--store", __file__], "is no folder"),
    "sources without changes": (["base", "--allow-source", "hf://a/*"], "--allow-runtime-adapters"),
    "a digest without changes": (["base", "--require-digest"], "--allow-runtime-adapters"),
    "no seconds for a step": (["base", "--step-timeout", "0"], "--step-timeout"),
    "no seconds for a source": (["base", "--load-timeout", "0"], "--load-timeout"),
    "no seconds for an answer": (["base", "--request-timeout", "0"], "--request-timeout"),
    "a dtype": (["base", "--dtype", "int3"], "int3"),
    "a flag that is none": (["base", "--metric-port", "1"], "--metric"),
    "one port for two": (["base", "--metrics-port", "8000"], "is the --port"),
    "a port": (["base", "--port", "70000"], "70000"),
    "threads": (["base", "--threads", "99999999999999"], "--threads"),
    "slots": (["base", "--slots", "99999999999"], "--slots"),
    "a device": (["base", "--device", "nope"], "--device 'nope' cannot be used"),
    "a device without numbers": (["base", "--device", "meta"], "--device 'meta' cannot be used"),
    "a cache beyond the memory": (["base", "--kv-bytes", "1000TB"], "--kv-bytes is 1000.0 TB"),
    "a key without a name": (["--new-key", " "], "needs a name"),
    "seconds": (["base", "--drain", "nan"], "no number"),
    "a source of the web": (["base", "--allow-runtime-adapters", "--allow-source", "https://a/*"], "cannot be allowed"),
    "a cluster without replicas": (["base", "--ray-address", "auto"], "Add --replicas N"),
    "a cluster without a store": (["base", "--replicas", "2", "--ray-address", "auto"], "all machines share"),
    "a device of its own": (["base", "--replicas", "2", "--device", "cuda:1"], "Say cuda."),
    "keys that are not there": (["base", "--api-keys", "none.json"], "none.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_option_is_told_at_once(
    case: str, run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("shelf/pirate/adapter_config.json", "shelf/notes.txt", "shelf/empty/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    installed = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: name == "ray" or installed(name, *more))
    arguments, text = REFUSED[case]
    result = run("serve", *arguments)
    assert result.code == 2
    assert text in result.err
    assert result.err.count("\n") == 1


NUMBERS = [option for option in command.params if option.type.name in ("integer range", "float range", "choice")]
SIZES = [option for option in command.params if option.metavar == "SIZE"]


@pytest.mark.parametrize("value", ["-1", "x", "nan"])
@pytest.mark.parametrize("option", [*NUMBERS, *SIZES], ids=lambda option: str(option.name))
def test_what_is_no_number_is_told_with_the_name_of_its_option(
    option: click.Parameter, value: str, run: Callable[..., Result]
) -> None:
    result = run("serve", "base", option.opts[0], value)
    assert result.code == 2
    assert option.opts[0] in result.err
    assert result.err.count("\n") == 1


def test_the_pages_tell_of_each_option() -> None:
    assert len(NUMBERS) > 15
    assert len(SIZES) > 3
    pages = "".join(page.read_text() for page in (Path(__file__).parents[2] / "docs").glob("serve*.md"))
    names = [option.opts[0] for option in command.params]
    assert [name for name in names if not re.search(rf"{name}(?![\w-])", pages)] == []


def test_a_port_that_is_taken(made: Path, run: Callable[..., Result]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for option in ("--port", "--metrics-port"):
            result = run("serve", made / "base", "--port", "0", option, str(taken.getsockname()[1]))
            assert result.code == 2
            assert "cannot be listened on" in result.err
            assert f"Give another --host or {option}." in result.err


def test_a_host_that_is_no_name(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **options: host.encode("idna"))
    for host in ("a" * 100, "x..y"):
        result = run("serve", "base", "--insecure", "--host", host)
        assert result.code == 2
        assert f"{host}:8000 cannot be listened on" in result.err
        assert result.err.count("\n") == 1


def test_the_extra_is_named_where_it_is_missing(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def find_spec(name: str, *more: Any) -> Any:
        return None if name in ("fastapi", "prometheus_client") else found(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    result = run("serve", "base")
    assert result.code == 2
    assert "fastapi and prometheus-client" in result.err
    assert ".[serve]" in result.err


def test_the_extra_of_replicas_is_named_too(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    installed = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "ray" else installed(name))
    result = run("serve", "base", "--replicas", "2")
    assert result.code == 2
    assert "veneer serve --replicas needs ray[serve], which is not installed." in result.err
    assert "pip install 'ray[serve]'" in result.err
    assert "'.[ray]'" in result.err


def test_a_new_key_is_one_that_the_file_takes(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run("serve", "--new-key", "laptop")
    key, entry = (line.partition(": ")[2] for line in result.out.splitlines())
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [json.loads(entry)]}))
    assert Keys(tmp_path / "keys.json").authenticate(f"Bearer {key}").id == "laptop"


def test_options_come_from_the_environment_too(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_SERVE_HOST", "0.0.0.0")
    assert "0.0.0.0" in run("serve", "base").err


def test_a_variable_has_the_name_of_its_flag(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described: list[ServerOptions] = []
    monkeypatch.setattr(server, "run_server", lambda options, *_: described.append(options))
    (tmp_path / "many" / "c").mkdir(parents=True)
    (tmp_path / "many" / "c" / "adapter_config.json").write_text("{}")
    monkeypatch.setenv("VENEER_SERVE_API_KEYS", "keys.json")
    monkeypatch.setenv("VENEER_SERVE_ADAPTER", "a=hf://acme/a b=hf://acme/b")
    monkeypatch.setenv("VENEER_SERVE_ADAPTERS", str(tmp_path / "many"))
    assert run("serve", "base").code == 0
    [given] = described
    assert given.keys == Path("keys.json")
    assert [registration.name for registration in (*given.adapters, *given.found)] == ["a", "b", "c"]
    assert {option.envvar for option in generate.params} == {None}


def test_options_come_from_a_file_too(run: Callable[..., Result], tmp_path: Path) -> None:
    pytest.importorskip("tomllib")
    file = tmp_path / "serve.toml"

    def told(text: str, *more: str) -> str:
        file.write_text(text)
        return run("serve", "--config", file, *more).err

    assert "0.0.0.0" in told('base = "base"\nhost = "0.0.0.0"\nslots = 8')
    assert "'a' twice" in told('base = "base"\nadapter = ["a=x", "a=y"]')
    assert "There is no base" in told("ui = true\nqueue-age = 3.5")
    assert "serve.example" in told('base = "base"\nhost = "0.0.0.0"', "--host", "serve.example")
    assert "Did you mean 'port'?" in told("prt = 1")
    assert "no TOML" in told("port =")
    assert "cannot be read" in run("serve", "--config", tmp_path / "none").err
    assert "70000" in told('base = "base"\nport = 70000')


@pytest.mark.parametrize(
    "line",
    ["base = []", "port = [1]", "port = {a = 1}", "port = true", "port = 2027-01-01", "port = 80.5", "ui = 3",
     'ui = "maybe"', 'adapter = "a=x"', "adapter = [1]", "adapter = 5", 'adapter = {a = "x"}', "api-keys = []",
     'config = "x"', "help = true", "[serve]", "host-bytes = [5]", "rank-buckets = [8]"],
)  # fmt: skip
def test_a_wrong_value_in_a_file_is_told_in_one_line(line: str, run: Callable[..., Result], tmp_path: Path) -> None:
    pytest.importorskip("tomllib")
    file = tmp_path / "serve.toml"
    file.write_text(line)
    result = run("serve", "base", "--config", file)
    assert result.code == 2
    assert line.partition(" ")[0].strip("[]") in result.err
    assert result.err.count("\n") == 1


def test_a_log_cannot_steer_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    from veneer.cli.serve_command import _log_as

    loggers = [logging.getLogger(name) for name in ("veneer", "uvicorn", "py.warnings")]
    for logger in loggers:
        for name in ("handlers", "level", "propagate"):
            monkeypatch.setattr(logger, name, [] if name == "handlers" else getattr(logger, name))
    try:
        _log_as("text")
        try:
            raise ValueError("\x1b[31m")
        except ValueError:
            loggers[0].exception("\x1b]0;title\x07 and\nanother line")
    finally:
        logging.captureWarnings(False)
    first, *traceback = capsys.readouterr().err.splitlines()
    assert first.endswith("ERROR \\x1b]0;title\\x07 and another line")
    assert traceback[-1] == "ValueError: \\x1b[31m"


def test_options_reach_what_they_are_for(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    described: list[ServerOptions] = []
    monkeypatch.setattr(server, "run_server", lambda options, *_: described.append(options))
    flags = ["--allow-runtime-adapters", "--require-digest", "--load-timeout=5", "--step-timeout=7.5"]
    assert run("serve", "base", *flags, "--metrics-adapters=3").code == 0
    assert run("serve", "base").code == 0
    given, default = described
    assert (given.registry.require_digest, given.registry.load_timeout) == (True, 5)
    assert (given.engine.step_timeout, given.metrics_adapters) == (7.5, 3)
    assert (default.registry.require_digest, default.registry.load_timeout) == (False, 120)
    assert (default.engine.step_timeout, default.metrics_adapters) == (30, 50)


def test_options_of_a_file_reach_it_too(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tomllib")
    described: list[ServerOptions] = []
    monkeypatch.setattr(server, "run_server", lambda options, *_: described.append(options))
    lines = ["step-timeout = 7.5", "load-timeout = 5", "metrics-port = 0", "metrics-adapters = 3"]
    switches = ["allow-runtime-adapters = true", "require-digest = true"]
    (tmp_path / "serve.toml").write_text("\n".join([*lines, *switches]))
    monkeypatch.setenv("VENEER_SERVE_LOAD_TIMEOUT", "6")
    assert run("serve", "base", "--config", tmp_path / "serve.toml").code == 0
    [given] = described
    assert (given.engine.step_timeout, given.registry.load_timeout, given.metrics_adapters) == (7.5, 6, 3)
    assert (given.settings.metrics_port, given.registry.require_digest) == (0, True)
