"""Small random base models and random checkpoints for them, shared by tests and benchmarks.

The models have real architectures (grouped-query attention, projections that vLLM fuses, Qwen2's biases) at a small
size. The checkpoints have the real format with random masks and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from loraf.base_model import describe
from loraf.checkpoint import Checkpoint
from loraf.manifest import positions_per_matrix
from loraf.matrices.sparse import SparseB

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ARCHITECTURES = ("mistral", "llama", "qwen2")


def byte_tokenizer():
    """Returns a fast tokenizer with one token per byte, `<s>` prepended, and a plain chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=1024
    )
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return fast


def make_model(
    architecture: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, context: int = 1024
) -> Path:
    """Saves a random two-layer model with its tokenizer into `folder`.

    Weights are several times larger than at a usual initialization, so that the output depends on the prompt and on the
    adapter.

    Args:
        context: the most tokens of a prompt and its answer.
    """
    import transformers

    configs = {
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }
    config_class, model_class = configs[architecture]
    config = config_class(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        initializer_range=0.08,
    )
    if architecture == "mistral":
        config.sliding_window = None
        config.head_dim = 32
    torch.manual_seed(seed)
    model = model_class(config)
    if architecture == "qwen2":
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def linear_shapes(model_folder: Path) -> dict[str, tuple[int, int]]:
    """Returns module name → (d_out, d_in) of every projection, read from the weights."""
    from safetensors import safe_open

    shapes = {}
    for file in sorted(model_folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
                module = key.removesuffix(".weight")
                if key.endswith(".weight") and module.rsplit(".", 1)[-1] in PROJECTIONS:
                    shapes[module] = tuple(tensors.get_slice(key).get_shape())
    return shapes


def random_values(
    shapes: dict[str, tuple[int, int]],
    rank: int,
    tasks: Sequence[str],
    sparsity: float,
    seed: int,
    std: float = 0.5,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, dict[str, SparseB]]:
    """Returns task → module → SparseB, with random disjoint masks of exactly K positions."""
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, dict[str, SparseB]] = {task: {} for task in tasks}
    for module, (d_out, _) in shapes.items():
        order = torch.randperm(d_out * rank, generator=generator)
        k = positions_per_matrix(sparsity, d_out, rank)
        for i, task in enumerate(tasks):
            positions = order[i * k : (i + 1) * k]
            drawn = (torch.randn(k, generator=generator) * std).to(dtype)
            values[task][module] = SparseB.from_positions(positions, drawn, (d_out, rank))
    return values


def random_checkpoint(
    folder: Path,
    model_folder: Path,
    tasks: Sequence[str] = ("math", "nlu", "code"),
    rank: int = 16,
    sparsity: float = 0.75,
    seed: int = 0,
    alphas: Sequence[float] = (16.0, 32.0, 24.0, 16.0),
    dtype: torch.dtype = torch.bfloat16,
    std: float = 0.5,
) -> Checkpoint:
    """Creates a checkpoint for the model in `model_folder`, each task trained on top of the earlier ones."""
    shapes = linear_shapes(model_folder)
    checkpoint = Checkpoint.create(folder, describe(str(model_folder), model_folder), rank, shapes, seed)
    drawn = random_values(shapes, rank, tasks, sparsity, seed, std, dtype)
    for i, task in enumerate(tasks):
        checkpoint.add_task(
            task,
            drawn[task],
            alpha=alphas[i % len(alphas)],
            sparsity=sparsity,
            trained_with=tasks[:i],
        )
    return checkpoint
