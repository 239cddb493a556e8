"""Dropout drawn by token: the same token of the same example gets the same mask, however a batch is cut.

    key        = SplitMix64 of (seed, step, example, place in the example, module), odd      one 64-bit number per token
    word(i)    = (key · constant(i) mod 2⁶⁴, its upper half folded onto its lower half) · odd constant
    kept(j)    = lane j mod 4 of word(j div 4) ≥ threshold                                    16 bits per entry

So neither micro-batches, packing, padding and gradient checkpointing nor the number of processes change a mask, and the
backward pass draws it again instead of keeping it. A full SplitMix64 for every word would pass over the words more than
twice as often; with random odd factors this product is uniform and pairwise independent for all that a test can tell
(tests/loraf_train/adapter/test_dropout.py).

SplitMix64: Steele, Lea, Flood, «Fast splittable pseudorandom number generators», OOPSLA 2014.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from loraf.errors import ConfigError, Problem

_LEVELS = 1 << 16  # a dropout probability is a multiple of 1 / _LEVELS
_LANES = 4  # 16-bit numbers in a word
_WORDS_AT_ONCE = {"cpu": 1 << 16}  # 512 KiB of words, which stay in a core's cache
_WORDS_AT_ONCE_ELSEWHERE = 1 << 24  # 128 MiB of a GPU's memory


def _signed(word: int) -> int:
    """A 64-bit word as torch.int64 holds it."""
    return word - (1 << 64) if word >> 63 else word


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))
_LAST_FACTOR = _signed(0xD6E8FEB86659FD93)


def _dropped(dropout: float) -> int:
    """How many of _LEVELS numbers drop an entry; never all of them."""
    return min(round(dropout * _LEVELS), _LEVELS - 1)


def keep_rate(dropout: float) -> float:
    """Returns the exact probability that an entry is kept."""
    return 1.0 - _dropped(dropout) / _LEVELS


def random_mask(shape: torch.Size, dropout: float, device: torch.device) -> torch.Tensor:
    """Returns a mask of `shape` (bool; True: kept) from torch's generator, which depends on how a batch is cut.

    Each random 64-bit number gives four entries of 16 bits: several times faster on a CPU than `Tensor.bernoulli_`.
    """
    words = torch.empty(-(-shape.numel() // _LANES), dtype=torch.int64, device=device).random_(-(2**63), None)
    return _kept(words, dropout)[: shape.numel()].view(shape)


class TokenKeys:
    """The tokens of the batch that a model is computing: set before each forward pass, read by the layers' masks.

    Args:
        seed: determines all masks, together with the step and the tokens.

    Attributes:
        keys: (rows, width) int64, one key per token.
    """

    keys: torch.Tensor

    def __init__(self, seed: int):
        self._seed = seed

    def set(self, step: int, examples: torch.Tensor, places: torch.Tensor) -> None:
        """Sets the tokens of the next forward pass.

        Args:
            step: the optimizer step, from 0.
            examples: (rows, width) int64, the number of the example that each token belongs to.
            places: (rows, width) int64, the place of each token in its example, from 0.
        """
        of_examples = _mixed((examples + 1) * _GAMMA + _key_of("step", self._seed, step))
        self.keys = _mixed((places + 1) * _GAMMA + of_examples)

    def of(self, module: str) -> ModuleDraws:
        """Returns what draws the masks of the module of this name."""
        return ModuleDraws(self, module)


class ModuleDraws:
    """Draws the masks of one module.

    Attributes:
        tokens: the tokens of the current forward pass.
    """

    def __init__(self, tokens: TokenKeys, module: str):
        self.tokens = tokens
        self._module = module
        self._key = _key_of("module", module)
        self._factors: torch.Tensor | None = None

    def mask(self, token_keys: torch.Tensor, shape: torch.Size, dropout: float) -> torch.Tensor:
        """Returns the mask of an input of this module.

        Args:
            token_keys: `tokens.keys` of the forward pass, (rows, width).
            shape: of the input: (rows, width, …, d_in), or (rows · width, d_in).

        Returns:
            (tokens, d_in) bool; True: kept.

        Raises:
            ConfigError: the input has another shape, so that nobody knows which token an entry belongs to.
        """
        tokens, d_in = shape[:-1].numel(), shape[-1]
        by_row = len(shape) > 2 and shape[:2] == token_keys.shape
        if not by_row and not (len(shape) == 2 and tokens == token_keys.numel()):
            message = (
                f"dropout cannot be drawn by token in {self._module}, whose input has the shape {tuple(shape)} "
                f"for {tuple(token_keys.shape)} tokens"
            )
            remedy = "set dropout: 0, or leave the module out of adapter.target_modules"
            raise ConfigError(Problem(message, "training.dropout", remedy=remedy))
        keys = _mixed(token_keys.reshape(-1) ^ self._key)
        of_each = tokens // max(1, len(keys))  # more than 1: the module sees several vectors of each token, as heads
        if of_each > 1:
            several = torch.arange(1, of_each + 1, device=keys.device) * _GAMMA
            keys = _mixed((keys[:, None] + several).view(-1))
        words = -(-d_in // _LANES)
        if self._factors is None or len(self._factors) != words or self._factors.device != keys.device:
            self._factors = _mixed(torch.arange(1, words + 1, device=keys.device) * _GAMMA) | 1
        return _masks(keys | 1, self._factors, d_in, dropout)


class Dropout(nn.Module):
    """In place of `torch.nn.Dropout`, for layers of others: drawn by token once `draws` is set.

    Args:
        p: probability that an entry is zeroed during training.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.draws: ModuleDraws | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.p and self.training):
            return x
        if self.draws is None:
            return nn.functional.dropout(x, self.p)
        mask = self.draws.mask(self.draws.tokens.keys, x.shape, self.p)
        return x * mask.view(x.shape) / keep_rate(self.p)

    def extra_repr(self) -> str:
        return f"p={self.p:g}"


