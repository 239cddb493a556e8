"""Prometheus metrics of the service. vLLM's own are in `loraf_serve.vllm.engine.metrics`.

    calls ─▶ MetricsObserver ─┐
    ServiceState, when asked ─┴▶ a registry ─▶ endpoint

Every name, label and help text stands in `FAMILIES`; docs, dashboard and alert rules are tested against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from loraf import __version__
from loraf_serve.observe.call import Call, Observer
from loraf_serve.observe.labels import DEFAULT_LIMIT, LabelLimit

# Upper bounds of the buckets, in seconds.
_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_DURATION = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_SET = ("adapter", "task_set")


@dataclass(frozen=True)
class Family:
    """A metric as Prometheus shows it.

    Attributes:
        kind: counter, gauge or histogram.
        help: one sentence.
        buckets: of a histogram.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()


FAMILIES = {
    family.name: family
    for family in (
        Family("loraf_requests_total", "counter", ("method", "code", *_SET), "Finished calls, by gRPC status code."),
        Family(
            "loraf_request_duration_seconds",
            "histogram",
            ("method",),
            "Time from a call's arrival to its status.",
            _DURATION,
        ),
        Family("loraf_prompt_tokens_total", "counter", _SET, "Tokens of prompts that reached the backend."),
        Family(
            "loraf_cached_prompt_tokens_total",
            "counter",
            _SET,
            "Tokens of prompts that the backend had in its prefix cache.",
        ),
        Family("loraf_completion_tokens_total", "counter", _SET, "Generated tokens."),
        Family(
            "loraf_time_to_first_token_seconds",
            "histogram",
            _SET,
            "Time from a request's arrival to its first token.",
            _FIRST_TOKEN,
        ),
        Family(
            "loraf_time_between_tokens_seconds",
            "histogram",
            _SET,
            "Time between two tokens of an answer.",
            _BETWEEN_TOKENS,
        ),
        Family("loraf_requests_in_flight", "gauge", ("method",), "Calls that have arrived and have no status yet."),
        Family(
            "loraf_requests_waiting",
            "gauge",
            (),
            "Generation requests that the backend has accepted and that have no token yet.",
        ),
        Family("loraf_queue_limit", "gauge", (), "Limit on generation requests in flight (--max-queue)."),
        Family(
            "loraf_serving",
            "gauge",
            (),
            "1 while requests are admitted, 0 while the server loads, drains or has failed.",
        ),
        Family("loraf_engine_up", "gauge", (), "0 once the engine has failed for good, else 1."),
        Family("loraf_adapter_bytes", "gauge", ("adapter",), "Memory of a loaded adapter, in all processes."),
        Family("loraf_adapter_tasks", "gauge", ("adapter",), "Tasks of a loaded adapter."),
        Family(
            "loraf_build_info",
            "gauge",
            ("version", "backend"),
            "Always 1; the labels tell the release and the backend.",
        ),
    )
}


@dataclass(frozen=True)
class LoadedAdapter:
    """What the metrics tell of an adapter."""

    name: str
    bytes: int
    tasks: int


@dataclass(frozen=True)
class ServiceState:
    """What the metrics ask the server for at every scrape, from another thread than the server's.

    Attributes:
        serving, engine_up: whether requests are admitted, and whether the engine has not failed.
        adapters: the loaded adapters.
        backend: name of the backend that serves now.
        queue_limit: --max-queue.
    """

    serving: Callable[[], bool]
    engine_up: Callable[[], bool]
    adapters: Callable[[], Iterable[LoadedAdapter]]
    backend: Callable[[], str]
    queue_limit: int


