"""lm-evaluation-harness counts as many right answers as `loraf-train eval`, by HTTP and by both exports.

The ways and the task are those of `docs/how-to/evaluate-with-lm-eval.md`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraf.base_model import resolve
from loraf_serve.adapters.adapter_spec import check_adapters
from loraf_serve.backends.merged import MergedBackend
from loraf_train.cli import main
from tests.loraf_serve.http.lm_eval_stand import requires_lm_eval, run_lm_eval, write_json_lines, write_tasks
from tests.loraf_serve.http.stand import both_doors

pytestmark = requires_lm_eval
TINY = resolve("tiny")
WORDS = [
    "kitten",
    "river",
    "stone",
    "apple",
    "lemon",
    "table",
    "cloud",
    "green",
    "music",
    "paper",
    "tiger",
    "wheel",
    "garden",
    "planet",
    "winter",
    "summer",
]
LEARNED = 10  # of the words; the others it may only guess

SETTINGS = """\
model: tiny
output: ckpt
retention: off
adapter: {rank: 16, sparsity: 0.5}
calibration: {steps: 2}
training: {learning_rate: 1e-2, batch_size: 10, epochs: 25, max_length: 64, dropout: 0}
tasks:
  - {name: shout, alpha: 32, data: {train: train.jsonl, eval: eval.jsonl}, metric: exact_match}
"""
WAYS = ("server tokenizes", "client tokenizes", "chat", "merged", "peft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A task that `tiny` has learned in part, its two exports, and the harness's description of it."""
    folder = tmp_path_factory.mktemp("lm-eval")
    records = [{"prompt": f"Shout: {word}\n", "completion": f"{word.upper()}!"} for word in WORDS]
    write_json_lines(folder / "train.jsonl", records[:LEARNED])
    write_json_lines(folder / "eval.jsonl", records)
    write_json_lines(folder / "choose.jsonl", [{**records[0], "choices": ["KITTEN!", "RIVER!"], "label": 0}])
    write_tasks(folder)
    (folder / "tasks.yaml").write_text(SETTINGS, encoding="utf-8")
    assert main(["run", str(folder / "tasks.yaml")]) == 0
    for form in ("merged", "peft"):
        command = ["export", str(folder / "ckpt"), "--tasks", "shout", "--format", form, "--dtype", "float32"]
        assert main([*command, "--out", str(folder / form)]) == 0
    return folder


@pytest.fixture(scope="module")
def right(folder) -> float:
    """The share of right answers by `loraf-train eval`."""
    out = folder / "scores.json"
    assert main(["eval", str(folder / "tasks.yaml"), "--json", str(out)]) == 0
    (score,) = json.loads(out.read_text(encoding="utf-8"))["scores"]
    assert 0 < score["score"] < 1 and score["count"] == len(WORDS)
    return score["score"]


@pytest.fixture(scope="module")
def answers(folder) -> dict[str, dict]:
    """What the harness found, in one process: by each way, and what it was told where it asked for likelihoods."""
    adapters = check_adapters([f"ckpt={folder / 'ckpt'}"], TINY)
    with both_doors(lambda: MergedBackend(TINY, "float32"), adapters) as doors:
        completions = {"model": "ckpt@shout", "base_url": f"{doors.url}/v1/completions", "max_retries": 1}
        chat = {"model": "ckpt@shout", "base_url": f"{doors.url}/v1/chat/completions", "num_concurrent": 4}
        local = {"tokenizer": str(TINY), "tokenizer_backend": "huggingface", "add_bos_token": True}
        hf = {"dtype": "float32", "add_bos_token": True}
        runs = {
            "server tokenizes": {
                "model": "local-completions",
                "model_args": {**completions, "tokenizer_backend": "none", "tokenized_requests": False},
                "batch_size": 4,
            },
            "client tokenizes": {"model": "local-completions", "model_args": {**completions, **local}},
            "chat": {
                "model": "local-chat-completions",
                "model_args": chat,
                "apply_chat_template": True,
                "gen_kwargs": {"apply_task_template": True},
            },
            "merged": {"model": "hf", "model_args": {"pretrained": "merged", **hf}, "device": "cpu"},
            "peft": {
                "model": "hf",
                "model_args": {"pretrained": str(TINY), "peft": "peft", **hf},
                "device": "cpu",
            },
            "likelihoods": {
                "model": "local-completions",
                "model_args": {**completions, **local},
                "tasks": ["choose"],
            },
        }
        results = run_lm_eval(folder, [{"tasks": ["shout"], **run} for run in runs.values()])
    return dict(zip(runs, results, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_as_many_answers_are_right_as_loraf_train_counts(way, answers, right):
    assert "error" not in answers[way], answers[way]
    assert answers[way]["scores"]["exact_match,none"] == right
    assert len(answers[way]["samples"]) == len(WORDS)


def test_every_way_gives_the_same_answers(answers):
    first, *others = (answers[way]["samples"] for way in WAYS)
    assert all(samples == first for samples in others)


def test_the_merged_backend_refuses_to_score_a_prompt(answers):
    assert "501 Server Error" in answers["likelihoods"]["error"]
