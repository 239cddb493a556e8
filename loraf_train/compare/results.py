"""What a comparison measured: plain data, and its JSON form. All tables and pictures are derived from it.

A run is one method with one seed. In protocol `single` each task is trained alone, from the base; in `sequence` the
tasks are trained one after the other.

The names of the fields are those of the JSON form.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loraf.errors import ConfigError, Problem
from loraf.files import strict_json

FORMAT = 1
BASE = ""  # in place of a task's name: before anything was trained
SO_FAR, AS_TRAINED, ALONE, PAIR = "so-far", "as-trained", "alone", "pair"
PROTOCOLS = ("single", "sequence")
SHOWN = 10  # maximum number of mistakes that are named


@dataclass(frozen=True)
class ScoredTask:
    """A task of the file.

    Attributes:
        evaluations: evaluation set → its number of examples, in the file's order.
    """

    name: str
    metric: str
    higher_is_better: bool
    evaluations: dict[str, int]


@dataclass(frozen=True)
class RunScore:
    """One measured score.

    Attributes:
        after: the last task that was trained before; BASE: none. In protocol `single`: the task itself, or BASE.
        acting: which tasks were on. SO_FAR: all that were trained until then. AS_TRAINED: those that were on when
            `task` had just been trained, measured at the end of the run (for a method with `keeps_copies`, the score
            of a copy kept at that time). ALONE: the values of `task` only; PAIR: those of `task` and `partner`; both at
            the end of the run. Of a method that serves each task alone, SO_FAR is `task` with its own adapter.
        task, evaluation: what was scored, on `count` examples.
        interval: 95 % interval of a mean of grades, over the examples; None: the score is of another kind.
    """

    after: str
    acting: str
    task: str
    evaluation: str
    score: float
    count: int
    interval: tuple[float, float] | None = None
    partner: str = ""


@dataclass(frozen=True)
class Cost:
    """The cost of training one task.

    Attributes:
        trainable: the number of trained parameters (of loraf: the K values of all modules; calibration counts only in
            `seconds` and `peak_bytes`).
        steps: optimizer steps, calibration included.
        seconds: wall time of training, without scoring.
        peak_bytes: peak memory of the process (on a GPU: allocated there); None: not known.
        file_bytes: what must be kept on disk to serve the task, besides the base model.
    """

    task: str
    trainable: int
    steps: int
    seconds: float
    peak_bytes: int | None
    file_bytes: int


@dataclass(frozen=True)
class Drift:
    """Loss on held-out general text in nats per token, with all tasks up to `after` on, over `tokens` tokens."""

    after: str
    loss: float
    tokens: int


@dataclass(frozen=True)
class MaskShare:
    """How many positions a task owns in one module: `positions` of `size`."""

    task: str
    module: str
    positions: int
    size: int


@dataclass(frozen=True)
class Change:
    """How far the training of `after` and the tasks before it moved the logits of an earlier task: root mean squares.

    Attributes:
        predicted: as the statistics of `task` predict it.
        measured: on examples of `task`.
    """

    task: str
    after: str
    predicted: float
    measured: float


@dataclass(frozen=True)
class Run:
    """One method with one seed.

    Attributes:
        keeps_copies: whether as-trained scores need a copy kept after each task (lora, full, frozen-a, …).
        costs: of a method that trains all tasks at once (joint) a single entry, of the last task.
        order: the tasks in the order of training; empty: the file's.
    """

    method: str
    seed: int
    keeps_copies: bool
    scores: tuple[RunScore, ...]
    costs: tuple[Cost, ...]
    drift: tuple[Drift, ...] = ()
    masks: tuple[MaskShare, ...] = ()
    order: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class Results:
    """A whole comparison.

    Attributes:
        protocol: one of PROTOCOLS.
        model: the base model's name in the file; `parameters` is its number of parameters.
        settings: method → task → the settings it was trained with (learning rate, alpha, …), for readers.
        surroundings: the environment: machine, precision, processes and versions.
        numbers: method → what `numbers.numbers` computed of its runs, for other programs.
    """

    protocol: str
    model: str
    parameters: int
    tasks: tuple[ScoredTask, ...]
    runs: tuple[Run, ...]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    surroundings: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run.method for run in self.runs))


def to_json(results: Results) -> dict[str, Any]:
    """Returns plain JSON values. A score or loss that is not finite, after training that diverged, becomes null.

    Raises:
        ValueError, TypeError: settings or surroundings hold values that JSON does not have.
    """
    content = asdict(results)
    for entry, key in _measured(content):
        if not math.isfinite(entry[key]):
            entry[key] = None
    plain: dict[str, Any] = strict_json.plain(content)
    return plain


def write(path: Path, results: Results) -> None:
    """Writes the JSON form; a reader sees the old file or the whole new one.

    Raises:
        CheckpointError: the file cannot be written (disk full, no permission).
    """
    from loraf.checkpoint import write_durably

    write_durably(Path(path), strict_json.dumps(to_json(results), indent=1) + b"\n")


def read(path: Path) -> Results:
    """Reads what `write` wrote; null in place of a measured number becomes NaN.

    Raises:
        ConfigError: the file cannot be read, is not JSON, or is not a whole comparison; it names the first mistakes,
            each with its field.
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
        message = f"is {content.get('format')!r}, but this release reads {FORMAT}"
        raise ConfigError(Problem(message, "format", str(path), "use the release of loraf that wrote it"))
    for entry, key in _measured(content):
        if entry[key] is None:
            entry[key] = math.nan
    faults: list[tuple[str, str]] = []
    results: Results | None = strict_json.build(Results, content, "", lambda *fault: faults.append(fault))
    if results is not None:
        faults += contradictions(results)
    if faults or results is None:
        problems = [Problem(text, where, str(path), remedy) for where, text in faults[:SHOWN]]
        more = len(faults) - SHOWN
        if more > 0:
            problems.append(Problem(f"{more} more fields have mistakes", "", str(path), remedy))
        raise ConfigError(problems)
    return results


