"""The methods that `benchmarks/training.py` compares, each with the same model, and their optimizer steps.

loraf       K values of each B on a frozen A (loraf_train.adapter.layer)
lora        PEFT LoRA with A and B in float32, PEFT's default whatever the model's dtype
lora-half   PEFT LoRA with A and B in the model's dtype
frozen-a    PEFT LoRA with a frozen A
full        every weight of the model
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from loraf import task_file
from loraf.manifest import positions_per_matrix
from loraf.matrices.projection import projection
from loraf.matrices.sparse import SparseB
from loraf_train.adapter.dropout import TokenKeys
from loraf_train.adapter.layer import LorafLinear
from loraf_train.adapter.trainable_base import attached, find_targets
from loraf_train.settings.parts import PROJECTIONS
from loraf_train.trainer.loop import completion_loss

METHODS = ("loraf", "lora", "lora-half", "frozen-a", "full")
SHAPES = {  # layers, hidden, intermediate, heads, key-value heads, vocabulary
    "toy": (2, 64, 96, 4, 2, 97),
    "small": (8, 768, 2048, 12, 4, 4096),
    "mistral-7b": (32, 4096, 14336, 32, 8, 32000),
}


@dataclass(frozen=True)
class Setting:
    """Settings that all methods share.

    Attributes:
        layers: instead of the shape's.
        sequence: tokens of an example.
    """

    shape: str
    dtype: torch.dtype
    device: str
    rank: int
    sparsity: float
    sequence: int
    layers: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Cell:
    """One combination of step settings."""

    batch: int
    dropout: float
    checkpointing: bool

    @property
    def name(self) -> str:
        return f"batch {self.batch}, dropout {self.dropout:g}, {'with' if self.checkpointing else 'no'} checkpointing"


def make_model(setting: Setting):
    """Builds a Mistral model with random weights, the same for the same setting."""
    import transformers

    layers, hidden, intermediate, heads, kv_heads, vocabulary = SHAPES[setting.shape]
    config = transformers.MistralConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=setting.layers or layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=max(2048, setting.sequence),
        sliding_window=None,
        tie_word_embeddings=False,
    )
    torch.manual_seed(setting.seed)
    with torch.device(setting.device):
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=setting.dtype, trust_remote_code=False
        ).requires_grad_(False)


def make_batch(setting: Setting, batch: int) -> dict[str, torch.Tensor]:
    """Returns input_ids, attention_mask and labels, each (batch, sequence) int64, with a loss on every token."""
    generator = torch.Generator().manual_seed(setting.seed + 1)
    shape = (batch, setting.sequence)
    ids = torch.randint(3, SHAPES[setting.shape][-1], shape, generator=generator).to(setting.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class Method:
    """A model that one method trains.

    Attributes:
        model: the callable model.
        adapters: module → the layer that replaces it; empty for `full`.
    """

    def __init__(self, name: str, setting: Setting):
        self.name = name
        self.setting = setting
        self.base = self.model = make_model(setting)
        self.adapters: dict[str, nn.Module] = {}
        self._attached = ExitStack()
        self._tokens = TokenKeys(setting.seed)
        if name == "loraf":
            self._loraf()
        elif name == "full":
            self.base.requires_grad_(True)
        else:
            self._peft()
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-4, weight_decay=0.0, fused=True)
        self.model.train()

    def _loraf(self) -> None:
        generator = torch.Generator().manual_seed(self.setting.seed + 2)
        for name, base in find_targets(self.base, PROJECTIONS).items():
            a = torch.from_numpy(projection(self.setting.seed, name, self.setting.rank, base.in_features))
            k = positions_per_matrix(self.setting.sparsity, base.out_features, self.setting.rank)
            positions = torch.randperm(base.out_features * self.setting.rank, generator=generator)[:k].sort().values
            self.adapters[name] = LorafLinear(base, a.to(base.weight.dtype), positions, scale=1.0)
        self._attached.enter_context(attached(self.base, self.adapters))

    def _peft(self) -> None:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora.layer import Linear

        rank = self.setting.rank
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
        self.model = get_peft_model(self.base, config, autocast_adapter_dtype=self.name != "lora-half")
        for name, module in self.base.named_modules():
            if isinstance(module, Linear):
                self.adapters[name] = module
                module.lora_A["default"].weight.requires_grad_(self.name != "frozen-a")

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def prepare(self, cell: Cell) -> None:
        """Sets dropout and checkpointing to those of the cell."""
        for name, layer in self.adapters.items():
            if isinstance(layer, LorafLinear):
                layer.dropout, layer.draws = cell.dropout, self._tokens.of(name)
            else:
                layer.lora_dropout["default"] = nn.Dropout(cell.dropout) if cell.dropout else nn.Identity()
        if cell.checkpointing:
            self.base.gradient_checkpointing_enable({"use_reentrant": False})
        elif self.base.is_gradient_checkpointing:
            self.base.gradient_checkpointing_disable()
        self.model.train()

    def set_tokens(self, shape: torch.Size) -> None:
        """Tells dropout which tokens the next batch holds, (examples, sequence), as training does."""
        examples, places = (torch.arange(size, device=self.setting.device) for size in shape)
        self._tokens.set(0, examples[:, None].expand(shape), places.expand(shape))

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.set_tokens(batch["input_ids"].shape)
        outputs = self.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        return completion_loss(outputs, batch["labels"])

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        """Forward, backward, clipping by the global norm, AdamW. Keeps the gradients until the next step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(batch).backward()
        nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()

    def bytes(self) -> dict[str, int]:
        """Returns the bytes of gradients and optimizer state (without step counters), after a step."""
        state = [t for s in self.optimizer.state.values() for name, t in s.items() if name != "step"]
        return {
            "gradient_bytes": sum(p.grad.nbytes for p in self.trainable if p.grad is not None),
            "optimizer_bytes": sum(t.nbytes for t in state),
        }

    def file_bytes(self) -> int:
        """Returns the size of one trained task on disk: bfloat16 values, PEFT's file, or all weights."""
        if self.name == "full":
            return sum(p.nbytes for p in self.trainable)
        if self.name == "loraf":
            stored = {
                name: SparseB.from_positions(
                    layer.positions.long(), layer.values.bfloat16(), (layer.base.out_features, layer.rank)
                )
                for name, layer in self.adapters.items()
            }
            return len(task_file.encode(stored))
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            return (Path(folder) / "adapter_model.safetensors").stat().st_size


