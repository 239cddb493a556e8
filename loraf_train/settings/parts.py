"""Settings of the adapter and of a task's two phases, which tasks.yaml may give in more than one place."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ValidationInfo

from loraf.limits import MAX_RANK
from loraf_train.settings.data import RecordSource
from loraf_train.settings.declare import MOST, Number, SettingsModel, Switch, Whole, mistake, setting

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Tracker = Literal["tensorboard", "wandb", "mlflow"]


def _trackers(value: Any) -> Any:
    """Accepts what transformers accepts: one name, a list of names, or none."""
    if value is None or value == "none" or value == ["none"]:
        return ()
    return (value,) if isinstance(value, str) else value


def _each_once(trackers: tuple[Tracker, ...]) -> tuple[Tracker, ...]:
    return tuple(dict.fromkeys(trackers))


def _on_or_off(value: Any, info: ValidationInfo) -> Any:
    """Accepts YAML's off and on, which are booleans, and the words; a file that leaves the value out says neither."""
    if value is None and info.context:
        raise mistake("is empty, which says neither on nor off")
    return {"off": None, "on": {}, False: None, True: {}}.get(value, value) if isinstance(value, bool | str) else value


def _off_or_mapping(value: Any) -> Any:
    """Accepts off; on says too little."""
    if value is None or value is False or value == "off":
        return None
    if value is True or value == "on":
        raise mistake("does not say how patient to be")
    return value


def _off_self_or_source(value: Any, info: ValidationInfo) -> Any:
    """Accepts off, self, or a source of records."""
    if value is None or value is False or value == "off":
        return None
    if value is True or value == "on":
        raise mistake("does not say which text")
    return value if value == "self" else RecordSource.model_validate(value, context=info.context)


class AdapterConfig(SettingsModel):
    """The shape of the adapter, which all tasks of a checkpoint share."""

    rank: Whole = setting(
        64,
        "Rank of every adapter: the rows of A and the columns of B.",
        expects=f"a whole number from 1 to {MAX_RANK}, for example 64",
        ge=1,
        le=MAX_RANK,
    )
    sparsity: Number = setting(
        0.9,
        "Share of each B that stays zero, for tasks that do not set their own sparsity.",
        expects="a number above 0 and below 1, for example 0.9",
        gt=0,
        lt=1,
    )
    target_modules: tuple[str, ...] = setting(
        PROJECTIONS,
        "Linear layers that get an adapter, each by the last part of its name.",
        expects=f"a list of projections, for example [{', '.join(PROJECTIONS[:2])}]",
        min_length=1,
    )
    init_std: Number | None = setting(
        None,
        "Standard deviation of the frozen A; by default 1/√(3·d_in), where d_in is the layer's input width.",
        expects="a number above 0, or leave it out for 1/√(3·d_in)",
        gt=0,
    )
    dtype: Literal["bfloat16", "float16", "float32"] = setting(
        "bfloat16", "Type that a task's values are stored in.", expects="bfloat16, float16 or float32"
    )


class EarlyStoppingConfig(SettingsModel):
    """When a training ends before its last step."""

    patience: Whole = setting(
        ...,
        "Evaluations in a row without a smaller loss after which the training ends; the best values are kept.",
        expects="a whole number from 1, for example 3",
        ge=1,
    )
    every: Whole | None = setting(
        None,
        "Optimizer steps between two evaluations; by default as many as an epoch has.",
        expects="a whole number of steps from 1, or leave it out for once an epoch",
        ge=1,
    )


