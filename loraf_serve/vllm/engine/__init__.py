"""Runs in the service's process: vLLM engines as backends.

    backends       the slots and the resident backend
    vllm_backend   their common base
    lora_requests  vLLM's request objects of task sets
    slot_queue     decides which task sets get a slot
    support        whether vLLM can serve a model on this machine
    quantised      quantised weights that vLLM adds no LoRA to
    inexact        base models that vLLM computes wrongly
    arguments      the user's vLLM options as an engine's arguments
    environment    environment variables of vLLM's processes
    metrics        vLLM's own Prometheus metrics, without labels that grow with the task sets
    answers        makes text of tokens, where vLLM's own way is not good enough
    convert        requests and outputs between the service's types and vLLM's

May import `slots`, `resident` and `worker`; they never import this room.
"""
