"""The estimates of a check against what a start takes, and what does not fit."""

from __future__ import annotations

import asyncio

import psutil
import pytest
import torch

from loraf_serve.backends.merged import KV_SHARE, MergedBackend
from loraf_serve.check import memory, sizes
from loraf_serve.check.memory import GPU, MAIN, Plan, Use
from tests.loraf_serve.harness import checkpoint_folder, model_folder, open_adapter


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_takes_what_the_check_says(dtype):
    """To the byte, except for the KV cache: the memory that is free changes all the time."""
    adapter = open_adapter("trio", checkpoint_folder())
    plan = memory.merged_plan(model_folder(), sizes.model_size(model_folder()), {"trio": adapter.manifest}, dtype, None)
    uses = {f"{use.what}, {use.detail.partition(' ')[0]}": use.nbytes for use in plan.uses}
    backend = MergedBackend(model_folder(), dtype, device="cpu")

    async def start() -> None:
        await backend.start()
        await backend.add_adapter(adapter)

    asyncio.run(start())
    try:
        weights = backend._weights
        parameters = {tensor.data_ptr(): tensor for tensor in weights._model.parameters()}
        assert uses[f"model weights, {dtype}"] == sum(tensor.nbytes for tensor in parameters.values())
        assert uses["adapter trio, A"] == backend.adapter_bytes(adapter)
        assert uses["adapter trio, values"] == adapter.resident_bytes
        assert uses["all adapters, copies"] == weights._originals.resident_bytes
        assert plan.max_model_len == backend.max_model_len
        if not torch.cuda.is_available():
            assert plan.kv_tokens == pytest.approx(backend._engine._kv_tokens, rel=0.25)
            assert uses["KV cache, at"] == pytest.approx(KV_SHARE * psutil.virtual_memory().available, rel=0.25)
    finally:
        asyncio.run(backend.stop())


def plan_of(*uses: Use, free: dict[str, int], **more) -> Plan:
    return Plan(torch.float32, uses, free, **({"kv_tokens": 100, "max_model_len": 100} | more))


def test_what_is_missing_is_said_for_each_kind_of_memory():
    uses = (Use("model weights", 10 * 10**9, GPU, ""), Use("adapter a", 3 * 10**9, MAIN, ""))
    assert plan_of(*uses, free={GPU: 10 * 10**9, MAIN: 3 * 10**9}).problems() == []
    on_gpu, in_main = plan_of(*uses, free={GPU: 8 * 10**9, MAIN: 10**9}).problems()
    assert "2 GB of GPU memory are missing: 10 GB are needed, most of it for model weights, and 8 GB" in on_gpu.message
    assert "--dtype" in on_gpu.remedy and "--tensor-parallel-size" in on_gpu.remedy
    assert "2 GB of main memory are missing: 3 GB are needed, most of it for adapter a" in in_main.message


def test_a_kv_cache_that_is_too_large_has_its_own_remedy():
    for place, option in ((GPU, "--gpu-memory-utilization"), (MAIN, "--kv-cache-memory-bytes")):
        (problem,) = plan_of(Use("KV cache", 10, place, ""), free={place: 5}).problems()
        assert problem.remedy == f"free some, or lower {option}"


def test_a_kv_cache_smaller_than_one_request_is_a_mistake_where_the_engine_refuses_it():
    assert plan_of(free={}, kv_tokens=99).problems() == []
    (problem,) = plan_of(free={}, kv_tokens=99, needs_whole_prompt=True).problems()
    assert "room for 99 tokens, and one request may have 100" in problem.message and "at most 99" in problem.remedy


def test_the_memory_of_a_container_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    available = psutil.virtual_memory().available
    assert memory.free_main_memory() == pytest.approx(available, rel=0.2)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_main_memory() == pytest.approx(available, rel=0.2)
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 500\n")
    assert memory.free_main_memory() == 2500
    (tmp_path / "memory.current").write_text("6000\n")
    assert memory.free_main_memory() == 0


def test_tied_embeddings_are_counted_once_and_quantised_weights_keep_their_size(tmp_path):
    from safetensors.torch import save_file

    tensors = {
        "model.embed_tokens.weight": torch.zeros(10, 4),
        "lm_head.weight": torch.zeros(10, 4),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(6, 4),
        "model.layers.0.mlp.gate_proj.weight": torch.zeros(6, 4, dtype=torch.int8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": ["X"], "tie_word_embeddings": true}')
    size = sizes.model_size(tmp_path)
    assert size.nbytes(torch.bfloat16) == 2 * (40 + 24) + 24
    assert size.linear == ((6, 4), (6, 4))
