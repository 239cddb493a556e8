"""`loraf-train import`: an imported task has the effect of its adapter, or its error is measured and refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from loraf import manifest as manifests
from loraf.checkpoint import Checkpoint
from loraf.delta import Merger, combined_b, delta_weight
from loraf.manifest import Templates
from loraf.peft_import import CONFIG, WEIGHTS
from loraf.tasksets import TaskSet
from loraf_train.commands.import_ import LARGEST_ERROR
from tests import standins
from tests.loraf_train import foreign_loras
from tests.loraf_train.command_line import digests, run

RANK = 16  # of standins.random_checkpoint


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with a model, checkpoints (`ckpt` has math, nlu and code, three quarters of B), and PEFT LoRAs."""
    folder = tmp_path_factory.mktemp("prepared")
    model = standins.make_model("llama", folder / "model")
    standins.random_checkpoint(folder / "four", model, tasks=("math", "nlu", "code", "law"))
    shutil.copytree(folder / "four", folder / "ckpt")
    Checkpoint.remove_task(folder / "ckpt", "law")
    standins.random_checkpoint(folder / "empty", model, tasks=())
    standins.random_checkpoint(folder / "other-a", model, tasks=("math",), seed=7)
    foreign_loras.make(folder / "lora", model)
    return folder


@pytest.fixture
def here(prepared, tmp_path, monkeypatch) -> Path:
    """A copy to change, as the working directory; the base model stays where the checkpoints expect it."""
    folder = tmp_path / "here"
    shutil.copytree(prepared, folder, ignore=shutil.ignore_patterns("model"))
    monkeypatch.chdir(folder)
    return folder


def merged_logits(model: Path, checkpoint: Path, text: str) -> torch.Tensor:
    opened = Checkpoint.open(checkpoint)
    loaded = foreign_loras.load(model)
    Merger(loaded, opened).merge(TaskSet.parse(text, opened.manifest.task_names))
    return foreign_loras.logits(loaded)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def export(capsys, checkpoint: str, tasks: str, out: str, *more: str) -> None:
    status, _, err = run(capsys, "export", checkpoint, "--tasks", tasks, "--format", "peft", "--out", out, *more)
    assert status == 0, err


def imported(capsys, source: str, into: str, name: str, *more: str) -> str:
    status, out, err = run(capsys, "import", source, "--into", into, "--name", name, *more)
    assert status == 0, err
    return out


def refused(capsys, source: str, into: str, name: str, *more: str) -> str:
    """Runs an import that must fail and write nothing; returns its message."""
    before = digests(Path(into)) if Path(into).is_dir() else None
    status, _, err = run(capsys, "import", source, "--into", into, "--name", name, *more)
    assert status == 2 and "Traceback" not in err
    assert before is None or digests(Path(into)) == before
    return err


def relative(out: str, row: str) -> tuple[float, float]:
    """(relative error, with a dense B) of a row of the printed table."""
    _, error, least = re.search(rf"^ *{row} +(\S+) +(\S+) +(\S+) *$", out, re.M).groups()
    return float(error), float(least)


# --- the same A: value by value ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", ["math", "nlu", "all", "math:0.7,nlu:-1.5"])
def test_an_imported_export_has_the_same_values(prepared, here, capsys, tasks):
    export(capsys, "ckpt", tasks, "out")
    out = imported(capsys, "out", "empty", "back")
    assert "copied value by value" in out and relative(out, "all") == (0, 0)
    there, back = Checkpoint.open("ckpt"), Checkpoint.open("empty")
    task_set = TaskSet.parse(tasks.replace(",", "+"), there.manifest.task_names)
    for module in there.manifest.modules:
        assert torch.equal(combined_b(there, module, task_set), combined_b(back, module, back.manifest.all_tasks()))
    task = back.manifest.task("back")
    # The shortest dtype that holds the numbers (code's are 1.5 times those of math), at the sparsity that they need.
    assert task.dtype == ("float32" if tasks in ("all", "math:0.7,nlu:-1.5") else "bfloat16")
    assert task.sparsity == {"all": 0.25, "math:0.7,nlu:-1.5": 0.5}.get(tasks, 0.75)
    assert_same(
        merged_logits(prepared / "model", Path("empty"), "back"),
        foreign_loras.served_by_peft(Path("out"), prepared / "model"),
    )


