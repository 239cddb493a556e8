"""A model whose tokenizer and generation config name more tokens than the model has."""

from __future__ import annotations

import json
from pathlib import Path

ODD_VOCAB_SIZE = 16
ODD_LETTERS = "abcdefghijklm"
# Added tokens, with ids from ODD_VOCAB_SIZE on. vLLM pads an embedding of 16 rows to 64: the last are beyond that too.
BEYOND = [f"<beyond{i}>" for i in range(100)]
ODD_ENDS = [2, ODD_VOCAB_SIZE, 64, 400, -1]
ODD_CONTEXT = 256


def odd_tokenizer():
    """Returns a tokenizer of ODD_LETTERS and BEYOND. Its template writes the last of these for a system message."""
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *ODD_LETTERS])}
    assert len(vocab) == ODD_VOCAB_SIZE
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<pad>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=ODD_CONTEXT
    )
    fast.add_tokens(BEYOND[:-1])
    fast.add_special_tokens({"additional_special_tokens": BEYOND[-1:]})
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}" + BEYOND[-1] + "{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    return fast


def make_odd_model(folder: Path) -> Path:
    """Saves a random model with ODD_VOCAB_SIZE token ids, `odd_tokenizer`, and ODD_ENDS in its generation config."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ODD_VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=ODD_CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    odd_tokenizer().save_pretrained(folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": ODD_ENDS}))
    return folder
