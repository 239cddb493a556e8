"""Campaigns: long attempts to break what the tests check briefly. Each is a command with results in the repository.

On a running server, over the network:

    streams              256 streams at once: each answer is what the same request gives alone
    cancels              1,000 cancelled requests leave nothing behind, wherever they were
    saturation           ten minutes of more work than the server can do: its memory does not grow
    generated_requests   100,000 requests, valid and not, and raw HTTP/2 frames: answered, or refused with a code
    service_cost         what the service costs beside the same engine called in process
    http_cost            what OpenAI's API costs beside gRPC, on the same server
    keepalive            which pings of a client a server bears

    stand                starts the server of a campaign in a process of its own (server.py), and looks into it
    calls, frames        make requests: through gRPC, and as HTTP/2 frames
    reporting            writes the results

Run one from the repository's root: python -m benchmarks.campaigns.streams. Options: --help. Results go to
benchmarks/results/campaigns/, and docs/explanation/under-load.md tells of them. tests/benchmarks/ runs each briefly.
"""
