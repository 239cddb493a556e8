"""Serves LoRAF checkpoints from a stock `vllm serve`.

install       what the plugin changes in that server, and when
checkpoints   which checkpoint and task set a path or a model name stands for
models        task sets as models
facts         what this relies on inside vLLM
choice        slots or resident workers
worker        the worker extension for slots: task sets in addition to PEFT adapters
metrics       leaves out what would grow with resident workers
"""
