"""From tokens to text while an answer grows: whole characters only, and nothing that may turn out to be a stop text.

token ─▶ TextStream ─▶ characters ─▶ StopTexts ─▶ text that can be sent
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

INCOMPLETE = "\ufffd"  # what bytes that are no whole character decode to
_SPACE = "▁"  # SentencePiece's sign for a space; `decode` drops it where a text begins
_CONTEXT = 4  # tokens: a character has at most four bytes


class TextStream:
    """The text that each token adds to a prompt and its answer.

    A character that is spread over several tokens comes with the last of them; one that stays incomplete never comes.
    Otherwise the pieces are what decoding the whole answer gives, but for the space that SentencePiece tokenizers
    drop at the beginning of a text: an answer continues its prompt. The same as vLLM's detokenizer, but for a prompt
    that ends within a character, whose text vLLM repeats in the answer.

    Args:
        tokenizer: a fast one; not for two threads at once.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], skip_special_tokens: bool):
        self._tokenizer = tokenizer.backend_tokenizer
        self._skip = skip_special_tokens
        whole = self._whole_characters(list(prompt))
        self._stream = DecodeStream(ids=list(prompt[:whole]), skip_special_tokens=skip_special_tokens)
        begun = list(prompt[whole:]) if whole else []  # bytes of a character that the answer may complete
        self._prompts_own = self._tokenizer.decode(begun, skip_special_tokens=skip_special_tokens)
        for token in begun:
            self._step(token)

    def _whole_characters(self, prompt: list[int]) -> int:
        """How many tokens of the prompt end with a whole character; 0 if it does not end like text at all."""
        for dangling in range(min(_CONTEXT, len(prompt))):
            end = len(prompt) - dangling
            if not self._tokenizer.decode(prompt[:end], skip_special_tokens=self._skip).endswith(INCOMPLETE):
                return end
        return 0

    def add(self, token: int) -> str:
        piece = self._step(token)
        if piece and self._prompts_own:
            piece, self._prompts_own = piece.removeprefix(self._prompts_own), ""
        return piece

    def _step(self, token: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token) or ""
        except Exception as error:  # the tokenizers package has no class of its own for it
            if "Invalid prefix" not in str(error):
                raise
            # Some tokenizers decode a longer sequence to something that does not begin with the shorter one's text.
            log.warning("the decoded text does not continue what was decoded before: decoding begins anew")
            self._stream = DecodeStream(skip_special_tokens=self._skip)
            return self._stream.step(self._tokenizer, token) or ""


class StopTexts:
    """Holds back the end of a text for as long as it may be the beginning of a stop text.

    Attributes:
        found: the stop text that ended the answer. Where several end at the same character, the first in the list.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""
        self.found: str | None = None

    def add(self, piece: str, may_stop: bool = True) -> str:
        """The text that can be sent now; the stop text and what follows it never is.

        Args:
            may_stop: False: a stop text that `piece` completes does not count (min_tokens).
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
        """What is still held back, when the answer has ended otherwise."""
        text, self._held = self._held, ""
        return text

    def _begin_of_stop(self, text: str, new: int) -> int | None:
        """Where the stop text begins that the last `new` characters complete; the one that ends first counts."""
        ends = []
        for order, stop in enumerate(self._stops):
            begin = text.find(stop, max(0, len(text) - new - len(stop) + 1))
            if begin >= 0:
                ends.append((begin + len(stop), order, begin))
        if not ends:
            return None
        _, order, begin = min(ends)
        self.found = self._stops[order]
        return begin


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins, `stop` itself not counted."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def token_text(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], token: int) -> str:
    """One token's text, as vLLM gives it beside a log-probability; special tokens are shown.

    A token that completes a character of several tokens has the whole character; those before it have "".

    Args:
        before: the answer's tokens before it.
    """
    text = tokenizer.decode([token])
    if not text.endswith(INCOMPLETE):
        piece = tokenizer.convert_ids_to_tokens(token) or ""
        spaces = len(piece) - len(piece.lstrip(_SPACE))
        return " " * max(0, spaces - (len(text) - len(text.lstrip(" ")))) + text
    for n in range(1, min(len(before), _CONTEXT) + 1):
        context = list(before[-n:])
        whole = tokenizer.decode([*context, token])
        if whole.endswith(INCOMPLETE):
            continue
        while context and tokenizer.decode(context[-1:]).endswith(INCOMPLETE):
            context.pop()  # its bytes belong to the character
        return whole.removeprefix(tokenizer.decode(context) if context else "")
    return ""
