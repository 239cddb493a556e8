"""The numbers of a comparison as plain JSON: for each method those of its sequences, with intervals and seeds."""

from __future__ import annotations

import math
from typing import Any

from loraf_train.compare.by_place import ByPlace
from loraf_train.compare.results import Results
from loraf_train.compare.statistics import Estimate, Statistics


def numbers(results: Results) -> dict[str, dict[str, Any]]:
    """Returns, for each method of a sequence, number → {mean, interval, values}; empty for protocol single.

    `average`, `backward_transfer`, `forgetting` and `forward_transfer` are defined in `scoring.continual`. The others
    are lists with an entry for each place in the sequence, see `by_place`. A number that was not measured is null.
    """
    statistics = Statistics(results)
    if results.protocol == "single" or statistics.mixed or len(results.tasks) < 2:
        return {}
    by_place = ByPlace(statistics)
    last = by_place.places[-1]
    computed = {}
    for method in results.methods:
        rows = {
            "just_trained": [by_place.score(method, place, place) for place in by_place.places],
            "at_the_end": [by_place.score(method, place, last) for place in by_place.places],
            "share_kept": [by_place.retained(method, place) for place in by_place.places],
            "just_trained_less_separate": [by_place.beside_alone(method, place) for place in by_place.places],
            "at_the_end_of_separate": [by_place.share_of_alone(method, place) for place in by_place.places],
            "drift": [by_place.drift(method, place) for place in by_place.places],
        }
        computed[method] = {
            **{name: _plain(estimate) for name, estimate in statistics.continual(method).items()},
            **{name: [_plain(estimate) for estimate in estimates] for name, estimates in rows.items()},
        }
    return computed


def _plain(estimate: Estimate | None) -> dict[str, Any] | None:
    if estimate is None or not math.isfinite(estimate.mean):  # JSON has no NaN
        return None
    interval = None if estimate.interval is None else list(estimate.interval)
    return {"mean": estimate.mean, "interval": interval, "values": list(estimate.values)}
