"""Means over seeds with their intervals, and what a sequence forgets, from what a comparison measured.

A number of one seed is that of its run; a task's score is the plain mean of its evaluation sets. Over two or more
seeds: the mean with Student's t interval of 95 %, which says how far another seed may fall. Of a single seed: Wilson's
interval of 95 % of a share of right answers, which says how far other examples may fall; a loss, a mean of several sets
and a difference have none then.

The four numbers of a sequence and their signs are defined in `scoring.continual`. Shares and losses are never
averaged with each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from loraf_train.compare.results import BASE, SO_FAR, Cost, Results, Run, RunScore, ScoredTask
from loraf_train.grading.builtin import LOWER_IS_BETTER, wilson_interval
from loraf_train.scoring import continual

CONFIDENCE = 0.95
ON_ITS_DAY = "on its day"  # in the place of a task's name, which has no spaces: an as-trained score


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        interval: (low, high) of 95 %; None: one seed, and no count that would give one.
        values: of each seed.
        count: examples (of a drift: tokens) that each seed's value rests on; where they differ, the fewest.
    """

    mean: float
    interval: tuple[float, float] | None
    values: tuple[float, ...]
    count: int

    @property
    def seeds(self) -> int:
        return len(self.values)


def over_seeds(
    values: Iterable[float | None], count: int, low: float = -math.inf, high: float = math.inf
) -> Estimate | None:
    """The mean and, of two or more values, Student's t interval, cut to [low, high]; None: there is no value.

    Args:
        values: one a seed; None where a seed has none.
    """
    found = tuple(value for value in values if value is not None)
    if not found:
        return None
    mean = math.fsum(found) / len(found)
    if len(found) < 2 or not math.isfinite(mean):
        return Estimate(mean, None, found, count)
    from scipy import stats

    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in found) / (len(found) - 1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(found) - 1)) * deviation / math.sqrt(len(found))
    return Estimate(mean, (max(low, mean - half), min(high, mean + half)), found, count)


@dataclass(frozen=True)
class Spent:
    """Costs of a method, over its seeds and one task or all.

    Attributes:
        trainable: (least, most) of the tasks.
        steps, file_bytes: of one seed, rounded mean; summed over the tasks.
        seconds: summed over the tasks.
        peak_bytes: the most of all seeds and tasks; None: it could not be told.
    """

    trainable: tuple[int, int]
    steps: int
    seconds: Estimate
    peak_bytes: int | None
    file_bytes: int


