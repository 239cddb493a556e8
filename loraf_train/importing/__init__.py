"""Foreign adapters as tasks of a checkpoint: read the source, place it on free positions, fit what is not exact.

sources (PEFT LoRA or another LoRAF checkpoint) → placing (which positions) → fitting (nearest values there). A new
format to import belongs in `sources`.
"""
