"""vLLM's own gRPC contract beside LoRAF's: one more way into the same service, for clients that speak nothing else.

    contract     adds its services to the server
    inference    vllm.Inference: answers, through `loraf_serve.service.answering` as GenerationService does
    asked        its request → GenerateRequest, which validation reads; nothing in it is left out silently
    told         pieces of an answer → its responses
    running      requests that Abort can end
    control      vllm.Control: what the server is, Abort, adapters

Imported only by a server that speaks this contract, see `loraf_serve.vllm_proto`.
"""
