"""What clients may name below `--adapter-root`, and that nothing else of the machine can be reached or learned of."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraf import manifest
from loraf.errors import BaseMismatch, CheckpointError, ConfigError, CorruptCheckpoint, LorafError, UnknownTask
from loraf_serve.adapters.root import AdapterRoot, path_problem
from loraf_serve.errors import InvalidRequest
from tests.loraf_serve.harness import checkpoint_folder, model_folder, open_adapter
from tests.standins import make_model


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """`root` with checkpoints, and `outside` with another one, which links try to reach."""
    top = tmp_path_factory.mktemp("tree")
    root, outside = top / "root", top / "outside"
    shutil.copytree(checkpoint_folder(), root / "one")
    shutil.copytree(checkpoint_folder(), root / "team/two")
    shutil.copytree(checkpoint_folder(1), outside / "secret")
    (top / "root-too").mkdir()
    shutil.copytree(checkpoint_folder(1), top / "root-too/one")
    (root / "to-one").symlink_to("one")
    (root / "to-secret").symlink_to(outside / "secret")
    (root / "to-nothing").symlink_to(outside / "nothing")
    (root / "to-outside").symlink_to("../outside")
    (root / "to-sibling").symlink_to("../root-too/one")
    (root / "to-root").symlink_to(".")
    (root / "loop").symlink_to("loop")
    (root / "empty").mkdir()
    (root / "file").write_text("")
    for name, file in (("stolen-task", "tasks/math.safetensors"), ("stolen-manifest", "loraf.json")):
        shutil.copytree(checkpoint_folder(), root / name)
        (root / name / file).unlink()
        (root / name / file).symlink_to(outside / "secret" / file)
    shutil.copytree(checkpoint_folder(), root / "stolen-folder")
    shutil.rmtree(root / "stolen-folder/tasks")
    (root / "stolen-folder/tasks").symlink_to(outside / "secret/tasks")
    for name, file in (("pipe-task", "tasks/nlu.safetensors"), ("pipe-manifest", "loraf.json")):
        shutil.copytree(checkpoint_folder(), root / name)
        (root / name / file).unlink()
        os.mkfifo(root / name / file)
    # As in the hub's cache: a snapshot is a folder of links to files elsewhere in the cache.
    shutil.copytree(checkpoint_folder(), root / "hub/blobs")
    (root / "hub/snapshot/tasks").mkdir(parents=True)
    for file in (root / "hub/blobs").rglob("*.*"):
        link = root / "hub/snapshot" / file.relative_to(root / "hub/blobs")
        link.symlink_to(os.path.relpath(file, link.parent))
    return top


@pytest.fixture(scope="module")
def root(tree) -> AdapterRoot:
    return AdapterRoot(tree / "root", model_folder())


@pytest.mark.parametrize(
    "path", ["one", "one/", "./one", "team/two", "team//two", "to-one", "to-root/one", "hub/snapshot"]
)
@pytest.mark.parametrize("tasks", [(), ("code", "math")])
def test_a_checkpoint_below_the_root_is_read(root, path, tasks):
    found = root.find(path, tasks)
    names = tuple(name for name in ("math", "nlu", "code") if not tasks or name in tasks)
    assert found.manifest.task_names == names
    assert found.served_as("a").file_bytes == sum(
        (checkpoint_folder() / f"tasks/{n}.safetensors").stat().st_size for n in names
    )
    adapter = root.open("a", found)
    expected = open_adapter("b", checkpoint_folder(), tasks or None)
    assert (adapter.name, adapter.tasks, adapter.digest) == ("a", names, expected.digest)
    assert adapter.digest == found.manifest.adapter_digest


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "./",
        "/",
        "..",
        "../outside/secret",
        "one/../../outside/secret",
        "one/../one",
        "~",
        "one\0",
        "x" * 300,
        "x/" * 5000,
        "nowhere",
        "one/nowhere",
        "file",
        "file/one",
        "loop",
        "to-root",
        "to-secret",
        "to-nothing",
        "to-outside",
        "to-outside/secret",
        "to-outside/nothing",
        "to-sibling",
        "to-root/to-secret",
        "stolen-task",
        "stolen-manifest",
        "stolen-folder",
        "pipe-task",
        "pipe-manifest",
    ],
)
def test_no_other_path_is_read(root, tree, path):
    with pytest.raises(InvalidRequest) as refused:
        root.find(path, ())
    assert {problem.field for problem in refused.value.problems} == {"path"}
    assert str(tree) not in str(refused.value) and "secret" not in str(refused.value)


def test_an_absolute_path_is_refused_even_into_the_root(root, tree):
    for path in (tree / "root/one", tree / "outside/secret", tree / "outside/nothing"):
        with pytest.raises(InvalidRequest, match="is absolute"):
            root.find(str(path), ())


@pytest.mark.parametrize(
    ("there", "missing"), [("to-secret", "to-nothing"), ("to-outside/secret", "to-outside/nothing")]
)
def test_existing_and_missing_paths_outside_are_refused_alike(root, there, missing):
    said = []
    for path in (there, missing):
        with pytest.raises(InvalidRequest) as refused:
            root.find(path, ())
        said.append(str(refused.value))
    assert said[0] == said[1]


@given(
    parts=st.lists(
        st.sampled_from(["..", ".", "", "one", "team", "to-outside", "to-root", "secret", "\0", "é", "~", "*"])
    )
)
@settings(deadline=None, max_examples=300)
def test_no_path_leads_out(root, tree, parts):
    try:
        found = root.find("/".join(parts), ())
    except LorafError as error:
        assert str(tree) not in str(root.shown(error))
        return
    assert found.path.is_relative_to(tree / "root") and ".." not in parts


def test_the_root_itself_may_be_reached_through_a_link(tree, tmp_path):
    (tmp_path / "link").symlink_to(tree / "root")
    assert AdapterRoot(tmp_path / "link", model_folder()).find("one", ()).path == tree / "root/one"


def test_an_unknown_task_and_a_folder_without_a_checkpoint_say_so(root):
    with pytest.raises(UnknownTask, match=r"tasks\[1\]: there is no task 'art' → choose from: math, nlu, code"):
        root.find("one", ("math", "art"))
    with pytest.raises(CheckpointError, match="there is no loraf.json"):
        root.find("empty", ())


def test_a_root_that_is_not_a_folder_is_refused(tree):
    for path in (tree / "nowhere", tree / "root/file"):
        with pytest.raises(ConfigError, match="--adapter-root: is not a folder"):
            AdapterRoot(path, model_folder())


def test_refusals_name_files_without_the_servers_folders(tree, tmp_path):
    """Of the root, the model's folder and everything above them a client learns nothing."""
    shutil.copytree(checkpoint_folder(), tmp_path / "root/bad")
    file = tmp_path / "root/bad/tasks/nlu.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    other = make_model("mistral", tmp_path / "models/other", seed=1)
    shutil.copytree(checkpoint_folder(), tmp_path / "root/good")
    for name, kind, says in (("bad", CorruptCheckpoint, "SHA-256"), ("good", BaseMismatch, "other weights")):
        root = AdapterRoot(tmp_path / "root", other, allow_other_base=name == "bad")
        with pytest.raises(kind) as refused:
            root.open("a", root.find(name, ()))
        shown = root.shown(refused.value)
        assert type(shown) is kind and says in str(shown)
        assert str(tmp_path) not in str(shown)
    assert AdapterRoot(tmp_path / "root", other, allow_other_base=True).open("a", root.find("good", ()))


def test_an_unreadable_manifest_is_shown_without_its_path(tree, root, monkeypatch):
    def denied(path, most):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(manifest, "read_bounded", denied)
    with pytest.raises(CheckpointError) as refused:
        root.find("one", ())
    (problem,) = root.shown(refused.value).problems
    assert "Permission denied" in problem.message and str(tree) not in str(problem)


def test_path_problems_are_seen_without_looking_at_the_disk():
    assert path_problem("a/b") is None
    assert path_problem("a..b") is None
    assert path_problem("/a").field == path_problem("").field == "path"
