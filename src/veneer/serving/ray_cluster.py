"""Runs replicas of the engine on Ray Serve, which places them, watches them, and replaces those that end."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from veneer.errors import EngineError, UsageError, VeneerError
from veneer.printing import first_line
from veneer.serving.engine import EngineOptions, TransformersEngine
from veneer.serving.engine_types import EngineRequest, LoadedVersion, ServedBase, TokenEvent
from veneer.serving.replica import EngineReplica
from veneer.serving.replica_types import ReplicaOptions, ReplicaState, RequestSource, lost

T = TypeVar("T")

# Seconds within which a replica that is well tells its state, and its base.
_LOOK, _DESCRIBE = 10.0, 120.0
# Seconds within which a cluster that is there takes a connection.
_CONNECT = 5.0
_QUIET: Any = {"log_to_driver": False, "logging_level": logging.ERROR}
# Messages are small: adapters go over the folder of the store.
_OWN: Any = {"include_dashboard": False, "object_store_memory": 200_000_000}


class RayReplica(EngineReplica):
    """An engine of transformers in a process of Ray.

    Args:
        base: a folder or hub id.
        options: of the engine.
        threads: of the CPU; torch's choice when ``None``.
        others: further replicas, which are deployed with this one.
    """

    def __init__(self, base: str, options: EngineOptions, threads: int | None, *others: Any) -> None:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        super().__init__(TransformersEngine(base, options))


class RayHandle:
    """Reaches one replica over Ray: a deployment of its own, so that a request can be sent to just this one."""

    def __init__(self, handle: Any) -> None:
        self._handle, self._streams = handle, handle.options(stream=True)

    def describe(self) -> ServedBase:
        """Return the facts of the base; raise the ``VeneerError`` for which the engine did not start."""
        base: ServedBase | VeneerError = _result(self._handle.describe.remote(), _DESCRIBE)
        return _value(base)

    def look(self, strays: Sequence[str]) -> ReplicaState:
        """Return the state within seconds, and drop versions that nobody knows any more."""
        state: ReplicaState = _result(self._handle.look.remote(strays), _LOOK)
        return state

    async def load(self, version: str, folder: Path) -> LoadedVersion:
        """Load a version, as the engine's method does."""
        with _losses():
            loaded: LoadedVersion | VeneerError = await self._handle.load.remote(version, folder)
        return _value(loaded)

    async def drop(self, version: str) -> None:
        """Drop a version, as the engine's method does; one that is not loaded is none."""
        with _losses():
            failure: VeneerError | None = await self._handle.drop.remote(version)
        _value(failure)

    async def generate(self, request: EngineRequest, source: RequestSource) -> AsyncIterator[TokenEvent]:
        """Generate, as the engine's method does; load the version before, where it is not."""
        stream = self._streams.generate.remote(request, source)
        try:
            with _losses():
                async for event in stream:
                    yield _value(event)
        finally:
            stream.cancel()  # Ray goes on with a stream that nobody reads


