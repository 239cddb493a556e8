"""Bounded values of metric labels: clients choose task sets and weights, and each distinct value is a time series."""

from __future__ import annotations

from typing import NamedTuple

OTHER = "other"
DEFAULT_LIMIT = 100
_LONGEST = 128  # characters of a task set


class Labels(NamedTuple):
    """Both are empty for a call that named none, or was refused before they were known."""

    adapter: str
    task_set: str


class LabelLimit:
    """The first pairs of adapter and task set keep their names; all others count as "other".

    A pair keeps its place for good: replacing one by another would still add time series to Prometheus without end.
    Sets with weights can take half of the places at most, so that a client that tries weights leaves the others theirs.

    Args:
        limit: number of pairs.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT):
        self._limit = limit
        self._known: dict[Labels, Labels] = {}
        self._weighted = 0

    def of(self, adapter: str, task_set: str) -> Labels:
        """The label values for an adapter and a task set, both known to be valid."""
        key = Labels(adapter, task_set)
        labels = self._known.get(key)
        if labels is not None:
            return labels
        if not (adapter or task_set):
            return key
        has_weights = ":" in task_set
        if len(self._known) >= self._limit or (has_weights and self._weighted >= self._limit // 2):
            return Labels(OTHER, OTHER)
        self._weighted += has_weights
        return self._known.setdefault(key, Labels(adapter, _short(task_set)))


def _short(task_set: str) -> str:
    return task_set if len(task_set) <= _LONGEST else f"{task_set.count('+') + 1} tasks"
