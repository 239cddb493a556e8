"""What an operator sees of the running server.

    call       what is known of one call of a client, and the interface of those who observe calls
    metrics    counts calls for Prometheus, and shows the server's state; `labels` bounds the number of time series
    endpoint   serves metrics over HTTP
    logs       log lines as text or JSON, and one for each call
    traces     OpenTelemetry spans

An observer is told of every call and never fails one. Knows neither gRPC's server nor a backend.
"""
