"""The page of other trainers' keys: each of ours is a setting, and each of PEFT's and TRL's is one of theirs."""

from __future__ import annotations

import re

import pytest
from peft import LoraConfig, PeftModel
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, EarlyStoppingCallback

from loraf_train.settings.config import RunFile, TaskEntry
from loraf_train.settings.problems import model_in
from tests.docs.pages import ROOT, read

PAGE = ROOT / "docs/how-to/coming-from.md"
NONE = "–"


def rows() -> list[list[str]]:
    """The cells of every row whose first cell is a key of tasks.yaml."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in read(PAGE).splitlines() if "|" in line]
    return [row for row in cells if re.fullmatch(r"`[\w.\[\]]+`", row[0])]


ROWS = rows()


def is_setting(key: str) -> bool:
    model: type[BaseModel] | None = RunFile
    if key.startswith(("tasks[].", "data.")):
        key, model = key.removeprefix("tasks[]."), TaskEntry
    for part in key.split("."):
        if model is None or part not in model.model_fields:
            return False
        model = model_in(model.model_fields[part].annotation)
    return True


def test_there_are_rows():
    assert len(ROWS) >= 35
    assert {"adapter.rank", "training.epochs", "data.train"} <= {row[0].strip("`") for row in ROWS}


@pytest.mark.parametrize("key", [row[0].strip("`") for row in ROWS])
def test_our_key_is_a_setting(key):
    assert is_setting(key), f"tasks.yaml has no {key}"


def test_a_key_that_is_no_setting_would_be_found():
    assert not is_setting("adapter.lora_rank")
    assert not is_setting("training.rank")


@pytest.mark.parametrize("cell", [row[1] for row in ROWS if row[1] != NONE])
def test_peft_and_trl_have_theirs(cell):
    import inspect

    import trl

    known = {name for config in (LoraConfig, trl.SFTConfig, trl.DPOConfig) for name in config.__dataclass_fields__}
    known |= set(inspect.signature(EarlyStoppingCallback.__init__).parameters)
    known |= set(inspect.signature(trl.SFTTrainer.__init__).parameters)
    known |= {"revision", "dtype", "quantization_config", "attn_implementation"}  # of transformers' from_pretrained
    for name in re.findall(r"`(\w+)`", cell.removeprefix("column ")):
        column = cell.startswith("column ")
        is_known = name in known or hasattr(trl, name) or hasattr(PeftModel, name) or name == "IterableDataset"
        assert column or is_known or hasattr(AutoModelForCausalLM, name), name
