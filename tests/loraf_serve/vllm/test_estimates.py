"""What `loraf-serve check` says of vLLM's engines, against running ones."""

from __future__ import annotations

import pytest

from loraf import base_model
from loraf_serve.check import memory, sizes
from loraf_serve.vllm.engine.plan import plan
from tests.loraf_serve.vllm_engines import KINDS, Pool, shared

pytestmark = [shared("mistral"), pytest.mark.engine]
TOLERANCE = {"slots": 0.0, "resident": 0.25}  # the packed form depends on the masks


@pytest.mark.parametrize("kind", TOLERANCE)
def test_an_engine_takes_what_the_check_says(vllm_pool: Pool, kind: str) -> None:
    engine = vllm_pool.get("mistral", kind)
    manifest = engine.adapter.manifest
    configured = plan(kind, engine.folder, KINDS[kind][1], manifest.rank, None)
    estimate = memory.vllm_plan(configured, sizes.model_size(engine.folder), {"main": manifest})
    uses = {use.what: use.nbytes for use in estimate.uses}
    config = engine.backend._engine.vllm_config
    assert uses["adapter main"] == pytest.approx(engine.backend.adapter_bytes(engine.adapter), rel=TOLERANCE[kind])
    assert estimate.max_model_len == engine.backend.max_model_len
    assert estimate.dtype == config.model_config.dtype
    assert uses["KV cache"] == config.cache_config.kv_cache_memory_bytes
    tokens = config.cache_config.num_gpu_blocks * config.cache_config.block_size
    assert estimate.kv_tokens == pytest.approx(tokens, rel=0.05)
    if kind == "slots":
        assert (configured.slots, configured.slot_rank) == (
            config.lora_config.max_loras,
            config.lora_config.max_lora_rank,
        )
    assert estimate.problems() == []


def test_a_kv_cache_that_vllm_would_refuse_is_found_without_a_start() -> None:
    """vLLM's own error for this start: «the estimated maximum model length is 768»."""
    folder = base_model.resolve("tiny")
    configured = plan("slots", folder, ["--kv-cache-memory-bytes", "1000000"], 8, None)
    (problem,) = memory.vllm_plan(configured, sizes.model_size(folder), {}).problems()
    assert problem.field == "--max-model-len" and "at most 768" in problem.remedy
