"""`attn_implementation`: passed on to transformers, or refused where model or machine lack it."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig

from loraf.errors import ConfigError
from loraf_train.sequence import runner
from loraf_train.sequence.base_checks import attention_problem
from loraf_train.sequence.preflight import survey
from tests.loraf_train import toys
from tests.standins import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", ["eager", "sdpa", None])
def test_the_model_computes_attention_as_the_file_says(folder, tmp_path, name):
    config = toys.run_config(folder, tmp_path / "ckpt", toys.task("one"), attn_implementation=name)
    model = runner.load_model(config)[0]
    assert model.config._attn_implementation == (name or "sdpa")


def test_packing_looks_at_the_implementation_that_is_used(folder, tmp_path):
    """An eager mask is one of numbers, and has to keep packed examples apart as well."""
    task = toys.task("one", training={"packing": True, "max_length": 40})
    config = toys.run_config(folder, tmp_path / "ckpt", task, attn_implementation="eager")
    runner.run(config, {"one": toys.data(3)})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have it")
@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_without_a_gpu_is_refused(folder, name):
    problem = attention_problem(folder, name, "tasks.yaml")
    assert problem is not None and (problem.field, problem.file) == ("attn_implementation", "tasks.yaml")
    assert "runs on GPUs" in problem.message and problem.remedy


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has it")
def test_flex_attention_without_a_gpu_is_refused(folder, tmp_path):
    """torch computes it there, but not its gradient."""
    config = toys.run_config(folder, tmp_path / "ckpt", toys.task("one"), attn_implementation="flex_attention")
    with pytest.raises(ConfigError, match="attn_implementation: flex_attention trains on GPUs only"):
        runner.load_model(config)


def test_what_the_architecture_lacks_is_refused_before_the_weights_are_loaded(tmp_path):
    config = AutoConfig.for_model("bloom", hidden_size=32, n_head=2, n_layer=1, vocab_size=320)
    config.save_pretrained(tmp_path)
    problem = attention_problem(tmp_path, "flex_attention", "tasks.yaml")
    assert problem is not None and problem.field == "attn_implementation" and "flex_attention" in problem.message


def test_check_reports_it_with_the_other_mistakes(folder, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    (tmp_path / "tasks.yaml").write_text(
        f"model: {folder}\noutput: ckpt\nattn_implementation: flash_attention_3\n"
        "adapter: {rank: 8, target_modules: [q_proj, nothing]}\ntasks: [{name: a, data: {train: a.jsonl}}]\n"
    )
    if torch.cuda.is_available():
        pytest.skip("a GPU may have it")
    _, problems, _ = survey(tmp_path / "tasks.yaml")
    assert [p.field for p in problems] == ["adapter.target_modules", "attn_implementation"]
