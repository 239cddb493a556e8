"""From an answer's text to right or wrong: the built-in metrics, and functions of the user's own.

A new metric belongs in `builtin`. Works on texts and records; no model, no data set, no settings enter.
"""
