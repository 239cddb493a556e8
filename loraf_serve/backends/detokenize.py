"""Converts tokens to text while an answer is generated: only whole characters, and no part of a stop text.

token ─▶ TextStream ─▶ characters ─▶ StopTexts ─▶ text that can be sent
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

INCOMPLETE = "\ufffd"  # the decoded form of bytes that are not a whole character
_SPACE = "▁"  # SentencePiece's sign for a space; `decode` drops it at the beginning of a text
CONTEXT = 4  # tokens; a character has at most four bytes
_WINDOW = 1024  # tokens of a prompt that are decoded; what stands before them does not change how an answer is decoded
_CUTS = (0, 1, 2, 3, 4, 8, 16, 32, 64)  # tokens from the end of a prompt: places where its whole characters may end


class TextStream:
    """Decodes an answer token by token, as a continuation of its prompt.

    A character that is spread over several tokens is returned with the last of them; an incomplete one never is.
    Otherwise the pieces add up to the decoded answer, except for the space that SentencePiece tokenizers drop at the
    beginning of a text. If the prompt ends within a character, the answer may complete it, and then begins with it.
    Nothing else of the prompt is ever returned.

    Args:
        tokenizer: a fast one; not thread-safe.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], skip_special_tokens: bool):
        self._tokenizer = tokenizer.backend_tokenizer
        self._skip = skip_special_tokens
        whole, rest = self._cut(list(prompt[-_WINDOW:]))
        self._stream = DecodeStream(ids=whole, skip_special_tokens=skip_special_tokens)
        # While its text ends with INCOMPLETE a stream returns nothing, then all of it: also what is the prompt's.
        returned = self._decode(whole) + "".join(self._step(token) for token in rest)
        # Some decoders show every byte of an incomplete character, and of whole ones next to it, as INCOMPLETE.
        texts = (self._decode([*whole, *rest[:n]]) for n in range(len(rest), 0, -1))
        self._prompt_end = next((text for text in texts if text.startswith(returned)), returned)[len(returned) :]

    def _cut(self, prompt: list[int]) -> tuple[list[int], list[int]]:
        """Splits a prompt into tokens that form whole characters, and a rest that the answer may complete.

        U+FFFD may also be a character of the prompt, or stand for bytes that can never become one; the rest is then
        longer than necessary. Both parts are empty if nothing near the end is whole.
        """
        for length in _CUTS:
            end = max(0, len(prompt) - length)
            if end == 0 or not self._decode(prompt[:end]).endswith(INCOMPLETE):
                return prompt[:end], prompt[end:]
        return [], []

    def add(self, token: int) -> str:
        """Returns the text that a token adds."""
        piece = self._step(token)
        if piece and self._prompt_end:
            piece, self._prompt_end = piece[len(os.path.commonprefix([piece, self._prompt_end])) :], ""
        return piece

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=self._skip)
        return text

    def _step(self, token: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token) or ""
        except Exception as error:  # the tokenizers package has no exception class for it
            if "Invalid prefix" not in str(error):
                raise
            # Some tokenizers decode a longer sequence to something that does not begin with the shorter one's text.
            log.warning("the decoded text does not continue the text before it; decoding restarts here")
            self._stream = DecodeStream(skip_special_tokens=self._skip)
            return self._stream.step(self._tokenizer, token) or ""


class StopTexts:
    """Holds back the end of a text while it may be the beginning of a stop text.

    Attributes:
        matched: the stop text that ended the answer. If several end at the same character, the first in the list.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""
        self.matched: str | None = None

    def add(self, piece: str, may_stop: bool = True) -> str:
        """Returns the text that can be sent now. A stop text, and text after it, is never sent.

        Args:
            may_stop: False to ignore a stop text that `piece` completes (because of min_tokens).
        """
        text = self._held + piece
        if may_stop and piece:
            begin = self._begin_of_stop(text, len(piece))
            if begin is not None:
                self._held = ""
                return text[:begin]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Returns the text that is held back, when the answer has ended for another reason."""
        text, self._held = self._held, ""
        return text

    def _begin_of_stop(self, text: str, new: int) -> int | None:
        """Where a stop text that the last `new` characters complete begins. Takes the stop text that ends first."""
        ends = []
        for order, stop in enumerate(self._stops):
            begin = text.find(stop, max(0, len(text) - new - len(stop) + 1))
            if begin >= 0:
                ends.append((begin + len(stop), order, begin))
        if not ends:
            return None
        _, order, begin = min(ends)
        self.matched = self._stops[order]
        return begin


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def token_text(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], token: int) -> str:
    """One token's text as vLLM returns it with a log-probability, including special tokens.

    For a character of several tokens, the last one has the whole character and the others have "".

    Args:
        before: the answer's tokens before it.
    """
    text = _decode(tokenizer, [token])
    if not text.endswith(INCOMPLETE):
        piece = str(tokenizer.convert_ids_to_tokens(token) or "")
        spaces = len(piece) - len(piece.lstrip(_SPACE))
        return " " * max(0, spaces - (len(text) - len(text.lstrip(" ")))) + text
    for n in range(1, min(len(before), CONTEXT) + 1):
        context = list(before[-n:])
        decoded = _decode(tokenizer, [*context, token])
        if decoded.endswith(INCOMPLETE):
            continue
        while context and _decode(tokenizer, context[-1:]).endswith(INCOMPLETE):
            context.pop()  # its bytes belong to the character
        return decoded.removeprefix(_decode(tokenizer, context) if context else "")
    return ""


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    text = tokenizer.decode(tokens)
    assert isinstance(text, str)  # a list only for a batch
    return text