class RayCluster:
    """Deploys replicas as one application of Ray Serve, and removes it.

    Args:
        name: of the application; an earlier one of that name is replaced.
        base: a folder or hub id.
        engine: how each engine runs.
        options: how many, and where.
        replica: the class that is deployed.
    """

    def __init__(
        self,
        name: str,
        base: str,
        engine: EngineOptions,
        options: ReplicaOptions,
        replica: type[EngineReplica] = RayReplica,
    ) -> None:
        self._name = re.sub(r"[^A-Za-z0-9_-]", "-", name)  # Ray's files are called so, too
        self._base, self._engine, self._options, self._replica = base, engine, options, replica
        self._has_connected = False

    def start(self) -> Sequence[RayHandle]:
        """Deploy all replicas, and wait until they can be reached.

        Raises:
            UsageError: there is no cluster at the address, or not room enough in it.
            EngineError: Ray cannot start the replicas.
        """
        if not ray.is_initialized():
            self._connect()
        self._check_room()
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="Disabled")  # the server's own process answers HTTP
        application: Any = None
        for number in reversed(range(self._options.count)):
            others = () if application is None else (application,)
            application = self._deployment(number).bind(self._base, self._engine, self._options.threads, *others)
        try:
            serve.run(application, name=self._name, route_prefix=None)
        except RuntimeError as error:
            raise EngineError(f"Ray cannot start the replicas: {first_line(error)}", hint="See Ray's logs.") from error
        return [RayHandle(serve.get_deployment_handle(_title(n), self._name)) for n in range(self._options.count)]

    def stop(self) -> None:
        """Remove the replicas, and leave the cluster; one that was made for them ends."""
        if not ray.is_initialized():
            return
        if self._options.address is not None or not self._has_connected:
            with suppress(RayError, RayServeException):
                serve.delete(self._name)
        if self._has_connected:
            ray.shutdown()

    def _connect(self) -> None:
        address = self._options.address
        if address is not None:
            _check_address(address)
        try:
            ray.init(address or "local", **(_OWN if address is None else {}), **_QUIET)
        except (ConnectionError, RayError, RuntimeError, ValueError) as error:
            where = "" if address is None else f" at {address}"
            raise UsageError(f"Ray cannot be used{where}: {first_line(error)}", hint="ray start --head") from error
        self._has_connected = True

    @property
    def _resources(self) -> dict[str, float]:
        """What Ray reserves for each replica."""
        on_gpu = str(self._engine.device or "").startswith("cuda")
        return {"CPU": self._options.cpus, "GPU": 1.0 if on_gpu else 0.0}

    def _check_room(self) -> None:
        """Raise ``UsageError`` where Ray would wait for ever."""
        available = ray.cluster_resources()
        for kind, each in self._resources.items():
            wanted = each * self._options.count
            there = available.get(kind, 0.0)
            if wanted > there:
                raise UsageError(
                    f"{self._options.count} replicas need {wanted:g} {kind}s, and Ray has {there:g}.",
                    hint="Give fewer --replicas, or a smaller --replica-cpus.",
                )

    def _deployment(self, number: int) -> Any:
        resources = self._resources
        return serve.deployment(self._replica, name=_title(number)).options(
            # The router keeps to the limits; beyond them it must still be able to look.
            max_ongoing_requests=2 * self._engine.max_requests * self._options.count + 100,
            ray_actor_options={"num_cpus": resources["CPU"], "num_gpus": resources["GPU"]},
            # Three failures in a row end a replica; one whose process is gone is replaced at once.
            health_check_period_s=1,
            health_check_timeout_s=30,
            graceful_shutdown_timeout_s=5,
        )


def _title(number: int) -> str:
    return f"engine-{number}"


def _check_address(address: str) -> None:
    """Raise ``UsageError`` where nothing listens: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    try:
        socket.create_connection((host, int(port)), _CONNECT).close()
    except (OSError, ValueError) as error:
        what = error.strerror or "nothing answers" if isinstance(error, OSError) else "it is no HOST:PORT"
        raise UsageError(
            f"--ray-address {address}: {what}.",
            hint="Such as 10.0.0.1:6379, where `ray start --head` runs, or auto on a machine of the cluster.",
        ) from error


def _value(outcome: T | VeneerError) -> T:
    if isinstance(outcome, VeneerError):
        raise outcome
    return outcome


def _result(response: Any, seconds: float) -> Any:
    """Wait for what a replica returns."""
    with _losses():
        try:
            return response.result(timeout_s=seconds)
        except TimeoutError as error:
            response.cancel()
            raise lost(f"The replica of the engine did not answer within {seconds:g} seconds.") from error


@contextmanager
def _losses() -> Iterator[None]:
    """Turn what Ray raises where a replica is gone into ``ReplicaLostError``; what its code raises stays."""
    try:
        yield
    except RayTaskError:
        raise
    except (RayError, RayServeException) as error:
        raise lost(f"The replica of the engine is gone ({type(error).__name__}).") from error
