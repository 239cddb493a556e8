"""Means over seeds with their intervals, and what a sequence forgets, from what a comparison measured.

With one seed, a number is that of its run; a task's score is the unweighted mean over its evaluation sets. With two or
more seeds it is the mean with Student's 95 % t interval, which tells how far another seed may be off. With a single
seed a share of correct answers has Wilson's 95 % interval, which tells how far other examples may be off; a loss, a
mean of several sets and a difference then have none.

The four numbers of a sequence and their signs are defined in `scoring.continual`. Shares and losses are never averaged
with each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from loraf_train.compare.results import AS_TRAINED, BASE, SO_FAR, Results, Run, RunScore, ScoredTask
from loraf_train.grading.builtin import LOWER_IS_BETTER, wilson_interval
from loraf_train.scoring import continual

CONFIDENCE = 0.95
# In place of `after`; no task's name has a space.
JUST_TRAINED = "just trained"  # as-trained scores
AT_THE_END = "at the end"  # after the last task of the run, whichever that was


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        interval: the 95 % interval, (low, high); None: there is one seed, and no count that would give an interval.
        values: one for each seed.
        count: the number of examples (of a drift: tokens) behind each seed's value; if they differ, the smallest.
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
    """Returns the mean and, of two or more values, Student's t interval clipped to [low, high]; None without values.

    Args:
        values: one for each seed; None if the seed has none.
        count: see `Estimate`.
    """
    measured = tuple(value for value in values if value is not None)
    seeds = len(measured)
    if not measured:
        return None
    mean = math.fsum(measured) / seeds
    if seeds < 2 or not math.isfinite(mean):
        return Estimate(mean, None, measured, count)
    from scipy import stats

    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in measured) / (seeds - 1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1)) * deviation / math.sqrt(seeds)
    return Estimate(mean, (max(low, mean - half), min(high, mean + half)), measured, count)


@dataclass(frozen=True)
class Spent:
    """Costs of a method, over its seeds and one task or all.

    Attributes:
        trainable: the (smallest, largest) number of trained parameters of the tasks.
        steps, file_bytes: sums over the tasks, as the rounded mean over the seeds.
        seconds: sum over the tasks.
        peak_bytes: the highest of all seeds and tasks; None: not known.
    """

    trainable: tuple[int, int]
    steps: int
    seconds: Estimate
    peak_bytes: int | None
    file_bytes: int


class Statistics:
    """Computes every derived number of a comparison. A number that was not measured is None.

    Args of the methods:
        method: None is the base model. It is the same for all runs: a score of it that a run lacks is taken from
            another run of the same seed, or of any seed.
        after: the task that was trained last when a score was measured, with all tasks so far on; BASE: before the
            first. JUST_TRAINED, AT_THE_END: see there.

    Attributes:
        varied: the runs differ in the order of the tasks.
        tasks: in the order of training, or where it varies, in the file's.
        scored: those of them that have evaluation sets.
    """

    def __init__(self, results: Results):
        self.results = results
        orders = [self.order_of(run) for run in results.runs]
        self.varied = any(order != orders[0] for order in orders)
        self.tasks = orders[0] if orders and not self.varied else results.tasks
        self.scored = tuple(task for task in self.tasks if task.evaluations)
        self._runs = {name: [run for run in results.runs if run.method == name] for name in results.methods}
        self._scores = {
            (run.method, run.seed): _by_state(run, [t.name for t in self.order_of(run)]) for run in results.runs
        }
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
        interval = scores[0].interval or wilson_interval(estimate.mean * count, count)
        return replace(estimate, interval=interval)

    def of_task(self, method: str | None, task: ScoredTask, after: str = BASE) -> Estimate | None:
        """The unweighted mean over a task's evaluation sets; with a single set, its score."""
        if len(task.evaluations) == 1:
            return self.of_set(method, task, next(iter(task.evaluations)), after)
        return self._mean(method, [task], after)

    def overall(self, method: str | None) -> Estimate | None:
        """Protocol single: the unweighted mean over all evaluation sets of all tasks, each after its own training.

        None also if it would average shares with losses.
        """
        return None if self.mixed else self._mean(method, self.scored, BASE if method is None else None)

    @property
    def mixed(self) -> bool:
        """Whether the tasks' scores have different units, so that a mean over tasks has no meaning."""
        return len({task.metric in LOWER_IS_BETTER or not task.higher_is_better for task in self.scored}) > 1

    def _mean(self, method: str | None, tasks: Sequence[ScoredTask], after: str | None) -> Estimate | None:
        """The unweighted mean over the tasks' sets. `after` None: each task after its own training."""
        places = [(task.name if after is None else after, task, name) for task in tasks for name in task.evaluations]
        rows = self._rows(method, places)
        count = min((sum(score.count for score in row) for row in rows), default=0)
        return over_seeds([math.fsum(score.score for score in row) / len(row) for row in rows], count, *_bounds(tasks))

    def _rows(self, method: str | None, places: Sequence[tuple[str, ScoredTask, str]]) -> list[list[RunScore]]:
        """The scores at (after, task, evaluation): a row for each seed that has them all.

        The base model depends on no seed: if all seeds have the same scores of it, there is one row.
        """
        of_base = all(after == BASE for after, *_ in places)
        if of_base:
            by_place = [self._base.get((task.name, name), {}) for _, task, name in places]
            seeds = sorted({seed for by_seed in by_place for seed in by_seed})
            rows = [_complete(by_seed.get(seed) for by_seed in by_place) for seed in seeds]
        else:
            rows = [_complete(self._find(run, *place) for place in places) for run in self.runs_of(method)]
        complete = [row for row in rows if row]
        if of_base and len({tuple(score.score for score in row) for row in complete}) == 1:
            return complete[:1]
        return complete

    def runs_of(self, method: str | None) -> list[Run]:
        return [] if method is None else self._runs[method]

    def _find(self, run: Run, after: str, task: ScoredTask, evaluation: str) -> RunScore | None:
        if after == AT_THE_END:
            after = self.order_of(run)[-1].name
        score = self._scores[run.method, run.seed].get((after, task.name, evaluation))
        if score is None and after == BASE:
            by_seed = self._base.get((task.name, evaluation), {})
            return by_seed.get(run.seed) or next(iter(by_seed.values()), None)
        return score

    # --- sequences ------------------------------------------------------------------------------------------------

    def order_of(self, run: Run) -> tuple[ScoredTask, ...]:
        """The tasks in the order in which a run trained them."""
        by_name = {task.name: task for task in self.results.tasks}
        return tuple(by_name[name] for name in run.order or by_name)

    def matrix(self, run: Run) -> dict[tuple[int, int], float]:
        """R of one run: (i, j) → score, both from 1 in the order of training; row 0 is the base model."""
        order = self.order_of(run)
        cells = {}
        for i, after in enumerate([BASE, *(task.name for task in order)]):
            for j, task in enumerate(order, 1):
                scores = _complete(self._find(run, after, task, name) for name in task.evaluations)
                if scores:
                    cells[i, j] = math.fsum(score.score for score in scores) / len(scores)
        return cells

    def continual(self, method: str | None) -> dict[str, Estimate | None]:
        """Average, backward transfer, forgetting and forward transfer over the seeds, by the names of `Continual`.

        A seed whose matrix lacks a cell does not count in the numbers that need it.
        """
        count = sum(sum(task.evaluations.values()) for task in self.scored)
        higher = all(task.higher_is_better for task in self.scored)
        last = 0 if self.mixed else len(self.results.tasks)
        by_run = []
        for run in self.runs_of(method):
            places = [j for j, task in enumerate(self.order_of(run), 1) if task.evaluations]
            by_run.append(continual.numbers(self.matrix(run), places, last, higher))
        names = continual.Continual.__dataclass_fields__
        bounds = {"average": _bounds(self.scored)}
        return {n: over_seeds([getattr(c, n) for c in by_run], count, *bounds.get(n, ())) for n in names}

    def retained(self, method: str | None, task: ScoredTask) -> Estimate | None:
        """The share of its just-trained score that a task still has at the end: R[T, j] / R[j, j].

        Seeds with a just-trained score of 0, or that trained the task last, do not count. None for a loss, which has
        no such share.
        """
        if not task.higher_is_better:
            return None
        shares = [kept_share(self.matrix(run), *self._places(run, task)) for run in self.runs_of(method)]
        return over_seeds(shares, sum(task.evaluations.values()), low=0.0)

    def change(self, method: str | None, task: ScoredTask) -> Estimate | None:
        """R[T, j] − R[j, j], with reversed sign if lower is better: a negative change is forgetting.

        Seeds that trained the task last do not count.
        """
        sign = 1 if task.higher_is_better else -1
        changes = [change_since(self.matrix(run), *self._places(run, task), sign) for run in self.runs_of(method)]
        return over_seeds(changes, sum(task.evaluations.values()))

    def _places(self, run: Run, task: ScoredTask) -> tuple[int, int]:
        """(j, T)."""
        order = self.order_of(run)
        return order.index(task) + 1, len(order)

    # --- the base, and costs --------------------------------------------------------------------------------------

    def base_loss(self) -> Estimate | None:
        """Loss of the base model on general text, in nats per token."""
        losses = [self._base_loss[seed] for seed in sorted(self._base_loss)]
        return over_seeds(losses[:1] if len(set(losses)) == 1 else losses, self._tokens(BASE))

    def drift(self, method: str | None, after: str) -> Estimate | None:
        """The increase of that loss with all tasks up to `after` on, in nats per token."""
        increases = []
        for run in self.runs_of(method):
            base = self.base_loss_of(run)
            loss = next((drift.loss for drift in run.drift if drift.after == after), None)
            increases.append(None if base is None or loss is None else loss - base)
        return over_seeds(increases, self._tokens(after))

    def base_loss_of(self, run: Run) -> float | None:
        """Loss of the base model on general text beside which a run's losses are set."""
        return self._base_loss.get(run.seed, next(iter(self._base_loss.values()), None))

    def _tokens(self, after: str) -> int:
        return max((d.tokens for run in self.results.runs for d in run.drift if d.after == after), default=0)

    def spent(self, method: str, task: str | None = None) -> Spent | None:
        """The costs of one task; None: of all tasks, over the seeds that trained them all."""
        rows = []
        for run in self.runs_of(method):
            last = self.order_of(run)[-1].name if task is None else task
            if any(cost.task == last for cost in run.costs):
                rows.append([cost for cost in run.costs if task in (None, cost.task)])
        if not rows:
            return None
        every = [cost for row in rows for cost in row]
        peaks = [cost.peak_bytes for cost in every if cost.peak_bytes is not None]
        trainable = [cost.trainable for cost in every]
        seconds = over_seeds([sum(cost.seconds for cost in row) for row in rows], 0, low=0.0)
        assert seconds is not None  # there are rows
        return Spent(
            trainable=(min(trainable), max(trainable)),
            steps=round(sum(cost.steps for cost in every) / len(rows)),
            seconds=seconds,
            peak_bytes=max(peaks) if len(peaks) == len(every) else None,
            file_bytes=round(sum(cost.file_bytes for cost in every) / len(rows)),
        )

    def keeps_copies(self, method: str) -> bool:
        return any(run.keeps_copies for run in self.runs_of(method))


