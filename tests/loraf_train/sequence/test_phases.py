"""How a task's settings become its two phases, and the seeds of both."""

from __future__ import annotations

from loraf_train.sequence.phases import calibration_phase, seeds_of, training_phase
from loraf_train.settings.parts import TrainingConfig
from tests.loraf_train import toys

TASK = toys.task(
    "one",
    calibration={"steps": 5, "optimizer": "sgd", "learning_rate": 0.3, "batch_size": 4},
    training={
        "micro_batch_size": 2,
        "packing": True,
        "max_length": 40,
        "gradient_checkpointing": True,
        "weight_decay": 0.1,
        "schedule": "cosine",
        "warmup_steps": 3,
        "epochs": 2.0,
    },
)


def test_training_runs_with_the_tasks_own_settings():
    phase = training_phase(TASK, 7)
    assert (phase.name, phase.seed, phase.optimizer) == ("training of task 'one'", 7, "adamw")
    assert phase.settings == TASK.training


def test_calibration_differs_from_training_only_as_algorithm_1_needs():
    phase = calibration_phase(TASK, 7)
    assert (phase.name, phase.seed, phase.optimizer) == ("calibration of task 'one'", 7, "sgd")
    calibration, training = phase.settings.model_dump(), TASK.training.model_dump()
    assert set(vars(phase.settings)) == set(TrainingConfig.model_fields)  # model_copy would take a misspelt name
    assert {name: value for name, value in calibration.items() if value != training[name]} == {
        "learning_rate": 0.3,
        "batch_size": 4,
        "max_steps": 5,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "schedule": "constant",
        "warmup_steps": 0,
    }


def test_only_tasks_with_trackers_are_tracked(tmp_path):
    tracked = toys.task("one", training={"report_to": ("tensorboard",)})
    assert [phase(TASK, 7, tmp_path).tracking for phase in (calibration_phase, training_phase)] == [None, None]
    names = [phase(tracked, 7, tmp_path).tracking.name for phase in (calibration_phase, training_phase)]
    assert names == ["one/calibration", "one/training"]
    assert training_phase(tracked, 7).tracking is None


def test_seeds_and_their_labels_are_those_of_earlier_versions():
    """Values of checkpoints from then depend on them, and manifests store them under these names."""
    assert seeds_of(0, "math") == {"calibration": 2518527413, "adaptation": 468996802}
    assert seeds_of(7, "first") == {"calibration": 3811090610, "adaptation": 2330217877}
