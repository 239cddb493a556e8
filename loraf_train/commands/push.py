"""`loraf-train push` and `loraf-train card`: a checkpoint to the hub, and the page that goes with it."""

from __future__ import annotations

import sys
from pathlib import Path

from loraf import manifest as manifests
from loraf.errors import ConfigError, Problem
from loraf.hub import HUB_ID, checkpoint_folder, reason
from loraf_train.commands import card as model_card


def card(source: str, write: bool, name: str | None) -> int:
    """Prints the model card, or writes README.md into the checkpoint's folder.

    Args:
        source: a folder or a hub id.
        name: what the card calls the checkpoint; by default `source`.

    Raises:
        LorafError: there is no checkpoint, or README.md is there already.
    """
    folder = checkpoint_folder(source)
    text = model_card.card(manifests.read(folder), name or source)
    if not write:
        sys.stdout.write(text)
        return 0
    path = folder / model_card.FILE_NAME
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        remedy = "remove it to have it made anew, or leave --write out and take what you need"
        raise ConfigError(Problem("is there already", file=str(path), remedy=remedy)) from None
    except OSError as error:
        message = f"cannot be written ({error.strerror or error})"
        raise ConfigError(
            Problem(message, file=str(path), remedy="leave --write out, and redirect the output")
        ) from None
    print(f"written: {path}")
    return 0


def push(folder: Path, repository: str, private: bool, revision: str | None, message: str | None) -> int:
    """Uploads the manifest, the tasks' files and the model card in one commit, after checking every byte.

    Other files of the folder stay here. Files of tasks that the checkpoint no longer has are taken out of the
    repository in the same commit, so that it is a whole checkpoint at any moment.

    Args:
        repository: `org/name`; it is made where it is missing.
        revision: an existing branch; the repository's main one by default.

    Raises:
        LorafError: no checkpoint, a damaged one, or a hub that does not take it.
    """
    from loraf.checkpoint import Checkpoint

    if not HUB_ID.fullmatch(repository):
        raise ConfigError(Problem(f"{repository!r} is no hub id", "REPO", remedy="write org/name"))
    manifest = Checkpoint.open(folder).manifest
    own = [manifests.FILE_NAME, *(task.file.path for task in manifest.tasks)]
    _, local = model_card.base_name(manifest)
    if local:
        print(
            f"warning: the manifest names the base model as {manifest.base_model.name}, a folder of this machine. "
            "Others see that path and have to know which model is meant.",
            file=sys.stderr,
        )
    readme = folder / model_card.FILE_NAME
    page: bytes | str = str(readme) if readme.is_file() else model_card.card(manifest, repository).encode()
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api = huggingface_hub.HfApi(library_name="loraf")
    title = message or f"LoRAF adapter: {', '.join(manifest.task_names) or 'no task yet'}"
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        there = set(api.list_repo_files(repository, revision=revision))
        stale = sorted(name for name in there - set(own) if name.startswith("tasks/") and name.endswith(".safetensors"))
        operations = [CommitOperationAdd(name, str(folder / name)) for name in own]
        operations.append(CommitOperationAdd(model_card.FILE_NAME, page))
        operations += [CommitOperationDelete(name) for name in stale]
        done = api.create_commit(repository, operations, commit_message=title, revision=revision)
    except Exception as error:  # the hub's client raises many kinds: network, no token, no such branch, refused
        remedy = "log in with `hf auth login` as someone who may write there, check the name and --revision, try again"
        raise ConfigError(Problem(f"the hub does not take it ({reason(error)})", repository, remedy=remedy)) from None
    size = sum(task.file.bytes for task in manifest.tasks)
    print(f"pushed: {len(own)} files ({size:,} bytes of tasks) and the model card, {len(stale)} old files taken out")
    print(f"adapter digest {manifest.adapter_digest}")
    print(done.commit_url)
    return 0
