"""`loraf-train protect` where an earlier task was trained again, and where statistics are damaged."""

from __future__ import annotations

import pytest

from tests.loraf_train.command_line import digests, run


def test_a_task_on_top_of_one_that_was_trained_again_since_is_refused(copied, capsys):
    run(capsys, "remove", "ckpt", "upper")
    head, upper, truth = (copied / "tasks.yaml").read_text().split("  - name: ")
    (copied / "tasks.yaml").write_text("  - name: ".join((head, truth, upper)))
    assert run(capsys, "run", "tasks.yaml", "--no-eval")[0] == 0
    before = digests(copied / "ckpt")
    status, _, err = run(capsys, "protect", "ckpt", "tasks.yaml")
    assert status == 2 and digests(copied / "ckpt") == before
    text = " ".join(err.split())
    assert "tasks[0]" in text and "task 'truth' was trained on top of upper" in text
    assert "does not have as it was then (upper: trained again since)" in text and "Traceback" not in err


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"x")])
def test_damaged_statistics_are_gathered_as_missing_ones_are(copied, capsys, damage):
    """As the message about them advises."""
    run(capsys, "protect", "ckpt", "tasks.yaml")
    whole = digests(copied / "ckpt")
    damage(copied / "ckpt/statistics/upper.safetensors")
    status, out, _ = run(capsys, "protect", "ckpt", "tasks.yaml")
    assert status == 0 and out.count("statistics in") == 1 and "upper: statistics in" in out
    assert digests(copied / "ckpt") == whole


def test_only_what_is_gathered_has_to_be_as_it_was(copied, capsys):
    run(capsys, "protect", "ckpt", "tasks.yaml")
    run(capsys, "remove", "ckpt", "upper")
    head, _, truth = (copied / "tasks.yaml").read_text().split("  - name: ")
    (copied / "tasks.yaml").write_text("  - name: ".join((head, truth)))
    status, out, err = run(capsys, "protect", "ckpt", "tasks.yaml")
    assert status == 0 and "has statistics already" in " ".join(out.split()).replace("have", "has"), err
    status, _, err = run(capsys, "protect", "ckpt", "tasks.yaml", "--again")
    assert status == 2 and "task 'truth' was trained on top of upper" in " ".join(err.split())


def test_a_mistake_in_retention_is_not_passed_over(copied, capsys):
    before = digests(copied / "ckpt")
    arguments = ("--set", "retention={budget: -3}", "--set", "training.epochs=0")
    status, _, err = run(capsys, "protect", "ckpt", "tasks.yaml", *arguments)
    assert status == 2 and digests(copied / "ckpt") == before
    assert "retention.budget: -3 is out of range" in err and err.count("training.epochs") == 1, err
