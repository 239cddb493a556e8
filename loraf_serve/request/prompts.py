"""Converts the input of a request to token ids: text, a chat through the model's template, or ids as they are."""

from __future__ import annotations

import copy
import string
from typing import TYPE_CHECKING

from loraf.errors import Problem
from loraf.prompt_ids import prompt_ids
from loraf_serve.backends.bad_words import token_sequences
from loraf_serve.errors import InvalidRequest
from loraf_serve.request import chat
from loraf_serve.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loraf.manifest import Templates

_INPUTS = "prompt, messages or prompt_token_ids"


class PromptReader:
    """Not thread-safe, because fast tokenizers are not.

    Args:
        tokenizer: is copied.
        max_model_len: limit on prompt and answer together, in tokens.
        vocab_size: number of token ids that the model can hold, which may be fewer or more than the tokenizer has;
            None for the tokenizer's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_model_len: int, vocab_size: int | None = None):
        self._tokenizer = copy.deepcopy(tokenizer)
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size or len(tokenizer)
        self._longest_token = max(map(len, tokenizer.get_vocab()), default=1)  # characters

    def read(
        self, request: pb.GenerateRequest | pb.StreamGenerateRequest, templates: Templates | None
    ) -> tuple[int, ...]:
        """Returns the prompt's token ids: at least one, and fewer than max_model_len.

        Args:
            templates: the task's; its prompt template is applied to the prompt. None to use the prompt as it is.

        Raises:
            InvalidRequest: there is no input, it is empty or too long, an id is not in the vocabulary, the chat is
                invalid (see `chat.text_of`), or the task's template does not have exactly one field.
        """
        kind = request.WhichOneof("input")
        if kind is None:
            raise _invalid("input", "is not set", f"set {_INPUTS}")
        if kind == "prompt":
            if not request.prompt:
                raise _invalid("prompt", "is empty", "send some text")
            text = request.prompt if templates is None else fill(templates.prompt, request.prompt)
            ids = self._encode("prompt", text, templates is None or templates.special_tokens)
        elif kind == "messages":
            # The template writes the special tokens itself: a second BOS would change the answer.
            text = chat.text_of(self._tokenizer, request.messages, request.tools)
            ids = self._encode("messages", text, add_special_tokens=False)
        else:
            ids = tuple(request.prompt_token_ids.ids)
            if ids and max(ids) >= self.vocab_size:
                i = next(i for i, token in enumerate(ids) if token >= self.vocab_size)
                remedy = f"use ids from 0 to {self.vocab_size - 1}"
                raise _invalid(f"prompt_token_ids.ids[{i}]", f"{ids[i]} is not in the vocabulary", remedy)
        self.check_ids(kind, ids)
        return ids

    def check_ids(self, field: str, ids: tuple[int, ...]) -> None:
        """Raises InvalidRequest if a prompt has no token, too many, or some that the model does not have.

        Args:
            field: the prompt's.
        """
        if not ids:
            raise _invalid(field, "has no tokens", "send at least one")
        if len(ids) >= self.max_model_len:
            raise self._too_long(field, f"{len(ids)} tokens")
        self._require_known(field, ids)

    def check_chat(self, request: pb.GenerateRequest | pb.StreamGenerateRequest) -> None:
        """Raises InvalidRequest unless the model's chat template reads everything in the chat."""
        chat.read(self._tokenizer, request.messages, request.tools)

    def bad_word_tokens(self, word: str) -> list[list[int]]:
        """The sequences of tokens that a bad word excludes."""
        return token_sequences(self._tokenizer, word)

    def _require_known(self, kind: str, ids: tuple[int, ...]) -> None:
        """Refuses tokens that the tokenizer has and the model does not. Raises InvalidRequest."""
        unknown = next((token for token in ids if not 0 <= token < self.vocab_size), None)
        if unknown is not None:
            text = self._tokenizer.convert_ids_to_tokens(unknown)
            message = f"has the token {text!r} (id {unknown}), but the model's vocabulary has {self.vocab_size} tokens"
            raise _invalid(kind, message, "leave it out; the tokenizer has more tokens than the model")

    def _encode(self, field: str, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        # Text that cannot fit even in the longest tokens is refused before it is tokenized.
        fewest = -(-len(text) // self._longest_token)
        if fewest >= self.max_model_len:
            raise self._too_long(field, f"at least {fewest} tokens")
        return tuple(prompt_ids(self._tokenizer, [text], add_special_tokens)[0])

    def _too_long(self, field: str, length: str) -> InvalidRequest:
        message = f"has {length}, and the limit for prompt and answer together is {self.max_model_len}"
        return _invalid(field, message, f"send at most {self.max_model_len - 1} tokens")


def fill(template: str, prompt: str) -> str:
    """Puts `prompt` into the only field of a task's prompt template.

    Raises:
        InvalidRequest: the template has no field or several, or one that is more than a name (`{a.b}`, `{a:>9}`).
    """
    where = "apply_task_template"
    remedy = "leave apply_task_template out and send the whole prompt"
    try:
        parsed = string.Formatter().parse(template)
        parts = [(field, spec, conversion) for _, field, spec, conversion in parsed if field is not None]
    except ValueError as error:
        raise _invalid(where, f"the task's template is malformed ({error})", remedy) from None
    fields = list(dict.fromkeys(field for field, _, _ in parts))
    if len(fields) != 1:
        names = ", ".join(fields) or "none"
        raise _invalid(where, f"the task's template has {len(fields)} fields ({names}) instead of one", remedy)
    if not fields[0].isidentifier() or any(spec or conversion for _, spec, conversion in parts):
        raise _invalid(where, f"the task's template has a field that is more than a name ({fields[0]})", remedy)
    return template.format(**{fields[0]: prompt})


def _invalid(field: str, message: str, remedy: str) -> InvalidRequest:
    return InvalidRequest(Problem(message, field, remedy=remedy))
