"""Subclasses of vLLM's serving classes: names, prompts and fingerprints come from the admitted request."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from vllm.entrypoints.generate.base.serving import format_token_id_placeholder
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionLogProbs, CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.inputs import EngineInput, tokens_input
from vllm.logprobs import Logprob
from vllm.lora.request import LoRARequest
from vllm.renderers.chat_utils import ConversationMessage
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.tokenizers import TokenizerLike

from loraf_serve.vllm.http.admitted import ADMITTED

_LEAST = -9999.0  # as vLLM writes -inf, which JSON does not have


class AdmittedModels(OpenAIServingModels):
    """The only model is the one that the admitted request names: the service has resolved it."""

    def is_base_model(self, model_name: str) -> bool:
        return model_name == ADMITTED.get().model

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        return ADMITTED.get().model


class AdmittedRenderer(OnlineRenderer):
    """Prompts of completions, and chats in a task's own template, are token ids already. Other chats are rendered by
    vLLM, and then validated."""

    async def render_completion(
        self, request: CompletionRequest, *, skip_mm_cache: bool = False
    ) -> list[EngineInput] | ErrorResponse:
        admitted = ADMITTED.get()
        tokenizer = self.renderer.get_tokenizer()
        admitted.inputs = []
        for asked, text in zip(admitted.requests, admitted.texts, strict=True):
            ids = list(asked.prompt_token_ids)
            if request.echo and text is None:
                text = tokenizer.decode(ids)
            admitted.inputs.append(tokens_input(ids, prompt=text, cache_salt=request.cache_salt))
        return admitted.inputs

    async def render_chat(
        self, request: ChatCompletionRequest, *, skip_mm_cache: bool = False
    ) -> tuple[list[ConversationMessage], list[EngineInput]] | ErrorResponse:
        admitted = ADMITTED.get()
        if admitted.requests:
            ids = list(admitted.requests[0].prompt_token_ids)
            admitted.inputs = [tokens_input(ids, cache_salt=request.cache_salt)]
            return [], admitted.inputs
        rendered = await super().render_chat(request, skip_mm_cache=skip_mm_cache)
        if isinstance(rendered, ErrorResponse):
            return rendered
        conversation, inputs = rendered
        try:
            admitted.requests = [admitted.rendered(self._token_ids(given)) for given in inputs]
        except Exception as error:
            raise admitted.failed(error) from None
        admitted.inputs = inputs
        return conversation, inputs

    def _token_ids(self, given: EngineInput) -> list[int]:
        assert given["type"] == "token", "only texts are admitted"
        ids: list[int] = given["prompt_token_ids"]
        return ids


class _Fingerprint:
    """An attribute that vLLM sets once for each server, and that here names what answers the request."""

    def __get__(self, instance: object, owner: type) -> str:
        return ADMITTED.get().fingerprint

    def __set__(self, instance: object, value: object) -> None:
        """vLLM's own value is of no use here."""


class AdmittedCompletion(OpenAIServingCompletion):
    """Completions of the admitted request."""

    system_fingerprint: Any = _Fingerprint()

    def _create_completion_logprobs(
        self,
        token_ids: Sequence[int],
        top_logprobs: Sequence[dict[int, Logprob] | None],
        num_output_top_logprobs: int,
        tokenizer: TokenizerLike | None,
        logprob_token_ids: list[int] | None = None,
        initial_text_offset: int = 0,
        return_as_token_id: bool | None = None,
    ) -> CompletionLogProbs:
        """As vLLM's, with a name of its own for each of the most likely tokens: parts of characters have no text, and
        all but one would be lost in an object of JSON."""
        result = super()._create_completion_logprobs(
            token_ids,
            top_logprobs,
            num_output_top_logprobs,
            tokenizer,
            logprob_token_ids,
            initial_text_offset,
            return_as_token_id,
        )
        if return_as_token_id:
            return result
        for i, entries in enumerate(top_logprobs):
            if entries is None:
                continue
            shown = entries if logprob_token_ids else dict(islice(entries.items(), num_output_top_logprobs + 1))
            names: dict[str, float] = {}
            for token, entry in shown.items():
                text = entry.decoded_token
                name = text if text and text not in names else format_token_id_placeholder(token)
                names[name] = max(entry.logprob, _LEAST)
                if token == token_ids[i]:
                    result.tokens[i] = name
            result.top_logprobs[i] = names
        return result


class AdmittedChat(OpenAIServingChat):
    """Chat completions of the admitted request."""

    system_fingerprint: Any = _Fingerprint()
