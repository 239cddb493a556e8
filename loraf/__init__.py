"""LoRAF's adapter: seeded projection, task sets, checkpoint, ΔW. Nothing here trains or serves.

Importing this package is cheap: torch is imported by the modules that need it.
"""

__version__ = "0.1.0"
