"""Runs in vLLM's worker processes, for every backend: checkpoints in memory, and the calls that load and drop them.

`store` reads checkpoints beside the engine's loop, `remote` is what the service may call, `manager` the base of the
LoRA managers, `targets` finds vLLM's layers. Knows no particular backend.
"""
