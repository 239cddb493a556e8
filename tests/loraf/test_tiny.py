"""The embedded base model `tiny` has its documented properties."""

from __future__ import annotations

import importlib.util
import json
from importlib import resources
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = Path(str(resources.files("loraf").joinpath("data/tiny")))
REPOSITORY = Path(__file__).parents[2]
REPORT = json.loads((TINY / "skills.json").read_text())
SAMPLED = ["copy", "reverse", "first_letter", "length", "next_letters", "mask_vowels", "longer", "add"]
EXAMPLES = 60
# Three standard deviations of a mean of SAMPLED × EXAMPLES answers are at most 0.07.
TOLERANCE = 0.07


def script(path: str) -> ModuleType:
    """Imports a script of this repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPOSITORY / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_tiny = script("tools/make_tiny.py")
make_data = script("examples/demo/make_data.py")
tokenizer = AutoTokenizer.from_pretrained(TINY, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(min(2, torch.get_num_threads()))
    return AutoModelForCausalLM.from_pretrained(TINY, local_files_only=True).eval()


def test_the_model_folder_is_small_and_not_pickled():
    files = [path for path in TINY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja", ".md"}


def test_tiny_is_a_mistral_with_a_long_enough_context(model):
    config = model.config
    assert config.architectures == ["MistralForCausalLM"]
    assert config.max_position_embeddings >= 1024
    assert config.sliding_window is None
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.vocab_size == len(tokenizer)
    with torch.inference_mode():
        assert torch.isfinite(model(torch.full((1, 1024), 5)).logits).all()


# Names of special tokens in a text are read as those tokens, as with every tokenizer of this kind.
ANY_TEXT = st.text(st.characters(codec="utf-8")).filter(lambda text: "<" not in text)


@given(ANY_TEXT)
@settings(max_examples=200, deadline=None)
def test_any_text_round_trips(text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == 1 + len(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", ["", "\n", " a  b .", "🙂👩‍👩‍👧 naïve\r\n\t…", "a <b> c </d>", "\x00"])
def test_selected_texts_round_trip(text):
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_the_tokenizer_adds_one_bos_and_no_eos():
    assert tokenizer("a")["input_ids"].count(tokenizer.bos_token_id) == 1
    assert tokenizer("a", add_special_tokens=False)["input_ids"] == tokenizer("a")["input_ids"][1:]
    assert tokenizer.eos_token_id not in tokenizer("a")["input_ids"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Copy: a"}], add_generation_prompt=True)
    assert chat["input_ids"] == tokenizer("Copy: a\n")["input_ids"]


def test_tiny_has_the_documented_skills(model):
    """It fails if the model was rebuilt without its skills.json."""
    assert len(REPORT["skills"]) >= 15
    assert set(REPORT["skills"]) == set(make_tiny.SKILLS)
    measured = make_tiny.score(model, tokenizer, EXAMPLES, seed=20_000, names=SAMPLED)
    stated = {name: REPORT["skills"][name]["accuracy"] for name in SAMPLED}
    assert sum(measured.values()) >= sum(stated.values()) - TOLERANCE * len(SAMPLED), (measured, stated)


@pytest.mark.parametrize("task", make_data.TASKS)
def test_tiny_does_not_know_the_demo_tasks(model, task):
    records = make_data.records(task, 100, seed=0)
    given = make_tiny.answers(model, tokenizer, [record["prompt"] for record in records])
    right = sum(answer == record["completion"] for answer, record in zip(given, records, strict=True))
    assert right <= 20


@pytest.mark.parametrize("task", make_data.TASKS)
def test_demo_data_is_the_same_every_time_and_held_out(task):
    made = make_data.records(task, 300, seed=0)
    assert made == make_data.records(task, 300, seed=0)
    assert len({record["prompt"] for record in made}) == 300
    assert max(len(record["prompt"] + record["completion"]) for record in made) <= 48
