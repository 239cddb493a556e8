"""`loraf-serve`: serves LoRAF checkpoints over gRPC and HTTP. Each request selects its task set.

    http (OpenAI's API) → service (gRPC) → request (validates one request) → backends (generate tokens)
                                                                           ← adapters (loaded checkpoints)

`vllm` is the only folder that knows vLLM, `kernels` the only one that knows how a delta is computed. `client`, `launch`
and the command lines (`cli`, `client_cli`) are on top. `addresses` is shared by server and client.
"""
