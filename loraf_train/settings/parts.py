"""Parts of a tasks.yaml that stand in more than one place of it: kinds of numbers, where records come from, and how a
task is calibrated and trained.

Each field's description says what may stand there; it is the remedy of the message when something else does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

FILE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")

Tracker = Literal["tensorboard", "wandb"]


def mistake(message: str, remedy: str) -> PydanticCustomError:
    escaped = {"message": message, "remedy": remedy}
    return PydanticCustomError("loraf", "{message}", escaped)


def _no_boolean(value: Any) -> Any:
    """YAML's true, yes and on are no numbers, though Python would take them for 1."""
    if isinstance(value, bool):
        raise mistake(f"{value!r} is no number", "")
    return value


def _trackers(value: Any) -> Any:
    """transformers' spellings: one name, a list of names, or none."""
    if value is None or value == "none" or value == ["none"]:
        return ()
    return (value,) if isinstance(value, str) else value


Number = Annotated[float, BeforeValidator(_no_boolean), Field(allow_inf_nan=False)]
Whole = Annotated[int, BeforeValidator(_no_boolean)]


class Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)


class CalibrationConfig(Model):
    """How a task's positions are chosen (Algorithm 1): B trained dense for a few mini-batches, the top K kept.

    `learning_rate` and `batch_size` None: those of the task's training. `load` fills them in.
    """

    steps: Whole = Field(32, ge=1, description="a whole number from 1, for example 32")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="adamw or sgd")
    learning_rate: Number | None = Field(None, gt=0, description="a number above 0, for example 1e-4")
    batch_size: Whole | None = Field(None, ge=1, description="a whole number from 1, for example 32")


class TrainingConfig(Model):
    """How a task's K values are trained.

    Attributes:
        batch_size: examples an optimizer step sees, over all processes and accumulation steps.
        max_length: tokens of an example, prompt, completion and end of sequence together.
        micro_batch_size: examples a process takes at once; gradient accumulation makes up the rest.
        max_steps: optimizer steps, instead of `epochs`.
        packing: several examples in a row of up to max_length tokens, see `loraf_train.trainer.packing`.
        report_to: trackers that are told of every step, see `loraf_train.trainer.trackers`.
        save_seconds: most time between two saves of an unfinished task, so that a killed run loses no more than that.
    """

    learning_rate: Number = Field(1e-4, gt=0, description="a number above 0, for example 1e-4")
    batch_size: Whole = Field(32, ge=1, description="a whole number from 1, for example 32")
    epochs: Number = Field(1.0, gt=0, description="a number above 0, for example 3")
    max_length: Whole = Field(512, ge=2, description="a whole number of tokens from 2, for example 512")
    dropout: Number = Field(0.05, ge=0, lt=1, description="a number from 0 up to, not including, 1")
    warmup_steps: Whole = Field(0, ge=0, description="a whole number from 0")
    weight_decay: Number = Field(0.0, ge=0, description="a number from 0")
    max_grad_norm: Number = Field(1.0, gt=0, description="a number above 0, for example 1.0")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="constant, linear or cosine")
    micro_batch_size: Whole | None = Field(None, ge=1, description="a whole number from 1, at most batch_size")
    gradient_checkpointing: bool = Field(False, description="true or false")
    max_steps: Whole | None = Field(None, ge=1, description="a whole number from 1")
    packing: bool = Field(False, description="true or false")
    report_to: Annotated[tuple[Tracker, ...], BeforeValidator(_trackers)] = Field(
        (), description="tensorboard, wandb, a list of them, or none"
    )
    save_seconds: Number = Field(60.0, ge=0, description="a number of seconds from 0, for example 60")


class Source(Model):
    """Where records come from: a file, or a Hugging Face dataset (of the hub, or a folder).

    Attributes:
        subset: one of the dataset's configurations, where it has several.
        split: train of training data and test of evaluation sets, unless it is said.
        revision: a branch, tag or commit of the dataset's repository.
    """

    file: Path | None = Field(None, description="a data file: " + ", ".join(FILE_SUFFIXES))
    dataset: str | None = Field(None, min_length=1, description="the name of a Hugging Face dataset")
    subset: str | None = Field(None, description="the name of one of the dataset's configurations")
    split: str | None = Field(None, description="a split such as train or test[:100]")
    revision: str | None = Field(None, description="a branch, tag or commit of the hub, in quotes")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str | Path):
            return {"file" if _is_file(str(value), info) else "dataset": str(value)}
        return value

    @field_validator("dataset")
    @classmethod
    def _local_dataset(cls, dataset: str | None, info: ValidationInfo) -> str | None:
        """A folder, which `datasets` takes too, becomes absolute."""
        if dataset is None or not info.context:
            return dataset
        folder = info.context["folder"] / Path(dataset).expanduser()
        return str(folder) if folder.is_dir() else dataset

    @field_validator("file")
    @classmethod
    def _exists(cls, file: Path | None, info: ValidationInfo) -> Path | None:
        if file is None or not info.context:
            return file
        file = info.context["folder"] / file.expanduser()
        if not file.is_file():
            raise mistake(f"there is no file {file}", f"paths are relative to {info.context['folder']}")
        if file.suffix not in FILE_SUFFIXES:
            raise mistake(f"{file.name} has no known format", f"use one of: {', '.join(FILE_SUFFIXES)}")
        return file

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if (self.file is None) == (self.dataset is None):
            raise mistake("names no source of records", "give either file: or dataset:")
        of_datasets = [key for key in ("subset", "split", "revision") if getattr(self, key) is not None]
        if self.file is not None and of_datasets:
            raise mistake(f"a file has no {' and no '.join(of_datasets)}", "leave it out, or give dataset: instead")
        return self

    def __str__(self) -> str:
        if self.file is not None:
            return str(self.file)
        name = f"{self.dataset}@{self.revision}" if self.revision else self.dataset
        return ":".join(part for part in (name, self.subset, self.split) if part)


def _is_file(text: str, info: ValidationInfo) -> bool:
    """Whether a bare text names a file rather than a dataset of the hub."""
    if info.context and (info.context["folder"] / Path(text).expanduser()).is_dir():
        return False
    return Path(text).suffix in FILE_SUFFIXES or text.startswith((".", "/", "~")) or text.count("/") > 1