class MetricsObserver(Observer):
    """Counts calls.

    Args:
        registry: gets the metrics.
        label_limit: number of pairs of adapter and task set that get labels of their own.
    """

    def __init__(self, registry: CollectorRegistry, label_limit: int = DEFAULT_LIMIT):
        self._labels = LabelLimit(label_limit)
        self._waiting_calls: set[int] = set()  # ids of calls without a token

        def counter(name: str) -> Counter:
            family = FAMILIES[name]
            return Counter(name, family.help, family.labels, registry=registry)

        def gauge(name: str) -> Gauge:
            family = FAMILIES[name]
            return Gauge(name, family.help, family.labels, registry=registry)

        def histogram(name: str) -> Histogram:
            family = FAMILIES[name]
            return Histogram(name, family.help, family.labels, buckets=family.buckets, registry=registry)

        self._requests = counter("loraf_requests_total")
        self._durations = histogram("loraf_request_duration_seconds")
        self._prompt_tokens = counter("loraf_prompt_tokens_total")
        self._cached_tokens = counter("loraf_cached_prompt_tokens_total")
        self._completion_tokens = counter("loraf_completion_tokens_total")
        self._first_token = histogram("loraf_time_to_first_token_seconds")
        self._between_tokens = histogram("loraf_time_between_tokens_seconds")
        self._in_flight = gauge("loraf_requests_in_flight")
        self._waiting = gauge("loraf_requests_waiting")

    def began(self, call: Call) -> None:
        self._in_flight.labels(call.name).inc()

    def answering(self, call: Call) -> None:
        self._waiting_calls.add(id(call))
        self._waiting.set(len(self._waiting_calls))

    def tokens(self, call: Call, count: int, since: float | None) -> None:
        labels = self._labels.of(call.adapter, call.task_set)
        assert call.last_token is not None
        if since is None:
            self._is_answered(call)
            self._first_token.labels(*labels).observe(call.last_token - call.began)
        elif count:
            between = self._between_tokens.labels(*labels)
            for _ in range(count):
                between.observe((call.last_token - since) / count)

    def ended(self, call: Call) -> None:
        method, labels = call.name, self._labels.of(call.adapter, call.task_set)
        self._is_answered(call)
        self._in_flight.labels(method).dec()
        self._requests.labels(method, call.code, *labels).inc()
        if call.ended is not None:
            self._durations.labels(method).observe(call.ended - call.began)
        if call.answering is not None:
            self._prompt_tokens.labels(*labels).inc(call.prompt_tokens)
            self._cached_tokens.labels(*labels).inc(call.cached_prompt_tokens)
            self._completion_tokens.labels(*labels).inc(call.completion_tokens)

    def _is_answered(self, call: Call) -> None:
        self._waiting_calls.discard(id(call))
        self._waiting.set(len(self._waiting_calls))


class StateCollector:
    """Gauges that are read from the server when Prometheus asks.

    Args:
        registry: gets the metrics.
        adapter_limit: adapters that get labels of their own; the first by name.
    """

    def __init__(self, state: ServiceState, registry: CollectorRegistry, adapter_limit: int = DEFAULT_LIMIT):
        self._state = state
        self._limit = adapter_limit
        registry.register(self)

    def describe(self) -> Iterator[Metric]:
        """The metrics without values. With it, registering calls no `collect`."""
        for name in ("loraf_queue_limit", "loraf_serving", "loraf_engine_up", "loraf_adapter_bytes"):
            yield _family(name)
        yield from (_family("loraf_adapter_tasks"), _family("loraf_build_info"))

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now."""
        state = self._state
        yield _family("loraf_queue_limit", ((), state.queue_limit))
        yield _family("loraf_serving", ((), state.serving()))
        yield _family("loraf_engine_up", ((), state.engine_up()))
        adapters = sorted(state.adapters(), key=lambda adapter: adapter.name)[: self._limit]
        yield _family("loraf_adapter_bytes", *(((adapter.name,), adapter.bytes) for adapter in adapters))
        yield _family("loraf_adapter_tasks", *(((adapter.name,), adapter.tasks) for adapter in adapters))
        yield _family("loraf_build_info", ((__version__, state.backend()), 1))


def _family(name: str, *samples: tuple[tuple[str, ...], float]) -> GaugeMetricFamily:
    description = FAMILIES[name]
    family = GaugeMetricFamily(name, description.help, labels=description.labels)
    for labels, value in samples:
        family.add_metric(labels, float(value))
    return family
