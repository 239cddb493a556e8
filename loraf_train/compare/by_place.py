"""What tasks keep, by their places in the sequence: the first, the second, …, whichever task a seed trained there.

A number is over all seeds of a method, also where each trains the tasks in another order. It needs tasks of one kind of
score: shares of right answers, or losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from loraf_train.compare.results import BASE, Run
from loraf_train.compare.statistics import Estimate, Statistics, change_since, kept_share, over_seeds

ALONE = "separate"  # the method that trains and serves each task alone: what LoRA reaches on a single task


class ByPlace:
    """Computes numbers of sequences by place. A number that was not measured is None.

    Args of the methods:
        place: from 1, in the order of training.
        after: the number of tasks trained before; 0: the base model.
    """

    def __init__(self, statistics: Statistics):
        self._statistics = statistics
        self.places = range(1, len(statistics.results.tasks) + 1)
        self.count = min((sum(task.evaluations.values()) for task in statistics.scored), default=0)
        higher = all(task.higher_is_better for task in statistics.scored)
        self._sign = 1 if higher else -1
        self._bounds = (0.0, 1.0) if higher else (0.0, math.inf)

    def score(self, method: str | None, place: int, after: int) -> Estimate | None:
        """R[after, place]."""
        return self._estimate((r.get((after, place)) for r in self._matrices(method)), *self._bounds)

    def change(self, method: str | None, place: int) -> Estimate | None:
        """R[T, place] − R[place, place], with reversed sign if lower is better."""
        last = self.places[-1]
        return self._estimate(change_since(r, place, last, self._sign) for r in self._matrices(method))

    def retained(self, method: str | None, place: int) -> Estimate | None:
        """R[T, place] / R[place, place]; None for losses."""
        if self._sign < 0:
            return None
        last = self.places[-1]
        return self._estimate((kept_share(r, place, last) for r in self._matrices(method)), 0.0)

    def beside_alone(self, method: str | None, place: int) -> Estimate | None:
        """R[place, place] less the score of ALONE on the same task with the same seed; positive is better."""
        return self._estimate(
            None if own is None or alone is None else self._sign * (own - alone)
            for own, alone in self._pairs(method, place, place)
        )

    def share_of_alone(self, method: str | None, place: int) -> Estimate | None:
        """R[T, place] / the score of ALONE on the same task with the same seed; None for losses."""
        if self._sign < 0:
            return None
        shares = (own / alone if own is not None and alone else None for own, alone in self._pairs(method, place))
        return self._estimate(shares, 0.0)

    def drift(self, method: str | None, after: int) -> Estimate | None:
        """The increase of the loss on general text with that many tasks on."""
        statistics, increases = self._statistics, []
        for run in statistics.runs_of(method):
            base = statistics.base_loss_of(run)
            name = statistics.order_of(run)[after - 1].name
            loss = next((drift.loss for drift in run.drift if drift.after == name), None)
            increases.append(None if base is None or loss is None else loss - base)
        tokens = max((d.tokens for run in statistics.results.runs for d in run.drift if d.after == BASE), default=0)
        return over_seeds(increases, tokens)

    def _matrices(self, method: str | None) -> list[Mapping[tuple[int, int], float]]:
        return [self._statistics.matrix(run) for run in self._statistics.runs_of(method)]

    def _pairs(
        self, method: str | None, place: int, after: int | None = None
    ) -> Iterable[tuple[float | None, float | None]]:
        """(R[after, place], the score of ALONE) of each seed. `after` None: all tasks."""
        if ALONE not in self._statistics.results.methods:
            return
        alone = {run.seed: run for run in self._statistics.runs_of(ALONE)}
        last = self.places[-1]
        for run in self._statistics.runs_of(method):
            r = self._statistics.matrix(run)
            yield r.get((after or last, place)), self._alone(alone.get(run.seed), run, place)

    def _alone(self, alone: Run | None, run: Run, place: int) -> float | None:
        if alone is None:
            return None
        task = self._statistics.order_of(run)[place - 1]
        own = self._statistics.order_of(alone).index(task) + 1
        return self._statistics.matrix(alone).get((own, own))

    def _estimate(self, values: Iterable[float | None], *bounds: float) -> Estimate | None:
        return over_seeds(values, self.count, *bounds)
