"""Text of answers to prompts that end anywhere, also within a character: its own, and nothing of the prompt."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from loraf_serve.backends.detokenize import TextStream
from tests.loraf_serve.byte_tokenizers import TOKENIZERS, bytes_of, ids_of

KINDS = pytest.mark.parametrize("kind", TOKENIZERS)
WITHIN_THE_SIGN = (b"\xef", b"\xef\xbf")  # the beginning of U+FFFD, which the decoded text shows as U+FFFD already


def text_of(kind: str, prompt: list[int], answer: list[int]) -> str:
    stream = TextStream(TOKENIZERS[kind](), prompt, True)
    return "".join(stream.add(token) for token in answer)


@KINDS
@given(text=st.text("ab é🙂日\ufffd", min_size=1, max_size=16), place=st.floats(0, 1))
@settings(deadline=None, max_examples=100)
def test_a_text_cut_anywhere_is_continued_with_the_characters_that_were_not_complete(kind, text, place):
    ids = ids_of(kind, text)
    end = max(1, round(place * len(ids)))
    before = bytes_of(kind, ids[:end])
    assume(not before.endswith(WITHIN_THE_SIGN))
    complete = len(before.decode(errors="ignore"))
    assert text_of(kind, ids[:end], ids[end:]) == text[complete:].rstrip("\ufffd")


@KINDS
@given(
    text=st.text("a é🙂日\ufffd", min_size=1, max_size=40), cut=st.integers(0, 5), answer=st.text("abc ", max_size=6)
)
@settings(deadline=None, max_examples=100)
def test_an_answer_that_does_not_complete_the_character_begins_with_its_own_text(kind, text, cut, answer):
    prompt = ids_of(kind, text)
    prompt = prompt[: max(1, len(prompt) - cut)]
    assert text_of(kind, prompt, ids_of(kind, "x" + answer)) == "x" + answer


@KINDS
@pytest.mark.parametrize("length", [1, 3, 64, 1023, 1024, 5000])
def test_long_prompts_of_characters_that_take_several_tokens(kind, length):
    """Only the end of a prompt is decoded, which then begins within a character."""
    for text in ("日" * length, "a" + "日" * length, "\ufffd" * length):
        assert text_of(kind, ids_of(kind, text), ids_of(kind, "b a🙂x")) == "b a🙂x"
    emoji = ids_of(kind, "日" * length + "a🙂")
    assert text_of(kind, emoji[:-1], [*emoji[-1:], *ids_of(kind, "x")]) == "🙂x"


def test_a_token_that_holds_a_space_and_the_beginning_of_an_emoji():
    prompt, last = ids_of("byte pairs", "ab 🙂"), ids_of("byte pairs", "🙂")[-1]
    assert prompt[-1] == last and len(prompt) == 4
    assert text_of("byte pairs", prompt[:-1], [last]) == "🙂"
