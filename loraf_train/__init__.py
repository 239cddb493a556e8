"""`loraf-train`: trains LoRAF checkpoints, scores, inspects and exports them.

One folder for each thing that happens, from the top down: commands, compare, peft, sequence, terminal, scoring,
trainer, importing, data, settings, adapter, grading, processes. A folder imports only folders below it
(tests/test_architecture.py); each `__init__.py` says what its folder is for.
"""
