"""What tasks.yaml may say under `compare:`. What a method leaves out is the task's own setting.

    compare:
      seeds: [0, 1, 2]
      orders: [[math, nlu], [nlu, math]]
      general: general.jsonl
      methods:
        lora: {rank: 64, training: {learning_rate: 1e-4}, tasks: {math: {training: {learning_rate: 5e-4}}}}
        ewc: {strength: 1000}
        full: {training: {learning_rate: 1e-5}}

`settings.loading` reads it with the rest of the file, and resolves each method's settings (`RunConfig.of_method`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, cast, get_args

from pydantic import AfterValidator

from loraf.limits import MAX_RANK
from loraf_train.settings.data import RecordSource
from loraf_train.settings.declare import Number, Seed, SettingsModel, Whole, mistake, setting
from loraf_train.settings.parts import TaskOverrides

MethodName = Literal[
    "loraf",
    "loraf-paper",
    "random-mask",
    "frozen-a",
    "lora",
    "lora-decay",
    "o-lora",
    "ewc",
    "replay",
    "separate",
    "joint",
    "full",
]
METHODS: tuple[str, ...] = get_args(MethodName)
MASKED = ("loraf", "loraf-paper", "random-mask")  # their tasks own positions, so that these may run out
WITH_PEFT = ("lora", "lora-decay", "o-lora", "ewc", "replay", "separate", "joint")
ONE_ALPHA = ("ewc", "replay", "joint")  # one LoRA for all tasks
HIGHEST_SEED = (1 << 32) - 1

# What `strength` means for a method, and its default: weight decay; λ₁; λ; the share of each earlier task's examples.
STRENGTHS = {"lora-decay": 0.3, "o-lora": 0.5, "ewc": 1000.0, "replay": 0.02}

# Settings that mean nothing for a method; setting one is a mistake.
_UNUSED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(METHODS, ()),
    "random-mask": ("calibration",),
    "frozen-a": ("calibration", "sparsity"),
    **dict.fromkeys(WITH_PEFT, ("calibration", "sparsity")),
    "full": ("calibration", "sparsity", "rank", "alpha"),
}
_SAME_FOR_ALL = ("max_length", "report_to", "save_seconds")  # the first decides what the examples are
_NOT_COMPARED = ("early_stopping", "beta")  # nor are tasks that stop early or learn from preferences
_NO_DROPOUT = ("full",)  # it has no adapter whose input could be dropped

Location = tuple[str | int, ...]


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) != len(seeds):
        raise mistake("a seed is listed twice", "list each seed once")
    return seeds


class MethodSettings(TaskOverrides):
    """What a method does differently for all tasks, and for some of them."""

    rank: Whole | None = setting(
        None,
        "Rank of the method's adapter; by default adapter.rank.",
        expects=f"a whole number from 1 to {MAX_RANK}, for example 64",
        ge=1,
        le=MAX_RANK,
    )
    strength: Number | None = setting(
        None,
        "Of lora-decay its weight decay (0.3), of o-lora its λ₁ (0.5), of ewc its λ (1000), of replay the share of "
        "each earlier task's examples (0.02).",
        expects="a number from 0",
        ge=0,
    )
    tasks: dict[str, TaskOverrides] = setting(
        {}, "What the method changes for single tasks, by their names.", expects="a mapping of tasks to settings"
    )


class CompareConfig(SettingsModel):
    """A comparison of training methods."""

    seeds: Annotated[tuple[Seed, ...], AfterValidator(_distinct)] = setting(
        (0, 1, 2),
        "Seeds that each method is trained with.",
        expects=f"a list of different whole numbers from 0 to {HIGHEST_SEED}",
        min_length=1,
    )
    orders: tuple[tuple[str, ...], ...] = setting(
        (),
        "Orders of the tasks in protocol sequence: seed i trains in order i modulo their number; else the file's.",
        expects="a list of orders, each with the name of every task",
    )
    general: RecordSource | None = setting(
        None,
        "Held-out text to measure the drift of the base model on; records with text, or as for training.",
        expects="a data file, or a Hugging Face dataset",
    )
    methods: dict[MethodName, MethodSettings] = setting(
        {},
        "What each method changes; what it leaves out stays as in the task.",
        expects=f"a mapping with {', '.join(METHODS)}",
    )

    def strength(self, method: str) -> float:
        """Returns the strength of a method of `STRENGTHS`."""
        settings = self.methods.get(cast("MethodName", method))
        return STRENGTHS[method] if settings is None or settings.strength is None else settings.strength

    def order(self, seed: int, tasks: Sequence[str]) -> tuple[str, ...]:
        """Returns the order in which a seed trains the file's tasks."""
        return self.orders[seed % len(self.orders)] if self.orders else tuple(tasks)


def contradictions(compare: CompareConfig, tasks: Sequence[str]) -> Iterator[tuple[Location, str, str]]:
    """Yields (place below `compare`, message, remedy) for values that are valid alone but not together.

    Args:
        tasks: names of the file's tasks.
    """
    for i, order in enumerate(compare.orders):
        if sorted(order) != sorted(tasks):
            yield ("orders", i), "is not an order of all tasks", f"name each of these once: {', '.join(tasks)}"
    for method, settings in compare.methods.items():
        if settings.strength is not None and method not in STRENGTHS:
            yield ("methods", method, "strength"), f"the method {method} has no strength", "leave it out"
        if method == "replay" and (settings.strength or 0) > 1:
            yield ("methods", method, "strength"), "is a share above 1", "write a share from 0 to 1"
        for name, overrides in {"": settings, **settings.tasks}.items():
            where: Location = ("methods", method, *(("tasks", name) if name else ()))
            if name and name not in tasks:
                yield where, f"there is no task {name!r}", f"choose from: {', '.join(tasks)}"
                continue
            for key in _UNUSED[method]:
                if key in overrides.model_fields_set:
                    yield (*where, key), f"the method {method} has no {key}", "leave it out"
            training = overrides.training.model_fields_set
            if method == "lora-decay" and "weight_decay" in training:
                remedy = f"set {'.'.join(('compare', 'methods', method))}.strength"
                yield (*where, "training", "weight_decay"), "is this method's strength", remedy
            for key in _SAME_FOR_ALL:
                if key in training:
                    remedy = "set it under training:, of the file or of a task"
                    yield (*where, "training", key), "is the same for all methods", remedy
            for key in _NOT_COMPARED:
                if getattr(overrides.training, key) is not None:
                    yield (*where, "training", key), "compare does not keep to it", "leave it out"
            if method in _NO_DROPOUT and "dropout" in training:
                yield (*where, "training", "dropout"), f"the method {method} has no dropout", "leave it out"
