"""The metrics over HTTP, asked by Python's own client; tokens, certificates, and clients that mean no good."""

from __future__ import annotations

import gzip
import http.client
import select
import shutil
import socket
import ssl
import subprocess
import time
from contextlib import closing, suppress

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.parser import text_string_to_metric_families

from loraf.errors import ConfigError
from loraf_serve.errors import Unauthenticated
from loraf_serve.observe import endpoint
from loraf_serve.observe.endpoint import MetricsEndpoint
from loraf_serve.security.tls_files import TlsFiles
from tests.loraf_serve.harness import eventually
from tests.tools import needs


@pytest.fixture
def registries():
    ours, engines = CollectorRegistry(), CollectorRegistry()
    Counter("loraf_requests_total", "Calls.", registry=ours).inc(3)
    Gauge("vllm:num_requests_running", "Running.", registry=engines).set(2)
    return ours, engines


@pytest.fixture
def serve(registries):
    """Starts endpoints on free ports; closes them at the end."""
    started = []

    def start(**options):
        started.append(MetricsEndpoint(registries, "127.0.0.1", 0, **options))
        return started[-1].port

    yield start
    for running in started:
        running.close()


def ask(port, path="/metrics", method="GET", context=None, **headers):
    kind = http.client.HTTPSConnection if context else http.client.HTTPConnection
    options = {"context": context} if context else {}
    with closing(kind("localhost" if context else "127.0.0.1", port, timeout=20, **options)) as connection:
        connection.request(method, path, headers={name.replace("_", "-"): text for name, text in headers.items()})
        response = connection.getresponse()
        return response.status, response.headers, response.read()


def test_all_registries_are_shown_together(serve):
    status, headers, body = ask(serve())
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    assert families["loraf_requests"].samples[0].value == 3
    assert families["vllm:num_requests_running"].samples[0].value == 2


def test_prometheus_asks_for_openmetrics_and_gzip(serve):
    status, headers, body = ask(serve(), Accept="application/openmetrics-text; version=1.0.0", Accept_Encoding="gzip")
    assert status == 200 and headers["Content-Type"].startswith("application/openmetrics-text")
    assert gzip.decompress(body).endswith(b"# EOF\n")


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [("GET", "/", 404), ("GET", "/metrics/../etc", 404), ("POST", "/metrics", 405), ("GET", "/metrics?x=1", 200)],
)
def test_there_is_one_page(serve, method, path, expected):
    assert ask(serve(), path, method)[0] == expected


def test_head_has_no_body(serve):
    status, headers, body = ask(serve(), method="HEAD")
    assert status == 200 and int(headers["Content-Length"]) > 0 and body == b""


def test_a_token_is_asked_for_before_anything_is_told(serve):
    def authenticate(authorization):
        if authorization != "Bearer right":
            raise Unauthenticated("no")

    port = serve(authenticate=authenticate)
    for path in ("/metrics", "/other"):
        status, headers, body = ask(port, path)
        assert (status, headers["WWW-Authenticate"], body) == (401, "Bearer", b"Unauthorized\n")
    assert ask(port, Authorization="Bearer wrong")[0] == 401
    assert ask(port, Authorization="Bearer right")[0] == 200


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="--metrics-port"):
        MetricsEndpoint([CollectorRegistry()], "127.0.0.1", taken.getsockname()[1])


def test_a_closed_endpoint_does_not_listen(registries):
    running = MetricsEndpoint(registries, "127.0.0.1", 0)
    assert ask(running.port)[0] == 200
    running.close()
    running.close()
    with pytest.raises(OSError):
        ask(running.port)


# --- TLS


def certificate(folder, name):
    """Writes a certificate for localhost that signs itself, over one that may be there."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip(needs("openssl"))
    files = folder / f"{name}.pem", folder / f"{name}.key"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command, "-out", files[0], "-keyout", files[1]], check=True, capture_output=True)
    return files


def trusting(authority):
    return ssl.create_default_context(cafile=authority)


def test_new_certificates_are_used_without_a_restart(serve, tmp_path):
    pem, key = certificate(tmp_path, "server")
    port = serve(tls=TlsFiles(pem, key))
    first = trusting(pem)
    assert ask(port, context=first)[0] == 200
    certificate(tmp_path, "server")
    second = trusting(pem)

    def answers(context):
        try:
            return ask(port, context=context)[0] == 200
        except ssl.SSLError:
            return False

    assert eventually(lambda: answers(second))
    assert not answers(first)
    pem.write_text("broken")  # the certificates before stay in use
    time.sleep(1.1)  # the files are looked at once a second
    assert answers(second)


def test_a_client_without_a_certificate_is_refused_where_one_is_needed(serve, tmp_path):
    server, client = certificate(tmp_path, "server"), certificate(tmp_path, "client")
    port = serve(tls=TlsFiles(*server, client[0]))
    context = trusting(server[0])
    with pytest.raises(OSError):
        ask(port, context=context)
    context.load_cert_chain(*client)
    assert ask(port, context=context)[0] == 200


# --- clients that mean no good


def is_open(client: socket.socket) -> bool:
    """A connection that the server has closed can be read: there is its end."""
    return not select.select([client], [], [], 0)[0]


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n",
        b"GET /metrics\r\n\r\n",  # HTTP 0.9
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\r\n\r\n",  # TLS
        b"GET /metrics HTTP/1.1\r\n" + b"a: b\r\n" * 500 + b"\r\n",  # too many headers
        b"GET /metrics HTTP/1.1\r\nx: " + b"a" * 100_000 + b"\r\n\r\n",  # too long
        b"GET /" + b"a" * 100_000,
    ],
)
def test_no_request_is_answered_but_http(serve, data):
    port = serve()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        try:
            client.sendall(data)
            answer = client.makefile("rb").read()
        except ConnectionError:
            answer = b""
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
    assert ask(port)[0] == 200


def test_many_requests_do_not_take_the_processor(serve, registries):
    written = 0

    class Counting:
        def collect(self):
            nonlocal written
            written += 1
            return ()

    registries[0].register(Counting())
    port, before = serve(), written
    began, used = time.monotonic(), time.process_time()
    while time.monotonic() - began < 1.0:
        assert ask(port)[0] == 200
    assert written - before <= 5
    assert time.process_time() - used < 0.5  # this client's too


@pytest.mark.parametrize("with_tls", [False, True])
def test_slow_clients_are_cut_off_and_their_number_is_limited(serve, monkeypatch, tmp_path, with_tls):
    """With TLS they never begin the handshake."""
    monkeypatch.setattr(endpoint, "SECONDS", 2.0)
    tls = TlsFiles(*certificate(tmp_path, "server")) if with_tls else None
    port = serve(tls=tls)
    clients = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(endpoint.MAX_CONNECTIONS * 2)]
    try:
        for client in clients if not with_tls else ():
            with suppress(ConnectionError):
                client.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert eventually(lambda: sum(map(is_open, clients)) == endpoint.MAX_CONNECTIONS)
        began = time.monotonic()
        for client in clients:
            with suppress(ConnectionError):  # reset, or closed
                assert client.recv(100) == b""
        assert time.monotonic() - began < 10
        assert ask(port, context=trusting(tls.certificate) if tls else None)[0] == 200
    finally:
        for client in clients:
            client.close()
