"""Models whose tokenizers and generation configs do not fit them: more tokens than the model has, fewer, odd ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.loraf_serve.byte_tokenizers import byte_fallback, byte_pairs
from tests.standins import byte_tokenizer

ODD_VOCAB_SIZE = 16
ODD_LETTERS = "abcdefghijklm"
# Added tokens, with ids from ODD_VOCAB_SIZE on. vLLM pads an embedding of 16 rows to 64: the last are beyond that too.
BEYOND = [f"<beyond{i}>" for i in range(100)]
ODD_ENDS = [2, ODD_VOCAB_SIZE, 64, 400, -1]
ODD_CONTEXT = 256


def odd_tokenizer(bos: str = "<s>", eos: str = "</s>", unk: str = "<pad>"):
    """Returns a tokenizer of ODD_LETTERS and BEYOND. Its template writes the last of these for a system message.

    Args:
        bos, eos, unk: special tokens, which may be some of BEYOND.
    """
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    known = ["<pad>", "<s>", "</s>", *ODD_LETTERS]
    assert len(known) == ODD_VOCAB_SIZE
    vocab = {token: i for i, token in enumerate([*known, *([unk] if unk == BEYOND[0] else [])])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=unk))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens(BEYOND[:-1])
    bos_id = tokenizer.token_to_id(bos)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token="<pad>", model_max_length=ODD_CONTEXT
    )
    fast.add_special_tokens({"additional_special_tokens": BEYOND[-1:]})
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}" + BEYOND[-1] + "{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    return fast


def _two_words():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(vocab={"a": 0, "b": 1, "c": 2}, unk_token="c"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _with_template(make: Callable[[], Any]):
    tokenizer = make()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


@dataclass(frozen=True)
class OddModel:
    """A tokenizer and a generation config, and the size of the model that they are put beside.

    Attributes:
        ends: `eos_token_id` of the generation config.
        good: pieces of text whose tokens the model has, where nothing else is said.
        bad: pieces whose tokens it may not have.
        config: further values of the model's config.
    """

    tokenizer: Callable[[], Any]
    vocab_size: int
    ends: Any
    good: tuple[str, ...] = tuple(ODD_LETTERS)
    bad: tuple[str, ...] = (*BEYOND, "é", "\0")
    config: Mapping[str, Any] = field(default_factory=dict)


_BYTES = ("a", "b", " ", "é", "日", "\ufffd")
ODD_MODELS = {
    "tokens beyond the model": OddModel(odd_tokenizer, ODD_VOCAB_SIZE, ODD_ENDS),
    # The last tokens are pieces of an emoji, so some texts have tokens that the model lacks.
    "pieces of characters": OddModel(partial(_with_template, byte_pairs), 257, [0, 256, 257, 999], _BYTES, (" 🙂",)),
    "model beyond the tokenizer": OddModel(partial(_with_template, byte_fallback), 320, 319, _BYTES, ("🙂", "\0")),
    "two tokens": OddModel(partial(_with_template, _two_words), 2, 1, ("a", "b"), ("c", "d", "é")),
    "every token an end": OddModel(odd_tokenizer, ODD_VOCAB_SIZE, list(range(-1, 2 * ODD_VOCAB_SIZE))),
    "no end": OddModel(byte_tokenizer, 259, None, _BYTES, ("</s>", "\0")),
    "the tokenizer's end beyond": OddModel(partial(odd_tokenizer, eos=BEYOND[0]), ODD_VOCAB_SIZE, None),
    "the tokenizer's beginning beyond": OddModel(partial(odd_tokenizer, bos=BEYOND[7]), ODD_VOCAB_SIZE, [2]),
    "the unknown token beyond": OddModel(partial(odd_tokenizer, unk=BEYOND[0]), ODD_VOCAB_SIZE, [2, 2, 2]),
    "tied embedding": OddModel(
        byte_tokenizer,
        65,
        [2, 64, 65, 127, 128],
        ("!", "#", "0", "9"),
        ("z", "é", "</s>"),
        {"tie_word_embeddings": True},
    ),
}
FIRST = "tokens beyond the model"


def make_odd_model(folder: Path, name: str = FIRST) -> Path:
    """Saves a random model with the vocabulary, the tokenizer and the end tokens of one of ODD_MODELS."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    odd = ODD_MODELS[name]
    torch.manual_seed(0)
    config = {
        "vocab_size": odd.vocab_size,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": ODD_CONTEXT,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
    }
    LlamaForCausalLM(LlamaConfig(**config | dict(odd.config))).save_pretrained(folder)
    odd.tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": odd.ends}))
    return folder
