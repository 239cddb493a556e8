"""LoRAF as a method of PEFT, for PEFT's own API, transformers' Trainer and TRL.

    model = get_peft_model(model, LorafConfig(task_name="math", r=64, target_modules=["q_proj", "v_proj"]))
    calibrate(model, dataloader)

An adapter of PEFT is a task here. This is the only folder that imports PEFT; importing it registers the method. The
layer, the choice of positions, retention and the checkpoint are those of `loraf-train`; what belongs here is what makes
them answer to PEFT's calls.
"""

import importlib.util

if importlib.util.find_spec("peft") is None:
    raise ImportError("loraf_train.peft needs PEFT, which is not installed: pip install 'loraf[peft]'")

from loraf_train.peft.calibrate import calibrate
from loraf_train.peft.callback import LorafCallback
from loraf_train.peft.config import LorafConfig
from loraf_train.peft.finish import finish_task, next_task
from loraf_train.peft.layer import LorafLayer
from loraf_train.peft.load import load_tasks
from loraf_train.peft.model import LorafModel
from loraf_train.peft.protect import protect
from loraf_train.peft.register import register
from loraf_train.peft.save import save_from_peft
from loraf_train.peft.select import select_tasks

__all__ = [
    "LorafCallback",
    "LorafConfig",
    "LorafLayer",
    "LorafModel",
    "calibrate",
    "finish_task",
    "load_tasks",
    "next_task",
    "protect",
    "select_tasks",
]

LorafModel.write = staticmethod(save_from_peft)
register(LorafConfig, LorafModel)
