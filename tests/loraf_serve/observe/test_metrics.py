"""Prometheus metrics of calls and of the server's state, read back with Prometheus' own parser."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from loraf_serve.observe.labels import LabelLimit
from loraf_serve.observe.metrics import FAMILIES, LoadedAdapter, MetricsObserver, ServiceState, StateCollector
from tests.loraf_serve.observe.calls import LOAD, answer, begin, end
from tests.tools import needs


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def observer(registry):
    return MetricsObserver(registry)


def state(**changes) -> ServiceState:
    adapters = [LoadedAdapter("trio", 1000, 3), LoadedAdapter("pair", 500, 2)]
    usual = {
        "serving": lambda: True,
        "engine_up": lambda: True,
        "adapters": lambda: adapters,
        "backend": lambda: "resident",
        "queue_limit": 8,
    }
    return ServiceState(**usual | changes)


def value(registry, name, **labels) -> float | None:
    return registry.get_sample_value(name, labels)


def test_an_answer_is_counted(registry, observer):
    answer([observer])
    trio = {"adapter": "trio", "task_set": "math"}
    assert value(registry, "loraf_requests_total", method="Generate", code="OK", **trio) == 1
    assert value(registry, "loraf_prompt_tokens_total", **trio) == 10
    assert value(registry, "loraf_cached_prompt_tokens_total", **trio) == 4
    assert value(registry, "loraf_completion_tokens_total", **trio) == 3
    assert value(registry, "loraf_time_to_first_token_seconds_sum", **trio) == pytest.approx(0.5)
    # Two tokens that are ready together share the time since the last one.
    assert value(registry, "loraf_time_between_tokens_seconds_count", **trio) == 2
    assert value(registry, "loraf_time_between_tokens_seconds_sum", **trio) == pytest.approx(0.2)
    assert value(registry, "loraf_time_between_tokens_seconds_bucket", le="0.25", **trio) == 2
    assert value(registry, "loraf_request_duration_seconds_sum", method="Generate") == pytest.approx(1)


def test_a_refused_call_has_no_adapter_and_no_tokens(registry, observer):
    end([observer], begin([observer], LOAD), "FAILED_PRECONDITION")
    labels = {"method": "LoadAdapter", "code": "FAILED_PRECONDITION", "adapter": "", "task_set": ""}
    assert value(registry, "loraf_requests_total", **labels) == 1
    assert value(registry, "loraf_prompt_tokens_total", adapter="", task_set="") is None


def test_calls_in_flight_and_waiting(registry, observer):
    first, second = begin([observer]), begin([observer])
    assert value(registry, "loraf_requests_in_flight", method="Generate") == 2
    assert value(registry, "loraf_requests_waiting") == 0
    observer.answering(first)
    observer.answering(second)
    assert value(registry, "loraf_requests_waiting") == 2
    first.first_token = first.last_token = 100.5
    observer.tokens(first, 1, None)
    assert value(registry, "loraf_requests_waiting") == 1
    end([observer], first, "OK")
    end([observer], second, "CANCELLED")  # before its first token
    assert value(registry, "loraf_requests_waiting") == 0
    assert value(registry, "loraf_requests_in_flight", method="Generate") == 0


def test_a_client_that_tries_weights_makes_no_endless_time_series(registry):
    observer = MetricsObserver(registry, label_limit=10)
    for i in range(1000):
        answer([observer], task_set=f"math:{i / 1000}")
    for i in range(1000):
        answer([observer], task_set=f"task{i}")
    sets = {
        sample.labels["task_set"]
        for family in registry.collect()
        for sample in family.samples
        if "task_set" in sample.labels
    }
    assert len(sets) == 11 and "other" in sets
    assert sum(":" in name for name in sets) == 5
    other = value(registry, "loraf_completion_tokens_total", adapter="other", task_set="other")
    assert other == 3 * (2000 - 10)


def test_a_label_is_short():
    limit = LabelLimit(3)
    names = [f"task-number-{i}" for i in range(30)]
    assert limit.of("trio", "+".join(names)) == ("trio", "30 tasks")
    assert limit.of("trio", "math+nlu:0.5") == ("trio", "math+nlu:0.5")


def test_the_servers_state_is_read_when_asked(registry):
    serving = [True]
    StateCollector(state(serving=lambda: serving[0]), registry, adapter_limit=2)
    assert value(registry, "loraf_serving") == 1
    serving[0] = False
    assert value(registry, "loraf_serving") == 0
    assert value(registry, "loraf_engine_up") == 1
    assert value(registry, "loraf_queue_limit") == 8
    assert value(registry, "loraf_adapter_bytes", adapter="pair") == 500
    assert value(registry, "loraf_adapter_tasks", adapter="trio") == 3


def test_every_family_is_exposed_with_its_labels_and_help(registry, observer):
    StateCollector(state(), registry)
    answer([observer])
    exposed = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        if not name.endswith("_created"):
            exposed[name] = (family.type, labels, family.documentation)
    assert exposed == {f.name: (f.kind, set(f.labels), f.help) for f in FAMILIES.values()}


def test_prometheus_finds_nothing_to_complain_about(registry, observer):
    import shutil
    import subprocess

    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip(needs("promtool"))
    StateCollector(state(), registry)
    answer([observer])
    lint = subprocess.run([promtool, "check", "metrics"], input=generate_latest(registry), capture_output=True)
    complaints = [line for line in lint.stderr.decode().splitlines() if "_created" not in line]
    assert (lint.returncode, lint.stdout, complaints) == (0, b"", [])