# --- what must hold before anything is timed --------------------------------------------------------------------------


def compare_gradients(setting: Setting) -> dict[str, float]:
    """Compares the gradient of the values with that of PEFT's dense B, and of W (times Aᵀ), at the same positions.

    Returns:
        For each of the two the largest difference, relative to the largest entry.
    """
    cell = Cell(2, 0.0, False)
    batch = make_batch(setting, cell.batch)
    methods = {name: Method(name, setting) for name in ("loraf", "lora-half", "full")}
    ours = methods["loraf"].adapters
    for name, layer in methods["lora-half"].adapters.items():
        layer.lora_A["default"].weight.data.copy_(ours[name].a)
    for method in methods.values():
        method.prepare(cell)
        method.loss(batch).backward()
    worst = {"B of PEFT": 0.0, "W": 0.0}
    whole = dict(methods["full"].base.named_modules())
    for name, layer in ours.items():
        at = layer.positions.long()
        dense = {
            "B of PEFT": methods["lora-half"].adapters[name].lora_B["default"].weight.grad,
            "W": whole[name].weight.grad @ layer.a.t(),
        }
        for matrix, gradient in dense.items():
            expected = gradient.reshape(-1)[at]
            difference = (layer.values.grad - expected).abs().max() / expected.abs().max()
            worst[matrix] = max(worst[matrix], float(difference))
    return worst


def state_bytes(setting: Setting) -> dict[float, tuple[int, int]]:
    """Returns sparsity → bytes of gradients and optimizer state after a step, and the expected 3 numbers per value."""
    sizes = {}
    for sparsity in (0.5, 0.9, 0.95, 0.99):
        method = Method("loraf", Setting(**vars(setting) | {"sparsity": sparsity}))
        method.step(make_batch(setting, 1))
        values = sum(
            positions_per_matrix(sparsity, layer.base.out_features, setting.rank) for layer in method.adapters.values()
        )
        size = torch.promote_types(setting.dtype, torch.float32).itemsize
        sizes[sparsity] = (sum(method.bytes().values()), 3 * size * values)
    return sizes


class _Kept:
    """Counts the bytes that autograd saves, each storage once, without parameters and buffers."""

    def __init__(self, model: nn.Module):
        self._own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self._saved: dict[int, torch.Tensor] = {}  # keeps storages alive, so that no address is reused
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in self._own:
            self._saved.setdefault(storage, tensor.detach())
        return tensor

    @property
    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self._saved.values())


def kept_for_backward(method: str, setting: Setting, dropout: float) -> float:
    """Returns the bytes per token that a method's adapters keep for the backward pass, in one layer of the model.

    It is the difference between a layer with adapters and a frozen one, both with an input that requires a gradient.
    """
    one = Setting(**vars(setting) | {"layers": 1})
    batch = make_batch(one, 1)

    def kept(model: nn.Module, base: nn.Module) -> int:
        base.enable_input_require_grads()
        counted = _Kept(model)
        with counted.hooks:
            model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        return counted.bytes

    frozen = make_model(one).train()
    without = kept(frozen, frozen)
    adapted = Method(method, one)
    adapted.prepare(Cell(1, dropout, False))
    adapted.set_tokens(batch["input_ids"].shape)
    return (kept(adapted.model, adapted.base) - without) / batch["input_ids"].numel()


def expected_for_backward(setting: Setting, dropout: float) -> dict[str, int]:
    """Returns the expected bytes per token and layer, for adapters in the model's dtype.

    `loraf`: rank numbers for each of seven modules, and with dropout a token's key of 8 bytes, which all layers of the
    model share. `lora`, without dropout: those numbers, and the inputs of A, once where modules share one, except
    o_proj's, which attention keeps anyway.
    """
    _, hidden, intermediate, *_ = SHAPES[setting.shape]
    size = setting.dtype.itemsize
    products = len(PROJECTIONS) * setting.rank * size
    if dropout:
        return {"loraf": products + 8}
    return {"loraf": products, "lora": products + (2 * hidden + intermediate) * size}
