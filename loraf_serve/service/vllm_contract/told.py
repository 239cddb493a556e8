"""Pieces of an answer → vllm.GenerateResponse, with what the request asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from loraf_serve.backends.backend import GenerationRequest
from loraf_serve.v1 import generation_pb2 as pb
from loraf_serve.vllm_proto import inference_pb2 as vllm_pb

_Finish = vllm_pb.FinishInfo.FinishReason
_REASONS = {
    pb.FINISH_REASON_STOP: _Finish.STOP,
    pb.FINISH_REASON_LENGTH: _Finish.LENGTH,
    pb.FINISH_REASON_ABORTED: _Finish.ABORTED,
}


class Told:
    """The responses to one request.

    Args:
        options: what they are to hold.
        request: the valid request.
        end_tokens: the model's own.
    """

    def __init__(self, options: vllm_pb.ResponseOptions, request: GenerationRequest, end_tokens: frozenset[int]):
        self._options = options
        self._request = request
        self._end_tokens = end_tokens
        self._with_text = options.output_text if options.HasField("output_text") else True
        self._told_prompt = False
        self._counts: dict[int, int] = {}  # by answer: tokens so far

    def responses(self, piece: pb.StreamGenerateResponse) -> Iterator[vllm_pb.GenerateResponse]:
        """Yields the responses for a piece: one for the prompt with the first piece, and one for each answer in it."""
        if not self._told_prompt:
            self._told_prompt = True
            yield vllm_pb.GenerateResponse(prompt_info=self._prompt(piece.prompt_logprobs))
        for choice in piece.choices:
            yield vllm_pb.GenerateResponse(outputs=self._output(choice, piece))

    def _prompt(self, positions: Sequence[pb.PositionLogprobs]) -> vllm_pb.PromptInfo:
        token_ids = self._request.prompt_token_ids
        info = vllm_pb.PromptInfo(num_prompt_tokens=len(token_ids))
        if self._options.prompt_token_ids:
            info.token_ids.extend(token_ids)
        if self._options.prompt_logprobs:
            _add(info, positions)
        return info

    def _output(self, choice: pb.Choice, piece: pb.StreamGenerateResponse) -> vllm_pb.SequenceOutput:
        output = vllm_pb.SequenceOutput(index=choice.index, num_tokens=len(choice.token_ids))
        self._counts[choice.index] = self._counts.get(choice.index, 0) + len(choice.token_ids)
        if self._with_text:
            output.text = choice.text
        if self._options.output_token_ids:
            output.token_ids.extend(choice.token_ids)
        if self._options.output_logprobs:
            _add(output, choice.logprobs)
        if choice.finish_reason:
            self._finish(choice, output.finish_info)
            if piece.HasField("usage"):
                output.finish_info.num_cached_tokens = piece.usage.cached_prompt_tokens
        return output

    def _finish(self, choice: pb.Choice, info: vllm_pb.FinishInfo) -> None:
        info.num_output_tokens = self._counts[choice.index]
        info.finish_reason = _REASONS[choice.finish_reason]
        if choice.finish_reason != pb.FINISH_REASON_STOP:
            return
        last = choice.token_ids[-1] if choice.token_ids else None
        if not choice.stop_reason:
            if last is not None and last in self._end_tokens:
                info.eos_token_id = last
        elif last in self._request.sampling.stop_token_ids and choice.stop_reason == str(last):
            info.stop_token_id = last
        else:
            info.stop_string = choice.stop_reason


class Joined:
    """Joins the responses of a stream with one answer into one response.

    Attributes:
        response: complete when the stream has ended.
    """

    def __init__(self) -> None:
        self.response = vllm_pb.GenerateResponse()
        self._texts: list[str] = []

    def add(self, responses: Iterable[vllm_pb.GenerateResponse]) -> None:
        """Adds the next responses."""
        for response in responses:
            self._texts.append(response.outputs.text)
            count = self.response.outputs.num_tokens
            self.response.MergeFrom(response)
            if response.HasField("outputs"):
                self.response.outputs.num_tokens = count + response.outputs.num_tokens

    def complete(self) -> vllm_pb.GenerateResponse:
        """The whole response."""
        self.response.outputs.text = "".join(self._texts)
        return self.response


def _add(into: vllm_pb.PromptInfo | vllm_pb.SequenceOutput, positions: Sequence[pb.PositionLogprobs]) -> None:
    """Adds an entry for each position. One that nothing precedes has no log-probability: it gets zeros."""
    for position in positions:
        chosen = position.chosen
        into.logprobs.append(chosen.logprob)
        into.ranks.append(chosen.rank)
        others = into.candidate_tokens.add()
        for token in position.top:
            if token.token_id != chosen.token_id:
                others.tokens.add(id=token.token_id, logprob=token.logprob, rank=token.rank)
