"""The metrics: what Prometheus reads is what the page of the API lists."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.fake_engine import FakeEngine, served
from tests.serving.http_service import call, one_adapter_service
from tests.serving.registry_world import World, run
from veneer.serving.admission import Admission
from veneer.serving.auth import ANONYMOUS
from veneer.serving.metrics import OTHERS, Measured, ServerMetrics
from veneer.serving.service import Service

PAGE = Path(__file__).parents[2] / "docs" / "serve-api.md"
# How a metric is named where its values stand.
_SUFFIX = {"counter": "_total"}


@pytest.fixture
def service(tmp_path: Path) -> Service:
    service = one_adapter_service(tmp_path, gateway_metrics=True)
    return replace(service, tiers={"store": lambda: 20, "host": lambda: 10})


def scraped(service: Service) -> dict[str, Any]:
    """Return the families of one scrape, by name."""
    with served(service) as url:
        assert call(url, "POST", "/v1/completions", {"model": "a", "prompt": "w1", "max_tokens": 3}).status == 200
        text = call(url, "GET", "/metrics").body.decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    return {name: family for name, family in families.items() if not name.endswith("_created")}


def values_of(families: Iterable[Metric]) -> dict[tuple[str, ...], float]:
    """Return the values of all series: the name and the values of the labels, sorted by theirs, -> the value."""
    samples = [sample for family in families for sample in family.samples]
    return {(sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value for sample in samples}


def test_the_page_of_the_api_lists_all_metrics_with_their_types_and_labels(service: Service) -> None:
    service.metrics.loaded("fetch", 0.1)
    given = {}
    for name, family in scraped(service).items():
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        given[name + _SUFFIX.get(family.type, "")] = family.type, labels
    rows = re.findall(r"^\| `([\w:]+)(?:\{([\w,]+)\})?` \| (counter|gauge|histogram) \|", PAGE.read_text(), re.M)
    assert {name: (kind, set(filter(None, labels.split(",")))) for name, labels, kind in rows} == given


def test_the_work_of_the_engine_is_shown(service: Service) -> None:
    assert isinstance(service.engine, FakeEngine)
    service.engine.meter.took("forward", 0.03)
    service.engine.meter.computed(tokens=12, adapters=2)
    families = scraped(service)
    values = values_of(families.values())
    assert values["veneer_step_seconds_count", "forward"] == 1
    assert values["veneer_step_seconds_sum", "forward"] == 0.03
    assert values["veneer_step_seconds_bucket", "0.025", "forward"] == 0
    assert values["veneer_step_seconds_bucket", "0.05", "forward"] == 1
    assert values["veneer_step_seconds_bucket", "+Inf", "forward"] == 1
    assert values["veneer_step_tokens_sum",] == 12
    assert values["veneer_batch_adapters_sum",] == 2
    assert values["veneer_bank_writes_total",] == 3
    assert values["veneer_slow_lane_rows_total",] == 5


def test_loads_are_measured_by_phase_and_requests_by_where_their_adapter_was(tmp_path: Path) -> None:
    metrics = ServerMetrics()
    world = World(tmp_path)
    world.residency._on_phase = world.registry._on_phase = metrics.loaded
    admission = Admission(world.residency)

    async def ask() -> None:
        with world.registry.use("a", ANONYMOUS) as use:
            async with admission.admit(use, ANONYMOUS, 10):
                pass

    async def main() -> None:
        info = await world.register("a")
        assert info.current is not None
        await ask()
        await world.residency.drop(info.current.digest)
        await asyncio.gather(ask(), ask())
        await ask()

    run(world, main())
    text = values_of(metrics.registry.collect())
    counts = {
        phase: text["veneer_adapter_load_seconds_count", phase] for phase in ("fetch", "room", "verify", "engine")
    }
    assert counts == {"fetch": 1, "room": 2, "verify": 2, "engine": 2}
    assert admission.hits == {"host": 2, "store": 2}


def test_adapters_beyond_the_first_few_share_one_series() -> None:
    metrics = ServerMetrics(adapters=2)
    for name in "abca":
        metrics.generated(name, 1, Measured(0.0, tokens=2))
    values = values_of(metrics.registry.collect())
    tokens = {key[1]: value for key, value in values.items() if key[0] == "veneer_tokens_total" and key[2] == "prompt"}
    assert tokens == {"a": 2, "b": 1, OTHERS: 1}


def test_the_series_of_adapters_that_are_gone_go_to_those_that_come(service: Service) -> None:
    metrics = service.metrics = ServerMetrics(adapters=3)
    for name in ("a", "base", "gone", "late"):
        metrics.generated(name, 1, Measured(0.0, tokens=2))
    scraped(service)
    metrics.generated("new", 1, Measured(0.0, tokens=2))
    names = {key[1] for key in values_of(metrics.registry.collect()) if key[0] == "veneer_tokens_total"}
    assert names == {"a", "base", OTHERS, "new"}
