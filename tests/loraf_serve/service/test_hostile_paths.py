"""A path of HTTP/2 that is not UTF-8 must not end the server: grpc.aio's loop that accepts calls fails to decode it."""

from __future__ import annotations

from h2.config import H2Configuration
from h2.connection import H2Connection

from benchmarks.campaigns.attacks import END_HEADERS, HEADERS, path_block
from benchmarks.campaigns.frames import Connection, frame
from tests.loraf_serve.asking import ask, ask_stream
from tests.loraf_serve.fake_backend import FakeBackend, expected_text
from tests.loraf_serve.harness import serving


def test_a_path_that_is_not_utf8_harms_nobody_else():
    with serving(FakeBackend(seconds_per_token=0.02)) as running:
        stream = running.generation.StreamGenerate(ask_stream("x", max_tokens=60))
        first = next(stream)
        for _ in range(3):
            connection = Connection(running.address)
            connection.open()
            connection.send(frame(HEADERS, END_HEADERS | 1, 1, path_block(H2Connection(H2Configuration()))))
            connection.wait(0.3, 1)
            connection.close()
        text = first.choices[0].text + "".join(piece.choices[0].text for piece in stream)
        assert text == expected_text(running.backend.requests[0])
        other = Connection(running.address)  # a connection that did not exist before
        other.open()
        number = other.call("/loraf.v1.GenerationService/Generate", ask("y", max_tokens=1).SerializeToString())
        other.wait(5, number)
        assert [status.code for status in other.statuses()] == ["0"]
        other.close()
