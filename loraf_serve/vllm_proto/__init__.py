"""gRPC stubs of vLLM's own contract, generated from proto/vllm when the package is built.

Nothing here is written by hand. The messages are called `vllm.…`, as vLLM's are, so they are imported only by a server
that speaks this contract: another package that brings the same names could not be loaded in the same process.
"""
