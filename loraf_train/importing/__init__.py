"""Imports foreign adapters as tasks of a checkpoint, on positions that no other task owns.

sources (read a PEFT LoRA or another LoRAF checkpoint) → placing (pick the positions) → fitting (the nearest values
there, if A differs). A new format to import belongs in `sources`.
"""
