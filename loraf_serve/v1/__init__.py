"""gRPC stubs, generated from proto/loraf/v1 when the package is built.

Nothing here is written by hand. Add a new field to the .proto files, then to `loraf_serve.request` or
`loraf_serve.service.messages`.
"""
