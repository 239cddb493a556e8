"""What is found before vLLM's engine starts, and what is said of an engine that fails."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.model_executor.models import ModelRegistry

from loraf.errors import ConfigError
from loraf_serve.backends.backend import BackendUnavailable, EngineFailed
from loraf_serve.vllm.engine import quantised
from loraf_serve.vllm.engine.backends import SlotsBackend
from loraf_serve.vllm.engine.support import can_serve
from loraf_serve.vllm.worker import faults


def config(folder: Path, **values: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["MistralForCausalLM"]} | values))
    return folder


# --- packages ---------------------------------------------------------------------------------------------------


def test_a_model_that_needs_a_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> type:
        raise ModuleNotFoundError("No module named 'torchvision'")

    monkeypatch.setitem(ModelRegistry.models, "MistralForCausalLM", SimpleNamespace(load_model_cls=load))
    reason = "vLLM's MistralForCausalLM cannot be imported (No module named 'torchvision')"
    assert can_serve(config(tmp_path)) == reason


# --- quantised weights ------------------------------------------------------------------------------------------

INT8, INT4 = {"num_bits": 8, "type": "int"}, {"num_bits": 4, "type": "int"}


def compressed(weights: dict, activations: dict | None) -> dict:
    group = {"weights": weights, "input_activations": activations, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


W8A8 = compressed(INT8, INT8 | {"symmetric": True})
ASYMMETRIC = compressed(INT8, INT8 | {"symmetric": False})
QUARK = {
    "quant_method": "quark",
    "global_quant_config": {"weight": {"dtype": "int8"}, "input_tensors": {"dtype": "int8"}},
}


@pytest.mark.parametrize(
    ("quantisation", "cpu", "amx", "refused"),
    [
        (W8A8, True, False, "on a CPU without AMX"),
        (QUARK, True, False, "on a CPU without AMX"),
        (ASYMMETRIC, True, True, "with asymmetric activations on a CPU"),
        (W8A8, True, True, None),
        (W8A8, False, False, None),
        (compressed(INT4, None), True, False, None),
        (compressed(INT8, None), True, False, None),
        (compressed({"num_bits": 8, "type": "float"}, {"num_bits": 8, "type": "float"}), True, False, None),
        ({"quant_method": "awq", "bits": 4}, True, False, None),
        ({"quant_method": "gptq", "bits": 8}, True, False, None),
        (None, True, False, None),
    ],
)
def test_int8_is_refused_exactly_where_vllm_gives_up_the_weights(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quantisation: dict | None,
    cpu: bool,
    amx: bool,
    refused: str | None,
) -> None:
    """The cases were tried on engines of vLLM 0.32 or read in its kernels."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: cpu)
    monkeypatch.setattr(quantised, "_keeps_weights", lambda: amx)
    folder = config(tmp_path, **({"quantization_config": quantisation} if quantisation else {}))
    if refused is None:
        assert can_serve(folder) is None
        return
    with pytest.raises(ConfigError, match=refused) as error:
        can_serve(folder)
    (problem,) = error.value.problems
    assert problem.field == "quantization_config" and problem.file == str(folder / "config.json")
    assert quantisation["quant_method"] in problem.message and "unquantised" in problem.remedy


# --- an engine that fails ---------------------------------------------------------------------------------------


class Failing(SlotsBackend):
    """Its processes log an error, as vLLM's do, and end."""

    logged: Exception | None = None

    def _start_engine(self, faults_file: Path) -> None:
        handler = faults.record(str(faults_file))
        try:
            for error in filter(None, (self.logged, RuntimeError("Engine core initialization failed"))):
                try:
                    raise error
                except Exception:
                    logging.getLogger("vllm.v1.engine.core").exception("EngineCore failed to start.")
        finally:
            logging.getLogger("vllm").removeHandler(handler)
        raise BackendUnavailable("Engine core initialization failed. See root cause above.")


@pytest.mark.parametrize(
    ("logged", "quantisation", "words", "remedy"),
    [
        (ValueError("no room for\nthe KV cache"), None, "(ValueError: no room for the KV cache)", "--backend merged"),
        (AttributeError("no 'device'"), {"quant_method": "new"}, "weights are quantised (new)", "unquantised"),
        (None, None, "(RuntimeError: Engine core initialization failed)", "--backend merged"),
    ],
)
def test_the_first_error_of_any_process_is_the_reason(
    tmp_path: Path, logged: Exception | None, quantisation: dict | None, words: str, remedy: str
) -> None:
    backend = Failing(config(tmp_path, **({"quantization_config": quantisation} if quantisation else {})))
    backend.logged = logged
    with pytest.raises(EngineFailed) as error:
        asyncio.run(backend.start())
    (problem,) = error.value.problems
    assert problem.field == "--backend slots" and words in problem.message and remedy in problem.remedy
    assert "\n" not in str(error.value)


def test_errors_of_a_later_time_go_nowhere(tmp_path: Path) -> None:
    handler = faults.record(str(tmp_path / "gone" / "faults"))
    try:
        raise ValueError
    except ValueError:
        handler.emit(logging.LogRecord("vllm", logging.ERROR, "", 0, "", None, sys.exc_info()))
    finally:
        logging.getLogger("vllm").removeHandler(handler)
    assert faults.first(tmp_path / "gone" / "faults") == ""
