"""Runs in vLLM's worker processes, for every backend: checkpoints in memory, and the calls that load and drop them.

    extension   puts LoRAF's parts in place of vLLM's
    remote      the calls that the service makes in a worker
    manager     base class of the LoRA managers
    store       reads checkpoints while the engine keeps serving
    targets     finds vLLM's layers for an adapter's modules
    waiting     makes vLLM's busy waiting yield to a load
    notice      tells the service that a load is over

Knows no particular backend.
"""
