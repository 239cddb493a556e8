"""Generates the table of fixed limits for the reference."""

from __future__ import annotations

from loraf_serve.limits import LIMITS


def markdown() -> str:
    """Returns a table of every fixed limit."""
    rows = [
        f"| `{limit.name}` | {limit.value:,.0f}{f' {limit.unit}' if limit.unit else ''} | {limit.description} |"
        for limit in LIMITS
    ]
    return "\n".join(["| name | limit | of |", "| --- | --- | --- |", *rows])
