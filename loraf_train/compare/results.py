"""What a comparison measured: plain data, and its JSON form. Everything that is shown is derived from it.

A run is one method with one seed. With the protocol `single` every task is trained alone, from the base; with
`sequence` the tasks are trained one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loraf import strict_json
from loraf.errors import ConfigError, Problem

FORMAT = 1
BASE = ""  # in the place of a task's name: before anything was trained
SO_FAR, AS_TRAINED = "so-far", "as-trained"
PROTOCOLS = ("single", "sequence")
SHOWN = 10  # mistakes of a file that are named


@dataclass(frozen=True)
class ScoredTask:
    """A task of the file.

    Attributes:
        evaluations: names of its evaluation sets, in order → examples of each.
    """

    name: str
    metric: str
    higher_is_better: bool
    evaluations: dict[str, int]


@dataclass(frozen=True)
class RunScore:
    """One number.

    Attributes:
        after: the last task trained when it was measured; BASE: the bare model. `single`: the task itself, or BASE.
        acting: SO_FAR: all that was trained until then acts; AS_TRAINED: what acted on the day when `task` had just
            ended, measured at the end of the run (for a method that keeps no such state apart, what a copy kept on
            that day scores: the run says so in `keeps_copies`).
        task, evaluation: what is scored; `count` examples.
    """

    after: str
    acting: str
    task: str
    evaluation: str
    score: float
    count: int


@dataclass(frozen=True)
class Cost:
    """Of training one task.

    Attributes:
        trainable: parameters that the optimizer moves (of loraf: K values of all modules; calibration is not counted
            here but is in `seconds` and `peak_bytes`).
        steps: optimizer steps, calibration included.
        peak_bytes: most memory of the process (GPU: allocated on the device) meanwhile; None: it cannot be told.
        file_bytes: what is to be kept on disk so that this task can be served, beside the base model.
    """

    task: str
    trainable: int
    steps: int
    seconds: float
    peak_bytes: int | None
    file_bytes: int


@dataclass(frozen=True)
class Drift:
    """Loss on held-out general text, nats a token, when all tasks up to `after` act."""

    after: str
    loss: float
    tokens: int


@dataclass(frozen=True)
class MaskShare:
    """Positions that a task owns in one module: `positions` of `size`."""

    task: str
    module: str
    positions: int
    size: int


@dataclass(frozen=True)
class Run:
    """One method with one seed.

    Attributes:
        keeps_copies: as-trained scores need a copy of what was trained for every task (lora, full, frozen-a).
    """

    method: str
    seed: int
    keeps_copies: bool
    scores: tuple[RunScore, ...]
    costs: tuple[Cost, ...]
    drift: tuple[Drift, ...] = ()
    masks: tuple[MaskShare, ...] = ()


@dataclass(frozen=True)
class Results:
    """A whole comparison.

    Attributes:
        model: its name as the file gives it; `parameters`: of the bare model.
        settings: method → task → what it was trained with (learning rate, alpha, …), for the reader.
        surroundings: machine, precision, processes and versions.
    """

    protocol: str  # single or sequence
    model: str
    parameters: int
    tasks: tuple[ScoredTask, ...]
    runs: tuple[Run, ...]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    surroundings: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run.method for run in self.runs))


def to_json(results: Results) -> dict[str, Any]:
    """Plain JSON values. A score or loss that is not finite, as training that diverged leaves it, becomes null.

    Raises:
        ValueError, TypeError: settings or surroundings hold what JSON cannot.
    """
    content = asdict(results)
    for entry, key in _measured(content):
        if not math.isfinite(entry[key]):
            entry[key] = None
    return strict_json.plain(content)


def write(path: Path, results: Results) -> None:
    """Writes the JSON form; a reader sees the old file or the whole new one.

    Raises:
        CheckpointError: the operating system refused (disk full, no permission).
    """
    from loraf.checkpoint import write_durably

    write_durably(Path(path), strict_json.dumps(to_json(results), indent=1) + b"\n")


def read(path: Path) -> Results:
    """What `write` wrote; null in the place of a measured number is read as NaN.

    Raises:
        ConfigError: the file cannot be read, is not JSON, or is no whole comparison; the first mistakes, each with its
            field.
    """
    remedy = "write it again with `loraf-train compare`"
    try:
        content = strict_json.loads(Path(path).read_bytes())
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error})"
        raise ConfigError(Problem(reason, "", str(path), "name a file that `loraf-train compare` wrote")) from None
    except ValueError as error:
        raise ConfigError(Problem(f"is not JSON ({error})", "", str(path), remedy)) from None
    if isinstance(content, dict) and content.get("format") != FORMAT:
        message = f"is {content.get('format')!r}, this release reads {FORMAT}"
        raise ConfigError(Problem(message, "format", str(path), "use the release of loraf that wrote it"))
    for entry, key in _measured(content):
        if entry[key] is None:
            entry[key] = math.nan
    faults: list[tuple[str, str]] = []
    results = strict_json.build(Results, content, "", lambda where, message: faults.append((where, message)))
    if results is not None:
        faults += contradictions(results)
    if faults:
        more = len(faults) - SHOWN
        rest = [Problem(f"{more} more fields have mistakes", "", str(path), remedy)] if more > 0 else []
        raise ConfigError([Problem(text, where, str(path), remedy) for where, text in faults[:SHOWN]] + rest)
    return results


def _measured(content: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """(object, key) of every measured number in a JSON form, which need not be well-formed."""
    runs = content.get("runs") if isinstance(content, dict) else None
    for run in runs if isinstance(runs, list | tuple) else ():
        for part, key in (("scores", "score"), ("drift", "loss")):
            entries = run.get(part) if isinstance(run, dict) else None
            for entry in entries if isinstance(entries, list | tuple) else ():
                if isinstance(entry, dict) and key in entry:
                    yield entry, key


def contradictions(results: Results) -> list[tuple[str, str]]:
    """(field, message) of everything that is of the right type and yet cannot be: unknown names, one thing twice."""
    found = []
    if results.protocol not in PROTOCOLS:
        found.append(("protocol", f"is {results.protocol!r}, not {' or '.join(PROTOCOLS)}"))
    sets = {task.name: task.evaluations for task in results.tasks}
    after = {BASE, *sets}
    found += _twice("tasks", [task.name for task in results.tasks])
    found += _twice("runs", [(run.method, run.seed) for run in results.runs])
    for r, run in enumerate(results.runs):
        for i, score in enumerate(run.scores):
            where = f"runs[{r}].scores[{i}]"
            if score.after not in after:
                found.append((f"{where}.after", f"{score.after!r} is no task of the file"))
            if score.acting not in (SO_FAR, AS_TRAINED):
                found.append((f"{where}.acting", f"is {score.acting!r}, not {SO_FAR} or {AS_TRAINED}"))
            if score.task not in sets:
                found.append((f"{where}.task", f"{score.task!r} is no task of the file"))
            elif score.evaluation not in sets[score.task]:
                found.append((f"{where}.evaluation", f"{score.evaluation!r} is no evaluation set of {score.task}"))
            if score.count < 1:
                found.append((f"{where}.count", "is below 1"))
        for part, names in (("costs", [c.task for c in run.costs]), ("masks", [m.task for m in run.masks])):
            unknown = [(i, name) for i, name in enumerate(names) if name not in sets]
            found += [(f"runs[{r}].{part}[{i}].task", f"{name!r} is no task of the file") for i, name in unknown]
        unknown = [(i, drift.after) for i, drift in enumerate(run.drift) if drift.after not in after]
        found += [(f"runs[{r}].drift[{i}].after", f"{name!r} is no task of the file") for i, name in unknown]
        found += _twice(f"runs[{r}].scores", [(s.after, s.acting, s.task, s.evaluation) for s in run.scores])
        found += _twice(f"runs[{r}].costs", [cost.task for cost in run.costs])
        found += _twice(f"runs[{r}].drift", [drift.after for drift in run.drift])
        found += _twice(f"runs[{r}].masks", [(mask.task, mask.module) for mask in run.masks])
    return found


def _twice(where: str, keys: Iterable[Any]) -> Iterator[tuple[str, str]]:
    seen: dict[Any, int] = {}
    for i, key in enumerate(keys):
        first = seen.setdefault(key, i)
        if first != i:
            yield f"{where}[{i}]", f"is of the same thing as {where}[{first}]"
