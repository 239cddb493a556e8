"""The observers of a server and its metrics' endpoint, as its options ask for them."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import REGISTRY, CollectorRegistry, disable_created_metrics

from loraf.errors import ConfigError, Problem
from loraf_serve.addresses import DEFAULT_HOST, address_of, is_socket
from loraf_serve.observe import traces
from loraf_serve.observe.call import Observer
from loraf_serve.observe.endpoint import PATH, MetricsEndpoint
from loraf_serve.observe.logs import LogObserver
from loraf_serve.observe.metrics import MetricsObserver, ServiceState, StateCollector
from loraf_serve.service.server_options import ServerOptions


class Observation:
    """What watches one server.

    Attributes:
        observers: to be told of every call.

    Raises:
        ConfigError: spans are to be sent, and OpenTelemetry is not installed.
    """

    def __init__(self, options: ServerOptions):
        self._options = options
        self._registry = CollectorRegistry()
        self._endpoint: MetricsEndpoint | None = None
        self.observers: list[Observer] = [LogObserver()]
        if options.metrics_port is not None:
            self.observers.append(MetricsObserver(self._registry))
        try:
            spans = traces.observer()
        except ImportError:
            message, remedy = "OpenTelemetry is not installed", 'pip install "loraf[otel]", or leave the variable out'
            raise ConfigError(Problem(message, " or ".join(traces.ENDPOINTS), remedy=remedy)) from None
        if spans:
            self.observers.insert(0, spans)  # so that the others see its ids

    def listen(self, state: ServiceState, authenticate: Callable[[str | None], object] | None) -> str:
        """Starts to serve metrics. Returns their address; "" if the options ask for none.

        Raises:
            ConfigError: the address is in use or not available.
        """
        options = self._options
        if options.metrics_port is None:
            return ""
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second time series for each counter, which nobody asks for
        StateCollector(state, self._registry)
        host = DEFAULT_HOST if is_socket(options.host) else options.host
        # The default registry has the process's and the engine's own.
        registries = [self._registry, REGISTRY]
        self._endpoint = MetricsEndpoint(registries, host, options.metrics_port, options.tls, authenticate)
        return f"{'https' if options.tls else 'http'}://{address_of(host, self._endpoint.port)}{PATH}"

    def close(self) -> None:
        """Stops to serve metrics. Idempotent."""
        if self._endpoint:
            self._endpoint.close()
