"""Makes LoRAF known to PEFT under the type LORAF.

PEFT registers a method by `register_peft_method`, which requires that its enumeration of types has a member of that
name. A release of PEFT lists its own methods there, so the member is added at run time.
"""

from __future__ import annotations

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

NAME = "LORAF"


def loraf_type() -> PeftType:
    """Returns PEFT's type for LoRAF, which is added on the first call."""
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_ = member._value_ = NAME
        member.__objclass__ = PeftType  # type: ignore[attr-defined]  # of enum
        member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]  # of enum
        type.__setattr__(PeftType, NAME, member)
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
    return PeftType[NAME]


def register(config: type[PeftConfig], tuner: type[BaseTuner]) -> None:
    """Registers the method with PEFT; a second call is a no-op."""
    if loraf_type() not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=config, model_cls=tuner, prefix=tuner.prefix)
