"""Bad words exclude the same tokens as vLLM and transformers would."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import NoBadWordsLogitsProcessor

from loraf_serve.backends.bad_words import excluded, token_sequences
from tests.loraf_serve.byte_tokenizers import TOKENIZERS
from tests.tools import needs


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("word", ["a", "ab", " a", "  ab", "a b", "é", "🙂", "a🙂", "x" * 20])
def test_words_become_the_sequences_that_vllm_makes_of_them(kind, word):
    vllm = pytest.importorskip("vllm.sampling_params", reason=needs("vLLM"))
    tokenizer = TOKENIZERS[kind]()
    tokenizer.max_token_id = len(tokenizer) - 1  # vLLM's own attribute
    params = vllm.SamplingParams(bad_words=[word])
    params.update_from_tokenizer(tokenizer)
    assert token_sequences(tokenizer, word) == params.bad_words_token_ids


@pytest.mark.parametrize("word", [" ", "   "])
def test_a_word_of_spaces_has_no_tokens(word):
    assert token_sequences(TOKENIZERS["bytes"](), word) == []


TOKENS = st.integers(0, 5)


@given(st.lists(st.lists(TOKENS, min_size=1, max_size=3), min_size=1, max_size=6), st.lists(TOKENS, max_size=8))
@settings(max_examples=300, deadline=None)
def test_the_same_tokens_are_excluded_as_in_transformers(sequences, output):
    scores = torch.zeros(1, 6)
    theirs = NoBadWordsLogitsProcessor(sequences, eos_token_id=99)(torch.tensor([output], dtype=torch.long), scores)
    assert set(excluded(sequences, output)) == set(theirs[0].isinf().nonzero().flatten().tolist())
