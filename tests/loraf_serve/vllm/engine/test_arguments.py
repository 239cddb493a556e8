"""The user's vLLM options: passed on, refused with vLLM's message, or refused because they contradict the backend."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.platforms import current_platform

from loraf.errors import ConfigError
from loraf_serve.vllm.engine import arguments
from loraf_serve.vllm.engine.arguments import (
    DEFAULT_SLOTS,
    RESIDENT_EXTENSION,
    SLOTS_EXTENSION,
    lora_rank,
    resident_args,
    slots_args,
)
from loraf_serve.vllm.engine.backends import ResidentBackend

MODEL = Path("model")


def test_the_backend_s_own_settings() -> None:
    args = slots_args(MODEL, [], max_rank=20)
    assert (args.model, args.enable_lora, args.worker_extension_cls) == ("model", True, SLOTS_EXTENSION)
    assert (args.max_lora_rank, args.max_loras, args.max_cpu_loras) == (32, DEFAULT_SLOTS, 2 * DEFAULT_SLOTS)
    assert args.disable_log_stats and args.tensor_parallel_size == 1 and args.dtype == "auto"


def test_options_are_passed_on() -> None:
    options = ["--dtype", "float32", "--max_model_len", "1k", "--enforce-eager", "-tp", "2"]
    options += ["--max-loras", "7", "--max-lora-rank=64"]
    args = slots_args(MODEL, options, max_rank=16)
    assert (args.dtype, args.max_model_len, args.enforce_eager) == ("float32", 1000, True)
    assert (args.max_loras, args.max_cpu_loras, args.max_lora_rank, args.tensor_parallel_size) == (7, 14, 64, 2)
    assert slots_args(MODEL, ["--max-cpu-loras", "9"], max_rank=1).max_cpu_loras == 9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--no-such-option", "3"], "--no-such-option"),
        (["--max-model-len", "many"], "many"),
        (["--dtype"], "--dtype"),
        (["--dtype", "float17"], "float17"),
        (["--max-lo", "3"], "--max-lo"),  # no abbreviations: a new option may make them ambiguous
        (["stray"], "stray"),
    ],
)
def test_a_bad_option_is_refused_with_vllms_message(options, words, capfd) -> None:
    with pytest.raises(ConfigError, match=words):
        slots_args(MODEL, options, max_rank=16)
    assert "usage:" not in capfd.readouterr().err


def test_contradictions_are_refused_all_at_once() -> None:
    options = ["--no-enable-lora", "--model", "other", "--worker-extension-cls", "x.Y", "--max-lora-rank", "8"]
    with pytest.raises(ConfigError) as refused:
        slots_args(MODEL, [*options, "--pipeline-parallel-size", "2"], max_rank=9)
    fields = {problem.field for problem in refused.value.problems}
    expected = {"--enable-lora", "--model", "--worker-extension-cls", "--max-lora-rank", "--pipeline-parallel-size"}
    assert fields == expected
    assert all(problem.remedy for problem in refused.value.problems)


def test_a_revision_that_vllm_would_ignore_is_refused() -> None:
    """The engine gets a local folder as its model."""
    with pytest.raises(ConfigError) as refused:
        slots_args(MODEL, ["--revision", "v1", "--tokenizer-revision", "v1"], max_rank=8)
    assert {problem.field for problem in refused.value.problems} == {"--revision", "--tokenizer-revision"}
    options = ["--tokenizer", "org/other", "--tokenizer-revision", "v1"]
    assert slots_args(MODEL, options, max_rank=8).tokenizer_revision == "v1"


@pytest.mark.parametrize("args", [slots_args, resident_args])
@pytest.mark.parametrize(
    ("refused", "accepted", "words"),
    [
        (["--skip-tokenizer-init"], ["--no-skip-tokenizer-init"], "the tokenizer is needed"),
        (["--runner", "pooling"], ["--runner", "generate"], "generates text"),
        (["--convert", "embed"], ["--convert", "none"], "generates text"),
    ],
)
def test_an_engine_that_could_not_generate_text_is_refused(args, refused, accepted, words) -> None:
    rank = {"max_rank": 8} if args is slots_args else {}
    args(MODEL, accepted, **rank)
    with pytest.raises(ConfigError, match=words) as error:
        args(MODEL, refused, **rank)
    assert [problem.field for problem in error.value.problems] == [refused[0]]


@pytest.mark.parametrize(("rank", "slot"), [(1, 1), (2, 8), (16, 16), (17, 32), (200, 256), (512, 512)])
def test_the_rank_of_slots_is_the_next_larger_one(rank: int, slot: int) -> None:
    assert lora_rank(rank) == slot


def test_a_rank_beyond_vllms_largest_is_refused() -> None:
    with pytest.raises(ConfigError, match="513 is beyond vLLM's largest, 512"):
        slots_args(MODEL, [], max_rank=513)


def test_default_size_of_the_kv_cache_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: True)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    default = slots_args(MODEL, [], max_rank=16).kv_cache_memory_bytes
    assert 1 << 30 <= default <= 4 << 30
    assert slots_args(MODEL, ["--kv-cache-memory-bytes", "1000"], 16).kv_cache_memory_bytes == 1000
    assert slots_args(MODEL, ["--gpu-memory-utilization", "0.3"], 16).kv_cache_memory_bytes is None
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert slots_args(MODEL, [], max_rank=16).kv_cache_memory_bytes is None


def test_the_resident_backend_refuses_slot_options() -> None:
    assert resident_args(MODEL, ["--dtype", "float32"]).worker_extension_cls == RESIDENT_EXTENSION
    with pytest.raises(ConfigError) as refused:
        resident_args(MODEL, ["--max-loras", "4", "--max-lora-rank", "8", "--fully-sharded-loras", "-pp", "2"])
    fields = {problem.field for problem in refused.value.problems}
    assert fields == {"--max-loras", "--max-lora-rank", "--fully-sharded-loras", "--pipeline-parallel-size"}
    assert all(problem.remedy for problem in refused.value.problems)


def test_memory_reserved_for_adapters_is_taken_from_the_default_kv_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: True)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=24 << 30))
    assert resident_args(MODEL, []).kv_cache_memory_bytes == 3 << 30
    assert resident_args(MODEL, [], reserve=8 << 30).kv_cache_memory_bytes == 2 << 30


def test_memory_reserved_for_adapters_is_taken_from_vllms_share_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(is_cpu=lambda: False, get_device_total_memory=lambda: 80 << 30)
    monkeypatch.setattr(arguments, "current_platform", gpu)
    default = resident_args(MODEL, []).gpu_memory_utilization
    assert resident_args(MODEL, [], reserve=8 << 30).gpu_memory_utilization == pytest.approx(default - 0.1)
    assert resident_args(MODEL, ["--gpu-memory-utilization", "0.5"], reserve=8 << 30).gpu_memory_utilization == 0.5
    sized = resident_args(MODEL, ["--kv-cache-memory-bytes", "1000"], reserve=8 << 30)
    assert (sized.gpu_memory_utilization, sized.kv_cache_memory_bytes) == (default, 1000)
    assert slots_args(MODEL, [], 16, reserve=8 << 30).gpu_memory_utilization == default
    with pytest.raises(ConfigError, match="--adapter-memory: 75,161,927,680 bytes for adapters leave vLLM 5% of a GPU"):
        resident_args(MODEL, [], reserve=70 << 30)


def test_resident_needs_the_models_dtype_and_allows_a_set_for_every_sequence() -> None:
    def configured(dtype: torch.dtype) -> SimpleNamespace:
        lora = SimpleNamespace(lora_dtype=dtype, max_loras=1, max_cpu_loras=1, max_lora_rank=16)
        model, scheduler = SimpleNamespace(dtype=torch.bfloat16), SimpleNamespace(max_num_seqs=7)
        config = SimpleNamespace(lora_config=lora, model_config=model, scheduler_config=scheduler)
        ResidentBackend(MODEL, max_rank=100)._configured(config)
        return lora

    lora = configured(torch.bfloat16)
    assert (lora.max_loras, lora.max_cpu_loras, lora.max_lora_rank) == (7, 7, 100)
    with pytest.raises(ConfigError, match="--lora-dtype: torch.float16 differs from the model's torch.bfloat16"):
        configured(torch.float16)


def test_json_comes_without_free_white_space_unless_the_user_says_otherwise() -> None:
    """A model that was not trained on JSON fills a whole answer with it."""
    assert resident_args(MODEL, []).structured_outputs_config.disable_any_whitespace
    option = ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": false}']
    assert not resident_args(MODEL, option).structured_outputs_config.disable_any_whitespace
