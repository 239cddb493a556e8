"""What a file may not say of a task that is finished: the remedy is something that the file may say."""

from __future__ import annotations

import pytest

from loraf.errors import ConfigError
from loraf_train.sequence import runner
from loraf_train.settings.parts import EarlyStoppingConfig
from tests.loraf_train import toys
from tests.standins import make_model


def test_the_remedy_for_an_edited_setting_may_be_written_so(tmp_path):
    folder, task = make_model("llama", tmp_path / "model"), toys.task("one", training={"max_steps": 1})
    runner.run(toys.run_config(folder, tmp_path / "ckpt", task), {"one": toys.data(3)})
    training = {"early_stopping": EarlyStoppingConfig(patience=3), "beta": 0.1}
    data = {"streaming": True, "prompt": "{q}"}
    edited = task.model_copy(
        update={
            "training": task.training.model_copy(update=training),
            "data": task.data.model_copy(update=data),
        }
    )
    with pytest.raises(ConfigError) as caught:
        runner.run(toys.run_config(folder, tmp_path / "ckpt", edited), {"one": toys.data(3)})
    text = str(caught.value)
    for part in (
        "early_stopping: task 'one' was trained with none, but the file says {patience: 3} → leave it out, give",
        "beta: task 'one' was trained with none, but the file says 0.1 → leave it out",
        "data.streaming: task 'one' was trained with false, but the file says true → set it to false",
        "data.prompt: task 'one' was trained with none, but the file says '{q}' → leave it out",
    ):
        assert part in text, text
    assert len(caught.value.problems) == 4
