"""The gRPC side of the server: services, their messages, status codes, limits, drain.

`server` puts it together, `services` answers calls, `status` turns exceptions into codes. Knows backends only by
`backends.backend`.
"""
