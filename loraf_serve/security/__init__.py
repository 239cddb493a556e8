"""Who may do what, and how the server shows who it is.

    permissions    what the holder of a token may do
    tokens         the token file: read, checked, reloaded; a token to its permissions
    allowance      requests in flight and tokens a minute of each token
    tls_files      certificate, key and the clients' authority, checked
    certificates   gRPC's credentials of them, replaced without a restart
    contexts       Python's TLS with them, for HTTP
    changes        notices that files have changed

Knows neither gRPC's server nor a backend.
"""
