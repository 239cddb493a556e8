"""vLLM's own metrics: those that it makes for a real configuration, without an engine."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY, generate_latest

pytest.importorskip("vllm")

from vllm.usage.usage_lib import UsageContext
from vllm.v1.metrics.stats import SchedulerStats

from loraf_serve.vllm.engine.arguments import resident_args
from loraf_serve.vllm.engine.metrics import EngineMetrics
from tests.loraf_serve.harness import model_folder
from tests.loraf_serve.vllm_engines import COMMON


@pytest.fixture(scope="module")
def metrics():
    config = resident_args(model_folder(), COMMON).create_engine_config(UsageContext.ENGINE_CONTEXT)
    before = set(REGISTRY._collector_to_names)
    metrics = EngineMetrics(config)
    metrics.log_engine_initialized()
    yield metrics
    for collector in set(REGISTRY._collector_to_names) - before:
        REGISTRY.unregister(collector)


def exposed() -> list[str]:
    return [line for line in generate_latest(REGISTRY).decode().splitlines() if line.startswith("vllm:")]


def test_no_label_joins_the_names_of_task_sets(metrics):
    stats = SchedulerStats(num_running_reqs=3, running_lora_adapters={f"loraf:d:math:{i}": 1 for i in range(3)})
    before = len(exposed())
    metrics.record(stats, None)
    assert any(line.startswith("vllm:num_requests_running{") and line.endswith(" 3.0") for line in exposed())
    assert len(exposed()) == before
    assert not [line for line in exposed() if "lora" in line]


def test_no_label_tells_where_the_model_lies(metrics):
    lines = exposed()
    assert len(lines) > 100
    assert f'model_name="{model_folder().name}"' in "".join(lines)
    assert not [line for line in lines if str(model_folder().parent) in line]


def test_statistics_are_computed_only_for_a_server_with_metrics():
    from loraf_serve.vllm.engine.backends import ResidentBackend

    backend = ResidentBackend(model_folder())
    assert backend._stat_loggers() == []
    backend.keeps_metrics = True
    assert backend._stat_loggers() == [EngineMetrics]
