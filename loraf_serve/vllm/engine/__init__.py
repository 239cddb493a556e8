"""Runs in the service's process: vLLM engines as backends.

`backends` holds the slots and the resident backend, `vllm_backend` what they share; options, environment and types are
turned into vLLM's here. May use `slots`, `resident` and `worker`, never the other way round.
"""
