"""Every tasks.yaml of the pages loads, every accelerate configuration is one, and other code is well-formed."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from loraf.errors import ConfigError
from loraf_train.settings.loading import load
from tests.docs.pages import Block, blocks

SMALLEST: dict[str, Any] = {
    "model": "tiny",
    "output": "./ckpt",
    "tasks": [{"name": "first", "data": {"train": "first.jsonl"}}],
}
RECORD = {"prompt": "1 + 1 =", "completion": "2"}


def is_of_accelerate(content: dict[str, Any]) -> bool:
    return "distributed_type" in content


def is_of_lm_eval(content: dict[str, Any]) -> bool:
    """Tests of lm-evaluation-harness run these (tests/loraf_serve/http/)."""
    return "output_type" in content


def lay_out(folder: Path, content: Any) -> None:
    """Writes a record into each file that the settings name."""
    if isinstance(content, dict | list):
        for part in content.values() if isinstance(content, dict) else content:
            lay_out(folder, part)
    elif isinstance(content, str) and re.search(r"\.(jsonl?|csv|parquet)$", content):
        file = folder / content
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(RECORD) + "\n", encoding="utf-8")


def write_metrics(folder: Path, page: Path) -> None:
    """Writes the Python files that the page shows for its metrics."""
    for block in blocks("python"):
        title = re.match(r"# (\w+\.py)\b", block.text)
        if block.page == page and title:
            (folder / title[1]).write_text(block.text, encoding="utf-8")


def settings_of(block: Block) -> dict[str, Any]:
    """The block's settings. What is not a whole file is completed with the smallest one."""
    content = yaml.safe_load(block.text)
    assert isinstance(content, dict), block
    return content if "model" in content else SMALLEST | content


SETTINGS = [block for block in blocks("yaml") if not is_of_lm_eval(yaml.safe_load(block.text))]


@pytest.mark.parametrize("block", SETTINGS, ids=str)
def test_settings_of_a_page_load(block, tmp_path):
    if is_of_accelerate(yaml.safe_load(block.text)):
        (tmp_path / "accelerate.yaml").write_text(block.text, encoding="utf-8")
        assert load_config_from_file(str(tmp_path / "accelerate.yaml")).num_processes >= 1
        return
    content = settings_of(block)
    lay_out(tmp_path, content)
    write_metrics(tmp_path, block.page)
    (tmp_path / "tasks.yaml").write_text(
        block.text if "model" in yaml.safe_load(block.text) else yaml.safe_dump(content), encoding="utf-8"
    )
    assert len(load(tmp_path / "tasks.yaml").tasks) == len(content["tasks"])


def test_a_wrong_setting_would_be_found(tmp_path):
    lay_out(tmp_path, SMALLEST)
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(SMALLEST | {"traning": {}}), encoding="utf-8")
    with pytest.raises(ConfigError, match="traning"):
        load(tmp_path / "tasks.yaml")


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_compiles_and_imports_names_that_exist(block):
    compile(block.text, str(block), "exec")
    for module, names in re.findall(r"^from (loraf[\w.]*) import (.+)$", block.text, re.MULTILINE):
        for imported in names.split(","):
            assert hasattr(importlib.import_module(module), imported.strip()), f"{module} has no {imported}"


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_is_json(block):
    assert all(json.loads(line) for line in block.text.splitlines())


def test_every_block_has_a_language_that_is_checked_or_shown_only():
    """Text and unnamed blocks are shown only: output, formulas, folders."""
    checked = ("sh", "yaml", "python", "json")
    everything = blocks(*checked, "text", "", "console", "bash", "shell", "py", "yml", "toml")
    assert {block.language for block in everything} <= {*checked, "text", ""}