def test_an_export_in_bfloat16_is_recognised_as_the_same_a(here, capsys):
    export(capsys, "ckpt", "math", "out", "--dtype", "bfloat16")
    out = imported(capsys, "out", "empty", "back")
    assert "copied value by value" in out
    assert 0 < relative(out, "all")[0] < 0.004  # A itself is exact here, and was rounded there
    there, back = Checkpoint.open("ckpt"), Checkpoint.open("empty")
    module = next(iter(there.manifest.modules))
    assert torch.equal(there.tasks["math"][module].dense(), back.tasks["back"][module].dense())


def test_a_task_imported_from_another_checkpoint_is_the_same_file(prepared, here, capsys):
    there = Checkpoint.open("ckpt")
    imported(capsys, "ckpt", "empty", "first", "--tasks", "math")
    back = Checkpoint.open("empty").manifest.task("first")
    math = there.manifest.task("math")
    assert (back.file.sha256, back.file.bytes) == (math.file.sha256, math.file.bytes)
    assert (back.alpha, back.sparsity, back.dtype) == (math.alpha, math.sparsity, math.dtype)
    origin = back.training["imported"]
    assert origin["files"] == {"math": math.file.sha256} and origin["set"] == "math" and origin["error"] == 0
    assert_same(
        merged_logits(prepared / "model", Path("empty"), "first"),
        merged_logits(prepared / "model", Path("ckpt"), "math"),
    )


def test_a_task_set_becomes_one_task(prepared, here, capsys):
    imported(capsys, "ckpt", "empty", "both", "--tasks", "nlu:0.5,math", "--dtype", "float32")
    assert_same(
        merged_logits(prepared / "model", Path("empty"), "both"),
        merged_logits(prepared / "model", Path("ckpt"), "math+nlu:0.5"),
    )
    task = Checkpoint.open("empty").manifest.task("both")
    assert (task.alpha, task.sparsity, task.trained_with) == (16, 0.5, ())


def test_trained_with_is_carried_over_if_the_checkpoint_has_those_tasks(prepared, here, capsys):
    """Two copies of a checkpoint, trained further apart, are united again, templates included."""
    shutil.copytree("ckpt", "fork")
    assert run(capsys, "remove", "fork", "code")[0] == run(capsys, "remove", "fork", "nlu")[0] == 0
    fork = Checkpoint.open("fork")
    values = Checkpoint.open("four").tasks["law"]
    templates = Templates(prompt="{q}!", completion="{a}")
    training = {"settings": {"alpha": 24.0}}
    fork.add_task(
        "law", values, alpha=24.0, sparsity=0.75, trained_with=("math",), templates=templates, training=training
    )
    imported(capsys, "fork", "ckpt", "law", "--tasks", "law")
    back = Checkpoint.open("ckpt").manifest
    assert back.task("law").templates == templates and str(back.as_trained("law")) == "math+law"
    assert back.task("law").training["settings"] == {"alpha": 24.0}
    assert_same(
        merged_logits(prepared / "model", Path("ckpt"), "math+law"),
        merged_logits(prepared / "model", Path("fork"), "all"),
    )
    # Without math, or with another math, law stands alone, with a warning.
    status, _, err = run(capsys, "import", "fork", "--into", "empty", "--name", "law", "--tasks", "law")
    assert (
        status == 0
        and "law was trained on top of math" in err
        and "--tasks math,law imports all of them as one task" in err
    )
    assert Checkpoint.open("empty").manifest.task("law").trained_with == ()


