"""`benchmarks/peft_steps.py` on a toy model: both ways train the same values, and every cell has its ratio."""

from __future__ import annotations

import pytest

from benchmarks import peft_steps

TOY = ["--shape", "toy", "--rank", "8", "--sequence", "16", "--batch", "2", "--threads", "1", "--rounds", "2"]


def test_every_cell_is_measured():
    result = peft_steps.main(peft_steps.parser().parse_args(TOY))
    assert [(row["tasks"], row["peft_to_loraf_train"]["n"]) for row in result["cells"]] == [(1, 2)] * 2 + [(2, 2)] * 2


def test_ways_that_train_other_values_are_not_timed(monkeypatch):
    monkeypatch.setattr(peft_steps.Pair, "difference", lambda self: 1.0)
    with pytest.raises(SystemExit, match="do not train the same values"):
        peft_steps.main(peft_steps.parser().parse_args(TOY))
