"""`loraf-train protect`: statistics of finished tasks, and what `run`, `check` and `inspect` say of them."""

from __future__ import annotations

import json
import re

from loraf import manifest as manifests
from loraf.checkpoint import Checkpoint
from tests.loraf_train.command_line import THIRD, digests, run

PROTECT = ("protect", "ckpt", "tasks.yaml")


def test_a_checkpoint_without_statistics_gets_them_afterwards(copied, capsys):
    before = digests(copied / "ckpt")
    status, out, _ = run(capsys, *PROTECT)
    assert status == 0
    assert re.search(r"upper: statistics in \S*ckpt/statistics/upper.safetensors \(\d", out) and "truth: stat" in out
    now = digests(copied / "ckpt")
    assert all(now[name] == digest for name, digest in before.items() if name != manifests.FILE_NAME)
    assert now.keys() - before.keys() == {"statistics/upper.safetensors", "statistics/truth.safetensors"}
    manifest = manifests.read(copied / "ckpt")
    assert manifest.format_version == 2
    status, out, _ = run(capsys, "inspect", "ckpt", "--verify", "--json")
    facts = json.loads(out)["tasks"]
    assert [task["statistics"]["bytes"] for task in facts] == [t.statistics.bytes for t in manifest.tasks]


def test_it_gathers_only_what_is_missing_unless_again_is_said(copied, capsys):
    run(capsys, *PROTECT)
    first = digests(copied / "ckpt")
    status, out, _ = run(capsys, *PROTECT)
    assert status == 0 and "every finished task of the file has statistics already" in out
    assert digests(copied / "ckpt") == first
    status, out, _ = run(capsys, *PROTECT, "--again")
    assert status == 0 and out.count("statistics in") == 2
    assert digests(copied / "ckpt") == first  # they depend on the task and its seed alone


def test_a_run_says_what_is_not_protected_and_then_what_was_spent(copied, capsys):
    (copied / "tasks.yaml").write_text((copied / "tasks.yaml").read_text() + THIRD)
    more = ("--no-eval", "--set", "retention={budget: 0.1}")
    status, out, _ = run(capsys, "check", "tasks.yaml", "--set", "retention={budget: 0.1}")
    assert status == 0 and "statistics take" in out and "not protected: upper, truth" in out
    run(capsys, *PROTECT)
    status, out, _ = run(capsys, "run", "tasks.yaml", *more)
    assert status == 0
    pattern = r"third: predicted change .* of a budget of 0.1: upper (\S+)(?: \(over\))?, truth (\S+) "
    spent = re.search(pattern, out.replace("\n", " "))
    assert spent and all(float(number) > 0 for number in spent.groups())


def test_a_run_over_unprotected_tasks_goes_on_and_names_the_command(copied, capsys):
    (copied / "tasks.yaml").write_text((copied / "tasks.yaml").read_text() + THIRD)
    status, out, _ = run(capsys, "run", "tasks.yaml", "--no-eval", "--set", "retention={budget: 0.1}")
    text = " ".join(out.split())
    assert status == 0 and "without statistics" in text and "upper, truth (`loraf-train protect`" in text
    assert manifests.read(copied / "ckpt").task("third").statistics is not None


def test_other_training_records_are_refused(copied, capsys):
    rows = (copied / "upper.jsonl").read_text().splitlines()
    (copied / "upper.jsonl").write_text("\n".join(rows[:-1]) + "\n")
    before = digests(copied / "ckpt")
    status, _, err = run(capsys, *PROTECT)
    assert status == 2 and "task 'upper' was trained on other examples than these" in err
    assert "tasks[0].data.train" in err and digests(copied / "ckpt") == before


def test_a_file_without_a_finished_task_is_refused(copied, capsys):
    text = (
        (copied / "tasks.yaml").read_text().replace("name: upper", "name: other").replace("name: truth", "name: more")
    )
    (copied / "tasks.yaml").write_text(text.replace("sparsity: 0.6", "sparsity: 0.95"))
    status, _, err = run(capsys, *PROTECT)
    assert status == 2 and "none of its tasks is in the checkpoint" in err and "upper, truth" in err
    assert "Traceback" not in err


def test_a_task_whose_earlier_tasks_are_gone_is_refused(copied, capsys):
    run(capsys, "remove", "ckpt", "upper")
    head, _, rest = (copied / "tasks.yaml").read_text().partition("  - name: upper")
    (copied / "tasks.yaml").write_text(head + rest[rest.index("  - name: truth") :])
    status, _, err = run(capsys, *PROTECT)
    assert status == 2 and "task 'truth' was trained on top of upper, which this checkpoint does not have" in err


def test_damaged_statistics_are_found_before_anything_is_trained_and_protect_mends_them(copied, capsys):
    run(capsys, *PROTECT)
    (copied / "tasks.yaml").write_text((copied / "tasks.yaml").read_text() + THIRD)
    upper, truth = (copied / f"ckpt/statistics/{name}.safetensors" for name in ("upper", "truth"))
    upper.unlink()
    damaged = truth.read_bytes()
    truth.write_bytes(damaged[:-1] + bytes([damaged[-1] ^ 1]))
    on = ("--set", "retention={budget: 0.1}")
    for command in (("check",), ("run", "--no-eval")):
        status, out, err = run(capsys, command[0], "tasks.yaml", *on, *command[1:])
        text = out + err
        assert status == 2 and "upper.safetensors: cannot be read" in text and "truth.safetensors: was changed" in text
        assert text.count("loraf-train protect") == 2 and "Traceback" not in text
        assert manifests.read(copied / "ckpt").task_names == ("upper", "truth")
        # Nothing is protected then, so they are not read.
        assert run(capsys, "check", "tasks.yaml", "--set", "retention=off")[0] == 0
    status, out, _ = run(capsys, *PROTECT, *on)
    assert status == 0 and out.count("statistics in") == 2
    assert run(capsys, "check", "tasks.yaml", *on)[0] == 0


def test_a_damaged_task_is_found_before_another_is_trained(copied, capsys):
    (copied / "ckpt/tasks/truth.safetensors").write_bytes(b"no tensors")
    assert run(capsys, "check", "tasks.yaml")[0] == 0  # nothing is left to train on top of it
    (copied / "tasks.yaml").write_text((copied / "tasks.yaml").read_text() + THIRD)
    status, out, err = run(capsys, "check", "tasks.yaml")
    assert status == 2 and "truth.safetensors" in out + err and "Traceback" not in out + err


def test_statistics_that_could_not_protect_are_found_by_check(copied, capsys):
    """Their digest is right: it is their content that no writer of this project makes."""
    run(capsys, *PROTECT)
    (copied / "tasks.yaml").write_text((copied / "tasks.yaml").read_text() + THIRD)
    checkpoint = Checkpoint.open(copied / "ckpt")
    checkpoint.set_statistics("truth", b"no tensors")
    status, out, err = run(capsys, "check", "tasks.yaml", "--set", "retention={budget: 0.1}")
    assert status == 2 and "truth.safetensors" in out + err and "loraf-train protect" in out + err