def kept_share(r: Mapping[tuple[int, int], float], j: int, last: int) -> float | None:
    """R[T, j] / R[j, j]; None: it was not measured, task j is the last, or R[j, j] is 0."""
    if j == last or (j, j) not in r or (last, j) not in r or r[j, j] == 0:
        return None
    return r[last, j] / r[j, j]


def change_since(r: Mapping[tuple[int, int], float], j: int, last: int, sign: int) -> float | None:
    """sign · (R[T, j] − R[j, j]); None: it was not measured, or task j is the last."""
    return sign * (r[last, j] - r[j, j]) if j < last and (last, j) in r and (j, j) in r else None


def _complete(scores: Iterable[RunScore | None]) -> list[RunScore]:
    """The scores, or an empty list if one is missing."""
    row = list(scores)
    present = [score for score in row if score is not None]
    return present if len(present) == len(row) else []


def _bounds(tasks: Iterable[ScoredTask]) -> tuple[float, float]:
    """The range of these tasks' scores: of a share 0 to 1, of a loss 0 to infinity."""
    return (0.0, math.inf) if any(task.metric in LOWER_IS_BETTER for task in tasks) else (0.0, 1.0)


def _by_state(run: Run, tasks: Sequence[str]) -> dict[tuple[str, str, str], RunScore]:
    """(after or JUST_TRAINED, task, evaluation) → score; of several as-trained scores the latest."""
    names = [BASE, *tasks]
    scores = sorted((s for s in run.scores if s.acting in (SO_FAR, AS_TRAINED)), key=lambda s: names.index(s.after))
    return {(s.after if s.acting == SO_FAR else JUST_TRAINED, s.task, s.evaluation): s for s in scores}
