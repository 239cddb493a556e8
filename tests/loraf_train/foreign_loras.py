"""LoRAs written by PEFT, for the tests of import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

IDS = torch.tensor([[1, 40, 50, 60, 70, 80, 41, 42], [1, 200, 90, 33, 45, 210, 99, 12]])
PATTERNS = {  # every way in which PEFT scales modules individually
    "r": 4,
    "lora_alpha": 12,
    "use_rslora": True,
    "target_modules": ["q_proj", "down_proj", "up_proj"],
    "rank_pattern": {"down_proj": 6, "layers.1.self_attn.q_proj": 2},
    "alpha_pattern": {r"model\.layers\.0.*up_proj": 5, "q_proj": 7},
}


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make(folder: Path, model: Path, seed: int = 0, std: float = 0.3, **config: Any) -> Path:
    """Saves a LoRA of the given model with random A and B."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **config}
    lora = get_peft_model(load(model), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    lora.save_pretrained(folder, save_embedding_layers="embed_tokens" in settings["target_modules"])
    return folder


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def served_by_peft(folder: Path, model: Path) -> torch.Tensor:
    """Returns the logits that PEFT computes with the adapter."""
    return logits(PeftModel.from_pretrained(load(model), folder))


def deltas(folder: Path, model: Path) -> dict[str, torch.Tensor]:
    """Returns ΔW by module, float32, computed by PEFT."""
    lora = PeftModel.from_pretrained(load(model), folder)
    layers = {name: layer for name, layer in lora.base_model.model.named_modules() if hasattr(layer, "lora_A")}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}
