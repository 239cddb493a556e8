"""Writes a task set as a PEFT adapter, and lets PEFT itself check that it applies all of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from loraf import base_model
from loraf.errors import ConfigError, Problem
from loraf.peft_export import PREFIX, export_peft
from loraf_train.adapter.peft_targets import peft_targets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from loraf.checkpoint import Checkpoint
    from loraf.manifest import Manifest
    from loraf.tasksets import TaskSet


def write_peft(
    checkpoint: Checkpoint, task_set: TaskSet, base_folder: Path | None, out: Path, dtype: torch.dtype = torch.float32
) -> str | None:
    """Writes the adapter, and loads it into the base model without its weights, as PEFT would.

    Args:
        base_folder: None: find the config of the base model that the checkpoint names, without its weights.

    Returns:
        Why PEFT could not check the adapter; None: it did.

    Raises:
        ConfigError: PEFT would not apply the adapter to every module.
    """
    manifest = checkpoint.manifest
    architecture = getattr(transformers, manifest.base_model.architecture, None)
    model = _base_on_meta(manifest, base_folder, architecture)
    parameters: Sequence[str] = ()
    config: Any = getattr(architecture, "config_class", None) if model is None else model.config
    if config is not None:
        _, parameters = peft_targets(config.model_type, manifest.modules)
    export_peft(checkpoint, task_set, out, dtype, parameters)
    if model is None:
        return f"there is no config of {manifest.base_model.name} that has its modules; name the model (--model)"
    try:
        import peft
    except ImportError:
        return "the package 'peft' is not installed"
    ignored = _ignored_by_peft(model, manifest, out)
    if ignored:
        more = f" and {len(ignored) - 1} more modules" if len(ignored) > 1 else ""
        message = f"PEFT {peft.__version__} does not apply an adapter to {ignored[0]}{more} of this model"
        raise ConfigError(Problem(message, "--format", remedy="export --format merged"))
    return None


def _base_on_meta(manifest: Manifest, folder: Path | None, architecture: Any) -> PreTrainedModel | None:
    """The base model without weights; None: neither its config nor its class is there, or it has other modules."""
    base = manifest.base_model
    try:
        try:
            folder = folder or base_model.resolve(base.name, base.revision, config_only=True)
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception:  # no network, a folder that was moved, a config that this transformers does not know
            config = architecture.config_class(**base.shapes)
        with torch.device("meta"):
            model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False
            )
    except Exception:  # from the model's own code, or there is no such class
        return None
    modules = dict(model.named_modules())
    return model if all(type(modules.get(name)) is torch.nn.Linear for name in manifest.modules) else None


def _ignored_by_peft(model: PreTrainedModel, manifest: Manifest, folder: Path) -> list[str]:
    """Returns the modules to which PEFT does not apply exactly the matrices in `folder`. Changes the model."""
    import peft
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    for name in manifest.modules:  # weights that PEFT can put a real adapter on, but that take no memory
        linear: Any = model.get_submodule(name)
        dtype = tensors[f"{PREFIX}{name}.lora_A.weight"].dtype
        linear.weight = torch.nn.Parameter(torch.empty(1, dtype=dtype).expand(linear.weight.shape), False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PeftConfig.from_pretrained(str(folder))
        adapted = peft.PeftModel(model, config, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
        peft.set_peft_model_state_dict(adapted, tensors, low_cpu_mem_usage=True)

    def is_loaded(part: Any, key: str) -> bool:
        weight = part["default"].weight
        return not weight.is_meta and torch.equal(weight, tensors[key])  # on meta as long as PEFT finds no value for it

    def applied(name: str) -> bool:
        layer: Any = model.get_submodule(name)
        return (
            isinstance(layer, LoraLayer)
            and layer.scaling == {"default": 1.0}
            and is_loaded(layer.lora_A, f"{PREFIX}{name}.lora_A.weight")
            and is_loaded(layer.lora_B, f"{PREFIX}{name}.lora_B.weight")
        )

    return [name for name in manifest.modules if not applied(name)]
