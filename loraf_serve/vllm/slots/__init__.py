"""The slots backend inside vLLM's workers: a task set becomes a dense LoRA in a slot.

`extension` puts `manager` and, on the CPU, `punica_cpu` in the place of vLLM's own.
"""
