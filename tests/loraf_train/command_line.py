"""Helpers shared by the tests of the command `loraf-train`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from loraf_train.cli import main

TASKS = """
model: base
output: ckpt
retention: off
adapter: {rank: 8, sparsity: 0.6, dtype: float32}
calibration: {steps: 2}
training: {learning_rate: 2e-2, batch_size: 8, max_steps: 12, dropout: 0}
tasks:
  - name: upper
    data: {train: upper.jsonl, eval: upper.jsonl}
    max_new_tokens: 4
  - name: truth
    data:
      train: truth.jsonl
      prompt: "{q}"
      completion: "{a}"
      eval:
        one: {file: truth.jsonl, choices: ["true", "false"]}
        two: {file: truth.jsonl, choices: ["true", "false"]}
      eval_limit: 5
    metric: choice
    max_new_tokens: 6
"""
THIRD = """
  - {name: third, sparsity: 0.9, data: {train: upper.jsonl}, training: {max_steps: 1}}
"""


def write_data(folder: Path) -> None:
    rows = [{"prompt": f"{word}=", "completion": word.upper()} for word in ("ab", "ba", "aa", "bb", "ac", "ca", "cc")]
    truth = [{"q": f"{'x' if i % 2 else 'y'}{i}?", "a": "true" if i % 2 else "false"} for i in range(9)]
    (folder / "upper.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "truth.jsonl").write_text("".join(json.dumps(row) + "\n" for row in truth))


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Runs a command in this process; returns (exit status, stdout, stderr)."""
    capsys.readouterr()
    try:
        status = main(arguments)
    except SystemExit as ended:
        status = ended.code
    out, err = capsys.readouterr()
    return status, out, err


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def words(line: str) -> list[str]:
    return line.split()
