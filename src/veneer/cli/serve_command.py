"""``veneer serve``."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from veneer.cli import options
from veneer.cli.options import A_PATH, PATH_OR_ID, NumberRange, switch
from veneer.cli.terminal import print_warnings, progress
from veneer.errors import UsageError, did_you_mean
from veneer.files.paths import exists, nearest_path
from veneer.packages import require
from veneer.printing import nbytes, one_line, parse_bytes, printable, quiet

if TYPE_CHECKING:
    from veneer.serving.replica_types import ReplicaOptions
    from veneer.serving.server import RunningServer
    from veneer.serving.server_options import ServerOptions

_PACKAGES = ("fastapi", "uvicorn", "prometheus-client", "psutil")


def _with_variables(command: click.Command) -> click.Command:
    """Let each option be given by an environment variable of its flag's name; click's own follow those in the code."""
    for option in command.params:
        if isinstance(option, click.Option):
            option.envvar = f"VENEER_SERVE{option.opts[0].removeprefix('-').upper().replace('-', '_')}"
    return command


def _size(context: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    """Parse ``16GB``."""
    size = None if text is None else parse_bytes(text)
    if text is not None and size is None:
        raise UsageError(f"{parameter.opts[0]} {text!r} is no size.", hint=f"Such as {parameter.opts[0]} 16GB.")
    return size


def _read_config(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Take the options of a TOML file for what neither the command line nor the environment gives."""
    if path is None:
        return
    try:
        import tomllib
    except ModuleNotFoundError as error:
        raise UsageError("--config needs Python 3.11.", hint="Set VENEER_SERVE_PORT and the like.") from error
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "Give a TOML file." if exists(path) else nearest_path(path)
        raise UsageError(f"--config {path} cannot be read: {error.strerror}.", hint=hint) from error
    except ValueError as error:
        raise UsageError(f"{path} is no TOML: {error}.", hint="Such as: port = 9000") from error
    known = {option.opts[0].removeprefix("--"): option for option in context.command.params if option is not parameter}
    for key in values:
        if key not in known:
            raise UsageError(f"{path}: there is no option {key!r}.", hint=did_you_mean(key, known) or "See --help.")
    context.default_map = {str(known[key].name): _as_given(f"{path}: {key}", known[key], values[key]) for key in values}


def _as_given(where: str, option: click.Parameter, value: Any) -> Any:
    """Return a value of a TOML file as the command line would give it."""
    if getattr(option, "multiple", False):
        is_right, hint = isinstance(value, list) and all(isinstance(text, str) for text in value), '["this", "that"]'
    elif getattr(option, "is_flag", False):
        is_right, hint = isinstance(value, bool), "true"
    else:
        is_right, hint = isinstance(value, (str, int, float)) and not isinstance(value, bool), '"a text", or a number'
    if not is_right:
        raise UsageError(f"{where} cannot be {value!r}.", hint=f"Such as: {hint}")
    return value if isinstance(value, (list, bool)) else str(value)


def _bytes(name: str, help: str, default: str | None = None) -> Callable[[Any], Any]:
    return click.option(name, default=default, metavar="SIZE", callback=_size, help=help)


