"""Calls of a campaign through grpc.aio, and what came of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraf_serve.client import request_of
from loraf_serve.v1 import adapter_pb2_grpc, generation_pb2_grpc
from loraf_serve.v1 import generation_pb2 as pb

NEVER = ("INTERNAL", "UNKNOWN")
"""Codes that no client may ever see."""


@dataclass
class Outcome:
    """What came of a call.

    Attributes:
        code: name of the status.
        message: the status's text.
        fields: those that its details name.
        debug: what grpc's core says of it.
        text, token_ids: of the first choice.
        finished: the answer has a finish reason.
        first, seconds: from the start to the first piece and to the end.
    """

    code: str = "OK"
    message: str = ""
    fields: tuple[str, ...] = ()
    debug: str = ""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cached: int = 0
    finished: bool = False
    first: float | None = None
    seconds: float = 0.0

    def add(self, response: pb.GenerateResponse | pb.StreamGenerateResponse) -> None:
        """Adds a response, or a piece of one."""
        for choice in response.choices:
            if choice.index == 0:
                self.text += choice.text
                self.token_ids += choice.token_ids
            self.finished = self.finished or choice.finish_reason != pb.FINISH_REASON_UNSPECIFIED
        self.cached = max(self.cached, response.usage.cached_prompt_tokens)

    def refuse(self, error: aio.AioRpcError) -> None:
        """Adds the status that ended the call."""
        self.code, self.message = error.code().name, error.details() or ""
        self.fields = fields_of(error.trailing_metadata() or ())
        self.debug = error.debug_error_string()


def fields_of(metadata: Iterable[tuple[str, bytes | str]]) -> tuple[str, ...]:
    """The fields that the details of a status name."""
    details = next((value for key, value in metadata if key == "grpc-status-details-bin"), b"")
    assert isinstance(details, bytes)
    violations = error_details_pb2.BadRequest()
    for detail in status_pb2.Status.FromString(details).details:
        if detail.Unpack(violations):
            return tuple(violation.field for violation in violations.field_violations)
    return ()


class Caller:
    """The stubs of one channel."""

    def __init__(self, address: str, options: Iterable[tuple[str, int | str]] = ()):
        # Otherwise grpc joins channels to one address into one connection.
        alone = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        self.channel = aio.insecure_channel(address, options=[*alone, ("grpc.enable_retries", 0), *options])
        self.generation = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.adapters = adapter_pb2_grpc.AdapterServiceStub(self.channel)
        self._health = health_pb2_grpc.HealthStub(self.channel)

    async def generate(self, request: pb.GenerateRequest, timeout: float | None = None) -> Outcome:
        """Calls Generate."""
        outcome, began = Outcome(), time.perf_counter()
        try:
            outcome.add(await self.generation.Generate(request, timeout=timeout))
        except aio.AioRpcError as error:
            outcome.refuse(error)
        outcome.seconds = time.perf_counter() - began
        return outcome

    async def stream(
        self, request: pb.StreamGenerateRequest, timeout: float | None = None, cancel_after: int | None = None
    ) -> Outcome:
        """Calls StreamGenerate.

        Args:
            cancel_after: cancels the call after so many pieces.
        """
        outcome, began = Outcome(), time.perf_counter()
        call = self.generation.StreamGenerate(request, timeout=timeout)
        try:
            pieces = 0
            async for piece in call:
                outcome.first = outcome.first or time.perf_counter() - began
                outcome.add(piece)
                pieces += 1
                if pieces == cancel_after:
                    call.cancel()
                    outcome.code = "CANCELLED"
                    break
        except aio.AioRpcError as error:
            outcome.refuse(error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            outcome.code = "CANCELLED"  # the call's own cancellation
        outcome.seconds = time.perf_counter() - began
        return outcome

    async def call(self, stub: str, request: Message, timeout: float | None = None) -> Outcome:
        """Calls a method of AdapterService."""
        outcome = Outcome()
        try:
            await getattr(self.adapters, stub)(request, timeout=timeout)
        except aio.AioRpcError as error:
            outcome.refuse(error)
        return outcome

    async def health(self) -> str:
        """The status of the whole server, or the code of the error."""
        try:
            response = await self._health.Check(health_pb2.HealthCheckRequest(), timeout=10)
        except aio.AioRpcError as error:
            return error.code().name
        return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)

    async def close(self) -> None:
        await self.channel.close()


def stream_request(request: pb.GenerateRequest) -> pb.StreamGenerateRequest:
    """The same request for the other method: their fields are equal."""
    return pb.StreamGenerateRequest.FromString(request.SerializeToString())


def control() -> pb.GenerateRequest:
    """A request whose answer is known from before: the base model, greedy."""
    return request_of(
        pb.GenerateRequest,
        prompt_token_ids=[1, 5, 9],
        adapter="trio",
        tasks=["math"],
        temperature=0,
        max_tokens=12,
        ignore_eos=True,
    )


async def is_well(caller: Caller, known: Outcome) -> list[str]:
    """What is wrong with the server: nothing if it serves, and answers `control` as before."""
    health = await caller.health()
    faults = [] if health == "SERVING" else [f"health is {health}"]
    answer = await caller.generate(control(), timeout=60)
    if (answer.code, answer.token_ids) != ("OK", known.token_ids):
        faults.append(f"the known request is answered with {answer.code} {answer.message} {answer.token_ids}")
    return faults
