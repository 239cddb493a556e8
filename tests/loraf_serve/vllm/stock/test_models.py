"""The models of a stock `vllm serve`, tested without an engine: what a name stands for, what is read and refused."""

from __future__ import annotations

import asyncio
import builtins
import io
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.openai.models.protocol import BaseModelPath, LoRAModulePath
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.exceptions import VLLMNotFoundError
from vllm.lora.request import LoRARequest

from loraf.checkpoint import Checkpoint
from loraf.files import bounded_file
from loraf_serve.vllm import naming
from loraf_serve.vllm.stock import models as stock_models
from loraf_serve.vllm.stock.models import TaskSetModels
from loraf_serve.vllm.worker.notice import give
from loraf_serve.vllm.worker.store import CheckpointStore

_ANSWERS = {  # of a worker that has one layer, about which everything is proven
    "loraf_layers": {"layer": [1, 1]},
    "loraf_recorded": ["decode", "mixed", "prefill"],
    "loraf_compare": True,
}


class FakeEngine:
    """An engine client that records its calls, with one worker that loads at once.

    It catches: a name or an id with two meanings, a set that reaches the engine before its checkpoint is in memory, a
    checkpoint that is loaded twice or kept after the worker refused it.
    """

    def __init__(self, refusal: dict | None = None, **parallel: object):
        config = {"worker_extension_cls": naming.STOCK_EXTENSION, "pipeline_parallel_size": 1, "data_parallel_size": 1}
        self.model_config = SimpleNamespace(model="./model", revision=None, max_model_len=600)
        self.vllm_config = SimpleNamespace(
            model_config=self.model_config,
            lora_config=SimpleNamespace(max_lora_rank=16),
            parallel_config=SimpleNamespace(**config | parallel),
        )
        self.renderer = self.input_processor = None
        self.output_processor = SimpleNamespace(request_states={})
        self.refusal = refusal
        self.calls: list[str] = []
        self.added: list[LoRARequest] = []

    async def collective_rpc(self, method: str, args: tuple = ()) -> list:
        self.calls.append(method)
        await asyncio.sleep(0)
        if method == "loraf_begin_load":
            self.notice = args[-1]
        if method in ("loraf_begin_load", "loraf_load_state"):
            give(self.notice)  # the first notice is spurious
        if method == "loraf_load_state":
            return [None if self.calls.count(method) == 1 else self.refusal or {"bytes": 1}]
        return [_ANSWERS.get(method)]

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[None]:
        """The requests of the proof."""
        assert self.calls[-1] == "loraf_begin_proof"
        for _ in range(params.max_tokens):
            yield None

    async def add_lora(self, request: LoRARequest) -> bool:
        assert "loraf_load_state" in self.calls or not request.lora_path.startswith("loraf:")
        self.added.append(request)
        return True


class ReadingEngine(FakeEngine):
    """A `FakeEngine` whose worker reads and verifies checkpoints, as a real one does."""

    def __init__(self) -> None:
        super().__init__()
        self.store: CheckpointStore[Checkpoint, Checkpoint] = CheckpointStore(
            lambda folder, tasks: nullcontext(Checkpoint.open(folder, tasks)), lambda checkpoint, pool: checkpoint
        )

    async def collective_rpc(self, method: str, args: tuple = ()) -> list:
        self.calls.append(method)
        if method == "loraf_begin_load":
            self.store.begin(*args)
        if method == "loraf_drop":
            self.store.drop(args[0])
        if method == "loraf_load_state":
            state = self.store.state(args[0])
            return [{"bytes": 1} if state == {} else state]
        return [_ANSWERS.get(method)]


