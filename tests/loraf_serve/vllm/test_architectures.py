"""Where vLLM's layers are not transformers' modules: what is proven is exact, and the rest is refused.

`python benchmarks/architectures.py` tries every architecture. test_parity.py has plain ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from loraf_serve import choose_backend
from loraf_serve.backends.backend import NotProven
from loraf_serve.vllm.worker.proof import NOT_CALLED, OTHER_ROWS
from tests.loraf_serve import architectures
from tests.loraf_serve.vllm_engines import Engine, Loop, open_adapter, random_prompt

SETS = ("a", "base", "a+b", "a:0.5+b:-1")
STEPS = 3
COPY = "vLLM uses a copy of its weight as v_proj, without the adapter"
# Architecture → backend, modules that are refused there (by the end of their names) and why.
CASES = {
    "llama4": ("slots", {".q_proj": OTHER_ROWS, ".k_proj": OTHER_ROWS}),  # rows permuted for rotary embeddings
    "deepseek_v3": ("resident", {".kv_b_proj": NOT_CALLED}),  # latent attention absorbs this weight
    # The last of six layers has full attention. The head is tied to the embedding.
    "gemma4-keys-are-values": ("resident", {".layers.5.self_attn.k_proj": COPY}),
}


@dataclass
class Case:
    name: str
    folder: Path
    shapes: architectures.Shapes
    refused: dict[str, str]  # module → reason
    engine: Engine


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    root = tmp_path_factory.mktemp(request.param)
    kind, reasons = CASES[request.param]
    folder = architectures.build(request.param, root / "model")
    shapes = architectures.linear_layers(folder)
    refused = {module: reason for module in shapes for end, reason in reasons.items() if module.endswith(end)}
    proven = {module: shape for module, shape in shapes.items() if module not in refused}
    checkpoint = architectures.make_checkpoint(root / "proven", folder, proven)
    with ExitStack() as stack:
        loop = Loop()
        stack.callback(loop.close)
        engine = Engine(loop, kind, folder, checkpoint)
        stack.callback(lambda: loop.run(engine.backend.stop()))
        yield Case(request.param, folder, shapes, refused, engine)


def test_exactly_the_modules_that_are_not_transformers_are_refused(case: Case) -> None:
    (problems,) = case.engine.loop.run(case.engine.backend._call_workers("loraf_problems"))
    assert {module: reason for module, reason in problems.items() if module in case.shapes} == case.refused


def test_what_is_proven_answers_like_transformers(case: Case) -> None:
    engine, prompt = case.engine, random_prompt(40, seed=7)
    answers = engine.ask(*(engine.request(text, prompt, max_tokens=STEPS, logprobs=-1) for text in SETS))
    errors, effects = {}, {}
    base = architectures.right_logits(case.folder, engine.adapter.path, "base", prompt)[-1]
    for text, answer in zip(SETS, answers, strict=True):
        token_ids = prompt + answer.token_ids[:-1]
        right = architectures.right_logits(case.folder, engine.adapter.path, text, token_ids)[-STEPS:]
        actual = torch.full_like(right, torch.nan)
        for row, position in zip(actual, answer.logprobs, strict=True):
            for token in position.top:
                row[token.token_id] = token.logprob
        errors[text] = float((actual - right).abs().max() / right.abs().max())
        effects[text] = float((right[0] - base).abs().max() / base.abs().max())
    assert max(errors.values()) <= 1e-4, errors
    assert all(effect > 0.1 for text, effect in effects.items() if text != "base")  # otherwise nothing is shown


def test_a_checkpoint_of_other_modules_is_refused_by_name_and_nothing_else_changes(case: Case, tmp_path: Path) -> None:
    engine, prompt = case.engine, random_prompt(12, seed=8)
    (before,) = engine.ask(engine.request("a", prompt))
    adapter = open_adapter("all", architectures.make_checkpoint(tmp_path / "all", case.folder, case.shapes))
    with pytest.raises(NotProven) as caught:
        engine.loop.run(engine.backend.add_adapter(adapter))
    named = {(problem.field, problem.message.partition(" (and ")[0]) for problem in caught.value.problems}
    assert named and named <= set(case.refused.items())
    assert {problem.remedy for problem in caught.value.problems} == {"serve it with --backend merged"}
    assert engine.ask(engine.request("a", prompt))[0].token_ids == before.token_ids


def test_experts_which_vllm_cannot_compute_with_lora_on_a_cpu_are_served_by_merged(tmp_path: Path) -> None:
    """vLLM 0.32 takes Triton for them, and its engine fails in the warm-up."""
    folder = architectures.build("mixtral", tmp_path / "model")
    checkpoint = architectures.make_checkpoint(tmp_path / "ckpt", folder, architectures.linear_layers(folder))
    said: list[str] = []

    def auto(folder: Path, options: tuple[str, ...], rank: int):
        return choose_backend.choose("auto", folder, options, rank, said.append).backend

    loop = Loop()
    engine = Engine(loop, "resident", folder, checkpoint, ("--dtype", "float32"), auto)
    try:
        assert engine.backend.name == "merged" and "sets take turns" in " ".join(said)
        prompt = random_prompt(20, seed=9)
        (answer,) = engine.ask(engine.request("a:0.5+b:-1", prompt, max_tokens=1, logprobs=20))
        right = architectures.right_logits(folder, checkpoint, "a:0.5+b:-1", prompt)[-1].log_softmax(-1)
        for token in answer.logprobs[0].top:
            assert abs(token.logprob - float(right[token.token_id])) <= 1e-4
    finally:
        loop.run(engine.backend.stop())
        loop.close()
