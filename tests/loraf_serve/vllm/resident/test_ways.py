"""The resident backend with two tensor-parallel workers, in half precision, and with a wrong kernel. Each test starts
its own engine."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from loraf_serve import choose_backend
from loraf_serve.vllm.engine.backends import ResidentBackend
from tests.loraf_serve.references import Formula, Merged
from tests.loraf_serve.vllm_engines import COMMON, Engine, Loop, random_prompt
from tests.standins import make_model, random_checkpoint

STEPS = 4
SETS = ("math", "nlu", "code", "all", "math:0.5+nlu:-2", "base")

# A sitecustomize module, found through PYTHONPATH by each of the engine's processes: every operand adds too much.
FAULT = """
import loraf_serve.kernels as kernels

prepare = kernels.prepare


def wrong(parts, kernel="auto"):
    operand = prepare(parts, kernel)
    add_delta = operand.add_delta

    def too_much(y, x, rows):
        add_delta(y, x, rows)
        y[rows.indices.long(), parts[0].offset + parts[0].d_out - 1] += 0.5

    operand.add_delta = too_much
    return operand


kernels.prepare = wrong
"""


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """Starts engines on a small random Mistral, and stops them at the end."""
    folder = make_model("mistral", tmp_path / "mistral")
    random_checkpoint(tmp_path / "ckpt", folder)
    loop = Loop()
    with ExitStack() as stack:
        stack.callback(loop.close)

        def start(backend=ResidentBackend, options=(*COMMON, "--enforce-eager")) -> Engine:
            engine = Engine(loop, "resident", folder, tmp_path / "ckpt", options, backend)
            stack.callback(lambda: loop.run(engine.backend.stop()))
            return engine

        yield start


def assert_mixed_batch(engine: Engine, merged: Merged) -> None:
    """Sixteen weightings and two base rows in one batch answer like merged weights, token for token."""
    drawn = random.Random(6)
    texts = ["+".join(f"{task}:{drawn.uniform(-2, 2):.3f}" for task in engine.adapter.tasks) for _ in range(16)]
    texts = [*texts[:8], "base", *texts[8:], "base"]
    prompts = [random_prompt(20 + 3 * i, seed=300 + i) for i in range(len(texts))]
    answers = engine.ask(*(engine.request(text, prompt) for text, prompt in zip(texts, prompts, strict=True)))
    expected = [merged.greedy(text, prompt, 8) for text, prompt in zip(texts, prompts, strict=True)]
    assert [answer.token_ids for answer in answers] == expected


def test_two_tensor_parallel_workers_answer_as_one(started, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds half of the heads and half of the rows or columns of every layer, including A and B."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("two workers of vLLM's CPU back end need two processors")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[1]}")
    monkeypatch.setenv("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    engine = started(options=(*COMMON, "--enforce-eager", "--tensor-parallel-size", "2"))
    assert len(engine.loop.run(engine.backend._call_workers("loraf_layers"))) == 2
    assert_mixed_batch(engine, Merged(engine.folder, engine.adapter.checkpoint))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_each_row_gets_its_own_delta(started, dtype: str) -> None:
    """Logits of a mixed batch against the formula in float64. Half precision rounds at every layer, so tokens are not
    compared. A row may have twice the error of merged weights in transformers in the same precision."""
    engine = started(options=(*COMMON, "--enforce-eager", "--dtype", dtype))
    prompt = random_prompt(40, seed=7)
    formula = Formula(engine.folder, engine.adapter.checkpoint)
    expected = {text: formula.logits(text, prompt)[-1] for text in SETS}
    merged = Merged(engine.folder, engine.adapter.checkpoint, getattr(torch, dtype))
    rounding = max(_error(merged.logits(text, prompt)[-1], expected[text]) for text in SETS)
    answers = engine.ask(*(engine.request(text, prompt, max_tokens=1, logprobs=-1) for text in SETS * 2))
    for text, answer in zip(SETS * 2, answers, strict=True):
        actual = torch.full_like(expected[text], torch.nan)
        for token in answer.logprobs[0].top:
            actual[token.token_id] = token.logprob
        errors = {other: _error(actual, logits) for other, logits in expected.items()}
        assert errors[text] <= 2 * rounding, (errors, rounding)
        assert min(error for other, error in errors.items() if other != text) > 4 * rounding, (errors, rounding)


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest error relative to the largest logit."""
    return float((actual - expected).abs().max() / expected.abs().max())


def test_a_wrong_kernel_is_detected_at_start_and_slots_serve_instead(started, tmp_path, monkeypatch) -> None:
    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(FAULT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fault"), prepend=os.pathsep)
    messages: list[str] = []

    def auto(folder: Path, options: tuple[str, ...], rank: int):
        return choose_backend.choose("auto", folder, options, rank, messages.append).backend

    engine = started(auto)
    assert engine.backend.name == "slots"
    assert "resident backend failed its self-check" in messages[0]
    assert "model.layers.0.self_attn.qkv_proj" in messages[0]
    assert messages[1] == "serving with the slots backend instead"
    assert_mixed_batch(engine, Merged(engine.folder, engine.adapter.checkpoint))
