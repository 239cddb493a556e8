"""From a prompt's text to the token ids that a model sees: one function for training, evaluation and serving."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    """What of transformers' tokenizers is used here."""

    bos_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: Any, **options: Any) -> Any: ...


def prompt_ids(tokenizer: Tokenizer, texts: Sequence[str], special_tokens: bool = True) -> list[list[int]]:
    """The ids of each prompt: as the tokenizer gives them, but never with two BOS or with an end before the answer.

    Args:
        tokenizer: one of transformers'.
        special_tokens: let the tokenizer add its own; no where a chat template has written them into the text.

    A BOS that the text begins with and the tokenizer adds once more is taken once; an end of sequence that the
    tokenizer appends to every text is taken away, since an answer is to follow.
    """
    if not texts:
        return []
    found = tokenizer(list(texts), add_special_tokens=special_tokens, verbose=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ends_all = None  # whether the tokenizer ends every text; asked only where one ends
    answers = []
    for ids in found:
        ids = list(ids)
        if special_tokens and eos is not None and ids[-1:] == [eos]:
            if ends_all is None:
                ends_all = list(tokenizer("a")["input_ids"])[-1:] == [eos]
            ids = ids[:-1] if ends_all else ids
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        answers.append(ids)
    return answers
