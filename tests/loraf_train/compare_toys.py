"""Shared by the tests of `loraf-train compare`: two small tasks on a small model, and a comparison of them."""

from __future__ import annotations

import json
from pathlib import Path

from loraf import base_model
from loraf_train.compare.general import general_text
from loraf_train.compare.protocols import Comparison
from loraf_train.sequence import runner
from loraf_train.sequence.preflight import survey

FILE = """
model: base
output: ckpt
retention: off
adapter: {rank: 8, sparsity: 0.6, dtype: float32, target_modules: [q_proj, v_proj, down_proj]}
calibration: {steps: 2}
training: {learning_rate: 5e-2, batch_size: 8, max_steps: 16, dropout: 0}
tasks:
  - name: upper
    data: {train: upper.jsonl, eval: upper.jsonl, limit: 8}
    max_new_tokens: 4
  - name: truth
    data:
      train: truth.jsonl
      limit: 8
      eval:
        one: {file: truth.jsonl, choices: ["true", "false"]}
        two: {file: some.jsonl, choices: ["true", "false"]}
    metric: choice
    max_new_tokens: 6
compare:
  seeds: [3, 4]
  general: general.jsonl
  methods:
    frozen-a: {training: {learning_rate: 3e-2}}
    lora: {alpha: 8, training: {learning_rate: 1e-2}}
    lora-decay: {training: {learning_rate: 1e-2}}
    o-lora: {training: {learning_rate: 1e-2}}
    ewc: {training: {learning_rate: 1e-2}}
    replay: {training: {learning_rate: 1e-2}}
    separate: {training: {learning_rate: 1e-2}}
    joint: {training: {learning_rate: 1e-2}}
    full: {training: {learning_rate: 5e-3}}
"""
ORDERS = ("compare.orders=[[upper, truth], [truth, upper]]",)
SHORT = ("training.max_steps=2",)


def lines(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_data(folder: Path) -> None:
    words = ("ab", "ba", "aa", "bb", "ac", "ca", "cc", "bc", "cb")
    lines(folder / "upper.jsonl", [{"prompt": f"{word}=", "completion": word.upper()} for word in words])
    truth = [{"prompt": f"{'x' if i % 2 else 'y'}{i}?", "completion": "true" if i % 2 else "false"} for i in range(9)]
    lines(folder / "truth.jsonl", truth)
    lines(folder / "some.jsonl", truth[:3])
    lines(folder / "general.jsonl", [{"text": "a plain sentence"}, {"text": "and another one"}])


def comparison(
    folder: Path,
    protocol: str,
    methods: tuple[str, ...],
    seeds: tuple[int, ...] = (3,),
    overrides: tuple[str, ...] = (),
    printed: list[str] | None = None,
    loaded=None,
) -> Comparison:
    """A comparison of `folder`/tasks.yaml, with its results in `folder`/out. Its messages are added to `printed`."""
    prepared, problems, _ = survey(folder / "tasks.yaml", overrides, into_checkpoint=False)
    assert not problems
    config = prepared.config
    return Comparison(
        config=config,
        protocol=protocol,
        methods=methods,
        seeds=seeds,
        data=prepared.data,
        general=general_text(config.compare.general, prepared.tokenizer, prepared.model.context),
        loaded=loaded or runner.load_model(config),
        base=base_model.fingerprint(prepared.model.folder),
        folder=folder / "out",
        part=lambda name: lambda done, total, note="": None,
        say=(printed if printed is not None else []).append,
        base_text=prepared.base_text,
    )
