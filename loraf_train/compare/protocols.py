"""The two protocols, run by run. A run is a method with a seed.

    single      every task alone, from the base; scored on its own evaluation sets
    sequence    one task after the other; after each, every task of the file is scored, those still to come too
                (forward transfer), and at the end each task as it was when it had just been trained

The bare base is scored once, on every task. Every example counts. Where the file names general text, the loss on it is
measured along with the scores.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraf.errors import ConfigError, Problem
from loraf.tasksets import TaskSet
from loraf_train.compare import methods, stored
from loraf_train.compare.general import General
from loraf_train.compare.meter import Meter
from loraf_train.compare.results import AS_TRAINED, BASE, SO_FAR, Cost, Drift, MaskShare, Run, RunScore
from loraf_train.grading.builtin import MEAN
from loraf_train.processes import group
from loraf_train.scoring.evaluate import score
from loraf_train.sequence import resume
from loraf_train.sequence.runner import surroundings

if TYPE_CHECKING:
    from loraf_train.data.examples import TaskData
    from loraf_train.settings.config import RunConfig, TaskConfig

SINGLE, SEQUENCE = "single", "sequence"
SCRATCH = "scratch"
OF_BASE = "base"  # in the place of a method: what the bare model scores
NEVER = 1e9  # seconds between two saves of an unfinished task: a run that was interrupted begins anew

Part = Callable[[str], Callable[..., None]]  # as `progress.Progress.part`


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        config: the file, `config.of_method` for each method.
        base: fingerprint of the base model.
        out: where finished runs are kept.
        part: reports how far something is.
        say: a line for the user.
    """

    config: RunConfig
    protocol: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    data: dict[str, TaskData]
    general: General | None
    loaded: tuple[Any, Any, Path]
    base: str
    out: Path
    part: Part
    say: Callable[[str], None]

    def config_of(self, method: str, seed: int) -> RunConfig:
        """What a run trains with. No tracker is told, and no state of an unfinished task is kept."""
        config = self.config.of_method(method)
        quiet = {"report_to": (), "save_seconds": NEVER}
        tasks = tuple(t.model_copy(update={"training": t.training.model_copy(update=quiet)}) for t in config.tasks)
        return config.model_copy(update={"seed": seed, "tasks": tasks})

    def runs(self) -> list[Run]:
        """All runs, each with the base's scores; what is on disk is not measured again.

        Methods take turns within a seed, so that what slows the machine for a while slows all of them.

        Raises:
            ConfigError: see `Method.train`.
            CheckpointError: a finished run cannot be written.
        """
        base = self._run(OF_BASE, 0, self._base)
        found = []
        for seed in self.seeds:
            for name in self.methods:
                run = self._run(name, seed, lambda name=name, seed=seed: self._measure(name, seed))
                whole = dataclasses.replace(run, scores=base.scores + run.scores, drift=base.drift + run.drift)
                found.append(whole)
        return sorted(found, key=lambda run: self.methods.index(run.method))

    def _run(self, name: str, seed: int, measure: Callable[[], Run]) -> Run:
        """A run from disk, or measured and kept there."""
        label = name if name == OF_BASE else f"{name}, seed {seed}"
        file = stored.path_of(self.out, name if name == OF_BASE else f"{name}-seed{seed}")
        making = self._making(name, seed)
        run, reason = stored.find(file, making)
        group.wait()  # none may write before all have looked
        if run is not None:
            self.say(f"{label}: measured before")
            return run
        self.say(f"{label}: measured anew, since {reason}" if reason else f"{label}:")
        run = measure()
        return group.first_writes(lambda: (stored.keep(file, making, run), run)[1], lambda: run)

    def _making(self, name: str, seed: int) -> dict[str, Any]:
        """All that a run depends on."""
        making: dict[str, Any] = {
            "protocol": self.protocol,
            "evaluation": {n: [resume.digest_of([s]) for s in d.evaluation.values()] for n, d in self.data.items()},
            "scoring": {t.name: {"metric": t.metric, "max_new_tokens": t.max_new_tokens} for t in self.config.tasks},
            "general": resume.digest_of(self.general.examples) if self.general else None,
            "base": self.base,
            **surroundings(self.loaded[0]),
        }
        if name == OF_BASE:
            return making | {"protocol": None}
        if name == methods.Lora.name:
            import peft

            making["versions"]["peft"] = peft.__version__
        config, method = self.config_of(name, seed), methods.ALL[name]
        return making | {
            "method": name,
            "seed": seed,
            "settings": {t.name: method.settings(config, t) for t in config.tasks},
            "how": {t.name: _how(t) for t in config.tasks},
            "examples": {n: resume.digest_of(d.train) for n, d in self.data.items()},
        }

    def _base(self) -> Run:
        """The bare model's scores on every task, as a run without costs."""
        recorder = self._recorder(OF_BASE, self.config)
        if group.is_first():
            recorder.score(self.config.tasks, BASE, SO_FAR)
            recorder.measure_drift(BASE)
        return recorder.run(OF_BASE, 0, keeps_copies=False)

    def _measure(self, name: str, seed: int) -> Run:
        method, config = methods.ALL[name], self.config_of(name, seed)
        recorder = self._recorder(f"{name}, seed {seed}", config, method.keeps_copies)
        listener = recorder if group.is_first() else methods.Listener()
        scratch = self.out / SCRATCH
        self._clear(scratch)
        alone = [config.model_copy(update={"tasks": (task,)}) for task in config.tasks]
        try:
            for i, part in enumerate(alone if self.protocol == SINGLE else [config]):
                method.train(methods.Bench(self.loaded, self.data, scratch / str(i)), part, listener)
        except ConfigError as error:
            problems = [dataclasses.replace(p, message=f"{recorder.label}: {p.message}") for p in error.problems]
            raise ConfigError(problems) from error
        self._clear(scratch)
        return recorder.run(name, seed, method.keeps_copies)

    def _recorder(self, label: str, config: RunConfig, keeps_copies: bool = False) -> _Recorder:
        return _Recorder(self, label, config.tasks, keeps_copies)

    def _clear(self, scratch: Path) -> None:
        group.first_writes(lambda: shutil.rmtree(scratch, ignore_errors=True), lambda: None)


