"""Tiny random models of many architectures, checkpoints that adapt all of their linear layers, and the right answers.

A model type is followed by what its config needs beyond the sizes in SIZES. Of those, a config takes what it knows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loraf.base_model import describe
from loraf.checkpoint import Checkpoint
from loraf.tasksets import TaskSet
from tests.loraf_serve.references import load
from tests.standins import byte_tokenizer, random_values

Shapes = dict[str, tuple[int, int]]  # module → (d_out, d_in)

SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "tie_word_embeddings": False, "initializer_range": 0.08, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}  # fmt: skip
# Without experts, which vLLM 0.32 computes with Triton if LoRA is on, and so not on a CPU.
MLA = {
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32, "num_key_value_heads": 4,
    "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1, "head_dim": 64,
}  # fmt: skip
YARN = {
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    }
}  # fmt: skip
DELTA_NET = {
    "num_hidden_layers": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}  # fmt: skip
GEMMA_4 = {
    "global_head_dim": 64, "num_hidden_layers": 6, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
    "sliding_window": 16, "num_experts": None, "enable_moe_block": False,
}  # fmt: skip
MAMBA_2 = {"mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16}

# name → (model type, what its config needs)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, {})
    for name in (
        *("apertus", "arcee", "cwm", "ernie4_5", "exaone4", "glm", "glm4", "gpt_oss", "granite"),
        *(
            "hunyuan_v1_dense",
            "hyperclovax",
            "jais2",
            "llama",
            "mellum",
            "ministral3",
            "mistral",
            "mixtral",
            "nemotron",
        ),
        *("olmo", "olmo2", "olmo3", "phi", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3"),
        *("starcoder2", "vaultgemma", "granite_swa", "granitemoe", "granitemoe_swa", "hunyuan_v1_moe", "flex_olmo"),
        *("minimax_m2", "ernie4_5_moe", "exaone_moe", "laguna", "hy_v3", "hy_v4", "glm4_moe", "inkling_text"),
    )
}
ARCHITECTURES |= {
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.25}),
    "gpt_bigcode": ("gpt_bigcode", {"n_embd": 128, "n_inner": 192, "n_layer": 2, "n_head": 4, "n_positions": 1024}),
    "opt": ("opt", {"ffn_dim": 192, "word_embed_proj_dim": 128, "init_std": 0.08}),
    "phi3": ("phi3", {"original_max_position_embeddings": 1024}),
    "gemma2": ("gemma2", {"tie_word_embeddings": True, "query_pre_attn_scalar": 32, "sliding_window": 16}),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 32, "sliding_window": 16}),
    "gemma4": ("gemma4_text", GEMMA_4),
    "gemma4-shared-kv-layers": (
        "gemma4_text",
        GEMMA_4
        | {
            "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 320, "num_kv_shared_layers": 2,
            "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "gemma4-keys-are-values": (
        "gemma4_text",
        GEMMA_4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "cohere": ("cohere", {"tie_word_embeddings": True}),
    "cohere-untied": ("cohere", {}),
    "cohere2": ("cohere2", {"tie_word_embeddings": True, "sliding_window": 1024}),
    "llama4": (
        "llama4_text",
        {"intermediate_size_mlp": 192, "interleave_moe_layer_step": 3, "moe_layers": [], "num_experts_per_tok": 1,
         "attn_temperature_tuning": False},
    ),
    "deepseek_v2": ("deepseek_v2", MLA | YARN | {"q_lora_rank": None}),
    "deepseek_v3": ("deepseek_v3", MLA | YARN | {"q_lora_rank": 64, "topk_method": "noaux_tc"}),
    "deepseek_v3-without-yarn": ("deepseek_v3", MLA | {"q_lora_rank": 64, "topk_method": "noaux_tc"}),
    "deepseek_v32": ("deepseek_v32", MLA | YARN | {"q_lora_rank": 64}),
    "glm4_moe_lite": ("glm4_moe_lite", MLA | {"q_lora_rank": 64, "topk_method": "noaux_tc"}),
    "glm_moe_dsa": ("glm_moe_dsa", MLA | {"q_lora_rank": 64}),
    "axk1": ("axk1", MLA | YARN | {"q_lora_rank": 64}),
    "longcat_flash": ("longcat_flash", MLA | {"q_lora_rank": 64, "num_layers": 1, "ffn_hidden_size": 192}),
    "minicpm3": ("minicpm3", MLA | {"q_lora_rank": 64, "kv_lora_rank": 64}),
    "qwen3_next": ("qwen3_next", DELTA_NET | {"mlp_only_layers": [0, 1, 2, 3]}),
    "qwen3_5_text": ("qwen3_5_text", DELTA_NET),
    "olmoe": ("olmoe", {"num_key_value_heads": 4}),
    "olmo_hybrid": ("olmo_hybrid", {"num_key_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]}),
    "afmoe": (
        "afmoe",
        {"num_dense_layers": 1, "num_shared_experts": 1, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "granitemoeshared": ("granitemoeshared", {"shared_intermediate_size": 64}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "lfm2_moe": ("lfm2_moe", {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "falcon_h1": ("falcon_h1", MAMBA_2 | {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_expand": 1}),
    "granitemoehybrid": (
        "granitemoehybrid",
        MAMBA_2 | {
            "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_expand": 2, "num_local_experts": 0,
            "num_experts_per_tok": 0, "shared_intermediate_size": 128,
        },
    ),
    "jamba": (
        "jamba",
        {
            "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 8, "expert_layer_offset": 7,
            "num_experts": 1, "use_mamba_kernels": False, "mamba_d_state": 16, "mamba_dt_rank": 16,
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3, "mamba_num_heads": 4,
            "mamba_head_dim": 32, "n_groups": 1, "ssm_state_size": 16,
        },
    ),
}  # fmt: skip


def build(name: str, folder: Path) -> Path:
    """Saves a random model of an architecture with its tokenizer. Linear layers get biases other than zero."""
    import transformers

    model_type, needs = ARCHITECTURES[name]
    config_class = transformers.CONFIG_MAPPING[model_type]
    known = config_class().to_dict()
    config = config_class(**{key: value for key, value in SIZES.items() if key in known} | needs)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module.bias is not None:
                module.bias.normal_(0, 0.1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def linear_layers(folder: Path) -> Shapes:
    """Returns the linear layers of the model in transformers, without its output head."""
    model = load(folder, torch.float32)
    head = model.get_output_embeddings()
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and module is not head
    }


def last_names(modules: Collection[str]) -> list[str]:
    return sorted({module.rpartition(".")[2] for module in modules})


def make_checkpoint(folder: Path, model_folder: Path, shapes: Shapes, rank: int = 8) -> Path:
    """Writes a checkpoint of two tasks, `a` and `b`, that change the answers a lot."""
    checkpoint = Checkpoint.create(folder, describe(str(model_folder), model_folder), rank, shapes, 0)
    values = random_values(shapes, rank, ("a", "b"), 0.6, 0, 0.4)
    for i, task in enumerate(("a", "b")):
        checkpoint.add_task(task, values[task], alpha=16.0, sparsity=0.6, trained_with=("a",)[:i])
    return folder


@torch.no_grad()
def right_logits(model_folder: Path, checkpoint_folder: Path, text: str, token_ids: Sequence[int]) -> torch.Tensor:
    """Returns the logits (len(token_ids), vocabulary) of transformers with ΔW written out and added, in float32."""
    model, checkpoint = load(model_folder, torch.float32), Checkpoint.open(checkpoint_folder)
    manifest = checkpoint.manifest
    for module in manifest.modules:
        a = checkpoint.projection_of(module).float()
        for task, weight in TaskSet.parse(text, manifest.task_names).weights:
            sparse = checkpoint.tasks[task][module]
            b = torch.zeros(sparse.shape)
            b[sparse.rows.long(), sparse.cols.long()] = sparse.values.float()
            model.get_submodule(module).weight += weight * manifest.task(task).alpha / manifest.rank * (b @ a)
    return model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]


def by_last_name(problems: Mapping[str, str]) -> dict[str, str]:
    """Returns module's last name → reason, of modules → reasons."""
    return {module.rpartition(".")[2]: reason for module, reason in problems.items()}
