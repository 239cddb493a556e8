"""tasks.yaml: what it may say, and what is left once defaults and overrides are resolved.

A setting is declared once, in `config`, `parts` or `comparison`, with its description. Reading settings opens no data
file and no model; whatever needs them is checked in `sequence.preflight`.
"""
