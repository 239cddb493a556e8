"""gRPC stubs, generated from proto/loraf/v1 when the package is built."""
