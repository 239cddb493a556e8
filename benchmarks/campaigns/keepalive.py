"""Which keepalive pings of a client a server bears, with gRPC's real numbers.

    python -m benchmarks.campaigns.keepalive        # two minutes

A call of one answer that takes 40 seconds. gRPC's own client pings every 10 seconds meanwhile: the call must be
answered. A client made by hand, since gRPC's does not go below 10 seconds, pings every second: it must be told to go
away.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from typing import Any

from benchmarks.campaigns.calls import Caller
from benchmarks.campaigns.frames import GENERATE, Connection
from benchmarks.campaigns.reporting import add_out, describe, finish, say
from benchmarks.campaigns.stand import CampaignServer, campaign_server
from loraf_serve.client import request_of
from loraf_serve.v1 import generation_pb2 as pb

TOKENS = 400


async def ping_as_grpc(server: CampaignServer, seconds: float, request: pb.GenerateRequest) -> dict[str, Any]:
    """Makes the call through gRPC's client, which pings every `seconds`."""
    options = [
        ("grpc.keepalive_time_ms", round(1000 * seconds)),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    caller = Caller(server.address, options)
    outcome = await caller.generate(request)
    await caller.close()
    return {"code": outcome.code, "message": outcome.message, "seconds": round(outcome.seconds, 1)}


def ping_by_hand(server: CampaignServer, seconds: float, request: pb.GenerateRequest, most: float) -> dict[str, Any]:
    """Makes the call with HTTP/2 frames, and pings every `seconds` for at most so many seconds."""
    connection = Connection(server.address)
    connection.open()
    number = connection.call(GENERATE, request.SerializeToString())
    began, pings = time.monotonic(), 0
    while time.monotonic() < began + most and not (connection.closed or connection.going_away):
        connection.wait(seconds, number)
        if connection.ended(number):
            break
        if not (connection.closed or connection.going_away):
            connection.state.ping(b"campaign")
            connection.flush()
            pings += 1
    connection.close()
    return {
        "told to go away": connection.closed or connection.going_away,
        "answered": bool(connection.statuses()),
        "pings": pings,
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> int:
    """The command."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--seconds", type=float, default=40.0, help="of the call (default: %(default)g)")
    add_out(command, "keepalive")
    options = command.parse_args()
    setup = describe()
    request = request_of(pb.GenerateRequest, "x", adapter="trio", max_tokens=TOKENS)
    with campaign_server("fake", seconds_per_token=options.seconds / TOKENS) as server:
        say(f"on {server.address}")
        every_ten = asyncio.run(ping_as_grpc(server, 10, request))
        by_hand = ping_by_hand(server, 10, request, options.seconds + 30)
        every_second = ping_by_hand(server, 1, request, options.seconds + 30)
    faults = []
    if every_ten["code"] != "OK" or not by_hand["answered"]:
        faults.append("a client that pings every 10 s was cut off")
    if not every_second["told to go away"] or every_second["answered"]:
        faults.append("a client that pings every second was borne")
    result = {
        "gRPC's client, every 10 s": every_ten,
        "by hand, every 10 s": by_hand,
        "by hand, every second": every_second,
        "faults": faults,
    }
    return finish("Which keepalive pings does a server bear?", setup, result, options.out)


if __name__ == "__main__":
    sys.exit(main())