def _ranks(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    """Parse ``8,16,64``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) <= 4096 for part in parts):
        raise UsageError(f"--rank-buckets {text!r} are no ranks.", hint="Such as --rank-buckets 8,16,64.")
    return tuple(sorted({int(part) for part in parts}))


def _count(name: str, help: str, default: int | None = None, most: int = 1 << 20) -> Callable[[Any], Any]:
    return click.option(name, type=click.IntRange(1, most), default=default, metavar="N", help=help)


def _seconds(name: str, default: float, help: str, *, or_none: bool = False) -> Callable[[Any], Any]:
    allowed = NumberRange(min=0, min_open=not or_none)
    return click.option(name, type=allowed, default=default, metavar="SECONDS", help=help)


@_with_variables
@click.command()
@click.argument("base", type=PATH_OR_ID, required=False, help="The base: a folder or hub id.")
@click.option(
    "--config",
    type=A_PATH,
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="A TOML file of these options, such as: port = 9000",
)
@click.option("--adapter", "adapters", metavar="NAME=SOURCE", multiple=True, help="An adapter; may be given again.")
@click.option("--adapters", "folder", type=A_PATH, metavar="DIR", help="Serve each adapter in this folder by its name.")
@click.option("--name", help="The base's name in requests; by default its folder's name or hub id.")
@click.option("--host", default="127.0.0.1", help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="0 takes a free one.")
@click.option("--api-keys", "keys", type=A_PATH, metavar="FILE", help="Only these keys may use the server.")
@click.option("--new-key", metavar="NAME", help="Make a key and its entry for that file, and end.")
@switch("--insecure", "Listen beyond this machine without keys.")
@switch("--allow-runtime-adapters", "Let adapters come and go while the server runs.")
@click.option(
    "--allow-source", multiple=True, metavar="GLOB", help="Where they may come from: hf://org/*, file:///dir/*."
)
@switch("--require-digest", "Refuse those whose registration does not say their digest.")
@click.option(
    "--store", type=A_PATH, metavar="DIR", help="Keep adapters and names there; else they go with the process."
)
@_bytes("--store-bytes", "The most that is kept there.", "50GB")
@_bytes("--max-adapter-bytes", "The largest adapter.", "4GB")
@_count("--max-rank", "The largest rank; by default any.")
@_bytes("--host-bytes", "The most that all loaded adapters take; by default a quarter of the memory.")
@_count("--slots", "Adapters in a batch at the price of one; as many more run beside them.", 64)
@click.option(
    "--rank-buckets",
    default="8,16,64",
    metavar="RANKS",
    callback=_ranks,
    help="Each has so many slots, for adapters up to its rank.",
)
@_bytes("--kv-bytes", "The cache of keys and values; by default enough for 16,384 tokens.")
@_count("--max-batch-tokens", "Tokens that a step computes.", 512)
@_count("--max-requests", "Requests in a batch.", 64)
@_count("--max-context", "Tokens of a prompt with its answer; by default the model's and the cache's.")
@_count("--queue", "Requests that wait.", 1024)
@_seconds("--queue-age", 30, "How long a request may wait.", or_none=True)
@_seconds("--adapter-cycle", 2, "How long an adapter waits for a slot before another gives one up.", or_none=True)
@_seconds("--load-wait", 10, "How long a request waits for its adapter to be loaded.", or_none=True)
@_seconds("--load-timeout", 120, "How long an adapter's source may take.")
@_seconds("--step-timeout", 30, "How long a step may take; after that the process ends with exit code 70.")
@_seconds("--request-timeout", 600, "How long an answer may take.")
@_seconds("--drain", 30, "How long running requests have when the server is told to stop.", or_none=True)
@options.dtype
@options.device
@_count("--threads", "Threads of the CPU; by default torch's choice.", most=4096)
@_count("--replicas", "Run so many engines, each in a process of its own, on Ray.")
@click.option("--ray-address", metavar="ADDRESS", help="The Ray cluster they run in; by default one of this machine.")
@click.option(
    "--replica-cpus",
    type=NumberRange(min=0),
    default=1,
    metavar="N",
    help="CPUs that Ray reserves for each; with --device cuda, a GPU too.",
)
@switch("--ui", "Serve a page at / that compares adapters.")
@click.option(
    "--metrics-port", type=click.IntRange(0, 65535), help="Answer /metrics there, and nowhere else; 0 takes a free one."
)
@_count("--metrics-adapters", "Adapters with metrics of their own; the others share one.", 50)
@switch("--gateway-metrics", "Add the gauges that gateways read, under vLLM's names.")
@click.option(
    "--audit-log", type=A_PATH, metavar="FILE", help="Add a line for each change and answer: who, which, how many."
)
@click.option("--log", type=click.Choice(["text", "json"]), default="text", metavar="FORM", help="text or json.")
def serve(
    base: str | None, new_key: str | None, log: str, audit_log: Path | None, threads: int | None, **given: Any
) -> None:
    """Serve a base and many adapters over OpenAI's API: a request's `model` names the adapter.

    Example: veneer serve path/to/base --adapter pirate=path/to/pirate --adapter brief=path/to/brief
    """
    require("veneer serve", *_PACKAGES, extra="serve", error=UsageError)
    if new_key is not None:
        _print_new_key(new_key)
        return
    if given["replicas"] is not None:
        require("veneer serve --replicas", "ray[serve]", extra="ray", error=UsageError)
    if base is None:
        raise UsageError("There is no base to serve.", hint="veneer serve path/to/base --adapter NAME=path/to/adapter")
    with quiet() as warnings, ExitStack() as shown:
        on_step = shown.enter_context(progress("loading", lines=True))
        from veneer.serving.server import run_server
        from veneer.serving.server_options import server_options

        described = server_options(base, threads=threads, **given)
        _use_threads(threads)
        _audit_to(audit_log)

        def ready(server: RunningServer) -> None:
            shown.close()
            _tell(server, warnings, described, log)

        run_server(described, on_step, ready)


def _print_new_key(name: str) -> None:
    from veneer.serving.auth import new_key

    if not name.strip():
        raise UsageError("--new-key needs a name.", hint="Such as --new-key laptop; answers and the log name it.")
    key, entry = new_key(name)
    print(f"The key, which is shown this once: {key}")
    print(f'Its entry for "keys" in the file: {json.dumps(entry)}')


def _audit_to(file: Path | None) -> None:
    from veneer.serving import audit

    if file is None:
        audit.LOGGER.setLevel(logging.WARNING)
    else:
        audit.log_to(file)


def _use_threads(count: int | None) -> None:
    if count is not None:
        import torch

        torch.set_num_threads(count)


def _tell(server: RunningServer, warnings: list[str], described: ServerOptions, log: str) -> None:
    """Print the figures chosen, and begin to log."""
    print_warnings([*warnings, *server.left_out])
    for name, fact in _facts(server, described):
        print(f"{name:<12}{one_line(fact)}")
    print(f"Serving on {server.addresses[0]}", flush=True)
    _log_as(log)


def _facts(server: RunningServer, described: ServerOptions) -> list[tuple[str, str]]:
    service, engine = server.service, server.service.engine
    limits = described.store_limits
    names = [info.name for info in server.adapters]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return [
        ("base", f"{described.settings.base_name}, {engine.max_context} tokens of context"),
        ("adapters", f"{len(names)}: {shown}" if names else "none yet"),
        (
            "batch",
            f"{described.engine.max_requests} requests, {described.engine.slots} adapters" + _on(described.replicas),
        ),
        ("memory", f"{nbytes(server.host_bytes)} for adapters"),
        ("store", f"{described.store or 'for this process'}, {nbytes(limits.store_bytes)} at most"),
        ("keys", "everybody on this machine" if service.settings.hosts is not None else _keys(described)),
        ("changes", "on" if described.settings.runtime_adapters else "off: --allow-runtime-adapters"),
        *(("metrics", f"{address}/metrics") for address in server.addresses[1:]),
    ]


def _on(replicas: ReplicaOptions | None) -> str:
    return "" if replicas is None else f", on each of {replicas.count} replicas"


def _keys(described: ServerOptions) -> str:
    return str(described.keys) if described.keys else "everybody who reaches it: --insecure"


def _log_as(form: str) -> None:
    """Send the log to standard error, a line for each answer."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines() if form == "json" else _TextLines("%(asctime)s %(levelname)s %(message)s"))
    for name in ("veneer", "uvicorn", "py.warnings"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if name == "veneer" else logging.WARNING)
        logger.propagate = False
    logging.captureWarnings(True)


class _TextLines(logging.Formatter):
    """Writes a record as a line, and a traceback below it, neither of which can steer a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return printable(super().formatException(ei))


class _JsonLines(logging.Formatter):
    """Writes a record as a line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": record.created, "level": record.levelname, "logger": record.name, "text": record.getMessage()}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)
