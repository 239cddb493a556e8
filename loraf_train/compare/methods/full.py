"""Full fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraf_train.compare.methods.base import Bench, Listener, Method, TrainedTask, fit, restore_base, written_bytes
from loraf_train.processes import group
from loraf_train.sequence import provenance

if TYPE_CHECKING:
    from loraf_train.settings.config import RunConfig, TaskConfig


class Full(Method):
    """Trains all parameters of the model; bfloat16 ones as float32 copies (trainer.master_weights)."""

    name = "full"

    def train(self, bench: Bench, config: RunConfig, listener: Listener) -> None:
        model = bench.model
        for task in config.tasks:
            listener.started(task)
            model.requires_grad_(True)
            outcome, trainable = fit(bench, config, task, listener)
            model.requires_grad_(False)
            listener.ended(task)
            size = written_bytes(bench, model.save_pretrained)
            if group.is_first():
                listener.trained(task, TrainedTask(trainable, outcome.steps, size))
            group.wait()
        restore_base(bench, config)

    def settings(self, config: RunConfig, task: TaskConfig) -> dict[str, Any]:
        training = dict(provenance.settings(config, task)["training"])
        training.pop("dropout")
        return {"training": training, "dtype": "float32"}
