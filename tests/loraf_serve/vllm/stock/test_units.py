"""A stock `vllm serve` with loraf installed, tested without an engine: names, refusals, and what stays unchanged."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.engine import arg_utils
from vllm.entrypoints.launchers.api_server import app_state
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.usage.usage_lib import UsageContext

from loraf.base_model import describe
from loraf.checkpoint import Checkpoint
from loraf.errors import BaseMismatch, CheckpointError, ConfigError, SelectionError, UnknownTask
from loraf.set_text import task_set
from loraf_serve.vllm import naming, plugin
from loraf_serve.vllm.stock import facts, install
from loraf_serve.vllm.stock.checkpoints import ALLOW_OTHER_BASE, StockCheckpoints, split_path
from loraf_serve.vllm.stock.models import TaskSetModels
from tests.loraf_serve.vllm.slots.test_punica_cpu import BATCHES, by_rows, random_layers
from tests.loraf_serve.vllm.slots.test_punica_cpu import wrapper_for as grouped_wrapper_for
from tests.standins import linear_shapes, make_model, random_checkpoint, random_values

FACTS = facts.FACTS
SERVER = UsageContext.OPENAI_API_SERVER


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
    assert {str(task_set(text, manifest)) for text in same} == {"math+nlu"}
    assert str(task_set("all", manifest)) == str(task_set("as_trained=code", manifest)) == "math+nlu+code"
    assert task_set("base", manifest).is_base
    for text in ("as_trained=", "as_trained=nope", "as_trained=math+nlu", "as_trained", ""):
        with pytest.raises(UnknownTask):
            task_set(text, manifest)
    for text in ("math:inf", "math+math", "math:a", "math:"):
        with pytest.raises(SelectionError):
            task_set(text, manifest)


# --- checkpoints ------------------------------------------------------------------------------------------------


def checkpoints(rank: int = 16) -> StockCheckpoints:
    return StockCheckpoints("./model", None, rank)


def test_one_folder_is_one_checkpoint_however_it_is_written(root: Path) -> None:
    store = checkpoints()
    first = store.check("./ckpt")
    store.keep(first)
    (root / "link").symlink_to("ckpt")
    assert first.folder == root.resolve() / "ckpt"
    assert all(store.check(name) is first for name in ("ckpt", f"{root}/ckpt/", "./model/../ckpt", "link"))


def test_added_tasks_are_accepted_but_not_served(root: Path) -> None:
    shapes, tasks = linear_shapes(root / "model"), ("math", "nlu", "later")
    drawn = random_values(shapes, 16, tasks, 0.75, seed=0)
    growing = Checkpoint.create("growing", describe("model", root / "model"), 16, shapes, seed=0)
    for task in tasks[:2]:
        growing.add_task(task, drawn[task], alpha=16.0, sparsity=0.75)
    store = checkpoints()
    checkpoint = store.check("./growing")
    store.keep(checkpoint)
    growing.add_task("later", drawn["later"], alpha=16.0, sparsity=0.75)
    growing.set_scores("math", [{"set": "math", "evaluation": "eval", "metric": "exact", "score": 1.0, "count": 1}])
    assert store.check("./growing") is checkpoint
    assert checkpoint.tasks == ("math", "nlu")  # those that the workers have loaded


@pytest.mark.parametrize("change", ["other contents", "fewer tasks", "no checkpoint"])
def test_a_changed_checkpoint_is_refused(root: Path, change: str) -> None:
    store = checkpoints()
    store.keep(store.check("./ckpt"))
    shutil.rmtree("ckpt")
    if change != "no checkpoint":
        tasks, seed = (("math", "nlu"), 0) if change == "fewer tasks" else (("math", "nlu", "code"), 1)
        random_checkpoint(root / "ckpt", root / "model", tasks, seed=seed)
    with pytest.raises(CheckpointError, match="there is no loraf.json" if change == "no checkpoint" else "was changed"):
        store.check("./ckpt")


def test_everything_is_checked_outside_of_the_engine(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="rank 16 is beyond the engine's largest, 8 → .* --max-lora-rank"):
        checkpoints(rank=8).check("./ckpt")
    random_checkpoint(root / "other", make_model("mistral", root / "other-model", seed=1))
    with pytest.raises(BaseMismatch, match=f"set {ALLOW_OTHER_BASE}=1"):
        checkpoints().check("./other")
    monkeypatch.setenv(ALLOW_OTHER_BASE, "1")
    assert checkpoints().check("./other").folder == root.resolve() / "other"
    with pytest.raises(ConfigError, match="LoRA path './nowhere': there is no checkpoint './nowhere'"):
        checkpoints().check("./nowhere")


def test_a_checkpoint_on_the_hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = []

    def snapshot_download(name: str, revision: str | None = None, **options: object) -> str:
        downloads.append((name, revision))
        return str(root / "ckpt")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    store = checkpoints()
    checkpoint = store.check("org/name")
    store.keep(checkpoint)
    assert store.check("org/name") is store.check("./ckpt") is checkpoint
    assert store.check("org/name#v1") is checkpoint
    assert downloads == [("org/name", None)] * 2 + [("org/name", "v1")]
    assert split_path("org/name#refs/pr/1@all") == ("org/name#refs/pr/1", "all")


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
