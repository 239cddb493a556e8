"""The general text that the drift of the base is measured on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraf.errors import ConfigError
from loraf_train.compare.general import general_text
from loraf_train.sequence.base_checks import load_tokenizer
from loraf_train.settings.data import RecordSource
from tests.loraf_train.compare_toys import write_data
from tests.standins import make_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_model("llama", tmp_path_factory.mktemp("model") / "base"))


@pytest.fixture
def folder(tmp_path) -> Path:
    write_data(tmp_path)
    return tmp_path


def test_general_text_longer_than_the_context_is_divided_and_every_token_counts(folder, tokenizer):
    (folder / "long.jsonl").write_text(json.dumps({"text": "a" * 100}) + "\n" + json.dumps({"text": ""}) + "\n")
    general = general_text(RecordSource(file=folder / "long.jsonl"), tokenizer, 40)
    assert [len(e.example.input_ids) for e in general.examples] == [40, 40, 21]  # <s> and 100 bytes
    assert general.tokens == 101 - 3  # the first of each piece is predicted from nothing


def test_general_records_may_have_a_prompt(folder, tokenizer):
    general = general_text(RecordSource(file=folder / "upper.jsonl"), tokenizer, 1024)
    assert general.tokens == 9 * 3  # two letters and the end of sequence


@pytest.mark.parametrize("record", [{"text": 3}, {"text": ""}])
def test_general_text_that_is_missing_or_too_short_is_refused(folder, tokenizer, record):
    (folder / "odd.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(ConfigError, match=r"odd\.jsonl"):
        general_text(RecordSource(file=folder / "odd.jsonl"), tokenizer, 1024)
