"""Reads and checks the options of ``veneer serve``."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from veneer.adapters.slot_table import slot_capacity
from veneer.errors import NotACheckpointError, PathNotFoundError, SourceError, UsageError
from veneer.files.names import ADAPTER_CONFIG
from veneer.files.paths import exists, is_file, is_folder, nearest_path
from veneer.files.resolve import local_path, looks_like_hub_id
from veneer.printing import first_line, nbytes, warn
from veneer.serving.admission import AdmissionLimits
from veneer.serving.engine import EngineOptions
from veneer.serving.registry import RegistryOptions
from veneer.serving.registry_types import Registration
from veneer.serving.replica_types import ReplicaOptions
from veneer.serving.service import ServiceSettings
from veneer.serving.source_policy import SourcePolicy
from veneer.serving.store import StoreLimits

# So many adapters run for each slot: those that find none free are computed beside the others, at some more cost.
_ADAPTERS_OF_A_SLOT = 2


@dataclass(frozen=True)
class ServerOptions:
    """Describes a server.

    Attributes:
        base: a folder or hub id.
        settings: of the routes.
        engine: of the engine.
        replicas: of the engine, on Ray; one in this process when ``None``.
        limits: of the requests that run and wait.
        store: the folder of the store; one that goes with the process when ``None``.
        store_limits: of what is in it.
        host_bytes: the most bytes of all loaded adapters; a quarter of the memory when ``None``.
        policy: where adapters may come from while the server runs.
        registry: of names, and how adapters get them.
        keys: the file of keys.
        host, port: where it listens; port 0 takes a free one.
        metrics_adapters: how many adapters have metrics of their own.
        drain: the seconds that running requests have when it is told to stop.
        adapters: those that must be there when it starts.
        found: those that are left out, with a warning, where they cannot be served.
    """

    base: str
    settings: ServiceSettings
    engine: EngineOptions
    replicas: ReplicaOptions | None
    limits: AdmissionLimits
    store: Path | None
    store_limits: StoreLimits
    host_bytes: int | None
    policy: SourcePolicy
    registry: RegistryOptions
    keys: Path | None
    host: str
    port: int
    metrics_adapters: int
    drain: float
    adapters: tuple[Registration, ...]
    found: tuple[Registration, ...]


def server_options(
    base: str,
    *,
    adapters: Iterable[str],
    folder: Path | None,
    name: str | None,
    host: str,
    port: int,
    keys: Path | None,
    insecure: bool,
    allow_runtime_adapters: bool,
    allow_source: tuple[str, ...],
    require_digest: bool,
    store: Path | None,
    store_bytes: int,
    max_adapter_bytes: int,
    max_rank: int | None,
    host_bytes: int | None,
    slots: int,
    rank_buckets: tuple[int, ...],
    kv_bytes: int | None,
    max_batch_tokens: int,
    max_requests: int,
    max_context: int | None,
    queue: int,
    queue_age: float,
    adapter_cycle: float,
    load_wait: float,
    load_timeout: float,
    step_timeout: float,
    request_timeout: float,
    drain: float,
    dtype: str,
    device: str | None,
    threads: int | None,
    replicas: int | None,
    ray_address: str | None,
    replica_cpus: float,
    ui: bool,
    metrics_port: int | None,
    metrics_adapters: int,
    gateway_metrics: bool,
) -> ServerOptions:
    """Return what the options of the command line describe.

    Raises:
        UsageError: they contradict each other, or others than this machine could use the server without a key.
    """
    _check_host(host, keys, insecure)
    for option, is_given in {"--allow-source": allow_source, "--require-digest": require_digest}.items():
        if is_given and not allow_runtime_adapters:
            raise UsageError(f"{option} is for adapters that come later.", hint="Add --allow-runtime-adapters.")
    if metrics_port and metrics_port == port:
        raise UsageError(f"--metrics-port {metrics_port} is the --port.", hint="Give another, or leave it out.")
    if store is not None and exists(store) and not store.is_dir():
        raise UsageError(f"--store {store} is no folder.", hint="Give a folder; it is made where there is none.")
    _check_replicas(replicas, ray_address, store, device)
    _check_device(device, is_here=replicas is None)
    _check_cache(kv_bytes, device, is_here=ray_address is None)
    given = tuple(_registration(text) for text in adapters)
    _check_once([registration.name for registration in given])
    found = tuple(_found(folder, {registration.name for registration in given})) if folder else ()
    return ServerOptions(
        base=base,
        settings=ServiceSettings(
            base_name=name or _name_of(base),
            runtime_adapters=allow_runtime_adapters,
            request_timeout=request_timeout,
            page=ui,
            metrics_port=metrics_port,
            gateway_metrics=gateway_metrics,
            hosts=None if keys or insecure else (host,),
        ),
        engine=EngineOptions(
            max_batch_tokens=max_batch_tokens,
            max_requests=max_requests,
            max_context=max_context,
            cache_bytes=kv_bytes,
            device=device,
            dtype=dtype,
            slots=slots,
            rank_buckets=rank_buckets,
            step_timeout=step_timeout,
        ),
        replicas=ReplicaOptions(replicas, ray_address, replica_cpus, threads) if replicas else None,
        limits=AdmissionLimits(
            running=max_requests * (replicas or 1),
            slots={
                bucket: _ADAPTERS_OF_A_SLOT * count * (replicas or 1)
                for bucket, count in slot_capacity(slots, rank_buckets).items()
            },
            queue=queue,
            queue_per_adapter=queue,
            queue_age=queue_age,
            cycle=adapter_cycle,
            load_wait=load_wait,
        ),
        store=store,
        store_limits=StoreLimits(store_bytes, max_adapter_bytes, max_rank),
        host_bytes=host_bytes,
        policy=SourcePolicy(allow_source),
        registry=RegistryOptions(load_timeout, require_digest),
        keys=keys,
        host=host,
        port=port,
        metrics_adapters=metrics_adapters,
        drain=drain,
        adapters=given,
        found=found,
    )


def _check_host(host: str, keys: Path | None, insecure: bool) -> None:
    if keys is not None or insecure or _is_loopback(host):
        return
    raise UsageError(
        f"Without keys, everybody who reaches {host} could use this server.",
        hint="Give --api-keys FILE (`veneer serve --new-key NAME` makes a key), or --insecure.",
    )


def _check_replicas(replicas: int | None, address: str | None, store: Path | None, device: str | None) -> None:
    if address is not None and replicas is None:
        raise UsageError("--ray-address is for replicas.", hint="Add --replicas N.")
    if address is not None and store is None:
        raise UsageError(
            "Replicas on other machines read adapters from the store.",
            hint="Give --store DIR, a folder that all machines share.",
        )
    if replicas is not None and device is not None and ":" in device:
        raise UsageError(
            f"--device {device}: Ray gives each replica a device of its own.", hint=f"Say {device.partition(':')[0]}."
        )


def _check_device(device: str | None, *, is_here: bool) -> None:
    """Refuse a device that torch does not know, or that this machine lacks where the engine runs on it."""
    try:
        place = torch.device(device or "cpu")
        if place.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=place if is_here else "cpu")
    except (RuntimeError, AssertionError) as error:  # the second where torch was built without CUDA
        reason = first_line(error).partition(" device type at start")[0].rstrip(".")
        raise UsageError(f"--device {device!r} cannot be used: {reason}.", hint="Such as --device cuda:0.") from error


def _check_cache(size: int | None, device: str | None, *, is_here: bool) -> None:
    """Refuse a cache that the memory of this machine cannot hold, before anything slower is done instead."""
    memory = psutil.virtual_memory().total
    if is_here and size is not None and size > memory and torch.device(device or "cpu").type == "cpu":
        raise UsageError(f"--kv-bytes is {nbytes(size)}, and this machine has {nbytes(memory)}.", hint="Give less.")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _name_of(base: str) -> str:
    return Path(base).resolve().name if exists(Path(base)) else base


def _registration(text: str) -> Registration:
    name, mark, source = text.partition("=")
    if not mark or not name or not source:
        raise UsageError(f"--adapter {text!r} is not NAME=SOURCE.", hint="Such as --adapter pirate=path/to/pirate.")
    if "://" not in source:
        source = _local_source(text, source)
    return Registration(name, source, replace=True, trusted=True)


def _local_source(text: str, source: str) -> str:
    """Return the whole path of a folder that is here, or else the source as it is, where it can be a hub id.

    Raises:
        SourceError: it is a path, and no adapter is there.
    """
    path, is_a_file, is_a_folder = local_path(source, "adapter")
    if is_a_file:
        raise NotACheckpointError(f"--adapter {text} is a file.", hint=f"Give its folder, {path.parent}.")
    if is_a_folder:
        _check_adapter(text, path)
        return str(path.resolve())
    repo = re.split("[@#]", source)[0]
    # With a folder ``owner`` here, ``owner/name`` is a path with a slip in it.
    if looks_like_hub_id(repo) and not ("/" in repo and is_folder(Path(repo).parent)):
        return source
    on_hub = f" If the hub's is meant: hf://{source}" if looks_like_hub_id(repo) else ""
    raise PathNotFoundError(f"--adapter {text}: {source} does not exist.", hint=nearest_path(path) + on_hub)


def _check_adapter(text: str, folder: Path) -> None:
    """Raise ``SourceError`` where a folder holds no adapter."""
    if is_file(folder / ADAPTER_CONFIG):
        return
    inner = _adapters_in(folder, f"--adapter {text}")
    raise NotACheckpointError(
        f"--adapter {text}: the folder has no {ADAPTER_CONFIG}, so it is no adapter.",
        hint=f"Did you mean {inner[0]}? `--adapters {folder}` serves each adapter in it."
        if inner
        else "Give the folder that holds the adapter's config and weights.",
    )


def _adapters_in(folder: Path, option: str) -> list[Path]:
    """Return the folders in a folder that hold an adapter."""
    try:
        return [path for path in sorted(folder.iterdir()) if is_file(path / ADAPTER_CONFIG)]
    except OSError as error:
        raise SourceError(f"{option} cannot be read: {error.strerror}.", hint="Let the server read it.") from error


def _check_once(names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"--adapter names {twice!r} twice.", hint="Give each adapter a name of its own.")


def _found(folder: Path, taken: set[str]) -> Iterator[Registration]:
    """Yield the adapters in a folder, but for names that are taken; each is loaded when it is first asked for."""
    option = f"--adapters {folder}"
    if not is_folder(folder):
        why, hint = ("it does not exist", nearest_path(folder)) if not exists(folder) else ("it is a file", _EACH)
        raise PathNotFoundError(f"{option} is no folder: {why}.", hint=hint)
    paths = _adapters_in(folder, option)
    if not paths and is_file(folder / ADAPTER_CONFIG):
        raise UsageError(f"{option} is one adapter.", hint=f"Give --adapter NAME={folder}, or the folder above.")
    if not paths:
        warn(f"{option} holds no adapter. {_EACH}")
    for path in paths:
        if path.name not in taken:
            yield Registration(path.name, str(path.resolve()), replace=True, trusted=True, check=False)


_EACH = "Give the folder that the adapters are in, each in a folder of its own."