def test_positions_that_another_task_owns_are_refused_with_its_name(here, capsys):
    export(capsys, "ckpt", "math,nlu", "out")
    assert run(capsys, "remove", "ckpt", "nlu")[0] == 0
    message = refused(capsys, "out", "ckpt", "back")
    assert (
        "task 'math' owns 512 of the positions" in message and "13 more modules" in message and "'code'" not in message
    )
    assert "model.layers.0.mlp.down_proj" in message and "loraf-train remove ckpt math" in message
    # With --allow-lossy it is fitted to free positions.
    out = imported(capsys, "out", "ckpt", "back", "--allow-lossy", "--sparsity", "0.75")
    error, least = relative(out, "all")
    assert error > 0.1 and least < 1e-6
    assert run(capsys, "inspect", "ckpt", "--verify")[0] == 0


def test_a_sparsity_that_is_too_high_is_refused_unless_lossy(here, capsys):
    export(capsys, "ckpt", "math", "out")
    message = refused(capsys, "out", "empty", "back", "--sparsity", "0.9")
    assert "not with the values left by a sparsity of 0.9" in message and "use a lower --sparsity" in message
    out = imported(capsys, "out", "empty", "back", "--sparsity", "0.9", "--allow-lossy")
    b = Checkpoint.open("ckpt").tasks["math"]["model.layers.0.self_attn.q_proj"].dense()
    kept = Checkpoint.open("empty").tasks["back"]["model.layers.0.self_attn.q_proj"].dense()
    assert (kept != 0).sum() == 204  # ⌊0.1 · 128 · 16⌋
    # A's rows are nearly orthogonal and equally long, so the largest stay, and nearly as they are.
    assert ((kept != 0) & (b == 0)).sum() == 0 and b[kept != 0].abs().min() > 0.75 * b.abs().view(-1).topk(
        204
    ).values.min()
    assert 0.2 < relative(out, "q_proj")[0] < 0.7


# --- a different A ----------------------------------------------------------------------------------------------------


def mixed_lora(folder: Path, model: Path, checkpoint: Path, patterns: dict) -> dict[str, torch.Tensor]:
    """A LoRA whose A is a linear map of the checkpoint's: A_f = M·A. Returns module → M."""
    foreign_loras.make(folder, model, **patterns)
    opened = Checkpoint.open(checkpoint)
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    maps = {}
    for key in [key for key in tensors if ".lora_A." in key]:
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        mix = torch.randn(len(tensors[key]), RANK, generator=torch.Generator().manual_seed(len(maps)))
        maps[module] = mix
        tensors[key] = (mix.double() @ opened.projection_of(module).double()).float()
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    return maps


@pytest.mark.parametrize("patterns", [{}, foreign_loras.PATTERNS], ids=["plain", "patterns"])
def test_a_linear_map_of_our_a_is_recovered_if_the_sparsity_permits(prepared, here, capsys, patterns):
    mixed_lora(here / "mixed", prepared / "model", here / "empty", patterns)
    message = refused(capsys, "mixed", "empty", "mixed", "--sparsity", "0.5")
    assert "This checkpoint's A could represent it" in message
    out = imported(capsys, "mixed", "empty", "mixed", "--sparsity", "0", "--dtype", "float32")
    error, least = relative(out, "all")
    assert error < 1e-6 and least < 1e-6 and "fitted" in out
    expected = foreign_loras.served_by_peft(Path("mixed"), prepared / "model")
    assert (expected - merged_logits(prepared / "model", Path("empty"), "base")).norm() > 0.1 * expected.norm()
    assert_same(merged_logits(prepared / "model", Path("empty"), "mixed"), expected)
    # With weight 1 the adapter acts as PEFT served it; a half of it is a half of its ΔW.
    opened = Checkpoint.open("empty")
    deltas = foreign_loras.deltas(Path("mixed"), prepared / "model")
    for module, delta in deltas.items():
        half = delta_weight(opened, module, TaskSet.parse("mixed:0.5", ("mixed",)))
        torch.testing.assert_close(half, delta / 2, rtol=1e-3, atol=1e-4 * float(delta.abs().max()))


