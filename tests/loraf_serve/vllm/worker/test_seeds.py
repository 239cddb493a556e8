"""A seed and a prompt that is computed in several steps: on the CPU, vLLM's own code ends the engine."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from loraf_serve.vllm.worker.seeds import without_draws_to_discard
from tests.loraf_serve.vllm_engines import Pool, random_prompt, shared

PROMPT = random_prompt(900, seed=7)


def test_a_discarded_draw_does_not_touch_the_requests_generator():
    generators = {row: torch.Generator().manual_seed(row) for row in (0, 2, 3)}
    before = {row: generator.get_state() for row, generator in generators.items()}
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(num_reqs=4, generators=generators),
        discard_request_mask=SimpleNamespace(np=np.array([True, True, False, False, True])),
    )

    def draw(runner: SimpleNamespace, factor: int) -> int:
        for generator in runner.input_batch.generators.values():
            torch.rand(3, generator=generator)
        return factor * len(runner.input_batch.generators)

    assert without_draws_to_discard(draw)(runner, 10) == 20
    unchanged = {row for row, state in before.items() if torch.equal(generators[row].get_state(), state)}
    assert unchanged == {0}

    def fail(runner: SimpleNamespace) -> None:
        raise ValueError

    with pytest.raises(ValueError):
        without_draws_to_discard(fail)(runner)
    assert set(generators) == {0, 2, 3}


def test_vllm_sets_a_generator_back_as_only_a_gpus_generator_can():
    """What the module is for. When it no longer holds, the module can go."""
    from vllm.v1.worker.gpu_input_batch import InputBatch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert "set_offset(gen.get_offset() - 4)" in inspect.getsource(GPUModelRunner._bookkeeping_sync)
    assert "generators=self.generators" in inspect.getsource(InputBatch._make_sampling_metadata)
    with pytest.raises(RuntimeError, match="offset"):
        torch.Generator().get_offset()


@pytest.mark.engine
@shared("llama")
def test_a_seed_gives_the_same_answer_whether_the_prompt_comes_in_one_step_or_in_several(vllm_pool: Pool) -> None:
    engine = vllm_pool.get("llama")
    # Together the prompts are longer than a step may be, so that some are computed in parts.
    prompts = [[1 + i, *PROMPT] for i in range(8)]
    assert sum(map(len, prompts)) > engine.backend._engine.vllm_config.scheduler_config.max_num_batched_tokens
    requests = [engine.request("all", prompt, temperature=1.0, seed=i) for i, prompt in enumerate(prompts)]
    together = [answer.token_ids for answer in engine.ask(*requests)]
    assert together == [engine.ask(request)[0].token_ids for request in requests]
