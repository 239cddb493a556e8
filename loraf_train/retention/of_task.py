"""Retention in one task's training: the penalty before, what was spent and the task's own statistics after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loraf.errors import one_line
from loraf_train.retention.gather import TOKENS_AT_ONCE, gather
from loraf_train.retention.protection import ProtectedTask, Protection
from loraf_train.retention.statistics import encode
from loraf_train.trainer.penalty import NO_PENALTY, Penalty

if TYPE_CHECKING:
    from loraf_train.adapter.layer import TaskValues
    from loraf_train.adapter.trainable_base import TrainableBase
    from loraf_train.data.examples import Example
    from loraf_train.settings.parts import RetentionConfig


class RetentionOfTask:
    """What retention does while a task trains, and when it ends.

    Args:
        settings: None: retention is off, and all of this does nothing.
        protected: the earlier tasks.

    Attributes:
        statistics: content of the task's statistics file, after `gather`; None: there are none.
        failure: why they could not be gathered; empty if they could.
    """

    def __init__(self, settings: RetentionConfig | None, protected: Sequence[ProtectedTask]):
        self._settings = settings
        self._protected = protected
        self._protection: Protection | None = None
        self.statistics: bytes | None = None
        self.failure = ""

    @property
    def budget(self) -> float:
        return self._settings.budget if self._settings else 0.0

    @property
    def is_protecting(self) -> bool:
        """Whether there is an earlier task to protect."""
        return self._settings is not None and bool(self._protected)

    def penalty(self, layers: Mapping[str, TaskValues]) -> Penalty:
        """Returns what is added to the loss while `layers` are trained."""
        if self._settings is None or not self._protected:
            return NO_PENALTY
        self._protection = Protection(layers, self._protected, self._settings.budget)
        return self._protection

    @property
    def spent(self) -> dict[str, float]:
        """Earlier task → root mean square change of its logits by all tasks since, with the layers' present values."""
        return self._protection.changes() if self._protection else {}

    def gather(self, base: TrainableBase, examples: Sequence[Example], seed: int, at_once: int | None) -> None:
        """Gathers the statistics of the task, whose layers are in the model, from its training examples.

        A failure, such as too little memory, does not lose the trained task: it has no statistics then.

        Args:
            at_once: examples that training computes at once; None: as many as `gather` chooses.
        """
        if self._settings is None:
            return
        layers = {name: base.model.get_submodule(name) for name in base.targets}
        tokens = TOKENS_AT_ONCE
        if at_once is not None:
            tokens = min(tokens, at_once * max(len(example.input_ids) for example in examples))
        try:
            statistics = gather(base.model, layers, examples, base.pad_id, seed, tokens_at_once=tokens)  # type: ignore[arg-type]  # get_submodule says Module
            self.statistics = encode(statistics)
        except (RuntimeError, NotImplementedError, ArithmeticError) as error:  # no memory, no embedding, not finite
            self.failure = one_line(error)

    @property
    def record(self) -> dict[str, Any]:
        """What the manifest says of retention in the task's training; empty: no earlier task was protected."""
        return {"budget": self.budget, "spent": self.spent} if self._protection else {}
