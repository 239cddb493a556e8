"""A checkpoint is compared with the model on disk before anything is computed from the shapes that it states."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from loraf import manifest as manifests
from loraf.errors import BaseMismatch
from loraf.manifest import Manifest, positions_per_matrix
from loraf_serve.adapters import checkpoint_folder
from loraf_serve.adapters.adapter_spec import open_adapter, parse_spec
from loraf_serve.adapters.model_shapes import misfits
from tests import standins


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return standins.make_model("llama", tmp_path_factory.mktemp("model"))


def reshaped(folder: Path, **sizes: int) -> Manifest:
    """Changes the shape of the first module, so that everything else fits."""
    manifest = manifests.read(folder)
    name = next(iter(manifest.modules))
    modules = manifest.modules | {name: dataclasses.replace(manifest.modules[name], **sizes)}
    k = {module: positions_per_matrix(0.75, shape.d_out, manifest.rank) for module, shape in modules.items()}
    tasks = tuple(dataclasses.replace(task, k=k) for task in manifest.tasks)
    changed = dataclasses.replace(manifest, modules=modules, tasks=tasks)
    (folder / manifests.FILE_NAME).write_text(changed.to_json(), encoding="utf-8")
    return changed


def test_a_checkpoint_of_the_model_fits(model, tmp_path):
    standins.random_checkpoint(tmp_path, model, ("math",))
    assert misfits(manifests.read(tmp_path), model, "ckpt") == []
    assert misfits(manifests.read(tmp_path), tmp_path, "ckpt") == []  # no model there: reported elsewhere


def test_another_shape_is_refused_before_a_value_is_read(model, tmp_path, monkeypatch):
    standins.random_checkpoint(tmp_path, model, ("math",))
    name = next(iter(reshaped(tmp_path, d_in=1 << 20).modules))
    monkeypatch.setattr(checkpoint_folder, "read_values", lambda adapter: pytest.fail("values were read"))
    with pytest.raises(BaseMismatch) as caught:
        open_adapter(parse_spec(f"x={tmp_path}"), model, allow_other_base=True)
    (problem,) = caught.value.problems
    assert problem.field == name and "1048576) in the checkpoint" in problem.message


def test_a_module_that_the_files_name_otherwise_has_a_bound(model, tmp_path):
    standins.random_checkpoint(tmp_path, model, ("math",))
    manifest = manifests.read(tmp_path)
    renamed = {f"language_{name}": module for name, module in manifest.modules.items()}
    assert misfits(dataclasses.replace(manifest, modules=renamed), model, "ckpt") == []
    first = next(iter(renamed))
    huge = renamed | {first: dataclasses.replace(renamed[first], d_in=1 << 24)}
    (problem,) = misfits(dataclasses.replace(manifest, modules=huge), model, "ckpt")
    assert problem.field == first and "larger than anything in the model" in problem.message


def test_all_modules_together_are_no_larger_than_the_model(model, tmp_path):
    """Each of them alone could be in the model; A of all would be computed for an hour."""
    standins.random_checkpoint(tmp_path, model, ("math",))
    manifest = manifests.read(tmp_path)
    spec = dataclasses.replace(next(iter(manifest.modules.values())), d_out=1, d_in=1 << 13)
    few, many = ({f"layer.{i}": spec for i in range(count)} for count in (8, 1000))
    assert misfits(dataclasses.replace(manifest, modules=few), model, "ckpt") == []
    (problem,) = misfits(dataclasses.replace(manifest, modules=many), model, "ckpt")
    assert problem.field == "modules" and "together larger than the model" in problem.message
