"""Measures the server for Prometheus."""

from __future__ import annotations

import time
from collections import Counter as Counts
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from veneer._version import __version__
from veneer.serving.auth import ANONYMOUS

if TYPE_CHECKING:
    from veneer.serving.engine_types import EngineStatus, TokenEvent
    from veneer.serving.service import Service

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)
# Adapters with series of their own; a thousand label values are too many for Prometheus.
_MOST_ADAPTERS = 50
OTHERS = "other"


@dataclass
class Measured:
    """The times of one answer.

    Attributes:
        arrival: when the request came.
        first, last: when the first and the last token came.
        tokens: how many came.
    """

    arrival: float
    first: float | None = None
    last: float = 0.0
    tokens: int = 0

    def add(self, event: TokenEvent) -> None:
        """Add an event, which comes now."""
        self.last = time.monotonic()
        if self.first is None:
            self.first = self.last
        self.tokens += event.token is not None

    @property
    def token_seconds(self) -> float | None:
        """The seconds between two tokens; ``None`` for fewer than two."""
        return (self.last - self.first) / (self.tokens - 1) if self.first is not None and self.tokens > 1 else None


class ServerMetrics:
    """Holds the counters and histograms of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._adapters: set[str] = set()
        self._requests = Counter("veneer_requests", "Answers by status.", ["code"], registry=self.registry)
        self._seconds = self._histogram("veneer_request_seconds", "From request to end of answer.", _SECONDS)
        self._queue = self._histogram("veneer_queue_seconds", "Wait before the engine took the request.", _SECONDS)
        self._ttft = self._histogram("veneer_ttft_seconds", "From request to first token.", _SECONDS)
        self._tpot = self._histogram("veneer_tpot_seconds", "Between two tokens, the answer's mean.", _TOKEN_SECONDS)
        self._tokens = Counter(
            "veneer_tokens", "Tokens of prompts and answers.", ["kind", "adapter"], registry=self.registry
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)

    def answered(self, status: int, seconds: float) -> None:
        """Count an answer; the status 499 is that of a client that went away."""
        self._requests.labels(str(status)).inc()
        self._seconds.observe(seconds)

    def queued(self, seconds: float) -> None:
        """Count the wait of a request."""
        self._queue.observe(seconds)

    def generated(self, adapter: str, prompt: int, measured: Measured) -> None:
        """Count the tokens and the times of an answer."""
        label = self._label(adapter)
        self._tokens.labels("prompt", label).inc(prompt)
        self._tokens.labels("generated", label).inc(measured.tokens)
        if measured.first is not None:
            self._ttft.observe(measured.first - measured.arrival)
        if measured.token_seconds is not None:
            self._tpot.observe(measured.token_seconds)

    def _label(self, adapter: str) -> str:
        if len(self._adapters) < _MOST_ADAPTERS:
            self._adapters.add(adapter)
        return adapter if adapter in self._adapters else OTHERS

    def text(self, service: Service) -> bytes:
        """Return all metrics in Prometheus' text format."""
        state = CollectorRegistry()
        state.register(_StateCollector(service))
        return generate_latest(self.registry) + generate_latest(state)


class _StateCollector(Collector):
    """Reads the state of engine, admission and registry at the moment of a scrape."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        service, status = self._service, self._service.engine.status()
        yield InfoMetricFamily("veneer_build", "The version.", value={"version": __version__})
        yield _gauge("veneer_requests_running", "Requests in the engine.", service.admission.running)
        yield _gauge("veneer_requests_waiting", "Requests that wait.", service.admission.waiting)
        yield _gauge("veneer_kv_use_ratio", "Share of the cache in use.", status.cache_used)
        yield _gauge("veneer_engine_up", "1 while the engine's thread lives.", float(status.alive))
        yield _gauge("veneer_engine_restarts", "How often the engine was started anew.", status.restarts)
        yield _slots(status)
        yield self._adapters()
        yield self._tiers()
        if service.settings.gateway_metrics:
            yield from self._for_gateways(status)

    def _adapters(self) -> Metric:
        states = Counts(info.state.value for info in self._service.registry.adapters(ANONYMOUS))
        family = GaugeMetricFamily("veneer_adapters", "Adapters by state.", labels=["state"])
        for state, count in states.items():
            family.add_metric([state], count)
        return family

    def _tiers(self) -> Metric:
        family = GaugeMetricFamily("veneer_tier_bytes", "Bytes of adapters by place.", labels=["tier"])
        for tier, used in self._service.tiers.items():
            family.add_metric([tier], used())
        return family

    def _for_gateways(self, status: EngineStatus) -> Iterator[Metric]:
        """Yield what the endpoint picker of Kubernetes' Gateway API reads of vLLM."""
        service = self._service
        yield _gauge("vllm:num_requests_waiting", "Requests that wait.", service.admission.waiting)
        yield _gauge("vllm:num_requests_running", "Requests in the engine.", service.admission.running)
        yield _gauge("vllm:gpu_cache_usage_perc", "Share of the cache in use.", status.cache_used)
        names = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        family = GaugeMetricFamily("vllm:lora_requests_info", "Adapters of running and waiting requests.", labels=names)
        base = service.settings.base_name
        values = [",".join(sorted(+counts - Counts([base] * counts[base]))) for counts in _both(service)]
        family.add_metric([str(status.slots), *values], 1)
        yield family


def _both(service: Service) -> tuple[Counts[str], Counts[str]]:
    return service.running, service.waiting


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _slots(status: EngineStatus) -> Metric:
    family = GaugeMetricFamily("veneer_bank_slots", "Slots for adapters by state.", labels=["state"])
    family.add_metric(["leased"], status.slots_used)
    family.add_metric(["free"], status.slots - status.slots_used)
    return family
