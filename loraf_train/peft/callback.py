"""What a Trainer, of transformers or TRL, has to do beside training: choose the positions, protect finished tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from loraf.errors import ConfigError, Problem
from loraf_train.peft.batches import examples_of, rounds
from loraf_train.peft.calibrate import calibrate
from loraf_train.peft.model import tuner_of
from loraf_train.peft.protect import Guard, protect
from loraf_train.peft.resume import require_same_run
from loraf_train.retention.extent import EXAMPLES

_LOADED = "default"  # the adapter whose values the Trainer loads at the end of a training


class LorafCallback(TrainerCallback, ExportableState):
    """Calibrates the active task at the start of a training, and protects the finished ones while it runs.

        trainer.add_callback(LorafCallback(trainer))

    A task that is calibrated already, or resumed, is not calibrated again.

    Args:
        trainer: whose batches and loss are used.
        steps: of the calibration.
        learning_rate: of the calibration; None: that of the training.
        optimizer: of the calibration, "adamw" or "sgd".
    """

    def __init__(self, trainer: Trainer, steps: int = 32, learning_rate: float | None = None, optimizer: str = "adamw"):
        self._trainer = trainer
        self._steps, self._learning_rate, self._optimizer = steps, learning_rate, optimizer
        self._guard: Guard | None = None
        load = trainer._load_from_checkpoint

        def checked(folder: str, model: nn.Module | None = None) -> None:
            loaded = trainer.model if model is None else model
            assert loaded is not None
            require_same_run(tuner_of(loaded), Path(folder))
            load(folder, model)

        # No event of a callback comes before the values are loaded.
        trainer._load_from_checkpoint = checked  # type: ignore[method-assign, assignment]  # of this trainer alone

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        if self._trainer.is_fsdp_enabled or self._trainer.is_deepspeed_enabled:
            message = "FSDP and DeepSpeed shard what the PEFT method trains, and have not been made to work with it"
            remedy = "train in plain data parallelism, or with `loraf-train`, which shards the base with FSDP2"
            raise ConfigError(Problem(message, remedy=remedy))
        tuner = tuner_of(model)
        adapter = tuner.active_task()
        task = tuner.states[adapter]
        if args.load_best_model_at_end and adapter != _LOADED:
            message = f"the Trainer would look for the values of {adapter!r} where those of {_LOADED!r} are stored"
            remedy = "leave it out, and load the best checkpoint by `loraf_train.peft.load_tasks` after the training"
            raise ConfigError(Problem(message, "load_best_model_at_end", remedy=remedy))
        if not tuner.is_calibrated(adapter):
            rate = self._learning_rate or args.learning_rate
            calibrate(
                model,
                train_dataloader,
                steps=self._steps,
                learning_rate=rate,
                optimizer=self._optimizer,
                loss=self._loss,
            )
        elif not task.examples:  # resumed: they are not in a checkpoint of the Trainer
            with torch.random.fork_rng(devices=[]):
                for batch in rounds(train_dataloader, self._steps):
                    task.examples += [e for e in examples_of(batch) if e not in task.examples]
                del task.examples[EXAMPLES:]
        if self._guard is not None:
            self._guard.remove()
        self._guard = protect(model, optimizer, max(1, state.max_steps), state.global_step)
        callbacks: Any = state.stateful_callbacks or {}
        stored = callbacks.get(type(self).__name__)
        if state.global_step and isinstance(stored, dict):
            tensors = {name: torch.tensor(n, dtype=torch.float64) for name, n in stored["attributes"].items()}
            self._guard.penalty.restore(tensors)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._guard is not None:
            self._guard.remove()
            self._guard = None

    def state(self) -> dict[str, Any]:
        """What the Trainer stores in its checkpoints, so that a resumed training protects as before."""
        of_penalty = self._guard.penalty.state() if self._guard is not None else {}
        return {"args": {}, "attributes": {name: tensor.tolist() for name, tensor in of_penalty.items()}}

    def _loss(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        inputs = self._trainer._prepare_inputs(batch)
        with self._trainer.compute_loss_context_manager():
            loss = self._trainer.compute_loss(model, inputs)
        assert isinstance(loss, torch.Tensor)
        return loss