def draw_peft_by_token(model: nn.Module) -> None:
    """Replaces torch's dropout in the LoRA layers that PEFT has put into `model` by Dropout."""
    for module in list(model.modules()):
        of_adapters = getattr(module, "lora_dropout", None)
        if isinstance(of_adapters, nn.ModuleDict):
            for name, layer in of_adapters.items():
                if isinstance(layer, nn.Dropout):
                    of_adapters[name] = Dropout(layer.p)


def _masks(keys: torch.Tensor, factors: torch.Tensor, d_in: int, dropout: float) -> torch.Tensor:
    """Returns the mask (keys, d_in) of the odd `keys` and `factors`, some rows at a time."""
    out = torch.empty(len(keys), d_in, dtype=torch.bool, device=keys.device)
    at_once = max(1, _WORDS_AT_ONCE.get(keys.device.type, _WORDS_AT_ONCE_ELSEWHERE) // max(1, len(factors)))
    for start in range(0, len(keys), at_once):
        words = keys[start : start + at_once, None] * factors
        words ^= words >> 32  # an arithmetic shift: it loses the sign, one of 64 random bits
        words *= _LAST_FACTOR
        out[start : start + at_once] = _kept(words, dropout)[:, :d_in]
    return out


def _kept(words: torch.Tensor, dropout: float) -> torch.Tensor:
    """Compares each lane of random 64-bit words: (…, n) int64 → (…, 4n) bool."""
    return words.view(torch.int16) >= _dropped(dropout) - _LEVELS // 2


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer: a bijection of 64-bit words of which each bit of the result depends on all bits."""
    for shift, factor in _MIX:
        words = (words ^ _shifted(words, shift)) * factor
    return words ^ _shifted(words, 31)


def _shifted(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifts to the right and fills with zeros; torch's own shift of int64 repeats the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _key_of(*parts: object) -> int:
    """A 64-bit key that depends on every part, as torch.int64 holds it."""
    return int.from_bytes(hashlib.sha256(repr(("dropout", *parts)).encode()).digest()[:8], "little", signed=True)