class Statistics:
    """Every derived number of a comparison. A number that was not measured is None.

    `method` None is the bare model. What a run did not measure of it (it is the same for all) is taken from another run
    of its seed, or of any seed. `after` is the task that was trained last when a score was measured with everything so
    far acting, BASE before the first; ON_ITS_DAY: only what acted when the scored task itself had just ended.
    """

    def __init__(self, results: Results):
        self.results = results
        self.scored = tuple(task for task in results.tasks if task.evaluations)
        self._runs = {name: [run for run in results.runs if run.method == name] for name in results.methods}
        self._scores = {(run.method, run.seed): _by_place(run, results.tasks) for run in results.runs}
        self._base: dict[tuple[str, str], dict[int, RunScore]] = {}
        self._base_loss: dict[int, float] = {}
        for run in results.runs:
            for score in run.scores:
                if score.after == BASE:
                    self._base.setdefault((score.task, score.evaluation), {}).setdefault(run.seed, score)
            for drift in run.drift:
                if drift.after == BASE:
                    self._base_loss.setdefault(run.seed, drift.loss)

    # --- scores ---------------------------------------------------------------------------------------------------

    def of_set(self, method: str | None, task: ScoredTask, evaluation: str, after: str = BASE) -> Estimate | None:
        """The score on one evaluation set."""
        scores = [row[0] for row in self._rows(method, [(after, task, evaluation)])]
        count = min((score.count for score in scores), default=0)
        estimate = over_seeds([score.score for score in scores], count, *_bounds([task]))
        if estimate is None or estimate.seeds > 1 or task.metric in LOWER_IS_BETTER or not 0 <= estimate.mean <= 1:
            return estimate
        return replace(estimate, interval=wilson_interval(estimate.mean * count, count))

    def of_task(self, method: str | None, task: ScoredTask, after: str = BASE) -> Estimate | None:
        """The plain mean of a task's evaluation sets; of an only one, its score."""
        if len(task.evaluations) == 1:
            return self.of_set(method, task, next(iter(task.evaluations)), after)
        return self._mean(method, [task], after)

    def overall(self, method: str | None) -> Estimate | None:
        """Protocol single: the plain mean of all evaluation sets of all tasks, each after its own training.

        None too where shares and losses would meet.
        """
        return None if self.mixed else self._mean(method, self.scored, BASE if method is None else None)

    @property
    def mixed(self) -> bool:
        """Whether scores of the comparison have different units, so that no mean over tasks has a meaning."""
        return len({task.metric in LOWER_IS_BETTER or not task.higher_is_better for task in self.scored}) > 1

    def _mean(self, method: str | None, tasks: Sequence[ScoredTask], after: str | None) -> Estimate | None:
        """Args: after: None: each task after its own training."""
        places = [(task.name if after is None else after, task, name) for task in tasks for name in task.evaluations]
        rows = self._rows(method, places)
        count = min((sum(score.count for score in row) for row in rows), default=0)
        return over_seeds([math.fsum(score.score for score in row) / len(row) for row in rows], count, *_bounds(tasks))

    def _rows(self, method: str | None, places: Sequence[tuple[str, ScoredTask, str]]) -> list[list[RunScore]]:
        """The scores at (after, task, evaluation), a row for each seed that has them all.

        Of the bare model one row where all seeds have the same, since it depends on no seed.
        """
        bare = all(after == BASE for after, *_ in places)
        if bare:
            by_place = [self._base.get((task.name, name), {}) for _, task, name in places]
            seeds = sorted({seed for by_seed in by_place for seed in by_seed})
            rows = [[by_seed.get(seed) for by_seed in by_place] for seed in seeds]
        else:
            rows = [[self._find(run, *place) for place in places] for run in self._runs[method]]
        whole = [row for row in rows if row and None not in row]
        if bare and len({tuple(score.score for score in row) for row in whole}) == 1:
            return whole[:1]
        return whole

    def _find(self, run: Run, after: str, task: ScoredTask, evaluation: str) -> RunScore | None:
        found = self._scores[run.method, run.seed].get((after, task.name, evaluation))
        if found is None and after == BASE:
            by_seed = self._base.get((task.name, evaluation), {})
            return by_seed.get(run.seed) or next(iter(by_seed.values()), None)
        return found

    # --- sequences ------------------------------------------------------------------------------------------------

    def matrix(self, run: Run) -> dict[tuple[int, int], float]:
        """R of one run: (i, j) → score, both counted from 1 in the order of training, row 0 the bare model."""
        afters = [BASE, *(task.name for task in self.results.tasks)]
        found = {}
        for i, after in enumerate(afters):
            for j, task in enumerate(self.results.tasks, 1):
                scores = [self._find(run, after, task, name) for name in task.evaluations]
                if scores and None not in scores:
                    found[i, j] = math.fsum(score.score for score in scores) / len(scores)
        return found

    def continual(self, method: str) -> dict[str, Estimate | None]:
        """Average, backward transfer, forgetting and forward transfer over the seeds, by the names of `Continual`.

        A seed whose matrix lacks a cell counts in no number that needs it.
        """
        order = [j for j, task in enumerate(self.results.tasks, 1) if task.evaluations]
        count = sum(sum(task.evaluations.values()) for task in self.scored)
        higher = all(task.higher_is_better for task in self.scored)
        last = 0 if self.mixed else len(self.results.tasks)
        each = [continual.numbers(self.matrix(run), order, last, higher) for run in self._runs[method]]
        names = continual.Continual.__dataclass_fields__
        bounds = {"average": _bounds(self.scored)}
        return {n: over_seeds([getattr(c, n) for c in each], count, *bounds.get(n, ())) for n in names}

    def retained(self, method: str, task: ScoredTask) -> Estimate | None:
        """What share of its score just after its training a task has at the end: R[T, j] / R[j, j].

        None: it had a score of 0 (such seeds do not count), or its metric is a loss, of which no share is kept.
        """
        if not task.higher_is_better:
            return None
        j, last = self.results.tasks.index(task) + 1, len(self.results.tasks)
        shares = []
        for run in self._runs[method]:
            r = self.matrix(run)
            both = (j, j) in r and (last, j) in r and r[j, j] != 0
            shares.append(r[last, j] / r[j, j] if both else None)
        return over_seeds(shares, sum(task.evaluations.values()), low=0.0)

    def change(self, method: str, task: ScoredTask) -> Estimate | None:
        """R[T, j] − R[j, j], its sign turned where lower is better: negative is forgotten."""
        j, last = self.results.tasks.index(task) + 1, len(self.results.tasks)
        sign = 1 if task.higher_is_better else -1
        matrices = [self.matrix(run) for run in self._runs[method]]
        values = [sign * (r[last, j] - r[j, j]) if (last, j) in r and (j, j) in r else None for r in matrices]
        return over_seeds(values, sum(task.evaluations.values()))

    # --- the base, and costs --------------------------------------------------------------------------------------

    def base_loss(self) -> Estimate | None:
        """Loss of the bare model on general text, nats a token."""
        losses = [self._base_loss[seed] for seed in sorted(self._base_loss)]
        return over_seeds(losses[:1] if len(set(losses)) == 1 else losses, self._tokens(BASE))

    def drift(self, method: str, after: str) -> Estimate | None:
        """By how much that loss is higher, nats a token, when all tasks up to `after` act."""
        found = []
        for run in self._runs[method]:
            base = self._base_loss.get(run.seed, next(iter(self._base_loss.values()), None))
            loss = next((drift.loss for drift in run.drift if drift.after == after), None)
            found.append(None if base is None or loss is None else loss - base)
        return over_seeds(found, self._tokens(after))

    def _tokens(self, after: str) -> int:
        return max((d.tokens for run in self.results.runs for d in run.drift if d.after == after), default=0)

    def spent(self, method: str, task: str | None = None) -> Spent | None:
        """Args: task: None: all tasks, for seeds that trained them all."""
        names = [task] if task is not None else [t.name for t in self.results.tasks]
        rows = []
        for run in self._runs[method]:
            by_task: dict[str, Cost] = {cost.task: cost for cost in run.costs}
            if all(name in by_task for name in names):
                rows.append([by_task[name] for name in names])
        if not rows:
            return None
        every = [cost for row in rows for cost in row]
        peaks = [cost.peak_bytes for cost in every]
        trainable = [cost.trainable for cost in every]
        return Spent(
            trainable=(min(trainable), max(trainable)),
            steps=round(sum(cost.steps for cost in every) / len(rows)),
            seconds=over_seeds([sum(cost.seconds for cost in row) for row in rows], 0, low=0.0),
            peak_bytes=None if None in peaks else max(peaks),
            file_bytes=round(sum(cost.file_bytes for cost in every) / len(rows)),
        )

    def keeps_copies(self, method: str) -> bool:
        return any(run.keeps_copies for run in self._runs[method])


def _bounds(tasks: Iterable[ScoredTask]) -> tuple[float, float]:
    """What scores of these tasks lie between: a share from 0 to 1, a loss from 0 on."""
    return (0.0, math.inf) if any(task.metric in LOWER_IS_BETTER for task in tasks) else (0.0, 1.0)


def _by_place(run: Run, tasks: Sequence[ScoredTask]) -> dict[tuple[str, str, str], RunScore]:
    """(after or ON_ITS_DAY, task, evaluation) → score. Of several as-trained scores the latest."""
    order = {task.name: i for i, task in enumerate(tasks)}
    scores = sorted(run.scores, key=lambda score: order.get(score.after, -1))
    return {(s.after if s.acting == SO_FAR else ON_ITS_DAY, s.task, s.evaluation): s for s in scores}
