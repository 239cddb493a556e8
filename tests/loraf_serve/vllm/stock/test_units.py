"""A stock `vllm serve` with loraf installed, tested without an engine: names, refusals, and what stays unchanged."""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.engine import arg_utils
from vllm.entrypoints.launchers.api_server import app_state
from vllm.entrypoints.openai.models.protocol import BaseModelPath, LoRAModulePath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.exceptions import VLLMNotFoundError
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.request import LoRARequest
from vllm.usage.usage_lib import UsageContext

from loraf.base_model import describe
from loraf.checkpoint import Checkpoint
from loraf.errors import BaseMismatch, CheckpointError, ConfigError, SelectionError, UnknownTask
from loraf_serve.vllm import naming, plugin, relied_on
from loraf_serve.vllm.stock import install
from loraf_serve.vllm.stock.checkpoints import ALLOW_OTHER_BASE, StockCheckpoints, read_set, split_path
from loraf_serve.vllm.stock.models import TaskSetModels
from loraf_serve.vllm.worker.notice import give
from tests.loraf_serve.vllm.slots.test_punica_cpu import BATCHES, by_rows, random_layers
from tests.loraf_serve.vllm.slots.test_punica_cpu import wrapper_for as grouped_wrapper_for
from tests.standins import linear_shapes, make_model, random_checkpoint, random_values

FACTS = relied_on.STOCK_FACTS
SERVER = UsageContext.OPENAI_API_SERVER


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `ckpt` (math, nlu, code), and a PEFT adapter whose name contains an @."""
    root = tmp_path_factory.mktemp("stock-units")
    random_checkpoint(root / "ckpt", make_model("mistral", root / "model"))
    (root / "peft@home").mkdir()
    (root / "peft@home" / "adapter_config.json").write_text("{}")
    return root


@pytest.fixture
def root(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `originals`, as the working directory."""
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("statement", FACTS)
def test_vllm_still_does_what_loraf_relies_on(statement: str) -> None:
    assert FACTS[statement](), f"no longer true of the installed vLLM: {statement}"


# --- names ------------------------------------------------------------------------------------------------------


def test_paths_are_split_into_checkpoint_and_set(root: Path) -> None:
    shutil.copytree("ckpt", "odd@name")
    expected = {
        "./ckpt": ("./ckpt", "all"),
        "ckpt/": ("ckpt/", "all"),
        "./ckpt@math:0.5+nlu": ("./ckpt", "math:0.5+nlu"),
        f"{root}/ckpt@as_trained=nlu": (f"{root}/ckpt", "as_trained=nlu"),
        "odd@name": ("odd@name", "all"),  # an existing path is never split
        "odd@name@math": ("odd@name", "math"),
        "org/name@all": ("org/name", "all"),
        "./nowhere@math": ("./nowhere", "math"),
        "peft@home": None,
        "./peft@home/": None,
        "home@host/adapter": None,
        "org/name": None,
        "/nowhere": None,
    }
    assert {path: split_path(path) for path in expected} == expected
    for path in ("@math", "./ckpt@", "loraf:00:math"):
        with pytest.raises(ConfigError, match="./ckpt@math"):
            split_path(path)


def test_a_task_set_is_parsed_in_every_form(originals: Path) -> None:
    manifest = Checkpoint.open(originals / "ckpt").manifest
    same = ("math+nlu", "nlu+math", " nlu + math", "math:1+nlu:1.0", "code:0+math+nlu", "as_trained=nlu")
    assert {str(read_set(text, manifest)) for text in same} == {"math+nlu"}
    assert str(read_set("all", manifest)) == str(read_set("as_trained=code", manifest)) == "math+nlu+code"
    assert read_set("base", manifest).is_base
    for text in ("as_trained=", "as_trained=nope", "as_trained=math+nlu", "as_trained", ""):
        with pytest.raises(UnknownTask):
            read_set(text, manifest)
    for text in ("math:inf", "math+math", "math:a", "math:"):
        with pytest.raises(SelectionError):
            read_set(text, manifest)


