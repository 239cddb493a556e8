"""The methods of a comparison. All train through `trainer.loop.fit`, with the same examples in the same order.

    loraf.py       loraf         this project: calibrated positions, K values each, with the file's retention
                   loraf-paper   the same without retention: the paper's Algorithm 1
                   random-mask   without retention, positions drawn at random among the free ones
    frozen_a.py    frozen-a      the same A, but one dense B that all tasks share
    lora.py        lora          PEFT's LoRA; an earlier task's adapter is merged, and a fresh one put on top
                   lora-decay    the same with weight decay
                   o-lora        the same with a penalty on rows of A that are not orthogonal to earlier ones
    shared_lora.py ewc           one LoRA that every task trains on, held by elastic weight consolidation
                   replay        one LoRA that every task trains on, with some earlier examples mixed in
    bounds.py      separate      one LoRA for each task, from the base: never on together; an upper bound
                   joint         one LoRA on the examples of all tasks at once; an upper bound
    full.py        full          all parameters of the model, bfloat16 ones as float32 copies

base.py has what they share, penalties.py the terms that o-lora and ewc add to the loss.

`Method.train` trains tasks one after the other and calls a Listener, which measures at the right moments. When it
returns, the model is the bare base again, bit for bit. Everything is measured in the form that would be served: with
adapters merged into the weights, and values rounded to the stored dtype.
"""

from __future__ import annotations

from collections.abc import Mapping

from loraf_train.compare.methods.base import Bench, Listener, Method, TrainedTask
from loraf_train.compare.methods.bounds import Joint, Separate
from loraf_train.compare.methods.frozen_a import FrozenA
from loraf_train.compare.methods.full import Full
from loraf_train.compare.methods.lora import Lora, LoraDecay, OLora
from loraf_train.compare.methods.loraf import Loraf, LorafPaper, RandomMask
from loraf_train.compare.methods.shared_lora import Ewc, Replay

__all__ = ["ALL", "Bench", "Full", "Listener", "Lora", "Loraf", "Method", "RandomMask", "TrainedTask"]

ALL: Mapping[str, Method] = {
    method.name: method
    for method in (
        Loraf(),
        LorafPaper(),
        RandomMask(),
        FrozenA(),
        Lora(),
        LoraDecay(),
        OLora(),
        Ewc(),
        Replay(),
        Separate(),
        Joint(),
        Full(),
    )
}
