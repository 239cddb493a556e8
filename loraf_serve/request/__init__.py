"""One request, from gRPC messages to what a backend takes, or every field that is wrong with it.

`validation` goes through a request and calls the others: `prompts`, `selection` (task sets), `sampling`. A new request
field is read and checked here.
"""
