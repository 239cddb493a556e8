"""Invariants 3 and 7 on vLLM: a task set answers like the base model plus ΔW(S), alone and in any batch."""

from __future__ import annotations

import random

import pytest
import torch

from tests.loraf_serve.references import Formula, Merged
from tests.loraf_serve.vllm_engines import BLOCK, KINDS, SLOTS, Engine, Pool, random_prompt, shared
from tests.standins import ARCHITECTURES, linear_shapes

# Each task, all, as trained (nlu stands on math), weights among them, base.
SETS = ("math", "nlu", "code", "all", "math+nlu", "math:0.5+nlu:-2", "nlu:0.25+code:3", "base")
STEPS = 4


ENGINES = [pytest.param((a, k), id=f"{a}-{k}", marks=shared(a)) for a in ARCHITECTURES for k in KINDS]


@pytest.fixture(scope="session", params=ENGINES)
def engine(request: pytest.FixtureRequest, vllm_pool: Pool) -> Engine:
    return vllm_pool.get(*request.param)


@pytest.fixture(scope="session")
def merged(engine: Engine) -> Merged:
    return Merged(engine.folder, engine.adapter.checkpoint)


def test_logits_of_vllm_merged_weights_and_formula_agree(engine: Engine, merged: Merged) -> None:
    prompt = random_prompt(40, seed=1)
    formula = Formula(engine.folder, engine.adapter.checkpoint)
    answers = engine.ask(*(engine.request(text, prompt, max_tokens=STEPS, logprobs=-1) for text in SETS))
    distinct = set()
    for text, answer in zip(SETS, answers, strict=True):
        token_ids = prompt + answer.token_ids[:-1]
        expected = formula.logits(text, token_ids)[-STEPS:]
        scale = expected.abs().max()
        assert (merged.logits(text, token_ids)[-STEPS:] - expected).abs().max() <= 1e-4 * scale, text
        for step, position in enumerate(answer.logprobs):
            actual = torch.full_like(expected[0], torch.nan)
            for token in position.top:
                actual[token.token_id] = token.logprob
            assert (actual - expected[step]).abs().max() <= 1e-4 * scale, (text, step)
        assert answer.token_ids == expected.argmax(-1).tolist(), text
        distinct.add(tuple(answer.token_ids))
    assert len(distinct) >= len(SETS) - 1  # otherwise the test shows nothing


def test_one_prompt_under_four_sets_in_one_batch_twice(engine: Engine, merged: Merged) -> None:
    prompt = random_prompt(2 * BLOCK + 50, seed=2)
    sets = ("math", "base", "nlu", "math+nlu")
    expected = [merged.greedy(text, prompt, 8) for text in sets]
    assert len({tuple(tokens) for tokens in expected}) == len(sets)
    for cached in (0, 2 * BLOCK):
        answers = engine.ask(*(engine.request(text, prompt) for text in sets))
        assert [answer.token_ids for answer in answers] == expected
        assert [answer.cached for answer in answers] == [cached] * len(sets)


def test_task_sets_do_not_share_the_prefix_cache(engine: Engine, merged: Merged) -> None:
    prompt = random_prompt(BLOCK + 10, seed=3)
    for text in ("math", "math:0.5", "math:-1+nlu", "base"):
        for cached in (0, BLOCK):
            (answer,) = engine.ask(engine.request(text, prompt))
            assert (text, answer.cached) == (text, cached)
            assert answer.token_ids == merged.greedy(text, prompt, 8)


def test_base_rows_are_untouched_by_adapter_rows_of_the_same_batch(engine: Engine, merged: Merged) -> None:
    """vLLM's own CPU path gives base rows the last slot's delta. Prompts of many lengths mix prefill and decode."""
    prompts = [random_prompt(length, seed=100 + length) for length in (1, 3, 17, 60, 130)]
    texts = ("base", "nlu", "base", "all", "base")
    requests = [engine.request(text, prompt, max_tokens=12) for text, prompt in zip(texts, prompts, strict=True)]
    for _ in range(2):  # the second time with filled slots
        answers = engine.ask(*requests)
        for text, prompt, answer in zip(texts, prompts, answers, strict=True):
            assert answer.token_ids == merged.greedy(text, prompt, 12), text


def test_many_more_sets_than_slots(engine: Engine, merged: Merged) -> None:
    texts = ["math", "nlu", "code", "all", "math+nlu", "math+code", "nlu+code"]
    texts += ["math:2", "nlu:-1", "code:0.5", "math:0.5+nlu:0.5", "math:-1+code:2"]
    assert len(texts) == 4 * SLOTS
    prompt = random_prompt(20, seed=4)
    expected = {text: merged.greedy(text, prompt, 6) for text in [*texts, "base"]}
    asked = [text for i, text in enumerate(texts * 2) for text in ([text, "base"] if i % 3 == 0 else [text])]
    answers = engine.ask(*(engine.request(text, prompt, max_tokens=6) for text in asked))
    for text, answer in zip(asked, answers, strict=True):
        assert (text, answer.token_ids) == (text, expected[text])


def test_sixteen_weightings_and_base_rows_in_one_batch(engine: Engine, merged: Merged) -> None:
    """Each request alone, the batch, and merged weights in transformers give the same tokens."""
    drawn = random.Random(5)
    texts = ["+".join(f"{task}:{drawn.uniform(-2, 2):.3f}" for task in engine.adapter.tasks) for _ in range(16)]
    texts = [*texts[:8], "base", *texts[8:], "base"]
    prompts = [random_prompt(20 + 3 * i, seed=200 + i) for i in range(len(texts))]
    requests = [engine.request(text, prompt, max_tokens=12) for text, prompt in zip(texts, prompts, strict=True)]
    together = [answer.token_ids for answer in engine.ask(*requests)]
    alone = [engine.ask(request)[0].token_ids for request in requests]
    expected = [merged.greedy(text, prompt, 12) for text, prompt in zip(texts, prompts, strict=True)]
    assert together == expected
    assert alone == expected


def test_lora_covers_exactly_the_projections(engine: Engine) -> None:
    (layers,) = engine.loop.run(engine.backend._call_workers("loraf_layers"))
    assert {name: tuple(shape) for name, shape in layers.items()} == linear_shapes(engine.folder)
