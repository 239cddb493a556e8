"""Two processes train streamed records, preferences and with early stopping to the values of one process."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loraf.checkpoint import Checkpoint
from tests.standins import make_model

ROOT = Path(__file__).parents[3]
TASKS = """
model: base
output: {output}
adapter: {{rank: 8, sparsity: 0.6, target_modules: [q_proj, down_proj], dtype: float32}}
calibration: {{steps: 2}}
training: {{learning_rate: 1e-2, batch_size: 4, dropout: 0.2}}
tasks:
  - name: streamed
    training: {{max_steps: 6, early_stopping: {{patience: 2, every: 2}}}}
    data: {{train: words.jsonl, eval: words.jsonl, eval_limit: 8, streaming: true}}
    metric: loss
  - name: preferred
    objective: dpo
    training: {{epochs: 1, early_stopping: {{patience: 2}}}}
    data: {{train: pairs.jsonl, eval: pairs.jsonl, eval_limit: 8}}
"""
LAUNCHER = (
    *("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)


def run(folder: Path, output: str, *launcher: str) -> Checkpoint:
    (folder / f"{output}.yaml").write_text(TASKS.format(output=output))
    command = [sys.executable, *launcher, "-m", "loraf_train.cli", "run", f"{output}.yaml"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return Checkpoint.open(folder / output)


@pytest.mark.slow
def test_values_are_those_of_one_process(tmp_path):
    pytest.importorskip("trl")
    make_model("llama", tmp_path / "base")
    chance = random.Random(0)
    words = dict.fromkeys("".join(chance.choices("abcd", k=chance.randint(2, 5))) for _ in range(60))
    records = [{"prompt": f"{word}=", "completion": word.upper()} for word in words]
    # 22 pairs: the last step of an epoch has 2, one for each process.
    pairs = [{"prompt": f"{w}=", "chosen": w.upper(), "rejected": w} for w in list(words)[:22]]
    for name, rows in (("words", records), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = run(tmp_path, "one"), run(tmp_path, "two", *LAUNCHER)
    for name in ("streamed", "preferred"):
        training = [checkpoint.manifest.task(name).training for checkpoint in (one, two)]
        assert training[0]["early_stopping"] == pytest.approx(training[1]["early_stopping"], rel=1e-5)
        for module, b in one.tasks[name].items():
            other = two.tasks[name][module]
            assert torch.equal(b.positions, other.positions)
            torch.testing.assert_close(b.values, other.values, atol=2e-4, rtol=0)
