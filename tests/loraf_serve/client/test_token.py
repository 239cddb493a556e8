"""Where a bearer token goes: over TLS or within this machine, and nowhere else unless that is asked for."""

from __future__ import annotations

import grpc
import pytest

from loraf_serve.client import PermissionDenied, ServiceError, Unauthenticated
from tests.loraf_serve.client.stand_in import CLIENTS, call, standing_in
from tests.loraf_serve.harness import serving

both = pytest.mark.parametrize("kind", CLIENTS)
TOKEN = "s3cret-token_~+/="
OF_A_FILE = "token-of-a-file-0000"


def sent(server) -> list[str | None]:
    return [attempt.metadata.get("authorization") for attempt in server.attempts]


@both
def test_every_call_to_this_machine_carries_the_token(kind):
    with standing_in() as (server, address):
        for method in ("adapters", "server_info", "health"):
            call(kind, address, method, options={"token": TOKEN})
        for method in ("generate", "stream"):
            call(kind, address, method, "x", options={"token": TOKEN})
        call(kind, address, "adapters")
    assert sent(server) == [f"Bearer {TOKEN}"] * 5 + [None]


@both
def test_a_unix_socket_is_this_machine(kind, tmp_path):
    with standing_in(address=f"unix:{tmp_path}/s") as (server, address):
        call(kind, address, "adapters", options={"token": TOKEN})
    assert sent(server) == [f"Bearer {TOKEN}"]


@both
@pytest.mark.parametrize("address", ["10.1.2.3:50051", "server.example:50051", "0.0.0.0:50051", "[2001:db8::1]:50051"])
def test_a_token_is_not_sent_in_clear_over_a_network(kind, address):
    with pytest.raises(ValueError, match="unencrypted; connect over TLS") as error:
        kind(address, token=TOKEN)
    assert TOKEN not in str(error.value)
    kind(address, token=TOKEN, insecure_token=True)
    kind(address, token=TOKEN, tls=True)


@both
@pytest.mark.parametrize("token", ["", "two words", "line\n", "ümlaut", "a,b"])
def test_what_no_bearer_token_can_be_is_refused_without_showing_it(kind, token):
    with pytest.raises(ValueError, match="the token is empty, or has characters") as error:
        kind("127.0.0.1:9", token=token)
    assert not token or token not in str(error.value)


def test_a_client_does_not_show_its_token():
    for kind in CLIENTS:
        assert repr(kind("127.0.0.1:9", token=TOKEN)) == f"{kind.__name__}('127.0.0.1:9')"


@both
def test_over_tls_the_token_goes_along(kind, pki):
    pair = ((pki / "server.key").read_bytes(), (pki / "server.crt").read_bytes())
    with standing_in(credentials=grpc.ssl_server_credentials([pair])) as (server, address):
        call(kind, address, "generate", "x", options={"token": TOKEN, "tls_ca": pki / "ca.crt"})
        with pytest.raises(ServiceError, match="UNAVAILABLE"):  # not a server that this authority knows
            call(kind, address, "generate", "x", options={"token": TOKEN, "tls_ca": pki / "other.crt", "retries": 0})
    assert sent(server) == [f"Bearer {TOKEN}"]


@both
def test_what_the_server_says_of_a_token(kind, tmp_path):
    (tmp_path / "tokens").write_text(f"{OF_A_FILE} tasks=math\n")
    with serving(token_file=tmp_path / "tokens") as running:
        options = {"token": OF_A_FILE}
        assert call(kind, running.address, "generate", "x", tasks=["math"], options=options).text
        with pytest.raises(PermissionDenied) as denied:
            call(kind, running.address, "generate", "x", tasks=["nlu"], options=options)
        for token in (None, "another-token-000000"):
            with pytest.raises(Unauthenticated) as refused:
                call(kind, running.address, "generate", "x", options={"token": token})
            assert refused.value.request_id
        assert denied.value.request_id
        assert call(kind, running.address, "health") == "SERVING"
