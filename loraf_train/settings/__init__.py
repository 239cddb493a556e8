"""tasks.yaml: what it may say, and what it means once defaults and overrides are resolved.

A setting is declared once, with `declare.setting`, in `config` (run and task), `parts` (adapter, calibration,
training), `data` or `comparison`. `loading` reads the file, `problems` words its mistakes, `reference` lists all
settings for the documentation. Loading opens no data file and no model: `sequence.preflight` checks what needs them.
"""
