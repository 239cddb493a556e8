"""The slots backend inside vLLM's workers: a task set becomes a dense LoRA in a slot.

extension    the worker extension
manager      builds the LoRA of a task set from a checkpoint in memory
punica_cpu   LoRA products on the CPU
"""