# --- checkpoints ------------------------------------------------------------------------------------------------


def checkpoints(rank: int = 16) -> StockCheckpoints:
    return StockCheckpoints("./model", None, rank)


def test_one_folder_is_one_checkpoint_however_it_is_written(root: Path) -> None:
    store = checkpoints()
    first = store.read("./ckpt")
    store.keep(first)
    (root / "link").symlink_to("ckpt")
    assert first.folder == root.resolve() / "ckpt"
    assert all(store.read(name) is first for name in ("ckpt", f"{root}/ckpt/", "./model/../ckpt", "link"))


def test_added_tasks_are_accepted_but_not_served(root: Path) -> None:
    shapes, tasks = linear_shapes(root / "model"), ("math", "nlu", "later")
    drawn = random_values(shapes, 16, tasks, 0.75, seed=0)
    growing = Checkpoint.create("growing", describe("model", root / "model"), 16, shapes, seed=0)
    for task in tasks[:2]:
        growing.add_task(task, drawn[task], alpha=16.0, sparsity=0.75)
    store = checkpoints()
    checkpoint = store.read("./growing")
    store.keep(checkpoint)
    growing.add_task("later", drawn["later"], alpha=16.0, sparsity=0.75)
    growing.set_scores("math", [{"score": 1.0}])
    assert store.read("./growing") is checkpoint
    assert checkpoint.tasks == ("math", "nlu")  # those that the workers have loaded


@pytest.mark.parametrize("change", ["other contents", "fewer tasks", "no checkpoint"])
def test_a_changed_checkpoint_is_refused(root: Path, change: str) -> None:
    store = checkpoints()
    store.keep(store.read("./ckpt"))
    shutil.rmtree("ckpt")
    if change != "no checkpoint":
        tasks, seed = (("math", "nlu"), 0) if change == "fewer tasks" else (("math", "nlu", "code"), 1)
        random_checkpoint(root / "ckpt", root / "model", tasks, seed=seed)
    with pytest.raises(CheckpointError, match="there is no loraf.json" if change == "no checkpoint" else "was changed"):
        store.read("./ckpt")


def test_everything_is_checked_outside_of_the_engine(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="rank 16 is beyond the engine's largest, 8 → .* --max-lora-rank"):
        checkpoints(rank=8).read("./ckpt")
    random_checkpoint(root / "other", make_model("mistral", root / "other-model", seed=1))
    with pytest.raises(BaseMismatch, match=f"set {ALLOW_OTHER_BASE}=1"):
        checkpoints().read("./other")
    monkeypatch.setenv(ALLOW_OTHER_BASE, "1")
    assert checkpoints().read("./other").folder == root.resolve() / "other"
    with pytest.raises(ConfigError, match="LoRA path './nowhere': there is no checkpoint './nowhere'"):
        checkpoints().read("./nowhere")


def test_a_checkpoint_on_the_hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = []

    def snapshot_download(name: str, **options: object) -> str:
        downloads.append(name)
        return str(root / "ckpt")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    store = checkpoints()
    checkpoint = store.read("org/name")
    store.keep(checkpoint)
    assert store.read("org/name") is store.read("./ckpt") is checkpoint
    assert downloads == ["org/name"] * 2


# --- models -----------------------------------------------------------------------------------------------------


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
        return [{"layer": [1, 1]} if method == "loraf_layers" else None]

    async def add_lora(self, request: LoRARequest) -> bool:
        assert "loraf_load_state" in self.calls or not request.lora_path.startswith("loraf:")
        self.added.append(request)
        return True


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
    async def run() -> None:
        served = models(FakeEngine(), "a=./ckpt", "b=./ckpt")
        await served.init_static_loras()
        del served.lora_requests["a"]
        assert isinstance(await served.resolve_lora("b@math"), LoRARequest)
        with pytest.raises(VLLMNotFoundError, match="there is no checkpoint 'a' → choose from: b"):
            await served.resolve_lora("a@math")

    asyncio.run(run())


