"""The gRPC side of the server.

    server           its life: listen, warm up, serve, drain
    services         answers calls; `messages` makes the protocol's messages, `status` the status of an exception
    info             what the server is and what it admits
    admission        limits the requests in flight
    server_options   addresses, TLS, limits

Knows backends only by `loraf_serve.backends.backend`.
"""
