"""The base model's own skills, protected like an earlier task of which all tasks of a checkpoint are later ones.

Their statistics are gathered from general text with no task on, at the start of every run that trains something. They
are not stored: the same text and seed give the same again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from loraf.checkpoint import Checkpoint
from loraf.errors import ConfigError, Problem, one_line
from loraf_train.adapter import model_limits, sharding
from loraf_train.adapter.layer import EarlierTasks
from loraf_train.adapter.trainable_base import TrainableBase, attached, earlier_tasks
from loraf_train.data.examples import digest_of
from loraf_train.processes import group
from loraf_train.retention import base_text
from loraf_train.retention.gather import gather
from loraf_train.retention.protection import ProtectedTask
from loraf_train.retention.statistics import Statistics, rounded
from loraf_train.settings.data import RecordSource
from loraf_train.trainer.order import derived_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loraf_train.data.examples import Example
    from loraf_train.settings.config import RunConfig

NAME = "base"  # among the protected tasks; loraf.tasksets reserves it
# Below that of a task: general text is so varied that every new task has to change some of it, and at a task's price it
# learns less (benchmarks/base_drift.py).
PRICE = 0.3


@dataclass(frozen=True)
class ProtectedBase:
    """The base model with the statistics of its own skills.

    Attributes:
        text: digest of the general text that they were gathered from.
    """

    statistics: Statistics
    text: str

    def as_task(self, checkpoint: Checkpoint) -> ProtectedTask:
        """Returns it as the next task to be trained sees it."""
        names = checkpoint.manifest.task_names
        later = {module: earlier_tasks(checkpoint, names, module) for module in checkpoint.manifest.modules}
        return ProtectedTask(NAME, self.statistics, later, price=PRICE)


def protected_base(
    base: TrainableBase,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    text: Sequence[Example] | None = None,
) -> ProtectedBase | None:
    """Gathers the statistics of the base model's skills; None: the file does not ask for it.

    Args:
        text: the general text that `config` names; None: it is read here.

    Raises:
        ConfigError: the text cannot be read or written, or the processes of this run have not the same.
    """
    source = None if config.retention is None else config.retention.base
    if source is None:
        return None
    if not isinstance(source, RecordSource):
        if sharding.is_sharded(base.model):
            raise ConfigError(base_text.sharded_problem(str(config.file)))
        with _said_of_the_base("no text can be written with", config):
            text = base_text.write(base.model, tokenizer, base.pad_id, config.seed)
    elif not text:
        limits = model_limits.context(base.model), model_limits.vocabulary(base.model)
        text = base_text.read(source, tokenizer, *limits)
    digest = digest_of(text)
    if not group.agree(int(digest[:15], 16), base.model.device):
        message = "the processes of this run protect the base model with different texts"
        remedy = "name one file of general text that all of them see"
        raise ConfigError(Problem(message, base_text.FIELD, str(config.file), remedy))
    none = {module: torch.empty(0, dtype=torch.int64) for module in base.targets}
    layers = base.layers(none, 1.0, dict.fromkeys(base.targets, EarlierTasks.of(())))
    with attached(base.model, layers), _said_of_the_base("no statistics can be gathered of", config):
        statistics = gather(base.model, layers, text, base.pad_id, derived_seed(config.seed, NAME))
    return ProtectedBase(rounded(statistics), digest)


@contextmanager
def _said_of_the_base(what: str, config: RunConfig) -> Iterator[None]:
    """Turns what torch raises (no memory, no embedding, values that are not finite) into a ConfigError."""
    try:
        yield
    except (RuntimeError, NotImplementedError, ArithmeticError) as error:
        message = f"{what} the base model ({one_line(error)})"
        remedy = "set it to off, or try precision: float32, or a machine with more memory"
        raise ConfigError(Problem(message, base_text.FIELD, str(config.file), remedy)) from error
