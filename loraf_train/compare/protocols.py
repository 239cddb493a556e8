"""The two protocols, run by run. A run is one method with one seed.

    single      each task is trained alone, from the base, and scored on its own evaluation sets
    sequence    one task after the other; after each, every task of the file is scored, also those still to come
                (forward transfer); at the end, each task as it was when it had just been trained; with masks also each
                task with its own values alone, and in every pair

The base model is scored once, on every task. If the file names general text, the loss on it is measured along with the
scores.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraf.errors import ConfigError, Problem
from loraf.tasksets import TaskSet
from loraf_train.compare import methods, stored
from loraf_train.compare.general import General
from loraf_train.compare.meter import Meter
from loraf_train.compare.results import (
    ALONE,
    AS_TRAINED,
    BASE,
    PAIR,
    SO_FAR,
    Change,
    Cost,
    Drift,
    MaskShare,
    Run,
    RunScore,
)
from loraf_train.data.examples import digest_of
from loraf_train.grading.builtin import MEAN
from loraf_train.processes import group
from loraf_train.scoring.evaluate import score
from loraf_train.sequence.provenance import environment
from loraf_train.settings.comparison import WITH_PEFT

if TYPE_CHECKING:
    from loraf_train.compare.methods import Method
    from loraf_train.data.examples import Example
    from loraf_train.data.task_data import TaskData
    from loraf_train.sequence.runner import Loaded
    from loraf_train.settings.config import RunConfig, TaskConfig
    from loraf_train.terminal.progress import Report

SINGLE, SEQUENCE = "single", "sequence"
SCRATCH = "scratch"
OF_BASE = "base"  # in place of a method's name: the run that scores the base model
NEVER = 1e9  # seconds between two saves of an unfinished task: an interrupted run starts over


@dataclass(frozen=True)
class Comparison:
    """What is compared, and with what.

    Attributes:
        config: the file; each method trains with `config.of_method`.
        general: the general text on which drift is measured; None: it is not measured.
        base_text: the general text that `retention.base` names; None: it names none.
        loaded: the base model, its tokenizer and their folder.
        base: the base model's fingerprint.
        folder: where finished runs are kept.
        part: adds a part of the work to the progress, as `Progress.part`.
        say: prints a line.
        stored_only: leave out the runs that are not on disk, instead of training them.
    """

    config: RunConfig
    protocol: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    data: dict[str, TaskData]
    general: General | None
    loaded: Loaded
    base: str
    folder: Path
    part: Callable[[str], Report]
    say: Callable[[str], None]
    stored_only: bool = False
    base_text: Sequence[Example] | None = None

    def config_of(self, method: str, seed: int) -> RunConfig:
        """The configuration of a run: its tasks in their order, without trackers or saving unfinished tasks."""
        config = self.config.of_method(method)
        changes = {"report_to": (), "save_seconds": NEVER}
        tasks = tuple(t.model_copy(update={"training": t.training.model_copy(update=changes)}) for t in config.tasks)
        if self.protocol == SEQUENCE:
            by_name = {task.name: task for task in tasks}
            tasks = tuple(by_name[name] for name in self.config.compare.order(seed, tuple(by_name)))
        return config.model_copy(update={"seed": seed, "tasks": tasks})

    def runs(self) -> list[Run]:
        """Returns all runs, each with the base model's scores; a run that is on disk is not measured again.

        Methods take turns within a seed, so that a slow period of the machine affects all of them.

        Raises:
            ConfigError: see `Method.train`.
            CheckpointError: a finished run cannot be written.
        """
        base = self._run(OF_BASE, 0, self._base)
        runs = []
        for seed in self.seeds:
            for name in self.methods:
                if self.stored_only:
                    found, reason = stored.find(self._file(name, seed), self._provenance(name, seed))
                    if found is None:
                        self.say(f"{name}, seed {seed}: " + (f"left out, because {reason}" if reason else "missing"))
                        continue
                run = self._run(name, seed, partial(self._measure, name, seed))
                runs.append(dataclasses.replace(run, scores=base.scores + run.scores, drift=base.drift + run.drift))
        return sorted(runs, key=lambda run: self.methods.index(run.method))

    def _file(self, name: str, seed: int) -> Path:
        return stored.path_of(self.folder, name if name == OF_BASE else f"{name}-seed{seed}")

    def _run(self, name: str, seed: int, measure: Callable[[], Run]) -> Run:
        """Returns a run from disk, or measures it and keeps it there."""
        label = name if name == OF_BASE else f"{name}, seed {seed}"
        file = self._file(name, seed)
        provenance = self._provenance(name, seed)
        run, reason = stored.find(file, provenance)
        group.wait()  # no process may write before all have looked
        if run is not None:
            self.say(f"{label}: measured before")
            return run
        self.say(f"{label}: measured again, because {reason}" if reason else f"{label}:")
        measured = measure()
        group.first_writes(lambda: stored.keep(file, provenance, measured), lambda: None)
        return measured

    def _provenance(self, name: str, seed: int) -> dict[str, Any]:
        """Everything that a run depends on; the keys are those of its file."""
        provenance: dict[str, Any] = {
            "protocol": self.protocol,
            "evaluation": {n: [digest_of([s]) for s in d.evaluation.values()] for n, d in self.data.items()},
            "scoring": {
                t.name: {"metric": self.data[t.name].metric, "max_new_tokens": t.max_new_tokens}
                for t in self.config.tasks
            },
            "general": digest_of(self.general.examples) if self.general else None,
            "base": self.base,
            **environment(self.loaded[0]),
        }
        if name == OF_BASE:
            return provenance | {"protocol": None}
        if name in WITH_PEFT:
            import peft

            provenance["versions"]["peft"] = peft.__version__
        config, method = self.config_of(name, seed), methods.ALL[name]
        settings = {t.name: method.settings(config, t) for t in config.tasks}
        if self.base_text and any("retention" in of_task for of_task in settings.values()):
            provenance["base_text"] = digest_of(self.base_text)  # the settings have only the name of its file
        return provenance | {
            "method": name,
            "seed": seed,
            "order": [t.name for t in config.tasks] if self.protocol == SEQUENCE else None,
            "settings": settings,
            "how": {t.name: _speed_settings(t) for t in config.tasks},
            "examples": {n: digest_of(d.train) for n, d in self.data.items()},
        }

    def _base(self) -> Run:
        """Scores the base model on every task, as a run without costs."""
        recorder = self._recorder(OF_BASE, self.config)
        if group.is_first():
            recorder.score(self.config.tasks, BASE, SO_FAR)
            recorder.measure_drift(BASE)
        return recorder.run(OF_BASE, 0)

    def _measure(self, name: str, seed: int) -> Run:
        method, config = methods.ALL[name], self.config_of(name, seed)
        recorder = self._recorder(f"{name}, seed {seed}", config, method)
        listener = recorder if group.is_first() else methods.Listener()
        scratch = self.folder / SCRATCH
        self._clear(scratch)
        alone = [config.model_copy(update={"tasks": (task,)}) for task in config.tasks]
        try:
            for i, part in enumerate(alone if self.protocol == SINGLE else [config]):
                method.train(methods.Bench(self.loaded, self.data, scratch / str(i)), part, listener)
        except ConfigError as error:
            problems = [dataclasses.replace(p, message=f"{recorder.label}: {p.message}") for p in error.problems]
            raise ConfigError(problems) from error
        self._clear(scratch)
        return recorder.run(name, seed)

    def _recorder(self, label: str, config: RunConfig, method: Method | None = None) -> _Recorder:
        return _Recorder(self, label, config.tasks, method)

    def _clear(self, scratch: Path) -> None:
        group.first_writes(lambda: shutil.rmtree(scratch, ignore_errors=True), lambda: None)


def _speed_settings(task: TaskConfig) -> dict[str, Any]:
    """Settings that change the costs of training, and only the last bits of scores."""
    return task.training.model_dump(mode="json", include={"micro_batch_size", "gradient_checkpointing", "packing"})


@dataclass
class _Recorder(methods.Listener):
    """Measures a run's scores, costs and drift whenever its method reports an event.

    Attributes:
        tasks: in the order of training.
        method: None: the base model is scored.
    """

    comparison: Comparison
    label: str
    tasks: Sequence[TaskConfig]
    method: Method | None
    scores: list[RunScore] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    drift: list[Drift] = field(default_factory=list)
    masks: list[MaskShare] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._meter = Meter(self.comparison.loaded[0].device)
        self._reports: dict[str, Report] = {}
        self._keeps_copies = self.method is not None and self.method.keeps_copies
        self._apart = self.method is not None and self.method.apart

    def started(self, task: TaskConfig) -> None:
        self._meter.start()

    def step(self, task: TaskConfig, phase: str, loss: float, step: int, total: int) -> None:
        self._report(f"{task.name}: {phase} step")(step, total, f"loss {loss:.4f}")

    def ended(self, task: TaskConfig) -> None:
        self._seconds, self._peak_bytes = self._meter.stop()

    def trained(self, task: TaskConfig, outcome: methods.TrainedTask) -> None:
        cost = Cost(task.name, outcome.trainable, outcome.steps, self._seconds, self._peak_bytes, outcome.file_bytes)
        self.costs.append(cost)
        self.masks += outcome.masks
        alone = self.comparison.protocol == SINGLE
        if self._apart and not alone:  # earlier tasks have their own adapters, which this training does not touch
            earlier = [s for s in self.scores if s.after == s.task and s.acting == SO_FAR]
            self.scores += [dataclasses.replace(s, after=task.name) for s in earlier]
        self.score([task] if alone or self._apart else self.tasks, task.name, SO_FAR)
        if not alone and self._keeps_copies:
            own = [s for s in self.scores if s.after == s.task == task.name]
            self.scores += [dataclasses.replace(s, acting=AS_TRAINED) for s in own]
        self.measure_drift(task.name)

    def as_trained(self, task: TaskConfig) -> None:
        if self.comparison.protocol == SEQUENCE:  # in protocol single it was measured already
            self.score([task], task.name, AS_TRAINED)

    def changed(self, task: str, after: str, predicted: float, measured: float) -> None:
        self.changes.append(Change(task, after, predicted, measured))

    def selected(self, tasks: Sequence[TaskConfig]) -> None:
        for task in tasks:
            partner = next((other.name for other in tasks if other is not task), "")
            self.score([task], self.tasks[-1].name, PAIR if partner else ALONE, partner)

    def score(self, tasks: Sequence[TaskConfig], after: str, acting: str, partner: str = "") -> None:
        model, tokenizer, _ = self.comparison.loaded
        for task in tasks:
            report = self._report(f"scoring {task.name} {_when(after, acting, partner)}")
            data = self.comparison.data[task.name]
            for s in score(model, tokenizer, task, data, TaskSet(), report):  # here the set is only a label
                self._require_finite(s.score, f"the score on {s.evaluation}", after, acting)
                if s.evaluation != MEAN:
                    self.scores.append(
                        RunScore(after, acting, task.name, s.evaluation, s.score, s.count, s.interval, partner)
                    )

    def measure_drift(self, after: str) -> None:
        general = self.comparison.general
        if general is not None:
            loss = general.loss(self.comparison.loaded[0], self._report(f"general text {_when(after, SO_FAR)}"))
            self._require_finite(loss, "the loss on general text", after, SO_FAR)
            self.drift.append(Drift(after, loss, general.tokens))

    def run(self, name: str, seed: int) -> Run:
        return Run(
            name,
            seed,
            self._keeps_copies,
            tuple(self.scores),
            tuple(self.costs),
            tuple(self.drift),
            tuple(self.masks),
            tuple(task.name for task in self.tasks),
            tuple(self.changes),
        )

    def _require_finite(self, value: float, quantity: str, after: str, acting: str) -> None:
        if not math.isfinite(value):
            remedy = "use a lower learning rate for this method"
            if after == BASE:
                remedy = "use precision: float32, or a base model without overflows"
            raise ConfigError(Problem(f"{quantity} {_when(after, acting)} is {value}", remedy=remedy))

    def _report(self, name: str) -> Report:
        if name not in self._reports:
            self._reports[name] = self.comparison.part(f"{self.label}: {name}")
        return self._reports[name]


def _when(after: str, acting: str, partner: str = "") -> str:
    if acting in (ALONE, PAIR):
        return f"with {partner}" if partner else "alone"
    if after == BASE:
        return "with the base model"
    return f"after {after}" if acting == SO_FAR else "as trained"
