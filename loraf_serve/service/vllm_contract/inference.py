"""vllm.Inference."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, nullcontext

from loraf_serve.adapters.registry import Registry
from loraf_serve.backends.backend import GenerationRequest
from loraf_serve.observe.call import Call, current
from loraf_serve.security.allowance import Allowance
from loraf_serve.security.permissions import Permissions
from loraf_serve.service.answering import Question, answer
from loraf_serve.service.generations import Generations
from loraf_serve.service.outbox import Outbox
from loraf_serve.service.refusal import Context, Refusal, abort, refusal_of
from loraf_serve.service.server_options import ServerOptions
from loraf_serve.service.vllm_contract import asked
from loraf_serve.service.vllm_contract.asked import Asked
from loraf_serve.service.vllm_contract.running import RunningRequest, RunningRequests
from loraf_serve.service.vllm_contract.told import Joined, Told
from loraf_serve.v1 import generation_pb2 as pb
from loraf_serve.vllm_proto import inference_pb2 as vllm_pb
from loraf_serve.vllm_proto import inference_pb2_grpc

_Tell = Callable[[Iterable[vllm_pb.GenerateResponse]], Awaitable[None]]


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Generate and GenerateStream.

    Args:
        running: gets the requests that run.
    """

    def __init__(self, generations: Generations, options: ServerOptions, running: RunningRequests):
        self._generations = generations
        self._options = options
        self._running = running

    async def Generate(self, request: vllm_pb.GenerateRequest, context: Context) -> vllm_pb.GenerateResponse:
        joined = Joined()

        async def tell(responses: Iterable[vllm_pb.GenerateResponse]) -> None:
            joined.add(responses)

        refusal = await self._answer(request, context, tell, nullcontext(), is_stream=False)
        if refusal:
            await abort(context, refusal)
        return joined.complete()

    async def GenerateStream(self, request: vllm_pb.GenerateRequest, context: Context) -> None:
        outbox = Outbox[vllm_pb.GenerateResponse](context.write)

        async def tell(responses: Iterable[vllm_pb.GenerateResponse]) -> None:
            for response in responses:
                await outbox.put(response)

        refusal = await self._answer(request, context, tell, outbox, is_stream=True)
        if refusal:
            await abort(context, refusal)

    async def _answer(
        self,
        request: vllm_pb.GenerateRequest,
        context: Context,
        tell: _Tell,
        sending: AbstractAsyncContextManager[object],
        is_stream: bool,
    ) -> Refusal | None:
        """Passes the responses to `tell`, within `sending`. Returns the status if anything is wrong."""
        call = current()
        try:
            read = asked.read(request, self._options.model, is_stream, call.metadata)
        except Exception as error:
            return refusal_of(error, call.request_id)
        with self._running.entered(request.request_id, call.client) as entry:
            return await self._answer_read(read, entry, context, tell, sending)

    async def _answer_read(
        self,
        read: Asked,
        entry: RunningRequest,
        context: Context,
        tell: _Tell,
        sending: AbstractAsyncContextManager[object],
    ) -> Refusal | None:
        told: Told

        async def validated(registry: Registry, permissions: Permissions) -> GenerationRequest:
            nonlocal told
            read.name.select(read.request, registry, permissions)
            valid = await self._generations.validated(read.request, registry, permissions)
            told = Told(read.response, valid, self._generations.backend.end_tokens)
            return valid

        def pieces(
            valid: GenerationRequest, call: Call, allowance: Allowance
        ) -> AsyncGenerator[pb.StreamGenerateResponse]:
            return entry.pieces(self._generations.pieces(valid, call, allowance), valid.sampling.n)

        async def emit(piece: pb.StreamGenerateResponse) -> None:
            await tell(told.responses(piece))

        question = Question(read.name.adapter, validated, lambda: read.prompt, asked.shown, pieces)
        return await answer(self._generations, self._options.default_deadline, question, context, emit, sending)
