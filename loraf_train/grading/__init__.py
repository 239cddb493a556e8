"""Grades the text of an answer: the built-in metrics, and functions of the user's own.

A new metric belongs in `builtin`. Everything here works on texts and records; it knows no model, data set or settings.
"""
