"""What PEFT's users say of a task: `LorafConfig`, with the defaults of `loraf-train`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import TaskType
from pydantic import ValidationError

from loraf.errors import ConfigError, Problem
from loraf.tasksets import name_problem
from loraf_train.peft.register import loraf_type
from loraf_train.settings.declare import SettingsModel, expects
from loraf_train.settings.parts import AdapterConfig, RetentionConfig, TaskOverrides, TrainingConfig

_WHERE = "LorafConfig"
# Field → the setting of tasks.yaml that says what may be written there.
_SETTINGS: dict[str, tuple[type[SettingsModel], str]] = {
    "r": (AdapterConfig, "rank"),
    "sparsity": (AdapterConfig, "sparsity"),
    "init_std": (AdapterConfig, "init_std"),
    "dtype": (AdapterConfig, "dtype"),
    "alpha": (TaskOverrides, "alpha"),
    "dropout": (TrainingConfig, "dropout"),
    "retention": (RetentionConfig, "budget"),
}
SHARED = ("r", "seed", "init_std", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_RANK, _SEED = 64, 0
_OPTIONAL = ("alpha", "retention")
_NOT_KEPT = ("modules_to_save", "trainable_token_indices")  # a checkpoint has no place for them


@dataclass
class LorafConfig(PeftConfig):
    """A task, and the adapter that all tasks of a model share.

    Args:
        task_name: name of the task in the checkpoint; by default the adapter's name.
        r: rank of every adapter, by default 64. All tasks of a model have the same.
        alpha: scales the task's update, ΔW = (alpha / r)·B·A; by default r.
        sparsity: share of each B that stays zero.
        seed: of the frozen A, by default 0. All tasks of a model have the same.
        target_modules: linear layers that get an adapter, as in LoraConfig: ends of names, a regular expression, or
            "all-linear". All tasks of a model have the same; by default the projections that `loraf-train` takes.
        dropout: on the adapter's input, while the task trains; calibration has none.
        retention: budget within which this task may change what earlier ones answer; None: as Algorithm 1.
        start: "previous": trained on top of the finished tasks; "base": on the base model alone.
        init_std: standard deviation of A; by default 1/√(3·d_in). All tasks of a model have the same.
        dtype: that the task's values are stored in: "bfloat16", "float16" or "float32".
        exclude_modules, layers_to_transform, layers_pattern: as in LoraConfig.
        modules_to_save, trainable_token_indices: always None, since a checkpoint has no place for them.
        trained_with: written by `save_pretrained`: the tasks that this one was trained on top of.

    Raises:
        ConfigError: lists every field that cannot be used.
    """

    task_name: str | None = None
    r: int = None  # type: ignore[assignment]  # None: left out, see __post_init__
    alpha: float | None = None
    sparsity: float = 0.9
    seed: int = None  # type: ignore[assignment]  # None: left out
    target_modules: list[str] | set[str] | str | None = None
    dropout: float = 0.05
    retention: float | None = 0.2
    start: str = "previous"
    init_std: float | None = None
    dtype: str = "bfloat16"
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: Any = None
    trained_with: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # of PEFT
        self.peft_type = loraf_type()
        self._given = {name for name in SHARED if getattr(self, name) is not None}
        self.r = _RANK if self.r is None else self.r
        self.seed = _SEED if self.seed is None else self.seed
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list | tuple) else value)
        self._folder: Path | None = None
        self._write: Callable[[str], None] | None = None
        self.check()

    def left_out(self, name: str) -> bool:
        """Whether a field that all tasks of a model share has its default because nothing was given for it."""
        default = {"r": _RANK, "seed": _SEED}.get(name)
        return name not in self._given and getattr(self, name) == default

    @property
    def scaling(self) -> float:
        """α/r."""
        return (self.r if self.alpha is None else self.alpha) / self.r

    def check(self) -> None:
        """Raises ConfigError, which lists every field that cannot be used."""
        problems = [] if self.task_name is None else [name_problem(self.task_name, field="task_name", file=_WHERE)]
        for name, (model, key) in _SETTINGS.items():
            value = getattr(self, name)
            try:
                if value is not None or name not in _OPTIONAL:
                    model.model_validate({key: value}, strict=True)  # "16" and 8.0 would be taken for numbers
            except ValidationError:
                remedy = f"use {expects(model.model_fields[key])}{', or None' * (name == 'retention')}"
                problems.append(Problem(f"{value!r} cannot be used", name, _WHERE, remedy))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 32:
            problems.append(Problem(f"{self.seed!r} cannot be used", "seed", _WHERE, "use 0 to 4294967295"))
        if self.start not in ("previous", "base"):
            problems.append(Problem(f"{self.start!r} is not known", "start", _WHERE, "use previous or base"))
        for name in _NOT_KEPT:
            if getattr(self, name) is not None:
                message = "would train weights that a LoRAF checkpoint has no place for"
                problems.append(Problem(message, name, _WHERE, "leave it out"))
        if self.task_type not in (None, TaskType.CAUSAL_LM):
            message = f"{self.task_type!r} is not supported: LoRAF adapts causal language models"
            problems.append(Problem(message, "task_type", _WHERE, "use CAUSAL_LM, or leave it out"))
        found = [problem for problem in problems if problem is not None]
        if found:
            raise ConfigError(found)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes adapter_config.json; for an adapter of a model that PEFT saves, the checkpoint as well."""
        if "auto_mapping_dict" in kwargs and self._write is not None:  # PeftModel.save_pretrained passes it
            self._write(save_directory)
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config._folder = Path(pretrained_model_name_or_path, subfolder or "")
        return config

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_write": None}  # it holds the model
