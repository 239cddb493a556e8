"""What LoRAF relies on inside vLLM. When a new vLLM breaks something, these tests name it in plain words."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

import pytest

from loraf_serve.vllm import relied_on
from loraf_serve.vllm.engine.backends import can_serve

FACTS = relied_on.FACTS | relied_on.RESIDENT_FACTS


@pytest.mark.parametrize("statement", FACTS)
def test_vllm_still_does_what_loraf_relies_on(statement: str) -> None:
    assert FACTS[statement](), f"no longer true of the installed vLLM: {statement}"


def test_a_broken_fact_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import vllm

    (tmp_path / "config.json").write_text('{"architectures": ["MistralForCausalLM"]}')
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    assert relied_on.broken() == ["vLLM's release is 0.32.x, the one that loraf was written for"]
    assert "0.32.x" in (can_serve(tmp_path) or "")


def test_a_broken_fact_of_resident_does_not_affect_slots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vllm.lora import model_manager

    from loraf_serve.vllm.engine.support import can_serve_resident

    (tmp_path / "config.json").write_text('{"architectures": ["MistralForCausalLM"]}')
    assert can_serve_resident(tmp_path) is None
    monkeypatch.delattr(model_manager, "from_layer")
    assert can_serve(tmp_path) is None
    assert "from_layer" in (can_serve_resident(tmp_path) or "")


def test_the_plugin_is_an_entry_point_of_this_distribution() -> None:
    from loraf_serve.vllm import plugin

    (entry_point,) = [point for point in entry_points(group="vllm.general_plugins") if point.name == "loraf"]
    assert entry_point.load() is plugin.register


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ('{"architectures": ["MistralForCausalLM"]}', None),
        ('{"architectures": ["Qwen2ForCausalLM"]}', None),
        ('{"architectures": ["GPT2LMHeadModel"]}', "vLLM does not support LoRA for GPT2LMHeadModel"),
        ('{"architectures": ["NoSuchForCausalLM"]}', "vLLM has no model NoSuchForCausalLM"),
        ("{}", "the model's config.json names no architecture"),
    ],
)
def test_can_serve(tmp_path: Path, config: str, reason: str | None) -> None:
    (tmp_path / "config.json").write_text(config)
    assert can_serve(tmp_path) == reason


def test_a_missing_vllm_is_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert can_serve(tmp_path) == "vLLM is not installed"
