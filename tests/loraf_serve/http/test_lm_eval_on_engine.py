"""lm-evaluation-harness chooses by log-likelihood through the HTTP door as it does with the merged export.

The suite's engine answers with logits for log-probabilities. For choices of one token, each choice's logit less that of
the first is the same as with log-probabilities, and so is which is the largest.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from loraf_train.cli import main
from tests.loraf_serve.http.engine_stand import on_engine
from tests.loraf_serve.http.lm_eval_stand import requires_lm_eval, run_lm_eval, write_json_lines, write_tasks
from tests.loraf_serve.vllm_engines import shared

pytestmark = [shared("mistral"), requires_lm_eval]
SET = "math:0.5+nlu"
QUESTIONS = ("Is water wet?", "Is fire cold?", "7 times 6?", "The fox jumps", "over the lazy dog", "x", "a b c", "no")
CHOICES = ("A", "B", "C", "D")


@pytest.fixture(scope="module")
def answers(vllm_pool, tmp_path_factory) -> dict[str, dict]:
    folder: Path = tmp_path_factory.mktemp("lm-eval")
    write_tasks(folder)
    records = [{"prompt": q, "choices": CHOICES, "label": i % len(CHOICES)} for i, q in enumerate(QUESTIONS)]
    write_json_lines(folder / "choose.jsonl", records)
    engine = vllm_pool.get("mistral", "resident")
    command = ["export", str(engine.adapter.path), "--tasks", SET, "--format", "merged", "--model", str(engine.folder)]
    assert main([*command, "--out", str(folder / "merged")]) == 0
    with on_engine(engine) as doors:
        url = f"{doors.url}/v1/completions"
        local = {"tokenizer": str(engine.folder), "tokenizer_backend": "huggingface", "add_bos_token": True}
        served = {"base_url": url, "max_length": 512, "num_concurrent": 4, "max_retries": 1, **local}
        hf = {"dtype": "float32", "add_bos_token": True}
        runs = {
            "served": {"model": "local-completions", "model_args": {"model": f"main@{SET}", **served}, "batch_size": 4},
            "base": {"model": "local-completions", "model_args": {"model": "base", **served}},
            "merged": {"model": "hf", "model_args": {"pretrained": "merged", **hf}, "device": "cpu"},
            "merged base": {"model": "hf", "model_args": {"pretrained": str(engine.folder), **hf}, "device": "cpu"},
        }
        results = run_lm_eval(folder, [{"tasks": ["choose"], **run} for run in runs.values()])
    return dict(zip(runs, results, strict=True))


def differences(sample: dict) -> list[float]:
    """How much likelier each choice is than the first."""
    likelihoods = [float(likelihood) for likelihood, _ in sample["answers"]]
    return [likelihood - likelihoods[0] for likelihood in likelihoods]


@pytest.mark.parametrize(("served", "reference"), [("served", "merged"), ("base", "merged base")])
def test_the_likelihoods_are_those_of_the_merged_model(served, reference, answers):
    assert "error" not in answers[served] and "error" not in answers[reference], answers[served]
    for mine, other in zip(answers[served]["samples"], answers[reference]["samples"], strict=True):
        ours, theirs = differences(mine), differences(other)
        assert ours == pytest.approx(theirs, abs=1e-3) and max(map(abs, theirs)) > 0.1
        assert [greedy for _, greedy in mine["answers"]] == [greedy for _, greedy in other["answers"]]
    assert answers[served]["scores"]["acc,none"] == answers[reference]["scores"]["acc,none"]


def test_some_choices_are_right_and_the_set_matters(answers):
    assert 0 < answers["served"]["scores"]["acc,none"] < 1
    assert answers["served"]["samples"] != answers["base"]["samples"]