def test_an_unrelated_a_is_refused_and_the_printed_error_matches_dense_matrices(prepared, here, capsys):
    message = refused(capsys, "lora", "ckpt", "foreign")
    assert "trained on a different A" in message and "loraf-train run" in message and "--allow-lossy" in message
    out = imported(capsys, "lora", "ckpt", "foreign", "--allow-lossy")
    opened = Checkpoint.open("ckpt")  # which verifies that no position belongs to two tasks
    deltas = foreign_loras.deltas(Path("lora"), prepared / "model")
    whole = TaskSet.parse("foreign", opened.manifest.task_names)
    sums = {}
    for module, delta in deltas.items():
        delta = delta.double()
        a = opened.projection_of(module).double()
        kept = delta_weight(opened, module, whole).double()
        outside = delta - delta @ torch.linalg.pinv(a) @ a
        squares = torch.stack([(delta - kept).square().sum(), outside.square().sum(), delta.square().sum()])
        for kind in (module.rsplit(".", 1)[-1], "all"):
            sums[kind] = sums.get(kind, 0) + squares
    assert sums.keys() == {"q_proj", "down_proj", "all"}
    for kind, (lost, outside, delta) in sums.items():
        assert relative(out, kind) == pytest.approx(
            (float((lost / delta).sqrt()), float((outside / delta).sqrt())), rel=2e-3
        )
    assert relative(out, "all")[0] > 0.9 > LARGEST_ERROR
    task = opened.manifest.task("foreign")
    origin = task.training["imported"]
    assert origin["error"] == pytest.approx(relative(out, "all")[0], rel=2e-3) and not origin["taken_over"]
    assert origin["errors"].keys() == {"q_proj", "down_proj"} and origin["source"] == "lora"
    assert origin["file"]["sha256"] == digests(Path("lora"))[WEIGHTS]
    assert (task.alpha, task.sparsity, task.dtype) == (2 * RANK, 0.75, "bfloat16")  # 8/4; those of the last task
    # Modules that it leaves alone hold zeros.
    assert "k_proj" in out and not opened.tasks["foreign"]["model.layers.0.self_attn.k_proj"].values.any()


def test_a_checkpoint_with_another_seed_has_a_different_a(here, capsys):
    message = refused(capsys, "other-a", "ckpt", "guest", "--sparsity", "0.9")
    assert "trained on a different A" in message
    out = imported(capsys, "other-a", "ckpt", "guest", "--allow-lossy", "--sparsity", "0.9")
    assert relative(out, "all")[0] > 0.9
    back = Checkpoint.open("ckpt").manifest.task("guest")
    assert back.alpha == 16 and back.training["imported"]["from"] == "loraf"


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_all_mistakes_are_reported_at_once(here, capsys):
    config = json.loads(Path("lora", CONFIG).read_text())
    Path("lora", CONFIG).write_text(json.dumps(config | {"use_dora": True, "bias": "all"}))
    message = refused(capsys, "lora", "ckpt", "math", "--sparsity", "1", "--tasks", "math")
    for part in (
        "use_dora",
        "bias",
        "task 'math' exists already",
        "1.0 is not in [0, 1)",
        "--tasks: a PEFT directory",
    ):
        assert part in message, part
    assert len(re.findall(r"(?m)^(?:loraf-train: )?\d\. ", message)) == 5


def test_folders_of_the_wrong_kind_are_refused(here, capsys):
    message = refused(capsys, "nowhere", "nothing", "All")
    assert "holds neither loraf.json nor adapter_config.json" in message and "there is no loraf.json" in message
    assert "'All' is not a valid task name" in message
    message = refused(capsys, "ckpt", "empty", "x")
    assert "the checkpoint holds math, nlu, code" in message and "--tasks" in message
    assert "no task 'art'" in refused(capsys, "ckpt", "empty", "x", "--tasks", "art")
    assert "'base' is not a task" in refused(capsys, "ckpt", "empty", "x", "--tasks", "base")
    Path("empty/loraf.json").write_text("{}")
    assert "empty/loraf.json" in refused(capsys, "lora", "empty", "x")


