"""`loraf-train push` and `loraf-train card`: upload a checkpoint to the hub, and print its model card."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable
from pathlib import Path

from loraf import manifest as manifests
from loraf.errors import ConfigError, Problem, one_line
from loraf.hub import HUB_ID, checkpoint_folder, loaded_from_hub, split_revision
from loraf_train import card as model_card
from loraf_train.terminal import tables


def card(source: str, write: bool, name: str | None, with_statistics: bool = False) -> int:
    """Prints the model card, or writes README.md into the checkpoint's folder.

    Args:
        source: a folder or a hub id, which may be followed by `#` and a revision.
        write: whether to write the file instead of printing.
        name: the checkpoint's name on the card; None: `source`, without a revision.
        with_statistics: whether the card is for a checkpoint that is pushed with its statistics.

    Raises:
        LorafError: there is no checkpoint, or README.md already exists.
    """
    folder = checkpoint_folder(source)
    manifest = manifests.read(folder)
    if not with_statistics and not loaded_from_hub(folder):
        manifest = manifest.without_statistics()
    text = model_card.card(manifest, name or split_revision(source)[0])
    if not write:
        sys.stdout.write(text)
        return 0
    path = folder / model_card.FILE_NAME
    try:
        with open(path, "w" if model_card.is_generated(path) else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        remedy = "delete it to generate a new one, or leave --write out and copy what you need"
        raise ConfigError(Problem("already exists", file=str(path), remedy=remedy)) from None
    except OSError as error:
        message = f"cannot be written ({error.strerror or error})"
        raise ConfigError(
            Problem(message, file=str(path), remedy="leave --write out, and redirect the output")
        ) from None
    print(f"written: {path}")
    return 0


def push(
    folder: Path,
    repository: str,
    private: bool,
    revision: str | None,
    message: str | None,
    with_statistics: bool = False,
) -> int:
    """Uploads the manifest, the tasks' files and the model card in one commit, after verifying every byte.

    Other files in the folder are not uploaded. Without their statistics, the manifest does not name them. The same
    commit deletes files of tasks and statistics that the uploaded manifest does not name, so that the repository is a
    whole checkpoint at any moment.

    Args:
        repository: `org/name`; it is created if missing.
        private: whether to create it as private.
        revision: an existing branch; None: the repository's main branch.
        message: of the commit; None: a line that names the tasks.
        with_statistics: whether to upload the tasks' statistics too.

    Raises:
        LorafError: there is no checkpoint, it is damaged, or the upload failed.
    """
    from loraf.checkpoint import Checkpoint

    if not HUB_ID.fullmatch(repository):
        raise ConfigError(Problem(f"{repository!r} is not a hub id", "REPO", remedy="write org/name"))
    checkpoint = Checkpoint.open(folder)
    manifest = checkpoint.manifest if with_statistics else checkpoint.manifest.without_statistics()
    if with_statistics:
        checkpoint.verify_statistics()
    statistics = [task.statistics for task in manifest.tasks if task.statistics is not None]
    manifest_file: bytes | str = str(folder / manifests.FILE_NAME)
    if manifest != checkpoint.manifest:
        manifest_file = manifest.to_json().encode()
    files: dict[str, bytes | str] = {
        manifests.FILE_NAME: manifest_file,
        **{f.path: str(folder / f.path) for f in (*(task.file for task in manifest.tasks), *statistics)},
    }
    _, local = model_card.base_name(manifest)
    if local:
        print(
            f"warning: the manifest names {manifest.base_model.name}, a folder on this machine, as the base model. "
            "Others will see that path, and cannot tell from it which model is meant.",
            file=sys.stderr,
        )
    readme = folder / model_card.FILE_NAME
    page: bytes | str = str(readme)
    if not readme.is_file() or model_card.is_generated(readme):
        page = model_card.card(manifest, repository).encode()
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api = huggingface_hub.HfApi(library_name="loraf")
    title = message or f"LoRAF adapter: {', '.join(manifest.task_names) or 'no task yet'}"
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        stale = _stale(api.list_repo_files(repository, revision=revision), files)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, content) for name, content in files.items()),
            CommitOperationAdd(model_card.FILE_NAME, page),
            *(CommitOperationDelete(name) for name in stale),
        ]
        commit = api.create_commit(repository, operations, commit_message=title, revision=revision)
    except Exception as error:  # the hub's client raises many kinds: network, no token, no such branch, refused
        remedy = "log in with `hf auth login` as a user with write access, check the name and --revision, and try again"
        raise ConfigError(
            Problem(f"the upload to the hub failed ({one_line(error)})", repository, remedy=remedy)
        ) from None
    size = sum(task.file.bytes for task in manifest.tasks)
    removed = f"; deleted {tables.counted(len(stale), 'old file')}" if stale else ""
    of_statistics = f", {sum(file.bytes for file in statistics):,} of statistics" if statistics else ""
    print(f"pushed {len(files)} files ({size:,} bytes of tasks{of_statistics}) and the model card{removed}")
    if statistics:
        print(f"the statistics {model_card.REVEALED}")
    if manifest != checkpoint.manifest:
        print("left out the tasks' statistics; --with-statistics uploads them too")
    print(f"adapter digest {manifest.adapter_digest}")
    print(commit.commit_url)
    return 0


def _stale(present: Iterable[str], kept: Container[str]) -> list[str]:
    """Files of tasks and of statistics in a repository that are not in the checkpoint."""
    folders = ("tasks/", "statistics/")
    return sorted(
        name for name in present if name.startswith(folders) and name.endswith(".safetensors") and name not in kept
    )
