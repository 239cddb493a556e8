"""The command `loraf-train` as users see it: exit status, messages, tables, files."""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import subprocess
import sys
import time

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from loraf import manifest as manifests
from loraf.checkpoint import Checkpoint
from loraf_train.cli import build_parser, main
from loraf_train.commands import eval
from loraf_train.settings.comparison import METHODS
from loraf_train.terminal.progress import Progress
from tests.loraf_train.command_line import TASKS, THIRD, digests, run, words
from tests.standins import make_model

# --- the shell -------------------------------------------------------------------------------------------------------


def test_help_of_every_command_is_quick_and_imports_nothing_heavy():
    code = """
import sys
from loraf_train.cli import main
names = ("run", "check", "eval", "compare", "inspect", "export", "import", "remove", "tune-weights", "card",
         "push")
for command in ([], *([name] for name in names)):
    try:
        main([*command, "--help"])
    except SystemExit as ended:
        assert not ended.code
heavy = {"torch", "transformers", "pydantic", "rich", "yaml", "numpy", "safetensors", "datasets"} & set(sys.modules)
assert not heavy, heavy
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 3  # eleven of them, on a machine that may be busy
    assert "Exit status" in done.stdout


def test_every_command_and_option_has_a_sentence_of_help():
    """The reference page is generated from these."""
    (commands,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    assert [entry.dest for entry in commands._choices_actions] == list(commands.choices)
    for entry in commands._choices_actions:
        assert re.fullmatch(r"[A-Z].*[.]", entry.help), entry.dest
        command = commands.choices[entry.dest]
        assert command.description.startswith(entry.help)
        for action in command._actions:
            if not isinstance(action, argparse._HelpAction):
                assert action.help and re.fullmatch(r"[A-Z].*[.]", action.help), (entry.dest, action.dest)


def test_help_names_every_method_of_a_comparison():
    """The command line imports no settings, so it lists the methods a second time."""
    (commands,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    (methods,) = (action for action in commands.choices["compare"]._actions if action.dest == "methods")
    assert set(METHODS) <= set(re.findall(r"[\w-]+", methods.help))
    assert set(methods.default.split(",")) <= set(METHODS)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["run"],
        ["run", "tasks.yaml", "--eval-limit", "0"],
        ["run", "tasks.yaml", "--eval-limit", "many"],
        ["remove", "ckpt"],
        ["export", "ckpt", "--format", "peft", "--out", "x"],
        ["export", "ckpt", "--tasks", "a", "--as-trained", "a", "--format", "peft", "--out", "x"],
        ["export", "ckpt", "--tasks", "a", "--format", "gguf", "--out", "x"],
    ],
)
def test_a_wrong_command_line_exits_2(capsys, arguments):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert "usage" in err


@pytest.mark.parametrize("command", ["run", "check", "eval"])
def test_a_missing_file_exits_2(capsys, tmp_path, command):
    status, out, err = run(capsys, command, str(tmp_path / "none.yaml"))
    assert (status, out) == (2, "")
    assert "no such file" in err and "→" in err


def test_an_interrupt_exits_130_and_a_fault_raises(capsys, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(eval, "prepare", interrupted)
    status, _, err = run(capsys, "eval", "tasks.yaml")
    assert status == 130 and "interrupted" in err
    monkeypatch.setattr(eval, "prepare", broken)
    with pytest.raises(ZeroDivisionError):  # Python prints the traceback and exits with 1
        main(["eval", "tasks.yaml"])


# --- run -------------------------------------------------------------------------------------------------------------


def test_run_shows_progress_scores_and_the_table(trained):
    folder, out = trained
    lines = out.splitlines()
    assert "to train: upper, truth" in lines
    assert "upper: training step: 12 of 12" in out and "truth: calibration step: 2 of 2" in out
    assert re.search(r"loss \d+\.\d{4}, rate 2\.00e-02", out)
    manifest = manifests.read(folder / "ckpt")
    assert manifest.task_names == ("upper", "truth")
    stored = {(e["set"], t.name, e["evaluation"]): e for t in manifest.tasks for e in t.scores}
    assert {key: e["count"] for key, e in stored.items()} == {
        ("upper", "upper", "upper"): 7,
        ("upper+truth", "upper", "upper"): 7,
        ("upper+truth", "truth", "one"): 5,
        ("upper+truth", "truth", "two"): 5,
        ("upper+truth", "truth", "mean"): 10,
    }
    table = {line.split("  ")[1]: words(line) for line in lines if line.startswith("  after")}
    first, both = (f"{stored[key]['score']:.3f}" for key in list(stored)[:2])
    assert table["after upper"] == ["after", "upper", "upper", first, "(7)", "–"]
    mean = f"{stored['upper+truth', 'truth', 'mean']['score']:.3f}"
    assert table["after truth"] == ["after", "truth", "upper+truth", both, "(7)", mean, "(10)"]
    assert any(words(line)[:4] == ["truth", "as", "trained", "upper+truth"] for line in lines)
    assert "backward transfer" in out and "forgetting" in out


def test_a_second_run_trains_nothing_and_changes_nothing(copied, capsys):
    before = digests(copied / "ckpt")
    status, out, _ = run(capsys, "run", "tasks.yaml")
    assert status == 0
    assert "trained already: upper, truth" in out and "to train: nothing" in out
    assert "after truth" in out  # the table comes from what is stored
    assert digests(copied / "ckpt") == before


def test_a_second_run_measures_missing_scores_and_trains_only_new_tasks(copied, capsys):
    before = digests(copied / "ckpt")
    scores = manifests.read(copied / "ckpt").task("truth").scores
    checkpoint = Checkpoint.open(copied / "ckpt")
    checkpoint.set_scores("truth", [])
    (copied / "tasks.yaml").write_text(TASKS + THIRD)
    status, out, _ = run(capsys, "run", "tasks.yaml", "--no-eval")
    assert status == 0
    assert "to train: third" in out and "third: training step: 1 of 1" in out and "truth: training" not in out
    after = digests(copied / "ckpt")
    assert {name for name in after if after[name] != before.get(name)} == {"loraf.json", "tasks/third.safetensors"}
    assert manifests.read(copied / "ckpt").task("truth").scores == ()
    status, out, _ = run(capsys, "run", "tasks.yaml")
    assert status == 0
    assert "third has no evaluation records" in out
    manifest = manifests.read(copied / "ckpt")
    assert manifest.task("truth").scores[:3] == scores  # measured again, with the same result
    assert [e["set"] for e in manifest.task("upper").scores] == ["upper", "upper+truth", "upper+truth+third"]


def test_records_edited_after_a_task_was_trained_and_scored(copied, capsys):
    """Training records: said, and not trained again. Evaluation records: said, and scored again."""
    trained = digests(copied / "ckpt")
    status, out, _ = run(capsys, "check", "tasks.yaml")
    assert status == 0 and "other examples" not in out
    lines = (copied / "truth.jsonl").read_text().splitlines()
    edited = [json.loads(line) for line in lines]
    edited[0]["a"] = "false" if edited[0]["a"] == "true" else "true"  # the same number of records
    (copied / "truth.jsonl").write_text("".join(json.dumps(row) + "\n" for row in edited))
    for command in ("check", "run"):
        status, out, _ = run(capsys, command, "tasks.yaml")
        words = " ".join(out.split())
        assert status == 0
        assert "tasks[1].data.train: task 'truth' was trained on other examples than these" in words
        assert "task 'upper' was trained on other" not in words
    assert "truth: its stored scores" in words and "upper: its stored scores" not in words
    assert "scoring truth" in out and "scoring upper" not in out and "training step" not in out
    after = digests(copied / "ckpt")
    assert {name for name in after if after[name] != trained[name]} == {"loraf.json"}
    status, out, _ = run(capsys, "run", "tasks.yaml")
    assert "stored scores" not in out and "scoring" not in out


def test_run_refuses_changed_settings_of_a_finished_task(copied, capsys):
    before = digests(copied / "ckpt")
    status, _, err = run(capsys, "run", "tasks.yaml", "--set", "tasks.upper.alpha=3", "--set", "seed=1")
    assert status == 2
    assert "tasks[0].alpha" in err and "seed" in err
    assert digests(copied / "ckpt") == before


# --- eval ------------------------------------------------------------------------------------------------------------


def test_eval_names_the_task_set_of_each_score(copied, capsys):
    before = digests(copied / "ckpt")
    arguments = [
        "--tasks",
        "truth,upper",
        "--tasks",
        "upper:0.5",
        "--base",
        "--as-trained",
        "upper",
        "--json",
        "s.json",
    ]
    status, out, _ = run(capsys, "eval", "tasks.yaml", *arguments)
    assert status == 0
    written = json.loads((copied / "s.json").read_text())
    assert [(s["set"], s["task"], s["evaluation"]) for s in written["scores"]] == [
        (task_set, *place)
        for task_set in ("upper+truth", "upper:0.5", "upper", "base")
        for place in (("upper", "upper"), ("truth", "one"), ("truth", "two"), ("truth", "mean"))
    ]
    manifest = manifests.read(copied / "ckpt")
    assert written["adapter_digest"] == manifest.adapter_digest
    by_place = {(s["set"], s["task"], s["evaluation"]): s["score"] for s in written["scores"]}
    for task in manifest.tasks:  # the same numbers as the run measured
        for entry in task.scores:
            assert by_place[entry["set"], task.name, entry["evaluation"]] == entry["score"]
    for s in written["scores"]:
        row = next(w for w in map(words, out.splitlines()) if w[:3] == [s["set"], s["task"], s["evaluation"]])
        assert row[4] == f"{s['score']:.3f}" and row[-1] == str(s["count"])
    assert digests(copied / "ckpt") == before


def test_eval_of_the_base_needs_no_checkpoint(copied, capsys):
    shutil.rmtree(copied / "ckpt")
    status, out, _ = run(capsys, "eval", "tasks.yaml", "--base", "--limit", "2")
    assert status == 0
    assert [words(line)[-1] for line in out.splitlines() if line.startswith("  base")] == ["2", "2", "2", "4"]
    status, _, err = run(capsys, "eval", "tasks.yaml")
    assert status == 2 and "no loraf.json" in err


def test_eval_refuses_an_unknown_task(copied, capsys):
    status, _, err = run(capsys, "eval", "tasks.yaml", "--tasks", "upper,maths", "--limit", "1")
    assert status == 2
    assert "no task 'maths'" in err and "upper, truth" in err


# --- check -----------------------------------------------------------------------------------------------------------


def test_check_shows_an_example_with_its_loss_mask_and_what_a_run_takes(copied, capsys):
    shutil.rmtree(copied / "ckpt")
    status, out, err = run(capsys, "check", "tasks.yaml", "--set", "tasks.truth.training.max_length=9")
    assert (status, err) == (0, "")
    assert "<s>ab=⟦AB</s>⟧" in out
    assert "7 records, 7 examples of 7 to 7 (mean 7) tokens" in out
    # «<s>y0?» and «false</s>» are ten tokens, «true</s>» makes nine.
    assert "cuts the end of 5 examples and drops 0" in out
    model = AutoModelForCausalLM.from_pretrained(copied / "base")
    matrices = [w for name, w in model.named_parameters() if name.split(".")[-2].endswith("_proj")]
    total = sum(w.shape[0] * 8 for w in matrices)
    k = sum(w.shape[0] * 8 * 4 // 10 for w in matrices)
    rows = {w[0]: w[1:] for w in map(words, out.splitlines()) if len(w) == 6 and w[0] in ("upper", "truth")}
    share = f"{k / total:.2%}"
    assert rows["upper"] == ["0.6", f"{k:,}", share, f"{total - k:,}", f"{(total - k) / total:.2%}"]
    assert rows["truth"] == ["0.6", f"{k:,}", share, f"{total - 2 * k:,}", f"{(total - 2 * k) / total:.2%}"]
    assert f"{sum(p.numel() for p in model.parameters()):,} weights in float32" in out
    assert not (copied / "ckpt").exists()


def test_check_highlights_the_loss_in_a_terminal(copied, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    status, out, _ = run(capsys, "check", "tasks.yaml")
    assert status == 0
    assert "\x1b[2m<s>ab=\x1b[0m\x1b[1;32mAB</s>\x1b[0m" in out


def test_check_reports_mistakes_of_every_kind_at_once(copied, capsys):
    shutil.rmtree(copied / "ckpt")
    tokenizer = copied / "base/tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"eos_token": None}))
    (copied / "bad.jsonl").write_text('{"prompt": "p"}\n')
    content = TASKS.replace("sparsity: 0.6", "sparsity: 0.4").replace("max_new_tokens: 4", "max_new_token: 4")
    content += "  - {name: broken, data: {train: bad.jsonl, eval: nothing.jsonl}}\n"
    content += "  - {name: unread, data: {train: bad.jsonl}}\n"
    (copied / "tasks.yaml").write_text(content)
    status, out, err = run(capsys, "check", "tasks.yaml", "--set", "training.epochs=0")
    assert (status, out) == (2, "")
    expected = [
        r"tasks\[0\]\.max_new_token: is not a known key → did you mean 'max_new_tokens'\?",
        r"--set: training\.epochs: 0 is out of range → use a number above 0",
        r"tasks\[2\]\.data\.eval: there is no file .*nothing\.jsonl → paths are relative to",
        r"eos_token: the tokenizer has no end-of-sequence token.* → set \"eos_token\"",
        r"bad\.jsonl: record 1: has none of the known forms \(it has: prompt\) → ",
        r"tasks\[1\]\.sparsity: task 'truth' needs \d+ positions in .* → a sparsity of 0\.6 would fit",
    ]
    for pattern in expected:
        assert re.search(pattern, err), (pattern, err)
    assert len(err.strip().splitlines()) >= len(expected)
    for line in err.strip().splitlines():
        assert " → " in line
    assert "Traceback" not in err


def test_check_names_a_missing_target_module_and_data_longer_than_the_context(copied, capsys):
    shutil.rmtree(copied / "ckpt")
    status, _, err = run(capsys, "check", "tasks.yaml", "--set", "adapter.target_modules=[q_proj, w_proj]")
    assert status == 2
    assert "adapter.target_modules: the model has no 'w_proj'" in err and "q_proj, k_proj" in err
    (copied / "upper.jsonl").write_text(json.dumps({"prompt": "p" * 2000, "completion": "c"}) + "\n")
    status, out, _ = run(capsys, "check", "tasks.yaml", "--set", "training.max_length=4096")
    assert status == 0  # rotary positions have no end
    assert "tasks[0].training.max_length: training example 1 has 200" in out and "context is 1024" in out
    status, _, err = run(capsys, "check", "tasks.yaml")
    assert status == 2
    assert "every prompt of task 'upper' fills max_length 512" in err


def test_check_refuses_the_checkpoint_of_another_base(copied, capsys):
    shutil.rmtree(copied / "base")
    make_model("llama", copied / "base", seed=1)
    for command in ("check", "run", "eval"):
        status, _, err = run(capsys, command, "tasks.yaml")
        assert status == 2
        assert "other weights" in err and "another output folder" in err


# --- progress --------------------------------------------------------------------------------------------------------


def test_a_terminal_gets_bars():
    written = io.StringIO()
    with Progress(Console(file=written, force_terminal=True, width=120)) as progress:
        step = progress.part("task [math]")
        step(3, 10, "loss 1.5")
        progress._bars.refresh()
    assert "task [math]" in written.getvalue() and "3/10" in written.getvalue() and "loss 1.5" in written.getvalue()


def test_a_pipe_gets_a_line_at_each_tenth_and_at_the_end():
    written = io.StringIO()
    with Progress(Console(file=written, width=120)) as progress:
        step = progress.part("math")
        for done in range(1, 996):
            step(done, 995)
    lines = written.getvalue().splitlines()
    assert 10 <= len(lines) <= 12
    assert lines[0].startswith("math: 100 of 995 (") and lines[-1].startswith("math: 995 of 995 (")
