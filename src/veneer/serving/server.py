"""Runs the server: takes the address, loads the base and the adapters, answers, and drains when it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

import psutil
import uvicorn

from veneer.adapters.slot_table import slot_capacity
from veneer.errors import OutputError, VeneerError
from veneer.files.paths import exists
from veneer.printing import first_line
from veneer.serving.admission import Admission
from veneer.serving.app import create_app
from veneer.serving.auth import ANONYMOUS, Keys
from veneer.serving.engine import TransformersEngine
from veneer.serving.engine_types import ServedEngine
from veneer.serving.http_guard import LOG
from veneer.serving.http_protocol import HttpProtocol
from veneer.serving.metrics import ServerMetrics
from veneer.serving.prompt_tokens import PromptTokenizer
from veneer.serving.registry import Registry
from veneer.serving.registry_types import AdapterInfo, Registration
from veneer.serving.replica_types import ReplicaOptions
from veneer.serving.residency import Residency, ResidencyLimits
from veneer.serving.server_options import ServerOptions
from veneer.serving.service import Service
from veneer.serving.stopping import Stopping
from veneer.serving.store import Store
from veneer.serving.template_process import TemplateProcess

# The engine starts itself anew within seconds; where one stays dead for so many, only a new process helps.
_DEAD_SECONDS = 30.0
# Between two looks at the engine.
_LOOK = 1.0
# Ray starts replicas anew, which load the base again; only a cluster that is gone gives none back for so long.
_LOST_SECONDS = 600.0
# What a supervisor of processes takes for "start it again" (EX_SOFTWARE).
_EXIT_DEAD = 70
# Seconds for the last bytes of answers when the drain is over.
_LAST_BYTES = 5
_READ_AT_ONCE = 32


@dataclass
class RunningServer:
    """Tells of a server that is ready; its second address, where there is one, is that of its metrics."""

    addresses: list[str]
    service: Service
    host_bytes: int
    left_out: list[str] = field(default_factory=list)

    @property
    def adapters(self) -> list[AdapterInfo]:
        """The state of all adapters."""
        return self.service.registry.adapters(ANONYMOUS)


def run_server(
    options: ServerOptions, on_step: Callable[[str], None], on_ready: Callable[[RunningServer], None]
) -> None:
    """Run the server until a signal ends it.

    Args:
        options: what it is made of.
        on_step: told what is being done before it is ready.
        on_ready: called when it answers.

    Raises:
        VeneerError: it cannot start.
    """
    keys, stopping = Keys(options.keys), Stopping()
    with stopping.on_signals(), ExitStack() as started:
        listeners = [started.enter_context(_listening(options.host, port, flag)) for flag, port in _ports(options)]
        engine = _engine(options)
        started.callback(engine.stop, 0)
        on_step("loading the base")
        engine.start()
        folder = options.store or started.enter_context(stopping.temporary_folder("veneer-serve-"))
        stopping.run(_serve(options, folder, engine, keys, listeners, on_step, on_ready, stopping.leave))


def _engine(options: ServerOptions) -> ServedEngine:
    if options.replicas is None:
        return TransformersEngine(options.base, options.engine)
    # Ray reads these when it is imported. By the third, a cluster of this machine listens on 127.0.0.1, as it does
    # anyway on macOS and Windows.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if options.replicas.address is None:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    from veneer.serving.ray_cluster import RayCluster
    from veneer.serving.replicated_engine import ReplicatedEngine

    base = str(Path(options.base).resolve()) if exists(Path(options.base)) else options.base
    cluster = RayCluster(f"veneer-{options.settings.base_name}", base, options.engine, options.replicas)
    capacity = slot_capacity(options.engine.slots, options.engine.rank_buckets)
    return ReplicatedEngine(cluster, options.engine.max_requests, capacity)


def _host_bytes(replicas: ReplicaOptions | None) -> int:
    """Return a quarter of the memory, or each replica's part of it where they share this machine."""
    shares = replicas.count if replicas is not None and replicas.address is None else 1
    return int(psutil.virtual_memory().total) // (4 * shares)


def _ports(options: ServerOptions) -> Iterator[tuple[str, int]]:
    yield "--port", options.port
    if options.settings.metrics_port is not None:
        yield "--metrics-port", options.settings.metrics_port


def _listening(host: str, port: int, flag: str) -> socket.socket:
    """Take the address before the base is loaded, so that one that is taken is told at once."""
    with ExitStack() as stack:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = stack.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except (OSError, UnicodeError) as error:  # the second of names with long or empty parts
            reason = getattr(error, "strerror", None) or first_line(error)
            raise OutputError(
                f"{host}:{port} cannot be listened on: {reason}.", hint=f"Give another --host or {flag}."
            ) from error
        stack.pop_all()
    return listener


