"""An engine that fails while it starts: one paragraph with the reason, exit status 1, and `auto` turns to merged."""

from __future__ import annotations

import asyncio

import pytest

from loraf.errors import ConfigError, Problem
from loraf_serve import choose_backend, cli
from loraf_serve.backends.backend import BackendUnavailable, EngineFailed
from loraf_serve.backends.fallback import Fallback
from tests.loraf_serve.fake_backend import FakeBackend
from tests.loraf_serve.harness import checkpoint_folder, model_folder, two_adapters

DEAD = EngineFailed(Problem("vLLM's engine failed while it started (RuntimeError: no kernel)", "--backend slots"))


class Failing(FakeBackend):
    """Its `start`, or else its `add_adapter`, fails."""

    name = "slots"

    def __init__(self, start: Exception | None, add: Exception | None = None):
        super().__init__()
        self.failure = start
        self.add_failure = add

    async def start(self) -> None:
        if self.failure:
            raise self.failure
        await super().start()


def fallback(error: Exception) -> tuple[Fallback, Failing, FakeBackend, list[str]]:
    first, second, said = Failing(error), FakeBackend(), []
    second.name = "merged"
    return Fallback(first, {EngineFailed: lambda _: second}, said.append, lambda adapter: adapter), first, second, said


def test_merged_serves_instead_and_the_reason_is_said():
    backend, first, second, said = fallback(DEAD)

    async def scenario() -> None:
        await backend.start()
        await backend.add_adapter(next(iter(two_adapters())))

    asyncio.run(scenario())
    assert (backend.name, first.state, second.state) == ("merged", "stopped", "started")
    assert "the slots backend did not start: " in said[0] and "RuntimeError: no kernel" in said[0]
    assert "serving with the merged backend instead" in said[1] and "take turns" in said[1]


def test_a_mistake_of_the_user_does_not_change_the_backend():
    backend, _, second, said = fallback(ConfigError("17 is not a dtype"))
    with pytest.raises(ConfigError, match="17"):
        asyncio.run(backend.start())
    assert second.state == "new" and said == []


@pytest.mark.parametrize(
    ("backend", "status", "words"),
    [
        (Failing(DEAD), 1, "vLLM's engine failed while it started (RuntimeError: no kernel)"),
        (Failing(ConfigError(Problem("17 is not a dtype", "--dtype"))), 2, "--dtype: 17 is not a dtype"),
        (Failing(None, BackendUnavailable("the engine has died")), 1, "the engine has died"),
    ],
)
def test_the_command_ends_with_one_paragraph(monkeypatch, capsys, backend, status, words):
    monkeypatch.setattr(choose_backend, "choose", lambda *a: choose_backend.BackendChoice(backend, "a test"))
    arguments = ["--model", str(model_folder()), "--adapter", str(checkpoint_folder()), "--port", "0"]
    assert cli.main(arguments) == status
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("loraf-serve: ") and words in error and "Traceback" not in error
