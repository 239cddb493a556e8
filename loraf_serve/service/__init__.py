"""The service behind every door, and its gRPC door.

    server           its life: listen, warm up, serve, drain
    generations      what a request for answers passes, whichever door it came through
    doors            what another door gets of the service, and what the service asks of it
    services         answers calls of gRPC: `answering` asks `generations`, `messages` makes its messages, `status` the
                     status of an exception
    vllm_contract    vLLM's own gRPC contract beside it
    info             what the server is and what it admits
    admission        limits the requests in flight
    server_options   addresses, TLS, limits

Knows backends only by `loraf_serve.backends.backend`.
"""
