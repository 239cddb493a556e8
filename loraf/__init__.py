"""LoRAF's adapter: seeded projection, task sets, checkpoint, ΔW. No training and no serving.

Importing this package is cheap: only the modules that need torch import it.
"""

__version__ = "0.1.0"
