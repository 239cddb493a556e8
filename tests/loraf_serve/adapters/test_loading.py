"""LoadAdapter and UnloadAdapter as a client meets them: answers, statuses, the Python client, `loraf-client`."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
from pathlib import Path

import grpc
import pytest

from loraf import manifest
from loraf.errors import BaseMismatch, Problem
from loraf.units import size_text
from loraf_serve import client_cli
from loraf_serve.adapters.registry import Registry
from loraf_serve.backends.backend import BackendUnavailable
from loraf_serve.client import ServiceError
from loraf_serve.v1 import adapter_pb2
from tests.loraf_serve.asking import ask, ask_stream, failure, violations
from tests.loraf_serve.fake_backend import FakeBackend, ReadingBackend, expected_text
from tests.loraf_serve.harness import (
    checkpoint_folder,
    checkpoints_root,
    eventually,
    model_folder,
    one_adapter,
    open_adapter,
    serving,
    two_adapters,
)
from tests.standins import make_model

CODES = grpc.StatusCode


def digest(seed: int = 0, *tasks: str) -> str:
    found = manifest.read(checkpoint_folder(seed))
    return (found.only(tasks) if tasks else found).adapter_digest


@pytest.fixture
def running():
    """`trio` (checkpoint 0) is loaded; checkpoints 0 and 1 may be."""
    checkpoint_folder(1)
    with serving(FakeBackend(), root=checkpoints_root()) as server:
        yield server


@pytest.fixture
def cli(running, capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        return client_cli.main([*arguments, "--server", running.address]), *capsys.readouterr()

    return run


def load(name="new", path="ckpt1", tasks=(), replace=False) -> adapter_pb2.LoadAdapterRequest:
    return adapter_pb2.LoadAdapterRequest(name=name, path=path, tasks=tasks, replace=replace)


def code_of(call) -> grpc.StatusCode:
    return failure(call).code()


# --- answers


def test_a_loaded_adapter_answers_and_is_listed(running):
    adapter = running.adapters.LoadAdapter(load(tasks=("nlu", "math"))).adapter
    assert (adapter.name, adapter.digest) == ("new", digest(1, "math", "nlu"))
    assert [task.name for task in adapter.tasks] == ["math", "nlu"]
    listed = running.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest()).adapters
    assert [each.name for each in listed] == ["trio", "new"] and listed[1] == adapter
    response = running.generation.Generate(ask("hello", adapter="new"))
    assert response.served_by.digest == adapter.digest
    assert response.choices[0].text == expected_text(running.backend.requests[-1])
    assert code_of(lambda: running.generation.Generate(ask("hello", adapter="new", tasks=["code"]))) is CODES.NOT_FOUND


def test_a_replaced_name_means_only_the_new_content(running):
    before = running.generation.Generate(ask("hello", max_tokens=20))
    adapter = running.adapters.LoadAdapter(load("trio", replace=True)).adapter
    after = running.generation.Generate(ask("hello", max_tokens=20))
    assert before.served_by.digest == digest(0) and after.served_by.digest == adapter.digest == digest(1)
    assert before.choices[0].text != after.choices[0].text
    assert [a.digest for a in running.client.adapters()] == [digest(1)]
    assert eventually(lambda: running.backend.added == {digest(1)})


def test_adapter_digest_distinguishes_versions(running):
    running.client.load_adapter("trio", "ckpt1", replace=True)
    error = failure(lambda: running.generation.Generate(ask("x", adapter_digest=digest(0))))
    assert error.code() is CODES.FAILED_PRECONDITION and digest(1) in error.details()
    assert running.generation.Generate(ask("x", adapter_digest=digest(1))).choices


def test_a_running_stream_ends_on_the_version_it_began_with():
    backend = FakeBackend(seconds_per_token=0.02)
    checkpoint_folder(1)
    with serving(backend, root=checkpoints_root()) as running:
        stream = running.generation.StreamGenerate(ask_stream("hello", max_tokens=30))
        pieces = [next(stream)]
        running.client.load_adapter("trio", "ckpt1", replace=True)
        new = running.generation.Generate(ask("hello", max_tokens=2))
        assert new.served_by.digest == digest(1) and backend.added == {digest(0), digest(1)}
        pieces += list(stream)
        assert "".join(piece.choices[0].text for piece in pieces) == expected_text(backend.requests[0])
        assert {piece.served_by.digest for piece in (pieces[0], pieces[-1])} == {digest(0)}
        assert eventually(lambda: backend.added == {digest(1)})
    assert backend.history == [("add", digest(0)), ("add", digest(1)), ("remove", digest(0))]


@pytest.mark.parametrize("way", ["end", "cancel"])
def test_unload_counts_running_requests_and_the_last_one_frees_the_memory(way):
    backend = FakeBackend(seconds_per_token=0.02)
    with serving(backend, root=checkpoints_root()) as running:
        streams = [running.generation.StreamGenerate(ask_stream("hello", max_tokens=30)) for _ in range(3)]
        for stream in streams:
            next(stream)
        found = running.client.unload_adapter("trio")
        assert (found.running_requests, list(found.other_names)) == (3, [])
        assert code_of(lambda: running.generation.Generate(ask("hello"))) is CODES.NOT_FOUND
        assert running.client.adapters() == [] and backend.added == {digest(0)}
        for stream in streams:
            if way == "cancel":
                stream.cancel()
            else:
                list(stream)
        assert eventually(lambda: backend.added == set())
    assert backend.history == [("add", digest(0)), ("remove", digest(0))]


def test_unload_returns_when_the_memory_is_freed(running):
    running.client.load_adapter("same", "ckpt0")
    found = running.client.unload_adapter("trio")
    assert (found.running_requests, list(found.other_names)) == (0, ["same"]) and running.backend.added
    found = running.client.unload_adapter("same")
    assert found == adapter_pb2.UnloadAdapterResponse() and not running.backend.added
    response = running.generation.Generate(ask("hello", adapter="", base=True))  # the base model goes on
    assert response.served_by.adapter == ""


def test_resident_bytes_include_the_backend(running):
    before = running.client.adapters()[0].resident_bytes
    running.backend.bytes_each = 1 << 20
    assert running.client.adapters()[0].resident_bytes == before + (1 << 20)
    assert running.client.load_adapter("new", "ckpt1").resident_bytes == before + (1 << 20)


# --- refusals


@pytest.mark.parametrize(
    ("request_", "code", "fields"),
    [
        (load("trio"), CODES.ALREADY_EXISTS, None),
        (load(tasks=["art"]), CODES.NOT_FOUND, None),
        (load(path="nowhere"), CODES.INVALID_ARGUMENT, {"path"}),
        (load(path="../model"), CODES.INVALID_ARGUMENT, {"path"}),
        (load(path="/etc"), CODES.INVALID_ARGUMENT, {"path"}),
        (load(path="org/adapter"), CODES.INVALID_ARGUMENT, {"path"}),
        (load(path="x" * 100_000), CODES.INVALID_ARGUMENT, {"path"}),
        (load("No Name", "", ["a", "a", "B"]), CODES.INVALID_ARGUMENT, {"name", "path", "tasks[1]", "tasks[2]"}),
        (load("base"), CODES.INVALID_ARGUMENT, {"name"}),
        (load("x" * 100_000, "/" * 100_000, ["é" * 1000] * 1000), CODES.INVALID_ARGUMENT, None),
    ],
)
def test_an_invalid_load_has_its_status_and_changes_nothing(running, request_, code, fields):
    before = running.client.adapters()
    error = failure(lambda: running.adapters.LoadAdapter(request_))
    assert error.code() is code and "→" in error.details()
    if fields:
        assert set(violations(error)) == fields
    assert running.client.adapters() == before and len(running.backend.history) == 1


def test_an_unknown_name_cannot_be_unloaded(running):
    error = failure(lambda: running.adapters.UnloadAdapter(adapter_pb2.UnloadAdapterRequest(name="duo")))
    assert error.code() is CODES.NOT_FOUND and "choose from: trio" in error.details()


def damaged(folder: Path) -> None:
    file = folder / "tasks/nlu.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def another_seed(folder: Path) -> None:
    found = manifest.read(folder)
    projection = dataclasses.replace(found.projection, seed=found.projection.seed + 1)
    (folder / "loraf.json").write_text(dataclasses.replace(found, projection=projection).to_json())


def another_base(folder: Path) -> None:
    found = manifest.read(folder)
    base = dataclasses.replace(found.base_model, fingerprint="0" * 64)
    (folder / "loraf.json").write_text(dataclasses.replace(found, base_model=base).to_json())


@pytest.mark.parametrize("copied", [0, 1])  # of what is loaded already, and of something new
@pytest.mark.parametrize("backend", [FakeBackend, ReadingBackend])
@pytest.mark.parametrize(
    ("damage", "code", "says"),
    [
        (damaged, CODES.DATA_LOSS, "nlu.safetensors"),
        (another_seed, CODES.DATA_LOSS, "loraf.json"),
        (lambda folder: (folder / "tasks/math.safetensors").unlink(), CODES.DATA_LOSS, "math.safetensors"),
        (lambda folder: (folder / "loraf.json").write_text("{"), CODES.DATA_LOSS, "loraf.json"),
        (lambda folder: (folder / "loraf.json").unlink(), CODES.FAILED_PRECONDITION, "there is no loraf.json"),
        (another_base, CODES.FAILED_PRECONDITION, "other weights"),
    ],
)
def test_a_checkpoint_that_cannot_be_served_has_its_status_and_changes_nothing(
    tmp_path, copied, backend, damage, code, says
):
    shutil.copytree(checkpoint_folder(copied), tmp_path / "root/team/bad")
    damage(tmp_path / "root/team/bad")
    with serving(backend, one_adapter(), root=tmp_path / "root") as running:
        for name, replace in (("trio", True), ("new", False)):
            error = failure(lambda: running.adapters.LoadAdapter(load(name, "team/bad", replace=replace)))  # noqa: B023
            assert error.code() is code and says in error.details()
            assert str(tmp_path) not in error.details() and str(model_folder()) not in error.details()
        assert [a.digest for a in running.client.adapters()] == [digest(0)] and running.backend.added == {digest(0)}


def test_another_base_model_is_loaded_where_the_server_allows_it(tmp_path, monkeypatch):
    from loraf_serve.adapters.root import AdapterRoot
    from tests.loraf_serve import harness

    other = make_model("mistral", tmp_path / "other", seed=1)
    monkeypatch.setattr(harness, "AdapterRoot", lambda root, _: AdapterRoot(root, other, allow_other_base=True))
    with serving(adapters=Registry(), root=checkpoints_root()) as running:
        assert running.client.load_adapter("a", "ckpt0").digest == digest(0)


@pytest.mark.parametrize(
    ("failure_", "code", "says"),
    [
        (BaseMismatch(Problem("rank 8 is beyond --max-lora-rank 4")), CODES.FAILED_PRECONDITION, "--max-lora-rank"),
        (RuntimeError("no memory at /srv/secret"), CODES.INTERNAL, "request "),
        (BackendUnavailable("died at /srv/secret"), CODES.UNAVAILABLE, "the engine cannot answer any more"),
    ],
)
def test_an_adapter_that_the_backend_refuses_has_its_status_and_the_old_content_stays(running, failure_, code, says):
    running.backend.add_failure = failure_
    error = failure(lambda: running.adapters.LoadAdapter(load("trio", replace=True)))
    assert error.code() is code and says in error.details() and "secret" not in error.details()
    assert [a.digest for a in running.client.adapters()] == [digest(0)]
    if code is CODES.UNAVAILABLE:
        assert running.client.health() == "NOT_SERVING"
    else:
        assert running.generation.Generate(ask("x")).served_by.digest == digest(0)


def test_without_adapter_root_clients_change_nothing():
    with serving(adapters=two_adapters()) as running:
        for call in (
            lambda: running.adapters.LoadAdapter(load()),
            lambda: running.adapters.UnloadAdapter(adapter_pb2.UnloadAdapterRequest(name="trio")),
        ):
            error = failure(call)
            assert error.code() is CODES.FAILED_PRECONDITION and "--adapter-root DIR" in error.details()
        assert len(running.client.adapters()) == 2


def test_a_load_beyond_the_memory_limit_names_the_sizes():
    taken = open_adapter("trio", checkpoint_folder()).resident_bytes
    files = sum(task.file.bytes for task in manifest.read(checkpoint_folder(1)).tasks)
    with serving(root=checkpoints_root(), adapter_memory=2 * taken) as running:
        error = failure(lambda: running.adapters.LoadAdapter(load()))
        assert error.code() is CODES.RESOURCE_EXHAUSTED
        expected = f"takes {size_text(files)}, and {size_text(taken)} of the {size_text(2 * taken)} for all adapters"
        assert f"--adapter-memory: this adapter {expected}" in error.details()
        assert running.adapters.LoadAdapter(load(tasks=["math"])).adapter.tasks
        running.client.unload_adapter("trio")
        assert running.adapters.LoadAdapter(load("all-tasks")).adapter.tasks


# --- the server's life


def test_nothing_is_loaded_before_the_server_serves_or_while_it_drains():
    backend = FakeBackend(seconds_per_token=0.05)
    checkpoint_folder(1)
    with serving(backend, root=checkpoints_root(), warm=False) as running:
        unload = adapter_pb2.UnloadAdapterRequest(name="trio")
        for call in (lambda: running.adapters.LoadAdapter(load()), lambda: running.adapters.UnloadAdapter(unload)):
            assert (failure(call).code(), failure(call).details()) == (CODES.UNAVAILABLE, "the model is still loading")
        running.call(running.server.warm_up())
        stream = running.generation.StreamGenerate(ask_stream("x", max_tokens=20))
        next(stream)
        draining = running.spawn(running.server.drain(30.0))
        assert eventually(lambda: running.client.health() == "NOT_SERVING")
        for call in (lambda: running.adapters.LoadAdapter(load()), lambda: running.adapters.UnloadAdapter(unload)):
            assert (failure(call).code(), failure(call).details()) == (CODES.UNAVAILABLE, "the server is draining")
        list(stream)
        draining.result(10)


def test_a_drain_cancels_a_load_in_progress():
    checkpoint_folder(1)
    backend = FakeBackend()
    with serving(backend, root=checkpoints_root()) as running:
        backend.add_gate = asyncio.Event()
        loading = running.adapters.LoadAdapter.future(load())
        assert eventually(lambda: backend._changing)
        running.call(running.server.drain(0.1))
        assert (loading.code(), loading.details()) == (CODES.UNAVAILABLE, "the server is draining")
        assert backend.state == "stopped"


@pytest.mark.parametrize("way", ["cancel", "deadline"])
def test_a_load_whose_client_disconnects_is_undone(running, monkeypatch, way):
    library, gone = running.server._library, []
    original = library.load

    async def noticing(*arguments):
        try:
            return await original(*arguments)
        except asyncio.CancelledError:
            gone.append(arguments)
            raise

    monkeypatch.setattr(library, "load", noticing)
    running.backend.add_gate = asyncio.Event()
    loading = running.adapters.LoadAdapter.future(load(), timeout=0.5 if way == "deadline" else None)
    assert eventually(lambda: running.backend._changing)
    waiting = running.adapters.LoadAdapter.future(load("other", tasks=["math"]))
    if way == "cancel":
        loading.cancel()
    assert eventually(lambda: loading.code() is not None)
    assert loading.code() is (CODES.CANCELLED if way == "cancel" else CODES.DEADLINE_EXCEEDED)
    assert eventually(lambda: gone)  # the server knows it too
    running.loop.call_soon_threadsafe(running.backend.add_gate.set)
    assert waiting.result(10).adapter.name == "other"
    assert eventually(lambda: running.backend.added == {digest(0), digest(1, "math")})
    assert [a.name for a in running.client.adapters()] == ["trio", "other"]


# --- the Python client and loraf-client


def test_the_python_client(running):
    adapter = running.client.load_adapter("new", "ckpt1", ["math", "code"])
    assert isinstance(adapter, adapter_pb2.Adapter) and adapter.digest == digest(1, "math", "code")
    with pytest.raises(ServiceError, match="ALREADY_EXISTS: name: the name 'new' is taken → set replace"):
        running.client.load_adapter("new", "ckpt1")
    assert running.client.load_adapter("new", "ckpt1", replace=True).digest == digest(1)
    assert running.client.unload_adapter("new").running_requests == 0
    with pytest.raises(ServiceError, match="NOT_FOUND"):
        running.client.unload_adapter("new")
    with pytest.raises(TypeError, match=r"tasks=\['math'\]"):
        running.client.load_adapter("new", "ckpt1", "math")


def test_loraf_client(running, cli):
    status, out, err = cli("load", "new", "ckpt1", "--tasks", "math, nlu")
    assert (status, err) == (0, "")
    assert out.startswith(f"new: rank 8, base stand-in, digest {digest(1, 'math', 'nlu')}, ")
    assert out in cli("adapters")[1]
    assert cli("load", "new", "ckpt1", "--replace", "--json")[1] == cli("adapters", "--json")[1].splitlines()[1] + "\n"
    assert cli("load", "same", "ckpt1")[0] == 0
    told = "new: unloaded; its memory is freed when same (the same content) is unloaded too\n"
    assert cli("unload", "new") == (0, told, "")
    assert json.loads(cli("unload", "same", "--json")[1]) == {}
    assert cli("unload", "trio") == (0, "trio: unloaded; its memory has been freed\n", "")
    assert cli("adapters") == (0, "", "")


def test_loraf_client_says_how_many_requests_still_run(cli, running):
    running.backend.seconds_per_token = 0.05
    stream = running.generation.StreamGenerate(ask_stream("hello", max_tokens=100))
    next(stream)
    told = "trio: unloaded; its memory is freed when the last of 1 running request has ended\n"
    assert cli("unload", "trio") == (0, told, "")
    stream.cancel()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["load", "trio", "ckpt1"], "ALREADY_EXISTS"),
        (["load", "new", "../ckpt1"], "path: is absolute"),
        (["load", "New", "ckpt1"], "'New' is not a valid adapter name"),
        (["load", "new", "ckpt1", "--tasks", "art"], "choose from: math, nlu, code"),
        (["load", "new", "ckpt1", "--tasks", "math,,math"], "tasks[1]: '' is not a task name"),
        (["unload", "new"], "choose from: trio"),
    ],
)
def test_mistakes_exit_with_2_and_print_the_reason(cli, arguments, says):
    status, out, err = cli(*arguments)
    assert (status, out) == (2, "") and says in err and "Traceback" not in err


def test_a_checkpoint_too_large_for_the_server_exits_with_2(capsys):
    checkpoint_folder(1)
    with serving(root=checkpoints_root(), adapter_memory=50_000) as running:
        assert client_cli.main(["load", "new", "ckpt1", "--server", running.address]) == 2
        assert "RESOURCE_EXHAUSTED: --adapter-memory" in capsys.readouterr().err