# --- replaced parts of vLLM -------------------------------------------------------------------


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes what `install` and `prepare` change."""
    stock = getattr(arg_utils.EngineArgs.create_engine_config, "__wrapped__", None)
    monkeypatch.setattr(
        arg_utils.EngineArgs, "create_engine_config", stock or arg_utils.EngineArgs.create_engine_config
    )
    monkeypatch.setattr(app_state, "OpenAIServingModels", OpenAIServingModels)


@pytest.mark.usefixtures("untouched")
def test_only_a_server_with_lora_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    for lora, usage in ((False, SERVER), (True, UsageContext.LLM_CLASS), (True, UsageContext.ENGINE_CONTEXT)):
        args = SimpleNamespace(enable_lora=lora, worker_extension_cls="")
        install.prepare(args, usage)
        assert (args.worker_extension_cls, app_state.OpenAIServingModels) == ("", OpenAIServingModels)
    with monkeypatch.context() as other_release:
        other_release.setattr("vllm.__version__", "0.99.0")
        args = SimpleNamespace(enable_lora=True, worker_extension_cls="")
        install.prepare(args, SERVER)
        assert (args.worker_extension_cls, app_state.OpenAIServingModels) == ("", OpenAIServingModels)
    for own in ("", "mine.Extension"):
        args = SimpleNamespace(enable_lora=True, worker_extension_cls=own)
        install.prepare(args, SERVER)
        assert (args.worker_extension_cls, app_state.OpenAIServingModels) == (
            own or naming.STOCK_EXTENSION,
            TaskSetModels,
        )


@pytest.mark.usefixtures("untouched")
def test_the_plugin_acts_once_and_not_in_loraf_serve_s_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = arg_utils.EngineArgs.create_engine_config
    monkeypatch.setenv(naming.ENGINE_OWNER, "1")
    plugin.register()
    assert arg_utils.EngineArgs.create_engine_config is stock
    monkeypatch.delenv(naming.ENGINE_OWNER)
    with monkeypatch.context() as elsewhere:  # a process that creates no configuration
        elsewhere.delitem(sys.modules, "vllm.engine.arg_utils")
        plugin.register()
        assert "vllm.engine.arg_utils" not in sys.modules
    plugin.register()
    ours = arg_utils.EngineArgs.create_engine_config
    plugin.register()
    assert ours is arg_utils.EngineArgs.create_engine_config is not stock
    assert ours.__wrapped__ is stock


def test_products_on_the_cpu_are_vllm_s_own_until_a_checkpoint_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from loraf_serve.vllm.stock.worker import StockPunicaWrapperCPU

    ids, slices = BATCHES["last slot next to base"], (16,)
    a, b = random_layers(slices)
    x, y = torch.randn(len(ids), 24), torch.randn(len(ids), sum(slices))
    wrapper = grouped_wrapper_for(ids)  # holds the batch's mapping; only its class is replaced below

    def products(wrapper_class: type) -> torch.Tensor:
        wrapper.__class__ = wrapper_class
        out = y.clone()
        wrapper.add_lora_linear(out, x, a, b, 1.0, slices)
        return out

    expected = by_rows(y, x, a, b, slices, ids)
    stock = products(PunicaWrapperCPU)
    assert not torch.allclose(stock.double(), expected, atol=1e-4)  # base rows get the last slot's delta
    monkeypatch.setattr(StockPunicaWrapperCPU, "grouped", False)
    assert torch.equal(products(StockPunicaWrapperCPU), stock)
    monkeypatch.setattr(StockPunicaWrapperCPU, "grouped", True)
    torch.testing.assert_close(products(StockPunicaWrapperCPU).double(), expected, rtol=1e-5, atol=1e-5)
