"""Bad words as sequences of tokens, by vLLM's rule (`SamplingParams.update_from_tokenizer`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_sequences(tokenizer: PreTrainedTokenizerBase, word: str) -> list[list[int]]:
    """Returns the sequences that `word` excludes: the last token of each may not follow the others.

    The word as it is, and with a space before it if that makes another first token and as many tokens. Spaces at its
    beginning do not count. Empty if it has no tokens.
    """
    plain, spaced = (tokenizer.encode(before + word.lstrip(), add_special_tokens=False) for before in ("", " "))
    if not plain:
        return []
    if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
        return [plain, spaced]
    return [plain]


def excluded(sequences: Sequence[Sequence[int]], output: Sequence[int]) -> list[int]:
    """Returns the tokens that would complete a sequence after `output`. As in vLLM, the prompt does not count."""
    return [
        sequence[-1]
        for sequence in sequences
        if len(sequence) <= len(output) + 1 and list(sequence[:-1]) == list(output[len(output) + 1 - len(sequence) :])
    ]
