"""What tasks.yaml may say under `compare:`. What a method leaves out is the task's own setting.

    compare:
      seeds: [0, 1, 2]
      general: general.jsonl
      methods:
        lora: {rank: 64, training: {learning_rate: 1e-4}, tasks: {math: {training: {learning_rate: 5e-4}}}}
        full: {training: {learning_rate: 1e-5}}

`settings.config` reads it with the rest of the file, and resolves each method's settings (`RunConfig.of_method`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from loraf_train.settings.parts import CalibrationConfig, Model, Number, Source, TrainingConfig, Whole, mistake

MethodName = Literal["loraf", "random-mask", "frozen-a", "lora", "full"]
METHODS: tuple[str, ...] = ("loraf", "random-mask", "frozen-a", "lora", "full")
HIGHEST_SEED = (1 << 32) - 1

# What has no meaning for a method: to set it is a mistake.
_OF_NO_USE = {
    "loraf": (),
    "random-mask": ("calibration",),
    "frozen-a": ("calibration", "sparsity"),
    "lora": ("calibration", "sparsity"),
    "full": ("calibration", "sparsity", "rank", "alpha"),
}
_SAME_FOR_ALL = ("max_length", "report_to", "save_seconds")  # the first decides what the examples are
_NO_DROPOUT = ("full",)  # it has no adapter whose input could be dropped

Location = tuple[str, ...]


def _different(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) != len(seeds):
        raise mistake("a seed stands twice", "give each run a seed of its own")
    return seeds


class TaskSettings(Model):
    """What a method does differently for one task."""

    alpha: Number | None = Field(None, gt=0, description="a number above 0, for example 64")
    sparsity: Number | None = Field(None, gt=0, lt=1, description="a number above 0 and below 1, for example 0.9")
    calibration: CalibrationConfig = Field(CalibrationConfig(), description="a mapping of calibration settings")
    training: TrainingConfig = Field(TrainingConfig(), description="a mapping of training settings")


class MethodSettings(TaskSettings):
    """What a method does differently for all tasks, and for some of them."""

    rank: Whole | None = Field(None, ge=1, le=1 << 16, description="a whole number from 1, for example 64")
    tasks: dict[str, TaskSettings] = Field({}, description="a mapping of tasks to settings")


class CompareConfig(Model):
    """A comparison.

    Attributes:
        general: held-out general text, on which the drift of the base is measured: records with `text`, or with
            prompt and completion.
    """

    seeds: Annotated[
        tuple[Annotated[Whole, Field(ge=0, le=HIGHEST_SEED)], ...],
        AfterValidator(_different),
    ] = Field((0, 1, 2), min_length=1, description=f"a list of different whole numbers from 0 to {HIGHEST_SEED}")
    general: Source | None = Field(None, description="a data file, or a Hugging Face dataset")
    methods: dict[MethodName, MethodSettings] = Field({}, description=f"a mapping with {', '.join(METHODS)}")


def contradictions(compare: CompareConfig, tasks: Sequence[str]) -> Iterator[tuple[Location, str, str]]:
    """(place below `compare`, what is wrong, remedy) of values that are each in order.

    Args:
        tasks: names of the file's tasks.
    """
    for method, settings in compare.methods.items():
        for name, own in {"": settings, **settings.tasks}.items():
            where: Location = ("methods", method, *(("tasks", name) if name else ()))
            if name and name not in tasks:
                yield where, f"there is no task {name!r}", f"choose from: {', '.join(tasks)}"
                continue
            for key in _OF_NO_USE[method]:
                if key in own.model_fields_set:
                    yield (*where, key), f"the method {method} has no {key}", "leave it out"
            training = own.training.model_fields_set
            for key in _SAME_FOR_ALL:
                if key in training:
                    remedy = "set it under training:, of the file or of a task"
                    yield (*where, "training", key), "is the same for all methods", remedy
            if method in _NO_DROPOUT and "dropout" in training:
                yield (*where, "training", "dropout"), f"the method {method} has no dropout", "leave it out"