def test_modules_that_the_checkpoint_lacks_or_has_in_another_shape_are_refused(prepared, here, capsys, tmp_path):
    foreign_loras.make(tmp_path / "head", prepared / "model", target_modules=["q_proj", "lm_head"])
    message = refused(capsys, str(tmp_path / "head"), "ckpt", "x")
    assert "changes modules that the checkpoint does not have: lm_head" in message and "target_modules" in message
    wide = standins.make_model("mistral", tmp_path / "wide")
    lora = foreign_loras.make(tmp_path / "shape", wide)
    tensors = safetensors.torch.load_file(lora / WEIGHTS)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    tensors[key] = tensors[key][:100].contiguous()
    safetensors.torch.save_file(tensors, lora / WEIGHTS)
    message = refused(capsys, str(lora), "ckpt", "x", "--allow-lossy")
    assert "model.layers.0.self_attn.q_proj: 100×128, but 128×128 in the checkpoint" in message
    assert "MistralForCausalLM" in message  # the base is another one too


def test_too_few_free_positions_are_refused(here, capsys):
    message = refused(capsys, "lora", "ckpt", "x", "--sparsity", "0.5", "--allow-lossy")
    assert "task 'x' needs 1024 positions" in message and "a sparsity of 0.75 would fit" in message


def test_another_base_is_refused_without_the_option(prepared, here, capsys, tmp_path):
    def name(base) -> None:
        config = json.loads(Path("lora", CONFIG).read_text())
        Path("lora", CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": base}))

    other = standins.make_model("llama", tmp_path / "other", seed=5)
    twin = shutil.copytree(prepared / "model", tmp_path / "twin")
    name(str(other))
    assert "has other weights" in refused(capsys, "lora", "ckpt", "x", "--allow-lossy")
    name("org/some-model")
    message = refused(capsys, "lora", "ckpt", "x", "--allow-lossy")
    assert "is org/some-model, but the checkpoint is for" in message and "--allow-other-base" in message
    imported(capsys, "lora", "ckpt", "accepted", "--allow-lossy", "--allow-other-base", "--sparsity", "0.95")
    name(str(twin))  # the same weights elsewhere
    imported(capsys, "lora", "ckpt", "twin", "--allow-lossy", "--sparsity", "0.95")
    name(None)
    status, _, err = run(
        capsys, "import", "lora", "--into", "ckpt", "--name", "unnamed", "--allow-lossy", "--sparsity", "0.95"
    )
    assert status == 0 and "does not name the adapter's base model" in err
    standins.random_checkpoint(tmp_path / "ckpt2", other, tasks=("law",))
    message = refused(capsys, str(tmp_path / "ckpt2"), "empty", "law")
    assert "has other weights" in message and "--allow-other-base" in message
    imported(capsys, str(tmp_path / "ckpt2"), "empty", "law", "--allow-other-base")


def test_a_value_too_large_for_the_dtype_is_refused(here, capsys):
    tensors = safetensors.torch.load_file(Path("lora", WEIGHTS))
    for key, tensor in tensors.items():
        if "lora_B" in key:
            tensor *= 1e6
    safetensors.torch.save_file(tensors, Path("lora", WEIGHTS))
    message = refused(capsys, "lora", "ckpt", "x", "--allow-lossy", "--dtype", "float16")
    assert "--dtype" in message and "too large for float16" in message


# --- afterwards -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_with_an_imported_task_works_like_any_other(prepared, here, capsys):
    imported(capsys, "lora", "ckpt", "guest", "--allow-lossy", "--sparsity", "0.9")
    status, out, _ = run(capsys, "card", "ckpt")
    assert status == 0 and "imported from a PEFT LoRA, `lora` (approximated, relative error 0.9" in out
    assert run(capsys, "inspect", "ckpt", "--verify")[0] == 0
    export(capsys, "ckpt", "guest", "again")
    assert_same(
        merged_logits(prepared / "model", Path("ckpt"), "guest"),
        foreign_loras.served_by_peft(Path("again"), prepared / "model"),
    )
    assert run(capsys, "remove", "ckpt", "guest")[0] == 0
    assert digests(Path("ckpt")) == digests(prepared / "ckpt")
    assert manifests.read(Path("ckpt")).task_names == ("math", "nlu", "code")
