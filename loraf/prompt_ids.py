"""Tokenizes prompts, in the same way for training, evaluation and serving."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    """The part of transformers' tokenizers that is used here."""

    bos_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: Any, **options: Any) -> Any: ...


def prompt_ids(tokenizer: Tokenizer, texts: Sequence[str], special_tokens: bool = True) -> list[list[int]]:
    """Returns the token ids of each prompt, with at most one BOS at the start and no EOS that the tokenizer appended.

    Where the text begins with a BOS and the tokenizer adds another, one is dropped. An EOS that the tokenizer appends
    to every text is dropped, because an answer follows.

    Args:
        tokenizer: a tokenizer of transformers.
        special_tokens: let the tokenizer add its special tokens. False where a chat template has already written
            them into the text.
    """
    if not texts:
        return []
    tokenized = tokenizer(list(texts), add_special_tokens=special_tokens, verbose=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    appends_eos = None  # whether the tokenizer ends every text with EOS; determined when a text ends with one
    prompts = []
    for ids in tokenized:
        ids = list(ids)
        if special_tokens and eos is not None and ids[-1:] == [eos]:
            if appends_eos is None:
                appends_eos = list(tokenizer("a")["input_ids"])[-1:] == [eos]
            ids = ids[:-1] if appends_eos else ids
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        prompts.append(ids)
    return prompts