async def _serve(
    options: ServerOptions,
    folder: Path,
    engine: ServedEngine,
    keys: Keys,
    listeners: list[socket.socket],
    on_step: Callable[[str], None],
    on_ready: Callable[[RunningServer], None],
    leave: Callable[[int], None],
) -> None:
    host_bytes = options.host_bytes or _host_bytes(options.replicas)
    service = _service(options, folder, engine, keys, listeners, host_bytes)
    try:
        await service.registry.open()
        running = RunningServer([*map(_address, listeners)], service, host_bytes)
        await _register(options, service.registry, running.left_out, on_step)

        def begin() -> None:
            service.ready = True
            on_ready(running)

        server = _DrainingServer(_config(service), service, options.drain, begin)
        patience = _DEAD_SECONDS if options.replicas is None else _LOST_SECONDS
        watch = asyncio.create_task(_watch(service, patience, leave))
        if hasattr(signal, "SIGHUP"):  # not on Windows
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _reload, keys)
        await server.serve(listeners)
        watch.cancel()
    finally:
        await service.registry.close()
        service.templates.close()


def _service(
    options: ServerOptions,
    folder: Path,
    engine: ServedEngine,
    keys: Keys,
    listeners: Sequence[socket.socket],
    host_bytes: int,
) -> Service:
    """Put the parts of a server together."""
    base = engine.served_base
    metrics_port = listeners[1].getsockname()[1] if len(listeners) > 1 else None
    settings = replace(options.settings, base_digest=base.digest or "", metrics_port=metrics_port)
    tokenizer, templates = PromptTokenizer(base.tokenizer, base.vocabulary), TemplateProcess()
    tokenizer.check_template()
    store = Store(folder, options.store_limits, base_digest=base.digest, check=templates.check)
    metrics = ServerMetrics(options.metrics_adapters)
    limits = ResidencyLimits(host_bytes, cycle=options.limits.cycle)
    place = Path(options.base)
    paths = dict.fromkeys((str(place.absolute()), str(place.resolve())), settings.base_name)
    residency = Residency(engine, store, limits, on_phase=metrics.loaded, shown=paths)
    registry = Registry(
        store, residency, options.policy, options.registry, base_name=settings.base_name, on_phase=metrics.loaded
    )
    tiers = {
        "store": lambda: store.used_bytes,
        "host": lambda: residency.used_bytes,
        "bank": lambda: engine.status().bank_bytes,
    }
    admission = Admission(residency, options.limits)
    return Service(settings, engine, registry, admission, keys, tokenizer, metrics, tiers, templates)


def _config(service: Service) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(service),
        http=HttpProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_LAST_BYTES,
    )


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _register(
    options: ServerOptions, registry: Registry, left_out: list[str], on_step: Callable[[str], None]
) -> None:
    for registration in options.adapters:
        on_step(f"loading {registration.name}")
        await registry.register(registration, ANONYMOUS)
    for start in range(0, len(options.found), _READ_AT_ONCE):
        batch = options.found[start : start + _READ_AT_ONCE]
        on_step(f"reading {batch[0].name}")
        # 1,000 adapters in 3 s instead of 17: each waits for the disk.
        lines = await asyncio.gather(*(_read(registry, registration) for registration in batch))
        left_out += filter(None, lines)


async def _read(registry: Registry, registration: Registration) -> str:
    """Register an adapter that was found, and return why it is left out where it is."""
    try:
        await registry.register(registration, ANONYMOUS)
    except VeneerError as error:
        return f"{registration.name} is left out: {error}"
    return ""


def _reload(keys: Keys) -> None:
    try:
        keys.reload()
    except VeneerError as error:
        LOG.error("The keys stay as they were: %s", error)
    else:
        LOG.info("The keys were read again.")


class _DrainingServer(uvicorn.Server):
    """Lets running requests end when it is told to stop, and refuses new ones; told again, it stops at once."""

    def __init__(
        self, config: uvicorn.Config, service: Service, seconds: float, on_listening: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._service, self._seconds, self._on_listening = service, seconds, on_listening
        self._draining: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        if self.started:
            self._on_listening()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, or stop."""
        self._loop.call_soon_threadsafe(self._told)

    def _told(self) -> None:
        if self._draining is None:
            LOG.info("Stopping: %s requests have %g seconds.", self._service.admission.running, self._seconds)
            self._draining = asyncio.create_task(self._drain())
        else:
            self.force_exit = self.should_exit = True

    async def _drain(self) -> None:
        self._service.drain()
        if not await self._service.admission.drained(self._seconds):
            LOG.warning("Not all requests ended in time.")
        self.should_exit = True


async def _watch(service: Service, patience: float, leave: Callable[[int], None]) -> None:
    """End the process when the engine hangs, for a thread cannot be ended, or stays dead for longer than that."""
    since, hung = time.monotonic(), False
    while True:
        status = service.engine.status()
        if status.alive:
            since = time.monotonic()
        # At two looks: a process that was paused seems to hang when it goes on.
        if (hung and status.hangs) or time.monotonic() - since >= patience:
            break
        hung = status.hangs
        await asyncio.sleep(_LOOK)
    LOG.critical("The engine is dead: %s", status.error)
    logging.shutdown()
    leave(_EXIT_DEAD)
