"""What OpenAI's API relies on inside vLLM's app."""

from __future__ import annotations

import pytest

from loraf.errors import ConfigError
from loraf_serve.vllm.http import app
from loraf_serve.vllm.http.facts import FACTS


@pytest.mark.parametrize("statement", FACTS)
def test_vllms_app_still_does_what_loraf_relies_on(statement: str) -> None:
    assert FACTS[statement](), f"no longer true of the installed vLLM: {statement}"


def test_a_broken_fact_is_named_before_a_request_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FACTS, "water is wet", lambda: False)
    with pytest.raises(ConfigError, match="water is wet"):
        app.EngineApp(None)  # type: ignore[arg-type]