def _how(task: TaskConfig) -> dict[str, Any]:
    """How a task is trained: costs depend on it, and the last bits of scores."""
    return task.training.model_dump(mode="json", include={"micro_batch_size", "gradient_checkpointing", "packing"})


@dataclass
class _Recorder(methods.Listener):
    """Measures whatever a run is to hold, at the moments that a method tells."""

    comparison: Comparison
    label: str
    tasks: Sequence[TaskConfig]
    keeps_copies: bool
    scores: list[RunScore] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    drift: list[Drift] = field(default_factory=list)
    masks: list[MaskShare] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._meter = Meter(self.comparison.loaded[0].device)
        self._parts: dict[str, Callable[..., None]] = {}

    def started(self, task: TaskConfig) -> None:
        self._meter.start()

    def step(self, task: TaskConfig, phase: str, loss: float, step: int, total: int) -> None:
        self._part(f"{task.name}: {phase} step")(step, total, f"loss {loss:.4f}")

    def ended(self, task: TaskConfig) -> None:
        self._seconds, self._peak = self._meter.stop()

    def trained(self, task: TaskConfig, made: methods.Made) -> None:
        cost = Cost(task.name, made.trainable, made.steps, self._seconds, self._peak, made.file_bytes)
        self.costs.append(cost)
        self.masks += made.masks
        alone = self.comparison.protocol == SINGLE
        self.score([task] if alone else self.tasks, task.name, SO_FAR)
        if not alone and self.keeps_copies:
            copied = [s for s in self.scores if s.after == s.task == task.name]
            self.scores += [dataclasses.replace(s, acting=AS_TRAINED) for s in copied]
        self.measure_drift(task.name)

    def as_trained(self, task: TaskConfig) -> None:
        if self.comparison.protocol == SEQUENCE:  # alone, it is what was measured already
            self.score([task], task.name, AS_TRAINED)

    def score(self, tasks: Sequence[TaskConfig], after: str, acting: str) -> None:
        model, tokenizer, _ = self.comparison.loaded
        for task in tasks:
            part = self._part(f"scoring {task.name} {_when(after, acting)}")
            evaluation = self.comparison.data[task.name].evaluation
            for found in score(model, tokenizer, task, evaluation, TaskSet(), part):  # the set is a label only
                self._require_number(found.score, f"the score on {found.evaluation} {_when(after, acting)}")
                if found.evaluation != MEAN:
                    self.scores.append(RunScore(after, acting, task.name, found.evaluation, found.score, found.count))

    def measure_drift(self, after: str) -> None:
        general = self.comparison.general
        if general is not None:
            loss = general.loss(self.comparison.loaded[0], self._part(f"general text {_when(after, SO_FAR)}"))
            self._require_number(loss, f"the loss on general text {_when(after, SO_FAR)}")
            self.drift.append(Drift(after, loss, general.tokens))

    def run(self, method: str, seed: int, keeps_copies: bool) -> Run:
        parts = (tuple(found) for found in (self.scores, self.costs, self.drift, self.masks))
        return Run(method, seed, keeps_copies, *parts)

    def _require_number(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise ConfigError(Problem(f"{what} is {value}", remedy="use a lower learning rate for this method"))

    def _part(self, name: str) -> Callable[..., None]:
        if name not in self._parts:
            self._parts[name] = self.comparison.part(f"{self.label}: {name}")
        return self._parts[name]


def _when(after: str, acting: str) -> str:
    if after == BASE:
        return "with the base"
    return f"after {after}" if acting == SO_FAR else "as trained"
