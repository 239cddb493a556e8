"""Slots or resident workers in a stock `vllm serve`: what is asked for, what cannot be, and what is changed."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import REGISTRY, Gauge
from vllm.engine import arg_utils
from vllm.entrypoints.launchers.api_server import app_state
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.usage.usage_lib import UsageContext

from loraf.errors import ConfigError
from loraf_serve.vllm import naming, plugin, relied_on
from loraf_serve.vllm.resident import support
from loraf_serve.vllm.resident.compiling import KEEP
from loraf_serve.vllm.stock import choice, install, metrics

SERVER = UsageContext.OPENAI_API_SERVER


def args(**changes: object) -> SimpleNamespace:
    usual = {"enable_lora": True, "worker_extension_cls": "", "pipeline_parallel_size": 1, "data_parallel_size": 1}
    return SimpleNamespace(**usual | {"fully_sharded_loras": False} | changes)


def config(**changes: object) -> SimpleNamespace:
    usual = {"dtype": torch.float32, "lora_dtype": torch.float32, "architectures": ["MistralForCausalLM"]} | changes
    return SimpleNamespace(
        model_config=SimpleNamespace(dtype=usual["dtype"], architectures=usual["architectures"]),
        lora_config=SimpleNamespace(lora_dtype=usual["lora_dtype"], max_loras=1, max_cpu_loras=None, max_lora_rank=16),
        scheduler_config=SimpleNamespace(max_num_seqs=64),
    )


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes what `install` and `prepare` change."""
    stock = getattr(arg_utils.EngineArgs.create_engine_config, "__wrapped__", None)
    monkeypatch.setattr(
        arg_utils.EngineArgs, "create_engine_config", stock or arg_utils.EngineArgs.create_engine_config
    )
    monkeypatch.setattr(app_state, "OpenAIServingModels", OpenAIServingModels)
    monkeypatch.setenv(KEEP, "")  # restored at the end
    monkeypatch.delenv(KEEP)
    monkeypatch.setattr(install, "keep_compile", lambda: None)


@pytest.mark.parametrize(("value", "asked"), [(None, False), ("", False), ("slots", False), ("resident", True)])
def test_the_variable_is_read(monkeypatch: pytest.MonkeyPatch, value: str | None, asked: bool) -> None:
    monkeypatch.delenv(choice.BACKEND, raising=False)
    if value is not None:
        monkeypatch.setenv(choice.BACKEND, value)
    assert choice.is_resident_asked() is asked
    arguments = args()
    install.prepare(arguments, SERVER)
    assert arguments.worker_extension_cls == (naming.RESIDENT_EXTENSION if asked else naming.STOCK_EXTENSION)


def test_an_unknown_value_ends_the_start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(choice.BACKEND, "merged")
    with pytest.raises(ConfigError, match="set it to slots or resident"):
        choice.is_resident_asked()
    with pytest.raises(SystemExit) as ended:
        install.prepare(args(), SERVER)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith("loraf: LORAF_STOCK_BACKEND: 'merged' is not a backend")
    install.prepare(args(enable_lora=False), SERVER)  # other servers are not concerned


@pytest.mark.parametrize(
    ("changes", "words", "extension"),
    [
        ({"pipeline_parallel_size": 2}, "split by --pipeline-parallel-size", naming.STOCK_EXTENSION),
        ({"data_parallel_size": 2}, "split by --data-parallel-size", naming.STOCK_EXTENSION),
        ({"fully_sharded_loras": True}, "does not shard A by rank", naming.STOCK_EXTENSION),
        ({"worker_extension_cls": "mine.Extension"}, "another worker extension", "mine.Extension"),
    ],
)
def test_arguments_that_resident_workers_cannot_serve(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], words: str, extension: str
) -> None:
    said: list[str] = []
    monkeypatch.setattr(install._logger, "warning", lambda text, *values: said.append(text % values))
    monkeypatch.setenv(choice.BACKEND, "resident")
    arguments = args(**changes)
    install.prepare(arguments, SERVER)
    assert arguments.worker_extension_cls == extension
    assert len(said) == 1 and words in said[0] and "takes a LoRA slot instead" in said[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_dtype": torch.bfloat16}, "differs from the model's"),
        ({"architectures": ["NobodysModel"]}, "vLLM has no model NobodysModel"),
        ({"is_multimodal": True}, "MistralForCausalLM is a multimodal model"),
    ],
)
def test_a_model_that_resident_workers_cannot_serve_gets_slots(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], words: str
) -> None:
    said: list[str] = []
    monkeypatch.setattr(install._logger, "warning", lambda text, *values: said.append(text % values))
    monkeypatch.setattr(support, "supports_multimodal", lambda _: changes.pop("is_multimodal", False))
    kept: list[str | None] = []

    def create() -> SimpleNamespace:
        kept.append(os.environ.get(KEEP))
        return config(**changes)

    arguments = args(worker_extension_cls=naming.RESIDENT_EXTENSION)
    made = install._resident_config(arguments, create)
    assert arguments.worker_extension_cls == naming.STOCK_EXTENSION
    assert (made.lora_config.max_loras, made.lora_config.max_lora_rank) == (1, 16)
    assert kept == ["1", None] and KEEP not in os.environ  # torch.compile is vLLM's own affair again
    assert len(said) == 1 and words in said[0]


def test_a_release_that_broke_something_gets_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(relied_on.RESIDENT_FACTS, "a statement", lambda: False)
    assert "a statement" in (choice.obstacle_of(config()) or "")


@pytest.mark.parametrize(("rank", "room"), [(16, 64), (128, 128)])
def test_there_is_a_set_for_every_sequence(rank: int, room: int) -> None:
    given = config()
    given.lora_config.max_lora_rank = rank
    made = install._resident_config(args(worker_extension_cls=naming.RESIDENT_EXTENSION), lambda: given)
    lora = made.lora_config
    assert (lora.max_loras, lora.max_cpu_loras, lora.max_lora_rank) == (64, 64, room)
    assert os.environ[KEEP] == "1"


def test_the_processes_of_such_a_server_keep_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(plugin, "keep_compile", lambda: calls.append("kept"))
    monkeypatch.delenv(naming.ENGINE_OWNER, raising=False)
    plugin.register()
    assert calls == []
    monkeypatch.setenv(KEEP, "1")
    plugin.register()
    assert calls == ["kept"]


def test_the_metric_of_slots_is_removed_and_no_other() -> None:
    gauge, other = Gauge("loraf_test_lora_info", "x", ["a"]), object()
    loggers = [SimpleNamespace(gauge_lora_info=gauge), SimpleNamespace(gauge_lora_info=None), other]
    metrics.drop_sets(SimpleNamespace(logger_manager=SimpleNamespace(stat_loggers=loggers)))
    assert loggers[0].gauge_lora_info is None
    assert REGISTRY._names_to_collectors.get("loraf_test_lora_info") is None
    metrics.drop_sets(SimpleNamespace(logger_manager=None))  # a server without metrics
    metrics.drop_sets(SimpleNamespace())


def test_the_choice_needs_no_vllm() -> None:
    code = "import sys; import loraf_serve.vllm.stock.choice; print('vllm' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "False", run.stderr
