"""How a vLLM engine makes text of tokens in the service's process, where vLLM's own way is not good enough.

vLLM repeats a prompt that ends within a character in the answer, and stop texts that stand in the prompt then end it.
One loop makes the text of all answers, and an exception in it ends the engine for everybody.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from loraf_serve.backends.detokenize import TextStream

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestOutputCollector


def install(engine: AsyncLLM) -> None:
    """Changes how the text of each answer to come is made.

    - Its text continues the prompt as the merged backend's does, unless the tokenizer is not a fast one.
    - The texts of single tokens, with log-probabilities, are left to `convert`: vLLM's function raises for tokens that
      the model has and the tokenizer has not.
    - An exception ends this request alone.
    """
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    processor, tokenizer = engine.output_processor, cast("PreTrainedTokenizerBase", engine.get_tokenizer())
    stock = processor.add_request

    def add_request(request: EngineCoreRequest, *args: Any, **kwargs: Any) -> None:
        stock(request, *args, **kwargs)
        state = processor.request_states[request.request_id]
        detokenizer: Any = state.detokenizer
        logprobs: Any = state.logprobs_processor
        if isinstance(detokenizer, FastIncrementalDetokenizer):
            text = TextStream(tokenizer, request.prompt_token_ids or (), detokenizer.skip_special_tokens)
            detokenizer.stream = _Stream(text)  # type: ignore[assignment]  # has the only method that vLLM calls
        logprobs.tokenizer = None
        detokenizer.update = _guarded(detokenizer.update, state.queue)
        logprobs.update_from_output = _guarded(logprobs.update_from_output, state.queue)

    processor.add_request = add_request  # type: ignore[method-assign]  # vLLM has no setting for it


class _Stream:
    """A TextStream with the interface of tokenizers' DecodeStream."""

    def __init__(self, text: TextStream):
        self._text = text

    def step(self, _tokenizer: Tokenizer, token: int) -> str:
        return self._text.add(token)


def _guarded(method: Callable[..., Any], queue: RequestOutputCollector | None) -> Callable[..., Any]:
    """The method, which passes an exception to the request's reader instead of raising it."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            if queue is None:
                raise
            queue.put(error)
            return None

    return call