class TrainingConfig(SettingsModel):
    """How a task's K values are trained."""

    learning_rate: Number = setting(
        1e-4, "Learning rate after the warmup.", expects="a number above 0, for example 1e-4", gt=0
    )
    batch_size: Whole = setting(
        32,
        "Examples in an optimizer step, over all processes and accumulation steps together.",
        expects="a whole number from 1, for example 32",
        ge=1,
    )
    epochs: Number = setting(
        1.0,
        "Passes over the training examples; may be a fraction.",
        expects="a number above 0, for example 3",
        gt=0,
        le=MOST,
    )
    max_length: Whole = setting(
        512,
        "Longest example in tokens, with prompt, completion and end of sequence; longer ones lose their end.",
        expects="a whole number of tokens from 2, for example 512",
        ge=2,
    )
    dropout: Number = setting(
        0.05,
        "Dropout on the adapter's input, while a task is trained.",
        expects="a number from 0 up to, not including, 1",
        ge=0,
        lt=1,
    )
    warmup_steps: Whole = setting(
        0, "Optimizer steps in which the learning rate rises from 0.", expects="a whole number from 0", ge=0
    )
    weight_decay: Number = setting(0.0, "Weight decay of the training's AdamW.", expects="a number from 0", ge=0)
    max_grad_norm: Number = setting(
        1.0, "Norm to which larger gradients are clipped.", expects="a number above 0, for example 1.0", gt=0
    )
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant", "Course of the learning rate after the warmup.", expects="constant, linear or cosine"
    )
    beta: Number | None = setting(
        None,
        "How strongly DPO holds the model to what it was before the task; by default 0.1.",
        expects="a number above 0, for example 0.1",
        gt=0,
        exclude_if=lambda value: value is None,
    )
    micro_batch_size: Whole | None = setting(
        None,
        "Examples that a process computes at once, the rest by gradient accumulation; by default its whole share.",
        expects="a whole number from 1, at most batch_size",
        ge=1,
    )
    gradient_checkpointing: Switch = setting(
        False,
        "Saves memory by computing activations again in the backward pass.",
        expects="true or false",
    )
    max_steps: Whole | None = setting(
        None, "Number of optimizer steps, in place of epochs.", expects="a whole number from 1", ge=1
    )
    packing: Switch = setting(
        False,
        "Puts several examples into a row of up to max_length tokens, without letting them attend to each other.",
        expects="true or false",
    )
    report_to: Annotated[tuple[Tracker, ...], BeforeValidator(_trackers), AfterValidator(_each_once)] = setting(
        (),
        "Experiment trackers that receive every step.",
        expects="tensorboard, wandb, mlflow, a list of them, or none",
    )
    save_seconds: Number = setting(
        60.0,
        "Seconds between two saves of an unfinished task; a killed run loses at most this much.",
        expects="a number of seconds from 0, for example 60",
        ge=0,
    )
    early_stopping: Annotated[EarlyStoppingConfig | None, BeforeValidator(_off_or_mapping)] = setting(
        None,
        "Evaluates on the way, ends when the loss on the evaluation sets no longer falls, and keeps the best values.",
        expects="off, or a mapping such as {patience: 3}",
        exclude_if=lambda value: value is None,
    )


class RetentionConfig(SettingsModel):
    """How much later tasks may change what earlier ones answer."""

    budget: Number = setting(
        0.2,
        "Root mean square change of an earlier task's logit that all later tasks together may cause, as predicted.",
        expects="a number above 0, for example 0.2",
        gt=0,
    )
    base: Annotated[Literal["self"] | RecordSource | None, BeforeValidator(_off_self_or_source)] = setting(
        None,
        "General text on which the base model's own answers are kept as well: a data file, or self for text that the "
        "model writes; by default they are not kept.",
        expects="off, self, or a data file of general text",
        exclude_if=lambda value: value is None,
    )


class CalibrationConfig(SettingsModel):
    """How a task's positions are chosen (Algorithm 1): a dense B is trained for a few steps, and its top K are kept."""

    steps: Whole = setting(
        32,
        "Optimizer steps on a dense B before its largest entries are chosen.",
        expects="a whole number from 1, for example 32",
        ge=1,
    )
    optimizer: Literal["adamw", "sgd"] = setting("adamw", "Optimizer of the calibration.", expects="adamw or sgd")
    learning_rate: Number | None = setting(
        None,
        "Learning rate of the calibration; by default that of the task's training.",
        expects="a number above 0, for example 1e-4",
        gt=0,
    )
    batch_size: Whole | None = setting(
        None,
        "Examples in a calibration step; by default as many as in a step of the task's training.",
        expects="a whole number from 1, for example 32",
        ge=1,
    )

    def resolved(self, training: TrainingConfig) -> CalibrationConfig:
        """The same with learning rate and batch size of `training` in place of None."""
        update: dict[str, Any] = {}
        if self.learning_rate is None:
            update["learning_rate"] = training.learning_rate
        if self.batch_size is None:
            update["batch_size"] = training.batch_size
        return self.model_copy(update=update)


class TaskOverrides(SettingsModel):
    """Settings that a task gives in place of the run's, and a compared method in place of the task's."""

    alpha: Number | None = setting(
        None,
        "Scales the task's update, ΔW = (alpha / rank)·B·A; a task's default is the rank.",
        expects="a number above 0, for example 64",
        gt=0,
    )
    sparsity: Number | None = setting(
        None,
        "Share of each B that stays zero; a task's default is adapter.sparsity.",
        expects="a number above 0 and below 1, for example 0.9",
        gt=0,
        lt=1,
    )
    calibration: CalibrationConfig = setting(
        CalibrationConfig(),
        "Calibration settings that differ from the inherited ones.",
        expects="a mapping of calibration settings",
    )
    training: TrainingConfig = setting(
        TrainingConfig(),
        "Training settings that differ from the inherited ones.",
        expects="a mapping of training settings",
    )


Retention = Annotated[RetentionConfig | None, BeforeValidator(_on_or_off)]
