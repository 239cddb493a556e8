"""Adapters of the merged backend come and go: answers, memory, the model's own weights."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.loraf_serve.merged_stand import GREEDY, SETS, Stand, only, served
from tests.standins import linear_shapes, random_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("merged")


@pytest.fixture(scope="module")
def stand(folder):
    stand = Stand("mistral", folder / "one", turn_steps=5)
    yield stand
    stand.close()


def test_a_removed_adapter_is_gone_and_may_come_back(stand):
    """Its set is in the weights when it goes, and comes again as the next one."""
    backend, second = stand.backend, stand.adapters["second"]
    expected = stand.expected("Hello", "math", 12, "second")
    for _ in range(2):
        assert only(stand.answers(("Hello", "math", GREEDY, "second"))[0]).token_ids == expected
        stand.run(backend.remove_adapter(second))
        try:
            assert backend.adapter_bytes(second) == 0
            with pytest.raises(ValueError, match="has not been added"):
                stand.answers(("Hello", "math", GREEDY, "second"))
            assert only(stand.answers(("Hello", "math"))[0]).token_ids == stand.expected("Hello", "math", 12)
            stand.run(backend.remove_adapter(second))  # an unknown one is nothing
        finally:
            stand.run(backend.add_adapter(second))


def test_memory_held_for_an_adapter_is_reported_and_freed(stand):
    """Its A; and the original weights, of which only those that another adapter changes are kept."""
    backend = stand.backend

    def originals() -> int:
        return backend._weights._originals.resident_bytes

    def adapted(*names: str) -> set[str]:
        return {module for name in names for module in stand.adapters[name].manifest.modules}

    def bytes_of(modules: set[str]) -> int:
        shapes = linear_shapes(stand.model_folder)
        return sum(4 * shapes[module][0] * shapes[module][1] for module in modules)

    for adapter in stand.adapters.values():
        manifest = adapter.manifest
        assert backend.adapter_bytes(adapter) == sum(4 * manifest.rank * m.d_in for m in manifest.modules.values())
    assert adapted("second") < adapted("first") and originals() == bytes_of(adapted("first"))
    stand.answers(("Hello", "math+nlu"))
    stand.run(backend.remove_adapter(stand.adapters["first"]))
    assert originals() == bytes_of(adapted("second"))
    stand.answers(("Hello", "math", GREEDY, "second"))
    stand.run(backend.remove_adapter(stand.adapters["second"]))
    assert originals() == 0
    assert backend._weights._mergers == {}
    now = backend._weights._model.state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(stand.model_folder).state_dict().items():
        assert torch.equal(now[name], weight), name
    for adapter in stand.adapters.values():
        stand.run(backend.add_adapter(adapter))
    for name in stand.adapters:
        answer = only(stand.answers(("Hello", "math", GREEDY, name))[0])
        assert answer.token_ids == stand.expected("Hello", "math", 12, name)


def test_adapters_come_and_go_while_others_answer(stand, folder):
    extra = served(random_checkpoint(folder / "extra", stand.model_folder, tasks=("math",), seed=6), "extra")

    async def changing():
        asked = [stand.ask("Hello", s, dataclasses.replace(GREEDY, max_tokens=60, ignore_eos=True)) for s in SETS[:3]]
        running = [asyncio.create_task(each) for each in asked]
        rounds = 0
        while not all(task.done() for task in running) or rounds < 3:
            await stand.backend.add_adapter(extra)
            await stand.backend.remove_adapter(extra)
            rounds += 1
        return await asyncio.gather(*running)

    for answer, task_set in zip(stand.run(changing()), SETS[:3], strict=True):
        assert only(answer).token_ids[:12] == stand.expected("Hello", task_set, 12)
