"""The examples' configurations load, and the paper's says what the paper says."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from loraf.manifest import positions
from loraf_train.config import load

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "tests" / "fixtures" / "records"
NLU_SETS = ("boolq", "piqa", "social_i_qa", "arc_easy", "arc_challenge", "openbookqa")
# Mistral-7B: d_out of each projection, 32 layers (its config.json: hidden 4096, 8 key/value heads of 128, MLP 14336).
MISTRAL_D_OUT = (4096, 1024, 1024, 4096, 14336, 14336, 4096)
MISTRAL_LAYERS = 32


def test_the_paper_s_configuration(tmp_path):
    shutil.copy(ROOT / "examples" / "mistral-7b" / "tasks.yaml", tmp_path)
    shutil.copytree(RECORDS / "gsm8k", tmp_path / "data" / "gsm8k")
    for name in NLU_SETS:  # two of them have no committed records; any of the same form do for loading
        source = RECORDS / "nlu" / name
        shutil.copytree(source if source.exists() else RECORDS / "nlu" / "boolq", tmp_path / "data" / "nlu" / name)
    config = load(tmp_path / "tasks.yaml")
    math, nlu = config.tasks

    assert (config.model, config.adapter.rank) == ("mistralai/Mistral-7B-v0.1", 64)
    assert (math.alpha, math.training.learning_rate, math.training.epochs) == (64, 5e-4, 3)
    assert (nlu.alpha, nlu.training.learning_rate, nlu.training.epochs) == (128, 1e-4, 1)
    for task in (math, nlu):
        training = task.training
        assert (task.sparsity, task.start) == (0.9, "previous")
        assert (training.batch_size, training.dropout, training.warmup_steps) == (32, 0.05, 0)
    assert set(nlu.data.eval) == set(NLU_SETS)
    k = MISTRAL_LAYERS * sum(positions(0.9, d_out, 64) for d_out in MISTRAL_D_OUT)
    assert k == 8_807_936  # «8.8M» in the paper


def test_the_demo_s_configuration(tmp_path):
    demo = ROOT / "examples" / "demo"
    spec = importlib.util.spec_from_file_location("make_data", demo / "make_data.py")
    make_data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_data)
    make_data.main(["--out", str(tmp_path / "data")])
    shutil.copy(demo / "tasks.yaml", tmp_path)
    config = load(tmp_path / "tasks.yaml")
    assert [task.name for task in config.tasks] == list(make_data.TASKS)
    assert sum(1 - task.sparsity for task in config.tasks) <= 1
