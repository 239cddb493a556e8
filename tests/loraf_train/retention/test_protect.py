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
