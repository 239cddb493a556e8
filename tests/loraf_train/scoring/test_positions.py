"""Answers of a model with a table of positions end with the table, and padding stays within the embedding."""

from __future__ import annotations

import torch

from loraf_train.scoring.evaluate import generate_ids
from tests.loraf_train.adapter.test_probe import gpt2
from tests.standins import byte_tokenizer


def plainly(model, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding, one sequence at a time, without a cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def test_answers_use_all_positions_and_no_more():
    torch.manual_seed(3)
    model = gpt2().eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.3)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token_id = 60  # beyond the 40 rows of the embedding
    tokenizer.eos_token_id = 61  # never produced, so that every answer takes all the room that it has
    model.generation_config.eos_token_id = None
    prompts = [[5, 6, 7], [8] * 20, [9] * 24]
    answers = generate_ids(model, tokenizer, prompts, 8)
    assert answers == [plainly(model, prompt, count) for prompt, count in zip(prompts, (8, 5, 1), strict=True)]
