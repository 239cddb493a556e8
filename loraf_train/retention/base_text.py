"""The text that stands for the base model's own skills: records that the user names, or text that the model writes.

Torch is imported only to write, so that `check` can read and refuse before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from loraf.errors import ConfigError, Problem
from loraf_train.data.examples import Example
from loraf_train.data.general import general_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from loraf_train.settings.data import RecordSource

FIELD = "retention.base"
SELF = "self"  # in place of a source: the model writes the text
LONGEST = 512  # tokens of an example that is read; a longer text is divided
SEQUENCES, NEW_TOKENS = 128, 64  # that the model writes, and the most tokens of each
_AT_ONCE = 32  # sequences


def read(
    source: RecordSource, tokenizer: PreTrainedTokenizerBase, context: int | None, vocabulary: int
) -> list[Example]:
    """Reads general text of the user's.

    Args:
        context: the model's longest sequence, in tokens; None: no limit.
        vocabulary: rows of its embedding.

    Raises:
        ConfigError: see `general_examples`; or a token is beyond the embedding.
    """
    examples = general_examples(source, tokenizer, min(LONGEST, context or LONGEST))
    highest = max(max(example.input_ids) for example in examples)
    if highest >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(highest)
        message = f"has the token {token!r} with id {highest}, but the model's embedding has {vocabulary} rows"
        remedy = "use the tokenizer that belongs to the model, or take the token out of the records"
        raise ConfigError(Problem(message, "", str(source), remedy))
    return [replace(example, prompt_length=max(1, example.prompt_length)) for example in examples]


def sharded_problem(file: str) -> Problem:
    """The problem of a model that should write text while it is sharded: all processes would have to draw alike."""
    return Problem("a model that FSDP shards cannot write text", FIELD, file, "name a file of general text")


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pad_id: int, seed: int) -> list[Example]:
    """Returns text that the model writes after its beginning-of-sequence token, or after an end if it has none.

    Tokens are drawn as the model predicts them (temperature 1). The same seed gives the same text on one machine.
    """
    import torch

    from loraf_train.adapter import model_limits
    from loraf_train.trainer.order import derived_seed

    rows, context = model_limits.vocabulary(model), model_limits.context(model)
    begins = (tokenizer.bos_token_id, tokenizer.eos_token_id, pad_id)
    begin = next(i for i in begins if i is not None and i < rows)
    end = tokenizer.eos_token_id
    length = 1 + min(NEW_TOKENS, (context or NEW_TOKENS + 1) - 1)
    examples = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derived_seed(seed, "text of the base"))
        for rows_of_batch in _sequences(model, begin, end, pad_id, length):
            for ids in rows_of_batch:
                ended = ids.index(end, 1) + 1 if end in ids[1:] else len(ids)
                examples.append(Example(ids[:ended], 1))
    return examples


def _sequences(
    model: PreTrainedModel, begin: int, end: int | None, pad_id: int, length: int
) -> Iterator[list[list[int]]]:
    """Yields batches of drawn sequences of `length` tokens; what follows an end is padding."""
    import torch
    from transformers import GenerationConfig

    before, was_training = model.generation_config, model.training
    # `generate` would take the rest from the model's own config.
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]  # of transformers
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_beams=1,
        eos_token_id=end,
        pad_token_id=pad_id,
        max_length=length,
        use_cache=True,
    )
    model.train(False)
    try:
        for _ in range(0, SEQUENCES, _AT_ONCE):
            ids = torch.full((_AT_ONCE, 1), begin, device=model.device)
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))  # type: ignore[operator]  # of transformers
            yield out.tolist()
    finally:
        model.generation_config = before
        model.train(was_training)
