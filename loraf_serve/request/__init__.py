"""Validates one request: from a gRPC message to a GenerationRequest, or to a list of every invalid field.

`validation` goes through a request and calls the others: `prompts`, `selection` (task sets), `sampling`. A new request
field is read and checked here.
"""