@pytest.fixture
def task_file_openings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the task files that this process opens, each time it opens one."""
    openings: list[str] = []

    def recording(function: Any) -> Any:
        def call(file: Any, *args: Any, **kwargs: Any) -> Any:
            if str(file).endswith(".safetensors"):
                openings.append(Path(file).name)
            return function(file, *args, **kwargs)

        return call

    for module in (builtins, io, os):
        monkeypatch.setattr(module, "open", recording(module.open))
    monkeypatch.setattr(bounded_file, "FileIO", recording(bounded_file.FileIO))
    return openings


def damage(file: Path) -> None:
    """Changes a task file's last byte, which leaves its size."""
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.fixture
def logged_errors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The errors that the models log. vLLM removes paths from its responses, not from its log."""
    errors: list[str] = []
    monkeypatch.setattr("loraf_serve.vllm.stock.models.logger.error", lambda text, *args: errors.append(text % args))
    return errors


def models(engine: FakeEngine, *modules: str) -> TaskSetModels:
    paths = [LoRAModulePath(*module.split("=", 1)) for module in modules]
    return TaskSetModels(engine, [BaseModelPath("base", "./model")], lora_modules=paths)


def load(name: str, path: str, **more: object) -> LoadLoRAAdapterRequest:
    return LoadLoRAAdapterRequest(lora_name=name, lora_path=path, **more)


@pytest.mark.usefixtures("root")
def test_a_content_has_one_id_and_a_name_one_content() -> None:
    async def run() -> None:
        engine = FakeEngine()
        served = models(engine, "math=./ckpt@math", "ckpt=./ckpt")
        await served.init_static_loras()
        names = ("ckpt@math", "ckpt@nlu+math", "ckpt@math+nlu", "ckpt@as_trained=nlu", "ckpt@all", "ckpt@math:0.5")
        resolved = await asyncio.gather(*(served.resolve_lora(name) for name in names * 2))
        ids = dict(zip(names * 2, [request.lora_int_id for request in resolved], strict=True))
        assert [request.lora_name for request in resolved] == list(names * 2)
        math, everything = (served.lora_requests[name].lora_int_id for name in ("math", "ckpt"))
        assert ids["ckpt@math"] == math and ids["ckpt@all"] == everything
        assert ids["ckpt@nlu+math"] == ids["ckpt@math+nlu"] == ids["ckpt@as_trained=nlu"]
        assert len({math, everything, ids["ckpt@math+nlu"], ids["ckpt@math:0.5"]}) == 4
        by_id = {(request.lora_int_id, request.lora_path) for request in engine.added}
        assert len(by_id) == len({number for number, _ in by_id}) == 4
        assert not any(request.load_inplace for request in engine.added)
        assert engine.calls.count("loraf_begin_load") == 1

        answer = await served.load_lora_adapter(load("math", "./ckpt@nlu", load_inplace=True))
        assert answer.error.code == 400 and "'math' already stands for" in answer.error.message
        assert served.lora_requests["math"].lora_int_id == math

    asyncio.run(run())


@pytest.mark.usefixtures("root")
def test_at_the_start_a_bad_path_is_an_error_that_names_it() -> None:
    for module, words in {
        "math=./nowhere@math": "math=./nowhere@math: .*there is no checkpoint './nowhere'",
        "math=./ckpt@maths": "math=./ckpt@maths: .*there is no task 'maths'.*choose from: math, nlu, code",
        "math=./model@math": "math=./model@math: .*there is no loraf.json",
    }.items():
        engine = FakeEngine()
        with pytest.raises(ValueError, match=words):
            asyncio.run(models(engine, module).init_static_loras())
        assert engine.added == []


@pytest.mark.usefixtures("root")
def test_the_api_process_opens_no_task_file(task_file_openings: list[str]) -> None:
    async def run() -> None:
        engine = FakeEngine()
        served = models(engine, "math=./ckpt@math", "ckpt=./ckpt")
        task_file_openings.clear()
        await served.init_static_loras()
        assert isinstance(await served.resolve_lora("ckpt@nlu"), LoRARequest)
        assert "Success" in await served.load_lora_adapter(load("late", "./ckpt@code"))
        assert engine.calls.count("loraf_begin_load") == 1
        assert task_file_openings == []

    asyncio.run(run())


@pytest.mark.usefixtures("root")
def test_a_copy_of_a_loaded_checkpoint_is_read_once_by_the_api_process(
    task_file_openings: list[str], logged_errors: list[str]
) -> None:
    """The workers hold its content and do not read it again."""

    async def run() -> None:
        for name in ("copy", "damaged"):
            shutil.copytree("ckpt", name)
        damage(Path("damaged/tasks/nlu.safetensors"))
        engine = FakeEngine()
        served = models(engine, "ckpt=./ckpt")
        await served.init_static_loras()
        task_file_openings.clear()
        for name in ("one", "two"):
            assert "Success" in await served.load_lora_adapter(load(name, "./copy"))
        assert sorted(task_file_openings) == ["code.safetensors", "math.safetensors", "nlu.safetensors"]
        for _ in range(2):
            answer = await served.load_lora_adapter(load("three", "./damaged@math"))
            assert answer.error.code == 400 and "is not the file that the manifest lists" in answer.error.message
            assert f"{Path('damaged').resolve()}/tasks/nlu.safetensors" in logged_errors.pop()
        assert engine.calls.count("loraf_begin_load") == 1 and "loraf_drop" not in engine.calls

    asyncio.run(run())


def test_a_damaged_task_file_is_refused_by_name(root: Path, logged_errors: list[str]) -> None:
    file = root.resolve() / "ckpt" / "tasks" / "nlu.safetensors"
    original = file.read_bytes()
    damage(file)

    async def run() -> None:
        engine = ReadingEngine()
        with pytest.raises(ValueError, match="ckpt=./ckpt: .*is not the file that the manifest lists"):
            await models(engine, "ckpt=./ckpt").init_static_loras()  # vLLM ends the start
        assert str(file) in logged_errors.pop()
        served = models(engine)
        answer = await served.load_lora_adapter(load("ckpt", "./ckpt@math"))
        assert answer.error.code == 400 and "is not the file that the manifest lists" in answer.error.message
        assert str(file) in logged_errors.pop()
        assert engine.calls[-1] == "loraf_drop" and engine.added == [] and served.lora_requests == {}

        file.write_bytes(original)
        assert "Success" in await served.load_lora_adapter(load("ckpt", "./ckpt"))

    asyncio.run(run())


@pytest.mark.parametrize("change", ["missing", "too short"])
def test_a_missing_or_short_task_file_is_refused_before_the_workers_read(
    root: Path, logged_errors: list[str], change: str
) -> None:
    file = root.resolve() / "ckpt" / "tasks" / "nlu.safetensors"
    if change == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    engine = FakeEngine()
    words = "cannot be read" if change == "missing" else "is not the file that the manifest names"
    with pytest.raises(ValueError, match=f"ckpt=./ckpt: .*{words}"):
        asyncio.run(models(engine, "ckpt=./ckpt").init_static_loras())
    assert str(file) in logged_errors.pop()
    assert "loraf_begin_load" not in engine.calls


@pytest.mark.usefixtures("root")
def test_a_set_with_an_unknown_task_loads_nothing() -> None:
    async def run() -> None:
        engine = FakeEngine()
        answer = await models(engine).load_lora_adapter(load("ckpt", "./ckpt@maths"))
        assert answer.error.code in (400, 404) and "'maths'" in answer.error.message
        assert "loraf_begin_load" not in engine.calls and engine.added == []

    asyncio.run(run())


@pytest.mark.usefixtures("root")
def test_a_checkpoint_that_a_worker_refuses_is_not_kept() -> None:
    async def run() -> None:
        refusal = {"kind": "BaseMismatch", "problems": [["vLLM applies no LoRA to this layer", "layer", "ckpt", ""]]}
        engine = FakeEngine(refusal)
        served = models(engine)
        answer = await served.load_lora_adapter(load("ckpt", "./ckpt"))
        assert answer.error.code == 400 and "vLLM applies no LoRA to this layer" in answer.error.message
        assert engine.calls[-1] == "loraf_drop" and engine.added == [] and served.lora_requests == {}
        engine.refusal = None
        assert "Success" in await served.load_lora_adapter(load("ckpt", "./ckpt"))

    asyncio.run(run())


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        ({"worker_extension_cls": "mine.Extension"}, "--worker-extension-cls: LoRAF brings its own"),
        (
            {"pipeline_parallel_size": 2},
            "--pipeline-parallel-size: LoRAF does not support a model",
        ),
        ({"data_parallel_size": 2}, "--data-parallel-size: LoRAF does not support a model"),
    ],
)
def test_a_server_that_cannot_serve_loraf_gives_the_reason(parallel: dict, words: str) -> None:
    engine = FakeEngine(**parallel)
    with pytest.raises(ValueError, match=words):
        asyncio.run(models(engine, "math=./ckpt@math").init_static_loras())
    assert engine.calls == []


@pytest.mark.usefixtures("root")
def test_vllm_loads_its_own_adapters_itself() -> None:
    async def run() -> None:
        engine = FakeEngine(worker_extension_cls="mine.Extension")
        served = models(engine, "plain=peft@home")
        await served.init_static_loras()
        assert [(request.lora_name, request.lora_path) for request in engine.added] == [("plain", "peft@home")]
        assert engine.calls == []
        assert (await served.resolve_lora("plain@math")).error.code == 404
        assert "Success" in await served.load_lora_adapter(load("plain", "peft@home", load_inplace=True))

    asyncio.run(run())


@pytest.mark.usefixtures("root")
def test_a_checkpoint_that_was_unloaded_is_not_found() -> None:
    """Nor are the names that were asked for while it was loaded; those of other names go on."""

    async def run() -> None:
        served = models(FakeEngine(), "a=./ckpt", "b=./ckpt", "math=./ckpt@math")
        await served.init_static_loras()
        before = [await served.resolve_lora(name) for name in ("a@math", "a@nlu+math", "b@math")]
        assert "Success" in await served.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name="a"))
        assert set(served.lora_requests) == {"b", "b@math", "math"}
        assert isinstance(await served.resolve_lora("b@math"), LoRARequest)
        for name in ("a@math", "a@nlu+math", "a@code"):
            with pytest.raises(VLLMNotFoundError, match="there is no checkpoint 'a' → choose from: b"):
                await served.resolve_lora(name)
        assert "Success" in await served.load_lora_adapter(load("a", "./ckpt"))
        after = [await served.resolve_lora(name) for name in ("a@math", "a@nlu+math", "b@math")]
        assert [(r.lora_name, r.lora_int_id) for r in after] == [(r.lora_name, r.lora_int_id) for r in before]

    asyncio.run(run())


@pytest.mark.usefixtures("root")
def test_a_checkpoint_that_is_unloaded_while_a_name_is_resolved() -> None:
    async def run() -> None:
        engine = FakeEngine()
        served = models(engine, "a=./ckpt")
        await served.init_static_loras()
        stock = engine.add_lora

        async def add_lora(request: LoRARequest) -> bool:
            await served.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name="a"))
            return await stock(request)

        engine.add_lora = add_lora
        with pytest.raises(VLLMNotFoundError, match="there is no checkpoint 'a' → choose from: none"):
            await served.resolve_lora("a@math")
        assert served.lora_requests == {}

    asyncio.run(run())


@pytest.mark.usefixtures("root")
def test_an_unloaded_name_keeps_its_meaning() -> None:
    async def run() -> None:
        served = models(FakeEngine(), "a=./ckpt")
        await served.init_static_loras()
        await served.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name="a"))
        for name, path in (("a", "./ckpt@math"), ("a@math", "./ckpt@nlu"), ("a@all", "peft@home")):
            answer = await served.load_lora_adapter(load(name, path))
            assert answer.error.code == 400 and f"{name!r} already stands for" in answer.error.message
        assert "Success" in await served.load_lora_adapter(load("a@math", "./ckpt@math"))

    asyncio.run(run())


@pytest.mark.usefixtures("root")
def test_what_is_kept_of_the_names_that_were_asked_for_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock_models, "MAX_RESOLVED", 4)
    monkeypatch.setattr(stock_models, "MAX_IDS", 16)

    async def run() -> None:
        engine = FakeEngine()
        served = models(engine, "ckpt=./ckpt")
        await served.init_static_loras()
        held = await served.resolve_lora("ckpt@math:0.5")
        engine.output_processor.request_states["r"] = SimpleNamespace(lora_request=held)  # a request that runs on
        fixed = len(served.lora_requests), len(served.lora_resolver_lock), len(served._paths)
        for n in range(60):
            await served.resolve_lora(f"ckpt@math:0.{n + 10}")
            assert (await served.resolve_lora(f"nothing{n}")).error.code == 404
            absent = UnloadLoRAAdapterRequest(lora_name=f"absent{n}")
            assert (await served.unload_lora_adapter(absent)).error.code == 404
        assert len(served.lora_requests) <= fixed[0] + 4 and len(served.lora_resolver_lock) <= fixed[1] + 4
        assert len(served._ids) <= 16 and len(served._resolved) == 4 and len(served._paths) == fixed[2]
        again = await served.resolve_lora("ckpt@math:0.5")
        assert (again.lora_int_id, again.lora_path) == (held.lora_int_id, held.lora_path)
        by_id = {(request.lora_int_id, request.lora_path) for request in engine.added}
        assert len(by_id) == len({number for number, _ in by_id}), "an id is never given to another content"

    asyncio.run(run())


@pytest.mark.usefixtures("root")
def test_resident_workers_take_any_number_of_sets_and_no_other_adapters(logged_errors: list[str]) -> None:
    async def run() -> None:
        engine = FakeEngine(worker_extension_cls=naming.RESIDENT_EXTENSION)
        engine.vllm_config.lora_config.max_loras = 64
        served = models(engine, "ckpt=./ckpt")
        await served.init_static_loras()
        count = stock_models.MAX_RESOLVED + 100
        for i in range(count):
            assert isinstance(await served.resolve_lora(f"ckpt@math:{i / 1000:g}1"), LoRARequest)
        assert min(request.lora_int_id for request in engine.added) > 64  # the others are those of vLLM's warm-up
        assert len({request.lora_int_id for request in engine.added}) == count + 1
        assert len(served.lora_requests) == stock_models.MAX_RESOLVED + 1
        assert len(served.lora_resolver_lock) <= stock_models.MAX_RESOLVED + 1

        answer = await served.load_lora_adapter(load("plain", "./peft@home"))
        assert answer.error.code == 400 and "LORAF_STOCK_BACKEND=resident" in answer.error.message
        assert len(engine.added) == count + 1

    asyncio.run(run())
