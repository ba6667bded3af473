"""Measures the server for Prometheus."""

from __future__ import annotations

import time
from collections import Counter as Counts
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from veneer._version import __version__
from veneer.serving.auth import ANONYMOUS

if TYPE_CHECKING:
    from veneer.serving.engine_types import EngineStatus, TokenEvent
    from veneer.serving.service import Service
    from veneer.serving.work_counts import Distribution, EngineWork

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)
OTHERS = "other"
# Name and text of a metric -> the counter of the bank that it shows.
_BANK = {
    ("veneer_bank_writes", "Adapters that were written into slots."): "writes",
    ("veneer_bank_bytes", "Bytes that were written into slots."): "bytes_written",
    ("veneer_bank_evictions", "Adapters that gave up their slots to others."): "evictions",
    ("veneer_bank_moves", "Slots that were moved, where those in use lay far apart."): "moves",
    (
        "veneer_slow_lane_rows",
        "Tokens of adapters in no slot, or with modules that compute one adapter after the other.",
    ): "row_by_row",
}


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
    """Holds the counters and histograms of one server.

    Args:
        adapters: how many have series of their own; a thousand are too many for Prometheus.
    """

    def __init__(self, adapters: int = 50) -> None:
        self.registry = CollectorRegistry()
        self._most_adapters = adapters
        self._adapters: set[str] = set()
        self._requests = Counter("veneer_requests", "Answers by status.", ["code"], registry=self.registry)
        self._seconds = self._histogram("veneer_request_seconds", "From request to end of answer.", _SECONDS)
        self._queue = self._histogram("veneer_queue_seconds", "Wait before the engine took the request.", _SECONDS)
        self._ttft = self._histogram("veneer_ttft_seconds", "From request to first token.", _SECONDS)
        self._tpot = self._histogram("veneer_tpot_seconds", "Between two tokens, the answer's mean.", _TOKEN_SECONDS)
        self._tokens = Counter(
            "veneer_tokens", "Tokens of prompts and answers.", ["kind", "adapter"], registry=self.registry
        )
        self._loads = self._histogram("veneer_adapter_load_seconds", "Loads of adapters, by phase.", _SECONDS, "phase")

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    def answered(self, status: int, seconds: float) -> None:
        """Count an answer; the status 499 is that of a client that went away."""
        self._requests.labels(str(status)).inc()
        self._seconds.observe(seconds)

    def queued(self, seconds: float) -> None:
        """Count the wait of a request."""
        self._queue.observe(seconds)

    def loaded(self, phase: str, seconds: float) -> None:
        """Count a phase of an adapter's load."""
        self._loads.labels(phase).observe(seconds)

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
        if len(self._adapters) < self._most_adapters:
            self._adapters.add(adapter)
        return adapter if adapter in self._adapters else OTHERS

    def text(self, service: Service) -> bytes:
        """Return all metrics in Prometheus' text format."""
        self._forget_gone({info.name for info in service.registry.adapters(ANONYMOUS)} | {service.settings.base_name})
        state = CollectorRegistry()
        state.register(_StateCollector(service))
        return generate_latest(self.registry) + generate_latest(state)

    def _forget_gone(self, names: set[str]) -> None:
        """Give the series of adapters that were removed to those that come."""
        for name in self._adapters - names:
            self._adapters.remove(name)
            for kind in ("prompt", "generated"):
                self._tokens.remove(kind, name)


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
        yield CounterMetricFamily("veneer_engine_restarts", "Starts of the engine anew.", value=status.restarts)
        yield from _steps(status.work)
        yield _slots(status)
        yield from _bank(status.work)
        yield self._adapters()
        yield self._tiers()
        yield self._hits(status.work)
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

    def _hits(self, work: EngineWork) -> Metric:
        text = "Requests by the place where they found their adapter."
        family = CounterMetricFamily("veneer_tier_hits", text, labels=["tier"])
        for tier, count in {**self._service.admission.hits, "bank": work.bank.get("hits", 0)}.items():
            family.add_metric([tier], count)
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


def _bank(work: EngineWork) -> Iterator[Metric]:
    for (name, text), counter in _BANK.items():
        yield CounterMetricFamily(name, text, value=work.bank.get(counter, 0))


def _steps(work: EngineWork) -> Iterator[Metric]:
    seconds = HistogramMetricFamily("veneer_step_seconds", "Steps of the engine, by phase.", labels=["phase"])
    for phase, values in work.seconds.items():
        seconds.add_metric([phase], _buckets(values), values.total)
    yield seconds
    yield _sizes("veneer_step_tokens", "Tokens of a step.", work.sizes.get("tokens"))
    yield _sizes("veneer_batch_adapters", "Adapters of a step.", work.sizes.get("adapters"))


def _sizes(name: str, text: str, values: Distribution | None) -> Metric:
    family = HistogramMetricFamily(name, text)
    if values is not None:
        family.add_metric([], _buckets(values), values.total)
    return family


def _buckets(values: Distribution) -> list[tuple[str, float]]:
    bounds = [*(str(float(bound)) for bound in values.bounds), "+Inf"]
    return list(zip(bounds, accumulate(values.counts), strict=True))
