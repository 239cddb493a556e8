"""Direct preference optimisation: the loss of TRL's DPOTrainer, in this project's order and with its own reference.

TRL computes the loss from the log probabilities of both answers under the model and under a reference. The reference is
the model without the values in training (`adapter.reference`), so no second model is held. A step's loss is the mean
over its pairs, however they are divided into micro-batches and over processes; TRL's own is a mean of means.

This module is imported where a task asks for it: TRL is an extra.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from loraf_train.adapter.dropout import TokenKeys
from loraf_train.adapter.reference import values_off
from loraf_train.data.examples import IGNORED
from loraf_train.data.preferences import Pair
from loraf_train.trainer import batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PairCollator:
    """Makes a batch of numbered pairs: the chosen answers' rows, then the rejected ones'.

    Besides what TRL's loss reads, the batch has `labels`, one for each pair that is not a blank: the Trainer divides by
    their number in the whole step.
    """

    def __init__(self, pad_id: int):
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        self._collator = DataCollatorForPreference(pad_token_id=pad_id)

    def __call__(self, numbered: Sequence[tuple[int, Pair]]) -> dict[str, torch.Tensor]:
        """Returns TRL's batch; EXAMPLES and PLACES, each (2·pairs, width) int64; labels, (pairs, 2) int64."""
        batch: dict[str, torch.Tensor] = self._collator([_for_trl(pair) for _, pair in numbered])
        width = batch["input_ids"].shape[1]
        # Each answer is an example of its own to dropout.
        numbers = torch.tensor([2 * n + answer for answer in (0, 1) for n, _ in numbered])
        real = batch["completion_mask"].sum(1).chunk(2)[0] > 0
        labels = torch.full((len(numbered), 2), IGNORED)
        labels[real, 1] = 0  # the Trainer does not count the first one: nothing predicts it
        places = torch.arange(width).expand(len(numbers), -1).contiguous()
        return batch | {
            batches.EXAMPLES: numbers[:, None].expand(-1, width).contiguous(),
            batches.PLACES: places,
            "labels": labels,
        }


def blank(pad_id: int) -> Pair:
    """A pair without an answer, which changes neither the loss nor a gradient."""
    from loraf_train.data.examples import Example

    return Pair(Example([pad_id], prompt_length=1), Example([pad_id], prompt_length=1))


def _for_trl(pair: Pair) -> dict[str, list[int]]:
    begin = max(1, pair.chosen.prompt_length)
    ids = pair.chosen.input_ids
    return {
        "prompt_ids": ids[:begin],
        "chosen_ids": ids[begin:],
        "rejected_ids": pair.rejected.input_ids[begin:],
    }


@contextmanager
def log_probability_head(model: PreTrainedModel) -> Iterator[None]:
    """Lets the model return log probabilities of its answers as TRL's loss asks for them, for a `with` block."""
    from trl.trainer.utils import add_fused_lm_head

    before = vars(model).get("forward")
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before


def trainer_class(of_steps: type[transformers.Trainer], beta: float) -> type[Any]:
    """Returns a Trainer that takes this project's steps with TRL's loss.

    Args:
        of_steps: `loop`'s Trainer.
        beta: how strongly the model is held to the reference.
    """
    from trl.trainer.dpo_trainer import DPOTrainer

    class PreferenceTrainer(of_steps, DPOTrainer):  # type: ignore[misc, valid-type]  # a class made here
        """TRL's constructor is left out: it loads a second model, tokenizes, and changes model and tokenizer."""

        tokens: TokenKeys | None

        def __init__(self, **arguments: Any):
            transformers.Trainer.__init__(self, **arguments)
            self.loss_is_scaled_for_ga = True  # by `compute_loss`
            self.beta = beta
            self.loss_types, self.loss_weights = ["sigmoid"], [1.0]
            self.precompute_ref_logps = True  # this class computes them for each batch
            self.ref_model = None
            self.ld_alpha = None
            self.label_smoothing = 0.0
            self.f_divergence_type, self.f_alpha_divergence_coef = "reverse_kl", 1.0
            self.use_weighting = self.aux_loss_enabled = False
            self.router_aux_loss_coef = 0.0
            self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
            self._total_train_tokens, self._tp_size = 0, 1

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            return transformers.Trainer.training_step(self, *args, **kwargs)

        def compute_loss(
            self,
            model: nn.Module,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: torch.Tensor | int | None = None,
        ) -> Any:
            examples, places = inputs.pop(batches.EXAMPLES), inputs.pop(batches.PLACES)
            labels = inputs.pop("labels")
            assert isinstance(self.model, nn.Module)
            with values_off(self.model):
                logs = DPOTrainer.compute_ref_log_probs(self, self.model, inputs)  # type: ignore[no-untyped-call]
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = logs
            if self.tokens is not None:
                self.tokens.set(self.state.global_step, examples, places)
            mean = DPOTrainer.compute_loss(self, model, inputs)  # type: ignore[no-untyped-call]
            real = (labels[:, 1] != IGNORED).sum()
            total = mean * len(labels) - (len(labels) - real) * math.log(2)  # a blank's loss, whatever the model
            return total / (real if num_items_in_batch is None else num_items_in_batch) * self.args.world_size

    return PreferenceTrainer