def _measured(content: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields (object, key) of every measured number in a JSON form, which need not be well-formed."""
    runs = content.get("runs") if isinstance(content, dict) else None
    for run in runs if isinstance(runs, list | tuple) else ():
        for part, key in (("scores", "score"), ("drift", "loss"), ("changes", "predicted"), ("changes", "measured")):
            entries = run.get(part) if isinstance(run, dict) else None
            for entry in entries if isinstance(entries, list | tuple) else ():
                if isinstance(entry, dict) and key in entry:
                    yield entry, key


def contradictions(results: Results) -> list[tuple[str, str]]:
    """Returns (field, message) of every invalid value of the right type: an unknown name, a repeated entry."""
    mistakes = []
    if results.protocol not in PROTOCOLS:
        mistakes.append(("protocol", f"is {results.protocol!r}, not {' or '.join(PROTOCOLS)}"))
    sets = {task.name: task.evaluations for task in results.tasks}
    after = {BASE, *sets}
    mistakes += _repeated("tasks", [task.name for task in results.tasks])
    mistakes += _repeated("runs", [(run.method, run.seed) for run in results.runs])
    for r, run in enumerate(results.runs):
        for i, score in enumerate(run.scores):
            where = f"runs[{r}].scores[{i}]"
            if score.after not in after:
                mistakes.append((f"{where}.after", f"{score.after!r} is not a task of the file"))
            if score.acting not in (SO_FAR, AS_TRAINED, ALONE, PAIR):
                mistakes.append(
                    (f"{where}.acting", f"is {score.acting!r}, not {SO_FAR}, {AS_TRAINED}, {ALONE} or {PAIR}")
                )
            if (score.partner not in sets) if score.acting == PAIR else score.partner:
                mistakes.append((f"{where}.partner", f"{score.partner!r} is not the other task of a pair"))
            if score.task not in sets:
                mistakes.append((f"{where}.task", f"{score.task!r} is not a task of the file"))
            elif score.evaluation not in sets[score.task]:
                message = f"{score.evaluation!r} is not an evaluation set of {score.task}"
                mistakes.append((f"{where}.evaluation", message))
            if score.count < 1:
                mistakes.append((f"{where}.count", "is below 1"))
        if run.order and sorted(run.order) != sorted(sets):
            mistakes.append((f"runs[{r}].order", "is not an order of all tasks of the file"))
        for part, names in (
            ("costs", [c.task for c in run.costs]),
            ("masks", [m.task for m in run.masks]),
            ("changes", [change.task for change in run.changes]),
        ):
            unknown = [(i, name) for i, name in enumerate(names) if name not in sets]
            mistakes += [(f"runs[{r}].{part}[{i}].task", f"{name!r} is not a task of the file") for i, name in unknown]
        for part, names in (("drift", [d.after for d in run.drift]), ("changes", [c.after for c in run.changes])):
            unknown = [(i, name) for i, name in enumerate(names) if name not in after]
            mistakes += [(f"runs[{r}].{part}[{i}].after", f"{n!r} is not a task of the file") for i, n in unknown]
        mistakes += _repeated(
            f"runs[{r}].scores", [(s.after, s.acting, s.partner, s.task, s.evaluation) for s in run.scores]
        )
        mistakes += _repeated(f"runs[{r}].costs", [cost.task for cost in run.costs])
        mistakes += _repeated(f"runs[{r}].drift", [drift.after for drift in run.drift])
        mistakes += _repeated(f"runs[{r}].changes", [(change.task, change.after) for change in run.changes])
        mistakes += _repeated(f"runs[{r}].masks", [(mask.task, mask.module) for mask in run.masks])
    return mistakes


def _repeated(where: str, keys: Iterable[Any]) -> Iterator[tuple[str, str]]:
    seen: dict[Any, int] = {}
    for i, key in enumerate(keys):
        first = seen.setdefault(key, i)
        if first != i:
            yield f"{where}[{i}]", f"repeats {where}[{first}]"
