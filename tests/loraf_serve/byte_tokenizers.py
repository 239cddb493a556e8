"""Tokenizers in which a token may end within a character, made as those of published models."""

from __future__ import annotations

from functools import cache

from tests.standins import byte_tokenizer


def byte_pairs():
    """Like GPT-2's: a token may hold a space and the beginning of an emoji."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    signs = bytes_to_unicode()
    space, first, second, third = (signs[byte] for byte in " 🙂".encode()[:4])
    merges = [(first, second), (space, first + second), (space + first + second, third)]
    tokens = ["</s>", *signs.values(), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def byte_fallback():
    """Like Llama 2's: `▁` is a space, and a character that is no token becomes a token for each of its bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcx", "▁a"]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


TOKENIZERS = {"bytes": cache(byte_tokenizer), "byte pairs": cache(byte_pairs), "byte fallback": cache(byte_fallback)}


def ids_of(kind: str, text: str) -> list[int]:
    """A text's tokens, without special ones."""
    return TOKENIZERS[kind]()(text, add_special_tokens=False)["input_ids"]


def bytes_of(kind: str, tokens: list[int]) -> bytes:
    """What ordinary tokens stand for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    pieces = TOKENIZERS[kind]().convert_ids_to_tokens(tokens)
    if kind == "byte fallback":
        return b"".join(
            bytes([int(p[3:5], 16)]) if p.startswith("<0x") else p.replace("▁", " ").encode() for p in pieces
        )
    of_sign = {sign: byte for byte, sign in bytes_to_unicode().items()}
    return bytes(of_sign[sign] for sign in "".join(pieces))
