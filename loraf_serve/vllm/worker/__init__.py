"""Runs in vLLM's worker processes, for every backend: checkpoints in memory, and the calls that load and drop them.

    extension   puts LoRAF's parts in place of vLLM's
    remote      the calls that the service makes in a worker
    manager     base class of the LoRA managers
    store       reads checkpoints while the engine keeps serving
    targets     finds vLLM's layers for an adapter's modules
    parts       the parts of the modules that a worker's layer holds
    proof       proves that LoRA on vLLM's layers acts as in transformers
    calls       records which layers a forward pass calls
    base_weights  reads rows of the model's files
    probe       the service's part of a proof
    waiting     makes vLLM's busy waiting yield to a load
    seeds       keeps seeds of requests whose prompt is computed in several steps
    notice      tells the service that a load is over
    faults      tells the service why a process of the engine failed

Knows no particular backend.
"""
