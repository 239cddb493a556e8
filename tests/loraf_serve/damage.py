"""Damaged copies of a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from loraf import manifest
from tests.loraf_serve.harness import checkpoint_folder


def damaged(tmp_path: Path, damage) -> Path:
    folder = tmp_path / "ckpt"
    shutil.copytree(checkpoint_folder(), folder)
    damage(folder)
    return folder


def flip_a_bit(folder: Path) -> None:
    file = folder / "tasks" / "nlu.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def change_the_seed(folder: Path) -> None:
    """The manifest is whole and its own digest right: only A tells."""
    found = manifest.read(folder)
    projection = dataclasses.replace(found.projection, seed=found.projection.seed + 1)
    (folder / "loraf.json").write_text(dataclasses.replace(found, projection=projection).to_json())


def change_the_manifest(folder: Path) -> None:
    content = json.loads((folder / "loraf.json").read_text())
    content["tasks"][0]["alpha"] = 99.0
    (folder / "loraf.json").write_text(json.dumps(content))


def cut_a_byte(folder: Path) -> None:
    file = folder / "tasks" / "nlu.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
