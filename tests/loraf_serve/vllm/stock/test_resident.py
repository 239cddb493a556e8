"""A stock `vllm serve` with resident workers, asked by the `openai` client: sets share a batch without slots."""

from __future__ import annotations

import re
from collections.abc import Iterator

import openai
import pytest

from loraf.checkpoint import Checkpoint
from loraf.peft_export import export_peft
from tests.loraf_serve.references import Merged
from tests.loraf_serve.stock_server import StockServer
from tests.loraf_serve.vllm.stock.test_server import MODELS
from tests.loraf_serve.vllm_engines import BLOCK, random_prompt

SETS = 64


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StockServer]:
    root = tmp_path_factory.mktemp("stock-resident")
    running = StockServer(root, slots=1, sequences=SETS, LORAF_STOCK_BACKEND="resident")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def merged(server: StockServer) -> Merged:
    return Merged(server.root / "model", Checkpoint.open(server.root / "ckpt"))


def large_steps(server: StockServer) -> float:
    """The number of the engine's steps so far that computed more than 32 tokens."""
    found = re.findall(r'vllm:iteration_tokens_total_bucket\{.*le="(32\.0|\+Inf)".*\} (\S+)', server.get("/metrics"))
    below = {bound: float(count) for bound, count in found}
    return below["+Inf"] - below["32.0"]


def test_64_sets_share_a_batch_with_one_slot(server: StockServer, merged: Merged) -> None:
    texts = [f"math:{(i % 8) / 2 - 2:g}+nlu:{(i // 8) / 2 - 2:g}+code:0.25" for i in range(SETS)]
    prompt = random_prompt(8, seed=1)
    expected = [merged.greedy(text, prompt, 24) for text in texts]
    assert len({tuple(tokens) for tokens in expected}) > SETS / 2  # otherwise the test shows nothing
    server.ask(*((f"ckpt@{text}", prompt) for text in texts), max_tokens=1)  # each name is resolved once
    before = large_steps(server)
    answers = server.ask(*((f"ckpt@{text}", prompt) for text in texts), max_tokens=24)
    for text, tokens, answer in zip(texts, expected, answers, strict=True):
        assert answer.token_ids == tokens, text
    assert large_steps(server) > before  # no request has so many tokens: more than 32 sets were in one step
    assert "vllm:lora_requests_info" not in server.get("/metrics")  # would keep every combination of sets
    assert "resident workers serve all task sets" in server.log


def test_every_form_of_a_name_and_base_rows_beside_them(server: StockServer, merged: Merged) -> None:
    prompt = random_prompt(40, seed=2)
    answers = server.ask(*((model, prompt) for model in (*MODELS, "base")), max_tokens=8)
    for (model, text), answer in zip((*MODELS.items(), ("base", "base")), answers, strict=True):
        assert answer.token_ids == merged.greedy(text, prompt, 8), model


def test_the_prefix_cache_does_not_mix_sets(server: StockServer, merged: Merged) -> None:
    prompt = random_prompt(2 * BLOCK + 50, seed=3)
    for model in ("math", "base", "ckpt@math:0.5+nlu"):
        for cached in (0, 2 * BLOCK):
            (answer,) = server.ask((model, prompt))
            assert (model, answer.cached) == (model, cached)
            assert answer.token_ids == merged.greedy(MODELS[model], prompt, 8)


def test_loads_unloads_and_refusals(server: StockServer) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no task 'maths'"):
        server.ask(("ckpt@maths", [1, 5]))
    checkpoint = Checkpoint.open(server.root / "ckpt")
    export_peft(checkpoint, checkpoint.manifest.all_tasks(), server.root / "peft")
    status, text = server.post("/v1/load_lora_adapter", lora_name="plain", lora_path="./peft")
    assert (status, "LORAF_STOCK_BACKEND=resident" in text) == (400, True), text
    assert server.post("/v1/load_lora_adapter", lora_name="late", lora_path="./spare")[0] == 200
    prompt = random_prompt(30, seed=4)
    expected = Merged(server.root / "model", Checkpoint.open(server.root / "spare")).greedy("code", prompt, 8)
    assert server.ask(("late@code", prompt))[0].token_ids == expected
    assert server.post("/v1/unload_lora_adapter", lora_name="late")[0] == 200
    with pytest.raises(openai.NotFoundError, match="there is no checkpoint 'late'"):
        server.ask(("late@code", prompt))
    assert server.alive()
