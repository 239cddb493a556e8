"""The resident backend in other ways than one process in float32: two tensor-parallel workers, half precision, and an
engine whose kernel is wrong. Each engine is started for its own test."""

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

# What a process of the engine runs when it starts, found through PYTHONPATH: every operand adds a little too much.
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
    """Starts an engine on a small random Mistral; stopped at the end."""
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


def mixed(engine: Engine, merged: Merged) -> None:
    """Sixteen weightings and two base rows in one batch, token for token."""
    drawn = random.Random(6)
    texts = ["+".join(f"{task}:{drawn.uniform(-2, 2):.3f}" for task in engine.adapter.tasks) for _ in range(16)]
    texts = [*texts[:8], "base", *texts[8:], "base"]
    prompts = [random_prompt(20 + 3 * i, seed=300 + i) for i in range(len(texts))]
    answers = engine.ask(*(engine.request(text, prompt) for text, prompt in zip(texts, prompts, strict=True)))
    expected = [merged.greedy(text, prompt, 8) for text, prompt in zip(texts, prompts, strict=True)]
    assert [answer.token_ids for answer in answers] == expected


def test_two_tensor_parallel_workers_answer_as_one(started, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds half of the heads and half of the rows or columns of every layer, of A, B and the masks too."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("two workers of vLLM's CPU back end need two processors")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[1]}")
    monkeypatch.setenv("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    engine = started(options=(*COMMON, "--enforce-eager", "--tensor-parallel-size", "2"))
    assert len(engine.loop.run(engine.backend._call_workers("loraf_layers"))) == 2
    mixed(engine, Merged(engine.folder, engine.adapter.checkpoint))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_each_row_gets_its_own_delta(started, dtype: str) -> None:
    """Logits of a mixed batch against the formula in float64. Half precision rounds at every layer, so no token is
    compared: a row may be as far off as twice what merged weights in transformers are in that precision."""
    engine = started(options=(*COMMON, "--enforce-eager", "--dtype", dtype))
    prompt = random_prompt(40, seed=7)
    formula = Formula(engine.folder, engine.adapter.checkpoint)
    expected = {text: formula.logits(text, prompt)[-1] for text in SETS}
    merged = Merged(engine.folder, engine.adapter.checkpoint, getattr(torch, dtype))
    rounding = max(_error(merged.logits(text, prompt)[-1], expected[text]) for text in SETS)
    answers = engine.ask(*(engine.request(text, prompt, max_tokens=1, logprobs=-1) for text in SETS * 2))
    for text, answer in zip(SETS * 2, answers, strict=True):
        found = torch.full_like(expected[text], torch.nan)
        for token in answer.logprobs[0].top:
            found[token.token_id] = token.logprob
        errors = {other: _error(found, logits) for other, logits in expected.items()}
        assert errors[text] <= 2 * rounding, (errors, rounding)
        assert min(error for other, error in errors.items() if other != text) > 4 * rounding, (errors, rounding)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, relative to the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def test_a_wrong_kernel_is_found_at_start_and_slots_serve_instead(started, tmp_path, monkeypatch) -> None:
    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(FAULT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fault"), prepend=os.pathsep)
    said: list[str] = []

    def auto(folder: Path, options: tuple[str, ...], rank: int):
        return choose_backend.choose("auto", folder, options, rank, said.append).backend

    engine = started(auto)
    assert engine.backend.name == "slots"
    assert "resident backend failed its self-check" in said[0] and "model.layers.0.self_attn.qkv_proj" in said[0]
    assert said[1] == "serving with the slots backend instead"
    mixed(engine, Merged(engine.folder, engine.adapter.checkpoint))
