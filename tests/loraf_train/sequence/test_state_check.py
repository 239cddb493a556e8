"""A saved state whose digests fit, but which cannot be one of the task, is not used."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from loraf.matrices.sparse import SparseB
from loraf_train.sequence.state_check import TaskShape
from loraf_train.trainer.loop import Snapshot
from tests.loraf_train import toys

D_OUT, RANK, K = 6, 4, 6
TAKEN = torch.arange(4)
POSITIONS = torch.arange(10, 10 + K)
TASK = TaskShape(
    toys.task("one", sparsity=0.75),  # 4 steps of training, 2 of calibration
    {"q": (D_OUT, RANK)},
    {"q": [SparseB.from_positions(TAKEN, torch.ones(len(TAKEN)), (D_OUT, RANK))]},
    examples=24,
)


def snapshot(count: int = K, step: int = 2, steps: int = 4, **changes) -> Snapshot:
    tensors = {
        "parameter.q.values": torch.zeros(count),
        "optimizer.step.q.values": torch.tensor(2.0),
        "optimizer.exp_avg.q.values": torch.zeros(count),
        "optimizer.exp_avg_sq.q.values": torch.zeros(count),
    }
    tensors |= changes
    return Snapshot(step, steps, 1.0, 1.0, {name: tensor for name, tensor in tensors.items() if tensor is not None})


def test_states_of_the_task_fit():
    assert TASK.misfit({"q": POSITIONS}, None) == ""
    assert TASK.misfit({"q": POSITIONS}, snapshot()) == ""
    assert TASK.misfit(None, snapshot(D_OUT * RANK - len(TAKEN), 1, 2)) == ""
    sgd = {f"optimizer.{key}.q.values": None for key in ("step", "exp_avg", "exp_avg_sq")}
    assert TASK.misfit(None, snapshot(D_OUT * RANK - len(TAKEN), 1, 2, **sgd)) == ""


@pytest.mark.parametrize(
    ("positions", "says"),
    [
        ({}, "other modules"),
        ({"k": POSITIONS}, "other modules"),
        ({"q": POSITIONS[:-1]}, "another number of positions"),
        ({"q": POSITIONS.view(2, 3)}, "another number of positions"),
        ({"q": POSITIONS.flip(0)}, "not ascending"),
        ({"q": POSITIONS.clone().index_fill_(0, torch.tensor([5]), 24)}, "not ascending positions of the matrix"),
        ({"q": POSITIONS - 11}, "not ascending positions of the matrix"),
        ({"q": POSITIONS - 7}, "belong to another task"),
    ],
)
def test_positions_that_the_task_cannot_own(positions, says):
    assert says in TASK.misfit(positions, None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"step": 5}, "step 5 of 4"),
        ({"step": 2**62, "steps": 2**62}, "is not one of this task"),
        ({"step": 0}, "step 0 of 4"),
        ({"step": -1}, "step -1 of 4"),
        ({"count": K + 1}, "not 6 numbers"),
        ({"parameter.q.values": torch.zeros(K, dtype=torch.int32)}, "int32"),
        ({"parameter.q.values": torch.zeros(1, K)}, "not 6 numbers"),
        ({"parameter.q.values": None}, "lacks parameters"),
        ({"optimizer.exp_avg.q.values": None}, "a part of the optimizer"),
        ({"optimizer.exp_avg.q.values": torch.zeros(3)}, "not 6 numbers"),
        ({"optimizer.step.q.values": torch.zeros(6)}, "not 1 numbers"),
        ({"optimizer.exp_avg.k.values": torch.zeros(K)}, "no tensor of this task"),
        ({"optimizer.other.q.values": torch.zeros(K)}, "no tensor of this task"),
        ({"else": torch.zeros(K)}, "no tensor of this task"),
        ({"parameter.": torch.zeros(K)}, "no tensor of this task"),
    ],
)
def test_tensors_and_counts_that_the_task_cannot_have(changes, says):
    assert says in TASK.misfit({"q": POSITIONS}, snapshot(**changes))


STOPPING = {
    "stopping.numbers": torch.tensor([0.5, 1, 0, 2], dtype=torch.float64),
    "stopping.value.q.values": torch.ones(K),
}


def test_states_of_early_stopping_and_of_a_stream():
    training = toys.task("one", training={"early_stopping": {"patience": 1}}).training
    stops = dataclasses.replace(TASK, task=TASK.task.model_copy(update={"training": training}))
    positions = {"q": POSITIONS}
    assert stops.misfit(positions, snapshot(**STOPPING)) == ""
    assert "a part of what early stopping needs" in stops.misfit(positions, snapshot())
    assert "does not stop early" in TASK.misfit(positions, snapshot(**STOPPING))
    for name, wrong, says in (
        ("stopping.numbers", torch.tensor([0.5, -1, 0, 2], dtype=torch.float64), "three counts"),
        ("stopping.numbers", torch.zeros(4), "three counts"),
        ("stopping.value.q.values", torch.ones(K + 1), f"not {K} numbers"),
        ("stopping.value.k.values", torch.ones(K), "early stopping needs"),
    ):
        assert says in stops.misfit(positions, snapshot(**(STOPPING | {name: wrong}))), name
    digest = {"stream.digest": torch.zeros(32, dtype=torch.uint8)}
    assert "not a digest" in TASK.misfit(positions, snapshot(**digest))
    streams = TASK.task.model_copy(update={"data": TASK.task.data.model_copy(update={"streaming": True})})
    assert dataclasses.replace(TASK, task=streams).misfit(positions, snapshot(**digest)) == ""
